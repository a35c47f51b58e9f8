"""What `cepo tokens` and `cepo plot` do with their arguments."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from cepo import checkpoint, metrics
from cepo.errors import InputError
from cepo.report import curves, page, samples, terminal
from cepo.report.samples import Sample
from cepo.report.shades import CHOICES, COLUMNS, scales, visible


def tokens(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """`cepo tokens`: a step's rollouts in the terminal, or all steps in one page."""
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--step", type=int, help="a step that was kept; default: the last that has what is shaded")
    parser.add_argument("--prompt", type=int, help="number of a prompt, from 1; default: all, or the page's first")
    parser.add_argument("--by", choices=CHOICES, help="what the shade says; default: the first of these there is")
    parser.add_argument("--html", metavar="FILE", help="write a page, of all steps that were kept or of --step alone")
    given = parser.parse_args(list(arguments))
    run = _run(given.run)
    files = samples.files(run)
    if not files:
        raise InputError(f"RUN: expected a run that keeps tokens, as --report.every says, got none in {given.run!r}")
    kept = _listed(list(files))
    if given.step is not None and given.step not in files:
        raise InputError(f"--step: expected one of {kept}, got {given.step}")
    if given.step is not None:
        files = {given.step: files[given.step]}
    newest_first = (samples.read(path) for path in reversed(files.values()))
    read = None if given.html is None else list(newest_first)
    sample = _newest(read or newest_first, COLUMNS[given.by or CHOICES[0]])
    known = scales(read or [sample])
    if not known:
        raise InputError(f"RUN: expected tokens with something to shade them by, got none in step {sample.step}")
    by = given.by or next(iter(known), None)
    if by not in known:
        raise InputError(f"--by: expected one of {', '.join(known)}, which step {sample.step} has, got {by!r}")
    if given.prompt is not None and not 1 <= given.prompt <= len(sample.groups):
        raise InputError(f"--prompt: expected 1 to {len(sample.groups)} in step {sample.step}, got {given.prompt}")
    if read is None:
        numbers = range(1, len(sample.groups) + 1) if given.prompt is None else [given.prompt]
        mixed = "" if sample.lam is None else f", lambda {sample.lam:g}"
        print(f"step {sample.step} (kept: {kept}), {visible(sample.method)}{mixed}")
        width, colour = shutil.get_terminal_size((100, 24)).columns, _coloured()
        text = terminal.draw(sample, by, known[by], numbers, max(width, 20), colour)
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return 0
    text = page.render(run.resolve().name, read[::-1], known, by, sample.step, given.prompt or 1)
    with checkpoint.replacing(_file("--html", given.html)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"page: {given.html} ({len(text) / 1e6:.1f} MB, {len(read)} steps)", file=sys.stderr)
    return 0


def plot(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """`cepo plot`: the curves of one run, or of several over each other."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    parser.add_argument("--out", metavar="FILE", help="a .png or .svg file; default: curves.png in RUN, or runs.png")
    given = parser.parse_args(list(arguments))
    runs = [_run(run) for run in given.runs]
    for run in runs:
        if not metrics.read(run):
            raise InputError(f"RUN: expected a run with records in {metrics.FILE}, got {str(run)!r}")
    out = _file("--out", given.out or (str(runs[0] / curves.FILE) if len(runs) == 1 else "runs.png"))
    if out.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--out: expected a .png or .svg file, got {given.out!r}")
    curves.overlay(runs, out) if len(runs) > 1 else curves.draw(runs[0], out)
    print(f"curves: {out}", file=sys.stderr)
    return 0


def _run(name: str) -> Path:
    path = Path(name).expanduser()
    if not (path / checkpoint.CONFIG).is_file():
        raise InputError(f"RUN: expected a run directory, got {name!r}")
    return path


def _file(option: str, name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option}: expected a file in a directory that exists, got {name!r}")
    return path


def _newest(found: Iterable[Sample], column: str) -> Sample:
    """The first that has `column`, else the first."""
    first = None
    for sample in found:
        if column in sample.columns():
            return sample
        first = first or sample
    assert first is not None
    return first


def _listed(steps: Sequence[int]) -> str:
    some = [str(step) for step in steps]
    return ", ".join(some if len(some) <= 12 else [*some[:5], "...", *some[-5:]])


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
