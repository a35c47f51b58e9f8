"""Which tokens earned the reward? From rows of logits to log-probs and token advantages, in one fused pass.

Each member is a module with

    <name>(policy_logits, positive_logits, negative_logits, labels, advantages, op=contrastive_logprobs, *,
           negative_mask, lam, eps_w, **options)     what `op` returns; `contrastive_policy_loss` makes the loss too
    TEACHERS    which teachers it reads, among "positive" and "negative"
    EPS_W, LAM_STEPS    the published evidence clip, and the number of steps over which lambda falls to 0
    SUPERVISION    what it is told about a problem, for the table of a comparison: ("answer",) or nothing

Logits are (N, V), the rest (N,). A teacher multiplies the advantage, so rows with A = 0 and steps with lambda = 0 need
none: both logits may then be None, and the result is the same.
"""

from __future__ import annotations


def lam_at(step: int, lam: float, steps: int) -> float:
    """lambda(s) = lam max(0, 1 - (s - 1) / steps), s = 1, 2, ...: a function of the step alone. steps = 0: constant."""
    return lam * max(0.0, 1 - (step - 1) / steps) if steps else lam
