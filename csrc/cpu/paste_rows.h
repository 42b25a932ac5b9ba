// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "half.h"
#include "paste_problem.h"

// A row of mask pixels is spread over the columns of the image once and serves all rows of the
// image that lie between it and the next one; a row of the image is then a weighted sum of two
// spread rows.

namespace glimpse {

/// What the cells of a line read, all of which read: two pixels each with their weights.
template <class A>
class LinePairs {
 public:
  /// Leaves `before` places free, and as many behind as make `count` in all.
  void find(const PasteLine<A>& line, Cells cells, int32_t before, int32_t count) {
    for (int slot = 0; slot < 2; ++slot) {
      pixel_[slot].resize(static_cast<size_t>(count));
      weight_[slot].resize(static_cast<size_t>(count));
    }
    int32_t* low = pixel_[0].data() + before;
    int32_t* high = pixel_[1].data() + before;
    A* low_weight = weight_[0].data() + before;
    A* high_weight = weight_[1].data() + before;
    const auto put = [&](int32_t cell, const Pair<A>& pair) {
      const int32_t i = cell - cells.first;
      low[i] = pair.pixel[0];
      high[i] = pair.pixel[1];
      low_weight[i] = pair.weight[0];
      high_weight[i] = pair.weight[1];
    };
    const Cells inner = inner_cells(line, cells);
    for (int32_t i = cells.first; i < inner.first; ++i) put(i, Pair<A>::of(line.taps(i)));
    put_inner(line, inner, low + (inner.first - cells.first), high + (inner.first - cells.first),
              low_weight + (inner.first - cells.first), high_weight + (inner.first - cells.first));
    for (int32_t i = inner.end; i < cells.end; ++i) put(i, Pair<A>::of(line.taps(i)));
  }

  int32_t* pixel(int slot) { return pixel_[slot].data(); }
  A* weight(int slot) { return weight_[slot].data(); }

 private:
  static void put_inner(const PasteLine<A>& line, Cells cells, int32_t* __restrict low,
                        int32_t* __restrict high, A* __restrict low_weight,
                        A* __restrict high_weight) {
    const PasteLine<A> own = line;
    for (int32_t i = 0; i < cells.end - cells.first; ++i) {
      const auto pair = inner_pair(own, cells.first + i);
      low[i] = pair.pixel[0];
      high[i] = pair.pixel[1];
      low_weight[i] = pair.weight[0];
      high_weight[i] = pair.weight[1];
    }
  }

  std::vector<int32_t> pixel_[2];
  std::vector<A> weight_[2];
};

/// The rows of one mask, spread over the columns of the image from `origin` to a multiple of kPad
/// columns further, all of which but those that the mask reaches hold anything. The last two rows
/// are kept: the rows of the image ask for them in order.
template <class T>
class SpreadRows {
 public:
  using A = acc_t<T>;
  static constexpr int32_t kPad = 64;

  void start(const PasteProblem& problem, int64_t k, const PasteLine<A>& line, Cells columns,
             int32_t origin) {
    mask_ = static_cast<const T*>(problem.mask) + k * problem.stride_n;
    stride_h_ = problem.stride_h;
    const int32_t count = (columns.end - origin + kPad - 1) / kPad * kPad;
    const int32_t begin = columns.first - origin, end = columns.end - origin;
    pairs_.find(line, columns, begin, count);
    for (int slot = 0; slot < 2; ++slot) {
      int32_t* pixel = pairs_.pixel(slot);
      A* weight = pairs_.weight(slot);
      std::fill(pixel, pixel + begin, pixel[begin]);
      std::fill(weight, weight + begin, A(0));
      std::fill(pixel + end, pixel + count, pixel[end - 1]);
      std::fill(weight + end, weight + count, A(0));
      rows_[slot].resize(static_cast<size_t>(count));
      held_[slot] = -1;
    }
    row_.resize(static_cast<size_t>(problem.mask_width) + 2 * kMostLanes);
    columns_ = {count,
                {pairs_.pixel(0), pairs_.pixel(1)},
                {pairs_.weight(0), pairs_.weight(1)},
                nullptr,
                row_.data(),
                problem.mask_width,
                problem.stride_w};
    if (find_bases(count)) columns_.base = base_.data();
  }

  /// Row `pixel` of the mask. Stays valid until a row other than `pixel` and `other` is asked for.
  const A* row(int32_t pixel, int32_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == pixel) return rows_[slot].data();
    }
    const int slot = held_[0] == other ? 1 : 0;
    held_[slot] = pixel;
    kernels<T>().paste_spread(mask_ + pixel * stride_h_, columns_, rows_[slot].data());
    return rows_[slot].data();
  }

 private:
  static constexpr int32_t kMostLanes = 16;

  /// Counts pixels from the first one of each vector, where that is close for all of them.
  bool find_bases(int32_t count) {
    const int32_t lanes = kernels<T>().lanes, vectors = count / lanes;
    base_.resize(static_cast<size_t>(vectors));
    int32_t *low = pairs_.pixel(0), *high = pairs_.pixel(1);
    for (int32_t v = 0; v < vectors; ++v) {
      // Positions are monotone, so the outer columns have the outer pixels.
      const int32_t first = v * lanes, last = first + lanes - 1;
      const int32_t base = std::min(low[first], low[last]);
      if (std::max(high[first], high[last]) - base >= 2 * lanes) return false;
      base_[static_cast<size_t>(v)] = base;
    }
    for (const int32_t base : base_) {
      for (int32_t i = 0; i < lanes; ++i) {
        *low++ -= base;
        *high++ -= base;
      }
    }
    return true;
  }

  const T* mask_ = nullptr;
  int64_t stride_h_ = 0;
  PasteColumns<A> columns_ = {};
  LinePairs<A> pairs_;
  std::vector<int32_t> base_;
  std::vector<A> rows_[2], row_;
  int32_t held_[2] = {-1, -1};
};

}  // namespace glimpse
