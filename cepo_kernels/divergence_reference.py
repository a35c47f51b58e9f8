"""The definition of `divergence`, in plain PyTorch, and its gradient. Rows are computed in float64.

A KL is summed as ``p log(p / q) - p + q``, which sums to the same, is never negative and, with the normalisers known
first, does not cancel where the rows are nearly equal: at ``r = log(p / q)`` it is ``p (expm1(-r) + r)``. A JSD is
summed around the mixture m: with ``z = p / m - 1``, ``p log(p / m)`` is ``m (phi(z) + z)``, where
``phi(z) = (1 + z) log1p(z) - z``, and the two z of an entry cancel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import row_sum


class Divergence(NamedTuple):
    """Of N rows, float64: the values, and their derivatives in the student's transformed logits."""

    values: Tensor  # (N,)
    gradient: Tensor  # (N, V)


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float, clip: float | None) -> Divergence:
    """Of transformed logits (N, V) float64, every column an entry."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    q, p = log_q.exp(), log_p.exp()
    ratio = torch.where((p == 0) & (q == 0), 0.0, log_p - log_q)
    if kind == "jsd":
        log_mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return _jsd(q, p, ratio, log_q - log_mixture, beta, clip)
    one, other = (p, q) if kind == "forward_kl" else (q, p)
    ratio = ratio if kind == "forward_kl" else -ratio
    plain = torch.where(one == 0, 0.0, one * ratio)
    difference = _difference(one, other, ratio)
    terms = torch.where(ratio.abs() < 1, one * (torch.expm1(-ratio) + ratio), plain - difference)
    clipped = torch.zeros_like(plain, dtype=torch.bool) if clip is None else plain > clip
    if clip is not None:
        terms = torch.where(clipped, clip - difference, terms)
    cut = row_sum(torch.where(clipped, one, 0.0)).unsqueeze(1)  # probability whose term is a constant now
    if kind == "forward_kl":
        gradient = torch.where(clipped, q - q * cut, -difference - q * cut)
    else:
        level = row_sum(torch.where(clipped, 0.0, plain)).unsqueeze(1) - cut
        gradient = torch.where(q == 0, 0.0, q * torch.where(clipped, -1 - level, ratio - level))
        gradient = torch.where(level.isfinite(), gradient, torch.nan)
    return Divergence(row_sum(terms), gradient)


def _jsd(q: Tensor, p: Tensor, ratio: Tensor, log_share: Tensor, beta: float, clip: float | None) -> Divergence:
    mixture = beta * p + (1 - beta) * q
    gap = torch.where(mixture == 0, 0.0, _difference(p, q, ratio) / mixture)
    of_p, of_q = ((1 - beta) * gap).clamp(min=-1), (-beta * gap).clamp(min=-1)
    terms = mixture * (beta * _phi(of_p) + (1 - beta) * _phi(of_q))
    clipped = torch.zeros_like(terms, dtype=torch.bool) if clip is None else terms > clip
    log_share = torch.where(ratio.abs() < 1, torch.log1p(of_q), log_share)
    slopes = torch.where(clipped | (q == 0), 0.0, q * log_share)
    gradient = (1 - beta) * (slopes - q * row_sum(slopes).unsqueeze(1))
    return Divergence(row_sum(terms if clip is None else torch.where(clipped, clip, terms)), gradient)


def top_k_divergence(
    student: Tensor, teacher: Tensor, order: Tensor, kind: str, beta: float, clip: float | None, top_k: int
) -> Divergence:
    """The same over the ``top_k`` largest of ``order`` (N, V), the first of equals, and one bucket of the others."""
    # From their tops, or a bucket at -1e38 could not say how many it holds.
    student, teacher = student - _origin(student), teacher - _origin(teacher)
    chosen = order.sort(stable=True, dim=1, descending=True).indices[:, :top_k]
    (of_student, shares), (of_teacher, _) = (_with_bucket(x, chosen) for x in (student, teacher))
    values, gradient = divergence(of_student, of_teacher, kind, beta, clip)
    return Divergence(values, (gradient[:, -1:] * shares).scatter(1, chosen, gradient[:, :-1]))


def _with_bucket(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen columns and the others' logsumexp, (N, K + 1), -inf where all are; and the others' shares in it, (N,
    V), from their own top, however far below the row's that is."""
    tail = x.scatter(1, chosen, -torch.inf)
    origin = _origin(tail)
    terms = (tail - origin).exp()
    total = row_sum(terms).unsqueeze(1)
    shares = torch.where(tail == -torch.inf, 0.0, terms / total)
    return torch.cat([x.gather(1, chosen), origin + total.log()], 1), shares


def _origin(x: Tensor) -> Tensor:
    """(N, 1): the largest, from which exponents are taken; 0 where there is none."""
    top = x.amax(1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, top)


def _log_softmax(x: Tensor) -> Tensor:
    top = x.amax(1, keepdim=True)
    return x - top - row_sum((x - top).exp()).log().unsqueeze(1)


def _difference(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """``p - q``, by their log-ratio where they are nearly equal."""
    return torch.where(ratio.abs() < 1, -p * torch.expm1(-ratio), p - q)


def _phi(z: Tensor) -> Tensor:
    found: Tensor = torch.special.xlog1py(1 + z, z) - z
    return found
