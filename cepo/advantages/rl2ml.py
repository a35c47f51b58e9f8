"""Advantage axis: an RL2ML-type family: reinforcement (alpha = 0), maximum likelihood (alpha = 1), and beyond.

After arXiv 2605.30154, which shows that an estimator that knows a group by its number of successes K alone follows
w(p) grad p, p the chance of success and w a polynomial. This one-parameter family is ours: w is the first G terms of
p^-alpha in powers of 1 - p, the objective -sum_{j<G} (alpha)_j / j! (1-p)^(j+1) / (j+1), (alpha)_j a rising factorial.
The gradient of a group is sum_i A_i grad log pi(y_i) / G, which only the loss average "constant" leaves as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cepo.advantages import floating, successes
from cepo.errors import InputError

if TYPE_CHECKING:
    from cepo.advantages._auto import AutoAlpha
    from cepo.config import Config

AVERAGE = "constant"
BASELINES = ("loo", "none")


def adaptive(config: Config) -> AutoAlpha | None:
    """What chooses alpha from earlier steps, if `advantage.alpha` is auto."""
    from cepo.advantages._auto import AutoAlpha

    if config.advantage.alpha != "auto":
        return None
    assert config.advantage.baseline is not None
    return AutoAlpha(config.rollout.group_size, config.advantage.baseline, config.reward.success_threshold)


def rl2ml(rewards_PG: Tensor, *, alpha: float = 1.0, baseline: str = "loo", threshold: float = 1.0) -> Tensor:
    """A_i = b_m (r_i - m / (G - 1)), r_i whether rollout i succeeds, m how many others do, b_m = multiplier(m + 1).

    Args:
        rewards_PG: (P, G), none negative. NaN: not scored, gets 0, and the group is one of the scored ones.
        alpha: at least 0; "auto" is the trainer's.
        baseline: "loo", the formula above, of usually lower variance (see `variance`); "none": A_i = b_m r_i.
        threshold: a rollout succeeds from this reward on.

    Returns (P, G). Raises InputError for negative rewards, or an option out of its range.
    """
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha < float("inf"):
        raise InputError(f"alpha: expected a number, at least 0, got {alpha!r}")
    rewards_PG = floating(rewards_PG)
    success, scored = successes(rewards_PG, threshold)
    right, wrong = weights(success.sum(1, keepdim=True), scored, alpha, baseline)
    found = torch.where(success, right, wrong).masked_fill(rewards_PG.isnan(), 0.0).to(rewards_PG.dtype)
    if not found.isfinite().all():
        size = rewards_PG.shape[1]
        raise InputError(f"alpha: expected one whose weights in groups of {size} {found.dtype} holds, got {alpha:g}")
    return found


def multiplier(k: Tensor, group_size: Tensor | int, alpha: float) -> Tensor:
    """beta(k) = Gamma(G + alpha) Gamma(k) / (Gamma(G) Gamma(k + alpha)), 0 for k = 0; float64, shape of `k`."""
    g = torch.as_tensor(group_size, dtype=torch.float64)
    least = k.double().clamp(min=1)
    log = (g + alpha).lgamma() - g.lgamma() - ((least + alpha).lgamma() - least.lgamma())
    return torch.where(k > 0, log.exp(), 0.0)


def weights(k: Tensor, group_size: Tensor | int, alpha: float, baseline: str) -> tuple[Tensor, Tensor]:
    """Advantages of a success and of a failure in a group with `k` successes; float64, shape of `k`."""
    if baseline not in BASELINES:
        raise InputError(f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
    size = torch.as_tensor(group_size, dtype=torch.float64).clamp(min=1)
    right = multiplier(k, size, alpha)
    if baseline == "none":
        return right, torch.zeros_like(right)
    others = (size - 1).clamp(min=1)  # alone in being scored: no others, and 0
    return right * ((size - k) / others), -multiplier(k + 1, size, alpha) * (k / others)


def update_scale(k: Tensor, group_size: int, alpha: float) -> Tensor:
    """S(k) = k / G beta(k), how far k successes move the group: rising in k for alpha < 1, flat at 1, else falling."""
    return k * multiplier(k, group_size, alpha) / group_size


def population_weight(p: Tensor, group_size: int, alpha: float) -> Tensor:
    """w(p) = sum_{j<G} (alpha)_j / j! (1 - p)^j, what grad p is multiplied by on average; float64, shape of `p`."""
    j = torch.arange(group_size, dtype=torch.float64)
    coefficients = torch.cat([torch.ones(1, dtype=torch.float64), (alpha + j[:-1]) / j[1:]]).cumprod(0)
    return (coefficients * (1 - p.double())[..., None] ** j).sum(-1)


def variance(
    p: Tensor,
    group_size: int,
    alpha: float,
    baseline: str,
    *,
    grad_squared: Tensor,
    right_trace: Tensor,
    wrong_trace: Tensor,
) -> Tensor:
    """Trace of the covariance of a group's gradient.

    E[K A+^2] / G^2 tr Sigma+ + E[(G - K) A-^2] / G^2 tr Sigma- + Var(u(K)) |grad p|^2, A+ and A- the advantages of
    a success and a failure and u = (K A+ / p - (G - K) A- / (1 - p)) / G. Without a baseline A- is 0 and u = S(K) / p.

    Args:
        p: chance of success, in (0, 1).
        grad_squared: |grad p|^2, shape of `p`.
        right_trace, wrong_trace: trace of the covariance of the score grad log pi(y) among successes and failures.

    Returns float64, shape of `p`.
    """
    p = p.double()[..., None]
    k = torch.arange(group_size + 1, dtype=torch.float64)
    ways = torch.tensor(group_size + 1.0).double().lgamma() - (k + 1).lgamma() - (group_size - k + 1).lgamma()
    chance = (ways + k * p.log() + (group_size - k) * (-p).log1p()).exp()
    right, wrong = (a / group_size for a in weights(k, group_size, alpha, baseline))
    along = k * right / p - (group_size - k) * wrong / (1 - p)
    spread = (chance * along.square()).sum(-1) - (chance * along).sum(-1).square()
    within = [(chance * n * a.square()).sum(-1) for n, a in ((k, right), (group_size - k, wrong))]
    return within[0] * right_trace + within[1] * wrong_trace + spread * grad_squared
