"""Advantage axis: GRPO (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from torch import Tensor

from cepo.advantages import centre


def grpo(rewards_PG: Tensor, *, eps: float = 1e-4) -> Tensor:
    """A = (r - mean) / (std + eps), std unbiased (divided by G - 1). (P, G) -> (P, G); NaN rewards give 0."""
    centred, count = centre(rewards_PG)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + eps)
