"""Credit axis: CEPO, contrastive evidence policy optimisation (arXiv 2605.19436)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cepo_kernels import ContrastiveLogprobs, contrastive_logprobs

TEACHERS: tuple[str, ...] = ("positive", "negative")
EPS_W = 0.5
LAM_STEPS = 25


def cepo(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    **options: Any,
) -> ContrastiveLogprobs:
    """w = clip((P_T+ / P_T-)^sign(A), 1 - eps_w, 1 + eps_w), A_t = A ((1 - lam) + lam w).

    Where `negative_mask` is False (no wrong rollout in the group) the policy takes P_T-'s place, which is RLSD.
    """
    return contrastive_logprobs(policy_logits, positive_logits, negative_logits, labels, advantages, **options)
