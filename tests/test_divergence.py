"""`divergence`: the textbook's formulas, right where those cancel, and the student's gradient in the same pass."""

from __future__ import annotations

import math

import divergence_oracle as textbook
import mpmath
import oracle
import pytest
import torch
from divergence_oracle import CUTS, KINDS, ROWS, VARIANTS, check, check_at_clip, check_distant, check_masked, pair, run
from hypothesis import given
from hypothesis import strategies as st

from cepo_kernels import divergence

pytestmark = pytest.mark.usefixtures("poisoned", "_has_divergence")


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_has_the_digits_that_it_is_asked_for(kind):
    """Against fifty, where the plain formulas cancel."""
    student, teacher = (x[0].double().numpy() for x in pair(vocabulary=40, gap=1e-5))
    with mpmath.workdps(50):
        rows = [[mpmath.mpf(float(x)) for x in logits] for logits in (student, teacher)]
        sums = [mpmath.fsum(mpmath.exp(x) for x in logits) for logits in rows]
        q, p = ([mpmath.exp(x) / total for x in logits] for logits, total in zip(rows, sums, strict=True))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

        def kl(a, b):
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))

        exact = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]
    assert 1e-12 < exact < 1e-9
    assert float(textbook.row(student, teacher, kind)[0]) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("how", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_it_is_the_formula(backend, dtype, how, cut):
    check(backend, *pair(dtype), **how, **cut)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_cuts_and_a_bucket_counts(kind):
    """The cases above are none if nothing is clipped and nothing is left to the bucket."""
    student, teacher = pair()
    plain, clipped, few = (divergence(student, teacher, kind=kind, **cut) for cut in CUTS[:3])
    assert clipped.sum() < 0.8 * plain.sum()
    assert (few < plain).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_agree_on_what_is_clipped(backend, dtype, kind):
    check_at_clip(backend, dtype, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "logit_scale": 1.5},
        {"temperature": torch.linspace(0.5, 2.0, ROWS)},
        {"token_weight": torch.tensor([0.0, -1.0, 2.5, 1e-3, 1.0, 4.0])},
        {"mask": torch.arange(ROWS) % 2 == 0, "token_weight": torch.tensor(0.5)},
        {"temperature": 30.0, "top_k": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(backend, dtype, options, kind):
    check(backend, *pair(dtype), kind=kind, **options)


@pytest.mark.parametrize("cut", CUTS[:3], ids=str)
@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("spread", [1.0, 15.0])
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_the_soft_cap(backend, dtype, spread, how, cut):
    """Far into saturation too, where 1 - tanh^2 has an absolute precision only, and so has the log-ratio."""
    student, teacher = pair(dtype)
    options = {"logit_softcap": 8.0, "temperature": 0.8}
    check(backend, student * spread, teacher * spread, absolute=8 / 0.8 * oracle.CAP_ROUNDING, **options, **how, **cut)


@pytest.mark.parametrize("dtypes", [(a, b) for a in oracle.NATIVE for b in oracle.NATIVE if a != b], ids=str)
@pytest.mark.parametrize("cut", CUTS[:3], ids=str)
def test_two_dtypes(backend, dtypes, cut):
    student, teacher = pair()
    for kind in KINDS:
        check(backend, student.to(dtypes[0]), teacher.to(dtypes[1]), kind=kind, **cut)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 64, 255, 4095, 4097, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_vocabulary(backend, vocabulary, dtype):
    student, teacher = pair(dtype, vocabulary, (2,))
    for how in VARIANTS[:4]:
        check(backend, student, teacher, **how)
    for top_k in (1, 2, 16, 63, 300, 10**6):
        check(backend, student, teacher, top_k=top_k)


@given(data=st.data())
def test_any_two_rows(backend, data):
    vocabulary = data.draw(st.one_of(st.integers(1, 80), st.sampled_from([1000, 4097, 9001])))
    dtype, seed = data.draw(st.sampled_from(oracle.NATIVE)), data.draw(st.integers(0, 10**6))
    student = oracle.logits_like((2, vocabulary), seed, dtype, data.draw(st.sampled_from([0.1, 4.0, 25.0])))
    teacher = oracle.logits_like((2, vocabulary), seed + 1, dtype, data.draw(st.sampled_from([0.1, 4.0, 25.0])))
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 0.6, 3.0])),
        "clip": data.draw(st.sampled_from([None, None, 0.0, 0.1])),
        "top_k": data.draw(st.sampled_from([None, None, 1, 7, 100])),
    }
    check(backend, student, teacher, **data.draw(st.sampled_from(VARIANTS)), **options)


@pytest.mark.parametrize("cut", [{}, {"clip": 0.05}, {"top_k": 20}], ids=str)
@pytest.mark.parametrize("how", VARIANTS, ids=str)
@pytest.mark.parametrize("offset", [0.0, -7.3, 1000.0], ids=str)
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 2e-5])
def test_nearly_equal_rows_keep_their_digits(backend, gap, offset, how, cut):
    """Values from 1e-2 down to 1e-10: relative to the value itself, however far the teacher's logits are shifted."""
    student, teacher = pair(gap=gap, offset=offset)
    values, gradient = run(backend, student, teacher, **how, **cut)
    want, _, slope = textbook.expected(student, teacher, **how, **cut)
    assert want.max() < gap
    oracle.assert_close(values, want, oracle.RELATIVE, 1e-15)
    oracle.assert_gradient(gradient, slope, torch.float32, 3e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_every_size(backend, dtype, kind):
    """From 1e-4 to some nats: where a plain sum would cancel, where it would do, and about where one is as good."""
    gaps = torch.logspace(-1.2, 0.7, 40, dtype=torch.float64)[:, None]
    flat, other = (oracle.logits_like((40, 1024), seed, torch.float64, 1.0) for seed in (1, 2))
    peaked, level = flat + 0.0, 0.1 * flat[:, :1].expand(-1, 1024) * torch.ones(1024)
    peaked[:, 0] += 11.0
    level[:, 0] += 7.0  # over equal tails, whose terms all round to the same side
    moved = level.clone()
    moved[:, 0] += gaps[:, 0]
    student = torch.cat([flat, peaked, level]).to(dtype)
    teacher = torch.cat([flat + gaps * other, peaked + gaps * other, moved]).to(dtype)
    check(backend, student, teacher, kind=kind)


@pytest.mark.parametrize("cut", [{}, {"clip": 0.05}, {"top_k": 20}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_otherwise_than_they_go_on(backend, dtype, kind, cut):
    """What the first columns say of the normalisers, of how close the rows are and of the clip does not hold later."""
    student, teacher = (x.double() for x in pair(vocabulary=6000, gap=0.02))
    student[0, 3000] = teacher[0, 3000] = 20.0  # nearly all of the probability, and about none of a difference there
    teacher[0, :2048] += 1.0
    teacher[1, 5000:] += 3.0
    teacher[2, 4000:] += 40.0
    student[3, 5999], teacher[3, 5999] = 12.0, 12.4  # a term near the clip
    student[4, 2048:], teacher[4, 2048:] = -torch.inf, -torch.inf
    student[5, 4000], teacher[5, 5000] = 14.0, 14.0
    check(backend, student.to(dtype), teacher.to(dtype), kind=kind, **cut)


@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_cap_keeps_the_digits_of_nearly_equal_rows(backend, kind):
    student, teacher = pair(gap=1e-3)
    values, _ = run(backend, student, teacher, kind=kind, logit_softcap=30.0)
    want, *_ = textbook.expected(student, teacher, kind=kind, logit_softcap=30.0)
    oracle.assert_close(values, want, oracle.RELATIVE)


@pytest.mark.parametrize("cut", [{}, {"clip": 0.05}, {"top_k": 20}], ids=str)
@pytest.mark.parametrize("how", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_equal_rows_are_exactly_zero(backend, dtype, how, cut):
    student, _ = pair(dtype, vocabulary=5003)
    student[:, 7::11] = -math.inf
    for teacher in (student.clone(), student.float()):
        values, gradient = run(backend, student, teacher, **how, **cut)
        assert (values == 0).all()
        assert not gradient.any()
    shifted = (student.float() * 16).round() / 16  # so that 64 more are 64 more exactly
    assert run(backend, shifted, shifted + 64, **how, **cut)[0].abs().max() < 1e-14


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_never_negative(backend, how):
    """Rows that differ by single bits, where rounding decides."""
    student = oracle.logits_like((64, 300), 1)
    teacher = student.clone()
    teacher[torch.arange(64), torch.arange(64)] = torch.nextafter(teacher[:, 0], torch.tensor(torch.inf))
    near = student * (1 + 1.2e-7 * torch.randint(-2, 3, student.shape, generator=torch.Generator().manual_seed(2)))
    for other in (teacher, near, student.bfloat16().float()):
        for cut in ({}, {"top_k": 9}):
            assert (run(backend, student, other, **how, **cut)[0] >= 0).all()


@pytest.mark.parametrize("cut", [{}, {"clip": 0.02}, {"top_k": 20}], ids=str)
@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("lowest", ["-inf", "finfo.min", "-inf and finfo.min"])
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_impossible_tokens(backend, dtype, lowest, how, cut):
    """Of one row, the other, or both: p = 0 adds nothing, q = 0 < p makes a KL infinite and a JSD not."""
    student, teacher = pair(dtype, shape=(4,))
    low = [-math.inf if name == "-inf" else torch.finfo(dtype).min for name in lowest.split(" and ")]
    student[1, ::3], teacher[2, ::3], student[3, ::5], teacher[3, ::5] = low[0], low[-1], low[0], low[-1]
    student[0, 5], teacher[0, 5] = low[0], -300.0  # next to nothing, and yet more than nothing
    check(backend, student, teacher, **how, **cut)
    values = run(backend, student, teacher, **how, **cut)[0]
    if how["kind"] == "forward_kl" and not cut and low[0] == -math.inf:
        assert values.isposinf().tolist() == [True, True, False, False]


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
def test_rows_far_apart(backend, how):
    """Logits beyond what float32 exponents hold, in either row, and all of the mass on one column or the other."""
    student, teacher = pair(shape=(5,))
    student[0], teacher[1] = student[0] * 1e7, teacher[1] * 1e7
    student[2], teacher[2] = student[2] * 1e30, teacher[2] * 1e30
    student[3, 0], teacher[3, 1] = 300.0, 300.0
    student[4], teacher[4] = student[4] - 1e9, teacher[4] + 1e9
    check(backend, student, teacher, **how)
    check(backend, student, teacher, top_k=20, **how)


def test_rows_far_apart_beyond_float32_are_right_or_nan(backend):
    check_distant(backend)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
def test_a_wholly_masked_row_is_uniform(backend, how, cut):
    """Where every logit is the lowest number, its logsumexp in any precision is that number again."""
    check_masked(backend, **how, **cut)


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_of_distant_levels(backend, dtype, how):
    """Whose difference float32 cannot hold: one row level at -9984, as only level rows have digits there."""
    student, teacher = torch.full((ROWS, 900), -9984.0), 0.1 * pair()[1]
    check(backend, student.to(dtype), teacher.to(dtype), **how)


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("cut", [{}, {"clip": 0.02}, {"top_k": 20}], ids=str)
@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_broken_row_stays_alone(backend, broken, cut, how):
    student, teacher = pair()
    clean, clean_gradient = run(backend, student, teacher, **how, **cut)
    for index, (tensor, column) in enumerate(((student, 5), (teacher, 899), (student, 0))):
        tensor[index, column if broken is not None else slice(None)] = -math.inf if broken is None else broken
    values, gradient = run(backend, student, teacher, **how, **cut)
    assert values.isnan().tolist() == [True] * 3 + [False] * 3
    assert gradient[:3].isnan().all()
    oracle.assert_same_bits(values[3:], clean[3:])
    oracle.assert_same_bits(gradient[3:], clean_gradient[3:])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cut", [{}, {"top_k": 20}], ids=str)
def test_masked_and_weightless_rows_are_not_read(backend, cut, in_place):
    student, teacher = pair()
    mask, weight = torch.tensor([True, False, True, True, True, False]), torch.tensor([1, 1, 0, 2, 1, math.nan])
    idle = ~mask | (weight == 0)
    clean, clean_gradient = run(backend, student, teacher, mask=mask, token_weight=weight, **cut)
    broken = [tensor.masked_fill(idle[:, None], math.nan) for tensor in (student, teacher)]
    values, gradient = run(backend, *broken, mask=mask, token_weight=weight, inplace_grad=in_place, **cut)
    oracle.assert_same_bits(values, clean)
    oracle.assert_same_bits(gradient, clean_gradient)
    assert not values[idle].any()
    assert not gradient[idle].any()
    assert values[~idle].all()


def test_top_k_takes_the_first_of_equals(backend):
    student = torch.zeros(1, 50)
    student[0, 40:] = 1.0
    teacher = oracle.logits_like((1, 50), 1)
    for top_k in (1, 3, 10, 11, 25, 48):
        check(backend, student, teacher, top_k=top_k)
    first = divergence(oracle.place(backend, student), oracle.place(backend, teacher), top_k=3, backend=backend)
    marked = student.clone()
    marked[0, 40:43] += 1e-4
    close = divergence(oracle.place(backend, marked), oracle.place(backend, teacher), top_k=3, backend=backend)
    assert float(first) == pytest.approx(float(close), rel=1e-3)


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
def test_a_tail_of_next_to_nothing_keeps_its_digits(backend, how):
    """Where log(1 - sum) would be log 0."""
    student, teacher = pair(vocabulary=3000)
    student[:, :4], teacher[:, :4] = student[:, :4] + 40, teacher[:, :4] + 30
    check(backend, student, teacher, top_k=4, **how)
    student, teacher = student.double(), teacher.double()
    assert (divergence(student, teacher, top_k=4) != divergence(student[:, :4], teacher[:, :4])).all()


def test_a_top_k_of_all_is_none(backend):
    student, teacher = pair(vocabulary=40)
    want, gradient = run(backend, student, teacher)
    for top_k in (39, 40, 1000):
        values, again = run(backend, student, teacher, top_k=top_k)
        oracle.assert_same_bits(values, want)
        oracle.assert_same_bits(again, gradient)


def test_a_jsd_of_beta_0_or_1_is_a_kl(backend):
    student, teacher = pair()
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        got, want = run(backend, student, teacher, kind="jsd", beta=beta), run(backend, student, teacher, kind=kind)
        for value, expected in zip(got, want, strict=True):
            oracle.assert_same_bits(value, expected)


def test_no_rows(backend):
    student, teacher = (tensor[:0] for tensor in pair())
    values, gradient = run(backend, student, teacher)
    assert values.shape == (0,)
    assert gradient.shape == (0, 900)
    one, _ = pair(shape=())
    assert divergence(oracle.place(backend, one), oracle.place(backend, one), backend=backend).shape == ()


@pytest.mark.parametrize("how", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("large", [300.0, 5e3, 1e14, 1e20, -1e30])
def test_chosen_entries_far_from_the_others(backend, large, how):
    student, teacher = torch.zeros(2, 40), torch.tensor([1.0, 2.0] + [0.0] * 38).repeat(2, 1)
    student[:, :3] = large if large > 0 else torch.tensor([large, large * (1 - 1e-6), large])
    if large < 0:
        student[:, 3:], teacher[:, 3:] = -torch.inf, -torch.inf
    teacher[1, :2] += large if large > 0 else 0.0
    check(backend, student, teacher, top_k=3 if large > 0 else 2, **how)


@pytest.mark.parametrize("how", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("lowest", [-1e17, torch.finfo(torch.float32).min])
def test_a_masked_rest_shares_its_gradient(backend, lowest, how):
    student, teacher = pair(vocabulary=1000)
    student[:, 2:] = lowest
    check(backend, student, teacher, top_k=2, **how)
    _, gradient = run(backend, student, teacher, top_k=2, **how)
    assert gradient.double().sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("how", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_differences_that_cancel_in_the_bucket(backend, dtype, how):
    student = torch.zeros(1, 9000)
    student[:, :100] = 8.0
    teacher = student.clone()
    teacher[:, 100::2] += 0.5
    teacher[:, 101::2] += math.log(2.002 - math.exp(0.5))
    if backend == "reference" or backend.startswith("cpu"):
        check(backend, student.to(dtype), teacher.to(dtype), top_k=100, **how)
        return
    # On a GPU the buckets' log-ratio is known to 4e-7 of the mean |log p / q| in them, here .5; the value's slope in
    # it is about its root.
    want = textbook.expected(student.to(dtype), teacher.to(dtype), top_k=100, **how)[0]
    values = run(backend, student.to(dtype), teacher.to(dtype), top_k=100, **how)[0]
    assert abs(values.double().numpy() - want).max() < 2e-7 * math.sqrt(2 * want.max())
