// Sixteen float32 lanes with AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "types.h"

namespace cepo {
namespace CEPO_ISA {

constexpr int kWidth = 16;
constexpr bool kSplitsBFloat16 = true;
using Vec = __m512;

inline Vec set(float a) { return _mm512_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }  // rounded once, on every processor
// NaN in the second operand wins, as the hardware has it.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// The low nine bits of a float's pattern moved to its sign and exponent.
inline Vec exponent_from_low_bits(Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
// x where a < b, else y; false for NaN.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline bool all_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) == 0xffff; }
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* out, Vec a) { _mm512_storeu_ps(out, a); }

// Two vectors at a time. bfloat16 splits into even and odd columns, which spares the shuffles.
inline void load2(const float* x, Vec& a, Vec& b) {
    a = _mm512_loadu_ps(x);
    b = _mm512_loadu_ps(x + 16);
}
inline void load2(const BFloat16* x, Vec& a, Vec& b) {
    const __m512i both = _mm512_loadu_si512(x);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
}
inline void load2(const Half* x, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16)));
}
inline void store2(float* out, Vec a, Vec b) {
    _mm512_storeu_ps(out, a);
    _mm512_storeu_ps(out + 16, b);
}
inline __m512i rounded_to_bfloat16(Vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline void store2(BFloat16* out, Vec a, Vec b) {
    const __m512i even = _mm512_srli_epi32(rounded_to_bfloat16(a), 16);
    const __m512i odd = _mm512_and_si512(rounded_to_bfloat16(b), _mm512_set1_epi32(0xffff0000));
    _mm512_storeu_si512(out, _mm512_or_si512(even, odd));
}
inline void store2(Half* out, Vec a, Vec b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace CEPO_ISA
}  // namespace cepo
