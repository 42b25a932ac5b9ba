// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cuda/paste.cuh"

/// Where the images of masks change, column after column, without the images: run lengths.
namespace glimpse::cuda {

// Note [Changes in two launches]
// The images are compared with the threshold twice, because that is cheaper than keeping them. The
// first launch counts the changes of each column and of each part of an image; the second one knows
// by these where the changes of a column go, and lists them. Everything that a column needs of the
// one before it is a single pixel. So no block waits for another one, sizes follow from shapes
// alone, and the host has to wait only for the one copy of counts and list.
//
// A thread owns a column. What it reads along x stays in registers, and so do its means along x of
// two rows of the mask, until the rows of the image come to the next one.

constexpr int32_t kChangesThreads = PasteChanges::kPartColumns;
constexpr int32_t kChangesWarps = kChangesThreads / 32;

/// Calls visit(y) for the pixels of column x that differ from the one before them, which for y = 0
/// is the last one of column x - 1. All threads of the block call it; `row_tap` is theirs, and
/// columns at and behind the width visit nothing.
template <class T, class Visit>
__device__ __forceinline__ void visit_changes(const PasteProblem& problem,
                                              const PasteWindow<acc_t<T>>& window, int64_t k,
                                              int32_t x, PasteTap<acc_t<T>>* row_tap,
                                              const Visit& visit) {
  using Number = acc_t<T>;
  using R = Rounded<Number>;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const T* mask = static_cast<const T*>(problem.mask) + k * problem.stride_n;
  const Cells rows = window.cells[kY], columns = window.cells[kX];
  const PasteStore<Number, uint8_t> store(problem);
  const bool background = store(Number(0)) != 0;
  const bool exists = x < problem.width;
  const bool reached = exists && x >= columns.first && x < columns.end;

  bool before = x > 0 && background;
  if (x > columns.first && x <= columns.end && rows.end == problem.height) {
    before = store(paste_value(window.line[kY].taps(problem.height - 1),
                               window.line[kX].taps(x - 1), [&](int32_t y, int32_t column) {
                                 return load_value(
                                     mask[y * problem.stride_h + column * problem.stride_w]);
                               })) != 0;
  }
  const auto meet = [&](int32_t y, bool value) {
    if (value != before) visit(y);
    before = value;
  };
  if (exists && (!reached || rows.first > 0)) meet(0, background);

  PasteTap<Number> own = {};
  if (reached) own = PasteTap<Number>::of(window.line[kX], x, 1);
  const auto mean_along_x = [&](int32_t y) {
    const T* row = mask + y * problem.stride_h;
    return (R(own.low_weight) * R(load_value(row[own.low * problem.stride_w])) +
            R(own.high_weight) * R(load_value(row[own.high * problem.stride_w])))
        .value;
  };
  int32_t low = -1, high = -1;
  Number low_mean = 0, high_mean = 0;
  GLIMPSE_NO_UNROLL
  for (int32_t first = rows.first; first < rows.end; first += kChangesThreads) {
    const int32_t left = rows.end - first;
    const int32_t count = left < kChangesThreads ? left : kChangesThreads;
    if (thread < count) {
      row_tap[thread] = PasteTap<Number>::of(window.line[kY], first + thread, 1);
    }
    __syncthreads();
    GLIMPSE_NO_UNROLL
    for (int32_t i = 0; i < count && reached; ++i) {
      const PasteTap<Number> tap = row_tap[i];
      if (tap.low != low || tap.high != high) {
        low = tap.low;
        high = tap.high;
        low_mean = mean_along_x(low);
        high_mean = mean_along_x(high);
      }
      const R value = R(tap.low_weight) * R(low_mean) + R(tap.high_weight) * R(high_mean);
      meet(first + i, store(value.value) != 0);
    }
    if (left <= kChangesThreads) break;
    __syncthreads();
  }
  if (reached && rows.end < problem.height) meet(rows.end, background);
}

/// The sum of `value` over the threads of a block before this one, and over all of them.
/// `of_warp` is shared by the block; there is a barrier inside.
template <class Count>
__device__ __forceinline__ Count sum_before(Count value, Count* of_warp, Count* all) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread >> 5, lane = thread & 31;
  Count sum = value;  // of this lane and all lower ones
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    const Count lower = __shfl_sync(kFullWarp, sum, lane - distance);
    if (lane >= distance) sum += lower;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  Count before = sum - value;
  *all = 0;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kChangesWarps; ++i) {
    if (i < warp) before += of_warp[i];
    *all += of_warp[i];
  }
  return before;
}

/// Whether a part of an image may have changes. All threads of the block call it and read `window`
/// after it; there is a barrier inside.
template <class Number>
__device__ __forceinline__ bool start_part(const PasteProblem& problem, int64_t k, int32_t first,
                                           PasteWindow<Number>* window) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < 2) {
    const auto line = PasteLine<Number>::of(problem, k, thread);
    window->line[thread] = line;
    window->cells[thread] = reading_cells(line);
  }
  __syncthreads();
  const Cells rows = window->cells[kY], columns = window->cells[kX];
  if (first == 0) return true;
  // One column more than the mask reaches, where the background begins again.
  return rows.first < rows.end && columns.first < columns.end && first <= columns.end &&
         columns.first - first < kChangesThreads;
}

/// Block: a part of an image. Counts its changes and those of its columns. Left to itself, the
/// compiler takes too few registers for one architecture and spills.
template <class T>
__global__ void __launch_bounds__(kChangesThreads, 8)
    paste_count_kernel(GLIMPSE_GRID_CONSTANT PasteProblem problem,
                       GLIMPSE_GRID_CONSTANT PasteChanges changes, int64_t first_block) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(PasteWindow<Number>, window, );
  GLIMPSE_SHARED(PasteTap<Number>, row_tap, [kChangesThreads]);
  GLIMPSE_SHARED(int32_t, of_warp, [kChangesWarps]);
  const int64_t block = first_block + blockIdx.x;
  int32_t part;
  const int64_t k = split(block, changes.parts, &part);
  const int32_t x = part * kChangesThreads + static_cast<int32_t>(threadIdx.x);
  const bool may_change = start_part(problem, k, part * kChangesThreads, &window);
  int32_t all = 0;  // an image has fewer than 2^31 pixels
  if (may_change) {
    int32_t own = 0;
    visit_changes<T>(problem, window, k, x, row_tap, [&](int32_t) { ++own; });
    sum_before(own, of_warp, &all);
    if (x < problem.width) changes.column_changes[k * problem.width + x] = own;
  }
  if (threadIdx.x == 0) changes.part_changes[block] = all;
}

/// Block: a part of an image. Lists its changes behind those of all parts before it.
template <class T>
__global__ void __launch_bounds__(kChangesThreads)
    paste_list_kernel(GLIMPSE_GRID_CONSTANT PasteProblem problem,
                      GLIMPSE_GRID_CONSTANT PasteChanges changes, int64_t first_block) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(PasteWindow<Number>, window, );
  GLIMPSE_SHARED(PasteTap<Number>, row_tap, [kChangesThreads]);
  GLIMPSE_SHARED(int64_t, of_warp, [2][kChangesWarps]);
  const int64_t block = first_block + blockIdx.x;
  if (changes.part_changes[block] > 0) {
    int32_t part;
    const int64_t k = split(block, changes.parts, &part);
    const int32_t x = part * kChangesThreads + static_cast<int32_t>(threadIdx.x);
    start_part(problem, k, part * kChangesThreads, &window);
    int64_t some = 0, base, all;
    for (int64_t i = threadIdx.x; i < block; i += kChangesThreads) some += changes.part_changes[i];
    sum_before(some, of_warp[0], &base);
    const int64_t own = x < problem.width ? changes.column_changes[k * problem.width + x] : 0;
    int64_t at = base + sum_before(own, of_warp[1], &all);
    visit_changes<T>(problem, window, k, x, row_tap, [&](int32_t y) {
      if (at < changes.room) changes.place[at] = x * problem.height + y;
      ++at;
    });
  }
}

}  // namespace glimpse::cuda
