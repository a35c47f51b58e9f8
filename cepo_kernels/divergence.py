"""Full-vocabulary divergences between a student and a teacher, with the student's gradient made in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, divergence_ops, linear_divergence_ops
from .contrastive import beside
from .linear import _needs, autocast
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

    Only the student gets a gradient, not ``token_weight`` or the temperature. It is first-order, computed with the
    values and handed over by the first backward; a second one raises. An upstream gradient of 1, as that of ``.sum()``,
    costs nothing.

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
    checks.check_backend(backend)
    checks.check_flag("inplace_grad", inplace_grad)
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


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    teacher_lm_head_weight: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float | Tensor = 0.5,
    mask: Tensor | None = None,
    clip: float | Tensor | None = None,
    top_k: int | None = None,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """`divergence` of ``student_hidden @ lm_head_weight.T`` and the teacher's, whose logits are never all there.

    Logits are float32, summed in float32 whatever the dtype of the operands. The gradients of the student's hidden
    states, head and bias are made with the values, chunk by chunk; rows that ``mask`` or ``token_weight`` leave out go
    through no matrix product, and a frozen head costs no weight gradient. They serve any upstream gradient that is the
    same for all rows that count, as that of ``.sum()`` or ``.mean()`` (under `torch.compile`, which cannot look at
    values, of ``.sum()`` alone); where it differs and the head is trained, the backward does the work again: put row
    weights into ``token_weight``. Under autocast all are cast as those of a linear layer are.

    Args:
        student_hidden: (..., H) bfloat16, float16, float32 or float64. teacher_hidden: (..., H') for its own head.
        lm_head_weight: (V, H). lm_head_bias: (V,) or None.
        teacher_lm_head_weight: (V, H'); None: the student's, without gradient, and its bias too.
        teacher_lm_head_bias: (V,) or None.
        kind, beta, mask, clip, top_k, temperature, token_weight, logit_scale, logit_softcap, backend: as for
            `divergence`. logits_dtype: as for `linear_token_logprobs`.

    Returns:
        (...) float32 (float64 if an input is), in nats.

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which, what was expected and what came.
        RuntimeError: a named backend cannot run here.
    """
    checks.check_backend(backend)
    checks.check_tensor("student_hidden", student_hidden)
    if student_hidden.ndim == 0:
        raise ValueError("student_hidden: expected shape (..., H), got ()")
    rows = student_hidden.detach().new_empty(()).expand(student_hidden.shape[:-1])
    if teacher_lm_head_weight is None:
        if teacher_lm_head_bias is not None:
            raise ValueError("teacher_lm_head_bias: expected a teacher_lm_head_weight with it, got None")
        teacher_lm_head_weight, teacher_lm_head_bias = lm_head_weight, lm_head_bias
    checks.check_head(lm_head_weight, lm_head_bias, rows, "", "student_hidden")
    checks.check_head(teacher_lm_head_weight, teacher_lm_head_bias, rows, "teacher_", "student_hidden")
    if teacher_lm_head_weight.shape[0] != lm_head_weight.shape[0]:
        expected = f"expected V = {lm_head_weight.shape[0]} as lm_head_weight has"
        raise ValueError(f"teacher_lm_head_weight: {expected}, got {teacher_lm_head_weight.shape[0]}")
    checks.check_hidden("student_hidden", student_hidden, rows, lm_head_weight, "rows")
    checks.check_hidden("teacher_hidden", teacher_hidden, rows, teacher_lm_head_weight, "student's rows")
    tensors: Any = (
        student_hidden, teacher_hidden.detach(), lm_head_weight, lm_head_bias, teacher_lm_head_weight.detach(),
        detached(teacher_lm_head_bias),
    )  # fmt: skip
    tensors = autocast(rows.device.type, *tensors)
    checks.check_logits_dtype(logits_dtype, tensors[0], tensors[2])
    checks.check_logits_dtype(logits_dtype, tensors[1], tensors[4])
    output = linear_divergence_ops.linear_divergence(
        *tensors, *_how(rows, kind, beta, mask, clip, top_k, temperature, token_weight, logit_scale, logit_softcap),
        [_needs(tensors[0]), _needs(tensors[2]), _needs(tensors[3])], logits_dtype, backend,
    )  # fmt: skip
    values: Tensor = output[0]
    return values


def _how(
    rows: Tensor, kind: str, beta: float | Tensor, mask: Tensor | None, clip: float | Tensor | None, top_k: int | None,
    temperature: float | Tensor, token_weight: Tensor | None, logit_scale: float | Tensor,
    logit_softcap: float | Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The ops' arguments from ``weight`` to ``logit_softcap``, checked; ``rows`` has one value per row."""
    checks.check_divergence(kind, top_k)
    checks.check_row_values("mask", mask, rows, boolean=True)
    checks.check_row_values("token_weight", token_weight, rows)
    weight, mask = beside(token_weight, rows), beside(mask, rows)
    if mask is not None:
        weight = mask.to(torch.float32) if weight is None else torch.where(mask, weight, 0.0)
    return (
        weight, kind, checks.scalar("beta", beta), None if clip is None else checks.scalar("clip", clip), top_k,
        *checks.row_options(rows, temperature, logit_scale, logit_softcap),
    )  # fmt: skip
