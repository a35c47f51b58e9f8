"""Tasks: where problems come from and how a completion is scored.

A task is a module of this package with a function `make(argument, **options) -> Task`; adding a file adds a task.
`get_task("name:argument")` finds it by name. A task of finitely many training problems may have `training_problems()`,
which lists them, so that all are checked before a run starts. One that knows where a completion goes wrong may have

    result_spans(completion)            character spans of the results it states, in their order: [(start, end), ...]
    first_error(completion, problem)    offset of the first wrong character, None if there is none

which let `cepo diagnose` ask whether credit finds that place. A distillation's teacher is told the worked solution,
"solution" in a problem's `data`, or

    feedback(completion, problem)       what is wrong with a completion, in a sentence, None if there is nothing to say

    addition                    three-digit column addition, the built-in task
    worked:<dataset>            two reasoning-gym datasets with worked solutions (extra `[tasks]`)
    reasoning_gym:<dataset>     any reasoning-gym dataset (extra `[tasks]`)
    jsonl:<path>                lines of {"prompt": ..., "answer": ...}, with images or without
    hf:<name or path>           a Hugging Face dataset (extra `[datasets]`)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from cepo.prompts import text_of

__all__ = ["Problem", "Task", "available_tasks", "get_task"]

HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    prompt: Any
    """A `Prompt`, plain: the text of the user turn, or a conversation. The policy's chat template goes around it."""
    answer: str
    """The correct answer, as it should be shown to a teacher."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the task needs to score a completion; JSON-able where possible."""

    @property
    def text(self) -> str:
        """The prompt for people."""
        return text_of(self.prompt)


@runtime_checkable
class Task(Protocol):
    """A source of problems, split once and for all, and the judge of their completions."""

    name: str
    max_new_tokens: int
    """A sensible budget for one completion, in tokens."""

    def train(self, index: int, seed: int) -> Problem:
        """Training problem `index` of the stream `seed`: a pure function of the two, never a held-out problem."""

    def split(self, name: str, n: int) -> list[Problem]:
        """The first `n` problems of "validation" or "test": distinct, the same for every seed, disjoint from training.

        Fewer than `n` come back only where the task has no more. Raises ValueError for another name or n < 1.
        """

    def parse_answer(self, completion: str) -> str | None:
        """The final answer a completion states, or None if it states none."""

    def score(self, completion: str, problem: Problem) -> float | None:
        """How good the completion is, in [0, 1]; None where it cannot be scored."""

    def accepts(self, answer: str, problem: Problem) -> bool:
        """Whether `answer`, in whatever form it is written, counts as correct."""


def available_tasks() -> list[str]:
    """Names that `get_task` knows, without their arguments."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get_task(spec: str, **options: Any) -> Task:
    """The task called `spec`, "name" or "name:argument".

    `options` are the task's own (see its module). Raises ValueError, in one line, for an unknown name, dataset or
    option, and for a file that cannot be read.
    """
    name, _, argument = spec.partition(":")
    if name not in available_tasks():
        raise ValueError(f"task: expected one of {', '.join(available_tasks())} (name or name:argument), got {spec!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Task, module.make(argument, **options))


def check_split(name: str, n: int) -> None:
    """Raise ValueError unless `name` is a held-out split and `n` a positive count."""
    if name not in HELD_OUT:
        raise ValueError(f"split: expected one of {', '.join(HELD_OUT)}, got {name!r}")
    if n < 1:
        raise ValueError(f"n: expected at least 1 problem of split {name!r}, got {n}")


def check_options(task: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError if a task was given an option it does not have."""
    for key in options:
        if key not in known:
            raise ValueError(f"task {task}: expected options among {', '.join(known)}, got {key!r}")
