#!/usr/bin/env bash
# On a machine with a CUDA GPU: build, test, look for memory errors and races, measure. Needs no network. Everything it
# finds lies in benchmarks/results/ (or the folder given) under the GPU's name. PYTHON: the interpreter that has torch.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${1:-benchmarks/results}
failed=0
step() {
    echo "== $1"
    shift
    "$@" || { echo "-- failed: $*"; failed=1; }
}
give_up() {
    echo "run_gpu.sh: $*" >&2
    exit 2
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr '[:upper:]' '[:lower:]')
[ -n "$gpu" ] || give_up "nvidia-smi names no GPU"
for tool in g++ nvcc; do
    command -v "$tool" > /dev/null || echo "-- $tool is not on the PATH"
done
for tool in compute-sanitizer ncu; do # without them a part of what this is to find out stays unknown
    command -v "$tool" > /dev/null || { echo "-- failed: $tool is not on the PATH"; failed=1; }
done
"$python" - << 'END' || give_up "$python lacks what stands above"
import importlib.util, sys
wanted = "torch triton numpy setuptools ninja pybind11 pytest hypothesis mpmath matplotlib"
missing = [name for name in wanted.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("missing: " + " ".join(missing))
import torch
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
END
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)

# Into a folder of its own: nothing of the machine changes, and a Python that its distribution manages allows it.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
echo "== build"
"$python" -m pip install -v --no-build-isolation --no-deps --target "$site" . > "$results/gpu-build.log" 2>&1 ||
    give_up "the build failed: $results/gpu-build.log"
export PYTHONPATH="$site"
# An extension that cannot be built costs the install nothing, but everything here.
(cd / && "$python" -c "import torch, cepo_kernels._cpu, cepo_kernels._cuda as cuda; print('__CUDA_ARCH__', cuda.probe())") ||
    give_up "no usable CUDA extension: $results/gpu-build.log"

# As `python -m pytest`, but for the current folder, whose sources would stand before what was built.
tests() {
    "${before[@]}" "$python" -c "import sys; sys.path = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())" \
        -p no:cacheprovider -m gpu "$@"
}
before=()
step tests tests tests/test_cuda_gpu.py tests/test_ops_*.py tests/test_policy_loss.py tests/test_triton.py
if command -v compute-sanitizer > /dev/null; then
    # Torch's cache of memory would hide an overrun; graphs cannot do without it. Much slower than alone: few cases.
    for tool in memcheck racecheck; do
        before=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1)
        step "$tool" tests tests/test_cuda_gpu.py -k "(agree and 32000) or callers_stream"
        step "$tool" tests tests/test_policy_loss.py -k "cuda and not vocabulary" -x
    done
fi
step measure "$python" benchmarks/gpu.py --tune --results "$results/gpu-$gpu.json"
if command -v ncu > /dev/null; then
    profile() {
        ncu --csv --print-units base --clock-control none --metrics dram__bytes_read.sum,dram__bytes_write.sum \
            -k "regex:^(stream_|cluster_rows|forward_kernel|backward_kernel|policy_loss_kernel)" \
            "$python" benchmarks/dram.py > "$results/gpu-$gpu-ncu.csv" &&
            "$python" benchmarks/dram.py "$results/gpu-$gpu-ncu.csv"
    }
    step "bytes against the model" profile
fi
[ "$results" != "$PWD/benchmarks/results" ] || step "README's table" "$python" benchmarks/readme.py
exit $failed
