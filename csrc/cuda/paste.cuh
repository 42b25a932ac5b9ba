// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/split.cuh"
#include "half.h"
#include "paste_problem.h"

/// Masks into images, in one launch that writes every pixel once.
namespace glimpse::cuda {

constexpr int32_t kPasteThreads = 256;
/// Packs of 16 bytes that a thread writes: 16 KB for each block.
constexpr int32_t kPastePacks = 4;
template <class Out>
constexpr int32_t kPasteCells = 16 / static_cast<int32_t>(sizeof(Out));  // pixels of a pack

/// Which pixels a block writes.
struct PastePlan {
  int64_t blocks_per_mask;
  int64_t first_block;  // of this launch
};

/// What a block needs to know of its mask; in shared memory.
template <class Number>
struct PasteWindow {
  PasteLine<Number> line[2];
};

/// The pixels column, column + 1, ... of a row that goes on in the next one. Most packs lie in one
/// row and out of reach of the mask; they are known by two comparisons.
template <class T, class Out>
__device__ __forceinline__ void paste_cells(const PasteProblem& problem,
                                            const PasteWindow<acc_t<T>>& window, const T* mask,
                                            const PasteStore<acc_t<T>, Out>& store, int32_t row,
                                            int32_t column, Out (&out)[kPasteCells<Out>]) {
  using Number = acc_t<T>;
  const Out background = store(Number(0));
  const Cells rows = window.line[kY].pixels, columns = window.line[kX].pixels;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kPasteCells<Out>; ++i) out[i] = background;
  const bool one_row = problem.width - column >= kPasteCells<Out>;
  const bool missed = one_row && (row < rows.first || row >= rows.end || column >= columns.end ||
                                  columns.first - column >= kPasteCells<Out>);
  if (missed) return;
  Taps<Number> y = window.line[kY].taps(row);
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kPasteCells<Out>; ++i) {
    if (row >= rows.first && row < rows.end && column >= columns.first && column < columns.end) {
      out[i] =
          store(paste_value(y, window.line[kX].taps(column), [&](int32_t pixel_y, int32_t pixel_x) {
            return load_value(mask[pixel_y * problem.stride_h + pixel_x * problem.stride_w]);
          }));
    }
    if (++column == problem.width) {
      column = 0;
      if (++row < problem.height) y = window.line[kY].taps(row);
    }
  }
}

/// Block: 16 KB of the image of one mask. Thread: packs of 16 bytes, aligned in memory, neighbours
/// in a warp; the packs that images share are written pixel by pixel.
template <class T, class Out>
__global__ void __launch_bounds__(kPasteThreads, sizeof(acc_t<T>) == 8 ? 2 : 4)
    paste_kernel(GLIMPSE_GRID_CONSTANT PasteProblem problem, GLIMPSE_GRID_CONSTANT PastePlan plan) {
  using Number = acc_t<T>;
  constexpr int64_t kCells = kPasteCells<Out>;
  GLIMPSE_SHARED(PasteWindow<Number>, window, );
  const int64_t block = plan.first_block + blockIdx.x;
  const int64_t k = block / plan.blocks_per_mask;
  if (threadIdx.x < 2) {
    const auto direction = static_cast<int32_t>(threadIdx.x);
    window.line[direction] = PasteLine<Number>::of(problem, k, direction);
  }
  __syncthreads();
  const T* mask = static_cast<const T*>(problem.mask) + k * problem.stride_n;
  auto* all = static_cast<Out*>(problem.image);
  const PasteStore<Number, Out> store(problem);
  const int64_t cells = int64_t{problem.height} * problem.width;
  const int64_t first = k * cells, end = first + cells;
  // Packs are counted over all images, because that is how they are aligned.
  const int64_t part = (block - k * plan.blocks_per_mask) * (kPastePacks * kPasteThreads);
  for (int32_t i = 0; i < kPastePacks; ++i) {
    const int64_t pack = first / kCells + part + i * kPasteThreads + threadIdx.x;
    const int64_t begin = pack * kCells;  // the first pixel
    if (begin >= end) break;
    const int64_t from = begin < first ? first : begin;
    int32_t column;
    const int64_t row = split(from - first, problem.width, &column);
    Out out[kPasteCells<Out>];
    paste_cells<T, Out>(problem, window, mask, store, static_cast<int32_t>(row), column, out);
    if (begin >= first && begin + kCells <= end) {
      Pack<Out, kPasteCells<Out>> packed;
      memcpy(&packed.word, out, sizeof(packed.word));
      packed.store(all + begin);
    } else {
      const int64_t stop = begin + kCells < end ? begin + kCells : end;
      GLIMPSE_UNROLL
      for (int64_t j = 0; j < kCells; ++j) {
        if (from + j < stop) all[from + j] = out[j];
      }
    }
  }
}

}  // namespace glimpse::cuda
