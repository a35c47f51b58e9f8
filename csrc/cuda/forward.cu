// The streaming kernels of the forward and of the backward.
#include "launch.h"
#include "streaming.cuh"

namespace cepo {
namespace cuda {

cudaError_t forward(const Forward& call, int64_t rows, const double* values, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (!takes(rows, call.vocabulary)) return cudaErrorInvalidValue;
    const bool entropy = call.entropy != nullptr, capped = call.options.softcap > 0.0;
    const auto kernel = entropy ? (capped ? stream_rows<false, true, true> : stream_rows<false, true, false>)
                                : (capped ? stream_rows<false, false, true> : stream_rows<false, false, false>);
    PolicyLoss whole;
    whole.forward = call;
    return device::launch(kernel, static_cast<unsigned>(rows), kStreamThreads, 1, sizeof(RowState), stream, whole,
                          Values{values});
}

cudaError_t backward(const Backward& call, int64_t rows, const double* values, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (!takes(rows, call.vocabulary)) return cudaErrorInvalidValue;
    const auto kernel = call.options.softcap > 0.0 ? stream_backward<true> : stream_backward<false>;
    return device::launch(kernel, static_cast<unsigned>(rows), kStreamThreads, 1, sizeof(RowState), stream, call,
                          Values{values});
}

}  // namespace cuda
}  // namespace cepo
