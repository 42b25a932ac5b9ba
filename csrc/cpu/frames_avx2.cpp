// SPDX-License-Identifier: BSD-3-Clause
//
// The loops on frames for AVX2, FMA and F16C. Only code between push_options and pop_options may
// use them: what the headers above define is shared with files that run everywhere.
#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "cpu/frame_kernels.h"

#define GLIMPSE_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace glimpse::avx2 {
#include "cpu/frames_apply.h"
}  // namespace glimpse::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
