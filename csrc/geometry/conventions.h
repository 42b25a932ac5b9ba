// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/axis.h"

namespace glimpse {

/// RoIAlign (He et al. 2017), numbers and order of arithmetic of torchvision.
///
/// `lo`, `hi` are box edges in edge units of the image; `scale` takes them to the feature map.
/// aligned: edges stay edges (index = edge - 1/2). Otherwise they are read as index units, half a
/// pixel late, and an extent under one pixel becomes one pixel from `lo`. A sampling ratio of 0
/// or less is adaptive: one sample per pixel that a cell covers, rounded up.
///
///      0           1           2           3           4  edge units
///      |-----x-----|-----x-----|-----x-----|-----x-----|
///                     o     o     o     o                 aligned, box 1..3, 4 cells, 1 sample
///                           o     o     o     o           legacy
template <class T>
GLIMPSE_HD Axis<T> roi_align_axis(T lo, T hi, T scale, bool aligned, int32_t sampling_ratio,
                                  int32_t cells) {
  using R = Rounded<T>;
  const R offset(aligned ? T(0.5) : T(0));
  const R start = R(lo) * R(scale) - offset;
  const R end = R(hi) * R(scale) - offset;
  R extent = end - start;
  const bool clamped = !aligned && extent.value < T(1);
  if (clamped) extent = R(T(1));
  const R step = extent / R(cells);

  Axis<T> axis;
  axis.origin = start.value;
  axis.step = step.value;
  axis.phase = T(0.5);
  axis.samples = sampling_ratio > 0 ? sampling_ratio : ceil_to_count(step.value);
  const T step_slope = clamped ? T(0) : (R(scale) / R(cells)).value;
  axis.origin_lo = scale;
  axis.origin_hi = T(0);
  axis.step_lo = -step_slope;
  axis.step_hi = step_slope;
  return axis;
}

}  // namespace glimpse
