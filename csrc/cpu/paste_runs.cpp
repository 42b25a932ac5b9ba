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
#include "cpu/paste_runs.h"

#include <algorithm>
#include <limits>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
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

/// On which side of the threshold a number surely keeps the means that it is part of.
enum class Side : uint8_t { kUnsure, kOnes, kZeros };

/// Note [Which pixels are computed]
template <class A>
class Sides {
 public:
  explicit Sides(A threshold)
      : threshold_(threshold), shortens_(threshold > A(1e-30) && threshold < A(1e30)) {}

  bool shortens() const { return shortens_; }

  /// NaN is on no side. A mean of two numbers is rounded three times, and so are its weights.
  Side of(A value) const {
    constexpr A kMargin = 16 * std::numeric_limits<A>::epsilon();
    const A magnitude = value < 0 ? -value : value;
    // An infinite number times a weight of 0 would be NaN.
    if (!shortens_ || !(magnitude < A(1e30))) return Side::kUnsure;
    if (value - kMargin * magnitude > threshold_) return Side::kOnes;
    return value + kMargin * magnitude < threshold_ ? Side::kZeros : Side::kUnsure;
  }

 private:
  A threshold_;
  bool shortens_;
};

/// Rows first..end - 1 of the image, which read the same rows of the mask.
struct Segment {
  int32_t first, end;
  int32_t taps;
  int32_t row[2];
};

template <class T>
class RunsOfMask {
 public:
  using A = acc_t<T>;

  explicit RunsOfMask(const PasteProblem& problem)
      : problem_(problem),
        store_(problem),
        sides_(static_cast<A>(problem.threshold)),
        background_(store_(A(0)) != 0),
        mask_height_(static_cast<size_t>(problem.mask_height)),
        column_(mask_height_),
        side_(mask_height_) {
    for (std::vector<A>& column : columns_) column.resize(mask_height_);
  }

  void write(int64_t k, PastedRuns& runs) {
    RunWriter writer(runs, problem_.height);
    const auto along_y = PasteLine<A>::of(problem_, k, kY);
    const auto along_x = PasteLine<A>::of(problem_, k, kX);
    writer.set(0, 0, problem_.height > 0 && problem_.width > 0 && background_);
    if (along_y.pixels.first < along_y.pixels.end && along_x.pixels.first < along_x.pixels.end) {
      find_segments(along_y);
      mask_ = static_cast<const T*>(problem_.mask) + k * problem_.stride_n;
      held_[0] = held_[1] = -1;
      for (int32_t x = along_x.pixels.first; x < along_x.pixels.end; ++x) {
        write_column(x, along_x.taps(x), along_y.pixels, writer);
      }
      if (along_x.pixels.end < problem_.width) writer.set(along_x.pixels.end, 0, background_);
    }
    writer.end(problem_.width);
  }

 private:
  void find_segments(const PasteLine<A>& line) {
    const Cells rows = line.pixels;
    segments_.clear();
    weight_.resize(2 * static_cast<size_t>(rows.end - rows.first));
    first_row_ = rows.first;
    for (int32_t y = rows.first; y < rows.end; ++y) {
      const Taps<A> taps = line.taps(y);
      const int32_t second = taps.count == 2 ? taps.pixel[1] : -1;
      const int32_t first = taps.count > 0 ? taps.pixel[0] : -1;
      A* weight = &weight_[2 * static_cast<size_t>(y - first_row_)];
      weight[0] = taps.weight[0];
      weight[1] = taps.weight[1];
      if (!segments_.empty() && segments_.back().row[0] == first &&
          segments_.back().row[1] == second) {
        segments_.back().end = y + 1;
      } else {
        segments_.push_back({y, y + 1, taps.count, {first, second}});
      }
    }
  }

  /// Column `pixel` of the mask. Stays valid until one other than `pixel` and `other` is asked for.
  const A* mask_column(int32_t pixel, int32_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == pixel) return columns_[slot].data();
    }
    const int slot = held_[0] == other ? 1 : 0;
    held_[slot] = pixel;
    const T* from = mask_ + pixel * problem_.stride_w;
    for (size_t i = 0; i < mask_height_; ++i, from += problem_.stride_h) {
      columns_[slot][i] = load_value(*from);
    }
    return columns_[slot].data();
  }

  void write_column(int32_t x, const Taps<A>& taps, Cells rows, RunWriter& writer) {
    if (rows.first > 0 || taps.count == 0) writer.set(x, 0, background_);
    if (taps.count == 0) return;
    read_column(taps);
    for (const Segment& segment : segments_) write_segment(x, segment, writer);
    if (rows.end < problem_.height) writer.set(x, rows.end, background_);
  }

  /// column_ = the mask between its columns, for all rows of the mask.
  void read_column(const Taps<A>& taps) {
    const bool two = taps.count == 2;
    const A* left = mask_column(taps.pixel[0], two ? taps.pixel[1] : -1);
    if (two) {
      const A* right = mask_column(taps.pixel[1], taps.pixel[0]);
      for (size_t i = 0; i < mask_height_; ++i) {
        column_[i] = taps.weight[0] * left[i] + taps.weight[1] * right[i];
      }
    } else {
      for (size_t i = 0; i < mask_height_; ++i) column_[i] = taps.weight[0] * left[i];
    }
    for (size_t i = 0; i < mask_height_; ++i) side_[i] = sides_.of(column_[i]);
  }

  void write_segment(int32_t x, const Segment& segment, RunWriter& writer) {
    if (segment.taps == 0) return writer.set(x, segment.first, background_);
    const auto above = static_cast<size_t>(segment.row[0]);
    // Beyond the edge of the mask there are zeros.
    const bool two = segment.taps == 2;
    const auto below = static_cast<size_t>(two ? segment.row[1] : 0);
    const Side side = side_[above];
    const Side other = two ? side_[below] : sides_.shortens() ? Side::kZeros : Side::kUnsure;
    if (side == other && side != Side::kUnsure) {
      return writer.set(x, segment.first, side == Side::kOnes);
    }
    const A a = column_[above], b = two ? column_[below] : A(0);
    const A* weight = &weight_[2 * static_cast<size_t>(segment.first - first_row_)];
    for (int32_t y = segment.first; y < segment.end; ++y, weight += 2) {
      const A value = two ? weight[0] * a + weight[1] * b : weight[0] * a;
      writer.set(x, y, store_(value) != 0);
    }
  }

  const PasteProblem& problem_;
  PasteStore<A, uint8_t> store_;
  Sides<A> sides_;
  bool background_;
  size_t mask_height_;
  int32_t first_row_ = 0;
  std::vector<Segment> segments_;
  std::vector<A> weight_;  // two of each row
  const T* mask_ = nullptr;
  int32_t held_[2] = {-1, -1};  // columns of the mask in columns_
  std::vector<A> columns_[2];
  std::vector<A> column_;   // of the image: the mask between two of its columns
  std::vector<Side> side_;  // of column_
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
