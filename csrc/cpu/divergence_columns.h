// What a column of two rows adds to their divergence and to its gradient, lane by lane.
//
// With r = log(p / q), u = |r|, hi the larger of p and q and w = e^-u, every column is hi times a function of u and w
// that does not cancel at u = 0: A(u) = u - (1 - w) = p (expm1(-r) + r) / hi where p is the larger, and
// B(u) = (1 - w) - u w where it is not. r itself comes from the difference of the logits, to the last bit, and of the
// normalisers, whose error to first order adds nothing: it is measured, as sum q - p, and taken out to second order.
#pragma once

#include "divergence_plain.h"

namespace cepo {
namespace CEPO_ISA {

enum Form { kForwardKl, kReverseKl, kJsd, kEvenJsd };  // the last: of beta 1/2
// What a call can do without: a soft cap and a clip; and, of 16-bit logits, the rounding of their difference.
enum Needs { kEverything, kNoCapNoClip, kExactDifferences };

// w = 2^-t and 1 - w for t in [0, 127], each to the last bits.
struct Decay {
    Vec w, complement;
};
inline Decay decay(Vec t) {
    const Vec one = set(1.0f), magic = set(12582912.0f + 127.0f), minus = sub(set(0.0f), t);
    const Vec rounded = add(minus, magic);
    const Vec f = sub(minus, sub(rounded, magic)), scale = exponent_from_low_bits(rounded);
    Vec p = fma(set(0x1.4308f4p-13f), f, set(0x1.5f07b4p-10f));
    p = fma(p, f, set(0x1.3b2ba0p-7f));
    p = fma(p, f, set(0x1.c6af6ep-5f));
    p = fma(p, f, set(0x1.ebfbdep-3f));
    p = fma(p, f, set(0x1.62e430p-1f));
    const Vec change = mul(scale, mul(p, f));  // scale (2^f - 1)
    return {add(scale, change), sub(sub(one, scale), change)};
}

// A(u): u^2 times a polynomial up to 1, the definition beyond.
inline Vec excess(Vec u, Vec complement) {
    Vec p = fma(set(-0x1.1f5370p-13f), u, set(0x1.5b046ep-10f));
    p = fma(p, u, set(-0x1.0ffb70p-7f));
    p = fma(p, u, set(0x1.554514p-5f));
    p = fma(p, u, set(-0x1.5554fap-3f));
    p = fma(p, u, set(0.5f));
    return where_less(u, set(1.0f), mul(mul(u, u), p), sub(u, complement));
}

// phi(z) = (1 + z) log1p(z) - z for z in [-1/2, 1].
inline Vec phi_of(Vec z) {
    Vec p = fma(set(-0x1.d9d95ep-10f), z, set(0x1.e086fcp-8f));
    p = fma(p, z, set(-0x1.99c744p-7f));
    p = fma(p, z, set(0x1.b1a394p-7f));
    p = fma(p, z, set(-0x1.b8a8b4p-7f));
    p = fma(p, z, set(0x1.19d2bcp-6f));
    p = fma(p, z, set(-0x1.85846cp-6f));
    p = fma(p, z, set(0x1.11a932p-5f));
    p = fma(p, z, set(-0x1.99a93cp-5f));
    p = fma(p, z, set(0x1.55525ep-4f));
    p = fma(p, z, set(-0x1.55553ap-3f));
    p = fma(p, z, set(0.5f));
    return mul(mul(z, z), p);
}

// log2 of the teacher's normaliser over the student's.
inline double gap_of(RowSum student, RowSum teacher) {
    return (teacher.c - student.c) + (log2(teacher.s) - log2(student.s));
}

// A row pair's constants, as the sweeps need them.
struct Levels {
    Vec k, inner;
    bool capped;
    Vec teacher_c, student_c, teacher_factor, student_factor;  // p = 2^(y k + c) factor
    Vec delta, delta_rest;                                     // minus the difference of the normalisers, in two pieces
    Vec beta, rest, log_beta, log_rest;                        // beta, 1 - beta and their logarithms
    Vec clip;

    Levels(const Transform& transform, RowSum student, RowSum teacher, double gap, const Divergence& d)
        : k(set(transform.k)), inner(set(transform.inner)), capped(transform.capped) {
        place(student, student_c, student_factor);
        place(teacher, teacher_c, teacher_factor);
        const float main = static_cast<float>(gap);
        delta = set(-main);
        delta_rest = set(static_cast<float>(main - gap));
        beta = set(static_cast<float>(d.beta));
        rest = set(static_cast<float>(1.0 - d.beta));
        log_beta = set(static_cast<float>(log(d.beta)));
        log_rest = set(static_cast<float>(log1p(-d.beta)));
        clip = set(static_cast<float>(d.clip));
    }
    static void place(RowSum sum, Vec& minus_c, Vec& factor) {
        const double level = sum.c + log2(sum.s), whole = rint(level);
        minus_c = set(static_cast<float>(-whole));
        factor = set(static_cast<float>(exp2(whole - level)));
    }
};

struct Column {
    Vec hi, w, complement;  // complement: 1 - w
    Vec u;                  // |r| in nats
    Vec r;                  // log2(p / q), signed
};

// From the raw logits x and what exponents are made of, y; the same but under a soft cap.
template <int kNeeds>
inline Column column_of(Vec student_x, Vec teacher_x, Vec student_y, Vec teacher_y, const Levels& l) {
    const Vec zero = set(0.0f), lowest = set(-0x1.fffffep127f);
    const Vec a = max(teacher_x, lowest), b = max(student_x, lowest);
    const Vec d = sub(a, b);
    Column c;
    if (kNeeds == kExactDifferences) {
        c.r = add(fused(l.k, d, l.delta), l.delta_rest);
    } else if (kNeeds == kEverything && l.capped) {  // tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        const Vec product = fma(sub(zero, teacher_y), student_y, set(1.0f));
        c.r = add(fused(l.k, mul(tanh_of(mul(d, l.inner)), product), l.delta), l.delta_rest);
    } else {
        const Vec back = sub(d, a);
        const Vec rest = sub(sub(a, sub(d, back)), add(b, back));  // d + rest is the difference exactly
        c.r = add(fused(l.k, d, l.delta), fma(l.k, rest, l.delta_rest));
    }
    const Vec t = where_less(c.r, zero, fused(student_y, l.k, l.student_c), fused(teacher_y, l.k, l.teacher_c));
    const Exp2 e = exp2_parts(max(set(kLowest), t));
    c.hi = mul(mul(e.mantissa, e.scale), where_less(c.r, zero, l.student_factor, l.teacher_factor));
    const Vec size = min(max(c.r, sub(zero, c.r)), set(kFarApart));  // NaN, where both are impossible, is far apart
    const Decay fall = decay(min(size, set(127.0f)));
    c.w = fall.w;
    c.complement = fall.complement;
    c.u = mul(size, set(static_cast<float>(kLn2)));
    return c;
}

// What a column adds and what its gradient is made of, both without hi.
struct Share {
    Vec value;
    Vec log_share;  // jsd: log(q / m)
};
template <int kForm>
inline Share share_of(const Column& c, const Levels& l, bool with_log) {
    const Vec zero = set(0.0f), one = set(1.0f), a = excess(c.u, c.complement);
    const Vec b = fma(c.u, c.complement, sub(zero, a));
    if (kForm == kForwardKl) return {where_less(c.r, zero, b, a), zero};
    if (kForm == kReverseKl) return {where_less(c.r, zero, a, b), zero};
    if (kForm == kEvenJsd) {
        const Vec z = mul(set(-0.5f), c.complement), f = phi_of(z);
        Share out{fma(set(0.5f), b, sub(zero, f)), zero};
        if (with_log) {
            const Vec log_m = div(add(f, z), add(one, z));  // log(m / hi)
            out.log_share = sub(zero, add(log_m, where_less(c.r, zero, zero, c.u)));
        }
        return out;
    }
    // kappa is the share of the smaller in the mixture, other that of the larger: m / hi = other + kappa w. Around hi,
    // the column is kappa B - phi(-kappa (1 - w)), which cancels as kappa nears 1; around lo, it is
    // other A - w phi(y) with y = m / lo - 1; and where y is above 1, -(m / hi) log(m / hi) - kappa w u itself.
    const Vec kappa = where_less(c.r, zero, l.beta, l.rest), other = where_less(c.r, zero, l.rest, l.beta);
    const Vec log_other = where_less(c.r, zero, l.log_rest, l.log_beta);
    const Vec half = set(0.5f);
    const Vec y = div(mul(other, c.complement), c.w), rho = div(mul(kappa, c.w), other);
    const Vec around_lo = where_less(y, one, y, min(rho, one));
    const Vec z = where_less(half, kappa, around_lo, mul(sub(zero, kappa), c.complement));
    const Vec f = phi_of(z);
    const Vec hi_form = fma(kappa, b, sub(zero, f));
    const Vec lo_form = fma(other, a, sub(zero, mul(c.w, f)));
    const Vec m = fma(kappa, c.w, other);
    const Vec far_form = sub(sub(mul(sub(zero, m), log_other), mul(other, add(f, rho))), mul(mul(kappa, c.w), c.u));
    Share out{where_less(half, kappa, where_less(y, one, lo_form, far_form), hi_form), zero};
    if (with_log) {
        const Vec log1p_z = div(add(f, z), add(one, z));
        const Vec base = where_less(half, kappa, where_less(y, one, sub(zero, c.u), log_other), zero);
        // log(q / m), q being hi where r < 0; around lo, log(m / hi) = log1p(y) - u.
        const Vec of_hi = sub(sub(zero, base), log1p_z), of_lo = sub(sub(sub(zero, c.u), base), log1p_z);
        out.log_share = where_less(c.r, zero, of_hi, of_lo);
    }
    return out;
}

// Whether a KL's term, or a jsd's, is above the clip: x where it is, else y.
template <int kForm, int kNeeds>
inline Vec where_clipped(const Column& c, const Share& s, const Levels& l, Vec x, Vec y) {
    if (kNeeds != kEverything) return y;
    const Vec zero = set(0.0f);
    if (kForm == kForwardKl) return where_less(l.clip, where_less(c.r, zero, zero, mul(c.hi, c.u)), x, y);
    if (kForm == kReverseKl) return where_less(l.clip, where_less(c.r, zero, mul(c.hi, c.u), zero), x, y);
    return where_less(l.clip, mul(c.hi, s.value), x, y);
}

}  // namespace CEPO_ISA
}  // namespace cepo
