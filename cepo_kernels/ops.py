"""The ops as `torch.library` knows them: three, with shapes for `torch.compile` and a first-order gradient.

``forward`` gives everything a call can ask for (an empty tensor stands for what it did not), ``logits_grad`` the
gradient of the policy's logits from two (N,) upstream gradients, ``logits_grad_`` the same over the logits' memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_values
from .rows import BackwardInputs, ForwardInputs, ForwardOutputs, RowOptions, blocks, row_values

STATS = 4

_OPTIONS = "Tensor temperature, Tensor logit_scale, Tensor? logit_softcap, int ignore_index"
_BACKWARD = (
    "Tensor labels, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logprobs, Tensor entropy, Tensor stats, "
    f"{_OPTIONS}, str backend"
)
_library = torch.library.Library("cepo_kernels", "DEF")
_library.define(
    "forward(Tensor policy, Tensor? positive, Tensor? negative, Tensor labels, Tensor? advantages, "
    f"Tensor? negative_mask, Tensor lam, Tensor eps_w, {_OPTIONS}, bool return_entropy, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"logits_grad(Tensor policy, {_BACKWARD}) -> Tensor")
_library.define(f"logits_grad_(Tensor(a!) policy, {_BACKWARD}) -> ()")

forward = torch.ops.cepo_kernels.forward.default
logits_grad = torch.ops.cepo_kernels.logits_grad.default
logits_grad_ = torch.ops.cepo_kernels.logits_grad_.default


def _forward_buffers(
    policy: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    labels: Tensor,
    advantages: Tensor | None,
    *others: Any,
) -> ForwardOutputs:
    """Unfilled outputs in the labels' shape; also what `torch.compile` is told the op returns."""
    return_entropy = others[-2]
    logits = (policy, positive, negative)
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in logits)
    dtype = torch.float64 if wide else torch.float32

    def rows(wanted: bool) -> Tensor:
        return torch.empty(labels.shape if wanted else (0,), dtype=dtype, device=policy.device)

    return ForwardOutputs(
        logprobs=rows(True),
        positive_logprobs=rows(positive is not None),
        negative_logprobs=rows(negative is not None),
        evidence=rows(positive is not None),
        weight=rows(positive is not None and advantages is not None),
        advantages=rows(advantages is not None),
        entropy=rows(return_entropy),
        # Zeros: a backend leaves an ignored row's as they are.
        stats=torch.zeros((labels.numel(), STATS), dtype=torch.float32, device=policy.device),
    )


def _forward(
    policy: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    labels: Tensor,
    advantages: Tensor | None,
    negative_mask: Tensor | None,
    lam: Tensor,
    eps_w: Tensor,
    temperature: Tensor,
    logit_scale: Tensor,
    logit_softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
    backend: str,
) -> ForwardOutputs:
    outputs = _forward_buffers(policy, positive, negative, labels, advantages, return_entropy, backend)
    chosen = backends.choose(backend, policy.device.type, outputs.logprobs.dtype)
    check_values(labels, ignore_index, lam, eps_w, temperature, logit_scale, logit_softcap)
    if labels.numel() == 0:
        return outputs
    flat_labels = row_values(labels, labels.shape, torch.int64)
    flat_advantages = row_values(advantages, labels.shape, outputs.logprobs.dtype)
    flat_mask = row_values(negative_mask, labels.shape, torch.bool)
    temperature = _row_temperature(temperature, labels)
    for rows, (policy_rows, positive_rows, negative_rows) in blocks([policy, positive, negative]):
        assert policy_rows is not None
        assert flat_labels is not None
        chosen.forward(
            ForwardInputs(
                policy_rows,
                positive_rows,
                negative_rows,
                _part(flat_labels, rows),
                None if flat_advantages is None else _part(flat_advantages, rows),
                None if flat_mask is None else _part(flat_mask, rows),
                lam,
                eps_w,
                RowOptions(_part(temperature, rows), logit_scale, logit_softcap, ignore_index),
            ),
            outputs if rows is None else _part_of(outputs, rows),
        )
    return outputs


def _write_gradient(
    gradient: Tensor,
    policy: Tensor,
    labels: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    stats: Tensor,
    temperature: Tensor,
    logit_scale: Tensor,
    logit_softcap: Tensor | None,
    ignore_index: int,
    backend: str,
) -> None:
    if labels.numel() == 0:
        return
    chosen = backends.choose(backend, policy.device.type, logprobs.dtype)
    flat_labels = row_values(labels, labels.shape, torch.int64)
    flat_logprobs_grad = row_values(grad_logprobs, labels.shape, logprobs.dtype)
    flat_entropy_grad = row_values(grad_entropy, labels.shape, logprobs.dtype)
    temperature = _row_temperature(temperature, labels)
    for rows, (gradient_rows, policy_rows) in blocks([gradient, policy]):
        assert gradient_rows is not None
        assert policy_rows is not None
        assert flat_labels is not None
        chosen.backward(
            BackwardInputs(
                gradient_rows,
                policy_rows,
                _part(flat_labels, rows),
                None if flat_logprobs_grad is None else _part(flat_logprobs_grad, rows),
                None if flat_entropy_grad is None else _part(flat_entropy_grad, rows),
                _part(logprobs, rows),
                _part(entropy, rows),
                stats if rows is None else stats[rows],
                RowOptions(_part(temperature, rows), logit_scale, logit_softcap, ignore_index),
            )
        )


def _logits_grad(policy: Tensor, *rest: Any) -> Tensor:
    gradient = torch.empty(policy.shape, dtype=policy.dtype, device=policy.device)
    _write_gradient(gradient, policy, *rest)
    return gradient


def _logits_grad_in_place(policy: Tensor, *rest: Any) -> None:
    _write_gradient(policy, policy, *rest)
    torch.autograd.graph.increment_version(policy)


def _row_temperature(temperature: Tensor, labels: Tensor) -> Tensor:
    if temperature.ndim == 0:
        return temperature
    return temperature.detach().expand(labels.shape).reshape(-1).contiguous()


def _part(values: Tensor, rows: slice | None) -> Tensor:
    """The values of a block's rows; what is 0-d or empty stands for every row."""
    if rows is None or values.ndim == 0 or values.numel() == 0:
        return values
    return values.reshape(-1)[rows]


def _part_of(outputs: ForwardOutputs, rows: slice) -> ForwardOutputs:
    *values, stats = outputs
    return ForwardOutputs(*[*(_part(buffer, rows) for buffer in values), stats[rows]])


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep on ``ctx`` what `gradient` reads, given the forward op's inputs and outputs."""
    policy, labels = inputs[0], inputs[3]
    temperature, logit_scale, logit_softcap, ignore_index = inputs[8:12]
    outputs = ForwardOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        policy, labels, outputs.logprobs, outputs.entropy, outputs.stats, temperature, logit_scale, logit_softcap
    )
    ctx.ignore_index, ctx.backend = ignore_index, inputs[-1]


def gradient(
    ctx: Any, op: Any, policy: Tensor, saved: list[Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the forward op's inputs: the policy's by ``op``, or its own memory where ``op`` returns none."""
    outputs = ForwardOutputs(*grads)  # type: ignore[arg-type]
    written = None
    labels, logprobs, entropy, stats, *options = saved
    grad_entropy = outputs.entropy if entropy.shape == labels.shape else None  # else it is the absent output's
    if outputs.logprobs is not None or grad_entropy is not None:
        written = op(
            policy, labels, outputs.logprobs, grad_entropy, logprobs, entropy, stats, *options,
            ctx.ignore_index, ctx.backend,
        )  # fmt: skip
        written = policy if written is None else written
    return written, *(None,) * 13


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    policy, *saved = ctx.saved_tensors
    return gradient(ctx, logits_grad, policy, saved, grads)


def _refuse_second_order(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("cepo_kernels computes first-order gradients only: a second derivative was asked for")


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("logits_grad", _logits_grad, "CompositeExplicitAutograd")
_library.impl("logits_grad_", _logits_grad_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::forward", lambda *a: tuple(_forward_buffers(*a)), lib=_library)
torch.library.register_fake(
    "cepo_kernels::logits_grad", lambda policy, *_: policy.new_empty(policy.shape), lib=_library
)
torch.library.register_fake("cepo_kernels::logits_grad_", lambda policy, *_: None, lib=_library)
torch.library.register_autograd("cepo_kernels::forward", _backward, setup_context=save_for_backward, lib=_library)
torch.library.register_autograd("cepo_kernels::logits_grad", _refuse_second_order, lib=_library)
