"""Three-digit column addition with every column written out: the built-in task.

    437+285   ->   75:12;38:12;42:7#722

Columns run from the right. Each reads upper digit, lower digit, ':', and their total with the carry that came in; the
answer after '#' is the last total followed by the last digits of the others. The answer therefore exposes every column:
whoever knows it knows which carry was forgotten where, which is what lets token credit find the mistake. A solution has
exactly one right spelling, so the first wrong token is the first character that differs from it.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cepo.tasks import Problem, check_options, check_split

SEPARATOR = ";"
ANSWER_CUE = "#"
# Shares of the problem space, in percent. `sft` trained the embedded model; RL sees `train` only.
SPLITS = {"sft": 50, "train": 30, "validation": 10, "test": 10}


class Column(NamedTuple):
    """One column of the sum: upper digit, lower digit, and the total written down, in 0..19."""

    x: int
    y: int
    total: int


def columns(a: int, b: int) -> list[Column]:
    """The three columns of a + b, rightmost first."""
    result: list[Column] = []
    for power in (1, 10, 100):
        x, y, carry = a // power % 10, b // power % 10, result[-1].total // 10 if result else 0
        result.append(Column(x, y, x + y + carry))
    return result


def render(work: Sequence[Column]) -> str:
    """Columns as the text of a solution, the answer read off their totals."""
    lines = SEPARATOR.join(f"{c.x}{c.y}:{c.total}" for c in work)
    ones, tens, hundreds = (c.total for c in work)
    return f"{lines}{ANSWER_CUE}{hundreds}{tens % 10}{ones % 10}"


def split_of(a: int, b: int) -> str:
    """The split that owns a + b: a hash of its text, addends sorted so that b + a never lands elsewhere."""
    return owner_of(f"{min(a, b)}+{max(a, b)}")


def owner_of(text: str) -> str:
    """The split that owns a problem of this text."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    for name, share in SPLITS.items():
        bucket -= share
        if bucket < 0:
            return name
    raise AssertionError("the shares of SPLITS must sum to 100")


def draw(rng: random.Random, split: str) -> tuple[int, int]:
    """Two addends in [100, 999] whose sum belongs to `split`."""
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if split_of(a, b) == split:
            return a, b


def problem(a: int, b: int) -> Problem:
    """The problem a + b; `data` holds the addends and the worked solution."""
    return Problem(f"{a}+{b}", str(a + b), {"a": a, "b": b, "solution": render(columns(a, b))})


def first_difference(text: str, right: str) -> int | None:
    """Offset of the first character in which `text` is not `right`, None if it is."""
    if text == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(text, right, strict=False)) if a != b), min(len(text), len(right)))


class Addition:
    """The built-in task; see the module's docstring for the format."""

    name = "addition"
    separator = SEPARATOR
    answer_cue = ANSWER_CUE

    def __init__(self, max_new_tokens: int = 28) -> None:
        self.max_new_tokens = max_new_tokens  # the longest solution takes 22 characters and the end token

    def train(self, index: int, seed: int) -> Problem:
        return problem(*draw(random.Random(f"addition/train/{seed}/{index}"), "train"))

    def split(self, name: str, n: int) -> list[Problem]:
        check_split(name, n)
        rng = random.Random(f"addition/{name}")
        pairs: dict[tuple[int, int], None] = {}
        while len(pairs) < n:
            pairs[draw(rng, name)] = None
        return [problem(a, b) for a, b in pairs]

    def parse_answer(self, completion: str) -> str | None:
        match = re.search(r"#\s*(\d+)\s*$", completion)
        return match[1] if match else None

    def score(self, completion: str, problem: Problem) -> float:
        answer = self.parse_answer(completion)
        return float(answer is not None and self.accepts(answer, problem))

    def accepts(self, answer: str, problem: Problem) -> bool:
        digits = answer.strip().replace(",", "")
        return digits.isascii() and digits.isdecimal() and digits.lstrip("0") == problem.answer

    def feedback(self, completion: str, problem: Problem) -> str | None:
        """What a failed test says: the first column with a wrong total; None if there is none before other mistakes."""
        work = completion.partition(ANSWER_CUE)[0].split(SEPARATOR)
        for place, (text, column) in enumerate(zip(work, columns(problem.data["a"], problem.data["b"]), strict=False)):
            match = re.fullmatch(f"{column.x}{column.y}:([0-9]{{1,2}})", text)
            if match is None:
                return None
            if int(match[1]) != column.total:
                return f"column {place + 1} is {column.total}, not {int(match[1])}."
        return None

    def first_error(self, completion: str, problem: Problem) -> int | None:
        """Where the completion first leaves the right solution: a character offset, or None if it never does."""
        return first_difference(completion, problem.data["solution"])

    def result_spans(self, completion: str) -> list[tuple[int, int]]:
        """Where the totals of the columns and the answer stand: character offsets, rightmost column first."""
        return [match.span(1) for match in re.finditer(r"[:#](\d+)", completion)]


def make(argument: str, **options: Any) -> Addition:
    """`addition`; option `max_new_tokens`."""
    if argument:
        raise ValueError(f"task addition: takes no argument, got {argument!r}")
    check_options("addition", options, ("max_new_tokens",))
    return Addition(**options)
