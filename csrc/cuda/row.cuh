// From the sums of a row's blocks to its results: what one warp computes and the whole block then knows.
#pragma once

#include "scan.cuh"

namespace cepo {
namespace cuda {

// Numbers that live on the GPU, in this order; null: those of the call hold. A soft cap is there if the call's is
// not 0, whichever its value.
enum Value { kScale, kSoftcap, kTemperature, kLam, kEpsW, kClipLow, kClipHigh, kKl, kEntropyCoef, kDenominator };
struct Values {
    const double* data;
    CEPO_DEVICE double or_else(Value which, double host) const { return data ? device::load(data + which) : host; }
};

constexpr int kPolicy = 0, kPositive = 1, kNegative = 2, kTensors = 3;
constexpr int kNeedsSpread = 1 << kTensors;  // in RowState::redo; below it, a bit per tensor that needs slow sums

enum class Gradient : int { kNone, kZero, kNaN, kFast, kSlow };

// What a row is, known to all of its threads.
struct RowPlan {
    int64_t row;
    int label;
    float advantage;
    const void* x[kTensors];  // null: not read
    void* gradient;           // null: none
    Dtype dtype[kTensors];
};

// Shared memory of a block.
struct RowState {
    RowPlan plan;
    double s[kTensors][kWarps], u[kTensors][kWarps];  // of virtual warps; in a cluster, of this block's
    float c[kTensors][kWarps];
    RowSum sum[kTensors];
    float label_x[kTensors];
    bool slow[kTensors];
    int redo;
    double spread;  // the entropy of the policy's other columns, where the sums cannot tell it
    double reduced[2][kWarps];
    int index[kWarps];
    Transform transform;
    Slopes slope;
    double c_gradient;
    Gradient gradient;
};

// Any element of a row, for the rare paths.
CEPO_DEVICE float element(const void* x, Dtype dtype, int64_t j) {
    if (dtype == Dtype::kFloat32) return device::load(static_cast<const float*>(x) + j);
    if (dtype == Dtype::kBFloat16) return widened(device::load(static_cast<const BFloat16*>(x) + j));
    return widened(device::load(static_cast<const Half*>(x) + j));
}
CEPO_DEVICE void put_element(void* x, Dtype dtype, int64_t j, float value) {
    if (dtype == Dtype::kFloat32) {
        device::store(static_cast<float*>(x) + j, value);
    } else if (dtype == Dtype::kBFloat16) {
        BFloat16 narrowed;
        narrow(value, narrowed);
        device::store(static_cast<BFloat16*>(x) + j, narrowed);
    } else {
        Half narrowed;
        narrow(value, narrowed);
        device::store(static_cast<Half*>(x) + j, narrowed);
    }
}
CEPO_DEVICE void* row_start(const Logits& logits, int64_t inner, int64_t row) {
    const int64_t offset =
        inner == 1 ? row * logits.outer_stride : row / inner * logits.outer_stride + row % inner * logits.inner_stride;
    return static_cast<unsigned char*>(logits.data) + offset * (logits.dtype == Dtype::kFloat32 ? 4 : 2);
}

CEPO_DEVICE Transform transform_of(const Options& o, const Values& values, int64_t row) {
    const double temperature =
        o.row_temperature ? device::load(o.row_temperature + row) : values.or_else(kTemperature, o.temperature);
    const double scale = values.or_else(kScale, o.scale), cap = values.or_else(kSoftcap, o.softcap);
    const bool capped = o.softcap > 0.0;
    Transform out;
    out.chain = scale / temperature;
    out.inner = capped ? static_cast<float>(scale / cap) : 1.0f;
    out.k = static_cast<float>((capped ? cap / temperature : out.chain) * kLog2e);
    return out;
}

// --- the slow way, by all threads of a block, in the same order for any number of them -------------------------------

// f(j) returns two numbers for a column and is called for each in the order of its virtual lane; their sums.
struct Pair {
    double a, b;
};
template <class F>
CEPO_DEVICE Pair block_total(RowState& state, int vocabulary, F f) {
    device::block_barrier();  // the last reduction has been read
    for (int lane = device::thread_index(); lane < kLanes; lane += blockDim.x) {
        Pair mine{0.0, 0.0};
        for (int j = lane; j < vocabulary; j += kLanes) {
            const Pair term = f(j);
            mine.a += term.a;
            mine.b += term.b;
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            mine.a += device::shuffle_xor(mine.a, mask);
            mine.b += device::shuffle_xor(mine.b, mask);
        }
        if (lane % 32 == 0) state.reduced[0][lane / 32] = mine.a, state.reduced[1][lane / 32] = mine.b;
    }
    device::block_barrier();
    Pair total{0.0, 0.0};
    for (int i = 0; i < kWarps; ++i) total.a += state.reduced[0][i], total.b += state.reduced[1][i];
    return total;
}

// The highest f(j) over all columns and the first column that has it; -1 where all are -inf.
struct Highest {
    double value;
    int index;
};
CEPO_DEVICE Highest higher(Highest a, Highest b) {
    return b.value > a.value || (b.value == a.value && static_cast<unsigned>(b.index) < static_cast<unsigned>(a.index))
               ? b
               : a;
}
template <class F>
CEPO_DEVICE Highest block_highest(RowState& state, int vocabulary, F f) {
    device::block_barrier();
    for (int lane = device::thread_index(); lane < kLanes; lane += blockDim.x) {
        Highest mine{-INFINITY, -1};
        for (int j = lane; j < vocabulary; j += kLanes) {
            const double value = f(j);
            if (value > mine.value) mine = {value, j};
        }
        for (int mask = 16; mask > 0; mask /= 2)
            mine = higher(mine, {device::shuffle_xor(mine.value, mask), device::shuffle_xor(mine.index, mask)});
        if (lane % 32 == 0) state.reduced[0][lane / 32] = mine.value, state.index[lane / 32] = mine.index;
    }
    device::block_barrier();
    Highest best{-INFINITY, -1};
    for (int i = 0; i < kWarps; ++i) best = higher(best, {state.reduced[0][i], state.index[i]});
    return best;
}

// NaN sums where the row holds NaN or +inf; {0, 0, -inf} where no other column is finite.
template <bool kCapped>
CEPO_DEVICE RowSum slow_sum(RowState& state, const void* x, Dtype dtype, int vocabulary, int label, float k,
                            float inner) {
    const auto scaled = [&](int j) {
        return exact_value_of<kCapped>(element(x, dtype, j), inner) * static_cast<double>(k);
    };
    // NaN and +inf rise above every number.
    const Highest top = block_highest(state, vocabulary, [&](int j) {
        const double t = j == label ? -INFINITY : scaled(j);
        return t != t ? static_cast<double>(INFINITY) : t;
    });
    if (top.value == INFINITY) return {NAN, NAN, 0.0};
    if (top.value == -INFINITY) return {0.0, 0.0, -INFINITY};
    const Pair total = block_total(state, vocabulary, [&](int j) {
        const double t = j == label ? -INFINITY : scaled(j) - top.value;
        const double term = t < kLowest ? 0.0 : exp2(t);
        return Pair{term, term == 0.0 ? 0.0 : t * term};
    });
    return {total.a, total.b, top.value};
}

// The other columns' entropy among themselves, from the sums of all but their largest: nothing cancels.
template <bool kCapped>
CEPO_DEVICE double slow_spread(RowState& state, const void* x, Dtype dtype, int vocabulary, int label, float k,
                               float inner) {
    const Highest top = block_highest(state, vocabulary, [&](int j) {
        return j == label ? -INFINITY : exact_value_of<kCapped>(element(x, dtype, j), inner);
    });
    const double unit = static_cast<double>(k) * kLn2;
    const double highest = top.index < 0 ? 0.0 : top.value;
    const Pair total = block_total(state, vocabulary, [&](int j) {
        const double gap = (highest - exact_value_of<kCapped>(element(x, dtype, j), inner)) * unit;
        if (j == label || j == top.index || !(gap < 700.0)) return Pair{0.0, 0.0};
        const double term = exp(-gap);
        return Pair{term, gap * term};
    });
    return log1p(total.a) + total.b / (1.0 + total.a);
}

}  // namespace cuda
}  // namespace cepo
