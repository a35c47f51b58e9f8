"""On a CPU in float32, logits that nobody keeps come in tiles of the vocabulary, and nothing else is seen of that."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F

import cepo_kernels
from cepo_kernels import backends, linear_contrastive_logprobs, linear_products, linear_token_logprobs
from cepo_kernels.backends import sharded

pytestmark = pytest.mark.skipif(backends.unavailable("cpu", "cpu") is not None, reason="no native backend here")
ROWS, TILE, VOCABULARY = 48, 100, 325
INF, LOWEST = math.inf, torch.finfo(torch.float32).min


@pytest.fixture
def made(monkeypatch):
    """The logits that a call makes; tiles of 100 columns, whatever they need."""
    found, original = [], linear_products.Products.logits

    def recorded(self, *arguments):
        found.append(original(self, *arguments))
        return found[-1]

    monkeypatch.setattr(linear_products.Products, "logits", recorded)
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 0)
    monkeypatch.setattr(sharded, "TILE", TILE)
    return found


def inputs(**bias):
    """Whole numbers, whose logits no product rounds, up to 2^23."""
    hidden = oracle.logits_like((3, ROWS, 8), 1, spread=1.0).round()
    weight = oracle.logits_like((VOCABULARY, 8), 2, spread=1.0).round()
    added = oracle.logits_like((VOCABULARY,), 3, spread=3.0).round()
    for where, value in bias.items():
        first, stop = map(int, where.strip("c").split("_"))
        added[first:stop] = value
    labels = torch.tensor([0, 99, 100, 200, 299, 300, -100, VOCABULARY - 1]).repeat(6)
    return hidden, weight, labels, torch.linspace(-1, 1, ROWS), added


def check(made, options, **bias):
    hidden, weight, labels, advantages, added = inputs(**bias)
    options = {"return_entropy": True, **options}
    got = linear_contrastive_logprobs(*hidden, weight, labels, advantages, lm_head_bias=added, **options)
    logits = [F.linear(x.double(), weight.double(), added.double()) for x in hidden]
    want = cepo_kernels.contrastive_logprobs(*logits, labels, advantages.double(), **options)
    for name, value in got._asdict().items():
        expected = getattr(want, name)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": torch.linspace(0.7, 1.3, ROWS)},
        {"logit_softcap": 5.0, "logit_scale": 0.5},
        {"negative_mask": torch.arange(ROWS) % 3 > 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_neither_a_rows_logits_nor_memory_for_all_columns_exist(made, options):
    check(made, options, c60_61=40.0)  # in one tile is nearly all of the probability
    assert {x.shape[1] for x in made} == {TILE, VOCABULARY % TILE}
    assert len({x.untyped_storage().data_ptr() for x in made}) == 1


@pytest.mark.parametrize("value", [-INF, LOWEST, -(2.0**23), 2.0**23, INF, math.nan])
def test_of_columns_that_are_all_alike(made, value):
    """-inf costs nothing; where float32 exponents will not do, a row's logits are made at once."""
    check(made, {}, c100_200=value)
    assert any(x.shape[1] == VOCABULARY for x in made) == (value != -INF)


def test_all_impossible_is_nan_and_a_broken_row_stays_alone(made):
    check(made, {}, c0_325=-INF)
    hidden, weight, labels, _, _ = inputs()
    hidden[0, 5, 0] = math.nan
    found = linear_token_logprobs(hidden[0], weight, labels).logprobs
    assert found.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("options", [{}, {"temperature": 1e-6}, {"temperature": 1e-6, "logit_softcap": 30.0}], ids=str)
@pytest.mark.parametrize("level", [0.0, 2.0**23])
def test_a_backward_that_makes_the_logits_again_has_its_gradients(made, options, level):
    hidden, weight, labels, _, added = inputs(c60_70=level)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden[0].clone(), weight.clone(), added.clone())]
        out = linear_token_logprobs(*leaves[:2], labels, lm_head_bias=leaves[2], return_entropy=True, **options)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        return [leaf.grad for leaf in leaves]

    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= 2e-4 * want.abs().max()
