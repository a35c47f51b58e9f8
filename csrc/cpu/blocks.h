// Rows of any dtype as float32 blocks and back, and their largest columns.
#pragma once

#include "scan.h"

namespace cepo {
namespace CEPO_ISA {

// n columns as float32, -inf up to a multiple of kStep; where the order is free, as load2 has it.
template <class T>
int64_t to_floats(const T* x, int64_t n, float* out, bool in_order) {
    const int64_t full = (n + kStep - 1) / kStep * kStep;
    if (in_order && kSplitsBFloat16 && sizeof(T) == sizeof(BFloat16)) {
        for (int64_t j = 0; j < n; ++j) out[j] = widened(x[j]);
        for (int64_t j = n; j < full; ++j) out[j] = -INFINITY;
        return full;
    }
    for (int64_t j = 0; j < full; j += 2 * kWidth) {
        Vec a, b;
        if (j + 2 * kWidth <= n) {
            load2(x + j, a, b);
        } else {
            T rest[2 * kWidth];
            for (int64_t i = 0; i < 2 * kWidth; ++i)
                if (j + i < n) {
                    rest[i] = x[j + i];
                } else {
                    set_negative_infinity(rest[i]);
                }
            load2(rest, a, b);
        }
        store(out + j, a);
        store(out + j + kWidth, b);
    }
    return full;
}

// The reverse, of n columns.
template <class T>
void from_floats(const float* x, int64_t n, T* out, bool in_order) {
    if (in_order && kSplitsBFloat16 && sizeof(T) == sizeof(BFloat16)) {
        for (int64_t j = 0; j < n; ++j) narrow(x[j], out[j]);
        return;
    }
    const int64_t full = n / (2 * kWidth) * (2 * kWidth);
    const auto two = [](const float* from, T* to) {
        Vec a, b;
        load2(from, a, b);
        store2(to, a, b);
    };
    for (int64_t j = 0; j < full; j += 2 * kWidth) two(x + j, out + j);
    if (full < n) {
        T rest[2 * kWidth];
        two(x + full, rest);
        memcpy(out + full, rest, (n - full) * sizeof(T));
    }
}

// f(typed pointer to the first column of the row).
template <class F>
auto with_row(const Logits& logits, int64_t inner, int64_t row, F f) {
    switch (logits.dtype) {
        case Dtype::kFloat32:
            return f(row_start<float>(logits, inner, row));
        case Dtype::kBFloat16:
            return f(row_start<BFloat16>(logits, inner, row));
        default:
            return f(row_start<Half>(logits, inner, row));
    }
}

// As large as the value is, and the value of a rank.
inline uint32_t rank_of(float value) {
    const uint32_t bits = bits_of(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline float value_of(uint32_t rank) {
    const uint32_t bits = rank >> 31 ? rank & 0x7fffffffu : ~rank;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The columns of the k largest logits, of equals the first, in rising order; both arrays have room for 2 k + kStep.
template <class T>
void largest(const T* x, int64_t vocabulary, int64_t k, int64_t* columns, uint32_t* ranks) {
    int64_t count = 0;
    float threshold = -INFINITY;
    bool has_k = false;  // the threshold is the k-th so far; a later column that equals it comes after it
    const auto reduce = [&] {
        uint32_t lowest = 0;  // the k-th rank, bit by bit
        for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
            uint32_t reach = 0;
            for (int64_t i = 0; i < count; ++i) reach += ranks[i] >= (lowest | bit);
            if (reach >= k) lowest |= bit;
        }
        int64_t equals = k, out = 0;
        for (int64_t i = 0; i < count; ++i) equals -= ranks[i] > lowest;
        for (int64_t i = 0; i < count; ++i)
            if (ranks[i] > lowest || (ranks[i] == lowest && equals-- > 0))
                ranks[out] = ranks[i], columns[out++] = columns[i];
        threshold = value_of(lowest);
        count = out;
        has_k = true;
    };
    for (int64_t start = 0; start < vocabulary; start += kStep) {
        const int64_t n = vocabulary - start < kStep ? vocabulary - start : kStep;
        if (has_k && n == kStep && !(block_max(x + start, kStep) > threshold)) continue;
        for (int64_t j = start; j < start + n; ++j) {
            const float value = widened(x[j]) + 0.0f;  // of -0 a 0, which it equals
            if (!has_k || value > threshold) {
                ranks[count] = rank_of(value != value ? INFINITY : value);
                columns[count++] = j;
            }
            if (count == 2 * k + kStep) reduce();
        }
    }
    if (count > k) reduce();
}

}  // namespace CEPO_ISA
}  // namespace cepo
