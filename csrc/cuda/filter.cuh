// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "batch_problem.h"
#include "cuda/device.cuh"
#include "cuda/grad_boxes.cuh"
#include "cuda/grad_features.cuh"
#include "half.h"
#include "problem.h"

/// Cells that weigh pixels: Note [Filters]. Short loops, one owner for each number, no tables of
/// taps: a weight follows from the row of its cell in a few operations, and rows are written down
/// once where many threads share them.
///
///   filter_rows_kernel           the rows of all boxes, into the workspace
///   crop_batch_kernel            images of any kind to scaled and converted crops
///   filter_sample_kernel         the same as pooled values, for derivatives of any order
///   filter_grad_features_kernel  one thread per pixel and channel, which adds boxes in order
///   filter_grad_boxes_kernel     one block per box
namespace glimpse::cuda {

constexpr int32_t kFilterThreads = 256;

/// A row with what it takes to follow a motion of the box.
template <class Number>
struct alignas(16) FilterCell {
  FilterRow<Number> row;
  FilterSlopes<Number> slopes;

  /// The weight of pixel `first + i`, or its derivative where the axis is in tangent mode.
  __device__ __forceinline__ Number weight(int32_t i, const Weighting<Number>& weighting) const {
    const Number own = row.weight(i);
    if (!weighting.tangent) return own;
    Number origin, step;
    row.slopes(i, slopes, &origin, &step);
    return weighting.of(own, origin, step);
  }
};

/// The row of a cell, found on the spot.
template <class Number>
__device__ __forceinline__ FilterCell<Number> filter_cell(const Problem& problem,
                                                          const Box<Number>& box, int32_t direction,
                                                          int32_t size, int32_t cell) {
  FilterCell<Number> found;
  found.row = filter_line(problem, box, direction, size).template row<Number>(cell, &found.slopes);
  return found;
}

/// What boxes read of a map, a little more at most.
struct alignas(16) FilterReach {
  int64_t map;  // image * levels + level; -1: nothing
  int32_t first_y, last_y, first_x, last_x;
};

/// [boxes] reaches, then [boxes][rows of y, rows of x].
template <class Number>
struct FilterWorkspace {
  FilterReach* reach;
  FilterCell<Number>* cell;

  GLIMPSE_HD explicit FilterWorkspace(const Problem& problem)
      : reach(static_cast<FilterReach*>(problem.workspace)),
        cell(reinterpret_cast<FilterCell<Number>*>(reach + problem.boxes)) {}

  GLIMPSE_HD static size_t bytes(const Problem& problem) {
    const size_t rows = static_cast<size_t>(problem.out_height) + problem.out_width;
    return static_cast<size_t>(problem.boxes) *
           (sizeof(FilterReach) + rows * sizeof(FilterCell<Number>));
  }
};

/// Images of their own sizes, as many as fit into the parameters of a kernel.
struct BatchChunk {
  static constexpr int32_t kImages = 32;
  BatchImage image[kImages];
  int64_t first;
  int32_t count;  // 0: the images are those of level 0
};

/// Thread: a row, or the reach of a box.
template <class Number>
__global__ void __launch_bounds__(kFilterThreads)
    filter_rows_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                       GLIMPSE_GRID_CONSTANT BatchChunk chunk) {
  const FilterWorkspace<Number> workspace(problem);
  const int64_t rows = int64_t{problem.out_height} + problem.out_width;
  const int64_t tasks = problem.boxes * (rows + 1);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < tasks;
       i += threads) {
    const int64_t k = i / (rows + 1);
    const auto row = static_cast<int32_t>(i - k * (rows + 1));
    const Box<Number> box = read_box<Number>(problem, k);
    int32_t height = 0, width = 0;
    bool here = box.level >= 0;
    if (here && chunk.count == 0) {
      height = problem.level[box.level].height;
      width = problem.level[box.level].width;
    } else if (here) {
      here = box.image >= chunk.first && box.image < chunk.first + chunk.count;
      const BatchImage& image = chunk.image[here ? box.image - chunk.first : 0];
      height = image.height;
      width = image.width;
    }
    if (row < rows) {
      // Rows of boxes that read nothing are not read either.
      if (!here) continue;
      const int32_t direction = row < problem.out_height ? kY : kX;
      const int32_t cell = direction == kY ? row : row - problem.out_height;
      workspace.cell[k * rows + row] =
          filter_cell(problem, box, direction, direction == kY ? height : width, cell);
      continue;
    }
    FilterReach reach = {-1, 0, 0, 0, 0};
    if (here) {
      reach.map = box.image * problem.levels + box.level;
      const auto range = [&](int32_t direction, int32_t size, int32_t* first, int32_t* last) {
        filter_line(problem, box, direction, size).pixels(first, last);
      };
      range(kY, height, &reach.first_y, &reach.last_y);
      range(kX, width, &reach.first_x, &reach.last_x);
    }
    workspace.reach[k] = reach;
  }
}

/// What becomes of the values of channels first .. first + count - 1.
struct BatchNumbers {
  static constexpr int32_t kChannels = 32;
  int64_t first;
  int32_t count;
  double multiplier[kChannels], offset[kChannels];
  double fill;
  Dtype result;
};

template <class Number>
__device__ __forceinline__ void store_result(Dtype dtype, void* data, int64_t i, Number value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(data)[i] = value;
  } else {
    store_element(dtype, data, i, static_cast<float>(value));
  }
}

/// Thread: a cell of all channels of `numbers`, four at a time.
template <class T>
__global__ void __launch_bounds__(kFilterThreads)
    crop_batch_kernel(GLIMPSE_GRID_CONSTANT Problem problem, GLIMPSE_GRID_CONSTANT BatchChunk chunk,
                      GLIMPSE_GRID_CONSTANT BatchNumbers numbers) {
  using Number = acc_t<T>;
  const FilterWorkspace<Number> workspace(problem);
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t rows = int64_t{problem.out_height} + problem.out_width;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const bool nhwc = problem.layout == Layout::kNhwc;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < problem.boxes * plane; i += threads) {
    const int64_t k = i / plane;
    const auto cell = static_cast<int32_t>(i - k * plane);
    const int32_t y = cell / problem.out_width, x = cell - y * problem.out_width;
    const Box<Number> box = read_box<Number>(problem, k);
    BatchImage image = {};
    if (box.level >= 0 && chunk.count == 0) {
      const Level& level = problem.level[0];
      image = {static_cast<const T*>(level.data) + box.image * level.stride_n,
               level.stride_c,
               level.stride_h,
               level.stride_w,
               level.height,
               level.width};
    } else if (box.level >= 0) {
      if (box.image < chunk.first || box.image >= chunk.first + chunk.count) continue;
      image = chunk.image[box.image - chunk.first];
    } else if (chunk.first > 0) {
      continue;
    }
    // In registers: lanes have rows of their own, and reading them again would touch as many lines.
    FilterRow<Number> row_y = {}, row_x = {};
    Number missing = 1;
    const T* pixels = nullptr;
    if (box.level >= 0) {
      row_y = workspace.cell[k * rows + y].row;
      row_x = workspace.cell[k * rows + problem.out_height + x].row;
      missing = 1 - row_y.coverage * row_x.coverage;
      pixels = static_cast<const T*>(image.data) + row_y.first * image.stride_h +
               row_x.first * image.stride_w;
    }
    const Number added =
        numbers.fill == 0 ? Number(0) : static_cast<Number>(numbers.fill) * missing;
    for (int32_t first = 0; first < numbers.count; first += 4) {
      Number sum[4] = {};
      GLIMPSE_NO_UNROLL
      for (int32_t j = 0; j < row_y.count; ++j) {
        const Number weight_y = row_y.weight(j);
        const T* line = pixels + j * image.stride_h + (numbers.first + first) * image.stride_c;
        GLIMPSE_NO_UNROLL
        for (int32_t l = 0; l < row_x.count; ++l) {
          const Number weight = weight_y * row_x.weight(l);
          // The end of a filter: not a product, because 0 * NaN is NaN.
          if (weight == 0) continue;
          GLIMPSE_UNROLL
          for (int32_t c = 0; c < 4; ++c) {
            if (first + c < numbers.count) {
              sum[c] += weight * load_value(line[l * image.stride_w + c * image.stride_c]);
            }
          }
        }
      }
      GLIMPSE_UNROLL
      for (int32_t c = 0; c < 4; ++c) {
        if (first + c >= numbers.count) continue;
        const int64_t channel = numbers.first + first + c;
        const Number value = (sum[c] + added) * static_cast<Number>(numbers.multiplier[first + c]) +
                             static_cast<Number>(numbers.offset[first + c]);
        const int64_t at =
            nhwc ? i * problem.channels + channel : (k * problem.channels + channel) * plane + cell;
        store_result(numbers.result, problem.pooled, at, value);
      }
    }
  }
}

/// Thread: a pooled value.
template <class T>
__global__ void __launch_bounds__(kFilterThreads)
    filter_sample_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  using Number = acc_t<T>;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t of_box = plane * problem.channels;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const bool nhwc = problem.layout == Layout::kNhwc;
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < problem.boxes * of_box; i += threads) {
    const int64_t k = i / of_box, rest = i - k * of_box;
    const int64_t channel = nhwc ? rest % problem.channels : rest / plane;
    const auto cell = static_cast<int32_t>(nhwc ? rest / problem.channels : rest % plane);
    const int32_t y = cell / problem.out_width, x = cell - y * problem.out_width;
    const Box<Number> box = read_box<Number>(problem, k);
    Number sum = 0;
    if (box.level >= 0) {
      const Level& level = problem.level[box.level];
      const auto row_y = filter_cell(problem, box, kY, level.height, y);
      const auto row_x = filter_cell(problem, box, kX, level.width, x);
      const Weighting<Number> along_y = box_axis(problem, box, kY).weighting;
      const Weighting<Number> along_x = box_axis(problem, box, kX).weighting;
      const T* pixels = static_cast<const T*>(level.data) + box.image * level.stride_n +
                        channel * level.stride_c + row_y.row.first * level.stride_h +
                        row_x.row.first * level.stride_w;
      GLIMPSE_NO_UNROLL
      for (int32_t j = 0; j < row_y.row.count; ++j) {
        Number line = 0;
        GLIMPSE_NO_UNROLL
        for (int32_t l = 0; l < row_x.row.count; ++l) {
          line += row_x.weight(l, along_x) *
                  load_value(pixels[j * level.stride_h + l * level.stride_w]);
        }
        sum += row_y.weight(j, along_y) * line;
      }
    }
    pooled[i] = Store<pooled_t<T>>::from(sum);
  }
}

/// Thread: an element of a gradient, from the workspace of filter_rows_kernel.
template <class Number>
__global__ void __launch_bounds__(kFilterThreads, 3)  // 64 registers, the compiler's choice, spill
    filter_grad_features_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  const FilterWorkspace<Number> workspace(problem);
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t rows = int64_t{problem.out_height} + problem.out_width;
  const int64_t cell_stride = nhwc ? problem.channels : 1;
  const int64_t channel_stride = nhwc ? 1 : plane;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    const int64_t pixels = int64_t{level.height} * level.width;
    const int64_t elements = problem.batch * problem.channels * pixels;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements;
         i += threads) {
      const int64_t image = i / (problem.channels * pixels);
      const int64_t rest = i % (problem.channels * pixels);
      const int64_t channel = nhwc ? rest % problem.channels : rest / pixels;
      const int64_t pixel = nhwc ? rest / problem.channels : rest % pixels;
      const auto y = static_cast<int32_t>(pixel / level.width);
      const auto x = static_cast<int32_t>(pixel % level.width);
      Number sum = 0;
      GLIMPSE_NO_UNROLL
      for (int64_t k = 0; k < problem.boxes; ++k) {
        const FilterReach reach = workspace.reach[k];
        if (reach.map != image * problem.levels + l || y < reach.first_y || y > reach.last_y ||
            x < reach.first_x || x > reach.last_x) {
          continue;
        }
        const Box<Number> box = box_on_level<Number>(problem, k, image, l);
        const BoxAxis<Number> along_y = box_axis(problem, box, kY);
        const BoxAxis<Number> along_x = box_axis(problem, box, kX);
        const FilterCells cells_y = filter_line(problem, box, kY, level.height).cells_reading(y, y);
        const FilterCells cells_x = filter_line(problem, box, kX, level.width).cells_reading(x, x);
        const FilterCell<Number>* row_y = workspace.cell + k * rows;
        const FilterCell<Number>* row_x = row_y + problem.out_height;
        GLIMPSE_NO_UNROLL
        for (int32_t cell_y = cells_y.first; cell_y < cells_y.end; ++cell_y) {
          const int32_t at_y = y - row_y[cell_y].row.first;
          if (at_y < 0 || at_y >= row_y[cell_y].row.count) continue;
          Number line = 0;
          GLIMPSE_NO_UNROLL
          for (int32_t cell_x = cells_x.first; cell_x < cells_x.end; ++cell_x) {
            const int32_t at_x = x - row_x[cell_x].row.first;
            if (at_x < 0 || at_x >= row_x[cell_x].row.count) continue;
            const int64_t cell = int64_t{cell_y} * problem.out_width + cell_x;
            line += row_x[cell_x].weight(at_x, along_x.weighting) *
                    load_element<Number>(problem.dtype, problem.pooled,
                                         k * problem.channels * plane + channel * channel_stride +
                                             cell * cell_stride);
          }
          sum += row_y[cell_y].weight(at_y, along_y.weighting) * line;
        }
      }
      store_element(problem.dtype, level.data,
                    image * level.stride_n + channel * level.stride_c + y * level.stride_h +
                        x * level.stride_w,
                    sum);
    }
  }
}

/// Block: a box. Thread: elements of its pooled gradient, evenly spaced.
template <class T>
__global__ void __launch_bounds__(kBoxThreads, 1)
    filter_grad_boxes_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(BoxAxis<Number>, axis, [2]);  // written and read by the first thread
  const int64_t k = blockIdx.x;
  const Box<Number> box = read_box<Number>(problem, k);
  BoxSums<Number> sums;
  sums.clear();
  if (box.level >= 0) {
    const Level& level = problem.level[box.level];
    const BoxAxis<Number> along_y = box_axis(problem, box, kY);
    const BoxAxis<Number> along_x = box_axis(problem, box, kX);
    if (threadIdx.x == 0) {
      axis[kY] = along_y;
      axis[kX] = along_x;
    }
    const PooledStrides strides(problem);
    const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled) + k * strides.box;
    const int64_t plane = int64_t{problem.out_height} * problem.out_width;
    GLIMPSE_NO_UNROLL
    for (int64_t i = threadIdx.x; i < problem.channels * plane; i += blockDim.x) {
      const int64_t channel = i / plane;
      const auto cell = static_cast<int32_t>(i - channel * plane);
      const int32_t cell_y = cell / problem.out_width;
      const auto row_y = filter_cell(problem, box, kY, level.height, cell_y);
      const auto row_x =
          filter_cell(problem, box, kX, level.width, cell - cell_y * problem.out_width);
      const Number g = load_value(grad[channel * strides.channel + cell * strides.cell]);
      const T* pixels = static_cast<const T*>(level.data) + box.image * level.stride_n +
                        channel * level.stride_c + row_y.row.first * level.stride_h +
                        row_x.row.first * level.stride_w;
      GLIMPSE_NO_UNROLL
      for (int32_t j = 0; j < row_y.row.count; ++j) {
        Number value = 0, origin_x = 0, step_x = 0;
        GLIMPSE_NO_UNROLL
        for (int32_t l = 0; l < row_x.row.count; ++l) {
          const Number product = g * load_value(pixels[j * level.stride_h + l * level.stride_w]);
          Number origin, step;
          row_x.row.slopes(l, row_x.slopes, &origin, &step);
          value += along_x.weighting.of(row_x.row.weight(l), origin, step) * product;
          origin_x += origin * product;
          step_x += step * product;
        }
        TapSlope<Number> slope;
        row_y.row.slopes(j, row_y.slopes, &slope.origin, &slope.step);
        sums.add_row(value, origin_x, step_x,
                     along_y.weighting.of(row_y.row.weight(j), slope.origin, slope.step), slope);
      }
    }
  }
  write_box(problem, k, box.level >= 0 ? axis : nullptr, sums);
}

}  // namespace glimpse::cuda
