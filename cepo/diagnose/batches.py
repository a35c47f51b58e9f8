"""Batches as training would see them, and the same batch under every method's credit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cepo import distil, teacher
from cepo.config import AdvantageConfig
from cepo.metrics import Clock
from cepo.parts import Parts, held_out, judge, roll_out, score
from cepo.rewards import is_success
from cepo.rollout import Rollouts
from cepo.tasks import Problem
from cepo.update import Batch, credit_ahead, distillation_loss, make_batch, passes_of, policy_loss

Reading = dict[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """Rollouts, their rewards, the task's own scores, and their advantages, (B,)."""

    rollouts: Rollouts
    rewards: list[float | None]
    scores: list[float | None]
    advantages: Tensor
    first: int = 0
    """Number of its first problem among all that are looked at."""
    of: AdvantageConfig | None = None
    """Which the advantages are; None: given, for every method."""

    @property
    def rewards_PG(self) -> Tensor:
        rewards = torch.tensor([float("nan") if r is None else r for r in self.rewards])
        return rewards.view(-1, self.rollouts.group_size)

    def problem_of_rollouts(self) -> Tensor:
        """(B,) int64, the numbers of their problems."""
        count = len(self.rollouts.problems)
        return self.first + torch.arange(count).repeat_interleave(self.rollouts.group_size)


def collect(parts: Parts, problems: Sequence[Problem], key: tuple[int, int]) -> Scored:
    """Roll out and score `problems` with the noise of `key`, (seed, step), as a training step does."""
    adapted = parts.adaptive.options() if parts.adaptive else {}
    rollouts = roll_out(parts, problems, key)
    rewards = score(parts, rollouts)
    scores = rewards if parts.config.reward.name == "verifier" else judge(parts, rollouts)
    scored = Scored(rollouts, rewards, scores, torch.empty(0), of=parts.config.advantage)
    return replace(scored, advantages=parts.advantage(scored.rewards_PG, **adapted).flatten())


def collect_held_out(parts: Parts) -> Iterator[Scored]:
    """All held-out problems, as many at a time as a training step has."""
    problems, size = held_out(parts), parts.config.rollout.prompts
    for i in range(0, len(problems), size):
        yield replace(collect(parts, problems[i : i + size], (parts.config.eval.seed, i)), first=i)


def batch_of(parts: Parts, scored: Scored, step: int = 1) -> Batch:
    """What an update by the method of `parts` would learn from in a step."""
    config, advantages, success = parts.config, scored.advantages, successes(parts, scored).tolist()
    if scored.of not in (None, config.advantage):
        adapted = parts.adaptive.options() if parts.adaptive else {}
        advantages = parts.advantage(scored.rewards_PG, **adapted).flatten()
    teachers = contexts = None
    told = parts.policy, config.teacher
    if parts.teachers:
        threshold = config.reward.success_threshold
        teachers = teacher.build(*told, parts.task, scored.rollouts, scored.scores, threshold)
    if parts.distillation:
        contexts = distil.build(*told, parts.distillation.TEACHER_CONTEXT, parts.task, scored.rollouts, success).ids
    batch = make_batch(parts, scored.rollouts, advantages, teachers, config.credit.lam, contexts)
    outcomes = scored.rewards if config.reward.is_function else scored.scores
    return credit_ahead(parts, batch, outcomes, success, step, Clock(parts.policy.device))


def successes(parts: Parts, scored: Scored) -> Tensor:
    """(B,) bool."""
    return torch.tensor([is_success(score, parts.config.reward.success_threshold) for score in scored.scores])


def read(parts: Parts, batch: Batch, chosen: Tensor, *, backward: bool = False) -> dict[int, Reading]:
    """Take the chosen rollouts, (B,) bool, through the passes of an update by the method of `parts`.

    Returns logprobs, entropy, evidence, weight and divergence of each chosen rollout, those which the method has, (T,)
    each. With `backward` the loss' gradient is added to that of the model.
    """
    one_pass: Callable[..., Any] = distillation_loss if parts.distillation else policy_loss
    readings: dict[int, Reading] = {}
    for rows in passes_of(parts, chosen):
        with torch.set_grad_enabled(backward):
            result = one_pass(parts, batch, rows, None, Clock(parts.policy.device))
        if backward:
            result.loss.backward()
        names = ("logprobs", "entropy", "evidence", "weight", "divergence")
        packed = {name: getattr(result.credit, name, None) for name in names}
        lengths = [len(ids) for ids in batch.responses(rows)]
        pieces = {name: x.detach().cpu().split(lengths) for name, x in packed.items() if x is not None}
        readings |= {b: {name: of[i] for name, of in pieces.items()} for i, b in enumerate(rows)}
    return readings


def ahead(batch: Batch) -> list[Reading]:
    """The token advantages, and what is recorded beside them, of every rollout of a batch whose credit is ahead."""
    assert batch.ahead is not None
    lengths = [len(ids) for ids in batch.rollouts.responses]
    packed = {"advantages": batch.ahead.advantages, **batch.ahead.tokens}
    pieces = {name: x.split(lengths) for name, x in packed.items()}
    return [{name: of[i] for name, of in pieces.items()} for i in range(len(lengths))]


@dataclass(frozen=True)
class Observed:
    """A batch as the methods see it."""

    scored: Scored
    batches: dict[str, Batch]
    rows: list[int]
    """The R rollouts that an update reads."""
    readings: dict[str, list[Reading]]
    """(R,) under each method that tells tokens apart, and under `uniform`; empty for a rollout it leaves out."""


def observe(methods: dict[str, Parts], scored: Scored) -> Observed:
    """Read a batch under every method but `shuffled`, the control, which knows no token."""
    seen = {label: method for label, method in methods.items() if not (method.token_advantages and method.teachers)}
    batches = {label: batch_of(method, scored) for label, method in seen.items()}
    chosen = batches["uniform"].active()
    rows, readings = chosen.nonzero().flatten().tolist(), {}
    for label, method in seen.items():
        if method.token_advantages:
            found = ahead(batches[label])
            readings[label] = [found[b] for b in rows]
        elif method.teachers or method.distillation or label == "uniform":
            read_of = read(method, batches[label], chosen & batches[label].active())
            readings[label] = [read_of.get(b, {}) for b in rows]
    return Observed(scored, batches, rows, readings)
