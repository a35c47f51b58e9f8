// One pass over a row, for the instruction set whose vec_*.h was included first.
//
// The row is read in blocks that stay in the first-level cache. Each block is summed relative to the reference found so
// far while its maximum is taken; only if that maximum is too far above the reference is the reference raised and the
// block, still in cache, summed again. Which column meets which lane depends on the column alone, so a row's bits do
// not depend on its neighbours, its alignment or the number of threads.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../api.h"
#include "../rowmath.h"
#include "types.h"

namespace cepo {
namespace CEPO_ISA {

constexpr int kStep = 4 * kWidth;  // columns per iteration
constexpr int64_t kBlock = 2048;   // columns: at most 8 KB, and few enough terms per lane for float32 sums

static_assert(3 * kBlock * sizeof(float) <= 64 * 1024, "what a thread keeps besides the outputs");

// 2^t for t in [-127, 128) as mantissa and scale: minimax polynomial on [-1/2, 1/2], relative error 2.2e-7. The magic
// number rounds t and leaves its exponent's bits, biased, at the low end; t = -127 makes the scale exactly 0.
struct Exp2 {
    Vec mantissa, scale;
};
inline Exp2 exp2_parts(Vec t) {
    const Vec magic = set(12582912.0f + 127.0f);
    const Vec rounded = add(t, magic);
    const Vec f = sub(t, sub(rounded, magic));
    Vec p = fma(set(0x1.5c08e6p-10f), f, set(0x1.3d0c52p-7f));
    p = fma(p, f, set(0x1.c6b6e4p-5f));
    p = fma(p, f, set(0x1.ebf918p-3f));
    p = fma(p, f, set(0x1.62e428p-1f));
    p = fma(p, f, set(0x1.000002p+0f));
    return {p, exponent_from_low_bits(rounded)};
}
inline Vec term_exponent(Vec x, Vec k, Vec minus_c) { return max(set(kLowest), fused(x, k, minus_c)); }

// tanh within 1.3e-7: an odd polynomial near 0, 1 - 2 / (e^2z + 1) elsewhere, where nothing cancels.
inline Vec tanh_of(Vec z) {
    const Vec size = max(z, sub(set(0.0f), z));
    const Vec z2 = mul(z, z);
    Vec near = fma(set(-0x1.82e064p-8f), z2, set(0x1.54d64ap-6f));
    near = fma(near, z2, set(-0x1.b89d50p-5f));
    near = fma(near, z2, set(0x1.1109d0p-3f));
    near = fma(near, z2, set(-0x1.55553ep-2f));
    near = fma(mul(near, z2), size, size);
    const Exp2 e = exp2_parts(min(set(60.0f), mul(size, set(static_cast<float>(2 * kLog2e)))));
    const Vec far = sub(set(1.0f), div(set(2.0f), fma(e.mantissa, e.scale, set(1.0f))));
    const Vec both = where_less(size, set(0.6f), near, far);
    return where_less(z, set(0.0f), sub(set(0.0f), both), both);
}

struct BlockSum {
    double s, u;
    float top;
};

inline double lane_sum(Vec a, Vec b) {
    float lanes[2 * kWidth];
    store(lanes, a);
    store(lanes + kWidth, b);
    double total = 0.0;
    for (int i = 0; i < 2 * kWidth; ++i) total += lanes[i];
    return total;
}
inline float lane_max(Vec a) {
    float lanes[kWidth];
    store(lanes, a);
    float top = lanes[0];
    for (int i = 1; i < kWidth; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

template <bool kEntropy>
inline void add_terms(Vec x, Vec k, Vec minus_c, Vec& s, Vec& u, Vec& top) {
    top = max(top, x);
    const Vec t = term_exponent(x, k, minus_c);
    const Exp2 e = exp2_parts(t);
    s = fma(e.mantissa, e.scale, s);
    if (kEntropy) u = fma(t, mul(e.mantissa, e.scale), u);
}

// n is a multiple of kStep.
template <class T, bool kEntropy>
BlockSum block_sum(const T* x, int64_t n, float k, float c) {
    const Vec vk = set(k), minus_c = set(-c);
    Vec s0 = set(0.0f), s1 = s0, u0 = s0, u1 = s0, top0 = set(-INFINITY), top1 = top0;
    for (int64_t j = 0; j < n; j += kStep) {
        Vec a, b;
        load2(x + j, a, b);
        add_terms<kEntropy>(a, vk, minus_c, s0, u0, top0);
        add_terms<kEntropy>(b, vk, minus_c, s1, u1, top1);
        load2(x + j + 2 * kWidth, a, b);
        add_terms<kEntropy>(a, vk, minus_c, s0, u0, top0);
        add_terms<kEntropy>(b, vk, minus_c, s1, u1, top1);
    }
    return {lane_sum(s0, s1), kEntropy ? lane_sum(u0, u1) : 0.0, lane_max(max(top0, top1))};
}

template <class T>
float block_max(const T* x, int64_t n) {
    Vec top0 = set(-INFINITY), top1 = top0;
    for (int64_t j = 0; j < n; j += 2 * kWidth) {
        Vec a, b;
        load2(x + j, a, b);
        top0 = max(top0, a);
        top1 = max(top1, b);
    }
    return lane_max(max(top0, top1));
}

// How a raw logit becomes an exponent: t = value k - c, value = x, or tanh(x inner) under a soft cap.
struct Transform {
    float k, inner;
    bool capped;
    double chain;  // dx'/dx, but for the cap's 1 - tanh^2

    Transform(const Options& options, int64_t row) {
        const double temperature = options.row_temperature ? options.row_temperature[row] : options.temperature;
        capped = options.softcap > 0.0;
        chain = options.scale / temperature;
        inner = capped ? static_cast<float>(options.scale / options.softcap) : 1.0f;
        k = static_cast<float>((capped ? options.softcap / temperature : chain) * kLog2e);
    }
    double value(float x) const {
        return !capped || x == INFINITY ? static_cast<double>(x) : tanh(static_cast<double>(x) * inner);
    }
};

// n columns from x as float32 values, padded with -inf to a multiple of kStep; the soft cap must not hide a +inf.
template <class T>
int64_t capped_block(const T* x, int64_t n, float inner, float* out) {
    T padded[kBlock];
    const int64_t full = (n + kStep - 1) / kStep * kStep;
    memcpy(padded, x, n * sizeof(T));
    for (int64_t j = n; j < full; ++j) set_negative_infinity(padded[j]);
    for (int64_t j = 0; j < full; j += 2 * kWidth) {
        Vec a, b;
        load2(padded + j, a, b);
        const Vec huge = set(0x1.fffffep127f);
        store(out + j, where_less(huge, a, a, tanh_of(mul(a, set(inner)))));
        store(out + j + kWidth, where_less(huge, b, b, tanh_of(mul(b, set(inner)))));
    }
    return full;
}

// Where load2 and store put a column of a block: bfloat16 may come apart into evens and odds.
template <class T>
inline int64_t lane_of(int64_t column) {
    return column;
}
template <>
inline int64_t lane_of<BFloat16>(int64_t column) {
    if (!kSplitsBFloat16) return column;
    const int64_t in_pair = column % (2 * kWidth);
    return column - in_pair + (in_pair % 2) * kWidth + in_pair / 2;
}

// The running sums of a row, block by block.
struct Scan {
    RowSum sum;
    float k;
    bool placed = false;    // a reference was found
    bool rising = false;    // the last block moved it: look at the next one's maximum first
    bool tiny = false;      // a finite column too low to be a reference was seen
    bool huge = false;      // one too high: float32 exponents will not do
    bool poisoned = false;  // +inf or NaN

    bool done() const { return huge || poisoned; }

    void place(float top) {
        const float reference = rintf(top * k);
        if (fabsf(reference) <= kLargest) {
            sum = placed ? rebased(sum, reference) : RowSum{0.0, 0.0, reference};
            placed = true;
        } else if (top > 0.0f) {
            top == INFINITY ? poisoned = true : huge = true;
        } else if (top > -INFINITY) {
            tiny = true;
        }
    }
    bool too_high(float top) const { return top * k - static_cast<float>(sum.c) > kHeadroom; }

    // A first reference; and where the last block moved it, the next one's.
    template <class T>
    void look_ahead(const T* x, int64_t n) {
        if (placed && !rising) return;
        const float top = block_max(x, n);
        rising = placed && too_high(top);
        if (!placed || rising) place(top);
    }
    // Whether a block of this maximum moves the reference, and must be summed again.
    bool moved(float top) {
        if (!placed || !too_high(top)) return false;
        rising = true;
        place(top);
        return true;
    }
    void add(double s, double u) {
        poisoned = s != s;
        sum.s += s;
        sum.u += u;
    }

    template <class T, bool kEntropy>
    void block(const T* x, int64_t n) {
        look_ahead(x, n);
        if (done()) return;
        BlockSum got = block_sum<T, kEntropy>(x, n, k, static_cast<float>(sum.c));
        if (moved(got.top)) {
            if (done()) return;
            got = block_sum<T, kEntropy>(x, n, k, static_cast<float>(sum.c));
        }
        add(got.s, got.u);
    }
};

// The same sums in float64 and two passes, for rows whose logits leave the range of float32 exponents.
template <class T>
RowSum slow_sum(const T* x, int64_t vocabulary, int64_t label, const Transform& transform) {
    RowSum sum;
    sum.c = -INFINITY;
    const double k = transform.k;
    for (int64_t j = 0; j < vocabulary; ++j) {
        const double t = transform.value(widened(x[j])) * k;
        if (j != label && t > sum.c) sum.c = t;
    }
    for (int64_t j = 0; j < vocabulary; ++j) {
        const double t = transform.value(widened(x[j])) * k - sum.c;
        if (j == label || t < kLowest) continue;
        const double term = exp2(t);
        sum.s += term;
        sum.u += t * term;
    }
    return sum;
}

// The other columns' entropy among themselves, from the sums of all but their largest: nothing cancels.
template <class T>
double slow_spread(const T* x, int64_t vocabulary, int64_t label, const Transform& transform) {
    const double unit = transform.k * kLn2;
    int64_t top = label;
    for (int64_t j = 0; j < vocabulary; ++j)
        if (j != label && (top == label || widened(x[j]) > widened(x[top]))) top = j;
    double rest = 0.0, gaps = 0.0;
    for (int64_t j = 0; j < vocabulary; ++j) {
        const double gap = (transform.value(widened(x[top])) - transform.value(widened(x[j]))) * unit;
        if (j == label || j == top || !(gap < 700.0)) continue;  // beyond it, nothing that float64 could hold
        rest += exp(-gap);
        gaps += gap * exp(-gap);
    }
    return log1p(rest) + gaps / (1.0 + rest);
}

struct RowResult {
    RowScalars scalars;
    RowSum sum;
    bool slow;
};

template <class T, bool kEntropy>
RowResult scan_row(const T* x, int64_t vocabulary, int64_t label, const Transform& transform) {
    T block[kBlock];
    float capped[kBlock];
    Scan scan;
    scan.k = transform.k;
    for (int64_t start = 0; start < vocabulary && !scan.done(); start += kBlock) {
        const int64_t n = vocabulary - start < kBlock ? vocabulary - start : kBlock;
        const bool has_label = label >= start && label < start + n;
        if (transform.capped) {
            const int64_t full = capped_block(x + start, n, transform.inner, capped);
            for (int64_t j = n; j < full; ++j) capped[lane_of<T>(j)] = -INFINITY;
            if (has_label) capped[lane_of<T>(label - start)] = -INFINITY;
            scan.block<float, kEntropy>(capped, full);
        } else if (has_label || n % kStep) {
            const int64_t full = (n + kStep - 1) / kStep * kStep;
            memcpy(block, x + start, n * sizeof(T));
            for (int64_t j = n; j < full; ++j) set_negative_infinity(block[j]);
            if (has_label) set_negative_infinity(block[label - start]);
            scan.block<T, kEntropy>(block, full);
        } else {
            scan.block<T, kEntropy>(x + start, n);
        }
    }
    const float label_x = widened(x[label]);
    RowResult out{{NAN, NAN, NAN, NAN}, scan.sum, false};
    if (scan.poisoned || label_x != label_x || label_x == INFINITY) return out;
    if (scan.huge || (scan.tiny && !scan.placed)) {
        out.sum = slow_sum(x, vocabulary, label, transform);
        out.slow = true;
    }
    out.scalars = finish(out.sum, transform.value(label_x) * transform.k - out.sum.c);
    if (kEntropy) {
        out.scalars.entropy = entropy_of(out.scalars, spread_of(out.sum));
        // One column holds nearly all that the label does not: the sums cannot tell how nearly.
        if (out.slow || out.scalars.entropy * kSumsError < out.scalars.complement * kEntropyError)
            out.scalars.entropy = entropy_of(out.scalars, slow_spread(x, vocabulary, label, transform));
    }
    return out;
}

template <class T>
const T* row_start(const Logits& logits, int64_t inner, int64_t row) {
    return static_cast<const T*>(logits.data) + (row / inner) * logits.outer_stride +
           (row % inner) * logits.inner_stride;
}

RowResult scan(const Logits& logits, int64_t inner, int64_t row, int64_t vocabulary, int64_t label,
               const Transform& transform, bool with_entropy) {
    switch (logits.dtype) {
        case Dtype::kFloat32: {
            const auto x = row_start<float>(logits, inner, row);
            return with_entropy ? scan_row<float, true>(x, vocabulary, label, transform)
                                : scan_row<float, false>(x, vocabulary, label, transform);
        }
        case Dtype::kBFloat16: {
            const auto x = row_start<BFloat16>(logits, inner, row);
            return with_entropy ? scan_row<BFloat16, true>(x, vocabulary, label, transform)
                                : scan_row<BFloat16, false>(x, vocabulary, label, transform);
        }
        default: {
            const auto x = row_start<Half>(logits, inner, row);
            return with_entropy ? scan_row<Half, true>(x, vocabulary, label, transform)
                                : scan_row<Half, false>(x, vocabulary, label, transform);
        }
    }
}

}  // namespace CEPO_ISA
}  // namespace cepo
