// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "problem.h"

// Keeps a short loop from being copied several times, which costs registers and code.
#if defined(GLIMPSE_EMULATED)
#define GLIMPSE_NO_UNROLL
#else
#define GLIMPSE_NO_UNROLL _Pragma("unroll 1")
#endif

namespace glimpse::cuda {

// Note [Tables of a block]
// A block serves one box, so it builds the rows of that box once, one thread per row, and all its
// channels read them from shared memory. Rows of y come first, rows of x follow, in one array:
//
//   box, axes | rows: y0 y1 .. x0 x1 .. | taps of y0, y1, .. x0, x1, .. | slopes, tap by tap
//
// How much room a block has is decided at launch from sizes alone, because no box is known there.
// With a fixed number of samples each row gets a slot for the most taps that it can have. Otherwise
// rows are packed behind each other, and a box whose rows need more room than there is gets no
// tables: the block then evaluates each cell by itself (cell_value). So no box can make a block
// write outside, and only very large boxes on very large maps are slow.

/// An input pixel with its weight in a cell, loaded as one piece.
template <class T>
struct alignas(2 * sizeof(T)) Tap {
  int32_t pixel;
  T weight;
};

/// d weight / d origin and d weight / d step of a tap.
template <class T>
struct alignas(2 * sizeof(T)) TapSlope {
  T origin;
  T step;
};

/// The taps of one cell: first, first + 1, ... first + count - 1.
struct alignas(8) Row {
  int32_t first;
  int32_t count;
};

namespace detail {

template <class T>
struct alignas(16) TableHeader {
  BoxAxis<T> axis[2];
  int64_t image;
  int32_t level;
  int32_t needed;  // taps over all packed rows
};

}  // namespace detail

/// What one block sets aside for tables. Made at launch by table_shape; a kernel parameter.
struct TableShape {
  int32_t cells_y, cells_x;
  int32_t room;  // taps, over all rows
  int32_t slot;  // taps of each row; 0: rows are packed

  GLIMPSE_HD int32_t rows() const { return cells_y + cells_x; }

  /// Bytes from the start of the shared memory.
  template <class T>
  GLIMPSE_HD size_t taps_offset() const {
    const size_t end = sizeof(detail::TableHeader<T>) + static_cast<size_t>(rows()) * sizeof(Row);
    return (end + sizeof(Tap<T>) - 1) / sizeof(Tap<T>) * sizeof(Tap<T>);
  }
  template <class T>
  GLIMPSE_HD size_t slopes_offset() const {
    return taps_offset<T>() + static_cast<size_t>(room) * sizeof(Tap<T>);
  }
  /// Bytes of shared memory, a multiple of 16.
  template <class T, bool kSlopes>
  GLIMPSE_HD size_t bytes() const {
    const size_t slopes = kSlopes ? static_cast<size_t>(room) * sizeof(TapSlope<T>) : 0;
    return (slopes_offset<T>() + slopes + 15) / 16 * 16;
  }
};

constexpr int32_t kMostTableRows = 1024;
constexpr int32_t kMostTableTaps = 3072;

/// False where not even the list of rows fits; such outputs are left to kernels without tables.
inline bool tables_apply(const Problem& problem) {
  return int64_t{problem.out_height} + problem.out_width <= kMostTableRows;
}

/// Samples of every cell of every box, or 0 where the box decides: only the operator knows. With
/// a fixed number each row has a slot of one size; otherwise rows are packed one behind another,
/// which takes two barriers more.
inline int32_t fixed_samples(const Operator& op) { return op.fixed_samples(); }

/// The tables of any box of `problem`, which must satisfy tables_apply.
inline TableShape table_shape(const Problem& problem, int32_t most_taps = kMostTableTaps) {
  TableShape shape;
  shape.cells_y = problem.out_height;
  shape.cells_x = problem.out_width;
  // Every sample has two taps at most.
  const int64_t slot = 2 * int64_t{fixed_samples(problem.op)};
  if (slot > 0 && slot * shape.rows() <= most_taps) {
    shape.slot = static_cast<int32_t>(slot);
    shape.room = shape.slot * shape.rows();
    return shape;
  }
  // Rows of neighbouring cells share two pixels at most.
  int64_t most = 0;
  for (int32_t i = 0; i < problem.levels; ++i) {
    const int64_t pixels = int64_t{problem.level[i].height} + problem.level[i].width;
    if (pixels > most) most = pixels;
  }
  most += 2 * int64_t{shape.rows()};
  shape.slot = 0;
  shape.room = static_cast<int32_t>(most < most_taps ? most : most_taps);
  return shape;
}

/// The tables of one box, in shared memory.
template <class T>
struct Tables {
  int32_t level;           // -1: the box reads nothing and all rows are empty
  bool fit;                // false: the rows had no room; none of them may be read
  int64_t image;           // 0 where level is -1
  const BoxAxis<T>* axis;  // [2], by Direction; nothing where level is -1
  const Row* row_y;        // [cells_y]
  const Row* row_x;        // [cells_x]
  const Tap<T>* tap;
  const TapSlope<T>* slope;  // beside tap; only where asked for

  /// The taps of a row that has one or two.
  __device__ __forceinline__ Taps<T> two_taps(Row row) const {
    Taps<T> taps = {};
    taps.count = row.count;
    GLIMPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Tap<T> at = tap[row.first + (i < row.count ? i : 0)];
      taps.pixel[i] = at.pixel;
      taps.weight[i] = at.weight;
    }
    return taps;
  }

  /// The weighted sum of load(y, x) over the taps of a cell whose rows are not empty.
  template <class Load>
  __device__ __forceinline__ T cell_value(Row y, Row x, const Load& load) const {
    T sum = T(0);
    GLIMPSE_NO_UNROLL
    for (int32_t i = y.first; i < y.first + y.count; ++i) {
      T line = T(0);
      GLIMPSE_NO_UNROLL
      for (int32_t j = x.first; j < x.first + x.count; ++j) {
        line += tap[j].weight * load(tap[i].pixel, tap[j].pixel);
      }
      sum += tap[i].weight * line;
    }
    return sum;
  }
};

namespace detail {

/// A row under construction, as build_row wants it.
template <class T, bool kSlopes>
struct RowWriter {
  Tap<T>* tap;
  TapSlope<T>* slope;
  int32_t room;
  int32_t count;

  GLIMPSE_HD int32_t size() const { return count; }
  GLIMPSE_HD int32_t pixel(int32_t i) const { return tap[i].pixel; }
  GLIMPSE_HD void add(int32_t i, T weight, T slope_origin, T slope_step) {
    using R = Rounded<T>;
    tap[i].weight = (R(tap[i].weight) + R(weight)).value;
    if (kSlopes) {
      slope[i].origin = (R(slope[i].origin) + R(slope_origin)).value;
      slope[i].step = (R(slope[i].step) + R(slope_step)).value;
    }
  }
  GLIMPSE_HD void push(int32_t pixel, T weight, T slope_origin, T slope_step) {
    // row_capacity bounds the count. Should it ever be wrong, numbers are lost and not memory.
    if (count >= room) return;
    tap[count] = {pixel, weight};
    if (kSlopes) slope[count] = {slope_origin, slope_step};
    ++count;
  }
  GLIMPSE_HD void scale(int32_t i, T factor) {
    using R = Rounded<T>;
    tap[i].weight = (R(tap[i].weight) * R(factor)).value;
    if (kSlopes) {
      slope[i].origin = (R(slope[i].origin) * R(factor)).value;
      slope[i].step = (R(slope[i].step) * R(factor)).value;
    }
  }
};

/// By warp 0: turns the counts of `rows` into first taps. Returns their sum, or room + 1 where it
/// is larger; counts are at most room + 1.
__device__ __forceinline__ int32_t pack_rows(Row* row, int32_t rows, int32_t room) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x);
  int32_t before = 0;
  GLIMPSE_NO_UNROLL
  for (int32_t base = 0; base < rows; base += 32) {
    const int32_t i = base + lane;
    const int32_t count = i < rows ? row[i].count : 0;
    int32_t sum = count;  // of this lane and all lower ones
    for (int32_t distance = 1; distance < 32; distance *= 2) {
      const int32_t lower = __shfl_sync(kFullWarp, sum, lane - distance);
      if (lane >= distance) sum += lower;
    }
    if (i < rows) row[i].first = before + sum - count;
    before += __shfl_sync(kFullWarp, sum, 31);
    if (before > room) before = room + 1;
  }
  return before;
}

}  // namespace detail

/// Builds the tables of box k at `shared`, which has shape.bytes<T, kSlopes>() bytes aligned to 16.
/// All threads of the block call it, and may read the result at once; there are barriers inside.
/// A block that builds again first passes a barrier of its own. Rows of y outside first_y, ...
/// end_y - 1 may be left out and must not be read.
template <class T, bool kSlopes>
__device__ __forceinline__ Tables<T> build_tables(const Problem& problem, int64_t k,
                                                  const TableShape& shape, char* shared,
                                                  int32_t first_y = 0,
                                                  int32_t end_y = kMostTableRows) {
  auto* header = reinterpret_cast<detail::TableHeader<T>*>(shared);
  auto* row = reinterpret_cast<Row*>(shared + sizeof(detail::TableHeader<T>));
  auto* tap = reinterpret_cast<Tap<T>*>(shared + shape.taps_offset<T>());
  auto* slope = reinterpret_cast<TapSlope<T>*>(shared + shape.slopes_offset<T>());
  const int32_t rows = shape.rows();
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t threads = static_cast<int32_t>(blockDim.x);

  // Only threads that build a row read the box: its level can cost a logarithm.
  Box<T> box{};
  box.level = -1;
  if (thread < rows) box = read_box<T>(problem, k);
  if (thread == 0) {
    header->image = box.level >= 0 ? box.image : 0;
    header->level = box.level;
    header->needed = 0;
  }

  if (shape.slot == 0) {
    for (int32_t i = thread; i < rows; i += threads) {
      int32_t count = 0;
      const bool left_out = i < shape.cells_y && (i < first_y || i >= end_y);
      if (box.level >= 0 && !left_out) {
        const int32_t direction = i < shape.cells_y ? kY : kX;
        const int32_t cell = direction == kY ? i : i - shape.cells_y;
        const BoxAxis<T> axis = box_axis(problem, box, direction);
        count = row_capacity(problem.op, axis.axis, cell, axis.size);
      }
      row[i].count = count <= shape.room ? count : shape.room + 1;
    }
    __syncthreads();
    if (thread < 32) {
      const int32_t needed = detail::pack_rows(row, rows, shape.room);
      if (thread == 0) header->needed = needed;
    }
    __syncthreads();
  }

  for (int32_t i = thread; i < rows; i += threads) {
    if (box.level < 0) {
      row[i] = {0, 0};
      continue;
    }
    const int32_t direction = i < shape.cells_y ? kY : kX;
    const int32_t cell = direction == kY ? i : i - shape.cells_y;
    if (direction == kY && cell > 0 && (cell < first_y || cell >= end_y)) continue;
    const BoxAxis<T> axis = box_axis(problem, box, direction);
    if (cell == 0) header->axis[direction] = axis;
    if (shape.slot == 0 && header->needed > shape.room) continue;
    const int32_t first = shape.slot > 0 ? i * shape.slot : row[i].first;
    const int32_t room = shape.slot > 0 ? shape.slot : row[i].count;
    detail::RowWriter<T, kSlopes> writer{tap + first, slope + first, room, 0};
    build_row(problem.op, axis.axis, axis.weighting, cell, axis.size, writer);
    row[i] = {first, writer.count};
  }
  __syncthreads();

  Tables<T> tables;
  tables.level = header->level;
  tables.fit = header->needed <= shape.room;
  tables.image = header->image;
  tables.axis = header->axis;
  tables.row_y = row;
  tables.row_x = row + shape.cells_y;
  tables.tap = tap;
  tables.slope = slope;
  return tables;
}

/// The taps of one sample, with the weights that the call asks for but not divided by the number of
/// samples.
template <class T>
__device__ __forceinline__ Taps<T> sample_taps(const Operator& op, const BoxAxis<T>& line,
                                               int32_t cell, int32_t sample) {
  Taps<T> taps = op.taps(line.axis.position(cell, sample), line.size);
  if (line.weighting.tangent) {
    const T progress = line.axis.progress(cell, sample);
    taps.weight[0] = line.weighting(taps.weight[0], taps.slope[0], progress);
    taps.weight[1] = line.weighting(taps.weight[1], taps.slope[1], progress);
  }
  return taps;
}

/// Samples of a cell, one after another, that read the same pixels: `pixel`, and pixel + 1 where
/// count is 2. Their weights are added up.
template <class T>
struct TapRun {
  int32_t pixel, count;
  T low, high;
};

/// Calls visit(run) for the samples of a cell. So the number of visits is bounded by the pixels,
/// however many samples there are.
template <class T, class Visit>
__device__ __forceinline__ void for_each_run(const Operator& op, const BoxAxis<T>& line,
                                             int32_t cell, SampleRange samples,
                                             const Visit& visit) {
  TapRun<T> run = {0, 0, T(0), T(0)};
  GLIMPSE_NO_UNROLL
  for (int32_t sample = samples.first; sample <= samples.end; ++sample) {
    Taps<T> taps = {};
    if (sample < samples.end) taps = sample_taps(op, line, cell, sample);
    if (taps.count > 0 && taps.count == run.count && taps.pixel[0] == run.pixel) {
      run.low += taps.weight[0];
      run.high += taps.weight[1];
      continue;
    }
    if (run.count > 0) visit(run);
    run = {taps.pixel[0], taps.count, taps.weight[0], taps.weight[1]};
  }
}

/// One output without tables: the weighted sum of load(y, x) over the samples of the cell, or
/// `fill` where it keeps none.
template <class T, class Load>
__device__ __forceinline__ T cell_value(const Operator& op, T fill, const BoxAxis<T>& y,
                                        const BoxAxis<T>& x, int32_t cell_y, int32_t cell_x,
                                        const Load& load) {
  const SampleRange samples_y = sample_range(op, y.axis, cell_y, 0, y.size - 1, y.size);
  const SampleRange samples_x = sample_range(op, x.axis, cell_x, 0, x.size - 1, x.size);
  T sum = T(0);
  bool empty = true;
  for_each_run(op, y, cell_y, samples_y, [&](const TapRun<T>& run_y) {
    T low = T(0), high = T(0);  // sums over the row of pixels of each tap
    for_each_run(op, x, cell_x, samples_x, [&](const TapRun<T>& run_x) {
      empty = false;
      low += run_x.low * load(run_y.pixel, run_x.pixel);
      if (run_x.count == 2) low += run_x.high * load(run_y.pixel, run_x.pixel + 1);
      if (run_y.count == 1) return;
      high += run_x.low * load(run_y.pixel + 1, run_x.pixel);
      if (run_x.count == 2) high += run_x.high * load(run_y.pixel + 1, run_x.pixel + 1);
    });
    sum += run_y.low * low;
    if (run_y.count == 2) sum += run_y.high * high;
  });
  return empty ? fill : sum * (sample_factor(y.axis) * sample_factor(x.axis));
}

}  // namespace glimpse::cuda
