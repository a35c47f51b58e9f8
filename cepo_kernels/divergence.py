"""Full-vocabulary divergences between a student and a teacher, with the student's gradient made in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, divergence_ops
from .policy_loss import detached


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | Tensor = 0.5,
    mask: Tensor | None = None,
    clip: float | Tensor | None = None,
    top_k: int | None = None,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    inplace_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divergence between each row's two distributions over the vocabulary, S the student's and T the teacher's.

    "forward_kl" is ``KL(T || S)``, "reverse_kl" ``KL(S || T)`` and "jsd" ``beta KL(T || m) + (1 - beta) KL(S || m)``
    with ``m = beta T + (1 - beta) S`` (GKD, arXiv 2306.13649, equation 1; OPSD, arXiv 2601.18734). A jsd of beta 0 or 1
    would be 0: as in GKD's code they stand for ``KL(T || S)`` and ``KL(S || T)``, its limits divided by beta and by
    1 - beta. Unless clipped never negative, 0 for equal rows and exact for nearly equal ones; infinite where a KL's
    second distribution lacks what its first has. A row that is all -inf, or holds +inf or NaN, gives NaN.

    Only the student gets a gradient. It is first-order, computed with the values and handed over by the first
    backward; a second one raises. An upstream gradient of 1, as that of ``.sum()``, costs nothing.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64; last dimension contiguous, leading strides
            free. teacher_logits: the same shape, any of these dtypes.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of a jsd's mixture, in [0, 1]; a number or 0-d tensor, on the CPU unless waiting for
            the device is no matter. clip likewise.
        mask: bool, 0-d or as many dimensions as there are rows', each 1 or equal. Where False, the row is never read
            and gives 0.
        clip: of an entry's term, ``p log(p / q)`` or a jsd's two together, what lies above it is cut off, as is the
            entry's gradient (OPSD); clipped sums may be negative. At least 0; None: no clip.
        top_k: take the student's ``top_k`` largest logits (of equals the first) as entries, and all others as one
            whose logit is their logsumexp (SDPO, arXiv 2601.20802); from V - 1 on, and for None, all are entries.
        temperature: T > 0, a number or tensor; shapes as for ``mask``.
        token_weight: floating, multiplies a row's value and gradient; shapes as for ``mask``. Where 0, as ``mask``.
        logit_scale, logit_softcap: ``x' = cap tanh(scale x / cap) / T``, of both.
        inplace_grad: write the gradient over ``student_logits``, already in the forward: nobody may read them after.
            Leaves, expanded tensors and logits that share memory with the teacher's are refused. Under
            `torch.compile`, which plans memory itself, it has no effect.
        backend: "auto" (the fastest that can run), or a name as for `contrastive_logprobs`.

    Returns:
        (...) float32 (float64 if any logits are), in nats.

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which, what was expected and what came.
        RuntimeError: a named backend cannot run here, or a second backward.
    """
    checks.check_pair(student_logits, teacher_logits)
    rows = student_logits[..., 0]
    arguments = (
        teacher_logits.detach(),
        *_how(rows, kind, beta, mask, clip, top_k, temperature, token_weight, logit_scale, logit_softcap),
    )
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if needs_gradient and not torch.compiler.is_compiling():
        if inplace_grad:
            checks.check_in_place(student_logits, {"teacher_logits": teacher_logits}, "student_logits")
        return divergence_ops.Fused.apply(student_logits, inplace_grad, *arguments, backend)  # type: ignore
    return divergence_ops.divergence(student_logits, *arguments, needs_gradient, backend)[0]  # type: ignore


def _how(
    rows: Tensor, kind: str, beta: float | Tensor, mask: Tensor | None, clip: float | Tensor | None, top_k: int | None,
    temperature: float | Tensor, token_weight: Tensor | None, logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The ops' arguments from ``weight`` to ``logit_softcap``, checked; ``rows`` has one value per row."""
    checks.check_divergence(kind, top_k)
    checks.check_row_values("mask", mask, rows, boolean=True)
    checks.check_row_values("token_weight", token_weight, rows)
    weight = detached(token_weight)
    if mask is not None:
        weight = mask.to(torch.float32) if weight is None else torch.where(mask, weight, 0.0)
    return (
        weight, kind, checks.scalar("beta", beta), None if clip is None else checks.scalar("clip", clip), top_k,
        *checks.row_options(rows, temperature, logit_scale, logit_softcap),
    )  # fmt: skip
