"""The statistics behind a diagnosis: ranks with ties, means with intervals, and the signal and noise of a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


def auroc(positive: Tensor, negative: Tensor) -> float:
    """P(a positive scores above a negative), a tie counting half: the area under the ROC curve (Hanley, McNeil 1982).

    Both (n,), neither empty; infinite scores are scores.
    """
    above, tied = positive[:, None] > negative, positive[:, None] == negative
    return ((above.sum() + tied.sum() / 2) / above.numel()).item()


def top_share(scores: Tensor, index: int) -> float:
    """1 if `scores[index]` is the highest of (n,), 1/k if it shares that with others, k in all, else 0."""
    highest = scores == scores.max()
    return (highest[index] / highest.sum()).item()


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; n values from independent clusters. No interval of fewer than two clusters."""

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int


def estimate(values: Tensor, clusters: Tensor, seed: int = 0) -> Estimate | None:
    """Mean of `values`, (n,), with a percentile bootstrap over whole clusters; None if there are no values.

    Values of one cluster, (n,) integers, may depend on each other, as the rollouts of one problem do.
    """
    values = values.double()
    if not values.numel():
        return None
    _, index, count = clusters.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(count.numel(), dtype=torch.float64).index_add(0, index, values)
    mean, n, k = values.mean().item(), values.numel(), count.numel()
    if k < 2:
        return Estimate(mean, None, None, n, k)
    drawn = torch.randint(k, (RESAMPLES, k), generator=torch.Generator().manual_seed(seed))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high, n, k)


def dot(a: Tensor, b: Tensor) -> float:
    """In float64: a million float32 terms lose four digits."""
    return torch.dot(a.double(), b.double()).item()


class GradientMoments:
    """Mean and total variance of a stream of vectors, of which one is kept (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._spread = 0.0

    def add(self, vector: Tensor) -> None:
        """Take one more vector, (D,)."""
        self.count += 1
        before = vector - self.mean
        self.mean = self.mean + before / self.count
        self._spread += dot(before, vector - self.mean)

    @property
    def variance(self) -> float:
        """tr Cov(g), unbiased."""
        return self._spread / (self.count - 1)

    @property
    def signal(self) -> float:
        """|E g|^2, unbiased, hence possibly negative."""
        return dot(self.mean, self.mean) - self.variance / self.count

    @property
    def noise_ratio(self) -> float | None:
        """tr Cov(g) / |E g|^2; None where the mean is not told from noise."""
        return self.variance / self.signal if self.signal > 0 else None
