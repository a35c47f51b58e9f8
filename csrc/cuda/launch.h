// Queues a call's kernels on a stream: no allocation, no synchronisation, so a CUDA graph can record them. No Python.
#pragma once

#include "../api.h"
#include "device.h"

namespace cepo {
namespace cuda {

enum class Kernel : int { kAuto = 0, kStreaming = 1, kCluster = 2 };

// `values`, where not null, points to numbers on the device that stand for the call's own: scale, softcap,
// temperature, lam, eps_w, clip_low, clip_high, kl_coef, entropy_coef, denominator. The call's softcap and entropy_coef
// then only say, by not being 0, that there is one. A label that is neither ignored nor a column makes its row NaN.
cudaError_t forward(const Forward& call, int64_t rows, const double* values, cudaStream_t stream);
cudaError_t backward(const Backward& call, int64_t rows, const double* values, cudaStream_t stream);
// Refuses kCluster (cudaErrorInvalidValue) where `cluster_fits` says no.
cudaError_t policy_loss(const PolicyLoss& call, int64_t rows, const double* values, Kernel kernel, bool has_clusters,
                        cudaStream_t stream);

// How many blocks a cluster would have for this call: 0 where the streaming kernel has to do it.
int cluster_fits(const PolicyLoss& call);
// The cluster kernel itself, with as many blocks.
cudaError_t cluster_policy_loss(const PolicyLoss& call, int64_t rows, const double* values, int blocks,
                                cudaStream_t stream);

// For benchmarks. Reads `bytes`, a multiple of 16, once; `out` gets one float that depends on all of them.
cudaError_t plain_read(const void* data, int64_t bytes, float* out, cudaStream_t stream);
// Reads three buffers of `bytes` and writes one, which may be one of the three.
cudaError_t stream31(const void* a, const void* b, const void* c, void* out, int64_t bytes, cudaStream_t stream);

// Sizes that the kernels' 32-bit columns and grids can take.
inline bool takes(int64_t rows, int64_t vocabulary) {
    return rows < (int64_t{1} << 29) && vocabulary > 0 && vocabulary < (int64_t{1} << 30);
}

}  // namespace cuda
}  // namespace cepo
