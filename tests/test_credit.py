"""`contrastive_credit`: the elementwise definition, for every advantage and every pair of log-probs."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cepo_kernels import contrastive_credit

LOGPROBS = st.one_of(st.floats(-80, 0, width=32), st.just(float("-inf")), st.floats(-(2.0**-20), 0, width=32))
ADVANTAGES = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 1e-30, -1.0, 1.0]))
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, ADVANTAGES), min_size=1, max_size=8)
LAM = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))
EPS_W = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.2, 0.5]))


def columns(tokens):
    return (torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True))


@settings(max_examples=200)
@given(tokens=TOKENS, lam=LAM, eps_w=EPS_W)
def test_every_value_is_the_papers(tokens, lam, eps_w):
    positive, negative, advantages = columns(tokens)
    got = contrastive_credit(positive, negative, advantages, lam=lam, eps_w=eps_w)
    shape = tuple(positive.shape)
    want = oracle.credit(*(oracle.array(t, shape) for t in (positive, negative, advantages)), lam, eps_w)
    for name, value, expected in zip(("evidence", "weight", "advantages"), got, want, strict=True):
        assert value.dtype == torch.float32
        oracle.assert_close(value, expected, 3e-7, 1e-37, name)


@settings(max_examples=200)
@given(tokens=TOKENS, lam=LAM, eps_w=EPS_W)
def test_the_sign_is_kept_and_the_size_is_bounded(tokens, lam, eps_w):
    positive, negative, advantages = columns(tokens)
    got = contrastive_credit(positive, negative, advantages, lam=lam, eps_w=eps_w)
    assert not torch.isnan(got.advantages).any()
    assert (got.advantages.sign() == advantages.sign())[advantages.abs() > 1e-20].all()
    ulp = 1 + 2e-7
    assert (got.weight <= (1 + eps_w) * ulp).all()
    assert (got.weight >= (1 - eps_w) / ulp).all()
    size, bound = got.advantages.double().abs(), advantages.double().abs()
    assert (size <= bound * (1 + lam * eps_w) * ulp + 1e-44).all()
    assert (size >= bound * (1 - lam * eps_w) / ulp - 1e-44).all()


@given(tokens=TOKENS, lam=LAM, eps_w=EPS_W)
def test_no_advantage_no_credit_whatever_the_evidence(tokens, lam, eps_w):
    positive, negative, _ = columns(tokens)
    positive = torch.cat([positive, torch.tensor([math.nan, math.inf, -math.inf])])
    negative = torch.cat([negative, torch.tensor([0.0, -1.0, 0.0])])
    for zero in (0.0, -0.0):
        got = contrastive_credit(positive, negative, torch.tensor(zero), lam=lam, eps_w=eps_w)
        assert (got.weight == 1).all()
        assert (got.advantages == 0).all()


def test_two_teachers_that_rule_a_token_out_say_nothing():
    impossible = torch.full((3,), -math.inf)
    got = contrastive_credit(impossible, impossible, torch.tensor([1.0, -2.0, 0.0]))
    assert got.evidence.tolist() == [0, 0, 0]
    assert got.weight.tolist() == [1, 1, 1]
    assert got.advantages.tolist() == [1, -2, 0]


@given(tokens=TOKENS, lam=LAM, eps_w=EPS_W)
def test_credit_favours_what_the_right_answer_predicts(tokens, lam, eps_w):
    """More evidence never costs: a praised token is praised no less, a blamed one blamed no more."""
    positive, negative, advantages = columns(tokens)
    assume(bool(torch.isfinite(negative).all()))
    less = contrastive_credit(positive - 1.0, negative, advantages, lam=lam, eps_w=eps_w)
    more = contrastive_credit(positive, negative, advantages, lam=lam, eps_w=eps_w)
    assert (more.advantages >= less.advantages - 1e-6 * advantages.abs()).all()


@given(tokens=TOKENS, lam=LAM)
def test_the_policy_as_the_wrong_teacher_is_rlsd(tokens, lam):
    positive, policy, advantages = columns(tokens)
    other = policy - 3.0
    rlsd = contrastive_credit(positive, None, advantages, policy_logprobs=policy, lam=lam)
    for same in (
        contrastive_credit(positive, policy, advantages, lam=lam),
        contrastive_credit(
            positive, other, advantages, policy_logprobs=policy, negative_mask=torch.tensor(False), lam=lam
        ),
        contrastive_credit(
            positive, policy, advantages, policy_logprobs=other, negative_mask=torch.tensor(True), lam=lam
        ),
    ):
        for got, want in zip(same, rlsd, strict=True):
            oracle.assert_same_bits(got, want)


def test_masked_tokens_are_zero_and_hide_what_they_hold():
    positive = torch.tensor([[-1.0, math.nan], [math.nan, -2.0]])
    mask = torch.tensor([[True, False], [False, True]])
    got = contrastive_credit(positive, torch.full((2, 2), -1.5), torch.tensor([[1.0], [-1.0]]), mask=mask)
    for value in got:
        assert (value[~mask] == 0).all()
        assert torch.isfinite(value[mask]).all()
    assert got.evidence[0, 0] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_float32_or_float64_and_never_carry_a_gradient(dtype):
    positive, negative = (torch.tensor([-1.0, -2.0], dtype=dtype, requires_grad=True) for _ in range(2))
    got = contrastive_credit(positive, negative, torch.tensor([1.0, 2.0], requires_grad=True))
    for value in got:
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not value.requires_grad


def test_advantages_broadcast_one_per_rollout_or_one_for_all():
    positive, negative = oracle.logits_like((3, 4), 1), oracle.logits_like((3, 4), 2)
    for advantages in (torch.tensor(-1.5), torch.tensor([[1.0], [0.0], [-2.0]]), torch.tensor([[1.0, 0.0, -2.0, 0.5]])):
        got = contrastive_credit(positive, negative, advantages)
        want = contrastive_credit(positive, negative, advantages.expand(3, 4))
        for value, expected in zip(got, want, strict=True):
            assert value.shape == (3, 4)
            oracle.assert_same_bits(value, expected)


def test_it_agrees_with_the_op_that_starts_from_logits(backend):
    logits = [oracle.logits_like((4, 6, 77), seed) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like((4, 6), 77, 4, 0.2), torch.tensor([[1.0], [-1.0], [0.0], [0.3]])
    negative_mask = torch.tensor([[True], [True], [False], [False]])
    options = {"lam": 0.7, "eps_w": 0.3, "negative_mask": negative_mask}
    fused = oracle.run(backend, *logits, labels, advantages, **options)
    log_p = [torch.from_numpy(oracle.logprobs(tensor, labels)).view(4, 6) for tensor in logits]
    plain = contrastive_credit(
        log_p[1], log_p[2], advantages.double(), policy_logprobs=log_p[0], mask=labels != -100, **options
    )
    for name, absolute in (("evidence", 4e-6), ("weight", 5e-6), ("advantages", 5e-6)):
        want: np.ndarray = getattr(plain, name).numpy()
        oracle.assert_close(getattr(fused, name), want, 2.0**-23, absolute, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positive_logprobs": [0.0]}, TypeError, "positive_logprobs: expected a tensor, got list"),
        ({"positive_logprobs": torch.zeros(2, 3).long()}, TypeError, "positive_logprobs: .*int64"),
        ({"negative_logprobs": torch.zeros(3, 2)}, ValueError, r"negative_logprobs: .*\(2, 3\).*\(3, 2\)"),
        ({"negative_logprobs": None}, ValueError, "policy_logprobs"),
        ({"negative_mask": torch.tensor(True)}, ValueError, "policy_logprobs"),
        ({"negative_mask": torch.ones(2, 3)}, TypeError, "negative_mask: expected bool, got torch.float32"),
        ({"mask": torch.ones(2, 3).int()}, TypeError, "mask: expected bool, got torch.int32"),
        ({"mask": torch.ones(2, 4) > 0}, ValueError, r"mask: .*\(2, 3\).*\(2, 4\)"),
        ({"advantages": torch.ones(2)}, ValueError, r"advantages: .*\(2, 3\).*\(2,\).*advantages\[:, None\]"),
        ({"advantages": torch.ones(2, 3).int()}, TypeError, "advantages: expected a floating dtype, got torch.int32"),
        ({"advantages": 1.0}, TypeError, "advantages: expected a tensor, got float"),
        ({"lam": 1.5}, ValueError, r"lam: expected a number in \[0, 1\], got 1.5"),
        ({"lam": math.nan}, ValueError, "lam: .*nan"),
        ({"eps_w": 1.0}, ValueError, r"eps_w: expected a number in \[0, 1\), got 1.0"),
        ({"eps_w": -0.1}, ValueError, r"eps_w: .*-0.1"),
        ({"lam": [0.5]}, TypeError, "lam: expected a number or a 0-d tensor, got list"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor, got None"),
        ({"negative_logprobs": [1.0]}, TypeError, "negative_logprobs: expected a tensor, got list"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    arguments = {
        "positive_logprobs": torch.zeros(2, 3),
        "negative_logprobs": torch.zeros(2, 3),
        "advantages": torch.ones(2, 1),
        **change,
    }
    with pytest.raises(error, match=message):
        contrastive_credit(**arguments)


def test_a_nan_advantage_stays_one():
    credit = contrastive_credit(torch.zeros(1), torch.zeros(1), torch.tensor([math.nan]))
    assert credit.weight.isnan().all()
    assert credit.advantages.isnan().all()
