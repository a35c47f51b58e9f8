"""Credit axis: RLSD, reinforcement learning with self-distillation (arXiv 2604.03128)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cepo_kernels import contrastive_logprobs

TEACHERS: tuple[str, ...] = ("positive",)
EPS_W = 0.2
LAM_STEPS = 50
SUPERVISION: tuple[str, ...] = ("answer",)
NEEDS_ZERO_A_ROWS = False


def rlsd(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    op: Callable[..., Any] = contrastive_logprobs,
    **options: Any,
) -> Any:
    """w = clip((P_T+ / P_S)^sign(A), 1 - eps_w, 1 + eps_w), A_t = A ((1 - lam) + lam w). P_S is the policy itself."""
    return op(policy_logits, positive_logits, None, labels, advantages, **options)
