"""The Triton kernel of the divergences: normalisers, sum and gradient of a pair of rows in one program.

The arithmetic is the contract. With r = log(p / q), u = |r|, hi the larger of p (teacher) and q (student) and
w = e^-u, a column adds hi times a function of u and w that does not cancel at u = 0: A(u) = u - (1 - w) to a KL whose
first is the larger, B(u) = (1 - w) - u w to one whose first is the smaller. r comes from the difference of the logits,
to the last bit, and of the normalisers, whose error adds nothing to first order: sum q - p measures it, and takes it
out to second. Columns meet lanes, and lanes each other, as in `triton_rows`.
"""

# mypy: ignore-errors
# The bodies are Triton's language, in which Python's types mean nothing.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import cap_slope, fill, options, put, start
from .triton_rows import LOG2E, LOWEST, chosen, log1p, sums, tanh, units

FORWARD, REVERSE, JSD, EVEN_JSD = (tl.constexpr(kind) for kind in range(4))  # the last: of beta 1/2
ALL, CHOSEN, TAIL = (tl.constexpr(part) for part in range(3))
HUGE = tl.constexpr(3.4028234663852886e38)
FAR = tl.constexpr(4194304.0)  # a log-ratio that stands for all larger ones where e^-u multiplies it


@triton.jit
def _decay(u):
    """w = e^-u, 1 - w, A(u), B(u), each to the last bits; 0 <= u <= HUGE."""
    near = u < 1.0
    series = tl.fma(u, -0.000137007679, 0.00132376596)
    series = tl.fma(series, u, -0.00830023736)
    series = tl.fma(series, u, 0.0416589156)
    series = tl.fma(series, u, -0.166665986)
    series = tl.fma(series, u, 0.5)
    excess = u * u * series
    w = tl.exp2(u * -LOG2E)
    complement = tl.where(near, u - excess, 1.0 - w)
    w = tl.where(near, 1.0 - complement, w)
    a = tl.where(near, excess, u - complement)
    b = tl.where(near, tl.fma(u, complement, -excess), tl.fma(-tl.minimum(u, FAR), w, complement))
    return w, complement, a, b


@triton.jit
def _phi(z):
    """(1 + z) log1p(z) - z for z in [-1/2, 1]."""
    p = tl.fma(z, -0.00180759083, 0.00733226445)
    p = tl.fma(p, z, -0.0125054438)
    p = tl.fma(p, z, 0.0132336114)
    p = tl.fma(p, z, -0.0134478454)
    p = tl.fma(p, z, 0.0172011219)
    p = tl.fma(p, z, -0.0237742476)
    p = tl.fma(p, z, 0.0334058739)
    p = tl.fma(p, z, -0.0500074551)
    p = tl.fma(p, z, 0.0833305046)
    p = tl.fma(p, z, -0.166666463)
    p = tl.fma(p, z, 0.5)
    return z * z * p


@triton.jit
def _share(r, u, mixture, KIND: tl.constexpr):
    """Of a column, all relative to hi: what it adds; q; q - p; and of a jsd log(q / m)."""
    w, complement, a, b = _decay(u)
    falls = r < 0.0  # the student's is the larger
    q = tl.where(falls, 1.0, w)
    difference = tl.where(falls, complement, -complement)
    log_share = w
    if KIND == FORWARD:
        value = tl.where(falls, b, a)
    elif KIND == REVERSE:
        value = tl.where(falls, a, b)
    elif KIND == EVEN_JSD:
        z = -0.5 * complement
        f = _phi(z)
        value = tl.fma(b, 0.5, -f)
        log_share = -((f + z) / (1.0 + z) + tl.where(falls, 0.0, tl.minimum(u, FAR)))
    else:
        # kappa is the share of the smaller in the mixture, other that of the larger: m / hi = other + kappa w. Around
        # hi the column is kappa B - phi(-kappa (1 - w)), which cancels as kappa nears 1; around lo it is
        # other A - w phi(y) with y = m / lo - 1; and where y is above 1, -(m / hi) log(m / hi) - kappa w u itself.
        beta, rest, log_beta, log_rest = mixture
        u = tl.minimum(u, FAR)
        a = tl.minimum(a, FAR)
        kappa = tl.where(falls, beta, rest)
        other = tl.where(falls, rest, beta)
        log_other = tl.where(falls, log_rest, log_beta)
        around_hi = kappa <= 0.5
        y = other * complement / w
        near_lo = y < 1.0
        rho = kappa * w / other
        z = tl.where(around_hi, -kappa * complement, tl.where(near_lo, y, tl.minimum(rho, 1.0)))
        f = _phi(z)
        of_hi = tl.fma(kappa, b, -f)
        of_lo = tl.fma(other, a, -(w * f))
        m = tl.fma(kappa, w, other)
        beyond = -m * log_other - other * (f + rho) - kappa * w * u
        value = tl.where(around_hi, of_hi, tl.where(near_lo, of_lo, beyond))
        base = tl.where(around_hi, 0.0, tl.where(near_lo, -u, log_other))
        log_share = -(base + (f + z) / (1.0 + z) + tl.where(falls, 0.0, u))
    return value, q, difference, log_share


@triton.jit
def _where_clipped(clip, r, hi, u, value, lost, x, y, KIND: tl.constexpr):
    """x where a KL's term, or a jsd's, is above the clip, else y."""
    if KIND == FORWARD:
        plain = tl.where(r < 0.0, 0.0, hi * u)
    elif KIND == REVERSE:
        plain = tl.where(r < 0.0, hi * u, 0.0)
    else:
        plain = hi * value
    return tl.where(lost | (plain > clip), x, y)


@triton.jit
def _difference(a, b):
    """a - b as a number and what its rounding left out."""
    d = a - b
    back = d - a
    return d, tl.where(tl.abs(d) < float("inf"), (a - (d - back)) - (b + back), 0.0)


@triton.jit
def _columns(
    student, teacher, at, vocabulary, pick, level, KIND: tl.constexpr, PART: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Of columns: whether they are of the part, the student's logits, log(p / q), its size, hi, and whether a KL's
    first is possible there and its second is not."""
    k, unit, inner_high, inner_low, student_top, teacher_top, student_factor, teacher_factor, gap, gap_low, log_gap = (
        level
    )
    inside = at < vocabulary
    b = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
    a = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32)
    if PART != ALL:
        threshold, last = pick
        inside = inside & (chosen(b, at, threshold, last) == (PART == CHOSEN))
    low_a = tl.maximum(a, LOWEST)
    low_b = tl.maximum(b, LOWEST)
    x, y = b, a
    if SOFTCAP:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        x = units(b, inner_high, inner_low, True)
        y = units(a, inner_high, inner_low, True)
        r = tl.fma(unit, tanh((low_a - low_b) * inner_high) * tl.fma(-x, y, 1.0), -gap) - gap_low
    else:
        d, rest = _difference(low_a, low_b)
        r = tl.fma(unit, (d - gap) + (rest - gap_low), -log_gap)
    falls = r < 0.0
    t = tl.where(falls, x - student_top, y - teacher_top) * k
    hi = tl.exp2(t) * tl.where(falls, student_factor, teacher_factor)
    if SOFTCAP or PART != ALL:
        hi = tl.where(inside, hi, 0.0)
    lost = inside & False
    if not SOFTCAP:
        if KIND == FORWARD:
            lost = inside & (b == float("-inf")) & (t > -1074.0)
        elif KIND == REVERSE:
            lost = inside & (a == float("-inf")) & (t > -1074.0)
    return inside, b, r, tl.minimum(tl.abs(r), HUGE), hi, lost


@triton.jit
def _total(lanes):
    """Sum to 2^-32 of the largest, in float64 and the same in any order; infinite where a lane is."""
    top = tl.max(tl.abs(lanes), 0)
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True).to(tl.float64)
    finite = top < float("inf")
    unit = tl.where(finite & (power > 0.0), power, 1.0)
    fixed = tl.where(finite, lanes.to(tl.float64) / unit * 4294967296.0, 0.0).to(tl.int64)
    return tl.where(finite, tl.sum(fixed, 0).to(tl.float64) * 2.3283064365386963e-10 * unit, float("inf"))


@triton.jit
def _sum(
    student, teacher, vocabulary, pick, level, mixture, clip,
    KIND: tl.constexpr, PART: tl.constexpr, CLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Over the part's columns: what they add; q - p; how many are clipped; probability of a KL's first that is; and of
    a jsd the sum of q log(q / m)."""
    lane = tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    cut = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        _, _, r, u, hi, lost = _columns(
            student, teacher, at, vocabulary, pick, level, KIND, PART, SOFTCAP
        )  # fmt: skip
        own, q, difference, log_share = _share(r, u, mixture, KIND)
        difference *= hi
        shift += difference
        added = tl.where(lost, float("inf"), hi * own)
        held = hi * q * log_share
        if CLIP:
            limit = clip
            if KIND == FORWARD:
                limit = clip + difference
                cut += _where_clipped(clip, r, hi, u, own, lost, hi, 0.0, KIND)
            elif KIND == REVERSE:
                limit = clip - difference
                cut += _where_clipped(clip, r, hi, u, own, lost, hi, 0.0, KIND)
            count += _where_clipped(clip, r, hi, u, own, lost, 1.0, 0.0, KIND)
            added = _where_clipped(clip, r, hi, u, own, lost, limit, added, KIND)
            held = _where_clipped(clip, r, hi, u, own, lost, 0.0, held, KIND)
        value += added
        if (KIND == JSD) | (KIND == EVEN_JSD):
            mean += held
    return _total(value), _total(shift), _total(count), _total(cut), _total(mean)


@triton.jit
def _slope(r, hi, u, lost, mixture, clip, level_of_q, KIND: tl.constexpr, CLIP: tl.constexpr):
    """The derivative in the student's transformed logit, a jsd's without 1 - beta."""
    own, q, difference, log_share = _share(r, u, mixture, KIND)
    q *= hi
    if KIND == FORWARD:
        slope = hi * difference
        if CLIP:
            slope = _where_clipped(clip, r, hi, u, own, lost, q, slope, KIND)
        return slope - q * level_of_q
    ratio = log_share
    at_clip = 0.0
    if KIND == REVERSE:
        ratio = tl.where(r < 0.0, u, -u)
        at_clip = -1.0
    if CLIP:
        ratio = _where_clipped(clip, r, hi, u, own, lost, at_clip, ratio, KIND)
    return q * (ratio - level_of_q)


@triton.jit
def _last_chosen(student, vocabulary, threshold, equals, BLOCK: tl.constexpr):
    """The column of the last of the first ``equals`` logits that equal the threshold."""
    lane = tl.arange(0, BLOCK)
    last = vocabulary * 0 - 1
    seen = equals * 0
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        x = tl.load(student + at, mask=at < vocabulary, other=float("nan")).to(tl.float32)
        same = (x == threshold).to(tl.int32)
        count = tl.sum(same, 0)
        if (seen < equals) & (seen + count >= equals):
            last = tl.max(tl.where((same > 0) & (tl.cumsum(same, 0) + seen == equals), at, -1), 0)
        seen += count
    return last


@triton.jit
def _log(x):
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), float("-inf"))


@triton.jit
def _log_sum(a, b):
    """log(e^a + e^b) in float64."""
    top = tl.maximum(a, b)
    origin = tl.where(top == float("-inf"), 0.0, top)
    return origin + _log(tl.exp(a - origin) + tl.exp(b - origin))


@triton.jit
def _log_total(total, top, origin, unit):
    """Of what `sums` found, relative to the highest."""
    return _log(total) + (origin - top) * unit


@triton.jit
def _level(
    unit, inner, student_top, student_total, student_log, student_log_z,
    teacher_top, teacher_total, teacher_log, teacher_log_z, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A part's constants, from each row's highest, its sum relative to that, the logarithm of the sum and that of the
    whole that probabilities are of, both relative to it too: beside -1e30 a logarithm has no digits left."""
    inner_high = inner.to(tl.float32)
    inner_low = (inner - inner_high.to(tl.float64)).to(tl.float32)
    student_share = tl.exp(student_log - student_log_z) / tl.where(student_total > 0.0, student_total, 1.0)
    teacher_share = tl.exp(teacher_log - teacher_log_z) / tl.where(teacher_total > 0.0, teacher_total, 1.0)
    log_gap = teacher_log_z - student_log_z
    if SOFTCAP:
        gap = log_gap + (teacher_top.to(tl.float64) - student_top) * unit
        gap_high = gap.to(tl.float32)
        gap_low = (gap - gap_high.to(tl.float64)).to(tl.float32)
    else:  # the highest logits apart: a row of 1e30 leaves no digits for the other's
        gap_high, gap_low = _difference(teacher_top, student_top)
    return (
        (unit * LOG2E).to(tl.float32), unit.to(tl.float32), inner_high, inner_low, student_top, teacher_top,
        student_share.to(tl.float32), teacher_share.to(tl.float32), gap_high, gap_low, log_gap.to(tl.float32),
    )  # fmt: skip


@triton.jit
def _write(
    into, student, teacher, vocabulary, pick, level, mixture, clip, level_of_q, slope, tail_top, tail_factor,
    KIND: tl.constexpr, CLIP: tl.constexpr, TOP_K: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient: of the entries' columns, and with a bucket ``tail_factor`` times e^(x - tail_top) of the others."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        PART: tl.constexpr = CHOSEN if TOP_K else ALL
        inside, b, r, u, hi, lost = _columns(student, teacher, at, vocabulary, pick, level, KIND, PART, SOFTCAP)
        value = _slope(r, hi, u, lost, mixture, clip, level_of_q, KIND, CLIP) * slope
        if TOP_K:
            x = units(b, level[2], level[3], SOFTCAP)
            value = tl.where(inside, value, tl.exp2((x - tail_top) * level[0]) * tail_factor)
        if SOFTCAP:
            value *= cap_slope(b, level[2])
        tl.store(into + at, value.to(into.dtype.element_ty), mask=at < vocabulary)


@triton.jit(do_not_specialize=["inner_rows"])
def divergence_kernel(
    student, teacher, weight, thresholds, equals, temperatures, values, out, gradient,
    student_outer: tl.int64, student_inner: tl.int64, teacher_outer: tl.int64, teacher_inner: tl.int64,
    gradient_outer: tl.int64, gradient_inner: tl.int64, inner_rows: tl.int64, vocabulary: tl.int32,
    scale: tl.float64, cap: tl.float64, temperature: tl.float64, beta: tl.float64, clip: tl.float64,
    KIND: tl.constexpr, CLIP: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    BACKWARD_BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence of one pair of rows and its gradient; with thresholds, of the chosen columns and a bucket."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.full((), 1.0, tl.float64)
    if weight is not None:
        factor = tl.load(weight + row).to(tl.float64)
    if gradient is not None:
        gradient = start(gradient, row, inner_rows, gradient_outer, gradient_inner)
    if factor == 0.0:
        put(out, row, factor)
        if gradient is not None:
            fill(gradient, vocabulary, 0.0, BACKWARD_BLOCK)
        return
    unit, inner = options(values, scale, cap, temperature, temperatures, row, SOFTCAP)
    unit = unit.to(tl.float32).to(tl.float64)
    student = start(student, row, inner_rows, student_outer, student_inner)
    teacher = start(teacher, row, inner_rows, teacher_outer, teacher_inner)
    beta = tl.full((), beta, tl.float64)
    mixture = (
        beta.to(tl.float32), (1.0 - beta).to(tl.float32), _log(beta).to(tl.float32), _log(1.0 - beta).to(tl.float32)
    )  # fmt: skip
    limit = tl.full((), clip, tl.float64)
    clip = limit.to(tl.float32)
    TOP_K: tl.constexpr = thresholds is not None

    pick = (tl.full((), 0.0, tl.float32), vocabulary)
    tail_student = tl.full((), float("-inf"), tl.float64)
    tail_teacher = tail_student
    tail_top = tl.full((), 0.0, tl.float32)
    tail_total = tl.full((), 1.0, tl.float64)
    broken = factor != factor
    order = None
    if TOP_K:
        threshold = tl.load(thresholds + row)
        pick = (threshold, _last_chosen(student, vocabulary, threshold, tl.load(equals + row), BLOCK))
        order = student
        s, tail_teacher_top, origin, _, _ = sums(
            teacher, vocabulary, vocabulary, unit, inner, SOFTCAP, False, BLOCK, UNROLL, order, pick, False
        )
        tail_teacher = _log_total(s, tail_teacher_top, origin, unit)
        broken = tail_teacher_top == float("inf")
        tail_total, tail_top, origin, _, _ = sums(
            student, vocabulary, vocabulary, unit, inner, SOFTCAP, False, BLOCK, UNROLL, order, pick, False
        )
        tail_student = _log_total(tail_total, tail_top, origin, unit)
        broken |= tail_top == float("inf")
        if (tail_student > float("-inf")) & (tail_teacher > float("-inf")) & (broken == 0):
            level = _level(
                unit, inner, tail_top, tail_total, tail_student, tail_student,
                tail_teacher_top, s, tail_teacher, tail_teacher, SOFTCAP,
            )  # fmt: skip
            _, shift, _, _, _ = _sum(
                student, teacher, vocabulary, pick, level, mixture, clip, FORWARD, TAIL, False, SOFTCAP, BLOCK
            )  # fmt: skip
            tail_student += log1p(shift)
    teacher_total, teacher_top, origin, _, _ = sums(
        teacher, vocabulary, vocabulary, unit, inner, SOFTCAP, False, BLOCK, UNROLL, order, pick, True
    )
    teacher_log = _log_total(teacher_total, teacher_top, origin, unit)
    student_total, student_top, origin, _, _ = sums(
        student, vocabulary, vocabulary, unit, inner, SOFTCAP, False, BLOCK, UNROLL, order, pick, True
    )
    student_log = _log_total(student_total, student_top, origin, unit)
    student_log_z = student_log
    teacher_log_z = teacher_log
    if TOP_K:
        tail_student += (tail_top.to(tl.float64) - student_top) * unit
        tail_teacher += (tail_teacher_top.to(tl.float64) - teacher_top) * unit
        student_log_z = _log_sum(student_log, tail_student)
        teacher_log_z = _log_sum(teacher_log, tail_teacher)
    broken |= (student_top == float("inf")) | (teacher_top == float("inf"))
    broken |= tl.abs(teacher_top - student_top) == float("inf")  # and no difference of logits is a number
    broken |= (student_log_z == float("-inf")) | (teacher_log_z == float("-inf"))
    if broken:
        put(out, row, tl.full((), float("nan"), tl.float64))
        if gradient is not None:
            fill(gradient, vocabulary, float("nan"), BACKWARD_BLOCK)
        return

    level = _level(
        unit, inner, student_top, student_total, student_log, student_log_z,
        teacher_top, teacher_total, teacher_log, teacher_log_z, SOFTCAP,
    )  # fmt: skip
    PART: tl.constexpr = CHOSEN if TOP_K else ALL
    value, shift, count, cut, mean = _sum(
        student, teacher, vocabulary, pick, level, mixture, clip, KIND, PART, CLIP, SOFTCAP, BLOCK
    )
    bucket_r = tl.full((), 0.0, tl.float32)
    bucket_hi = bucket_r
    bucket_lost = factor != factor
    if TOP_K:
        log_p = tail_teacher - teacher_log_z
        log_q = tail_student - student_log_z
        same = log_p == log_q
        bucket_r = tl.where(same, 0.0, log_p - tl.where(same, 0.0, log_q)).to(tl.float32)
        bucket_hi = tl.exp(tl.maximum(log_p, log_q)).to(tl.float32)
        if KIND == FORWARD:
            bucket_lost = (log_q == float("-inf")) & (log_p > -745.0)
        elif KIND == REVERSE:
            bucket_lost = (log_p == float("-inf")) & (log_q > -745.0)
        u = tl.minimum(tl.abs(bucket_r), HUGE)
        own, q, difference, log_share = _share(bucket_r, u, mixture, KIND)
        difference *= bucket_hi
        shift += difference.to(tl.float64)
        added = tl.where(bucket_lost, float("inf"), bucket_hi * own)
        held = bucket_hi * q * log_share
        if CLIP:
            of_clip = clip
            if KIND == FORWARD:
                of_clip = clip + difference
            elif KIND == REVERSE:
                of_clip = clip - difference
            cut += _where_clipped(clip, bucket_r, bucket_hi, u, own, bucket_lost, bucket_hi, 0.0, KIND).to(tl.float64)
            count += _where_clipped(clip, bucket_r, bucket_hi, u, own, bucket_lost, 1.0, 0.0, KIND)
            added = _where_clipped(clip, bucket_r, bucket_hi, u, own, bucket_lost, of_clip, added, KIND)
            held = _where_clipped(clip, bucket_r, bucket_hi, u, own, bucket_lost, 0.0, held, KIND)
        value += added.to(tl.float64)
        mean += held.to(tl.float64)

    slope = factor
    if (KIND == JSD) | (KIND == EVEN_JSD):
        value -= 0.5 * shift * shift * beta * (1.0 - beta)
        level_of_q = mean
        slope *= 1.0 - beta
    else:
        value -= 0.5 * shift * shift
        level_of_q = cut
        if KIND == REVERSE:
            level_of_q = value - cut
            if CLIP:
                level_of_q -= tl.where(count > 0.0, count * limit, 0.0)
    value = tl.where((value < 0.0) & (count == 0.0), 0.0, value)
    put(out, row, factor * value)
    if gradient is not None:
        if KIND == REVERSE:  # noqa: SIM102
            if tl.abs(level_of_q) == float("inf"):
                fill(gradient, vocabulary, float("nan"), BACKWARD_BLOCK)
                return
        # A jsd's gradient is unmoved to first order: the mean has the same error. Where a KL's entry is clipped, the
        # normalisers that decided it stay, and the level makes up for them; where none is, none may be now.
        if (KIND == FORWARD) | (KIND == REVERSE):
            moved = log1p(shift)
            if CLIP:
                level_of_q += tl.where(count > 0.0, shift, 0.0)
                moved = tl.where(count > 0.0, 0.0, moved)
                clip = tl.where(count > 0.0, clip, float("inf"))
            level = _level(
                unit, inner, student_top, student_total, student_log, student_log_z + moved,
                teacher_top, teacher_total, teacher_log, teacher_log_z, SOFTCAP,
            )  # fmt: skip
            bucket_r += moved.to(tl.float32)
        level_of_q = level_of_q.to(tl.float32)
        bucket = tl.full((), 0.0, tl.float32)
        if TOP_K:
            u = tl.minimum(tl.abs(bucket_r), HUGE)
            bucket = _slope(bucket_r, bucket_hi, u, bucket_lost, mixture, clip, level_of_q, KIND, CLIP)
        if SOFTCAP:
            slope *= inner
        slope *= unit
        tail_factor = bucket.to(tl.float64) * slope / tl.where(tail_total > 0.0, tail_total, 1.0)
        _write(
            gradient, student, teacher, vocabulary, pick, level, mixture, clip, level_of_q, slope.to(tl.float32),
            tail_top, tail_factor.to(tl.float32), KIND, CLIP, TOP_K, SOFTCAP, BACKWARD_BLOCK,
        )  # fmt: skip
