"""The definition of every op, in plain PyTorch.

All other backends are tested against these few functions, and machines without any of them run on these. Rows are
computed in float64 whatever the logits' dtype.

The label's column is left out of the sum. With ``S`` the sum of ``exp(x_j - m)`` over the *other* columns and ``m``
their maximum, ``t = log S + m - x_y`` is the log-odds against the label, and

    log p = -softplus(t)        1 - p = sigmoid(t)        p_j = (1 - p) exp(x_j - m) / S

are exact from p = 1e-30 to 1 - p = 1e-30, where ``x_y - logsumexp(x)`` cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Scalars and exponentials of N rows, float64; ``others`` is 0 in the label's column."""

    logprobs: Tensor  # (N,)  log p(label)
    complement: Tensor  # (N,)  1 - p(label)
    entropy: Tensor  # (N,)  nats
    log_others: Tensor  # (N, V)  log p_j, j != label
    others: Tensor  # (N, V)  p_j, j != label
    log_total: Tensor  # (N,)  log of the sum over j != label of exp(x_j - the largest such x_j)


class Credit(NamedTuple):
    """What a token earns. ``weight`` and ``advantages`` are None where the call gave no advantages."""

    evidence: Tensor
    weight: Tensor | None
    advantages: Tensor | None


def transform(
    logits: Tensor, temperature: Tensor, logit_scale: Tensor, logit_softcap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x' = cap tanh(scale x / cap) / T`` and ``dx'/dx``, both (N, V) float64; ``temperature`` is 0-d or (N,)."""
    x = logits.double()
    inverse = (1.0 / temperature.double()).reshape(-1, 1)
    scale = logit_scale.double()
    if logit_softcap is None:
        return x * (scale * inverse), (scale * inverse).expand_as(x)
    cap = logit_softcap.double()
    tanh = torch.tanh(x * (scale / cap))
    capped = torch.where(x == torch.inf, torch.inf, cap * tanh)  # the cap must not hide an overflowed logit
    return capped * inverse, scale * inverse * (1 - tanh * tanh)


def row_terms(x: Tensor, labels: Tensor) -> Rows:
    """Everything about N rows of transformed logits ``x`` (N, V) float64 and their ``labels`` (N,) in [0, V)."""
    index = labels.long().unsqueeze(1)
    label_x = x.gather(1, index).squeeze(1)
    others = x.scatter(1, index, -torch.inf)
    top = others.amax(1)
    origin = torch.where(top == -torch.inf, 0.0, top)
    shifted = others - origin.unsqueeze(1)
    exponentials = shifted.exp()
    total = row_sum(exponentials)
    # The largest of the others counts 1: left out too, so that the entropy of a peaked row keeps its digits.
    rest = row_sum(exponentials.scatter(1, others.argmax(1, keepdim=True), 0.0))
    log_total = torch.where(total > 0, rest.log1p(), total.log())
    log_odds = torch.where(label_x == torch.inf, torch.nan, log_total + (origin - label_x))

    logprobs, log_complement = F.logsigmoid(-log_odds), F.logsigmoid(log_odds)  # softplus overflows past 709
    complement = log_odds.sigmoid()
    log_others = log_complement.unsqueeze(1) + shifted - log_total.unsqueeze(1)
    log_others = torch.where(shifted == -torch.inf, -torch.inf, log_others)
    shares = torch.where(shifted == -torch.inf, 0.0, exponentials / total.unsqueeze(1))
    probabilities = complement.unsqueeze(1) * shares  # all NaN where the row has no distribution
    mean_shift = row_sum(torch.where(exponentials == 0, 0.0, shifted * exponentials)) / total
    spread = torch.where(total == 0, 0.0, log_total - mean_shift)
    entropy = complement * spread - product(logprobs.exp(), logprobs) - product(complement, log_complement)
    return Rows(logprobs, complement, entropy, log_others, probabilities, log_total)


def logits_gradient(
    rows: Rows, slope: Tensor, labels: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Gradient (N, V) float64 of ``sum(grad_logprobs * logprobs + grad_entropy * entropy)`` in the raw logits.

    ``d log p / dx_j = [j = y] - p_j`` and ``dH / dx_j = -p_j (log p_j + H)``, each times ``slope = dx'/dx``.
    """
    index = labels.long().unsqueeze(1)
    gradient = torch.zeros_like(rows.others)
    label_gradient = torch.zeros_like(rows.logprobs)
    if grad_logprobs is not None:
        upstream = grad_logprobs.double()
        gradient -= upstream.unsqueeze(1) * rows.others
        label_gradient += upstream * rows.complement
    if grad_entropy is not None:
        upstream = grad_entropy.double()
        entropy = rows.entropy
        gradient -= upstream.unsqueeze(1) * product(rows.others, rows.log_others + entropy.unsqueeze(1))
        label_gradient -= upstream * product(rows.logprobs.exp(), rows.logprobs + entropy)
    return gradient.scatter(1, index, label_gradient.unsqueeze(1)) * slope


def credit(
    positive_logprobs: Tensor, negative_logprobs: Tensor, advantages: Tensor | None, lam: Tensor, eps_w: Tensor
) -> Credit:
    """Evidence, clipped weight and token advantage (CEPO, arXiv 2605.19436, its equations for w_t and A_t).

    ``evidence = log P+ - log P-``, ``weight = clip(exp(sign(A) evidence), 1 - eps_w, 1 + eps_w)``,
    ``advantages = A ((1 - lam) + lam weight)``. Two teachers at -inf have evidence 0; A = 0 has weight 1.
    """
    both_impossible = (positive_logprobs == -torch.inf) & (negative_logprobs == -torch.inf)
    evidence = torch.where(both_impossible, 0.0, positive_logprobs - negative_logprobs)
    if advantages is None:
        return Credit(evidence, None, None)
    sign = torch.where(advantages.isnan(), advantages, advantages.sign())  # which is 0 for NaN
    ratio = torch.exp(sign * evidence)
    weight = torch.minimum(torch.maximum(ratio, 1 - eps_w), 1 + eps_w)
    weight = torch.where(advantages == 0, 1.0, weight)
    return Credit(evidence, weight, torch.where(advantages == 0, 0.0, advantages * ((1 - lam) + lam * weight)))


class LossTerms(NamedTuple):
    """Of N rows: the loss, what clipping did, and the loss's derivatives in log p and in the entropy."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor


def loss_terms(
    logprobs: Tensor, entropy: Tensor, advantages: Tensor, old_logprobs: Tensor, token_weight: Tensor,
    ref_logprobs: Tensor, surrogate: str,
    clip_low: Tensor, clip_high: Tensor, kl_coef: Tensor, entropy_coef: Tensor,
) -> LossTerms:  # fmt: skip
    """The clipped policy loss of N tokens, and its slopes, float64; `contrastive_policy_loss` has the formulas.

    ``logprobs`` are rounded as the caller sees them, so that equal ``old_logprobs`` make the ratio exactly 1.
    """
    ratio = torch.where(logprobs == old_logprobs, 1.0, (logprobs - old_logprobs).exp())
    low, high = 1 - clip_low, 1 + clip_high
    any_sign = surrogate == "cispo"
    below = (ratio < low) & (any_sign | (advantages < 0))
    above = (ratio > high) & (any_sign | (advantages > 0))
    clipped = below | above
    pull = -token_weight * torch.where(below, low, torch.where(above, high, ratio)) * advantages
    pull = torch.where(advantages == 0, 0.0, pull)
    losses = torch.where(pull == 0, 0.0, pull * logprobs) if surrogate == "cispo" else pull
    slope = pull if surrogate == "cispo" else torch.where(clipped, 0.0, pull)
    if kl_coef != 0:
        distance = torch.where(logprobs == ref_logprobs, 0.0, ref_logprobs - logprobs)
        losses = losses + kl_coef * (distance.expm1() - distance)
        slope = slope - kl_coef * distance.expm1()
    if entropy_coef != 0:
        losses = losses - entropy_coef * entropy
    return LossTerms(losses, ratio, clipped, slope, -entropy_coef.expand_as(slope))


def product(probability: Tensor, factor: Tensor) -> Tensor:
    """``probability * factor`` with 0 times anything = 0, but NaN kept."""
    return torch.where(probability == 0, 0.0, probability * factor)


def row_sum(x: Tensor) -> Tensor:
    """Sums (N,) of rows (N, V), in runs of 256 first: torch deals one long sum out to its threads, and bits with it."""
    padded = F.pad(x, (0, -x.shape[1] % 256))
    return padded.reshape(padded.shape[0], padded.shape[1] // 256, 256).sum(2).sum(1)
