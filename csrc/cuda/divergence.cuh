// A block for a pair of rows: their normalisers, the sum of what their columns add, the gradient; each a sweep, the
// later ones from what the L2 still holds.
#pragma once

#include "divergence_columns.cuh"

namespace cepo {
namespace cuda {

struct PartSum {
    float top;     // the highest, in logits or their tanh
    double total;  // sum of e^(x - top); NaN where the row is broken
};
struct PairSum {
    PartSum student, teacher;
};

// Shared memory of a block: what its threads need between and through the sweeps, for which registers are too few.
struct PairState {
    double reduced[5][kPairWarps];
    int counts[kPairThreads];
    PairRows rows;
    Mixture mixture;
    Level level;
    Pick pick;
    float clip;
    PairSum tail, sum;
    double log_p, log_q;  // of the bucket
    double slope;         // of a transformed logit, weight included
    float level_of_q, of_tail;
    double student_log, student_log_z, teacher_log, teacher_log_z;
};

// --- across threads, in an order of its own --------------------------------------------------------------------------

template <int kCount>
CEPO_DEVICE void block_sums(double (&values)[kCount], PairState& state) {
    const int thread = device::thread_index();
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] += device::shuffle_xor(values[i], mask);
    }
    device::block_barrier();  // the last reduction has been read
    if (thread % 32 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) state.reduced[i][thread / 32] = values[i];
    }
    device::block_barrier();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[i] = 0.0;
        for (int warp = 0; warp < kPairWarps; ++warp) values[i] += state.reduced[i][warp];
    }
}
CEPO_DEVICE float block_top(float value, PairState& state) {
    const int thread = device::thread_index();
    for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, device::shuffle_xor(value, mask));
    device::block_barrier();
    if (thread % 32 == 0) state.reduced[0][thread / 32] = value;
    device::block_barrier();
    for (int warp = 0; warp < kPairWarps; ++warp) value = fmaxf(value, static_cast<float>(state.reduced[0][warp]));
    return value;
}

struct RunningSum {
    float top = kLowestLogit, s = 0.0f;
    CEPO_DEVICE void add(const float (&x)[kChunk], float k) {
        float raised = top, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) raised = fmaxf(raised, x[i]);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum += device::fast_exp2((x[i] - raised) * k);
        s = fmaf(s, device::fast_exp2((top - raised) * k), sum);
        top = raised;
    }
};
template <bool kCapped>
CEPO_DEVICE PairSum pair_sum(PairState& state, Part part) {
    const PairRows& rows = state.rows;
    RunningSum student, teacher;
    over_chunks(rows, [&](int chunk, float (&b)[kChunk], float (&a)[kChunk]) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const int column = chunk * kChunk + i;
            const bool own = is_of(part, state.pick, b[i], column);
            b[i] = part_value<kCapped>(b[i], rows, column, own);
            a[i] = part_value<kCapped>(a[i], rows, column, own);
        }
        student.add(b, rows.k);
        teacher.add(a, rows.k);
    });
    const float tops[2] = {block_top(student.top, state), block_top(teacher.top, state)};
    double sums[2] = {static_cast<double>(student.s) * device::fast_exp2((student.top - tops[0]) * rows.k),
                      static_cast<double>(teacher.s) * device::fast_exp2((teacher.top - tops[1]) * rows.k)};
    block_sums(sums, state);
    return {{tops[0], sums[0]}, {tops[1], sums[1]}};
}

// The column of the last of the first `equals` logits that equal the threshold.
CEPO_DEVICE void find_last_chosen(PairState& state, float threshold, int equals) {
    const PairRows& rows = state.rows;
    const int thread = device::thread_index(), each = (rows.vocabulary + kPairThreads - 1) / kPairThreads;
    const int begin = thread * each, end = min(begin + each, rows.vocabulary);
    int count = 0;
    for (int j = begin; j < end; ++j) count += element(rows.student, rows.student_dtype, j) == threshold;
    state.counts[thread] = count;
    if (thread == 0) state.pick = {threshold, -1};
    device::block_barrier();
    int before = 0;
    for (int i = 0; i < thread; ++i) before += state.counts[i];
    if (before < equals && before + count >= equals) {
        int j = begin;
        for (int left = equals - before; left > 0; ++j)
            left -= element(rows.student, rows.student_dtype, j) == threshold;
        state.pick.last = j - 1;
    }
    device::block_barrier();
}

struct ColumnSums {
    DivergenceSums sums;
    double shift;  // sum q - p: what is wrong with the normalisers
};
template <int kForm, bool kCapped>
CEPO_DEVICE ColumnSums column_sums(PairState& state, Part part) {
    const PairRows& rows = state.rows;
    constexpr bool kKl = kForm == kForwardKl || kForm == kReverseKl;
    float value = 0.0f, shift = 0.0f, cut = 0.0f, clipped = 0.0f, mean = 0.0f;
    over_chunks(rows, [&](int chunk, float (&b)[kChunk], float (&a)[kChunk]) {
        float values = 0.0f, shifts = 0.0f, means = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const int column = chunk * kChunk + i;
            const bool own = is_of(part, state.pick, b[i], column);
            const Column c = column_of<kForm, kCapped>(b[i], a[i], part_value<kCapped>(b[i], rows, column, own),
                                                       part_value<kCapped>(a[i], rows, column, own), rows, state.level);
            const Share s = share_of<kForm>(c, state.mixture);
            const bool over = is_clipped<kForm>(c, s, state.clip);
            const float gap = c.hi * (c.falls ? c.complement : -c.complement);
            shifts += gap;
            const float limit = kForm == kForwardKl   ? state.clip + gap
                                : kForm == kReverseKl ? state.clip - gap
                                                      : state.clip;
            values += over ? limit : c.lost ? INFINITY : c.hi * s.value;
            clipped += over ? 1.0f : 0.0f;
            if (kKl) {
                cut += over ? c.hi : 0.0f;
            } else {
                means += over ? 0.0f : c.hi * (c.falls ? 1.0f : c.w) * s.log_share;
            }
        }
        value += values, shift += shifts, mean += means;
    });
    double all[5] = {value, shift, cut, clipped, mean};
    block_sums(all, state);
    ColumnSums out;
    out.sums.value = all[0], out.sums.cut = all[2], out.sums.clipped = all[3], out.sums.mean = all[4];
    out.shift = all[1];
    return out;
}

// --- rows ------------------------------------------------------------------------------------------------------------

CEPO_DEVICE double log_of(double x) { return x == 0.0 ? -INFINITY : log(x); }
// How far the highest of one part is above that of another, in nats.
CEPO_DEVICE double above(const PartSum& part, const PartSum& other, float unit) {
    return (static_cast<double>(part.top) - other.top) * unit;
}
CEPO_DEVICE double log_sum(double a, double b) {
    const double top = fmax(a, b), origin = top == -INFINITY ? 0.0 : top;
    return origin + log_of(exp(a - origin) + exp(b - origin));
}
// Of a part, where its rows' wholes have the logarithms student_log_z and teacher_log_z, all relative to the part's
// highest: beside -1e30 a logarithm has no digits left. By thread 0.
template <bool kCapped>
CEPO_DEVICE void put_level(PairState& state, const PairSum& part, double student_log, double student_log_z,
                           double teacher_log, double teacher_log_z) {
    const auto factor = [](const PartSum& sum, double log, double log_z) {
        return static_cast<float>(sum.total > 0.0 ? exp(log - log_z) / sum.total : 0.0);
    };
    const double logs = teacher_log_z - student_log_z;
    const double whole = logs + above(part.teacher, part.student, state.rows.unit);
    const float main = static_cast<float>(whole);
    state.level = {
        part.student.top,
        part.teacher.top,
        factor(part.student, student_log, student_log_z),
        factor(part.teacher, teacher_log, teacher_log_z),
        kCapped ? Difference{main, static_cast<float>(whole - main)} : difference(part.teacher.top, part.student.top),
        static_cast<float>(logs)};
}

// For the bucket of all columns that are not chosen: the logarithms of the tails' sums, the student's from the
// teacher's where both are there, so that their ratio keeps its digits. False if a row is broken.
template <bool kCapped>
CEPO_DEVICE bool sum_tail(PairState& state, float threshold, int equals, float clip) {
    find_last_chosen(state, threshold, equals);
    const PairSum tail = pair_sum<kCapped>(state, Part::kTail);
    const double student = log_of(tail.student.total), teacher = log_of(tail.teacher.total);
    if (device::thread_index() == 0) {
        state.tail = tail;
        state.log_p = teacher, state.log_q = student;
        state.clip = INFINITY;
        put_level<kCapped>(state, tail, student, student, teacher, teacher);
    }
    if (student != student || teacher != teacher) return false;
    device::block_barrier();
    double moved = 0.0;
    if (student > -INFINITY && teacher > -INFINITY)
        moved = log1p(column_sums<kForwardKl, kCapped>(state, Part::kTail).shift);
    device::block_barrier();
    if (device::thread_index() == 0) state.log_q += moved, state.clip = clip;
    return true;
}

template <int kForm, bool kCapped>
__global__ void __launch_bounds__(kPairThreads, 1)
    stream_divergence(Divergence d, const float* thresholds, const int* equals, Values values) {
    constexpr bool kKl = kForm == kForwardKl || kForm == kReverseKl;
    PairState& state = *reinterpret_cast<PairState*>(device::dynamic_shared());
    const int64_t row = blockIdx.x;
    const int thread = device::thread_index(), vocabulary = static_cast<int>(d.vocabulary);
    void* const gradient = d.gradient.data ? row_start(d.gradient, d.inner, row) : nullptr;
    const double weight = d.weight ? device::load(d.weight + row) : 1.0f;
    const auto finish_with = [&](float value) {
        if (thread == 0) device::store(d.values + row, value);
        if (gradient) fill(d.gradient, gradient, vocabulary, value, thread, kPairThreads);
    };
    if (weight == 0.0 || weight != weight) return finish_with(static_cast<float>(weight));
    DivergenceOptions how{static_cast<Kind>(d.kind), d.beta, d.clip};
    if (thread == 0) {
        const Transform transform = transform_of(d.options, values, row);
        state.rows = {row_start(d.student, d.inner, row),
                      row_start(d.teacher, d.inner, row),
                      d.student.dtype,
                      d.teacher.dtype,
                      vocabulary,
                      transform.k,
                      static_cast<float>(transform.k * kLn2),
                      transform.inner};
        state.slope = weight * transform.chain;
        state.mixture = {static_cast<float>(d.beta), static_cast<float>(1.0 - d.beta), static_cast<float>(log(d.beta)),
                         static_cast<float>(log1p(-d.beta))};
        state.clip = static_cast<float>(d.clip);
    }
    device::block_barrier();
    const Part part = thresholds ? Part::kChosen : Part::kAll;
    if (thresholds && !sum_tail<kCapped>(state, device::load(thresholds + row), device::load(equals + row),
                                         static_cast<float>(d.clip)))
        return finish_with(NAN);
    const PairSum sum = pair_sum<kCapped>(state, part);
    if (thread == 0) {
        const double student = log_of(sum.student.total), teacher = log_of(sum.teacher.total);
        state.sum = sum;
        state.student_log = state.student_log_z = student, state.teacher_log = state.teacher_log_z = teacher;
        if (thresholds) {
            state.log_q += above(state.tail.student, sum.student, state.rows.unit);
            state.log_p += above(state.tail.teacher, sum.teacher, state.rows.unit);
            state.student_log_z = log_sum(student, state.log_q);
            state.teacher_log_z = log_sum(teacher, state.log_p);
            state.log_p -= state.teacher_log_z, state.log_q -= state.student_log_z;
        }
        put_level<kCapped>(state, sum, student, state.student_log_z, teacher, state.teacher_log_z);
    }
    device::block_barrier();
    // Where the highest logits are further apart than float32's largest number, no difference of logits is a number.
    if (!(state.student_log_z > -INFINITY && state.teacher_log_z > -INFINITY && fabsf(state.level.gap.main) < INFINITY))
        return finish_with(NAN);

    const ColumnSums found = column_sums<kForm, kCapped>(state, part);
    device::block_barrier();
    if (thread == 0) {
        DivergenceSums sums = found.sums;
        double shift = found.shift;
        if (thresholds) {
            const Entry bucket = divergence_entry(state.log_p, state.log_q, how);
            add(sums, bucket);
            shift -= bucket.difference;
        }
        sums.value -= 0.5 * shift * shift * (kKl ? 1.0 : d.beta * (1.0 - d.beta));
        if (sums.value < 0.0 && sums.clipped == 0.0) sums.value = 0.0;
        device::store(d.values + row, static_cast<float>(weight * sums.value));
        // A jsd's gradient is unmoved to first order: the mean has the same error. Where a KL's entry is clipped, the
        // normalisers that decided it stay, and the level makes up for them; where none is, none may be now.
        const bool clips = sums.clipped > 0.0;
        if (!clips) how.clip = state.clip = INFINITY;
        const double moved = kKl && !clips ? log1p(shift) : 0.0;
        const double level = divergence_level(sums, how) + (kKl && clips ? shift : 0.0);
        put_level<kCapped>(state, state.sum, state.student_log, state.student_log_z + moved, state.teacher_log,
                           state.teacher_log_z);
        state.level_of_q = static_cast<float>(level);
        if (thresholds) {
            const double bucket = divergence_slope(divergence_entry(state.log_p, state.log_q - moved, how), level, how);
            const double total = state.tail.student.total;
            state.of_tail = static_cast<float>(total > 0.0 ? state.slope * bucket / total : bucket * 0.0);
        }
    }
    if (!gradient) return;
    device::block_barrier();
    if (state.level_of_q != state.level_of_q) return fill(d.gradient, gradient, vocabulary, NAN, thread, kPairThreads);
    const float slope = static_cast<float>(state.slope);
    over_chunks(state.rows, [&](int chunk, float (&b)[kChunk], float (&a)[kChunk]) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const PairRows& rows = state.rows;
            const float x = value_of<kCapped>(b[i], rows.inner);
            float out;
            if (part == Part::kAll || state.pick.takes(b[i], chunk * kChunk + i)) {
                const float y = value_of<kCapped>(a[i], rows.inner);
                const Column c = column_of<kForm, kCapped>(b[i], a[i], x, y, rows, state.level);
                out = slope * slope_of<kForm>(c, state.mixture, state.clip, state.level_of_q);
            } else {
                out = state.of_tail * device::fast_exp2((x - state.tail.student.top) * rows.k);
            }
            b[i] = kCapped ? (1.0f + x) * (1.0f - x) * out : out;
        }
        put_chunk(gradient, d.gradient.dtype, chunk, vocabulary, b);
    });
}

}  // namespace cuda
}  // namespace cepo
