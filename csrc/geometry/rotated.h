// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/conventions.h"
#include "geometry/frame.h"
#include "geometry/sincos.h"

namespace glimpse {

/// One local axis of a rotated box: `length` in image pixels, about its centre. Numbers and order
/// of arithmetic of detectron2 and mmcv. minimum_one: a length under one pixel of the map becomes
/// one pixel (mmcv, aligned=False).
///
///          -length/2          0           length/2
///              |-----o-----|-----o-----|-----o-----|      three cells of one sample
template <class T>
GLIMPSE_HD Axis<T> rotated_axis(T length, T scale, bool minimum_one, int32_t sampling_ratio,
                                int32_t cells) {
  using R = Rounded<T>;
  R extent = R(length) * R(scale);
  const bool clamped = minimum_one && extent.value < T(1);
  if (clamped) extent = R(T(1));
  const R step = extent / R(cells);

  Axis<T> axis;
  axis.origin = (R(T(0)) - extent / R(T(2))).value;
  axis.step = step.value;
  axis.phase = T(0.5);
  axis.single = 0;
  axis.samples = sampling_ratio > 0 ? sampling_ratio : ceil_to_count(step.value);
  axis.origin_lo = axis.step_lo = T(0);
  axis.origin_hi = clamped ? T(0) : -scale / T(2);
  axis.step_hi = clamped ? T(0) : (R(scale) / R(cells)).value;
  return axis;
}

/// Any operator of the RoIAlign family that is not separable: the argument through which the
/// kernels on frames learn where samples fall.
struct FrameOperator {
  enum Kind : int32_t { kRoiAlign = 0, kRotated = 1, kKinds };

  int32_t kind;
  int32_t sampling_ratio;  // <= 0: one sample per pixel that a cell covers, rounded up
  int32_t aligned;         // as in RoiAlign
  int32_t clockwise;  // kRotated: positive angles turn with the clock, on a picture with y down
  int32_t degrees;    // kRotated: unit of the angle

  /// Columns of a box after its image index.
  GLIMPSE_HD int32_t columns() const { return kind == kRotated ? 5 : 4; }

  /// Of a box: x1, y1, x2, y2, or centre x, centre y, width, height, angle.
  template <class T>
  GLIMPSE_HD Frame<T> frame(const T* box, T scale, int32_t cells_y, int32_t cells_x) const {
    using R = Rounded<T>;
    Frame<T> frame;
    if (kind == kRotated) {
      const bool minimum_one = aligned == 0;
      frame.axis[0] = rotated_axis(box[3], scale, minimum_one, sampling_ratio, cells_y);
      frame.axis[1] = rotated_axis(box[2], scale, minimum_one, sampling_ratio, cells_x);
      const R offset(aligned != 0 ? T(0.5) : T(0));
      frame.centre[0] = (R(box[1]) * R(scale) - offset).value;
      frame.centre[1] = (R(box[0]) * R(scale) - offset).value;
      const SinCos turned = portable_sincos(static_cast<double>(box[4]), degrees != 0);
      frame.cosine = static_cast<T>(turned.cosine);
      frame.sine = static_cast<T>(clockwise != 0 ? -turned.sine : turned.sine);
      frame.centre_slope = scale;
      const T unit = degrees != 0 ? T(0.017453292519943295) : T(1);
      frame.angle_slope = clockwise != 0 ? -unit : unit;
      frame.rotated = 1;
    } else {
      frame.axis[0] = roi_align_axis(box[1], box[3], scale, aligned != 0, sampling_ratio, cells_y);
      frame.axis[1] = roi_align_axis(box[0], box[2], scale, aligned != 0, sampling_ratio, cells_x);
      frame.centre[0] = frame.centre[1] = T(0);
      frame.cosine = T(1);
      frame.sine = T(0);
      frame.centre_slope = frame.angle_slope = T(0);
      frame.rotated = 0;
    }
    return frame;
  }
};

}  // namespace glimpse
