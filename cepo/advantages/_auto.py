"""`alpha: auto` of rl2ml: the alpha whose step would have gained most, judged by earlier steps alone.

To first order and with the best step size, following g gains <grad M, E g>^2 / E|g|^2 of the mean success rate M. Over
prompts, whose gradients are taken to be orthogonal, that is

    (sum_x w(p_x) |grad p_x|^2)^2 / sum_x (w(p_x)^2 |grad p_x|^2 + tr Cov g_x)

with |grad p|^2 = (p (1 - p))^2, as if each prompt had one logit. The p_x are a histogram of K smoothed by the prior
Beta(1/2, 1/2); the score's variance within successes is that of their tokens' logits, one parameter each, the failures'
taken to be alike. Both are averaged over earlier steps with exponentially falling weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cepo.advantages import successes
from cepo.advantages.rl2ml import population_weight, variance
from cepo.errors import InputError

GRID = tuple(i / 4 for i in range(13))
START = 1.0
DECAY = 0.9

State = dict[str, Tensor]


def start(group_size: int) -> State:
    """What is known before the first step: `histogram` of K, (G + 1,), and sum and number of `scores`; float64."""
    return {name: torch.zeros(n, dtype=torch.float64) for name, n in (("histogram", group_size + 1), ("scores", 2))}


def observed(state: State, rewards_PG: Tensor, squared_scores_PG: Tensor, threshold: float) -> State:
    """`state` after one more step.

    Args:
        rewards_PG: (P, G); groups that are not scored whole are left out.
        squared_scores_PG: (P, G) estimates of |grad log pi(y)|^2 in logits, sum_t (1 - p(y_t)); NaN: not known.
        threshold: a rollout succeeds from this reward on.
    """
    success, scored = successes(rewards_PG, threshold)
    whole = (scored == rewards_PG.shape[1]).flatten()
    counts = torch.bincount(success.sum(1)[whole], minlength=rewards_PG.shape[1] + 1)
    known = squared_scores_PG[success & ~squared_scores_PG.isnan()].double()
    new = {"histogram": counts.double(), "scores": torch.stack([known.sum(), torch.tensor(known.numel()).double()])}
    return {name: DECAY * state[name] + (1 - DECAY) * new[name] for name in state}


def choose(state: State, baseline: str) -> float:
    """The best alpha of GRID for what `state` holds; START where it holds too little."""
    share, (total, number) = state["histogram"], state["scores"].tolist()
    if not share.sum() or not number:
        return START
    size = share.numel() - 1
    p = (torch.arange(size + 1) + 0.5).double() / (size + 1)
    squared = (p * (1 - p)).square()
    traces = {"right_trace": (total / number - (1 - p).square()).clamp(min=0),
              "wrong_trace": (total / number - p.square()).clamp(min=0)}  # fmt: skip

    def gain(alpha: float) -> float:
        w = population_weight(p, size, alpha)
        noise = variance(p, size, alpha, baseline, grad_squared=squared, **traces)
        return float((share * w * squared).sum() ** 2 / (share * (w.square() * squared + noise)).sum())

    return max(GRID, key=gain)


class AutoAlpha:
    """The state of a run: `options()` for the coming step, then `observe(...)` once the step is done."""

    def __init__(self, group_size: int, baseline: str, threshold: float) -> None:
        self.baseline, self.threshold = baseline, threshold
        self.state = start(group_size)

    def options(self) -> dict[str, float]:
        return {"alpha": choose(self.state, self.baseline)}

    def observe(self, rewards_PG: Tensor, squared_scores_PG: Tensor) -> None:
        self.state = observed(self.state, rewards_PG, squared_scores_PG, self.threshold)

    def restore(self, state: State) -> None:
        """Go on from a checkpoint's state. Raises InputError if its groups were of another size."""
        size, own = (s["histogram"].numel() - 1 for s in (state, self.state))
        if size != own:
            raise InputError(f"rollout.group_size: expected {size}, which advantage.alpha auto has counted, got {own}")
        self.state = state
