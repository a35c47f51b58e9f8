"""Loss axis: OPSD, on-policy self-distillation (arXiv 2601.18734).

The teacher is the initial policy, told a worked solution; the student imitates it on rollouts of its own. No reward, no
advantage. JSD with beta 1/2 is `--loss.divergence jsd`, the clip of an entry's term `--loss.clip`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cepo.losses import Distilled
from cepo_kernels import divergence

TEACHER_CONTEXT: tuple[str, ...] = ("solution",)
TEACHER = "fixed"
DIVERGENCE = "forward_kl"
TOP_K: int | None = None
AVERAGE = "sequence"
USES_RATIO = False
SUPERVISION: tuple[str, ...] = ("worked solution",)


def opsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor,
    ratio: Tensor | None = None,
    op: Callable[..., Tensor] = divergence,
    **options: Any,
) -> Distilled:
    """sum_t weight_t D(T_t, S_t) over the whole vocabulary. The ratio is not read."""
    return Distilled(op(student_logits, teacher_logits, token_weight=token_weights, **options), None)
