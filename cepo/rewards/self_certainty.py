"""Reward axis: self-certainty, the control that asks nobody (arXiv 2502.18581; as a reward: arXiv 2505.19590)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cepo.config import Config
from cepo.policy import Policy, response_logits, tokens_of
from cepo.prompts import Prompt
from cepo_kernels.reference import transform

SUPERVISION: tuple[str, ...] = ()


def load(config: Config) -> Any:
    """The reward of a run: at the temperature of its rollouts."""
    return partial(self_certainty, temperature=config.rollout.temperature)


@torch.no_grad()
def self_certainty(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    policy: Policy,
    temperature: float = 1.0,
    batch_size: int = 32,
    **columns: Any,
) -> list[float | None]:
    """r = mean over the response's tokens of KL(uniform || p) = -log V - mean_v log p(v), p the policy's: at least 0.

    Args:
        prompts, completions, completion_ids: one per rollout; the ids, end token included, are what is read.
        policy: the model that wrote them, as it is now.
        temperature: divides the logits.
        batch_size: responses whose logits are held at once.
    """
    rewards: list[float | None] = []
    for start in range(0, len(prompts), batch_size):
        ids = completion_ids[start : start + batch_size]
        contexts = [tokens_of(policy, prompt) for prompt in prompts[start : start + batch_size]]
        certainty = uniform_divergence(response_logits(policy, contexts, ids), temperature, **policy.logit_options)
        rewards += [row.mean().item() for row in certainty.split([len(one) for one in ids])]
    return rewards


def uniform_divergence(
    logits: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None
) -> Tensor:
    """KL(uniform || softmax) of each row of logits (N, V): float64 (N,)."""
    one = torch.ones((), dtype=torch.float64, device=logits.device)
    cap = None if logit_softcap is None else one * logit_softcap
    x, _ = transform(logits, one * temperature, one * logit_scale, cap)
    return x.logsumexp(-1) - x.mean(-1) - math.log(x.shape[-1])
