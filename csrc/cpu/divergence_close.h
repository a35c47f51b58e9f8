// The KL of two rows that are close, in one sweep, without knowing their normalisers.
//
// With a guess at the normalisers of P and Q, what P' and Q' then sum to is no 1, but of S = sum P' (e^-r - 1 + r) with
// r = log(P' / Q'), Z = sum P' and D = sum Q' - P', none of which cancels, KL(P || Q) = S / Z - (d - log1p(d)), d = D /
// Z. Only a bad guess makes that difference cancel; the sweep then has made a good one. Where all columns of a vector
// have |r| below 1, r^2 times a polynomial serves, and no second exponential is needed.
#pragma once

#include "divergence_columns.h"

namespace cepo {
namespace CEPO_ISA {

constexpr float kCloseSquare = 0x1.0a6p+1f;  // of a log2 ratio: 1 nat
constexpr double kEnough = 3e-6;             // relative, of a value
constexpr double kFarGuess = 0.1;            // in nats, from which float32's ratios deserve a better one
constexpr float kHighest = 64.0f;            // above its guessed level, in octaves, no term may be

// (2^-r - 1 + r ln 2) / r^2 up to 1 nat: relative error 1.1e-7.
inline Vec excess_octaves(Vec r) {
    Vec p = fma(set(0x1.6507a0p-20f), r, set(-0x1.062658p-16f));
    p = fma(p, r, set(0x1.4317acp-13f));
    p = fma(p, r, set(-0x1.5d6e24p-10f));
    p = fma(p, r, set(0x1.3b2a6cp-7f));
    p = fma(p, r, set(-0x1.c6b0c2p-5f));
    return fma(p, r, set(0x1.ebfbe0p-3f));
}

// KL(one || other); kExact: logits differ by what float32 holds.
template <bool kExact>
struct CloseKl {
    const Transform& transform;
    const Divergence& d;
    RowSum one, other;
    double excess = 0.0;                // KL before what a wrong guess at the normalisers added is taken out
    double value = 0.0, largest = 0.0;  // KL and its largest term, which is kept under a clip alone, in nats
    double drift = 0.0;                 // of the guess, in nats
    double log_ratio = 0.0;             // of the other's normaliser over the one's, in nats
    bool guessed_well = false;
    const int64_t* skipped = nullptr;  // columns that belong to neither row, in rising order
    int64_t skips = 0;

    Levels levels() const { return Levels(transform, other, one, gap_of(other, one), d); }
    static Vec ratio(Vec x, Vec y, const Levels& l) {
        const Vec gap = sub(x, y);
        if (kExact) return add(fused(l.k, gap, l.delta), l.delta_rest);
        const Vec back = sub(gap, x), rest = sub(sub(x, sub(gap, back)), add(y, back));
        return add(fused(l.k, gap, l.delta), fma(l.k, rest, l.delta_rest));
    }
    static Vec probability(Vec x, const Levels& l) {
        const Exp2 e = exp2_parts(term_exponent(x, l.k, l.teacher_c));
        return mul(mul(e.mantissa, e.scale), l.teacher_factor);
    }
    static Column column(Vec x, Vec y, const Levels& l) {
        return column_of<kExact ? kExactDifferences : kNoCapNoClip>(y, x, y, x, l);
    }

    // Whether the rows are such that this serves; then the normalisers are known.
    template <bool kSkips = false, class T>
    bool sweep(const T* x, const T* y) {
        const Levels l = levels();
        const Vec zero = set(0.0f), one_ = set(1.0f), minus_ln2 = set(static_cast<float>(-kLn2));
        double sum = 0.0, total = 0.0, shift = 0.0;
        const bool limited = d.clip < INFINITY;
        Vec top = set(-INFINITY), far = top, probe = zero, reach = zero;
        const int64_t* next = skipped;
        for (int64_t start = 0; start < d.vocabulary; start += kBlock) {
            const int64_t end = start + kBlock < d.vocabulary ? start + kBlock : d.vocabulary;
            Vec sums[2] = {zero, zero}, totals[2] = {zero, zero}, shifts[2] = {zero, zero}, at_x[2], at_y[2];
            for (int64_t j = start; j < end; j += 2 * kWidth) {
                const int64_t* const first = next;
                while (kSkips && next < skipped + skips && *next < j + 2 * kWidth) ++next;
                if (first < next) {
                    get_two_without(x, j, d.vocabulary, first, next, at_x);
                    get_two_without(y, j, d.vocabulary, first, next, at_y);
                } else {
                    get_two(x + j, d.vocabulary - j, at_x);
                    get_two(y + j, d.vocabulary - j, at_y);
                }
                for (int i = 0; i < 2; ++i) {
                    const Vec r = ratio(at_x[i], at_y[i], l), square = mul(r, r);
                    const Vec t = fused(at_x[i], l.k, l.teacher_c);
                    top = max(t, top);
                    if (all_less(square, set(kCloseSquare))) {
                        const Exp2 e = exp2_parts(max(set(kLowest), t));
                        const Vec p = mul(mul(e.mantissa, e.scale), l.teacher_factor);
                        const Vec share = mul(square, excess_octaves(r));
                        sums[i] = fma(p, share, sums[i]);
                        totals[i] = add(totals[i], p);
                        shifts[i] = fma(p, fma(minus_ln2, r, share), shifts[i]);
                        if (limited) reach = max(reach, mul(p, r));
                        continue;
                    }
                    const Column c = column(at_x[i], at_y[i], l);
                    const Vec gap = mul(c.hi, c.complement), s = max(set(kLowest), fused(at_y[i], l.k, l.student_c));
                    sums[i] = fma(c.hi, share_of<kForwardKl>(c, l, false).value, sums[i]);
                    totals[i] = fma(c.hi, where_less(c.r, zero, c.w, one_), totals[i]);
                    shifts[i] = add(shifts[i], where_less(c.r, zero, gap, sub(zero, gap)));
                    far = max(c.r, far);
                    top = max(s, top);
                    probe = add(probe, add(s, max(set(kLowest), t)));
                    if (limited) reach = max(reach, mul(c.hi, where_less(c.r, zero, zero, c.r)));
                }
            }
            sum += lane_sum(sums[0], sums[1]);
            total += lane_sum(totals[0], totals[1]);
            shift += lane_sum(shifts[0], shifts[1]);
        }
        const double probes = lane_sum(probe, zero);
        if (!(fabs(probes) < INFINITY) || lane_max(top) > kHighest || lane_max(far) > kFarApart || !(total > 0.0))
            return false;
        const double rise = shift / total;
        log_ratio = log1p(rise) - gap_of(other, one) * kLn2;
        one.s *= total;
        other.s *= total + shift;
        drift = fabs(log1p(rise));
        excess = sum / total;
        value = excess - (rise - log1p(rise));
        largest = lane_max(reach) * kLn2 / total;
        guessed_well = value >= 0.5 * excess;
        return fabs(value) < INFINITY;
    }
    bool clips() const { return largest + drift >= d.clip * (1.0 - 1e-5); }

    // Whether the rows are such that this serves; not yet whether the clip leaves them alone.
    template <class T>
    bool run(const T* x, const T* y) {
        if (!sweep(x, y)) return false;
        const bool surely_clips = largest - drift > d.clip;
        if ((!guessed_well || clips()) && !surely_clips && !sweep(x, y)) return false;
        if (value < 0.0) value = 0.0;
        return true;
    }

    // In y, or kInX in x, as plain_gradient; out may be that row.
    template <bool kInX, class T>
    void gradient(const T* x, const T* y, T* out, double factor) const {
        const Levels l = levels();
        const Vec by = set(static_cast<float>(factor)), zero = set(0.0f);
        const Vec level = set(static_cast<float>(-value)), ln2 = set(static_cast<float>(kLn2)), far = set(kFarApart);
        Vec at_x[2], at_y[2], found[2];
        for (int64_t j = 0; j < d.vocabulary; j += 2 * kWidth) {
            get_two(x + j, d.vocabulary - j, at_x);
            get_two(y + j, d.vocabulary - j, at_y);
            for (int i = 0; i < 2; ++i) {
                const Vec r = ratio(at_x[i], at_y[i], l), square = mul(r, r);
                Vec slope;
                if (kInX) {
                    const Vec held = max(sub(zero, far), min(r, far));
                    slope = mul(probability(at_x[i], l), fma(ln2, held, level));
                } else if (all_less(square, set(kCloseSquare))) {
                    const Vec share = mul(square, excess_octaves(r));
                    slope = mul(probability(at_x[i], l), fma(sub(zero, ln2), r, share));
                } else {
                    const Column c = column(at_x[i], at_y[i], l);
                    slope = mul(c.hi, where_less(c.r, zero, c.complement, sub(zero, c.complement)));
                }
                found[i] = mul(by, slope);
            }
            put_two(found, d.vocabulary - j, out + j);
        }
    }

    // `factor` times the probabilities of x.
    template <class T>
    void scaled(const T* x, T* out, double factor) const {
        const Levels l = levels();
        const Vec by = set(static_cast<float>(factor));
        for (int64_t j = 0; j < d.vocabulary; j += 2 * kWidth) {
            Vec at[2];
            get_two(x + j, d.vocabulary - j, at);
            for (Vec& value : at) value = mul(by, probability(value, l));
            put_two(at, d.vocabulary - j, out + j);
        }
    }
};

}  // namespace CEPO_ISA
}  // namespace cepo
