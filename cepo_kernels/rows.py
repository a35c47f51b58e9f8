"""From the tensors of a call to the rows that a backend sees: collapsed leading dimensions, broadcast row values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor


class RowOptions(NamedTuple):
    """What every row of a call shares. ``temperature`` is 0-d or (N,), everything else 0-d; any device."""

    temperature: Tensor
    logit_scale: Tensor
    logit_softcap: Tensor | None
    ignore_index: int


class ForwardInputs(NamedTuple):
    """Inputs of a backend's forward over N = O * I rows. Logits are (O, I, V), last stride 1, any other strides."""

    policy: Tensor
    positive: Tensor | None
    negative: Tensor | None
    labels: Tensor  # (N,) int64, contiguous
    advantages: Tensor | None  # (N,) output dtype, contiguous
    negative_mask: Tensor | None  # (N,) bool, contiguous
    lam: Tensor  # 0-d
    eps_w: Tensor  # 0-d
    options: RowOptions

    def contexts(self) -> list[Tensor]:
        """The logits that are there."""
        return [x for x in (self.policy, self.positive, self.negative) if x is not None]


class ForwardOutputs(NamedTuple):
    """Contiguous buffers of N values that a backend's forward fills, in whatever shape; empty where not asked for.

    float32 (float64 for float64 logits). ``stats``, N times 4, is the backend's own note to its backward.
    """

    logprobs: Tensor
    positive_logprobs: Tensor
    negative_logprobs: Tensor
    evidence: Tensor
    weight: Tensor
    advantages: Tensor
    entropy: Tensor
    stats: Tensor


class BackwardInputs(NamedTuple):
    """Inputs of a backend's backward. ``gradient`` (O, I, V) is written, and may be the memory of ``policy``."""

    gradient: Tensor
    policy: Tensor
    labels: Tensor  # (N,) int64
    grad_logprobs: Tensor | None  # (N,) output dtype
    grad_entropy: Tensor | None  # (N,) output dtype
    logprobs: Tensor  # (N,) as the forward returned it
    entropy: Tensor  # (N,), or empty when the forward was not asked for it
    stats: Tensor  # (N, 4)
    options: RowOptions


class LossInputs(NamedTuple):
    """Inputs of a backend's fused policy loss. Rows with advantage 0 are idle unless a KL or entropy term acts."""

    forward: ForwardInputs  # its advantages are there
    old_logprobs: Tensor | None  # (N,) output dtype; None: the policy's own
    token_weight: Tensor | None  # (N,) output dtype
    ref_logprobs: Tensor | None  # (N,) output dtype
    surrogate: str  # "ppo" or "cispo"
    numbers: tuple[
        Tensor, Tensor, Tensor, Tensor, Tensor
    ]  # 0-d: clip_low, clip_high, kl_coef, entropy_coef, denominator


class LossOutputs(NamedTuple):
    """Buffers of N values that a backend's fused loss fills; ``forward.stats`` is empty."""

    forward: ForwardOutputs
    losses: Tensor  # not divided by the denominator
    ratio: Tensor
    clipped: Tensor  # bool
    gradient: Tensor | None  # (O, I, V) of the policy's dtype, divided by the denominator; None: none wanted


class DivergenceInputs(NamedTuple):
    """Inputs of a backend's divergence over N = O * I rows; what stands in ``options.ignore_index`` means nothing."""

    student: Tensor  # (O, I, V), last stride 1, any other strides
    teacher: Tensor
    weight: Tensor | None  # (N,) output dtype: a factor of the row's value and gradient; 0: the row is not read
    kind: str  # "forward_kl", "reverse_kl" or "jsd"
    beta: float  # the teacher's share of a jsd's mixture, within (0, 1)
    clip: float | None  # from above, of an entry's term
    top_k: int | None  # below V - 1; None: every column is an entry
    options: RowOptions


class DivergenceOutputs(NamedTuple):
    """What a backend's divergence fills, weights included."""

    values: Tensor  # (N,), float32 (float64 for float64 logits)
    gradient: Tensor | None  # (O, I, V) in the student's logits and dtype, possibly their memory; None: none wanted


@overload
def row_values(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...
@overload
def row_values(value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None: ...
def row_values(value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """One value per row: ``value`` (0-d, or broadcastable dimension by dimension) as a contiguous (N,) of ``dtype``."""
    if value is None:
        return None
    return value.detach().to(dtype).expand(shape).reshape(-1).contiguous()


def top_k_threshold(logits: Tensor, top_k: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Of each row the ``top_k``-th largest logit, float32, and how many of those that equal it are among the ``top_k``,
    int32: what a kernel needs to tell them, the first of equals before the others."""
    if top_k is None:
        return None, None
    largest = logits.topk(top_k, dim=-1, sorted=False).values
    threshold = largest.amin(-1, keepdim=True)
    return threshold.float(), (largest == threshold).sum(-1, dtype=torch.int32)


def blocks(tensors: list[Tensor | None]) -> Iterator[tuple[slice | None, list[Tensor | None]]]:
    """Views (O, I, V) of tensors (..., V) of one shape, without a copy, and the slice of rows each covers; None: all.

    Up to two leading dimensions need nothing. Of more, adjacent ones are merged where the strides of all tensors allow
    it, and whatever is left beyond two is walked over here, which no usual layout needs.
    """
    (*leading, vocabulary) = next(tensor.shape for tensor in tensors if tensor is not None)
    if len(leading) <= 2:
        missing = (None,) * (2 - len(leading))
        yield None, [None if tensor is None else tensor[missing] for tensor in tensors]
        return
    present = [tensor for tensor in tensors if tensor is not None]
    merged: list[int] = []
    merged_strides: list[list[int]] = [[] for _ in present]
    for axis, size in enumerate(leading):
        strides = [tensor.stride(axis) for tensor in present]
        if merged and all(ms[-1] == stride * size for ms, stride in zip(merged_strides, strides, strict=True)):
            merged[-1] *= size
            for ms, stride in zip(merged_strides, strides, strict=True):
                ms[-1] = stride
        elif size > 1:
            merged.append(size)
            for ms, stride in zip(merged_strides, strides, strict=True):
                ms.append(stride)
    while len(merged) < 2:
        merged.insert(0, 1)
        for ms in merged_strides:
            ms.insert(0, 0)
    views = iter(
        tensor.as_strided((*merged, vocabulary), (*ms, 1)) for tensor, ms in zip(present, merged_strides, strict=True)
    )
    whole = [None if tensor is None else next(views) for tensor in tensors]
    *walked, outer, inner = merged
    for number, index in enumerate(itertools.product(*map(range, walked))):
        rows = slice(number * outer * inner, (number + 1) * outer * inner)
        yield rows, [None if tensor is None else tensor[index] for tensor in whole]
