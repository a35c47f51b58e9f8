"""A step's rollouts as text: in 256 colours, or without any, with marks beneath the tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from cepo.report.samples import Group, Rollout, Sample
from cepo.report.shades import Scale, token_text, visible

# Of the 256 colours, which look alike on light and dark ground: blue above, orange below, and what is read on each.
_COLOURS = {1: (16, 153), 2: (16, 111), 3: (16, 75), 4: (231, 25), -1: (16, 223), -2: (16, 215), -3: (16, 208),
            -4: (231, 130)}  # fmt: skip
_MARKS = {0: " ", 1: "+", 2: "+", 3: "#", 4: "#", -1: "-", -2: "-", -3: "=", -4: "="}


def draw(sample: Sample, by: str, scale: Scale, groups: Sequence[int], width: int, colour: bool) -> str:
    """The groups with these numbers, from 1, shaded by the column called `by`; lines of at most `width` places."""
    lines = [_legend(by, scale, colour)]
    for number in groups:
        lines += ["", *_group(sample, number, scale, width, colour)]
    return "\n".join(lines) + "\n"


def _group(sample: Sample, number: int, scale: Scale, width: int, colour: bool) -> list[str]:
    group = sample.groups[number - 1]
    lines = [_bold(f"prompt {number} of {len(sample.groups)}", colour), *_indented(group.prompt)]
    told = {rollout.negative for rollout in group.rollouts}
    one = told.pop() if len(told) == 1 else None
    lines += [f"  right answer {visible(group.positive)}" + (f", wrong answer {visible(one)}" if one else "")]
    # sorted keeps the order of those that are alike
    for place, rollout in sorted(enumerate(group.rollouts, 1), key=lambda pair: not pair[1].right):
        lines += ["", _head(rollout, place, None if one else rollout.negative, colour)]
        column = rollout.columns.get(scale.column)
        levels = [scale.level(x) for x in column] if column else [0] * len(rollout.tokens)
        lines += _tokens(rollout.tokens, levels, width, colour)
        if column is None:
            lines.append(f"  ({_absent(sample, group, rollout)})")
    return lines


def _head(rollout: Rollout, place: int, negative: str | None, colour: bool) -> str:
    parts = [
        *([] if rollout.advantage is None else [f"advantage {rollout.advantage:+.3g}"]),
        "not scored" if rollout.reward is None else f"reward {rollout.reward:.3g}",
        "no answer" if rollout.answer is None else f"answer {visible(rollout.answer)}",
        *([f"wrong answer told {visible(negative)}"] if negative else []),
        *(["truncated"] if rollout.truncated else []),
    ]
    verdict = "right" if rollout.right else "wrong"
    return f"{_bold(f'{verdict} #{place}', colour)}  {', '.join(parts)}"


def _absent(sample: Sample, group: Group, rollout: Rollout) -> str:
    if rollout.advantage == 0 and rollout.columns.keys() <= {"entropy"}:
        return "not computed: its advantage is 0"
    return "not computed: lambda is 0 in this step" if sample.lam == 0 else "not computed"


def _legend(by: str, scale: Scale, colour: bool) -> str:
    def bar(levels: Iterable[int]) -> str:
        return "".join(_shaded("  ", level, True) if colour else _MARKS[level] for level in levels)

    low = f"{scale.low} {scale.centre - scale.span:.3g} {bar((-4, -3, -2, -1))} " if scale.low else ""
    high = f" {bar((1, 2, 3, 4))} {scale.centre + scale.span:.3g} {scale.high}" if scale.high else ""
    return f"{by}: {low}{scale.centre:g}{high}"


def _tokens(tokens: Sequence[str], levels: Sequence[int], width: int, colour: bool) -> list[str]:
    """Lines of tokens, indented, with a line of marks beneath where there is no colour."""
    lines: list[str] = []
    line, marks, place = "", "", 0

    def end() -> None:
        nonlocal line, marks, place
        lines.append(f"  {line}")
        if not colour and marks.strip():
            lines.append(f"  {marks.rstrip()}")
        line, marks, place = "", "", 0

    for text, level in zip(tokens, levels, strict=True):
        piece = ""
        for character in token_text(text):
            wide = _places(character)
            if character == "\n" or place + wide > width - 2:
                line, piece = line + _shaded(piece, level, colour), ""
                end()
            if character != "\n":
                piece, marks, place = piece + character, marks + _MARKS[level] * wide, place + wide
        line += _shaded(piece, level, colour)
    if place:
        end()
    return lines


def _shaded(text: str, level: int, colour: bool) -> str:
    if not (colour and level and text):
        return text
    ink, ground = _COLOURS[level]
    return f"\x1b[{'4;' if level > 0 else ''}38;5;{ink};48;5;{ground}m{text}\x1b[0m"


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in visible(text).split("\n")]


def _places(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
