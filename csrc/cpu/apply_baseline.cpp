// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels for what every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include <type_traits>

#include "cpu/kernels.h"

#define GLIMPSE_VECTOR_BYTES 16

namespace glimpse::baseline {
#include "cpu/apply.h"
}  // namespace glimpse::baseline
