"""Distillation of the policy by itself: what its teacher is told, and whose weights the teacher has.

A loss names what may be told in `TEACHER_CONTEXT`, best first:

    solution    the task's worked solution, `solution` in the problem's data; a problem without one is refused
    sibling     the first other rollout of the group that succeeded
    feedback    what the task's own `feedback` says of the rollout

A rollout gets the first of these that there is and that fits the model's context; with none it is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cepo import adapters, checkpoint
from cepo.config import LossConfig, TeacherConfig
from cepo.errors import InputError
from cepo.policy import Policy, continued_states, prefill, response_states, tokens_of
from cepo.prompts import hinted
from cepo.rollout import Rollouts
from cepo.sharding import local, weights
from cepo.tasks import Problem, Task
from cepo.vision import identity


class SelfTeacher:
    """The model that teaches: the one that learns, or a copy of it that no gradient reaches."""

    def __init__(self, model: Any, config: LossConfig) -> None:
        self.kind, self.ema = config.teacher, config.ema
        # What does not learn is the same in both for ever, and kept once.
        self._frozen = adapters.frozen_names(model)
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = model if self.kind == "policy" else copy.deepcopy(model, shared).requires_grad_(False)
        self._saved: list[Any] | None = None

    @torch.no_grad()
    def follow(self, model: torch.nn.Module) -> None:
        """After a step of the optimiser on `model`: theta_T := (1 - ema) theta_T + ema theta."""
        if self.ema is not None:
            torch._foreach_lerp_(local(self.model.parameters()), local(model.parameters()), self.ema)

    def begin(self, run: Path) -> None:
        """Save a fixed teacher in `run`, once and for all."""
        if self.kind == "fixed":
            self._saved = checkpoint.save_teacher(run, self.model)

    def state(self) -> dict[str, Any]:
        """What goes into each checkpoint: the weights of an average, or which file the fixed ones are in."""
        if self.kind == "policy":
            return {}
        return {f"{self.kind}_teacher": self._saved if self.kind == "fixed" else self._learned()}

    def restore(self, run: Path, state: dict[str, Any]) -> None:
        """Take the weights back. Raises InputError where the run had another teacher, or its file is damaged."""
        if self.kind == "policy":
            return
        saved = state.get(f"{self.kind}_teacher")
        if saved is None:
            raise InputError(f"loss.teacher: expected the one {run} has had, got {self.kind!r}, of which it saved none")
        if self.kind == "fixed":
            self._saved, saved = saved, checkpoint.load_teacher(run, saved)
        own = self.model.state_dict()
        self.model.load_state_dict({**{name: own[name] for name in self._frozen}, **saved})

    def _learned(self) -> dict[str, Tensor]:
        state = weights(self.model) or self.model.state_dict()
        return {name: value for name, value in state.items() if name not in self._frozen}


class Contexts(NamedTuple):
    """(B,) token ids of what the teacher reads before each rollout's response, None for a dropped one; and shares."""

    ids: list[list[int] | None]
    statistics: dict[str, float]


def solution_context(policy: Policy, config: TeacherConfig, problem: Problem, response: int) -> list[int]:
    """Token ids of the prompt with its worked solution.

    Raises InputError if there is none, or no room for `response` tokens after it.
    """
    solution = problem.data.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise InputError(
            f"loss.name: opsd needs a worked solution, `solution` in the data of every problem, "
            f"{problem.text[:40]!r} has none"
        )
    ids = _context(policy, config.solution_hint, problem, solution=solution)
    if len(ids) + response > policy.context:
        raise InputError(
            f"solution in the prompt {problem.text[:40]!r}: expected at most {policy.context} tokens, the model's "
            f"context, got {len(ids)} + {response} of the response"
        )
    return ids


def build(
    policy: Policy,
    config: TeacherConfig,
    kinds: Sequence[str],
    task: Task,
    rollouts: Rollouts,
    success: Sequence[bool],
) -> Contexts:
    """The contexts of a batch. `kinds` as in `TEACHER_CONTEXT`; success is (B,), by the task.

    Statistics are shares of all rollouts: `told_<kind>` for every kind, and `dropped`. Raises InputError for a problem
    without a worked solution, where that is asked for, and for one that is too long.
    """
    size = rollouts.group_size

    def offers(b: int) -> Iterator[tuple[str, list[int]]]:
        problem, group = rollouts.problems[b // size], range(b - b % size, b - b % size + size)
        if "solution" in kinds:
            yield "solution", solution_context(policy, config, problem, len(rollouts.responses[b]))
        sibling = next((i for i in group if i != b and success[i]), None)
        if "sibling" in kinds and sibling is not None:
            solution = rollouts.completions[sibling].strip()
            yield "sibling", _context(policy, config.sibling_hint, problem, solution=solution)
        say = getattr(task, "feedback", None)
        if "feedback" in kinds and say and (said := say(rollouts.completions[b], problem)):
            yield "feedback", _context(policy, config.feedback_hint, problem, feedback=said)

    chosen: list[tuple[str, list[int] | None]] = []
    for b, response in enumerate(rollouts.responses):
        fitting = (offer for offer in offers(b) if len(offer[1]) + len(response) <= policy.context)
        chosen.append(next(fitting, ("", None)))
    told = [kind for kind, _ in chosen]
    names = {**{kind: f"told_{kind}" for kind in kinds}, "": "dropped"}
    return Contexts([ids for _, ids in chosen], {name: told.count(kind) / len(told) for kind, name in names.items()})


@torch.no_grad()
def told_states(
    teacher: Policy, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], share_prefix: bool
) -> Tensor:
    """States that predict every token of each response given its context, as the teacher's model has them: (N, H).

    With `share_prefix` each distinct context goes through the model once.
    """
    if not share_prefix:
        return response_states(teacher, contexts, responses)
    distinct = {identity(ids): ids for ids in contexts}
    places = {key: k for k, key in enumerate(distinct)}
    index = [places[identity(ids)] for ids in contexts]
    return continued_states(teacher, prefill(teacher, list(distinct.values())), index, responses)


def _context(policy: Policy, hint: str, problem: Problem, **texts: str) -> list[int]:
    return tokens_of(policy, hinted(hint, problem.prompt, **texts))
