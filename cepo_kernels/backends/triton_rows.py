"""One row of logits in Triton. The arithmetic is the contract:

- One program per row. The label's column never enters a maximum or a sum. Of the other columns j, in units x_j that
  are the logits as stored, or ``tanh(scale x / cap)`` under a soft cap, with k log2 units each:
  ``M = max x_j``, ``S = sum e_j``, ``e_j = 2^((x_j - M) k)``. The subtraction comes before the product, so that an
  offset common to the row costs nothing.
- Column j belongs to lane j mod BLOCK, and a lane takes UNROLL columns at a time, in order. BLOCK depends on V alone,
  UNROLL on whether there is a cap; products and sums are fused where the code says so and nowhere else.
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
def tanh(z):
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
def units(raw, inner_high, inner_low, SOFTCAP: tl.constexpr):
    """Stored logits, float32, in the units of M. The cap must hide neither +inf nor, as a maximum does, NaN."""
    x = raw
    if SOFTCAP:
        finite = tl.maximum(x, LOWEST)  # -inf times a rounding error of 0 would be NaN
        x = tl.where(x < float("inf"), tanh(tl.fma(finite, inner_high, finite * inner_low)), x)
    return x


@triton.jit
def chosen(x, columns, threshold, last):
    """Whether logits are above the threshold, or equal it no later than in column ``last``."""
    return (x > threshold) | ((x == threshold) & (columns <= last))


@triton.jit
def _load_all(
    row, columns, vocabulary, label, inner_high, inner_low, order, pick,
    SOFTCAP: tl.constexpr, EDGE: tl.constexpr, UNROLL: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """UNROLL columns of every lane, and the highest of their stored logits, which only a cap has a use for."""
    loaded = ()
    highest = tl.full((columns.shape[0],), float("-inf"), tl.float32)
    for i in tl.static_range(UNROLL):
        of = columns + i * columns.shape[0]
        if EDGE:
            raw = tl.load(row + of, mask=of < vocabulary).to(tl.float32)
            counts = (of < vocabulary) & (of != label)
            if order is not None:
                key = tl.load(order + of, mask=of < vocabulary, other=float("-inf")).to(tl.float32)
                counts &= chosen(key, of, pick[0], pick[1]) == CHOSEN
            raw = tl.where(counts, raw, float("-inf"))
            x = tl.where(counts, units(raw, inner_high, inner_low, SOFTCAP), float("-inf"))
        else:
            raw = tl.load(row + of).to(tl.float32)
            x = units(raw, inner_high, inner_low, SOFTCAP)
        if SOFTCAP:
            highest = tl.maximum(highest, raw)
        loaded = loaded + (x,)  # noqa: RUF005
    return loaded, highest


@triton.jit
def _lanes(
    row, vocabulary, label, k, inner_high, inner_low, order, pick,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Per lane: maximum m; s = sum e; and for the entropy r = sum of the e below the maximum, n = how many are at it,
    u = sum (x - m) k e; highest is the stored logit behind m."""
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)
    n = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, UNROLL * BLOCK):
        stop = start + UNROLL * BLOCK
        columns = start + lane
        if (order is not None) | (stop > vocabulary) | ((label >= start) & (label < stop)):
            xs, high = _load_all(
                row, columns, vocabulary, label, inner_high, inner_low, order, pick, SOFTCAP, True, UNROLL, CHOSEN
            )
        else:
            xs, high = _load_all(
                row, columns, vocabulary, label, inner_high, inner_low, None, pick, SOFTCAP, False, UNROLL, CHOSEN
            )
        if SOFTCAP:
            highest = tl.maximum(highest, high)
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
    return m, s, r, n, u, highest


@triton.jit
def _total(lanes):
    """Sum of numbers >= 0 to 2^-32 of the largest, in float64 and the same in any order."""
    power = tl.max(lanes, 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = (0x7F000000 - power).to(tl.float32, bitcast=True)
    total = tl.sum((lanes * unit * 4294967296.0).to(tl.int64), 0).to(tl.float64)
    return total * 2.3283064365386963e-10 * power.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def log1p(x):
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
def sums(
    row, vocabulary, label, unit, inner,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    order=None, pick=None, CHOSEN: tl.constexpr = True,
):  # fmt: skip
    """S, M, M in float64, and for the entropy R and -U / S in nats. Nothing is read where the label is negative.

    M is +inf where a column other than the label's is +inf or NaN. With ``order``, another row, only columns that are,
    or are not, `chosen` by it and ``pick`` count.
    """
    k = (unit * LOG2E).to(tl.float32)
    inner_high = inner.to(tl.float32)
    inner_low = (inner - inner_high.to(tl.float64)).to(tl.float32)
    columns = tl.where(label >= 0, vocabulary, 0)
    m, s, r, n, u, highest = _lanes(
        row, columns, label, k, inner_high, inner_low, order, pick, SOFTCAP, ENTROPY, BLOCK, UNROLL, CHOSEN
    )
    top = tl.max(tl.where(s == s, m, float("inf")), 0)
    factor = tl.exp2((m - top) * k)
    # The lane at the top holds 1 or more: 2^-34 is small enough a unit, and large enough for 2^28 columns.
    total = tl.sum((s * factor * 17179869184.0).to(tl.int64), 0).to(tl.float64) * 5.820766091346741e-11
    origin = top.to(tl.float64)
    if SOFTCAP:
        # The tanh in float32 is what limits a capped row. The column at M, whose share is 1 / S, is corrected here.
        exact = _tanh64(tl.max(highest, 0).to(tl.float64) * inner)
        origin += tl.where((total > 0.0) & (exact == exact), (exact - origin) / tl.where(total > 0.0, total, 1.0), 0.0)
    rest = total
    mean = total
    if ENTROPY:
        at_top = m == top
        rest = _total(tl.where(at_top, r, (r + n) * factor))
        count = tl.sum(tl.where(at_top, n, 0.0).to(tl.int32), 0)
        rest += tl.where(count > 0, count - 1, 0).to(tl.float64)
        shift = tl.maximum((m - top) * k, VANISHED)
        mean = _total(-factor * tl.fma(shift, s, u)) * LN2 / (1.0 + rest)
    return total, top, origin, rest, mean


@triton.jit
def label_logit(row, label):
    x = tl.load(row + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    return tl.where(x == float("inf"), float("nan"), x)


@triton.jit
def odds_against(total, origin, x, unit, inner, SOFTCAP: tl.constexpr):
    """The log-odds against the label, from what `sums` found."""
    x = x.to(tl.float64)
    if SOFTCAP:
        x = _tanh64(x * inner)
    log_total = tl.where(total > 0.0, tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    odds = log_total + (origin - x) * unit
    return tl.where(origin < float("inf"), odds, float("nan"))
