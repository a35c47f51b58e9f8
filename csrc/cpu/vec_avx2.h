// Eight float32 lanes with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "types.h"

namespace cepo {
namespace CEPO_ISA {

constexpr int kWidth = 8;
constexpr bool kSplitsBFloat16 = true;
using Vec = __m256;

inline Vec set(float a) { return _mm256_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }  // rounded once, on every processor
// NaN in the second operand wins, as the hardware has it.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
// The low nine bits of a float's pattern moved to its sign and exponent.
inline Vec exponent_from_low_bits(Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
// x where a < b, else y; false for NaN.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline bool all_less(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) == 0xff; }
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* out, Vec a) { _mm256_storeu_ps(out, a); }

// Two vectors at a time. bfloat16 splits into even and odd columns, which spares the shuffles.
inline void load2(const float* x, Vec& a, Vec& b) {
    a = _mm256_loadu_ps(x);
    b = _mm256_loadu_ps(x + 8);
}
inline void load2(const BFloat16* x, Vec& a, Vec& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}
inline void load2(const Half* x, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8)));
}
inline void store2(float* out, Vec a, Vec b) {
    _mm256_storeu_ps(out, a);
    _mm256_storeu_ps(out + 8, b);
}
inline __m256i rounded_to_bfloat16(Vec a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline void store2(BFloat16* out, Vec a, Vec b) {
    const __m256i even = _mm256_srli_epi32(rounded_to_bfloat16(a), 16);
    const __m256i odd = _mm256_and_si256(rounded_to_bfloat16(b), _mm256_set1_epi32(0xffff0000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(even, odd));
}
inline void store2(Half* out, Vec a, Vec b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace CEPO_ISA
}  // namespace cepo
