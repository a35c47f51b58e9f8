// Eight float32 lanes in the vector types of GCC and Clang: any processor, whatever vectors it has.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

namespace cepo {
namespace CEPO_ISA {

constexpr int kWidth = 8;
constexpr bool kSplitsBFloat16 = false;
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Bits __attribute__((vector_size(4 * kWidth)));

inline Vec set(float a) { return Vec{} + a; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Rounded once even where the processor has no such instruction: the product of two float32 is exact in float64.
inline Vec fused(Vec a, Vec b, Vec c) {
    Vec out;
#if defined(__FMA__) || defined(__aarch64__)
    for (int i = 0; i < kWidth; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
    typedef double Wide __attribute__((vector_size(8 * kWidth)));
    out = __builtin_convertvector(
        __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) + __builtin_convertvector(c, Wide), Vec);
#endif
    return out;
}
inline Vec chosen(Bits mask, Vec x, Vec y) { return (Vec)((mask & (Bits)x) | (~mask & (Bits)y)); }
// NaN in the second operand wins.
inline Vec max(Vec a, Vec b) { return chosen(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return chosen(a < b, a, b); }
// The low nine bits of a float's pattern moved to its sign and exponent.
inline Vec exponent_from_low_bits(Vec a) { return (Vec)((Bits)a << 23); }
// x where a < b, else y; false for NaN.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) { return chosen(a < b, x, y); }
inline bool all_less(Vec a, Vec b) {
    const Bits less = a < b;
    bool all = true;
    for (int i = 0; i < kWidth; ++i) all &= less[i] != 0;
    return all;
}
inline Vec load(const float* x) {
    Vec a;
    memcpy(&a, x, sizeof a);
    return a;
}
inline void store(float* out, Vec a) { memcpy(out, &a, sizeof a); }

inline void load2(const float* x, Vec& a, Vec& b) {
    memcpy(&a, x, sizeof a);
    memcpy(&b, x + kWidth, sizeof b);
}
template <class T>
inline void load2(const T* x, Vec& a, Vec& b) {
    for (int i = 0; i < kWidth; ++i) a[i] = widened(x[i]);
    for (int i = 0; i < kWidth; ++i) b[i] = widened(x[kWidth + i]);
}
template <class T>
inline void store2(T* out, Vec a, Vec b) {
    for (int i = 0; i < kWidth; ++i) narrow(a[i], out[i]);
    for (int i = 0; i < kWidth; ++i) narrow(b[i], out[kWidth + i]);
}

}  // namespace CEPO_ISA
}  // namespace cepo
