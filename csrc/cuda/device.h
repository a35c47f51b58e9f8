// What the kernels ask of the hardware beyond plain CUDA C++, each wrapper one instruction or two.
//
// tests/cuda_emulator.h gives the same names a meaning on a CPU, where the kernels are tested thread by thread.
#pragma once

#ifdef CEPO_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#include <stdint.h>

namespace cepo {
namespace device {

constexpr uint32_t kFullWarp = 0xffffffffu;

// All 32 lanes take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kFullWarp, value, mask);
}
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// 2^x within 2 units in the last place, subnormal results flushed to 0; 2^-inf is 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from and to global memory, 16-byte aligned; read or written once, so they pass the L1 by.
__device__ __forceinline__ uint4 load16_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

// threadIdx.x, read anew: a kernel of many phases would otherwise keep it, and what follows from it, in registers.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// One element from or to global memory.
template <class T>
__device__ __forceinline__ T load(const T* p) {
    return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
    *p = value;
}

// The block's dynamic shared memory, 128-byte aligned; kernels keep nothing in shared memory but there.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char cepo_dynamic_shared[];
    return cepo_dynamic_shared;
}

// Queues a kernel of one-dimensional blocks in clusters of `cluster` blocks, of which `grid` is a multiple. Above 1,
// the kernel itself must say nothing of its cluster.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
    const void* entry = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024) {
        error =
            cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess && cluster > 8) {
        error = cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(grid);
        config.blockDim = dim3(block);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = cluster > 1 ? 1 : 0;
        error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    }
    if (error != cudaSuccess) cudaGetLastError();  // reported here, so that nobody later finds it
    return error;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The blocks of a cluster. A barrier orders shared memory accesses of every block, near and far.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Where block `rank` of the cluster keeps what this block keeps at `mine`; ordinary loads and stores reach it.
template <class T>
__device__ __forceinline__ T* of_block(T* mine, uint32_t rank) {
    T* theirs;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
}

// A barrier in shared memory on which bulk loads report the bytes that have landed. Each phase ends when one thread has
// announced its bytes and all of them are there; `parity` of the first phase is 0, and alternates.
struct BulkBarrier {
    uint64_t state;
};
// By one thread, followed by a block or cluster barrier before anyone else touches it.
__device__ __forceinline__ void init(BulkBarrier* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void announce(BulkBarrier* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void wait(BulkBarrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Bulk copies, by one thread: both ends 16-byte aligned, bytes a multiple of 16. A load is there once a wait on its
// barrier has returned. A store reads its source until `bulk_stores_read` has returned, and what other threads wrote
// there must be fenced by each of them (`before_bulk_store`), then ordered by a block barrier.
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, uint32_t bytes,
                                          BulkBarrier* barrier) {
    uint64_t once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(to_shared)),
        "l"(from_global), "r"(bytes), "r"(shared_address(barrier)), "l"(once)
        : "memory");
}
__device__ __forceinline__ void before_bulk_store() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to_global),
                 "r"(shared_address(from_shared)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// The sources of all but the latest kPending stores may be overwritten.
template <int kPending>
__device__ __forceinline__ void bulk_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace device
}  // namespace cepo
#endif
