"""The two Triton kernels, for NVIDIA and AMD: everything a call can ask for of a row, and the gradient of one."""

# mypy: ignore-errors
# The bodies are Triton's language, in which Python's types mean nothing.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import LN2, LOG2E, LOWEST, VANISHED, label_logit, log1p, odds_against, sums, units


@triton.jit
def _three(index, a, b, c):
    return tl.where(index == 0, a, tl.where(index == 1, b, c))


@triton.jit
def _pick(index, values, which: tl.constexpr):
    return tl.sum(tl.where(index == which, values, 0.0), 0)


@triton.jit
def _options(values, scale, cap, temperature, temperatures, row, SOFTCAP: tl.constexpr):
    """A unit of M in natural units of x', and the factor before the tanh: from arguments, or values on the device."""
    scale = tl.full((), scale, tl.float64)
    cap = tl.full((), cap, tl.float64)
    temperature = tl.full((), temperature, tl.float64)
    if values is not None:
        scale, cap, temperature = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    if temperatures is not None:
        temperature = tl.load(temperatures + row).to(tl.float64)
    if SOFTCAP:
        return cap / temperature, scale / cap
    return scale / temperature, scale


@triton.jit
def _start(logits, row, inner_rows, outer_stride, inner_stride):
    return logits + (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride


@triton.jit
def _put(out, row, value):
    if out is not None:
        tl.store(out + row, value.to(tl.float32))


@triton.jit(do_not_specialize=["inner_rows", "ignore_index"])
def forward_kernel(
    policy, positive, negative, labels, advantages, negative_mask, temperatures, values,
    logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy, stats,
    policy_outer: tl.int64, policy_inner: tl.int64, positive_outer: tl.int64, positive_inner: tl.int64,
    negative_outer: tl.int64, negative_inner: tl.int64, inner_rows: tl.int64, vocabulary: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, temperature: tl.float64, lam: tl.float64, eps_w: tl.float64,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Everything that the call asked for of one row: a tensor that is None was not given or not asked for."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == ignore_index:
        zero = tl.full((), 0.0, tl.float32)
        _put(logprobs, row, zero)
        _put(positive_logprobs, row, zero)
        _put(negative_logprobs, row, zero)
        _put(evidence, row, zero)
        _put(weight, row, zero)
        _put(token_advantages, row, zero)
        _put(entropy, row, zero)
        return
    label = tl.where((label >= 0) & (label < vocabulary), label, -1).to(tl.int32)
    unit, inner = _options(values, scale, cap, temperature, temperatures, row, SOFTCAP)

    policy = _start(policy, row, inner_rows, policy_outer, policy_inner)
    total, top, origin, rest, mean = sums(
        policy, vocabulary, label, unit, inner, SOFTCAP, entropy is not None, BLOCK, UNROLL
    )
    positive_total, positive_origin = total, origin
    if positive is not None:
        positive = _start(positive, row, inner_rows, positive_outer, positive_inner)
        positive_total, _, positive_origin, _, _ = sums(
            positive, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
        )
    negative_total, negative_origin = total, origin
    used = label == label
    if negative is not None:
        if negative_mask is not None:
            used = tl.load(negative_mask + row) != 0
        negative = _start(negative, row, inner_rows, negative_outer, negative_inner)
        if used:
            negative_total, _, negative_origin, _, _ = sums(
                negative, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
            )

    # Last, and not each beside its sums: a value less to hold through the loops over the next rows.
    x = label_logit(policy, label)
    positive_x, negative_x = x, x
    if positive is not None:
        positive_x = label_logit(positive, label)
    if negative is not None:
        negative_x = label_logit(negative, tl.where(used, label, -1))
        negative_x = tl.where(used, negative_x, x)

    # Float64 is dear on most GPUs, and every thread would do it for each of the three: let lanes share it.
    index = tl.arange(0, 4)
    odds = odds_against(
        _three(index, total, positive_total, negative_total), _three(index, origin, positive_origin, negative_origin),
        _three(index, x, positive_x, negative_x), unit, inner, SOFTCAP,
    )  # fmt: skip
    e = tl.exp(-tl.abs(odds))
    tail = log1p(e)
    log_p = -(tl.where(odds > 0.0, odds, 0.0) + tail)
    own = _pick(index, log_p, 0)
    q = _pick(index, tl.where(odds > 0.0, 1.0, e) / (1.0 + e), 0)
    _put(logprobs, row, own)
    offset = q
    if entropy is not None:
        p = _pick(index, tl.where(odds > 0.0, e, 1.0) / (1.0 + e), 0)
        log_q = _pick(index, -(tl.where(odds < 0.0, -odds, 0.0) + tail), 0)
        log_p_top = tl.where(q == 0.0, 0.0, log_q - log1p(rest))
        spread = tl.where(p == 0.0, 0.0, -p * own) + tl.where(q == 0.0, 0.0, q * (mean - log_p_top))
        _put(entropy, row, spread)
        offset = log_p_top + spread
    tl.store(stats + row * 4, top)
    tl.store(stats + row * 4 + 1, total.to(tl.float32))
    tl.store(stats + row * 4 + 2, q.to(tl.float32))
    tl.store(stats + row * 4 + 3, offset.to(tl.float32))

    under_negative = _pick(index, log_p, 2)
    if negative is not None:
        _put(negative_logprobs, row, under_negative)
    group = tl.full((), 0.0, tl.float64)
    if advantages is not None:
        group = tl.load(advantages + row).to(tl.float64)
    if positive is not None:
        under_positive = _pick(index, log_p, 1)
        _put(positive_logprobs, row, under_positive)
        both_impossible = (under_positive == float("-inf")) & (under_negative == float("-inf"))
        gap = tl.where(both_impossible, 0.0, under_positive - under_negative)
        _put(evidence, row, gap)
        if advantages is not None:
            lam = tl.full((), lam, tl.float64)
            eps_w = tl.full((), eps_w, tl.float64)
            if values is not None:
                lam, eps_w = tl.load(values + 3), tl.load(values + 4)
            sign = tl.where(group > 0.0, 1.0, tl.where(group < 0.0, -1.0, group))
            ratio = tl.exp(sign * gap)
            clipped = tl.where(ratio < 1.0 - eps_w, 1.0 - eps_w, tl.where(ratio > 1.0 + eps_w, 1.0 + eps_w, ratio))
            clipped = tl.where(group == 0.0, 1.0, clipped)
            _put(weight, row, clipped)
            group = tl.where(group == 0.0, 0.0, group * ((1.0 - lam) + lam * clipped))
    _put(token_advantages, row, group)


@triton.jit(do_not_specialize=["inner_rows", "ignore_index"])
def backward_kernel(
    gradient, policy, labels, grad_logprobs, grad_entropy, logprobs, entropy, stats, temperatures, values,
    gradient_outer: tl.int64, gradient_inner: tl.int64, policy_outer: tl.int64, policy_inner: tl.int64,
    inner_rows: tl.int64, vocabulary: tl.int32, ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, temperature: tl.float64,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row: ``g (1 - p) - h p (log p + H)`` at the label, ``-p_j (g + h (log p_j + H))`` elsewhere,
    times dx'/dx, where g and h are the upstream gradients of log p and of the entropy H."""
    row = tl.program_id(0).to(tl.int64)
    into = _start(gradient, row, inner_rows, gradient_outer, gradient_inner)
    label = tl.load(labels + row)
    scored = label != ignore_index
    g = tl.full((), 0.0, tl.float32)
    h = tl.full((), 0.0, tl.float32)
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row, mask=scored, other=0.0)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row, mask=scored, other=0.0)
    wanted = scored & ((g != 0.0) | (h != 0.0))
    valid = (label >= 0) & (label < vocabulary)
    label = label.to(tl.int32)
    lane = tl.arange(0, BLOCK)
    if wanted & valid:
        unit, inner = _options(values, scale, cap, temperature, temperatures, row, SOFTCAP)
        k = unit * LOG2E
        k_high = k.to(tl.float32)
        k_low = (k - k_high.to(tl.float64)).to(tl.float32)
        inner_high = inner.to(tl.float32)
        inner_low = (inner - inner_high.to(tl.float64)).to(tl.float32)
        slope = unit.to(tl.float32)
        if SOFTCAP:
            slope = (unit * inner).to(tl.float32)
        top = tl.load(stats + row * 4)
        total = tl.load(stats + row * 4 + 1).to(tl.float64)
        complement = tl.load(stats + row * 4 + 2).to(tl.float64)
        factor = tl.where(complement == 0.0, 0.0, complement / tl.where(complement == 0.0, 1.0, total)).to(tl.float32)
        at_label = g.to(tl.float64) * complement
        offset = tl.load(stats + row * 4 + 3)
        if grad_entropy is not None:
            logprob = tl.load(logprobs + row).to(tl.float64)
            p = tl.exp(logprob)
            spread = tl.load(entropy + row).to(tl.float64)
            at_label -= h.to(tl.float64) * tl.where(p == 0.0, 0.0, p * (logprob + spread))
        at_label = at_label.to(tl.float32)
        source = _start(policy, row, inner_rows, policy_outer, policy_inner)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lane
            inside = columns < vocabulary
            raw = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
            x = units(raw, inner_high, inner_low, SOFTCAP)
            t = x - top
            t = tl.fma(t, k_high, tl.maximum(t, LOWEST) * k_low)
            change = g
            if grad_entropy is not None:
                change = tl.fma(h, tl.fma(tl.maximum(t, VANISHED), LN2, offset), g)
            value = tl.where(columns == label, at_label, -(change * (tl.exp2(t) * factor))) * slope
            if SOFTCAP:
                # 1 - tanh^2 = 4 e / (1 + e)^2, e = exp(-2 |z|), to full relative precision.
                e = tl.exp2(tl.abs(raw * inner_high) * (-2.0 * LOG2E))
                value *= 4.0 * e / ((1.0 + e) * (1.0 + e))
            tl.store(into + columns, value.to(into.dtype.element_ty), mask=inside)
    else:
        fill = tl.zeros((BLOCK,), tl.float32) + tl.where(wanted, float("nan"), 0.0)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lane
            tl.store(into + columns, fill.to(into.dtype.element_ty), mask=columns < vocabulary)
