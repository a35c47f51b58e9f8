"""Advantage axis: REINFORCE, leave one out (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from torch import Tensor

from cepo.advantages import centre


def rloo(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the others = (r_i - mean) n / (n - 1). (P, G) -> (P, G); NaN rewards give 0.

    A rollout that is alone in being scored has no others and gets 0.
    """
    centred, count = centre(rewards_PG)
    return centred * count / (count - 1).clamp(min=1)
