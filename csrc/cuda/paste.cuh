// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/split.cuh"
#include "cuda/tables.cuh"
#include "half.h"
#include "paste_problem.h"

/// Masks into images, in one launch that writes every pixel once.
namespace glimpse::cuda {

// Note [Packs of a mask]
// Most of an image is out of reach of its mask, and all that a block does there is to store packs
// of 16 bytes. A warp stores those of its pixels first and lists the packs that the box may meet;
// then all of its lanes share the listed pixels. Rows and columns that the block meets stand in
// tables, with the weights of their two mask pixels. Where a table has no room, and in the packs
// that two images share, pixels are computed one by one.

constexpr int32_t kPasteThreads = 128;
constexpr int32_t kPasteWarps = kPasteThreads / 32;
/// Packs of 16 bytes that a thread owns: 32 KB for each block.
constexpr int32_t kPastePacks = 16;
constexpr int32_t kPasteBlockPacks = kPastePacks * kPasteThreads;
template <class Out>
constexpr int32_t kPasteCells = 16 / static_cast<int32_t>(sizeof(Out));  // pixels of a pack
/// Pixels that a lane computes together.
template <class Out>
constexpr int32_t kPasteTogether = kPasteCells<Out> < 4 ? kPasteCells<Out> : 4;
constexpr int32_t kPasteRows = 64;  // of a table

/// Which pixels a block writes.
struct PastePlan {
  int64_t blocks_per_mask;
  int64_t first_block;  // of this launch
  uint32_t reciprocal;  // (2^32 - 1) / width
  int32_t columns;      // of the table; 0: none
};

/// The two mask pixels of a row or column of the image, times a stride, and their weights.
template <class Number>
struct alignas(16) PasteTap {
  int32_t low, high;
  Number low_weight, high_weight;

  __device__ __forceinline__ static PasteTap of(const PasteLine<Number>& line, int32_t pixel,
                                                int32_t stride) {
    const auto pair = Pair<Number>::of(line.taps(pixel));
    return {pair.pixel[0] * stride, pair.pixel[1] * stride, pair.weight[0], pair.weight[1]};
  }
};

/// What a block needs to know of its mask; in shared memory.
template <class Number>
struct PasteWindow {
  PasteLine<Number> line[2];
  Cells cells[2];       // of the image that read the mask
  int32_t row, column;  // of the block's first pixel; a column below 0 is in the image before
};

/// Row and column of a pixel, counted from the start of a row.
__device__ __forceinline__ int32_t paste_row(const PasteProblem& problem, const PastePlan& plan,
                                             uint32_t pixel, int32_t* column) {
  const auto width = static_cast<uint32_t>(problem.width);
  // The quotient, or one less.
  auto row = static_cast<uint32_t>(uint64_t{pixel} * plan.reciprocal >> 32);
  uint32_t rest = pixel - row * width;
  if (rest >= width) {
    rest -= width;
    ++row;
  }
  *column = static_cast<int32_t>(rest);
  return static_cast<int32_t>(row);
}

/// One pixel, without tables.
template <class T, class Out>
__device__ __forceinline__ Out paste_pixel(const PasteProblem& problem,
                                           const PasteWindow<acc_t<T>>& window, const T* mask,
                                           const PasteStore<acc_t<T>, Out>& store, int64_t pixel) {
  using Number = acc_t<T>;
  int32_t column;
  const auto row = static_cast<int32_t>(split(pixel, problem.width, &column));
  const Cells rows = window.cells[kY], columns = window.cells[kX];
  if (row < rows.first || row >= rows.end || column < columns.first || column >= columns.end) {
    return store(Number(0));
  }
  return store(paste_value(window.line[kY].taps(row), window.line[kX].taps(column),
                           [&](int32_t y, int32_t x) {
                             return load_value(mask[y * problem.stride_h + x * problem.stride_w]);
                           }));
}

/// The pixels column, column + 1, ... of a row that the mask reaches, all of that row.
template <class T, class Out>
__device__ __forceinline__ void paste_together(const PasteProblem& problem, Cells columns,
                                               const PasteTap<acc_t<T>>& y,
                                               const PasteTap<acc_t<T>>* column_tap, const T* mask,
                                               const PasteStore<acc_t<T>, Out>& store,
                                               int32_t column, Out (&out)[kPasteTogether<Out>]) {
  using R = Rounded<acc_t<T>>;
  const T* low = mask + y.low * problem.stride_h;
  const T* high = mask + y.high * problem.stride_h;
  const int32_t last = columns.end - columns.first - 1;
  const int32_t first = column - columns.first;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kPasteTogether<Out>; ++i) {
    // Loads go ahead of tests: beyond the columns of the mask the nearest one is read.
    const int32_t at = first + i;
    const int32_t near = at < 0 ? 0 : at > last ? last : at;
    const PasteTap<acc_t<T>> x = column_tap[near];
    const R left(x.low_weight), right(x.high_weight);
    const R low_row = left * R(load_value(low[x.low])) + right * R(load_value(low[x.high]));
    const R high_row = left * R(load_value(high[x.low])) + right * R(load_value(high[x.high]));
    const R value = R(y.low_weight) * low_row + R(y.high_weight) * high_row;
    out[i] = store(at == near ? value.value : acc_t<T>(0));
  }
}

/// Blocks that share a multiprocessor. Conversions of bytes are many at a time.
template <class T>
constexpr int32_t kPasteBlocks = sizeof(T) == 8 || sizeof(T) == 1 ? 4 : 5;

/// Block: 32 KB of the image of one mask. See Note [Packs of a mask].
template <class T, class Out>
__global__ void __launch_bounds__(kPasteThreads, kPasteBlocks<T>)
    paste_kernel(GLIMPSE_GRID_CONSTANT PasteProblem problem, GLIMPSE_GRID_CONSTANT PastePlan plan) {
  using Number = acc_t<T>;
  constexpr int32_t kCells = kPasteCells<Out>, kTogether = kPasteTogether<Out>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  GLIMPSE_SHARED(PasteWindow<Number>, window, );
  GLIMPSE_SHARED(PasteTap<Number>, row_tap, [kPasteRows]);
  GLIMPSE_SHARED(uint16_t, listed, [kPasteWarps][32 * kPastePacks]);
  auto* column_tap = reinterpret_cast<PasteTap<Number>*>(shared);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t block = plan.first_block + blockIdx.x;
  const int64_t k = block / plan.blocks_per_mask;
  const int64_t cells = int64_t{problem.height} * problem.width;
  // Packs are counted over all images, because that is how they are aligned: the first one of an
  // image may begin in the image before.
  const int64_t part = (block - k * plan.blocks_per_mask) * kPasteBlockPacks;
  const int64_t begin = (k * cells / kCells + part) * kCells - k * cells;
  if (thread < 2) {
    const auto line = PasteLine<Number>::of(problem, k, thread);
    window.line[thread] = line;
    window.cells[thread] = reading_cells(line);
  } else if (thread == 32) {
    window.row = 0;
    window.column = static_cast<int32_t>(begin);
    if (begin > 0) {
      window.row = static_cast<int32_t>(split(begin, problem.width, &window.column));
    }
  }
  __syncthreads();

  const T* mask = static_cast<const T*>(problem.mask) + k * problem.stride_n;
  Out* own = static_cast<Out*>(problem.image) + k * cells + begin;  // of this block
  const PasteStore<Number, Out> store(problem);
  // Packs first_pack .. end_pack - 1 of this block lie in the image as a whole.
  const int64_t whole = (cells - begin) / kCells;
  const int32_t end_pack = whole < 0                  ? 0
                           : whole < kPasteBlockPacks ? static_cast<int32_t>(whole)
                                                      : kPasteBlockPacks;
  const int32_t first_pack = begin < 0 ? 1 : 0;
  const auto place = [&](int32_t cell, int32_t* column) {
    return window.row +
           paste_row(problem, plan,
                     static_cast<uint32_t>(window.column) + static_cast<uint32_t>(cell), column);
  };
  const Cells rows = window.cells[kY], columns = window.cells[kX];
  Cells block_rows = {rows.first > window.row ? rows.first : window.row, rows.end};
  if (end_pack > 0) {
    int32_t column;
    const int32_t end_row = place(end_pack * kCells - 1, &column) + 1;
    if (end_row < rows.end) block_rows.end = end_row;
  }
  Pack<Out, kCells> background;
  Out zeros[kCells];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kCells; ++i) zeros[i] = store(Number(0));
  memcpy(&background.word, zeros, sizeof(background.word));

  const int32_t warp = thread >> 5, lane = thread & 31;
  const int32_t own_packs = warp * 32 * kPastePacks;
  if (block_rows.first >= block_rows.end || columns.first >= columns.end) {
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < kPastePacks; ++i) {
      const int32_t pack = own_packs + i * 32 + lane;
      if (pack >= first_pack && pack < end_pack) background.store(own + pack * kCells);
    }
  } else {
    const bool tables = columns.end - columns.first <= plan.columns &&
                        block_rows.end - block_rows.first <= kPasteRows;
    if (tables) {
      for (int32_t i = thread; i < columns.end - columns.first; i += kPasteThreads) {
        column_tap[i] = PasteTap<Number>::of(window.line[kX], columns.first + i,
                                             static_cast<int32_t>(problem.stride_w));
      }
      for (int32_t i = thread; i < block_rows.end - block_rows.first; i += kPasteThreads) {
        row_tap[i] = PasteTap<Number>::of(window.line[kY], block_rows.first + i, 1);
      }
    }
    __syncthreads();

    int32_t count = 0;
    GLIMPSE_NO_UNROLL
    for (int32_t i = 0; i < kPastePacks; ++i) {
      const int32_t pack = own_packs + i * 32 + lane;
      int32_t column;
      const int32_t row = place(pack * kCells, &column);
      const bool in_row = row >= rows.first && row < rows.end && column < columns.end;
      // How far the pack goes on in the next row; it may go on in more where that is short.
      const int32_t beyond = column + kCells - problem.width;
      const bool in_next = beyond > columns.first && row < rows.end && row + kCells >= rows.first;
      const bool is_whole = pack >= first_pack && pack < end_pack;
      const bool met = is_whole && ((in_row && column + kCells > columns.first) || in_next);
      const unsigned ballot = __ballot_sync(kFullWarp, met);
      if (met) {
        const int32_t before = __popc(ballot & ((1u << lane) - 1u));
        listed[warp][count + before] = static_cast<uint16_t>(pack);
      } else if (is_whole) {
        background.store(own + pack * kCells);
      }
      count += __popc(ballot);
    }
    __syncwarp();

    constexpr int32_t kParts = kCells / kTogether;
    GLIMPSE_NO_UNROLL
    for (int32_t i = lane; i < count * kParts; i += 32) {
      const int32_t cell = listed[warp][i / kParts] * kCells + i % kParts * kTogether;
      Out out[kTogether];
      int32_t column;
      const int32_t row = place(cell, &column);
      if (!tables || column + kTogether > problem.width) {
        GLIMPSE_NO_UNROLL
        for (int32_t j = cell; j < cell + kTogether; ++j) {
          own[j] = paste_pixel<T, Out>(problem, window, mask, store, begin + j);
        }
        continue;
      }
      if (row < rows.first || row >= rows.end || column >= columns.end ||
          column + kTogether <= columns.first) {
        GLIMPSE_UNROLL
        for (int32_t j = 0; j < kTogether; ++j) out[j] = store(Number(0));
      } else {
        paste_together<T, Out>(problem, columns, row_tap[row - block_rows.first], column_tap, mask,
                               store, column, out);
      }
      Pack<Out, kTogether> packed;
      memcpy(&packed.word, out, sizeof(packed.word));
      packed.store(own + cell);
    }
  }

  // The pixels of packs that images share: before the first whole one, and behind the last.
  int64_t pixel = -1;
  if (thread < kCells) {
    if (first_pack > 0 && begin + kCells > thread && thread < cells) pixel = thread;
  } else if (thread < 2 * kCells) {
    const int32_t behind = first_pack > end_pack ? first_pack : end_pack;
    const int64_t tail = begin + int64_t{behind} * kCells + thread - kCells;
    if (behind < kPasteBlockPacks && tail < cells) pixel = tail;
  }
  if (pixel >= 0) own[pixel - begin] = paste_pixel<T, Out>(problem, window, mask, store, pixel);
}

}  // namespace glimpse::cuda
