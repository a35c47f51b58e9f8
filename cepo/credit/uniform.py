"""Credit axis: every token of a rollout gets its advantage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cepo_kernels import contrastive_logprobs

TEACHERS: tuple[str, ...] = ()
EPS_W = 0.0
LAM_STEPS = 0
SUPERVISION: tuple[str, ...] = ()
NEEDS_ZERO_A_ROWS = False


def uniform(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    op: Callable[..., Any] = contrastive_logprobs,
    **options: Any,
) -> Any:
    """A_t = A. Teachers are not read."""
    return op(policy_logits, None, None, labels, advantages, **options)
