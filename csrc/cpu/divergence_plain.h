// Divergences of rows that are not nearly equal: the plain sum of a KL, sum p (log p - log q), from the sweep that
// finds the normalisers, and a plain jsd of beta 1/2; and their gradients.
//
// They need few instructions, but they cancel. What float32 leaves of a KL is an absolute error of up to 1.4e-6 (2.2e-7
// from each normaliser's exponentials, the rounding of exponents of up to 17, and that of sums, which equal terms
// share), of a small jsd one of 4e-7. From kPlain and kPlainJsd on that is within the contract; smaller values are
// summed again, column by column without cancellation.
#pragma once

#include "blocks.h"

namespace cepo {
namespace CEPO_ISA {

constexpr double kPlain = 0x1p-2;  // nats
constexpr double kPlainJsd = 0x1p-5;
constexpr float kFarApart = 0x1p22f;   // a log2 ratio from which a probability that float32 lacks may weigh: go slow
constexpr int64_t kRun = 16 * kWidth;  // columns, of eight terms a lane: equal terms all round to the same side
constexpr float kBottom = -0x1p100f;   // what an impossible column counts as in a log-ratio

// Two vectors of the `left` columns from x, -inf beyond them; and back.
template <class T>
inline void get_two(const T* x, int64_t left, Vec (&to)[2]) {
    if (left >= 2 * kWidth) return load2(x, to[0], to[1]);
    T rest[2 * kWidth];
    for (int64_t i = 0; i < 2 * kWidth; ++i) i < left ? void(rest[i] = x[i]) : set_negative_infinity(rest[i]);
    load2(rest, to[0], to[1]);
}
// The same of columns j to end, but for those of [from, to).
template <class T>
inline void get_two_without(const T* x, int64_t j, int64_t end, const int64_t* from, const int64_t* to,
                            Vec (&into)[2]) {
    T kept[2 * kWidth];
    for (int64_t i = 0; i < 2 * kWidth; ++i) j + i < end ? void(kept[i] = x[j + i]) : set_negative_infinity(kept[i]);
    for (; from < to; ++from) set_negative_infinity(kept[*from - j]);
    load2(kept, into[0], into[1]);
}
template <class T>
inline void put_two(const Vec (&from)[2], int64_t left, T* out) {
    if (left >= 2 * kWidth) return store2(out, from[0], from[1]);
    T rest[2 * kWidth];
    store2(rest, from[0], from[1]);
    memcpy(out, rest, left * sizeof(T));
}

// A column of the first row, whose term is 2^t, and the ratio log2(2^t / 2^s) to that of the second, by their
// references.
struct Term {
    Exp2 of_x, of_y;
    Vec gap;
};
template <bool kGap>
inline Term term_of(Vec x, Vec y, Vec k, Vec minus_cx, Vec minus_cy) {
    const Vec t = fused(x, k, minus_cx), s = fused(y, k, minus_cy), lowest = set(kLowest), bottom = set(kBottom);
    return {exp2_parts(max(lowest, t)), exp2_parts(max(lowest, s)),
            kGap ? sub(max(bottom, t), max(bottom, s)) : lowest};
}

// The sums of two rows, block by block. `x.sum.u` is the sum of 2^t (t - s).
struct PairScan {
    Scan x, y;
    float worst = -INFINITY;  // of t - s

    explicit PairScan(float k) { x.k = y.k = k; }
    bool poisoned() const { return x.poisoned || y.poisoned; }
    bool done() const { return x.done() || y.done(); }
    bool slow() const { return x.huge || y.huge || (x.tiny && !x.placed) || (y.tiny && !y.placed); }

    // What f does to y's reference moves the ratios summed so far.
    template <class F>
    void following(F f) {
        const double before = y.sum.c;
        f();
        x.sum.u += (y.sum.c - before) * x.sum.s;
    }

    template <class T>
    void block(const T* a, const T* b, int64_t n) {
        x.look_ahead(a, n);
        following([&] { y.look_ahead(b, n); });
        while (!done()) {
            const Vec k = set(x.k), cx = set(static_cast<float>(-x.sum.c)), cy = set(static_cast<float>(-y.sum.c));
            const Vec zero = set(0.0f), least = set(-INFINITY);
            Vec sx[2] = {zero, zero}, sy[2] = {zero, zero}, u[2] = {zero, zero};
            Vec top_x[2] = {least, least}, top_y[2] = {least, least}, far[2] = {least, least};
            for (int64_t run = 0; run < n; run += kRun) {
                const int64_t end = run + kRun < n ? run + kRun : n;
                Vec run_x[2] = {zero, zero}, run_y[2] = {zero, zero}, run_u[2] = {zero, zero};
                for (int64_t j = run; j < end; j += 2 * kWidth) {
                    Vec at_x[2], at_y[2];
                    load2(a + j, at_x[0], at_x[1]);
                    load2(b + j, at_y[0], at_y[1]);
                    for (int i = 0; i < 2; ++i) {
                        top_x[i] = max(top_x[i], at_x[i]);
                        top_y[i] = max(top_y[i], at_y[i]);
                        const Term term = term_of<true>(at_x[i], at_y[i], k, cx, cy);
                        const Vec e = mul(term.of_x.mantissa, term.of_x.scale);
                        run_x[i] = add(run_x[i], e);
                        run_y[i] = fma(term.of_y.mantissa, term.of_y.scale, run_y[i]);
                        run_u[i] = fma(e, term.gap, run_u[i]);
                        far[i] = max(far[i], term.gap);
                    }
                }
                for (int i = 0; i < 2; ++i)
                    sx[i] = add(sx[i], run_x[i]), sy[i] = add(sy[i], run_y[i]), u[i] = add(u[i], run_u[i]);
            }
            bool again = x.moved(lane_max(max(top_x[0], top_x[1])));
            following([&] { again |= y.moved(lane_max(max(top_y[0], top_y[1]))); });
            if (again) continue;
            x.add(lane_sum(sx[0], sx[1]), lane_sum(u[0], u[1]));
            y.add(lane_sum(sy[0], sy[1]), 0.0);
            worst = fmaxf(worst, lane_max(max(far[0], far[1])));
            return;
        }
    }

    template <class T>
    void row(const T* a, const T* b, int64_t vocabulary) {
        for (int64_t start = 0; start < vocabulary && !done(); start += kBlock) {
            const int64_t n = vocabulary - start < kBlock ? vocabulary - start : kBlock, full = n / kStep * kStep;
            if (full > 0) block(a + start, b + start, full);
            if (full == n || done()) continue;
            T rest[2][kStep];
            for (int64_t j = 0; j < kStep; ++j) {
                set_negative_infinity(rest[0][j]), set_negative_infinity(rest[1][j]);
                if (full + j < n) rest[0][j] = a[start + full + j], rest[1][j] = b[start + full + j];
            }
            block(rest[0], rest[1], kStep);
        }
    }

    // log2 of the second's normaliser over the first's, relative to their references.
    double levels() const { return log2(y.sum.s) - log2(x.sum.s); }
    double value() const { return (x.sum.u / x.sum.s + levels()) * kLn2; }  // the KL, in nats
};

// The gradient in one of the two rows, out, which may be that row: in y `factor` times q - p, in x that times
// p (log p / q - value).
template <bool kInX, class T>
void plain_gradient(const PairScan& pair, const T* a, const T* b, T* out, int64_t vocabulary, double value,
                    double factor) {
    const Vec k = set(pair.x.k), cx = set(static_cast<float>(-pair.x.sum.c)),
              cy = set(static_cast<float>(-pair.y.sum.c));
    const double of_x = factor / pair.x.sum.s;
    const Vec base = set(static_cast<float>(kInX ? of_x * (pair.levels() * kLn2 - value) : -of_x)),
              slope = set(static_cast<float>(kInX ? of_x * kLn2 : factor / pair.y.sum.s));
    for (int64_t j = 0; j < vocabulary; j += 2 * kWidth) {
        Vec at_x[2], at_y[2], found[2];
        get_two(a + j, vocabulary - j, at_x);
        get_two(b + j, vocabulary - j, at_y);
        for (int i = 0; i < 2; ++i) {
            const Term term = term_of<kInX>(at_x[i], at_y[i], k, cx, cy);
            found[i] = kInX ? mul(mul(fma(slope, term.gap, base), term.of_x.mantissa), term.of_x.scale)
                            : fma(mul(slope, term.of_y.mantissa), term.of_y.scale,
                                  mul(mul(base, term.of_x.mantissa), term.of_x.scale));
        }
        put_two(found, vocabulary - j, out + j);
    }
}

// log2 of (1 + w) / 2 from z = 1 - w in [0, 1]: relative error 1e-7.
inline Vec log2_mean(Vec z) {
    Vec p = fma(set(-0x1.0a1deep-8f), z, set(0x1.392588p-7f));
    p = fma(p, z, set(-0x1.d07a66p-7f));
    p = fma(p, z, set(0x1.2ca9d4p-8f));
    p = fma(p, z, set(-0x1.8e4c2ap-7f));
    p = fma(p, z, set(-0x1.66b39cp-6f));
    p = fma(p, z, set(-0x1.ecfb82p-5f));
    p = fma(p, z, set(-0x1.71531cp-3f));
    p = fma(p, z, set(-0x1.715476p-1f));
    return mul(p, z);
}

// The jsd of beta 1/2 of two rows whose normalisers are known. With w the smaller probability over the larger, hi, a
// column of it is hi (w log w - (1 + w) log((1 + w) / 2)) / 2, and what that cancels is of hi.
struct EvenJsd {
    Vec k, cx, cy, level_x, level_y;
    double value = 0.0, mean = 0.0;  // mean: of log(q / m) under q, in octaves

    explicit EvenJsd(const PairScan& pair)
        : k(set(pair.x.k)),
          cx(set(static_cast<float>(-pair.x.sum.c))),
          cy(set(static_cast<float>(-pair.y.sum.c))),
          level_x(set(static_cast<float>(-log2(pair.x.sum.s)))),
          level_y(set(static_cast<float>(-log2(pair.y.sum.s)))) {}

    struct Mixed {
        Vec value;         // twice the column's, in octaves
        Vec q, log_share;  // of y, and log2(q / m)
    };
    template <bool kShare>
    Mixed column(Vec x, Vec y) const {
        const Vec bottom = set(kBottom), lowest = set(kLowest), one = set(1.0f);
        const Vec t = add(max(bottom, fused(x, k, cx)), level_x), s = add(max(bottom, fused(y, k, cy)), level_y);
        const Vec top = max(t, s), fall = sub(min(t, s), top);
        const Exp2 of_top = exp2_parts(max(lowest, top)), of_fall = exp2_parts(max(lowest, fall));
        const Vec hi = mul(of_top.mantissa, of_top.scale), w = mul(of_fall.mantissa, of_fall.scale);
        const Vec log_m = log2_mean(sub(one, w));
        Mixed out{mul(hi, fma(w, fall, sub(set(0.0f), mul(add(one, w), log_m)))), hi, hi};
        if (kShare) {
            out.q = where_less(s, t, mul(hi, w), hi);
            out.log_share = sub(where_less(s, t, fall, set(0.0f)), log_m);
        }
        return out;
    }

    template <bool kMean, class T>
    void sum(const T* a, const T* b, int64_t vocabulary) {
        for (int64_t start = 0; start < vocabulary; start += kBlock) {
            const int64_t end = start + kBlock < vocabulary ? start + kBlock : vocabulary;
            const Vec zero = set(0.0f);
            Vec values[2] = {zero, zero}, means[2] = {zero, zero}, at_x[2], at_y[2];
            for (int64_t j = start; j < end; j += 2 * kWidth) {
                get_two(a + j, vocabulary - j, at_x);
                get_two(b + j, vocabulary - j, at_y);
                for (int i = 0; i < 2; ++i) {
                    const Mixed at = column<kMean>(at_x[i], at_y[i]);
                    values[i] = add(values[i], at.value);
                    if (kMean) means[i] = fma(at.q, at.log_share, means[i]);
                }
            }
            value += lane_sum(values[0], values[1]) * (0.5 * kLn2);
            mean += lane_sum(means[0], means[1]);
        }
    }

    // In y, which may be out: q (log(q / m) - mean) / 2.
    template <class T>
    void gradient(const T* a, const T* b, T* out, int64_t vocabulary, double factor) const {
        const Vec by = set(static_cast<float>(0.5 * kLn2 * factor)), level = set(static_cast<float>(mean));
        for (int64_t j = 0; j < vocabulary; j += 2 * kWidth) {
            Vec at_x[2], at_y[2], found[2];
            get_two(a + j, vocabulary - j, at_x);
            get_two(b + j, vocabulary - j, at_y);
            for (int i = 0; i < 2; ++i) {
                const Mixed at = column<true>(at_x[i], at_y[i]);
                found[i] = mul(by, mul(at.q, sub(at.log_share, level)));
            }
            put_two(found, vocabulary - j, out + j);
        }
    }
};

}  // namespace CEPO_ISA
}  // namespace cepo
