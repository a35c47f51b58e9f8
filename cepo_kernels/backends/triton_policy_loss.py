"""The Triton kernel of the fused policy loss: forward, loss and gradient of a row in one program."""

# mypy: ignore-errors
# The bodies are Triton's language, in which Python's types mean nothing.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import entropy_at_label, fill, put, put_zeros, score, start, write_gradient


@triton.jit
def _expm1(x):
    """exp(x) - 1 in float64, by the series where that would cancel."""
    series = 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(tl.abs(x) < 0.01, series * x, tl.exp(x) - 1.0)


@triton.jit(do_not_specialize=["inner_rows", "ignore_index"])
def policy_loss_kernel(
    policy, positive, negative, labels, advantages, negative_mask, temperatures, values,
    logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy,
    old_logprobs, token_weight, ref_logprobs, losses, ratios, clipped, gradient,
    policy_outer: tl.int64, policy_inner: tl.int64, positive_outer: tl.int64, positive_inner: tl.int64,
    negative_outer: tl.int64, negative_inner: tl.int64, gradient_outer: tl.int64, gradient_inner: tl.int64,
    inner_rows: tl.int64, vocabulary: tl.int32, ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, temperature: tl.float64, lam: tl.float64, eps_w: tl.float64,
    clip_low: tl.float64, clip_high: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    denominator: tl.float64,
    CISPO: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    BACKWARD_BLOCK: tl.constexpr,
):  # fmt: skip
    """The forward of one row, its loss, and the gradient of that; `contrastive_policy_loss` has the formulas."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    kl_coef = tl.full((), kl_coef, tl.float64)
    entropy_coef = tl.full((), entropy_coef, tl.float64)
    if values is not None:
        kl_coef, entropy_coef = tl.load(values + 7), tl.load(values + 8)
    idle = (tl.load(advantages + row) == 0.0) & (kl_coef == 0.0) & (entropy_coef == 0.0)
    if gradient is not None:
        gradient = start(gradient, row, inner_rows, gradient_outer, gradient_inner)
    if (label == ignore_index) | idle:
        put_zeros(logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy, row)
        put(losses, row, tl.full((), 0.0, tl.float32))
        put(ratios, row, tl.full((), 0.0, tl.float32))
        tl.store(clipped + row, False)
        if gradient is not None:
            fill(gradient, vocabulary, tl.full((), 0.0, tl.float32), BACKWARD_BLOCK)
        return
    label, unit, inner, policy, top, total, q, own, offset, spread, advantage = score(
        policy, positive, negative, advantages, negative_mask, values,
        logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy,
        policy_outer, policy_inner, positive_outer, positive_inner, negative_outer, negative_inner,
        row, inner_rows, label, vocabulary, scale, cap, temperature, temperatures, lam, eps_w,
        SOFTCAP, entropy is not None, BLOCK, UNROLL,
    )  # fmt: skip

    low = 1.0 - tl.full((), clip_low, tl.float64)
    high = 1.0 + tl.full((), clip_high, tl.float64)
    denominator = tl.full((), denominator, tl.float64)
    if values is not None:
        low, high, denominator = 1.0 - tl.load(values + 5), 1.0 + tl.load(values + 6), tl.load(values + 9)
    seen = own.to(tl.float32).to(tl.float64)  # as the caller sees it: the same bits in old_logprobs make the ratio 1
    ratio = tl.where(seen == seen, tl.full((), 1.0, tl.float64), seen)
    if old_logprobs is not None:
        old = tl.load(old_logprobs + row).to(tl.float64)
        ratio = tl.where(seen == old, 1.0, tl.exp(seen - old))
    below = ratio < low
    above = ratio > high
    if not CISPO:
        below &= advantage < 0.0
        above &= advantage > 0.0
    held = below | above
    pull = -advantage * tl.where(below, low, tl.where(above, high, ratio))
    if token_weight is not None:
        pull *= tl.load(token_weight + row).to(tl.float64)
    pull = tl.where(advantage == 0.0, 0.0, pull)
    if CISPO:
        loss = tl.where(pull == 0.0, 0.0, pull * seen)
        g = pull
    else:
        loss = pull
        g = tl.where(held, 0.0, pull)
    if ref_logprobs is not None:
        ref = tl.load(ref_logprobs + row).to(tl.float64)
        distance = tl.where(seen == ref, 0.0, ref - seen)
        gain = _expm1(distance)
        loss += tl.where(kl_coef == 0.0, 0.0, kl_coef * (gain - distance))
        g -= tl.where(kl_coef == 0.0, 0.0, kl_coef * gain)
    h = tl.full((), 0.0, tl.float32)
    if entropy is not None:
        loss -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * spread)
        h = (-entropy_coef / denominator).to(tl.float32)
    put(losses, row, loss)
    put(ratios, row, ratio)
    tl.store(clipped + row, held)

    if gradient is not None:
        g = (g / denominator).to(tl.float32)
        wanted = (g != 0.0) | (h != 0.0)
        if wanted & (label >= 0):
            at_label = g.to(tl.float64) * q.to(tl.float64)
            if entropy is not None:
                at_label -= entropy_at_label(h, own, spread)
            write_gradient(
                gradient, policy, vocabulary, label, unit, inner, g, h, at_label.to(tl.float32), top, total, q, offset,
                SOFTCAP, entropy is not None, BACKWARD_BLOCK,
            )  # fmt: skip
        else:
            fill(gradient, vocabulary, tl.where(wanted, float("nan"), 0.0), BACKWARD_BLOCK)


@triton.jit
def rescale_kernel(gradient, factor, size: tl.int64, BLOCK: tl.constexpr):
    """Multiply in place by a number on the device; where it is 1 nothing is read."""
    scale = tl.load(factor)
    if scale != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + index, mask=index < size).to(tl.float32)
        tl.store(gradient + index, (x * scale).to(gradient.dtype.element_ty), mask=index < size)
