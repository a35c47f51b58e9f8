// The three logit types, 16 bytes at a time: a piece, which is what one lane loads at once.
#pragma once

#define CEPO_ISA cuda
#include "../api.h"
#include "../rowmath.h"
#include "device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define CEPO_DEVICE __device__ __forceinline__

namespace cepo {
namespace cuda {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

template <class T>
constexpr int kPieceColumns = 16 / static_cast<int>(sizeof(T));

CEPO_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
CEPO_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// 16-bit floats from float32, to nearest even, NaN kept; the plain arithmetic is what the instructions do.
CEPO_DEVICE uint32_t narrowed(float x, BFloat16) {
#ifdef __CUDACC__
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = float_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
#endif
}
CEPO_DEVICE uint32_t narrowed(float x, Half) {
#ifdef __CUDACC__
    return __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (x != x) return 0x7fffu;
    if (size >= 0x477ff000u) return sign | 0x7c00u;
    if (size < 0x38800000u) return sign | (float_bits(bits_float(size) + 0.5f) - float_bits(0.5f));
    return sign | (size - 0x38000000u + 0x0fffu + (size >> 13 & 1u)) >> 13;
#endif
}
CEPO_DEVICE float widened_bits(uint32_t bits, BFloat16) { return bits_float(bits << 16); }
CEPO_DEVICE float widened_bits(uint32_t bits, Half) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
    const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return bits_float(sign | rest | 0x70000000u);
    if (rest >= 0x00800000u) return bits_float(sign | (rest + 0x38000000u));
    return bits_float(sign | float_bits(bits_float(rest + 0x38800000u) - 0x1p-14f));
#endif
}
CEPO_DEVICE float widened(float x) { return x; }
template <class T>
CEPO_DEVICE float widened(T x) {
    return widened_bits(x.bits, T{});
}
CEPO_DEVICE void narrow(float value, float& out) { out = value; }
template <class T>
CEPO_DEVICE void narrow(float value, T& out) {
    out.bits = static_cast<uint16_t>(narrowed(value, T{}));
}

CEPO_DEVICE uint32_t word(const uint4& piece, int i) {
    return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
}

// The columns of a piece as float32, and back.
CEPO_DEVICE void unpack(const uint4& piece, float (&out)[4], float) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bits_float(word(piece, i));
}
CEPO_DEVICE void unpack(const uint4& piece, float (&out)[8], BFloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = bits_float(word(piece, i) << 16);
        out[2 * i + 1] = bits_float(word(piece, i) & 0xffff0000u);
    }
}
CEPO_DEVICE void unpack(const uint4& piece, float (&out)[8], Half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = widened_bits(word(piece, i) & 0xffffu, Half{});
        out[2 * i + 1] = widened_bits(word(piece, i) >> 16, Half{});
    }
}
CEPO_DEVICE uint4 pack(const float (&in)[4], float) {
    return make_uint4(float_bits(in[0]), float_bits(in[1]), float_bits(in[2]), float_bits(in[3]));
}
CEPO_DEVICE uint32_t narrowed_pair(float low, float high, BFloat16 type [[maybe_unused]]) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return narrowed(low, type) | narrowed(high, type) << 16;
#endif
}
CEPO_DEVICE uint32_t narrowed_pair(float low, float high, Half type [[maybe_unused]]) {
#ifdef __CUDACC__
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return narrowed(low, type) | narrowed(high, type) << 16;
#endif
}
template <class T>
CEPO_DEVICE uint4 pack(const float (&in)[8], T type) {
    return make_uint4(narrowed_pair(in[0], in[1], type), narrowed_pair(in[2], in[3], type),
                      narrowed_pair(in[4], in[5], type), narrowed_pair(in[6], in[7], type));
}

// Bits of a word whose columns are all -inf.
CEPO_DEVICE uint32_t lowest_word(float) { return 0xff800000u; }
CEPO_DEVICE uint32_t lowest_word(BFloat16) { return 0xff80ff80u; }
CEPO_DEVICE uint32_t lowest_word(Half) { return 0xfc00fc00u; }
template <class T>
CEPO_DEVICE uint4 lowest_piece() {
    const uint32_t w = lowest_word(T{});
    return make_uint4(w, w, w, w);
}

// Column i of the piece replaced by the bits of `columns`' own column i.
template <class T>
CEPO_DEVICE uint4 with_column(uint4 piece, int i, uint32_t columns) {
    const int w = i * static_cast<int>(sizeof(T)) / 4;
    const uint32_t mask = sizeof(T) == 4 ? 0xffffffffu : i % 2 ? 0xffff0000u : 0x0000ffffu;
    const auto merged = [&](uint32_t old, int at) { return w == at ? (old & ~mask) | (columns & mask) : old; };
    return make_uint4(merged(piece.x, 0), merged(piece.y, 1), merged(piece.z, 2), merged(piece.w, 3));
}
// A word whose columns all are this one.
CEPO_DEVICE uint32_t repeated(float x) { return float_bits(x); }
template <class T>
CEPO_DEVICE uint32_t repeated(T x) {
    return x.bits * 0x00010001u;
}

}  // namespace cuda
}  // namespace cepo
