"""A row's bits are its own: not its neighbours', its place's, its alignment's or the thread count's."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cepo_kernels

VOCABULARIES = [1, 2, 17, 255, 4095, 4097, 12289, 50257, 151936]
SCALARS = ("logprobs", "positive_logprobs", "negative_logprobs", "evidence", "weight", "advantages", "entropy")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(backend, policy, positive, negative, labels, advantages, **options):
    """Every output, and the gradients of log-prob and entropy, as one row of bits per row of logits."""
    leaf = oracle.place(backend, policy).detach().requires_grad_()
    out = oracle.run(backend, leaf, positive, negative, labels, advantages, **options)
    found = {name: getattr(out, name).reshape(-1) for name in SCALARS if getattr(out, name) is not None}
    wide = policy.shape[-1]
    (found["gradient"],) = torch.autograd.grad(out.logprobs.sum(), leaf, retain_graph=True)
    (found["entropy gradient"],) = torch.autograd.grad(out.entropy.sum(), leaf)
    for name in ("gradient", "entropy gradient"):
        found[name] = found[name].reshape(-1, wide)
    return {name: value.detach().cpu() for name, value in found.items()}


def assert_rows_equal(got, want, rows):
    for name, value in want.items():
        oracle.assert_same_bits(got[name][rows], value, name)


def shifted(tensor, shift, gap):
    """The same values ``shift`` elements into a fresh storage, rows ``gap`` elements apart, NaN between them."""
    rows, vocabulary = tensor.shape
    storage = torch.full((shift + rows * (vocabulary + gap),), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = storage.as_strided((rows, vocabulary), (vocabulary + gap, 1), shift)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_alone_in_a_crowd_and_elsewhere(backend, vocabulary, dtype):
    device = oracle.device_of(backend)
    crowd = 19 if vocabulary < 20000 else 5
    logits = [oracle.logits_like((crowd, vocabulary), seed, dtype, 4.0).to(device) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like((crowd,), vocabulary, 4), oracle.logits_like((crowd,), 5)
    want = {}
    for row in range(3):
        one = slice(row, row + 1)
        want[row] = results(backend, *(t[one] for t in logits), labels[one], advantages[one])
    # In a crowd, some of it ignored or NaN.
    rowdy, quiet = [t.clone() for t in logits], labels.clone()
    rowdy[0][3], rowdy[1][4 % crowd], quiet[3] = torch.nan, torch.inf, -100
    got = results(backend, *rowdy, quiet, advantages)
    for row in range(3):
        assert_rows_equal(got, want[row], slice(row, row + 1))
    # At another place, start and stride, each tensor its own.
    order = torch.arange(crowd).flip(0)
    moved = [
        shifted(t[order.to(device)], shift, gap) for t, shift, gap in zip(logits, (1, 7, 2), (3, 0, 5), strict=True)
    ]
    got = results(backend, *moved, labels[order], advantages[order])
    for row in range(3):
        assert_rows_equal(got, want[row], slice(crowd - 1 - row, crowd - row))


@settings(max_examples=40)
@given(data=st.data())
def test_any_batch_shape_and_layout(backend, data):
    vocabulary = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([4096, 5000, 8193, 33001])))
    dtype, seed = data.draw(st.sampled_from(oracle.NATIVE)), data.draw(st.integers(0, 10**6))
    spread = data.draw(st.sampled_from([0.5, 5.0, 60.0]))
    batch, time = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    base = oracle.logits_like((batch, time + 1, vocabulary), seed, dtype, spread).to(oracle.device_of(backend))
    labels = oracle.labels_like((batch, time), vocabulary, seed, 0.2)
    temperature = torch.rand(batch, time, dtype=torch.float64) + 0.5
    positive = base.flip(1)[:, 1:]
    views = {
        "a view without the last": (base[:, :-1], positive),
        "packed": (base[:, :-1].contiguous(), positive.contiguous()),
        "time first in memory": tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (base[:, :-1], positive)),
    }
    found = [
        results(backend, policy, teacher, None, labels, torch.ones(()), temperature=temperature)
        for policy, teacher in views.values()
    ]
    for other in found[1:]:
        assert_rows_equal(other, found[0], slice(None))
    b, t = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, time - 1))
    alone = results(
        backend, base[b, t][None], positive[b, t][None], None, labels[b, t][None], torch.ones(()),
        temperature=temperature[b, t][None],
    )  # fmt: skip
    assert_rows_equal(found[0], alone, slice(b * time + t, b * time + t + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads(backend, threads, dtype):
    for rows, vocabulary in ((1, 151936), (5, 20011), (64, 1001)):
        logits = [oracle.logits_like((rows, vocabulary), seed, dtype) for seed in (1, 2, 3)]
        labels, advantages = oracle.labels_like((rows,), vocabulary, 4), torch.ones(rows)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(backend, *logits, labels, advantages))
        for other in found[1:]:
            assert_rows_equal(other, found[0], slice(None))


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_log_prob_has_the_same_bits_from_every_op_so_an_on_policy_ratio_is_one(backend, vocabulary, dtype):
    logits = oracle.logits_like((6, vocabulary), 1, dtype, 3.0)
    teachers = [oracle.logits_like((6, vocabulary), seed, torch.bfloat16) for seed in (2, 3)]
    labels = oracle.labels_like((6,), vocabulary, 4, 0.2)
    options = {"temperature": 0.9, "logit_scale": 1.1}
    old = cepo_kernels.token_logprobs(
        oracle.place(backend, logits), oracle.place(backend, labels), backend=backend, **options
    ).logprobs
    for positive in (None, teachers[0]):
        for negative in (None, teachers[1]):
            for advantages in (None, torch.ones(6)):
                for entropy in (False, True):
                    new = oracle.run(
                        backend, logits, positive, negative, labels, advantages, return_entropy=entropy, **options
                    )
                    oracle.assert_same_bits(new.logprobs, old, "logprobs")
    assert ((new.logprobs - old).exp() == 1).all()


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_asking_for_entropy_does_not_change_the_gradient(backend, dtype):
    logits, labels = oracle.logits_like((5, 9001), 1, dtype), oracle.labels_like((5,), 9001, 2)
    gradients = []
    for entropy in (False, True):
        leaf = oracle.place(backend, logits.clone()).requires_grad_()
        oracle.run(backend, leaf, None, None, labels, return_entropy=entropy).logprobs.sum().backward()
        gradients.append(leaf.grad)
    oracle.assert_same_bits(*gradients, "gradient")


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_a_teacher_with_the_policys_logits_has_its_log_prob_and_no_evidence(backend, dtype):
    logits, labels = oracle.logits_like((6, 9001), 1, dtype, 3.0), oracle.labels_like((6,), 9001, 2)
    copy = oracle.place(backend, shifted(logits, 3, 1))
    out = oracle.run(backend, logits, copy, None, labels, torch.ones(6))
    oracle.assert_same_bits(out.positive_logprobs, out.logprobs)
    assert (out.evidence == 0).all()
    assert (out.weight == 1).all()
    both = oracle.run(backend, oracle.logits_like((6, 9001), 3, dtype), logits, copy, labels)
    assert (both.evidence == 0).all()


def test_the_same_call_twice_gives_the_same_bits(backend):
    logits = [oracle.logits_like((33, 5003), seed, torch.bfloat16) for seed in (1, 2, 3)]
    labels = oracle.labels_like((33,), 5003, 4)
    first = results(backend, *logits, labels, torch.ones(33))
    assert_rows_equal(results(backend, *logits, labels, torch.ones(33)), first, slice(None))


def test_float64_rows_are_their_own_too():
    logits, labels = oracle.logits_like((9, 50257), 1, torch.float64), oracle.labels_like((9,), 50257, 2)
    crowd = results("reference", logits, logits * 0.5, None, labels, torch.ones(()))
    for row in (0, 8):
        one = slice(row, row + 1)
        alone = results("reference", logits[one], logits[one] * 0.5, None, labels[one], torch.ones(()))
        assert_rows_equal(crowd, alone, one)
