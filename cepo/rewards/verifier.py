"""Reward axis: the task's own check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cepo.errors import InputError, one_line
from cepo.prompts import Prompt
from cepo.tasks import Problem, Task

SUPERVISION: tuple[str, ...] = ("verifier",)


def verifier(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    task: Task,
    problem: Sequence[Problem],
    truncated: Sequence[bool],
    **columns: Any,
) -> list[float | None]:
    """r = the task's score in [0, 1]; 0 for a rollout that was cut at the maximum length; None if it cannot be scored.

    All sequences have one entry per rollout. Raises InputError if the task does.
    """
    try:
        return [
            0.0 if cut else task.score(completion, one)
            for completion, one, cut in zip(completions, problem, truncated, strict=True)
        ]
    except Exception as error:  # a task may be anybody's
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise InputError(f"task {task.name}: its score raised {why}") from error
