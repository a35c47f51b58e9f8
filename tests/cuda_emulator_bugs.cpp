// Small kernels that are right, and the same with one bug each: the emulator must pass the first and catch the second.
#include <stdio.h>

#include <map>

#include "device.h"

using namespace cepo::device;

namespace {

// One bug at a time, by name; kernels ask whether it is theirs.
std::string planted;
bool bug(const char* name) { return planted == name; }

__device__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += shuffle_xor(x, step);
    return x;
}

// Each block sums one row; every thread adds the warps' sums, and thread t writes the total to out[t] of its row.
__global__ void block_sum(const float* in, float* out, int columns) {
    float* partial = reinterpret_cast<float*>(dynamic_shared());
    const float* row = in + static_cast<size_t>(blockIdx.x) * columns;
    unsigned thread = threadIdx.x, warps = blockDim.x / 32;
    float sum = 0.0f;
    for (int i = thread; i < columns + bug("row overrun"); i += blockDim.x) sum += load(row + i);
    if (bug("lane outside the mask")) {
        sum += __shfl_xor_sync(0xffffu, sum, 8);
    } else if (bug("lane of the mask elsewhere")) {
        if (thread % 32 < 16) sum += __shfl_xor_sync(kFullWarp, sum, 8);
    } else if (bug("masks that differ")) {
        sum += __shfl_xor_sync(thread % 32 < 16 ? kFullWarp : 0xffff0000u, sum, 8);
    }
    if (bug("lane that has returned") && thread == 0) return;
    sum = warp_sum(sum);
    if (thread % 32 == 0) partial[thread / 32 + bug("shared memory overrun")] = sum;
    if (bug("barrier in one branch")) {
        if (thread < 32) block_barrier();
    } else if (bug("barriers in two branches")) {
        if (thread < 32) {
            block_barrier();
        } else {
            block_barrier();
        }
    } else if (!bug("no block barrier")) {
        block_barrier();
    }
    float total = 0.0f;
    for (unsigned warp = 0; warp < warps; warp++) total += partial[warp];
    store(out + blockIdx.x * blockDim.x + thread, total);
}

// Each cluster sums one row: a block its share, then every block the shares of all, read where they are kept.
__global__ void cluster_sum(const float* in, float* out, int columns) {
    float* share = reinterpret_cast<float*>(dynamic_shared());
    uint32_t rank = cluster_rank(), blocks = cluster_size();
    const float* row = in + static_cast<size_t>(blockIdx.x / blocks) * columns;
    float sum = 0.0f;
    for (int i = rank * 32 + threadIdx.x; i < columns; i += blocks * 32) sum += load(row + i);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) *share = sum;
    if (!bug("no cluster barrier before reading")) {
        cluster_arrive();
        cluster_wait();
    }
    float total = 0.0f;
    const float* theirs[16];
    for (uint32_t other = 0; other < blocks; other++) theirs[other] = of_block(share, other);
    for (uint32_t other = 0; other < blocks; other++) {
        __syncwarp();
        total += *theirs[other];
    }
    if (threadIdx.x == 0) store(out + blockIdx.x, total);
    if (!bug("no cluster barrier before the end")) {
        cluster_arrive();
        cluster_wait();
    }
}

constexpr int kChunk = 64;  // floats, one a thread
constexpr uint32_t kBytes = kChunk * sizeof(float);

// Each block sums one row of whole chunks, column by column modulo kChunk; two chunks are on their way at a time.
__global__ void bulk_load_sum(const float* in, float* out, int columns) {
    float* stages = reinterpret_cast<float*>(dynamic_shared());
    auto* barriers = reinterpret_cast<BulkBarrier*>(dynamic_shared() + 2 * kBytes);
    const float* row = in + static_cast<size_t>(blockIdx.x) * columns;
    int chunks = columns / kChunk;
    auto fetch = [&](int chunk) {
        if (!bug("no announcement")) {
            announce(&barriers[chunk % 2], kBytes - 16 * bug("too few bytes") + 16 * bug("too many bytes"));
        }
        int skip = bug("misaligned load") ? 1 : 0;
        bulk_load(stages + chunk % 2 * kChunk, row + chunk * kChunk + skip, kBytes, &barriers[chunk % 2]);
    };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 2; stage++) init(&barriers[stage]);
        for (int stage = 0; stage < 2; stage++) fetch(stage);
    }
    block_barrier();
    float sum = 0.0f;
    for (int chunk = 0; chunk < chunks; chunk++) {
        uint32_t parity = chunk / 2 % 2;
        if (bug("parity that never turns")) parity = 0;
        if (bug("parity of the phase after")) parity = chunk == 0 ? 0 : (chunk + 2) / 2 % 2;
        if (!bug("no wait")) wait(&barriers[chunk % 2], parity);
        sum += stages[chunk % 2 * kChunk + threadIdx.x];
        if (!bug("load into a buffer in use")) block_barrier();
        if (threadIdx.x == 0 && chunk + 2 < chunks) fetch(chunk + 2);
    }
    if (bug("wait once too often")) wait(&barriers[(chunks - 1) % 2], (chunks + 1) / 2 % 2);
    store(out + blockIdx.x * kChunk + threadIdx.x, sum);
}

// Each block doubles one row of whole chunks; a chunk is written while the one before it leaves.
__global__ void bulk_store_double(const float* in, float* out, int columns) {
    float* stages = reinterpret_cast<float*>(dynamic_shared());
    size_t start = static_cast<size_t>(blockIdx.x) * columns;
    for (int chunk = 0; chunk < columns / kChunk; chunk++) {
        float* stage = stages + chunk % 2 * kChunk;
        if (threadIdx.x == 0 && !bug("store's source overwritten")) bulk_stores_read<1>();
        block_barrier();
        stage[threadIdx.x] = 2.0f * load(in + start + chunk * kChunk + threadIdx.x);
        if (!bug("no fence") && !(bug("fence by one thread") && threadIdx.x != 0)) before_bulk_store();
        if (!bug("store before the block has written")) block_barrier();
        if (threadIdx.x == 0) {
            bulk_store(out + start + chunk * kChunk, stage, kBytes);
            if (bug("reads what it stored") && load(out + start + chunk * kChunk) < 0.0f) return;
        }
    }
    if (threadIdx.x == 0 && !bug("return before the store has read")) bulk_stores_read<0>();
}

// Thread 0 of each block sums one row but for its ends: it starts 4 bytes after a unit of 16, and ends 4 before one.
__global__ void unaligned_sum(const float* in, float* out, int columns) {
    if (threadIdx.x != 0) return;
    const float* row = in + static_cast<size_t>(blockIdx.x) * columns + 1;
    const float* const end = row + columns - 2;
    float sum = 0.0f;
    for (const float* unit = row - 1 - 4 * bug("unit before the row"); unit < end + 4 * bug("unit after the row");
         unit += 4) {
        const uint4 bits = bug("unit read strictly") ? load16(unit) : load16_once(unit);
        const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
        for (int i = 0; i < 4; i++)
            if (unit + i >= row && unit + i < end + bug("column outside the row")) sum += __uint_as_float(words[i]);
    }
    store(out + blockIdx.x, sum);
}

struct Kernel {
    void (*entry)(const float*, float*, int);
    unsigned block, cluster;
    size_t shared_bytes;
    unsigned outputs;  // a block
};

constexpr int kColumns = 6 * kChunk;
const std::map<std::string, Kernel> kKernels = {
    {"block_sum", {block_sum, 96, 1, 3 * sizeof(float), 96}},
    {"cluster_sum", {cluster_sum, 32, 4, sizeof(float), 1}},
    {"bulk_load_sum", {bulk_load_sum, kChunk, 1, 2 * kBytes + 2 * sizeof(BulkBarrier), kChunk}},
    {"unaligned_sum", {unaligned_sum, 32, 1, 0, 1}},
    {"bulk_store_double", {bulk_store_double, kChunk, 1, 2 * kBytes, kColumns}},
};

}  // namespace

// KERNEL BUG ORDER SEED: runs the kernel on two rows of i % 7, i = 0, 1, ..., and prints the bytes that it read and
// wrote, then its results; or what the emulator said.
int main(int, char** arguments) {
    using cepo::emulator::Order;
    Kernel kernel = kKernels.at(arguments[1]);
    planted = arguments[2];
    std::string order = arguments[3];
    auto& options = cepo::emulator::options;
    options.order = order == "reverse" ? Order::kReverse : order == "random" ? Order::kRandom : Order::kForward;
    options.seed = static_cast<unsigned>(atoi(arguments[4]));
    options.yield_on_access = order == "random";
    unsigned grid = 2 * kernel.cluster - bug("half a cluster");
    if (bug("1025 threads")) kernel.block = 1025;
    if (bug("too much shared memory")) kernel.shared_bytes = 228 * 1024;
    auto allocate = [](size_t floats) { return static_cast<float*>(malloc(floats * sizeof(float))); };
    float* in = allocate(2 * kColumns);
    float* out = allocate(grid * kernel.outputs);
    for (int i = 0; i < 2 * kColumns; i++) in[i] = static_cast<float>(i % 7);
    for (unsigned i = 0; i < grid * kernel.outputs; i++) out[i] = NAN;
    for (int row = 1; row <= 2 && kernel.entry == unaligned_sum; row++)
        cepo::emulator::forbid(in + row * kColumns - 1, sizeof(float));
    cudaError_t error = cudaSuccess;
    try {
        error =
            launch(kernel.entry, grid, kernel.block, kernel.cluster, kernel.shared_bytes, nullptr, in, out, kColumns);
    } catch (const std::runtime_error& fault) {
        fprintf(stderr, "emulator: %s\n", fault.what());
        return 2;
    }
    if (error != cudaSuccess) {
        fprintf(stderr, "%s\n", cudaGetErrorString(error));
        return 3;
    }
    printf("%ju %ju", cepo::emulator::counters.read, cepo::emulator::counters.written);
    for (unsigned i = 0; i < grid * kernel.outputs; i++) printf(" %g", out[i]);
    free(in);
    free(out);
    return 0;
}
