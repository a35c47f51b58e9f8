"""Batches as training would see them, and the same batch under every method's credit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cepo import axes, teacher
from cepo.config import CreditConfig
from cepo.metrics import Clock
from cepo.parts import Parts, held_out, judge, roll_out, score
from cepo.rewards import is_success
from cepo.rollout import Rollouts
from cepo.tasks import Problem
from cepo.update import Batch, make_batch, passes_of, policy_loss

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

    def problem_of_rollouts(self) -> Tensor:
        """(B,) int64, the numbers of their problems."""
        count = len(self.rollouts.problems)
        return self.first + torch.arange(count).repeat_interleave(self.rollouts.group_size)


def collect(parts: Parts, problems: Sequence[Problem], key: tuple[int, int]) -> Scored:
    """Roll out and score `problems` with the noise of `key`, (seed, step), as a training step does."""
    adapted = parts.adaptive.options() if parts.adaptive else {}
    rollouts = roll_out(parts, problems, key)
    rewards = score(parts, rollouts)
    rewards_PG = torch.tensor([float("nan") if r is None else r for r in rewards]).view(len(problems), -1)
    scores = rewards if parts.config.reward.name == "verifier" else judge(parts, rollouts)
    return Scored(rollouts, rewards, scores, parts.advantage(rewards_PG, **adapted).flatten())


def collect_held_out(parts: Parts) -> Iterator[Scored]:
    """All held-out problems, as many at a time as a training step has."""
    problems, size = held_out(parts), parts.config.rollout.prompts
    for i in range(0, len(problems), size):
        yield replace(collect(parts, problems[i : i + size], (parts.config.eval.seed, i)), first=i)


def methods(parts: Parts, eps_w: float | None) -> dict[str, Parts]:
    """`parts` with each credit that asks at most the two teachers; with either kind of r- where it is read at once."""
    found: dict[str, Parts] = {}
    for name in axes.members("credit"):
        module = axes.module("credit", name)
        ahead = getattr(module, "token_advantages", None)
        if ahead and not module.TEACHERS:  # by passes of its own
            continue
        credit = CreditConfig(name, parts.config.credit.lam, eps_w=eps_w)
        credit.check()
        for negative in ("group", "own") if "negative" in module.TEACHERS and not ahead else ("group",):
            told = replace(parts.config.teacher, negative=negative)
            config = replace(parts.config, credit=credit, teacher=told)
            label = name if negative == "group" else f"{name}, own r-"
            found[label] = replace(
                parts,
                config=config,
                credit=axes.lookup("credit", name),
                teachers=module.TEACHERS,
                needs_zero_a_rows=module.NEEDS_ZERO_A_ROWS,
                token_advantages=ahead,
            )
    return found


def batch_of(parts: Parts, scored: Scored) -> Batch:
    """What an update by the method of `parts` would learn from."""
    config, teachers = parts.config, None
    if parts.teachers:
        teachers = teacher.build(
            parts.policy, config.teacher, parts.task, scored.rollouts, scored.scores, config.reward.success_threshold
        )
    return make_batch(parts, scored.rollouts, scored.advantages, teachers, config.credit.lam)


def successes(parts: Parts, scored: Scored) -> Tensor:
    """(B,) bool."""
    return torch.tensor([is_success(score, parts.config.reward.success_threshold) for score in scored.scores])


def reads(batch: Batch) -> Tensor:
    """Rollouts that an update reads for credit, (B,) bool."""
    return (batch.advantages != 0) & (batch.weights > 0)


def read(parts: Parts, batch: Batch, chosen: Tensor, *, backward: bool = False) -> list[Reading]:
    """Take the chosen rollouts, (B,) bool, through the passes of an update by the method of `parts`.

    Returns logprobs, entropy, evidence and weight of each chosen rollout, those which the method has, (T,) each. With
    `backward` the loss' gradient is added to that of the model.
    """
    readings: list[Reading] = []
    for rows in passes_of(parts, chosen):
        with torch.set_grad_enabled(backward):
            result = policy_loss(parts, batch, rows, None, Clock(parts.policy.device))
        if backward:
            result.loss.backward()
        packed = {name: getattr(result.credit, name) for name in ("logprobs", "entropy", "evidence", "weight")}
        lengths = [len(ids) for ids in batch.responses(rows)]
        pieces = {name: x.detach().cpu().split(lengths) for name, x in packed.items() if x is not None}
        readings += [{name: of[i] for name, of in pieces.items()} for i in range(len(rows))]
    return readings


@dataclass(frozen=True)
class Observed:
    """A batch as the methods see it."""

    scored: Scored
    batches: dict[str, Batch]
    rows: list[int]
    """The R rollouts that an update reads."""
    readings: dict[str, list[Reading]]
    """(R,) under each method."""


def observe(methods: dict[str, Parts], scored: Scored) -> Observed:
    """Read a batch under every method whose credit is made where it is read."""
    batches = {label: batch_of(method, scored) for label, method in methods.items() if not method.token_advantages}
    chosen = reads(batches["uniform"])
    readings = {label: read(methods[label], batch, chosen) for label, batch in batches.items()}
    return Observed(scored, batches, chosen.nonzero().flatten().tolist(), readings)
