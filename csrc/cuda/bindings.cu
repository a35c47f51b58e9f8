// Python's door to CUDA: addresses, sizes, strides and a stream in; work queued on the stream.
#include <string>

#include "../tuples.h"
#include "launch.h"

namespace {

namespace py = pybind11;

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
cudaStream_t stream_at(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

// "cluster" is whatever number of blocks is best.
int kernel_of(const std::string& name) {
    if (name == "auto") return cepo::cuda::kAuto;
    if (name == "streaming") return cepo::cuda::kStreaming;
    if (name == "cluster") return cepo::cuda::kCluster;
    for (const int blocks : {2, 4, 8})
        if (name == "cluster" + std::to_string(blocks)) return blocks;
    throw std::invalid_argument("kernel: expected auto, streaming, cluster, cluster2, cluster4 or cluster8, got " +
                                name);
}

// The tuples are those of the CPU's bindings. `values`: the address of ten float64 on the device, or 0 (see launch.h).
void forward(int64_t rows, int64_t inner, int64_t vocabulary, const py::tuple& call, uintptr_t values,
             uintptr_t stream) {
    const cepo::Forward f = cepo::forward_of(inner, vocabulary, call);
    py::gil_scoped_release release;
    check(cepo::cuda::forward(f, rows, cepo::at<const double>(values), stream_at(stream)));
}

void backward(int64_t rows, int64_t inner, int64_t vocabulary, const py::tuple& gradient, const py::tuple& policy,
              uintptr_t labels, uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logprobs, uintptr_t entropy,
              uintptr_t stats, const py::tuple& opts, uintptr_t values, uintptr_t stream) {
    const cepo::Backward w = cepo::backward_of(inner, vocabulary, gradient, policy, labels, grad_logprobs, grad_entropy,
                                               logprobs, entropy, stats, opts);
    py::gil_scoped_release release;
    check(cepo::cuda::backward(w, rows, cepo::at<const double>(values), stream_at(stream)));
}

// `shared_limit`: see launch.h.
void policy_loss(int64_t rows, int64_t inner, int64_t vocabulary, const py::tuple& call, const py::tuple& gradient,
                 const py::tuple& opts, const py::tuple& row_values, const py::tuple& out, uintptr_t values,
                 const std::string& kernel, int64_t shared_limit, uintptr_t stream) {
    const cepo::PolicyLoss l = cepo::policy_loss_of(inner, vocabulary, call, gradient, opts, row_values, out);
    const int kind = kernel_of(kernel);
    py::gil_scoped_release release;
    check(cepo::cuda::policy_loss(l, rows, cepo::at<const double>(values), kind, shared_limit, stream_at(stream)));
}

// `thresholds`, `equals`: see launch.h.
void divergence(int64_t rows, int64_t inner, int64_t vocabulary, const py::tuple& call, uintptr_t thresholds,
                uintptr_t equals, uintptr_t values, uintptr_t stream) {
    const cepo::Divergence d = cepo::divergence_of(inner, vocabulary, call);
    py::gil_scoped_release release;
    check(cepo::cuda::divergence(d, rows, cepo::at<const float>(thresholds), cepo::at<const int>(equals),
                                 cepo::at<const double>(values), stream_at(stream)));
}

void rescale(uintptr_t data, int dtype, int64_t size, uintptr_t factor, uintptr_t stream) {
    check(cepo::cuda::rescale(cepo::at<void>(data), static_cast<cepo::Dtype>(dtype), size,
                              cepo::at<const float>(factor), stream_at(stream)));
}

void plain_read(uintptr_t data, int64_t bytes, uintptr_t out, uintptr_t stream) {
    check(cepo::cuda::plain_read(cepo::at<const void>(data), bytes, cepo::at<float>(out), stream_at(stream)));
}

void stream31(uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out, int64_t bytes, uintptr_t stream) {
    check(cepo::cuda::stream31(cepo::at<const void>(a), cepo::at<const void>(b), cepo::at<const void>(c),
                               cepo::at<void>(out), bytes, stream_at(stream)));
}

#ifndef CEPO_EMULATE

__global__ void compiled_architecture(int* out) {
#ifdef __CUDA_ARCH__
    *out = __CUDA_ARCH__;
#endif
}

// The __CUDA_ARCH__ that the current device runs, e.g. 900; raises with CUDA's own words where there is no device.
int probe() {
    int* device = nullptr;
    int architecture = 0;
    cudaError_t error = cudaMalloc(&device, sizeof(int));
    if (error == cudaSuccess) {
        compiled_architecture<<<1, 1>>>(device);
        error = cudaGetLastError();
        if (error == cudaSuccess) error = cudaMemcpy(&architecture, device, sizeof(int), cudaMemcpyDeviceToHost);
        cudaFree(device);
    }
    check(error);
    return architecture;
}

#else

int probe() { return 0; }

#endif

}  // namespace

#ifdef CEPO_EMULATE
PYBIND11_MODULE(_cuda_emulated, m) {
    m.def("order", [](int order, unsigned seed) {
        cepo::emulator::options.order = static_cast<cepo::emulator::Order>(order);
        cepo::emulator::options.seed = seed;
    });
    m.def("forbid", [](uintptr_t at, size_t bytes) { cepo::emulator::forbid(cepo::at<void>(at), bytes); });
    m.def("allow", [](uintptr_t at, size_t bytes) { cepo::emulator::allow(cepo::at<void>(at), bytes); });
    m.def("watch", [](uintptr_t at, size_t bytes) { cepo::emulator::watched.push_back({at, at + bytes, {}}); });
    // Bytes read and written, per stretch that was watched; forgets them.
    m.def("seen", [] {
        py::list found;
        for (const auto& stretch : std::exchange(cepo::emulator::watched, {}))
            found.append(py::make_tuple(stretch.counters.read, stretch.counters.written));
        return found;
    });
#else
PYBIND11_MODULE(_cuda, m) {
#endif
    m.doc() = "CUDA kernels.";
    m.def("probe", &probe);
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("policy_loss", &policy_loss);
    m.def("divergence", &divergence);
    m.def("rescale", &rescale);
    m.def("plain_read", &plain_read);
    m.def("stream31", &stream31);
}
