"""What a config names, looked up and loaded: policy, task, and a function for each of the four axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cepo import axes
from cepo.config import Config
from cepo.credit import TokenAdvantages
from cepo.errors import InputError, one_line
from cepo.policy import Policy, load_policy
from cepo.rollout import Rollouts
from cepo.tasks import Problem, Task, get_task
from cepo_kernels import token_logprobs


@dataclass(frozen=True)
class Parts:
    """What a config names, looked up and loaded."""

    config: Config
    policy: Policy
    task: Task
    reward: Callable[..., list[float | None]]
    advantage: Callable[[Tensor], Tensor]
    credit: Callable[..., Any]
    teachers: tuple[str, ...]
    surrogate: str
    needs_zero_a_rows: bool = False
    token_advantages: Callable[..., TokenAdvantages] | None = None
    check_problem: Callable[..., None] | None = None

    @property
    def max_new_tokens(self) -> int:
        return self.config.rollout.max_new_tokens or self.task.max_new_tokens


def load_task(config: Config) -> Task:
    """The task of `config`. Raises InputError if there is none such."""
    try:
        task = get_task(config.task.name, **config.task.options)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(one_line(error)) from error
    length = task.max_new_tokens
    if not isinstance(length, int) or length < 1:
        raise InputError(f"task.options: expected max_new_tokens to be a whole number, at least 1, got {length!r}")
    return task


def load_parts(config: Config, model: str | None = None) -> Parts:
    """Look up and load all that `config` names; `model` in place of its own if given."""
    task = load_task(config)
    policy = load_policy(config.policy if model is None else replace(config.policy, model=model, gguf_file=None))
    _check_backend(config.backend, policy)
    credit = axes.module("credit", config.credit.name)
    return Parts(
        config,
        policy,
        task,
        axes.lookup("rewards", config.reward.name),
        axes.lookup("advantages", config.advantage.name),
        axes.lookup("credit", config.credit.name),
        credit.TEACHERS,
        axes.module("losses", config.loss.name).SURROGATE,
        needs_zero_a_rows=credit.NEEDS_ZERO_A_ROWS,
        token_advantages=getattr(credit, "token_advantages", None),
        check_problem=getattr(credit, "check_problem", None),
    )


def _check_backend(name: str, policy: Policy) -> None:
    logits = torch.zeros(1, 2, dtype=policy.compute_dtype, device=policy.device)
    try:
        token_logprobs(logits, torch.zeros(1, dtype=torch.int64, device=policy.device), backend=name)
    except (ValueError, RuntimeError) as error:
        raise InputError(one_line(error)) from error


def problems_of(parts: Parts, step: int) -> list[Problem]:
    """The problems of a step: the next ones of the seed's stream, by random access."""
    per_step, seed = parts.config.rollout.prompts, parts.config.train.seed
    return [parts.task.train((step - 1) * per_step + i, seed) for i in range(per_step)]


def training_problems(parts: Parts) -> list[Problem]:
    """All problems that training can meet where the task has a list of them, else those of the first step."""
    listed = getattr(parts.task, "training_problems", None)
    return listed() if listed else problems_of(parts, 1)


def held_out(parts: Parts) -> list[Problem]:
    """The problems of every evaluation. Raises InputError if the task has none."""
    try:
        return parts.task.split(parts.config.eval.split, parts.config.eval.problems)
    except ValueError as error:
        raise InputError(one_line(error)) from error


def score(parts: Parts, rollouts: Rollouts) -> list[float | None]:
    """The reward of every rollout."""
    problems = rollouts.per_rollout(rollouts.problems)
    prompts = [problem.prompt for problem in problems]
    columns = {"task": parts.task, "problem": problems, "truncated": rollouts.truncated}
    return parts.reward(prompts, rollouts.completions, rollouts.responses, **columns)


def is_success(parts: Parts, reward: float | None) -> bool:
    return reward is not None and reward >= parts.config.reward.success_threshold
