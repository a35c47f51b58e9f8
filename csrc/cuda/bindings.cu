// Python's door to CUDA. One kernel so far: it proves that a build for this device's architecture is in the binary and
// that a launch reaches it, which `cepo doctor` reports.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

namespace {

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
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return architecture;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels.";
    m.def("probe", &probe);
}
