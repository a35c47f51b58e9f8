"""How does the policy move? `f(logprobs, old_logprobs, advantages, token_weights, **options) -> Loss`.

Each member is a module with a function of its own name, which defines it, and `SURROGATE`, what the fused kernel behind
`cepo_kernels.contrastive_policy_loss` calls it; the trainer runs that. All tensors are (N,), one per response token.
`SUPERVISION` names what the loss is told of a problem beside the advantage.

A distillation has no advantage but a teacher: `f(student_logits, teacher_logits, token_weights, ratio, op=divergence,
**options) -> Distilled`, the options those of `cepo_kernels.divergence`. Logits are (N, V). Its module has no
`SURROGATE`; it says

    TEACHER_CONTEXT    what the teacher may be told, among "solution", "sibling", "feedback" (`cepo.distil`), best first
    TEACHER, DIVERGENCE, TOP_K, AVERAGE    as published: `loss.teacher`, `loss.divergence`, `loss.top_k`, `loss.average`
    USES_RATIO         whether it reads the ratio of a batch's later updates
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cepo.errors import InputError

AVERAGES = ("token", "sequence", "constant")


class Loss(NamedTuple):
    """A member's result: the scalar, differentiable; and for each token its ratio and whether the clip held it."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class Distilled(NamedTuple):
    """A distillation's result: (N,) each token's share of the loss, differentiable, and whether its ratio was held."""

    shares: Tensor
    clipped: Tensor | None


def token_weights(lengths: Tensor, average: str, max_length: int) -> Tensor:
    """Weight of each token of every rollout, (B,) float32, so that a weighted sum is the average over the batch.

    Args:
        lengths: (B,) response tokens of every rollout of the batch, those without a gradient included.
        average: "token": all tokens alike; "sequence": all rollouts alike; "constant": all rollouts alike, each
            divided by `max_length` instead of its own length (Dr. GRPO, arXiv 2503.20783).
    """
    if average not in AVERAGES:
        raise InputError(f"loss.average: expected one of {', '.join(AVERAGES)}, got {average!r}")
    rollouts = lengths.numel()
    if average == "token":
        return torch.ones_like(lengths, dtype=torch.float32) / lengths.sum().clamp(min=1)
    if average == "sequence":
        return 1 / (lengths.clamp(min=1).float() * rollouts)
    return torch.full_like(lengths, 1 / (max_length * max(rollouts, 1)), dtype=torch.float32)
