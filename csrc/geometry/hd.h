// SPDX-License-Identifier: BSD-3-Clause
#pragma once

/// Marks a function that runs on the host and on the device. The only macro of the geometry.
#if defined(__CUDACC__)
#define GLIMPSE_HD __host__ __device__ __forceinline__
#else
#define GLIMPSE_HD inline
#endif

#if defined(__FAST_MATH__)
#error "glimpse_ext: positions must round as written; compile without -ffast-math"
#endif
