// SPDX-License-Identifier: BSD-3-Clause
//
// Masks as run lengths, without their images. The cost of a mask is that of its outline: words of
// 64 columns are looked at row by row (paste_words.h), and their changes are then put into columns.
#include "cpu/paste_runs.h"

#include <vector>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/paste_words.h"
#include "half.h"

namespace glimpse {
namespace {

template <class T>
class RunsOfMask {
 public:
  explicit RunsOfMask(const PasteProblem& problem) : problem_(problem), pixels_(problem) {}

  CocoMask make(int64_t k) {
    writer_.start(problem_.height);
    const bool reached = pixels_.start(k, 1), background = pixels_.background();
    const Cells columns = pixels_.columns();
    const bool has_pixels = problem_.height > 0 && problem_.width > 0;
    if (has_pixels && background && (!reached || columns.first > 0)) writer_.change(0, 0);
    if (reached) {
      find_changes();
      for (int32_t x = columns.first; x < columns.end; ++x) write_column(x - columns.first, x);
      if (columns.end < problem_.width && writer_.value() != background) {
        writer_.change(columns.end * int64_t{problem_.height}, 0);
      }
    }
    return writer_.end(problem_.width);
  }

 private:
  /// The rows of each column at which it changes, from background above the mask on.
  void find_changes() {
    const uint64_t background = pixels_.background() ? ~uint64_t{0} : 0;
    const int32_t words = pixels_.words();
    stride_ = static_cast<size_t>(words) * PasteWords<T>::kColumns;
    count_.assign(stride_, 0);
    before_.assign(static_cast<size_t>(words), background);
    pixels_.visit(
        [&](int32_t first, int32_t, int32_t w, uint64_t word) { add_row(first, w, word); },
        [&](int32_t first, int32_t rows, int32_t w, const uint64_t* word) {
          for (int32_t i = 0; i < rows; ++i) add_row(first + i, w, word[i]);
        });
    const int32_t end = pixels_.rows().end;
    if (end == problem_.height) return;
    for (int32_t w = 0; w < words; ++w) add_row(end, w, background);
  }

  /// Bit i of `word` is the pixel of row y in column w * kColumns + i.
  void add_row(int32_t y, int32_t w, uint64_t word) {
    uint64_t& before = before_[static_cast<size_t>(w)];
    uint64_t changed = (word ^ before) & pixels_.reached(w);
    before = word;
    const size_t first = static_cast<size_t>(w) * PasteWords<T>::kColumns;
    for (; changed != 0; changed &= changed - 1) {
      const size_t column = first + static_cast<size_t>(__builtin_ctzll(changed));
      const size_t at = static_cast<size_t>(count_[column]++) * stride_ + column;
      if (at >= changes_.size()) changes_.resize(at / stride_ * stride_ + stride_);
      changes_[at] = y;
    }
  }

  void write_column(int32_t column, int32_t x) {
    const int32_t* change = changes_.data() + column;
    int32_t left = count_[static_cast<size_t>(column)];
    const int64_t place = x * int64_t{problem_.height};
    bool first = pixels_.background();
    if (left > 0 && *change == 0) {
      first = !first;
      change += stride_;
      --left;
    }
    if (first != writer_.value()) writer_.change(place, 0);
    for (; left > 0; --left, change += stride_) writer_.change(place, *change);
  }

  const PasteProblem& problem_;
  PasteWords<T> pixels_;
  RunWriter writer_;
  std::vector<uint64_t> before_;  // the row above
  /// First the first change of every column, then the second one and so on: columns have few.
  std::vector<int32_t> changes_;
  std::vector<int32_t> count_;  // of changes of each column
  size_t stride_ = 0;           // columns
};

}  // namespace

void cpu_paste_runs(const PasteProblem& problem, CocoMask* runs) {
  constexpr int64_t kOutputsOfMask = 2048;  // about what a mask costs, in numbers of other kernels
  const int64_t workers = workers_for(problem.masks * kOutputsOfMask);
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_tasks(problem.masks, workers, [&](const auto& next) {
      RunsOfMask<T> mask(problem);
      for (int64_t k = next(); k < problem.masks; k = next()) runs[k] = mask.make(k);
    });
  });
}

}  // namespace glimpse
