"""The ops as `torch.library` knows them: three, with shapes for `torch.compile` and a first-order gradient.

``forward`` gives everything a call can ask for (an empty tensor stands for what it did not), ``logits_grad`` the
gradient of the policy's logits from two (N,) upstream gradients, ``logits_grad_`` the same over the logits' memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from . import backends
from .checks import check_values
from .rows import BackwardInputs, ForwardInputs, ForwardOutputs, RowOptions, blocks, row_values

STATS = 4

OPTIONS = "Tensor temperature, Tensor logit_scale, Tensor? logit_softcap, int ignore_index"
_BACKWARD = (
    "Tensor labels, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logprobs, Tensor entropy, Tensor stats, "
    f"{OPTIONS}, str backend"
)
library = torch.library.Library("cepo_kernels", "DEF")
library.define(
    "forward(Tensor policy, Tensor? positive, Tensor? negative, Tensor labels, Tensor? advantages, "
    f"Tensor? negative_mask, Tensor lam, Tensor eps_w, {OPTIONS}, bool return_entropy, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"logits_grad(Tensor policy, {_BACKWARD}) -> Tensor")
library.define(f"logits_grad_(Tensor(a!) policy, {_BACKWARD}) -> ()")

forward = torch.ops.cepo_kernels.forward.default
logits_grad = torch.ops.cepo_kernels.logits_grad.default
logits_grad_ = torch.ops.cepo_kernels.logits_grad_.default


def forward_buffers(
    policy: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    labels: Tensor,
    advantages: Tensor | None,
    return_entropy: bool,
) -> ForwardOutputs:
    """Unfilled outputs in the labels' shape; also what `torch.compile` is told the op returns."""
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
        stats=torch.zeros((labels.numel(), STATS), dtype=dtype, device=policy.device),
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
    outputs = forward_buffers(policy, positive, negative, labels, advantages, return_entropy)
    chosen = backends.choose(backend, policy.device.type, outputs.logprobs.dtype)
    check_values(labels, ignore_index, lam, eps_w, temperature, logit_scale, logit_softcap)
    if labels.numel() == 0:
        return outputs
    options = RowOptions(temperature, logit_scale, logit_softcap, ignore_index)
    for rows, inputs, _ in forward_inputs(
        [policy, positive, negative], labels, advantages, negative_mask, lam, eps_w, options, outputs.logprobs.dtype
    ):
        chosen.forward(inputs, outputs if rows is None else part_of(outputs, rows))
    return outputs


def forward_inputs(
    logits: list[Tensor | None],
    labels: Tensor,
    advantages: Tensor | None,
    negative_mask: Tensor | None,
    lam: Tensor,
    eps_w: Tensor,
    options: RowOptions,
    dtype: torch.dtype,
) -> Iterator[tuple[slice | None, ForwardInputs, list[Tensor | None]]]:
    """A backend's inputs, block by block: the rows it covers, policy and teachers, views of the other ``logits``."""
    flat_labels = row_values(labels, labels.shape, torch.int64)
    flat_advantages = row_values(advantages, labels.shape, dtype)
    flat_mask = row_values(negative_mask, labels.shape, torch.bool)
    temperature = row_temperature(options.temperature, labels)
    for rows, (policy, positive, negative, *others) in blocks(logits):
        assert policy is not None
        inputs = ForwardInputs(
            policy, positive, negative, part(flat_labels, rows), part(flat_advantages, rows), part(flat_mask, rows),
            lam, eps_w, options._replace(temperature=part(temperature, rows)),
        )  # fmt: skip
        yield rows, inputs, others


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
    temperature = row_temperature(temperature, labels)
    for rows, (gradient_rows, policy_rows) in blocks([gradient, policy]):
        assert gradient_rows is not None
        assert policy_rows is not None
        chosen.backward(
            BackwardInputs(
                gradient_rows,
                policy_rows,
                part(flat_labels, rows),
                part(flat_logprobs_grad, rows),
                part(flat_entropy_grad, rows),
                part(logprobs, rows),
                part(entropy, rows),
                stats if rows is None else stats[rows],
                RowOptions(part(temperature, rows), logit_scale, logit_softcap, ignore_index),
            )
        )


def _logits_grad(policy: Tensor, *rest: Any) -> Tensor:
    gradient = torch.empty(policy.shape, dtype=policy.dtype, device=policy.device)
    _write_gradient(gradient, policy, *rest)
    return gradient


def _logits_grad_in_place(policy: Tensor, *rest: Any) -> None:
    _write_gradient(policy, policy, *rest)
    torch.autograd.graph.increment_version(policy)


def row_temperature(temperature: Tensor, labels: Tensor) -> Tensor:
    return temperature if temperature.ndim == 0 else row_values(temperature, labels.shape, temperature.dtype)


@overload
def part(values: Tensor, rows: slice | None) -> Tensor: ...
@overload
def part(values: Tensor | None, rows: slice | None) -> Tensor | None: ...
def part(values: Tensor | None, rows: slice | None) -> Tensor | None:
    """The values of a block's rows; what is absent, 0-d or empty stands for every row."""
    if values is None or rows is None or values.ndim == 0 or values.numel() == 0:
        return values
    return values.reshape(-1)[rows]


def part_of(outputs: ForwardOutputs, rows: slice) -> ForwardOutputs:
    *values, stats = outputs
    return ForwardOutputs(*[*(part(buffer, rows) for buffer in values), stats[rows]])


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


def refuse_create_graph() -> None:
    """For backwards outside `torch.library`, in which autograd is on only if their result shall be differentiable."""
    if torch.is_grad_enabled():
        _refuse_second_order(None)


library.impl("forward", _forward, "CompositeExplicitAutograd")
library.impl("logits_grad", _logits_grad, "CompositeExplicitAutograd")
library.impl("logits_grad_", _logits_grad_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::forward", lambda *a: tuple(forward_buffers(*a[:5], *a[-2:-1])), lib=library)
torch.library.register_fake("cepo_kernels::logits_grad", lambda policy, *_: policy.new_empty(policy.shape), lib=library)
torch.library.register_fake("cepo_kernels::logits_grad_", lambda policy, *_: None, lib=library)
torch.library.register_autograd("cepo_kernels::forward", _backward, setup_context=save_for_backward, lib=library)
torch.library.register_autograd("cepo_kernels::logits_grad", _refuse_second_order, lib=library)
