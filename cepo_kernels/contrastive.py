"""Log-probs under the policy and two teachers, contrastive evidence and token credit, from logits in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, parallel
from .rows import ForwardOutputs


class ContrastiveLogprobs(NamedTuple):
    """One value per row, in the labels' shape; None where the call did not give what it needs. Ignored rows are 0."""

    logprobs: Tensor  # policy log p(label), differentiable
    positive_logprobs: Tensor | None
    negative_logprobs: Tensor  # the policy's, detached, where it stands in for the negative teacher
    evidence: Tensor | None
    weight: Tensor | None
    advantages: Tensor | None
    entropy: Tensor | None  # of the policy, in nats, differentiable


@parallel.outside_graphs
def contrastive_logprobs(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor | None = None,
    *,
    negative_mask: Tensor | None = None,
    lam: float | Tensor = 0.5,
    eps_w: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_grad: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> ContrastiveLogprobs:
    """Log-probs of the labels under policy and teachers, and the token credit of CEPO (arXiv 2605.19436).

    Each row of the three tensors is read once. ``evidence = log P+ - log P-``,
    ``weight = clip(exp(sign(A) evidence), 1 - eps_w, 1 + eps_w)``, ``advantages = A ((1 - lam) + lam weight)``.
    Only ``logprobs`` and ``entropy`` carry a gradient, to ``policy_logits`` and nothing else: advantages, temperature
    and all other tensors are constants, whatever their requires_grad. It is first-order, by a backward of autograd.

    Args:
        policy_logits: (..., V) bfloat16, float16, float32 or float64; last dimension contiguous, leading strides
            free, so that ``logits[:, :-1]`` costs no copy. (Its gradient does: autograd then allocates one for the
            whole ``logits``; passing all of them with the last label ignored avoids that.)
        positive_logits: (..., V) of the teacher that is given the correct answer, or None: then there is no
            evidence, and ``advantages`` come back unweighted.
        negative_logits: (..., V) of the teacher that is given a wrong answer, or None: then the policy takes its
            place (RLSD, arXiv 2604.03128).
        labels: (...) int32 or int64, already shifted. Where ``ignore_index``, the row is never read.
        advantages: group advantage A, floating; 0-d, or labels.ndim dimensions each 1 or equal.
        negative_mask: bool, same shapes; where False the policy takes the negative teacher's place.
        lam: mixing lambda in [0, 1]. eps_w: evidence clip in [0, 1). Numbers or 0-d tensors.
        temperature: T > 0, a number or tensor shaped like ``advantages``.
        logit_scale, logit_softcap: ``x' = cap tanh(scale x / cap) / T``; leave the cap None for models that cap
            their logits themselves.
        return_entropy: also return the policy's entropy.
        inplace_grad: write the gradient over ``policy_logits``. Leaves, expanded tensors and logits that share
            memory with a teacher are refused. Under `torch.compile`, which plans memory itself, it has no effect.
        backend: "auto" (the fastest that can run), "triton", "cpu" or "reference".
        tp_group: a torch ProcessGroup over which the vocabulary is sharded, or None: each rank then passes its columns
            of the logits, and everything else, upstream gradients too, the same as the others. The host waits for one
            exchange of checks; the call is a graph break under `torch.compile`.
        vocab_size: columns of the whole vocabulary; those at or beyond it are padding, never read, their gradient 0.
            None: all that the ranks pass.
        vocab_start: this rank's first column. None, on every rank: the shards follow each other in the ranks' order.
            Where all shards start at multiples of 8192, a row's bits do not depend on how many there are.

    Returns:
        `ContrastiveLogprobs`, float32 (float64 if any logits are).

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which, what was expected and what came.
            On a GPU a label outside [0, V) gives NaN in its row instead.
        RuntimeError: a named backend cannot run here.
    """
    outputs = run_rows(
        ("policy_logits", "positive_logits", "negative_logits"),
        policy_logits, positive_logits, negative_logits, labels, advantages, negative_mask,
        lam=lam, eps_w=eps_w, temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap,
        ignore_index=ignore_index, return_entropy=return_entropy, inplace_grad=inplace_grad, backend=backend,
        tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start,
    )  # fmt: skip
    return credit_of(outputs, positive_logits, negative_logits, advantages, return_entropy)


def credit_of(
    outputs: ForwardOutputs, positive: Tensor | None, negative: Tensor | None, advantages: Tensor | None,
    return_entropy: bool,
) -> ContrastiveLogprobs:  # fmt: skip
    """What a call returns of a forward op's outputs, given what it was called with; teachers and credit detached."""
    has_evidence = positive is not None
    return ContrastiveLogprobs(
        logprobs=outputs.logprobs,
        positive_logprobs=outputs.positive_logprobs.detach() if has_evidence else None,
        negative_logprobs=(outputs.logprobs if negative is None else outputs.negative_logprobs).detach(),
        evidence=outputs.evidence.detach() if has_evidence else None,
        weight=outputs.weight.detach() if has_evidence and advantages is not None else None,
        advantages=None if advantages is None else outputs.advantages.detach(),
        entropy=outputs.entropy if return_entropy else None,
    )


def run_rows(
    names: tuple[str, str, str],
    policy: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    labels: Tensor,
    advantages: Tensor | None,
    negative_mask: Tensor | None,
    *,
    lam: float | Tensor,
    eps_w: float | Tensor,
    temperature: float | Tensor,
    logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None,
    ignore_index: int,
    return_entropy: bool,
    inplace_grad: bool,
    backend: str,
    tp_group: Any,
    vocab_size: int | None,
    vocab_start: int | None,
) -> ForwardOutputs:
    """The op behind `contrastive_logprobs` and `token_logprobs`, its arguments checked, its numbers 0-d tensors."""
    with parallel.Meeting(tp_group, vocab_size, vocab_start, backend) as meeting:
        checks.check_labels(labels)
        checks.check_logits(names[0], policy, labels, meeting.sharded)
        checks.check_teacher(names[1], positive, policy, labels, meeting.sharded)
        checks.check_teacher(names[2], negative, policy, labels, meeting.sharded)
        arguments = row_arguments(
            labels, advantages, negative_mask, lam, eps_w, temperature, logit_scale, logit_softcap, ignore_index,
            return_entropy,
        )  # fmt: skip
        checks.check_flag("inplace_grad", inplace_grad)
        needs_gradient = torch.is_grad_enabled() and policy.requires_grad
        in_place = inplace_grad and needs_gradient and not torch.compiler.is_compiling()
        if in_place:
            checks.check_in_place(policy, {names[1]: positive, names[2]: negative}, names[0])
        meeting.bring(dict(zip(names, (policy, positive, negative), strict=True)), policy.shape[-1], **arguments)
    teachers = (None if x is None else meeting.true(x).detach() for x in (positive, negative))
    run: Any = _InPlace.apply if in_place else ops.forward
    return ForwardOutputs(*run(meeting.true(policy), *teachers, *arguments.values(), meeting.backend))


def row_arguments(
    labels: Tensor, advantages: Tensor | None, negative_mask: Tensor | None, lam: float | Tensor, eps_w: float | Tensor,
    temperature: float | Tensor, logit_scale: float | Tensor, logit_softcap: float | Tensor | None, ignore_index: int,
    return_entropy: bool,
) -> dict[str, Any]:  # fmt: skip
    """The forward ops' arguments from ``labels`` to ``return_entropy``, checked, detached, numbers as 0-d tensors."""
    checks.check_ignore_index(ignore_index)
    checks.check_flag("return_entropy", return_entropy)
    checks.check_row_values("advantages", advantages, labels)
    checks.check_row_values("negative_mask", negative_mask, labels, boolean=True)
    temperature, logit_scale, logit_softcap = checks.row_options(labels, temperature, logit_scale, logit_softcap)
    return {
        "labels": labels, "advantages": beside(advantages, labels),
        "negative_mask": beside(negative_mask, labels), "lam": checks.scalar("lam", lam, labels),
        "eps_w": checks.scalar("eps_w", eps_w, labels), "temperature": temperature, "logit_scale": logit_scale,
        "logit_softcap": logit_softcap, "ignore_index": ignore_index, "return_entropy": return_entropy,
    }  # fmt: skip


def beside(value: Tensor | None, labels: Tensor) -> Tensor | None:
    """Detached, on the labels' device, where a 0-d tensor need not have come from."""
    return None if value is None else value.detach().to(labels.device)


class _InPlace(torch.autograd.Function):
    """The same op, its gradient written over the logits: whoever saved them is told by the version counter."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        output = ops.forward(policy, *rest)
        ops.save_for_backward(ctx, (policy, *rest), output)
        ctx.mark_non_differentiable(*output[1:6], output[7])
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ops.refuse_create_graph()
        policy, *saved = ctx.saved_tensors
        return ops.gradient(ctx, ops.logits_grad_, policy.detach(), saved, grads)
