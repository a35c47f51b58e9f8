"""Fused log-probs and token credit for RL post-training: policy and two teachers in one pass over the logits."""

from .contrastive import ContrastiveLogprobs, contrastive_logprobs
from .credit import contrastive_credit
from .reference import Credit
from .report import BackendReport, backend_report
from .token import TokenLogprobs, token_logprobs

__all__ = [
    "BackendReport",
    "ContrastiveLogprobs",
    "Credit",
    "TokenLogprobs",
    "backend_report",
    "contrastive_credit",
    "contrastive_logprobs",
    "token_logprobs",
]
