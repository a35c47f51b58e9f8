// A saved gradient times what came from above, known on the device alone; at 1 nothing is read.
#include "launch.h"
#include "types.cuh"

namespace cepo {
namespace cuda {

constexpr int kRescaleThreads = 512;

template <class T>
__global__ void __launch_bounds__(kRescaleThreads) rescale_pieces(T* data, int64_t size, const float* factor) {
    const float scale = device::load(factor);
    if (scale == 1.0f) return;
    constexpr int kColumns = kPieceColumns<T>;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRescaleThreads + device::thread_index()) * kColumns;
    if (first + kColumns <= size) {
        float values[kColumns];
        unpack(device::load16(data + first), values, T{});
#pragma unroll
        for (int i = 0; i < kColumns; ++i) values[i] *= scale;
        device::store16(data + first, pack(values, T{}));
        return;
    }
    for (int64_t i = first; i < size; ++i) {
        T value;
        narrow(widened(device::load(data + i)) * scale, value);
        device::store(data + i, value);
    }
}

namespace {
template <class T>
cudaError_t launch_rescale(void* data, int64_t size, const float* factor, cudaStream_t stream) {
    const int64_t per_block = kRescaleThreads * kPieceColumns<T>;
    const auto blocks = static_cast<unsigned>((size + per_block - 1) / per_block);
    return device::launch(rescale_pieces<T>, blocks, kRescaleThreads, 1, 0, stream, static_cast<T*>(data), size,
                          factor);
}
}  // namespace

cudaError_t rescale(void* data, Dtype dtype, int64_t size, const float* factor, cudaStream_t stream) {
    if (size == 0) return cudaSuccess;
    if (dtype == Dtype::kFloat32) return launch_rescale<float>(data, size, factor, stream);
    if (dtype == Dtype::kBFloat16) return launch_rescale<BFloat16>(data, size, factor, stream);
    return launch_rescale<Half>(data, size, factor, stream);
}

}  // namespace cuda
}  // namespace cepo
