// Divergences between two rows, where the plain sums do not serve: a sweep for the normalisers, one for the sum, one
// for the gradient; the later ones find the rows in the cache. Blocks become float32 first, so that the arithmetic is
// written once for all dtypes.
#pragma once

#include <stdlib.h>

#include <type_traits>

#include "divergence_close.h"
#include "divergence_columns.h"
#include "divergence_entries.h"
#include "divergence_plain.h"

namespace cepo {
namespace CEPO_ISA {

// The rows, block by block.
struct Block {
    float student[kBlock], teacher[kBlock], student_capped[kBlock], teacher_capped[kBlock];
    const float *student_y, *teacher_y;
};
static_assert(sizeof(Block) <= 64 * 1024, "what a thread keeps besides the outputs");

// One row of a call.
struct Pair {
    const Divergence& d;
    const int64_t row;
    const double weight;
    const Transform transform;
    const bool in_order;
    const bool writes;                // a gradient
    const int64_t* chosen = nullptr;  // top_k columns that the sweeps leave out, in rising order
    void* rooms[10];
    int rooms_taken = 0;
    Block block;

    Pair(const Divergence& d, int64_t row, double weight)
        : d(d),
          row(row),
          weight(weight),
          transform(d.options, row),
          in_order(transform.capped || d.top_k > 0 || d.student.dtype != d.teacher.dtype),
          writes(d.gradient.data) {}

    float logit(const Logits& logits, int64_t column) const {
        return with_row(logits, d.inner, row, [&](auto x) { return widened(x[column]); });
    }
    double natural(float x) const { return transform.value(x) * transform.k * kLn2; }
    double cap_slope(float x) const {
        const double y = transform.capped ? transform.value(x) : 0.0;
        return 1.0 - y * y;
    }
    DivergenceOptions how() const { return {static_cast<Kind>(d.kind), d.beta, d.clip}; }

    void put_value(double value) const { d.values[row] = static_cast<float>(weight * value); }
    // f(column) in every column of the gradient.
    template <class F>
    void put_columns(F f) const {
        with_row(d.gradient, d.inner, row, [&](auto x) {
            const auto out = writable(x);
            for (int64_t j = 0; j < d.vocabulary; ++j) narrow(static_cast<float>(f(j)), out[j]);
        });
    }
    template <class T>
    static T* writable(const T* x) {
        return const_cast<T*>(x);
    }
    void put_block(int64_t start, int64_t n) const {
        with_row(d.gradient, d.inner, row,
                 [&](auto x) { from_floats(block.student, n, writable(x) + start, in_order); });
    }
    void give_up() const {
        put_value(NAN);
        if (writes) put_columns([](int64_t) { return NAN; });
    }

    // f(first column, number of columns, the same padded to a multiple of kStep), the block filled.
    template <class F>
    void over_blocks(F f) {
        int64_t next = 0;
        for (int64_t start = 0; start < d.vocabulary; start += kBlock) {
            const int64_t n = d.vocabulary - start < kBlock ? d.vocabulary - start : kBlock;
            const int64_t full = fetch(d.student, start, n, block.student);
            fetch(d.teacher, start, n, block.teacher);
            float *student_y = block.student, *teacher_y = block.teacher;
            if (transform.capped) {
                capped_block(block.student, full, transform.inner, student_y = block.student_capped);
                capped_block(block.teacher, full, transform.inner, teacher_y = block.teacher_capped);
                for (int64_t j = n; j < full; ++j) student_y[j] = teacher_y[j] = -INFINITY;
            }
            for (; next < d.top_k && chosen[next] < start + n; ++next)
                student_y[chosen[next] - start] = teacher_y[chosen[next] - start] = -INFINITY;
            block.student_y = student_y, block.teacher_y = teacher_y;
            if (!f(start, n, full)) return;
        }
    }

    int64_t fetch(const Logits& logits, int64_t start, int64_t n, float* to) const {
        return with_row(logits, d.inner, row, [&](auto x) { return to_floats(x + start, n, to, in_order); });
    }

    // f(first column, which of two, the columns) for every vector of a block.
    template <int kNeeds, class F>
    void over_columns(int64_t full, const Levels& l, F f) {
        const float* const student_y = kNeeds == kEverything ? block.student_y : block.student;
        const float* const teacher_y = kNeeds == kEverything ? block.teacher_y : block.teacher;
        for (int64_t j = 0; j < full; j += 2 * kWidth)
            for (int i = 0; i < 2; ++i) {
                const int64_t at = j + i * kWidth;
                f(at, i,
                  column_of<kNeeds>(load(block.student + at), load(block.teacher + at), load(student_y + at),
                                    load(teacher_y + at), l));
            }
    }

    struct Sums {
        DivergenceSums sums;
        double shift = 0.0;  // sum q - p: what is wrong with the normalisers
        float worst = -INFINITY;
    };
    template <int kForm, int kNeeds>
    Sums sum(const Levels& l, bool with_log) {
        Sums total;
        over_blocks([&](int64_t, int64_t, int64_t full) {
            const Vec zero = set(0.0f), one = set(1.0f);
            Vec value[2] = {zero, zero}, shift[2] = {zero, zero}, cut[2] = {zero, zero}, clipped[2] = {zero, zero},
                mean[2] = {zero, zero}, worst[2] = {set(-INFINITY), set(-INFINITY)};
            over_columns<kNeeds>(full, l, [&](int64_t, int i, const Column& c) {
                const Share s = share_of<kForm>(c, l, with_log);
                const Vec gap = mul(c.hi, c.complement);
                shift[i] = add(shift[i], where_less(c.r, zero, gap, sub(zero, gap)));
                const Vec at_clip = kForm == kForwardKl || kForm == kReverseKl ? sub(l.clip, gap) : l.clip;
                value[i] = add(value[i], where_clipped<kForm, kNeeds>(c, s, l, at_clip, mul(c.hi, s.value)));
                clipped[i] = add(clipped[i], where_clipped<kForm, kNeeds>(c, s, l, one, zero));
                if (kForm == kForwardKl || kForm == kReverseKl) {
                    cut[i] = add(cut[i], where_clipped<kForm, kNeeds>(c, s, l, c.hi, zero));
                    worst[i] = max(kForm == kForwardKl ? c.r : sub(zero, c.r), worst[i]);
                } else if (with_log) {
                    const Vec q = mul(c.hi, where_less(c.r, zero, one, c.w));
                    mean[i] = add(mean[i], where_clipped<kForm, kNeeds>(c, s, l, zero, mul(q, s.log_share)));
                }
            });
            total.sums.value += lane_sum(value[0], value[1]);
            total.sums.cut += lane_sum(cut[0], cut[1]);
            total.sums.clipped += lane_sum(clipped[0], clipped[1]);
            total.sums.mean += lane_sum(mean[0], mean[1]);
            total.shift += lane_sum(shift[0], shift[1]);
            total.worst = fmaxf(total.worst, lane_max(max(worst[0], worst[1])));
            return true;
        });
        return total;
    }

    template <int kForm, int kNeeds>
    void write(const Levels& l, double level_of_q, double factor) {
        const Vec level = set(static_cast<float>(level_of_q)), zero = set(0.0f), one = set(1.0f);
        const Vec by = set(static_cast<float>(kForm == kJsd || kForm == kEvenJsd ? factor * (1.0 - d.beta) : factor));
        over_blocks([&](int64_t start, int64_t n, int64_t full) {
            over_columns<kNeeds>(full, l, [&](int64_t j, int, const Column& c) {
                const Share s = share_of<kForm>(c, l, true);
                const Vec q = mul(c.hi, where_less(c.r, zero, one, c.w));
                Vec slope;
                if (kForm == kForwardKl) {
                    const Vec gap = mul(c.hi, where_less(c.r, zero, c.complement, sub(zero, c.complement)));
                    slope = sub(where_clipped<kForm, kNeeds>(c, s, l, q, gap), mul(q, level));
                } else if (kForm == kReverseKl) {
                    const Vec ratio = where_less(c.r, zero, c.u, sub(zero, c.u));
                    slope = mul(q, sub(where_clipped<kForm, kNeeds>(c, s, l, set(-1.0f), ratio), level));
                } else {
                    slope = mul(q, sub(where_clipped<kForm, kNeeds>(c, s, l, zero, s.log_share), level));
                }
                emit(j, mul(by, slope));
            });
            put_block(start, n);
            return true;
        });
    }
    // A column's gradient takes the place of its logit in the block, which nobody reads again.
    void emit(int64_t j, Vec slope) {
        if (transform.capped) {
            const Vec y = load(block.student_y + j);
            slope = mul(slope, mul(sub(set(1.0f), y), add(set(1.0f), y)));
        }
        store(block.student + j, slope);
    }

    void run() {
        if (d.top_k > 0) {
            int64_t* const columns = room<int64_t>(2 * d.top_k + kStep);
            uint32_t* const ranks = room<uint32_t>(2 * d.top_k + kStep);
            with_row(d.student, d.inner, row, [&](auto x) { largest(x, d.vocabulary, d.top_k, columns, ranks); });
            chosen = columns;
            if (!transform.capped && d.student.dtype == d.teacher.dtype && run_entries_closely()) return;
        }
        const bool plain = !in_order && !(d.clip < INFINITY);
        if (!in_order && is_kl() && run_if_close()) return;
        PairScan pair(transform.k);
        Scan &student = is_reverse() ? pair.x : pair.y, &teacher = is_reverse() ? pair.y : pair.x;
        if (plain) {
            of_both([&](auto x, auto y) { pair.row(x, y, d.vocabulary); });
        } else {
            over_blocks([&](int64_t, int64_t, int64_t full) {
                student.block<float, false>(block.student_y, full);
                teacher.block<float, false>(block.teacher_y, full);
                return !student.poisoned && !teacher.poisoned;
            });
        }
        if (pair.poisoned()) return give_up();
        if (d.top_k > 0) return pair.slow() ? run_entries_slowly() : run_entries(student.sum, teacher.sum);
        if (pair.slow()) return run_slowly();
        if (student.sum.s == 0.0 || teacher.sum.s == 0.0) return give_up();
        if (d.vocabulary == 1) return run_slowly();  // exactly 0
        if (plain &&
            (is_kl() ? run_plainly(pair) || run_closely(pair.x.sum, pair.y.sum) : d.beta == 0.5 && run_evenly(pair)))
            return;
        if (transform.capped || d.clip < INFINITY) return run_fast<kEverything>(student.sum, teacher.sum);
        differences_are_exact(student.sum, teacher.sum) ? run_fast<kExactDifferences>(student.sum, teacher.sum)
                                                        : run_fast<kNoCapNoClip>(student.sum, teacher.sum);
    }
    template <int kNeeds>
    void run_fast(RowSum student, RowSum teacher) {
        switch (how().kind) {
            case Kind::kForward:
                return run_form<kForwardKl, kNeeds>(student, teacher);
            case Kind::kReverse:
                return run_form<kReverseKl, kNeeds>(student, teacher);
            default:
                return d.beta == 0.5 ? run_form<kEvenJsd, kNeeds>(student, teacher)
                                     : run_form<kJsd, kNeeds>(student, teacher);
        }
    }

    bool is_reverse() const { return how().kind == Kind::kReverse; }
    bool is_kl() const { return how().kind != Kind::kJsd; }
    // f(the row whose probabilities weigh a KL's log-ratios, the other), of one dtype.
    template <class F>
    void of_both(F f) const {
        with_row(is_reverse() ? d.student : d.teacher, d.inner, row, [&](auto x) {
            f(x, row_start<std::decay_t<decltype(*x)>>(is_reverse() ? d.teacher : d.student, d.inner, row));
        });
    }
    // Both: whether the sums know the value well enough, and then all is done.
    bool run_plainly(const PairScan& pair) const {
        const double value = pair.value();
        if (!(value >= kPlain) || pair.worst > kFarApart) return false;
        put_value(value);
        if (writes)
            of_both([&](auto x, auto y) {
                const auto out = gradient_row(x);
                is_reverse() ? plain_gradient<true>(pair, x, y, out, d.vocabulary, value, weight * transform.chain)
                             : plain_gradient<false>(pair, x, y, out, d.vocabulary, value, weight * transform.chain);
            });
        return true;
    }
    bool run_evenly(const PairScan& pair) const {
        if (pair.value() < 4.0 * kPlainJsd) return false;  // a small jsd is a quarter of it
        EvenJsd jsd(pair);
        of_both(
            [&](auto x, auto y) { writes ? jsd.sum<true>(x, y, d.vocabulary) : jsd.sum<false>(x, y, d.vocabulary); });
        if (!(jsd.value >= kPlainJsd)) return false;
        put_value(jsd.value);
        if (writes)
            of_both(
                [&](auto x, auto y) { jsd.gradient(x, y, gradient_row(x), d.vocabulary, weight * transform.chain); });
        return true;
    }
    // Whether that was all, of rows that are close as far as their first block tells.
    bool run_if_close() {
        PairScan first(transform.k);
        of_both([&](auto x, auto y) { first.row(x, y, d.vocabulary < kBlock ? d.vocabulary : kBlock); });
        const bool serves = !first.poisoned() && !first.slow() && first.x.sum.s > 0.0 && first.y.sum.s > 0.0;
        return serves && first.value() < kPlain && d.vocabulary > 1 && run_closely(first.x.sum, first.y.sum);
    }
    // The same, from a guess at the normalisers of the row whose probabilities weigh and of the other.
    bool run_closely(RowSum one, RowSum other) {
        return differences_are_exact(one, other) ? run_closely(CloseKl<true>{transform, d, one, other})
                                                 : run_closely(CloseKl<false>{transform, d, one, other});
    }
    template <class Close>
    bool run_closely(Close close) {
        bool serves = false;
        of_both([&](auto x, auto y) { serves = close.run(x, y); });
        if (!serves) return false;
        if (close.clips()) {
            is_reverse() ? run_fast<kEverything>(close.one, close.other)
                         : run_fast<kEverything>(close.other, close.one);
            return true;
        }
        put_value(close.value);
        if (writes)
            of_both([&](auto x, auto y) {
                const double factor = weight * transform.chain;
                is_reverse() ? close.template gradient<true>(x, y, gradient_row(x), factor)
                             : close.template gradient<false>(x, y, gradient_row(x), factor);
            });
        return true;
    }
    // Of rows far apart the difference of 16-bit logits is rounded as well, by up to 2^-25 of it.
    bool differences_are_exact(RowSum a, RowSum b) const {
        return d.student.dtype != Dtype::kFloat32 && d.teacher.dtype != Dtype::kFloat32 && fabs(a.c - b.c) <= 16.0;
    }
    // Of the dtype that x points to.
    template <class T>
    T* gradient_row(const T*) const {
        return writable(row_start<T>(d.gradient, d.inner, row));
    }

    template <int kForm, int kNeeds>
    void run_form(RowSum student, RowSum teacher) {
        const double gap = gap_of(student, teacher);
        Sums found = sum<kForm, kNeeds>(Levels(transform, student, teacher, gap, d), writes);
        double& value = found.sums.value;
        if (!(fabs(value) < INFINITY) || found.worst > kFarApart) return run_slowly();
        const bool is_jsd = kForm == kJsd || kForm == kEvenJsd;
        value -= 0.5 * found.shift * found.shift * (is_jsd ? d.beta * (1.0 - d.beta) : 1.0);
        if (value < 0.0 && found.sums.clipped == 0.0) value = 0.0;
        put_value(value);
        if (!writes) return;
        // A jsd's gradient is unmoved to first order: the mean has the same error. Where a KL's entry is clipped, the
        // normalisers that decided it stay, and the level makes up for them; where none is, none may be now.
        const bool clips = found.sums.clipped > 0.0;
        Levels exact(transform, student, teacher, is_jsd || clips ? gap : gap - log1p(found.shift) / kLn2, d);
        if (!clips) exact.clip = set(INFINITY);
        const double level = divergence_level(found.sums, how()) + (is_jsd || !clips ? 0.0 : found.shift);
        write<kForm, kNeeds>(exact, level, weight * transform.chain);
    }

    // Memory until the row is done. No destructor frees it: exceptions and what they drag in stay out.
    template <class T>
    T* room(int64_t n) {
        rooms[rooms_taken] = malloc(n * sizeof(T));
        if (!rooms[rooms_taken]) abort();
        return static_cast<T*>(rooms[rooms_taken++]);
    }

    // A row's largest logit, from which the slow ways measure: at -1e38 a logsumexp cannot say how many it is of.
    double origin_of(const Logits& logits) const {
        double top = -INFINITY;
        for (int64_t j = 0; j < d.vocabulary; ++j) top = fmax(top, natural(logit(logits, j)));
        return top == -INFINITY ? 0.0 : top;
    }

    void run_slowly() {
        double *const students = room<double>(d.vocabulary), *const teachers = room<double>(d.vocabulary);
        const double student_top = origin_of(d.student), teacher_top = origin_of(d.teacher);
        for (int64_t j = 0; j < d.vocabulary; ++j) {
            students[j] = natural(logit(d.student, j)) - student_top;
            teachers[j] = natural(logit(d.teacher, j)) - teacher_top;
        }
        put_value(solve(d.vocabulary, students, teachers, how()));
        if (!writes) return;
        put_columns([&](int64_t j) { return weight * transform.chain * cap_slope(logit(d.student, j)) * students[j]; });
    }

    // The chosen columns and one bucket of the others, whose logit is their logsumexp, measured as theirs from the
    // tops; put_others(factor) writes that times the others' probabilities in the bucket. False, and nothing that
    // counts is written, if the log-ratio of the buckets, which may be wrong by `error`, is not known well enough.
    template <class F>
    bool put_entries(double student_bucket, double teacher_bucket, double student_top, double teacher_top, double error,
                     F put_others) {
        const int64_t k = d.top_k;
        double *const students = room<double>(k + 1), *const teachers = room<double>(k + 1);
        double* const slopes = room<double>(k);
        for (int64_t i = 0; i < k; ++i) {
            const float x = logit(d.student, chosen[i]);
            students[i] = natural(x) - student_top;
            teachers[i] = natural(logit(d.teacher, chosen[i])) - teacher_top;
            slopes[i] = weight * transform.chain * cap_slope(x);
        }
        students[k] = student_bucket, teachers[k] = teacher_bucket;
        from_top(k + 1, students), from_top(k + 1, teachers);
        const double value = solve(k + 1, students, teachers, how());
        if ((fabs(students[k]) + error) * error > kEnough * fabs(value)) return false;
        put_value(value);
        if (!writes) return true;
        const double factor = weight * transform.chain * students[k];
        if (factor != factor || student_bucket == -INFINITY) {
            put_columns([&](int64_t) { return factor != factor ? NAN : 0.0; });
        } else {
            put_others(factor);
        }
        with_row(d.gradient, d.inner, row, [&](auto x) {
            for (int64_t i = 0; i < k; ++i) narrow(static_cast<float>(slopes[i] * students[i]), writable(x)[chosen[i]]);
        });
        return true;
    }
    // Whether one sweep over the others, from the first block's guess at their sums, was enough.
    bool run_entries_closely() {
        PairScan first(transform.k);
        over_blocks([&](int64_t, int64_t, int64_t full) {
            first.block(block.student, block.teacher, full);
            return false;
        });
        const RowSum &one = first.x.sum, &other = first.y.sum;
        if (first.poisoned() || first.slow() || !(one.s > 0.0) || !(other.s > 0.0)) return false;
        return differences_are_exact(one, other) ? run_entries_closely(CloseKl<true>{transform, d, one, other})
                                                 : run_entries_closely(CloseKl<false>{transform, d, one, other});
    }
    template <class Close>
    bool run_entries_closely(Close close) {
        close.skipped = chosen, close.skips = d.top_k;
        return with_row(d.student, d.inner, row, [&](auto x) {
            using T = std::decay_t<decltype(*x)>;
            const T* const y = row_start<T>(d.teacher, d.inner, row);
            if (!close.template sweep<true>(x, y)) return false;
            if (close.drift > kFarGuess && !close.template sweep<true>(x, y)) return false;
            const double bucket = (close.one.c + log2(close.one.s)) * kLn2;
            if (!put_entries(bucket, bucket + close.log_ratio, 0.0, 0.0, ratio_error(close.excess),
                             [&](double factor) { close.scaled(x, gradient_row(x), factor); }))
                run_entries_slowly();
            return true;
        });
    }
    void run_entries(RowSum student, RowSum teacher) {
        double student_bucket = (student.c + log2(student.s)) * kLn2, error = 0.0;
        const double teacher_bucket = (teacher.c + log2(teacher.s)) * kLn2;
        if (student.s > 0.0 && teacher.s > 0.0) {
            const double gap = gap_of(student, teacher);
            Levels l(transform, student, teacher, gap, d);
            l.clip = set(INFINITY);
            const Sums found = sum<kForwardKl, kEverything>(l, false);
            student_bucket = teacher_bucket - gap * kLn2 + log1p(found.shift);
            error = ratio_error(found.sums.value);
        }
        const bool done = put_entries(student_bucket, teacher_bucket, 0.0, 0.0, error, [&](double factor) {
            const Levels l(transform, student, student, 0.0, d);
            const Vec by = mul(set(static_cast<float>(factor)), l.student_factor);
            over_blocks([&](int64_t start, int64_t n, int64_t full) {
                for (int64_t j = 0; j < full; j += kWidth) {
                    const Exp2 e = exp2_parts(term_exponent(load(block.student_y + j), l.k, l.student_c));
                    emit(j, mul(by, mul(e.mantissa, e.scale)));
                }
                put_block(start, n);
                return true;
            });
        });
        if (!done) run_entries_slowly();
    }
    void run_entries_slowly() {
        const double student_top = origin_of(d.student), teacher_top = origin_of(d.teacher);
        const Tail student = tail_of(d.student, student_top), teacher = tail_of(d.teacher, teacher_top);
        put_entries(student.logit(), teacher.logit(), student_top, teacher_top, 0.0, [&](double factor) {
            put_columns([&](int64_t j) {
                const float x = logit(d.student, j);
                return factor * cap_slope(x) * exp(natural(x) - student_top - student.top - student.log_total);
            });
        });
    }
    Tail tail_of(const Logits& logits, double top) {
        double* const others = room<double>(d.vocabulary);
        int64_t count = 0, next = 0;
        for (int64_t j = 0; j < d.vocabulary; ++j) {
            if (next < d.top_k && chosen[next] == j) {
                ++next;
            } else {
                others[count++] = natural(logit(logits, j)) - top;
            }
        }
        return Tail(count, others);
    }
};

void divergence_rows(const Divergence& d, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const double weight = d.weight ? d.weight[row] : 1.0;
        if (weight != 0.0) {
            Pair pair(d, row, weight);
            pair.run();
            while (pair.rooms_taken > 0) free(pair.rooms[--pair.rooms_taken]);
            continue;
        }
        d.values[row] = 0.0f;
        if (d.gradient.data)
            with_row(d.gradient, d.inner, row,
                     [&](auto x) { memset(Pair::writable(x), 0, d.vocabulary * sizeof(*x)); });
    }
}

}  // namespace CEPO_ISA
}  // namespace cepo
