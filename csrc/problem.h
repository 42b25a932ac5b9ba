// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry/filter.h"
#include "geometry/operators.h"
#include "geometry/pyramid.h"
#include "geometry/tables.h"

namespace glimpse {

constexpr int32_t kMaxLevels = 8;

/// Storage types of features. Sums and coordinates are double for kFloat64 and float for all
/// others.
enum class Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8 };

/// Which stride of features and pooled values is 1: the one along x, or the one along channels.
enum class Layout : int32_t { kNchw, kNhwc };

/// One feature map of [batch, channels, height, width]. Strides are in elements.
struct Level {
  void* data;  // read by sample and grad_boxes, written by grad_features
  int64_t stride_n, stride_c, stride_h, stride_w;
  int32_t height, width;
  double scale;  // box coordinates times scale are feature coordinates
};

/// Sizes, strides and raw pointers of one call: all that a kernel ever sees. Nothing here owns.
/// Box numbers are float, or double where dtype is kFloat64.
struct Problem {
  Operator op;

  int32_t levels;
  Level level[kMaxLevels];
  LevelRule level_rule;      // used when levels > 1 and box_level is null
  const int64_t* box_level;  // [boxes] or null; outside [0, levels): the box reads nothing

  int64_t batch, channels, boxes;
  int32_t out_height, out_width;
  Dtype dtype;  // of features and their gradients; pooled values too, but float for kUInt8
  Layout layout;

  const void* box;             // [boxes, box_columns]
  int32_t box_columns;         // of the operator, and one more where image_column is set
  int32_t image_column;        // 1: column 0 is the image index; 0: no such column
  const int64_t* image_index;  // [boxes], or null where there is a column or a rule
  int64_t boxes_per_image;     // the rule without either: box k reads image k / boxes_per_image
  const void* tangent;         // [boxes, box_columns] or null: the motion of the boxes
  int32_t tangent_axes;        // bit 1 << direction: that axis uses tangent weights
  FilterRule filter;           // where `used`, cells weigh pixels: Note [Filters]

  double fill;  // pooled value of cells that keep no sample, and of boxes that read nothing

  void* pooled;  // [boxes, channels, out_height, out_width], dense in `layout`; written by
                 // sample, read by the gradients
  // Where `strided`, which is for backends that say so, the gradients of points read them as
  // [images, channels, points] with these strides instead.
  int32_t strided;
  int64_t pooled_stride[3];
  void* grad_box;   // [boxes, box_columns], written by grad_boxes
  void* workspace;  // as many bytes as the backend asked for
  void* stream;     // of the device; unused on the host
};

/// A box as kernels read it. `level` is -1 where the box reads nothing.
template <class T>
struct Box {
  int64_t image;
  int32_t level;
  const T* edges;    // after the image column
  const T* tangent;  // same columns, or null
};

/// Reads box k. An image index outside the batch (or NaN) gives level -1, so such a row is all
/// fill and nothing is read for it. Fractional indices truncate toward zero.
template <class T>
GLIMPSE_HD Box<T> read_box(const Problem& problem, int64_t k) {
  Box<T> box;
  const T* row = static_cast<const T*>(problem.box) + k * problem.box_columns;
  const int32_t skip = problem.image_column;
  box.edges = row + skip;
  box.tangent = problem.tangent == nullptr
                    ? nullptr
                    : static_cast<const T*>(problem.tangent) + k * problem.box_columns + skip;
  bool valid;
  if (problem.image_index != nullptr) {
    box.image = problem.image_index[k];
    valid = box.image >= 0 && box.image < problem.batch;
  } else if (skip == 0) {
    box.image = k / problem.boxes_per_image;
    valid = box.image < problem.batch;
  } else {
    const T index = row[0];
    valid = index > T(-1) && index < static_cast<T>(problem.batch);
    box.image = valid ? static_cast<int64_t>(index) : 0;
  }
  if (problem.box_level != nullptr) {
    const int64_t level = problem.box_level[k];
    box.level = level >= 0 && level < problem.levels ? static_cast<int32_t>(level) : -1;
  } else {
    box.level = problem.levels == 1 ? 0 : assign_level(problem.level_rule, box.edges);
  }
  if (!valid) box.level = -1;
  if (box.level >= 0) {
    const Level& level = problem.level[box.level];
    if (level.height <= 0 || level.width <= 0) box.level = -1;  // no pixel to read
  }
  return box;
}

/// The axis of a box along `direction`, with the weighting that the call asks for.
template <class T>
struct BoxAxis {
  Axis<T> axis;
  Weighting<T> weighting;
  int32_t size;   // pixels
  int32_t cells;  // outputs
};

template <class T>
GLIMPSE_HD BoxAxis<T> box_axis(const Problem& problem, const Box<T>& box, int32_t direction) {
  const Level& level = problem.level[box.level];
  BoxAxis<T> result;
  result.size = direction == kY ? level.height : level.width;
  result.cells = direction == kY ? problem.out_height : problem.out_width;
  result.axis =
      problem.op.axis(direction, box.edges, static_cast<T>(level.scale), result.size, result.cells);
  const bool tangent = (problem.tangent_axes >> direction & 1) != 0;
  result.weighting =
      tangent ? Weighting<T>::along(result.axis, box.tangent[problem.op.lo_column(direction)],
                                    box.tangent[problem.op.hi_column(direction)])
              : Weighting<T>::value();
  return result;
}

/// The same where cells weigh pixels.
template <class T>
GLIMPSE_HD FilterLine filter_line(const Problem& problem, const Box<T>& box, int32_t direction,
                                  int32_t size) {
  return FilterLine::of(problem.filter,
                        static_cast<double>(box.edges[problem.op.lo_column(direction)]),
                        static_cast<double>(box.edges[problem.op.hi_column(direction)]), size,
                        direction == kY ? problem.out_height : problem.out_width);
}

}  // namespace glimpse
