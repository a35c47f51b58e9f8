"""The CUDA kernel of the divergences, thread by thread on a CPU: the contract, its bits, the bytes that it moves.

`cuda_emulated` as a plugin runs the suite that all backends share on it, too.
"""

from __future__ import annotations

import contextlib
import math

import cuda_emulated
import oracle
import pytest
import torch
from divergence_oracle import check, check_at_clip, check_distant, check_masked, run
from test_cuda_memory import EVERY_ROW, alone, byte_model
from test_divergence import CUTS, KINDS, ROWS, VARIANTS, pair

from cepo_kernels.rows import DivergenceInputs, DivergenceOutputs, RowOptions

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(cuda_emulated.missing() is not None, reason=str(cuda_emulated.missing())),
]

ALL_THREADS = 8 * 512  # columns that a block takes at once


@pytest.fixture(scope="module", autouse=True)
def emulated():
    """The backends by name, and the module itself."""
    with cuda_emulated.registered():
        yield cuda_emulated.module()


@pytest.fixture(params=cuda_emulated.ORDERS)
def order(request, emulated):
    """The order in which threads go on."""
    emulated.order(cuda_emulated.ORDERS[request.param], 7)
    yield request.param
    emulated.order(0, 0)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("dtypes", [(a, b) for a in oracle.NATIVE for b in dict.fromkeys((a, torch.float32))], ids=str)
def test_it_is_the_formula(dtypes, how, cut):
    student, teacher = pair(shape=(2,))
    check("emulated", student.to(dtypes[0]), teacher.to(dtypes[1]), **how, **cut)


@pytest.mark.parametrize("cut", CUTS[:3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_cap(kind, cut):
    student, teacher = (x * 4 for x in pair(torch.bfloat16, shape=(2,)))
    check("emulated", student, teacher, absolute=10 * oracle.CAP_ROUNDING, kind=kind, logit_softcap=8.0,
          temperature=0.8, **cut)  # fmt: skip


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, ALL_THREADS - 1, ALL_THREADS + 1, 2 * ALL_THREADS + 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_vocabulary(vocabulary, dtype):
    student, teacher = pair(dtype, vocabulary, (2,))
    check("emulated", student, teacher, kind="jsd", beta=0.3)
    for top_k in (1, 63):
        check("emulated", student, teacher, top_k=top_k)


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("cut", [{}, {"clip": 0.05}, {"top_k": 20}], ids=str)
def test_nearly_equal_rows_keep_their_digits_and_equal_ones_are_zero(how, cut):
    for gap, offset in ((1e-3, 0.0), (2e-5, 1000.0)):
        student, teacher = pair(shape=(2,), gap=gap, offset=offset)
        check("emulated", student, teacher, **how, **cut)
    student, _ = pair(torch.bfloat16, 5003, (2,))
    student[:, 7::11] = -math.inf
    for teacher in (student, student.float()):
        values, gradient = run("emulated", student, teacher, **how, **cut)
        assert (values == 0).all()
        assert not gradient.any()


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("cut", [{}, {"clip": 0.02}, {"top_k": 20}], ids=str)
def test_edge_rows(how, cut):
    """Impossible tokens; logits far apart and beyond float32 exponents; broken rows."""
    student, teacher = pair(shape=(ROWS,))
    student[0, ::3], teacher[1, ::3] = -math.inf, torch.finfo(torch.float32).min
    student[2], teacher[3] = student[2] * 1e7, teacher[3] * 1e30
    student[4, 5], teacher[5, 6] = math.nan, math.inf
    check("emulated", student, teacher, **how, **cut)


@pytest.mark.parametrize("how", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_wholly_masked_row_is_uniform(how, cut):
    check_masked("emulated", **how, **cut)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_value_and_gradient_agree_on_what_is_clipped(kind):
    check_at_clip("emulated", torch.float32, kind)


def test_rows_further_apart_than_float32_counts_are_right_or_nan():
    check_distant("emulated")


@pytest.mark.parametrize("cut", [{}, {"top_k": 20}], ids=str)
def test_numbers_that_live_on_the_device_have_the_same_bits(cut):
    options = {"temperature": torch.tensor(0.7), "logit_softcap": 9.0, "logit_scale": 1.5}
    for value, want in zip(*(run(f"emulated{of}", *pair(), **options, **cut) for of in (":values", "")), strict=True):
        oracle.assert_same_bits(value, want)


def raw(student, teacher, weight, gradient, top_k=None):
    """Values and gradient, of logits (N, V) as they lie in memory."""
    values, one = torch.empty(len(student)), torch.ones(())
    inputs = DivergenceInputs(
        student[None], teacher[None], weight, "jsd", 0.3, None, top_k, RowOptions(one, one, None, -100)
    )
    cuda_emulated.KNOWN["emulated"].divergence(inputs, DivergenceOutputs(values, gradient[None]))
    return values, gradient.clone()


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_it_touches_its_rows_alone_and_has_its_bits_anywhere(emulated, order, dtype):
    live, weight = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, -0.5])
    for vocabulary, shift in ((1, 3), (7, 1), (8, 0), (1001, 5), (ALL_THREADS + 17, 1)):
        student, teacher = pair(dtype, vocabulary, (3,))
        want = raw(student, teacher, weight, torch.empty_like(student))
        for in_place in (False, True):
            with contextlib.ExitStack() as memory:
                b, a, gradient = (
                    memory.enter_context(alone(emulated, x, shift, there))
                    for x, there in zip(
                        (student, teacher, torch.zeros_like(student)),
                        (EVERY_ROW[:3] if in_place else live, live, EVERY_ROW[:3]), strict=True,
                    )
                )  # fmt: skip
                for value, expected in zip(raw(b, a, weight, b if in_place else gradient), want, strict=True):
                    oracle.assert_same_bits(value, expected, f"V = {vocabulary}, shift {shift}, in place: {in_place}")


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_top_k_has_its_bits_in_any_order_of_threads(order, emulated, dtype):
    student, teacher = (x.round() for x in pair(dtype, ALL_THREADS + 17, (2,)))  # many equals
    found = [raw(student, teacher, None, torch.empty_like(student), 300)]
    emulated.order(0, 0)
    found.append(raw(student, teacher, None, torch.empty_like(student), 300))
    for value, want in zip(*found, strict=True):
        oracle.assert_same_bits(value, want)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_it_moves_the_bytes_of_the_model(emulated, dtype):
    for vocabulary in (8, 1000, ALL_THREADS + 64):
        student, teacher = pair(dtype, vocabulary, (3,))
        gradient = torch.empty_like(student)
        for tensor in (student, teacher, gradient):
            emulated.watch(tensor.data_ptr(), tensor.nbytes)
        raw(student, teacher, torch.tensor([1.0, 0.0, 2.0]), gradient)
        got = dict(zip(("student", "teacher", "gradient"), emulated.seen(), strict=True))
        assert got == byte_model.divergence(2, 1, vocabulary, dtype.itemsize), vocabulary
