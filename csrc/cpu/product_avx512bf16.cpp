// Products of bfloat16 matrices summed in float32, by AVX-512's dot product of pairs.
//
// Both operands are packed into panels of 16 lines (rows of the left one, columns of the right one): a vector holds a
// pair of neighbours in the summed dimension for each line. float32 is rounded to bfloat16 there. A tile of sums stays
// in registers for a block of the summed dimension and is then added to the result, so the bits of an element depend on
// its own row and column alone.
#include <immintrin.h>
#include <stdint.h>

#include <algorithm>
#include <new>
#include <utility>

#include "../api.h"

namespace cepo {
namespace {

using Pair = uint32_t;
constexpr int kLines = 16;        // of a panel
constexpr int kRows = 14;         // of a tile, two panels wide: 28 sums leave four registers
constexpr int64_t kDepth = 1024;  // of a block: long enough runs of each line for memory to keep up
constexpr int64_t kPanel = (kDepth / 2 + 1) * kLines;  // pairs, one vector more than used: panels start in unlike sets

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__mmask32 first(int64_t count, int64_t width) {
    return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(count, 0, width)) - 1);
}

// Up to 32 neighbours as bfloat16, zeros behind them.
__m512i neighbours(const uint16_t* x, int64_t count) { return _mm512_maskz_loadu_epi16(first(count, 32), x); }
__m512i neighbours(const float* x, int64_t count) {
    const __m512 low = _mm512_maskz_loadu_ps(first(count, 16), x);
    const __m512 high = _mm512_maskz_loadu_ps(first(count - 16, 16), x + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 of bfloat16, each in 32 bits.
__m512i widened(const uint16_t* x, __mmask16 there) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x));
}
__m512i widened(const float* x, __mmask16 there) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x)));
}

// 16 x 16 pairs.
void transpose(__m512i (&x)[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        const int j = i / 4 * 4 + i / 2 % 2;
        x[i] = _mm512_unpacklo_epi64(y[j], y[j + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[j], y[j + 2]);
    }
    // Now x[4 j + i] holds columns i, 4 + i, 8 + i and 12 + i of rows 4 j to 4 j + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        const __m512i evens = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        const __m512i odds = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        x[i] = _mm512_shuffle_i32x4(even, evens, 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(odd, odds, 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(even, evens, 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(odd, odds, 0xdd);
    }
}

// A panel of up to 16 lines, of which x is the first's first element. Lines that are not there hold another's values
// or zeros; what comes of them is never stored.
template <class T>
void pack(const T* x, const Operand& of, int64_t lines, int64_t depth, Pair* out) {
    if (of.depth_stride == 1) {
        const T* line[kLines];
        for (int i = 0; i < kLines; ++i) line[i] = x + std::min<int64_t>(i, lines - 1) * of.line_stride;
        for (int64_t k = 0; k < depth; k += 2 * kLines) {
            __m512i pairs[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) pairs[i] = neighbours(line[i] + k, depth - k);
            transpose(pairs);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (k / 2 + i) * kLines, pairs[i]);
        }
        return;
    }
    const __mmask16 there = first(lines, kLines);
    for (int64_t k = 0; k < depth; k += 2, x += 2 * of.depth_stride) {
        const __m512i high = widened(x + of.depth_stride, k + 1 < depth ? there : 0);
        _mm512_store_si512(out + k / 2 * kLines, _mm512_or_si512(_mm512_slli_epi32(high, 16), widened(x, there)));
    }
}

void pack(const Operand& of, int64_t line, int64_t lines, int64_t from, int64_t depth, Pair* out) {
    if (lines <= 0) return;
    const int64_t start = line * of.line_stride + from * of.depth_stride;
    if (of.dtype == Dtype::kFloat32)
        pack(static_cast<const float*>(of.data) + start, of, lines, depth, out);
    else
        pack(static_cast<const uint16_t*>(of.data) + start, of, lines, depth, out);
}

template <int Rows>
void tile(const Pair* a, const Pair* b, int64_t pairs, float* out, int64_t stride, int64_t columns, bool add) {
    const __mmask16 left = first(columns, kLines), right = first(columns - kLines, kLines);
    __m512 sums[Rows][2];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        __builtin_prefetch(out + i * stride, 1);
        __builtin_prefetch(out + i * stride + kLines, 1);
    }
    for (int64_t k = 0; k < pairs; ++k, a += kLines, b += kLines) {
        const __m512bh x = (__m512bh)_mm512_load_si512(b), y = (__m512bh)_mm512_load_si512(b + kPanel);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, x);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, y);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i, out += stride) {
        if (add) {
            sums[i][0] = _mm512_add_ps(sums[i][0], _mm512_maskz_loadu_ps(left, out));
            sums[i][1] = _mm512_add_ps(sums[i][1], _mm512_maskz_loadu_ps(right, out + kLines));
        }
        _mm512_mask_storeu_ps(out, left, sums[i][0]);
        _mm512_mask_storeu_ps(out + kLines, right, sums[i][1]);
    }
}

template <int... I>
auto tile_of(int64_t rows, std::integer_sequence<int, I...>) {
    constexpr decltype(&tile<1>) kTiles[] = {tile<I + 1>...};
    return kTiles[rows - 1];
}

struct Panels {
    Pair* data;
    explicit Panels(int64_t count) : data(new (std::align_val_t(64)) Pair[count * kPanel]) {}
    ~Panels() { operator delete[](data, std::align_val_t(64)); }
    Panels(const Panels&) = delete;
};

}  // namespace

void avx512bf16_product(const Product& p, int64_t top, int64_t bottom, int64_t left, int64_t right) {
    const Panels a(ceil_div(bottom - top, kRows)), b(2);
    for (int64_t k = 0; k == 0 || k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k);
        Pair* panel = a.data;
        for (int64_t row = top; row < bottom; row += kRows, panel += kPanel)
            pack(p.left, row, std::min<int64_t>(bottom - row, kRows), k, depth, panel);
        for (int64_t column = left; column < right; column += 2 * kLines) {
            const int64_t columns = std::min<int64_t>(right - column, 2 * kLines);
            pack(p.right, column, std::min<int64_t>(columns, kLines), k, depth, b.data);
            pack(p.right, column + kLines, columns - kLines, k, depth, b.data + kPanel);
            panel = a.data;
            for (int64_t row = top; row < bottom; row += kRows, panel += kPanel) {
                const int64_t rows = std::min<int64_t>(bottom - row, kRows);
                const auto run = tile_of(rows, std::make_integer_sequence<int, kRows>());
                run(panel, b.data, (depth + 1) / 2, p.out + row * p.out_stride + column, p.out_stride, columns,
                    p.add || k > 0);
            }
        }
    }
}

}  // namespace cepo
