// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/operators.h"

namespace glimpse {

// Note [Tables]
// Every operator here is separable: out = Ay * image * Ax^T, one short row of weights per cell and
// axis, shared by all channels. A row holds the merged taps of the samples of its cell, divided by
// their number. Building rows is scalar and branchy and happens once per box; applying them is hot
// and knows no coordinate. The same rows are read forwards, transposed (gradient to the image) and
// by slope (gradient to the box).

/// Which number of a tap an application uses. `kTangent` is the derivative of the weight along a
/// given direction of the box edges, which is how every derivative in the box is computed without
/// a kernel of its own.
template <class T>
struct Weighting {
  bool tangent;
  T origin_tangent, step_tangent;  // motion of the axis under the motion of the box

  GLIMPSE_HD static Weighting value() { return {false, T(0), T(0)}; }

  /// Motion of `axis` when its box edges move by lo_tangent and hi_tangent.
  GLIMPSE_HD static Weighting along(const Axis<T>& axis, T lo_tangent, T hi_tangent) {
    using R = Rounded<T>;
    return {true, (R(axis.origin_lo) * R(lo_tangent) + R(axis.origin_hi) * R(hi_tangent)).value,
            (R(axis.step_lo) * R(lo_tangent) + R(axis.step_hi) * R(hi_tangent)).value};
  }

  GLIMPSE_HD T operator()(T weight, T slope, T progress) const {
    using R = Rounded<T>;
    if (!tangent) return weight;
    return (R(slope) * (R(origin_tangent) + R(progress) * R(step_tangent))).value;
  }

  /// The same from both slopes.
  GLIMPSE_HD T of(T weight, T slope_origin, T slope_step) const {
    using R = Rounded<T>;
    if (!tangent) return weight;
    return (R(slope_origin) * R(origin_tangent) + R(slope_step) * R(step_tangent)).value;
  }
};

/// Samples first <= i < end of a cell.
struct SampleRange {
  int32_t first, end;
};

namespace detail {

/// The first sample whose position passes `bound` (>= if inclusive, > otherwise) when walking in
/// the direction in which positions grow. Positions are monotone in the sample index because each
/// rounding is, so this is exact for any box and costs 31 steps at most.
template <class T>
GLIMPSE_HD int32_t first_beyond(const Axis<T>& axis, int32_t cell, T bound, bool inclusive,
                                bool growing) {
  int32_t low = 0, high = axis.samples;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const int32_t sample = growing ? middle : axis.samples - 1 - middle;
    const T position = axis.position(cell, sample);
    if (inclusive ? position >= bound : position > bound) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace detail

/// The samples of a cell whose taps can touch the pixels first_pixel..last_pixel. May hold others
/// where samples are few; never misses one. This is what bounds the work of a 1e9-pixel box.
template <class T>
GLIMPSE_HD SampleRange sample_range(const Operator& op, const Axis<T>& axis, int32_t cell,
                                    int32_t first_pixel, int32_t last_pixel, int32_t size) {
  constexpr int32_t kFew = 8;
  if (axis.samples <= kFew) return {0, axis.samples};
  const T low = op.reach_low<T>(first_pixel);
  const T high = op.reach_high<T>(last_pixel, size);
  const bool growing = !(axis.step < 0);
  const int32_t begin = detail::first_beyond(axis, cell, low, true, growing);
  const int32_t end = detail::first_beyond(axis, cell, high, false, growing);
  if (!(begin < end)) return {0, 0};
  if (growing) return {begin, end};
  return {axis.samples - end, axis.samples - begin};
}

/// 1 / samples, the factor that turns the sum over samples into their mean along one axis.
template <class T>
GLIMPSE_HD T sample_factor(const Axis<T>& axis) {
  using R = Rounded<T>;
  return axis.samples > 0 ? (R(T(1)) / R(axis.samples)).value : T(0);
}

/// Calls visit(pixel, weight, slope, progress) for each tap of each sample of a cell that can touch
/// first_pixel..last_pixel, in sample order, taps ascending. Weights are not yet divided by the
/// number of samples. Callers that tile must ignore pixels outside their tile.
template <class T, class Visit>
GLIMPSE_HD void for_each_tap(const Operator& op, const Axis<T>& axis, int32_t cell,
                             int32_t first_pixel, int32_t last_pixel, int32_t size,
                             const Visit& visit) {
  const SampleRange range = sample_range(op, axis, cell, first_pixel, last_pixel, size);
  for (int32_t sample = range.first; sample < range.end; ++sample) {
    const Taps<T> taps = op.taps(axis.position(cell, sample), size);
    if (taps.count == 0) continue;
    const T progress = axis.progress(cell, sample);
    visit(taps.pixel[0], taps.weight[0], taps.slope[0], progress);
    if (taps.count == 2) visit(taps.pixel[1], taps.weight[1], taps.slope[1], progress);
  }
}

/// An upper bound of the number of merged taps of a cell, from its first and last kept sample.
/// Rows of neighbouring cells overlap by two pixels, so all rows of an axis together hold about
/// min(2 * samples * cells, size + 2 * cells) taps.
template <class T>
GLIMPSE_HD int32_t row_capacity(const Operator& op, const Axis<T>& axis, int32_t cell,
                                int32_t size) {
  SampleRange range = sample_range(op, axis, cell, 0, size - 1, size);
  Taps<T> first, last;
  first.count = last.count = 0;
  while (range.first < range.end) {
    first = op.taps(axis.position(cell, range.first), size);
    if (first.count != 0) break;
    ++range.first;
  }
  while (range.end > range.first) {
    last = op.taps(axis.position(cell, range.end - 1), size);
    if (last.count != 0) break;
    --range.end;
  }
  if (range.first >= range.end) return 0;
  const int32_t low = first.pixel[0] < last.pixel[0] ? first.pixel[0] : last.pixel[0];
  // Not pixel[count - 1]: an index that the compiler cannot know puts the taps on the device's
  // stack.
  const int32_t first_high = first.count == 2 ? first.pixel[1] : first.pixel[0];
  const int32_t last_high = last.count == 2 ? last.pixel[1] : last.pixel[0];
  const int32_t high = first_high > last_high ? first_high : last_high;
  const int32_t run = high - low + 1;
  const int32_t kept = range.end - range.first;
  return kept < run / 2 ? 2 * kept : run;
}

/// Builds the merged row of a cell in `row`, which offers
///   int32_t size(); int32_t pixel(i); void add(i, weight, slope_origin, slope_step);
///   void push(pixel, weight, slope_origin, slope_step); void scale(i, factor);
/// and must have room for row_capacity() taps. slope_origin and slope_step are d weight / d origin
/// and d weight / d step; in the tangent weighting the weight is the directional derivative.
template <class T, class Row>
GLIMPSE_HD void build_row(const Operator& op, const Axis<T>& axis, const Weighting<T>& weighting,
                          int32_t cell, int32_t size, Row& row) {
  using R = Rounded<T>;
  for_each_tap(op, axis, cell, 0, size - 1, size,
               [&](int32_t pixel, T weight, T slope, T progress) {
                 const T used = weighting(weight, slope, progress);
                 const T slope_step = (R(slope) * R(progress)).value;
                 // Positions are monotone, so only the last three taps can be met again: three
                 // because a descending row appends low before high.
                 const int32_t count = row.size();
                 for (int32_t i = count - 1; i >= 0 && i >= count - 3; --i) {
                   if (row.pixel(i) == pixel) {
                     row.add(i, used, slope, slope_step);
                     return;
                   }
                 }
                 row.push(pixel, used, slope, slope_step);
               });
  const T factor = sample_factor(axis);
  for (int32_t i = 0; i < row.size(); ++i) row.scale(i, factor);
}

/// Cells first <= i < end, or none.
struct alignas(8) Cells {
  int32_t first, end;
};

/// The cells of an axis, among `cells`, that can touch the pixels first_pixel .. last_pixel, and
/// maybe some more. Positions are monotone, so the cells before and behind them are found by
/// bisection.
template <class T>
GLIMPSE_HD Cells cells_reaching(const Operator& op, const Axis<T>& axis, Cells cells,
                                int32_t first_pixel, int32_t last_pixel, int32_t size) {
  const T low = op.reach_low<T>(first_pixel);
  const T high = op.reach_high<T>(last_pixel, size);
  const bool growing = !(axis.step < 0);
  Cells reached;
  for (int32_t side = 0; side < 2; ++side) {
    // Of each cell, the sample that is the last to leave on this side.
    const int32_t sample = side == 0 ? axis.samples - 1 : 0;
    int32_t begin = side == 0 ? cells.first : reached.first, end = cells.end;
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      const T position = axis.position(middle, sample);
      // side 0: the first cell that is not wholly before; side 1: the first one wholly behind.
      const bool beyond = side == 0 ? (growing ? position >= low : position <= high)
                                    : (growing ? position > high : position < low);
      if (beyond) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    (side == 0 ? reached.first : reached.end) = begin;
  }
  return reached;
}

}  // namespace glimpse
