"""results.json as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cepo import checkpoint
from cepo.compare.cells import Record

# Okabe and Ito's colours, told apart by every kind of colour vision; the reference is black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")
_POINTS = 12.0  # of accuracy, to either side, that a picture shows


def markdown(summary: Record) -> str:
    """The tables, a task each, and what a reader must know to believe them."""
    plan, cells = summary["plan"], summary["cells"]
    lines = [f"# {plan['name']}", "", *_preamble(plan)]
    for task, found in summary["tasks"].items():
        lines += ["", f"## {task}", "", *table(plan, found), "", *_notes(plan, found), *_checks(found["checks"])]
    lines += ["", "## Cells", "", f"{cells['finished']} of {cells['planned']} are finished."]
    lines += [f"- {name} failed: {error}" for name, error in cells["failed"].items()]
    lines += [f"- {name} took {seconds:.0f} s, more than the {plan['cell_seconds']:g} s of the plan"
              for name, seconds in cells["too_long"].items()]  # fmt: skip
    if len(summary["software"]) > 1:
        lines.append(f"- They were made by {len(summary['software'])} versions of the software, see results.json.")
    for software in summary["software"]:
        lines.append("- Made by " + ", ".join(f"{name} {value}" for name, value in software.items()) + ".")
    return "\n".join(lines) + "\n"


def _preamble(plan: Record) -> list[str]:
    rates, seeds = ", ".join(f"{lr:g}" for lr in plan["rates"]), ", ".join(map(str, plan["seeds"]))
    tuned = (
        f"The learning rate is the one of {rates} with the best mean accuracy on validation problems over tuning seeds "
        f"{', '.join(map(str, plan['tuning_seeds']))}, of equals the smallest."
        if rates
        else "The learning rate was not tuned."
    )
    return [
        f"Accuracy on the same {plan['test_problems']:,} test problems with the same sampling noise; mean +- standard "
        f"deviation over seeds {seeds}, of the problems and the noise of training. All methods of a task start from "
        f"the same weights, of which alone the table speaks. {tuned}",
        "",
        f"`vs {plan['reference']}`: difference in {plan['metric']} accuracy, in points, paired by seed, with the 95 % "
        "interval of Student's t. `p`: of that, with Holm's correction over the methods of a task; the verdict is by "
        f"p < {plan['level']:g}. `detectable`: the true difference that so many seeds show four times in five, alone "
        "and (in brackets) at Holm's first step. `area`: mean height of the held-out curve. `active`: seconds of a "
        "step with lambda > 0. `credit`: seconds of a step outside rollout, reward, policy and update; it holds the "
        "log-probs and the loss, which all methods need.",
    ]


def table(plan: Record, task: Record, without: Sequence[str] = ()) -> list[str]:
    """A line for each method of a task, and one for the untrained model; but for the columns `without`."""
    tuned = bool(plan["rates"])
    heads = ["method", "sampled", "greedy", f"pass@{plan['pass_at']['k']}", f"vs {plan['reference']}", "p (Holm)",
             "verdict", "detectable", "area", "s/step", "active", "credit", "lr", *(["tried"] if tuned else []),
             "supervision"]  # fmt: skip
    shown = [head for head in heads if head not in without]
    rows = []
    if base := task["base"]:
        row = {"method": "base", "sampled": _number(base["sampled"]), "greedy": _number(base["greedy"]),
               heads[3]: _number(base["pass_at"])}  # fmt: skip
        rows.append(row)
    for name, method in task["methods"].items():
        row = {
            "method": f"**{name}**" if name == plan["reference"] else name,
            "sampled": _spread(method["sampled"]),
            "greedy": _spread(method["greedy"]),
            heads[3]: _spread(method["pass_at"]),
            "area": _spread(method["area"]),
            "s/step": _number(method["seconds_per_step"]),
            "active": _number(method["seconds_per_active_step"]),
            "credit": _number(method["credit_seconds_per_step"]),
            "lr": "" if method["lr"] is None else f"{method['lr']:g}",
            "tried": ", ".join(f"{each['lr']:g}: {_number(each['mean']) or '-'}" for each in method["tried"]),
            "supervision": ", ".join(method["supervision"]),
        }
        if difference := method.get("difference"):
            row[heads[4]] = _difference(difference)
            p = difference["p_holm"]
            row["p (Holm)"] = "<0.001" if p is not None and p < 1e-3 else _number(p)
            row["verdict"] = difference["verdict"]
            if difference["detectable"] is not None:
                both = (100 * difference["detectable"], 100 * difference["detectable_holm"])
                row["detectable"] = "{:.1f} ({:.1f})".format(*both)
        rows.append(row)
    cells = [shown, ["---", *["---:"] * (len(shown) - 1)], *([row.get(head, "") for head in shown] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _difference(difference: Record) -> str:
    if difference["mean"] is None:
        return ""
    text = f"{100 * difference['mean']:+.1f}"
    if difference["low"] is not None:
        text += f" [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    return f"{text}, n = {difference['n']}"


def _notes(plan: Record, task: Record) -> list[str]:
    """What is not as the plan would have it: fewer problems, or a best rate that may lie beyond those tried."""
    rates, notes = plan["rates"], []
    if (tests := task["test_problems"]) not in (None, plan["test_problems"]):
        fewer = f"; pass@{plan['pass_at']['k']} is of these" * (tests < plan["pass_at"]["problems"])
        notes += [f"The task has {tests:,} test problems only{fewer}.", ""]
    at = [name for name, method in task["methods"].items() if method["lr"] in (*rates[:1], *rates[-1:])]
    if at and len(rates) > 1:
        notes += [f"The chosen rate is the smallest or the largest tried for {', '.join(at)}.", ""]
    return notes


def _checks(checks: list[Record]) -> list[str]:
    return [f"- {'ok' if each['held'] else 'FAILED'}: {each['what']} ({each['detail']})" for each in checks]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread(values: Record) -> str:
    if values["mean"] is None:
        return ""
    return f"{values['mean']:.3f}" + ("" if values["sd"] is None else f" +- {values['sd']:.3f}")


def draw(summary: Record, path: Path) -> None:
    """A column a task: held-out accuracy over steps, and the differences from the reference with their intervals."""
    from matplotlib.figure import Figure

    plan = summary["plan"]
    tasks = {name: task for name, task in summary["tasks"].items() if any(m["curve"] for m in task["methods"].values())}
    methods = list(next(iter(summary["tasks"].values()))["methods"])
    looks: dict[str, dict[str, Any]] = {plan["reference"]: {"color": "black", "linewidth": 2.5, "zorder": 3}}
    for name in methods:
        style, colour = divmod(len(looks) - 1, len(_COLOURS))
        looks.setdefault(name, {"color": _COLOURS[colour], "linestyle": _STYLES[style % len(_STYLES)]})
    figure = Figure(figsize=(5.2 * max(1, len(tasks)), 4.2 + 0.28 * len(methods)), layout="constrained")
    if tasks:
        panels: Any = figure.subplots(2, len(tasks), squeeze=False, height_ratios=[3.6, 0.6 + 0.28 * len(methods)])
        for column, (task, found) in enumerate(tasks.items()):
            _draw_curves(panels[0][column], task, found, plan["metric"], looks)
            _draw_differences(panels[1][column], found, plan["reference"], looks)
    with checkpoint.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_curves(axes: Any, task: str, found: Record, metric: str, looks: dict[str, dict[str, Any]]) -> None:
    if found["base"]:
        axes.axhline(found["base"][metric], color="grey", linewidth=0.8, linestyle=":", label="base")
    for name, look in looks.items():
        curve = found["methods"][name]["curve"]
        label = name if name == next(iter(looks)) else None  # the others by their colours below
        axes.plot([point["step"] for point in curve], [point[metric]["mean"] for point in curve], label=label, **look)
    axes.set(title=task, xlabel="step", ylabel=f"held-out accuracy, {metric}")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)


def _draw_differences(axes: Any, found: Record, reference: str, looks: dict[str, dict[str, Any]]) -> None:
    """Of each method the mean and its interval; what lies beyond the panel by its number, with an arrow."""
    methods = [name for name in looks if name != reference]
    for row, name in enumerate(methods):
        difference, look = found["methods"][name]["difference"], looks[name]
        if not difference["n"]:
            continue
        mean = 100 * difference["mean"]
        if abs(mean) > _POINTS:
            side = 1 if mean > 0 else -1
            axes.annotate(
                f"{mean:+.0f}", (side * _POINTS, row), (side * 0.8 * _POINTS, row), color=look["color"], va="center",
                ha="center", arrowprops={"arrowstyle": "->", "color": look["color"]},
            )  # fmt: skip
            continue
        if difference["low"] is not None:
            axes.plot([100 * difference["low"], 100 * difference["high"]], [row, row], **look)
        axes.plot(mean, row, "o", color=look["color"])
    axes.axvline(0, color="black", linewidth=1.2)
    axes.set(xlim=(-_POINTS, _POINTS), ylim=(len(methods) - 0.5, -0.5), xlabel=f"points more than {reference}, 95 %")
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(alpha=0.3, axis="x")
