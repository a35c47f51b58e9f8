"""Nothing the size of the vocabulary is allocated but the gradient, and in place not even that."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cepo_kernels
from cepo_kernels import backends

ROWS, VOCABULARY = 64, 50_000
ROW_BYTES = 4 * VOCABULARY


def largest_allocations(call) -> list[int]:
    """Bytes of every allocation that torch makes on the CPU during ``call``, largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    sizes = [event.cpu_memory_usage for event in recorded.events() if event.name in ("[memory]", "aten::empty")]
    return sorted((size for size in sizes if size > 0), reverse=True)


@pytest.mark.skipif(backends.unavailable("cpu", "cpu") is not None, reason=str(backends.unavailable("cpu", "cpu")))
@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_is_the_only_large_allocation(in_place):
    torch.manual_seed(0)
    leaf = torch.randn(ROWS, VOCABULARY, requires_grad=True)
    teachers = torch.randn(2, ROWS, VOCABULARY)
    labels, advantages = torch.randint(VOCABULARY, (ROWS,)), torch.randn(ROWS)
    logits = leaf * 1.0
    result = None

    def forward():
        nonlocal result
        result = cepo_kernels.contrastive_logprobs(
            logits, teachers[0], teachers[1], labels, advantages, inplace_grad=in_place, return_entropy=True
        )

    assert all(size < ROW_BYTES // 8 for size in largest_allocations(forward))
    loss = (result.logprobs * result.advantages + result.entropy).sum()
    sizes = largest_allocations(lambda: torch.autograd.grad(loss, logits))
    large = [size for size in sizes if size >= ROW_BYTES // 8]
    assert len(large) == (0 if in_place else 1), sizes[:5]
    assert all(size == ROWS * ROW_BYTES for size in large)


def test_a_gradient_that_is_allocated_twice_would_be_seen():
    sizes = largest_allocations(lambda: torch.empty(ROWS, VOCABULARY))
    assert ROWS * ROW_BYTES in sizes
