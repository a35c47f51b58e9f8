"""The policy's loss with token credit, and its gradient, in the one pass over the logits that the log-probs need."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, loss_ops, parallel
from .contrastive import ContrastiveLogprobs, beside, credit_of
from .rows import ForwardOutputs

SURROGATES = ("ppo", "cispo")


class PolicyLoss(NamedTuple):
    """Only ``loss`` is differentiable. The others are one value per row; ignored and idle rows are 0 (False)."""

    loss: Tensor  # 0-d
    credit: ContrastiveLogprobs
    ratio: Tensor  # exp(logprobs - old_logprobs)
    clipped: Tensor  # bool: the ratio was beyond a bound, and the bound took its place


@parallel.outside_graphs
def contrastive_policy_loss(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    surrogate: str = "ppo",
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.28,
    token_weight: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    entropy_coef: float | Tensor = 0.0,
    denominator: float | Tensor | None = None,
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
) -> PolicyLoss:
    """The clipped policy loss with the advantages of `contrastive_logprobs`; its gradient leaves in the same pass.

    With ``r = exp(logprobs - old_logprobs)`` and ``c(r) = clip(r, 1 - clip_low, 1 + clip_high)``, a row's loss is
    ``-token_weight min(r A, c(r) A)`` ("ppo": PPO, arXiv 1707.06347, with DAPO's two bounds, arXiv 2503.14476) or
    ``-token_weight stop_gradient(c(r)) A logprobs`` ("cispo": arXiv 2506.13585), plus
    ``kl_coef (exp(d) - 1 - d)``, ``d = ref_logprobs - logprobs`` (k3), minus ``entropy_coef entropy``. The loss is the
    rows' sum over ``denominator``.

    The ratio belongs to a token, as credit does: sequence-level ratios (GSPO) need all tokens of a rollout first, and
    so `contrastive_logprobs`. The gradient is that of ``policy_logits`` alone: advantages, ``token_weight``,
    temperature and all other tensors are constants, whatever their requires_grad. It is computed with the loss and
    handed over by the first backward; a second one raises.

    Args:
        policy_logits, positive_logits, negative_logits, labels, negative_mask, lam, eps_w, temperature, logit_scale,
            logit_softcap, ignore_index, return_entropy, backend, tp_group, vocab_size, vocab_start: as for
            `contrastive_logprobs`.
        advantages: group advantage A, floating; 0-d, or labels.ndim dimensions each 1 or equal. A row with A = 0 is
            idle, that is not read and 0 in every output, unless a KL or entropy term acts on it.
        old_logprobs: (...) log-probs of the policy that sampled; None: this one, so that the ratio is exactly 1.
        surrogate: "ppo" or "cispo".
        clip_low, clip_high: bounds of the ratio; clip_low in [0, 1], clip_high >= 0.
        token_weight: multiplies the surrogate (importance correction); shapes as for ``advantages``.
        ref_logprobs: (...) log-probs of the reference policy, needed when ``kl_coef`` is not 0.
        kl_coef, entropy_coef: numbers or 0-d tensors.
        denominator: number or 0-d tensor above 0; None: the number of rows that are not ignored, at least 1.
        inplace_grad: write the gradient over ``policy_logits``, already in the forward: nobody may read them after.
            Under `torch.compile`, which plans memory itself, it has no effect.

    Returns:
        `PolicyLoss`, float32 (float64 if any logits are).

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which, what was expected and what came.
        RuntimeError: a named backend cannot run here, or a second backward.
    """
    teachers = {"positive_logits": positive_logits, "negative_logits": negative_logits}
    with parallel.Meeting(tp_group, vocab_size, vocab_start, backend) as meeting:
        checks.check_labels(labels)
        checks.check_logits("policy_logits", policy_logits, labels, meeting.sharded)
        for name, teacher in teachers.items():
            checks.check_teacher(name, teacher, policy_logits, labels, meeting.sharded)
        arguments = loss_arguments(
            labels, advantages, old_logprobs, surrogate, clip_low, clip_high, token_weight, ref_logprobs, kl_coef,
            entropy_coef, denominator, negative_mask, lam, eps_w, temperature, logit_scale, logit_softcap, ignore_index,
            return_entropy,
        )  # fmt: skip
        checks.check_flag("inplace_grad", inplace_grad)
        needs_gradient = torch.is_grad_enabled() and policy_logits.requires_grad
        if inplace_grad and needs_gradient and not torch.compiler.is_compiling():
            checks.check_in_place(policy_logits, teachers)
        meeting.bring({"policy_logits": policy_logits, **teachers}, policy_logits.shape[-1], **arguments)
    policy_logits, backend = meeting.true(policy_logits), meeting.backend
    inputs = (*(None if x is None else meeting.true(x).detach() for x in teachers.values()), *arguments.values())
    if torch.compiler.is_compiling():
        output = loss_ops.policy_loss(policy_logits, *inputs, needs_gradient, backend)
    elif needs_gradient:
        output = loss_ops.Fused.apply(policy_logits, inplace_grad, *inputs, backend)  # type: ignore[no-untyped-call]
    else:
        output = loss_ops.policy_loss(policy_logits, *inputs, False, backend)
    loss, ratio, clipped, _, *credit = output
    return policy_loss_of(loss, ratio, clipped, credit, positive_logits, negative_logits, advantages, return_entropy)


def loss_arguments(
    labels: Tensor, advantages: Tensor, old_logprobs: Tensor | None, surrogate: str, clip_low: float | Tensor,
    clip_high: float | Tensor, token_weight: Tensor | None, ref_logprobs: Tensor | None, kl_coef: float | Tensor,
    entropy_coef: float | Tensor, denominator: float | Tensor | None, negative_mask: Tensor | None,
    lam: float | Tensor, eps_w: float | Tensor, temperature: float | Tensor, logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None, ignore_index: int, return_entropy: bool,
) -> dict[str, Any]:  # fmt: skip
    """The loss ops' arguments from ``labels`` to ``with_entropy``, checked, detached, numbers as 0-d tensors."""
    checks.check_surrogate(surrogate, SURROGATES)
    checks.check_ignore_index(ignore_index)
    if advantages is None:
        raise TypeError("advantages: expected a tensor, got None")
    checks.check_flag("return_entropy", return_entropy)
    checks.check_row_values("advantages", advantages, labels)
    checks.check_row_values("token_weight", token_weight, labels)
    checks.check_row_values("old_logprobs", old_logprobs, labels, each="labels")
    checks.check_row_values("ref_logprobs", ref_logprobs, labels, each="labels")
    checks.check_row_values("negative_mask", negative_mask, labels, boolean=True)
    if denominator is None:
        denominator = (labels != ignore_index).sum().clamp(min=1).double()
    numbers = {"lam": lam, "eps_w": eps_w, "clip_low": clip_low, "clip_high": clip_high, "kl_coef": kl_coef,
               "entropy_coef": entropy_coef, "denominator": denominator}  # fmt: skip
    scalars = {name: checks.scalar(name, value, labels) for name, value in numbers.items()}
    has_kl = isinstance(kl_coef, Tensor) or kl_coef != 0
    if has_kl and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected log-probs of the reference policy for kl_coef = {kl_coef}, got None")
    has_entropy = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    temperature, logit_scale, logit_softcap = checks.row_options(labels, temperature, logit_scale, logit_softcap)
    return {
        "labels": labels, "advantages": beside(advantages, labels), "old_logprobs": beside(old_logprobs, labels),
        "token_weight": beside(token_weight, labels), "ref_logprobs": beside(ref_logprobs, labels) if has_kl else None,
        "negative_mask": beside(negative_mask, labels),
        **scalars,
        "temperature": temperature, "logit_scale": logit_scale, "logit_softcap": logit_softcap,
        "ignore_index": ignore_index, "surrogate": surrogate, "with_entropy": return_entropy or has_entropy,
    }  # fmt: skip


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def policy_loss_of(
    loss: Tensor, ratio: Tensor, clipped: Tensor, credit: list[Tensor], positive: Tensor | None,
    negative: Tensor | None, advantages: Tensor, return_entropy: bool,
) -> PolicyLoss:  # fmt: skip
    """What a call returns of a loss op's outputs; all but the loss detached."""
    values = [value.detach() for value in credit]
    outputs = ForwardOutputs._make([*values, values[0]])  # a loss leaves no stats; nothing reads what stands there
    return PolicyLoss(loss, credit_of(outputs, positive, negative, advantages, return_entropy), ratio.detach(), clipped)
