"""`linear_divergence`: what `divergence` gives, with no logits of all rows anywhere."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from test_linear import BOUND, DTYPES, VOCABULARY, WIDTH, products
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import cepo_kernels
from cepo_kernels import divergence, linear_divergence, linear_products

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS = 40
CALLS = [{"kind": "forward_kl"}, {"kind": "reverse_kl", "clip": 0.05}, {"kind": "jsd", "beta": 0.3, "top_k": 30}]


def inputs(dtype=torch.float32, bias=True, shape=(ROWS,)):
    student, teacher = (oracle.logits_like((*shape, WIDTH), seed, dtype, 1.0) for seed in (1, 2))
    weight = oracle.logits_like((VOCABULARY, WIDTH), 3, dtype, 0.4)
    return student, teacher, weight, oracle.logits_like((VOCABULARY,), 4, dtype, 1.0) if bias else None


def weights():
    weight = oracle.logits_like((ROWS,), 5).abs()
    weight[::5] = 0.0
    return {"mask": torch.arange(ROWS) % 7 > 0, "token_weight": weight}


def plain(student, teacher, weight, bias, upstream, teacher_weight=None, teacher_bias=None, **how):
    """Values and gradients in float64, from logits, by autograd through the head."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (student, weight, bias)]
    head = (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)
    other = linear(teacher.double(), head[0].double(), None if head[1] is None else head[1].double())
    values = divergence(linear(leaves[0], leaves[1], leaves[2]), other, **how)
    (values * upstream).sum().backward()
    return values.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def ours(student, teacher, weight, bias, upstream, frozen=False, **how):
    leaves = [student.detach().clone().requires_grad_()]
    leaves += [None if x is None else x.detach().clone().requires_grad_(not frozen) for x in (weight, bias)]
    values = linear_divergence(leaves[0], teacher, leaves[1], lm_head_bias=leaves[2], **how)
    values.sum().backward() if upstream is None else values.backward(upstream)
    return values.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def compare(got, want, dtype, frozen=False):
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=2e-6)
    for index, (name, gradient, right) in enumerate(zip(("hidden", "weight", "bias"), got[1], want[1], strict=True)):
        assert (gradient is None) == (right is None or (frozen and index > 0)), name
        if gradient is not None:
            assert gradient.dtype == dtype
            error = (gradient.double() - right).abs().max() / right.abs().max()
            assert error < BOUND[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("how", CALLS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_chunks")
def test_values_and_gradients(dtype, frozen, bias, how):
    call = {**how, **weights(), "temperature": 1.3}
    tensors = inputs(dtype, bias)
    compare(ours(*tensors, None, frozen, **call), plain(*tensors, 1.0, **call), dtype, frozen)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("_chunks")
def test_any_upstream_gradient(frozen, weighted):
    """The same for all rows; and a different one for each, zeros included."""
    tensors, call = inputs(), weights() if weighted else {}
    upstream = oracle.logits_like((ROWS,), 6)
    upstream[1::3] = 0.0
    for factor in (upstream, torch.tensor(-3.0).expand(ROWS)):
        compare(ours(*tensors, factor, frozen, **call), plain(*tensors, factor, **call), torch.float32, frozen)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": 5.0, "logit_scale": 0.5},
        {"temperature": torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) + 0.5},
        {"token_weight": torch.tensor([[0.5], [1.0], [0.0], [2.0]])},
    ],
    ids=["cap", "temperatures", "weights"],
)
@pytest.mark.usefixtures("_chunks")
def test_options_and_leading_shapes(options):
    tensors = inputs(shape=(4, 10))
    got = ours(*tensors, None, **options)
    compare(got, plain(*tensors, 1.0, **options), torch.float32)
    assert got[0].shape == (4, 10)


def test_a_teacher_with_a_head_of_its_own():
    student, _, weight, bias = inputs()
    teacher, head, other = (oracle.logits_like(shape, 8, spread=0.4) for shape in ((ROWS, 7), (VOCABULARY, 7), (301,)))
    for teacher_bias in (None, other):
        teachers = {"teacher_lm_head_weight": head.requires_grad_(), "teacher_lm_head_bias": teacher_bias}
        want = plain(student, teacher, weight, bias, 1.0, head.detach(), teacher_bias)
        compare(ours(student, teacher, weight, bias, None, **teachers), want, torch.float32)
        assert head.grad is None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("_chunks")
def test_sixteen_bit_logits_are_those_of_a_plain_linear_layer(frozen):
    student, teacher, weight, bias = inputs(torch.bfloat16)
    want = divergence(linear(student, weight) + bias, linear(teacher, weight) + bias)
    values, gradients = ours(student, teacher, weight, bias, None, frozen, logits_dtype=torch.bfloat16)
    torch.testing.assert_close(values, want)
    logits = (linear(student, weight) + bias).requires_grad_()
    divergence(logits, linear(teacher, weight) + bias).sum().backward()
    right = logits.grad.double()
    expected = [right @ weight.double(), right.t() @ student.double(), right.sum(0)]
    compare((values, gradients), (want.double(), expected), torch.bfloat16, frozen)


@pytest.mark.parametrize(
    ("reduce", "again"),
    [
        (lambda values, scored: values.mean(), False),
        (lambda values, scored: (values * scored).sum() / scored.sum(), False),
        (lambda values, scored: values[scored].mean(), False),
        (lambda values, scored: (values * torch.where(scored, -2.0, math.nan)).sum(), False),
        (lambda values, scored: (values * torch.arange(len(values))).sum(), True),
    ],
    ids=["mean", "masked mean", "mean of some", "NaN elsewhere", "weighted"],
)
def test_the_work_is_done_again_only_where_scored_rows_differ(monkeypatch, reduce, again):
    tensors, call = inputs(bias=False), weights()
    scored = call["mask"] & (call["token_weight"] != 0)
    upstream = torch.ones(ROWS, requires_grad=True)
    (upstream,) = torch.autograd.grad(reduce(upstream, scored), upstream)
    want = plain(*tensors, torch.where(scored, upstream, 0.0), **call)
    made = products(monkeypatch)
    leaves = [x.clone().requires_grad_() for x in (tensors[0], tensors[2])]
    values = linear_divergence(leaves[0], tensors[1], leaves[1], **call)
    reduce(values, scored).backward()
    assert [name for name, _ in made].count("add_weight_gradient") == 1 + again
    compare((values.detach(), [*(leaf.grad for leaf in leaves), None]), want, torch.float32)


def test_equal_hidden_states_are_exactly_zero():
    student, _, weight, bias = inputs()
    values, gradients = ours(student, student, weight, bias, None)
    assert not values.any()
    assert not any(gradient.any() for gradient in gradients)


def test_rows_that_cannot_matter_meet_no_product_and_a_frozen_head_no_gradient(monkeypatch):
    student, teacher, weight, _ = inputs()
    call = weights()
    scored = int((call["mask"] & (call["token_weight"] != 0)).sum())
    made = products(monkeypatch)
    ours(student, teacher, weight, None, None, **call)
    both = [("logits", scored), ("logits", scored)]
    assert made == [*both, ("hidden_gradient", scored), ("add_weight_gradient", scored)]
    made.clear()
    ours(student, teacher, weight, None, torch.arange(ROWS) * 1.0, frozen=True, **call)
    assert made == [*both, ("hidden_gradient", scored)]
    made.clear()
    linear_divergence(student, teacher, weight, **call)
    assert made == both


def test_rows_that_are_not_scored_may_hold_anything():
    student, teacher, weight, bias = inputs()
    call = weights()
    idle = ~call["mask"] | (call["token_weight"] == 0)
    broken = [x.masked_fill(idle[:, None], math.nan) for x in (student, teacher)]
    for upstream in (None, oracle.logits_like((ROWS,), 6)):
        want = ours(student, teacher, weight, bias, upstream, **call)
        got = ours(*broken, weight, bias, upstream, **call)
        oracle.assert_same_bits(got[0], want[0])
        for found, expected in zip(got[1], want[1], strict=True):
            oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_scored_row_everything_is_zero_and_attached(rows):
    student, teacher, weight, bias = inputs()
    values, gradients = ours(student[:rows], teacher[:rows], weight, bias, None, mask=torch.tensor(False))
    assert values.shape == (rows,)
    assert not values.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_refused_and_checkpoints_are_not(frozen):
    student, teacher, weight, _ = inputs()
    leaves = [student.requires_grad_(), weight.requires_grad_(not frozen)]
    values = linear_divergence(student, teacher, weight).sum()
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(values, student, create_graph=True)
    found = []
    for run in (linear_divergence, lambda *given: checkpoint(linear_divergence, *given, use_reentrant=False)):
        run(student, teacher, weight).mean().backward()
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_comes_from_above_for_a_row_that_nobody_scores_is_nothing(frozen):
    student, teacher, weight, _ = inputs()
    labels, upstream = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS)
    labels[3], upstream[3] = -100, math.nan
    for run in (
        lambda student, weight: cepo_kernels.linear_token_logprobs(student, weight, labels).logprobs,
        lambda student, weight: linear_divergence(student, teacher, weight, mask=labels == 0),
    ):
        leaf = student.clone().requires_grad_()
        run(leaf, weight.clone().requires_grad_(not frozen)).backward(upstream)
        assert not leaf.grad[3].any()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[2].any()


def test_autocast_casts_as_for_a_linear_layer():
    student, teacher, weight, _ = inputs()
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = linear_divergence(leaf, teacher, weight)
    rounded = linear_divergence(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())
    oracle.assert_same_bits(values, rounded)
    values.sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_compiled_equals_eager_bit_for_bit(frozen, uniform):
    torch._dynamo.reset()
    student, teacher, weight, bias = inputs(torch.bfloat16)
    scale, call = torch.arange(ROWS) * 0.25, weights()

    def loss_of(student, weight, bias):
        values = linear_divergence(student, teacher, weight, lm_head_bias=bias, kind="jsd", **call)
        return values.sum() * 2.0 if uniform else (values * scale).sum()

    found = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_(index == 0 or not frozen)
                  for index, x in enumerate((student, weight, bias))]  # fmt: skip
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        oracle.assert_same_bits(compiled, eager)


@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float32, False), (torch.float16, True)], ids=str)
def test_the_op_is_registered_as_torch_wants_it(dtype, frozen):
    student, teacher, weight, bias = inputs(dtype, shape=(5,))
    student.requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.05)]
    options = [torch.tensor(1.0, dtype=torch.float64)] * 2
    torch.library.opcheck(
        torch.ops.cepo_kernels.linear_divergence.default,
        (student, teacher, weight, bias, weight.detach(), bias.detach(), torch.rand(5), "jsd", *numbers, 9, *options,
         None, [True, not frozen, not frozen], None, "auto"),
    )  # fmt: skip


def test_memory_is_a_chunk_whatever_the_number_of_rows(monkeypatch):
    """Allocations beyond hidden-sized ones and the head's gradient stay below a few chunks of logits."""
    rows, width, vocabulary = 400, 16, 20_000
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 32 * vocabulary * 4)
    student, weight = (torch.randn(n, width, requires_grad=True) for n in (rows, vocabulary))
    teacher = torch.randn(rows, width)

    def call():
        linear_divergence(student, teacher, weight, kind="jsd").sum().backward()

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    sizes = [event.cpu_memory_usage for event in recorded.events() if event.name in ("[memory]", "aten::empty")]
    assert max(sizes) <= max(16 * vocabulary * 4, weight.nbytes) * 1.01 < rows * vocabulary * 4 / 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden": torch.zeros(5, 25)}, ValueError, r"student_hidden: expected shape \(5, 24\), of the rows"),
        ({"student_hidden": None}, TypeError, "student_hidden: expected a tensor, got NoneType"),
        ({"student_hidden": torch.zeros(())}, ValueError, r"student_hidden: expected shape \(..., H\), got \(\)"),
        ({"student_hidden": torch.zeros(5, 24).to_sparse()}, TypeError, "student_hidden: expected a dense tensor"),
        ({"student_hidden": torch.zeros(5, 24, dtype=torch.int64)}, TypeError, "student_hidden: expected bfloat16"),
        ({"teacher_hidden": torch.zeros(4, 24)}, ValueError, r"teacher_hidden: expected shape \(5, 24\), of the stud"),
        ({"lm_head_weight": torch.zeros(0)}, ValueError, r"^lm_head_weight: expected shape \(V, H\), not empty"),
        ({"lm_head_bias": torch.zeros(3)}, ValueError, r"^lm_head_bias: expected shape \(301,\)"),
        ({"teacher_lm_head_weight": torch.zeros(7, 24)}, ValueError, "teacher_lm_head_weight: expected V = 301"),
        ({"teacher_lm_head_bias": torch.zeros(301)}, ValueError, "teacher_lm_head_bias: expected a teacher_lm_head_w"),
        ({"kind": "kl"}, ValueError, "kind: expected one of"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask: expected a 0-d tensor or shape"),
        ({"logits_dtype": torch.float64}, ValueError, "logits_dtype: expected None, bfloat16 or float16, got .*64"),
        ({"logits_dtype": torch.float16, "teacher_hidden": torch.zeros(5, 24).double()}, ValueError, "logits_dtype"),
        ({"beta": 2.0}, ValueError, r"beta: expected a number in \[0, 1\]"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    student, teacher, weight, bias = inputs(shape=(5,))
    call = {"student_hidden": student, "teacher_hidden": teacher, "lm_head_weight": weight, "lm_head_bias": bias}
    with pytest.raises(error, match=message):
        linear_divergence(**{**call, **change})


def test_it_is_listed():
    assert "linear_divergence" in cepo_kernels.backend_report().chosen
