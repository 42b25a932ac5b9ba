// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "geometry/hd.h"

namespace glimpse {

// Note [One arithmetic for both devices]
// A sample that falls on a border is in or out by its last bit, so a position must be the same
// number on every device. Compilers may contract `a + b * c` into one fused operation with one
// rounding: nvcc does so by default, gcc does so where the target has FMA. Every coordinate is
// therefore computed with Rounded<T>, whose operators round once each: on the device by the
// intrinsics that are never contracted, on the host because the geometry is compiled with
// -ffp-contract=off. A test compares the tables of both devices bit for bit.

/// A floating-point number whose every operation rounds exactly once, to nearest even.
template <class T>
struct Rounded {
  T value;

  GLIMPSE_HD Rounded() : value(0) {}
  GLIMPSE_HD explicit Rounded(T v) : value(v) {}
  /// Integers become T by one rounding.
  GLIMPSE_HD explicit Rounded(int32_t v) : value(static_cast<T>(v)) {}
};

#if defined(__CUDA_ARCH__)
#define GLIMPSE_ROUNDED_OPERATOR(symbol, single_intrinsic, double_intrinsic)                      \
  __device__ __forceinline__ Rounded<float> operator symbol(Rounded<float> a, Rounded<float> b) { \
    return Rounded<float>(single_intrinsic(a.value, b.value));                                    \
  }                                                                                               \
  __device__ __forceinline__ Rounded<double> operator symbol(Rounded<double> a,                   \
                                                             Rounded<double> b) {                 \
    return Rounded<double>(double_intrinsic(a.value, b.value));                                   \
  }
GLIMPSE_ROUNDED_OPERATOR(+, __fadd_rn, __dadd_rn)
GLIMPSE_ROUNDED_OPERATOR(-, __fsub_rn, __dsub_rn)
GLIMPSE_ROUNDED_OPERATOR(*, __fmul_rn, __dmul_rn)
GLIMPSE_ROUNDED_OPERATOR(/, __fdiv_rn, __ddiv_rn)
#undef GLIMPSE_ROUNDED_OPERATOR

__device__ __forceinline__ float rounded_sqrt(float v) { return __fsqrt_rn(v); }
__device__ __forceinline__ double rounded_sqrt(double v) { return __dsqrt_rn(v); }
#else
template <class T>
GLIMPSE_HD Rounded<T> operator+(Rounded<T> a, Rounded<T> b) {
  return Rounded<T>(a.value + b.value);
}
template <class T>
GLIMPSE_HD Rounded<T> operator-(Rounded<T> a, Rounded<T> b) {
  return Rounded<T>(a.value - b.value);
}
template <class T>
GLIMPSE_HD Rounded<T> operator*(Rounded<T> a, Rounded<T> b) {
  return Rounded<T>(a.value * b.value);
}
template <class T>
GLIMPSE_HD Rounded<T> operator/(Rounded<T> a, Rounded<T> b) {
  return Rounded<T>(a.value / b.value);
}

GLIMPSE_HD float rounded_sqrt(float v) { return std::sqrt(v); }
GLIMPSE_HD double rounded_sqrt(double v) { return std::sqrt(v); }
#endif

/// The largest sample count of a cell. A cell that asks for more counts as having none.
constexpr int32_t kMaxSamples = 2147483647;

/// ceil(v) as a count: 0 for NaN, for v <= 0 and for counts beyond kMaxSamples.
template <class T>
GLIMPSE_HD int32_t ceil_to_count(T v) {
  if (!(v > 0 && v <= static_cast<T>(kMaxSamples - 127))) return 0;
  const int32_t whole = static_cast<int32_t>(v);
  return whole + (static_cast<T>(whole) < v ? 1 : 0);
}

/// log2, rounded from a double series: the same bits on every device, unlike the math libraries.
/// Exact for powers of two. log2(0) = -inf; negative values and NaN give NaN.
GLIMPSE_HD double portable_log2(double v) {
  if (!(v > 0)) return v == 0 ? -HUGE_VAL : (v - v) / (v - v);
  if (v > 1.7976931348623157e308) return v;  // +inf
  int32_t exponent = 0;
  if (v < 2.2250738585072014e-308) {  // subnormal
    v = v * 18014398509481984.0;      // 2^54
    exponent = -54;
  }
  uint64_t bits;
  memcpy(&bits, &v, sizeof(bits));
  exponent += static_cast<int32_t>(bits >> 52) - 1023;
  bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  double mantissa;
  memcpy(&mantissa, &bits, sizeof(mantissa));
  if (mantissa > 1.4142135623730951) {
    mantissa = mantissa * 0.5;
    exponent += 1;
  }
  // log(m) = 2 atanh((m - 1) / (m + 1)); |s| < 0.172, so 12 terms reach the last bit.
  using R = Rounded<double>;
  const R s = (R(mantissa) - R(1.0)) / (R(mantissa) + R(1.0));
  const R square = s * s;
  // Reciprocals that the compiler divides: as exact as a division here, which takes a GPU long.
  R sum(1.0 / 25.0);
  const auto add_term = [&](double reciprocal) { sum = sum * square + R(reciprocal); };
  add_term(1.0 / 23.0);
  add_term(1.0 / 21.0);
  add_term(1.0 / 19.0);
  add_term(1.0 / 17.0);
  add_term(1.0 / 15.0);
  add_term(1.0 / 13.0);
  add_term(1.0 / 11.0);
  add_term(1.0 / 9.0);
  add_term(1.0 / 7.0);
  add_term(1.0 / 5.0);
  add_term(1.0 / 3.0);
  add_term(1.0);
  const R two_over_ln2(2.8853900817779268);
  return (R(static_cast<double>(exponent)) + two_over_ln2 * (s * sum)).value;
}

}  // namespace glimpse
