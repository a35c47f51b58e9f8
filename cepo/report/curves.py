"""Curves of a run, or of several, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cepo import checkpoint, metrics

FILE = "curves.png"
_EVIDENCE = {"evidence_right": "right rollouts", "evidence_wrong": "wrong rollouts"}
_VALUES = {"value_mean": "value before a segment", "value_outcome": "segments of rollouts that succeeded"}
_SHOWN = ("step", "accuracy", "sampled", "greedy", "entropy", "zero_variance", *_EVIDENCE, *_VALUES, "divergence",
          "lam")  # fmt: skip
_MOST = 20_000  # steps of a run
# Okabe and Ito's, which the colour-blind tell apart, without the yellow that white swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def is_drawn(run: Path) -> bool:
    """Whether the picture of `run` is there, and no older than its records."""
    picture, records = (file.stat().st_mtime_ns if file.exists() else 0 for file in (run / FILE, run / metrics.FILE))
    return 0 < picture >= records


def draw(run: Path, out: Path | None = None) -> Path:
    """Plot metrics.jsonl of `run` into `out`, its own curves.png if None, and return the path."""
    from matplotlib.figure import Figure

    steps, evals = _drawn(run)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    accuracy, entropy, evidence, seconds = figure.subplots(2, 2).flat
    _lines(accuracy, steps, {"accuracy": "training rollouts"}, alpha=0.4)
    _lines(accuracy, evals, {"sampled": "held out, sampled", "greedy": "held out, greedy"}, marker="o")
    accuracy.set(title="accuracy", ylim=(0, 1))
    _lines(entropy, steps, {"entropy": "entropy (nats per token)", "zero_variance": "groups without variance"})
    entropy.set(title="exploration", ylim=(0, None))
    valued = any("value_mean" in record for record in steps)
    _lines(evidence, steps, {**_EVIDENCE, **_VALUES, "divergence": "divergence from the teacher"})
    _lines(evidence, steps, {"lam": "lambda"}, linestyle="--", color="grey")
    evidence.set(title="values, mean per segment" if valued else "teachers, mean per token (nats)")
    evidence.set_visible(evidence.has_data())
    timed = [record for record in steps if "seconds" in record]
    phases = list(dict.fromkeys(phase for record in timed for phase in record["seconds"]))
    if phases:
        times = [[record["seconds"].get(phase, 0.0) for record in timed] for phase in phases]
        seconds.stackplot([record["step"] for record in timed], *times, labels=phases)
    seconds.set(title="seconds per step")
    for axes in (accuracy, entropy, evidence, seconds):
        _count(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return _save(figure, out or run / FILE)


def overlay(runs: Sequence[Path], out: Path) -> Path:
    """Plot the curves of several runs over each other into `out`, a colour for each, and return the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    sampled, greedy, accuracy, entropy = panels
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        steps, evals = _drawn(run)
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": ("-", "--", ":", "-.")[number // len(_COLOURS) % 4],
        }
        _lines(sampled, evals, {"sampled": name}, marker="o", markersize=4, **style)
        _lines(greedy, evals, {"greedy": name}, marker="o", markersize=4, **style)
        _lines(accuracy, steps, {"accuracy": name}, linewidth=1, **style)
        _lines(entropy, steps, {"entropy": name}, linewidth=1, **style)
    sampled.set(title="held-out accuracy, sampled", ylim=(0, 1))
    greedy.set(title="held-out accuracy, greedy", ylim=(0, 1))
    accuracy.set(title="accuracy of training rollouts", ylim=(0, 1))
    entropy.set(title="entropy (nats per token)", ylim=(0, None))
    for axes in panels:
        _count(axes)
        axes.grid(alpha=0.25)
    legend: dict[str, Any] = {}
    for axes in panels:
        legend |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2, fontsize=9)
    return _save(figure, out)


def _drawn(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What there is to draw of a run's steps, every n-th where a picture could not show them all, and evaluations."""
    steps: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    every = 1
    for record in metrics.stream(run):
        of = {"train": steps, "eval": evals}.get(record["kind"])
        if of is None or (of is steps and record["step"] % every):
            continue
        of.append({name: float(record[name]) for name in _SHOWN if metrics.is_number(record.get(name))})
        if of is steps and isinstance(record.get("seconds"), dict):
            of[-1]["seconds"] = {phase: x for phase, x in record["seconds"].items() if metrics.is_number(x)}
        if len(steps) > _MOST:
            every *= 2
            steps[:] = [record for record in steps if record["step"] % every == 0]
    return steps, evals


def _names(runs: Sequence[Path]) -> list[str]:
    """What each run is called: its directory, or its path where two would be called the same."""
    names = [run.resolve().name for run in runs]
    # matplotlib keeps labels with a leading "_" out of a legend, and reads what stands between two "$" as mathematics.
    told = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    return [name.replace("$", r"\$").replace("_", "\u200b_", name.startswith("_")) for name in told]


def _save(figure: Any, out: Path) -> Path:
    with checkpoint.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=120)
    return out


def _count(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _lines(axes: Any, records: Sequence[dict[str, Any]], columns: dict[str, str], **style: Any) -> None:
    for key, label in columns.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
