// SPDX-License-Identifier: BSD-3-Clause
#pragma once

// Not "backend.h", which would be this file.
#include "../backend.h"

namespace glimpse {

/// The backend of the CPU dispatch key: merged tables, vector kernels, threads.
const Backend& cpu_backend();

/// The same numbers by the shortest loops that can be read: what cpu_backend() is tested against.
const Backend& simple_backend();

/// The instruction set that cpu_backend() uses: "avx512", "avx2" or "baseline". The environment
/// variable GLIMPSE_ISA, read once, can ask for a lesser one than the CPU has.
const char* cpu_isa();

}  // namespace glimpse
