// A block for a row, for every GPU: the teachers first, the policy last, its gradient from what the caches still hold.
#pragma once

#include "conclude.cuh"

namespace cepo {
namespace cuda {

constexpr int kStreamThreads = 512;
constexpr int kOwn = kLanes / kStreamThreads;

template <class T, bool kEntropy, bool kCapped>
CEPO_DEVICE void scan_global(int vocabulary, RowState& state, int tensor) {
    LaneSum sums[kOwn];
    const int thread = device::thread_index();
    const GlobalRow<T> row{state.plan.x[tensor], thread, vocabulary};
    scan<T, kOwn, kEntropy, kCapped>(row, kStreamThreads, state.plan.label, state.transform, sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
        put_warp_sum(sums[i], state, tensor, (device::thread_index() + i * kStreamThreads) / 32);
}

template <bool kCapped>
CEPO_DEVICE void write_global(const Logits& gradient, int vocabulary, const RowState& state) {
    const RowPlan& plan = state.plan;
    const int thread = device::thread_index();
    if (write_plain<kCapped>(gradient, vocabulary, state, thread, kStreamThreads)) return;
    const Factors factors = factors_of(state);
    const auto write = [&](auto type) {
        using T = decltype(type);
        write_gradient<T, kOwn, kCapped>(GlobalRow<T>{plan.x[kPolicy], thread, vocabulary}, plan.gradient,
                                         kStreamThreads, plan.label, factors);
    };
    if (gradient.dtype == Dtype::kFloat32) return write(float{});
    if (gradient.dtype == Dtype::kBFloat16) return write(BFloat16{});
    write(Half{});
}

template <bool kLoss, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_rows(PolicyLoss l, Values values) {
    RowState& state = *reinterpret_cast<RowState*>(device::dynamic_shared());
    const int vocabulary = static_cast<int>(l.forward.vocabulary);
    float label_x = 0.0f;
    if (!plan_row<kLoss>(l, values, blockIdx.x, device::thread_index(), kStreamThreads, state, label_x)) return;
    device::block_barrier();
    if (device::thread_index() < kTensors) state.label_x[device::thread_index()] = label_x;
#pragma unroll 1
    for (int tensor = kTensors - 1; tensor >= 0; --tensor) {
        if (!state.plan.x[tensor]) continue;
        const Dtype dtype = state.plan.dtype[tensor];
        if (dtype == Dtype::kFloat32) {
            scan_global<float, kEntropy, kCapped>(vocabulary, state, tensor);
        } else if (dtype == Dtype::kBFloat16) {
            scan_global<BFloat16, kEntropy, kCapped>(vocabulary, state, tensor);
        } else {
            scan_global<Half, kEntropy, kCapped>(vocabulary, state, tensor);
        }
    }
    device::block_barrier();
    settle<kLoss, kEntropy, kCapped>(l, values, state, OneBlock{});
    if (kLoss) write_global<kCapped>(l.gradient, vocabulary, state);
}

template <bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_backward(Backward w, Values values) {
    RowState& state = *reinterpret_cast<RowState*>(device::dynamic_shared());
    const int64_t row = blockIdx.x;
    const int thread = device::thread_index(), vocabulary = static_cast<int>(w.vocabulary);
    void* const gradient = row_start(w.gradient, w.inner, row);
    const int64_t label = device::load(w.labels + row);
    const double g = w.grad_logprobs ? device::load(w.grad_logprobs + row) : 0.0f;
    const double h = w.grad_entropy ? device::load(w.grad_entropy + row) : 0.0f;
    const bool ignored = label == w.options.ignore_index || (g == 0.0 && h == 0.0);
    if (ignored || label < 0 || label >= w.vocabulary)
        return fill(w.gradient, gradient, vocabulary, ignored ? 0.0f : NAN, thread, kStreamThreads);
    const float* const stats = w.stats + row * kStats;
    const bool slow = device::load(stats + 1) == kSlowRow;
    const void* const x = row_start(w.policy, w.inner, row);
    if (thread == 0) {
        state.plan.x[kPolicy] = x;
        state.plan.gradient = gradient;
        state.plan.label = static_cast<int>(label);
        state.transform = transform_of(w.options, values, row);
    }
    RowSum sum{device::load(stats + 1), 0.0, device::load(stats)};
    if (slow) {
        device::block_barrier();
        sum = slow_sum<kCapped>(state, x, w.policy.dtype, vocabulary, static_cast<int>(label), state.transform.k,
                                state.transform.inner);
    }
    if (thread == 0) {
        const RowScalars at{0.0, device::load(w.logprobs + row), device::load(stats + 2),
                            w.entropy ? device::load(w.entropy + row) : 0.0f};
        plan_gradient<kCapped>(state, at, sum, slow, g, h, element(x, w.policy.dtype, label));
    }
    device::block_barrier();
    write_global<kCapped>(w.gradient, vocabulary, state);
}

}  // namespace cuda
}  // namespace cepo
