// Products of bfloat16 matrices summed in float32, by AVX-512's dot product of pairs.
//
// Both operands are packed into panels of a few lines (rows of the left one, columns of the right one), as pairs of
// neighbours in the summed dimension: of the right one a vector holds a pair for each line; of the left one pairs are
// spread over a vector one by one, so that they may lie line by line as well. float32 is rounded to bfloat16 there. A
// tile of sums stays in registers for a block of the summed dimension and is then added to the result, so the bits of
// an element depend on its own row and column alone.
#include <immintrin.h>
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "../api.h"

namespace cepo {
namespace {

using Pair = uint32_t;
constexpr int kLines = 16;  // of a panel
constexpr int kRows = 14;   // of a tile, two panels wide: 28 sums leave four registers
constexpr int kColumns = 2 * kLines;
constexpr int64_t kDepth = 1024;  // of a block: long enough runs of each line for memory to keep up
constexpr int64_t kPanel = (kDepth / 2 + 1) * kLines;  // pairs, one vector more than used: panels start in unlike sets
constexpr int kStep = 8;                               // pairs between two looks ahead
constexpr int64_t kLine = kDepth / 2 + kLines;         // the same, of a line

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

// A panel of up to 16 lines, of which x is the first's first element. Lines that are not there hold another's values,
// zeros, or what was there; what comes of them is never stored.
template <class T>
void pack_columns(const T* x, const Operand& of, int64_t lines, int64_t depth, Pair* out) {
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
}

// Line by line, which needs no transposing.
template <class T>
void pack_rows(const T* x, const Operand& of, int64_t lines, int64_t depth, Pair* out) {
    for (int64_t i = 0; i < lines; ++i, x += of.line_stride, out += kLine)
        for (int64_t k = 0; k < depth; k += 2 * kLines) _mm512_store_si512(out + k / 2, neighbours(x + k, depth - k));
}

// Two panels of `step` lines, which lie next to each other in memory.
template <class T>
void pack_across(const T* x, const Operand& of, int step, int64_t lines, int64_t depth, Pair* out) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
        order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
        order[1][i] = static_cast<uint16_t>(std::min(step + i / 2, 31) + i % 2 * 32);
    }
    const __m512i one = _mm512_load_si512(order[0]), other = _mm512_load_si512(order[1]);
    for (int64_t k = 0; k < depth; k += 2, x += 2 * of.depth_stride, out += kLines) {
        const __m512i low = neighbours(x, lines), high = neighbours(x + of.depth_stride, k + 1 < depth ? lines : 0);
        _mm512_store_si512(out, _mm512_permutex2var_epi16(low, one, high));
        _mm512_store_si512(out + kPanel, _mm512_permutex2var_epi16(low, other, high));
    }
}

const char* element(const Operand& of, int64_t line, int64_t k) {
    const int64_t size = of.dtype == Dtype::kFloat32 ? 4 : 2;
    return static_cast<const char*>(of.data) + (line * of.line_stride + k * of.depth_stride) * size;
}

// f(typed pointer to the element)
template <class F>
void with_type(const Operand& of, int64_t line, int64_t k, F f) {
    const char* const start = element(of, line, k);
    of.dtype == Dtype::kFloat32 ? f(reinterpret_cast<const float*>(start))
                                : f(reinterpret_cast<const uint16_t*>(start));
}

// Two panels, of which the second may have no lines.
void pack_right(const Operand& of, int64_t line, int64_t lines, int64_t from, int64_t depth, Pair* out) {
    if (of.depth_stride != 1) {
        with_type(of, line, from, [&](auto x) { pack_across(x, of, kLines, lines, depth, out); });
        return;
    }
    for (; lines > 0; line += kLines, lines -= kLines, out += kPanel)
        with_type(of, line, from, [&](auto x) { pack_columns(x, of, std::min<int64_t>(lines, kLines), depth, out); });
}
void pack_left(const Operand& of, int64_t line, int64_t lines, int64_t from, int64_t depth, Pair* out) {
    if (of.depth_stride != 1) {
        with_type(of, line, from, [&](auto x) { pack_across(x, of, kRows, lines, depth, out); });
        return;
    }
    for (; lines > 0; line += kRows, lines -= kRows, out += kPanel)
        with_type(of, line, from, [&](auto x) { pack_rows(x, of, std::min<int64_t>(lines, kRows), depth, out); });
}

// What will be packed next, fetched while tiles are being summed: a few cache lines at a time, since a processor waits
// when too many are on their way.
class Ahead {
  public:
    Ahead(const Operand& of, int64_t line, int64_t lines, int64_t from, int64_t depth, int64_t steps) {
        if (lines <= 0 || depth <= 0) return;
        const bool along = of.depth_stride == 1;
        run_ = element(of, line, from);
        next_ = (along ? element(of, line + 1, from) : element(of, line, from + 1)) - run_;
        bytes_ = (along ? element(of, line, from + depth) : element(of, line + lines, from)) - run_;
        runs_ = along ? lines : depth;
        at_once_ = ceil_div(runs_ * (bytes_ / 64 + 1), steps);
    }
    void step() {
        for (int64_t i = 0; i < at_once_ && runs_ > 0; ++i) {
            _mm_prefetch(run_ + std::min(at_, bytes_ - 1), _MM_HINT_T1);
            at_ += 64;
            if (at_ < bytes_ + 64) continue;
            at_ = 0;
            run_ += next_;
            --runs_;
        }
    }

  private:
    const char* run_ = nullptr;
    int64_t next_ = 0, bytes_ = 0, runs_ = 0, at_once_ = 0, at_ = 0;
};

// Rows by two panels; `along`: as pack_rows packed them.
template <int Rows, bool along>
void tile(const Pair* a, const Pair* b, int64_t pairs, float* out, int64_t stride, int64_t columns, bool add,
          Ahead& ahead) {
    const __mmask16 left = first(columns, kLines), right = first(columns - kLines, kLines);
    __m512 sums[Rows][2];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t start = 0; start < pairs; start += kStep) {
        ahead.step();
        if (const int64_t row = start / kStep; row < Rows) {
            __builtin_prefetch(out + row * stride, 1);
            __builtin_prefetch(out + row * stride + kLines, 1);
        }
        const int64_t stop = std::min(start + kStep, pairs);
        for (int64_t k = start; k < stop; ++k, b += kLines) {
            const __m512bh x = (__m512bh)_mm512_load_si512(b), y = (__m512bh)_mm512_load_si512(b + kPanel);
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i) {
                const Pair pair = along ? a[i * kLine + k] : a[k * kLines + i];
                const __m512bh all = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], all, x);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], all, y);
            }
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

template <bool along, int... I>
auto tile_of(int64_t rows, std::integer_sequence<int, I...>) {
    constexpr decltype(&tile<1, along>) kTiles[] = {tile<I + 1, along>...};
    return kTiles[rows - 1];
}

struct Panels {
    Pair* data;
    explicit Panels(int64_t count) : data(new (std::align_val_t(64)) Pair[count * kPanel]) {}
    ~Panels() { operator delete[](data, std::align_val_t(64)); }
    Panels(const Panels&) = delete;
};

void round(const float* x, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; i += 32)
        _mm512_mask_storeu_epi16(out + i, first(count - i, 32), neighbours(x + i, count - i));
}

}  // namespace

// Of a block of the summed dimension, the operand with fewer lines is packed once, the other two panels at a time. Sums
// to be rounded wait in memory of their own: all of them, or where one block is all, those of two panels.
void avx512bf16_product(const Product& p, int64_t top, int64_t bottom, int64_t left, int64_t right) {
    const int64_t height = bottom - top, width = right - left;
    const int64_t tiles = ceil_div(height, kRows), stripes = ceil_div(width, kColumns);
    const bool left_streams = height > width, rounds = p.out_dtype == Dtype::kBFloat16, wait = p.depth > kDepth;
    const Panels a(left_streams ? 2 : tiles + tiles % 2), b(left_streams ? 2 * stripes : 2);
    const int64_t kept_rows = left_streams && !wait ? 2 * kRows : height,
                  kept_columns = left_streams || wait ? width : kColumns;
    const std::unique_ptr<float[]> sums(rounds ? new float[kept_rows * kept_columns] : nullptr);
    const auto at = [&](int64_t row, int64_t column) {
        return sums.get() + row % kept_rows * kept_columns + column % kept_columns;
    };
    const auto round_block = [&](int64_t row, int64_t column, int64_t rows, int64_t columns) {
        for (const int64_t stop = std::min(row + rows, height); rounds && row < stop; ++row)
            round(at(row, column), std::min(columns, width - column),
                  static_cast<uint16_t*>(p.out) + (top + row) * p.out_stride + left + column);
    };
    for (int64_t k = 0; k == 0 || k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k), steps = ceil_div(depth, 2 * kStep);
        const auto pack_rows_from = [&](int64_t row, Pair* panels) {
            pack_left(p.left, top + row, std::min<int64_t>(height - row, 2 * kRows), k, depth, panels);
        };
        const auto pack_columns_from = [&](int64_t column, Pair* panels) {
            pack_right(p.right, left + column, std::min<int64_t>(width - column, kColumns), k, depth, panels);
        };
        const auto run = [&](int64_t row, int64_t column, const Pair* rows, const Pair* columns, Ahead& ahead) {
            float* const out =
                rounds ? at(row, column) : static_cast<float*>(p.out) + (top + row) * p.out_stride + left + column;
            const int64_t count = std::min<int64_t>(height - row, kRows);
            constexpr auto kAll = std::make_integer_sequence<int, kRows>();
            const auto run_tile = p.left.depth_stride == 1 ? tile_of<true>(count, kAll) : tile_of<false>(count, kAll);
            run_tile(rows, columns, (depth + 1) / 2, out, rounds ? kept_columns : p.out_stride,
                     std::min<int64_t>(width - column, kColumns), p.add || k > 0, ahead);
        };
        if (left_streams) {
            for (int64_t j = 0; j < stripes; ++j) pack_columns_from(j * kColumns, b.data + 2 * j * kPanel);
            for (int64_t row = 0; row < height; row += 2 * kRows) {
                const int64_t next = row + 2 * kRows;
                pack_rows_from(row, a.data);
                Ahead ahead(p.left, top + next, std::min<int64_t>(height - next, 2 * kRows), k, depth,
                            2 * stripes * steps);
                for (int64_t j = 0; j < stripes; ++j) {
                    run(row, j * kColumns, a.data, b.data + 2 * j * kPanel, ahead);
                    if (row + kRows < height)
                        run(row + kRows, j * kColumns, a.data + kPanel, b.data + 2 * j * kPanel, ahead);
                }
                if (!wait) round_block(row, 0, 2 * kRows, width);
            }
        } else {
            for (int64_t column = 0; column < width; column += kColumns) {
                const int64_t next = column + kColumns;
                pack_columns_from(column, b.data);
                Ahead ahead(p.right, left + next, std::min<int64_t>(width - next, kColumns), k, depth, tiles * steps);
                for (int64_t i = 0; i < tiles; ++i) {
                    if (column == 0 && i % 2 == 0) pack_rows_from(i * kRows, a.data + i * kPanel);
                    run(i * kRows, column, a.data + i * kPanel, b.data, ahead);
                }
                if (!wait) round_block(0, column, height, kColumns);
            }
        }
    }
    if (wait) round_block(0, 0, height, width);
}

}  // namespace cepo
