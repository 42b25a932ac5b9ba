// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry/hd.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace glimpse {

// 16-bit types exist in memory only: they are read to float and written from float, nothing is
// computed in them.

/// IEEE binary16 bits.
struct half {
  uint16_t bits;
};

/// The upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

/// Sums and coordinates: double for double, float for everything else.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

/// What pooled values of a feature type are stored as.
template <class T>
struct Pooled {
  using type = T;
};
template <>
struct Pooled<uint8_t> {
  using type = float;
};
template <class T>
using pooled_t = typename Pooled<T>::type;

namespace detail {
GLIMPSE_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
GLIMPSE_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
}  // namespace detail

GLIMPSE_HD float load_value(float v) { return v; }
GLIMPSE_HD double load_value(double v) { return v; }
GLIMPSE_HD float load_value(uint8_t v) { return static_cast<float>(v); }
GLIMPSE_HD float load_value(bfloat16 v) {
  return detail::float_from_bits(static_cast<uint32_t>(v.bits) << 16);
}
GLIMPSE_HD float load_value(half v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  // Branch-free: place exponent and mantissa, then let one float operation renormalise. Half
  // subnormals become exact through the subtraction of 2^-14 * 1.0.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t normal = magnitude + ((127u - 15u) << 23);
  normal += exponent == 0x0f800000u ? (128u - 16u) << 23 : 0u;  // inf and NaN
  const float subnormal =
      detail::float_from_bits(magnitude + (113u << 23)) - detail::float_from_bits(113u << 23);
  const uint32_t bits = exponent == 0 ? detail::bits_of_float(subnormal) : normal;
  return detail::float_from_bits(bits | sign);
#endif
}

/// Rounds to nearest even, once.
template <class T>
struct Store;
template <>
struct Store<float> {
  GLIMPSE_HD static float from(float v) { return v; }
};
template <>
struct Store<double> {
  GLIMPSE_HD static double from(double v) { return v; }
};
template <>
struct Store<bfloat16> {
  GLIMPSE_HD static bfloat16 from(float v) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
    const uint32_t bits = detail::bits_of_float(v);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? quiet_nan : rounded)};
#endif
  }
};
template <>
struct Store<half> {
  GLIMPSE_HD static half from(float v) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(v))};
#else
    const uint32_t bits = detail::bits_of_float(v);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t result;
    if (magnitude >= 0x47800000u) {  // 65536 and above, inf, NaN
      result = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x1ffu) : 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: half subnormals
      // Adding 0.5 puts the last half bit at the last float bit, so the sum rounds as wanted.
      const float shifted = detail::float_from_bits(magnitude) + 0.5f;
      result = detail::bits_of_float(shifted) - 0x3f000000u;
    } else {
      const uint32_t odd = magnitude >> 13 & 1u;
      result = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    }
    return {static_cast<uint16_t>(sign | result)};
#endif
  }
};

}  // namespace glimpse
