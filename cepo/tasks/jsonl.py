"""Problems from a file: `jsonl:/path/file.jsonl`, one {"prompt": "...", "answer": "..."} a line.

Prompts are told apart by their text; a tenth of them, at least one, goes to each of validation and test by the order of
a hash, or all go where an optional "split" field ("train", "validation", "test") says.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from cepo.tasks import HELD_OUT, Problem, check_options, check_split
from cepo.tasks._answers import final_answer, same_answer

SPLITS = ("train", *HELD_OUT)


class Jsonl:
    """A JSON Lines file as a task.

    Args: `path` of the file; `prompt_key` and `answer_key` name the two fields, every other field comes along in
    `Problem.data`; `max_new_tokens` in tokens. Raises ValueError, with the line's number, for anything unreadable.
    """

    def __init__(
        self, path: str, prompt_key: str = "prompt", answer_key: str = "answer", max_new_tokens: int = 256
    ) -> None:
        self.name = f"jsonl:{path}"
        self.max_new_tokens = max_new_tokens
        self._splits = _distribute(path, _read(path, prompt_key, answer_key))
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def train(self, index: int, seed: int) -> Problem:
        problems = self._splits["train"]
        epoch, place = divmod(index, len(problems))
        if self._order is None or self._order[0] != (seed, epoch):
            order = list(range(len(problems)))
            random.Random(f"jsonl/{seed}/{epoch}").shuffle(order)
            self._order = (seed, epoch), order
        return problems[self._order[1][place]]

    def training_problems(self) -> list[Problem]:
        """All of them, so that what does not fit the model is told before a run starts."""
        return self._splits["train"]

    def split(self, name: str, n: int) -> list[Problem]:
        check_split(name, n)
        if not self._splits[name]:
            raise ValueError(f"task {self.name}: expected a line whose split is {name!r}, got none")
        return self._splits[name][:n]

    def parse_answer(self, completion: str) -> str | None:
        return final_answer(completion)

    def score(self, completion: str, problem: Problem) -> float:
        answer = self.parse_answer(completion)
        return float(answer is not None and self.accepts(answer, problem))

    def accepts(self, answer: str, problem: Problem) -> bool:
        return same_answer(answer, problem.answer)


def _read(path: str, prompt_key: str, answer_key: str) -> list[Problem]:
    try:
        lines = Path(path).expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"task jsonl: cannot read {path!r}: {error.strerror}") from None
    problems: dict[str, tuple[int, Problem]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        problem = _parse(f"{path}, line {number}", line, prompt_key, answer_key)
        first, known = problems.setdefault(problem.prompt, (number, problem))
        if (known.answer, known.data.get("split")) != (problem.answer, problem.data.get("split")):
            raise ValueError(f"{path}, line {number}: expected one answer and split per prompt, line {first} differs")
    if not problems:
        raise ValueError(f"{path}: expected at least one line of JSON, got an empty file")
    return [problem for _, problem in problems.values()]


def _parse(where: str, line: bytes, prompt_key: str, answer_key: str) -> Problem:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # text, JSON, a number of thousands of digits; or too deep
        raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for key in (prompt_key, answer_key):
        if key not in record:
            raise ValueError(f"{where}: expected a field {key!r}, got {', '.join(map(repr, record)) or 'none'}")
    prompt, answer, split = record[prompt_key], record[answer_key], record.get("split")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: expected {prompt_key!r} to be a non-empty string, got {prompt!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"{where}: expected {answer_key!r} to be a non-empty string or a number, got {answer!r}")
    if not _is_unicode(prompt + str(answer)):
        raise ValueError(f"{where}: expected Unicode text, got half of a surrogate pair in {prompt[:40]!r}")
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where}: expected 'split' to be one of {', '.join(SPLITS)}, got {split!r}")
    return Problem(prompt, str(answer), record)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _distribute(path: str, problems: list[Problem]) -> dict[str, list[Problem]]:
    marked = [p for p in problems if p.data.get("split") is not None]
    if marked and len(marked) < len(problems):
        raise ValueError(f"{path}: expected 'split' on every line or on none, got {len(marked)} of {len(problems)}")
    if marked:
        splits = {name: [p for p in problems if p.data["split"] == name] for name in SPLITS}
        if not splits["train"]:
            raise ValueError(f"{path}: expected a line whose split is 'train', got none")
        return splits
    if len(problems) < len(SPLITS):
        raise ValueError(f"{path}: expected at least {len(SPLITS)} distinct prompts to split, got {len(problems)}")
    ordered = sorted(problems, key=lambda p: hashlib.sha256(p.prompt.encode()).digest())
    share = math.ceil(len(problems) / 10)
    return {"validation": ordered[:share], "test": ordered[share : 2 * share], "train": ordered[2 * share :]}


def make(argument: str, **options: Any) -> Jsonl:
    """`jsonl:<path>`; options as in `Jsonl`."""
    if not argument:
        raise ValueError("task jsonl: expected a path, jsonl:/path/file.jsonl, got none")
    check_options("jsonl", options, ("prompt_key", "answer_key", "max_new_tokens"))
    return Jsonl(argument, **options)
