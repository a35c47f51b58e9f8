// CUDA C++ and csrc/cuda/device.h on a CPU: kernels compiled by a C++ compiler with -DCEPO_EMULATE run thread by
// thread, and what they get wrong is a report instead of luck. For x86-64 Linux, best with
// -fsanitize=address,undefined.
//
// Shared memory starts as 0xff bytes and is gone when its block has returned. A bulk load lands at the first wait that
// observes its phase, and its destination is out of bounds until then; a bulk store reads its source at
// `bulk_stores_read`, and its destination is out of bounds until the kernel ends. A bulk store may take bytes that have
// not changed since any thread of the block last called `before_bulk_store`: where one thread's fence covers for
// another's, another order shows it. What is wrong comes out of `launch` as a std::runtime_error, or ends the process
// where AddressSanitizer finds it. Stricter than the hardware: a barrier needs every thread of the block, at one line
// of the source, and a shuffle every lane of its mask.
//
// Not emulated: races within a stretch without a barrier that come out right in every order, generic writes that no
// fence separates from a later bulk load, and `__shared__` variables, which kernels do without.
#pragma once

#include <float.h>
#include <math.h>

#include <algorithm>

#include "cuda_emulator_machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))  // after the standard library, whose attributes name it
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}

// Where the kernel's source calls: a wrapper's last parameters.
#define CEPO_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cepo {
namespace emulator {

inline Machine& machine() {
    if (Machine::current == nullptr) throw std::runtime_error("called outside a kernel");
    return *Machine::current;
}

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Waits until every lane of the mask is here; returns what each of them brought.
inline const uint64_t* exchange(uint32_t mask, uint64_t value, Site site) {
    Machine& m = machine();
    Fiber& fiber = *m.self;
    std::vector<Lane>& lanes = fiber.block->warps[fiber.thread / 32];
    unsigned mine = fiber.thread % 32;
    if ((mask >> mine & 1) == 0) m.fail(site.text() + ": lane " + std::to_string(mine) + " is not in its own mask");
    if ((uint64_t{mask} >> lanes.size()) != 0) m.fail(site.text() + ": the mask names lanes that the warp lacks");
    lanes[mine].operation = site.what;
    lanes[mine].mask = mask;
    lanes[mine].value = value;
    bool complete = true;
    for (unsigned i = 0; i < lanes.size(); i++) {
        if ((mask >> i & 1) == 0) continue;
        if (lanes[i].operation == nullptr) {
            complete = false;
        } else if (lanes[i].mask != mask || strcmp(lanes[i].operation, site.what) != 0) {
            m.fail(site.text() + ": lane " + std::to_string(i) + " is in another " + lanes[i].operation);
        }
    }
    if (!complete) {
        m.wait_for(&lanes[mine], site);
        return lanes[mine].others;
    }
    for (unsigned i = 0; i < lanes.size(); i++) {
        if ((mask >> i & 1) == 0) continue;
        for (unsigned j = 0; j < lanes.size(); j++) lanes[i].others[j] = lanes[j].value;
        lanes[i].operation = nullptr;
        m.wake(size_t{fiber.block->rank} * m.threads + fiber.thread - mine + i);
    }
    m.yield();
    return lanes[mine].others;
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned from, Site site) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    const uint64_t* all = exchange(mask, word, site);
    if ((mask >> from & 1) == 0) machine().fail(site.text() + ": reads a lane that is not in the mask");
    memcpy(&value, &all[from], sizeof(T));
    return value;
}

inline unsigned lane() { return machine().self->thread % 32; }

inline void block_barrier(Site site) {
    Machine& m = machine();
    Block& block = *m.self->block;
    if (block.arrived == 0) block.barrier = site;
    if (!(block.barrier == site)) m.fail(site.text() + ": others of the block are in " + block.barrier.text());
    if (++block.arrived < m.threads) return m.wait_for(&block, site);
    block.arrived = 0;
    m.wake(&block);
    m.yield();
}

// Global memory: whether it is there is AddressSanitizer's to say.
inline void access(const void* p, size_t bytes, size_t alignment, uint64_t Counters::* counter) {
    Machine& m = machine();
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
        m.fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
    }
    if (m.block_of(p, 1) != nullptr) m.fail("an access to global memory reaches shared memory");
    count(p, bytes, counter);
    if (options.yield_on_access) m.yield();
}

inline void check_bulk(const char* what, const void* shared, const void* global, uint32_t bytes) {
    Machine& m = machine();
    std::string name = what;
    auto ends = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
    if (ends % 16 != 0 || bytes % 16 != 0) m.fail(name + ": an end or the size is not a multiple of 16 bytes");
    if (m.block_of(shared, bytes) != m.self->block) m.fail(name + ": not within the block's shared memory");
    if (m.block_of(global, 1) != nullptr) m.fail(name + ": the other end is shared memory, too");
    if (!allowed(global, bytes)) m.fail(name + ": global memory out of bounds, or still to be written by a bulk_store");
}

}  // namespace emulator

}  // namespace cepo

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int with, CEPO_HERE) {
    return cepo::emulator::shuffle(mask, value, (cepo::emulator::lane() ^ with) & 31, {"__shfl_xor_sync", file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, CEPO_HERE) {
    unsigned lane = cepo::emulator::lane();
    return cepo::emulator::shuffle(mask, value, lane + by < 32 ? lane + by : lane, {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, CEPO_HERE) {
    unsigned lane = cepo::emulator::lane();
    return cepo::emulator::shuffle(mask, value, lane >= by ? lane - by : lane, {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, CEPO_HERE) {
    return cepo::emulator::shuffle(mask, value, from & 31, {"__shfl_sync", file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, CEPO_HERE) {
    const uint64_t* all = cepo::emulator::exchange(mask, predicate != 0, {"__ballot_sync", file, line});
    uint32_t votes = 0;
    for (unsigned i = 0; i < 32; i++) votes |= (mask >> i & 1) != 0 && all[i] != 0 ? 1u << i : 0;
    return votes;
}
inline int __any_sync(uint32_t mask, int predicate, CEPO_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, CEPO_HERE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, CEPO_HERE) {
    cepo::emulator::exchange(mask, 0, {"__syncwarp", file, line});
}
inline void __syncthreads(CEPO_HERE) { cepo::emulator::block_barrier({"__syncthreads", file, line}); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __uint_as_float(unsigned x) { return cepo::emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cepo::emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cepo::emulator::bits<float>(x); }
inline int __float_as_int(float x) { return cepo::emulator::bits<int>(x); }
inline double __longlong_as_double(long long x) { return cepo::emulator::bits<double>(x); }
inline long long __double_as_longlong(double x) { return cepo::emulator::bits<long long>(x); }

namespace cepo {
namespace device {

constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
T shuffle_xor(T value, int mask, CEPO_HERE) {
    return emulator::shuffle(kFullWarp, value, (emulator::lane() ^ mask) & 31, {"shuffle_xor", file, line});
}
inline void block_barrier(CEPO_HERE) { emulator::block_barrier({"block_barrier", file, line}); }

inline float fast_exp2(float x) {
    float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
}

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline uint4 load16(const void* p) {
    emulator::access(p, 16, 16, &emulator::Counters::read);
    return *static_cast<const uint4*>(p);
}
// A unit of which a byte is there may be read whole, as on the hardware; the bytes that are not there are 0xff.
inline uint4 load16_once(const void* p) {
    const auto* from = static_cast<const unsigned char*>(p);
    if (emulator::allowed(p, 16)) return load16(p);
    unsigned char bytes[16];
    bool any = false;
    for (int i = 0; i < 16; i++) {
        const bool there = emulator::allowed(from + i, 1);
        bytes[i] = there ? from[i] : 0xff;
        any = any || there;
    }
    if (!any) return load16(p);  // which reports it
    emulator::access(p, 16, 16, &emulator::Counters::read);
    uint4 unit;
    memcpy(&unit, bytes, 16);
    return unit;
}
inline void store16(void* p, uint4 v) {
    emulator::access(p, 16, 16, &emulator::Counters::written);
    *static_cast<uint4*>(p) = v;
}
template <class T>
T load(const T* p) {
    emulator::access(p, sizeof(T), alignof(T), &emulator::Counters::read);
    return *p;
}
template <class T>
void store(T* p, T value) {
    emulator::access(p, sizeof(T), alignof(T), &emulator::Counters::written);
    *p = value;
}

inline unsigned char* dynamic_shared() { return emulator::machine().self->block->shared; }

inline uint32_t cluster_rank() { return emulator::machine().self->block->rank; }
inline uint32_t cluster_size() { return emulator::machine().cluster; }
inline void cluster_arrive(CEPO_HERE) {
    emulator::Machine& m = emulator::machine();
    emulator::Site site = {"cluster_arrive", file, line};
    emulator::Fiber& fiber = *m.self;
    if (fiber.at_cluster_barrier) m.fail(site.text() + ": arrives again without a cluster_wait");
    fiber.at_cluster_barrier = true;
    fiber.cluster_phase = m.cluster_phase;
    if (++m.cluster_arrived == m.threads * m.cluster) {
        m.cluster_arrived = 0;
        m.cluster_phase++;
        m.wake(&m);
    }
    m.yield();
}
inline void cluster_wait(CEPO_HERE) {
    emulator::Machine& m = emulator::machine();
    emulator::Site site = {"cluster_wait", file, line};
    emulator::Fiber& fiber = *m.self;
    if (!fiber.at_cluster_barrier) m.fail(site.text() + ": waits without a cluster_arrive");
    if (fiber.cluster_phase == m.cluster_phase) m.wait_for(&m, site);
    fiber.at_cluster_barrier = false;
}
template <class T>
T* of_block(T* mine, uint32_t rank) {
    emulator::Machine& m = emulator::machine();
    emulator::Block& block = *m.self->block;
    if (rank >= m.cluster) m.fail("of_block: no such block in the cluster");
    if (m.block_of(mine, sizeof(T)) != &block) m.fail("of_block: not within the block's own shared memory");
    if (m.blocks[rank].running == 0) m.fail("of_block: block " + std::to_string(rank) + " has returned");
    return reinterpret_cast<T*>(m.blocks[rank].shared + (reinterpret_cast<const unsigned char*>(mine) - block.shared));
}

struct BulkBarrier {
    uint64_t state;
};

}  // namespace device

namespace emulator {

constexpr uint32_t kBarrier = 0x6d626172;  // in the upper half of an initialised barrier; the lower half is its number

inline Phases& phases(const device::BulkBarrier* barrier, const char* what) {
    Machine& m = machine();
    if (m.block_of(barrier, sizeof(*barrier)) != m.self->block) {
        m.fail(std::string(what) + ": the barrier is not in the block's shared memory");
    }
    auto index = static_cast<uint32_t>(barrier->state);
    if (barrier->state >> 32 != kBarrier || index >= m.barriers.size()) {
        m.fail(std::string(what) + ": the barrier is not initialised");
    }
    return m.barriers[index];
}

inline void check_count(Phases& barrier, const char* what) {
    Machine& m = machine();
    if (barrier.announced && barrier.issued > barrier.expected) {
        m.fail(std::string(what) + ": more bytes are loaded than announced");
    }
    m.wake(&barrier);
    m.yield();
}

inline void land(Phases& barrier) {
    Machine& m = machine();
    for (const Load& load : barrier.loads) {
        if (!allowed(load.from, load.bytes)) m.fail("a bulk_store overtook a bulk_load from the same place");
        allow(load.to, load.bytes);
        memcpy(load.to, load.from, load.bytes);
        memcpy(&barrier.block->fenced[load.to - barrier.block->shared], load.from, load.bytes);
    }
    barrier.loads.clear();
    barrier.completed++;
    barrier.announced = false;
    barrier.expected = barrier.issued = 0;
}

}  // namespace emulator

namespace device {

inline void init(BulkBarrier* barrier) {
    emulator::Machine& m = emulator::machine();
    if (m.block_of(barrier, sizeof(*barrier)) != m.self->block || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
        m.fail("init: the barrier is not aligned in the block's shared memory");
    }
    barrier->state = uint64_t{emulator::kBarrier} << 32 | m.barriers.size();
    m.barriers.emplace_back().block = m.self->block;
}
inline void announce(BulkBarrier* barrier, uint32_t bytes) {
    emulator::Phases& phases = emulator::phases(barrier, "announce");
    if (phases.announced) emulator::machine().fail("announce: twice, and nobody has waited for the first");
    phases.announced = true;
    phases.expected = bytes;
    emulator::check_count(phases, "announce");
}
inline void wait(BulkBarrier* barrier, uint32_t parity, CEPO_HERE) {
    emulator::Machine& m = emulator::machine();
    m.yield();
    emulator::Phases& phases = emulator::phases(barrier, "wait");
    if (parity > 1) m.fail("wait: a parity is 0 or 1");
    while (phases.completed % 2 == parity) {
        if (phases.announced && phases.issued == phases.expected) {
            emulator::land(phases);
            m.wake(&phases);
        } else {
            m.wait_for(&phases, {"wait", file, line});
        }
    }
}

inline void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, BulkBarrier* barrier) {
    emulator::Machine& m = emulator::machine();
    emulator::check_bulk("bulk_load", to_shared, from_global, bytes);
    emulator::Phases& phases = emulator::phases(barrier, "bulk_load");
    auto* to = static_cast<unsigned char*>(to_shared);
    for (const emulator::Phases& other : m.barriers) {
        for (const emulator::Load& load : other.loads) {
            if (to < load.to + load.bytes && load.to < to + bytes) {
                m.fail("bulk_load: another load is on its way to the same place");
            }
        }
    }
    memset(to, 0xff, bytes);
    emulator::forbid(to, bytes);
    phases.loads.push_back({to, static_cast<const unsigned char*>(from_global), bytes});
    phases.issued += bytes;
    emulator::count(from_global, bytes, &emulator::Counters::read);
    emulator::check_count(phases, "bulk_load");
}
inline void before_bulk_store() {
    emulator::Machine& m = emulator::machine();
    emulator::Block& block = *m.self->block;
    void* to = block.fenced.data();
    const void* from = block.shared;
    size_t bytes = m.shared_bytes;
    // Not memcpy, which AddressSanitizer watches: loads on their way may keep some of this out of bounds.
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
    m.yield();
}
inline void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
    emulator::Machine& m = emulator::machine();
    emulator::check_bulk("bulk_store", from_shared, to_global, bytes);
    const auto* from = static_cast<const unsigned char*>(from_shared);
    if (!emulator::allowed(from, bytes)) m.fail("bulk_store: the source is still to be loaded");
    if (memcmp(from, &m.self->block->fenced[from - m.self->block->shared], bytes) != 0) {
        m.fail("bulk_store: the source was written without before_bulk_store");
    }
    m.self->stores.push_back({static_cast<unsigned char*>(to_global), from, {from, from + bytes}});
    m.forbid_until_the_end(to_global, bytes);
    emulator::count(to_global, bytes, &emulator::Counters::written);
    m.yield();
}
template <int kPending>
void bulk_stores_read() {
    emulator::Machine& m = emulator::machine();
    m.yield();
    for (auto& stores = m.self->stores; stores.size() > kPending; stores.pop_front()) {
        emulator::Store& store = stores.front();
        size_t bytes = store.bytes.size();
        if (!emulator::allowed(store.from, bytes) || memcmp(store.from, store.bytes.data(), bytes) != 0) {
            m.fail("the source of a bulk_store was overwritten before bulk_stores_read");
        }
        emulator::allow(store.to, bytes);
        memcpy(store.to, store.from, bytes);
        emulator::forbid(store.to, bytes);
    }
}

// Runs the kernel to its end; throws what it did wrong.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,
                   cudaStream_t, A... args) {
    if (grid == 0 || block == 0 || block > 1024 || cluster == 0 || cluster > 16 || grid % cluster != 0) {
        return cudaErrorInvalidConfiguration;
    }
    if (shared_bytes > 227 * 1024) return cudaErrorInvalidValue;
    emulator::Machine machine(grid, block, cluster, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
    machine.run();
    return cudaSuccess;
}

}  // namespace device
}  // namespace cepo
