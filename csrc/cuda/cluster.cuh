// A cluster of blocks for a row of the fused loss, from compute capability 9.0 on: the policy's row is copied into the
// blocks' shared memory while the teachers are read, so every logit crosses the memory bus once.
//
// The blocks' threads together are the 1024 virtual lanes; block r has its share of every chunk of 1024 pieces.
#pragma once

#include "conclude.cuh"

namespace cepo {
namespace cuda {

constexpr int kMostClusterThreads = 512;  // two blocks to a row at least

// What the policy's share comes after.
struct ClusterState {
    RowState row;
    uint64_t arrived;  // a BulkBarrier, which older targets do not know
    int rank;          // of the block
};
constexpr int kShareAt = (sizeof(ClusterState) + 127) / 128 * 128;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Like GlobalRow, of a row that is a whole number of pieces.
template <class T>
struct SharedRow {
    const unsigned char* own;  // this thread's piece of the first chunk
    int chunk_bytes;           // of the block's share
    int first;
    int pieces;

    CEPO_DEVICE int groups() const { return (pieces + kGroup * kLanes - 1) / (kGroup * kLanes); }
    CEPO_DEVICE bool has(int group) const { return group * kGroup * kLanes < pieces; }
    CEPO_DEVICE int piece_index(int group, int) const { return group * kGroup * kLanes + first; }
    CEPO_DEVICE void load(Group& out, int group, int) const {
        const unsigned char* at = own + group * kGroup * chunk_bytes;
#pragma unroll
        for (int i = 0; i < kGroup; ++i, at += chunk_bytes) {
            out.pieces[i] = lowest_piece<T>();
            if (piece_index(group, 0) + i * kLanes < pieces) out.pieces[i] = *reinterpret_cast<const uint4*>(at);
        }
    }
    CEPO_DEVICE int present(int piece) const { return piece < pieces ? kPieceColumns<T> : 0; }
};

struct Cluster {
    int rank, warps;  // of this block; of a block

    CEPO_DEVICE bool writes() const { return rank == 0; }
    CEPO_DEVICE const RowState& owner(RowState& state, int warp) const {
        return *device::of_block(&state, static_cast<uint32_t>(warp / warps));
    }
    CEPO_DEVICE void meet() const {
        device::cluster_arrive();
        device::cluster_wait();
    }
};

template <class T, bool kEntropy, bool kCapped, class Row>
CEPO_DEVICE void scan_lane(const Row& row, RowState& state, int tensor) {
    LaneSum sums[1];
    scan<T, 1, kEntropy, kCapped>(row, 0, state.plan.label, state.transform, sums);
    put_warp_sum(sums[0], state, tensor, row.first / 32);
}

// f(SharedRow<T>) with the policy's T.
template <class F>
CEPO_DEVICE void with_share(const RowState& state, int vocabulary, int first, F f) {
    const unsigned char* const own = device::dynamic_shared() + kShareAt + device::thread_index() * 16;
    const int chunk_bytes = static_cast<int>(blockDim.x) * 16;
    const Dtype dtype = state.plan.dtype[kPolicy];
    if (dtype == Dtype::kFloat32) return f(SharedRow<float>{own, chunk_bytes, first, vocabulary / 4}, float{});
    if (dtype == Dtype::kBFloat16) return f(SharedRow<BFloat16>{own, chunk_bytes, first, vocabulary / 8}, BFloat16{});
    f(SharedRow<Half>{own, chunk_bytes, first, vocabulary / 8}, Half{});
}

// By one thread: the block's share of the policy's row, on its way.
CEPO_DEVICE void load_share(const unsigned char* row, int64_t row_bytes, int rank, device::BulkBarrier* arrived) {
    const int chunk_bytes = static_cast<int>(blockDim.x) * 16;
    unsigned char* const share = device::dynamic_shared() + kShareAt;
    const auto bytes_at = [&](int64_t at) {
        const int64_t left = row_bytes - at;
        return static_cast<uint32_t>(left < 0 ? 0 : left < chunk_bytes ? left : chunk_bytes);
    };
    const int64_t first = static_cast<int64_t>(rank) * chunk_bytes;
    uint32_t total = 0;
    for (int64_t at = first; at < row_bytes; at += kLanes * 16) total += bytes_at(at);
    device::init(arrived);
    device::announce(arrived, total);
    int chunk = 0;
    for (int64_t at = first; at < row_bytes; at += kLanes * 16, ++chunk)
        device::bulk_load(share + chunk * chunk_bytes, row + at, bytes_at(at), arrived);
}

template <bool kEntropy, bool kCapped>
CEPO_DEVICE void cluster_row(const PolicyLoss& l, const Values& values) {
    ClusterState& shared = *reinterpret_cast<ClusterState*>(device::dynamic_shared());
    RowState& state = shared.row;
    const auto arrived = reinterpret_cast<device::BulkBarrier*>(&shared.arrived);
    const Forward& f = l.forward;
    const int rank = static_cast<int>(device::cluster_rank()), thread = device::thread_index();
    const int threads = static_cast<int>(blockDim.x);
    const int lane = rank * threads + thread;
    const int vocabulary = static_cast<int>(f.vocabulary);
    const int64_t row = blockIdx.x / device::cluster_size();
    float label_x = 0.0f;
    if (!plan_row<true>(l, values, row, lane, kLanes, state, label_x)) return;
    if (thread == 32) {  // in another warp than the one that plans
        load_share(static_cast<const unsigned char*>(row_start(f.policy, f.inner, row)),
                   f.vocabulary * (f.policy.dtype == Dtype::kFloat32 ? 4 : 2), rank, arrived);
    }
    if (thread == 0) shared.rank = rank;
    device::block_barrier();
    if (thread < kTensors) state.label_x[thread] = label_x;
    const auto own_lane = [&] { return shared.rank * static_cast<int>(blockDim.x) + device::thread_index(); };
#pragma unroll 1
    for (int tensor = kNegative; tensor >= kPositive; --tensor) {
        const void* const& x = state.plan.x[tensor];
        if (!x) continue;
        const Dtype dtype = state.plan.dtype[tensor];
        if (dtype == Dtype::kFloat32) {
            scan_lane<float, false, kCapped>(GlobalRow<float>{x, own_lane(), vocabulary}, state, tensor);
        } else if (dtype == Dtype::kBFloat16) {
            scan_lane<BFloat16, false, kCapped>(GlobalRow<BFloat16>{x, own_lane(), vocabulary}, state, tensor);
        } else {
            scan_lane<Half, false, kCapped>(GlobalRow<Half>{x, own_lane(), vocabulary}, state, tensor);
        }
    }
    device::wait(arrived, 0);
    with_share(state, vocabulary, own_lane(), [&](const auto& share, auto type) {
        scan_lane<decltype(type), kEntropy, kCapped>(share, state, kPolicy);
    });
    const Cluster cluster{shared.rank, static_cast<int>(blockDim.x) / 32};
    cluster.meet();
    settle<true, kEntropy, kCapped>(l, values, state, cluster);
    device::cluster_arrive();  // this block has read what it wants from the others
    if (!write_plain<kCapped>(l.gradient, vocabulary, state, own_lane(), kLanes)) {
        const Factors factors = factors_of(state);
        with_share(state, vocabulary, own_lane(), [&](const auto& share, auto type) {
            write_gradient<decltype(type), 1, kCapped>(share, state.plan.gradient, 0, state.plan.label, factors);
        });
    }
    device::cluster_wait();
}

#endif

template <bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kMostClusterThreads, 2) cluster_rows(PolicyLoss l, Values values) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cluster_row<kEntropy, kCapped>(l, values);
#endif
}

}  // namespace cuda
}  // namespace cepo
