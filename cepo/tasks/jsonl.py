"""Problems from a file: `jsonl:/path/file.jsonl`, one {"prompt": "...", "answer": "..."} a line.

Prompts, texts or lists of messages, are told apart by their text; a tenth of them, at least one, goes to each of
validation and test by the order of a hash, or all go where an optional "split" field ("train", "validation", "test")
says. All other fields come along in `Problem.data`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cepo.tasks import Problem, check_options
from cepo.tasks._records import FIELDS, SPLITS, Listed, Reading, split_off


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of each line; an error in the record's place if it is no JSON."""
    try:
        lines = Path(path).expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"task jsonl: cannot read {path!r}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # text, JSON, a number of thousands of digits; or too deep
                yield where, ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})")


def _distribute(path: str, problems: list[Problem]) -> dict[str, list[Problem]]:
    marked = [p for p in problems if p.data.get("split") is not None]
    if not marked:
        return split_off(path, problems)
    if len(marked) < len(problems):
        raise ValueError(f"{path}: expected 'split' on every line or on none, got {len(marked)} of {len(problems)}")
    splits = {name: [p for p in problems if p.data["split"] == name] for name in SPLITS}
    if not splits["train"]:
        raise ValueError(f"{path}: expected a line whose split is 'train', got none")
    return splits


def make(argument: str, **options: Any) -> Listed:
    """`jsonl:<path>`; options as in `cepo.tasks._records.Reading`. Raises ValueError, with the line, if unreadable."""
    if not argument:
        raise ValueError("task jsonl: expected a path, jsonl:/path/file.jsonl, got none")
    check_options("jsonl", options, FIELDS)
    reading = Reading(**options)
    problems = reading.problems(_records(argument), Path(argument).expanduser().parent)
    if not problems:
        raise ValueError(f"{argument}: expected at least one line of JSON, got an empty file")
    return Listed(f"jsonl:{argument}", reading.max_new_tokens, _distribute(argument, problems))
