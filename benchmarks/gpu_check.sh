#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Everything that needs a real GPU, in one call and without a network:
#
#   benchmarks/gpu_check.sh OUT [options of gpu_check.py, such as --parts tests,timing]
#
# Builds for the GPU of this machine, then runs benchmarks/gpu_check.py, which leaves a dated JSON
# file and a short table in OUT. Needs CUDA, torch 2.11 or newer, cmake, ninja, pybind11 and pytest;
# torchvision makes the timing table more interesting. A part that fails does not stop the others.
# PYTHON chooses the interpreter. The exit status is 0 when every part has passed. All parts together
# take at most half an hour after the build; where a command must be shorter, split it: --parts
# hostile,streams,...
set -u

if [ $# -lt 1 ]; then
  sed -n '3,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)

architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';')
if [ -z "$architectures" ]; then
  echo "gpu_check: nvidia-smi finds no GPU" >&2
  exit 2
fi

with_pip() {
  "$python" -m pip install --no-build-isolation --no-deps --no-index --editable "$root"
}

# Where pip cannot (no setuptools, a system Python that is not to be changed).
with_cmake() {
  cmake -S "$root" -B "$root/build/gpu_check" -G Ninja -DGLIMPSE_CUDA=1 -DGLIMPSE_TESTING=1 \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" &&
    cmake --build "$root/build/gpu_check" &&
    cmake --install "$root/build/gpu_check" --component python --prefix "$root"
}

export TORCH_CUDA_ARCH_LIST=$architectures GLIMPSE_CUDA=1 GLIMPSE_TESTING=1
echo "building for $architectures"
start=$(date +%s)
if ! { with_pip || { echo "pip failed, trying cmake"; with_cmake; }; } >"$out/build.log" 2>&1; then
  tail -n 40 "$out/build.log" >&2
  echo "gpu_check: the build failed, see build.log" >&2
  exit 1
fi
echo "built in $(($(date +%s) - start)) s"

# Also finds the package where only cmake could build it.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/benchmarks/gpu_check.py" "$out" "$@"
