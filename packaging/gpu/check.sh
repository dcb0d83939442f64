#!/usr/bin/env bash
# All that a GPU can say about this package, in one command: builds it with nvcc, runs the GPU tests,
# the kernels under compute-sanitizer, and the benchmarks. Needs torch, TorchRec and FBGEMM for CUDA.
#
#   packaging/gpu/check.sh FOLDER [MINUTES OF BENCHMARKS]
#
# FOLDER gets a log of each step, benchmarks/report.md and summary.txt. A second call goes on: what
# has passed is not repeated. TARGET=DIR installs there instead of into the environment.
set -uo pipefail

folder=$(mkdir -p "${1:?"usage: $0 FOLDER [MINUTES]"}" && cd "$1" && pwd)
minutes=${2:-8}
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
failed=0

step() {
  local name=$1
  shift
  if [[ -e $folder/$name.passed ]]; then
    return
  fi
  echo "== $name: $*"
  if "$@" >"$folder/$name.log" 2>&1; then
    touch "$folder/$name.passed"
    echo "$name passed: $(tail -n 1 "$folder/$name.log")" | tee -a "$folder/summary.txt"
  else
    failed=1
    tail -n 30 "$folder/$name.log"
    echo "$name FAILED, see $name.log" | tee -a "$folder/summary.txt"
  fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$folder/summary.txt"
step build "$python" -m pip install --no-build-isolation --no-deps --force-reinstall \
  ${TARGET:+--target "$TARGET" --upgrade} .
step tests env CAFE_REQUIRE_CUDA=1 "$python" -m pytest tests -m cuda
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" env CAFE_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
    "$python" -m pytest tests/ops/test_cuda.py -m cuda
done
step benchmarks "$python" -m benchmarks.run --device cuda --minutes "$minutes" \
  --out "$folder/benchmarks"
exit "$failed"
