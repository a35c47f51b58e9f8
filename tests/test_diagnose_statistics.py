"""What a diagnosis computes, against brute force and simulation."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cepo.diagnose.statistics import GradientMoments, auroc, estimate, top_share

scores = st.lists(st.integers(-2, 2), min_size=1, max_size=6)


def area_under_the_curve(positive: list[int], negative: list[int]) -> float:
    """The ROC curve drawn threshold by threshold, and its area by trapezoids."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*positive, *negative}, reverse=True):
        points.append(tuple(sum(x >= threshold for x in xs) / len(xs) for xs in (negative, positive)))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))


@given(positive=scores, negative=scores)
def test_auroc_is_the_area_under_the_curve_ties_included(positive: list[int], negative: list[int]) -> None:
    got = auroc(torch.tensor(positive).float(), torch.tensor(negative).float())
    assert got == pytest.approx(area_under_the_curve(positive, negative))


def test_auroc_takes_infinite_scores() -> None:
    inf = float("inf")
    assert auroc(torch.tensor([inf]), torch.tensor([0.0, inf, -inf])) == pytest.approx(2.5 / 3)


@given(values=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_top_share_is_how_often_random_ties_put_it_first(values: list[int]) -> None:
    orders = list(permutations(range(len(values))))
    for index in range(len(values)):
        first = sum(max(order, key=lambda i: (values[i], order.index(i))) == index for order in orders)
        assert top_share(torch.tensor(values).float(), index) == pytest.approx(first / len(orders))


def test_an_interval_covers_the_mean_as_often_as_it_says_although_values_of_a_cluster_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(40).repeat_interleave(4)
    covered = {"clusters": 0, "values": 0}
    for _ in range(200):
        values = torch.randn(40, generator=generator).repeat_interleave(4)
        values += 0.3 * torch.randn(160, generator=generator)
        for name, owners in (("clusters", clusters), ("values", torch.arange(160))):
            got = estimate(values, owners)
            covered[name] += got.low <= 0 <= got.high
    assert 0.89 <= covered["clusters"] / 200 <= 0.98
    assert covered["values"] / 200 < 0.8  # what it would be if rollouts of a problem were taken as independent


def test_an_estimate_weighs_values_not_clusters_and_is_the_same_every_time() -> None:
    values, clusters = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([7, 7, 7, 2])
    got = estimate(values, clusters)
    assert (got.mean, got.low, got.high, got.n, got.clusters) == (2.0, 1.0, 5.0, 4, 2)
    assert got == estimate(values, clusters)
    assert estimate(values, torch.zeros(4)).low is None
    assert estimate(values[:0], clusters[:0]) is None


def test_gradient_moments_are_those_of_all_gradients_at_once() -> None:
    gradients = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)) + 0.5
    moments = GradientMoments()
    for gradient in gradients:
        moments.add(gradient)
    variance = gradients.double().var(0).sum().item()
    mean = gradients.double().mean(0)
    pairs = [(gradients[i].double() @ gradients[j].double()).item() for i in range(9) for j in range(9) if i != j]
    assert torch.allclose(moments.mean.double(), mean, atol=1e-6)
    assert moments.variance == pytest.approx(variance, rel=1e-5)
    # |E g|^2 without bias: the mean product of two different gradients.
    assert moments.signal == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    assert moments.noise_ratio == pytest.approx(variance / (sum(pairs) / len(pairs)), rel=1e-4)


def test_a_mean_that_is_not_told_from_noise_has_no_ratio() -> None:
    moments = GradientMoments()
    for gradient in (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.5])):
        moments.add(gradient)
    assert moments.signal < 0
    assert moments.noise_ratio is None
