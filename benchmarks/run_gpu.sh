#!/usr/bin/env bash
# On a machine with a CUDA GPU: build, test, look for memory errors and races, measure. Everything it finds lies in
# benchmarks/results/ (or the folder given) under the GPU's name.
set -uo pipefail
cd "$(dirname "$0")/.."

results=${1:-benchmarks/results}
mkdir -p "$results"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr '[:upper:]' '[:lower:]')
failed=0
step() {
    echo "== $1"
    shift
    "$@" || { echo "-- failed: $*"; failed=1; }
}

step build pip install --quiet --no-build-isolation --no-deps .
step tests pytest -p no:cacheprovider -m gpu tests
small="pytest -p no:cacheprovider -q -m gpu tests/test_cuda_gpu.py tests/test_policy_loss.py -k cuda"
if command -v compute-sanitizer > /dev/null; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 1 $small
    step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 $small
else
    echo "-- compute-sanitizer is not on the PATH: not run"
fi
step measure python benchmarks/gpu.py --results "$results/$gpu.json"
exit $failed
