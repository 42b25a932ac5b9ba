// SPDX-License-Identifier: BSD-3-Clause
//
// The loops on frames for what every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include <type_traits>

#include "cpu/frame_kernels.h"

#define GLIMPSE_VECTOR_BYTES 16

namespace glimpse::baseline {
#include "cpu/frames_apply.h"
}  // namespace glimpse::baseline
