"""How good is a rollout relative to its group? `f(rewards_PG, **options) -> advantages_PG`.

Each member is a module with a function of its own name. Rewards are float32 (P, G); a NaN marks a rollout that could
not be scored: its group ignores it and its advantage is 0. A member that counts successes takes a `threshold`. One that
keeps its objective under one loss average alone says so in `AVERAGE`. One with options that follow from earlier steps
has `adaptive(config)`: None, or what keeps their state (see `_auto`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cepo.errors import InputError
from cepo.rewards import is_success


def floating(rewards_PG: Tensor) -> Tensor:
    """Whole numbers and truth values as float32."""
    return rewards_PG if rewards_PG.is_floating_point() else rewards_PG.float()


def centre(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean, (P, G), and how many of each group are scored, (P, 1).

    Unscored rollouts get 0, and so does, exactly, a group whose rewards agree, which rounding in the mean could spoil.
    Raises InputError for rewards that are not (P, G), or for groups of one, whose advantage would always be 0.
    """
    if rewards_PG.ndim != 2:
        raise InputError(f"rewards: expected shape (P, G), got {tuple(rewards_PG.shape)}")
    if rewards_PG.shape[1] < 2:
        raise InputError(f"rollout.group_size: expected at least 2, got {rewards_PG.shape[1]}")
    rewards_PG = floating(rewards_PG)
    count = (~rewards_PG.isnan()).sum(1, keepdim=True)
    mean = rewards_PG.nansum(1, keepdim=True) / count.clamp(min=1)
    highest = rewards_PG.nan_to_num(-torch.inf).amax(1, keepdim=True)
    lowest = rewards_PG.nan_to_num(torch.inf).amin(1, keepdim=True)
    return (rewards_PG - mean).nan_to_num(0.0).masked_fill(highest == lowest, 0.0), count


def successes(rewards_PG: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which rollouts succeed, (P, G) bool, and how many of each group are scored, (P, 1).

    Raises InputError as `centre` does, and for a negative reward: whoever counts successes gives failures 0.
    """
    _, count = centre(rewards_PG)
    if (rewards_PG < 0).any():
        lowest = rewards_PG.nan_to_num(torch.inf).min().item()
        raise InputError(f"rewards: expected none below 0 where successes are counted, got {lowest:g}")
    return is_success(rewards_PG, threshold), count
