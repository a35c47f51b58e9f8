"""The loop: rollouts -> reward -> group advantage -> token credit -> policy update.

One step, in the names of the four axes:

    rollouts    G completions of each of P problems, by `generate`
    reward      how good each is                              rewards/
    advantage   how good relative to its group                advantages/
    credit      which of its tokens earned that: the policy reads each response again, and as its own teacher once
                more knowing the right answer and once a wrong one; one kernel turns the three rows of logits into
                log-probs and token advantages                credit/
    loss        how the policy moves                          losses/

What differs from a textbook loop: old log-probs are those of the first pass over a batch, never of generation, so an
on-policy ratio is exactly 1; rows with A = 0 go without teachers and without a gradient, as do all teachers once lambda
is 0, which changes no bit; every schedule and random number is a function of the step, so a resumed run continues as if
it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cepo import axes, checkpoint, metrics, rollout, teacher
from cepo.config import Config
from cepo.credit import lam_at
from cepo.errors import InputError, one_line
from cepo.losses import token_weights
from cepo.metrics import Clock
from cepo.policy import Policy, load_policy, response_logits
from cepo.rollout import Rollouts
from cepo.tasks import Problem, Task, get_task
from cepo.teacher import NO_TEACHERS, Teachers
from cepo_kernels import token_logprobs

Record = dict[str, Any]


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
    loss: Callable[..., Any]

    @property
    def max_new_tokens(self) -> int:
        return self.config.rollout.max_new_tokens or self.task.max_new_tokens


def load_task(config: Config) -> Task:
    """The task of `config`. Raises InputError if there is none such."""
    try:
        return get_task(config.task.name, **config.task.options)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(one_line(error)) from error


def load_parts(config: Config, model: str | None = None) -> Parts:
    """Look up and load all that `config` names; `model` in place of its own if given."""
    task = load_task(config)
    policy_config = config.policy
    if model is not None:
        policy_config = type(policy_config)(model, None, policy_config.compute_dtype, policy_config.device)
    return Parts(
        config,
        load_policy(policy_config),
        task,
        axes.lookup("rewards", config.reward.name),
        axes.lookup("advantages", config.advantage.name),
        axes.lookup("credit", config.credit.name),
        axes.module("credit", config.credit.name).TEACHERS,
        axes.lookup("losses", config.loss.name),
    )


def train(config: Config, run: Path, start: Path | None = None) -> Iterator[Record]:
    """Train in `run`, from checkpoint `start` if given, and yield the records as they are written."""
    done = 0 if start is None else checkpoint.verify(start)
    parts = load_parts(config, None if start is None else str(start))
    optimizer = make_optimizer(parts)
    if start is not None:
        checkpoint.load_state(start, optimizer)
    metrics.cut_back(run, None if start is None else done)

    def record(kind: str, step: int, values: Record) -> Record:
        line = {"kind": kind, "step": step, **values}
        metrics.append(run, line)
        return line

    if start is None:
        yield record("eval", 0, evaluate(parts))
    for step in range(done + 1, config.train.steps + 1):
        yield record("train", step, train_step(parts, optimizer, step))
        last = step == config.train.steps
        if last or (config.eval.every and step % config.eval.every == 0):
            yield record("eval", step, evaluate(parts))
        if last or step % config.checkpoint.every == 0:
            policy = parts.policy
            checkpoint.save(run, step, policy.model, policy.tokenizer, optimizer, config.checkpoint.keep)


def make_optimizer(parts: Parts) -> torch.optim.Optimizer:
    """AdamW on float32 weights."""
    config = parts.config.train
    return torch.optim.AdamW(parts.policy.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def evaluate(parts: Parts) -> Record:
    """Held-out accuracy, sampled and greedy. The noise is that of step 0 of the evaluation's own seed, every time."""
    config = parts.config.eval
    clock = Clock(parts.policy.device)
    try:
        problems = parts.task.split(config.split, config.problems)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    shared: Record = {"group_size": 1, "max_new_tokens": parts.max_new_tokens, "key": (config.seed, 0)}
    shared["batch_size"] = parts.config.rollout.batch_size
    result: Record = {"split": config.split, "problems": len(problems)}
    for name, temperature in (("sampled", config.temperature), ("greedy", 0.0)):
        rollouts = rollout.sample(parts.policy, problems, temperature=temperature, **shared)
        scores = score(parts, rollouts)
        result[name] = sum(is_success(parts, r) for r in scores) / len(scores)
    return {**result, "seconds": clock.total()}


def train_step(parts: Parts, optimizer: torch.optim.Optimizer, step: int) -> Record:
    """One step of the algorithm; returns what there is to say about it."""
    config = parts.config
    clock = Clock(parts.policy.device)
    with clock.phase("rollout"):
        problems = problems_of(parts, step)
        rollouts = rollout.sample(
            parts.policy,
            problems,
            group_size=config.rollout.group_size,
            max_new_tokens=parts.max_new_tokens,
            temperature=config.rollout.temperature,
            key=(config.train.seed, step),
            batch_size=config.rollout.batch_size,
        )
    with clock.phase("reward"):
        rewards = score(parts, rollouts)
        rewards_PG = torch.tensor([float("nan") if r is None else r for r in rewards]).view(len(problems), -1)
        advantages = parts.advantage(rewards_PG).flatten()
    with clock.phase("teacher"):
        lam = lam_at(step, config.credit.lam, config.credit.lam_steps or 0)
        teachers = None
        if parts.teachers and (lam > 0 or not config.teacher.skip):
            threshold = config.reward.success_threshold
            teachers = teacher.build(parts.policy, config.teacher, parts.task, rollouts, rewards, threshold)
    lr = config.train.lr * min(1.0, step / (config.train.warmup_steps + 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens, updated = update(parts, optimizer, rollouts, advantages, teachers, lam, clock)

    seconds = clock.total()
    lengths = [len(ids) for ids in rollouts.responses]
    right = torch.tensor([is_success(parts, r) for r in rewards]).repeat_interleave(torch.tensor(lengths))
    scored = [r for r in rewards if r is not None]
    evidence, weight = tokens.get("evidence"), tokens.get("weight")
    eps_w = config.credit.eps_w or 0.0
    return {
        "reward": sum(scored) / max(len(scored), 1),
        "accuracy": sum(is_success(parts, r) for r in rewards) / len(rewards),
        "unscored": 1 - len(scored) / len(rewards),
        "truncated": sum(rollouts.truncated) / len(rewards),
        "length": sum(lengths) / len(lengths),
        "entropy": _mean(tokens["entropy"]),
        "zero_variance": (advantages.view(len(problems), -1) == 0).all(1).float().mean().item(),
        "lam": lam,
        "lr": lr,
        "evidence_right": _mean(evidence, right),
        "evidence_wrong": _mean(evidence, ~right),
        "weight_clipped": None if weight is None else _mean(((weight - 1).abs() >= eps_w * (1 - 1e-6)).float(), weight),
        **updated,
        **({} if teachers is None else teachers.statistics),
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / seconds,
        "seconds": {**clock.seconds, "other": seconds - sum(clock.seconds.values())},
    }


def problems_of(parts: Parts, step: int) -> list[Problem]:
    """The problems of a step: the next ones of the seed's stream, by random access."""
    per_step, seed = parts.config.rollout.prompts, parts.config.train.seed
    return [parts.task.train((step - 1) * per_step + i, seed) for i in range(per_step)]


def score(parts: Parts, rollouts: Rollouts) -> list[float | None]:
    """The reward of every rollout."""
    problems = rollouts.per_rollout(rollouts.problems)
    prompts = [problem.prompt for problem in problems]
    columns = {"task": parts.task, "problem": problems, "truncated": rollouts.truncated}
    return parts.reward(prompts, rollouts.completions, rollouts.responses, **columns)


def is_success(parts: Parts, reward: float | None) -> bool:
    return reward is not None and reward >= parts.config.reward.success_threshold


def update(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: Tensor,
    teachers: Teachers | None,
    lam: float,
    clock: Clock,
) -> tuple[dict[str, Tensor], Record]:
    """Move the policy on one batch, `updates_per_batch` times.

    Credit and old log-probs come from the first pass, whose kernel call also gives the first update its gradient;
    later passes only ask for log-probs. Returns the tokens' statistics, packed in the order of the rollouts, with NaN
    where there is none; and the update's own.
    """
    config, policy = parts.config, parts.policy
    lengths = torch.tensor([len(ids) for ids in rollouts.responses])
    weights = token_weights(lengths, config.loss.average, parts.max_new_tokens)
    if config.rollout.mask_truncated:
        weights = weights.masked_fill(torch.tensor(rollouts.truncated), 0.0)
    active = (advantages != 0) & (weights > 0)
    passes = [(rows, rows_active) for rows_active in (True, False) for rows in _passes(parts, active == rows_active)]
    contexts = rollouts.per_rollout(rollouts.prompts)
    options = {"temperature": config.rollout.temperature, "backend": config.backend, **policy.logit_options}
    tokens: dict[str, Tensor] = {}
    behaviour: dict[int, tuple[Tensor, Tensor]] = {}
    losses, norms, clipped = [], [], []

    for round_ in range(config.train.updates_per_batch):
        optimizer.zero_grad()
        total = 0.0
        for number, (rows, rows_active) in enumerate(passes):
            if round_ and not rows_active:
                continue
            responses = [rollouts.responses[b] for b in rows]
            labels = torch.tensor([token for ids in responses for token in ids], device=policy.device)
            spread = lengths[rows]
            # Without a gradient and without teachers where A = 0: the result is the same.
            full = rows_active or not config.teacher.skip
            told = NO_TEACHERS
            if round_ == 0 and full and teachers is not None:
                with clock.phase("teacher"):
                    told = teacher.teacher_logits(policy, config.teacher, teachers, parts.teachers, rollouts, rows)
            with clock.phase("policy"), torch.set_grad_enabled(full):
                logits = response_logits(policy, [contexts[b] for b in rows], responses)
            with clock.phase("credit"), torch.set_grad_enabled(full):
                if round_ == 0:
                    out = parts.credit(
                        logits,
                        told.positive,
                        told.negative,
                        labels,
                        advantages[rows].repeat_interleave(spread).to(policy.device),
                        negative_mask=told.negative_mask,
                        lam=lam,
                        eps_w=config.credit.eps_w,
                        return_entropy=True,
                        **options,
                    )
                    behaviour[number] = out.logprobs.detach(), out.advantages
                    values = {"entropy": out.entropy}
                    if rows_active:
                        values |= {"evidence": out.evidence, "weight": out.weight}
                    _scatter(tokens, values, rows, lengths)
                else:
                    out = token_logprobs(logits, labels, **options)
            if full:
                with clock.phase("update"):
                    old, token_advantages = behaviour[number]
                    token_weight = weights[rows].repeat_interleave(spread).to(policy.device)
                    clip = {"clip_low": config.loss.clip_low, "clip_high": config.loss.clip_high}
                    result = parts.loss(out.logprobs, old, token_advantages, token_weight, **clip)
                    result.loss.backward()
                    total += result.loss.item()
                    if rows_active:
                        clipped.append(result.clipped.float().cpu())
        with clock.phase("update"):
            losses.append(total)
            if active.any():  # a batch in which every group agrees says nothing, and must not move the weights either
                norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.train.max_grad_norm)
                if norm.isfinite():
                    optimizer.step()
                norms.append(norm.item())
    statistics = {
        "loss": losses[0],
        "gradient_norm": norms[0] if norms else 0.0,
        "ratio_clipped": _mean(torch.cat(clipped)) if clipped else 0.0,
    }
    return tokens, statistics


def _passes(parts: Parts, chosen: Tensor) -> list[list[int]]:
    """The chosen rollouts, (B,) bool, in passes of whole groups, so that no prefix is needed by two of them."""
    size = (parts.config.train.prompts_per_pass or chosen.numel()) * parts.config.rollout.group_size
    groups = [rows.nonzero().flatten() + i * size for i, rows in enumerate(chosen.split(size))]
    return [rows.tolist() for rows in groups if rows.numel()]


def _scatter(tokens: dict[str, Tensor], values: dict[str, Tensor | None], rows: list[int], lengths: Tensor) -> None:
    """Put packed values of some rollouts in their places among the tokens of all."""
    ends = lengths.cumsum(0)
    places = torch.cat([torch.arange(int(ends[b] - lengths[b]), int(ends[b])) for b in rows])
    for name, value in values.items():
        if value is not None:
            tokens.setdefault(name, torch.full((int(ends[-1]),), float("nan")))[places] = value.detach().float().cpu()


def _mean(values: Tensor | None, where: Tensor | None = None) -> float | None:
    """Mean of the numbers among `values`, those chosen by a bool `where`, or where `where` is a number; None if none."""
    if values is None:
        return None
    if where is not None:
        values = values[where if where.dtype == torch.bool else ~where.isnan()]
    values = values[~values.isnan()]
    return values.mean().item() if values.numel() else None
