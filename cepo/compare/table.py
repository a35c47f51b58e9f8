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
    if task["test_problems"] not in (None, plan["test_problems"]):
        notes += [f"The task has {task['test_problems']:,} test problems only.", ""]
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
    """Held-out accuracy over steps, a panel a task, with bands of one standard deviation over the seeds."""
    from matplotlib.figure import Figure

    plan, tasks = summary["plan"], summary["tasks"]
    figure = Figure(figsize=(5.2 * len(tasks) + 1.6, 4), layout="constrained")
    panels: Any = figure.subplots(1, len(tasks), squeeze=False)[0]
    looks: dict[str, dict[str, Any]] = {plan["reference"]: {"color": "black", "linewidth": 2.5, "zorder": 3}}
    for name in next(iter(tasks.values()))["methods"]:
        style, colour = divmod(len(looks) - 1, len(_COLOURS))
        looks.setdefault(name, {"color": _COLOURS[colour], "linestyle": _STYLES[style % len(_STYLES)]})
    for axes, (task, found) in zip(panels, tasks.items(), strict=True):
        if found["base"]:
            axes.axhline(found["base"][plan["metric"]], color="grey", linewidth=0.8, linestyle=":", label="base")
        for name, look in looks.items():
            curve = found["methods"][name]["curve"]
            if not curve:
                continue
            steps = [point["step"] for point in curve]
            means = [point[plan["metric"]]["mean"] for point in curve]
            sds = [point[plan["metric"]]["sd"] or 0.0 for point in curve]
            axes.plot(steps, means, label=name, **look)
            low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)
        axes.set(title=task, xlabel="step", ylabel=f"held-out accuracy, {plan['metric']}")
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    with checkpoint.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
