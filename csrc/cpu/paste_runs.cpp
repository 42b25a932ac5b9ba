// SPDX-License-Identifier: BSD-3-Clause
//
// Masks as run lengths, without their images. The cost of a mask is that of its outline.
//
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
// 64 columns are looked at together, row by row; their changes are then put into columns.
#include "cpu/paste_runs.h"

#include <algorithm>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/paste_rows.h"
#include "half.h"

namespace glimpse {
namespace {

/// Builds PastedRuns from changes, which come in order.
class RunWriter {
 public:
  RunWriter(PastedRuns& runs, int64_t height) : runs_(runs), height_(height) {}

  /// From row y of column x on, pixels are `value`.
  void set(int64_t x, int64_t y, bool value) {
    if (value == value_) return;
    close(x, y);
    value_ = value;
    x_ = x;
    y_ = y;
  }

  /// The image ends before column `width`.
  void end(int64_t width) { close(width, 0); }

 private:
  void close(int64_t x, int64_t y) {
    const int64_t position = x * height_ + y;
    runs_.lengths.push_back(position - last_);
    if (value_ && position > last_) add_ones(position - last_, x, y);
    last_ = position;
  }

  /// A run of ones that ends before row y of column x.
  void add_ones(int64_t count, int64_t x, int64_t y) {
    if (y == 0) {
      --x;
      y = height_;
    }
    const bool one_column = x == x_;
    const int64_t top = one_column ? y_ : 0, bottom = one_column ? y : height_;
    const bool first = runs_.area == 0;
    runs_.x1 = first ? x_ : std::min(runs_.x1, x_);
    runs_.y1 = first ? top : std::min(runs_.y1, top);
    runs_.x2 = std::max(runs_.x2, x + 1);
    runs_.y2 = std::max(runs_.y2, bottom);
    runs_.area += count;
  }

  PastedRuns& runs_;
  int64_t height_;
  int64_t last_ = 0, x_ = 0, y_ = 0;
  bool value_ = false;
};

/// Rows first..end - 1 of the image, which read the same rows of the mask.
struct Segment {
  int32_t first, end;
  int32_t row[2];
};

/// Note [Which pixels are computed]
template <class T>
class RunsOfMask {
 public:
  using A = acc_t<T>;

  explicit RunsOfMask(const PasteProblem& problem)
      : problem_(problem),
        threshold_(static_cast<A>(problem.threshold)),
        background_(A(0) >= threshold_) {}

  void write(int64_t k, PastedRuns& runs) {
    RunWriter writer(runs, problem_.height);
    const auto along_y = PasteLine<A>::of(problem_, k, kY);
    const auto along_x = PasteLine<A>::of(problem_, k, kX);
    rows_ = reading_cells(along_y);
    columns_ = reading_cells(along_x);
    const bool reached = rows_.first < rows_.end && columns_.first < columns_.end;
    const bool has_pixels = problem_.height > 0 && problem_.width > 0;
    if (has_pixels && (!reached || columns_.first > 0)) writer.set(0, 0, background_);
    if (reached) {
      find_segments(along_y);
      spread_.start(problem_, k, along_x, columns_);
      find_changes();
      for (int32_t x = columns_.first; x < columns_.end; ++x) write_column(x, writer);
      if (columns_.end < problem_.width) writer.set(columns_.end, 0, background_);
    }
    writer.end(problem_.width);
  }

 private:
  static constexpr int32_t kWord = 64;

  void find_segments(const PasteLine<A>& line) {
    segments_.clear();
    weight_.resize(2 * static_cast<size_t>(rows_.end - rows_.first));
    A* weight = weight_.data();
    for (int32_t y = rows_.first; y < rows_.end; ++y, weight += 2) {
      const auto pair = Pair<A>::of(line.taps(y));
      weight[0] = pair.weight[0];
      weight[1] = pair.weight[1];
      Segment* last = segments_.empty() ? nullptr : &segments_.back();
      if (last != nullptr && last->row[0] == pair.pixel[0] && last->row[1] == pair.pixel[1]) {
        last->end = y + 1;
      } else {
        segments_.push_back({y, y + 1, {pair.pixel[0], pair.pixel[1]}});
      }
    }
  }

  /// The rows of each column at which it changes, from background above the mask on.
  void find_changes() {
    const int32_t count = columns_.end - columns_.first;
    words_ = (count + kWord - 1) / kWord;
    last_word_ = ~uint64_t{0} >> (words_ * kWord - count);
    stride_ = static_cast<size_t>(words_) * kWord;
    count_.assign(stride_, 0);
    before_.assign(static_cast<size_t>(words_), background_ ? ~uint64_t{0} : 0);
    for (int slot = 0; slot < 2; ++slot) {
      above_[slot].resize(static_cast<size_t>(words_));
      below_[slot].resize(static_cast<size_t>(words_));
      known_[slot] = -1;
    }
    // Below a denormal threshold or beyond a huge one, rounding is another.
    const bool shortens = threshold_ > A(1e-30) && threshold_ < A(1e30);
    for (const Segment& segment : segments_) {
      const A* spread[2] = {spread_.row(segment.row[0], segment.row[1]),
                            spread_.row(segment.row[1], segment.row[0])};
      // Of a single row both weights are halves, and zeros lie beyond it.
      const bool two = segment.row[0] != segment.row[1];
      if (!shortens || !two) {
        for (int32_t w = 0; w < words_; ++w) compute(segment, spread, w);
        continue;
      }
      const int first = sides_of(segment.row[0], segment.row[1], spread[0]);
      const int second = sides_of(segment.row[1], segment.row[0], spread[1]);
      for (int32_t w = 0; w < words_; ++w) {
        const auto i = static_cast<size_t>(w);
        const uint64_t ones = above_[first][i] & above_[second][i];
        const uint64_t zeros = below_[first][i] & below_[second][i];
        if ((ones | zeros | (w + 1 == words_ ? ~last_word_ : 0)) == ~uint64_t{0}) {
          add_row(segment.first, w, ones);
        } else {
          compute(segment, spread, w);
        }
      }
    }
    if (rows_.end == problem_.height) return;
    for (int32_t w = 0; w < words_; ++w) add_row(rows_.end, w, background_ ? ~uint64_t{0} : 0);
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

  void compute(const Segment& segment, const A* const (&spread)[2], int32_t w) {
    constexpr int32_t kRows = 64;
    uint64_t words[kRows];
    for (int32_t y = segment.first; y < segment.end; y += kRows) {
      const int32_t rows = std::min(kRows, segment.end - y);
      const A* weight = &weight_[2 * static_cast<size_t>(y - rows_.first)];
      kernels<T>().paste_bits(
          {{spread[0] + w * kWord, spread[1] + w * kWord}, weight, rows, threshold_}, words);
      for (int32_t i = 0; i < rows; ++i) add_row(y + i, w, words[i]);
    }
  }

  /// Bit i of `word` is the pixel of row y in column w * kWord + i.
  void add_row(int32_t y, int32_t w, uint64_t word) {
    uint64_t& before = before_[static_cast<size_t>(w)];
    uint64_t changed = (word ^ before) & (w + 1 == words_ ? last_word_ : ~uint64_t{0});
    before = word;
    for (; changed != 0; changed &= changed - 1) {
      const size_t column =
          static_cast<size_t>(w) * kWord + static_cast<size_t>(__builtin_ctzll(changed));
      const size_t at = static_cast<size_t>(count_[column]++) * stride_ + column;
      if (at >= changes_.size()) changes_.resize(at / stride_ * stride_ + stride_);
      changes_[at] = y;
    }
  }

  void write_column(int32_t x, RunWriter& writer) {
    const auto column = static_cast<size_t>(x - columns_.first);
    const int32_t* change = changes_.data() + column;
    int32_t left = count_[column];
    bool value = background_;
    const auto next = [&] {
      const int32_t y = *change;
      change += stride_;
      --left;
      value = !value;
      return y;
    };
    // A column that starts with another value does not start with the background first.
    if (left > 0 && *change == 0) next();
    writer.set(x, 0, value);
    while (left > 0) {
      const int32_t y = next();
      writer.set(x, y, value);
    }
  }

  const PasteProblem& problem_;
  A threshold_;
  bool background_;
  Cells rows_ = {0, 0}, columns_ = {0, 0};  // of the image that read the mask
  std::vector<Segment> segments_;
  std::vector<A> weight_;  // two of each row
  SpreadRows<T> spread_;
  int32_t words_ = 0;
  uint64_t last_word_ = 0;                     // its columns
  std::vector<uint64_t> above_[2], below_[2];  // of two rows of the mask
  int32_t known_[2] = {-1, -1};
  std::vector<uint64_t> before_;  // the row above
  /// First the first change of every column, then the second one and so on: columns have few.
  std::vector<int32_t> changes_;
  std::vector<int32_t> count_;  // of changes of each column
  size_t stride_ = 0;           // columns
};

}  // namespace

void cpu_paste_runs(const PasteProblem& problem, PastedRuns* runs) {
  constexpr int64_t kOutputsOfMask = 2048;  // about what a mask costs, in numbers of other kernels
  const int64_t workers = workers_for(problem.masks * kOutputsOfMask);
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_tasks(problem.masks, workers, [&](const auto& next) {
      RunsOfMask<T> mask(problem);
      for (int64_t k = next(); k < problem.masks; k = next()) mask.write(k, runs[k]);
    });
  });
}

void append_coco_counts(const std::vector<int64_t>& lengths, std::string& text) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    // After the third run, differences to the run of the same kind before it; then groups of five
    // bits, low ones first, with a sixth bit where more follow.
    int64_t rest = i > 2 ? lengths[i] - lengths[i - 2] : lengths[i];
    bool more = true;
    while (more) {
      int64_t group = rest & 0x1f;
      rest >>= 5;
      more = (group & 0x10) != 0 ? rest != -1 : rest != 0;
      if (more) group |= 0x20;
      text.push_back(static_cast<char>(group + 48));
    }
  }
}

}  // namespace glimpse
