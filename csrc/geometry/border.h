// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/rounded.h"

namespace glimpse {

/// What one sample reads along one axis: up to two pixels with their weights, ascending.
/// value = sum(weight * pixel); d value / d position = sum(slope * pixel).
template <class T>
struct Taps {
  int32_t count;  // 0: the sample is dropped
  int32_t pixel[2];
  T weight[2];
  T slope[2];
};

/// RoIAlign's border. A sample up to one pixel beyond the outer pixel centres reads the outer
/// pixel at full weight (and `size` itself counts as inside); farther ones are dropped.
///
///      weight of the outer pixels              0 ______                  ______ 0
///                                                      |‾‾‾‾‾\ ... /‾‾‾‾‾|
///                                                     -1     0       S-1  S
struct RoiBorder {
  /// Positions that are not dropped: reach_low() <= p <= reach_high(size).
  /// Written so that NaN falls out.
  template <class T>
  GLIMPSE_HD static bool inside(T position, int32_t size) {
    return position >= T(-1) && position <= static_cast<T>(size);
  }

  /// The closed range of positions whose taps can touch the pixels first..last.
  template <class T>
  GLIMPSE_HD static T reach_low(int32_t first) {
    return static_cast<T>(first) - T(1);
  }
  template <class T>
  GLIMPSE_HD static T reach_high(int32_t last, int32_t size) {
    (void)size;
    return static_cast<T>(last) + T(1);
  }

  template <class T>
  GLIMPSE_HD static Taps<T> taps(T position, int32_t size) {
    Taps<T> taps;
    taps.count = 0;
    taps.pixel[0] = taps.pixel[1] = 0;
    taps.weight[0] = taps.weight[1] = T(0);
    taps.slope[0] = taps.slope[1] = T(0);
    if (!inside(position, size)) return taps;
    // Clamping comes after the range test: a sample outside by half a pixel still counts in full.
    const int32_t low = position > 0 ? static_cast<int32_t>(position) : 0;
    if (!(position > 0) || low >= size - 1) {
      taps.count = 1;
      taps.pixel[0] = position > 0 ? size - 1 : 0;
      taps.weight[0] = T(1);
      return taps;
    }
    using R = Rounded<T>;
    const R fraction = R(position) - R(low);
    taps.count = 2;
    taps.pixel[0] = low;
    taps.pixel[1] = low + 1;
    taps.weight[0] = (R(T(1)) - fraction).value;
    taps.weight[1] = fraction.value;
    taps.slope[0] = T(-1);
    taps.slope[1] = T(1);
    return taps;
  }
};

}  // namespace glimpse
