// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>
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

/// What happens near the edge of the map: how far samples are kept, and what they read there.
///
///   reach   samples are kept for -reach <= p <= S-1 + reach; NaN never is
///   kClamp  beyond the outer pixel centres the outer pixel counts in full, with slope 0
///   kDrop   the two taps of a sample that lie outside are left out: the value fades to 0
///   kExact  a sample on a pixel centre reads that pixel alone, with slope 0
///   kNearest  the nearest pixel alone, halves away from zero, with slope 0
///
///   RoIAlign   weight of the outer pixels    0 ______                  ______ 0
///   {1, kClamp}                                      |‾‾‾‾‾\ ... /‾‾‾‾‾|
///                                                   -1     0    S-1    S
///   zeros      {1, kDrop}                    0 ______                  ______ 0
///                                                    \_____    _____ /
///                                                   -1     0  S-1    S
///   border     {inf, kClamp}, TensorFlow's crop_and_resize {0, kExact} or {0, kNearest}
struct Border {
  enum Mode : int32_t { kClamp = 0, kDrop = 1, kExact = 2, kNearest = 3 };

  float reach;
  int32_t mode;

  template <class T>
  GLIMPSE_HD bool inside(T position, int32_t size) const {
    return position >= -static_cast<T>(reach) &&
           position <= static_cast<T>(size - 1) + static_cast<T>(reach);
  }

  /// Bounds of the positions whose taps can touch the pixels first..last.
  template <class T>
  GLIMPSE_HD T reach_low(int32_t first) const {
    const T beyond = first == 0 && reach > 1 ? static_cast<T>(reach) : T(1);
    return static_cast<T>(first) - beyond;
  }
  template <class T>
  GLIMPSE_HD T reach_high(int32_t last, int32_t size) const {
    const T beyond = last == size - 1 && reach > 1 ? static_cast<T>(reach) : T(1);
    return static_cast<T>(last) + beyond;
  }

  template <class T>
  GLIMPSE_HD Taps<T> taps(T position, int32_t size) const {
    using R = Rounded<T>;
    Taps<T> taps;
    taps.count = 0;
    taps.pixel[0] = taps.pixel[1] = 0;
    taps.weight[0] = taps.weight[1] = T(0);
    taps.slope[0] = taps.slope[1] = T(0);
    if (!inside(position, size)) return taps;

    // floor where it matters; far positions are clamped before they become integers.
    int32_t low = size;
    if (position < static_cast<T>(size)) {
      low = static_cast<int32_t>(position > T(-2) ? position : T(-2));
      if (static_cast<T>(low) > position) --low;
    }
    const R fraction = R(position) - R(low);

    taps.count = 1;
    taps.weight[0] = T(1);
    if (mode != kDrop && (low < 0 || low >= size - 1)) {
      // Clamping comes after the range test: a sample outside by half a pixel still counts in full.
      taps.pixel[0] = low < 0 ? 0 : size - 1;
      return taps;
    }
    if (mode == kNearest) {
      taps.pixel[0] = fraction.value >= T(0.5) ? low + 1 : low;
      return taps;
    }
    taps.pixel[0] = low;
    if (mode == kExact && !(fraction.value > 0)) return taps;
    // RoIAlign's slope is 0 on the first pixel's centre and right-handed on all others.
    if (mode == kClamp && !(position > 0)) return taps;
    taps.count = 2;
    taps.pixel[1] = low + 1;
    taps.weight[0] = (R(T(1)) - fraction).value;
    taps.weight[1] = fraction.value;
    taps.slope[0] = T(-1);
    taps.slope[1] = T(1);
    if (mode == kDrop) {
      if (low + 1 >= size) taps.count = low < size ? 1 : 0;
      if (low < 0) {
        taps.count = 1;
        taps.pixel[0] = 0;
        taps.weight[0] = taps.weight[1];
        taps.slope[0] = T(1);
      }
    }
    return taps;
  }
};

/// Samples up to one pixel outside read the outer pixel, farther ones count as zeros.
GLIMPSE_HD Border roi_border() { return {1.0f, Border::kClamp}; }
/// Pixels outside the map are zeros.
GLIMPSE_HD Border zeros_border() { return {1.0f, Border::kDrop}; }
/// Pixels outside the map are those of its edge.
GLIMPSE_HD Border edge_border() { return {HUGE_VALF, Border::kClamp}; }
/// Samples outside the map are the fill value; inside are those between the outer pixel centres.
GLIMPSE_HD Border fill_border(bool nearest) {
  return {0.0f, nearest ? Border::kNearest : Border::kExact};
}
/// As fill_border, but inside is all that pixels cover: half a pixel more on each side.
GLIMPSE_HD Border covered_border(bool nearest) {
  return {0.5f, nearest ? Border::kNearest : Border::kClamp};
}

}  // namespace glimpse
