// From a row's sums to the gradient in its logits.
#pragma once

#include "scan.h"

namespace cepo {
namespace CEPO_ISA {

template <bool kEntropy>
inline Vec column_gradient(Vec x, Vec k, Vec minus_c, Vec a, Vec b) {
    const Vec t = term_exponent(x, k, minus_c);
    const Exp2 e = exp2_parts(t);
    const Vec factor = kEntropy ? fma(b, t, a) : a;
    return mul(mul(e.mantissa, factor), e.scale);
}

// 2^t (a + b t) for n columns, a multiple of 2 kWidth; under a soft cap times 1 - tanh^2, from the raw logits.
template <class T, bool kEntropy>
void block_gradient(const T* x, T* out, int64_t n, const Transform& transform, float c, float a, float b) {
    const Vec k = set(transform.k), minus_c = set(-c), va = set(a), vb = set(b);
    for (int64_t j = 0; j < n; j += 2 * kWidth) {
        Vec first, second;
        load2(x + j, first, second);
        if (transform.capped) {
            const Vec one = set(1.0f), minus = set(-1.0f);
            first = tanh_of(mul(first, set(transform.inner)));
            second = tanh_of(mul(second, set(transform.inner)));
            const Vec slope0 = mul(add(one, first), fma(minus, first, one));
            const Vec slope1 = mul(add(one, second), fma(minus, second, one));
            store2(out + j, mul(slope0, column_gradient<kEntropy>(first, k, minus_c, va, vb)),
                   mul(slope1, column_gradient<kEntropy>(second, k, minus_c, va, vb)));
        } else {
            store2(out + j, column_gradient<kEntropy>(first, k, minus_c, va, vb),
                   column_gradient<kEntropy>(second, k, minus_c, va, vb));
        }
    }
}

template <class T>
void fill(T* out, int64_t n, float value) {
    T filler;
    narrow(value, filler);
    for (int64_t j = 0; j < n; ++j) out[j] = filler;
}

template <class T>
void slow_gradient(const T* x, T* out, int64_t n, const Transform& transform, double c, const Slopes& slope) {
    for (int64_t j = 0; j < n; ++j) {
        const double value = transform.value(widened(x[j])), t = value * transform.k - c;
        const double outer = transform.capped ? 1.0 - value * value : 1.0;
        narrow(t < kLowest ? 0.0f : static_cast<float>(outer * exp2(t) * (slope.a + slope.b * t)), out[j]);
    }
}

// The gradient of g log p + h H in every column, given what the forward found; out may be x.
template <class T>
void write_gradient(const T* x, T* out, int64_t vocabulary, int64_t label, const Transform& transform,
                    const RowResult& row, double g, double h) {
    const RowScalars& at = row.scalars;
    if (at.complement != at.complement || g != g || h != h) {
        fill(out, vocabulary, NAN);
        return;
    }
    const double tanh_label = transform.capped ? transform.value(widened(x[label])) : 0.0;
    const RowSum sum = row.slow ? slow_sum(x, vocabulary, label, transform) : row.sum;
    const Slopes slope = slopes(g, h, at.logprob, at.complement, at.entropy, sum.s, transform.chain);
    if (row.slow) {
        slow_gradient(x, out, vocabulary, transform, sum.c, slope);
    } else {
        const float a = static_cast<float>(slope.a), b = static_cast<float>(slope.b), c = static_cast<float>(sum.c);
        const auto block = [&](const T* from, T* to, int64_t n) {
            h == 0.0 ? block_gradient<T, false>(from, to, n, transform, c, a, b)
                     : block_gradient<T, true>(from, to, n, transform, c, a, b);
        };
        const int64_t full = vocabulary / (2 * kWidth) * (2 * kWidth), rest = vocabulary - full;
        block(x, out, full);
        if (rest) {
            T tail[2 * kWidth] = {};
            memcpy(tail, x + full, rest * sizeof(T));
            block(tail, tail, 2 * kWidth);
            memcpy(out + full, tail, rest * sizeof(T));
        }
    }
    narrow(static_cast<float>(slope.label * (1.0 - tanh_label * tanh_label)), out[label]);
}

}  // namespace CEPO_ISA
}  // namespace cepo
