"""The loop: rollouts -> reward -> group advantage -> token credit -> policy update.

One step, in the names of the four axes:

    rollouts    G completions of each of P problems, by `generate`
    reward      how good each is                              rewards/
    advantage   how good relative to its group                advantages/
    credit      which of its tokens earned that: the policy reads each response again, and as its own teacher once
                more knowing the right answer and once a wrong one; one kernel turns the three rows of logits into
                log-probs and token advantages                credit/
    loss        how the policy moves                          losses/

A loss that distils has a teacher, `distil`, in place of the three above it; rewards then say only what comes of it.

What differs from a textbook loop: old log-probs are those of the first pass over a batch, never of generation, so an
on-policy ratio is exactly 1; rows with A = 0 go without teachers and without a gradient, as do all teachers once lambda
is 0, which changes no bit; every schedule and random number is a function of the step, so a resumed run continues as if
it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cepo import checkpoint, distil, metrics, rollout, sharding, teacher
from cepo.credit import lam_at
from cepo.engine import importance
from cepo.errors import InputError
from cepo.metrics import Clock, mean
from cepo.parts import Parts, held_out, judge, problems_of, roll_out, score, training_problems
from cepo.report.samples import Recorder
from cepo.rewards import is_success
from cepo.update import Batch, credit_ahead, make_batch, update

Record = dict[str, Any]


def train(parts: Parts, run: Path, start: Path | None = None) -> Iterator[Record]:
    """Train in `run`, from checkpoint `start`, whose weights `parts` holds, if given; yield the records as written."""
    config, many = parts.config, parts.processes
    done = 0 if start is None else checkpoint.verify(start)
    place(parts, parts.policy.model)
    optimizer = make_optimizer(parts)
    if start is not None:
        state = checkpoint.load_state(start, optimizer)
        if parts.adaptive and "advantage" in state:
            parts.adaptive.restore(state["advantage"])
        if parts.self_teacher:
            parts.self_teacher.restore(run, state)
    elif parts.self_teacher:
        many.first("teacher.pt", partial(parts.self_teacher.begin, run))
    if parts.self_teacher and parts.self_teacher.model is not parts.policy.model:
        place(parts, parts.self_teacher.model)
    kept = None if start is None else done
    many.first("metrics", lambda: metrics.cut_back(run, kept))
    # The first process keeps samples, as it writes all that is written.
    recorder = many.together("tokens", lambda: None if many.rank else Recorder(parts, run, kept))

    def nothing() -> None: ...

    def record(kind: str, step: int, values: Record) -> Record:
        line = {"kind": kind, "step": step, **values}
        many.first("metrics", lambda: metrics.append(run, line))
        return line

    def check_weights(step: int) -> None:
        if name := sharding.broken_weight(parts.policy.model):
            raise InputError(f"step {step} is not saved: weight {name} is not finite; what was saved before stays")

    def save(step: int) -> int:
        many.together("checkpoint", partial(check_weights, step))
        policy, state = parts.policy, {"advantage": parts.adaptive.state} if parts.adaptive else {}
        state |= parts.self_teacher.state() if parts.self_teacher else {}
        state |= {"weights": sharding.weights(policy.model), "base": policy.base}
        written = (run, step, policy.model, policy.processor, sharding.optimizer_state(optimizer))
        many.first("checkpoint", lambda: checkpoint.save(*written, config.checkpoint.keep, **state))
        return step

    saved, skipped = done, 0
    try:
        if start is None:
            yield record("eval", 0, evaluate(parts))
        for step in range(done + 1, config.train.steps + 1):
            values = train_step(parts, optimizer, step, recorder.observe if recorder else None)
            done = step
            yield record("train", step, values)
            many.together("tokens", recorder.write if recorder else nothing)
            skipped = skipped + 1 if values["skipped_updates"] else 0
            if skipped == config.train.max_skipped != 0:
                raise InputError(
                    f"step {step}: {values['not_finite']} not finite, {skipped} steps in a row skipped "
                    f"(train.max_skipped); `cepo train --resume {run}` continues from what was saved"
                )
            last = step == config.train.steps
            if last or (config.eval.every and step % config.eval.every == 0):
                yield record("eval", step, evaluate(parts))
            if last or step % config.checkpoint.every == 0:
                saved = save(step)
    except InputError:
        # A step raises before it moves the weights, so they are those of the last finished step.
        if done > saved:
            with suppress(InputError):  # the first one says what is wrong
                save(done)
        raise


def place(parts: Parts, model: Any) -> None:
    """Give every process the same weights, or its part of them."""
    parts.processes.broadcast(model)
    if parts.processes.sharded:
        sharding.shard(model, parts.policy.device, parts.processes.world)


def make_optimizer(parts: Parts) -> torch.optim.Optimizer:
    """AdamW on float32 weights."""
    config, trained = parts.config.train, [p for p in parts.policy.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)


def check_prompts(parts: Parts) -> None:
    """Raise InputError if a prompt, held out or in training, or what teachers or credit add does not fit the model.

    Training problems are all of the task's where it can list them, else those of the first step.
    """
    config, training = parts.config, training_problems(parts)
    rollout.encode_prompts(parts.policy, held_out(parts), parts.max_new_tokens)
    prompts = rollout.encode_prompts(parts.policy, training, parts.max_new_tokens)
    if parts.teachers and (config.credit.lam > 0 or not config.teacher.skip):
        for problem in training:
            teacher.check_context(parts.policy, config.teacher, problem, parts.max_new_tokens)
    if parts.check_problem:
        for problem, prompt in zip(training, prompts, strict=True):
            parts.check_problem(parts, problem, prompt)


def evaluate(parts: Parts) -> Record:
    """Held-out accuracy, sampled and greedy. The noise is that of step 0 of the evaluation's own seed, every time."""
    config = parts.config.eval
    clock = Clock(parts.policy.device)
    problems = held_out(parts)
    shared: Record = {"group_size": 1, "max_new_tokens": parts.max_new_tokens, "key": (config.seed, 0)}
    shared |= {"batch_size": parts.config.rollout.batch_size, "processes": parts.processes, "engine": parts.engine}
    result: Record = {"split": config.split, "problems": len(problems)}
    for name, temperature in (("sampled", config.temperature), ("greedy", 0.0)):
        rollouts = rollout.sample(parts.policy, problems, temperature=temperature, **shared)
        scores = judge(parts, rollouts)
        result[name] = sum(is_success(r, parts.config.reward.success_threshold) for r in scores) / len(scores)
    return {**result, "seconds": clock.total()}


def train_step(
    parts: Parts, optimizer: torch.optim.Optimizer, step: int, observe: Callable[..., None] | None = None
) -> Record:
    """One step of the algorithm; returns what there is to say about it. `observe` is shown its tokens."""
    config = parts.config
    clock = Clock(parts.policy.device)
    with clock.phase("rollout"):
        problems = problems_of(parts, step)
        rollouts = roll_out(parts, problems, (config.train.seed, step))
    with clock.phase("reward"):
        rewards = score(parts, rollouts)
        scores = rewards if config.reward.name == "verifier" else judge(parts, rollouts)
        success = [is_success(s, config.reward.success_threshold) for s in scores]
        control = parts.control and score(parts, rollouts, parts.control)
        rewards_PG = torch.tensor([float("nan") if r is None else r for r in rewards]).view(len(problems), -1)
        adapted = parts.adaptive.options() if parts.adaptive else {}
        advantages = parts.advantage(rewards_PG, **adapted).flatten()
    with clock.phase("teacher"):
        lam = 0.0 if parts.distillation else lam_at(step, config.credit.lam, config.credit.lam_steps or 0)
        teachers = contexts = None
        if parts.teachers and (lam > 0 or not config.teacher.skip):
            threshold = config.reward.success_threshold
            teachers = teacher.build(parts.policy, config.teacher, parts.task, rollouts, scores, threshold)
        if parts.distillation:
            kinds = parts.distillation.TEACHER_CONTEXT
            contexts = distil.build(parts.policy, config.teacher, kinds, parts.task, rollouts, success)
    lr = config.train.lr * min(1.0, step / (config.train.warmup_steps + 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch = make_batch(parts, rollouts, advantages, teachers, lam, contexts and contexts.ids)
    batch = credit_ahead(parts, batch, rewards if config.reward.is_function else scores, success, step, clock)
    tokens, updated = update(parts, optimizer, batch, clock)
    if parts.engine:
        with clock.phase("sync"):
            parts.engine.sync(parts.policy.model)
    if observe:
        observe(step, batch, rewards, success, tokens)
    if parts.adaptive:  # at the end: a step that fails must leave no trace, since it will be taken again
        parts.adaptive.observe(rewards_PG, squared_scores(rollouts, tokens).view_as(rewards_PG))
    return {
        **describe(parts, batch, rewards, success, tokens),
        **({} if control is None else {"reward_control": mean_of(control)}),
        **adapted,
        "lr": lr,
        **updated,
        **({} if teachers is None else teachers.statistics),
        **({} if contexts is None else contexts.statistics),
        **({} if batch.ahead is None else batch.ahead.statistics),
        "tokens_per_second": sum(map(len, rollouts.responses)) / clock.total(),
        "seconds": clock.with_other(),
    }


def squared_scores(rollouts: rollout.Rollouts, tokens: dict[str, Tensor]) -> Tensor:
    """sum_t (1 - p(y_t)) of every rollout, (B,), whose mean is that of |grad log pi|^2 in logits; NaN: not computed."""
    lengths = [len(ids) for ids in rollouts.responses]
    logprobs = tokens.get("logprobs", torch.full((sum(lengths),), float("nan")))
    return torch.stack([-row.expm1().sum() for row in logprobs.split(lengths)])


def mean_of(rewards: list[float | None]) -> float | None:
    """Mean of those that could be scored, None if none could."""
    scored = [r for r in rewards if r is not None]
    return sum(scored) / len(scored) if scored else None


def describe(
    parts: Parts, batch: Batch, rewards: list[float | None], success: list[bool], tokens: dict[str, Tensor]
) -> Record:
    """A batch in numbers: fractions of rollouts or groups, and means over tokens; None where there is nothing."""
    lengths = torch.tensor([len(ids) for ids in batch.rollouts.responses])
    right = torch.tensor(success).repeat_interleave(lengths)
    nothing = torch.full(right.shape, float("nan"))
    flat = (batch.advantages.view(-1, batch.rollouts.group_size) == 0).all(1).float()
    evidence, weight = tokens.get("evidence", nothing), tokens.get("weight", nothing)
    at_clip = (weight - 1).abs() >= (parts.config.credit.eps_w or 0.0) * (1 - 1e-6)
    return {
        "reward": mean_of(rewards),
        "accuracy": mean(torch.tensor(success).float()),
        "unscored": sum(r is None for r in rewards) / len(rewards),
        "truncated": sum(batch.rollouts.truncated) / len(rewards),
        "tokens": lengths.sum().item(),
        "length": mean(lengths.float()),
        "entropy": mean(tokens["entropy"]),
        "zero_variance": None if parts.distillation else mean(flat),
        **({"divergence": mean(tokens.get("divergence", nothing))} if parts.distillation else {}),
        "lam": batch.lam if parts.teachers else None,
        "evidence_right": mean(evidence[right]),
        "evidence_wrong": mean(evidence[~right]),
        "weight_clipped": mean(at_clip[~weight.isnan()].float()),
        **off_policy(parts, batch, tokens.get("logprobs", nothing)),
    }


def off_policy(parts: Parts, batch: Batch, logprobs: Tensor) -> Record:
    """How far an engine's log-probs are from the policy's, (N,), and what that makes of the tokens' weights."""
    told = batch.engine_logprobs(list(range(len(batch.rollouts.responses))))
    if told is None:
        return {}
    read, cap = ~logprobs.isnan(), parts.config.rollout.importance_cap
    assert cap is not None
    weights = importance(logprobs[read], told[read], cap)
    return {
        "engine_gap": mean((logprobs - told).abs()),
        "importance": mean(weights),
        "importance_capped": mean((weights >= cap).float()),
    }
