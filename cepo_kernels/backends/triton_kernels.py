"""The Triton kernels, for NVIDIA and AMD: everything a call can ask for of a row, and its gradient."""

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
def options(values, scale, cap, temperature, temperatures, row, SOFTCAP: tl.constexpr):
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
def start(logits, row, inner_rows, outer_stride, inner_stride):
    return logits + (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride


@triton.jit
def put(out, row, value):
    if out is not None:
        tl.store(out + row, value.to(tl.float32))


@triton.jit
def put_zeros(logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy, row):
    zero = tl.full((), 0.0, tl.float32)
    put(logprobs, row, zero)
    put(positive_logprobs, row, zero)
    put(negative_logprobs, row, zero)
    put(evidence, row, zero)
    put(weight, row, zero)
    put(token_advantages, row, zero)
    put(entropy, row, zero)


@triton.jit
def score(
    policy, positive, negative, advantages, negative_mask, values,
    logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy,
    policy_outer, policy_inner, positive_outer, positive_inner, negative_outer, negative_inner,
    row, inner_rows, label, vocabulary, scale, cap, temperature, temperatures, lam, eps_w,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """All that is written about one scored row; and its label (-1: no column), unit and inner factor (see `options`),
    where the policy's row begins, and of it M, S, 1 - p, log p, log p_M + H, H, and the token advantage.

    The policy is read last, so that a gradient finds it in the cache.
    """
    label = tl.where((label >= 0) & (label < vocabulary), label, -1).to(tl.int32)
    unit, inner = options(values, scale, cap, temperature, temperatures, row, SOFTCAP)
    policy = start(policy, row, inner_rows, policy_outer, policy_inner)
    if positive is not None:
        positive = start(positive, row, inner_rows, positive_outer, positive_inner)
    if negative is not None:
        negative = start(negative, row, inner_rows, negative_outer, negative_inner)
    positive_total, positive_origin = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if positive is not None:
        positive_total, _, positive_origin, _, _ = sums(
            positive, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
        )
    negative_total, negative_origin = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    used = label == label
    if negative is not None:
        if negative_mask is not None:
            used = tl.load(negative_mask + row) != 0
        if used:
            negative_total, _, negative_origin, _, _ = sums(
                negative, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
            )
    total, top, origin, rest, mean = sums(policy, vocabulary, label, unit, inner, SOFTCAP, ENTROPY, BLOCK, UNROLL)

    # Last, and not each beside its sums: a value less to hold through the loops over the next rows.
    x = label_logit(policy, label)
    positive_x, negative_x = x, x
    if positive is not None:
        positive_x = label_logit(positive, label)
    if negative is not None:
        negative_x = label_logit(negative, tl.where(used, label, -1))

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
    put(logprobs, row, own)
    offset = q
    spread = q
    if ENTROPY:
        p = _pick(index, tl.where(odds > 0.0, e, 1.0) / (1.0 + e), 0)
        log_q = _pick(index, -(tl.where(odds < 0.0, -odds, 0.0) + tail), 0)
        log_p_top = tl.where(q == 0.0, 0.0, log_q - log1p(rest))
        spread = tl.where(p == 0.0, 0.0, -p * own) + tl.where(q == 0.0, 0.0, q * (mean - log_p_top))
        put(entropy, row, spread)
        offset = log_p_top + spread

    under_negative = own
    if negative is not None:
        under_negative = tl.where(used, _pick(index, log_p, 2), own)
        put(negative_logprobs, row, under_negative)
    group = tl.full((), 0.0, tl.float64)
    if advantages is not None:
        group = tl.load(advantages + row).to(tl.float64)
    if positive is not None:
        under_positive = _pick(index, log_p, 1)
        put(positive_logprobs, row, under_positive)
        both_impossible = (under_positive == float("-inf")) & (under_negative == float("-inf"))
        gap = tl.where(both_impossible, 0.0, under_positive - under_negative)
        put(evidence, row, gap)
        if advantages is not None:
            lam = tl.full((), lam, tl.float64)
            eps_w = tl.full((), eps_w, tl.float64)
            if values is not None:
                lam, eps_w = tl.load(values + 3), tl.load(values + 4)
            sign = tl.where(group > 0.0, 1.0, tl.where(group < 0.0, -1.0, group))
            ratio = tl.exp(sign * gap)
            clipped = tl.where(ratio < 1.0 - eps_w, 1.0 - eps_w, tl.where(ratio > 1.0 + eps_w, 1.0 + eps_w, ratio))
            clipped = tl.where(group == 0.0, 1.0, clipped)
            put(weight, row, clipped)
            group = tl.where(group == 0.0, 0.0, group * ((1.0 - lam) + lam * clipped))
    put(token_advantages, row, group)
    total, q, offset = total.to(tl.float32), q.to(tl.float32), offset.to(tl.float32)
    return label, unit, inner, policy, top, total, q, own, offset, spread, group


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
        put_zeros(logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy, row)
        return
    _, _, _, _, top, total, q, _, offset, _, _ = score(
        policy, positive, negative, advantages, negative_mask, values,
        logprobs, positive_logprobs, negative_logprobs, evidence, weight, token_advantages, entropy,
        policy_outer, policy_inner, positive_outer, positive_inner, negative_outer, negative_inner,
        row, inner_rows, label, vocabulary, scale, cap, temperature, temperatures, lam, eps_w,
        SOFTCAP, entropy is not None, BLOCK, UNROLL,
    )  # fmt: skip
    tl.store(stats + row * 4, top)
    tl.store(stats + row * 4 + 1, total)
    tl.store(stats + row * 4 + 2, q)
    tl.store(stats + row * 4 + 3, offset)


@triton.jit
def fill(into, vocabulary, value, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    fill = tl.zeros((BLOCK,), tl.float32) + value
    for start in range(0, vocabulary, BLOCK):
        columns = start + lane
        tl.store(into + columns, fill.to(into.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def cap_slope(raw, inner):
    """1 - tanh^2 = 4 e / (1 + e)^2, e = exp(-2 |z|), to full relative precision."""
    e = tl.exp2(tl.abs(raw * inner) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def write_gradient(
    into, source, vocabulary, label, unit, inner, g, h, at_label, top, total, complement, offset,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``at_label`` at the label, ``-p_j (g + h (log p_j + H))`` elsewhere, times dx'/dx; all float32 but ``unit``."""
    k = unit * LOG2E
    k_high = k.to(tl.float32)
    k_low = (k - k_high.to(tl.float64)).to(tl.float32)
    inner_high = inner.to(tl.float32)
    inner_low = (inner - inner_high.to(tl.float64)).to(tl.float32)
    slope = unit.to(tl.float32)
    if SOFTCAP:
        slope = (unit * inner).to(tl.float32)
    total = tl.where(complement == 0.0, 1.0, total).to(tl.float64)
    factor = tl.where(complement == 0.0, 0.0, complement.to(tl.float64) / total).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        columns = start + lane
        inside = columns < vocabulary
        raw = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
        x = units(raw, inner_high, inner_low, SOFTCAP)
        t = x - top
        t = tl.fma(t, k_high, tl.maximum(t, LOWEST) * k_low)
        change = g
        if ENTROPY:
            change = tl.fma(h, tl.fma(tl.maximum(t, VANISHED), LN2, offset), g)
        value = tl.where(columns == label, at_label, -(change * (tl.exp2(t) * factor))) * slope
        if SOFTCAP:
            value *= cap_slope(raw, inner_high)
        tl.store(into + columns, value.to(into.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["inner_rows", "ignore_index"])
def backward_kernel(
    gradient, policy, labels, grad_logprobs, grad_entropy, logprobs, entropy, stats, temperatures, values,
    gradient_outer: tl.int64, gradient_inner: tl.int64, policy_outer: tl.int64, policy_inner: tl.int64,
    inner_rows: tl.int64, vocabulary: tl.int32, ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, temperature: tl.float64,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row, where g and h are the upstream gradients of log p and of the entropy H."""
    row = tl.program_id(0).to(tl.int64)
    into = start(gradient, row, inner_rows, gradient_outer, gradient_inner)
    label = tl.load(labels + row)
    scored = label != ignore_index
    g = tl.full((), 0.0, tl.float32)
    h = tl.full((), 0.0, tl.float32)
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row, mask=scored, other=0.0)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row, mask=scored, other=0.0)
    wanted = scored & ((g != 0.0) | (h != 0.0))
    if wanted & (label >= 0) & (label < vocabulary):
        unit, inner = options(values, scale, cap, temperature, temperatures, row, SOFTCAP)
        complement = tl.load(stats + row * 4 + 2)
        at_label = g.to(tl.float64) * complement.to(tl.float64)
        if grad_entropy is not None:
            at_label -= entropy_at_label(h, tl.load(logprobs + row).to(tl.float64), tl.load(entropy + row))
        write_gradient(
            into, start(policy, row, inner_rows, policy_outer, policy_inner), vocabulary, label.to(tl.int32),
            unit, inner, g, h, at_label.to(tl.float32), tl.load(stats + row * 4), tl.load(stats + row * 4 + 1),
            complement, tl.load(stats + row * 4 + 3), SOFTCAP, grad_entropy is not None, BLOCK,
        )  # fmt: skip
    else:
        fill(into, vocabulary, tl.where(wanted, float("nan"), 0.0), BLOCK)


@triton.jit
def entropy_at_label(h, logprob, spread):
    """h p (log p + H)."""
    p = tl.exp(logprob)
    return h.to(tl.float64) * tl.where(p == 0.0, 0.0, p * (logprob + spread.to(tl.float64)))
