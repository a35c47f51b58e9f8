// Nothing but memory traffic: what the row kernels' speed is measured against.
#include "launch.h"
#include "types.cuh"

namespace cepo {
namespace cuda {

constexpr int kThreads = 512, kUnroll = 4;

// A block takes kThreads * kUnroll units of 16 bytes.
__global__ void __launch_bounds__(kThreads) read_units(const unsigned char* data, int64_t units, float* out) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
    uint4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (first + i * kThreads < units) v[i] = device::load16_once(data + (first + i * kThreads) * 16);
    }
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) all ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    if (all == 0x7fc0dead) device::store(out, 1.0f);  // hardly ever: the loads have to happen, the store has not
}

__global__ void __launch_bounds__(kThreads) stream_units(const unsigned char* a, const unsigned char* b,
                                                         const unsigned char* c, unsigned char* out, int64_t units) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * 2 + threadIdx.x;
    uint4 v[2][3];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = (first + i * kThreads) * 16;
        if (first + i * kThreads >= units) continue;
        v[i][0] = device::load16_once(a + at), v[i][1] = device::load16_once(b + at);
        v[i][2] = device::load16_once(c + at);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (first + i * kThreads >= units) continue;
        const uint4 x = v[i][0], y = v[i][1], z = v[i][2];
        device::store16(out + (first + i * kThreads) * 16,
                        make_uint4(x.x ^ y.x ^ z.x, x.y ^ y.y ^ z.y, x.z ^ y.z ^ z.z, x.w ^ y.w ^ z.w));
    }
}

namespace {
unsigned blocks_for(int64_t units, int64_t per_block) {
    return static_cast<unsigned>((units + per_block - 1) / per_block);
}
}  // namespace

cudaError_t plain_read(const void* data, int64_t bytes, float* out, cudaStream_t stream) {
    const int64_t units = bytes / 16;
    if (units == 0) return cudaSuccess;
    return device::launch(read_units, blocks_for(units, kThreads * kUnroll), kThreads, 1, 0, stream,
                          static_cast<const unsigned char*>(data), units, out);
}

cudaError_t stream31(const void* a, const void* b, const void* c, void* out, int64_t bytes, cudaStream_t stream) {
    const int64_t units = bytes / 16;
    if (units == 0) return cudaSuccess;
    const auto at = [](const void* p) { return static_cast<const unsigned char*>(p); };
    return device::launch(stream_units, blocks_for(units, kThreads * 2), kThreads, 1, 0, stream, at(a), at(b), at(c),
                          static_cast<unsigned char*>(out), units);
}

}  // namespace cuda
}  // namespace cepo
