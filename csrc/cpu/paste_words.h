// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/paste_rows.h"
#include "half.h"
#include "paste_problem.h"

// Note [Which pixels are computed]
// In a column of the image, the rows between two neighbouring rows of mask pixels are a segment:
// their values are means of the same two numbers, a and b. Where both lie on the same side of the
// threshold, by more than rounding can move them, so does the whole segment, and nothing is
// computed. Elsewhere each pixel is computed as paste_value does it, and so every pixel has the
// bits that pasting gives it:
//
//     mask rows   a     b     c     d
//                 | x x | x x | x x |      x: pixels of the column
//     threshold   above above below below
//                  ones   ?    zeros       only the middle segment is computed
//
// 64 columns are looked at together, as bits of a word, and computed a vector at a time.

namespace glimpse {

/// The pixels of one mask after another that meet the threshold, as words of 64 columns.
template <class T>
class PasteWords {
 public:
  using A = acc_t<T>;
  static constexpr int32_t kColumns = 64;  // of a word
  static constexpr int32_t kMostRows = 64;

  explicit PasteWords(const PasteProblem& problem)
      : problem_(problem),
        threshold_(static_cast<A>(problem.threshold)),
        background_(A(0) >= threshold_) {}

  /// Finds what mask k reaches. Words begin at a column that is a multiple of `multiple`.
  /// Returns whether it reaches anything; otherwise there are no words.
  bool start(int64_t k, int32_t multiple) {
    const auto along_y = PasteLine<A>::of(problem_, k, kY);
    const auto along_x = PasteLine<A>::of(problem_, k, kX);
    rows_ = reading_cells(along_y);
    columns_ = reading_cells(along_x);
    if (rows_.first >= rows_.end || columns_.first >= columns_.end) return false;
    origin_ = columns_.first / multiple * multiple;
    find_segments(along_y);
    spread_.start(problem_, k, along_x, columns_, origin_);
    words_ = (columns_.end - origin_ + kColumns - 1) / kColumns;
    for (int slot = 0; slot < 2; ++slot) {
      above_[slot].resize(static_cast<size_t>(words_));
      below_[slot].resize(static_cast<size_t>(words_));
      known_[slot] = -1;
    }
    return true;
  }

  bool background() const { return background_; }
  Cells rows() const { return rows_; }        // that are reached
  Cells columns() const { return columns_; }  // that are reached
  int32_t origin() const { return origin_; }  // the column of bit 0 of word 0
  int32_t words() const { return words_; }
  /// The columns of word w that are reached, as bits.
  uint64_t reached(int32_t w) const {
    const int32_t first = columns_.first - origin_ - w * kColumns;
    const int32_t end = columns_.end - origin_ - w * kColumns;
    const uint64_t from = first > 0 ? ~uint64_t{0} << first : ~uint64_t{0};
    return end < kColumns ? from & ~(~uint64_t{0} << end) : from;
  }

  /// Calls same(first, end, w, word) for rows first .. end - 1 that hold one word, and
  /// each(first, count, w, words) for at most kMostRows others. Every reached row has each w once,
  /// and rows come in order. Columns out of reach hold anything.
  template <class Same, class Each>
  void visit(const Same& same, const Each& each) {
    // Below a denormal threshold or beyond a huge one, rounding is another.
    const bool shortens = threshold_ > A(1e-30) && threshold_ < A(1e30);
    for (const Segment& segment : segments_) {
      const A* spread[2] = {spread_.row(segment.row[0], segment.row[1]),
                            spread_.row(segment.row[1], segment.row[0])};
      // Of a single row both weights are halves, and zeros lie beyond it.
      if (!shortens || segment.row[0] == segment.row[1]) {
        for (int32_t w = 0; w < words_; ++w) compute(segment, spread, w, 0, ~uint64_t{0}, each);
        continue;
      }
      const int first = sides_of(segment.row[0], segment.row[1], spread[0]);
      const int second = sides_of(segment.row[1], segment.row[0], spread[1]);
      for (int32_t w = 0; w < words_; ++w) {
        const auto i = static_cast<size_t>(w);
        const uint64_t ones = above_[first][i] & above_[second][i];
        const uint64_t zeros = below_[first][i] & below_[second][i];
        const uint64_t unknown = ~(ones | zeros) & reached(w);
        if (unknown == 0) {
          same(segment.first, segment.end, w, ones);
        } else {
          compute(segment, spread, w, ones, unknown, each);
        }
      }
    }
  }

 private:
  /// Rows first..end - 1 of the image, which read the same rows of the mask.
  struct Segment {
    int32_t first, end;
    int32_t row[2];
  };

  void find_segments(const PasteLine<A>& line) {
    const int32_t count = rows_.end - rows_.first;
    pairs_.find(line, rows_, 0, count);
    const int32_t *low = pairs_.pixel(0), *high = pairs_.pixel(1);
    segments_.clear();
    int32_t first = 0;
    for (int32_t i = 1; i <= count; ++i) {
      if (i < count && low[i] == low[first] && high[i] == high[first]) continue;
      segments_.push_back({rows_.first + first, rows_.first + i, {low[first], high[first]}});
      first = i;
    }
  }

  /// The slot of above_ and below_ that holds those of row `pixel` of the mask.
  int sides_of(int32_t pixel, int32_t other, const A* spread) {
    for (int slot = 0; slot < 2; ++slot) {
      if (known_[slot] == pixel) return slot;
    }
    const int slot = known_[0] == other ? 1 : 0;
    known_[slot] = pixel;
    kernels<T>().paste_sides(spread, words_, threshold_, above_[slot].data(), below_[slot].data());
    return slot;
  }

  template <class Each>
  void compute(const Segment& segment, const A* const (&spread)[2], int32_t w, uint64_t ones,
               uint64_t unknown, const Each& each) {
    uint64_t words[kMostRows];
    for (int32_t y = segment.first; y < segment.end; y += kMostRows) {
      const int32_t rows = std::min(kMostRows, segment.end - y);
      const PasteBlock<A> block = {
          {spread[0] + int64_t{w} * kColumns, spread[1] + int64_t{w} * kColumns},
          {pairs_.weight(0) + (y - rows_.first), pairs_.weight(1) + (y - rows_.first)},
          rows,
          threshold_,
          ones,
          unknown};
      kernels<T>().paste_bits(block, words);
      each(y, rows, w, words);
    }
  }

  const PasteProblem& problem_;
  A threshold_;
  bool background_;
  Cells rows_ = {0, 0}, columns_ = {0, 0};
  int32_t origin_ = 0, words_ = 0;
  std::vector<Segment> segments_;
  LinePairs<A> pairs_;  // of the rows
  SpreadRows<T> spread_;
  std::vector<uint64_t> above_[2], below_[2];  // of two rows of the mask
  int32_t known_[2] = {-1, -1};
};

}  // namespace glimpse
