// SPDX-License-Identifier: BSD-3-Clause
//
// Masks into images. A box is a few percent of its image, so what costs is memory that is touched,
// not arithmetic: rows that the mask does not reach are left alone where they hold zeros already.
//
// A row of mask pixels is spread over the columns of the image once and serves all rows of the
// image that lie between it and the next one; a row of the image is then a weighted sum of two
// spread rows, which vectorises by itself.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "half.h"

namespace glimpse {
namespace {

/// Two pixels with their weights. Of a single pixel each slot holds one half, so that nothing has
/// to be asked, and nothing is read that does not count: it could be infinite.
template <class A>
struct Pair {
  int32_t pixel[2];
  A weight[2];

  explicit Pair(const Taps<A>& taps) {
    pixel[0] = taps.pixel[0];
    pixel[1] = taps.count == 2 ? taps.pixel[1] : taps.pixel[0];
    weight[0] = taps.count == 2 ? taps.weight[0] : taps.weight[0] / 2;
    weight[1] = taps.count == 2 ? taps.weight[1] : weight[0];
  }
};

/// Takes the cells from `line` that read nothing: a sample may lie on the first pixel outside.
template <class A>
Cells reading_cells(const PasteLine<A>& line) {
  Cells cells = line.cells;
  while (cells.first < cells.end && line.taps(cells.first).count == 0) ++cells.first;
  while (cells.first < cells.end && line.taps(cells.end - 1).count == 0) --cells.end;
  return cells;
}

/// The rows of one mask, spread over the columns of the image that it reaches. The last two are
/// kept: the rows of the image need them in order.
template <class T>
class SpreadRows {
 public:
  using A = acc_t<T>;

  void start(const PasteProblem& problem, int64_t k, const PasteLine<A>& line, Cells columns) {
    mask_ = static_cast<const T*>(problem.mask) + k * problem.stride_n;
    stride_h_ = problem.stride_h;
    columns_.clear();
    offsets_.clear();
    for (int32_t x = columns.first; x < columns.end; ++x) {
      columns_.emplace_back(line.taps(x));
      Pair<A>& pair = columns_.back();
      for (int64_t tap = 0; tap < 2; ++tap) offsets_.push_back(pair.pixel[tap] * problem.stride_w);
    }
    for (int slot = 0; slot < 2; ++slot) {
      pixel_[slot] = -1;
      rows_[slot].resize(columns_.size());
    }
  }

  /// Row `pixel` of the mask. Stays valid until a row other than `pixel` and `other` is asked for.
  const A* row(int32_t pixel, int32_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (pixel_[slot] == pixel) return rows_[slot].data();
    }
    const int slot = pixel_[0] == other ? 1 : 0;
    pixel_[slot] = pixel;
    const T* from = mask_ + pixel * stride_h_;
    A* to = rows_[slot].data();
    for (size_t x = 0; x < columns_.size(); ++x) {
      to[x] = columns_[x].weight[0] * load_value(from[offsets_[2 * x]]) +
              columns_[x].weight[1] * load_value(from[offsets_[2 * x + 1]]);
    }
    return to;
  }

 private:
  const T* mask_ = nullptr;
  int64_t stride_h_ = 0;
  std::vector<Pair<A>> columns_;
  std::vector<int64_t> offsets_;
  std::vector<A> rows_[2];
  int32_t pixel_[2] = {-1, -1};
};

template <class A, class Store, class Out>
void blend_rows(const A* above, const A* below, A weight_above, A weight_below, int32_t count,
                const Store& store, Out* to) {
  for (int32_t x = 0; x < count; ++x) {
    to[x] = store(weight_above * above[x] + weight_below * below[x]);
  }
}

/// What a mask reaches, part `part` of `parts`, and the background around it.
template <class T, class Out>
void paste_part(const PasteProblem& problem, int64_t k, int64_t part, int64_t parts,
                SpreadRows<T>& spread) {
  using A = acc_t<T>;
  const PasteStore<A, Out> store(problem);
  const auto along_y = PasteLine<A>::of(problem, k, kY);
  const auto along_x = PasteLine<A>::of(problem, k, kX);
  Cells rows = reading_cells(along_y), columns = reading_cells(along_x);
  if (rows.first >= rows.end || columns.first >= columns.end) rows = columns = {0, 0};
  auto* image = static_cast<Out*>(problem.image) + k * problem.height * int64_t{problem.width};

  const Out background = store(A(0));
  const auto fill = [&](int64_t first, int64_t end) {
    if (!problem.cleared) std::fill(image + first, image + end, background);
  };
  const int64_t count = rows.end - rows.first, width = problem.width;
  const auto first = static_cast<int32_t>(rows.first + count * part / parts);
  const auto end = static_cast<int32_t>(rows.first + count * (part + 1) / parts);
  if (part == 0) fill(0, first * width);
  if (first < end) spread.start(problem, k, along_x, columns);
  for (int32_t y = first; y < end; ++y) {
    const Pair<A> pair(along_y.taps(y));
    const A* above = spread.row(pair.pixel[0], pair.pixel[1]);
    const A* below = spread.row(pair.pixel[1], pair.pixel[0]);
    fill(y * width, y * width + columns.first);
    blend_rows(above, below, pair.weight[0], pair.weight[1], columns.end - columns.first, store,
               image + y * width + columns.first);
    fill(y * width + columns.end, (y + 1) * width);
  }
  if (part == parts - 1) fill(end * width, problem.height * width);
}

template <class T, class Out>
void paste_typed(const PasteProblem& problem) {
  const int64_t outputs = problem.masks * problem.height * int64_t{problem.width};
  const int64_t workers = workers_for(outputs);
  // Several tasks for each thread, because boxes differ in size.
  const int64_t parts = workers == 1 ? 1 : (8 * workers + problem.masks - 1) / problem.masks;
  const int64_t tasks = problem.masks * parts;
  parallel_tasks(tasks, workers, [&](const auto& next) {
    SpreadRows<T> spread;
    for (int64_t task = next(); task < tasks; task = next()) {
      paste_part<T, Out>(problem, task / parts, task % parts, parts, spread);
    }
  });
}

}  // namespace

void cpu_paste(const PasteProblem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.result == PasteResult::kValue) return paste_typed<T, pooled_t<T>>(problem);
    paste_typed<T, uint8_t>(problem);
  });
}

}  // namespace glimpse
