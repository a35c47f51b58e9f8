// A pair of rows, chunk by chunk, and what a column of them adds to their divergence and to its gradient.
//
// Both rows are cut into chunks of eight columns, whatever their dtypes, and chunk i belongs to thread i % 512: equal
// rows of different dtypes are equal to the last bit. The arithmetic of a column is that of csrc/cpu's
// divergence_columns.h, but that exponents are relative to a lane's highest logit, which no logit is too large for.
#pragma once

#include "gradient.cuh"

namespace cepo {
namespace cuda {

constexpr int kPairThreads = 512, kPairWarps = kPairThreads / 32;
constexpr int kChunk = 8;        // columns
constexpr float kFar = 0x1p22f;  // stands for every larger log-ratio where e^-u multiplies it
constexpr float kLowestLogit = -0x1.fffffep127f;

enum Form { kForwardKl, kReverseKl, kJsd, kEvenJsd };  // the last: of beta 1/2
enum class Part : int { kAll, kChosen, kTail };

// The top_k columns of a row: those above the threshold, and those that equal it up to column `last`.
struct Pick {
    float threshold;
    int last;
    CEPO_DEVICE bool takes(float x, int column) const { return x > threshold || (x == threshold && column <= last); }
};

// a - b as a number and what its rounding left out.
struct Difference {
    float main, rest;
};
CEPO_DEVICE Difference difference(float a, float b) {
    const float d = a - b, back = d - a;
    return {d, fabsf(d) < INFINITY ? (a - (d - back)) - (b + back) : 0.0f};
}

// A part's constants, for every column. Without a cap, `gap` is that of the highest logits alone: a row of 1e30 leaves
// no digits for the other's.
struct Level {
    float student_top, teacher_top, student_factor, teacher_factor;
    Difference gap;
    float log_gap;
};

struct Mixture {
    float beta, rest, log_beta, log_rest;
};

// What all sweeps of a pair of rows share.
struct PairRows {
    const void *student, *teacher;
    Dtype student_dtype, teacher_dtype;
    int vocabulary;
    float k, unit, inner;  // unit: of a logit in nats
};

// --- chunks ----------------------------------------------------------------------------------------------------------

struct Chunk {
    uint4 low, high;  // `high` of float32 alone
};
template <class T>
CEPO_DEVICE Chunk load_chunk(const void* x, int chunk, int vocabulary) {
    const int first = chunk * kChunk;
    Chunk out{lowest_piece<T>(), lowest_piece<T>()};
    if (first + kChunk <= vocabulary) {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(x) & 15);
        const unsigned char* const at =
            static_cast<const unsigned char*>(x) - shift + static_cast<int64_t>(first) * sizeof(T);
        out.low = shift == 0 ? device::load16_once(at) : GlobalRow<T>::unaligned(at, shift);
        if (sizeof(T) == 4)
            out.high = shift == 0 ? device::load16_once(at + 16) : GlobalRow<T>::unaligned(at + 16, shift);
        return out;
    }
#pragma unroll 1
    for (int i = 0; first + i < vocabulary; ++i) {
        const uint32_t column = repeated(device::load(static_cast<const T*>(x) + first + i));
        if (i < kPieceColumns<T>) {
            out.low = with_column<T>(out.low, i, column);
        } else {
            out.high = with_column<T>(out.high, i - kPieceColumns<T>, column);
        }
    }
    return out;
}
CEPO_DEVICE Chunk load_chunk(const void* x, Dtype dtype, int chunk, int vocabulary) {
    if (dtype == Dtype::kFloat32) return load_chunk<float>(x, chunk, vocabulary);
    if (dtype == Dtype::kBFloat16) return load_chunk<BFloat16>(x, chunk, vocabulary);
    return load_chunk<Half>(x, chunk, vocabulary);
}
CEPO_DEVICE void unpack_chunk(const Chunk& chunk, Dtype dtype, float (&out)[kChunk]) {
    if (dtype == Dtype::kBFloat16) return unpack(chunk.low, out, BFloat16{});
    if (dtype == Dtype::kFloat16) return unpack(chunk.low, out, Half{});
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bits_float(word(chunk.low, i)), out[4 + i] = bits_float(word(chunk.high, i));
}
CEPO_DEVICE void put_chunk(void* to, Dtype dtype, int chunk, int vocabulary, const float (&values)[kChunk]) {
    const int left = vocabulary - chunk * kChunk, columns = left < kChunk ? left : kChunk;
    if (dtype == Dtype::kBFloat16) return OutRow<BFloat16>(to).put(chunk, columns, pack(values, BFloat16{}));
    if (dtype == Dtype::kFloat16) return OutRow<Half>(to).put(chunk, columns, pack(values, Half{}));
    const float low[4] = {values[0], values[1], values[2], values[3]};
    const float high[4] = {values[4], values[5], values[6], values[7]};
    const OutRow<float> out(to);
    out.put(2 * chunk, columns < 4 ? columns : 4, pack(low, 0.0f));
    if (columns > 4) out.put(2 * chunk + 1, columns - 4, pack(high, 0.0f));
}

// f(chunk, the student's logits, the teacher's), the next chunks on their way; -inf beyond the row.
template <class F>
CEPO_DEVICE void over_chunks(const PairRows& rows, F f) {
    const int thread = device::thread_index();
    Chunk student = load_chunk(rows.student, rows.student_dtype, thread, rows.vocabulary);
    Chunk teacher = load_chunk(rows.teacher, rows.teacher_dtype, thread, rows.vocabulary);
#pragma unroll 1
    for (int chunk = thread; chunk * kChunk < rows.vocabulary; chunk += kPairThreads) {
        float b[kChunk], a[kChunk];
        unpack_chunk(student, rows.student_dtype, b);
        unpack_chunk(teacher, rows.teacher_dtype, a);
        if ((chunk + kPairThreads) * kChunk < rows.vocabulary) {
            student = load_chunk(rows.student, rows.student_dtype, chunk + kPairThreads, rows.vocabulary);
            teacher = load_chunk(rows.teacher, rows.teacher_dtype, chunk + kPairThreads, rows.vocabulary);
        }
        f(chunk, b, a);
    }
}

// A logit as exponents are made of it: -inf where it is not of the part.
template <bool kCapped>
CEPO_DEVICE float part_value(float x, const PairRows& rows, int column, bool is_of_part) {
    const float value = value_of<kCapped>(x, rows.inner);
    return is_of_part && (!kCapped || column < rows.vocabulary) ? value : -INFINITY;
}
CEPO_DEVICE bool is_of(Part part, const Pick& pick, float student, int column) {
    return part == Part::kAll || pick.takes(student, column) == (part == Part::kChosen);
}

// --- columns ---------------------------------------------------------------------------------------------------------

// phi(z) = (1 + z) log1p(z) - z for z in [-1/2, 1].
CEPO_DEVICE float phi_of(float z) {
    float p = fmaf(-0x1.d9d95ep-10f, z, 0x1.e086fcp-8f);
    p = fmaf(p, z, -0x1.99c744p-7f);
    p = fmaf(p, z, 0x1.b1a394p-7f);
    p = fmaf(p, z, -0x1.b8a8b4p-7f);
    p = fmaf(p, z, 0x1.19d2bcp-6f);
    p = fmaf(p, z, -0x1.85846cp-6f);
    p = fmaf(p, z, 0x1.11a932p-5f);
    p = fmaf(p, z, -0x1.99a93cp-5f);
    p = fmaf(p, z, 0x1.55525ep-4f);
    p = fmaf(p, z, -0x1.55553ap-3f);
    p = fmaf(p, z, 0.5f);
    return z * z * p;
}

struct Column {
    float r, u, hi;             // log(p / q), its size, the larger of p and q
    float w, complement, a, b;  // e^-u, 1 - w, A(u) = u - (1 - w), B(u) = (1 - w) - u w
    bool falls, lost;           // q is the larger; a KL's first is possible here and its second is not
};
// From the raw logits a and b and what exponents are made of, y and x.
template <int kForm, bool kCapped>
CEPO_DEVICE Column column_of(float b, float a, float x, float y, const PairRows& rows, const Level& l) {
    const float low_a = fmaxf(a, kLowestLogit), low_b = fmaxf(b, kLowestLogit);
    Column c;
    if (kCapped) {  // tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        const float capped_x = fmaxf(x, -1.0f), capped_y = fmaxf(y, -1.0f);  // of another part nothing weighs
        c.r = fmaf(rows.unit, tanh_of((low_a - low_b) * rows.inner) * fmaf(-capped_x, capped_y, 1.0f), -l.gap.main) -
              l.gap.rest;
    } else {
        const Difference d = difference(low_a, low_b);
        c.r = fmaf(rows.unit, (d.main - l.gap.main) + (d.rest - l.gap.rest), -l.log_gap);
    }
    c.falls = c.r < 0.0f;
    const float t = (c.falls ? x - l.student_top : y - l.teacher_top) * rows.k;
    c.hi = device::fast_exp2(t) * (c.falls ? l.student_factor : l.teacher_factor);
    c.lost = !kCapped && (kForm == kForwardKl || kForm == kReverseKl) && (kForm == kForwardKl ? b : a) == -INFINITY &&
             t > -1074.0f;
    const float u = c.u = fminf(fabsf(c.r), -kLowestLogit);
    float series = fmaf(-0x1.1f5370p-13f, u, 0x1.5b046ep-10f);
    series = fmaf(series, u, -0x1.0ffb70p-7f);
    series = fmaf(series, u, 0x1.554514p-5f);
    series = fmaf(series, u, -0x1.5554fap-3f);
    series = fmaf(series, u, 0.5f);
    const bool near = u < 1.0f;
    const float excess = u * u * series, fall = device::fast_exp2(u * static_cast<float>(-kLog2e));
    c.complement = near ? u - excess : 1.0f - fall;
    c.w = near ? 1.0f - c.complement : fall;
    c.a = near ? excess : u - c.complement;
    c.b = near ? fmaf(u, c.complement, -excess) : fmaf(-fminf(u, kFar), fall, c.complement);
    return c;
}

// Relative to hi: what a column adds, and of a jsd log(q / m).
struct Share {
    float value, log_share;
};
template <int kForm>
CEPO_DEVICE Share share_of(const Column& c, const Mixture& mixture) {
    if (kForm == kForwardKl) return {c.falls ? c.b : c.a, 0.0f};
    if (kForm == kReverseKl) return {c.falls ? c.a : c.b, 0.0f};
    const float u = fminf(c.u, kFar), a = fminf(c.a, kFar), risen = c.falls ? 0.0f : u;
    if (kForm == kEvenJsd) {
        const float z = -0.5f * c.complement, f = phi_of(z);
        return {fmaf(c.b, 0.5f, -f), -((f + z) / (1.0f + z) + risen)};
    }
    // As in divergence_columns.h: around hi, around lo, or neither.
    const float kappa = c.falls ? mixture.beta : mixture.rest, other = c.falls ? mixture.rest : mixture.beta;
    const float log_other = c.falls ? mixture.log_rest : mixture.log_beta;
    const bool around_hi = kappa <= 0.5f;
    const float y = other * c.complement / c.w, rho = kappa * c.w / other;
    const bool near_lo = y < 1.0f;
    const float z = around_hi ? -kappa * c.complement : near_lo ? y : fminf(rho, 1.0f), f = phi_of(z);
    const float m = fmaf(kappa, c.w, other);
    const float value = around_hi ? fmaf(kappa, c.b, -f)
                        : near_lo ? fmaf(other, a, -(c.w * f))
                                  : -m * log_other - other * (f + rho) - kappa * c.w * u;
    const float base = around_hi ? 0.0f : near_lo ? -u : log_other;
    return {value, -(base + (f + z) / (1.0f + z) + risen)};
}
template <int kForm>
CEPO_DEVICE bool is_clipped(const Column& c, const Share& s, float clip) {
    if (kForm == kForwardKl) return (c.falls ? 0.0f : c.lost ? INFINITY : c.hi * c.u) > clip;
    if (kForm == kReverseKl) return (c.falls ? c.lost ? INFINITY : c.hi * c.u : 0.0f) > clip;
    return c.hi * s.value > clip;
}

template <int kForm>
CEPO_DEVICE float slope_of(const Column& c, const Mixture& mixture, float clip, float level_of_q) {
    const Share s = share_of<kForm>(c, mixture);
    const bool over = is_clipped<kForm>(c, s, clip);
    const float q = c.hi * (c.falls ? 1.0f : c.w);
    if (kForm == kForwardKl) return (over ? q : c.hi * (c.falls ? c.complement : -c.complement)) - q * level_of_q;
    if (kForm == kReverseKl) return q * ((over ? -1.0f : c.falls ? c.u : -c.u) - level_of_q);
    return mixture.rest * (q * ((over ? 0.0f : s.log_share) - level_of_q));
}

}  // namespace cuda
}  // namespace cepo
