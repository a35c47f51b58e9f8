"""Time, bytes and peak memory of the kernels on a CUDA GPU: `python benchmarks/gpu.py --results FILE.json`.

Shares are of what the same run measures for a plain read (forward) and for three reads to one write (with gradient).
Each contender is timed by CUDA events, all taking turns; the median of the rounds is kept. A set of inputs is larger
than any L2, so nothing is found there from the round before.
"""

from __future__ import annotations

import argparse
import datetime
import json
from functools import partial
from pathlib import Path
from typing import Any

import byte_model
import contenders
import gpu_linear
import torch
import tune
from events import Call, medians
from torch import Tensor

import cepo_kernels
from cepo_kernels import backends

VOCABULARIES = (32_000, 128_256, 151_936, 262_144)


def inputs(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Three tensors of logits, and what every contender gets besides the policy's."""
    torch.manual_seed(0)
    logits = [torch.randn(rows, vocabulary, device="cuda", dtype=dtype).mul_(3) for _ in range(3)]
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    return logits, (*logits[1:], labels, torch.randn(rows, device="cuda"))


def run_once(rows: int, vocabulary: int, dtype: torch.dtype, kind: str, backend: str) -> None:
    logits, rest = inputs(rows, vocabulary, dtype)
    (no_grad if kind == "forward" else apply)(ours(backend, kind), logits[0], *rest)
    torch.cuda.synchronize()


def by_construction(backend: str, kind: str, rows: int, vocabulary: int, itemsize: int) -> int | None:
    """Bytes to and from memory of one call by the model, None for others' code."""
    if backend.partition(":")[0] not in ("triton", "cuda"):
        return None
    device = torch.cuda.get_device_properties(0)
    holds = byte_model.l2_holds_rows(vocabulary, itemsize, device.multi_processor_count, device.L2_cache_size)
    if kind == "divergence":
        return byte_model.divergence_dram(rows, vocabulary, itemsize, holds)
    clusters = backend in ("cuda", "cuda:cluster") and device.major >= 9
    kernels = {"forward": ["forward"], "fused": ["cluster8" if clusters else "streaming"],
               "separate": ["forward", "backward"]}[kind]  # fmt: skip
    return sum(byte_model.dram(kernel, rows, vocabulary, itemsize, holds).total for kernel in kernels)


def group(rows: int, vocabulary: int, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """One table: everybody on the same inputs. ``kind`` is forward, fused (in place), separate (with backward) or
    divergence (of the first two logits, with the first's gradient)."""
    logits, rest = inputs(rows, vocabulary, dtype)
    runs: dict[str, contenders.Contender] = {"eager": contenders.eager}
    runs["torch.compile"] = torch.compile(contenders.eager, fullgraph=True, dynamic=False)
    others, missing = contenders.others()
    runs.update(others)
    if kind != "forward":
        runs = {name: contenders.with_gradient(run) for name, run in runs.items()}
    for name in ("triton", "cuda", "cuda:streaming", "cuda:cluster"):
        if backends.unavailable(name, "cuda") is None:
            runs[name] = ours(name, kind)
    if kind == "divergence":
        runs, rest, missing = contenders.divergences(), (logits[1],), {}
    calls: dict[str, Call] = {}
    for name, run in runs.items():
        calls[name] = partial(no_grad if kind == "forward" else apply, run, logits[0], *rest)
    ceiling, moved = ceilings(logits, kind)
    milliseconds, peak, absent = medians({"ceiling": ceiling, **calls})
    floor = byte_model.floor(kind, rows, vocabulary, dtype.itemsize)
    per_byte = milliseconds.pop("ceiling") / moved
    table = [
        {
            "name": name,
            "ms": ms,
            "tb_per_s": floor / ms / 1e9,
            "share": floor * per_byte / ms,
            "model_bytes": by_construction(name, kind, rows, vocabulary, dtype.itemsize),
            "peak_mib": peak[name] / 2**20,
        }
        for name, ms in milliseconds.items()
    ]
    title = f"{kind} {str(dtype).removeprefix('torch.')}: N = {rows}, V = {vocabulary:,}"
    return {"title": title, "kind": kind, "vocabulary": vocabulary, "dtype": str(dtype), "floor_bytes": floor,
            "ceiling_tb_per_s": 1 / per_byte / 1e9, "rows": table, "absent": {**missing, **absent}}  # fmt: skip


def ours(backend: str, kind: str) -> contenders.Contender:
    if kind == "fused":
        return partial(fused_in_place, backend)
    run = contenders.ours(backend)
    return contenders.with_gradient(run) if kind == "separate" else run


def apply(run: contenders.Contender, *arguments: Tensor) -> Any:
    return run(*arguments)


@torch.no_grad()
def no_grad(run: contenders.Contender, *arguments: Tensor) -> Any:
    return run(*arguments)


def fused_in_place(backend: str, policy: Tensor, *rest: Tensor) -> Any:
    """The gradient replaces the logits; the next round takes it for logits, which changes no byte that is moved."""
    logits = _NotALeaf.apply(policy.detach().requires_grad_())  # type: ignore[no-untyped-call]
    out = cepo_kernels.contrastive_policy_loss(logits, *rest, denominator=1.0, inplace_grad=True, backend=backend)
    return out.loss.backward()  # type: ignore[no-untyped-call]


def fused_triton(rows: int, vocabulary: int, dtype: torch.dtype) -> float:
    """Median milliseconds of Triton's fused loss, which holds every loop that a launch size has a say in."""
    logits, rest = inputs(rows, vocabulary, dtype)
    found, _, _ = medians({"triton": partial(apply, ours("triton", "fused"), logits[0], *rest)})
    return found.get("triton", float("inf"))


class _NotALeaf(torch.autograd.Function):
    """The same memory as a tensor that is neither a leaf nor a view of one, and whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return torch.empty(0, dtype=leaf.dtype, device=leaf.device).set_(leaf.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def ceilings(logits: list[Tensor], kind: str) -> tuple[Call, int]:
    """The call that moves bytes and does nothing else, and how many it moves."""
    from cepo_kernels import _cuda  # type: ignore[attr-defined]

    size = logits[0].nbytes // 16 * 16
    out = torch.empty(1, device="cuda")

    def stream() -> int:
        return torch.cuda.current_stream().cuda_stream

    def read() -> None:
        for x in logits:
            _cuda.plain_read(x.data_ptr(), size, out.data_ptr(), stream())

    def three_to_one() -> None:
        a, b, c = (x.data_ptr() for x in logits)
        _cuda.stream31(a, b, c, logits[0].data_ptr(), size, stream())

    return (read, 3 * size) if kind == "forward" else (three_to_one, 4 * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="write the tables to this JSON file, and a picture beside it")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--tune", action="store_true", help="also measure what cepo_kernels/backends/tables.py holds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: torch sees no CUDA device")
    cases = [(v, torch.bfloat16) for v in VOCABULARIES] + [(151_936, torch.float32)]
    groups = []
    for kind in ("forward", "fused", "separate", "divergence"):
        for vocabulary, dtype in cases:
            found = group(arguments.rows, vocabulary, dtype, kind)
            groups.append(found)
            print(f"\n{found['title']}  (ceiling {found['ceiling_tb_per_s']:.2f} TB/s)")
            for row in found["rows"]:
                model = "" if row["model_bytes"] is None else f"{row['model_bytes'] / found['floor_bytes']:6.2f} floors"
                print(f"  {row['name']:16}{row['ms']:9.3f} ms {row['tb_per_s']:7.2f} TB/s {row['share']:6.0%} "
                      f"{row['peak_mib']:10.0f} MiB beyond the inputs {model}")  # fmt: skip
            for name, reason in found["absent"].items():
                print(f"  {name:16}{reason}")
            torch.cuda.empty_cache()
    measured: dict[str, Any] = {"groups": groups, "linear": list(gpu_linear.groups())}
    if arguments.tune:
        lines = tune.launches(partial(fused_triton, arguments.rows))
        measured["tables"] = tune.source(lines, tune.fastest(groups, torch.cuda.get_device_capability()))
        print(f"\nfor cepo_kernels/backends/tables.py:\n\n{measured['tables']}")
    if arguments.results is not None:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                   "date": datetime.date.today().isoformat()}  # fmt: skip
        arguments.results.write_text(json.dumps({"machine": machine, **measured}, indent=1) + "\n")
        draw([*groups, *measured["linear"]], arguments.results.with_suffix(".png"))


def draw(groups: list[dict[str, Any]], path: Path) -> None:
    """Share of the ceiling, a bar for each contender of each table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(groups), 1, figsize=(7, 1.6 * len(groups)), sharex=True, layout="constrained")
    for axis, found in zip(axes, groups, strict=True):
        names = [row["name"] for row in found["rows"]]
        axis.barh(names[::-1], [row["share"] for row in found["rows"]][::-1])
        axis.set_title(found["title"], fontsize=8, loc="left")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("share of the speed of moving the bytes, or of the matrix products, and nothing else")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
