// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "problem.h"

namespace glimpse {

/// An image [channels, height, width]. Strides are in elements.
struct BatchImage {
  const void* data;
  int64_t stride_c, stride_h, stride_w;
  int32_t height, width;
};

/// Boxes of images, resized by a filter, scaled and converted. What is read of which image is a
/// Problem, of which `pooled` is the result, in `layout` whatever that of the images, and `dtype`
/// the type of the images.
struct BatchProblem {
  Problem problem;
  /// [problem.batch] images of their own sizes, in host memory; null: those of level 0. Then that
  /// is a map of one pixel which is not read.
  const BatchImage* list;
  Dtype result;  // a float type
  double fill;   // pixels outside the image, where its edge does not stand in for them
  /// [problem.channels] in host memory: result = value * multiplier + offset.
  const double* multiplier;
  const double* offset;

  template <class T>
  BatchImage image(int64_t n) const {
    if (list != nullptr) return list[n];
    const Level& level = problem.level[0];
    return {static_cast<const T*>(level.data) + n * level.stride_n,
            level.stride_c,
            level.stride_h,
            level.stride_w,
            level.height,
            level.width};
  }
};

}  // namespace glimpse
