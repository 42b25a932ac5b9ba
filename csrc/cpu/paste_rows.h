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
    for (int slot = 0; slot < 2; ++slot) {
      pixel_[slot].resize(static_cast<size_t>(count));
      weight_[slot].resize(static_cast<size_t>(count));
      rows_[slot].resize(static_cast<size_t>(count));
      held_[slot] = -1;
    }
    for (int32_t x = columns.first; x < columns.end; ++x) {
      const auto pair = Pair<A>::of(line.taps(x));
      const auto i = static_cast<size_t>(x - origin);
      for (int slot = 0; slot < 2; ++slot) {
        pixel_[slot][i] = pair.pixel[slot];
        weight_[slot][i] = pair.weight[slot];
      }
    }
    for (int slot = 0; slot < 2; ++slot) {
      const int32_t begin = columns.first - origin, end = columns.end - origin;
      std::fill_n(pixel_[slot].begin(), begin, pixel_[slot][static_cast<size_t>(begin)]);
      std::fill_n(weight_[slot].begin(), begin, A(0));
      std::fill_n(pixel_[slot].begin() + end, count - end,
                  pixel_[slot][static_cast<size_t>(end) - 1]);
      std::fill_n(weight_[slot].begin() + end, count - end, A(0));
    }
    row_.resize(static_cast<size_t>(problem.mask_width) + 2 * kMostLanes);
    columns_ = {count,
                {pixel_[0].data(), pixel_[1].data()},
                {weight_[0].data(), weight_[1].data()},
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
    const int32_t lanes = kernels<T>().lanes;
    base_.resize(static_cast<size_t>(count / lanes));
    for (int32_t v = 0; v < count / lanes; ++v) {
      // Positions are monotone, so the outer columns have the outer pixels.
      const auto first = static_cast<size_t>(v * lanes),
                 last = first + static_cast<size_t>(lanes) - 1;
      const int32_t low = std::min(pixel_[0][first], pixel_[0][last]);
      const int32_t high = std::max(pixel_[1][first], pixel_[1][last]);
      if (high - low >= 2 * lanes) return false;
      base_[static_cast<size_t>(v)] = low;
    }
    for (int slot = 0; slot < 2; ++slot) {
      int32_t* pixel = pixel_[slot].data();
      for (int32_t v = 0; v < count / lanes; ++v) {
        for (int32_t i = 0; i < lanes; ++i) *pixel++ -= base_[static_cast<size_t>(v)];
      }
    }
    return true;
  }

  const T* mask_ = nullptr;
  int64_t stride_h_ = 0;
  PasteColumns<A> columns_ = {};
  std::vector<int32_t> pixel_[2], base_;
  std::vector<A> weight_[2], rows_[2], row_;
  int32_t held_[2] = {-1, -1};
};

}  // namespace glimpse
