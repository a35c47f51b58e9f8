"""How noisy is each method's gradient, at the same weights and on the same rollouts?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cepo.diagnose.batches import Scored, batch_of, collect, read, reads
from cepo.diagnose.statistics import GradientMoments, dot
from cepo.parts import Parts, problems_of


def gradient(parts: Parts, scored: Scored) -> Tensor:
    """The gradient, (D,), of an update by the method of `parts`; the model keeps none."""
    model = parts.policy.model
    model.zero_grad()
    batch = batch_of(parts, scored)
    read(parts, batch, reads(batch), backward=True)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat([g.flatten() for g in found])


def variance(parts: Parts, methods: dict[str, Parts], batches: int) -> dict[str, dict[str, Any]]:
    """Over the first `batches` batches of training, none of which moves the weights, for each method:

    noise_ratio     tr Cov(g) / |E g|^2, both unbiased; None where E g is not told from noise
    variance, signal    the two
    resolved        the share of |mean of g|^2 that is |E g|^2 and not noise
    cosine          between its mean gradient and that of `uniform`
    """
    moments = {label: GradientMoments() for label in methods}
    for step in tqdm(range(1, batches + 1), desc="gradients", unit="batch"):
        scored = collect(parts, problems_of(parts, step), (parts.config.train.seed, step))
        for label, method in methods.items():
            moments[label].add(gradient(method, scored))
    uniform = moments["uniform"].mean
    return {
        label: {
            "noise_ratio": of.noise_ratio,
            "variance": of.variance,
            "signal": of.signal,
            "resolved": of.signal / max(dot(of.mean, of.mean), 1e-300),
            "cosine": torch.cosine_similarity(of.mean.double(), uniform.double(), dim=0).item(),
        }
        for label, of in moments.items()
    }
