// The streaming kernel of the divergences.
#include "divergence.cuh"
#include "launch.h"

namespace cepo {
namespace cuda {

namespace {
template <bool kCapped>
auto kernel_of(const Divergence& call) {
    if (call.kind == static_cast<int>(Kind::kForward)) return stream_divergence<kForwardKl, kCapped>;
    if (call.kind == static_cast<int>(Kind::kReverse)) return stream_divergence<kReverseKl, kCapped>;
    return call.beta == 0.5 ? stream_divergence<kEvenJsd, kCapped> : stream_divergence<kJsd, kCapped>;
}
}  // namespace

cudaError_t divergence(const Divergence& call, int64_t rows, const float* thresholds, const int* equals,
                       const double* values, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (!takes(rows, call.vocabulary)) return cudaErrorInvalidValue;
    const auto kernel = call.options.softcap > 0.0 ? kernel_of<true>(call) : kernel_of<false>(call);
    return device::launch(kernel, static_cast<unsigned>(rows), kPairThreads, 1, sizeof(PairState), stream, call,
                          thresholds, equals, Values{values});
}

}  // namespace cuda
}  // namespace cepo
