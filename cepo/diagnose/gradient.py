"""How noisy is each method's gradient, at the same weights and on the same rollouts?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cepo.diagnose.batches import Scored, batch_of, collect, read
from cepo.diagnose.statistics import GradientMoments, dot
from cepo.parts import Parts, problems_of
from cepo.trainer import squared_scores


def gradient(parts: Parts, scored: Scored, step: int = 1) -> Tensor:
    """The gradient, (D,), of an update by the method of `parts`; the model keeps none.

    An advantage that adapts to earlier steps is shown this one, as training would.
    """
    model, rollouts = parts.policy.model, scored.rollouts
    model.zero_grad()
    batch = batch_of(parts, scored, step)
    readings = read(parts, batch, batch.active(), backward=True)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    if parts.adaptive and parts.config.advantage != scored.of:
        unread = [torch.full((len(ids),), float("nan")) for ids in rollouts.responses]
        logprobs = [readings[b]["logprobs"] if b in readings else row for b, row in enumerate(unread)]
        squared = squared_scores(rollouts, {"logprobs": torch.cat(logprobs)})
        parts.adaptive.observe(scored.rewards_PG, squared.view_as(scored.rewards_PG))
    return torch.cat([g.flatten() for g in found])


def variance(parts: Parts, methods: dict[str, Parts], batches: int) -> dict[str, dict[str, Any]]:
    """Over the first `batches` batches of training, none of which moves the weights, for each method:

    noise_ratio     tr Cov(g) / |E g|^2, both unbiased; None where E g is not told from noise
    variance, signal    the two
    resolved        the share of |mean of g|^2 that is |E g|^2 and not noise; None if the mean is 0
    cosine, length  of its mean gradient, to and relative to that of `uniform`; None if that is 0
    """
    moments = {label: GradientMoments() for label in methods}
    for step in tqdm(range(1, batches + 1), desc="gradients", unit="batch"):
        scored = collect(parts, problems_of(parts, step), (parts.config.train.seed, step))
        for label, method in methods.items():
            moments[label].add(gradient(method, scored, step))
    uniform = moments["uniform"].mean
    norm = math.sqrt(dot(uniform, uniform))
    report: dict[str, dict[str, Any]] = {}
    for label, of in moments.items():
        own = math.sqrt(dot(of.mean, of.mean))
        report[label] = {
            "noise_ratio": of.noise_ratio,
            "variance": of.variance,
            "signal": of.signal,
            "resolved": of.signal / own**2 if own else None,
            "cosine": dot(of.mean, uniform) / (own * norm) if own and norm else None,
            "length": own / norm if norm else None,
        }
    return report
