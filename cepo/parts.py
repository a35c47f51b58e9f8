"""What a config names, looked up and loaded: policy, task, and a function for each of the four axes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from cepo import axes, distil, rollout
from cepo.config import Config
from cepo.credit import TokenAdvantages
from cepo.distil import SelfTeacher
from cepo.engine import Engine
from cepo.errors import InputError, one_line
from cepo.layers import checkpoint_layers
from cepo.policy import Policy, load_policy, resolve
from cepo.processes import ALONE, Alone
from cepo.rewards.verifier import verifier
from cepo.rollout import Rollouts
from cepo.sharding import whole
from cepo.tasks import Problem, Task, get_task
from cepo_kernels import token_logprobs

logger = logging.getLogger("cepo")


@dataclass(frozen=True)
class Parts:
    """What a config names, looked up and loaded."""

    config: Config
    policy: Policy
    task: Task
    reward: Callable[..., list[float | None]]
    advantage: Callable[..., Tensor]
    credit: Callable[..., Any]
    teachers: tuple[str, ...]
    surrogate: str | None
    needs_zero_a_rows: bool = False
    token_advantages: Callable[..., TokenAdvantages] | None = None
    check_problem: Callable[..., None] | None = None
    control: Callable[..., list[float | None]] | None = None
    """A reward that is logged beside the one in use."""
    adaptive: Any = None
    """What chooses options of the advantage from earlier steps (`cepo.advantages`)."""
    distillation: Any = None
    """The module of a loss that distils (`cepo.losses`): there is no advantage and no credit, but a `self_teacher`."""
    self_teacher: SelfTeacher | None = None
    processes: Alone = ALONE
    engine: Engine | None = None
    """What generates; None: the policy itself."""

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


def load_parts(config: Config, model: str | None = None, processes: Alone = ALONE) -> Parts:
    """Look up and load all that `config` names, for one of `processes`; `model` in place of its own if given."""
    task = load_task(config)
    policy = load_policy(config.policy if model is None else replace(config.policy, model=model, gguf_file=None))
    if config.train.gradient_checkpointing:
        checkpoint_layers(policy.model)
    _check_backend(config.backend, policy)
    reward = axes.module("rewards", config.reward.name)
    if config.advantage.average not in (None, config.loss.average):
        logger.warning(
            "loss.average: advantage %s keeps its objective under %r alone, not under %r",
            *(config.advantage.name, config.advantage.average, config.loss.average),
        )
    return Parts(
        config,
        policy,
        task,
        reward.load(config) if hasattr(reward, "load") else axes.lookup("rewards", config.reward.name),
        **of_method(config, policy),
        control=reward.load_control(config) if hasattr(reward, "load_control") else None,
        processes=processes,
        engine=_engine(config, policy, model or config.policy.model, processes),
    )


def of_method(config: Config, policy: Policy) -> dict[str, Any]:
    """What advantage, credit and loss make of a policy's `Parts`: those fields."""
    credit, loss = axes.module("credit", config.credit.name), axes.module("losses", config.loss.name)
    advantage = axes.module("advantages", config.advantage.name)
    fields = {
        "advantage": _advantage(config),
        "credit": axes.lookup("credit", config.credit.name),
        "teachers": credit.TEACHERS,
        "surrogate": getattr(loss, "SURROGATE", None),
        "needs_zero_a_rows": credit.NEEDS_ZERO_A_ROWS,
        "token_advantages": getattr(credit, "token_advantages", None),
        "check_problem": getattr(credit, "check_problem", None),
        "adaptive": advantage.adaptive(config) if hasattr(advantage, "adaptive") else None,
        "distillation": None,
        "self_teacher": None,
    }
    if config.loss.distils:
        fields |= {
            "advantage": torch.zeros_like,
            "teachers": (),
            "check_problem": _check_solution if "solution" in loss.TEACHER_CONTEXT else None,
            "distillation": loss,
            "self_teacher": SelfTeacher(policy.model, config.loss),
        }
    return fields


def _engine(config: Config, policy: Policy, model: str, processes: Alone) -> Engine | None:
    """What generates, if it is not the policy itself."""
    if config.rollout.engine == "transformers":
        return None
    for refused, where in ((processes.world > 1, "in several processes"), (policy.vision, "for a model with images")):
        if refused:
            raise InputError(f"rollout.engine: expected transformers {where}, got {config.rollout.engine!r}")
    from cepo.vllm_engine import VllmEngine

    dtype, options = config.policy.compute_dtype, config.rollout.engine_options
    return VllmEngine(resolve(model), policy.model, policy.eos_ids, dtype, options)


def _check_solution(parts: Parts, problem: Problem, prompt: list[int]) -> None:
    distil.solution_context(parts.policy, parts.config.teacher, problem, parts.max_new_tokens)


def _advantage(config: Config) -> Callable[..., Tensor]:
    """The advantage with what the config says of its options; those that earlier steps decide come with each step."""
    function = axes.lookup("advantages", config.advantage.name)
    given = {"threshold": config.reward.success_threshold, "alpha": config.advantage.alpha,
             "baseline": config.advantage.baseline}  # fmt: skip
    return partial(function, **{name: given[name] for name in given.keys() & signature(function).parameters.keys()})


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


def roll_out(parts: Parts, problems: Sequence[Problem], key: tuple[int, int]) -> Rollouts:
    """A group of responses to each problem as the config says, with the noise of `key`, (seed, step)."""
    config = parts.config.rollout
    return rollout.sample(
        parts.policy,
        problems,
        group_size=config.group_size,
        max_new_tokens=parts.max_new_tokens,
        temperature=config.temperature,
        key=key,
        batch_size=config.batch_size,
        processes=parts.processes,
        engine=parts.engine,
    )


def score(
    parts: Parts, rollouts: Rollouts, reward: Callable[..., list[float | None]] | None = None
) -> list[float | None]:
    """The reward of every rollout, or what `reward` gives it, NaN as None; each process scores its share of groups."""
    function, many, size = reward or parts.reward, parts.processes, rollouts.group_size
    groups = many.share(len(rollouts.problems))
    mine = slice(groups.start * size, groups.stop * size)
    problems = rollouts.per_rollout(rollouts.problems)[mine]
    prompts = [problem.prompt for problem in problems]
    columns = {"task": parts.task, "policy": parts.policy, "problem": problems, "truncated": rollouts.truncated[mine]}

    def scored() -> list[float | None]:
        return function(prompts, rollouts.completions[mine], rollouts.responses[mine], **columns) if prompts else []

    with nullcontext() if function is verifier else whole(parts.policy.model):
        values = [value for part in many.gather("rewards", scored) for value in part]
    return [None if value is None or math.isnan(value) else value for value in values]


def judge(parts: Parts, rollouts: Rollouts) -> list[float | None]:
    """The task's score of every rollout, by which success, r- and accuracy go whatever the reward is."""
    return score(parts, rollouts, verifier)
