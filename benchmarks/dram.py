"""What Nsight Compute saw against the byte model, kernel by kernel.

`run_gpu.sh` profiles this script without arguments, which launches the kernels, and gives it what ncu wrote.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import byte_model
import gpu
import torch

from cepo_kernels import backends

ROWS = 8192  # enough that what stays in the L2 unwritten is little
ALLOWED = 0.05
BACKENDS = {"triton": "streaming", "cuda:streaming": "streaming", "cuda:cluster": "cluster8"}  # and their fused loss


def cases() -> Iterator[tuple[str, str, int, list[str]]]:
    """Backend, kind of call, V and the kernels that it launches, in their order."""
    for vocabulary in gpu.VOCABULARIES:
        for name, loss in BACKENDS.items():
            if backends.unavailable(name, "cuda") is None:
                yield name, "fused", vocabulary, [loss]
                if loss == "streaming":
                    yield name, "separate", vocabulary, ["forward", "backward"]


def launch() -> None:
    for name, kind, vocabulary, _ in cases():
        gpu.run_once(ROWS, vocabulary, torch.bfloat16, kind, name)


def expected() -> list[tuple[str, int]]:
    device = torch.cuda.get_device_properties(0)
    found = []
    for name, _, vocabulary, kernels in cases():
        holds = byte_model.l2_holds_rows(vocabulary, 2, device.multi_processor_count, device.L2_cache_size)
        found += [
            (f"{name} {kernel} V = {vocabulary:,}", byte_model.dram(kernel, ROWS, vocabulary, 2, holds).total)
            for kernel in kernels
        ]
    return found


def measured(text: str) -> list[int]:
    """Bytes read and written by each kernel, in the order of their launches."""
    lines = [line for line in text.splitlines() if line.startswith('"')]  # ncu has more to say
    if not lines or not lines[0].startswith('"ID"'):
        raise SystemExit("dram.py: expected ncu's CSV with a line of column names, got none")
    total: dict[int, int] = {}
    for row in csv.DictReader(lines):
        if row["Metric Unit"] not in ("byte", "bytes"):
            raise SystemExit(f"dram.py: expected bytes (--print-units base), got {row['Metric Unit']!r}")
        value = round(float(row["Metric Value"].replace(",", "")))
        total[int(row["ID"])] = total.get(int(row["ID"]), 0) + value
    return [total[index] for index in sorted(total)]


def compare(seen: list[int], model: list[tuple[str, int]]) -> bool:
    """Prints both; whether every kernel is within 5 % of the model."""
    if len(seen) != len(model):
        raise SystemExit(f"dram.py: expected {len(model)} kernels in ncu's report, got {len(seen)}")
    good = True
    for got, (name, want) in zip(seen, model, strict=True):
        near = abs(got / want - 1.0) <= ALLOWED
        good &= near
        print(f"{name:44}{want / 1e9:8.3f} GB by the model {got / 1e9:8.3f} measured{'' if near else '  OFF'}")
    return good


if __name__ == "__main__":
    if len(sys.argv) == 1:
        launch()
    else:
        sys.exit(not compare(measured(Path(sys.argv[1]).read_text()), expected()))
