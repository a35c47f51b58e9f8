// Eight float32 lanes as a plain array: any compiler, any processor. The compiler vectorises the loops where it can.
#pragma once

#include <math.h>
#include <stdint.h>

#include "types.h"

namespace cepo {
namespace CEPO_ISA {

constexpr int kWidth = 8;
constexpr bool kSplitsBFloat16 = false;
struct Vec {
    float lane[kWidth];
};

template <class F>
inline Vec each(F f) {
    Vec out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = f(i);
    return out;
}

inline Vec set(float a) {
    return each([=](int) { return a; });
}
inline Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
// Rounded once even where the processor has no such instruction: the product of two float32 is exact in float64.
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
#if defined(__FMA__) || defined(__aarch64__)
    return each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
#else
    return each([&](int i) { return static_cast<float>(static_cast<double>(a.lane[i]) * b.lane[i] + c.lane[i]); });
#endif
}
// NaN in the second operand wins.
inline Vec max(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// The low nine bits of a float's pattern moved to its sign and exponent.
inline Vec exponent_from_low_bits(const Vec& a) {
    return each([&](int i) { return float_of(bits_of(a.lane[i]) << 23); });
}
// x where a < b, else y; false for NaN.
inline Vec where_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}
inline void store(float* out, const Vec& a) {
    for (int i = 0; i < kWidth; ++i) out[i] = a.lane[i];
}
template <class T>
inline void load2(const T* x, Vec& a, Vec& b) {
    a = each([&](int i) { return widened(x[i]); });
    b = each([&](int i) { return widened(x[kWidth + i]); });
}
template <class T>
inline void store2(T* out, const Vec& a, const Vec& b) {
    for (int i = 0; i < kWidth; ++i) narrow(a.lane[i], out[i]);
    for (int i = 0; i < kWidth; ++i) narrow(b.lane[i], out[kWidth + i]);
}

}  // namespace CEPO_ISA
}  // namespace cepo
