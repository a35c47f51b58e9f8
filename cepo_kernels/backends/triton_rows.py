"""The row kernels in Triton, for NVIDIA and AMD. The arithmetic is the contract:

- One program per row. The label's column never enters a maximum or a sum. Of the other columns j, in units x_j that
  are the logits as stored, or ``tanh(scale x / cap)`` under a soft cap, with k log2 units each:
  ``M = max x_j``, ``S = sum e_j``, ``e_j = 2^((x_j - M) k)``. The subtraction comes before the product, so that an
  offset common to the row costs nothing.
- Column j belongs to lane j mod BLOCK, four columns of a lane at a time, in order. BLOCK depends on V alone, every
  product-sum that is to be fused is written so, and the compiler is told to fuse no other.
- Lanes merge in fixed point, whose sums do not depend on their order: neither the threads of a program nor the
  alignment of a row, which decide how lanes are laid out, can change a bit.
- A maximum starts at the lowest finite number, not at -inf: then -inf - M is never NaN, a NaN or +inf anywhere makes
  S NaN, and finfo.min is a number like any other.
- For the entropy, ``R = S - 1`` and ``U = sum (x_j - M) k e_j`` are summed on their own, as every term but the
  maximum's own, so that a row whose mass is in one column keeps its digits. S does not depend on it.
- Scalars of a row are float64 and rounded once. ``stats`` are (M, S, 1 - p, log p_M + entropy), p_M that of M's column.
"""

# mypy: ignore-errors
# The bodies are Triton's language, in which Python's types mean nothing.

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
VANISHED = tl.constexpr(-200.0)  # 2^-200 is 0 in float32; keeps -inf out of products with 0


@triton.jit
def _tanh(z):
    """Within 1.2e-7 of tanh(z): an odd polynomial below 1, where 1 - 2 / (e^2z + 1) would cancel."""
    a = tl.abs(z)
    a2 = a * a
    near = tl.fma(a2, 1.2039187e-4, -8.3678576e-4)
    near = tl.fma(near, a2, 3.0714588e-3)
    near = tl.fma(near, a2, -8.589019e-3)
    near = tl.fma(near, a2, 2.1781847e-2)
    near = tl.fma(near, a2, -5.3952362e-2)
    near = tl.fma(near, a2, 0.13333191)
    near = tl.fma(near, a2, -0.33333328)
    near = tl.fma(a * a2, near, a)
    e = tl.exp2(a * (-2.0 * LOG2E))
    t = tl.where(a < 1.0, near, 1.0 - (e + e) / (1.0 + e))
    return tl.where(z < 0.0, -t, t)


@triton.jit
def _units(raw, inner_high, inner_low, SOFTCAP: tl.constexpr):
    """Stored logits as float32 in the units of M. The cap must not hide a +inf."""
    x = raw.to(tl.float32)
    if SOFTCAP:
        finite = tl.maximum(x, LOWEST)  # -inf times a rounding error of 0 would be NaN
        x = tl.where(x == float("inf"), x, _tanh(tl.fma(finite, inner_high, finite * inner_low)))
    return x


@triton.jit
def _load(row, columns, vocabulary, label, inner_high, inner_low, SOFTCAP: tl.constexpr, EDGE: tl.constexpr):
    if EDGE:
        inside = columns < vocabulary
        x = _units(tl.load(row + columns, mask=inside), inner_high, inner_low, SOFTCAP)
        return tl.where(inside & (columns != label), x, float("-inf"))
    return _units(tl.load(row + columns), inner_high, inner_low, SOFTCAP)


@triton.jit
def _load_all(
    row, columns, vocabulary, label, inner_high, inner_low,
    SOFTCAP: tl.constexpr, EDGE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    loaded = ()
    for i in tl.static_range(UNROLL):
        of = columns + i * columns.shape[0]
        loaded = loaded + (_load(row, of, vocabulary, label, inner_high, inner_low, SOFTCAP, EDGE),)  # noqa: RUF005
    return loaded


@triton.jit
def _lanes(
    row, vocabulary, label, k, inner_high, inner_low,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Per lane: maximum m; s = sum e; and for the entropy r = sum of the e below the maximum, n = how many are at it,
    u = sum (x - m) k e."""
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)
    n = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, UNROLL * BLOCK):
        stop = start + UNROLL * BLOCK
        columns = start + lane
        if (stop > vocabulary) | ((label >= start) & (label < stop)):
            xs = _load_all(row, columns, vocabulary, label, inner_high, inner_low, SOFTCAP, True, UNROLL)
        else:
            xs = _load_all(row, columns, vocabulary, label, inner_high, inner_low, SOFTCAP, False, UNROLL)
        top = m
        for i in tl.static_range(UNROLL):
            top = tl.maximum(top, xs[i])
        same = m == top
        shift = (m - top) * k
        factor = tl.exp2(shift)
        # Each step is summed by itself first: the long sum then takes one rounding a step, not one a column.
        sum_e = tl.zeros((BLOCK,), tl.float32)
        sum_te = tl.zeros((BLOCK,), tl.float32)
        below = tl.zeros((BLOCK,), tl.float32)
        old_n, n = n, tl.where(same, n, 0.0)
        for i in tl.static_range(UNROLL):
            t = (xs[i] - top) * k
            e = tl.exp2(t)
            sum_e += e
            if ENTROPY:
                at_top = xs[i] == top
                sum_te = tl.fma(tl.maximum(t, VANISHED), e, sum_te)
                below += tl.where(at_top, 0.0, e)
                n += tl.where(at_top, 1.0, 0.0)
        if ENTROPY:
            u = tl.fma(factor, tl.fma(tl.maximum(shift, VANISHED), s, u), sum_te)
            r = tl.fma(factor, r + tl.where(same, 0.0, old_n), below)
        s = tl.fma(factor, s, sum_e)
        m = top
    return m, s, r, n, u


@triton.jit
def _total(lanes):
    """Sum of numbers >= 0 to 2^-32 of the largest, in float64 and the same in any order."""
    power = tl.max(lanes, 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = (0x7F000000 - power).to(tl.float32, bitcast=True)
    total = tl.sum((lanes * unit * 4294967296.0).to(tl.int64), 0).to(tl.float64)
    return total * 2.3283064365386963e-10 * power.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 in float64: what 1 + x rounds away is put back."""
    y = 1.0 + x
    rounded_away = y == 1.0
    return tl.where(rounded_away, x, tl.log(y) * x / tl.where(rounded_away, 1.0, y - 1.0))


@triton.jit
def _tanh64(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _sums(
    row, vocabulary, label, unit, inner,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """S and M, and for the entropy R and -U / S in nats. Nothing is read where the label is negative.

    M is +inf where a column other than the label's is +inf or NaN.
    """
    k = (unit * LOG2E).to(tl.float32)
    inner_high = inner.to(tl.float32)
    inner_low = (inner - inner_high.to(tl.float64)).to(tl.float32)
    columns = tl.where(label >= 0, vocabulary, 0)
    m, s, r, n, u = _lanes(row, columns, label, k, inner_high, inner_low, SOFTCAP, ENTROPY, BLOCK, UNROLL)
    top = tl.max(tl.where(s == s, m, float("inf")), 0)
    factor = tl.exp2((m - top) * k)
    # The lane at the top holds 1 or more: 2^-34 is small enough a unit, and large enough for 2^28 columns.
    total = tl.sum((s * factor * 17179869184.0).to(tl.int64), 0).to(tl.float64) * 5.820766091346741e-11
    rest = total
    mean = total
    if ENTROPY:
        at_top = m == top
        rest = _total(tl.where(at_top, r, (r + n) * factor))
        count = tl.sum(tl.where(at_top, n, 0.0).to(tl.int32), 0)
        rest += tl.where(count > 0, count - 1, 0).to(tl.float64)
        shift = tl.maximum((m - top) * k, VANISHED)
        mean = _total(-factor * tl.fma(shift, s, u)) * LN2 / (1.0 + rest)
    return total, top, rest, mean


@triton.jit
def _label_logit(row, label):
    x = tl.load(row + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    return tl.where(x == float("inf"), float("nan"), x)


@triton.jit
def _odds(total, top, x, unit, inner, SOFTCAP: tl.constexpr):
    """The log-odds against the label, from what `_sums` found."""
    x = x.to(tl.float64)
    if SOFTCAP:
        x = _tanh64(x * inner)
    log_total = tl.where(total > 0.0, tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    odds = log_total + (top.to(tl.float64) - x) * unit
    return tl.where(top < float("inf"), odds, float("nan"))


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
    total, top, rest, mean = _sums(policy, vocabulary, label, unit, inner, SOFTCAP, entropy is not None, BLOCK, UNROLL)
    positive_total, positive_top = total, top
    if positive is not None:
        positive = _start(positive, row, inner_rows, positive_outer, positive_inner)
        positive_total, positive_top, _, _ = _sums(
            positive, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
        )
    negative_total, negative_top = total, top
    used = label == label
    if negative is not None:
        if negative_mask is not None:
            used = tl.load(negative_mask + row) != 0
        negative = _start(negative, row, inner_rows, negative_outer, negative_inner)
        if used:
            negative_total, negative_top, _, _ = _sums(
                negative, vocabulary, label, unit, inner, SOFTCAP, False, BLOCK, UNROLL
            )

    # Last, and not each beside its sums: a value less to hold through the loops over the next rows.
    x = _label_logit(policy, label)
    positive_x, negative_x = x, x
    if positive is not None:
        positive_x = _label_logit(positive, label)
    if negative is not None:
        negative_x = _label_logit(negative, tl.where(used, label, -1))
        negative_x = tl.where(used, negative_x, x)

    # Float64 is dear on most GPUs, and every thread would do it for each of the three: let lanes share it.
    index = tl.arange(0, 4)
    odds = _odds(
        _three(index, total, positive_total, negative_total), _three(index, top, positive_top, negative_top),
        _three(index, x, positive_x, negative_x), unit, inner, SOFTCAP,
    )  # fmt: skip
    e = tl.exp(-tl.abs(odds))
    tail = _log1p(e)
    log_p = -(tl.where(odds > 0.0, odds, 0.0) + tail)
    own = _pick(index, log_p, 0)
    q = _pick(index, tl.where(odds > 0.0, 1.0, e) / (1.0 + e), 0)
    _put(logprobs, row, own)
    offset = q
    if entropy is not None:
        p = _pick(index, tl.where(odds > 0.0, e, 1.0) / (1.0 + e), 0)
        log_q = _pick(index, -(tl.where(odds < 0.0, -odds, 0.0) + tail), 0)
        log_p_top = tl.where(q == 0.0, 0.0, log_q - _log1p(rest))
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
            x = _units(raw, inner_high, inner_low, SOFTCAP)
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
