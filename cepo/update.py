"""One batch of rollouts into one or more steps of the optimiser: teachers, credit, loss, gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cepo.losses import token_weights
from cepo.metrics import Clock, mean
from cepo.parts import Parts
from cepo.policy import response_logits
from cepo.rollout import Rollouts
from cepo.teacher import NO_TEACHERS, Teachers, teacher_logits
from cepo_kernels import ContrastiveLogprobs, token_logprobs


@dataclass(frozen=True)
class Batch:
    """What an update learns from: B rollouts, their advantages and weights (B,), and what the teachers are told."""

    rollouts: Rollouts
    advantages: Tensor
    weights: Tensor
    """(B,) weight of each of a rollout's tokens in the loss."""
    teachers: Teachers | None
    lam: float

    def responses(self, rows: list[int]) -> list[list[int]]:
        return [self.rollouts.responses[b] for b in rows]

    def prompts(self, rows: list[int]) -> list[list[int]]:
        return [self.rollouts.prompts[b // self.rollouts.group_size] for b in rows]

    def per_token(self, values: Tensor, rows: list[int]) -> Tensor:
        """(B,) values as (N,), one for each token of `rows`."""
        lengths = torch.tensor([len(ids) for ids in self.responses(rows)])
        return values[rows].repeat_interleave(lengths)


def make_batch(parts: Parts, rollouts: Rollouts, advantages: Tensor, teachers: Teachers | None, lam: float) -> Batch:
    """Weigh the tokens as `loss.average` says. Rollouts masked from the loss still count in its denominator."""
    lengths = torch.tensor([len(ids) for ids in rollouts.responses])
    weights = token_weights(lengths, parts.config.loss.average, parts.max_new_tokens)
    if parts.config.rollout.mask_truncated:
        weights = weights.masked_fill(torch.tensor(rollouts.truncated), 0.0)
    return Batch(rollouts, advantages, weights, teachers, lam)


def update(
    parts: Parts, optimizer: torch.optim.Optimizer, batch: Batch, clock: Clock
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Move the policy on one batch, `updates_per_batch` times.

    Credit and old log-probs come from the first round, whose kernel call also gives the first update its gradient;
    later rounds only ask for log-probs. Returns the tokens' statistics, packed, rollout after rollout, with NaN where
    there is none; and the update's own.
    """
    config, model = parts.config, parts.policy.model
    active = (batch.advantages != 0) & (batch.weights > 0)
    passes = [(rows, acts) for acts in (True, False) for rows in _passes(parts, active == acts)]
    everyone = list(range(len(batch.rollouts.responses)))
    owner = batch.per_token(torch.arange(len(everyone)), everyone)
    tokens: dict[str, Tensor] = {}
    behaviour: list[ContrastiveLogprobs] = []
    losses, norms, clipped = [], [], [torch.zeros(1)]

    for round_ in range(config.train.updates_per_batch):
        optimizer.zero_grad()
        losses.append(0.0)
        for number, (rows, acts) in enumerate(passes):
            # Without a gradient and without teachers where A = 0: the result is the same.
            full = acts or not config.teacher.skip
            if round_ == 0:
                out = look(parts, batch, rows, full, clock)
                behaviour.append(out)
                _scatter(tokens, out, torch.isin(owner, torch.tensor(rows)), acts)
                logprobs = out.logprobs
            elif full:
                logprobs = look_again(parts, batch, rows, clock)
            if full:
                with clock.phase("update"):
                    result = parts.loss(
                        logprobs,
                        behaviour[number].logprobs.detach(),
                        behaviour[number].advantages,
                        batch.per_token(batch.weights, rows).to(logprobs.device),
                        clip_low=config.loss.clip_low,
                        clip_high=config.loss.clip_high,
                    )
                    result.loss.backward()
                    losses[-1] += result.loss.item()
                    if acts:
                        clipped.append(result.clipped.float().cpu())
        if active.any():  # a batch in which every group agrees says nothing, and must not move the weights either
            with clock.phase("update"):
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm).item())
                if math.isfinite(norms[-1]):
                    optimizer.step()
    statistics = {"loss": losses[0], "gradient_norm": norms[0] if norms else 0.0}
    return tokens, {**statistics, "ratio_clipped": mean(torch.cat(clipped)[1:]) or 0.0}


def look(parts: Parts, batch: Batch, rows: list[int], full: bool, clock: Clock) -> ContrastiveLogprobs:
    """Read the responses of `rows` as policy and, if `full`, as teachers; the kernel makes token advantages of it."""
    config, policy, told = parts.config, parts.policy, NO_TEACHERS
    responses = batch.responses(rows)
    if full and batch.teachers is not None:
        with clock.phase("teacher"):
            told = teacher_logits(policy, config.teacher, batch.teachers, parts.teachers, batch.rollouts, rows)
    with clock.phase("policy"), torch.set_grad_enabled(full):
        logits = response_logits(policy, batch.prompts(rows), responses)
    with clock.phase("credit"), torch.set_grad_enabled(full):
        out: ContrastiveLogprobs = parts.credit(
            logits,
            told.positive,
            told.negative,
            _labels(responses, logits.device),
            batch.per_token(batch.advantages, rows).to(logits.device),
            negative_mask=told.negative_mask,
            lam=batch.lam,
            eps_w=config.credit.eps_w,
            temperature=config.rollout.temperature,
            return_entropy=True,
            inplace_grad=True,
            backend=config.backend,
            **policy.logit_options,
        )
    return out


def look_again(parts: Parts, batch: Batch, rows: list[int], clock: Clock) -> Tensor:
    """Log-probs of the responses of `rows` under weights that have moved since their credit was decided."""
    config, policy = parts.config, parts.policy
    responses = batch.responses(rows)
    with clock.phase("policy"):
        logits = response_logits(policy, batch.prompts(rows), responses)
    with clock.phase("credit"):
        return token_logprobs(
            logits,
            _labels(responses, logits.device),
            temperature=config.rollout.temperature,
            backend=config.backend,
            **policy.logit_options,
        ).logprobs


def _labels(responses: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor([token for ids in responses for token in ids], device=device)


def _passes(parts: Parts, chosen: Tensor) -> list[list[int]]:
    """The chosen rollouts, (B,) bool, in passes of whole groups, so that no prefix is needed by two of them."""
    size = (parts.config.train.prompts_per_pass or chosen.numel()) * parts.config.rollout.group_size
    groups = [rows.nonzero().flatten() + i * size for i, rows in enumerate(chosen.split(size))]
    return [rows.tolist() for rows in groups if rows.numel()]


def _scatter(tokens: dict[str, Tensor], out: ContrastiveLogprobs, places: Tensor, acts: bool) -> None:
    """Put packed values of some rollouts in their places, (N,) bool, among the tokens of all."""
    values = {"entropy": out.entropy, **({"evidence": out.evidence, "weight": out.weight} if acts else {})}
    for name, value in values.items():
        if value is not None:
            tokens.setdefault(name, torch.full(places.shape, float("nan")))[places] = value.detach().float().cpu()
