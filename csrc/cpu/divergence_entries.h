// Divergences of a row's few entries, in float64, and what is said of the others.
#pragma once

#include "divergence_close.h"

namespace cepo {
namespace CEPO_ISA {

// The largest, -inf of none; NaN is passed over.
inline double highest(int64_t n, const double* x) {
    double top = -INFINITY;
    for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// -inf where all are; NaN where one is +inf or NaN.
inline double logsumexp(int64_t n, const double* x) {
    double top = highest(n, x), total = 0.0;
    if (top == -INFINITY) top = 0.0;
    for (int64_t i = 0; i < n; ++i) total += exp(x[i] - top);
    return top + log(total);
}

// The divergence of n entries, logits in nats; its derivatives take the place of the students' logits.
inline double solve(int64_t n, double* students, const double* teachers, const DivergenceOptions& how) {
    const double log_q = logsumexp(n, students), log_p = logsumexp(n, teachers);
    DivergenceSums sums;
    for (int64_t i = 0; i < n; ++i) add(sums, divergence_entry(teachers[i] - log_p, students[i] - log_q, how));
    const double level = divergence_level(sums, how);
    for (int64_t i = 0; i < n; ++i) {
        const Entry e = divergence_entry(teachers[i] - log_p, students[i] - log_q, how);
        students[i] = divergence_slope(e, level, how);
    }
    return sums.clipped == 0.0 && sums.value < 0.0 ? 0.0 : sums.value;
}

inline void from_top(int64_t n, double* x) {
    const double top = highest(n, x);
    for (int64_t i = 0; i < n && fabs(top) < INFINITY; ++i) x[i] -= top;
}
// Of a log-ratio summed in float32 from columns whose KL is `excess`, which bounds the sum of their p |log p / q|.
inline double ratio_error(double excess) { return 4e-7 * sqrt(2.0 * fmax(excess, 0.0)); }

// The largest of some columns and their logsumexp from there, each measured from a row's top; n logits, which it moves.
struct Tail {
    double top, log_total;

    Tail(int64_t n, double* x) : top(highest(n, x)) {
        if (fabs(top) == INFINITY) top = 0.0;
        for (int64_t i = 0; i < n; ++i) x[i] -= top;
        log_total = logsumexp(n, x);
    }
    double logit() const { return top + log_total; }
};

}  // namespace CEPO_ISA
}  // namespace cepo
