// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>
#include <cstdint>

#include "geometry/rounded.h"

namespace glimpse {

// Note [Filters]
// A resized crop is not sampled: each cell weighs the pixels around its middle by a triangle, and
// the weights are divided by their sum. With antialiasing the triangle is as wide as the cell (PIL,
// and torch's interpolate with antialias=True), otherwise as a pixel, which is bilinear
// interpolation. What may be read is a window: the box, so that the result is that of cropping
// first, or the box and the image. A pixel that the window covers in part counts in part. For whole
// boxes that is the loop of crop and resize; in between, weights follow the box without jumps.
//
//      0           1           2           3           4           5   edge units
//      |-----x-----|-----x-----|-----x-----|-----x-----|-----x-----|
//                  [           |     ^     |           ]               a cell of 3 pixels, 1 to 4
//                  1/3        2/3    1    2/3         1/3              weights, before their sum
//
// Sums over pixels are arithmetic series, so a row of weights takes a few numbers to write down,
// however wide the box. They are computed in double, and in one arithmetic for both devices.

/// How crops are resized.
struct FilterRule {
  bool used;       // otherwise cells are sampled, and the rest means nothing
  bool antialias;  // the triangle is as wide as a cell, where that is wider than a pixel
  bool beyond;     // pixels of the image beyond the box may be read
  bool edge;       // pixels outside the image are the nearest of it; otherwise they are zeros
};

/// The cells of an axis that are in some range, first <= i < end.
struct FilterCells {
  int32_t first, end;
};

/// What is beyond a weight: how it follows the origin and the step of its axis.
template <class T>
struct FilterSlopes {
  T middle;      // of the cell: d centre / d step
  T reach_step;  // d reach / d step
  T sum_origin, sum_step;
  T low_origin, low_step, high_origin, high_step;  // of the shares
  T before_origin, before_step, behind_origin, behind_step;
};

/// The weights of a cell: pixels first .. first + count - 1.
template <class T>
struct FilterRow {
  int32_t first, count;
  int32_t own, own_end;     // those whose own weight counts, from the first on
  int32_t low, high;        // the outer pixels of the window, from the first on, or -1
  T start;                  // first pixel with a weight of its own, less the centre
  T inverse;                // of the reach
  T norm;                   // 1 / sum of all weights, also of pixels outside the image
  T low_share, high_share;  // how much of the outer pixels the window covers
  T before, behind;         // weights of the pixels outside the image, where the edge stands in
  T coverage;               // sum of all weights here

  GLIMPSE_HD T weight(int32_t i) const {
    using R = Rounded<T>;
    R sum(T(0));
    if (i >= own && i < own_end) sum = R(tent(i)) * R(share(i)) * R(norm);
    if (i == 0) sum = sum + R(before);
    if (i == count - 1) sum = sum + R(behind);
    return sum.value;
  }

  /// d weight / d origin and d weight / d step. On the kinks of the triangle those to the right.
  GLIMPSE_HD void slopes(int32_t i, const FilterSlopes<T>& of, T* origin, T* step) const {
    using R = Rounded<T>;
    R along_origin(T(0)), along_step(T(0));
    if (i >= own && i < own_end) {
      const R distance = R(start) + R(i - own);
      const R size(distance.value < 0 ? -distance.value : distance.value);
      const R side(distance.value > 0 ? inverse : -inverse);
      const R part(share(i)), height(tent(i));
      const R part_origin((i == low ? of.low_origin : T(0)) + (i == high ? of.high_origin : T(0)));
      const R part_step((i == low ? of.low_step : T(0)) + (i == high ? of.high_step : T(0)));
      const R wider = size * R(inverse) * R(inverse) * R(of.reach_step);
      const R own_weight = height * part * R(norm);
      along_origin = (side * part + height * part_origin) * R(norm) - own_weight * R(of.sum_origin);
      along_step = ((side * R(of.middle) + wider) * part + height * part_step) * R(norm) -
                   own_weight * R(of.sum_step);
    }
    if (i == 0) {
      along_origin = along_origin + R(of.before_origin);
      along_step = along_step + R(of.before_step);
    }
    if (i == count - 1) {
      along_origin = along_origin + R(of.behind_origin);
      along_step = along_step + R(of.behind_step);
    }
    *origin = along_origin.value;
    *step = along_step.value;
  }

 private:
  GLIMPSE_HD T tent(int32_t i) const {
    using R = Rounded<T>;
    const R distance = R(start) + R(i - own);
    const R size(distance.value < 0 ? -distance.value : distance.value);
    const R height = R(T(1)) - size * R(inverse);
    return height.value > 0 ? height.value : T(0);
  }
  GLIMPSE_HD T share(int32_t i) const {
    return i == low ? low_share : i == high ? high_share : T(1);
  }
};

/// One axis of a box that is resized.
struct FilterLine {
  using R = Rounded<double>;

  /// `lo`, `hi` in edge units of the image. A box that is empty or not finite has no rows.
  GLIMPSE_HD static FilterLine of(const FilterRule& rule, double lo, double hi, int32_t size,
                                  int32_t cells) {
    FilterLine line;
    line.size_ = size;
    line.cells_ = cells;
    line.edge_ = rule.edge;
    line.origin_ = (R(lo) - R(0.5)).value;
    line.step_ = ((R(hi) - R(lo)) / R(cells)).value;
    const double pixels = line.step_ < 0 ? -line.step_ : line.step_;
    line.valid_ = line.origin_ - line.origin_ == 0 && pixels - pixels == 0 && pixels > 0;
    const bool wide = rule.antialias && pixels > 1;
    line.reach_ = wide ? pixels : 1.0;
    line.reach_step_ = !wide ? 0.0 : line.step_ < 0 ? -1.0 : 1.0;
    const bool growing = line.step_ > 0;
    line.low_ = {growing ? lo : hi, 1.0, growing ? 0.0 : static_cast<double>(cells)};
    line.high_ = {growing ? hi : lo, 1.0, growing ? static_cast<double>(cells) : 0.0};
    if (rule.beyond && line.low_.place > 0) line.low_ = {0.0, 0.0, 0.0};
    if (rule.beyond && line.high_.place < size) {
      line.high_ = {static_cast<double>(size), 0.0, 0.0};
    }
    line.low_pixel_ = floor_of(line.low_.place);
    line.high_pixel_ = -floor_of(-line.high_.place) - 1;
    return line;
  }

  template <class T>
  GLIMPSE_HD FilterRow<T> row(int32_t cell) const {
    FilterSlopes<T> unused;
    return row<T>(cell, &unused);
  }

  template <class T>
  GLIMPSE_HD FilterRow<T> row(int32_t cell, FilterSlopes<T>* slopes) const {
    FilterRow<T> row = {};
    *slopes = {};
    if (!valid_) return row;
    const double middle = (R(cell) + R(0.5)).value;
    const double centre = (R(origin_) + R(middle) * R(step_)).value;
    // A pixel at the right-hand end has no weight, but the right-hand slope.
    double first = floor_of((R(centre) - R(reach_)).value) + 1;
    double last = floor_of((R(centre) + R(reach_)).value);
    if (first < low_pixel_) first = low_pixel_;
    if (last > high_pixel_) last = high_pixel_;
    if (!(first <= last)) return row;
    const Mass all = mass(centre, middle, first, last);
    if (!(all.sum > 0)) return row;
    const double norm = (R(1.0) / R(all.sum)).value;
    const double sum_origin = (R(all.origin) * R(norm)).value;
    const double sum_step = (R(all.step) * R(norm)).value;
    slopes->middle = static_cast<T>(middle);
    slopes->reach_step = static_cast<T>(reach_step_);
    slopes->sum_origin = static_cast<T>(sum_origin);
    slopes->sum_step = static_cast<T>(sum_step);

    const double end = static_cast<double>(size_) - 1;
    const double own_first = first < 0 ? 0 : first, own_last = last > end ? end : last;
    const bool inside = own_first <= own_last;
    double coverage = 1;
    double read_first = own_first, read_last = own_last;
    if (edge_) {
      read_first = first < 0 ? 0 : first > end ? end : first;
      read_last = last > end ? end : last < 0 ? 0 : last;
      const auto scaled = [&](const Mass& part, T* weight, T* origin, T* step) {
        const R share = R(part.sum) * R(norm);
        *weight = static_cast<T>(share.value);
        *origin = static_cast<T>((R(part.origin) * R(norm) - share * R(sum_origin)).value);
        *step = static_cast<T>((R(part.step) * R(norm) - share * R(sum_step)).value);
      };
      if (first < 0) {
        scaled(mass(centre, middle, first, last < -1 ? last : -1), &row.before,
               &slopes->before_origin, &slopes->before_step);
      }
      if (last > end) {
        scaled(mass(centre, middle, first > end + 1 ? first : end + 1, last), &row.behind,
               &slopes->behind_origin, &slopes->behind_step);
      }
    } else {
      if (!inside) return row;
      if (first < 0 || last > end) {
        coverage = (R(mass(centre, middle, own_first, own_last).sum) * R(norm)).value;
      }
    }
    row.first = static_cast<int32_t>(read_first);
    row.count = static_cast<int32_t>(read_last) - row.first + 1;
    row.low = row.high = -1;
    row.norm = static_cast<T>(norm);
    row.inverse = static_cast<T>((R(1.0) / R(reach_)).value);
    row.coverage = static_cast<T>(coverage);
    row.low_share = row.high_share = T(1);
    if (inside) {
      row.own = static_cast<int32_t>(own_first) - row.first;
      row.own_end = static_cast<int32_t>(own_last) - row.first + 1;
      row.start = static_cast<T>((R(own_first) - R(centre)).value);
      const auto outer = [&](double pixel, int32_t* at, T* share, T* origin, T* step) {
        if (!(pixel >= own_first && pixel <= own_last)) return;
        const Share part = share_of(pixel);
        *at = static_cast<int32_t>(pixel) - row.first;
        *share = static_cast<T>(part.place);
        *origin = static_cast<T>(part.origin);
        *step = static_cast<T>(part.step);
      };
      outer(low_pixel_, &row.low, &row.low_share, &slopes->low_origin, &slopes->low_step);
      if (high_pixel_ != low_pixel_) {
        outer(high_pixel_, &row.high, &row.high_share, &slopes->high_origin, &slopes->high_step);
      }
    }
    return row;
  }

  /// The cells whose rows can have the pixels first_pixel .. last_pixel, and maybe some more.
  GLIMPSE_HD FilterCells cells_reading(int32_t first_pixel, int32_t last_pixel) const {
    if (!valid_) return {0, 0};
    const bool from_start = edge_ && first_pixel == 0;
    const bool to_end = edge_ && last_pixel == size_ - 1;
    const R origin(origin_), step(step_);
    const double before = ((R(first_pixel) - R(reach_) - origin) / step).value;
    const double behind = ((R(last_pixel) + R(reach_) - origin) / step).value;
    const bool growing = step_ > 0;
    const bool open_low = growing ? from_start : to_end, open_high = growing ? to_end : from_start;
    const double low = (growing ? before : behind) - 1.5, high = (growing ? behind : before) + 1.5;
    const auto clamped = [&](double v) {
      return v > 0 ? v < cells_ ? static_cast<int32_t>(v) : cells_ : 0;
    };
    return {open_low ? 0 : clamped(low), open_high ? cells_ : clamped(high)};
  }

  /// The pixels of the image that all cells together read, and maybe some more.
  GLIMPSE_HD void pixels(int32_t* first, int32_t* last) const {
    const R half(0.5), reach(reach_ + 1);
    const R begin = R(origin_) + half * R(step_);
    const R end = R(origin_) + (R(cells_) - half) * R(step_);
    const bool growing = step_ > 0;
    const double low = ((growing ? begin : end) - reach).value;
    const double high = ((growing ? end : begin) + reach).value;
    const auto clamped = [&](double v) {
      return v > 0 ? v < size_ ? static_cast<int32_t>(v) : size_ - 1 : 0;
    };
    *first = clamped(low);
    *last = clamped(high);
  }

 private:
  /// A number with its derivatives along the origin and the step.
  struct Share {
    double place, origin, step;
  };
  struct Mass {
    double sum, origin, step;
  };

  GLIMPSE_HD static double floor_of(double v) { return floor(v); }

  /// How much of an outer pixel the window covers. At whole edges its slope is that of a window
  /// that gets smaller.
  GLIMPSE_HD Share share_of(double pixel) const {
    const bool low = low_.place >= pixel, high = high_.place <= pixel + 1;
    const R begin(low ? low_.place : pixel), end(high ? high_.place : pixel + 1);
    return {(end - begin).value, (high ? high_.origin : 0.0) - (low ? low_.origin : 0.0),
            (high ? high_.step : 0.0) - (low ? low_.step : 0.0)};
  }

  /// Adds the pixels first .. last, all on one side of the centre and covered in full.
  GLIMPSE_HD void add_series(double centre, double middle, double first, double last, bool right,
                             Mass* mass) const {
    if (!(first <= last)) return;
    const R reach(reach_);
    const auto tent = [&](double pixel) {
      const R distance = right ? R(pixel) - R(centre) : R(centre) - R(pixel);
      return R(1.0) - distance / reach;
    };
    const R count = R(last) - R(first) + R(1.0);
    const R sum = count * (tent(first) + tent(last)) * R(0.5);
    const R along_centre = (right ? count : R(0.0) - count) / reach;
    const R along_reach = (count - sum) / reach;
    mass->sum = (R(mass->sum) + sum).value;
    mass->origin = (R(mass->origin) + along_centre).value;
    mass->step = (R(mass->step) + along_centre * R(middle) + along_reach * R(reach_step_)).value;
  }

  /// Adds an outer pixel.
  GLIMPSE_HD void add_outer(double centre, double middle, double pixel, Mass* mass) const {
    const Share share = share_of(pixel);
    Mass full = {0, 0, 0};
    add_series(centre, middle, pixel, pixel, pixel > centre, &full);
    const R part(share.place), height(full.sum);
    mass->sum = (R(mass->sum) + height * part).value;
    mass->origin = (R(mass->origin) + R(full.origin) * part + height * R(share.origin)).value;
    mass->step = (R(mass->step) + R(full.step) * part + height * R(share.step)).value;
  }

  /// The weights of the pixels first .. last of the window, added up.
  GLIMPSE_HD Mass mass(double centre, double middle, double first, double last) const {
    Mass mass = {0, 0, 0};
    if (first == low_pixel_) {
      add_outer(centre, middle, first, &mass);
      first += 1;
    }
    if (last == high_pixel_ && first <= last) {
      add_outer(centre, middle, last, &mass);
      last -= 1;
    }
    const double split = floor_of(centre);
    add_series(centre, middle, first, last < split ? last : split, false, &mass);
    add_series(centre, middle, first > split ? first : split + 1, last, true, &mass);
    return mass;
  }

  double origin_, step_, reach_, reach_step_;
  Share low_, high_;  // the ends of the window, edge units
  double low_pixel_, high_pixel_;
  int32_t size_, cells_;
  bool edge_, valid_;
};

}  // namespace glimpse
