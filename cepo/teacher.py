"""What the teachers are told: a right answer r+ and a wrong one r- for every group, and the contexts that say so.

The teachers are the policy itself with an answer in its context. r- is the answer of the group's worst wrong rollout:
of those with the lowest reward the first that was not truncated and states an answer the task does not accept. If none
states one, the last line of the first, at most 64 tokens. If none of that is usable, or it is too long for the model's
context, the group has no r- and the policy takes the negative teacher's place, which is RLSD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cepo.config import TeacherConfig
from cepo.config.checks import require
from cepo.errors import InputError
from cepo.policy import Policy, Prefixes, continued_states, prefill, response_states, tokens_of
from cepo.prompts import hinted
from cepo.rewards import is_success
from cepo.rollout import Rollouts
from cepo.tasks import Problem, Task
from cepo.vision import identity

LAST_LINE_TOKENS = 64


class WrongAnswer(NamedTuple):
    """A wrong answer, and whether it is a last line because none could be parsed."""

    answer: str
    last_line: bool


@dataclass
class Teachers:
    """The contexts of a batch: K distinct prefixes, and which of them rollout b has for each teacher."""

    prefixes: list[list[int]] = field(default_factory=list)
    positive: list[int] = field(default_factory=list)
    """(B,) index into `prefixes`."""
    negative: list[int | None] = field(default_factory=list)
    """(B,) index into `prefixes`; None: no r-."""
    answers: list[str] = field(default_factory=list)
    """(K,) the answer that each prefix states."""
    statistics: dict[str, float] = field(default_factory=dict)


def wrong_answer(
    tokenizer: Any,
    parse_answer: Callable[[str], str | None],
    accepts: Callable[[str], bool],
    completions: Sequence[str],
    rewards: Sequence[float],
) -> WrongAnswer | None:
    """r- from the completions of one problem, all of them wrong and not truncated, or None if none is usable.

    Raises InputError where `parse_answer` gives neither a text nor None.
    """
    order = sorted(range(len(completions)), key=lambda i: rewards[i])
    for i in order:
        answer = parse_answer(completions[i])
        require(isinstance(answer, str | None), "parse_answer", "to return a text or None", answer)
        if answer is not None and answer.strip() and not accepts(answer):
            return WrongAnswer(answer.strip(), False)
    for i in order:
        lines = completions[i].strip().splitlines()
        if parse_answer(completions[i]) is None and lines:
            ids = tokenizer(lines[-1], add_special_tokens=False)["input_ids"][:LAST_LINE_TOKENS]
            line = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            if line and not accepts(line):
                return WrongAnswer(line, True)
    return None


def teacher_context(policy: Policy, config: TeacherConfig, problem: Problem, answer: str) -> list[int]:
    """Token ids of the prompt with `answer` in it, rendered as one text."""
    if config.template == "hint":
        return tokens_of(policy, hinted(config.hint, problem.prompt, answer=answer))
    return tokens_of(policy, problem.prompt, config.splice.format(answer=answer))


def check_context(policy: Policy, config: TeacherConfig, problem: Problem, response: int) -> None:
    """Raise InputError if the prompt with its right answer leaves no room for `response` tokens."""
    context = teacher_context(policy, config, problem, problem.answer)
    if len(context) + response > policy.context:
        raise InputError(
            f"teacher context of prompt {problem.text[:40]!r}: expected at most {policy.context} tokens, the "
            f"model's context, got {len(context)} + {response} of the response"
        )


def build(
    policy: Policy,
    config: TeacherConfig,
    task: Task,
    rollouts: Rollouts,
    rewards: Sequence[float | None],
    threshold: float,
) -> Teachers:
    """The contexts for every rollout. `rewards` is (B,), the task's; a rollout is wrong below `threshold`.

    Raises InputError if a right answer and the responses exceed the model's context; a wrong one that does is left out.
    """
    teachers = Teachers()
    known: dict[tuple[Any, ...], int] = {}
    wrong = shared = last_lines = missing = same = 0

    @cache
    def context(p: int, answer: str) -> list[int]:
        return teacher_context(policy, config, rollouts.problems[p], answer)

    def index(p: int, answer: str) -> int:
        ids = context(p, answer)
        if (key := identity(ids)) not in known:
            known[key] = len(teachers.prefixes)
            teachers.prefixes.append(ids)
            teachers.answers.append(answer)
        return known[key]

    def usable(b: int) -> bool:
        return _is_wrong(rewards[b], threshold) and not rollouts.truncated[b]

    def choose(p: int, candidates: Sequence[int]) -> WrongAnswer | None:
        chosen = wrong_answer(
            policy.tokenizer,
            task.parse_answer,
            lambda answer: task.accepts(answer, rollouts.problems[p]),
            [rollouts.completions[b] for b in candidates],
            [rewards[b] or 0.0 for b in candidates],
        )
        if chosen is None:
            return None
        return chosen if len(context(p, chosen.answer)) + longest <= policy.context else None

    for p, problem in enumerate(rollouts.problems):
        members = range(p * rollouts.group_size, (p + 1) * rollouts.group_size)
        longest = max(len(rollouts.responses[b]) for b in members)
        check_context(policy, config, problem, longest)
        positive = index(p, problem.answer)
        common = choose(p, [b for b in members if usable(b)])
        for b in members:
            chosen = choose(p, [b]) if config.negative == "own" and usable(b) else None
            chosen = chosen or common
            negative = None if chosen is None else index(p, chosen.answer)
            teachers.positive.append(positive)
            teachers.negative.append(negative)
            if _is_wrong(rewards[b], threshold):
                wrong += 1
                missing += chosen is None
                last_lines += chosen is not None and chosen.last_line
                same += negative == positive
                shared += chosen is not None and task.parse_answer(rollouts.completions[b]) == chosen.answer
    if wrong:
        counts = {"shared": shared, "last_line": last_lines, "missing": missing, "same_as_positive": same}
        teachers.statistics = {f"negative_{name}": count / wrong for name, count in counts.items()}
    return teachers


def _is_wrong(reward: float | None, threshold: float) -> bool:
    return reward is not None and not is_success(reward, threshold)


class TeacherStates(NamedTuple):
    """Both teachers' states of N response tokens, (N, H); `negative_mask`, (N,) bool, is False where there is no r-."""

    positive: Tensor | None
    negative: Tensor | None
    negative_mask: Tensor | None


NO_TEACHERS = TeacherStates(None, None, None)


@torch.no_grad()
def teacher_states(
    policy: Policy,
    config: TeacherConfig,
    teachers: Teachers,
    names: Sequence[str],
    rollouts: Rollouts,
    rows: Sequence[int],
) -> TeacherStates:
    """Run the teachers called `names` ("positive", "negative") on the responses of `rows`.

    Each distinct prefix goes through the model once and its cache serves all its rollouts.
    """
    responses = [rollouts.responses[b] for b in rows]
    positive = [teachers.positive[b] for b in rows]
    # A rollout without r- needs some row in the negative teacher's place; the mask says that it is never read.
    present = [teachers.negative[b] is not None and "negative" in names for b in rows]
    negative = [_or(teachers.negative[b], teachers.positive[b]) for b in rows]
    used = sorted({*positive, *(k for k, there in zip(negative, present, strict=True) if there)})
    prefixes = prefill(policy, [teachers.prefixes[k] for k in used]) if config.share_prefix else None

    def states(index: Sequence[int]) -> Tensor:
        if isinstance(prefixes, Prefixes):
            return continued_states(policy, prefixes, [used.index(k) for k in index], responses)
        return response_states(policy, [teachers.prefixes[k] for k in index], responses)

    if not any(present):
        return TeacherStates(states(positive), None, None)
    mask = torch.tensor([there for r, there in zip(responses, present, strict=True) for _ in r], device=policy.device)
    return TeacherStates(states(positive), states(negative), mask)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
