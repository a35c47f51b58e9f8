"""How good is a rollout? `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

Each member is a module with a function of its own name; None means that a rollout cannot be scored and is left out of
its group. `columns` holds one value per rollout: `problem`, `truncated`; and the `task` and `policy` themselves.

One that needs something loaded has `load(config)`, which gives the function; `load_control(config)` gives a second one,
which is logged beside it. A name with a colon is a function of somebody's own (`_function`). `SUPERVISION` says what of
the task a reward takes. Whatever it is, success is judged by the task's own score, which `verifier` gives; only
advantages that count successes ask the reward itself.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def is_success(score: float | None, threshold: float) -> bool: ...
@overload
def is_success(score: Tensor, threshold: float) -> Tensor: ...
def is_success(score: float | Tensor | None, threshold: float) -> bool | Tensor:
    """Whether a task's score, or each of a tensor, is a success; one that is missing (None, NaN) is none."""
    return score is not None and score >= threshold
