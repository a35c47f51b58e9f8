"""`divergence` as it is called: its gradient's ways, layouts, bits, compilers, errors."""

from __future__ import annotations

import math

import divergence_oracle as textbook
import numpy as np
import oracle
import pytest
import torch
from divergence_oracle import CUTS, KINDS, ROWS, VARIANTS, pair, run

import cepo_kernels
from cepo_kernels import backends, divergence, divergence_ops
from cepo_kernels.divergence import _how

pytestmark = pytest.mark.usefixtures("poisoned", "_has_divergence")


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
    for how in ({"kind": "reverse_kl"}, {"kind": "jsd"}, {"kind": "jsd", "beta": 0.3}, {"top_k": 9}):
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


def test_a_0_d_mask_or_weight_of_the_cpu_goes_to_the_rows_device():
    """Where a kernel reads its address."""
    rows, one = torch.zeros(2, 3, device="meta"), torch.ones(())
    for mask, weight in ((one > 0, None), (None, one), (one > 0, one)):
        found = _how(rows, "jsd", 0.5, mask, None, None, 1.0, weight, 1.0, None)
        assert found[0].device.type == "meta"
