// What Python hands over, as the kernels take it.
#pragma once

#include <pybind11/pybind11.h>

#include "api.h"

namespace cepo {
namespace py = pybind11;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, dtype, outer stride, inner stride); an address of 0 is an absent tensor.
inline Logits logits(const py::tuple& t) {
    return {at<void>(t[0].cast<uintptr_t>()), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<int64_t>(),
            t[3].cast<int64_t>()};
}

// (address, dtype, line stride, depth stride)
inline Operand operand(const py::tuple& t) {
    return {at<const void>(t[0].cast<uintptr_t>()), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<int64_t>(),
            t[3].cast<int64_t>()};
}

// (row temperatures or 0, temperature, scale, softcap or 0, ignore_index)
inline Options options(const py::tuple& t) {
    return {at<const double>(t[0].cast<uintptr_t>()), t[1].cast<double>(), t[2].cast<double>(), t[3].cast<double>(),
            t[4].cast<int64_t>()};
}

// (policy, positive, negative, labels, advantages, negative_mask, lam, eps_w, options, outputs), addresses for tensors.
inline Forward forward_of(int64_t inner, int64_t vocabulary, const py::tuple& t) {
    Forward f;
    f.policy = logits(t[0]), f.positive = logits(t[1]), f.negative = logits(t[2]);
    f.inner = inner, f.vocabulary = vocabulary;
    f.labels = at<const int64_t>(t[3].cast<uintptr_t>());
    f.advantages = at<const float>(t[4].cast<uintptr_t>());
    f.negative_mask = at<const bool>(t[5].cast<uintptr_t>());
    f.lam = t[6].cast<double>(), f.eps_w = t[7].cast<double>();
    f.options = options(t[8]);
    const py::tuple out = t[9];
    float** const buffers[] = {&f.logprobs, &f.positive_logprobs, &f.negative_logprobs, &f.evidence,
                               &f.weight,   &f.advantages_out,    &f.entropy,           &f.stats};
    for (size_t i = 0; i < 8; ++i) *buffers[i] = at<float>(out[i].cast<uintptr_t>());
    return f;
}

// Options are (cispo, clip_low, clip_high, kl_coef, entropy_coef, denominator), rows (old_logprobs, token_weight,
// ref_logprobs), out (losses, ratio, clipped).
inline PolicyLoss policy_loss_of(int64_t inner, int64_t vocabulary, const py::tuple& call, const py::tuple& gradient,
                                 const py::tuple& opts, const py::tuple& row_values, const py::tuple& out) {
    PolicyLoss l;
    l.forward = forward_of(inner, vocabulary, call);
    l.gradient = logits(gradient);
    l.cispo = opts[0].cast<bool>();
    double* const numbers[] = {&l.clip_low, &l.clip_high, &l.kl_coef, &l.entropy_coef, &l.denominator};
    for (size_t i = 0; i < 5; ++i) *numbers[i] = opts[i + 1].cast<double>();
    const float** const values[] = {&l.old_logprobs, &l.token_weight, &l.ref_logprobs};
    for (size_t i = 0; i < 3; ++i) *values[i] = at<const float>(row_values[i].cast<uintptr_t>());
    l.losses = at<float>(out[0].cast<uintptr_t>()), l.ratio = at<float>(out[1].cast<uintptr_t>());
    l.clipped = at<bool>(out[2].cast<uintptr_t>());
    return l;
}

inline Backward backward_of(int64_t inner, int64_t vocabulary, const py::tuple& gradient, const py::tuple& policy,
                            uintptr_t labels, uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logprobs,
                            uintptr_t entropy, uintptr_t stats, const py::tuple& opts) {
    Backward w;
    w.gradient = logits(gradient), w.policy = logits(policy);
    w.inner = inner, w.vocabulary = vocabulary;
    w.labels = at<const int64_t>(labels);
    w.grad_logprobs = at<const float>(grad_logprobs), w.grad_entropy = at<const float>(grad_entropy);
    w.logprobs = at<const float>(logprobs), w.entropy = at<const float>(entropy), w.stats = at<const float>(stats);
    w.options = options(opts);
    return w;
}

// (student, teacher, gradient, weight, kind, beta, clip, top_k, options, values), addresses for tensors.
inline Divergence divergence_of(int64_t inner, int64_t vocabulary, const py::tuple& t) {
    Divergence d;
    d.student = logits(t[0]), d.teacher = logits(t[1]), d.gradient = logits(t[2]);
    d.inner = inner, d.vocabulary = vocabulary;
    d.weight = at<const float>(t[3].cast<uintptr_t>());
    d.kind = t[4].cast<int>();
    d.beta = t[5].cast<double>(), d.clip = t[6].cast<double>();
    d.top_k = t[7].cast<int64_t>();
    d.options = options(t[8]);
    d.values = at<float>(t[9].cast<uintptr_t>());
    return d;
}

}  // namespace cepo
