"""Fused log-probs and token credit for RL post-training: policy and two teachers in one pass over the logits."""

from .contrastive import ContrastiveLogprobs, contrastive_logprobs
from .credit import contrastive_credit
from .policy_loss import PolicyLoss, contrastive_policy_loss
from .reference import Credit
from .report import BackendReport, backend_report
from .token import TokenLogprobs, token_logprobs

__all__ = [
    "BackendReport",
    "ContrastiveLogprobs",
    "Credit",
    "PolicyLoss",
    "TokenLogprobs",
    "backend_report",
    "contrastive_credit",
    "contrastive_logprobs",
    "contrastive_policy_loss",
    "token_logprobs",
]
