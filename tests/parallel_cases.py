"""What ranks that hold columns of a vocabulary are tried on: layouts, and calls against one process and the oracle.

`test_parallel` runs the cases, all of a world size in one set of processes.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cepo_kernels import contrastive_logprobs, contrastive_policy_loss, linear_products, token_logprobs
from cepo_kernels.linear import linear_contrastive_logprobs, linear_contrastive_policy_loss, linear_token_logprobs

TILE, ROWS, WIDTH, VOCABULARY = 64, 10, 12, 300
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of a gradient's largest entry
LINEAR = [torch.float64, torch.float32, torch.bfloat16]
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


# --- who holds what --------------------------------------------------------------------------------------------------


def layouts(world):
    """Names, and for each rank its start and the columns that it holds, padding included."""
    vocabulary = VOCABULARY
    uneven = [0, *(7 + rank * vocabulary // world for rank in range(1, world)), vocabulary]
    tiles = [min(vocabulary, TILE * (rank + rank // 2)) for rank in range(world)] + [vocabulary]
    share = -(-vocabulary // (world - 1))  # the last rank has padding alone
    yield "uneven", [(start, stop - start) for start, stop in itertools.pairwise(uneven)], {}
    yield "on tiles", [(start, stop - start) for start, stop in itertools.pairwise(tiles)], {}
    yield "padded", [(rank * share, share) for rank in range(world)], {"vocab_size": vocabulary}
    whole = [(start, stop - start) for start, stop in itertools.pairwise(uneven)]
    yield "backwards", whole[::-1], {"vocab_start": True}
    yield "none", [(0, vocabulary)] + [(vocabulary, 0)] * (world - 1), {}


class Held:
    """This rank's part of a layout, and the call's options that say so."""

    def __init__(self, rank, parts, options):
        self.start, self.columns = parts[rank]
        self.options = {"tp_group": dist.group.WORLD, **options}
        if "vocab_start" in options:
            self.options["vocab_start"] = self.start

    def of(self, whole, dim=-1):
        """The columns, as a leaf; what lies beyond the vocabulary is NaN."""
        there = max(0, min(self.columns, whole.shape[dim] - self.start))
        part = whole.detach().narrow(dim, min(self.start, whole.shape[dim]), there)
        padding = [0, 0] * (whole.ndim - 1 - dim % whole.ndim) + [0, self.columns - there]
        return F.pad(part, padding, value=math.nan).clone().requires_grad_()

    def check(self, found, whole, compare, dim=-1):
        """A gradient of what `of` gave: ``compare`` with that of the whole, and zeros in the padding."""
        there = max(0, min(self.columns, whole.shape[dim] - self.start))
        assert not found.narrow(dim, there, self.columns - there).any()
        if there:
            compare(found.narrow(dim, 0, there), whole.narrow(dim, self.start, there))


def everywhere(rank, world, only=()):
    for name, parts, more in layouts(world):
        if not only or name in only:
            yield name, Held(rank, parts, more)


def of_dtype(dtype):
    """Layouts to try with a dtype: all of them with float32 alone, for time's sake."""
    return () if dtype == torch.float32 else ("uneven", "padded")


def close(found, want, dtype=torch.float32):
    error = (found.double() - want.double()).abs().max()
    assert error <= BOUND[dtype] * scale_of(want), f"{error:.1e} of {scale_of(want):.1e}"


def scale_of(want):
    return max(want.double().abs().max().item(), 1e-6)


def logits_and_rows(dtype=torch.float32, shape=(ROWS,), vocabulary=VOCABULARY):
    logits = [oracle.logits_like((*shape, vocabulary), seed, dtype) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like(shape, vocabulary, 4, 0.2), oracle.logits_like(shape, 5)
    advantages.view(-1)[::4] = 0.0
    return logits, labels, advantages


# --- from logits -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "capped": {"logit_softcap": 5.0, "logit_scale": 0.7, "temperature": 0.8},
    "temperatures": {"temperature": torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) + 0.5},
    "a mask": {"negative_mask": torch.tensor([[True], [False]]), "lam": 0.9, "ignore_index": 7},
}


@case
def logits(rank, world):
    for dtype in (torch.float64, *oracle.NATIVE):
        for backend in ("auto", "reference"):
            for name, held in everywhere(rank, world, of_dtype(dtype)):
                for options in OPTIONS.values() if name == "uneven" else [{}]:
                    _logits(dtype, backend, held, options)


def _logits(dtype, backend, held, options):
    (policy, *teachers), labels, advantages = logits_and_rows(dtype, (2, 5))
    labels[0, 0], labels[1, 1] = 0, VOCABULARY - 1
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    leaf = held.of(policy)
    more = {**held.options, "backend": backend, "return_entropy": True}
    got = contrastive_logprobs(leaf, *(held.of(x) for x in teachers), labels, advantages, **options, **more)
    want = oracle.contrastive(policy, *teachers, labels, advantages, **options)
    oracle.assert_forward(got, want)
    upstream = oracle.logits_like((2, 5), 6), oracle.logits_like((2, 5), 7)
    (got.logprobs * upstream[0] + got.entropy * upstream[1]).sum().backward()
    plain = {name: value for name, value in options.items() if name not in ("negative_mask", "lam")}
    check_gradient(held, leaf.grad.flatten(0, 1), oracle.logits_gradient(policy, labels, *upstream, **plain))
    alone = token_logprobs(leaf.detach(), labels, backend=backend, **plain, **held.options)
    oracle.assert_same_bits(alone.logprobs, got.logprobs.detach())


def check_gradient(held, found, want, rows=slice(None)):
    """Against the oracle's, whose values and magnitudes travel together."""
    both = torch.from_numpy(np.stack(want, -1))[rows]

    def compare(mine, part):
        oracle.assert_gradient(mine, oracle.Gradient(*part.numpy().transpose(2, 0, 1)), found.dtype)

    held.check(found[rows], both, compare, dim=1)


@case
def the_bits_do_not_depend_on_the_ranks(rank, world):
    alone = [dist.new_group([other]) for other in range(world)][rank]
    for dtype in (torch.float32, torch.bfloat16):
        for softcap in (None, 5.0):
            (policy, *teachers), labels, advantages = logits_and_rows(dtype)
            options = {"return_entropy": True, "logit_softcap": softcap, "temperature": 0.9}

            def call(part, group, labels=labels, advantages=advantages, options=options):
                leaf, *others = part
                out = contrastive_logprobs(leaf, *others, labels, advantages, tp_group=group, **options)
                (out.logprobs + out.entropy).sum().backward()
                return out, leaf.grad

            want, gradient = call([x.clone().requires_grad_() for x in (policy, *teachers)], alone)
            held = Held(rank, list(layouts(world))[1][1], {})
            got, part = call([held.of(x) for x in (policy, *teachers)], dist.group.WORLD)
            for name, value in got._asdict().items():
                oracle.assert_same_bits(value, getattr(want, name), name)
            held.check(part, gradient, oracle.assert_same_bits)


@case
def near_certain_labels(rank, world):
    """1 - p = 1e-20, its mass on one rank or on all, the label on each in turn; and labels as unlikely as that."""
    for _, held in everywhere(rank, world):
        x = torch.full((2 * world, VOCABULARY), -46.0)
        labels = torch.arange(2 * world) * (VOCABULARY // (2 * world)) + 5
        x[torch.arange(2 * world), labels] = 0.0
        x[1::2, :] = -90.0
        x[1::2, 3] = -46.0
        x[torch.arange(2 * world), labels] = 0.0
        for wanted in (labels, (labels + 1) % VOCABULARY, torch.full_like(labels, 3)):
            for backend in ("auto", "reference"):
                leaf = held.of(x)
                got = token_logprobs(leaf, wanted, return_entropy=True, backend=backend, **held.options)
                want = oracle.contrastive(x, None, None, wanted)
                oracle.assert_close(got.logprobs, want.logprobs, oracle.RELATIVE, name="logprobs")
                oracle.assert_close(got.entropy, want.entropy, oracle.RELATIVE, name="entropy")
                (got.logprobs + got.entropy).sum().backward()
                check_gradient(held, leaf.grad, oracle.logits_gradient(x, wanted, 1.0, 1.0))


@case
def rows_without_a_distribution(rank, world):
    """NaN and +inf on one rank make their own row NaN on all; a shard of -inf adds nothing."""
    for _, held in everywhere(rank, world):
        for backend in ("auto", "reference"):
            clean, labels, _ = logits_and_rows()
            x, labels = clean[0].clone(), labels.clamp(min=0)
            x[0, 290], x[1, 2], x[2] = math.nan, math.inf, -math.inf
            x[3, labels[3]] = math.nan
            x[4, :150] = -math.inf
            x[5, 150:] = -math.inf
            x[6, :] = -math.inf
            x[6, labels[6]] = 1.0
            leaf = held.of(x)
            got = token_logprobs(leaf, labels, return_entropy=True, backend=backend, **held.options)
            want = oracle.contrastive(x, None, None, labels)
            oracle.assert_close(got.logprobs, want.logprobs, oracle.RELATIVE, name="logprobs")
            oracle.assert_close(got.entropy, want.entropy, oracle.RELATIVE, name="entropy")
            got.logprobs.sum().backward()
            finite = np.isfinite(want.logprobs) | np.isnan(want.logprobs)
            check_gradient(held, leaf.grad, oracle.logits_gradient(x, labels, 1.0), finite)


@case
def logits_of_any_size(rank, world):
    for _, held in everywhere(rank, world):
        for backend in ("auto", "reference"):
            for scale in (1e6, 1e7, 1e20, 1.5e38):
                x = torch.cat([
                    torch.full((1, VOCABULARY), -scale), torch.zeros(1, VOCABULARY) - scale,
                    torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * scale,
                ])  # fmt: skip
                x[1, 0], x[1, 1] = scale, 1.0
                x, labels = x.bfloat16(), torch.tensor([1, 1, 0, 3, VOCABULARY - 1])
                leaf = held.of(x)
                got = token_logprobs(leaf, labels, backend=backend, **held.options)
                want = oracle.contrastive(x, None, None, labels)
                oracle.assert_close(got.logprobs, want.logprobs, oracle.RELATIVE, name="logprobs")
                got.logprobs.sum().backward()
                check_gradient(held, leaf.grad, oracle.logits_gradient(x, labels, 1.0))


def losses(own, shape=(ROWS,)):
    """Every surrogate and term."""
    rows = {"old_logprobs": own + oracle.logits_like(shape, 8, spread=0.4), "ref_logprobs": own + 0.2,
            "token_weight": oracle.logits_like(shape, 9).abs()}  # fmt: skip
    for surrogate in ("ppo", "cispo"):
        for kl_coef, entropy_coef in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, -0.05)):
            yield {**rows, "surrogate": surrogate, "kl_coef": kl_coef, "entropy_coef": entropy_coef}


def same_rows(got, want):
    for mine, right in zip((*got.credit, got.ratio), (*want.credit, want.ratio), strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), right.double(), rtol=2e-5, atol=2e-5)
    assert torch.equal(got.clipped, want.clipped)


@case
def the_policy_loss(rank, world):
    for dtype in LINEAR:
        tensors, labels, advantages = logits_and_rows(dtype)
        own = token_logprobs(tensors[0].double(), labels).logprobs
        for options in losses(own.to(advantages.dtype)):
            whole = tensors[0].double().clone().requires_grad_()
            teachers = [x.double() for x in tensors[1:]]
            want = contrastive_policy_loss(whole, *teachers, labels, advantages.double(), **options)
            (want.loss * 3.0).backward()
            for _, held in everywhere(rank, world, of_dtype(dtype)):
                leaf, *others = (held.of(x) for x in tensors)
                got = contrastive_policy_loss(leaf, *others, labels, advantages, **options, **held.options)
                (got.loss * 3.0).backward()
                same_rows(got, want)
                assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
                held.check(
                    leaf.grad,
                    whole.grad,
                    lambda a, b: close(a, b, dtype) if scale_of(b) > 1e-6 else None,  # noqa: B023
                )


@case
def in_place(rank, world):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for _, held in everywhere(rank, world):
            tensors, labels, advantages = logits_and_rows(dtype)
            found = []
            for inplace in (False, True):
                leaf = held.of(tensors[0])
                options = {"inplace_grad": inplace, **held.options}
                out = token_logprobs(leaf * 1.0, labels, **options)
                loss = contrastive_policy_loss(leaf * 1.0, None, None, labels, advantages, **options).loss
                (out.logprobs.sum() + loss).backward()
                found.append(leaf.grad)
            oracle.assert_same_bits(found[1], found[0])


# --- from hidden states ----------------------------------------------------------------------------------------------


def hidden_and_head(dtype):
    hidden = [oracle.logits_like((ROWS, WIDTH), seed, dtype, 1.0) for seed in (1, 2, 3)]
    weight = oracle.logits_like((VOCABULARY, WIDTH), 4, dtype, 0.4)
    bias = oracle.logits_like((VOCABULARY,), 7, dtype, 1.0)
    labels, advantages = oracle.labels_like((ROWS,), VOCABULARY, 5, 0.2), oracle.logits_like((ROWS,), 6)
    advantages[::5] = 0.0
    return hidden, weight, bias, labels, advantages


def heads(hidden, weight, bias):
    """Float64 leaves of the whole, and the three contexts' logits."""
    leaves = [x.double().detach().requires_grad_() for x in (hidden[0], weight, bias)]
    return leaves, [F.linear(x.double(), *leaves[1:]) for x in (leaves[0], *hidden[1:])]


def compare_gradients(held, found, want, dtype, frozen):
    close(found[0].grad, want[0].grad, dtype)
    for mine, right in zip(found[1:], want[1:], strict=True):
        assert (mine.grad is None) == frozen
        if not frozen:
            assert mine.grad.dtype == dtype
            held.check(mine.grad, right.grad, lambda a, b: _within(a, b, right.grad, dtype), dim=0)  # noqa: B023


def _within(found, want, whole, dtype):
    assert (found.double() - want).abs().max() <= BOUND[dtype] * whole.abs().max()


def linear_cases(rank, world):
    """Many chunks for the uneven layout only: each is another exchange."""
    budget, linear_products.LEAST_ROWS = linear_products.LOGITS_BYTES, 4
    for dtype in LINEAR:
        for frozen in (False, True):
            for name, held in everywhere(rank, world, of_dtype(dtype)):
                linear_products.LOGITS_BYTES = 0 if name == "uneven" else budget
                hidden, weight, bias, labels, advantages = hidden_and_head(dtype)
                mine = [hidden[0].clone().requires_grad_(), held.of(weight, 0), held.of(bias)]
                for x in mine[1:]:
                    x.requires_grad_(not frozen)
                yield dtype, frozen, held, mine, (hidden, weight, bias, labels, advantages)
    linear_products.LOGITS_BYTES, linear_products.LEAST_ROWS = budget, 16


@case
def hidden_states(rank, world):
    for dtype, frozen, held, mine, (hidden, weight, bias, labels, advantages) in linear_cases(rank, world):
        leaves, logits = heads(hidden, weight, bias)
        options = {"return_entropy": True, "logit_softcap": 20.0, "temperature": 1.3}
        want = contrastive_logprobs(*logits, labels, advantages.double(), **options)
        got = linear_contrastive_logprobs(
            mine[0], hidden[1], hidden[2], mine[1], labels, advantages, lm_head_bias=mine[2], **options, **held.options
        )
        for out in (got, want):
            ((out.logprobs * out.advantages).sum() + 0.1 * out.entropy.sum()).backward()
        for value, right in zip(got, want, strict=True):
            torch.testing.assert_close(value.double(), right, rtol=2e-5, atol=2e-5)
        compare_gradients(held, mine, leaves, dtype, frozen)


@case
def the_policy_loss_from_hidden_states(rank, world):
    for dtype, frozen, held, mine, (hidden, weight, bias, labels, advantages) in linear_cases(rank, world):
        own = token_logprobs(heads(hidden, weight, bias)[1][0], labels).logprobs.detach()
        for options in losses(own.to(advantages.dtype)):
            leaves, logits = heads(hidden, weight, bias)
            want = contrastive_policy_loss(*logits, labels, advantages.double(), **options)
            for x in mine:
                x.grad = None
            got = linear_contrastive_policy_loss(
                mine[0], hidden[1], hidden[2], mine[1], labels, advantages, lm_head_bias=mine[2], **options,
                **held.options,
            )  # fmt: skip
            (got.loss * 3.0).backward()
            (want.loss * 3.0).backward()
            same_rows(got, want)
            compare_gradients(held, mine, leaves, dtype, frozen)


@case
def rows_that_are_not_scored_may_hold_anything(rank, world):
    for _, held in everywhere(rank, world):
        (policy, *_), labels, advantages = logits_and_rows()
        idle = (labels == -100) | (advantages == 0)
        found = []
        for x in (policy, policy.masked_fill(idle[:, None], math.nan)):
            leaf = held.of(x)
            out = contrastive_policy_loss(leaf, None, None, labels, advantages, **held.options)
            out.loss.backward()
            found += [out.loss.detach(), leaf.grad]
        oracle.assert_same_bits(found[2], found[0])
        oracle.assert_same_bits(found[3], found[1])
        hidden, weight, _, labels, _ = hidden_and_head(torch.float32)
        leaf = hidden[0].clone().requires_grad_()
        nothing = torch.full_like(labels, -100)
        linear_token_logprobs(leaf, held.of(weight, 0), nothing, **held.options).logprobs.sum().backward()
        assert not leaf.grad.any()
