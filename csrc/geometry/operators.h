// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/border.h"
#include "geometry/conventions.h"

namespace glimpse {

/// Directions of a window. Internals are ordered (y, x).
enum Direction : int32_t { kY = 0, kX = 1 };

/// RoIAlign (He et al. 2017): mean of the bilinear samples of each cell.
/// Box: x1, y1, x2, y2 in edge units of the image.
struct RoiAlign {
  using Border = RoiBorder;
  int32_t sampling_ratio;  // <= 0: one sample per pixel that a cell covers, rounded up
  int32_t aligned;         // 1: box edges in edge units (detectron2); 0: the 2017 offset

  GLIMPSE_HD static int32_t lo_column(int32_t direction) { return direction == kY ? 1 : 0; }
  GLIMPSE_HD static int32_t hi_column(int32_t direction) { return direction == kY ? 3 : 2; }

  template <class T>
  GLIMPSE_HD Axis<T> axis(int32_t direction, const T* box, T scale, int32_t cells) const {
    return roi_align_axis(box[lo_column(direction)], box[hi_column(direction)], scale, aligned != 0,
                          sampling_ratio, cells);
  }
};

/// Any separable operator: the one argument through which kernels learn what they compute.
/// Adding an operator adds a struct like RoiAlign above, a kind, a member, and a case to each
/// function below; kernels stay as they are.
struct Operator {
  enum Kind : int32_t { kRoiAlign = 0, kKinds };

  int32_t kind;
  RoiAlign roi_align;

  template <class T>
  GLIMPSE_HD Axis<T> axis(int32_t direction, const T* box, T scale, int32_t size,
                          int32_t cells) const {
    (void)size;
    return roi_align.axis(direction, box, scale, cells);
  }

  /// Samples of every cell where they do not depend on the box, else 0. Tables are sized by it.
  GLIMPSE_HD int32_t fixed_samples() const {
    return roi_align.sampling_ratio > 0 ? roi_align.sampling_ratio : 0;
  }

  /// Columns of the two box edges that make an axis, counted after the image column.
  GLIMPSE_HD int32_t lo_column(int32_t direction) const { return RoiAlign::lo_column(direction); }
  GLIMPSE_HD int32_t hi_column(int32_t direction) const { return RoiAlign::hi_column(direction); }

  template <class T>
  GLIMPSE_HD Taps<T> taps(T position, int32_t size) const {
    return RoiBorder::taps(position, size);
  }
  template <class T>
  GLIMPSE_HD T reach_low(int32_t first) const {
    return RoiBorder::reach_low<T>(first);
  }
  template <class T>
  GLIMPSE_HD T reach_high(int32_t last, int32_t size) const {
    return RoiBorder::reach_high<T>(last, size);
  }
};

}  // namespace glimpse
