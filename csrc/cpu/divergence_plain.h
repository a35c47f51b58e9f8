// The plain sum of a KL, sum p (log p - log q), from the sweep that finds the normalisers, and its gradient.
//
// It needs no exponential that the normalisers do not need, but it cancels: what float32 leaves of it is an absolute
// error of some 5e-7 (of each normaliser's exponentials 2.2e-7, and the rounding of exponents of up to 17), which is
// within the contract from kPlain on. Smaller values are summed again, column by column without cancellation.
#pragma once

#include "blocks.h"

namespace cepo {
namespace CEPO_ISA {

constexpr double kPlain = 0x1p-3;  // nats
constexpr float kFarApart = 0x1p22f;    // a log2 ratio from which a probability that float32 lacks may weigh: go slow
constexpr int64_t kRun = 16 * kWidth;   // columns, of eight terms a lane: equal terms all round to the same side
constexpr float kBottom = -0x1p100f;    // what an impossible column counts as in a log-ratio

// A column of the first row, whose term is 2^t, and the ratio log2(2^t / 2^s) to that of the second, by their
// references.
struct Term {
    Exp2 of_x, of_y;
    Vec gap;
};
template <bool kGap>
inline Term term_of(Vec x, Vec y, Vec k, Vec minus_cx, Vec minus_cy) {
    const Vec t = fused(x, k, minus_cx), s = fused(y, k, minus_cy), lowest = set(kLowest), bottom = set(kBottom);
    return {exp2_parts(max(lowest, t)), exp2_parts(max(lowest, s)), kGap ? sub(max(bottom, t), max(bottom, s)) : lowest};
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

    template <bool kGap, class T>
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
                        const Term term = term_of<kGap>(at_x[i], at_y[i], k, cx, cy);
                        const Vec e = mul(term.of_x.mantissa, term.of_x.scale);
                        run_x[i] = add(run_x[i], e);
                        run_y[i] = fma(term.of_y.mantissa, term.of_y.scale, run_y[i]);
                        if (kGap) run_u[i] = fma(e, term.gap, run_u[i]), far[i] = max(far[i], term.gap);
                    }
                }
                for (int i = 0; i < 2; ++i)
                    sx[i] = add(sx[i], run_x[i]), sy[i] = add(sy[i], run_y[i]), u[i] = add(u[i], run_u[i]);
            }
            bool again = x.moved(lane_max(max(top_x[0], top_x[1])));
            following([&] { again |= y.moved(lane_max(max(top_y[0], top_y[1]))); });
            if (again) continue;
            x.add(lane_sum(sx[0], sx[1]), kGap ? lane_sum(u[0], u[1]) : 0.0);
            y.add(lane_sum(sy[0], sy[1]), 0.0);
            if (kGap) worst = fmaxf(worst, lane_max(max(far[0], far[1])));
            return;
        }
    }

    template <bool kGap, class T>
    void row(const T* a, const T* b, int64_t vocabulary) {
        for (int64_t start = 0; start < vocabulary && !done(); start += kBlock) {
            const int64_t n = vocabulary - start < kBlock ? vocabulary - start : kBlock, full = n / kStep * kStep;
            if (full > 0) block<kGap>(a + start, b + start, full);
            if (full == n || done()) continue;
            T rest[2][kStep];
            for (int64_t j = 0; j < kStep; ++j) {
                set_negative_infinity(rest[0][j]), set_negative_infinity(rest[1][j]);
                if (full + j < n) rest[0][j] = a[start + full + j], rest[1][j] = b[start + full + j];
            }
            block<kGap>(rest[0], rest[1], kStep);
        }
    }

    // log2 of the second's normaliser over the first's, relative to their references.
    double levels() const { return log2(y.sum.s) - log2(x.sum.s); }
    // The KL in nats, NaN where this sum does not know it well enough.
    double value() const {
        const double found = (x.sum.u / x.sum.s + levels()) * kLn2;
        return worst <= kFarApart && found >= kPlain ? found : NAN;
    }
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
    const auto two = [&](const T* a, const T* b, T* out) {
        Vec at_x[2], at_y[2], found[2];
        load2(a, at_x[0], at_x[1]);
        load2(b, at_y[0], at_y[1]);
        for (int i = 0; i < 2; ++i) {
            const Term term = term_of<kInX>(at_x[i], at_y[i], k, cx, cy);
            found[i] = kInX ? mul(mul(fma(slope, term.gap, base), term.of_x.mantissa), term.of_x.scale)
                            : fma(mul(slope, term.of_y.mantissa), term.of_y.scale,
                                  mul(mul(base, term.of_x.mantissa), term.of_x.scale));
        }
        store2(out, found[0], found[1]);
    };
    const int64_t full = vocabulary / (2 * kWidth) * (2 * kWidth), rest = vocabulary - full;
    for (int64_t j = 0; j < full; j += 2 * kWidth) two(a + j, b + j, out + j);
    if (rest == 0) return;
    T last[2][2 * kWidth] = {};
    memcpy(last[0], a + full, rest * sizeof(T));
    memcpy(last[1], b + full, rest * sizeof(T));
    two(last[0], last[1], last[0]);
    memcpy(out + full, last[0], rest * sizeof(T));
}

}  // namespace CEPO_ISA
}  // namespace cepo
