"""Loss axis: CISPO, whose clipped ratio weighs the log-prob's gradient and lets it through (arXiv 2506.13585)."""

from __future__ import annotations

from torch import Tensor

from cepo.losses import Loss

SURROGATE = "cispo"
SUPERVISION: tuple[str, ...] = ()


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Loss:
    """-sum_t weight_t stop_gradient(clip(rho_t, 1 - low, 1 + high)) A_t log p_t, rho = exp(logprobs - old_logprobs)."""
    ratio = (logprobs - old_logprobs).exp().detach()
    held = ratio.clamp(1 - clip_low, 1 + clip_high)
    return Loss(-(token_weights * held * advantages * logprobs).sum(), ratio, held != ratio)
