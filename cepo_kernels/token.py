"""Log-prob of the labels and entropy, from one tensor of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import parallel
from .contrastive import run_rows


class TokenLogprobs(NamedTuple):
    """One value per row, in the labels' shape, both differentiable. Ignored rows are 0."""

    logprobs: Tensor
    entropy: Tensor | None


@parallel.outside_graphs
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_grad: bool = False,
    backend: str = "auto",
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each label, and the entropy of its row if asked, each row read once.

    The bits of a row are those that `contrastive_logprobs` returns for it, so an on-policy ratio is exactly 1.

    Args:
        logits: (..., V) bfloat16, float16, float32 or float64; last dimension contiguous, leading strides free.
        labels: (...) int32 or int64, already shifted. Where ``ignore_index``, the row is never read.
        temperature, logit_scale, logit_softcap, ignore_index, return_entropy, inplace_grad, backend, tp_group,
            vocab_size, vocab_start: as in `contrastive_logprobs`, whose errors these are too.

    Returns:
        `TokenLogprobs`, float32 (float64 for float64 logits), in nats, differentiable in the logits alone.
    """
    outputs = run_rows(
        ("logits", "", ""), logits, None, None, labels, None, None,
        lam=0.0, eps_w=0.0, temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap,
        ignore_index=ignore_index, return_entropy=return_entropy, inplace_grad=inplace_grad, backend=backend,
        tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start,
    )  # fmt: skip
    return TokenLogprobs(outputs.logprobs, outputs.entropy if return_entropy else None)
