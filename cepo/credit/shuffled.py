"""Credit axis: the control, CEPO's weights moved to random tokens of the same rollout.

It keeps the weights and loses their tokens: what `cepo` learns beyond it comes of knowing the right tokens, what it
learns beyond `uniform`, of weights that differ at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cepo.credit import TokenAdvantages, cepo
from cepo.parts import Parts
from cepo.policy import contrastive_op, response_states
from cepo.teacher import teacher_states
from cepo.update import Batch, kernel_options, labels_of
from cepo_kernels import contrastive_logprobs

TEACHERS = cepo.TEACHERS
EPS_W = cepo.EPS_W
LAM_STEPS = cepo.LAM_STEPS
SUPERVISION = cepo.SUPERVISION
NEEDS_ZERO_A_ROWS = False


def shuffled(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    op: Callable[..., Any] = contrastive_logprobs,
    **options: Any,
) -> Any:
    """The advantages are those of `token_advantages`. Teachers are not read again."""
    return op(policy_logits, None, None, labels, advantages, **options)


def permutation(lengths: Sequence[int], rollouts: Sequence[int], seed: int, step: int) -> Tensor:
    """(N,) places from which the packed tokens of `rollouts` take their values, each from its own rollout.

    A function of (seed, step, rollout) and the rollout's length, however rollouts are put together.
    """
    places: list[int] = []
    for b, length in zip(rollouts, lengths, strict=True):
        own = list(range(len(places), len(places) + length))
        random.Random(f"shuffled/{seed}/{step}/{b}").shuffle(own)
        places += own
    return torch.tensor(places)


@torch.no_grad()
def token_advantages(
    parts: Parts,
    batch: Batch,
    rows: list[list[int]],
    rewards: Sequence[float | None],
    success: Sequence[bool],
    step: int,
) -> TokenAdvantages:
    """A ((1 - lam) + lam w), CEPO's w and the evidence behind it taken from another token of the rollout."""
    config, policy = parts.config, parts.policy
    names = ("advantages", "evidence", "weight")

    def credited(some: list[int]) -> list[Tensor]:
        own = batch.per_token(batch.advantages, some)
        if batch.teachers is None:  # as lambda is 0
            return [own, *torch.full((2, own.numel()), float("nan"))]
        told = teacher_states(policy, config.teacher, batch.teachers, TEACHERS, batch.rollouts, some)
        states = response_states(policy, batch.prompts(some), batch.responses(some))
        with policy.autocast():
            out = cepo.cepo(
                states,
                told.positive,
                told.negative,
                labels_of(batch, some, states.device),
                own.to(states.device),
                op=contrastive_op(policy),
                negative_mask=told.negative_mask,
                lam=batch.lam,
                eps_w=config.credit.eps_w,
                **kernel_options(parts),
            )
        order = permutation([len(ids) for ids in batch.responses(some)], some, config.train.seed, step)
        return [getattr(out, name).cpu()[order] for name in names]

    told = parts.processes.gather("credit", lambda: [credited(some) for some in rows])
    columns = [column for part in told for column in part]
    advantages, evidence, weight = (torch.cat(column) for column in zip(*columns, strict=True))
    return TokenAdvantages(advantages, {"evidence": evidence, "weight": weight}, {})
