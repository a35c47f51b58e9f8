"""Curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cepo import checkpoint, metrics

FILE = "curves.png"
_EVIDENCE = {"evidence_right": "right rollouts", "evidence_wrong": "wrong rollouts"}


def draw(run: Path) -> Path:
    """Plot metrics.jsonl of `run` into curves.png and return its path."""
    from matplotlib.figure import Figure

    records = metrics.read(run)
    steps = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    accuracy, entropy, evidence, seconds = figure.subplots(2, 2).flat
    _lines(accuracy, steps, {"accuracy": "training rollouts"}, alpha=0.4)
    _lines(accuracy, evals, {"sampled": "held out, sampled", "greedy": "held out, greedy"}, marker="o")
    accuracy.set(title="accuracy", ylim=(0, 1))
    _lines(entropy, steps, {"entropy": "entropy (nats per token)", "zero_variance": "groups without variance"})
    entropy.set(title="exploration", ylim=(0, None))
    _lines(evidence, steps, {**_EVIDENCE, "divergence": "divergence from the teacher"})
    _lines(evidence, steps, {"lam": "lambda"}, linestyle="--", color="grey")
    evidence.set(title="teachers, mean per token (nats)")
    phases = list(dict.fromkeys(phase for record in steps for phase in record["seconds"]))
    if steps:
        times = [[record["seconds"].get(phase, 0.0) for record in steps] for phase in phases]
        seconds.stackplot([record["step"] for record in steps], *times, labels=phases)
    seconds.set(title="seconds per step")
    for axes in (accuracy, entropy, evidence, seconds):
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with checkpoint.replacing(run / FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return run / FILE


def _lines(axes: Any, records: Sequence[dict[str, Any]], columns: dict[str, str], **style: Any) -> None:
    for key, label in columns.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
