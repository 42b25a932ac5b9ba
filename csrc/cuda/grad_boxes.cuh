// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/split.cuh"
#include "cuda/tables.cuh"
#include "half.h"
#include "problem.h"

/// grad_box = <pooled gradient, d/d box (Ay * features * Ax^T)>. Three kernels compute it:
///
///   grad_boxes_nhwc_kernel    lanes are neighbouring channels and read them with wide loads
///   grad_boxes_taps_kernel    lanes are taps along x; any layout, any strides
///   grad_boxes_simple_kernel  no tables; outputs with more cells than tables can list
///
/// Of many channels and cells, several blocks share a box: grid (box, slice). Each thread keeps
/// four sums; one warp adds those of its lanes, one thread those of the warps, always in the same
/// order. The only slice of a box writes its row of the result. Several write their sums to the
/// workspace, and grad_boxes_sum_kernel adds them in order: no memory is cleared or added to.
namespace glimpse::cuda {

// Note [Gradient of a box]
// An axis is affine in its box edges, with origin and step as the only intermediates. So four
// numbers are enough, of which the edges are a linear function:
//
//   d / d origin_y = sum G * (d Ay/d origin) * F * Ax     d / d step_y likewise
//   d / d origin_x = sum G * Ay * F * (d Ax/d origin)     d / d step_x likewise
//
// Multiplying the pooled gradient G into the pixels F first leaves one number per pixel and cell,
// whatever the number of channels in a lane; slopes and weights are applied to that number.

/// The four sums of one thread, or of a box.
template <class Number>
struct BoxSums {
  Number origin[2], step[2];  // by Direction

  __device__ __forceinline__ void clear() { origin[kY] = origin[kX] = step[kY] = step[kX] = 0; }

  __device__ __forceinline__ void add(const BoxSums& other) {
    GLIMPSE_UNROLL
    for (int32_t d = 0; d < 2; ++d) {
      origin[d] += other.origin[d];
      step[d] += other.step[d];
    }
  }

  /// Adds a row of pixels of a cell: what the row is worth under the weights and slopes along x,
  /// and the weight and slope of the row itself.
  __device__ __forceinline__ void add_row(Number value, Number origin_x, Number step_x,
                                          Number weight_y, TapSlope<Number> slope_y) {
    origin[kY] += slope_y.origin * value;
    step[kY] += slope_y.step * value;
    origin[kX] += weight_y * origin_x;
    step[kX] += weight_y * step_x;
  }
};

constexpr int32_t kBoxWarps = 8;  // of a block, at most
constexpr int32_t kBoxThreads = 32 * kBoxWarps;
constexpr int32_t kSumThreads = 32;
// With tables. Five such blocks leave 96 registers a thread, and some compute while others build
// their tables.
constexpr int32_t kTableThreads = 128;
/// Blocks of kTableThreads that share a multiprocessor.
template <class Number>
constexpr int32_t kTableBlocks = sizeof(Number) == 8 ? 3 : 5;

/// Row k of the result, by one thread. axis_of(direction) is asked where the box reads something.
template <class Number, class AxisOf>
__device__ __forceinline__ void write_row(const Problem& problem, int64_t k, bool reads,
                                          const AxisOf& axis_of, const BoxSums<Number>& sums) {
  Number* row = static_cast<Number*>(problem.grad_box) + k * problem.box_columns;
  for (int32_t i = 0; i < problem.box_columns; ++i) row[i] = 0;
  if (!reads) return;
  Number* edges = row + problem.image_column;
  GLIMPSE_UNROLL
  for (int32_t d = 0; d < 2; ++d) {
    const BoxAxis<Number>& line = axis_of(d);
    const Axis<Number>& a = line.axis;
    // Added, because several edges may be one column.
    edges[problem.op.lo_column(d)] += sums.origin[d] * a.origin_lo + sums.step[d] * a.step_lo;
    edges[problem.op.hi_column(d)] += sums.origin[d] * a.origin_hi + sums.step[d] * a.step_hi;
  }
}

/// Adds the sums of all threads of the block and writes row k of the result, or the sums of this
/// slice. Called by all threads; a barrier inside.
template <class Number>
__device__ __forceinline__ void write_box(const Problem& problem, int64_t k,
                                          const BoxAxis<Number>* axis, BoxSums<Number> sums) {
  GLIMPSE_SHARED(BoxSums<Number>, warp_sums, [kBoxWarps]);
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    GLIMPSE_UNROLL
    for (int32_t d = 0; d < 2; ++d) {
      sums.origin[d] += __shfl_down_sync(kFullWarp, sums.origin[d], distance);
      sums.step[d] += __shfl_down_sync(kFullWarp, sums.step[d], distance);
    }
  }
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) warp_sums[warp] = sums;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int32_t i = 1; i < static_cast<int32_t>(blockDim.x / 32); ++i) sums.add(warp_sums[i]);
  if (gridDim.y > 1) {
    static_cast<BoxSums<Number>*>(problem.workspace)[blockIdx.y * problem.boxes + k] = sums;
  } else {
    const auto axis_of = [&](int32_t d) -> const BoxAxis<Number>& { return axis[d]; };
    write_row(problem, k, axis != nullptr, axis_of, sums);
  }
}

/// Thread: a box, whose slices it adds in order.
template <class Number>
__global__ void __launch_bounds__(kSumThreads)
    grad_boxes_sum_kernel(GLIMPSE_GRID_CONSTANT Problem problem, int32_t slices) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (k >= problem.boxes) return;
  const auto* slice = static_cast<const BoxSums<Number>*>(problem.workspace) + k;
  BoxSums<Number> sums = *slice;
  for (int32_t i = 1; i < slices; ++i) sums.add(slice[i * problem.boxes]);
  const Box<Number> box = read_box<Number>(problem, k);
  const auto axis_of = [&](int32_t d) { return box_axis(problem, box, d); };
  write_row(problem, k, box.level >= 0, axis_of, sums);
}

/// Offsets of the pooled gradient, which is dense in the layout of the problem.
struct PooledStrides {
  int64_t box, channel, cell;

  __device__ __forceinline__ explicit PooledStrides(const Problem& problem) {
    const int64_t cells = int64_t{problem.out_height} * problem.out_width;
    const bool nhwc = problem.layout == Layout::kNhwc;
    box = problem.channels * cells;
    channel = nhwc ? 1 : cells;
    cell = nhwc ? problem.channels : 1;
  }
};

// ------------------------------------------------------------------------------------------ simple

/// The sums of this thread over its share of the pooled gradient of box k, of the cells that can
/// reach the map: a mask that is pasted reaches few of the pixels of an image.
/// `axis` is read where it is, because copies of it would cost registers.
template <class T>
__device__ __forceinline__ void add_without_tables(const Problem& problem, int64_t k, int64_t image,
                                                   int32_t level_index,
                                                   const BoxAxis<acc_t<T>>* axis,
                                                   BoxSums<acc_t<T>>* sums) {
  using Number = acc_t<T>;
  const BoxAxis<Number>&along_y = axis[kY], &along_x = axis[kX];
  const auto reached = [&](const BoxAxis<Number>& line) {
    return cells_reaching(problem.op, line.axis, {0, line.cells}, 0, line.size - 1, line.size);
  };
  const Cells rows = reached(along_y), columns = reached(along_x);
  const int32_t width = columns.end - columns.first;
  const Level& level = problem.level[level_index];
  const PooledStrides strides(problem);
  const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled) + k * strides.box;
  const int64_t cells = int64_t{rows.end - rows.first} * width;
  GLIMPSE_NO_UNROLL
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < problem.channels * cells;
       i += int64_t{gridDim.y} * blockDim.x) {
    const int64_t channel = i / cells;
    const int64_t place = i - channel * cells;
    const auto row = static_cast<int32_t>(place / width);
    const int32_t cell_y = rows.first + row;
    const int32_t cell_x = columns.first + static_cast<int32_t>(place - int64_t{row} * width);
    const int64_t cell = int64_t{cell_y} * along_x.cells + cell_x;
    const Number g = load_value(grad[channel * strides.channel + cell * strides.cell]);
    const T* plane =
        static_cast<const T*>(level.data) + image * level.stride_n + channel * level.stride_c;
    const Number factor_y = sample_factor(along_y.axis), factor_x = sample_factor(along_x.axis);
    for_each_tap(
        problem.op, along_y.axis, cell_y, 0, along_y.size - 1, along_y.size,
        [&](int32_t y, Number weight_y, Number slope_y, Number progress_y) {
          Number value = 0, origin_x = 0, step_x = 0;
          for_each_tap(problem.op, along_x.axis, cell_x, 0, along_x.size - 1, along_x.size,
                       [&](int32_t x, Number weight_x, Number slope_x, Number progress_x) {
                         const Number product =
                             g * load_value(plane[y * level.stride_h + x * level.stride_w]);
                         value += along_x.weighting(weight_x, slope_x, progress_x) * product;
                         origin_x += slope_x * product;
                         step_x += slope_x * progress_x * product;
                       });
          const Number weight = along_y.weighting(weight_y, slope_y, progress_y) * factor_y;
          const Number slope = slope_y * factor_y;
          sums->add_row(value * factor_x, origin_x * factor_x, step_x * factor_x, weight,
                        {slope, slope * progress_y});
        });
  }
}

/// Block: a slice of a box. Thread: elements of its pooled gradient, evenly spaced.
template <class T>
__global__ void __launch_bounds__(kBoxThreads, sizeof(acc_t<T>) == 8 ? 1 : 2)
    grad_boxes_simple_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(Box<Number>, box, );
  GLIMPSE_SHARED(BoxAxis<Number>, axis, [2]);
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) {
    box = read_box<Number>(problem, k);
    for (int32_t d = 0; d < 2 && box.level >= 0; ++d) axis[d] = box_axis(problem, box, d);
  }
  __syncthreads();
  BoxSums<Number> sums;
  sums.clear();
  if (box.level >= 0) add_without_tables<T>(problem, k, box.image, box.level, axis, &sums);
  write_box(problem, k, box.level >= 0 ? axis : nullptr, sums);
}

// ----------------------------------------------------------------------------- lanes are channels

/// Adds kTaps neighbouring taps of an x row: they stay in registers while all rows of pixels pass.
/// `image` points at the first channel of this lane, `grad` holds its pooled gradient of the cell.
template <class T, int kChannels, int kTaps>
__device__ __forceinline__ void add_slope_columns(const Tables<float>& tables, const Level& level,
                                                  const T* image, const float (&grad)[kChannels],
                                                  Row row_y, int32_t first_x,
                                                  BoxSums<float>* sums) {
  const T* column[kTaps];
  float weight_x[kTaps];
  TapSlope<float> slope_x[kTaps];
  GLIMPSE_UNROLL
  for (int j = 0; j < kTaps; ++j) {
    const Tap<float> tap = tables.tap[first_x + j];
    column[j] = image + tap.pixel * level.stride_w;
    weight_x[j] = tap.weight;
    slope_x[j] = tables.slope[first_x + j];
  }
  GLIMPSE_NO_UNROLL
  for (int32_t i = row_y.first; i < row_y.first + row_y.count; ++i) {
    const Tap<float> tap_y = tables.tap[i];
    const int64_t row = tap_y.pixel * level.stride_h;
    Pack<T, kChannels> pixel[kTaps];
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) pixel[j] = Pack<T, kChannels>::load(column[j] + row);
    float value = 0, origin_x = 0, step_x = 0;
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      float feature[kChannels];
      pixel[j].unpack(feature);
      float product = grad[0] * feature[0];
      GLIMPSE_UNROLL
      for (int c = 1; c < kChannels; ++c) product += grad[c] * feature[c];
      value += weight_x[j] * product;
      origin_x += slope_x[j].origin * product;
      step_x += slope_x[j].step * product;
    }
    sums->add_row(value, origin_x, step_x, tap_y.weight, tables.slope[i]);
  }
}

/// Block: a slice of a box. Warp: one row of cells of 32 * kChannels channels at a time, so that
/// its next cell finds the pixels it shares with this one in L1. Lane: kChannels channels; tables
/// are the same in all lanes.
template <class T, int kChannels>
__global__ void __launch_bounds__(kTableThreads, kTableBlocks<float>)
    grad_boxes_nhwc_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                           GLIMPSE_GRID_CONSTANT TableShape shape) {
  using Grad = pooled_t<T>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const Tables<float> tables = build_tables<float, true>(problem, k, shape, shared);
  BoxSums<float> sums;
  sums.clear();
  if (tables.level >= 0 && !tables.fit) {
    add_without_tables<T>(problem, k, tables.image, tables.level, tables.axis, &sums);
  } else if (tables.level >= 0) {
    const Level& level = problem.level[tables.level];
    const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n;
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t warps = blockDim.x / 32 * gridDim.y;
    int32_t cell_y = blockIdx.y * (blockDim.x >> 5) + warp;
    int64_t channel = lane * kChannels;
    while (true) {
      // Rows of cells inside, slices of channels outside.
      while (cell_y >= shape.cells_y) {
        cell_y -= shape.cells_y;
        channel += 32 * kChannels;
      }
      if (channel >= problem.channels) break;
      const Row row_y = tables.row_y[cell_y];
      const int64_t cell = (k * shape.cells_y + cell_y) * shape.cells_x;
      const Grad* grad =
          static_cast<const Grad*>(problem.pooled) + cell * problem.channels + channel;
      for (int32_t cell_x = 0; cell_x < shape.cells_x; ++cell_x) {
        const Row row_x = tables.row_x[cell_x];
        float value[kChannels];
        Pack<Grad, kChannels>::load(grad).unpack(value);
        grad += problem.channels;
        for (int32_t j = 0; j < row_x.count; j += 4) {
          const T* lane_image = image + channel;
          const int32_t first = row_x.first + j;
          switch (row_x.count - j) {
            case 1:
              add_slope_columns<T, kChannels, 1>(tables, level, lane_image, value, row_y, first,
                                                 &sums);
              break;
            case 2:
              add_slope_columns<T, kChannels, 2>(tables, level, lane_image, value, row_y, first,
                                                 &sums);
              break;
            case 3:
              add_slope_columns<T, kChannels, 3>(tables, level, lane_image, value, row_y, first,
                                                 &sums);
              break;
            default:
              add_slope_columns<T, kChannels, 4>(tables, level, lane_image, value, row_y, first,
                                                 &sums);
          }
        }
      }
      cell_y += warps;
    }
  }
  write_box(problem, k, tables.level >= 0 ? tables.axis : nullptr, sums);
}

// -------------------------------------------------------------------------------- lanes are taps

// Note [Lanes are taps]
// A lane owns one tap along x of one cell, and walks down the rows of pixels of that cell's column.
// Taps along x follow each other in the tables, and so do their pixels in a row of the map: lanes
// of a warp read one or two lines of memory, where lanes that are cells read as many as they have
// rows. What a lane adds up along y it multiplies with its weight and slopes along x once for each
// cell.

/// Rows of cells that a warp takes at a time.
constexpr int32_t kSegmentRows = 8;
/// Marks a tap that no cell has.
constexpr uint16_t kNoCell = 0xffff;

/// Bytes of the list behind the tables.
inline size_t cell_list_bytes(const TableShape& shape) {
  return (static_cast<size_t>(shape.room) * sizeof(uint16_t) + 15) / 16 * 16;
}

/// The taps along x of a box: taps first, first + 1, ... of the tables, cell by cell.
struct TapList {
  int32_t first, count;
  const uint16_t* cell;  // of each, or kNoCell
};

/// By all threads, after build_tables; a barrier inside.
template <class Number>
__device__ __forceinline__ TapList list_taps(const Tables<Number>& tables, const TableShape& shape,
                                             uint16_t* cell) {
  const Row last_row = tables.row_x[shape.cells_x - 1];
  TapList list;
  list.first = tables.row_x[0].first;
  list.count = last_row.first + last_row.count - list.first;
  list.cell = cell;
  for (int32_t q = threadIdx.x; q < shape.cells_x; q += blockDim.x) {
    const Row row = tables.row_x[q];
    const int32_t end =
        q + 1 < shape.cells_x ? tables.row_x[q + 1].first : last_row.first + last_row.count;
    GLIMPSE_NO_UNROLL
    for (int32_t i = row.first; i < end; ++i) {
      const bool used = i < row.first + row.count;
      cell[i - list.first] = used ? static_cast<uint16_t>(q) : kNoCell;
    }
  }
  __syncthreads();
  return list;
}

/// Adds the cells `rows` of one tap along x in kTogether channels. `plane` points at its column of
/// pixels in the first of them, `grad` at its first cell.
template <class T, int kTogether>
__device__ __forceinline__ void add_tap(const Tables<acc_t<T>>& tables, const Level& level,
                                        const T* plane, const pooled_t<T>* grad,
                                        int64_t grad_channel, int64_t grad_row, Cells rows,
                                        Tap<acc_t<T>> tap_x, TapSlope<acc_t<T>> slope_x,
                                        BoxSums<acc_t<T>>* sums) {
  using Number = acc_t<T>;
  GLIMPSE_NO_UNROLL
  for (int32_t cell_y = rows.first; cell_y < rows.end; ++cell_y, grad += grad_row) {
    const Row row_y = tables.row_y[cell_y];
    Number value[kTogether];
    GLIMPSE_UNROLL
    for (int32_t c = 0; c < kTogether; ++c) value[c] = load_value(grad[c * grad_channel]);
    Number sum = 0, origin_y = 0, step_y = 0;
    GLIMPSE_NO_UNROLL
    for (int32_t i = row_y.first; i < row_y.first + row_y.count; ++i) {
      const Tap<Number> tap_y = tables.tap[i];
      const TapSlope<Number> slope_y = tables.slope[i];
      const T* pixel = plane + tap_y.pixel * level.stride_h;
      Number product = 0;
      GLIMPSE_UNROLL
      for (int32_t c = 0; c < kTogether; ++c) {
        product += value[c] * load_value(*pixel);
        pixel += level.stride_c;
      }
      sum += tap_y.weight * product;
      origin_y += slope_y.origin * product;
      step_y += slope_y.step * product;
    }
    sums->origin[kY] += tap_x.weight * origin_y;
    sums->step[kY] += tap_x.weight * step_y;
    sums->origin[kX] += slope_x.origin * sum;
    sums->step[kX] += slope_x.step * sum;
  }
}

/// Block: a slice of a box. Warp: up to 32 taps, kSegmentRows rows of cells and a group of channels
/// at a time. Where taps are few, the lanes beyond have channels of their own.
template <class T, int kTogether>
__global__ void __launch_bounds__(kTableThreads, kTableBlocks<acc_t<T>>)
    grad_boxes_taps_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                           GLIMPSE_GRID_CONSTANT TableShape shape) {
  using Number = acc_t<T>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const Tables<Number> tables = build_tables<Number, true>(problem, k, shape, shared);
  BoxSums<Number> sums;
  sums.clear();
  if (tables.level >= 0 && !tables.fit) {
    add_without_tables<T>(problem, k, tables.image, tables.level, tables.axis, &sums);
  } else if (tables.level >= 0) {
    const TapList list = list_taps(
        tables, shape, reinterpret_cast<uint16_t*>(shared + shape.template bytes<Number, true>()));
    const Level& level = problem.level[tables.level];
    const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n;
    const PooledStrides strides(problem);
    const auto* box_grad = static_cast<const pooled_t<T>*>(problem.pooled) + k * strides.box;
    int32_t lanes_log2 = 5;
    while (lanes_log2 > 0 && 1 << (lanes_log2 - 1) >= list.count) --lanes_log2;
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t warp_channels = kTogether * (32 >> lanes_log2);
    const int32_t segments = (shape.cells_y - 1) / kSegmentRows + 1;
    const int32_t chunks = (list.count + 31) / 32;
    const int64_t items =
        ((problem.channels - 1) / warp_channels + 1) * (int64_t{segments} * chunks);
    for (int64_t item = blockIdx.y * (blockDim.x / 32) + warp; item < items;
         item += int64_t{gridDim.y} * (blockDim.x / 32)) {
      int32_t inner;
      const int64_t group = split(item, segments * chunks, &inner);
      const int32_t chunk = inner / segments, segment = inner - chunk * segments;
      const int32_t i = chunk * 32 + (lane & ((1 << lanes_log2) - 1));
      const int64_t channel = group * warp_channels + (lane >> lanes_log2) * kTogether;
      if (i >= list.count || list.cell[i] == kNoCell || channel >= problem.channels) continue;
      Cells rows = {segment * kSegmentRows, (segment + 1) * kSegmentRows};
      if (rows.end > shape.cells_y) rows.end = shape.cells_y;
      const Tap<Number> tap = tables.tap[list.first + i];
      const TapSlope<Number> slope = tables.slope[list.first + i];
      const T* plane = image + channel * level.stride_c + tap.pixel * level.stride_w;
      const int64_t row = shape.cells_x * strides.cell;
      const auto* grad =
          box_grad + channel * strides.channel + rows.first * row + list.cell[i] * strides.cell;
      if (problem.channels - channel >= kTogether) {
        add_tap<T, kTogether>(tables, level, plane, grad, strides.channel, row, rows, tap, slope,
                              &sums);
      } else {
        GLIMPSE_NO_UNROLL
        for (int64_t c = channel; c < problem.channels; ++c) {
          add_tap<T, 1>(tables, level, plane, grad, strides.channel, row, rows, tap, slope, &sums);
          plane += level.stride_c;
          grad += strides.channel;
        }
      }
    }
  }
  write_box(problem, k, tables.level >= 0 ? tables.axis : nullptr, sums);
}

}  // namespace glimpse::cuda
