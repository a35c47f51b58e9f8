"""What only a GPU can tell, as data: `benchmarks/gpu.py --tune` measures it there and prints both tables."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How a Triton program deals the columns of a row to lanes and threads.

    ``block`` lanes take ``unroll`` columns each at a time: these two decide a row's bits, and therefore depend on V and
    on whether there is a cap, and not on the dtype, which rows of one call need not share. ``warps`` and ``stages``
    change no bit.
    """

    block: int
    unroll: int
    warps: int
    stages: int

    @property
    def backward_block(self) -> int:
        """Backward has no accumulators: sixteen columns a thread."""
        return 4 * self.block


class Threads(NamedTuple):
    warps: int
    stages: int


# Columns at most, lanes, and by the bytes of one of the policy's logits what runs them. Not yet measured: four lanes a
# thread and eight columns a lane keep 8 KB of bfloat16 in flight a program, and accumulators in registers.
UNROLL, UNROLL_CAPPED = 8, 4
LAUNCHES: tuple[tuple[int, int, dict[int, Threads]], ...] = (
    (256, 32, {2: Threads(1, 3), 4: Threads(1, 3)}),
    (512, 64, {2: Threads(1, 3), 4: Threads(1, 3)}),
    (1024, 128, {2: Threads(1, 3), 4: Threads(1, 3)}),
    (2048, 256, {2: Threads(2, 3), 4: Threads(2, 3)}),
    (2**31 - 1, 512, {2: Threads(4, 3), 4: Threads(4, 3)}),
)

# Which of "triton" and "cuda" was measured faster, by the backend's function ("forward", which decides for
# its backward too, "policy_loss" or "divergence") and the GPU's compute capability. Where nothing stands, triton runs.
FASTEST: dict[tuple[str, tuple[int, int]], str] = {}


def launch(vocabulary: int, dtype: torch.dtype, softcap: bool) -> Launch:
    """The launch for rows of ``vocabulary`` columns, the policy's logits being of ``dtype``."""
    block, threads = next((block, threads) for most, block, threads in LAUNCHES if vocabulary <= most)
    return Launch(block, UNROLL_CAPPED if softcap else UNROLL, *threads[dtype.itemsize])


def pair_launch(vocabulary: int, dtype: torch.dtype, softcap: bool, top_k: bool) -> Launch:
    """The launch of a divergence, whose later sweeps find both rows in the L2 if few enough are in flight."""
    shape = launch(vocabulary, dtype, softcap or top_k)  # either leaves fewer registers to unroll with
    wider = 4 if shape.block == 512 else 1
    return shape._replace(block=wider * shape.block, warps=wider * shape.warps)
