// SPDX-License-Identifier: BSD-3-Clause
//
// Masks into images. A box is a few percent of its image, so what costs is memory that is touched,
// not arithmetic: rows that the mask does not reach are left alone where they hold zeros already.
#include <algorithm>
#include <type_traits>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/paste_rows.h"
#include "half.h"

namespace glimpse {
namespace {

/// Makes the pages of `bytes` at `start` in each of the rows [first, end); those between rows that
/// are far apart are left alone.
template <class Out>
void populate_rows(Out* start, size_t bytes, int64_t width, int32_t first, int32_t end) {
  constexpr int64_t kApart = 4096;
  char *from = nullptr, *to = nullptr;
  for (int32_t y = first; y < end; ++y) {
    char* row = reinterpret_cast<char*>(start + y * width);
    if (from != nullptr && row - to > kApart) {
      populate_pages(from, to);
      from = nullptr;
    }
    if (from == nullptr) from = row;
    to = row + bytes;
  }
  if (from != nullptr) populate_pages(from, to);
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
  if (problem.cleared) {
    populate_rows(image + columns.first, (columns.end - columns.first) * sizeof(Out), width, first,
                  end);
  }
  if (first < end) spread.start(problem, k, along_x, columns, columns.first);
  for (int32_t y = first; y < end; ++y) {
    const auto pair = Pair<A>::of(along_y.taps(y));
    const PasteRow<A> row = {{spread.row(pair.pixel[0], pair.pixel[1]),  // keeps the other one
                              spread.row(pair.pixel[1], pair.pixel[0])},
                             {pair.weight[0], pair.weight[1]},
                             columns.end - columns.first};
    fill(y * width, y * width + columns.first);
    Out* to = image + y * width + columns.first;
    if constexpr (std::is_same_v<Out, uint8_t>) {
      kernels<T>().paste_bytes(row, store, to);
    } else {
      kernels<T>().paste_values(row, to);
    }
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
  if (problem.result == PasteResult::kBits) return cpu_paste_bits(problem);
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.result == PasteResult::kValue) return paste_typed<T, pooled_t<T>>(problem);
    paste_typed<T, uint8_t>(problem);
  });
}

}  // namespace glimpse
