"""What fills `cepo_kernels/backends/tables.py`: `gpu.py --tune` measures candidates and prints both tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cepo_kernels.backends import tables
from cepo_kernels.backends.tables import Threads

LARGEST = 151_936  # columns that stand for the last line of the table
DTYPES = {2: torch.bfloat16, 4: torch.float32}
Lines = Sequence[tuple[int, int, dict[int, Threads]]]
Measure = Callable[[int, torch.dtype], float]  # milliseconds with the table as it stands, inf where it cannot run


def launches(measure: Measure) -> Lines:
    """The line that is fastest for each of the table's sizes; its block is one for all dtypes."""
    before, found = tables.LAUNCHES, []
    try:
        for most, block, _ in before:
            tried = [_with_block(lanes, min(most, LARGEST), measure) for lanes in (block // 2, block, 2 * block)]
            _, lanes, threads = min(tried, key=lambda line: line[0])
            found.append((most, lanes, threads))
    finally:
        tables.LAUNCHES = before
    return found


def _with_block(block: int, vocabulary: int, measure: Measure) -> tuple[float, int, dict[int, Threads]]:
    """The product of the best times of each dtype, the block, and what made them the best."""
    product, best = 1.0, {}
    usual = max(1, block // 128)
    for size, dtype in DTYPES.items():
        times = {}
        for threads in (Threads(warps, stages) for warps in (usual, 2 * usual) for stages in (2, 3)):
            tables.LAUNCHES = ((2**31 - 1, block, dict.fromkeys(DTYPES, threads)),)
            times[threads] = measure(vocabulary, dtype)
        best[size] = min(times, key=times.__getitem__)
        product *= times[best[size]]
    return product, block, best


def fastest(groups: list[dict[str, Any]], capability: tuple[int, int]) -> dict[tuple[str, tuple[int, int]], str]:
    """The faster of triton and cuda over the tables of `gpu.py` in which both stand: by the geometric mean."""
    logs: dict[str, list[float]] = {}
    for group in groups:
        ms = {row["name"]: row["ms"] for row in group["rows"]}
        if {"cuda", "triton"} <= ms.keys():
            op = {"fused": "policy_loss", "divergence": "divergence"}.get(group["kind"], "forward")
            logs.setdefault(op, []).append(math.log(ms["cuda"] / ms["triton"]))
    return {(op, capability): "cuda" if sum(of) < 0 else "triton" for op, of in logs.items()}


def source(lines: Lines, best: dict[tuple[str, tuple[int, int]], str]) -> str:
    """Both tables as `tables.py` has them."""
    text = ["LAUNCHES: tuple[tuple[int, int, dict[int, Threads]], ...] = ("]
    for most, block, threads in lines:
        sizes = ", ".join(f"{size}: Threads({of.warps}, {of.stages})" for size, of in threads.items())
        text.append(f"    ({'2**31 - 1' if most == 2**31 - 1 else most}, {block}, {{{sizes}}}),")
    text += [")", "FASTEST: dict[tuple[str, tuple[int, int]], str] = {"]
    text += [f'    ("{op}", {capability}): "{name}",' for (op, capability), name in {**tables.FASTEST, **best}.items()]
    return "\n".join([*text, "}"])
