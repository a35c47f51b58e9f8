// The arithmetic of one row, for the CPU and for CUDA.
//
// Units are powers of two: a column's term is 2^t with t = x' k - c, where k = log2(e) times scale over temperature and
// the reference c is a whole number, so that one fused multiply-add gives t rounded once however large x is. The
// label's column is never part of the sums. With s = sum 2^t and u = sum t 2^t over the other columns, and t_y the
// label's own, the log-odds against the label are (log2 s - t_y) ln 2, and everything else follows without
// cancellation. The scalars at a row's end are float64.
//
// Everything lives in a namespace named after the instruction set that it was compiled for: otherwise the linker could
// keep one copy for all of them, and a machine without AVX-512 would meet AVX-512 instructions.
#pragma once

#include <math.h>
#include <stdint.h>

#ifndef CEPO_ISA
#error "define CEPO_ISA, the namespace of this translation unit's instruction set, before including rowmath.h"
#endif

#ifdef __CUDACC__
#define CEPO_HD __host__ __device__ __forceinline__
#else
#define CEPO_HD inline
#endif

namespace cepo {
namespace CEPO_ISA {

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLog2e = 1.44269504088896340735992468100;
constexpr float kHeadroom = 2.0f;    // a column may exceed the reference by 2^2 before the reference moves: near
                                     // it, the largest terms add next to nothing to u and drown nobody
constexpr float kLowest = -127.0f;   // terms from 2^-126 down count as 0
constexpr float kLargest = 0x1p22f;  // beyond it, rounding the reference moves it by a unit: the row goes the slow way
constexpr double kSumsError = 5e-6;  // relative error allowed to the entropy by its float32 sums,
constexpr double kEntropyError = 4e-7;  // and the absolute error, in nats, that they have
constexpr float kSlowRow = -1.0f;       // in Stats::sum: recompute this row in float64

// Sums over the columns but the label's, relative to the reference c.
struct RowSum {
    double s = 0.0;  // sum 2^t
    double u = 0.0;  // sum t 2^t
    double c = 0.0;
};

// The same sums relative to another reference.
CEPO_HD RowSum rebased(RowSum a, double c) {
    const double shift = a.c - c;
    const double factor = exp2(shift);
    return {a.s * factor, a.s == 0.0 ? 0.0 : factor * (a.u + shift * a.s), c};
}

// log(1 + e^t), and its mirror for the other side, without overflow or cancellation.
CEPO_HD double softplus(double t) { return t > 0 ? t + log1p(exp(-t)) : log1p(exp(t)); }
CEPO_HD double sigmoid(double t) { return t > 0 ? 1.0 / (1.0 + exp(-t)) : exp(t) / (1.0 + exp(t)); }
CEPO_HD double times(double probability, double factor) { return probability == 0.0 ? 0.0 : probability * factor; }

struct RowScalars {
    double log_odds;                      // against the label
    double logprob, complement, entropy;  // log p, 1 - p, H in nats
};

// label_t is x'_y k - c in float64; NaN sums or labels come out as NaN.
CEPO_HD RowScalars finish(RowSum sum, double label_t) {
    const double log_odds = (log2(sum.s) - label_t) * kLn2;
    return {log_odds, -softplus(log_odds), sigmoid(log_odds), 0.0};
}

// The entropy of the other columns among themselves, in nats.
CEPO_HD double spread_of(RowSum sum) { return sum.s == 0.0 ? 0.0 : (log2(sum.s) - sum.u / sum.s) * kLn2; }

// H = q spread - p log p - q log q.
CEPO_HD double entropy_of(const RowScalars& row, double spread) {
    if (row.log_odds != row.log_odds) return row.log_odds;
    const double p = sigmoid(-row.log_odds), q = row.complement;
    return times(q, spread) - times(p, row.logprob) - times(q, -softplus(-row.log_odds));
}

struct Credit {
    double evidence, weight, advantage;
};

// CEPO (arXiv 2605.19436): w = clip(exp(sign(A) (log P+ - log P-)), 1 - eps_w, 1 + eps_w), A_t = A ((1 - lam) + lam w).
CEPO_HD double evidence(double positive, double negative) {
    return positive == -INFINITY && negative == -INFINITY ? 0.0 : positive - negative;
}
CEPO_HD Credit credit(double evidence, double advantage, double lam, double eps_w) {
    if (advantage == 0.0) return {evidence, 1.0, 0.0};
    const double ratio = exp(advantage > 0 ? evidence : -evidence);
    double weight = ratio < 1.0 - eps_w ? 1.0 - eps_w : ratio > 1.0 + eps_w ? 1.0 + eps_w : ratio;
    if (advantage != advantage) weight = advantage;
    return {evidence, weight, advantage * ((1.0 - lam) + lam * weight)};
}

// The policy loss of one token and its derivatives in log p and in the entropy, of which the row's gradient is made.
struct LossTerm {
    double loss, ratio;
    bool clipped;
    double g, h;
};
struct LossOptions {
    bool cispo;
    double clip_low, clip_high, kl_coef, entropy_coef;
};
// `logprob` as the caller will see it, in float32, so that an `old` of the same bits makes the ratio exactly 1.
// PPO: -w min(r A, clip(r) A). CISPO: -w sg(clip(r)) A log p. Added: kl_coef k3(ref) - entropy_coef H, where
// k3 = e^d - 1 - d, d = ref - log p, without w. Both clip r to [1 - clip_low, 1 + clip_high].
CEPO_HD LossTerm loss_term(float logprob, double entropy, double advantage, double old, double weight, double ref,
                           const LossOptions& o) {
    const double lp = logprob, ratio = lp == old ? 1.0 : exp(lp - old);
    const double low = 1.0 - o.clip_low, high = 1.0 + o.clip_high;
    const bool below = ratio < low && (o.cispo || advantage < 0.0);
    const bool above = ratio > high && (o.cispo || advantage > 0.0);
    const double used = below ? low : above ? high : ratio;
    LossTerm out{0.0, static_cast<float>(ratio), below || above, 0.0, 0.0};
    if (advantage != 0.0) {
        const double pull = -weight * used * advantage;
        out.loss = o.cispo ? times(pull, lp) : pull;
        out.g = out.clipped && !o.cispo ? 0.0 : pull;
    }
    if (o.kl_coef != 0.0) {
        const double d = lp == ref ? 0.0 : ref - lp, e = expm1(d);
        out.loss += o.kl_coef * (e - d);
        out.g -= o.kl_coef * e;
    }
    if (o.entropy_coef != 0.0) {
        out.loss -= o.entropy_coef * entropy;
        out.h = -o.entropy_coef;
    }
    return out;
}

// The gradient of g log p + h H in column j != y is 2^t (a + b t); in the label's column it is `label`. All three
// already carry dx'/dx where that is the same for every column.
struct Slopes {
    double a, b, label;
};
CEPO_HD Slopes slopes(double g, double h, double logprob, double complement, double entropy, double s, double chain) {
    const double density = s == 0.0 ? 0.0 : complement / s;  // p_j = density 2^t
    const double log_density = density == 0.0 ? 0.0 : log(density);
    const double p = exp(logprob);
    Slopes out;
    out.a = -chain * density * (g + h * (log_density + entropy));
    out.b = -chain * density * h * kLn2;
    out.label = chain * (g * complement - h * times(p, logprob + entropy));
    return out;
}

// Divergences between a student's row and a teacher's, p the teacher's and q the student's probabilities, entry by
// entry.
enum class Kind : int { kForward = 0, kReverse = 1, kJsd = 2 };  // KL(p || q), KL(q || p), the jsd around their mixture

struct DivergenceOptions {
    Kind kind;
    double beta;  // the teacher's share of the mixture, within (0, 1)
    double clip;  // of an entry's term from above; infinite: none
};

struct Entry {
    double value;       // what the entry adds; over all entries of a KL, p - q is nothing, and keeps the sum positive
    double difference;  // p - q
    double q;
    double ratio;  // a KL: log of its first over its second; jsd: log(q / m), and 0 where clipped
    double cut;    // probability, of a KL's first, that was clipped
    bool clipped;
};

CEPO_HD double phi(double z) { return z <= -1.0 ? 1.0 : (1.0 + z) * log1p(z) - z; }

CEPO_HD Entry divergence_entry(double log_p, double log_q, const DivergenceOptions& o) {
    const double p = exp(log_p), q = exp(log_q);
    if (p == 0.0 && q == 0.0) return {0.0, 0.0, 0.0, 0.0, 0.0, false};
    const double r = log_p - log_q;
    const bool near = fabs(r) < 1.0;
    Entry e{0.0, near ? -p * expm1(-r) : p - q, q, 0.0, 0.0, false};
    if (o.kind == Kind::kJsd) {
        const double m = o.beta * p + (1.0 - o.beta) * q, z = m == 0.0 ? 0.0 : e.difference / m;
        const double of_p = fmax(-1.0, (1.0 - o.beta) * z), of_q = fmax(-1.0, -o.beta * z);
        e.value = m * (o.beta * phi(of_p) + (1.0 - o.beta) * phi(of_q));
        e.clipped = e.value > o.clip;
        if (e.clipped) e.value = o.clip;
        if (!e.clipped && q > 0.0) e.ratio = near ? log1p(of_q) : log_q - log(m);
        return e;
    }
    const bool forward = o.kind == Kind::kForward;
    const double one = forward ? p : q, gap = forward ? e.difference : -e.difference;
    e.ratio = forward ? r : -r;
    const double plain = times(one, e.ratio);
    e.clipped = plain > o.clip;
    e.cut = e.clipped ? one : 0.0;
    e.value = e.clipped ? o.clip - gap : near ? one * (expm1(-e.ratio) + e.ratio) : plain - gap;
    return e;
}

// Sums over the entries.
struct DivergenceSums {
    double value = 0.0;
    double cut = 0.0, clipped = 0.0;  // probability of, and number of clipped entries
    double mean = 0.0;                // jsd: sum of q log(q / m)
};
CEPO_HD void add(DivergenceSums& sums, const Entry& e) {
    sums.value += e.value;
    sums.cut += e.cut;
    sums.clipped += e.clipped;
    sums.mean += times(e.q, e.ratio);
}

// The constant of the gradient in q: what a KL's entries lost to the clip, or the mean that makes a gradient sum to 0.
CEPO_HD double divergence_level(const DivergenceSums& sums, const DivergenceOptions& o) {
    if (o.kind == Kind::kForward) return sums.cut;
    if (o.kind == Kind::kJsd) return sums.mean;
    const double level = sums.value - (sums.clipped > 0.0 ? sums.clipped * o.clip : 0.0) - sums.cut;
    return fabs(level) < INFINITY ? level : NAN;
}

// The derivative of the sum in the student's logit of this entry.
CEPO_HD double divergence_slope(const Entry& e, double level, const DivergenceOptions& o) {
    if (o.kind == Kind::kForward) return (e.clipped ? e.q : -e.difference) - e.q * level;
    if (o.kind == Kind::kJsd) return (1.0 - o.beta) * (times(e.q, e.ratio) - e.q * level);
    return e.q == 0.0 && level == level ? 0.0 : e.q * ((e.clipped ? -1.0 : e.ratio) - level);
}

}  // namespace CEPO_ISA
}  // namespace cepo
