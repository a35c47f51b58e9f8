"""Runs `cepo train` once per seed and keeps what each learnt: `python benchmarks/learn.py`.

Writes benchmarks/results/learning.json and the picture of README.md, docs/learning.png. Every run is the command as a
newcomer types it but for its seed and directory; its wall time includes start-up and evaluations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import machine
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, directory: Path) -> dict:
    """Train with one seed; its evaluations and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "cepo", "train", "--train.seed", str(seed), "--run_dir", str(directory)]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evals = [
        {key: record[key] for key in ("step", "sampled", "greedy", "problems")}
        for record in records
        if record["kind"] == "eval"
    ]
    steps = [record for record in records if record["kind"] == "train"]
    phases = {phase: sum(r["seconds"][phase] for r in steps) / len(steps) for phase in steps[0]["seconds"]}
    return {
        "seed": seed,
        "seconds": seconds,
        "before": evals[0],
        "after": evals[-1],
        "evals": evals,
        "seconds_per_step": phases,
    }


def draw(runs: list[dict], path: Path) -> None:
    """Held-out accuracy over steps, a line a seed."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("sampled", "-o"), ("greedy", "--s")):
        for number, one in enumerate(runs):
            steps, values = [e["step"] for e in one["evals"]], [e[kind] for e in one["evals"]]
            label = f"{'sampled at T = 1' if kind == 'sampled' else 'greedy'}, seed {one['seed']}"
            axes.plot(steps, values, style, color=f"C{number}", label=label, alpha=1.0 if kind == "sampled" else 0.55)
    axes.set(title="cepo train: column addition, held out", xlabel="step", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/learning.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/learning.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs = [run(seed, Path(directory, f"seed-{seed}")) for seed in arguments.seeds]
    result = {"machine": machine(), "problems": runs[0]["before"]["problems"], "runs": runs}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, arguments.picture)
    for one in runs:
        print(f"seed {one['seed']}: {one['before']['sampled']:.3f} -> {one['after']['sampled']:.3f}", end=" ")
        print(f"in {one['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
