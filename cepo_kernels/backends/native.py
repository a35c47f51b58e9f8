"""Tensors and options as csrc reads them: addresses, dtypes, strides and numbers, in the tuples of csrc/tuples.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rows import (
    BackwardInputs,
    DivergenceInputs,
    DivergenceOutputs,
    ForwardInputs,
    ForwardOutputs,
    RowOptions,
)

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0, 0, 0)


def fresh_bytes(gradient: Tensor | None, logits: Tensor) -> int:
    """Bytes of a gradient that has memory of its own, in one piece."""
    fresh = gradient is not None and gradient.data_ptr() != logits.data_ptr() and gradient.is_contiguous()
    return gradient.nbytes if fresh and gradient is not None else 0


def shape(logits: Tensor) -> tuple[int, int, int]:
    outer, inner, vocabulary = logits.shape
    return outer * inner, inner, vocabulary


def call(inputs: ForwardInputs, outputs: ForwardOutputs) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The tensor that must outlive the call, and a forward's tensors and options as the kernel reads them."""
    row_temperature, numbers = options(inputs.options)
    return row_temperature, (
        logits(inputs.policy),
        logits(inputs.positive),
        logits(inputs.negative),
        inputs.labels.data_ptr(),
        address(inputs.advantages),
        address(inputs.negative_mask),
        float(inputs.lam),
        float(inputs.eps_w),
        numbers,
        tuple(address(buffer) for buffer in outputs),
    )


def backward_call(inputs: BackwardInputs, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """A backward's tensors, and the options that `options` made of its own."""
    return (
        logits(inputs.gradient),
        logits(inputs.policy),
        inputs.labels.data_ptr(),
        address(inputs.grad_logprobs),
        address(inputs.grad_entropy),
        inputs.logprobs.data_ptr(),
        address(inputs.entropy),
        inputs.stats.data_ptr(),
        numbers,
    )


def divergence_call(inputs: DivergenceInputs, outputs: DivergenceOutputs) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The tensor that must outlive the call, and a divergence's tensors and options as the kernel reads them."""
    row_temperature, numbers = options(inputs.options)
    return row_temperature, (
        logits(inputs.student),
        logits(inputs.teacher),
        logits(outputs.gradient),
        address(inputs.weight),
        KINDS[inputs.kind],
        inputs.beta,
        math.inf if inputs.clip is None else inputs.clip,
        inputs.top_k or 0,
        numbers,
        outputs.values.data_ptr(),
    )


def logits(tensor: Tensor | None) -> tuple[int, int, int, int]:
    if tensor is None:
        return ABSENT
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def options(given: RowOptions) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The tensor that must outlive the call, and the tuple that the kernel reads."""
    per_row = None if given.temperature.ndim == 0 else given.temperature.double().contiguous()
    cap = given.logit_softcap
    return per_row, (
        address(per_row),
        float(given.temperature) if per_row is None else 1.0,
        float(given.logit_scale),
        0.0 if cap is None else float(cap),
        given.ignore_index,
    )
