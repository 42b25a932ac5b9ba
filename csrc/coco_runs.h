// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace glimpse {

/// A mask in its image as COCO writes it: runs of equal pixels, column after column, first one of
/// zeros (maybe none), then one of ones and so on.
struct CocoMask {
  std::string counts;                      // the lengths, compressed
  int64_t area = 0;                        // pixels that are 1
  int64_t x1 = 0, y1 = 0, x2 = 0, y2 = 0;  // their tight box in edge units; zeros without any
};

/// Makes a CocoMask from the places where pixels change, which come in order. It keeps its memory
/// from one mask to the next.
class RunWriter {
 public:
  /// An image of `height` rows.
  void start(int64_t height) {
    size_ = 0;
    height_ = height;
    last_ = x_ = y_ = 0;
    value_ = false;
    first_ = true;
    lengths_[0] = lengths_[1] = 0;
    mask_ = CocoMask();
  }

  /// From row y of column x on, pixels are `value`.
  void set(int64_t x, int64_t y, bool value) {
    if (value == value_) return;
    close(x, y);
    value_ = value;
    x_ = x;
    y_ = y;
  }

  /// The image ends before column `width`.
  CocoMask end(int64_t width) {
    close(width, 0);
    mask_.counts.assign(text_.data(), size_);
    return std::move(mask_);
  }

 private:
  static constexpr size_t kMostGroups = 16;  // of a number, and more than 64 bits need

  void close(int64_t x, int64_t y) {
    const int64_t position = x * height_ + y, length = position - last_;
    last_ = position;
    if (value_ && length > 0) add_ones(length, x, y);
    // Of the fourth run and all later ones, the difference to the run of their kind before them.
    add_number(length - lengths_[0]);
    lengths_[0] = lengths_[1];
    lengths_[1] = first_ ? 0 : length;
    first_ = false;
  }

  /// A run of ones that ends before row y of column x.
  void add_ones(int64_t count, int64_t x, int64_t y) {
    if (y == 0) {
      --x;
      y = height_;
    }
    const bool one_column = x == x_;
    const int64_t top = one_column ? y_ : 0, bottom = one_column ? y : height_;
    if (mask_.area == 0) {
      mask_.x1 = x_;
      mask_.y1 = top;
    }
    mask_.y1 = std::min(mask_.y1, top);
    mask_.x2 = x + 1;  // columns come in order
    mask_.y2 = std::max(mask_.y2, bottom);
    mask_.area += count;
  }

  /// Groups of five bits, low ones first, each but the last with a sixth bit. The sign is that of
  /// the last group.
  void add_number(int64_t number) {
    if (text_.size() - size_ < kMostGroups) text_.resize(2 * text_.size() + 4096);
    char* to = text_.data() + size_;
    const int64_t magnitude = number ^ (number >> 63);
    if (magnitude < int64_t{1} << 19) {
      // All four groups that it may have are written, however many count: no branch to mispredict.
      const int32_t more[3] = {magnitude >= 1 << 4, magnitude >= 1 << 9, magnitude >= 1 << 14};
      for (int32_t i = 0; i < 4; ++i) {
        const int32_t sixth = i < 3 ? more[i] << 5 : 0;
        to[i] = static_cast<char>((number >> (5 * i) & 31) + sixth + 48);
      }
      size_ += static_cast<size_t>(1 + more[0] + more[1] + more[2]);
      return;
    }
    while (true) {
      const int64_t group = number & 31;
      number >>= 5;
      const bool more = number != ((group & 16) != 0 ? -1 : 0);
      text_[size_++] = static_cast<char>(group + (more ? 32 : 0) + 48);
      if (!more) return;
    }
  }

  std::vector<char> text_;
  size_t size_ = 0;
  int64_t height_ = 0;
  int64_t last_ = 0, x_ = 0, y_ = 0;  // where the run begins
  bool value_ = false, first_ = true;
  int64_t lengths_[2] = {0, 0};  // of the two runs before, the first one of all as 0
  CocoMask mask_;
};

}  // namespace glimpse
