// Runs the threads of a kernel as fibers of one OS thread, a cluster at a time, in an order that the caller chooses.
//
// A fiber keeps running until it waits or yields; then goes on the first that can, the last that can, or any: so with
// the first, thread 0 gets as far ahead of the others as they let it. What a kernel owes to luck shows in one of these
// orders. When nobody can go on, the report says who waits where.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx = {}, blockIdx = {};
inline dim3 blockDim, gridDim;

// void cepo_emulator_switch(void** from, void* to): leaves one stack, whose top it notes, for another.
extern "C" void cepo_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak cepo_emulator_switch
.type cepo_emulator_switch, @function
cepo_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");

namespace cepo {
namespace emulator {

enum class Order { kForward, kReverse, kRandom };
struct Options {
    Order order = Order::kForward;
    unsigned seed = 0;
    bool yield_on_access = false;  // let others go on after each access to global memory, too
};
inline Options options;

// Bytes of global memory that the wrappers read and wrote; the caller sets them back.
struct Counters {
    uint64_t read = 0;
    uint64_t written = 0;
};
inline Counters counters;

// The same for stretches of memory that the caller names.
struct Watched {
    uintptr_t begin, end;
    Counters counters;
};
inline std::vector<Watched> watched;
inline void count(const void* p, size_t bytes, uint64_t Counters::* counter) {
    counters.*counter += bytes;
    const auto at = reinterpret_cast<uintptr_t>(p);
    for (Watched& stretch : watched)
        if (at + bytes > stretch.begin && at < stretch.end) stretch.counters.*counter += bytes;
}

// AddressSanitizer's view of memory; without it, everything is always there.
#if defined(__SANITIZE_ADDRESS__)
inline void forbid(const void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void allow(const void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
inline bool allowed(const void* p, size_t bytes) {
    return __asan_region_is_poisoned(const_cast<void*>(p), bytes) == nullptr;
}
inline void start_switch(void** fake, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, stack, bytes);
}
inline void finish_switch(void* fake, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
}
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline bool allowed(const void*, size_t) { return true; }
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

struct Site {
    const char* what;
    const char* file;
    int line;
    bool operator==(const Site& other) const { return line == other.line && strcmp(file, other.file) == 0; }
    std::string text() const {
        const char* slash = strrchr(file, '/');
        return std::string(what) + " at " + (slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
    }
};

struct Store {
    unsigned char* to;
    const unsigned char* from;
    std::vector<unsigned char> bytes;  // as they were when the store was issued
};

struct Block;
struct Fiber {
    Block* block = nullptr;
    unsigned thread = 0;
    unsigned char* stack = nullptr;
    void* top = nullptr;
    void* fake = nullptr;
    bool returned = false;
    const void* waits_for = nullptr;  // null: can go on
    Site site = {};
    bool at_cluster_barrier = false;  // has arrived, and not yet waited
    uint32_t cluster_phase = 0;
    std::deque<Store> stores;  // issued, and perhaps not yet read
};

// One lane's part in a warp's exchange.
struct Lane {
    const char* operation = nullptr;  // null: not there
    uint32_t mask = 0;
    uint64_t value = 0;
    uint64_t others[32] = {};
};

struct Block {
    unsigned rank = 0;
    unsigned running = 0;
    unsigned char* shared = nullptr;
    std::vector<unsigned char> fenced;  // shared memory as bulk stores may see it
    unsigned arrived = 0;
    Site barrier = {};
    std::vector<std::vector<Lane>> warps;
};

struct Load {
    unsigned char* to;
    const unsigned char* from;
    uint32_t bytes;
};
// What a BulkBarrier counts. A phase ends, and its loads land, when somebody waits for that.
struct Phases {
    Block* block = nullptr;
    uint32_t completed = 0;
    bool announced = false;
    uint64_t expected = 0;
    uint64_t issued = 0;
    std::vector<Load> loads;
};

class Machine {
  public:
    Machine(unsigned grid, unsigned threads, unsigned cluster, size_t shared_bytes, std::function<void()> body)
        : threads(threads), cluster(cluster), shared_bytes(shared_bytes), grid_(grid), body_(std::move(body)) {
        if (current != nullptr) throw std::runtime_error("a kernel launches a kernel");
        size_t bytes = size_t{threads} * cluster * kStack;
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
        stacks_ = static_cast<unsigned char*>(memory);
        for (size_t i = 0; i < size_t{threads} * cluster; i++) mprotect(stacks_ + i * kStack, kGuard, PROT_NONE);
        current = this;
    }
    ~Machine() {
        current = nullptr;
        end_cluster();
        for (const auto& [p, bytes] : stored_) allow(p, bytes);
        clean_stacks(!ended_);
        munmap(stacks_, size_t{threads} * cluster * kStack);
    }
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

    // Every cluster once; the first fault of the kernel ends it.
    void run() {
        gridDim = dim3(grid_);
        blockDim = dim3(threads);
        random_.seed(options.seed);
        unsigned clusters = grid_ / cluster;
        for (unsigned i = 0; i < clusters; i++) {
            start_cluster(options.order == Order::kReverse ? clusters - 1 - i : i);
            while (Fiber* next = choose()) {
                resume(*next);
                if (!error_.empty()) throw std::runtime_error(error_);
            }
            for (const Fiber& fiber : fibers) {
                if (!fiber.returned) throw std::runtime_error("deadlock: " + report());
            }
            end_cluster();
        }
        ended_ = true;
    }

    // By a fiber: others may go on now; or: go on when somebody calls wake with this key.
    void yield() { leave(*self); }
    void wait_for(const void* key, Site site) {
        self->waits_for = key;
        self->site = site;
        leave(*self);
    }
    void wake(const void* key) {
        for (size_t i = 0; i < fibers.size(); i++) {
            if (fibers[i].waits_for == key) wake(i);
        }
    }
    void wake(size_t index) {
        fibers[index].waits_for = nullptr;
        first_ = std::min(first_, position(index));
    }
    // The block of this cluster whose shared memory holds all of these bytes, or null.
    Block* block_of(const void* p, size_t bytes) {
        auto at = reinterpret_cast<uintptr_t>(p);
        for (Block& block : blocks) {
            auto start = reinterpret_cast<uintptr_t>(block.shared);
            if (at >= start && at + bytes <= start + shared_bytes) return &block;
        }
        return nullptr;
    }
    // Until the kernel ends nobody can know that a bulk store has been written.
    void forbid_until_the_end(const void* p, size_t bytes) {
        forbid(p, bytes);
        stored_.emplace_back(p, bytes);
    }
    [[noreturn]] void fail(const std::string& message) const {
        throw std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) +
                                 ": " + message);
    }

    static inline Machine* current = nullptr;
    Fiber* self = nullptr;
    unsigned threads;
    unsigned cluster;
    size_t shared_bytes;
    std::deque<Fiber> fibers;  // block after block
    std::deque<Block> blocks;
    std::deque<Phases> barriers;
    unsigned cluster_arrived = 0;
    uint32_t cluster_phase = 0;

  private:
    static constexpr size_t kStack = 128 * 1024;
    static constexpr size_t kGuard = 4096;

    // Out of bounds is what a fiber that is never resumed had in use; of one that has returned, its outermost frame.
    void clean_stacks(bool whole) {
        if (whole) return allow(stacks_, size_t{threads} * cluster * kStack);
        for (size_t i = 1; i <= size_t{threads} * cluster; i++) allow(stacks_ + i * kStack - kGuard, kGuard);
    }
    void start_cluster(unsigned index) {
        clean_stacks(false);
        first_block_ = index * cluster;
        cluster_arrived = 0;
        cluster_phase = 0;
        first_ = 0;
        for (unsigned rank = 0; rank < cluster; rank++) {
            Block& block = blocks.emplace_back();
            block.rank = rank;
            block.running = threads;
            void* memory = nullptr;
            if (posix_memalign(&memory, 128, shared_bytes > 0 ? shared_bytes : 1) != 0) throw std::bad_alloc();
            block.shared = static_cast<unsigned char*>(memory);
            memset(block.shared, 0xff, shared_bytes);
            block.fenced.assign(shared_bytes, 0xff);
            for (unsigned start = 0; start < threads; start += 32) {
                block.warps.emplace_back(threads - start < 32 ? threads - start : 32);
            }
            for (unsigned thread = 0; thread < threads; thread++) {
                unsigned char* stack = stacks_ + fibers.size() * kStack;
                Fiber& fiber = fibers.emplace_back();
                fiber.block = &block;
                fiber.thread = thread;
                fiber.stack = stack;
                auto** top = reinterpret_cast<void**>(stack + kStack) - 8;  // six registers, where to start, an end
                memset(top, 0, 8 * sizeof(void*));
                top[6] = reinterpret_cast<void*>(&Machine::enter);
                fiber.top = top;
            }
        }
    }
    void end_cluster() {
        for (Block& block : blocks) {
            allow(block.shared, shared_bytes);
            free(block.shared);
        }
        fibers.clear();
        blocks.clear();
        barriers.clear();
    }

    Fiber* choose() {
        size_t n = fibers.size();
        if (options.order == Order::kRandom) {
            for (size_t i = 0, at = random_() % n; i < n; i++, at = (at + 1) % n) {
                if (can_go_on(fibers[at])) return &fibers[at];
            }
            return nullptr;
        }
        for (; first_ < n; first_++) {
            Fiber& fiber = fibers[position(first_)];
            if (can_go_on(fiber)) return &fiber;
        }
        return nullptr;
    }
    static bool can_go_on(const Fiber& fiber) { return !fiber.returned && fiber.waits_for == nullptr; }
    // Its own inverse: where the order's i-th fiber is.
    size_t position(size_t i) const { return options.order == Order::kReverse ? fibers.size() - 1 - i : i; }
    void resume(Fiber& fiber) {
        self = &fiber;
        threadIdx = {fiber.thread, 0, 0};
        blockIdx = {first_block_ + fiber.block->rank, 0, 0};
        start_switch(&fake_, fiber.stack + kGuard, kStack - kGuard);
        cepo_emulator_switch(&top_, fiber.top);
        finish_switch(fake_, nullptr, nullptr);
    }
    void leave(Fiber& fiber) {
        start_switch(fiber.returned ? nullptr : &fiber.fake, caller_stack_, caller_bytes_);
        cepo_emulator_switch(&fiber.top, top_);
        finish_switch(fiber.fake, &caller_stack_, &caller_bytes_);
    }
    static void enter() {
        Machine& machine = *current;
        finish_switch(nullptr, &machine.caller_stack_, &machine.caller_bytes_);
        Fiber& fiber = *machine.self;
        try {
            machine.body_();
            machine.at_return(fiber);
        } catch (const std::exception& error) {
            machine.error_ = error.what();
        }
        fiber.returned = true;
        machine.leave(fiber);
        abort();
    }
    void at_return(Fiber& fiber) {
        if (!fiber.stores.empty()) fail("returned while a bulk_store may still read shared memory");
        if (--fiber.block->running > 0) return;
        for (const Phases& barrier : barriers) {
            if (barrier.block == fiber.block && !barrier.loads.empty()) {
                fail("the block returned while a bulk_load was on its way to its shared memory");
            }
        }
        forbid(fiber.block->shared, shared_bytes);
    }

    std::string report() const {
        std::string text;
        for (size_t i = 0, next = 0; i < fibers.size(); i = next) {
            std::string state = describe(fibers[i]);
            while (next < fibers.size() && fibers[next].block == fibers[i].block && describe(fibers[next]) == state) {
                next++;
            }
            text += (i > 0 ? "; " : "") + ("block " + std::to_string(first_block_ + fibers[i].block->rank)) +
                    ", threads " + std::to_string(fibers[i].thread) + "-" + std::to_string(fibers[next - 1].thread) +
                    " " + state;
        }
        return text;
    }
    std::string describe(const Fiber& fiber) const {
        if (fiber.returned) return "have returned";
        std::string text = "wait in " + fiber.site.text();
        for (const Phases& barrier : barriers) {
            if (fiber.waits_for != &barrier) continue;
            text += " (phase " + std::to_string(barrier.completed) + ": " + std::to_string(barrier.issued) + " of " +
                    (barrier.announced ? std::to_string(barrier.expected) : std::string("unannounced")) + " bytes)";
        }
        return text;
    }

    unsigned grid_;
    std::function<void()> body_;
    unsigned char* stacks_ = nullptr;
    unsigned first_block_ = 0;
    size_t first_ = 0;  // in the order; nobody before it can go on
    std::mt19937 random_;
    std::string error_;
    bool ended_ = false;
    void* top_ = nullptr;  // the caller's own stack
    void* fake_ = nullptr;
    const void* caller_stack_ = nullptr;
    size_t caller_bytes_ = 0;
    std::vector<std::pair<const void*, size_t>> stored_;
};

}  // namespace emulator
}  // namespace cepo
