"""The statistics of a comparison, against tables, published examples and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from cepo.compare.statistics import LEVEL, Paired, area, detectable, holm, mean_sd, paired, quantile, verdict, within

# Student (1908): hours of sleep gained by ten patients under two drugs.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.7062047), (0.975, 2, 4.3026527), (0.975, 3, 3.1824463), (0.975, 4, 2.7764451),
        (0.975, 5, 2.5705818), (0.975, 9, 2.2621572), (0.975, 30, 2.0422725), (0.975, 100, 1.9839715),
        (0.995, 4, 4.6040949), (0.9995, 2, 31.5990546), (0.8, 4, 0.9409646), (0.5, 7, 0.0), (0.025, 4, -2.7764451),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(p: float, df: int, expected: float) -> None:
    assert quantile(p, df) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 41])
def test_the_quantile_inverts_the_distribution(df: int) -> None:
    for p in (0.6, 0.9, 0.999):
        assert within(quantile(p, df), df) == pytest.approx(2 * p - 1, abs=1e-12)


def test_a_paired_difference_is_that_of_the_textbook() -> None:
    difference = paired(by_seed(FIRST), by_seed(SECOND))
    assert difference.n == 10
    assert difference.mean == pytest.approx(-1.58)
    assert difference.sd == pytest.approx(1.2299955)
    assert (difference.low, difference.high) == pytest.approx((-2.4598858, -0.7001142))
    assert difference.p == pytest.approx(0.00283289, rel=1e-5)


def test_pairs_are_made_by_seed_and_only_of_seeds_that_both_have() -> None:
    difference = paired({3: 0.5, 1: 0.4, 7: 9.0}, {1: 0.2, 3: 0.4, 2: -9.0})
    assert (difference.n, difference.mean) == (2, pytest.approx(0.15))


def test_too_few_pairs_say_nothing() -> None:
    assert paired({}, {0: 1.0}) == Paired(0, None, None, None, None, None)
    assert paired({0: 1.5}, {0: 1.0}) == Paired(1, 0.5, None, None, None, None)
    assert mean_sd([]) == (None, None)
    assert mean_sd([2.0]) == (2.0, None)
    assert detectable(None, 1) is None


def test_equal_differences_have_no_error_to_judge_by() -> None:
    none = paired({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7})
    assert none == Paired(2, 0.0, 0.0, 0.0, 0.0, 1.0)
    alike = paired({0: 0.6, 1: 0.8}, {0: 0.5, 1: 0.7})
    assert (alike.low, alike.high, alike.p) == (None, None, None)
    assert verdict(alike, None) == "not separated"


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([None, 0.01, None]) == [None, pytest.approx(0.03), None]  # they still count


def test_a_verdict_needs_a_corrected_p_and_a_side() -> None:
    better, worse = Paired(5, 0.1, 0.1, 0, 0, 0.01), Paired(5, -0.1, 0.1, 0, 0, 0.01)
    assert verdict(better, 0.049) == "better"
    assert verdict(worse, 0.049) == "worse"
    assert verdict(better, 0.05) == verdict(better, None) == "not separated"
    assert verdict(Paired(0, None, None, None, None, None), None) == "no data"


@pytest.mark.parametrize("n", [2, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int) -> None:
    draws = np.random.default_rng(0).normal(0.3, 0.1, (4000, n))
    intervals = [paired(by_seed(list(row)), by_seed([0.0] * n)) for row in draws]
    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals if i.low is not None and i.high is not None])
    assert covered == pytest.approx(0.95, abs=0.011)  # three standard errors
    wrong = np.mean([(i.p is not None and i.p < LEVEL) != (i.low > 0 or i.high < 0) for i in intervals])  # type: ignore[operator]
    assert wrong == 0


def test_holm_errs_in_one_family_of_twenty() -> None:
    draws = np.random.default_rng(1).normal(size=(1500, 5, 5))  # a reference and four methods of equal worth
    errors = 0
    for reference, *methods in draws:
        p = holm([paired(by_seed(list(m)), by_seed(list(reference))).p for m in methods])
        errors += any(value is not None and value < LEVEL for value in p)
    assert 0.015 < errors / len(draws) < 0.05 + 3 * (0.05 * 0.95 / len(draws)) ** 0.5


@pytest.mark.parametrize(("n", "level"), [(2, LEVEL), (3, LEVEL), (5, LEVEL), (5, LEVEL / 10), (10, LEVEL)])
def test_the_detectable_effect_is_detected_four_times_in_five(n: int, level: float) -> None:
    effect = detectable(0.5, n, level)
    assert effect is not None
    draws = np.random.default_rng(2).normal(effect, 0.5, (4000, n))
    found = [paired(by_seed(list(row)), by_seed([0.0] * n)).p for row in draws]
    assert np.mean([p is not None and p < level for p in found]) == pytest.approx(0.8, abs=0.019)


def test_the_area_is_the_mean_height_over_the_steps() -> None:
    assert area([0, 20, 40], [0.5, 0.5, 0.5]) == 0.5
    assert area([0, 10, 40], [0.0, 1.0, 0.5]) == pytest.approx((5 + 22.5) / 40)
