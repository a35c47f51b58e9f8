"""`cepo compare`: runs what a plan asks for and is not there yet, then writes the table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from cepo import checkpoint
from cepo.compare import table
from cepo.compare.cells import FOLDER, Record, Store, run
from cepo.compare.plan import BASE, Plan, load
from cepo.compare.results import schedule, summarise, whole
from cepo.errors import InputError, one_line
from cepo.parts import load_parts


def compare(
    plan: Plan, out: Path, *, limit_seconds: float | None = None, keep_weights: bool = False, redo: bool = False
) -> None:
    """Run the cells of `plan` that `out` lacks, one after the other.

    Args:
        limit_seconds: no cell is started after so many.
        keep_weights: leave the checkpoints of finished cells where they are.
        redo: replace cells of another configuration.

    Raises InputError if `out` holds such cells, or cannot be written.
    """
    store, began = Store(out), time.monotonic()
    if redo:
        for cell in plan.every():
            if store.stale(cell):
                store.discard(cell)
    else:
        _refuse_stale(plan, store, ", or --redo to replace them")
    for number, cell in enumerate(schedule(plan, store), 1):
        record = store.get(cell)
        if record is not None and "error" not in record:
            continue
        if limit_seconds is not None and time.monotonic() - began > limit_seconds:
            print(f"no more cells are started after {limit_seconds:g} s", file=sys.stderr)
            return
        print(f"[{number}/{len(plan)}] {cell.name}: {_told(run(cell, store, keep_weights), plan)}", file=sys.stderr)


def report(plan: Plan, out: Path) -> Record:
    """Write results.json, results.md and results.png from the cells that are there; returns the first."""
    try:
        summary = summarise(plan, Store(out))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{out / FOLDER}: expected cells as they were written, got edited ones ({why})") from error
    with checkpoint.replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    with checkpoint.replacing(out / "results.md") as temporary:
        temporary.write_text(table.markdown(summary))
    table.draw(summary, out / "results.png")
    return summary


def main(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """The command; its exit status is 0 if every cell is finished and every check held, else 1."""
    parser.add_argument(
        "plan", metavar="PLAN.yaml", help="methods, tasks, seeds and so on, as examples/compare/addition.yaml has them"
    )
    parser.add_argument("--out", help="directory of all runs and results; default: runs/<name of the plan>")
    parser.add_argument("--limit-seconds", type=float, help="start no more cells after so long")
    parser.add_argument("--keep-weights", action="store_true", help="leave the checkpoints of finished cells")
    parser.add_argument("--redo", action="store_true", help="replace cells that were made under another configuration")
    parser.add_argument("--report-only", action="store_true", help="write the results from what is there")
    given = parser.parse_args(list(arguments))
    if given.limit_seconds is not None and not given.limit_seconds >= 0:
        raise InputError(f"--limit-seconds: expected at least 0, got {given.limit_seconds:g}")
    plan = load(given.plan)
    out = Path(given.out or Path("runs", plan.name)).expanduser()
    if given.report_only and not out.is_dir():
        raise InputError(f"--out: expected a directory with cells, got {str(out)!r}")
    if given.report_only:
        _refuse_stale(plan, Store(out))
    else:
        for task in plan.tasks:  # a model or a backend that is not there would fail in cell after cell
            load_parts(plan.configs[task, BASE])
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: cannot make {out}: {error.strerror}") from error
        options = {name: given[name] for name in ("limit_seconds", "keep_weights", "redo")}
        with checkpoint.lock(out):
            try:
                compare(plan, out, **options)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command continues where this one stopped") from None
    summary = report(plan, out)
    sys.stdout.write(table.markdown(summary))
    print(f"results: {out / 'results.md'}, .json, .png", file=sys.stderr)
    return 0 if whole(summary) else 1


def _refuse_stale(plan: Plan, store: Store, instead: str = "") -> None:
    if stale := [difference for cell in plan.every() if (difference := store.stale(cell))]:
        raise InputError(
            f"--out: expected cells of this plan, got {len(stale)} of another configuration, the first {stale[0]}; "
            f"give another directory{instead}"
        )


def _told(record: Record, plan: Plan) -> str:
    """A cell in a few words."""
    if "error" in record:
        return f"failed: {record['error']}"
    first, last = record["curve"][0], record["curve"][-1]
    if first is last:
        return f"sampled {first['sampled']:.3f}, greedy {first['greedy']:.3f}"
    seconds = record["wall_seconds"]
    over = plan.cell_seconds is not None and seconds > plan.cell_seconds
    late = f"; warning: more than cell_seconds, {plan.cell_seconds:g}" if over else ""
    gains = ", ".join(f"{metric} {first[metric]:.3f} -> {last[metric]:.3f}" for metric in ("sampled", "greedy"))
    return f"{record['kind']}, {gains} ({seconds:.0f} s{late})"
