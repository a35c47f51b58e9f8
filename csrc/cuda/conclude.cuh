// A row's results from its merged sums, written where the caller asked for them.
#pragma once

#include "gradient.cuh"

namespace cepo {
namespace cuda {

CEPO_DEVICE void put(float* out, int64_t row, double value) {
    if (out) device::store(out + row, static_cast<float>(value));
}

// Every output of a row that is not scored (0), or cannot be (NaN).
template <bool kLoss>
CEPO_DEVICE void put_all(const PolicyLoss& l, int64_t row, double value) {
    const Forward& f = l.forward;
    put(f.logprobs, row, value);
    put(f.positive_logprobs, row, value);
    put(f.negative_logprobs, row, value);
    put(f.evidence, row, value);
    put(f.weight, row, value);
    put(f.advantages_out, row, value);
    put(f.entropy, row, value);
    if (!kLoss) {
        for (int i = 0; f.stats && i < kStats; ++i) put(f.stats, row * kStats + i, value);
        return;
    }
    put(l.losses, row, value);
    put(l.ratio, row, value);
    device::store(l.clipped + row, false);
}

// By all threads of the row's blocks, `thread` of `threads`. Writes what is known without reading a logit and returns
// false if that is all there is to the row; else the block's state says what is to be read, after a block barrier, and
// the first threads have their tensor's label_x, on its way, for the state.
template <bool kLoss>
CEPO_DEVICE bool plan_row(const PolicyLoss& l, const Values& values, int64_t row, int thread, int threads,
                          RowState& state, float& label_x) {
    const Forward& f = l.forward;
    const int64_t label = device::load(f.labels + row);
    const float advantage = f.advantages ? device::load(f.advantages + row) : 0.0f;
    void* const gradient = kLoss && l.gradient.data ? row_start(l.gradient, f.inner, row) : nullptr;
    const bool ignored =
        label == f.options.ignore_index || (kLoss && advantage == 0.0f && values.or_else(kKl, l.kl_coef) == 0.0 &&
                                            values.or_else(kEntropyCoef, l.entropy_coef) == 0.0);
    if (ignored || label < 0 || label >= f.vocabulary) {
        const double value = ignored ? 0.0 : NAN;
        if (thread == 0) put_all<kLoss>(l, row, value);
        if (gradient)
            fill(l.gradient, gradient, static_cast<int>(f.vocabulary), static_cast<float>(value), thread, threads);
        return false;
    }
    const int tensor = device::thread_index();
    if (tensor >= kTensors) return true;
    const Logits& logits = tensor == kPolicy ? f.policy : tensor == kPositive ? f.positive : f.negative;
    const bool read = tensor != kNegative || !f.negative_mask || device::load(f.negative_mask + row);
    const void* const x = logits.data && read ? row_start(logits, f.inner, row) : nullptr;
    state.plan.x[tensor] = x;
    state.plan.dtype[tensor] = logits.dtype;
    state.slow[tensor] = false;
    if (x) label_x = element(x, logits.dtype, label);
    if (tensor == 0) {
        state.plan.row = row;
        state.plan.label = static_cast<int>(label);
        state.plan.advantage = advantage;
        state.plan.gradient = gradient;
        state.transform = transform_of(f.options, values, row);
    }
    return true;
}

// The policy's gradient of the row, from its loss term; NaN where the row has none.
template <bool kCapped>
CEPO_DEVICE void plan_gradient(RowState& state, const RowScalars& at, const RowSum& sum, bool slow, double g, double h,
                               float label_x) {
    if (at.complement != at.complement || g != g || h != h) {
        state.gradient = Gradient::kNaN;
        return;
    }
    state.gradient = slow ? Gradient::kSlow : Gradient::kFast;
    state.c_gradient = sum.c;
    state.slope = slopes(g, h, at.logprob, at.complement, at.entropy, sum.s, state.transform.chain);
    const double tanh_label = kCapped ? exact_value_of<true>(label_x, state.transform.inner) : 0.0;
    state.slope.label *= 1.0 - tanh_label * tanh_label;
}

// By lane 0 of one warp, once its lanes have the scalars. False if the entropy's spread is missing.
template <bool kLoss, bool kEntropy, bool kCapped>
CEPO_DEVICE bool conclude_policy(const PolicyLoss& l, const Values& values, RowState& state, RowScalars at,
                                 double positive, double negative, bool has_spread, bool writes) {
    const Forward& f = l.forward;
    const RowPlan& plan = state.plan;
    const RowSum sum = state.sum[kPolicy];
    const bool slow = state.slow[kPolicy];
    const int64_t row = plan.row;
    if (kEntropy) {
        at.entropy = entropy_of(at, has_spread ? state.spread : spread_of(sum));
        // One column holds nearly all that the label does not: the sums cannot tell how nearly.
        if (!has_spread && (slow || at.entropy * kSumsError < at.complement * kEntropyError)) return false;
    }
    double advantage = plan.advantage, evident = 0.0, weight = 0.0;
    if (!plan.x[kNegative]) negative = at.logprob;
    if (plan.x[kPositive]) {
        const Credit earned = credit(evidence(positive, negative), advantage, values.or_else(kLam, f.lam),
                                     values.or_else(kEpsW, f.eps_w));
        evident = earned.evidence, weight = earned.weight, advantage = earned.advantage;
    }
    if (writes) {
        put(f.logprobs, row, at.logprob);
        put(f.negative_logprobs, row, negative);
        if (plan.x[kPositive]) {
            put(f.positive_logprobs, row, positive);
            put(f.evidence, row, evident);
            put(f.weight, row, weight);
        }
        put(f.advantages_out, row, advantage);
        if (kEntropy) put(f.entropy, row, at.entropy);
        if (!kLoss && f.stats) {
            put(f.stats, row * kStats, sum.c);
            put(f.stats, row * kStats + 1, slow ? kSlowRow : sum.s);
            put(f.stats, row * kStats + 2, at.complement);
            put(f.stats, row * kStats + 3, 0.0);
        }
    }
    if (!kLoss) return true;
    const float logprob = static_cast<float>(at.logprob);
    const auto given = [&](const float* column, float otherwise) {
        return column ? device::load(column + row) : otherwise;
    };
    const LossTerm term =
        loss_term(logprob, at.entropy, advantage, given(l.old_logprobs, logprob), given(l.token_weight, 1.0f),
                  given(l.ref_logprobs, logprob),
                  {l.cispo, values.or_else(kClipLow, l.clip_low), values.or_else(kClipHigh, l.clip_high),
                   values.or_else(kKl, l.kl_coef), kEntropy ? values.or_else(kEntropyCoef, l.entropy_coef) : 0.0});
    if (writes) {
        put(l.losses, row, term.loss);
        put(l.ratio, row, term.ratio);
        device::store(l.clipped + row, term.clipped);
    }
    if (!plan.gradient) {
        state.gradient = Gradient::kNone;
        return true;
    }
    const double denominator = values.or_else(kDenominator, l.denominator);
    const double g = term.g / denominator, h = term.h / denominator;
    if (g == 0.0 && h == 0.0) {
        state.gradient = Gradient::kZero;
    } else {
        plan_gradient<kCapped>(state, at, sum, slow, g, h, state.label_x[kPolicy]);
    }
    return true;
}

// By all lanes of one warp: lane i finishes tensor i. False if the entropy's spread is missing.
template <bool kLoss, bool kEntropy, bool kCapped>
CEPO_DEVICE bool conclude(const PolicyLoss& l, const Values& values, RowState& state, bool has_spread, bool writes) {
    const int lane = device::thread_index() % 32, tensor = lane < kTensors ? lane : kPolicy;
    const RowSum sum = state.sum[tensor];
    const float label_x = state.label_x[tensor];
    RowScalars at{NAN, NAN, NAN, NAN};
    if (label_x < INFINITY) {  // neither +inf nor NaN
        const double value = exact_value_of<kCapped>(label_x, state.transform.inner);
        at = finish(sum, value * static_cast<double>(state.transform.k) - sum.c);
    }
    const double positive = device::shuffle_xor(at.logprob, kPositive);
    const double negative = device::shuffle_xor(at.logprob, kNegative);
    return lane != 0 ||
           conclude_policy<kLoss, kEntropy, kCapped>(l, values, state, at, positive, negative, has_spread, writes);
}

// Which tensors' sums float32 could not take, lane i answering for tensor i: bits, the same in every lane.
CEPO_DEVICE int needs_slow_sum(const WarpSum& mine) {
    int bits = mine.c == INFINITY || mine.s == 0.0 ? 1 << device::thread_index() % 32 : 0;
    for (int mask = 16; mask > 0; mask /= 2) bits |= device::shuffle_xor(bits, mask);
    return bits;
}

// What `redo` asks for, by the whole block, from global memory.
template <bool kCapped>
CEPO_DEVICE void redo_slowly(const Forward& f, RowState& state, int redo) {
    const RowPlan& plan = state.plan;
    const int vocabulary = static_cast<int>(f.vocabulary);
    const float k = state.transform.k, inner = state.transform.inner;
#pragma unroll 1
    for (int tensor = 0; tensor < kTensors; ++tensor) {
        if (!(redo >> tensor & 1)) continue;
        RowSum sum = slow_sum<kCapped>(state, plan.x[tensor], plan.dtype[tensor], vocabulary, plan.label, k, inner);
        const bool finite = sum.s == sum.s && sum.c != -INFINITY;
        if (sum.c == -INFINITY) sum.c = 0.0;
        if (device::thread_index() == 0) state.sum[tensor] = sum, state.slow[tensor] = finite;
    }
    if (redo & kNeedsSpread) {
        const double spread =
            slow_spread<kCapped>(state, plan.x[kPolicy], f.policy.dtype, vocabulary, plan.label, k, inner);
        if (device::thread_index() == 0) state.spread = spread;
    }
    device::block_barrier();
}

// A lane's sums, met by those of its warp, to where `settle` finds them.
CEPO_DEVICE void put_warp_sum(const LaneSum& lane, RowState& state, int tensor, int warp) {
    const WarpSum sum = warp_sum(lane.s, lane.u, lane.c);
    if (device::thread_index() % 32 != 0) return;
    state.s[tensor][warp] = sum.s;
    state.u[tensor][warp] = sum.u;
    state.c[tensor][warp] = sum.c;
}

// The blocks of a row: here, one.
struct OneBlock {
    CEPO_DEVICE bool writes() const { return true; }
    CEPO_DEVICE const RowState& owner(RowState& state, int) const { return state; }
    CEPO_DEVICE void meet() const {}
};

// From the virtual warps' sums of every tensor to the outputs and to what the gradient is made of, by a block that has
// met the others since they were written. Every block of a row computes the same; one writes the outputs.
template <bool kLoss, bool kEntropy, bool kCapped, class Team>
CEPO_DEVICE void settle(const PolicyLoss& l, const Values& values, RowState& state, const Team& team) {
    int redo = 0;
#pragma unroll 1
    for (bool first = true;; first = false) {
        const int lane = device::thread_index();
        if (lane < 32) {
            if (first) {
                const RowState& owner = team.owner(state, lane);
                WarpSum mine{1.0, 0.0, 0.0};
#pragma unroll 1
                for (int tensor = 0; tensor < kTensors; ++tensor) {
                    if (!state.plan.x[tensor]) continue;
                    const WarpSum sum = warp_sum(owner.s[tensor][lane], owner.u[tensor][lane], owner.c[tensor][lane]);
                    if (lane == tensor) mine = sum;
                }
                if (lane < kTensors) state.sum[lane] = {mine.s, mine.u, mine.c};
                redo = needs_slow_sum(mine);
            }
            // In the next pass, what `redo` asked for is there.
            if (!first || redo == 0) {
                const bool has_spread = redo & kNeedsSpread;
                redo =
                    conclude<kLoss, kEntropy, kCapped>(l, values, state, has_spread, team.writes()) ? 0 : kNeedsSpread;
            }
            if (lane == 0) state.redo = redo;
        }
        device::block_barrier();
        redo = state.redo;
        if (redo == 0) return;
        redo_slowly<kCapped>(l.forward, state, redo);
        team.meet();  // nobody writes over a row that another block still reads
    }
}

}  // namespace cuda
}  // namespace cepo
