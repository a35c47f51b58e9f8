"""`divergence`: the textbook's formulas, right where those cancel, and the student's gradient in the same pass."""

from __future__ import annotations

import math

import divergence_oracle as textbook
import mpmath
import numpy as np
import oracle
import pytest
import torch
from divergence_oracle import check, run
from hypothesis import given
from hypothesis import strategies as st

import cepo_kernels
from cepo_kernels import backends, divergence, divergence_ops

pytestmark = pytest.mark.usefixtures("poisoned", "_able")

KINDS = ("forward_kl", "reverse_kl", "jsd")
VARIANTS = [{"kind": kind} for kind in KINDS] + [{"kind": "jsd", "beta": beta} for beta in (0.01, 0.3, 0.9, 0.0, 1.0)]
CUTS = [{}, {"clip": 0.02}, {"top_k": 20}, {"top_k": 20, "clip": 0.01}]
ROWS = 6


@pytest.fixture
def _able(request):
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        reason = backends.unavailable(name, oracle.device_of(name), "divergence")
        if reason is not None:
            pytest.skip(f"{name}: {reason}")


def pair(dtype=torch.float32, vocabulary=900, shape=(ROWS,), gap=1.5, seed=1, offset=0.0):
    """A student, and a teacher whose logits differ from it by about ``gap``."""
    student = oracle.logits_like((*shape, vocabulary), seed, torch.float64)
    teacher = student + oracle.logits_like((*shape, vocabulary), seed + 1, torch.float64, gap, offset)
    return student.to(dtype), teacher.to(dtype)


# --- values and gradients ---------------------------------------------------------------------------------------------


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


# --- nearly equal rows ------------------------------------------------------------------------------------------------


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


# --- edges ------------------------------------------------------------------------------------------------------------


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


# --- the gradient's ways ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_the_reference_passes_gradcheck(how, cut):
    student, teacher = (tensor.double() for tensor in pair(vocabulary=30, shape=(2, 2), gap=1.0))
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (how.get("beta", 0.5), cut.get("clip", 9.0))]
    options = [torch.tensor([[0.7, 1.0], [1.3, 2.0]]), torch.tensor(1.2), torch.tensor(20.0)]
    weight, top_k = torch.tensor([[1.0, 0.5], [0.0, -2.0]]), min(cut.get("top_k", 30), 6)

    def values(student):
        return divergence_ops.divergence(
            student, teacher, weight, how["kind"], *numbers, top_k, *options, True, "reference"
        )[0]

    assert torch.autograd.gradcheck(values, (student.requires_grad_(),), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_in_place_has_the_same_bits(backend, dtype, cut):
    student, teacher = pair(dtype, vocabulary=5003)
    for kind in KINDS:
        want, gradient = run(backend, student, teacher, kind=kind, **cut)
        values, written = run(backend, student, teacher, kind=kind, inplace_grad=True, **cut)
        oracle.assert_same_bits(values, want)
        oracle.assert_same_bits(written, gradient)


def test_in_place_refuses_and_says_so_to_whoever_saved_the_logits(backend):
    student, teacher = (oracle.place(backend, tensor) for tensor in pair())
    leaf = student.requires_grad_()
    logits = leaf.exp()  # its backward reads its result
    values = divergence(logits, teacher, inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()
    with pytest.raises(ValueError, match="inplace_grad: student_logits is a leaf"):
        divergence(leaf, teacher, inplace_grad=True)
    logits = leaf * 1.0
    with pytest.raises(ValueError, match="student_logits shares memory with teacher_logits"):
        divergence(logits, logits, inplace_grad=True)
    with pytest.raises(ValueError, match="student_logits is an expanded tensor"):
        divergence((leaf * 1.0)[:1].expand(ROWS, -1), teacher, inplace_grad=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 65536.0, -0.25, torch.tensor([1.0, 0.0, -2.0, 0.5, 1.0, 8.0])], ids=str)
def test_what_comes_from_above_scales_each_row(backend, upstream, in_place):
    student, teacher = pair()
    student[1, 3] = math.nan  # in the row whose upstream gradient may be 0
    _, plain = run(backend, student, teacher)
    factor = torch.as_tensor(upstream).expand(ROWS)
    _, scaled = run(backend, student, teacher, upstream=factor, inplace_grad=in_place)
    want = plain * factor[:, None]
    want[factor == 0] = 0.0
    torch.testing.assert_close(scaled, want, rtol=0, atol=0, equal_nan=True)


def test_once_and_first_order_only(backend):
    student, teacher = (oracle.place(backend, tensor) for tensor in pair())
    student.requires_grad_()
    values = divergence(student, teacher, backend=backend)
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward took the gradient"):
        values.sum().backward()
    values = divergence(student, teacher, backend=backend)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(values.sum(), student, create_graph=True)


def test_the_teacher_gets_no_gradient_and_none_is_made_unasked(backend, monkeypatch):
    student, teacher = (oracle.place(backend, tensor) for tensor in pair())
    seen = []
    original = backends.load(backend).divergence
    monkeypatch.setattr(
        backends.load(backend), "divergence", lambda given, made: seen.append(made.gradient) or original(given, made)
    )
    student.requires_grad_(), teacher.requires_grad_()
    divergence(student, teacher, backend=backend).sum().backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not divergence(student, teacher, backend=backend).requires_grad
    assert not divergence(student.detach(), teacher, backend=backend).requires_grad
    assert [gradient is None for gradient in seen] == [False, True, True]


# --- layouts, bits, compilers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["sliced", "four dimensions", "transposed"])
def test_any_leading_shape_and_stride(backend, view):
    student, teacher = pair(torch.bfloat16, 301, (2, 3, 2, 5))
    weight = oracle.logits_like((2, 3, 2, 5), 5).abs()
    if view == "sliced":
        student = torch.nn.functional.pad(student, (0, 0, 0, 3))[..., :-3, :]
    elif view == "transposed":
        student = student.transpose(0, 2).contiguous().transpose(0, 2)
    flat = [tensor.reshape(-1, 301) for tensor in (student, teacher)]
    want, want_gradient = run(backend, *flat, token_weight=weight.reshape(-1))
    leaf = oracle.place(backend, student).detach().requires_grad_()
    values = divergence(
        leaf, oracle.place(backend, teacher), token_weight=oracle.place(backend, weight), backend=backend
    )
    values.sum().backward()
    assert values.shape == (2, 3, 2, 5)
    oracle.assert_same_bits(values.reshape(-1).cpu(), want)
    oracle.assert_same_bits(leaf.grad.reshape(-1, 301).cpu(), want_gradient)


@pytest.mark.parametrize("dtypes", [(a, b) for a in oracle.NATIVE for b in (a, torch.float32)], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 17, 255, 4097, 50257])
def test_a_rows_bits_are_its_own(backend, vocabulary, dtypes):
    """Alone, in a crowd, at another place, alignment and stride, with any number of threads."""
    student, teacher = pair(shape=(7,), vocabulary=vocabulary)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    before = torch.get_num_threads()
    for how in ({"kind": "reverse_kl"}, {"kind": "jsd", "beta": 0.3}, {"top_k": 9}):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(backend, student, teacher, **how))
        torch.set_num_threads(before)
        moved = [shifted(x.flip(0), shift, gap) for x, shift, gap in ((student, 1, 3), (teacher, 5, 0))]
        found.append(tuple(x.flip(0) for x in run(backend, *moved, **how)))
        for values, gradient in found[1:]:
            oracle.assert_same_bits(values, found[0][0])
            oracle.assert_same_bits(gradient, found[0][1])
        alone = run(backend, student[3:4], teacher[3:4], **how)
        oracle.assert_same_bits(alone[0], found[0][0][3:4])
        oracle.assert_same_bits(alone[1], found[0][1][3:4])


def shifted(tensor, shift, gap):
    """The same values ``shift`` elements into a fresh storage, rows ``gap`` elements apart, NaN between them."""
    rows, vocabulary = tensor.shape
    storage = torch.full((shift + rows * (vocabulary + gap),), torch.nan, dtype=tensor.dtype)
    return storage.as_strided((rows, vocabulary), (vocabulary + gap, 1), shift).copy_(tensor)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_compiled_equals_eager_bit_for_bit(backend, compiler, in_place, uniform):
    if compiler == "inductor" and backend not in ("cpu:portable", "triton"):
        pytest.skip("once through a compiler is enough: the op is opaque to it")
    torch._dynamo.reset()
    student, teacher = (oracle.place(backend, tensor) for tensor in pair())
    mask, scale = oracle.place(backend, torch.arange(ROWS) > 0), oracle.place(backend, torch.arange(ROWS) * 0.5)

    def step(student):
        values = divergence(
            student * 1.0, teacher, kind="jsd", beta=0.4, clip=0.1, top_k=30, mask=mask, inplace_grad=in_place,
            backend=backend,
        )  # fmt: skip
        return values, values.sum() if uniform else (values * scale).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaf = student.detach().requires_grad_()
        values, loss = function(leaf)
        loss.backward()
        results.append((values, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        oracle.assert_same_bits(compiled, eager)


def test_numbers_that_move_compile_once(backend):
    torch._dynamo.reset()
    student, teacher = (oracle.place(backend, tensor) for tensor in pair(vocabulary=17))
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    def call(student, beta, clip):
        return divergence(student, teacher, kind="jsd", beta=beta, clip=clip, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for index in range(1, 9):
        numbers = (torch.tensor(index / 10), torch.tensor(index / 50))
        oracle.assert_same_bits(compiled(student, *numbers), call(student, *numbers))
    assert count == 1


@pytest.mark.parametrize("top_k", [None, 9])
def test_the_op_is_registered_as_torch_wants_it(backend, top_k):
    student, teacher = (oracle.place(backend, tensor) for tensor in pair(vocabulary=65, shape=(2, 2)))
    weight = oracle.place(backend, torch.rand(2, 2))
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.05)]
    options = [torch.tensor(1.0, dtype=torch.float64)] * 2
    arguments = (teacher, weight, "jsd", *numbers, top_k, *options, None)
    torch.library.opcheck(
        torch.ops.cepo_kernels.divergence.default, (student.requires_grad_(), *arguments, True, backend)
    )
    torch.library.opcheck(
        torch.ops.cepo_kernels.divergence_.default, (student.detach().clone(), *arguments, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_it_is_listed():
    assert "divergence" in cepo_kernels.backend_report().chosen


def test_a_backend_without_it_is_passed_over_or_refused(monkeypatch, caplog):
    class Without:
        forward = None

        @staticmethod
        def unavailable(device_type):
            return None

    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: Without if name == "cpu" else load(name))
    for cached in (backends.choose, backends.unavailable):
        cached.cache_clear()
    try:
        assert backends.choose("auto", "cpu", torch.float32) is Without
        assert backends.choose("auto", "cpu", torch.float32, "divergence") is load("reference")
        assert "slowly: it has no divergence yet" in caplog.text
        assert cepo_kernels.backend_report().chosen["divergence"]["cpu"] == "reference"
        with pytest.raises(RuntimeError, match="backend: 'cpu' cannot run here: it has no divergence yet"):
            divergence(*pair(), backend="cpu")
    finally:
        for cached in (backends.choose, backends.unavailable):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind: expected one of forward_kl, reverse_kl, jsd; got 'kl'"),
        ({"beta": 1.5}, ValueError, r"beta: expected a number in \[0, 1\], got 1.5"),
        ({"beta": "half"}, TypeError, "beta: expected a number or a 0-d tensor, got str"),
        ({"clip": -0.1}, ValueError, "clip: expected a finite number of at least 0, or None; got -0.1"),
        ({"clip": math.nan}, ValueError, "clip: expected a finite number"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int or None, got float"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected bool, got torch.float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask: .*pass mask\[:, None\]"),
        ({"token_weight": torch.ones(3)}, ValueError, "token_weight: expected a 0-d tensor or shape"),
        ({"token_weight": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "token_weight: expected a floating dtype"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number .*, got 0.0"),
        ({"temperature": torch.zeros(2, 1)}, ValueError, "temperature: .* for every scored row, got 0.0"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap: expected a positive finite number"),
        ({"teacher_logits": torch.zeros(2, 3, 10)}, ValueError, r"teacher_logits: expected shape \(2, 3, 11\) as stud"),
        ({"teacher_logits": torch.zeros(2, 11)}, ValueError, r"teacher_logits: expected shape \(2, 3, 11\)"),
        ({"teacher_logits": None}, TypeError, "teacher_logits: expected a tensor, got NoneType"),
        ({"teacher_logits": torch.zeros(2, 11, 3).mT}, ValueError, "teacher_logits: expected a contiguous last"),
        ({"student_logits": torch.zeros(2, 3, 11, dtype=torch.int64)}, TypeError, "student_logits: expected bfloat16"),
        ({"student_logits": torch.zeros(())}, ValueError, r"student_logits: expected shape \(\.\.\., V\)"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    student, teacher = pair(vocabulary=11, shape=(2, 3))
    with pytest.raises(error, match=message):
        divergence(**{"student_logits": student, "teacher_logits": teacher, **change})


def test_float64_is_the_references(backend):
    student, teacher = pair()
    assert divergence(student.double(), teacher).dtype == torch.float64
    assert divergence(student, teacher.double()).dtype == torch.float64
    if backend != "reference":
        with pytest.raises(ValueError, match="float64 logits need backend='reference'"):
            divergence(oracle.place(backend, student.double()), oracle.place(backend, teacher), backend=backend)
    want, *_ = textbook.expected(student, teacher)
    np.testing.assert_allclose(divergence(student.double(), teacher).numpy(), want, rtol=1e-13)
