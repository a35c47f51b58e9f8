"""The ops from hidden states and a head: logits exist for some rows, or some columns, at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, linear_ops, parallel
from .contrastive import ContrastiveLogprobs, credit_of, row_arguments
from .linear_products import chunk_rows, result_dtype
from .policy_loss import PolicyLoss, detached, loss_arguments, policy_loss_of
from .rows import ForwardOutputs
from .token import TokenLogprobs


@parallel.outside_graphs
def linear_token_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of ``hidden_states @ lm_head_weight.T + lm_head_bias``, whose logits are never all there.

    Logits are float32, summed in float32 whatever the dtype of the operands. A frozen head: the gradient of the hidden
    states is made in the forward, and kept. A trainable one: the logits are kept where one chunk of 256 MiB holds them
    all; else the backward makes them again, of the rows whose upstream gradient is not 0. Under autocast hidden states
    and head are cast as those of a linear layer are.

    Args:
        hidden_states: (..., H) bfloat16, float16, float32 or float64.
        lm_head_weight: (V, H). lm_head_bias: (V,) or None.
        labels, temperature, logit_scale, logit_softcap, ignore_index, return_entropy, backend: as for `token_logprobs`.
        logits_dtype: None, or bfloat16 or float16, in which the matrix products and their results are then computed, as
            by a plain linear layer. On CPUs with 16-bit products this is faster; it moves every logit by up to 2^-9
            (2^-12) of itself, and the log-prob of a logit of 20 by up to .08 (.01).
        tp_group, vocab_size, vocab_start: as for `token_logprobs`; each rank passes its rows of the head and its part
            of the bias, the same hidden states as the others, whose gradient is summed over the ranks, and takes part
            in the backward. A head that is a DTensor, ``Shard(0)``, says them itself.

    Returns:
        `TokenLogprobs`, float32 (float64 if an input is), differentiable in hidden states, head and bias alone.

    Raises:
        TypeError, ValueError: an argument is malformed; the message says which, what was expected and what came.
    """
    outputs = _forward(
        (hidden_states, None, None), lm_head_weight, lm_head_bias, labels, None, None, 0.0, 0.0,
        temperature, logit_scale, logit_softcap, ignore_index, return_entropy, logits_dtype, backend,
        (tp_group, vocab_size, vocab_start), ("hidden_states", "", ""),
    )  # fmt: skip
    return TokenLogprobs(outputs.logprobs, outputs.entropy if return_entropy else None)


@parallel.outside_graphs
def linear_contrastive_logprobs(
    policy_hidden: Tensor,
    positive_hidden: Tensor | None,
    negative_hidden: Tensor | None,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor | None = None,
    *,
    lm_head_bias: Tensor | None = None,
    negative_mask: Tensor | None = None,
    lam: float | Tensor = 0.5,
    eps_w: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> ContrastiveLogprobs:
    """`contrastive_logprobs` of three contexts' hidden states (..., H) under one head, in one matrix product a chunk.

    Args and errors as for `contrastive_logprobs` and `linear_token_logprobs`.
    """
    outputs = _forward(
        (policy_hidden, positive_hidden, negative_hidden), lm_head_weight, lm_head_bias, labels, advantages,
        negative_mask, lam, eps_w, temperature, logit_scale, logit_softcap, ignore_index, return_entropy,
        logits_dtype, backend, (tp_group, vocab_size, vocab_start),
    )  # fmt: skip
    return credit_of(outputs, positive_hidden, negative_hidden, advantages, return_entropy)


@parallel.outside_graphs
def linear_contrastive_policy_loss(
    policy_hidden: Tensor,
    positive_hidden: Tensor | None,
    negative_hidden: Tensor | None,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    lm_head_bias: Tensor | None = None,
    surrogate: str = "ppo",
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.28,
    token_weight: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    entropy_coef: float | Tensor = 0.0,
    denominator: float | Tensor | None = None,
    negative_mask: Tensor | None = None,
    lam: float | Tensor = 0.5,
    eps_w: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    logit_softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    tp_group: Any = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
) -> PolicyLoss:
    """`contrastive_policy_loss` from hidden states: loss, and gradients of hidden states, head and bias, in one go.

    The gradients are made with the loss, chunk by chunk, so nothing is computed twice; rows that are ignored, idle or
    clipped go through no matrix product that they could not change. A frozen head costs no weight gradient.

    Args and errors as for `contrastive_policy_loss` and `linear_token_logprobs`.
    """
    contexts = (policy_hidden, positive_hidden, negative_hidden)
    where = (tp_group, vocab_size, vocab_start)
    weight, bias, where = parallel.local_head(lm_head_weight, lm_head_bias, where)
    with parallel.Meeting(*where, backend) as meeting:
        contexts, weight, bias = _checked(contexts, weight, bias, labels, logits_dtype, meeting.sharded)
        arguments = loss_arguments(
            labels, advantages, old_logprobs, surrogate, clip_low, clip_high, token_weight, ref_logprobs, kl_coef,
            entropy_coef, denominator, negative_mask, lam, eps_w, temperature, logit_scale, logit_softcap, ignore_index,
            return_entropy,
        )  # fmt: skip
        states = dict(zip(_NAMES, contexts, strict=True))
        meeting.bring(
            {**states, "lm_head_weight": weight, "lm_head_bias": bias},
            weight.shape[0],
            hidden_size=weight.shape[1],
            logits_dtype=logits_dtype,
            **arguments,
            **states,
        )
    policy, positive, negative = contexts
    weight, bias = meeting.true(weight, 0), meeting.true(bias)
    needs = [_needs(x) for x in (policy, weight, bias)]
    output = linear_ops.linear_policy_loss(
        policy, detached(positive), detached(negative), weight, bias, *arguments.values(), needs, logits_dtype,
        meeting.backend,
    )  # fmt: skip
    loss, ratio, clipped, _, _, _, *credit = output
    return policy_loss_of(loss, ratio, clipped, credit, positive, negative, advantages, return_entropy)


_NAMES = ("policy_hidden", "positive_hidden", "negative_hidden")


def _forward(
    contexts: tuple[Tensor, Tensor | None, Tensor | None], weight: Tensor, bias: Tensor | None, labels: Tensor,
    advantages: Tensor | None, negative_mask: Tensor | None, lam: float | Tensor, eps_w: float | Tensor,
    temperature: float | Tensor, logit_scale: float | Tensor, logit_softcap: float | Tensor | None, ignore_index: int,
    return_entropy: bool, logits_dtype: torch.dtype | None, backend: str, where: parallel.Where,
    names: tuple[str, str, str] = _NAMES,
) -> ForwardOutputs:  # fmt: skip
    weight, bias, where = parallel.local_head(weight, bias, where)
    with parallel.Meeting(*where, backend) as meeting:
        contexts, weight, bias = _checked(contexts, weight, bias, labels, logits_dtype, meeting.sharded, names)
        arguments = row_arguments(
            labels, advantages, negative_mask, lam, eps_w, temperature, logit_scale, logit_softcap, ignore_index,
            return_entropy,
        )  # fmt: skip
        states = dict(zip(names, contexts, strict=True))
        meeting.bring(
            {**states, "lm_head_weight": weight, "lm_head_bias": bias},
            weight.shape[0],
            hidden_size=weight.shape[1],
            logits_dtype=logits_dtype,
            **arguments,
            **states,
        )
    policy, positive, negative = contexts
    weight, bias = meeting.true(weight, 0), meeting.true(bias)
    keep = linear_ops.NOTHING
    if _needs(weight) or _needs(bias):
        dtype = result_dtype(policy, weight, logits_dtype)
        count = sum(x is not None for x in contexts)
        keep = linear_ops.LOGITS if labels.numel() <= chunk_rows(count, weight.shape[0], dtype) else keep
    elif _needs(policy):
        keep = linear_ops.SLOPES
    output = linear_ops.linear_forward(
        policy, detached(positive), detached(negative), weight, bias, *arguments.values(), keep, logits_dtype,
        meeting.backend,
    )  # fmt: skip
    return ForwardOutputs(*output[:8])


def _needs(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _checked(
    contexts: tuple[Tensor, Tensor | None, Tensor | None], weight: Tensor, bias: Tensor | None, labels: Tensor,
    logits_dtype: torch.dtype | None, sharded: bool, names: tuple[str, str, str] = _NAMES,
) -> Any:  # fmt: skip
    """Contexts, weight and bias, checked, in autocast's dtype where it is on."""
    checks.check_labels(labels)
    checks.check_head(weight, bias, labels, sharded=sharded)
    contexts = tuple(map(parallel.local, names, contexts))  # type: ignore[assignment]
    for name, hidden in zip(names, contexts, strict=True):
        if hidden is not None or name in ("hidden_states", "policy_hidden"):
            checks.check_hidden(name, hidden, labels, weight)  # type: ignore[arg-type]
    *contexts, weight, bias = autocast(labels.device.type, *contexts, weight, bias)  # type: ignore[assignment]
    if any(x is not None and x.dtype == torch.float64 for x in (*contexts, bias)):
        contexts = (contexts[0].double(), *contexts[1:])  # which decides on the dtype of all logits
    checks.check_logits_dtype(logits_dtype, contexts[0], weight)
    return contexts, weight, bias


def autocast(device_type: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors in autocast's dtype where it is on, as it casts a linear layer's."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return [*tensors]
    dtype = torch.get_autocast_dtype(device_type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
