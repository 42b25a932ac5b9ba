// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "half.h"
#include "paste_problem.h"

// A row of mask pixels is spread over the columns of the image once and serves all rows of the
// image that lie between it and the next one; a row of the image is then a weighted sum of two
// spread rows.

namespace glimpse {

/// The rows of one mask, spread over the columns of the image that it reaches, and zeros up to a
/// multiple of kPad columns. The last two are kept: the rows of the image ask for them in order.
template <class T>
class SpreadRows {
 public:
  using A = acc_t<T>;
  static constexpr size_t kPad = 64;

  void start(const PasteProblem& problem, int64_t k, const PasteLine<A>& line, Cells columns) {
    mask_ = static_cast<const T*>(problem.mask) + k * problem.stride_n;
    stride_h_ = problem.stride_h;
    const auto count = static_cast<size_t>(columns.end - columns.first);
    for (int slot = 0; slot < 2; ++slot) {
      pixel_[slot].resize(count);
      weight_[slot].resize(count);
      rows_[slot].assign((count + kPad - 1) / kPad * kPad, A(0));
      held_[slot] = -1;
    }
    for (size_t i = 0; i < count; ++i) {
      const auto pair = Pair<A>::of(line.taps(columns.first + static_cast<int32_t>(i)));
      for (int slot = 0; slot < 2; ++slot) {
        pixel_[slot][i] = pair.pixel[slot];
        weight_[slot][i] = pair.weight[slot];
      }
    }
    columns_ = {columns.end - columns.first,
                {pixel_[0].data(), pixel_[1].data()},
                {weight_[0].data(), weight_[1].data()},
                problem.stride_w};
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
  const T* mask_ = nullptr;
  int64_t stride_h_ = 0;
  PasteColumns<A> columns_ = {};
  std::vector<int32_t> pixel_[2];
  std::vector<A> weight_[2], rows_[2];
  int32_t held_[2] = {-1, -1};
};

}  // namespace glimpse
