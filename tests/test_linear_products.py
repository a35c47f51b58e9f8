"""The CPU's own products of bfloat16: float32 results, whatever the shapes, the strides and the threads; and what
products in chunks need of memory."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cepo_kernels import (
    backend_report,
    linear_contrastive_policy_loss,
    linear_divergence,
    linear_products,
    linear_token_logprobs,
)
from cepo_kernels.backends import cpu
from cepo_kernels.linear_products import Head, Products

pytestmark = pytest.mark.usefixtures("poisoned")
native = pytest.mark.skipif(cpu.product is None, reason="this processor, or the build, has no bfloat16 products")
BOUND = 2e-6  # of the sum of the terms' sizes: what sums of float32 cost


def checked(a, b, add=False, out=None):
    """The product, compared with that of the operands rounded to bfloat16 and multiplied in float64."""
    out = torch.full((a.shape[0], b.shape[1]), 0.5 if add else math.nan) if out is None else out
    cpu.product(out, a, b, add)
    exact_a, exact_b = (x.bfloat16().double() for x in (a, b))
    want, size = exact_a @ exact_b + 0.5 * add, exact_a.abs() @ exact_b.abs() + 0.5 * add
    assert ((out - want).abs() <= BOUND * size).all()
    return out


@native
@pytest.mark.parametrize("vocabulary", [1, 17, 1000])
@pytest.mark.parametrize("width", [1, 31, 1030])
@pytest.mark.parametrize("rows", [1, 3, 17, 450])
def test_the_three_products_of_a_head(rows, width, vocabulary):
    hidden = oracle.logits_like((rows, width), 1, torch.bfloat16, 1.0)
    weight = oracle.logits_like((vocabulary, width), 2, torch.bfloat16, 0.4)
    gradient = oracle.logits_like((rows, vocabulary), 3)
    checked(hidden, weight.t())
    checked(gradient, weight, add=True)
    checked(gradient.t(), hidden, add=True)


@native
def test_strides_and_what_lies_beside_the_result():
    hidden, weight = (oracle.logits_like((n, 150), n, torch.bfloat16) for n in (70, 90))
    want = checked(hidden, weight.t())
    for a, b in ((hidden.t().contiguous().t(), weight), (hidden, weight.t().contiguous().t()),
                 (hidden.repeat(1, 2)[:, :150], weight.repeat_interleave(2, 1)[:, ::2])):  # fmt: skip
        oracle.assert_same_bits(checked(a, b.t()), want)
    wide = torch.full((72, 100), 7.0)
    checked(hidden, weight.t(), out=wide[1:71, 5:95])
    wide[1:71, 5:95] = 7.0
    assert (wide == 7.0).all()
    checked(hidden[:1].expand(20, 150), weight.t())
    nothing = torch.empty(70, 90)
    cpu.product(nothing, hidden[:, :0], weight[:, :0].t(), False)
    assert (nothing == 0.0).all()


@native
def test_what_is_not_finite_spreads_as_in_any_product():
    hidden, weight = (oracle.logits_like((n, 70), n, torch.float32, 1.0) for n in (20, 40))
    hidden[3, 5], hidden[4, 69], hidden[19, 0], weight[7, 5], weight[39, 2] = math.inf, math.nan, 1e38, 0.0, -math.inf
    hidden[6, 2] = 0.0
    got = torch.empty(20, 40)
    cpu.product(got, hidden, weight.t(), False)
    want = hidden.bfloat16().float() @ weight.bfloat16().float().t()
    assert want.isnan().any()
    assert want.isinf().any()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@native
def test_bits_depend_on_neither_threads_nor_other_rows():
    hidden = oracle.logits_like((500, 1100), 1, torch.bfloat16)
    weight = oracle.logits_like((700, 1100), 2, torch.bfloat16)
    whole, threads = checked(hidden, weight.t()), torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            oracle.assert_same_bits(checked(hidden, weight.t()), whole)
    finally:
        torch.set_num_threads(threads)
    oracle.assert_same_bits(checked(hidden[123:130], weight[40:101].t()), whole[123:130, 40:101])


def products(dtype, backend=cpu, weight_dtype=None, **options):
    hidden = oracle.logits_like((20, 30), 1, dtype)
    weight = oracle.logits_like((50, 30), 2, weight_dtype or dtype)
    return hidden, weight, Products(Head(weight, None), hidden, options.get("logits_dtype"), backend)


@pytest.mark.parametrize("why", ["the processor", "the instruction set", "float16", "two dtypes", "logits in float16"])
def test_everything_else_is_multiplied_as_before(monkeypatch, why):
    dtype, options = torch.bfloat16, {}
    if why == "the processor":
        monkeypatch.setattr(cpu, "product", None)
    elif why == "the instruction set":
        options["backend"] = cpu.Variant("avx2")
    elif why == "float16":
        dtype = torch.float16
    elif why == "two dtypes":
        options["weight_dtype"] = torch.float32
    else:
        options["logits_dtype"] = torch.float16
    hidden, weight, found = products(dtype, **options)
    operand = options.get("logits_dtype", torch.float32)
    assert (found.product, found.operand) == (None, operand)
    oracle.assert_same_bits(found.logits(hidden), torch.mm(hidden.to(operand), weight.to(operand).t()))


@native
@pytest.mark.parametrize("depth", [70, 1100])
@pytest.mark.parametrize(("rows", "columns"), [(100, 40), (30, 600)])
def test_a_result_of_sixteen_bits_is_the_other_one_rounded(rows, columns, depth):
    a, b = oracle.logits_like((rows, depth), 1), oracle.logits_like((columns, depth), 2, torch.bfloat16)
    wide = torch.full((rows + 1, columns + 3), 7.0, dtype=torch.bfloat16)
    checked_out = wide[1:, 1 : columns + 1]
    cpu.product(checked_out, a, b.t(), False)
    oracle.assert_same_bits(checked_out, checked(a, b.t()).bfloat16())
    assert (wide[0] == 7.0).all()
    assert (wide[:, [0, -2, -1]] == 7.0).all()


@native
@pytest.mark.parametrize("enough", [1, 40])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pieces_of_a_chunk_change_no_bit(monkeypatch, dtype, enough):
    """Logits of a few rows at a time, their gradients gathered for the products of the same rows as before; or, of a
    frozen head, multiplied at once where there are enough."""
    contexts = [oracle.logits_like((40, 24), seed, torch.bfloat16) for seed in (1, 2, 3)]
    weight, labels = oracle.logits_like((301, 24), 4, torch.bfloat16, 0.4), oracle.labels_like((40,), 301, 5, 0.2)
    advantages = oracle.logits_like((40,), 6)

    def run():
        found = []
        for frozen in (False, True):
            leaves = contexts[0].clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            out = linear_token_logprobs(*leaves, labels, logits_dtype=dtype, return_entropy=True)
            (out.logprobs * advantages + out.entropy).sum().backward()
            loss = linear_contrastive_policy_loss(
                leaves[0], *contexts[1:], leaves[1], labels, advantages, logits_dtype=dtype
            ).loss
            loss.backward()
            found += [out.logprobs, loss, leaves[0].grad] + ([] if frozen else [leaves[1].grad])
        return found

    whole = run()
    calls, original = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda out, *rest: (calls.append(out.shape), original(out, *rest)))
    monkeypatch.setattr(linear_products, "CACHE_BYTES", 0)
    monkeypatch.setattr(linear_products, "PIECE_ROWS", 9)
    monkeypatch.setattr(linear_products, "ENOUGH_ROWS", enough)
    for got, want in zip(run(), whole, strict=True):
        oracle.assert_same_bits(got, want)
    of_head = [shape for shape in calls if shape == (301, 24)]
    assert len(of_head) == 2  # one each for the log-probs and the loss of a trainable head
    assert sum(columns == 301 and rows <= 9 for rows, columns in calls) > 10
    assert (sum(columns == 24 and rows <= 9 for rows, columns in calls) > 10) == (enough == 1)


@native
def test_every_op_from_hidden_states_takes_them(monkeypatch):
    calls, original = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda out, a, b, add: (calls.append(add), original(out, a, b, add)))
    hidden, weight, _ = products(torch.bfloat16)
    labels = torch.arange(20)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    linear_token_logprobs(*leaves, labels).logprobs.sum().backward()
    assert calls == [False, False, False]  # the first chunk adds to nothing
    linear_divergence(leaves[0], hidden.detach() + 1, leaves[1]).sum().backward()
    assert calls[3:] == [False] * 4
    calls.clear()
    linear_token_logprobs(*leaves, labels, backend="reference").logprobs.sum().backward()
    assert not calls
    assert "with bfloat16 products" in backend_report().extensions["cepo_kernels._cpu"]


def test_memory_is_a_chunk_whatever_the_number_of_rows(monkeypatch):
    """Allocations beyond hidden-sized ones and the head's gradient stay below a few chunks of logits."""
    rows, width, vocabulary = 400, 16, 20_000
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 16 * vocabulary * 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    labels, advantages = torch.randint(vocabulary, (rows,)), torch.randn(rows)

    def call():
        linear_contrastive_policy_loss(hidden, None, None, weight, labels, advantages).loss.backward()
        linear_token_logprobs(hidden, weight, labels).logprobs.sum().backward()

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    sizes = [event.cpu_memory_usage for event in recorded.events() if event.name in ("[memory]", "aten::empty")]
    chunk = 16 * vocabulary * 4
    assert max(sizes) <= max(chunk, weight.nbytes) * 1.01 < rows * vocabulary * 4 / 20
