"""Which tokens earned the reward? From rows of logits to log-probs and token advantages, in one fused pass.

Each member is a module with

    <name>(policy_logits, positive_logits, negative_logits, labels, advantages, op=contrastive_logprobs, *,
           negative_mask, lam, eps_w, **options)     what `op` returns; `contrastive_policy_loss` makes the loss too
    TEACHERS    which teachers it reads, among "positive" and "negative"
    EPS_W, LAM_STEPS    the published evidence clip, and the number of steps over which lambda falls to 0
    SUPERVISION    what it is told, for the table of a comparison, among "answer" and "verifier", the task's own score,
                   which says who is wrong
    NEEDS_ZERO_A_ROWS   whether rollouts with A = 0 matter to it

Logits are (N, V), the rest (N,). A teacher multiplies the advantage, so rows with A = 0 and steps with lambda = 0 need
none: both logits may then be None, and the result is the same.

A member whose credit takes more than three rows of logits also has

    token_advantages(parts, batch, rows, rewards, success, step) -> TokenAdvantages    of the rollouts in `rows`, in
                                  lists of whole groups for one pass each; called before the update, which then reads no
                                  teacher; rewards and success by the task, (B,), are those of all rollouts; in several
                                  processes `rows` are this one's, and what is returned is gathered from all of them
    check(config)                 raises InputError for what it does not go with
    check_problem(parts, problem, prompt)    raises InputError for a problem that it cannot credit; `prompt` in ids
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenAdvantages(NamedTuple):
    """Credit that is made before the update: advantages, (N,); (N,) tensors to record, NaN for none; and numbers."""

    advantages: Tensor
    tokens: dict[str, Tensor]
    statistics: dict[str, float | None]
    replaces: bool = False
    """Whether they are none of the rollouts' own times something."""


def lam_at(step: int, lam: float, steps: int) -> float:
    """lambda(s) = lam max(0, 1 - (s - 1) / steps), s = 1, 2, ...: a function of the step alone. steps = 0: constant."""
    return lam * max(0.0, 1 - (step - 1) / steps) if steps else lam
