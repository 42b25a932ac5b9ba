// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <vector>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace glimpse {
namespace {

constexpr int32_t kQuad = 4;

/// The weights of all cells of an axis, or of some rows of cells.
template <class A>
struct Weights {
  std::vector<int32_t> first, start;  // of each cell: its first pixel; where its weights begin
  std::vector<A> weight, coverage;
  int32_t low = 0, high = -1;  // pixels that are read
  int32_t longest = 0;
  bool covered = true;  // no cell reaches beyond the image

  void build(const FilterLine& line, int32_t begin, int32_t end) {
    first.clear();
    weight.clear();
    coverage.clear();
    start.assign(1, 0);
    low = longest = 0;
    high = -1;
    covered = true;
    for (int32_t cell = begin; cell < end; ++cell) {
      const FilterRow<A> row = line.row<A>(cell);
      int32_t from = 0, to = row.count;
      // The filter ends on a pixel, which then counts nothing and is not read.
      while (to > from && row.weight(to - 1) == 0) --to;
      while (to > from && row.weight(from) == 0) ++from;
      first.push_back(row.first + from);
      for (int32_t i = from; i < to; ++i) weight.push_back(row.weight(i));
      start.push_back(static_cast<int32_t>(weight.size()));
      coverage.push_back(row.coverage);
      covered = covered && row.coverage == 1;
      if (to == from) continue;
      low = high < low ? row.first + from : std::min(low, row.first + from);
      high = std::max(high, row.first + to - 1);
      longest = std::max(longest, to - from);
    }
  }

  int32_t cells() const { return static_cast<int32_t>(first.size()); }
  int32_t taps(int32_t cell) const { return start[cell + 1] - start[cell]; }
  bool empty() const { return high < low; }

  /// Counts pixels from the lowest one on.
  void shift() {
    for (int32_t cell = 0; cell < cells(); ++cell) {
      first[cell] = taps(cell) == 0 ? 0 : first[cell] - low;
    }
  }

  /// Gives all cells the same number of weights: zeros behind their own.
  void pad() {
    padded.assign(static_cast<size_t>(cells()) * longest, A(0));
    for (int32_t cell = 0; cell < cells(); ++cell) {
      std::copy(weight.begin() + start[cell], weight.begin() + start[cell + 1],
                padded.begin() + int64_t{cell} * longest);
    }
  }
  std::vector<A> padded;
};

/// One thread's part: rows of cells of boxes.
template <class T>
class BatchWorker {
 public:
  using A = acc_t<T>;

  explicit BatchWorker(const BatchProblem& batch)
      : batch_(batch), problem_(batch.problem), kernel_(kernels<T>()) {
    const auto channels = static_cast<int32_t>(problem_.channels);
    nchw_ = problem_.layout == Layout::kNchw;
    out_stride_ = (int64_t{problem_.out_width} + kQuad - 1) / kQuad * kQuad;
    out_.resize(static_cast<size_t>(nchw_ ? channels * out_stride_
                                          : int64_t{problem_.out_width} * channels + kQuad));
    for (int32_t c = 0; c < channels + kQuad; ++c) {
      multiplier_.push_back(static_cast<A>(c < channels ? batch.multiplier[c] : 0));
      offset_.push_back(static_cast<A>(c < channels ? batch.offset[c] : 0));
    }
  }

  void run(int64_t k, int32_t begin, int32_t end) {
    if (k != box_) plan(k);
    rows_.build(line_y_, begin, end);
    for (int32_t i = begin; i < end; ++i) {
      if (rows_.taps(i - begin) == 0 || columns_.empty()) {
        row_of_fill();
      } else {
        row(i - begin);
      }
      write(k, i);
    }
  }

 private:
  void plan(int64_t k) {
    box_ = k;
    const Box<A> box = read_box<A>(problem_, k);
    image_ = box.level < 0 ? BatchImage{} : batch_.image<T>(box.image);
    const auto line = [&](int32_t direction, int32_t size) {
      return box.level < 0 ? FilterLine::of(problem_.filter, 0, 0, 0, 1)
                           : filter_line(problem_, box, direction, size);
    };
    line_y_ = line(kY, image_.height);
    columns_.build(line(kX, image_.width), 0, problem_.out_width);
    if (columns_.empty()) return;
    columns_.shift();
    // Numbers that are finite may be read with a weight of zero.
    const int64_t all = int64_t{columns_.longest} * columns_.cells();
    const auto weights = static_cast<int64_t>(columns_.weight.size());
    uniform_ = weights == all || (sizeof(T) == 1 && 2 * weights >= all);
    if (uniform_) columns_.pad();

    const auto channels = static_cast<int32_t>(problem_.channels);
    const int64_t pixels = int64_t{columns_.high} - columns_.low + 1;
    planes_ = !(image_.stride_c == 1 && (image_.width == 1 || image_.stride_w >= channels)) &&
              channels > 1;
    // A single column has whatever stride.
    const int64_t pitch = image_.width == 1 ? 1 : image_.stride_w;
    pitch_ = static_cast<int32_t>(planes_ ? kQuad : image_.width == 1 ? channels : pitch);
    const int64_t elements = planes_ ? pixels : (pixels - 1) * pitch_ + channels;
    const int64_t lanes = kernel_.lanes;
    vectors_ = static_cast<int32_t>((elements + lanes - 1) / lanes);
    last_valid_ = static_cast<int32_t>(elements - (vectors_ - 1) * lanes);
    const int64_t room = (vectors_ * lanes + kQuad - 1) / kQuad * kQuad;
    // Behind the pixels lie zeros, as many as padded cells can reach.
    const int64_t behind = (int64_t{columns_.longest} + 1) * pitch_ + kQuad;
    sums_.assign(static_cast<size_t>(room + behind), A(0));
    if (planes_) {
      planes_stride_ = room;
      plane_sums_.assign(static_cast<size_t>(kQuad * room), A(0));
      sums_.assign(static_cast<size_t>(kQuad * room + behind), A(0));
    }
  }

  /// The cells of a row as numbers of the result.
  void row(int32_t i) {
    const int32_t taps = rows_.taps(i);
    const A* weights = rows_.weight.data() + rows_.start[i];
    for (int32_t t = static_cast<int32_t>(pixel_rows_.size()); t < taps; ++t) {
      pixel_rows_.push_back(t);
    }
    const T* from = static_cast<const T*>(image_.data) + rows_.first[i] * image_.stride_h +
                    (image_.width > 1 ? columns_.low * image_.stride_w : 0);
    const auto sum = [&](const T* at, A* to) {
      kernel_.batch_rows(at, image_.stride_h, pixel_rows_.data(), weights, taps, vectors_,
                         last_valid_, to);
    };
    if (!planes_) sum(from, sums_.data());
    BatchCells<A> cells = {};
    cells.row = sums_.data();
    cells.pitch = pitch_;
    cells.count = columns_.cells();
    cells.taps = uniform_ ? columns_.longest : 0;
    cells.first = columns_.first.data();
    cells.start = columns_.start.data();
    cells.weight = uniform_ ? columns_.padded.data() : columns_.weight.data();
    cells.fill = fill_of_row(rows_.coverage[i]);
    const auto channels = static_cast<int32_t>(problem_.channels);
    for (int32_t c = 0; c < channels; c += kQuad) {
      cells.channels = std::min(kQuad, channels - c);
      if (planes_) {
        for (int32_t own = 0; own < cells.channels; ++own) {
          sum(from + (c + own) * image_.stride_c, plane_sums_.data() + own * planes_stride_);
        }
        kernel_.batch_interleave(plane_sums_.data(), planes_stride_, cells.channels,
                                 static_cast<int32_t>(planes_stride_), sums_.data());
      } else {
        cells.row = sums_.data() + c;
      }
      std::copy_n(multiplier_.data() + c, kQuad, cells.multiplier);
      std::copy_n(offset_.data() + c, kQuad, cells.offset);
      kernel_.batch_cells(cells, nchw_ ? 0 : channels, out_stride_,
                          out_.data() + (nchw_ ? c * out_stride_ : c));
    }
  }

  /// What the part of each cell outside the image adds.
  const A* fill_of_row(A coverage) {
    if (batch_.fill == 0 || (coverage == 1 && columns_.covered)) return nullptr;
    fill_.resize(columns_.coverage.size());
    for (size_t j = 0; j < fill_.size(); ++j) {
      fill_[j] = static_cast<A>(batch_.fill) * (1 - coverage * columns_.coverage[j]);
    }
    return fill_.data();
  }

  void row_of_fill() {
    const auto channels = static_cast<int32_t>(problem_.channels);
    for (int32_t c = 0; c < channels; ++c) {
      const A value = static_cast<A>(batch_.fill) * multiplier_[c] + offset_[c];
      for (int32_t j = 0; j < problem_.out_width; ++j) {
        out_[nchw_ ? c * out_stride_ + j : int64_t{j} * channels + c] = value;
      }
    }
  }

  void write(int64_t k, int32_t i) {
    const int64_t channels = problem_.channels, width = problem_.out_width;
    const int64_t rows = problem_.out_height;
    if (!nchw_) {
      return kernel_.batch_store(out_.data(), width * channels, batch_.result, problem_.pooled,
                                 (k * rows + i) * width * channels);
    }
    for (int64_t c = 0; c < channels; ++c) {
      kernel_.batch_store(out_.data() + c * out_stride_, width, batch_.result, problem_.pooled,
                          ((k * channels + c) * rows + i) * width);
    }
  }

  const BatchProblem& batch_;
  const Problem& problem_;
  const Kernels<T>& kernel_;
  bool nchw_;
  int64_t out_stride_;
  std::vector<A> multiplier_, offset_;

  int64_t box_ = -1;
  BatchImage image_ = {};
  FilterLine line_y_ = {};
  Weights<A> rows_, columns_;
  bool planes_ = false, uniform_ = false;
  int32_t pitch_ = 0, vectors_ = 0, last_valid_ = 0;
  int64_t planes_stride_ = 0;
  std::vector<int32_t> pixel_rows_;  // 0, 1, 2, ...
  std::vector<A> sums_, plane_sums_, fill_, out_;
};

/// Tasks are bands of rows of cells of a box.
template <class T>
void crop_batch_typed(const BatchProblem& batch) {
  const Problem& problem = batch.problem;
  const int64_t height = problem.out_height;
  const int64_t workers =
      workers_for(problem.boxes * problem.channels * height * problem.out_width);
  constexpr int64_t kLeastRows = 16;
  const int64_t wanted =
      workers == 1 ? 1 : std::max<int64_t>((4 * workers + problem.boxes - 1) / problem.boxes, 1);
  const int64_t bands = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(height / kLeastRows, 1));
  parallel_tasks(problem.boxes * bands, workers, [&](const auto& next) {
    BatchWorker<T> worker(batch);
    for (int64_t task = next(); task < problem.boxes * bands; task = next()) {
      const int64_t band = task % bands;
      worker.run(task / bands, static_cast<int32_t>(height * band / bands),
                 static_cast<int32_t>(height * (band + 1) / bands));
    }
  });
}

}  // namespace

void cpu_crop_batch(const BatchProblem& batch) {
  with_feature_type(batch.problem.dtype,
                    [&](auto type) { crop_batch_typed<typename decltype(type)::type>(batch); });
}

}  // namespace glimpse
