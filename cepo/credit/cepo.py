"""Credit axis: CEPO, contrastive evidence policy optimisation (arXiv 2605.19436)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cepo_kernels import contrastive_logprobs

TEACHERS: tuple[str, ...] = ("positive", "negative")
EPS_W = 0.5
LAM_STEPS = 25
SUPERVISION: tuple[str, ...] = ("verifier", "answer")
NEEDS_ZERO_A_ROWS = False


def cepo(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    op: Callable[..., Any] = contrastive_logprobs,
    **options: Any,
) -> Any:
    """w = clip((P_T+ / P_T-)^sign(A), 1 - eps_w, 1 + eps_w), A_t = A ((1 - lam) + lam w).

    Where `negative_mask` is False (no wrong rollout in the group) the policy takes P_T-'s place, which is RLSD.
    """
    return op(policy_logits, positive_logits, negative_logits, labels, advantages, **options)
