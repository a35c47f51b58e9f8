"""The reference backend: `cepo_kernels.reference`, a bounded number of rows at a time. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import divergence_reference, reference
from ..checks import check_label_range
from ..rows import (
    BackwardInputs,
    DivergenceInputs,
    DivergenceOutputs,
    ForwardInputs,
    ForwardOutputs,
    LossInputs,
    LossOutputs,
    RowOptions,
)

_ELEMENTS = 1 << 22  # per chunk; several float64 temporaries of this size are alive at once

notes = ""


def unavailable(device_type: str) -> str | None:
    return None


def forward(inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
    if inputs.labels.device.type == "cpu":
        check_label_range(inputs.labels, inputs.policy.shape[-1], inputs.options.ignore_index)
    outputs = ForwardOutputs(*(buffer.zero_().view(-1) for buffer in outputs))
    for rows in _scored(inputs.policy, inputs.labels, inputs.options.ignore_index):
        labels, options = inputs.labels[rows], inputs.options
        policy = _terms(inputs.policy, rows, labels, options)
        if outputs.entropy.numel():
            outputs.entropy[rows] = policy.entropy.to(outputs.entropy.dtype)
        positive = negative = None
        if inputs.negative is not None:
            used = torch.ones_like(labels, dtype=torch.bool)
            if inputs.negative_mask is not None:
                used = inputs.negative_mask[rows]
            negative = policy.logprobs.clone()
            negative[used] = _terms(inputs.negative, rows[used], labels[used], options).logprobs
        if inputs.positive is not None:
            positive = _terms(inputs.positive, rows, labels, options).logprobs
        put(inputs, outputs, rows, policy.logprobs, positive, negative)


def put(
    inputs: ForwardInputs, outputs: ForwardOutputs, rows: Tensor, logprobs: Tensor, positive: Tensor | None,
    negative: Tensor | None,
) -> None:  # fmt: skip
    """Write the log-probs of some rows, float64, and the credit that follows from them; outputs are flat."""
    outputs.logprobs[rows] = logprobs.to(outputs.logprobs.dtype)
    if negative is not None:
        outputs.negative_logprobs[rows] = negative.to(outputs.negative_logprobs.dtype)
    advantages = None if inputs.advantages is None else inputs.advantages[rows].double()
    if positive is not None:
        outputs.positive_logprobs[rows] = positive.to(outputs.positive_logprobs.dtype)
        under_negative = logprobs if negative is None else negative
        credit = reference.credit(
            positive, under_negative, advantages, inputs.lam.to(positive), inputs.eps_w.to(positive)
        )
        outputs.evidence[rows] = credit.evidence.to(outputs.evidence.dtype)
        if credit.weight is not None and credit.advantages is not None:
            outputs.weight[rows] = credit.weight.to(outputs.weight.dtype)
            outputs.advantages[rows] = credit.advantages.to(outputs.advantages.dtype)
    elif advantages is not None:
        outputs.advantages[rows] = advantages.to(outputs.advantages.dtype)


def backward(inputs: BackwardInputs) -> None:
    skipped = inputs.labels == inputs.options.ignore_index
    idle = torch.ones_like(skipped)
    for upstream in (inputs.grad_logprobs, inputs.grad_entropy):
        if upstream is not None:
            idle &= upstream == 0
    inner = inputs.policy.shape[1]
    for rows in chunks((skipped | idle).nonzero().squeeze(1), inputs.policy.shape[-1]):
        inputs.gradient[rows // inner, rows % inner] = 0
    for rows in chunks((~(skipped | idle)).nonzero().squeeze(1), inputs.policy.shape[-1]):
        labels = inputs.labels[rows]
        raw = inputs.policy[rows // inner, rows % inner]
        x, slope = transformed(raw, rows, inputs.options)
        gradient = reference.logits_gradient(
            reference.row_terms(x, labels),
            slope,
            labels,
            None if inputs.grad_logprobs is None else inputs.grad_logprobs[rows],
            None if inputs.grad_entropy is None else inputs.grad_entropy[rows],
        )
        inputs.gradient[rows // inner, rows % inner] = gradient.to(inputs.gradient.dtype)


def policy_loss(
    inputs: LossInputs,
    outputs: LossOutputs,
    forward: Callable[[ForwardInputs, ForwardOutputs], None] = forward,
    backward: Callable[[BackwardInputs], None] = backward,
) -> None:
    """Forward, the loss of its log-probs, and backward: the definition of what other backends fuse."""
    given, made = inputs.forward, outputs.forward
    assert given.advantages is not None
    clip_low, clip_high, kl_coef, entropy_coef, denominator = (
        x.to(made.logprobs.device).double() for x in inputs.numbers
    )
    idle = (given.advantages == 0) & (kl_coef == 0) & (entropy_coef == 0)
    ignore_index = given.options.ignore_index
    labels = given.labels.masked_fill(idle, ignore_index)
    forward(given._replace(labels=labels), made)
    logprobs = made.logprobs.view(-1)
    entropy = made.entropy.view(-1) if made.entropy.numel() else torch.zeros_like(logprobs)

    def per_row(value: Tensor | None, default: Tensor) -> Tensor:
        return (default if value is None else value).double()

    scored = labels != ignore_index
    terms = reference.loss_terms(
        logprobs.double(), entropy.double(), made.advantages.view(-1).double(),
        per_row(inputs.old_logprobs, logprobs), per_row(inputs.token_weight, torch.ones_like(logprobs)),
        per_row(inputs.ref_logprobs, logprobs), inputs.surrogate, clip_low, clip_high, kl_coef, entropy_coef,
    )  # fmt: skip
    for buffer, value in (
        (outputs.losses, terms.losses),
        (outputs.ratio, terms.ratio),
        (outputs.clipped, terms.clipped),
    ):
        buffer.view(-1).copy_(torch.where(scored, value, 0))
    if outputs.gradient is not None:
        slopes = (terms.grad_logprobs / denominator, terms.grad_entropy / denominator)
        backward(
            BackwardInputs(
                outputs.gradient, given.policy, labels, *slopes, made.logprobs, made.entropy, made.stats, given.options
            )
        )


def divergence(inputs: DivergenceInputs, outputs: DivergenceOutputs) -> None:
    outer, inner, vocabulary = inputs.student.shape
    rows = torch.arange(outer * inner, device=inputs.student.device)
    outputs.values.zero_()
    if inputs.weight is not None:
        idle = (inputs.weight == 0).nonzero().squeeze(1)
        if outputs.gradient is not None:
            for skipped in chunks(idle, vocabulary):
                outputs.gradient[skipped // inner, skipped % inner] = 0
        rows = inputs.weight.nonzero().squeeze(1)
    how = (inputs.kind, inputs.beta, inputs.clip)
    for some in chunks(rows, vocabulary):
        index = (some // inner, some % inner)
        raw = inputs.student[index]
        student, slope = transformed(raw, some, inputs.options)
        teacher, _ = transformed(inputs.teacher[index], some, inputs.options)
        if inputs.top_k is None:
            found = divergence_reference.divergence(student, teacher, *how)
        else:
            found = divergence_reference.top_k_divergence(student, teacher, raw, *how, inputs.top_k)
        weight = torch.ones_like(found.values) if inputs.weight is None else inputs.weight[some].double()
        outputs.values[some] = (weight * found.values).to(outputs.values.dtype)
        if outputs.gradient is not None:
            gradient = weight.unsqueeze(1) * found.gradient * slope
            outputs.gradient[index] = gradient.to(outputs.gradient.dtype)


def _terms(logits: Tensor, rows: Tensor, labels: Tensor, options: RowOptions) -> reference.Rows:
    inner = logits.shape[1]
    return reference.row_terms(transformed(logits[rows // inner, rows % inner], rows, options)[0], labels)


def transformed(raw: Tensor, rows: Tensor, options: RowOptions) -> tuple[Tensor, Tensor]:
    temperature = options.temperature.to(raw.device)
    cap = options.logit_softcap
    return reference.transform(
        raw,
        temperature if temperature.ndim == 0 else temperature[rows],
        options.logit_scale.to(raw.device),
        None if cap is None else cap.to(raw.device),
    )


def _scored(logits: Tensor, labels: Tensor, ignore_index: int) -> Iterator[Tensor]:
    return chunks((labels != ignore_index).nonzero().squeeze(1), logits.shape[-1])


def chunks(rows: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """So many rows at a time as float64 copies of their logits may take."""
    return iter(rows.split(max(1, _ELEMENTS // vocabulary))) if rows.numel() else iter(())
