"""Advantage axis: MaxRL, maximum likelihood reinforcement learning (arXiv 2602.02710)."""

from __future__ import annotations

from torch import Tensor

from cepo.advantages import centre, floating, successes

AVERAGE = "constant"


def maxrl(rewards_PG: Tensor, *, threshold: float = 1.0) -> Tensor:
    """A = (r - mean) / mean, r whether a rollout succeeds; 0 in a group without a success.

    Follows grad J_T, J_T = -sum_{k<=T} (1 - p)^k / k with T = G - 1: the mean, which holds r itself, costs one term.

    Args:
        rewards_PG: (P, G), none negative; NaN: not scored, gets 0.
        threshold: a rollout succeeds from this reward on.

    Returns (P, G). Raises InputError for negative rewards, with which the sign of A would flip.
    """
    rewards_PG = floating(rewards_PG)
    success, scored = successes(rewards_PG, threshold)
    centred, _ = centre(success.to(rewards_PG).masked_fill(rewards_PG.isnan(), float("nan")))
    return centred * scored / success.sum(1, keepdim=True).clamp(min=1)
