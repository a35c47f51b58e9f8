"""The op behind `contrastive_policy_loss`, as `torch.library` knows it, and its in-place form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, ops
from .rows import LossInputs, LossOutputs, RowOptions, row_values

_ARGUMENTS = (
    "Tensor? positive, Tensor? negative, Tensor labels, Tensor advantages, Tensor? old_logprobs, Tensor? token_weight, "
    "Tensor? ref_logprobs, Tensor? negative_mask, Tensor lam, Tensor eps_w, Tensor clip_low, Tensor clip_high, "
    f"Tensor kl_coef, Tensor entropy_coef, Tensor denominator, {ops.OPTIONS}, str surrogate, bool with_entropy"
)
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
ops.library.define(f"policy_loss(Tensor policy, {_ARGUMENTS}, bool with_gradient, str backend) -> ({_OUTPUTS})")
ops.library.define(f"policy_loss_(Tensor(a!) policy, {_ARGUMENTS}, str backend) -> ({_OUTPUTS})")
_DENOMINATOR = 14  # among the arguments after the policy
policy_loss = torch.ops.cepo_kernels.policy_loss.default
policy_loss_ = torch.ops.cepo_kernels.policy_loss_.default


def loss_buffers(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, labels: Tensor, advantages: Tensor,
    with_entropy: bool, with_gradient: bool,
) -> LossOutputs:  # fmt: skip
    forward = ops.forward_buffers(policy, positive, negative, labels, advantages, with_entropy)
    return LossOutputs(
        forward._replace(stats=forward.stats.new_empty(0)),
        losses=torch.empty_like(forward.logprobs),
        ratio=torch.empty_like(forward.logprobs),
        clipped=torch.empty(labels.shape, dtype=torch.bool, device=labels.device),
        gradient=torch.empty(policy.shape, dtype=policy.dtype, device=policy.device) if with_gradient else None,
    )


def returned(loss: Tensor, outputs: LossOutputs, policy: Tensor) -> tuple[Tensor, ...]:
    gradient = policy.new_empty(0) if outputs.gradient is None else outputs.gradient
    return loss, outputs.ratio, outputs.clipped, gradient, *outputs.forward[:-1]


def total(losses: Tensor, denominator: Tensor) -> Tensor:
    """The loss of a call, summed in float64 and rounded once."""
    return (losses.sum(dtype=torch.float64) / denominator.to(losses.device, torch.float64)).to(losses.dtype)


def kernels_part(dtype: torch.dtype, denominator: Tensor) -> Tensor:
    """What a kernel divides by: all of the denominator; in float16 all but a power of two, left to the backward.

    A float16 gradient over thousands of rows would be 0 before GradScaler's factor arrives. Like that factor, a power
    of two rounds nothing but subnormals.
    """
    return 2.0 * torch.frexp(denominator.double()).mantissa if dtype == torch.float16 else denominator


def backwards_part(dtype: torch.dtype, denominator: Tensor) -> Tensor | None:
    """The factor that the kernel left out of the gradient; None for 1."""
    return kernels_part(dtype, denominator) / denominator if dtype == torch.float16 else None


def scaled(upstream: Tensor, factor: Tensor | None) -> Tensor:
    return upstream if factor is None else (upstream * factor).to(upstream.dtype)


def _run(policy: Tensor, arguments: tuple[Any, ...], in_place: bool, with_gradient: bool) -> tuple[Tensor, ...]:
    (
        positive, negative, labels, advantages, old_logprobs, token_weight, ref_logprobs, negative_mask, lam, eps_w,
        clip_low, clip_high, kl_coef, entropy_coef, denominator,
        temperature, logit_scale, logit_softcap, ignore_index, surrogate, with_entropy, backend,
    ) = arguments  # fmt: skip
    outputs = loss_buffers(policy, positive, negative, labels, advantages, with_entropy, with_gradient and not in_place)
    dtype = outputs.losses.dtype
    chosen = backends.choose(backend, policy.device.type, dtype, "policy_loss")
    checks.check_values(labels, ignore_index, lam, eps_w, temperature, logit_scale, logit_softcap)
    checks.check_loss_values(clip_low, clip_high, kl_coef, entropy_coef, denominator)
    gradient = policy if in_place else outputs.gradient
    old_logprobs = row_values(old_logprobs, labels.shape, dtype)
    token_weight = row_values(token_weight, labels.shape, dtype)
    ref_logprobs = row_values(ref_logprobs, labels.shape, dtype)
    numbers = (clip_low, clip_high, kl_coef, entropy_coef, kernels_part(policy.dtype, denominator))
    options = RowOptions(temperature, logit_scale, logit_softcap, ignore_index)
    if labels.numel():
        for rows, inputs, (gradient_rows,) in ops.forward_inputs(
            [policy, positive, negative, gradient], labels, advantages, negative_mask, lam, eps_w, options, dtype
        ):
            chosen.policy_loss(
                LossInputs(
                    inputs, ops.part(old_logprobs, rows), ops.part(token_weight, rows), ops.part(ref_logprobs, rows),
                    surrogate, numbers,
                ),
                LossOutputs(
                    outputs.forward if rows is None else ops.part_of(outputs.forward, rows),
                    ops.part(outputs.losses, rows), ops.part(outputs.ratio, rows), ops.part(outputs.clipped, rows),
                    gradient_rows,
                ),
            )  # fmt: skip
    return returned(total(outputs.losses, denominator), outputs, policy)


def _policy_loss(policy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, with_gradient, backend = rest
    return _run(policy, (*arguments, backend), False, with_gradient)


def _policy_loss_in_place(policy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output = _run(policy, rest, True, True)
    torch.autograd.graph.increment_version(policy)
    return output


def _fake(policy: Tensor, positive: Tensor | None, negative: Tensor | None, labels: Tensor, advantages: Tensor,
          *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    *_, with_entropy, with_gradient, _ = rest
    outputs = loss_buffers(policy, positive, negative, labels, advantages, with_entropy, with_gradient)
    return returned(outputs.losses.new_empty(()), outputs, policy)


def is_batched(upstream: Tensor) -> bool:
    """Whether it is several backwards' at once (`torch.autograd.grad` with is_grads_batched), which no address has."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream)


def rescaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """The gradient times what came from above, in place; nothing is done at 1, and no device is waited for."""
    if is_batched(upstream):
        return (gradient * upstream).to(gradient.dtype)
    if upstream.device.type == "cpu":
        if (factor := float(upstream)) != 1.0:
            gradient.mul_(factor)
        return gradient
    chosen = backends.choose(backend, gradient.device.type, upstream.dtype, "policy_loss")
    rescale = getattr(chosen, "rescale", None)
    if rescale is not None and gradient.is_contiguous() and gradient.data_ptr() % 16 == 0:
        rescale(gradient, upstream)
    else:
        gradient.mul_(upstream)
    return gradient


def is_last(upstream: Tensor) -> bool:
    """Whether a backward on the CPU is its graph's last, so that what the graph kept may be changed and given away.

    To the ops' own callers these are outputs, which such a backward overwrites: to spare them would cost a copy of the
    head's gradient, and the public functions hand them to nobody.
    """
    eager = type(upstream) is Tensor and upstream.device.type == "cpu" and not is_batched(upstream)
    return eager and not torch._C._autograd._get_current_graph_task_keep_graph()


def times(gradient: Tensor, upstream: Tensor, last: bool) -> Tensor:
    """A kept gradient times what came from above: a head's is large, and a copy of it costs more than it looks."""
    return rescaled(gradient.detach(), upstream, "cpu") if last else gradient * upstream


class Fused(torch.autograd.Function):
    """Outside `torch.compile`: the gradient is kept, once, and given away."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, in_place: bool, *arguments: Any) -> tuple[Tensor, ...]:
        *rest, backend = arguments
        detached = policy.detach()
        ctx.backend, ctx.factor = backend, backwards_part(detached.dtype, rest[_DENOMINATOR])
        if in_place:
            output = policy_loss_(detached, *rest, backend)
            ctx.gradient = detached
        else:
            output = policy_loss(detached, *rest, True, backend)
            ctx.gradient = output[3]
        ctx.version = ctx.gradient._version
        loss, ratio, clipped, _, *others = output
        absent = loss.new_empty(0)
        ctx.mark_non_differentiable(ratio, clipped, absent, *others)
        ctx.set_materialize_grads(False)
        return loss, ratio, clipped, absent, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        ops.refuse_create_graph()
        if ctx.gradient is None:
            raise RuntimeError("contrastive_policy_loss: the first backward took the gradient; compute the loss again")
        gradient, ctx.gradient = ctx.gradient, None
        if gradient._version != ctx.version:
            raise RuntimeError(
                "contrastive_policy_loss: policy_logits, where inplace_grad keeps the gradient, were modified by an "
                f"inplace operation: at version {gradient._version}, expected version {ctx.version}"
            )
        if upstream is None:
            return (None,) * 24
        return rescaled(gradient, scaled(upstream, ctx.factor), ctx.backend), *(None,) * 23


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], inputs[1 + _DENOMINATOR])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient, denominator = ctx.saved_tensors
    if upstream is None:
        return (None,) * 24
    factor = scaled(upstream, backwards_part(gradient.dtype, denominator))
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype), *(None,) * 23


ops.library.impl("policy_loss", _policy_loss, "CompositeExplicitAutograd")
ops.library.impl("policy_loss_", _policy_loss_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::policy_loss", _fake, lib=ops.library)
torch.library.register_fake(
    "cepo_kernels::policy_loss_", lambda policy, *rest: _fake(policy, *rest[:-1], False, rest[-1]), lib=ops.library
)
torch.library.register_autograd("cepo_kernels::policy_loss", _backward, setup_context=_save, lib=ops.library)
