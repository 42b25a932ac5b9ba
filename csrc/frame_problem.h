// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry/rotated.h"
#include "problem.h"

namespace glimpse {

/// Problem for operators on frames: all that their kernels ever see. Nothing here owns.
///
/// `chosen` turns the mean over the samples of a cell into one of them, for each channel its own:
/// what RoIAlign by the maximum becomes once the maximum is known. It counts the samples of the
/// cell's window (cell_window) row by row; -1 is a sample that reads nothing.
struct FrameProblem {
  FrameOperator op;
  Level map;  // data: read by sample, maximum and grad_boxes, written by grad_features

  int64_t batch, channels, boxes;
  int32_t out_height, out_width;
  Dtype dtype;  // as in Problem
  Layout layout;

  const void* box;  // [boxes, box_columns], the image index first unless it stands apart
  int32_t box_columns;
  const int64_t* image_index;  // [boxes] or null
  const void* tangent;         // [boxes, box_columns] or null: the motion of the boxes
  const int32_t* chosen;       // like pooled, or null: the mean

  void* pooled;     // [boxes, channels, out_height, out_width], dense in `layout`
  int32_t* winner;  // like pooled: written by maximum
  void* grad_box;   // [boxes, box_columns], written by grad_boxes
  void* stream;     // of the device; unused on the host
};

/// A box as kernels on frames read it.
template <class T>
struct FrameBox {
  int64_t image;
  bool reads;  // false: the box reads nothing
  bool moves;  // tangent weights
  T motion[kFrameColumns];
  Frame<T> frame;
  FrameReach<T> reach;  // of the whole map
};

/// Reads box k. As read_box: an image index outside the batch, or NaN, gives a box that reads
/// nothing, and fractional ones truncate toward zero.
template <class T>
GLIMPSE_HD FrameBox<T> read_frame(const FrameProblem& problem, int64_t k) {
  FrameBox<T> box;
  const T* row = static_cast<const T*>(problem.box) + k * problem.box_columns;
  const int32_t columns = problem.op.columns();
  const int32_t skip = problem.box_columns - columns;
  if (problem.image_index != nullptr) {
    box.image = problem.image_index[k];
    box.reads = box.image >= 0 && box.image < problem.batch;
  } else {
    const T index = row[0];
    box.reads = index > T(-1) && index < static_cast<T>(problem.batch);
    box.image = box.reads ? static_cast<int64_t>(index) : 0;
  }
  if (problem.map.height <= 0 || problem.map.width <= 0) box.reads = false;
  box.moves = problem.tangent != nullptr;
  const T* tangent = static_cast<const T*>(problem.tangent) + k * problem.box_columns + skip;
  for (int32_t i = 0; i < kFrameColumns; ++i) {
    box.motion[i] = box.moves && i < columns ? tangent[i] : T(0);
  }
  box.frame = problem.op.frame(row + skip, static_cast<T>(problem.map.scale), problem.out_height,
                               problem.out_width);
  box.reach = FrameReach<T>::of(box.frame, 0, problem.map.height - 1, 0, problem.map.width - 1);
  if (box.frame.axis[0].samples <= 0 || box.frame.axis[1].samples <= 0) box.reads = false;
  return box;
}

/// The samples of a cell that may be on the map: a rectangle of its grid of samples. All others
/// are dropped, so they need not be looked at.
struct CellWindow {
  SampleRange y, x;

  GLIMPSE_HD int64_t size() const { return int64_t{y.end - y.first} * (x.end - x.first); }
};

template <class T>
GLIMPSE_HD CellWindow cell_window(const FrameBox<T>& box, int32_t cell_y, int32_t cell_x) {
  return {samples_within(box.frame.axis[0], cell_y, box.reach.low[0], box.reach.high[0]),
          samples_within(box.frame.axis[1], cell_x, box.reach.low[1], box.reach.high[1])};
}

/// 1 / number of samples of a cell, which turns their sum into their mean.
template <class T>
GLIMPSE_HD T frame_factor(const Frame<T>& frame) {
  return sample_factor(frame.axis[0]) * sample_factor(frame.axis[1]);
}

/// The four weights of a sample, at (low, low), (low, high), (high, low), (high, high) of (y, x).
/// Without a second tap in a direction the weights of its `high` are 0, and so are slopes.
template <class T>
struct TapWeights {
  T value[4];

  GLIMPSE_HD static TapWeights product(const T* y, const T* x) {
    return {{y[0] * x[0], y[0] * x[1], y[1] * x[0], y[1] * x[1]}};
  }
  /// a * this + b * other
  GLIMPSE_HD static TapWeights combine(T a, const TapWeights& u, T b, const TapWeights& v) {
    return {{a * u.value[0] + b * v.value[0], a * u.value[1] + b * v.value[1],
             a * u.value[2] + b * v.value[2], a * u.value[3] + b * v.value[3]}};
  }
};

/// Weights of a sample in its pooled value, or their derivative along the motion of the box.
template <class T>
GLIMPSE_HD TapWeights<T> sample_weights(const FrameBox<T>& box, const FramePoint<T>& point,
                                        const FrameTaps<T>& taps) {
  if (!box.moves) return TapWeights<T>::product(taps.y.weight, taps.x.weight);
  const PositionSlopes<T> slopes = PositionSlopes<T>::at(box.frame, point);
  return TapWeights<T>::combine(
      slopes.motion_y(box.motion), TapWeights<T>::product(taps.y.slope, taps.x.weight),
      slopes.motion_x(box.motion), TapWeights<T>::product(taps.y.weight, taps.x.slope));
}

/// How the value of a sample follows each column of the box, from its derivatives in y, in x and
/// in both; or how that changes along the motion of the box. visit(column, slope)
template <class T, class Number, class Visit>
GLIMPSE_HD void for_each_column_slope(const FrameBox<T>& box, const FramePoint<T>& point,
                                      Number in_y, Number in_x, Number in_both,
                                      const Visit& visit) {
  const PositionSlopes<T> slopes = PositionSlopes<T>::at(box.frame, point);
  if (!box.moves) {
    visit(0, in_y * slopes.y[0] + in_x * slopes.x[0]);
    visit(1, in_y * slopes.y[1] + in_x * slopes.x[1]);
    visit(2, in_y * slopes.y[2] + in_x * slopes.x[2]);
    visit(3, in_y * slopes.y[3] + in_x * slopes.x[3]);
    visit(4, in_y * slopes.y[4] + in_x * slopes.x[4]);
    return;
  }
  const PositionSlopes<T> turned = PositionSlopes<T>::along(box.frame, point, box.motion);
  // A bilinear function bends in no direction alone.
  const Number by_y = in_both * slopes.motion_x(box.motion);
  const Number by_x = in_both * slopes.motion_y(box.motion);
  visit(0, by_y * slopes.y[0] + by_x * slopes.x[0] + in_y * turned.y[0] + in_x * turned.x[0]);
  visit(1, by_y * slopes.y[1] + by_x * slopes.x[1] + in_y * turned.y[1] + in_x * turned.x[1]);
  visit(2, by_y * slopes.y[2] + by_x * slopes.x[2] + in_y * turned.y[2] + in_x * turned.x[2]);
  visit(3, by_y * slopes.y[3] + by_x * slopes.x[3] + in_y * turned.y[3] + in_x * turned.x[3]);
  visit(4, by_y * slopes.y[4] + by_x * slopes.x[4] + in_y * turned.y[4] + in_x * turned.x[4]);
}

/// The point of sample (sample_y, sample_x) of a cell.
template <class T>
GLIMPSE_HD FramePoint<T> frame_point(const Frame<T>& frame, int32_t cell_y, int32_t sample_y,
                                     int32_t cell_x, int32_t sample_x) {
  return {frame.axis[0].position(cell_y, sample_y), frame.axis[1].position(cell_x, sample_x),
          frame.axis[0].progress(cell_y, sample_y), frame.axis[1].progress(cell_x, sample_x)};
}

/// Calls visit(point, taps) for the kept samples of a cell, row by row.
template <class T, class Visit>
GLIMPSE_HD void for_each_sample(const FrameProblem& problem, const FrameBox<T>& box, int32_t cell_y,
                                int32_t cell_x, const Visit& visit) {
  const CellWindow window = cell_window(box, cell_y, cell_x);
  for (int32_t i = window.y.first; i < window.y.end; ++i) {
    for (int32_t j = window.x.first; j < window.x.end; ++j) {
      const FramePoint<T> point = frame_point(box.frame, cell_y, i, cell_x, j);
      const FrameTaps<T> taps = FrameTaps<T>::at(box.frame, point.local_y, point.local_x,
                                                 problem.map.height, problem.map.width);
      if (taps.kept()) visit(point, taps);
    }
  }
}

/// Calls visit(point, taps) for the chosen sample of a cell, if it is kept.
template <class T, class Visit>
GLIMPSE_HD void for_chosen_sample(const FrameProblem& problem, const FrameBox<T>& box,
                                  int32_t cell_y, int32_t cell_x, int32_t chosen,
                                  const Visit& visit) {
  const CellWindow window = cell_window(box, cell_y, cell_x);
  // Nothing that a caller can put into `chosen` leads outside the cell.
  if (chosen < 0 || chosen >= window.size()) return;
  const int32_t columns = window.x.end - window.x.first;
  const int32_t i = window.y.first + chosen / columns, j = window.x.first + chosen % columns;
  const FramePoint<T> point = frame_point(box.frame, cell_y, i, cell_x, j);
  const FrameTaps<T> taps = FrameTaps<T>::at(box.frame, point.local_y, point.local_x,
                                             problem.map.height, problem.map.width);
  if (taps.kept()) visit(point, taps);
}

/// The largest sample of a cell and its number in the cell's window, found in the order of the
/// samples: the first of equals wins, and the first NaN over everything. A dropped sample is a 0.
template <class T>
struct Maximum {
  T value;
  int32_t sample;  // -1: no sample, or a dropped one
  bool any;

  GLIMPSE_HD static Maximum none() { return {T(0), -1, false}; }

  GLIMPSE_HD void take(T candidate, int32_t index) {
    // Neither less nor equal is greater, or NaN.
    if (!any || (!(candidate <= value) && value == value)) {
      value = candidate;
      sample = index;
      any = true;
    }
  }
};

/// Where dropped samples outside a window stand among those inside: before row i of the window,
/// after it, or after the last.
struct DroppedAround {
  bool before, left, right, after;

  template <class T>
  GLIMPSE_HD static DroppedAround of(const Frame<T>& frame, const CellWindow& window) {
    const bool empty = window.size() == 0;
    DroppedAround dropped;
    dropped.before = empty || window.y.first > 0;
    dropped.left = window.x.first > 0;
    dropped.right = window.x.end < frame.axis[1].samples;
    dropped.after = window.y.end < frame.axis[0].samples;
    return dropped;
  }
};

/// Calls take(index, taps) for every sample of a cell in order, with index -1 and taps without
/// pixels where it is dropped. Dropped samples in a row are visited once.
template <class T, class Take>
GLIMPSE_HD void for_each_candidate(const FrameProblem& problem, const FrameBox<T>& box,
                                   int32_t cell_y, int32_t cell_x, const Take& take) {
  const CellWindow window = cell_window(box, cell_y, cell_x);
  const DroppedAround dropped = DroppedAround::of(box.frame, window);
  const Taps<T> nothing = roi_border().taps(T(-2), 1);
  const auto drop = [&] { take(-1, FrameTaps<T>{nothing, nothing}); };
  if (dropped.before) drop();
  int32_t index = 0;
  for (int32_t i = window.y.first; i < window.y.end && window.size() > 0; ++i) {
    if (dropped.left) drop();
    for (int32_t j = window.x.first; j < window.x.end; ++j, ++index) {
      const FrameTaps<T> taps = FrameTaps<T>::at(box.frame, box.frame.axis[0].position(cell_y, i),
                                                 box.frame.axis[1].position(cell_x, j),
                                                 problem.map.height, problem.map.width);
      if (taps.kept()) {
        take(index, taps);
      } else {
        drop();
      }
    }
    if (dropped.right) drop();
  }
  if (dropped.after) drop();
}

}  // namespace glimpse
