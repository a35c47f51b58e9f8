"""Advantage axis: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)."""

from __future__ import annotations

from torch import Tensor

from cepo.advantages import centre


def dr_grpo(rewards_PG: Tensor) -> Tensor:
    """A = r - mean. (P, G) -> (P, G); NaN rewards give 0."""
    return centre(rewards_PG)[0]
