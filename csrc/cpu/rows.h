// The kernels: what is read and written for each row of a call.
#pragma once

#include "gradient.h"

namespace cepo {
namespace CEPO_ISA {

inline void put(float* out, int64_t row, double value) {
    if (out) out[row] = static_cast<float>(value);
}

void forward_rows(const Forward& f, int64_t begin, int64_t end) {
    float* const all[] = {f.logprobs, f.positive_logprobs, f.negative_logprobs, f.evidence, f.weight, f.advantages_out,
                          f.entropy};
    for (int64_t row = begin; row < end; ++row) {
        const int64_t label = f.labels[row];
        if (label == f.options.ignore_index) {
            for (float* out : all) put(out, row, 0.0);
            continue;
        }
        const Transform transform(f.options, row);
        const auto logprob_of = [&](const Logits& logits) {
            return scan(logits, f.inner, row, f.vocabulary, label, transform, false).scalars.logprob;
        };
        const RowResult policy = scan(f.policy, f.inner, row, f.vocabulary, label, transform, f.entropy != nullptr);
        put(f.logprobs, row, policy.scalars.logprob);
        put(f.entropy, row, policy.scalars.entropy);
        if (f.stats) {
            float* stats = f.stats + row * kStats;
            stats[0] = static_cast<float>(policy.sum.c);
            stats[1] = policy.slow ? kSlowRow : static_cast<float>(policy.sum.s);
            stats[2] = static_cast<float>(policy.scalars.complement);
            stats[3] = 0.0f;
        }
        double negative = policy.scalars.logprob;
        if (f.negative.data && (!f.negative_mask || f.negative_mask[row])) negative = logprob_of(f.negative);
        put(f.negative_logprobs, row, negative);
        double advantage = f.advantages ? f.advantages[row] : 0.0;
        if (f.positive.data) {
            const double positive = logprob_of(f.positive);
            const Credit earned = credit(evidence(positive, negative), advantage, f.lam, f.eps_w);
            put(f.positive_logprobs, row, positive);
            put(f.evidence, row, earned.evidence);
            put(f.weight, row, earned.weight);
            advantage = earned.advantage;
        }
        put(f.advantages_out, row, advantage);
    }
}

template <class T>
void backward_row(const Backward& w, int64_t row) {
    T* const out = const_cast<T*>(row_start<T>(w.gradient, w.inner, row));
    const double g = w.grad_logprobs ? w.grad_logprobs[row] : 0.0, h = w.grad_entropy ? w.grad_entropy[row] : 0.0;
    if (w.labels[row] == w.options.ignore_index || (g == 0.0 && h == 0.0)) {
        memset(out, 0, w.vocabulary * sizeof(T));
        return;
    }
    const float* stats = w.stats + row * kStats;
    RowResult found;
    found.scalars = {0.0, w.logprobs[row], stats[2], w.entropy ? w.entropy[row] : 0.0};
    found.sum = {stats[1], 0.0, stats[0]};
    found.slow = stats[1] == kSlowRow;
    write_gradient(row_start<T>(w.policy, w.inner, row), out, w.vocabulary, w.labels[row], Transform(w.options, row),
                   found, g, h);
}

void backward_rows(const Backward& w, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        switch (w.policy.dtype) {
            case Dtype::kFloat32:
                backward_row<float>(w, row);
                break;
            case Dtype::kBFloat16:
                backward_row<BFloat16>(w, row);
                break;
            default:
                backward_row<Half>(w, row);
        }
    }
}

float sum_of(const float* data, int64_t size) {
    Vec s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for (int64_t j = 0; j + kStep <= size; j += kStep) {
        Vec a, b;
        load2(data + j, a, b);
        s[0] = add(s[0], a);
        s[1] = add(s[1], b);
        load2(data + j + 2 * kWidth, a, b);
        s[2] = add(s[2], a);
        s[3] = add(s[3], b);
    }
    return static_cast<float>(lane_sum(s[0], s[1]) + lane_sum(s[2], s[3]));
}

}  // namespace CEPO_ISA
}  // namespace cepo
