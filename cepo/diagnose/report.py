"""A diagnosis as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cepo.diagnose.statistics import Estimate

_GRADIENT = {"noise_ratio": ".2f", "resolved": ".2f", "cosine": ".4f", "length": ".3f"}


def text(report: dict[str, Any]) -> str:
    """Plain tables; +- is half of a 95 % interval."""
    options = report["options"]
    lines = [
        f"{report['model']} on {report['task']}: {report['problems']} problems of {report['split']} x "
        f"{options['group_size']} rollouts at T = {options['temperature']:g}; eps_w "
        + ", ".join(f"{name} {eps_w:g}" for name, eps_w in report["eps_w"].items()),
        "+- is half of a 95 % interval, resampled over problems, and 0 where all of them agree",
        *(f"without {label}: {why}" for label, why in report["without"].items()),
        *_ranking(report["ranking"], report["task"]),
        *_leakage(report["leakage"]),
        *_shares(report["shares"]),
        *_gradient(report["gradient"], options),
    ]
    return "\n".join(lines)


def _ranking(found: dict[str, Any] | None, task: str) -> list[str]:
    title = "\nRanking: the first wrong token of a wrong rollout against its other result tokens"
    if found is None:
        return [title, f"  not known: task {task} does not say where a completion goes wrong"]
    lines = [
        title,
        f"  {found['slips']} rollouts; {found['elsewhere']} more go wrong first outside a result or state only one",
        "  against all of them; those earlier, which are right, or later; those earlier with at least half its",
        "  entropy; by the result that the error is in; by whether its group's r- is its own answer",
    ]
    wanted = {
        "auroc": "AUROC: the share of its rivals that the first wrong token outranks, a tie counting half",
        "top": "top: how often it outranks all of them, a tie shared",
    }
    for key, meaning in wanted.items() if found["slips"] else ():
        heads = [[*name.rpartition(" ")[::2], f"n {_any(table)[key].n}"] for name, table in found["sets"].items()]
        rows = [
            [score, *(_pm(table[score][key]) if score in table else "-" for table in found["sets"].values())]
            for score in found["sets"]["all"]
        ]
        lines += [f"\n  {meaning}", *_table([["", "", ""], *heads], rows)]
    return lines


def _any(table: dict[str, Any]) -> Any:
    return next(iter(table.values()))


def _leakage(rows: dict[str, Any]) -> list[str]:
    names = {"answer_logprob": "log P(r+ | x, cue)", "entropy": "entropy per token", "accuracy": "accuracy"}
    lines = ["\nLeakage: does the policy, given no hint, know answers better or say less without solving more?"]
    shown = {label: row for label, row in rows.items() if not isinstance(row, str)}
    cells = [[label, *(_pm(row[name]) for name in names)] for label, row in shown.items()]
    lines += _table([["", ""], *(["", meaning] for meaning in names.values())], cells)
    return [*lines, *(f"  {label}: {row}" for label, row in rows.items() if isinstance(row, str))]


def _shares(found: dict[str, Any]) -> list[str]:
    meaning = {
        "zero_variance": "groups without variance",
        "r_minus_is_own": "wrong rollouts whose answer is their group's r-",
        "no_r_minus": "wrong rollouts without an r-",
    }
    lines = ["\nShares", *(f"  {label:50}{_share(found[name])}" for name, label in meaning.items())]
    heads = [["", ""], ["groups", "idle"], ["rollouts", "idle"], ["weights", "at clip"]]
    rows = [[label, *map(_share, of.values())] for label, of in found["methods"].items()]
    return [*lines, "", "  idle: without a gradient, as it stands", *_table(heads, rows)]


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _gradient(found: dict[str, dict[str, Any]] | None, options: dict[str, Any]) -> list[str]:
    lines = ["\nGradient at these weights: noise tr Cov(g) / |E g|^2, and the direction of its mean"]
    if found is None:
        return [*lines, "  not asked for (diagnose.batches 0)"]
    rows = [
        [label, *("-" if of[key] is None else f"{of[key]:{form}}" for key, form in _GRADIENT.items())]
        for label, of in found.items()
    ]
    return [
        *lines,
        f"  {options['batches']} batches of {options['prompts']} x {options['group_size']} rollouts, lambda "
        f"{options['lam']:g}; resolved: the share of the measured |mean|^2 that is not noise",
        "  (no ratio below 0); cosine and length: of the mean, against uniform's",
        *_table([["", ""], *(["", name.replace("_", " ")] for name in _GRADIENT)], rows),
    ]


def _pm(value: Estimate) -> str:
    spread = "" if value.low is None or value.high is None else f"+-{(value.high - value.low) / 2:.3f}"
    return re.sub(r"(?<!\d)0\.", ".", f"{value.mean:.3f}{spread}")


def _table(heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [*map(list, zip(*heads, strict=True)), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]

    def aligned(line: Sequence[str]) -> str:
        first, *rest = line
        return "  " + "  ".join([f"{first:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))])

    return [aligned(line).rstrip() for line in lines if any(line)]
