"""Evidence, weight and token advantage for those who have the log-probs already."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .reference import Credit


def contrastive_credit(
    positive_logprobs: Tensor,
    negative_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    policy_logprobs: Tensor | None = None,
    negative_mask: Tensor | None = None,
    mask: Tensor | None = None,
    lam: float | Tensor = 0.5,
    eps_w: float | Tensor = 0.5,
) -> Credit:
    """Token credit of CEPO (arXiv 2605.19436) or RLSD (arXiv 2604.03128) from log-probs, elementwise, no gradient.

    Args:
        positive_logprobs: (...) floating, log-prob of each token under the teacher given the correct answer.
        negative_logprobs: (...) under the teacher given a wrong one; None: ``policy_logprobs`` everywhere.
        advantages: A, 0-d or as many dimensions, each 1 or equal.
        policy_logprobs: (...), needed where ``negative_mask`` is False or ``negative_logprobs`` is None.
        negative_mask: bool, shaped like ``advantages``; where False the policy is the denominator.
        mask: bool, same; where False all three results are 0.
        lam: in [0, 1]. eps_w: in [0, 1).

    Returns:
        `Credit` with ``evidence``, ``weight`` and ``advantages`` of shape (...), float32 or float64 as the inputs.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
    """
    checks.check_tensor("positive_logprobs", positive_logprobs)
    if not positive_logprobs.dtype.is_floating_point:
        raise TypeError(f"positive_logprobs: expected a floating dtype, got {positive_logprobs.dtype}")
    if advantages is None:
        raise TypeError("advantages: expected a tensor, got None")
    checks.check_row_values("negative_logprobs", negative_logprobs, positive_logprobs, each="positive_logprobs")
    checks.check_row_values("policy_logprobs", policy_logprobs, positive_logprobs, each="positive_logprobs")
    checks.check_row_values("advantages", advantages, positive_logprobs)
    checks.check_row_values("negative_mask", negative_mask, positive_logprobs, boolean=True)
    checks.check_row_values("mask", mask, positive_logprobs, boolean=True)
    if policy_logprobs is None and (negative_logprobs is None or negative_mask is not None):
        raise ValueError("policy_logprobs: expected a tensor where there is no negative teacher, got None")
    lam, eps_w = checks.scalar("lam", lam), checks.scalar("eps_w", eps_w)
    checks.check_credit_values(lam, eps_w)

    shape = positive_logprobs.shape
    negative = policy_logprobs if negative_logprobs is None else negative_logprobs
    assert negative is not None
    if negative_mask is not None and policy_logprobs is not None:
        negative = torch.where(negative_mask, negative, policy_logprobs)
    dtype = torch.float64 if positive_logprobs.dtype == torch.float64 else torch.float32
    positive = positive_logprobs.detach().double()
    result = reference.credit(
        positive, negative.detach().double(), advantages.detach().double().expand(shape), lam.to(positive),
        eps_w.to(positive),
    )  # fmt: skip
    keep = torch.ones((), dtype=torch.bool, device=positive.device) if mask is None else mask
    return Credit(*(torch.where(keep, value, 0.0).to(dtype) for value in result if value is not None))
