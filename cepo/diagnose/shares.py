"""Shares: how much of a batch carries credit at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cepo.diagnose.batches import Observed, successes
from cepo.diagnose.ranking import answer_is_r_minus
from cepo.metrics import mean
from cepo.parts import Parts


def shares(methods: dict[str, Parts], observed: Sequence[Observed]) -> dict[str, float | None]:
    """None where there is nothing to take a share of.

    zero_variance       groups whose advantages are all 0
    r_minus_is_own      wrong rollouts whose answer is what their group's negative teacher is told
    no_r_minus          wrong rollouts without a negative teacher
    at_clip: <method>   tokens that an update reads whose weight is at one of the clip's ends
    """
    cepo, flat, own = methods["cepo"], [], []
    clipped: dict[str, list[torch.Tensor]] = {}
    for one in observed:
        rollouts, teachers = one.scored.rollouts, one.batches["cepo"].teachers
        flat.append((one.scored.advantages.view(-1, rollouts.group_size) == 0).all(1))
        scored = torch.tensor([score is not None for score in one.scored.scores])
        wrong = (scored & ~successes(cepo, one.scored)).nonzero().flatten().tolist()
        own += [answer_is_r_minus(cepo, teachers, rollouts, b) for b in wrong]
        for label, readings in one.readings.items():
            eps_w = methods[label].config.credit.eps_w or 0.0
            weights = [values["weight"] for values in readings if "weight" in values]
            clipped.setdefault(label, []).extend((w - 1).abs() >= eps_w * (1 - 1e-6) for w in weights)
    found = {
        "zero_variance": torch.cat(flat),
        "r_minus_is_own": torch.tensor([answer is True for answer in own]),
        "no_r_minus": torch.tensor([answer is None for answer in own]),
        **{f"at_clip: {label}": torch.cat(tokens) for label, tokens in clipped.items() if tokens},
    }
    return {name: mean(values.float()) for name, values in found.items()}
