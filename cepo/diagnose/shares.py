"""Shares: how much of a batch carries credit at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cepo.diagnose.batches import Observed, successes
from cepo.diagnose.ranking import answer_is_r_minus
from cepo.metrics import mean
from cepo.parts import Parts


def shares(methods: dict[str, Parts], observed: Sequence[Observed]) -> dict[str, Any]:
    """None where there is nothing to take a share of.

    zero_variance       groups whose advantages are all 0
    r_minus_is_own      wrong rollouts whose answer is what their group's negative teacher is told
    no_r_minus          wrong rollouts without a negative teacher
    methods             of each that is observed: {idle_groups, idle_rollouts, at_clip}, groups and rollouts without a
                        gradient, and tokens read whose weight is at one of the clip's ends
    """
    cepo, flat, own = methods["cepo"], [], []
    idle: dict[str, list[torch.Tensor]] = {label: [] for one in observed for label in one.batches}
    clipped: dict[str, list[torch.Tensor]] = {label: [] for label in idle}
    for one in observed:
        rollouts, teachers = one.scored.rollouts, one.batches["cepo"].teachers
        flat.append((one.scored.advantages.view(-1, rollouts.group_size) == 0).all(1))
        scored = torch.tensor([score is not None for score in one.scored.scores])
        wrong = (scored & ~successes(cepo, one.scored)).nonzero().flatten().tolist()
        own += [answer_is_r_minus(cepo, teachers, rollouts, b) for b in wrong]
        for label, batch in one.batches.items():
            idle[label].append(~batch.active().view(-1, rollouts.group_size))
        for label, readings in one.readings.items():
            eps_w = methods[label].config.credit.eps_w or 0.0
            weights = [values["weight"] for values in readings if "weight" in values]
            clipped[label] += [(w - 1).abs() >= eps_w * (1 - 1e-6) for w in weights]
    return {
        "zero_variance": mean(torch.cat(flat).float()),
        "r_minus_is_own": mean(torch.tensor([float(answer is True) for answer in own])),
        "no_r_minus": mean(torch.tensor([float(answer is None) for answer in own])),
        "methods": {
            label: {
                "idle_groups": mean(torch.cat(groups).all(1).float()),
                "idle_rollouts": mean(torch.cat(groups).flatten().float()),
                "at_clip": mean(torch.cat(clipped[label]).float()) if clipped[label] else None,
            }
            for label, groups in idle.items()
        },
    }
