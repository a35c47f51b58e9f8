"""Bytes of global memory that each kernel moves by construction: what is measured is held against this.

N rows of V columns of `itemsize` bytes. Of a scored row, the forward reads three rows of logits; a backward reads one
and writes one; the fused loss reads three and writes one, and its streaming kernel reads the policy's a second time,
which is memory traffic unless the L2 still holds it. In bfloat16 the floors are 6NV forward, 8NV fused, 10NV forward
and then backward. `tests/test_cuda_memory.py` counts the accesses of the CUDA kernels and finds these numbers; Triton's
read and write the same rows, uncounted.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS = ("forward", "backward", "streaming", "cluster2", "cluster4", "cluster8")
BLOCKS_PER_MULTIPROCESSOR = 2  # of the streaming kernels, a row each: their launch bounds


class Traffic(NamedTuple):
    """Bytes."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


# A row's own numbers, each counted once, without the entropy. Read: label, advantage; in a backward label, upstream
# gradient, log p and three of the stats. Written: six results; with them four stats, or loss, ratio and clipped.
_NUMBERS = {"forward": Traffic(12, 40), "backward": Traffic(28, 0), "loss": Traffic(12, 33)}


def requested(kernel: str, scored: int, idle: int, vocabulary: int, itemsize: int) -> dict[str, Traffic]:
    """What a kernel asks of the caches, by tensor: policy, positive, negative, gradient.

    The rows are aligned to 16 bytes; of one that is not, a load may be of two units of 16 bytes for each that it holds,
    so that up to twice as much is read. A label's logit is fetched once more, by every block of a cluster.

    Args:
        scored, idle: rows that are read; rows (ignored, or without advantage in a loss) that only get zeros.
    """
    row = vocabulary * itemsize
    label = itemsize * (int(kernel.removeprefix("cluster")) if kernel.startswith("cluster") else 1)
    once, no = Traffic(scored * (row + label), 0), Traffic(0, 0)
    teacher = no if kernel == "backward" else once
    policy = Traffic(once.read + scored * row, 0) if kernel == "streaming" else once
    gradient = no if kernel == "forward" else Traffic(0, (scored + idle) * row)
    return {"policy": policy, "positive": teacher, "negative": teacher, "gradient": gradient}


def numbers(kernel: str, rows: int, entropy: bool = False) -> Traffic:
    """Everything that is not logits."""
    one = _NUMBERS.get(kernel, _NUMBERS["loss"])
    return Traffic(rows * one.read, rows * (one.written + 4 * (entropy and kernel != "backward")))


def dram(kernel: str, rows: int, vocabulary: int, itemsize: int, l2_holds: bool) -> Traffic:
    """What reaches memory when every row is scored. `l2_holds`: whether the policy's row is still in the L2 when the
    streaming kernel comes back to it; see `l2_holds_rows`."""
    row, own = vocabulary * itemsize, numbers(kernel, rows)
    reads = 1 if kernel == "backward" else 4 if kernel == "streaming" and not l2_holds else 3
    return Traffic(rows * row * reads + own.read, rows * row * (kernel != "forward") + own.written)


def divergence(scored: int, idle: int, vocabulary: int, itemsize: int) -> dict[str, Traffic]:
    """What a divergence with its gradient asks of the caches, by tensor, both of one dtype and without a top_k: three
    sweeps over both rows, for the normalisers, the sum and the gradient."""
    row = vocabulary * itemsize
    read = Traffic(3 * scored * row, 0)
    return {"student": read, "teacher": read, "gradient": Traffic(0, (scored + idle) * row)}


def divergence_dram(rows: int, vocabulary: int, itemsize: int, l2_holds: bool) -> int:
    """Bytes that reach memory of it, every row scored. `l2_holds`: whether a pair of rows is still in the L2 when the
    later sweeps come back to it; see `l2_holds_rows`. The floor is two reads and a write."""
    return rows * vocabulary * itemsize * (3 if l2_holds else 7)


def l2_holds_rows(vocabulary: int, itemsize: int, multiprocessors: int, l2_bytes: int) -> bool:
    """Whether the policy rows that are in flight at once, or the pairs of a divergence, of which a multiprocessor has
    one, fit into the L2."""
    return multiprocessors * BLOCKS_PER_MULTIPROCESSOR * vocabulary * itemsize <= l2_bytes


def floor(kind: str, rows: int, vocabulary: int, itemsize: int) -> int:
    """The least that forward, fused (loss and gradient in one), separate (forward, then backward) or divergence (with
    its gradient) must move."""
    return {"forward": 3, "fused": 4, "separate": 5, "divergence": 3}[kind] * rows * vocabulary * itemsize
