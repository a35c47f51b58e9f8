// A block for a row, for every GPU: the teachers first, the policy last, its gradient from what the caches still hold.
#pragma once

#include "conclude.cuh"

namespace cepo {
namespace cuda {

constexpr int kStreamThreads = 512;
constexpr int kOwn = kLanes / kStreamThreads;

template <class T, bool kEntropy, bool kCapped>
CEPO_DEVICE void scan_global(const void* x, int vocabulary, int label, RowState& state, int tensor) {
    LaneSum sums[kOwn];
    const int thread = threadIdx.x;
    const GlobalRow<T> row(x, thread, vocabulary);
    scan<T, kOwn, kEntropy, kCapped>(row, kStreamThreads, label, state.transform, sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const WarpSum sum = warp_sum(sums[i].s, sums[i].u, sums[i].c);
        const int warp = (thread + i * kStreamThreads) / 32;
        if (thread % 32 == 0) state.s[tensor][warp] = sum.s, state.u[tensor][warp] = sum.u, state.c[tensor][warp] = sum.c;
    }
}

template <bool kCapped>
CEPO_DEVICE void write_global(const Forward& f, const RowPlan& plan, const Logits& gradient, const RowState& state) {
    const int vocabulary = static_cast<int>(f.vocabulary), thread = threadIdx.x;
    const void* const x = plan.x[kPolicy];
    switch (state.gradient) {
        case Gradient::kNone:
            return;
        case Gradient::kZero:
            return fill(gradient, plan.gradient, vocabulary, 0.0f, thread, kStreamThreads);
        case Gradient::kNaN:
            return fill(gradient, plan.gradient, vocabulary, NAN, thread, kStreamThreads);
        case Gradient::kSlow:
            return slow_gradient<kCapped>(state, x, plan.gradient, gradient.dtype, vocabulary, plan.label, thread,
                                          kStreamThreads);
        default:
            break;
    }
    const Factors factors = factors_of(state);
    const auto write = [&](auto type) {
        using T = decltype(type);
        write_gradient<T, kOwn, kCapped>(GlobalRow<T>(x, thread, vocabulary), plan.gradient, kStreamThreads, plan.label,
                                         factors);
    };
    if (gradient.dtype == Dtype::kFloat32) return write(float{});
    if (gradient.dtype == Dtype::kBFloat16) return write(BFloat16{});
    write(Half{});
}

template <bool kLoss, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_rows(PolicyLoss l, Values values) {
    RowState& state = *reinterpret_cast<RowState*>(device::dynamic_shared());
    const Forward& f = l.forward;
    const int thread = threadIdx.x, warp = thread / 32, vocabulary = static_cast<int>(f.vocabulary);
    RowPlan plan;
    if (!plan_row<kLoss>(l, values, blockIdx.x, thread, kStreamThreads, plan)) return;
    if (thread == 0) state.transform = transform_of(f.options, values, plan.row);
    if (thread < kTensors) {
        const void* const x = thread == kPolicy ? plan.x[0] : thread == kPositive ? plan.x[1] : plan.x[2];
        if (x) state.label_x[thread] = element(x, plan.dtype(f, thread), plan.label);
        state.slow[thread] = false;
    }
    device::block_barrier();
#pragma unroll 1
    for (int tensor = kTensors - 1; tensor >= 0; --tensor) {
        const void* const x = tensor == kPolicy ? plan.x[0] : tensor == kPositive ? plan.x[1] : plan.x[2];
        if (!x) continue;
        const Dtype dtype = plan.dtype(f, tensor);
        if (dtype == Dtype::kFloat32) {
            scan_global<float, kEntropy, kCapped>(x, vocabulary, plan.label, state, tensor);
        } else if (dtype == Dtype::kBFloat16) {
            scan_global<BFloat16, kEntropy, kCapped>(x, vocabulary, plan.label, state, tensor);
        } else {
            scan_global<Half, kEntropy, kCapped>(x, vocabulary, plan.label, state, tensor);
        }
    }
    device::block_barrier();
    int redo = 0;
#pragma unroll 1
    for (bool first = true;; first = false) {
        if (warp == 0) {
            if (first) {
                const int lane = thread;
                WarpSum mine{1.0, 0.0, 0.0};
#pragma unroll 1
                for (int tensor = 0; tensor < kTensors; ++tensor) {
                    const WarpSum sum = warp_sum(state.s[tensor][lane], state.u[tensor][lane], state.c[tensor][lane]);
                    if (lane == tensor) mine = sum;
                }
                if (lane < kTensors) state.sum[lane] = {mine.s, mine.u, mine.c};
                redo = needs_slow_sum(mine, lane < kTensors && (lane == kPolicy ? plan.x[0] : lane == kPositive ? plan.x[1] : plan.x[2]));
            }
            const bool has_spread = redo & kNeedsSpread;
            if (first && redo) {
            } else {
                redo = conclude<kLoss, kEntropy, kCapped>(l, values, state, plan, has_spread, true) ? 0 : kNeedsSpread;
            }
            if (thread == 0) state.redo = redo;
        }
        device::block_barrier();
        redo = state.redo;
        if (!redo) break;
        redo_slowly<kCapped>(f, state, plan, redo);
    }
    if (kLoss) write_global<kCapped>(f, plan, l.gradient, state);
}

template <bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_backward(Backward w, Values values) {
    RowState& state = *reinterpret_cast<RowState*>(device::dynamic_shared());
    const int64_t row = blockIdx.x;
    const int thread = threadIdx.x, vocabulary = static_cast<int>(w.vocabulary);
    RowPlan plan;
    plan.row = row;
    plan.gradient = row_start(w.gradient, w.inner, row);
    plan.x[kPolicy] = row_start(w.policy, w.inner, row);
    const int64_t label = device::load(w.labels + row);
    const double g = w.grad_logprobs ? device::load(w.grad_logprobs + row) : 0.0f;
    const double h = w.grad_entropy ? device::load(w.grad_entropy + row) : 0.0f;
    const bool ignored = label == w.options.ignore_index || (g == 0.0 && h == 0.0);
    if (ignored || label < 0 || label >= w.vocabulary)
        return fill(w.gradient, plan.gradient, vocabulary, ignored ? 0.0f : NAN, thread, kStreamThreads);
    plan.label = static_cast<int>(label);
    const float* const stats = w.stats + row * kStats;
    const bool slow = device::load(stats + 1) == kSlowRow;
    if (thread == 0) state.transform = transform_of(w.options, values, row);
    device::block_barrier();
    RowSum sum{device::load(stats + 1), 0.0, device::load(stats)};
    if (slow) {
        sum = slow_sum<kCapped>(state, plan.x[kPolicy], w.policy.dtype, vocabulary, plan.label, state.transform.k,
                                state.transform.inner);
    }
    if (thread == 0) {
        const RowScalars at{0.0, device::load(w.logprobs + row), device::load(stats + 2),
                            w.entropy ? device::load(w.entropy + row) : 0.0f};
        plan_gradient<kCapped>(state, at, sum, slow, g, h, element(plan.x[kPolicy], w.policy.dtype, plan.label));
    }
    device::block_barrier();
    Forward f;
    f.vocabulary = w.vocabulary;
    write_global<kCapped>(f, plan, w.gradient, state);
}

}  // namespace cuda
}  // namespace cepo
