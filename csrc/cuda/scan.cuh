// How a block sums a row.
//
// A row is cut into pieces of 16 bytes; piece i belongs to virtual lane i % 1024, whatever the kernel, the number of
// threads and blocks, and the alignment, so a row's bits depend on its values, V and dtype alone. A lane takes its
// pieces in small groups, in float32 relative to a reference of its own: the group's maximum comes first, the
// reference is raised if that is too far above, then the terms are added. Lanes meet in float64, first the 32 of a
// virtual warp, then the 32 warps.
#pragma once

#include "types.cuh"

namespace cepo {
namespace cuda {

constexpr int kLanes = 1024;  // virtual lanes of a row
constexpr int kWarps = kLanes / 32;
constexpr int kGroup = 3;  // pieces: with four, two lanes a thread do not fit 64 registers

// 2^shift for a whole number shift <= 0; 0 where a float32 sum times it would be lost, or shift is -inf or NaN.
CEPO_DEVICE float power_of_two(float shift) {
    return shift >= -126.0f ? bits_float(static_cast<uint32_t>(static_cast<int>(shift) + 127) << 23) : 0.0f;
}
CEPO_DEVICE double power_of_two(double shift) {
    return shift >= -1000.0 ? __longlong_as_double(static_cast<long long>(static_cast<int>(shift) + 1023) << 52) : 0.0;
}

// tanh within 1.5e-7: an odd polynomial near 0, 1 - 2 / (e^2z + 1) elsewhere, where nothing cancels.
CEPO_DEVICE float tanh_of(float z) {
    const float size = fabsf(z), z2 = z * z;
    float near = fmaf(-0x1.82e064p-8f, z2, 0x1.54d64ap-6f);
    near = fmaf(near, z2, -0x1.b89d50p-5f);
    near = fmaf(near, z2, 0x1.1109d0p-3f);
    near = fmaf(near, z2, -0x1.55553ep-2f);
    near = fmaf(near * z2, size, size);
    const float e = device::fast_exp2(fminf(60.0f, size * static_cast<float>(2 * kLog2e)));
    const float value = size < 0.6f ? near : 1.0f - 2.0f / (e + 1.0f);
    return z != z ? z : copysignf(value, z);
}

// How a raw logit becomes an exponent: t = value k - c, value = x, or tanh(x inner) under a soft cap.
struct Transform {
    double chain;  // dx'/dx, but for the cap's 1 - tanh^2
    float k, inner;
};
// The soft cap must not hide a +inf.
template <bool kCapped>
CEPO_DEVICE float value_of(float x, float inner) {
    return kCapped && !(x > 0x1.fffffep127f) ? tanh_of(x * inner) : x;
}
template <bool kCapped>
CEPO_DEVICE double exact_value_of(float x, float inner) {
    return kCapped && x != INFINITY ? tanh(static_cast<double>(x) * inner) : static_cast<double>(x);
}

// A lane's sums relative to c. An empty lane has c = -kLargest, far below every column that float32 can take; a lane
// that saw a column too large for that, or +inf, has c = inf, which sends the row the slow way. NaN shows in s.
struct LaneSum {
    float s = 0.0f, u = 0.0f, c = -kLargest;

    template <bool kEntropy>
    CEPO_DEVICE void raise(float top, float k) {
        const float reference = top * k;
        if (reference - c > kHeadroom) {
            const float raised = reference > kLargest ? INFINITY : rintf(reference), shift = c - raised;
            const float factor = power_of_two(shift);
            if (kEntropy) u = factor * fmaf(shift, s, u);
            s *= factor;
            c = raised;
        }
    }
    template <bool kEntropy, int kColumns>
    CEPO_DEVICE void add(const float (&x)[kColumns], float k) {
        float e[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const float t = fmaf(x[i], k, -c);
            e[i] = device::fast_exp2(t);
            if (kEntropy) u = fmaf(fmaxf(t, kLowest), e[i], u);
        }
        float first = (e[0] + e[1]) + (e[2] + e[3]);
        if (kColumns == 8) first += (e[kColumns - 4] + e[kColumns - 3]) + (e[kColumns - 2] + e[kColumns - 1]);
        s += first;
    }
};

struct Group {
    uint4 pieces[kGroup];
};

template <int kColumns>
CEPO_DEVICE float top_of(const float (&x)[kColumns]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) top = fmaxf(top, x[i]);
    return top;
}

// A row in global memory, at any alignment of its elements. A row that does not start at 16
// bytes is put together from the two aligned units that a piece lies in, both of which hold some of its own bytes.
template <class T>
struct GlobalRow {
    const void* const& x;  // in shared memory, and read from there again and again: registers are what is scarce
    int first;             // this thread's first lane
    int vocabulary;

    CEPO_DEVICE int complete() const { return vocabulary / kPieceColumns<T>; }
    static constexpr int kColumns = kGroup * kLanes * kPieceColumns<T>;  // of a group of all lanes
    CEPO_DEVICE int groups() const { return (vocabulary + kColumns - 1) / kColumns; }
    CEPO_DEVICE bool has(int group) const { return group * kColumns < vocabulary; }
    CEPO_DEVICE int piece_index(int group, int lane_offset) const {
        return group * kGroup * kLanes + first + lane_offset;
    }
    // `at` is aligned, `shift` how many bytes the row starts after such a place.
    CEPO_DEVICE static uint4 unaligned(const unsigned char* at, int shift) {
        const uint4 low = device::load16_once(at), high = device::load16_once(at + 16);
        uint32_t w[7] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z}, last = high.w;
        if (shift & 8) w[0] = w[2], w[1] = w[3], w[2] = w[4], w[3] = w[5], w[4] = w[6], w[5] = last;
        if (shift & 4) w[0] = w[1], w[1] = w[2], w[2] = w[3], w[3] = w[4], w[4] = w[5];
        if (shift & 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
        }
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
    CEPO_DEVICE uint4 incomplete() const {
        uint4 piece = lowest_piece<T>();
        const T* const start = static_cast<const T*>(x);
#pragma unroll
        for (int i = 0; i + 1 < kPieceColumns<T>; ++i) {
            const int j = complete() * kPieceColumns<T> + i;
            if (j < vocabulary) piece = with_column<T>(piece, i, repeated(device::load(start + j)));
        }
        return piece;
    }
    CEPO_DEVICE void load(Group& out, int group, int lane_offset) const {
        const int piece = piece_index(group, lane_offset);
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(x) & 15);
        const unsigned char* const at = static_cast<const unsigned char*>(x) - shift + static_cast<int64_t>(piece) * 16;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) out.pieces[i] = lowest_piece<T>();
        if (shift == 0) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i)
                if (piece + i * kLanes < complete()) out.pieces[i] = device::load16_once(at + i * kLanes * 16);
        } else {
#pragma unroll
            for (int i = 0; i < kGroup; ++i)
                if (piece + i * kLanes < complete()) out.pieces[i] = unaligned(at + i * kLanes * 16, shift);
        }
        const int distance = complete() - piece;
        if (vocabulary % kPieceColumns<T> && static_cast<unsigned>(distance) < kGroup * kLanes &&
            distance % kLanes == 0) {
            const uint4 last = incomplete();
#pragma unroll
            for (int i = 0; i < kGroup; ++i)
                if (distance == i * kLanes) out.pieces[i] = last;
        }
    }
    // Columns of a piece that exist.
    CEPO_DEVICE int present(int piece) const {
        const int left = vocabulary - piece * kPieceColumns<T>;
        return left < 0 ? 0 : left < kPieceColumns<T> ? left : kPieceColumns<T>;
    }
};

// One group of one lane; `piece` is its first piece's index.
template <class T, bool kEntropy, bool kCapped, class Row>
CEPO_DEVICE void add_group(Group& g, const Row& row, int piece, const int& label, const Transform& transform,
                           LaneSum& sum) {
    constexpr int kColumns = kPieceColumns<T>;
    const int distance = label / kColumns - piece;  // from the group's first piece to the label's
    const bool has_label = static_cast<unsigned>(distance) < kGroup * kLanes && distance % kLanes == 0;
    float x[kColumns];
    if (kCapped) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int present = row.present(piece + i * kLanes);
            const int skipped = has_label && distance == i * kLanes ? label % kColumns : -1;
            unpack(g.pieces[i], x, T{});
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                x[j] = j < present && j != skipped ? value_of<true>(x[j], transform.inner) : -INFINITY;
            sum.raise<kEntropy>(top_of(x), transform.k);
            sum.add<kEntropy>(x, transform.k);
        }
        return;
    }
    if (has_label) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
            if (distance == i * kLanes) g.pieces[i] = with_column<T>(g.pieces[i], label % kColumns, lowest_word(T{}));
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        unpack(g.pieces[i], x, T{});
        top = fmaxf(top, top_of(x));
    }
    sum.raise<kEntropy>(top, transform.k);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        unpack(g.pieces[i], x, T{});
        sum.add<kEntropy>(x, transform.k);
    }
}

// A thread's lanes: `row.first`, and for kOwn = 2 the one `apart` later. The next group is on its way while one is
// added.
template <class T, int kOwn, bool kEntropy, bool kCapped, class Row>
CEPO_DEVICE void scan(const Row& row, int apart, const int& label, const Transform& transform, LaneSum (&sums)[kOwn]) {
    static_assert(kOwn == 1 || kOwn == 2);
    constexpr int kSecond = kOwn - 1;
    Group a, b;
    row.load(a, 0, 0);
#pragma unroll 1
    for (int group = 0; row.has(group); group += 2 / kOwn) {
        const int next = group + 2 / kOwn, between = kOwn == 2 ? group : group + 1;
        row.load(b, between, kSecond * apart);
        add_group<T, kEntropy, kCapped>(a, row, row.piece_index(group, 0), label, transform, sums[0]);
        row.load(a, next, 0);
        add_group<T, kEntropy, kCapped>(b, row, row.piece_index(between, kSecond * apart), label, transform,
                                        sums[kSecond]);
    }
}

// The sums of a virtual warp, or of 32 of them, in every lane: relative to the highest reference among them.
struct WarpSum {
    double s, u;
    float c;
};
CEPO_DEVICE WarpSum warp_sum(double s, double u, float c) {
    float top = c;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, device::shuffle_xor(top, mask));
    const double shift = static_cast<double>(c) - static_cast<double>(top), factor = power_of_two(shift);
    u = factor == 0.0 ? 0.0 : factor * (u + shift * s);
    s *= factor;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        s += device::shuffle_xor(s, mask);
        u += device::shuffle_xor(u, mask);
    }
    return {s, u, top};
}

}  // namespace cuda
}  // namespace cepo
