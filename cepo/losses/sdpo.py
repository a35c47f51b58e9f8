"""Loss axis: SDPO, self-distillation policy optimisation (arXiv 2601.20802).

The teacher is an exponential average of the policy, told the first other rollout of the group that succeeded, else the
task's feedback on this one. Rollouts with neither are left out, of the average too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cepo.losses import Distilled
from cepo_kernels import divergence

TEACHER_CONTEXT: tuple[str, ...] = ("sibling", "feedback")
TEACHER = "ema"
DIVERGENCE = "reverse_kl"
TOP_K: int | None = 100
AVERAGE = "token"
USES_RATIO = True
SUPERVISION: tuple[str, ...] = ("verifier", "feedback")
HIGHEST_RATIO = 2.0


def sdpo(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor,
    ratio: Tensor | None = None,
    op: Callable[..., Tensor] = divergence,
    **options: Any,
) -> Distilled:
    """sum_t weight_t min(rho_t, 2) D(T_t, S_t), D over the student's `top_k` entries and one for all others.

    The ratio rho = p / p_old of the tokens has no gradient; None is 1, as in the first update of a batch.
    """
    if ratio is None:
        return Distilled(op(student_logits, teacher_logits, token_weight=token_weights, **options), None)
    weights = token_weights * ratio.clamp(max=HIGHEST_RATIO)
    return Distilled(op(student_logits, teacher_logits, token_weight=weights, **options), ratio > HIGHEST_RATIO)
