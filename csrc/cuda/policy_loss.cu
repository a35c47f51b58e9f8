// The streaming kernel of the fused loss, and the choice between it and the cluster kernel.
#include "launch.h"
#include "streaming.cuh"

namespace cepo {
namespace cuda {

cudaError_t policy_loss(const PolicyLoss& call, int64_t rows, const double* values, int kind, int64_t shared_limit,
                        cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (!takes(rows, call.forward.vocabulary)) return cudaErrorInvalidValue;
    const int blocks = shared_limit == 0 || kind == kStreaming         ? 0
                       : kind == kAuto || kind == kCluster             ? best_cluster(call, rows, shared_limit)
                       : cluster_takes(call, rows, kind, shared_limit) ? kind
                                                                       : 0;
    if (blocks > 0) return cluster_policy_loss(call, rows, values, blocks, stream);
    if (kind != kAuto && kind != kStreaming) return cudaErrorInvalidValue;
    const bool entropy = call.forward.entropy != nullptr || call.entropy_coef != 0.0;
    const bool capped = call.forward.options.softcap > 0.0;
    const auto kernel = entropy ? (capped ? stream_rows<true, true, true> : stream_rows<true, true, false>)
                                : (capped ? stream_rows<true, false, true> : stream_rows<true, false, false>);
    return device::launch(kernel, static_cast<unsigned>(rows), kStreamThreads, 1, sizeof(RowState), stream, call,
                          Values{values});
}

}  // namespace cuda
}  // namespace cepo
