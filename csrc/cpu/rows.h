// The kernels: what is read and written for each row of a call.
#pragma once

#include "gradient.h"

namespace cepo {
namespace CEPO_ISA {

inline void put(float* out, int64_t row, double value) {
    if (out) out[row] = static_cast<float>(value);
}

// The policy's scan and what the row's credit makes of it; every output of `f` but the policy's stays as it was where
// it is null.
struct ScoredRow {
    RowResult policy;
    double advantage;
};
ScoredRow score_row(const Forward& f, int64_t row, const Transform& transform, bool with_entropy) {
    const int64_t label = f.labels[row];
    const auto scan_of = [&](const Logits& logits, bool entropy) {
        return scan(logits, f.inner, row, f.vocabulary, label, transform, entropy);
    };
    const bool has_negative = f.negative.data && (!f.negative_mask || f.negative_mask[row]);
    double negative = has_negative ? scan_of(f.negative, false).scalars.logprob : 0.0;
    const double positive = f.positive.data ? scan_of(f.positive, false).scalars.logprob : 0.0;
    // The policy comes last: a gradient written right after finds its row in the cache.
    ScoredRow out{scan_of(f.policy, with_entropy), f.advantages ? f.advantages[row] : 0.0};
    if (!has_negative) negative = out.policy.scalars.logprob;
    put(f.logprobs, row, out.policy.scalars.logprob);
    put(f.negative_logprobs, row, negative);
    if (f.positive.data) {
        const Credit earned = credit(evidence(positive, negative), out.advantage, f.lam, f.eps_w);
        put(f.positive_logprobs, row, positive);
        put(f.evidence, row, earned.evidence);
        put(f.weight, row, earned.weight);
        out.advantage = earned.advantage;
    }
    put(f.advantages_out, row, out.advantage);
    put(f.entropy, row, out.policy.scalars.entropy);
    return out;
}

void zero_row(const Forward& f, int64_t row) {
    float* const all[] = {f.logprobs, f.positive_logprobs, f.negative_logprobs, f.evidence, f.weight, f.advantages_out,
                          f.entropy};
    for (float* out : all) put(out, row, 0.0);
}

void forward_rows(const Forward& f, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (f.labels[row] == f.options.ignore_index) {
            zero_row(f, row);
            continue;
        }
        const RowResult policy = score_row(f, row, Transform(f.options, row), f.entropy != nullptr).policy;
        if (f.stats) {
            float* stats = f.stats + row * kStats;
            stats[0] = static_cast<float>(policy.sum.c);
            stats[1] = policy.slow ? kSlowRow : static_cast<float>(policy.sum.s);
            stats[2] = static_cast<float>(policy.scalars.complement);
            stats[3] = 0.0f;
        }
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

template <class T>
void policy_loss_row(const PolicyLoss& l, int64_t row) {
    const Forward& f = l.forward;
    T* const out = l.gradient.data ? const_cast<T*>(row_start<T>(l.gradient, f.inner, row)) : nullptr;
    const bool idle = f.advantages[row] == 0.0f && l.kl_coef == 0.0 && l.entropy_coef == 0.0;
    if (idle || f.labels[row] == f.options.ignore_index) {
        zero_row(f, row);
        l.losses[row] = l.ratio[row] = 0.0f;
        l.clipped[row] = false;
        if (out) memset(out, 0, f.vocabulary * sizeof(T));
        return;
    }
    const Transform transform(f.options, row);
    const ScoredRow scored = score_row(f, row, transform, f.entropy || l.entropy_coef != 0.0);
    const RowScalars& at = scored.policy.scalars;
    const float logprob = static_cast<float>(at.logprob);
    const LossTerm term =
        loss_term(logprob, at.entropy, scored.advantage, l.old_logprobs ? l.old_logprobs[row] : logprob,
                  l.token_weight ? l.token_weight[row] : 1.0, l.ref_logprobs ? l.ref_logprobs[row] : logprob,
                  {l.cispo, l.clip_low, l.clip_high, l.kl_coef, l.entropy_coef});
    put(l.losses, row, term.loss);
    put(l.ratio, row, term.ratio);
    l.clipped[row] = term.clipped;
    if (!out) return;
    const double g = term.g / l.denominator, h = term.h / l.denominator;
    if (g == 0.0 && h == 0.0) {
        memset(out, 0, f.vocabulary * sizeof(T));
    } else {
        write_gradient(row_start<T>(f.policy, f.inner, row), out, f.vocabulary, f.labels[row], transform, scored.policy,
                       g, h);
    }
}

void policy_loss_rows(const PolicyLoss& l, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        switch (l.forward.policy.dtype) {
            case Dtype::kFloat32:
                policy_loss_row<float>(l, row);
                break;
            case Dtype::kBFloat16:
                policy_loss_row<BFloat16>(l, row);
                break;
            default:
                policy_loss_row<Half>(l, row);
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
