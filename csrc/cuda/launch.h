// Queues a call's kernels on a stream: no allocation, no synchronisation, so a CUDA graph can record them. No Python.
#pragma once

#include "../api.h"
#include "device.h"

namespace cepo {
namespace cuda {

// Which kernel a fused loss takes: besides these, a cluster of exactly that many blocks.
constexpr int kAuto = -1, kStreaming = 0, kCluster = 1;

// `values`, where not null, points to numbers on the device that stand for the call's own: scale, softcap,
// temperature, lam, eps_w, clip_low, clip_high, kl_coef, entropy_coef, denominator. The call's softcap and entropy_coef
// then only say, by not being 0, that there is one. A label that is neither ignored nor a column makes its row NaN.
cudaError_t forward(const Forward& call, int64_t rows, const double* values, cudaStream_t stream);
cudaError_t backward(const Backward& call, int64_t rows, const double* values, cudaStream_t stream);
// `shared_limit`: the bytes of shared memory that a block of the device may ask for (sharedMemPerBlockOptin), 0 below
// compute capability 9.0, which has no clusters. A cluster where `cluster_takes` says no is refused with
// cudaErrorInvalidValue.
cudaError_t policy_loss(const PolicyLoss& call, int64_t rows, const double* values, int kernel, int64_t shared_limit,
                        cudaStream_t stream);

// Whether a cluster's blocks can hold the policy's row between them, and how many of them are best, 0 where none can.
bool cluster_takes(const PolicyLoss& call, int64_t rows, int blocks, int64_t shared_limit);
int best_cluster(const PolicyLoss& call, int64_t rows, int64_t shared_limit);
cudaError_t cluster_policy_loss(const PolicyLoss& call, int64_t rows, const double* values, int blocks,
                                cudaStream_t stream);

// With a top_k, `thresholds` has each row's top_k-th largest student logit, and `equals` how many of those that equal
// it are among the top_k; else null. The call's own top_k says nothing.
cudaError_t divergence(const Divergence& call, int64_t rows, const float* thresholds, const int* equals,
                       const double* values, cudaStream_t stream);

// `size` values, 16-byte aligned, times `factor` on the device.
cudaError_t rescale(void* data, Dtype dtype, int64_t size, const float* factor, cudaStream_t stream);

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
