"""Writes the tables of README.md from the files in benchmarks/results: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def speed() -> str:
    """The machine as it is, and held to AVX2 where that was measured."""
    paths = [RESULTS / "cpu.json", RESULTS / "cpu-avx2.json"]
    return "\n\n".join(_speed(path) for path in paths if path.exists())


def _speed(path: Path) -> str:
    """Medians per group: milliseconds, our speed-up, share of a plain read, error."""
    measured = json.loads(path.read_text())
    machine = measured["machine"]
    held = "**All held to AVX2.** " if "avx2" in path.name else ""
    lines = [
        f"{held}{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}. "
        "Medians of interleaved runs in one process; the error is the largest relative one against float64 (of "
        "log-probs; with gradient, of the gradient).",
        "",
    ]
    for group in measured["groups"]:
        if "adversarial" in group["group"]:
            continue
        lines += [f"**{group['title']}**", "", "| | ms | GB/s | of a plain read | `cepo` is faster by | error |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for row in group["rows"]:
            share = "" if row["share_of_read"] is None else f"{row['share_of_read']:.0%}"
            faster = "" if row["speedup"] is None or row["name"] == "cepo" else f"{row['speedup']:.1f}x"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {row['name']} | {row['ms']:.1f} | {row['gb_per_s']:.1f} | {share} | {faster} | {error} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def learning() -> str:
    """Held-out accuracy before and after `cepo train`, per seed."""
    measured = json.loads((RESULTS / "learning.json").read_text())
    machine = measured["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['date']}; "
        f"{measured['problems']} held-out problems.",
        "",
        "| seed | sampled at T = 1, before | after | greedy, before | after | seconds in all |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run['seed']} | {run['before']['sampled']:.3f} | {run['after']['sampled']:.3f} "
        f"| {run['before']['greedy']:.3f} | {run['after']['greedy']:.3f} | {run['seconds']:.0f} |"
        for run in measured["runs"]
    ]
    return "\n".join(lines)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    tables: dict[str, Callable[[], str]] = {"speed": speed, "learning": learning}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: benchmarks/readme.py writes this -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            print(f"README.md: expected the markers {begin!r} and {end!r}", file=sys.stderr)
            return 2
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
