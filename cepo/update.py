"""One batch of rollouts into one or more steps of the optimiser: teachers, credit, loss, gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cepo import axes
from cepo.credit import TokenAdvantages
from cepo.distil import told_states
from cepo.engine import importance
from cepo.losses import token_weights
from cepo.metrics import Clock, mean
from cepo.parts import Parts
from cepo.policy import divergence_op, loss_op, response_states, token_op
from cepo.rollout import Rollouts
from cepo.sharding import broken_weight, forward, is_sharded, norm, whole
from cepo.teacher import NO_TEACHERS, Teachers, teacher_states
from cepo.vision import Seen
from cepo_kernels import ContrastiveLogprobs, PolicyLoss


@dataclass(frozen=True)
class Batch:
    """What an update learns from: B rollouts, their advantages and weights (B,), and what the teachers are told."""

    rollouts: Rollouts
    advantages: Tensor
    weights: Tensor
    """(B,) weight of each of a rollout's tokens in the loss."""
    teachers: Teachers | None
    lam: float
    ahead: TokenAdvantages | None = None
    """What a credit with token advantages of its own made before the update, for all N tokens."""
    contexts: list[list[int] | None] | None = None
    """(B,) what a distillation's teacher reads before each response; None: nothing, the rollout is dropped."""

    def responses(self, rows: list[int]) -> list[list[int]]:
        return [self.rollouts.responses[b] for b in rows]

    def prompts(self, rows: list[int]) -> list[list[int]]:
        return [self.rollouts.prompts[b // self.rollouts.group_size] for b in rows]

    def per_token(self, values: Tensor, rows: list[int]) -> Tensor:
        """(B,) values as (N,), one for each token of `rows`."""
        lengths = torch.tensor([len(ids) for ids in self.responses(rows)])
        return values[rows].repeat_interleave(lengths)

    def engine_logprobs(self, rows: list[int]) -> Tensor | None:
        """Log-probs of the tokens of `rows`, (N,), as the engine had them that sampled them; None: the policy did."""
        told = self.rollouts.logprobs
        return None if told is None else torch.tensor([value for b in rows for value in told[b]])

    def token_advantages(self, rows: list[int]) -> Tensor:
        """Advantages of the tokens of `rows`, (N,): the rollout's, or those made before the update."""
        if self.ahead is None:
            return self.per_token(self.advantages, rows)
        pieces = self.ahead.advantages.split([len(ids) for ids in self.rollouts.responses])
        return torch.cat([pieces[b] for b in rows])

    def active(self) -> Tensor:
        """(B,) bool: the rollouts with a gradient."""
        if self.contexts is not None:
            return torch.tensor([ids is not None for ids in self.contexts]) & (self.weights > 0)
        everyone = list(range(len(self.rollouts.responses)))
        owner = self.per_token(torch.arange(len(everyone)), everyone)
        credited = owner[self.token_advantages(everyone) != 0]
        return (credited.bincount(minlength=len(everyone)) > 0) & (self.weights > 0)


def make_batch(
    parts: Parts,
    rollouts: Rollouts,
    advantages: Tensor,
    teachers: Teachers | None,
    lam: float,
    contexts: list[list[int] | None] | None = None,
) -> Batch:
    """Weigh the tokens as `loss.average` says.

    Rollouts masked from the loss still count in its denominator; those that a distillation dropped do not.
    """
    assert parts.config.loss.average is not None
    lengths = torch.tensor([len(ids) for ids in rollouts.responses])
    kept = torch.tensor([contexts is None or contexts[b] is not None for b in range(lengths.numel())])
    weights = torch.zeros(lengths.shape)
    weights[kept] = token_weights(lengths[kept], parts.config.loss.average, parts.max_new_tokens)
    if parts.config.rollout.mask_truncated:
        weights = weights.masked_fill(torch.tensor(rollouts.truncated), 0.0)
    return Batch(rollouts, advantages, weights, teachers, lam, contexts=contexts)


def credit_ahead(
    parts: Parts, batch: Batch, outcomes: Sequence[float | None], success: Sequence[bool], step: int, clock: Clock
) -> Batch:
    """`batch` with the token advantages of a credit that makes them before the update; 0 where it needs none."""
    if parts.token_advantages is None:
        return batch
    needed = (batch.advantages != 0) | parts.needs_zero_a_rows | (not parts.config.teacher.skip)
    places = batch.per_token(needed, list(range(needed.numel())))
    ahead = TokenAdvantages(torch.zeros(places.numel()), {}, {})
    if needed.any():
        with clock.phase("token_advantages"), whole(parts.policy.model):
            made = parts.token_advantages(
                parts, batch, passes_of(parts, share_of(parts, needed)), outcomes, success, step
            )
        ahead.advantages[places] = made.advantages.float()
        _scatter(ahead.tokens, _kept(made.tokens), places)
        ahead = ahead._replace(statistics=made.statistics, replaces=made.replaces)
    return replace(batch, ahead=ahead)


def update(
    parts: Parts, optimizer: torch.optim.Optimizer, batch: Batch, clock: Clock
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Move the policy on one batch, `updates_per_batch` times.

    Credit and old log-probs come from the first round; later rounds move the same token advantages. Each pass is one
    kernel call, which leaves the loss and the gradient of the logits. Returns the tokens' statistics, packed, rollout
    after rollout, with NaN where there is none; and the update's own.

    A round in which logits, loss or gradient are not finite moves nothing, and ends the update.
    """
    config, model, many = parts.config, parts.policy.model, parts.processes
    everyone = list(range(len(batch.rollouts.responses)))
    owner = batch.per_token(torch.arange(len(everyone)), everyone)
    active = batch.active()
    tokens: dict[str, Tensor] = {} if batch.ahead is None else dict(batch.ahead.tokens)
    found: list[tuple[list[int], dict[str, Tensor]]] = []
    with whole(model):
        for rows in passes_of(parts, share_of(parts, ~active)):
            found.append((rows, _kept({"entropy": entropy(parts, batch, rows, clock)})))
    passes = passes_for(parts, batch, active)
    one_pass: Callable[..., Any] = distillation_loss if parts.distillation else policy_loss
    teacher = parts.self_teacher and parts.self_teacher.model
    shows = any(isinstance(ids, Seen) for ids in batch.prompts(active.nonzero().flatten().tolist()))
    behaviour: list[Any] = []
    losses, norms, clipped, skipped, broken = [], [], [torch.zeros(1)], 0, None

    def one_round(round_: int) -> tuple[float, bool]:
        loss = 0.0
        for number, (rows, acts, of) in enumerate(passes):
            before = None if round_ == 0 else behaviour[number]
            result = forward(model, partial(one_pass, parts, of, rows, before, clock), teacher, shows)
            if round_ == 0:
                behaviour.append(result.credit)
                if acts:
                    names = ("entropy", "evidence", "weight", "logprobs", "divergence", "positive_logprobs",
                             "negative_logprobs", "advantages")  # fmt: skip
                    found.append((rows, _kept({name: getattr(result.credit, name, None) for name in names})))
            with clock.phase("update"):
                result.loss.backward()
                loss += result.loss.item()
            if acts:
                clipped.append(result.clipped.float().cpu())
        # Only a row without a distribution has no entropy, and a loss may have left that row out.
        return loss, any(bool(values["entropy"].isnan().any()) for _, values in found)

    for round_ in range(config.train.updates_per_batch):
        optimizer.zero_grad()
        rounds = many.gather("update", partial(one_round, round_), exchanges=is_sharded(model))
        losses.append(sum(loss for loss, _ in rounds))
        acts = bool(active.any())
        if acts:  # a batch in which every group agrees says nothing, and must not move the weights either
            with clock.phase("update"):
                if not is_sharded(model):
                    many.sum_gradients(model)
                norms.append(norm(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)))
        if broken := not_finite(model, any(lost for _, lost in rounds), losses[-1], norms[-1:]):
            skipped = config.train.updates_per_batch - round_  # the weights have not moved: the next would be the same
            break
        if acts:
            with clock.phase("update"):
                optimizer.step()
                if parts.self_teacher:
                    parts.self_teacher.follow(model)
    told = many.gather("tokens", lambda: (found, torch.cat(clipped)[1:]))
    for rows, values in (entry for entries, _ in told for entry in entries):
        _scatter(tokens, values, torch.isin(owner, torch.tensor(rows)))
    statistics = {"loss": losses[0], "gradient_norm": norms[0] if norms else 0.0}
    return tokens, {
        **{name: value if math.isfinite(value) else None for name, value in statistics.items()},
        "skipped_updates": skipped,
        **({} if broken is None else {"not_finite": broken}),
        "ratio_clipped": mean(torch.cat([part for _, part in told])) or 0.0,
    }


def not_finite(model: Any, lost: bool, loss: float, norms: list[float]) -> str | None:
    """What of a round is NaN or infinite, the cause before its effects; None: nothing. `lost`: some of the logits."""
    if not lost and all(map(math.isfinite, (loss, *norms))):
        return None
    if weight := broken_weight(model):
        return f"weight {weight}"
    return "logits" if lost else "gradient" if math.isfinite(loss) else "loss"


def passes_for(parts: Parts, batch: Batch, active: Tensor) -> list[tuple[list[int], bool, Batch]]:
    """The passes of this process: rollouts, whether they act, and the batch they are of.

    Of a sharded model every process makes as many; where rollouts run out, one of another's counts nothing.
    """

    def of(rank: int) -> list[tuple[list[int], bool]]:
        # Rows with A = 0 need no gradient and no teachers: the result is the same.
        passes = [(rows, True) for rows in passes_of(parts, share_of(parts, active, rank))]
        if not parts.config.teacher.skip and parts.distillation is None:
            passes += [(rows, False) for rows in passes_of(parts, share_of(parts, ~active, rank))]
        return passes

    mine = [(rows, acts, batch) for rows, acts in of(parts.processes.rank)]
    if is_sharded(parts.policy.model):
        everyone = [of(rank) for rank in range(parts.processes.world)]
        dummies = max(map(len, everyone)) - len(mine)
        some = next((rows[:1] for passes in everyone for rows, _ in passes), [])
        mine += [(some, False, replace(batch, weights=torch.zeros_like(batch.weights)))] * dummies
    return mine


def share_of(parts: Parts, chosen: Tensor, rank: int | None = None) -> Tensor:
    """Those of the chosen rollouts, (B,) bool, that are this process's, or another's: a share of their groups."""
    groups = chosen.view(-1, parts.config.rollout.group_size).any(1)
    places = groups.nonzero().flatten()
    share = parts.processes.share(places.numel(), rank)
    groups[places[: share.start]] = groups[places[share.stop :]] = False
    return chosen & groups.repeat_interleave(parts.config.rollout.group_size)


@torch.no_grad()
def entropy(parts: Parts, batch: Batch, rows: list[int], clock: Clock) -> Tensor:
    """Of the policy at every token of the responses of `rows`: (N,)."""
    with clock.phase("policy"):
        states = response_states(parts.policy, batch.prompts(rows), batch.responses(rows))
    with clock.phase("credit"), parts.policy.autocast():
        labels = labels_of(batch, rows, states.device)
        entropy = token_op(parts.policy)(states, labels, return_entropy=True, **kernel_options(parts)).entropy
    assert entropy is not None
    return entropy


def policy_loss(
    parts: Parts, batch: Batch, rows: list[int], behaviour: ContrastiveLogprobs | None, clock: Clock
) -> PolicyLoss:
    """The loss on the responses of `rows`: with their credit if `behaviour` is None, else with the one it holds.

    For credit the model reads the responses as policy and as teachers; one call makes log-probs, token advantages, loss
    and gradient of the three.
    """
    config, policy, told = parts.config, parts.policy, NO_TEACHERS
    if behaviour is None and batch.ahead is None and batch.teachers is not None:
        with clock.phase("teacher"), whole(policy.model):
            told = teacher_states(policy, config.teacher, batch.teachers, parts.teachers, batch.rollouts, rows)
    with clock.phase("policy"):
        states = response_states(policy, batch.prompts(rows), batch.responses(rows))
    with clock.phase("credit"), policy.autocast():
        labels = labels_of(batch, rows, states.device)

        def own() -> Tensor:
            if behaviour is not None:
                return behaviour.logprobs
            return token_op(policy)(states.detach(), labels, **kernel_options(parts)).logprobs

        shared = {
            "surrogate": parts.surrogate,
            "clip_low": config.loss.clip_low,
            "clip_high": config.loss.clip_high,
            "token_weight": loss_weights(parts, batch, rows, own).to(states.device),
            "denominator": 1.0,
            **kernel_options(parts),
        }
        if behaviour is not None:
            assert behaviour.advantages is not None
            return loss_op(policy)(states, None, None, labels, behaviour.advantages, behaviour.logprobs, **shared)
        result: PolicyLoss = parts.credit(
            states,
            told.positive,
            told.negative,
            labels,
            batch.token_advantages(rows).to(states.device),
            op=loss_op(policy),
            negative_mask=told.negative_mask,
            lam=batch.lam,
            eps_w=config.credit.eps_w,
            return_entropy=True,
            **shared,
        )
    return result


def loss_weights(parts: Parts, batch: Batch, rows: list[int], own: Callable[[], Tensor]) -> Tensor:
    """Weights of the tokens of `rows` in the loss, (N,); of an engine's tokens their importance is a factor.

    own: gives their log-probs under the policy as it was when they were sampled.
    """
    weights, told = batch.per_token(batch.weights, rows), batch.engine_logprobs(rows)
    if told is None:
        return weights
    cap = parts.config.rollout.importance_cap
    assert cap is not None
    return weights * importance(own().cpu(), told, cap)


class TokenDivergence(NamedTuple):
    """Of (N,) tokens: the policy's log-probs, its entropy, and its divergence from the teacher."""

    logprobs: Tensor
    entropy: Tensor | None
    divergence: Tensor


class DistillationLoss(NamedTuple):
    """One pass of a distillation, in the names of a `PolicyLoss`."""

    loss: Tensor
    credit: TokenDivergence | None
    clipped: Tensor


def distillation_loss(
    parts: Parts, batch: Batch, rows: list[int], behaviour: TokenDivergence | None, clock: Clock
) -> DistillationLoss:
    """The loss on the responses of `rows`, which all have a context; `behaviour` is None in the first round.

    The teacher reads the responses again in each round, with the weights that it then has.
    """
    config, policy = parts.config, parts.policy
    assert batch.contexts is not None
    assert parts.self_teacher is not None
    teacher = replace(policy, model=parts.self_teacher.model)
    contexts = [ids for b in rows if (ids := batch.contexts[b]) is not None]
    with clock.phase("teacher"), whole(teacher.model):
        told = told_states(teacher, contexts, batch.responses(rows), config.teacher.share_prefix)
    with clock.phase("policy"):
        states = response_states(policy, batch.prompts(rows), batch.responses(rows))
    how = config.loss
    given = {"kind": how.divergence, "beta": how.beta, "clip": how.clip, "top_k": how.top_k}
    options = {name: value for name, value in given.items() if value is not None}
    with clock.phase("divergence"), policy.autocast():
        ratio = own = None
        if behaviour is None or parts.distillation.USES_RATIO:
            with torch.no_grad():
                labels = labels_of(batch, rows, states.device)
                own = token_op(policy)(states, labels, return_entropy=behaviour is None, **kernel_options(parts))
            ratio = None if behaviour is None else (own.logprobs - behaviour.logprobs).exp()
        sampled: Any = behaviour or own
        weights = loss_weights(parts, batch, rows, lambda: sampled.logprobs).to(states.device)
        shares, clipped = axes.lookup("losses", config.loss.name)(
            states, told, weights, ratio, op=divergence_op(policy, teacher), **options, **kernel_options(parts)
        )
    credit = None
    if behaviour is None:
        assert own is not None
        credit = TokenDivergence(own.logprobs, own.entropy, shares.detach() / weights)
    return DistillationLoss(shares.sum(), credit, torch.zeros_like(weights) if clipped is None else clipped)


def kernel_options(parts: Parts) -> dict[str, Any]:
    config = parts.config
    return {"temperature": config.rollout.temperature, "backend": config.backend, **parts.policy.logit_options}


def labels_of(batch: Batch, rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor([token for ids in batch.responses(rows) for token in ids], device=device)


def passes_of(parts: Parts, chosen: Tensor) -> list[list[int]]:
    """The chosen rollouts, (B,) bool, in passes of whole groups, so that no prefix is needed by two of them."""
    size = (parts.config.train.prompts_per_pass or chosen.numel()) * parts.config.rollout.group_size
    groups = [rows.nonzero().flatten() + i * size for i, rows in enumerate(chosen.split(size))]
    return [rows.tolist() for rows in groups if rows.numel()]


def _kept(values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in values.items() if value is not None}


def _scatter(tokens: dict[str, Tensor], values: Mapping[str, Tensor], places: Tensor) -> None:
    """Put packed values of some rollouts in their places, (N,) bool, among the tokens of all."""
    for name, value in values.items():
        tokens.setdefault(name, torch.full(places.shape, float("nan")))[places] = value
