// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/tables.cuh"
#include "half.h"
#include "problem.h"

/// grad_box = <pooled gradient, d/d box (Ay * features * Ax^T)>. Three kernels compute it:
///
///   grad_boxes_nhwc_kernel    lanes are neighbouring channels and read them with wide loads
///   grad_boxes_cells_kernel   lanes are cells; any layout, any strides
///   grad_boxes_simple_kernel  no tables; outputs with more cells than tables can list
///
/// In all of them a block owns a box and writes its row of the result, so nothing is cleared and
/// nothing is added in memory. Each thread keeps four sums; one warp adds those of its lanes, one
/// thread those of the warps, always in the same order.
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
// With tables. Five such blocks leave 96 registers a thread, and some compute while others build
// their tables.
constexpr int32_t kTableThreads = 128;
/// Blocks of kTableThreads that share a multiprocessor.
template <class Number>
constexpr int32_t kTableBlocks = sizeof(Number) == 8 ? 3 : 5;

/// Adds the sums of all threads of the block and writes row k of the result. Called by all threads;
/// a barrier inside. `axis` as in Tables; null: the box reads nothing.
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
  for (int32_t i = 1; i < static_cast<int32_t>(blockDim.x / 32); ++i) {
    GLIMPSE_UNROLL
    for (int32_t d = 0; d < 2; ++d) {
      sums.origin[d] += warp_sums[i].origin[d];
      sums.step[d] += warp_sums[i].step[d];
    }
  }
  Number* row = static_cast<Number*>(problem.grad_box) + k * problem.box_columns;
  for (int32_t i = 0; i < problem.box_columns; ++i) row[i] = 0;
  if (axis == nullptr) return;
  Number* edges = row + problem.image_column;
  GLIMPSE_UNROLL
  for (int32_t d = 0; d < 2; ++d) {
    const Axis<Number>& a = axis[d].axis;
    // Added, because several edges may be one column.
    edges[problem.op.lo_column(d)] += sums.origin[d] * a.origin_lo + sums.step[d] * a.step_lo;
    edges[problem.op.hi_column(d)] += sums.origin[d] * a.origin_hi + sums.step[d] * a.step_hi;
  }
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

/// The sums of this thread over every blockDim.x-th element of the pooled gradient of box k, of the
/// cells that can reach the map: a mask that is pasted reaches few of the pixels of an image.
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
  for (int64_t i = threadIdx.x; i < problem.channels * cells; i += blockDim.x) {
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

/// Block: a box. Thread: every kBoxThreads-th element of its pooled gradient.
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

/// Block: a box. Warp: one row of cells of 32 * kChannels channels at a time, so that its next cell
/// finds the pixels it shares with this one in L1. Lane: kChannels channels; tables are the same in
/// all lanes.
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
    const int32_t warps = blockDim.x >> 5;
    int32_t cell_y = warp;
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

// -------------------------------------------------------------------------------- lanes are cells

/// How grad_boxes_cells_kernel divides a warp: 1 << cell_lanes_log2 neighbouring lanes are
/// neighbouring cells, the groups of such lanes are groups of channels.
struct CellsPlan {
  TableShape tables;
  int32_t cell_lanes_log2;
};

/// Block: a box. Lane: one cell of kTogether channels at a time. Neighbouring lanes read
/// neighbouring pixels of a channel; what one cell reads of the tables serves all its channels,
/// whose loads are under way together.
template <class T, int kTogether>
__global__ void __launch_bounds__(kTableThreads, kTableBlocks<acc_t<T>>)
    grad_boxes_cells_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                            GLIMPSE_GRID_CONSTANT CellsPlan plan) {
  using Number = acc_t<T>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const TableShape& shape = plan.tables;
  const Tables<Number> tables = build_tables<Number, true>(problem, k, shape, shared);
  BoxSums<Number> sums;
  sums.clear();
  if (tables.level >= 0 && !tables.fit) {
    add_without_tables<T>(problem, k, tables.image, tables.level, tables.axis, &sums);
  } else if (tables.level >= 0) {
    const Level& level = problem.level[tables.level];
    const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n;
    const PooledStrides strides(problem);
    const auto* box_grad = static_cast<const pooled_t<T>*>(problem.pooled) + k * strides.box;
    const int32_t cells = shape.cells_y * shape.cells_x;
    const int32_t cell_lanes = 1 << plan.cell_lanes_log2;
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t warps = blockDim.x >> 5;
    const int32_t warp_channels = kTogether * (32 >> plan.cell_lanes_log2);
    int32_t first_cell = warp * cell_lanes;
    int64_t first_channel = (lane >> plan.cell_lanes_log2) * kTogether;
    while (true) {
      // Cells inside, groups of channels outside.
      while (first_cell >= cells) {
        first_cell -= (cells + cell_lanes - 1) / cell_lanes * cell_lanes;
        first_channel += warp_channels;
      }
      // Group 0 of a warp has its lowest channels, and leaves last.
      if (first_channel >= problem.channels) break;
      const int32_t cell = first_cell + (lane & (cell_lanes - 1));
      if (cell < cells) {
        const int32_t cell_y = cell / shape.cells_x;
        const Row row_y = tables.row_y[cell_y];
        const Row row_x = tables.row_x[cell - cell_y * shape.cells_x];
        const int64_t left = problem.channels - first_channel;
        const int32_t channels = left < kTogether ? static_cast<int32_t>(left) : kTogether;
        const auto* grad = box_grad + first_channel * strides.channel + cell * strides.cell;
        Number value[kTogether];
        GLIMPSE_UNROLL
        for (int32_t c = 0; c < kTogether; ++c) {
          value[c] = c < channels ? load_value(grad[c * strides.channel]) : Number(0);
        }
        const T* plane = image + first_channel * level.stride_c;
        GLIMPSE_NO_UNROLL
        for (int32_t i = row_y.first; i < row_y.first + row_y.count; ++i) {
          const Tap<Number> tap_y = tables.tap[i];
          const T* row = plane + tap_y.pixel * level.stride_h;
          Number row_value = 0, origin_x = 0, step_x = 0;
          GLIMPSE_NO_UNROLL
          for (int32_t j = row_x.first; j < row_x.first + row_x.count; ++j) {
            const Tap<Number> tap_x = tables.tap[j];
            const TapSlope<Number> slope_x = tables.slope[j];
            const T* pixel = row + tap_x.pixel * level.stride_w;
            Number product = 0;
            GLIMPSE_UNROLL
            for (int32_t c = 0; c < kTogether; ++c) {
              if (c < channels) product += value[c] * load_value(*pixel);
              pixel += level.stride_c;
            }
            row_value += tap_x.weight * product;
            origin_x += slope_x.origin * product;
            step_x += slope_x.step * product;
          }
          sums.add_row(row_value, origin_x, step_x, tap_y.weight, tables.slope[i]);
        }
      }
      first_cell += warps * cell_lanes;
    }
  }
  write_box(problem, k, tables.level >= 0 ? tables.axis : nullptr, sums);
}

}  // namespace glimpse::cuda
