"""Fused log-probs and token credit for RL post-training: policy and two teachers in one pass over the logits."""

from .contrastive import ContrastiveLogprobs, contrastive_logprobs
from .credit import contrastive_credit
from .divergence import divergence, linear_divergence
from .head import LogprobHead, restore_head, use_logprob_head
from .linear import linear_contrastive_logprobs, linear_contrastive_policy_loss, linear_token_logprobs
from .policy_loss import PolicyLoss, contrastive_policy_loss
from .reference import Credit
from .report import BackendReport, backend_report
from .token import TokenLogprobs, token_logprobs

__all__ = [
    "BackendReport",
    "ContrastiveLogprobs",
    "Credit",
    "LogprobHead",
    "PolicyLoss",
    "TokenLogprobs",
    "backend_report",
    "contrastive_credit",
    "contrastive_logprobs",
    "contrastive_policy_loss",
    "divergence",
    "linear_contrastive_logprobs",
    "linear_contrastive_policy_loss",
    "linear_divergence",
    "linear_token_logprobs",
    "restore_head",
    "token_logprobs",
    "use_logprob_head",
]
