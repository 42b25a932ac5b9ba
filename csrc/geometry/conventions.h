// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>
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
  axis.single = 0;
  axis.samples = sampling_ratio > 0 ? sampling_ratio : ceil_to_count(step.value);
  const T step_slope = clamped ? T(0) : (R(scale) / R(cells)).value;
  axis.origin_lo = scale;
  axis.origin_hi = T(0);
  axis.step_lo = -step_slope;
  axis.step_hi = step_slope;
  return axis;
}

namespace detail {

template <class T>
GLIMPSE_HD bool is_finite(T v) {
  return v - v == 0;
}

/// v, or 0 where it is subnormal in float: TensorFlow computes with subnormals flushed to zero, and
/// a box that starts at -1e-40 starts inside.
template <class T>
GLIMPSE_HD T flushed(T v) {
  constexpr T kSmallest = static_cast<T>(1.17549435e-38f);
  return sizeof(T) == sizeof(float) && v < kSmallest && v > -kSmallest ? T(0) : v;
}

/// An axis of one sample per cell. One that is not finite reads nothing.
template <class T>
GLIMPSE_HD Axis<T> sampled_once(Rounded<T> origin, Rounded<T> step, T phase) {
  Axis<T> axis;
  axis.origin = origin.value;
  axis.step = step.value;
  axis.phase = phase;
  axis.samples = is_finite(origin.value) && is_finite(step.value) ? 1 : 0;
  axis.origin_lo = axis.origin_hi = axis.step_lo = axis.step_hi = T(0);
  axis.single = 0;
  return axis;
}

}  // namespace detail

/// What the numbers of a box mean: fractions of the map, 0 to 1; grid_sample's -1 to 1; or pixels.
enum class Unit : int32_t { kFraction = 0, kNormalized = 1, kPixels = 2 };

/// Box edges are edges: 0 and 1 (or -1 and 1) are the outer edges of the first and last pixel, and
/// cells divide the box evenly. grid_sample's and resize's align_corners=False, and PyTorch's
/// affine_grid with it. One sample in the middle of each cell.
///
///      0           1           2           3           4  pixels
///      |-----x-----|-----x-----|-----x-----|-----x-----|
///      0                                               1  fractions
///                     o     o     o     o                 box 1..3, 4 cells
template <class T>
GLIMPSE_HD Axis<T> half_pixel_axis(T lo, T hi, Unit unit, int32_t size, int32_t cells) {
  using R = Rounded<T>;
  const R shift(unit == Unit::kNormalized ? T(1) : T(0));
  const R pixels = unit == Unit::kPixels     ? R(T(1))
                   : unit == Unit::kFraction ? R(size)
                                             : R(size) * R(T(0.5));
  const R origin = (R(lo) + shift) * pixels - R(T(0.5));
  const R step = ((R(hi) - R(lo)) * pixels) / R(cells);
  Axis<T> axis = detail::sampled_once(origin, step, T(0.5));
  axis.origin_lo = pixels.value;
  axis.step_hi = (pixels / R(cells)).value;
  axis.step_lo = -axis.step_hi;
  return axis;
}

/// Box edges are pixel centres: 0 and 1 (or -1 and 1) are the centres of the first and last pixel,
/// and the first and last sample lie on the box edges. TensorFlow's crop_and_resize (fractions, in
/// its order of operations) and grid_sample's align_corners=True. One cell: the middle of the box.
///
///            0           1           2           3        pixels
///      |-----x-----|-----x-----|-----x-----|-----x-----|
///            0                                   1        fractions
///                        o       o       o       o        box 1..3, 4 cells
template <class T>
GLIMPSE_HD Axis<T> corner_aligned_axis(T lo, T hi, Unit unit, int32_t size, int32_t cells) {
  using R = Rounded<T>;
  const R pixels = unit == Unit::kPixels     ? R(T(1))
                   : unit == Unit::kFraction ? R(size - 1)
                                             : R(size - 1) * R(T(0.5));
  if (unit == Unit::kFraction) {
    lo = detail::flushed(lo);
    hi = detail::flushed(hi);
  }
  const R a = unit == Unit::kNormalized ? R(lo) + R(T(1)) : R(lo);
  if (cells == 1) {
    const R b = unit == Unit::kNormalized ? R(hi) + R(T(1)) : R(hi);
    // TensorFlow multiplies in double here; halving is exact, so one rounding gives its number.
    Axis<T> axis = detail::sampled_once(R(T(0.5)) * (a + b) * pixels, R(T(0)), T(0));
    axis.origin_lo = axis.origin_hi = (R(T(0.5)) * pixels).value;
    return axis;
  }
  const R step = ((R(hi) - R(lo)) * pixels) / R(cells - 1);
  Axis<T> axis = detail::sampled_once(a * pixels, step, T(0));
  axis.origin_lo = pixels.value;
  axis.step_hi = (pixels / R(cells - 1)).value;
  axis.step_lo = -axis.step_hi;
  return axis;
}

/// Version 1 and 2 of TensorFlow's extract_glimpse.
struct GlimpseRule {
  int32_t version;
  int32_t centered, normalized;
};

/// The place of the first pixel of a window of `extent` pixels, before it becomes an integer, in
/// TensorFlow's order of operations. Only normalized and centered, or in version 1, is the offset
/// the middle of the window; otherwise it is its first pixel. Normalized offsets count in sizes of
/// the image, not in sizes less one.
///
///   normalized  centered   version 2          version 1
///   yes         yes        (o*S + S - g)/2    (o*S + S - g)/2
///   yes         no         o*S                o*S - g/2
///   no          yes        o + S/2            o/2 + S/2 - g/2
///   no          no         o                  o - g/2
template <class T>
GLIMPSE_HD T glimpse_origin(T offset, const GlimpseRule& rule, int32_t size, int32_t extent) {
  using R = Rounded<T>;
  const R two(T(2));
  R v(offset);
  if (rule.normalized) v = v * R(size);
  if (rule.centered) {
    if (rule.normalized || rule.version == 1) v = v / two;
    v = v + R(size) / two;
  }
  if (rule.version == 1 || (rule.normalized && rule.centered)) v = v - R(extent) / two;
  return v.value;
}

/// d origin / d offset.
template <class T>
GLIMPSE_HD T glimpse_origin_slope(const GlimpseRule& rule, int32_t size) {
  const bool halved = rule.centered && (rule.normalized || rule.version == 1);
  return (rule.normalized ? static_cast<T>(size) : T(1)) * (halved ? T(0.5) : T(1));
}

/// Neighbouring pixels from an origin on; cells of scale x scale pixels, for a window that is
/// reduced by its mean. The origin keeps its fraction, which TensorFlow drops.
template <class T>
GLIMPSE_HD Axis<T> glimpse_axis(T offset, const GlimpseRule& rule, int32_t scale, int32_t size,
                                int32_t cells) {
  using R = Rounded<T>;
  const R origin(glimpse_origin(offset, rule, size, cells * scale));
  Axis<T> axis = detail::sampled_once(origin, R(scale), T(0));
  axis.samples = axis.samples > 0 && scale > 0 ? scale : 0;
  axis.origin_lo = glimpse_origin_slope<T>(rule, size);
  return axis;
}

/// TensorFlow's integer origin: truncated toward zero. False where it has none, because the offset
/// is NaN, infinite, or beyond 63 bits; such a window lies outside.
template <class T>
GLIMPSE_HD bool truncated_origin(T origin, int64_t* pixel) {
  constexpr T kLimit = static_cast<T>(9223372036854775808.0);
  if (!(origin > -kLimit && origin < kLimit)) return false;
  *pixel = static_cast<int64_t>(origin);
  return true;
}

/// An axis of one sample on each whole pixel from TensorFlow's integer origin on. `single`: the
/// origin is rounded in float also where coordinates are double.
template <class T>
GLIMPSE_HD Axis<T> whole_glimpse_axis(T offset, const GlimpseRule& rule, bool single, int32_t size,
                                      int32_t cells) {
  using R = Rounded<T>;
  int64_t pixel = 0;
  const bool found =
      single
          ? truncated_origin(glimpse_origin(static_cast<float>(offset), rule, size, cells), &pixel)
          : truncated_origin(glimpse_origin(offset, rule, size, cells), &pixel);
  return detail::sampled_once(R(found ? static_cast<T>(pixel) : static_cast<T>(HUGE_VAL)), R(T(1)),
                              T(0));
}

/// The part of a window of whole pixels that lies inside the image, along one axis: the cells
/// begin <= i < end, of which cell i is pixel first + i.
struct GlimpseSpan {
  int64_t first;
  int32_t begin, end;
};

template <class T>
GLIMPSE_HD GlimpseSpan glimpse_span(T offset, const GlimpseRule& rule, int32_t size,
                                    int32_t extent) {
  int64_t first;
  if (!truncated_origin(glimpse_origin(offset, rule, size, extent), &first)) return {0, 0, 0};
  // Compared before anything is added, because the origin may have 63 bits.
  if (first >= size || first <= -static_cast<int64_t>(extent)) return {0, 0, 0};
  const int64_t rest = size - first;
  return {first, first < 0 ? static_cast<int32_t>(-first) : 0,
          rest < extent ? static_cast<int32_t>(rest) : extent};
}

/// Where the pixels of an image fall on a mask that is stretched over a box: the other way round,
/// cells are pixels of the image and positions are indices of the mask. detectron2's
/// paste_masks_in_image: (pixel + 1/2 - lo) / (hi - lo) * mask - 1/2. A box without width reads
/// nothing; a reversed one mirrors the mask. `lo`, `hi` in edge units.
///
///      0           1           2           3           4  edge units of the image
///      |-----o-----|-----o-----|-----o-----|-----o-----|
///                  |--x--|--x--|--x--|--x--|              mask of 4, box 1..3
template <class T>
GLIMPSE_HD Axis<T> paste_axis(T lo, T hi, int32_t mask) {
  using R = Rounded<T>;
  const R step = R(mask) / (R(hi) - R(lo));
  const R origin = (R(T(0.5)) - R(lo)) * step - R(T(0.5));
  return detail::sampled_once(origin, step, T(0));
}

/// The pixel from which paste_axis best counts cells: the one that holds `lo`, if the image has it.
/// Edges less this pixel make an axis whose positions are small numbers near the box, and so lose
/// nothing to the box being far from pixel 0.
template <class T>
GLIMPSE_HD int32_t paste_anchor(T lo, int32_t pixels) {
  return lo > T(0) && lo < static_cast<T>(pixels) ? static_cast<int32_t>(lo) : 0;
}

/// torchvision's paste_masks_in_image: the mask gets a border of one zero, the box grows with it
/// about its centre by `grow` = (mask + 2) / mask, and its edges are truncated to whole pixels lo
/// to hi, both of which are covered. A box that ends before it starts reads nothing.
template <class T>
GLIMPSE_HD Axis<T> snapped_paste_axis(T lo, T hi, T grow, int32_t mask) {
  using R = Rounded<T>;
  const R half(T(0.5));
  const R reach = (R(hi) - R(lo)) * half * R(grow);
  const R centre = (R(hi) + R(lo)) * half;
  int64_t first, last;
  if (!truncated_origin((centre - reach).value, &first) ||
      !truncated_origin((centre + reach).value, &last) || last < first) {
    return detail::sampled_once(R(static_cast<T>(HUGE_VAL)), R(T(0)), T(0));
  }
  // In unsigned arithmetic, because the edges may be 64 bits apart.
  const R pixels(static_cast<T>(static_cast<uint64_t>(last) - static_cast<uint64_t>(first) + 1));
  const R step = R(mask + 2) / pixels;
  // One less than the index in the mask with its border.
  const R origin = (half - R(static_cast<T>(first))) * step - R(T(1.5));
  return detail::sampled_once(origin, step, T(0));
}

}  // namespace glimpse
