"""Loss axis: the clipped surrogate of PPO (arXiv 1707.06347), its two clips apart as in DAPO (arXiv 2503.14476)."""

from __future__ import annotations

import torch
from torch import Tensor

from cepo.losses import Loss

SURROGATE = "ppo"
SUPERVISION: tuple[str, ...] = ()


def clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Loss:
    """-sum_t weight_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), rho = exp(logprobs - old_logprobs)."""
    ratio = (logprobs - old_logprobs).exp()
    free = ratio * advantages
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return Loss(-(token_weights * torch.min(free, held)).sum(), ratio.detach(), (held < free).detach())
