"""Every output is within the numerics contract of float64, on the logits as stored."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cepo_kernels

pytestmark = pytest.mark.usefixtures("poisoned")

VOCABULARIES = st.one_of(
    st.integers(1, 70),
    st.integers(71, 5000),
    st.sampled_from([4095, 4096, 4097, 8191, 12289, 32003, 50257, 151936, 299993, 300000]),
)
# Distances t between a label and the rest, from p = 1e-30 to 1 - p = 1e-30 and a little beyond.
LOG_ODDS = [-75.0, -69.1, -40.0, -17.5, -16.0, -8.0, -1.0, -0.01, 0.0, 0.3, 5.0, 16.6, 30.0, 69.1, 90.0]


@st.composite
def calls(draw, dtypes=oracle.NATIVE):
    """Arguments of one call: three tensors, each of its own dtype, layout and spread, and every option."""
    shape = draw(st.sampled_from([(1,), (4,), (2, 3), (5, 1), (2, 1, 2)]))
    vocabulary = draw(VOCABULARIES)
    if vocabulary > 20000:
        shape = draw(st.sampled_from([(2,), (1, 2)]))
    seed = draw(st.integers(0, 10**6))

    def logits(salt):
        dtype = draw(st.sampled_from(dtypes))
        spread = draw(st.sampled_from([0.0, 0.5, 3.0, 12.0, 60.0]))
        offset = draw(st.sampled_from([0.0, 0.0, -37.0, 1e4 if dtype != torch.float16 else 1e3]))
        front, back = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (3, 2)]))
        wide = oracle.logits_like(
            (*shape[:-1], shape[-1] + 1, front + vocabulary + back), seed + salt, dtype, spread, offset
        )
        return wide[..., : shape[-1], front : front + vocabulary]

    def row_value(tensor):
        per_row = draw(st.sampled_from(["0-d", "one", "all"]))
        if per_row == "0-d":
            return tensor.reshape(-1)[0].clone()
        return tensor[tuple(slice(0, 1) for _ in shape)] if per_row == "one" else tensor

    generator = torch.Generator().manual_seed(seed)
    policy, positive = logits(1), draw(st.sampled_from([True, True, False]))
    positive = logits(2) if positive else None
    negative = draw(st.sampled_from([True, True, False]))
    negative = logits(3) if negative else None
    labels = oracle.labels_like(shape, vocabulary, seed, draw(st.sampled_from([0.0, 0.0, 0.4])))
    advantages = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.2)
    options = {
        "negative_mask": draw(st.sampled_from([None, row_value(torch.rand(shape, generator=generator) > 0.5)])),
        "lam": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "eps_w": draw(st.sampled_from([0.0, 0.2, 0.5, 0.999])),
        "temperature": draw(st.sampled_from([1.0, 0.6, 1.7, row_value(torch.rand(shape, generator=generator) + 0.4)])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.25, 2.0])),
        "logit_softcap": draw(st.sampled_from([None, None, 30.0, 50.0])),
    }
    return (policy, positive, negative, labels, draw(st.sampled_from([None, row_value(advantages)]))), options


@settings(max_examples=60)
@given(call=calls())
def test_every_output_matches_float64(backend, call):
    arguments, options = call
    got, want = oracle.run(backend, *arguments, **options), oracle.contrastive(*arguments, **options)
    oracle.assert_forward(got, want, but=("entropy",))


@settings(max_examples=40)
@given(call=calls())
def test_entropy_matches_float64(backend, call):
    (policy, _, _, labels, _), options = call
    options = {name: options[name] for name in ("temperature", "logit_scale", "logit_softcap")}
    got = oracle.run(backend, policy, None, None, labels, **options)
    want = oracle.contrastive(policy, None, None, labels, **options)
    oracle.assert_close(got.entropy, want.entropy, oracle.RELATIVE, name="entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [-2.0, 0.0, 2.0, 4.0, 8.0, 14.0, 20.0, 26.0, 40.0, 69.0])
def test_entropy_keeps_its_digits_where_one_column_dominates(backend, gap, dtype):
    """Wherever the dominant column is: the label or another, in the first block or the last."""
    vocabulary = 32003
    logits = oracle.logits_like((6, vocabulary), 1, dtype, 1.0)
    peaks = torch.tensor([0, 1, 4095, 4096, 20000, vocabulary - 1])
    logits.scatter_(1, peaks[:, None], (logits.double().logsumexp(1, keepdim=True) + gap).to(dtype))
    for labels in (peaks, (peaks + 1) % vocabulary, (peaks + 7000) % vocabulary):
        got = oracle.run(backend, logits, None, None, labels)
        want = oracle.contrastive(logits, None, None, labels)
        oracle.assert_close(got.entropy, want.entropy, oracle.RELATIVE, name="entropy")
        oracle.assert_close(got.logprobs, want.logprobs, oracle.RELATIVE, name="logprobs")


@given(call=calls(dtypes=(torch.float64, torch.float32)))
def test_float64_logits_are_computed_in_float64(call):
    arguments, options = call
    got = oracle.run("auto", *arguments, **options)
    want = oracle.contrastive(*arguments, **options)
    wide = any(t is not None and t.dtype == torch.float64 for t in arguments[:3])
    assert got.logprobs.dtype == (torch.float64 if wide else torch.float32)
    if wide:
        # An offset of 1e4 costs 1e4 * 2^-53 absolute in x itself, which the subtraction then shows.
        oracle.assert_close(got.logprobs, want.logprobs, 1e-9, 1e-300, "logprobs")
        oracle.assert_close(got.entropy, want.entropy, 1e-9, 1e-300, "entropy")


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("vocabulary", [2, 33, 5003])
def test_both_ends_of_a_probability_keep_full_relative_precision(backend, vocabulary, dtype):
    rows = len(LOG_ODDS)
    logits = oracle.logits_like((rows, vocabulary), 5, dtype, 1.0)
    labels = oracle.labels_like((rows,), vocabulary, 6)
    others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    own = (others - torch.tensor(LOG_ODDS, dtype=torch.float64)).to(dtype)
    logits.scatter_(1, labels[:, None], own[:, None])
    want = oracle.logprobs(logits, labels)
    assert want.min() < -69
    assert want.max() > -1e-30
    out = oracle.run(backend, logits, None, None, labels)
    oracle.assert_close(out.logprobs, want, oracle.RELATIVE, name="logprobs")
    oracle.assert_forward(out, oracle.contrastive(logits, None, None, labels))
    # 1 - p is the gradient at the label; float32 shows it to full precision.
    if dtype == torch.float32:
        gradient = oracle.gradient_of(backend, logits, labels, 1.0)
        oracle.assert_close(gradient.gather(1, labels[:, None])[:, 0], -np.expm1(want), oracle.RELATIVE, name="1 - p")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("cap", [15.0, 30.0, 50.0])
def test_a_cap_keeps_the_precision_of_a_confident_row(backend, cap, temperature):
    options = {"logit_softcap": cap, "temperature": temperature}
    for spread in (1.0, 20.0):
        logits = oracle.logits_like((40, 5003), 1, torch.float32, spread)
        labels = oracle.labels_like((40,), 5003, 2)
        logits.scatter_(1, labels[:, None], torch.linspace(0.2 * cap, 3 * cap, 40)[:, None])
        got = oracle.run(backend, logits, None, None, labels, **options)
        oracle.assert_close(got.logprobs, oracle.logprobs(logits, labels, **options), oracle.RELATIVE, name="logprobs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positive_odds", "negative_odds"), [(-40.0, 60.0), (60.0, -40.0), (60.0, 61.5), (-1e-3, 0.3)])
def test_evidence_keeps_its_absolute_bound_where_log_probs_are_large(backend, positive_odds, negative_odds, dtype):
    vocabulary = 7001
    labels = oracle.labels_like((6,), vocabulary, 1)
    teachers = []
    for seed, odds in ((2, positive_odds), (3, negative_odds)):
        logits = oracle.logits_like((6, vocabulary), seed, dtype, 2.0)
        others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        teachers.append(logits.scatter(1, labels[:, None], (others - odds).to(dtype)[:, None]))
    policy = oracle.logits_like((6, vocabulary), 4, dtype)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.5, -0.3, 1e-3])
    for eps_w in (0.5, 0.999):
        want = oracle.contrastive(policy, *teachers, labels, advantages, eps_w=eps_w)
        oracle.assert_forward(oracle.run(backend, policy, *teachers, labels, advantages, eps_w=eps_w), want)


def test_without_a_negative_teacher_the_policy_is_the_denominator(backend):
    logits = [oracle.logits_like((2, 5, 301), seed) for seed in (1, 2, 3)]
    labels = oracle.labels_like((2, 5), 301, 4, ignored=0.2)
    advantages = torch.tensor([[1.0], [-1.0]])
    rlsd = oracle.run(backend, logits[0], logits[1], None, labels, advantages)
    masked = oracle.run(backend, *logits, labels, advantages, negative_mask=torch.tensor([[True], [False]]))
    oracle.assert_same_bits(rlsd.negative_logprobs, rlsd.logprobs, "negative_logprobs")
    for name in ("logprobs", "negative_logprobs", "evidence", "weight", "advantages"):
        oracle.assert_same_bits(getattr(masked, name)[1], getattr(rlsd, name)[1], name)
    both = oracle.run(backend, *logits, labels, advantages)
    for name in ("logprobs", "negative_logprobs", "evidence", "weight", "advantages"):
        oracle.assert_same_bits(getattr(masked, name)[0], getattr(both, name)[0], name)
    assert not torch.equal(both.evidence[1], rlsd.evidence[1])


def test_a_masked_negative_row_is_never_read(backend):
    policy, positive, negative = (oracle.logits_like((3, 50), seed) for seed in (1, 2, 3))
    negative[1] = torch.nan
    labels = oracle.labels_like((3,), 50, 4)
    out = oracle.run(
        backend, policy, positive, negative, labels, torch.ones(3), negative_mask=torch.tensor([True, False, True])
    )
    assert torch.isfinite(out.evidence).all()
    assert torch.isfinite(out.advantages).all()


def test_values_of_a_row_stay_with_it_when_rows_before_it_are_ignored(backend):
    logits = [oracle.logits_like((12, 90), seed) for seed in (1, 2, 3)]
    labels = oracle.labels_like((12,), 90, 4)
    labels[[0, 1, 5]] = -100
    advantages = torch.linspace(-1.0, 1.2, 12)
    options = {"negative_mask": torch.arange(12) % 3 != 1, "temperature": torch.linspace(0.5, 2.0, 12)}
    got = oracle.run(backend, *logits, labels, advantages, **options)
    oracle.assert_forward(got, oracle.contrastive(*logits, labels, advantages, **options))


def test_without_a_positive_teacher_advantages_come_back_unweighted(backend):
    policy, negative = oracle.logits_like((2, 3, 40), 1), oracle.logits_like((2, 3, 40), 2)
    labels = oracle.labels_like((2, 3), 40, 3)
    advantages = torch.tensor([[0.7], [-1.3]])
    out = oracle.run(backend, policy, None, negative, labels, advantages)
    assert out.positive_logprobs is None
    assert out.evidence is None
    assert out.weight is None
    assert torch.equal(out.advantages.cpu(), advantages.expand(2, 3))
    oracle.assert_forward(out, oracle.contrastive(policy, None, negative, labels, advantages))


def test_outputs_not_asked_for_are_none(backend):
    policy, labels = oracle.logits_like((3, 20), 1), oracle.labels_like((3,), 20, 2)
    out = oracle.run(backend, policy, policy + 1, None, labels, return_entropy=False)
    assert out.weight is None
    assert out.advantages is None
    assert out.entropy is None
    assert out.evidence is not None


def test_lambda_zero_returns_the_advantages_and_no_clip_room_returns_weight_one(backend):
    logits = [oracle.logits_like((64, 90), seed) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like((64,), 90, 4), oracle.logits_like((64,), 5)
    out = oracle.run(backend, *logits, labels, advantages, lam=0.0)
    assert torch.equal(out.advantages.cpu(), advantages)
    out = oracle.run(backend, *logits, labels, advantages, lam=1.0, eps_w=0.0)
    assert (out.weight == 1).all()
    assert torch.equal(out.advantages.cpu(), advantages)


def test_numbers_and_tensors_give_the_same_bits(backend):
    logits = [oracle.logits_like((2, 4, 77), seed) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like((2, 4), 77, 4), torch.tensor([[0.7], [-1.3]])
    values = {"lam": 0.3, "eps_w": 0.2, "temperature": 0.8, "logit_scale": 1.5, "logit_softcap": 20.0}
    plain = oracle.run(backend, *logits, labels, advantages, **values)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    boxed = oracle.run(backend, *logits, labels.int(), advantages.expand(2, 4), **tensors)
    spread = oracle.run(
        backend, *logits, labels, advantages,
        **{**values, "temperature": torch.full((2, 4), 0.8, dtype=torch.float64)},
    )  # fmt: skip
    for name, want in plain._asdict().items():
        oracle.assert_same_bits(getattr(boxed, name), want, name)
        oracle.assert_same_bits(getattr(spread, name), want, name)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7])
def test_any_index_can_be_the_ignored_one(backend, ignore_index):
    logits = oracle.logits_like((20, 10), 1)
    labels = torch.arange(20) % 10
    labels[3] = ignore_index
    got = oracle.run(backend, logits, logits * 0.5, None, labels, torch.ones(20), ignore_index=ignore_index)
    want = oracle.contrastive(logits, logits * 0.5, None, labels, torch.ones(20), ignore_index=ignore_index)
    oracle.assert_forward(got, want)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize(("spread", "offset"), [(3.0, 0.0), (3.0, 1e4), (30.0, -1e3)])
def test_temperature_holds_the_bounds_far_from_one_and_far_from_zero(backend, t, spread, offset):
    logits = oracle.logits_like((4, 3001), 8, torch.float32, spread, offset)
    labels = oracle.labels_like((4,), 3001, 9)
    labels[0] = logits[0].argmax()
    for temperature in (t, torch.full((4,), t, dtype=torch.float64)):
        got = oracle.run(backend, logits, logits.bfloat16(), None, labels, torch.ones(4), temperature=temperature)
        want = oracle.contrastive(logits, logits.bfloat16(), None, labels, torch.ones(4), temperature=temperature)
        oracle.assert_forward(got, want, but=("entropy",))


@settings(max_examples=200)
@given(
    x=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=6),
    y=st.integers(0, 5),
)
@example(x=[70.0, 0.0, 0.0], y=0)
@example(x=[0.0, 70.0], y=0)
def test_the_oracle_itself_agrees_with_fifty_digits(x, y):
    y = min(y, len(x) - 1)
    with localcontext() as context:
        context.prec = 400  # enough for 1 - p of exp(-400) to be a plain subtraction
        weights = [(Decimal(v) - Decimal(x[y])).exp() for v in x]
        total = sum(weights)
        log_p = [(w / total).ln() for w in weights]
        want_log_p, want_entropy = (
            float(log_p[y]),
            float(-sum(w / total * lp for w, lp in zip(weights, log_p, strict=True))),
        )
    row = np.array(x, dtype=np.float64)
    assert oracle.log_probability(row, y) == pytest.approx(want_log_p, rel=1e-12, abs=0)
    assert oracle.entropy(row) == pytest.approx(want_entropy, rel=1e-12, abs=0)


def test_token_logprobs_is_the_same_op(backend):
    logits = oracle.logits_like((3, 4, 501), 1, torch.bfloat16)
    labels = oracle.labels_like((3, 4), 501, 2, ignored=0.2)
    got = cepo_kernels.token_logprobs(
        oracle.place(backend, logits),
        oracle.place(backend, labels),
        temperature=0.7,
        return_entropy=True,
        backend=backend,
    )
    assert got.logprobs.shape == labels.shape
    oracle.assert_close(got.logprobs, oracle.logprobs(logits, labels, temperature=0.7), oracle.RELATIVE)
    want = oracle.contrastive(logits, None, None, labels, temperature=0.7)
    oracle.assert_close(got.entropy, want.entropy, oracle.RELATIVE)
