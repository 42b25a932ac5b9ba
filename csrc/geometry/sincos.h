// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/rounded.h"

namespace glimpse {

/// Sine and cosine of one angle.
struct SinCos {
  double sine, cosine;
};

/// Angles beyond this many quarter turns have no sine and no cosine here: NaN. A float has no
/// meaningful fraction of a turn left by then.
constexpr double kMostQuarterTurns = 1048576.0;

namespace detail {

/// Nearest integer, ties to even, of |v| < 2^51: the sum rounds away the fraction.
GLIMPSE_HD double rounded_to_integer(double v) {
  using R = Rounded<double>;
  const R shift(6755399441055744.0);  // 1.5 * 2^52
  return ((R(v) + shift) - shift).value;
}

/// Of an angle within an eighth of a turn of 0, by the polynomials of fdlibm (Sun Microsystems,
/// 1993): less than one unit in the last place.
GLIMPSE_HD SinCos sincos_of_remainder(double angle) {
  using R = Rounded<double>;
  const R x(angle);
  const R z = x * x;
  R s(1.58969099521155010221e-10);
  s = s * z + R(-2.50507602534068634195e-08);
  s = s * z + R(2.75573137070700676789e-06);
  s = s * z + R(-1.98412698298579493134e-04);
  s = s * z + R(8.33333333332248946124e-03);
  s = s * z + R(-1.66666666666666324348e-01);
  R c(-1.13596475577881948265e-11);
  c = c * z + R(2.08757232129817482790e-09);
  c = c * z + R(-2.75573143513906633035e-07);
  c = c * z + R(2.48015872894767294178e-05);
  c = c * z + R(-1.38888888888741095749e-03);
  c = c * z + R(4.16666666666666019037e-02);
  const R half = z * R(0.5);
  const R one(1.0);
  const R leading = one - half;
  SinCos result;
  result.sine = (x + (x * z) * s).value;
  result.cosine = (leading + (((one - leading) - half) + z * (z * c))).value;
  return result;
}

}  // namespace detail

/// Sine and cosine with the same bits on every device, unlike the math libraries. Multiples of a
/// quarter turn in degrees are exact: degrees are reduced before they become radians. NaN for
/// angles that are not finite or beyond kMostQuarterTurns.
GLIMPSE_HD SinCos portable_sincos(double angle, bool degrees) {
  using R = Rounded<double>;
  const double quarter = degrees ? 90.0 : 1.5707963267948966;
  const double most = kMostQuarterTurns * quarter;
  if (!(angle >= -most && angle <= most)) {
    const double zero = angle < 0 ? 0.0 : -0.0;
    const double nan = zero / zero;
    return {nan, nan};
  }
  const R turns(detail::rounded_to_integer((R(angle) / R(quarter)).value));
  R rest(angle);
  if (degrees) {
    // Exact, because both are within a factor of two of each other.
    rest = (rest - turns * R(90.0)) * R(0.017453292519943295);
  } else {
    // pi / 2 in three parts of 33 bits: each product is exact, and so is the first difference.
    rest = rest - turns * R(1.57079632673412561417e+00);
    rest = rest - turns * R(6.07710050630396597660e-11);
    rest = rest - turns * R(2.02226624879595063154e-21);
  }
  const SinCos remainder = detail::sincos_of_remainder(rest.value);
  switch (static_cast<int64_t>(turns.value) & 3) {
    case 0:
      return remainder;
    case 1:
      return {remainder.cosine, -remainder.sine};
    case 2:
      return {-remainder.sine, -remainder.cosine};
    default:
      return {-remainder.cosine, remainder.sine};
  }
}

}  // namespace glimpse
