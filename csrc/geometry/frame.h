// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/border.h"
#include "geometry/tables.h"

namespace glimpse {

/// Where the samples of a box fall when its axes are not those of the map: two local axes about a
/// centre, turned by an angle. Directions are ordered (y, x), positions are in index units.
///
///   Y = y*cosine - x*sine + centre_y         X = y*sine + x*cosine + centre_x
///
///                 x'                 cosine = 1, sine = 0 and centre = 0 leave local positions as
///            o  o                    they are, to the bit, so that an axis-aligned operator can
///         o  o                       run on the same kernels.
///      o  o  |
///        y'  centre
///
/// Not separable: the taps of a sample need both of its local positions. A derivative along a
/// motion of the box is again a weight for each tap (tap_weights), and so is the second one.
template <class T>
struct Frame {
  Axis<T> axis[2];  // local; their `lo` and `hi` are the columns that an operator says
  T centre[2];
  T cosine, sine;
  T centre_slope;   // d centre / d its column
  T angle_slope;    // d angle / d its column, in radians
  int32_t rotated;  // columns: 0: x1, y1, x2, y2; 1: centre x, centre y, width, height, angle

  GLIMPSE_HD T position_y(T y, T x) const {
    using R = Rounded<T>;
    return (R(y) * R(cosine) - R(x) * R(sine) + R(centre[0])).value;
  }
  GLIMPSE_HD T position_x(T y, T x) const {
    using R = Rounded<T>;
    return (R(y) * R(sine) + R(x) * R(cosine) + R(centre[1])).value;
  }
};

/// Columns of a box after its image index, at most.
constexpr int32_t kFrameColumns = 5;

/// A sample of a frame: its local positions and how far along each axis it is.
template <class T>
struct FramePoint {
  T local_y, local_x;
  T progress_y, progress_x;
};

/// d position / d each column of the box.
template <class T>
struct PositionSlopes {
  T y[kFrameColumns], x[kFrameColumns];

  GLIMPSE_HD static PositionSlopes at(const Frame<T>& frame, const FramePoint<T>& point) {
    const Axis<T>& along_y = frame.axis[0];
    const Axis<T>& along_x = frame.axis[1];
    const T high_y = along_y.origin_hi + point.progress_y * along_y.step_hi;
    const T high_x = along_x.origin_hi + point.progress_x * along_x.step_hi;
    PositionSlopes slopes;
    if (frame.rotated != 0) {
      const T turned_y = point.local_y * frame.cosine - point.local_x * frame.sine;
      const T turned_x = point.local_y * frame.sine + point.local_x * frame.cosine;
      slopes.y[0] = T(0);
      slopes.x[0] = frame.centre_slope;
      slopes.y[1] = frame.centre_slope;
      slopes.x[1] = T(0);
      slopes.y[2] = -frame.sine * high_x;
      slopes.x[2] = frame.cosine * high_x;
      slopes.y[3] = frame.cosine * high_y;
      slopes.x[3] = frame.sine * high_y;
      slopes.y[4] = -frame.angle_slope * turned_x;
      slopes.x[4] = frame.angle_slope * turned_y;
    } else {
      slopes.y[0] = slopes.y[2] = slopes.x[1] = slopes.x[3] = slopes.y[4] = slopes.x[4] = T(0);
      slopes.x[0] = along_x.origin_lo + point.progress_x * along_x.step_lo;
      slopes.y[1] = along_y.origin_lo + point.progress_y * along_y.step_lo;
      slopes.x[2] = high_x;
      slopes.y[3] = high_y;
    }
    return slopes;
  }

  /// The derivative of at() along a motion of the box: zero but where something turns.
  GLIMPSE_HD static PositionSlopes along(const Frame<T>& frame, const FramePoint<T>& point,
                                         const T* motion) {
    PositionSlopes slopes;
    for (int32_t i = 0; i < kFrameColumns; ++i) slopes.y[i] = slopes.x[i] = T(0);
    if (frame.rotated == 0) return slopes;
    const Axis<T>& along_y = frame.axis[0];
    const Axis<T>& along_x = frame.axis[1];
    const T high_y = along_y.origin_hi + point.progress_y * along_y.step_hi;
    const T high_x = along_x.origin_hi + point.progress_x * along_x.step_hi;
    const T turn = frame.angle_slope * motion[4];
    const T turned_y = point.local_y * frame.cosine - point.local_x * frame.sine;
    const T turned_x = point.local_y * frame.sine + point.local_x * frame.cosine;
    const T moved_y = high_y * motion[3];
    const T moved_x = high_x * motion[2];
    slopes.y[2] = -turn * frame.cosine * high_x;
    slopes.x[2] = -turn * frame.sine * high_x;
    slopes.y[3] = -turn * frame.sine * high_y;
    slopes.x[3] = turn * frame.cosine * high_y;
    slopes.y[4] =
        -frame.angle_slope * (moved_y * frame.sine + moved_x * frame.cosine + turn * turned_y);
    slopes.x[4] =
        frame.angle_slope * (moved_y * frame.cosine - moved_x * frame.sine - turn * turned_x);
    return slopes;
  }

  /// How the position moves with the box.
  GLIMPSE_HD T motion_y(const T* motion) const { return dot(y, motion); }
  GLIMPSE_HD T motion_x(const T* motion) const { return dot(x, motion); }

 private:
  GLIMPSE_HD static T dot(const T* slope, const T* motion) {
    return slope[0] * motion[0] + slope[1] * motion[1] + slope[2] * motion[2] +
           slope[3] * motion[3] + slope[4] * motion[4];
  }
};

/// What a sample reads: the taps of both directions. `count` 0: dropped.
template <class T>
struct FrameTaps {
  Taps<T> y, x;

  GLIMPSE_HD static FrameTaps at(const Frame<T>& frame, T local_y, T local_x, int32_t height,
                                 int32_t width) {
    FrameTaps taps;
    taps.y = roi_border().taps(frame.position_y(local_y, local_x), height);
    taps.x = roi_border().taps(frame.position_x(local_y, local_x), width);
    return taps;
  }
  GLIMPSE_HD bool kept() const { return y.count > 0 && x.count > 0; }
};

/// Local positions that may lie on the map, as an interval of each axis.
template <class T>
struct FrameReach {
  T low[2], high[2];

  /// Of the positions whose taps can touch the pixels first..last of each direction: the turned
  /// rectangle, and what rounding may add to it. Never too small. NaN where a position cannot be
  /// on the map at all.
  GLIMPSE_HD static FrameReach of(const Frame<T>& frame, int32_t first_y, int32_t last_y,
                                  int32_t first_x, int32_t last_x) {
    using R = Rounded<T>;
    const R y0 = R(roi_border().reach_low<T>(first_y)) - R(frame.centre[0]);
    const R y1 = R(roi_border().reach_high<T>(last_y, last_y + 1)) - R(frame.centre[0]);
    const R x0 = R(roi_border().reach_low<T>(first_x)) - R(frame.centre[1]);
    const R x1 = R(roi_border().reach_high<T>(last_x, last_x + 1)) - R(frame.centre[1]);
    const R largest(larger(larger(magnitude(y0.value), magnitude(y1.value)),
                           larger(magnitude(x0.value), magnitude(x1.value))));
    const R margin = largest * R(sizeof(T) == 8 ? T(1e-14) : T(4e-6));
    const R c(frame.cosine), s(frame.sine), minus_s(-frame.sine);
    FrameReach reach;
    span(c * y0, c * y1, s * x0, s * x1, margin, &reach.low[0], &reach.high[0]);
    span(minus_s * y0, minus_s * y1, c * x0, c * x1, margin, &reach.low[1], &reach.high[1]);
    return reach;
  }

 private:
  GLIMPSE_HD static T magnitude(T v) { return v < 0 ? -v : v; }
  GLIMPSE_HD static T larger(T a, T b) { return a < b ? b : a; }
  GLIMPSE_HD static void span(Rounded<T> a, Rounded<T> b, Rounded<T> c, Rounded<T> d,
                              Rounded<T> margin, T* low, T* high) {
    const bool ab = a.value < b.value, cd = c.value < d.value;
    *low = ((ab ? a : b) + (cd ? c : d) - margin).value;
    *high = ((ab ? b : a) + (cd ? d : c) + margin).value;
  }
};

/// The samples of a cell whose local position may lie in [low, high]; all of them where they are
/// few. This is what bounds the work of a 1e9-pixel box.
template <class T>
GLIMPSE_HD SampleRange samples_within(const Axis<T>& axis, int32_t cell, T low, T high) {
  constexpr int32_t kFew = 8;
  if (axis.samples <= kFew) return {0, axis.samples};
  const bool growing = !(axis.step < 0);
  const int32_t begin = detail::first_beyond(axis, cell, low, true, growing);
  const int32_t end = detail::first_beyond(axis, cell, high, false, growing);
  if (!(begin < end)) return {0, 0};
  if (growing) return {begin, end};
  return {axis.samples - end, axis.samples - begin};
}

/// Cells first <= i < end of an axis.
struct CellRange {
  int32_t first, end;
};

/// Whether a sample may lie in [low, high]. Never false where one does; divides by nothing.
template <class T>
GLIMPSE_HD bool may_reach(const Axis<T>& axis, int32_t cells, T low, T high) {
  const T begin = axis.origin, end = axis.origin + static_cast<T>(cells) * axis.step;
  const T margin = axis.step < 0 ? -axis.step : axis.step;
  const bool below = (begin < end ? end : begin) + margin < low;
  const bool above = (begin < end ? begin : end) - margin > high;
  return !(below || above);
}

/// The cells of which a sample may lie in [low, high]: at most one too many at either end.
template <class T>
GLIMPSE_HD CellRange cells_within(const Axis<T>& axis, int32_t cells, T low, T high) {
  if (axis.samples <= 0 || !(low <= high)) return {0, 0};
  const T a = (low - axis.origin) / axis.step, b = (high - axis.origin) / axis.step;
  const T first = (a < b ? a : b) - T(1), end = (a < b ? b : a) + T(2);
  // A cell without width holds all of its samples in one place, in reach or not.
  if (!(first <= end)) return {0, cells};
  CellRange range{0, cells};
  if (first > T(0))
    range.first = first < static_cast<T>(cells) ? static_cast<int32_t>(first) : cells;
  if (end < static_cast<T>(cells)) range.end = end > T(0) ? static_cast<int32_t>(end) : 0;
  return range;
}

}  // namespace glimpse
