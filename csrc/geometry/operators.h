// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/border.h"
#include "geometry/conventions.h"

namespace glimpse {

/// Directions of a window. Internals are ordered (y, x).
enum Direction : int32_t { kY = 0, kX = 1 };

/// Columns of a box, after the image column, that make the axis of one direction.
struct Columns {
  int32_t lo, hi;
};

/// RoIAlign (He et al. 2017): mean of the bilinear samples of each cell.
/// Box: x1, y1, x2, y2 in edge units of the image.
struct RoiAlign {
  int32_t sampling_ratio;  // <= 0: one sample per pixel that a cell covers, rounded up
  int32_t aligned;         // 1: box edges in edge units (detectron2); 0: the 2017 offset

  GLIMPSE_HD Border border() const { return roi_border(); }
  GLIMPSE_HD int32_t box_columns() const { return 4; }
  GLIMPSE_HD Columns columns(int32_t direction) const {
    return {direction == kY ? 1 : 0, direction == kY ? 3 : 2};
  }
  GLIMPSE_HD int32_t fixed_samples() const { return sampling_ratio > 0 ? sampling_ratio : 0; }

  template <class T>
  GLIMPSE_HD Axis<T> axis(T lo, T hi, T scale, int32_t size, int32_t cells) const {
    (void)size;
    return roi_align_axis(lo, hi, scale, aligned != 0, sampling_ratio, cells);
  }
};

/// One sample per cell of a box, or of a point: crop, crop_and_resize, point_sample.
/// Box: x1, y1, x2, y2 or y1, x1, y2, x2; point: x, y.
struct Crop {
  enum Order : int32_t { kXyxy = 0, kYxyx = 1, kPoint = 2, kOrders };
  /// What is read beyond the outer pixels.
  enum Outside : int32_t { kZeros = 0, kEdge = 1, kFill = 2, kOutsides };

  int32_t order;
  Unit unit;
  int32_t align_corners;
  int32_t outside;
  int32_t nearest;  // with kFill only
  int32_t single;   // 1: positions are rounded to float also where coordinates are double

  GLIMPSE_HD Border border() const {
    if (outside == kZeros) return zeros_border();
    if (outside == kEdge) return edge_border();
    return align_corners ? fill_border(nearest != 0) : covered_border(nearest != 0);
  }
  GLIMPSE_HD int32_t box_columns() const { return order == kPoint ? 2 : 4; }
  GLIMPSE_HD Columns columns(int32_t direction) const {
    if (order == kPoint) return {direction == kY ? 1 : 0, direction == kY ? 1 : 0};
    const int32_t lo = (direction == kY) == (order == kYxyx) ? 0 : 1;
    return {lo, lo + 2};
  }
  GLIMPSE_HD int32_t fixed_samples() const { return 1; }

  template <class T>
  GLIMPSE_HD Axis<T> axis(T lo, T hi, T scale, int32_t size, int32_t cells) const {
    (void)scale;
    if (single != 0 && sizeof(T) > sizeof(float)) {
      return rounded_once(axis_as(static_cast<float>(lo), static_cast<float>(hi), size, cells),
                          axis_as(lo, hi, size, cells));
    }
    return axis_as(lo, hi, size, cells);
  }

 private:
  template <class T>
  GLIMPSE_HD Axis<T> axis_as(T lo, T hi, int32_t size, int32_t cells) const {
    return align_corners ? corner_aligned_axis(lo, hi, unit, size, cells)
                         : half_pixel_axis(lo, hi, unit, size, cells);
  }

  /// `wide` with the places of `narrow`.
  template <class T>
  GLIMPSE_HD static Axis<T> rounded_once(const Axis<float>& narrow, Axis<T> wide) {
    wide.origin = static_cast<T>(narrow.origin);
    wide.step = static_cast<T>(narrow.step);
    wide.samples = narrow.samples;
    wide.single = 1;
    return wide;
  }
};

/// extract_glimpse with the fraction of its origin: one sample per pixel of the window, or the mean
/// over scale x scale of them. Or without it, as TensorFlow has it: one pixel per cell, which is
/// what the derivatives of the copy are made of.
/// Box: the offset y, x; where the scale is 0, a third number is the scale.
struct Glimpse {
  /// How the origin becomes whole: not at all, truncated, or truncated after float arithmetic.
  enum Whole : int32_t { kFraction = 0, kTruncated = 1, kTruncatedSingle = 2, kWholes };

  GlimpseRule rule;
  int32_t scale;
  int32_t whole;

  // A whole position reads its own pixel only: no neighbour enters, not even with a weight of 0.
  GLIMPSE_HD Border border() const {
    return whole == kFraction ? zeros_border() : fill_border(false);
  }
  GLIMPSE_HD int32_t box_columns() const { return scale > 0 ? 2 : 3; }
  GLIMPSE_HD Columns columns(int32_t direction) const {
    const int32_t lo = direction == kY ? 0 : 1;
    return {lo, scale > 0 ? lo : 2};
  }
  GLIMPSE_HD int32_t fixed_samples() const { return scale; }

  template <class T>
  GLIMPSE_HD Axis<T> axis(T lo, T hi, T spatial_scale, int32_t size, int32_t cells) const {
    (void)spatial_scale;
    if (whole != kFraction) {
      return whole_glimpse_axis(lo, rule, whole == kTruncatedSingle, size, cells);
    }
    const int32_t pixels = scale > 0 ? scale : ceil_to_count(hi);
    return glimpse_axis(lo, rule, pixels, size, cells);
  }
};

/// Axes as they are, one sample per cell, zeros outside: what paste_masks reads of a mask.
/// Box: origin y, origin x, step y, step x, in pixels.
struct GivenAxes {
  GLIMPSE_HD Border border() const { return zeros_border(); }
  GLIMPSE_HD int32_t box_columns() const { return 4; }
  GLIMPSE_HD Columns columns(int32_t direction) const { return {direction, direction + 2}; }
  GLIMPSE_HD int32_t fixed_samples() const { return 1; }

  template <class T>
  GLIMPSE_HD Axis<T> axis(T lo, T hi, T scale, int32_t size, int32_t cells) const {
    (void)scale, (void)size, (void)cells;
    Axis<T> axis = detail::sampled_once(Rounded<T>(lo), Rounded<T>(hi), T(0));
    axis.origin_lo = axis.step_hi = T(1);
    return axis;
  }
};

/// Any separable operator: the one argument through which kernels learn what they compute.
/// Adding an operator adds a struct like those above, a kind, a member, and a line to `visit`;
/// kernels stay as they are.
struct Operator {
  enum Kind : int32_t { kRoiAlign = 0, kCrop = 1, kGlimpse = 2, kGivenAxes = 3, kKinds };

  int32_t kind;
  Border border;
  union {
    RoiAlign roi_align;
    Crop crop;
    Glimpse glimpse;
    GivenAxes given_axes;
  };

  GLIMPSE_HD Operator() : kind(kRoiAlign), border(roi_border()), roi_align{} {}
  GLIMPSE_HD explicit Operator(const RoiAlign& op)
      : kind(kRoiAlign), border(op.border()), roi_align(op) {}
  GLIMPSE_HD explicit Operator(const Crop& op) : kind(kCrop), border(op.border()), crop(op) {}
  GLIMPSE_HD explicit Operator(const Glimpse& op)
      : kind(kGlimpse), border(op.border()), glimpse(op) {}
  GLIMPSE_HD explicit Operator(const GivenAxes& op)
      : kind(kGivenAxes), border(op.border()), given_axes(op) {}

  /// Calls function(op) with the struct of the kind.
  template <class Function>
  GLIMPSE_HD auto visit(const Function& function) const {
    switch (kind) {
      case kCrop:
        return function(crop);
      case kGlimpse:
        return function(glimpse);
      case kGivenAxes:
        return function(given_axes);
      default:
        return function(roi_align);
    }
  }

  template <class T>
  GLIMPSE_HD Axis<T> axis(int32_t direction, const T* box, T scale, int32_t size,
                          int32_t cells) const {
    return visit([&](const auto& op) {
      const Columns columns = op.columns(direction);
      return op.axis(box[columns.lo], box[columns.hi], scale, size, cells);
    });
  }

  /// Samples of every cell where they do not depend on the box, else 0. Tables are sized by it.
  GLIMPSE_HD int32_t fixed_samples() const {
    return visit([](const auto& op) { return op.fixed_samples(); });
  }

  /// Columns of a box, not counting an image column.
  GLIMPSE_HD int32_t box_columns() const {
    return visit([](const auto& op) { return op.box_columns(); });
  }

  /// Columns of the two box edges that make an axis, counted after the image column. They are one
  /// where a single number makes the axis.
  GLIMPSE_HD int32_t lo_column(int32_t direction) const {
    return visit([&](const auto& op) { return op.columns(direction).lo; });
  }
  GLIMPSE_HD int32_t hi_column(int32_t direction) const {
    return visit([&](const auto& op) { return op.columns(direction).hi; });
  }

  template <class T>
  GLIMPSE_HD Taps<T> taps(T position, int32_t size) const {
    return border.taps(position, size);
  }
  template <class T>
  GLIMPSE_HD T reach_low(int32_t first) const {
    return border.reach_low<T>(first);
  }
  template <class T>
  GLIMPSE_HD T reach_high(int32_t last, int32_t size) const {
    return border.reach_high<T>(last, size);
  }
};

}  // namespace glimpse
