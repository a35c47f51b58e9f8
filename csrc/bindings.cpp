// Python's door to the CPU kernels: addresses, sizes and strides in, nothing out but what was written there.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "tuples.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

bool supported(const std::string& isa) {
    if (isa == "portable") return true;
#ifdef CEPO_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx2") return avx2;
    if (isa == "avx512")
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef CEPO_AVX512BF16
    if (isa == "avx512bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    return false;
}

cepo::Kernels kernels(const std::string& isa) {
#ifdef CEPO_X86
    if (isa == "avx512") return cepo::avx512_kernels();
    if (isa == "avx2") return cepo::avx2_kernels();
#endif
    return cepo::portable_kernels();
}

// Rows over threads, in runs of about 64 Ki columns: one row of a large vocabulary, many of a small one.
template <class F>
void over_rows(int64_t rows, int64_t vocabulary, int threads, F f) {
    const int64_t run = 1 + 65536 / vocabulary;
    const int64_t runs = (rows + run - 1) / run;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (runs > 1)
#endif
    for (int64_t i = 0; i < runs; ++i) f(i * run, (i + 1) * run < rows ? (i + 1) * run : rows);
}

// A fresh gradient is first touched here; in huge pages that costs a fifth.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{1} << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

bool labels_are_good(const cepo::Forward& f, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t label = f.labels[row];
        if (label != f.options.ignore_index && (label < 0 || label >= f.vocabulary)) return false;
    }
    return true;
}

// False, and nothing computed, if a label is neither ignored nor a column.
bool forward(const std::string& isa, int threads, int64_t rows, int64_t inner, int64_t vocabulary,
             const py::tuple& call) {
    const cepo::Forward f = cepo::forward_of(inner, vocabulary, call);
    const cepo::Kernels chosen = kernels(isa);
    py::gil_scoped_release release;
    if (!labels_are_good(f, rows)) return false;
    over_rows(rows, vocabulary, threads, [&](int64_t begin, int64_t end) { chosen.forward(f, begin, end); });
    return true;
}

// The same for a policy's loss.
bool policy_loss(const std::string& isa, int threads, int64_t rows, int64_t inner, int64_t vocabulary,
                 const py::tuple& call, const py::tuple& gradient, const py::tuple& opts, const py::tuple& row_values,
                 const py::tuple& out, int64_t fresh_bytes) {
    const cepo::PolicyLoss l = cepo::policy_loss_of(inner, vocabulary, call, gradient, opts, row_values, out);
    const cepo::Kernels chosen = kernels(isa);
    py::gil_scoped_release release;
    if (!labels_are_good(l.forward, rows)) return false;
    if (fresh_bytes > 0) advise_huge_pages(l.gradient.data, fresh_bytes);
    over_rows(rows, vocabulary, threads, [&](int64_t begin, int64_t end) { chosen.policy_loss(l, begin, end); });
    return true;
}

void backward(const std::string& isa, int threads, int64_t rows, int64_t inner, int64_t vocabulary,
              const py::tuple& gradient, const py::tuple& policy, uintptr_t labels, uintptr_t grad_logprobs,
              uintptr_t grad_entropy, uintptr_t logprobs, uintptr_t entropy, uintptr_t stats, const py::tuple& opts,
              int64_t fresh_bytes) {
    const cepo::Backward w = cepo::backward_of(inner, vocabulary, gradient, policy, labels, grad_logprobs, grad_entropy,
                                               logprobs, entropy, stats, opts);
    const cepo::Kernels chosen = kernels(isa);
    py::gil_scoped_release release;
    if (fresh_bytes > 0) advise_huge_pages(w.gradient.data, fresh_bytes);
    over_rows(rows, vocabulary, threads, [&](int64_t begin, int64_t end) { chosen.backward(w, begin, end); });
}

void divergence(const std::string& isa, int threads, int64_t rows, int64_t inner, int64_t vocabulary,
                const py::tuple& call, int64_t fresh_bytes) {
    const cepo::Divergence d = cepo::divergence_of(inner, vocabulary, call);
    const cepo::Kernels chosen = kernels(isa);
    py::gil_scoped_release release;
    if (fresh_bytes > 0) advise_huge_pages(d.gradient.data, fresh_bytes);
    over_rows(rows, vocabulary, threads, [&](int64_t begin, int64_t end) { chosen.divergence(d, begin, end); });
}

#ifdef CEPO_AVX512BF16
// In pieces, whose number is a multiple of the threads' where they are few; which they are changes no bit.
void product(int threads, const py::tuple& left, const py::tuple& right, int64_t rows, int64_t columns, int64_t depth,
             uintptr_t out, int out_dtype, int64_t out_stride, bool add) {
    const cepo::Product p{cepo::operand(left),
                          cepo::operand(right),
                          rows,
                          columns,
                          depth,
                          cepo::at<void>(out),
                          static_cast<cepo::Dtype>(out_dtype),
                          out_stride,
                          add};
    const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
    py::gil_scoped_release release;
    if (rows <= 0 || columns <= 0) return;
    if (!add && out_stride == columns)
        advise_huge_pages(p.out, rows * columns * (p.out_dtype == cepo::Dtype::kFloat32 ? 4 : 2));
    const int64_t down = parts(rows, cepo::kMostRows), height = parts(rows, down);
    int64_t across = parts(columns, cepo::kMostColumns);
    if (down * across < 4 * threads) across = parts(parts(down * across, threads) * threads, down);
    const int64_t width = parts(parts(columns, across), 32) * 32;
    across = parts(columns, width);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (down * across > 1)
#endif
    for (int64_t i = 0; i < down * across; ++i) {
        const int64_t top = i % down * height, left_edge = i / down * width;
        cepo::avx512bf16_product(p, top, std::min(top + height, rows), left_edge, std::min(left_edge + width, columns));
    }
}
#endif

// Sum of float32 values read by all threads: the speed of a plain read, which benchmarks measure against.
double plain_read(const std::string& isa, int threads, uintptr_t data, int64_t size) {
    const cepo::Kernels chosen = kernels(isa);
    constexpr int64_t kRun = 1 << 16;
    double total = 0.0;
    py::gil_scoped_release release;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : total)
#endif
    for (int64_t start = 0; start < size; start += kRun)
        total += chosen.sum(cepo::at<const float>(data) + start, start + kRun < size ? kRun : size - start);
    return total;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Row kernels for CPUs; cepo_kernels/backends/cpu.py is the caller.";
    m.def("supported", &supported);
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("policy_loss", &policy_loss);
    m.def("divergence", &divergence);
    m.def("plain_read", &plain_read);
    m.def("advise_huge_pages", [](uintptr_t data, int64_t bytes) { advise_huge_pages(cepo::at<void>(data), bytes); });
#ifdef CEPO_AVX512BF16
    m.def("product", &product);
#endif
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
