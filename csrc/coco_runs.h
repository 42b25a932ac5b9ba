// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
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
    height_ = height;
    changes_.clear();
  }

  /// From row y of a column on, whose first pixel has the place `column`, pixels are 1 if they were
  /// 0 before, and 0 if they were 1. The pixel before the first one of all is a 0.
  void change(int64_t column, int64_t y) { changes_.push_back({column + y, y}); }

  /// Whether pixels are 1 behind the last change.
  bool value() const { return changes_.size() % 2 != 0; }

  /// The image has `width` columns.
  CocoMask end(int64_t width) {
    const int64_t height = height_, all = width * height;
    changes_.push_back({all, 0});
    const size_t count = changes_.size();
    if (text_.size() < count * kMostGroups) text_.resize(2 * count * kMostGroups);
    char* to = text_.data();
    CocoMask mask;
    int64_t area = 0, top = height, bottom = 0;
    int64_t last = 0;
    int64_t before[2] = {0, 0};  // lengths of the two runs before, that of the first one as 0
    for (size_t i = 0; i < count; ++i) {
      const int64_t length = changes_[i].place - last;
      if (i % 2 != 0) {
        const int64_t y = changes_[i - 1].y;
        const bool one_column = length <= height - y;
        if (length > 0) {
          top = std::min(top, one_column ? y : 0);
          bottom = std::max(bottom, one_column ? y + length : height);
        }
        area += length;
      }
      // Of the fourth run and all later ones, the difference to the run of their kind before them.
      to = write_number(length - before[0], to);
      before[0] = before[1];
      before[1] = i == 0 ? 0 : length;
      last = changes_[i].place;
    }
    if (area > 0) {
      // The last run of ones ends with the last change, or with the image.
      const int64_t end = changes_[count - 1 - count % 2].place;
      mask.area = area;
      mask.x1 = changes_[0].place / height;
      mask.x2 = (end - 1) / height + 1;
      mask.y1 = top;
      mask.y2 = bottom;
    }
    mask.counts.assign(text_.data(), to);
    return mask;
  }

 private:
  struct Change {
    int64_t place, y;
  };

  static constexpr size_t kMostGroups = 13;  // of a number of 64 bits

  /// Groups of five bits, low ones first, each but the last with a sixth bit. The sign is that of
  /// the last group. Returns the end.
  static char* write_number(int64_t number, char* to) {
    const int64_t magnitude = number ^ (number >> 63);
    if (magnitude < int64_t{1} << 19) {
      // All four groups that it may have are written, however many count: no branch to mispredict.
      const int32_t more[3] = {magnitude >= 1 << 4, magnitude >= 1 << 9, magnitude >= 1 << 14};
      for (int32_t i = 0; i < 4; ++i) {
        const int32_t sixth = i < 3 ? more[i] << 5 : 0;
        to[i] = static_cast<char>((number >> (5 * i) & 31) + sixth + 48);
      }
      return to + 1 + more[0] + more[1] + more[2];
    }
    while (true) {
      const int64_t group = number & 31;
      number >>= 5;
      const bool more = number != ((group & 16) != 0 ? -1 : 0);
      *to++ = static_cast<char>(group + (more ? 32 : 0) + 48);
      if (!more) return to;
    }
  }

  std::vector<char> text_;
  std::vector<Change> changes_;
  int64_t height_ = 0;
};

}  // namespace glimpse
