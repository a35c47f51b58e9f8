// The cluster kernel of the fused loss.
#include "cluster.cuh"
#include "launch.h"

namespace cepo {
namespace cuda {

namespace {

constexpr int64_t kReserved = 1024;  // bytes of shared memory that each block takes besides its own

int64_t bytes_of(const Logits& logits) { return logits.dtype == Dtype::kFloat32 ? 4 : 2; }

int64_t shared_bytes(const PolicyLoss& call, int blocks) {
    constexpr int64_t kChunk = kLanes * 16;
    const int64_t row = call.forward.vocabulary * bytes_of(call.forward.policy);
    return kShareAt + (row + kChunk - 1) / kChunk * kChunk / blocks;
}

// Bulk loads take 16 bytes at a time, from the start of every row. Without a gradient nothing is read twice anyway.
bool has_shape(const PolicyLoss& call) {
    const Logits& policy = call.forward.policy;
    const int64_t size = bytes_of(policy);
    const auto whole = [](int64_t bytes) { return bytes % 16 == 0; };
    return call.gradient.data && whole(static_cast<int64_t>(reinterpret_cast<uintptr_t>(policy.data))) &&
           whole(call.forward.vocabulary * size) && whole(policy.outer_stride * size) &&
           whole(policy.inner_stride * size);
}

}  // namespace

bool cluster_takes(const PolicyLoss& call, int64_t rows, int blocks, int64_t shared_limit) {
    return (blocks == 2 || blocks == 4 || blocks == 8) && rows < (int64_t{1} << 28) && has_shape(call) &&
           shared_bytes(call, blocks) <= shared_limit;
}

// As few blocks as leave room for a second cluster beside this one, so that one loads while the other computes.
int best_cluster(const PolicyLoss& call, int64_t rows, int64_t shared_limit) {
    for (const int64_t limit : {(shared_limit - kReserved) / 2, shared_limit}) {
        for (const int blocks : {2, 4, 8})
            if (cluster_takes(call, rows, blocks, shared_limit) && shared_bytes(call, blocks) <= limit) return blocks;
    }
    return 0;
}

cudaError_t cluster_policy_loss(const PolicyLoss& call, int64_t rows, const double* values, int blocks,
                                cudaStream_t stream) {
    const bool entropy = call.forward.entropy != nullptr || call.entropy_coef != 0.0;
    const bool capped = call.forward.options.softcap > 0.0;
    const auto kernel = entropy ? (capped ? cluster_rows<true, true> : cluster_rows<true, false>)
                                : (capped ? cluster_rows<false, true> : cluster_rows<false, false>);
    return device::launch(kernel, static_cast<unsigned>(rows * blocks), static_cast<unsigned>(kLanes / blocks),
                          static_cast<unsigned>(blocks), static_cast<size_t>(shared_bytes(call, blocks)), stream, call,
                          Values{values});
}

}  // namespace cuda
}  // namespace cepo
