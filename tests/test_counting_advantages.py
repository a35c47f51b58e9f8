"""maxrl and rl2ml: every outcome of small groups is enumerated, in fractions, and what they promise holds exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from cepo.advantages.maxrl import maxrl
from cepo.advantages.rl2ml import multiplier, population_weight, rl2ml, update_scale, variance
from cepo.advantages.rloo import rloo
from cepo.config import AdvantageConfig
from cepo.errors import InputError

F = Fraction
ALPHAS = [F(0), F(1, 2), F(1), F(3, 2), F(5, 2)]
CHANCES = [F(1, 50), F(1, 3), F(1, 2), F(7, 8)]
SIZES = [2, 3, 4, 5]
BASELINES = ["loo", "none"]
NAN = float("nan")


def outcomes(size: int) -> list[tuple[int, ...]]:
    return list(product((0, 1), repeat=size))


def rewards(size: int) -> Tensor:
    return torch.tensor(outcomes(size), dtype=torch.float64)


def exact_multiplier(k: int, size: int, alpha: Fraction) -> Fraction:
    """Gamma(G + alpha) Gamma(k) / (Gamma(G) Gamma(k + alpha)), the common factors gone."""
    return prod(((j + alpha) / j for j in range(k, size)), start=F(1)) if k else F(0)


def exact_rl2ml(group: tuple[int, ...], alpha: Fraction, baseline: str) -> list[Fraction]:
    result = []
    for r in group:
        m = sum(group) - r
        b = exact_multiplier(m + 1, len(group), alpha)
        result.append(b * (r - F(m, len(group) - 1)) if baseline == "loo" else b * r)
    return result


def exact_maxrl(group: tuple[int, ...]) -> list[Fraction]:
    mean = F(sum(group), len(group))
    return [(r - mean) / mean if mean else F(0) for r in group]


def exact_gradient(size: int, p: Fraction, advantages: dict[tuple[int, ...], list[Fraction]]) -> Fraction:
    """E[sum_i A_i s_i / G] with grad p = 1: a success has the score 1 / p on average, a failure -1 / (1 - p)."""
    total = F(0)
    for group in outcomes(size):
        chance = prod((p if r else 1 - p for r in group), start=F(1))
        scores = [1 / p if r else -1 / (1 - p) for r in group]
        total += chance * sum((a * s for a, s in zip(advantages[group], scores, strict=True)), start=F(0)) / size
    return total


def exact_weight(p: Fraction, size: int, alpha: Fraction) -> Fraction:
    """The first G terms of p^-alpha in powers of 1 - p."""
    return sum((prod(((alpha + i) / (i + 1) for i in range(j)), start=F(1)) * (1 - p) ** j for j in range(size)), F(0))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", SIZES)
def test_rl2ml_follows_its_weight_times_grad_p(size: int, alpha: Fraction, baseline: str) -> None:
    exact = {group: exact_rl2ml(group, alpha, baseline) for group in outcomes(size)}
    got = rl2ml(rewards(size), alpha=float(alpha), baseline=baseline)
    expected = torch.tensor([[float(a) for a in exact[group]] for group in outcomes(size)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for p in CHANCES:
        w = exact_weight(p, size, alpha)
        assert exact_gradient(size, p, exact) == w
        weight = population_weight(torch.tensor(float(p), dtype=torch.float64), size, float(alpha)).item()
        assert weight == pytest.approx(float(w), rel=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_maxrl_follows_its_own_truncated_objective(size: int) -> None:
    exact = {group: exact_maxrl(group) for group in outcomes(size)}
    expected = torch.tensor([[float(a) for a in exact[group]] for group in outcomes(size)], dtype=torch.float64)
    torch.testing.assert_close(maxrl(rewards(size)), expected, rtol=1e-13, atol=1e-13)
    for p in CHANCES:
        slope = sum(((1 - p) ** (k - 1) for k in range(1, size)), F(0))  # of J_T at T = G - 1
        assert exact_gradient(size, p, exact) == slope
        assert slope != sum(((1 - p) ** (k - 1) for k in range(1, size + 1)), F(0)), "T = G would be another one"


def test_centring_by_the_groups_own_mean_would_follow_something_else() -> None:
    p, alpha = F(1, 3), F(3, 2)
    biased = {}
    for group in outcomes(4):
        b = exact_multiplier(sum(group), 4, alpha)
        biased[group] = [b * (r - F(sum(group), 4)) for r in group]
    assert exact_gradient(4, p, biased) != exact_weight(p, 4, alpha)


@pytest.mark.parametrize("size", SIZES)
def test_alpha_0_is_rloo_and_alpha_1_maximum_likelihood(size: int) -> None:
    groups = rewards(size)
    torch.testing.assert_close(rl2ml(groups, alpha=0.0), rloo(groups), rtol=0, atol=1e-15)
    k = torch.arange(1, size + 1).double()
    torch.testing.assert_close(multiplier(k, size, 1.0), size / k)
    assert torch.equal(multiplier(k, size, 0.0), torch.ones(size).double())
    p = torch.linspace(0.01, 1, 100).double()
    torch.testing.assert_close(population_weight(p, size, 1.0), (1 - (1 - p) ** size) / p)


def test_the_update_scale_rises_below_alpha_1_is_flat_there_and_falls_above() -> None:
    k = torch.arange(0, 17).double()
    for alpha in (0.0, 0.5, 1.0, 1.5, 2.5):
        scale = update_scale(k, 16, alpha)
        assert scale[0] == 0
        torch.testing.assert_close(scale[2:] / scale[1:-1], ((k + 1) / (k + alpha))[1:-1])


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_variance_is_that_of_every_outcome(size: int, alpha: float, baseline: str) -> None:
    # A softmax over two right and three wrong answers: the score of answer i is e_i - q.
    q = torch.tensor([0.1, 0.25, 0.05, 0.2, 0.4], dtype=torch.float64)
    right = torch.tensor([1, 1, 0, 0, 0], dtype=torch.bool)
    scores, p = torch.eye(5).double() - q, q[right].sum()
    gradient = (q[right, None] * scores[right]).sum(0)

    def trace(which: Tensor) -> Tensor:
        chance = q[which] / q[which].sum()
        centred = scores[which] - (chance[:, None] * scores[which]).sum(0)
        return (chance[:, None] * centred.square()).sum()

    groups = torch.tensor(list(product(range(5), repeat=size)))
    chance = q[groups].prod(1)
    advantages = rl2ml(right[groups].double(), alpha=alpha, baseline=baseline)
    estimates = (advantages[..., None] * scores[groups]).mean(1)
    mean = (chance[:, None] * estimates).sum(0)
    torch.testing.assert_close(mean, population_weight(p, size, alpha) * gradient)
    expected = (chance * (estimates - mean).square().sum(1)).sum()
    got = variance(
        p, size, alpha, baseline, grad_squared=gradient @ gradient, right_trace=trace(right), wrong_trace=trace(~right)
    )
    torch.testing.assert_close(got, expected)


def test_leave_one_out_varies_less_for_frequent_success_and_not_always() -> None:
    p = torch.tensor([0.02, 0.5, 0.9])
    unit = {"grad_squared": (p * (1 - p)).square().double(), "right_trace": torch.ones(3), "wrong_trace": torch.ones(3)}
    loo, none = (variance(p, 8, 1.0, baseline, **unit) for baseline in BASELINES)
    assert (loo < none).tolist() == [False, True, True]


@pytest.mark.parametrize("advantage", [maxrl, rl2ml])
def test_a_group_is_as_large_as_the_number_scored(advantage: object) -> None:
    assert callable(advantage)
    got = advantage(torch.tensor([[1.0, NAN, 0.0, 1.0, NAN]]))
    assert torch.equal(got[0, [0, 2, 3]], advantage(torch.tensor([[1.0, 0.0, 1.0]]))[0])
    assert (got[0, [1, 4]] == 0).all()


@pytest.mark.parametrize("advantage", [maxrl, rl2ml])
def test_success_begins_at_the_threshold(advantage: object) -> None:
    assert callable(advantage)
    partial = torch.tensor([[0.2, 0.5, 1.0, 0.0]])
    assert torch.equal(advantage(partial), advantage(torch.tensor([[0.0, 0.0, 1.0, 0.0]])))
    assert torch.equal(advantage(partial, threshold=0.5), advantage(torch.tensor([[0.0, 1.0, 1.0, 0.0]])))


@pytest.mark.parametrize("advantage", [maxrl, rl2ml])
def test_negative_rewards_are_refused(advantage: object) -> None:
    assert callable(advantage)
    with pytest.raises(InputError, match=r"rewards: expected none below 0 .*, got -0\.5"):
        advantage(torch.tensor([[1.0, NAN, -0.5]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("advantage", [maxrl, rl2ml])
def test_whole_rewards_are_as_good(advantage: object, dtype: torch.dtype) -> None:
    assert callable(advantage)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(advantage(rewards.to(dtype)), advantage(rewards))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="alpha: expected a number, at least 0, got 'auto'"):
        rl2ml(torch.ones(1, 2), alpha="auto")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"alpha: expected one whose weights in groups of 2 .*float32.*, got 1e\+308"):
        rl2ml(torch.ones(1, 2), alpha=1e308)
    with pytest.raises(InputError, match="alpha: expected a number, at least 0, got -1"):
        rl2ml(torch.ones(1, 2), alpha=-1)
    with pytest.raises(InputError, match="alpha: expected a number, at least 0, got True"):
        rl2ml(torch.ones(1, 2), alpha=True)
    with pytest.raises(InputError, match=r"advantage.alpha: expected auto or a number, at least 0, got True"):
        AdvantageConfig("rl2ml", alpha=True).check()
    with pytest.raises(InputError, match="baseline: expected one of loo, none, got 'mean'"):
        rl2ml(torch.ones(1, 2), baseline="mean")


def test_without_a_baseline_a_group_that_succeeds_still_moves() -> None:
    assert torch.equal(rl2ml(torch.ones(1, 4), alpha=2.0, baseline="none"), torch.ones(1, 4))
