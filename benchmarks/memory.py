"""Memory of log-probs from hidden states, forward and backward, beyond what nobody can do without.

    python benchmarks/memory.py --results benchmarks/results/memory.json

Each contender runs in a process of its own; counted is the peak of its resident memory less what was resident before
(the inputs among it), less the gradients of hidden states and head and one float32 buffer of the head's size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import machine
from linear_contenders import Run, eager, peers

import cepo_kernels

DTYPE = torch.bfloat16


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cepo_kernels.linear_token_logprobs(hidden, weight, labels).logprobs


def contenders() -> dict[str, Run]:
    # The compiled one keeps what the eager one keeps, and torch's own op has its chunks as large.
    return {"cepo": ours, "eager": eager, **{name: run for name, run in peers().items() if name.startswith("TRL")}}


def status(field: str) -> int:
    """Bytes of this process, as /proc has them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def merge(path: Path, found: dict[str, Any]) -> None:
    """Write into a JSON file what was found, and leave what else it holds; dictionaries are merged, too."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name, value in found.items():
        kept[name] = {**kept.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(kept, indent=1) + "\n")


def run(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    contenders()[name](hidden, weight, labels).sum().backward()


def measure(name: str, rows: int, width: int, vocabulary: int) -> int:
    """Bytes beyond inputs, gradients and one float32 head."""
    run(torch.randn(32, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True), torch.arange(32), name)
    hidden = torch.randn(rows, width).to(DTYPE).requires_grad_()
    weight = torch.empty(vocabulary, width, dtype=DTYPE).normal_(std=0.02).requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    before = status("VmRSS")
    forget_peak()
    run(hidden, weight, labels, name)
    return status("VmHWM") - before - hidden.nbytes - weight.nbytes - 4 * weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="N (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="H (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write what was measured to this JSON file")
    parser.add_argument("--only", choices=list(contenders()), help="measure this one, in this process")
    args = parser.parse_args()
    sizes = ["--width", str(args.width), "--vocabulary", str(args.vocabulary)]
    if args.only:
        print(measure(args.only, args.rows[0], args.width, args.vocabulary))
        return
    found = []
    for rows in args.rows:
        for name in contenders():
            command = [sys.executable, __file__, "--only", name, "--rows", str(rows), *sizes]
            result = subprocess.run(command, capture_output=True, text=True)
            extra = int(result.stdout) if result.returncode == 0 else None
            found.append({"rows": rows, "name": name, "bytes": extra})
            said = (
                "failed: " + result.stderr.strip().splitlines()[-1] if extra is None else f"{extra / 2**20:9,.0f} MiB"
            )
            print(f"N = {rows:6,}  {name:20} {said}", flush=True)
    if args.results:
        shape = {"width": args.width, "vocabulary": args.vocabulary, "dtype": str(DTYPE)}
        merge(args.results, {"machine": machine(), **shape, "measured": found})


if __name__ == "__main__":
    main()
