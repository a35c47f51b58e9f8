"""The layers a model is a stack of: what is sharded apart, and what is computed twice to save memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cepo.errors import InputError


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a transformers model, first to last. Raises InputError for a model without any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise InputError(f"policy.model: expected a stack of transformers' layers, got {type(model).__name__}")
    return found


def checkpoint_layers(model: Any) -> None:
    """Keep of each layer its input alone, and run it again in the backward pass.

    Not by the model's own switch, which asks for the training mode, and with it for dropout and for no cache.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(_run, layer)  # a copy of the model gets its own: partial is copied with what it holds


def _run(layer: Any, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():
        return forward(layer, *args, **kwargs)
    return checkpoint(forward, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
