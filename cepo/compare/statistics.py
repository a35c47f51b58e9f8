"""Small-sample statistics of paired runs: Student's t, intervals of a paired difference, Holm's correction."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Method minus reference over the seeds that both have.

    With fewer than two there is a mean at most, and no interval where all differ by the same amount.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of a mean of 0."""


def within(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with `df` degrees of freedom: a finite sum (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, df - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * square
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@functools.cache
def quantile(p: float, df: int) -> float:
    """The t below which a share `p` in (0, 1) of Student's t with `df` degrees of freedom lies."""
    if p < 0.5:
        return -quantile(1 - p, df)
    low, high = 0.0, 1.0
    while within(high, df) < 2 * p - 1:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, df) < 2 * p - 1 else (low, middle)
    return high


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    return (
        float(np.mean(values)) if values else None,
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
    )


def paired(method: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL) -> Paired:
    """The paired t interval of confidence 1 - `level` for method minus reference, and the p of no difference.

    Args:
        method, reference: a value for each seed; seeds that only one has are left out.
    """
    differences = [method[seed] - reference[seed] for seed in sorted(method.keys() & reference.keys())]
    n = len(differences)
    mean, sd = mean_sd(differences)
    if mean is None or sd is None:
        return Paired(n, mean, None, None, None, None)
    if sd <= 1e-12:  # but for rounding they are all the same: nothing, or too coarse to know their error
        none = abs(mean) <= 1e-12
        return Paired(n, mean, 0.0, mean if none else None, mean if none else None, 1.0 if none else None)
    error = sd / math.sqrt(n)
    half = quantile(1 - level / 2, n - 1) * error
    p = max(0.0, 1 - within(abs(mean) / error, n - 1))
    return Paired(n, mean, sd, mean - half, mean + half, p)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p of a family (Holm 1979): p_(i) becomes the largest (m - j + 1) p_(j) of j <= i, 1 at most.

    None stays None and counts in m: a comparison still to be made makes the others no easier.
    """
    largest = 0.0
    adjusted: list[float | None] = [None] * len(p)
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    for rank, (value, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        adjusted[i] = largest
    return adjusted


def detectable(sd: float | None, n: int, level: float = LEVEL) -> float | None:
    """The true difference that n pairs of normal differences show at `level` four times in five.

    None without a standard deviation above 0.
    """
    return _shift(n, level) * sd / math.sqrt(n) if sd else None


@functools.cache
def _shift(n: int, level: float) -> float:
    """The mean, in standard errors, at which a two-sided t test of n values has its POWER: noncentral t, integrated."""
    df, bound = n - 1, quantile(1 - level / 2, n - 1)
    s = np.linspace(0, 8, 2001)[1:]  # the sample's standard deviation over the true one, a scaled chi
    density = s ** (df - 1) * np.exp(-df * s**2 / 2)
    erfc = np.vectorize(math.erfc)

    def power(mean: float) -> float:
        beyond = erfc((bound * s - mean) / math.sqrt(2)) + erfc((bound * s + mean) / math.sqrt(2))
        return float((density * beyond).sum() / density.sum() / 2)

    low, high = 0.0, 2 * (bound + 1)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def verdict(difference: Paired, p_holm: float | None) -> str:
    """ "better" or "worse" where Holm's p is below .05, "not separated" where it is not, "no data" without a pair."""
    if difference.mean is None:
        return "no data"
    if p_holm is None or p_holm >= LEVEL:
        return "not separated"
    return "better" if difference.mean > 0 else "worse"


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a curve over its steps, by trapezoids."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    width = np.diff(x)
    return float((width * (y[1:] + y[:-1]) / 2).sum() / width.sum())
