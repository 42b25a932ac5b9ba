// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/rounded.h"

namespace glimpse {

/// Where the samples of a row of cells fall along one direction, in index units (the centre of
/// pixel k is k), and how that depends on the two box edges `lo` and `hi` that made it.
///
///   position(cell, sample) = origin + cell*step + (sample + phase)*step/samples
///
/// Origin and step are affine in the box edges for every convention, so four constants are the
/// whole derivative and second derivatives along one axis vanish.
template <class T>
struct Axis {
  T origin;
  T step;
  T phase;
  int32_t samples;         // in each cell; 0: the cell reads nothing
  T origin_lo, origin_hi;  // d origin / d lo, d origin / d hi
  T step_lo, step_hi;      // d step / d lo, d step / d hi
  int32_t single;          // 1: positions of a double axis are rounded as if it were float

  /// Rounds left to right as written; see Note [One arithmetic for both devices].
  GLIMPSE_HD T position(int32_t cell, int32_t sample) const {
    if (sizeof(T) > sizeof(float) && single != 0) {
      return static_cast<T>(position_as(static_cast<float>(origin), static_cast<float>(step),
                                        static_cast<float>(phase), cell, sample));
    }
    return position_as(origin, step, phase, cell, sample);
  }

  /// d position / d step of a sample; d position / d origin is 1.
  GLIMPSE_HD T progress(int32_t cell, int32_t sample) const {
    using R = Rounded<T>;
    return (R(cell) + (R(sample) + R(phase)) / R(samples)).value;
  }

 private:
  template <class S>
  GLIMPSE_HD S position_as(S origin, S step, S phase, int32_t cell, int32_t sample) const {
    using R = Rounded<S>;
    return (R(origin) + R(cell) * R(step) + (R(sample) + R(phase)) * R(step) / R(samples)).value;
  }
};

}  // namespace glimpse
