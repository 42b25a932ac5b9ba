// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/tables.h"
#include "half.h"
#include "problem.h"

namespace glimpse {

/// What is written for a pixel of the image.
enum class PasteResult : int32_t {
  kValue,      // the value, in the dtype of the masks (float for kUInt8)
  kThreshold,  // 1 where value >= threshold, else 0
  kQuantized,  // 255 times the value, truncated to a byte
  kBits,       // kThreshold, eight pixels to a byte: pixel x of a row is bit x % 8 of byte x / 8
};

/// Masks that are stretched over boxes of an image: sizes, strides and raw pointers of one call.
///
/// Cells are the pixels of the image, so there are far more of them than a mask reaches: beyond the
/// box and half a mask pixel around it every value is 0. A kernel finds the cells that are reached
/// (PasteLine) and writes the background elsewhere, where it computes nothing.
struct PasteProblem {
  const void* mask;  // [masks, mask_height, mask_width]; strides in elements
  int64_t stride_n, stride_h, stride_w;
  int32_t mask_height, mask_width;
  Dtype dtype;      // of masks; sums and box numbers are double for kFloat64, float for all others
  const void* box;  // [masks, 4], dense: x1, y1, x2, y2 in edge units
  bool snapped;     // boxes cover whole pixels, as in torchvision
  double grow;      // snapped: how much boxes grow, (mask_width + 2) / mask_width

  int64_t masks;
  int32_t height, width;  // of the image
  PasteResult result;
  double threshold;
  void* image;   // [masks, height, width], dense; of kBits [masks, height, row_bytes()]
  bool cleared;  // the image holds zeros already, which need not be written again
  void* stream;  // of the device; unused on the host

  /// Bytes of a row of kBits. Bits behind the last pixel are 0.
  GLIMPSE_HD int32_t row_bytes() const { return width / 8 + (width % 8 != 0 ? 1 : 0); }
};

/// Where a kThreshold image changes, read column after column: the pixels x * height + y that
/// differ from the one before, the first one from 0. Images have fewer than 2^31 pixels here.
struct PasteChanges {
  static constexpr int32_t kPartColumns = 128;

  int32_t parts;            // of each image: kPartColumns columns, the last one maybe fewer
  int32_t* part_changes;    // [masks, parts], how many there are
  int32_t* column_changes;  // [masks, width], scratch
  int32_t* place;           // [room], all of them in order, or as many as there is room for
  int64_t room;
};

/// What an operator of the geometry has to say of masks: zeros outside, one sample per cell.
GLIMPSE_HD Operator paste_operator() { return Operator(GivenAxes{}); }

/// One direction of a mask.
template <class T>
struct PasteLine {
  Axis<T> axis;
  int32_t anchor;  // the pixel of the image that is cell 0 of the axis
  int32_t size;    // mask pixels
  Cells pixels;    // of the image that the mask may reach; all others are background

  /// Along `direction` of mask k. The pixels are found with the positions themselves, so that every
  /// device finds the same.
  GLIMPSE_HD static PasteLine of(const PasteProblem& problem, int64_t k, int32_t direction) {
    using R = Rounded<T>;
    const T* box = static_cast<const T*>(problem.box) + 4 * k;
    const T lo = box[direction == kY ? 1 : 0], hi = box[direction == kY ? 3 : 2];
    const int32_t extent = direction == kY ? problem.height : problem.width;
    PasteLine line;
    line.size = direction == kY ? problem.mask_height : problem.mask_width;
    if (problem.snapped) {
      line.anchor = 0;
      line.axis = snapped_paste_axis(lo, hi, static_cast<T>(problem.grow), line.size);
    } else {
      line.anchor = paste_anchor(lo, extent);
      const R start(line.anchor);
      line.axis = paste_axis((R(lo) - start).value, (R(hi) - start).value, line.size);
    }
    line.pixels = {0, 0};
    if (line.axis.samples > 0) {
      const Cells cells =
          cells_reaching(paste_operator(), line.axis, {-line.anchor, extent - line.anchor}, 0,
                         line.size - 1, line.size);
      line.pixels = {cells.first + line.anchor, cells.end + line.anchor};
    }
    return line;
  }

  GLIMPSE_HD Taps<T> taps(int32_t pixel) const {
    return zeros_border().taps(axis.position(pixel - anchor, 0), size);
  }
};

/// Takes the cells from `line` that read nothing: a sample may lie on the first pixel outside.
template <class T>
GLIMPSE_HD Cells reading_cells(const PasteLine<T>& line) {
  Cells cells = line.pixels;
  while (cells.first < cells.end && line.taps(cells.first).count == 0) ++cells.first;
  while (cells.first < cells.end && line.taps(cells.end - 1).count == 0) --cells.end;
  return cells;
}

/// The taps of a reading cell as two pixels always: a single one counts twice with half its weight,
/// which gives the same sum.
template <class T>
struct Pair {
  int32_t pixel[2];
  T weight[2];

  GLIMPSE_HD static Pair of(const Taps<T>& taps) {
    const bool two = taps.count == 2;
    const T half = taps.weight[0] / 2;
    return {{taps.pixel[0], two ? taps.pixel[1] : taps.pixel[0]},
            {two ? taps.weight[0] : half, two ? taps.weight[1] : half}};
  }
};

/// The same of a pixel whose position lies between the centres of the outer mask pixels. Without a
/// branch, so that loops over it become vectors.
template <class T>
GLIMPSE_HD Pair<T> inner_pair(const PasteLine<T>& line, int32_t pixel) {
  using R = Rounded<T>;
  const T position = line.axis.position(pixel - line.anchor, 0);
  const int32_t low = static_cast<int32_t>(position);
  const R fraction = R(position) - R(low);
  return {{low, low + 1}, {(R(T(1)) - fraction).value, fraction.value}};
}

/// The cells among `cells`, all of which read, that inner_pair is for.
template <class T>
GLIMPSE_HD Cells inner_cells(const PasteLine<T>& line, Cells cells) {
  const auto is_inner = [&](int32_t pixel) {
    const T position = line.axis.position(pixel - line.anchor, 0);
    return position >= T(0) && position < static_cast<T>(line.size - 1);
  };
  while (cells.first < cells.end && !is_inner(cells.first)) ++cells.first;
  while (cells.first < cells.end && !is_inner(cells.end - 1)) --cells.end;
  return cells;
}

/// The value of a pixel: taps along x first, then along y, each operation rounded once. A value
/// meets a threshold by its last bit, so all devices compute it in this order.
/// `read(y, x)` is a pixel of the mask.
template <class T, class Read>
GLIMPSE_HD T paste_value(const Taps<T>& y, const Taps<T>& x, const Read& read) {
  using R = Rounded<T>;
  if (y.count == 0 || x.count == 0) return T(0);
  const auto row = [&](int32_t pixel) {
    const R sum = R(x.weight[0]) * R(read(pixel, x.pixel[0]));
    return x.count == 2 ? sum + R(x.weight[1]) * R(read(pixel, x.pixel[1])) : sum;
  };
  const R sum = R(y.weight[0]) * row(y.pixel[0]);
  return (y.count == 2 ? sum + R(y.weight[1]) * row(y.pixel[1]) : sum).value;
}

/// A value as a byte: NaN and what is below 0 as 0, what is above as 255.
template <class T>
GLIMPSE_HD uint8_t quantized(T value) {
  const T scaled = (Rounded<T>(value) * Rounded<T>(T(255))).value;
  if (!(scaled > 0)) return 0;
  return scaled < T(255) ? static_cast<uint8_t>(scaled) : uint8_t{255};
}

/// Turns values into what a call asks for.
template <class T, class Out>
struct PasteStore {
  GLIMPSE_HD explicit PasteStore(const PasteProblem&) {}
  GLIMPSE_HD Out operator()(T value) const { return Store<Out>::from(value); }
};
template <class T>
struct PasteStore<T, uint8_t> {
  bool quantize;
  T threshold;

  GLIMPSE_HD explicit PasteStore(const PasteProblem& problem)
      : quantize(problem.result == PasteResult::kQuantized),
        threshold(static_cast<T>(problem.threshold)) {}
  GLIMPSE_HD uint8_t operator()(T value) const {
    return quantize ? quantized(value) : static_cast<uint8_t>(value >= threshold ? 1 : 0);
  }
};

}  // namespace glimpse
