// The two 16-bit floats, one value at a time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace cepo {
namespace CEPO_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
inline uint32_t bits_of(float value) {
    uint32_t out;
    memcpy(&out, &value, sizeof out);
    return out;
}

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widened(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    const uint32_t exponent = rest & 0x0f800000u;
    if (exponent == 0x0f800000u) return float_of(sign | rest | 0x70000000u);  // inf, NaN
    if (exponent != 0) return float_of(sign | (rest + 0x38000000u));
    return float_of(sign | bits_of(float_of(rest + 0x38800000u) - 0x1p-14f));  // subnormal
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, BFloat16& out) {
    const uint32_t bits = bits_of(value);
    out.bits = value != value ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float value, Half& out) {
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const float size = fabsf(value);
    uint32_t rest;
    if (value != value) {
        rest = 0x7e00u;
    } else if (size >= 65520.0f) {
        rest = 0x7c00u;
    } else if (size < 0x1p-14f) {
        rest = bits_of(size + 0.5f) - bits_of(0.5f);  // the addition rounds to a multiple of 2^-24
    } else {
        const uint32_t magnitude = bits & 0x7fffffffu;
        rest = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | rest);
}

inline void set_negative_infinity(float& out) { out = -INFINITY; }
inline void set_negative_infinity(BFloat16& out) { out.bits = 0xff80u; }
inline void set_negative_infinity(Half& out) { out.bits = 0xfc00u; }

}  // namespace CEPO_ISA
}  // namespace cepo
