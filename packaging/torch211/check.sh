#!/usr/bin/env bash
# Builds the package, CUDA kernels included, and runs its tests with the oldest torch, TorchRec and
# FBGEMM that it supports: PyPI's CUDA build of torch, on a machine that needs no GPU.
#
#   packaging/torch211/check.sh [FOLDER] [PYTEST ARGUMENTS]
#
# FOLDER (a new one under $TMPDIR) keeps the virtual environment, 7 GB; it may be there already.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mkdir -p "${1:-${TMPDIR:-/tmp}/torchrec_cafe_torch211}" && cd "${1:-${TMPDIR:-/tmp}/torchrec_cafe_torch211}" && pwd)
shift || true
export PATH="$folder/venv/bin:$PATH" PYTHONNOUSERSITE=1
unset PYTHONPATH VIRTUAL_ENV

[[ -x $folder/venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$folder/venv"
# All that requirements-cpu.txt has but for the packages in question.
grep -vE '^(torch|torchrec|fbgemm-gpu-cpu)==|^\./packaging/' "$repository/requirements-cpu.txt" \
  >"$folder/requirements.txt"
python -m pip install -q torch==2.11.0 torchrec==1.6.1 fbgemm-gpu==1.6.0 \
  -r "$folder/requirements.txt"

# FBGEMM's CUDA build asks the driver's management library about the links between GPUs as soon as it
# is loaded. Where there is no driver, one that knows of no GPU (status 9) answers.
if ! ldconfig -p | grep -q libnvidia-ml.so.1; then
  gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o "$folder/libnvidia-ml.so.1" \
    "$repository/packaging/torch211/no_gpu_nvml.c"
  export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

# A copy, so that the build at hand stays as it is.
mkdir -p "$folder/source"
git -C "$repository" ls-files -z | tar -C "$repository" --null -T - -cf - | tar -C "$folder/source" -xf -
cd "$folder/source"
python -m pip install -q --no-build-isolation --no-deps -e .

python - <<'PYTHON'
import fbgemm_gpu, torch, torchrec
import torchrec_cafe
from importlib.metadata import version

names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("torchrec_cafe::")]
keys = {key: sum(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names)
        for key in ("CPU", "CUDA", "Meta")}
versions = {name: version(name) for name in ("torch", "torchrec", "fbgemm-gpu")}
print(f"{versions}, CUDA {torch.version.cuda}: {len(names)} operators, kernels {keys}")
assert torch.version.cuda is None or keys["CUDA"] > 0, "the CUDA kernels are not registered"
PYTHON

python -m pytest "$@"
