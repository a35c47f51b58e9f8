// The gradient in the policy's logits, written by the threads that own the pieces.
#pragma once

#include "row.cuh"

namespace cepo {
namespace cuda {

// Where a row's gradient goes: 16 bytes at once if it starts at 16 bytes, else column by column.
template <class T>
struct OutRow {
    T* x;
    bool aligned;

    CEPO_DEVICE explicit OutRow(void* at)
        : x(static_cast<T*>(at)), aligned((reinterpret_cast<uintptr_t>(at) & 15) == 0) {}
    CEPO_DEVICE void put(int piece, int columns, const uint4& bits) const {
        T* const at = x + static_cast<int64_t>(piece) * kPieceColumns<T>;
        if (aligned && columns == kPieceColumns<T>) {
            device::store16(at, bits);
            return;
        }
#pragma unroll
        for (int i = 0; i < kPieceColumns<T>; ++i) {
            if (i >= columns) continue;
            const uint32_t pair = word(bits, i * static_cast<int>(sizeof(T)) / 4);
            put_column(at + i, sizeof(T) == 2 && i % 2 ? pair >> 16 : pair);
        }
    }
    CEPO_DEVICE static void put_column(float* at, uint32_t bits) { device::store(at, bits_float(bits)); }
    template <class N>
    CEPO_DEVICE static void put_column(N* at, uint32_t bits) {
        device::store(at, N{static_cast<uint16_t>(bits)});
    }
};

// The same number in every column, by the threads of all of the row's blocks.
template <class T>
CEPO_DEVICE void fill_row(void* out, int vocabulary, float value, int thread, int threads) {
    const OutRow<T> row(out);
    T narrowed;
    narrow(value, narrowed);
    const uint32_t w = repeated(narrowed);
    for (int piece = thread; piece * kPieceColumns<T> < vocabulary; piece += threads) {
        const int left = vocabulary - piece * kPieceColumns<T>;
        row.put(piece, left < kPieceColumns<T> ? left : kPieceColumns<T>, make_uint4(w, w, w, w));
    }
}
CEPO_DEVICE void fill(const Logits& gradient, void* out, int vocabulary, float value, int thread, int threads) {
    if (gradient.dtype == Dtype::kFloat32) return fill_row<float>(out, vocabulary, value, thread, threads);
    if (gradient.dtype == Dtype::kBFloat16) return fill_row<BFloat16>(out, vocabulary, value, thread, threads);
    fill_row<Half>(out, vocabulary, value, thread, threads);
}

// What every column's gradient is made of, in float32.
struct Factors {
    float k, inner, c, a, b, label;
};
CEPO_DEVICE Factors factors_of(const RowState& state) {
    const Slopes& s = state.slope;
    return {state.transform.k,       state.transform.inner,   static_cast<float>(state.c_gradient),
            static_cast<float>(s.a), static_cast<float>(s.b), static_cast<float>(s.label)};
}

template <bool kCapped>
CEPO_DEVICE float column_gradient(float x, const Factors& f) {
    const float value = kCapped ? tanh_of(x * f.inner) : x;
    const float t = fmaxf(kLowest, fmaf(value, f.k, -f.c));
    const float out = device::fast_exp2(t) * fmaf(f.b, t, f.a);
    return kCapped ? (1.0f + value) * (1.0f - value) * out : out;
}

template <class T, bool kCapped, class Row>
CEPO_DEVICE void write_group(const Group& g, const Row& row, const OutRow<T>& out, int piece, int label,
                             const Factors& f) {
    constexpr int kColumns = kPieceColumns<T>;
    const int distance = label / kColumns - piece;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        const int present = row.present(piece + i * kLanes);
        if (present == 0) continue;
        float x[kColumns];
        unpack(g.pieces[i], x, T{});
#pragma unroll
        for (int j = 0; j < kColumns; ++j) x[j] = column_gradient<kCapped>(x[j], f);
        uint4 bits = pack(x, T{});
        if (distance == i * kLanes) {
            T at_label;
            narrow(f.label, at_label);
            bits = with_column<T>(bits, label % kColumns, repeated(at_label));
        }
        out.put(piece + i * kLanes, present, bits);
    }
}

// From the row's end, whose pieces were read last: what the cache still holds is met before it is thrown out.
template <class T, int kOwn, bool kCapped, class Row>
CEPO_DEVICE void write_gradient(const Row& row, void* to, int apart, int label, const Factors& f) {
    const OutRow<T> out(to);
#pragma unroll 1
    for (int step = row.groups() * kOwn - 1; step >= 0; --step) {
        const int group = step / kOwn, own = step % kOwn * apart;
        Group g;
        row.load(g, group, own);
        write_group<T, kCapped>(g, row, out, row.piece_index(group, own), label, f);
    }
}

// A row whose exponents need float64; `out` may be `x`, so a column is read and written by one thread.
template <bool kCapped>
CEPO_DEVICE void slow_gradient(const RowState& state, const void* x, void* out, Dtype dtype, int vocabulary, int label,
                               int thread, int threads) {
    const Transform& transform = state.transform;
    for (int j = thread; j < vocabulary; j += threads) {
        const double value = exact_value_of<kCapped>(element(x, dtype, j), transform.inner);
        const double t = value * transform.k - state.c_gradient, outer = kCapped ? 1.0 - value * value : 1.0;
        const double column = t < kLowest ? 0.0 : outer * exp2(t) * (state.slope.a + state.slope.b * t);
        put_element(out, dtype, j, static_cast<float>(j == label ? state.slope.label : column));
    }
}

// What of a gradient needs no sums in float32; false if it does.
template <bool kCapped>
CEPO_DEVICE bool write_plain(const Logits& gradient, int vocabulary, const RowState& state, int thread, int threads) {
    const RowPlan& plan = state.plan;
    const Gradient kind = state.gradient;
    if (kind == Gradient::kFast) return false;
    if (kind == Gradient::kSlow) {
        slow_gradient<kCapped>(state, plan.x[kPolicy], plan.gradient, gradient.dtype, vocabulary, plan.label, thread,
                               threads);
    } else if (kind != Gradient::kNone) {
        fill(gradient, plan.gradient, vocabulary, kind == Gradient::kZero ? 0.0f : NAN, thread, threads);
    }
    return true;
}

}  // namespace cuda
}  // namespace cepo
