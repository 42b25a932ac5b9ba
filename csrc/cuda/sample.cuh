// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/tables.cuh"
#include "half.h"
#include "problem.h"

/// pooled = Ay * features * Ax^T. These kernels compute it:
///
///   sample_simple_kernel  any type, any strides; one thread per output, no tables
///   sample_points_kernel  a cell of one sample for each box: lanes are neighbouring channels
///   sample_planes_kernel  the same where channels are planes: lanes are points
///   sample_cells_kernel   few channels or many cells, any type and strides: lanes are cells
///   sample_nhwc_kernel    lanes are neighbouring channels and read them with wide loads
///   sample_nchw_kernel    lanes are neighbouring columns of pixels, then cells
///
/// Each takes the whole Problem: the levels of a pyramid are one launch. Every output is written
/// once, also the zeros of boxes that read nothing. An output depends on its own box only, and the
/// order of its sum on nothing but the taps of its cell.
namespace glimpse::cuda {

// ------------------------------------------------------------------------------------------ simple

/// One thread: output elements `index`, `index + all threads`, ...
/// Walks the samples of the cell in both directions; nothing is shared.
template <class T>
__global__ void __launch_bounds__(256, sizeof(acc_t<T>) == 8 ? 2 : 3)
    sample_simple_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  using Number = acc_t<T>;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t box_outputs = problem.channels * cells;
  const int64_t outputs = problem.boxes * box_outputs;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < outputs;
       index += threads) {
    const int64_t k = index / box_outputs;
    const int64_t rest = index - k * box_outputs;
    const bool nhwc = problem.layout == Layout::kNhwc;
    const int64_t c = nhwc ? rest % problem.channels : rest / cells;
    const int32_t cell = static_cast<int32_t>(nhwc ? rest / problem.channels : rest % cells);
    const int32_t cell_y = cell / problem.out_width;
    const int32_t cell_x = cell - cell_y * problem.out_width;

    const auto fill = static_cast<Number>(problem.fill);
    Number value = fill;
    const Box<Number> box = read_box<Number>(problem, k);
    if (box.level >= 0) {
      const Level& level = problem.level[box.level];
      const T* plane =
          static_cast<const T*>(level.data) + box.image * level.stride_n + c * level.stride_c;
      value = cell_value(problem.op, fill, box_axis(problem, box, kY), box_axis(problem, box, kX),
                         cell_y, cell_x, [&](int32_t y, int32_t x) {
                           return load_value(plane[y * level.stride_h + x * level.stride_w]);
                         });
    }
    pooled[index] = Store<pooled_t<T>>::from(value);
  }
}

// ------------------------------------------------------------------------------------------ points

constexpr int32_t kPointsThreads = 256;

__device__ __forceinline__ int64_t shuffle64(int64_t value, int32_t lane) {
  const int32_t high = __shfl_sync(kFullWarp, static_cast<int32_t>(value >> 32), lane);
  const int32_t low = __shfl_sync(kFullWarp, static_cast<int32_t>(value), lane);
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(low));
}

/// A warp: `points_per_warp` points, 32 at most, one cell of one sample each, and a slice of their
/// channels (grid y). Each lane finds the taps of one point. Then 1 << lanes_log2 lanes take a
/// point together, kChannels neighbouring channels each.
template <class T, int kChannels>
__global__ void __launch_bounds__(kPointsThreads)
    sample_points_kernel(GLIMPSE_GRID_CONSTANT Problem problem, int32_t lanes_log2,
                         int32_t points_per_warp) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & 31;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> 5;
  const int64_t first = warp * points_per_warp, left = problem.boxes - first;
  const int32_t points =
      left < points_per_warp ? (left < 0 ? 0 : static_cast<int32_t>(left)) : points_per_warp;

  Taps<float> own_y = {}, own_x = {};
  Box<float> box{};
  box.level = -1;
  if (lane < points) box = read_box<float>(problem, first + lane);
  if (box.level >= 0) {
    own_y = sample_taps(problem.op, box_axis(problem, box, kY), 0, 0);
    own_x = sample_taps(problem.op, box_axis(problem, box, kX), 0, 0);
  }
  const Level& level = problem.level[box.level < 0 ? 0 : box.level];
  const T* own_image =
      static_cast<const T*>(level.data) + (box.level < 0 ? 0 : box.image * level.stride_n);
  const auto stride_y = static_cast<int32_t>(level.stride_h);
  const auto stride_x = static_cast<int32_t>(level.stride_w);
  const int32_t own_counts = own_x.count == 0 ? 0 : own_y.count << 2 | own_x.count;
  const int32_t own_row[2] = {own_y.pixel[0] * stride_y, own_y.pixel[1] * stride_y};
  const int32_t own_column[2] = {own_x.pixel[0] * stride_x, own_x.pixel[1] * stride_x};

  const int32_t group = lane >> lanes_log2, groups = 32 >> lanes_log2;
  const int32_t lane_of_group = lane & ((1 << lanes_log2) - 1);
  const int64_t channel =
      ((static_cast<int64_t>(blockIdx.y) << lanes_log2) + lane_of_group) * kChannels;
  const auto fill = static_cast<float>(problem.fill);
  T* pooled = static_cast<T*>(problem.pooled) + first * problem.channels + channel;
  GLIMPSE_NO_UNROLL
  for (int32_t base = 0; base < points; base += groups) {
    const int32_t point = base + group;
    const auto* image = reinterpret_cast<const T*>(static_cast<uintptr_t>(
        shuffle64(static_cast<int64_t>(reinterpret_cast<uintptr_t>(own_image)), point)));
    const int32_t counts = __shfl_sync(kFullWarp, own_counts, point);
    int32_t row[2], column[2];
    float weight_y[2], weight_x[2];
    GLIMPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      row[i] = __shfl_sync(kFullWarp, own_row[i], point);
      column[i] = __shfl_sync(kFullWarp, own_column[i], point);
      weight_y[i] = __shfl_sync(kFullWarp, own_y.weight[i], point);
      weight_x[i] = __shfl_sync(kFullWarp, own_x.weight[i], point);
    }
    if (point >= points || channel >= problem.channels) continue;
    float sum[kChannels];
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) sum[c] = counts < 4 ? fill : 0.0f;
    const bool two_x = (counts & 2) != 0;
    const auto add_row = [&](int32_t offset, float weight) {
      const T* at = image + offset + channel;
      float low[kChannels], high[kChannels] = {};
      Pack<T, kChannels>::load(at + column[0]).unpack(low);
      if (two_x) Pack<T, kChannels>::load(at + column[1]).unpack(high);
      GLIMPSE_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        float value = weight_x[0] * low[c];
        if (two_x) value += weight_x[1] * high[c];
        sum[c] += weight * value;
      }
    };
    if (counts >= 4) {
      add_row(row[0], weight_y[0]);
      if (counts >= 8) add_row(row[1], weight_y[1]);
    }
    Pack<T, kChannels>::from(sum).store(pooled + point * problem.channels);
  }
}

// ----------------------------------------------------------------------------------- planes, cells

/// The taps of a cell that has one or two of them in each direction, to be applied to one channel
/// after another. In the place of a tap that is not there the other one is read, which costs less
/// than a branch, and dropped: a weight of zero would not hide infinity.
template <class Number>
struct Corners {
  uint32_t offset[2][2];  // elements from the start of a channel: [tap of y][tap of x]
  Number weight_y[2], weight_x[2];
  bool two_y, two_x;

  __device__ __forceinline__ Corners(const Level& level, const Taps<Number>& y,
                                     const Taps<Number>& x)
      : two_y(y.count == 2), two_x(x.count == 2) {
    const auto stride_y = static_cast<int32_t>(level.stride_h);
    const auto stride_x = static_cast<int32_t>(level.stride_w);
    // No index that is found at run time: it would put the taps into local memory.
    const int32_t high_y = two_y ? y.pixel[1] : y.pixel[0];
    const int32_t high_x = two_x ? x.pixel[1] : x.pixel[0];
    const int32_t row[2] = {y.pixel[0] * stride_y, high_y * stride_y};
    const int32_t column[2] = {x.pixel[0] * stride_x, high_x * stride_x};
    GLIMPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      weight_y[i] = y.weight[i];
      weight_x[i] = x.weight[i];
      GLIMPSE_UNROLL
      for (int j = 0; j < 2; ++j) offset[i][j] = static_cast<uint32_t>(row[i] + column[j]);
    }
  }

  /// `element_bytes` is the size of a T that the compiler does not know: then an address is one
  /// multiply-add, which a constant size would turn into two additions and a shift.
  template <class T>
  __device__ __forceinline__ Number value(const char* channel, uint32_t element_bytes) const {
    Number pixel[2][2], sum[2];
    GLIMPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      GLIMPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const char* at = channel + static_cast<uint64_t>(offset[i][j]) * element_bytes;
        pixel[i][j] = load_value(*reinterpret_cast<const T*>(at));
      }
    }
    GLIMPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Number second = two_x ? weight_x[1] * pixel[i][1] : Number(0);
      sum[i] = weight_x[0] * pixel[i][0] + second;
    }
    return weight_y[0] * sum[0] + (two_y ? weight_y[1] * sum[1] : Number(0));
  }
};

constexpr int32_t kPlanesThreads = 256;

/// A warp: 32 points, a slice of `channels_per_warp` channels (grid y), one cell of one sample
/// each. Lanes are points, so a channel is a few lines of its plane. The results of a point are
/// neighbours in memory: 32 channels of 32 points are turned in shared memory.
template <class T>
__global__ void __launch_bounds__(kPlanesThreads, 4)
    sample_planes_kernel(GLIMPSE_GRID_CONSTANT Problem problem, int32_t channels_per_warp,
                         uint32_t element_bytes) {
  GLIMPSE_SHARED(float, turned, [kPlanesThreads / 32][32][33]);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & 31;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) >> 5;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) - lane;
  const int64_t left = problem.boxes - first;
  const int32_t points = left < 32 ? (left < 0 ? 0 : static_cast<int32_t>(left)) : 32;

  Taps<float> y = {}, x = {};
  Box<float> box{};
  box.level = -1;
  if (lane < points) box = read_box<float>(problem, first + lane);
  if (box.level >= 0) {
    y = sample_taps(problem.op, box_axis(problem, box, kY), 0, 0);
    x = sample_taps(problem.op, box_axis(problem, box, kX), 0, 0);
  }
  const bool reads = y.count > 0 && x.count > 0;
  const Level& level = problem.level[box.level < 0 ? 0 : box.level];
  const Corners<float> corners(level, y, x);
  const auto fill = static_cast<float>(problem.fill);

  int64_t channel = static_cast<int64_t>(blockIdx.y) * channels_per_warp;
  const int64_t end = channel + channels_per_warp < problem.channels ? channel + channels_per_warp
                                                                     : problem.channels;
  const T* slice = static_cast<const T*>(level.data) + (reads ? box.image * level.stride_n : 0) +
                   channel * level.stride_c;
  const auto* plane = reinterpret_cast<const char*>(slice);
  const int64_t plane_bytes = level.stride_c * static_cast<int64_t>(sizeof(T));
  T* pooled = static_cast<T*>(problem.pooled) + first * problem.channels + channel;
  for (; channel < end; channel += 32, pooled += 32) {
    const int32_t width = end - channel < 32 ? static_cast<int32_t>(end - channel) : 32;
    GLIMPSE_NO_UNROLL
    for (int32_t c = 0; c < width; ++c, plane += plane_bytes) {
      turned[warp][lane][c] = reads ? corners.template value<T>(plane, element_bytes) : fill;
    }
    __syncwarp();
    // Of few channels, several points at a time.
    const int32_t side = 32 / width, own = lane / width, column = lane - own * width;
    if (own < side) {
      for (int32_t point = own; point < points; point += side) {
        pooled[point * problem.channels + column] = Store<T>::from(turned[warp][point][column]);
      }
    }
    __syncwarp();
  }
}

constexpr int32_t kCellsThreads = 256;

/// How sample_cells_kernel divides a box: grid (box, group of cells, slice of channels). A group is
/// `rows_per_block` rows of up to `columns` cells; a pass of the block takes `rows_per_pass` of
/// them.
struct CellsPlan {
  TableShape tables;
  int32_t columns, column_groups;
  int32_t rows_per_pass, rows_per_block;
  int32_t channels_per_block;
  uint32_t element_bytes;
};

/// Block: a group of cells of a box. A thread goes down a column of them and finds the taps of a
/// cell once for a slice of the channels, one or two taps in each direction in registers.
template <class T>
__global__ void __launch_bounds__(kCellsThreads, sizeof(acc_t<T>) == 8 ? 2 : 4)
    sample_cells_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                        GLIMPSE_GRID_CONSTANT CellsPlan plan) {
  using Number = acc_t<T>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const int32_t cells_y = plan.tables.cells_y, cells_x = plan.tables.cells_x;
  const auto group = static_cast<int32_t>(blockIdx.y) / plan.column_groups;
  const int32_t first_x =
      (static_cast<int32_t>(blockIdx.y) - group * plan.column_groups) * plan.columns;
  const int32_t first_y = group * plan.rows_per_block;
  const int32_t end_y =
      cells_y - first_y < plan.rows_per_block ? cells_y : first_y + plan.rows_per_block;
  const Tables<Number> tables =
      build_tables<Number, false>(problem, k, plan.tables, shared, first_y, end_y);

  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row_of_pass = thread / plan.columns;
  const int32_t cell_x = first_x + thread - row_of_pass * plan.columns;
  if (row_of_pass >= plan.rows_per_pass || cell_x >= cells_x) return;

  const int64_t first_channel = static_cast<int64_t>(blockIdx.z) * plan.channels_per_block;
  const int64_t left = problem.channels - first_channel;
  const int32_t channels =
      left < plan.channels_per_block ? static_cast<int32_t>(left) : plan.channels_per_block;
  const Level& level = problem.level[tables.level < 0 ? 0 : tables.level];
  const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n +
                   first_channel * level.stride_c;
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t cells = int64_t{cells_y} * cells_x;
  const int64_t to_cell = nhwc ? problem.channels : 1, to_channel = nhwc ? 1 : cells;
  int32_t cell_y = first_y + row_of_pass;
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled) + k * problem.channels * cells +
                 first_channel * to_channel + (int64_t{cell_y} * cells_x + cell_x) * to_cell;
  const int64_t to_next = int64_t{plan.rows_per_pass} * cells_x * to_cell;
  const auto stride_y = static_cast<int32_t>(level.stride_h);
  const auto stride_x = static_cast<int32_t>(level.stride_w);
  const int64_t plane_bytes = level.stride_c * static_cast<int64_t>(sizeof(T));
  const int64_t result_bytes = to_channel * static_cast<int64_t>(sizeof(pooled_t<T>));
  const auto fill = static_cast<Number>(problem.fill);
  const auto each_channel = [&](const auto& value) {
    const T* plane = image;
    pooled_t<T>* result = pooled;
    GLIMPSE_NO_UNROLL
    for (int32_t c = channels; c > 0; --c, plane += level.stride_c, result += to_channel) {
      *result = Store<pooled_t<T>>::from(value(
          [&](int32_t y, int32_t x) { return load_value(plane[y * stride_y + x * stride_x]); }));
    }
  };

  if (!tables.fit) {
    for (; cell_y < end_y; cell_y += plan.rows_per_pass, pooled += to_next) {
      each_channel([&](const auto& load) {
        return cell_value(problem.op, fill, tables.axis[kY], tables.axis[kX], cell_y, cell_x, load);
      });
    }
    return;
  }
  const Row row_x = tables.row_x[cell_x];
  Taps<Number> x = {};
  if (row_x.count > 0) x = tables.two_taps(row_x);
  for (; cell_y < end_y; cell_y += plan.rows_per_pass, pooled += to_next) {
    const Row row_y = tables.row_y[cell_y];
    if (row_y.count == 0 || row_x.count == 0) {
      each_channel([&](const auto&) { return fill; });
    } else if (row_y.count <= 2 && row_x.count <= 2) {
      const Corners<Number> corners(level, tables.two_taps(row_y), x);
      const auto* plane = reinterpret_cast<const char*>(image);
      auto* result = reinterpret_cast<char*>(pooled);
      GLIMPSE_NO_UNROLL
      for (int32_t c = channels; c > 0; --c, plane += plane_bytes, result += result_bytes) {
        const Number value = corners.template value<T>(plane, plan.element_bytes);
        *reinterpret_cast<pooled_t<T>*>(result) = Store<pooled_t<T>>::from(value);
      }
    } else {
      each_channel([&](const auto& load) { return tables.cell_value(row_y, row_x, load); });
    }
  }
}

// -------------------------------------------------------------------------------------------- NHWC

// Seven warps share 7 or 14 rows of cells evenly, and four such blocks leave 72 registers a thread.
constexpr int32_t kNhwcThreads = 224;

/// How sample_nhwc_kernel divides a box: grid (box, slice of channels, group of workers).
struct NhwcPlan {
  TableShape tables;
  int32_t lanes_log2;        // lanes of a worker; a power of two up to 32
  int32_t cells_per_worker;  // in row-major order
  float fill;                // as in Problem: no conversion from double for each cell
};

/// The numbers of a pack as float. bfloat16 goes by pairs: one operation for each number.
template <class T, int kCount>
__device__ __forceinline__ void unpack(const Pack<T, kCount>& pack, float* values) {
  if constexpr (std::is_same_v<T, bfloat16> && kCount % 2 == 0) {
    uint32_t pairs[kCount / 2];
    memcpy(pairs, &pack.word, sizeof(pairs));
    GLIMPSE_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const uint32_t low = pairs[i] << 16, high = pairs[i] & 0xffff0000u;
      memcpy(values + 2 * i, &low, sizeof(low));
      memcpy(values + 2 * i + 1, &high, sizeof(high));
    }
  } else {
    pack.unpack(values);
  }
}

/// sum += the part of a cell that reads kTaps neighbouring taps of its x row: they stay in
/// registers while all rows of pixels pass. Pitches count packs. `image` points at the first
/// channel of this lane.
template <class T, int kChannels, int kTaps>
__device__ __forceinline__ void add_columns(const typename Pack<T, kChannels>::Word* image,
                                            uint32_t pitch_y, uint32_t pitch_x,
                                            const Tap<float>* tap_y, const Tap<float>* end_y,
                                            const Tap<float>* tap_x, float* sum) {
  uint32_t offset[kTaps];
  float weight[kTaps];
  GLIMPSE_UNROLL
  for (int j = 0; j < kTaps; ++j) {
    const Tap<float> tap = tap_x[j];
    offset[j] = static_cast<uint32_t>(tap.pixel) * pitch_x;
    weight[j] = tap.weight;
  }
  GLIMPSE_NO_UNROLL
  for (; tap_y != end_y; ++tap_y) {
    const Tap<float> tap = *tap_y;
    Pack<T, kChannels> pixel[kTaps];
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      const uint32_t packs = static_cast<uint32_t>(tap.pixel) * pitch_y + offset[j];
      pixel[j] = {load_readonly(image + packs)};
    }
    float row_sum[kChannels] = {};
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      float value[kChannels];
      unpack(pixel[j], value);
      GLIMPSE_UNROLL
      for (int c = 0; c < kChannels; ++c) row_sum[c] += weight[j] * value[c];
    }
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) sum[c] += tap.weight * row_sum[c];
  }
}

/// Block: a box and a slice of its channels. A worker is a group of lanes, a whole warp unless
/// channels are few: it owns a run of cells, a row of them where that divides the work well, so
/// that its next cell finds the pixels it shares with this one in L1. A lane owns kChannels
/// channels, and weights are the same in all lanes of a worker.
template <class T, int kChannels>
__global__ void __launch_bounds__(kNhwcThreads, 4)
    sample_nhwc_kernel(GLIMPSE_GRID_CONSTANT Problem problem, GLIMPSE_GRID_CONSTANT NhwcPlan plan) {
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const Tables<float> tables = build_tables<float, false>(problem, k, plan.tables, shared);

  const int32_t lanes = 1 << plan.lanes_log2;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) & (lanes - 1);
  const int64_t worker =
      (static_cast<int64_t>(blockIdx.z) * blockDim.x + threadIdx.x) >> plan.lanes_log2;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * kChannels;
  const int32_t cells_x = plan.tables.cells_x;
  const int32_t cells = plan.tables.cells_y * cells_x;
  if (channel >= problem.channels || worker * plan.cells_per_worker >= cells) return;
  int32_t cell = static_cast<int32_t>(worker) * plan.cells_per_worker;
  const int32_t end = cell + plan.cells_per_worker < cells ? cell + plan.cells_per_worker : cells;

  const Level& level = problem.level[tables.level < 0 ? 0 : tables.level];
  const auto pitch_y = static_cast<uint32_t>(level.stride_h / kChannels);
  const auto pitch_x = static_cast<uint32_t>(level.stride_w / kChannels);
  const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n + channel;
  T* pooled = static_cast<T*>(problem.pooled) + (k * cells + cell) * problem.channels + channel;

  if (!tables.fit) {
    for (; cell < end; ++cell, pooled += problem.channels) {
      GLIMPSE_NO_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        pooled[c] = Store<T>::from(
            cell_value(problem.op, plan.fill, tables.axis[kY], tables.axis[kX], cell / cells_x,
                       cell % cells_x, [&](int32_t y, int32_t x) {
                         return load_value(image[y * level.stride_h + x * level.stride_w + c]);
                       }));
      }
    }
    return;
  }

  const auto* packs = reinterpret_cast<const typename Pack<T, kChannels>::Word*>(image);
  const Row* row_y = tables.row_y + cell / cells_x;
  const Row* row_x = tables.row_x + cell % cells_x;
  for (; cell < end; ++cell) {
    float sum[kChannels] = {};
    if (row_y->count == 0 || row_x->count == 0) {
      GLIMPSE_UNROLL
      for (int c = 0; c < kChannels; ++c) sum[c] = plan.fill;
    }
    const Tap<float>* tap_y = tables.tap + row_y->first;
    const Tap<float>* end_y = tap_y + row_y->count;
    const Tap<float>* tap_x = tables.tap + row_x->first;
    GLIMPSE_NO_UNROLL
    for (int32_t left = row_x->count; left > 0; left -= 4, tap_x += 4) {
      switch (left) {
        case 1:
          add_columns<T, kChannels, 1>(packs, pitch_y, pitch_x, tap_y, end_y, tap_x, sum);
          break;
        case 2:
          add_columns<T, kChannels, 2>(packs, pitch_y, pitch_x, tap_y, end_y, tap_x, sum);
          break;
        case 3:
          add_columns<T, kChannels, 3>(packs, pitch_y, pitch_x, tap_y, end_y, tap_x, sum);
          break;
        default:
          add_columns<T, kChannels, 4>(packs, pitch_y, pitch_x, tap_y, end_y, tap_x, sum);
      }
    }
    if constexpr (kChannels == 1) {
      *pooled = Store<T>::from(sum[0]);
    } else {
      Pack<T, kChannels>::from(sum).store(pooled);
    }
    pooled += problem.channels;
    if (++row_x == tables.row_x + cells_x) {
      row_x = tables.row_x;
      ++row_y;
    }
  }
}

// -------------------------------------------------------------------------------------------- NCHW

// Note [Rows, then columns]
// In NCHW a lane that owns a channel would read one element of each sector it touches. So lanes are
// neighbouring columns of pixels. A warp first sums rows of pixels: a lane goes down its column and
// holds the last two pixels it has read, so that neighbouring cells read each row once. These sums
// go to a tile of shared memory that belongs to the warp:
//
//   tile     [channel][row of cells][column, padded]
//
// Then lanes are cells, and each sums up the columns that it has taps on. Several rows of cells are
// one access to the tile, and results are stored in the order of memory. No warp waits for another.
//
// The columns are all those from the first to the last one with a tap, or one for each tap where
// that is fewer: few samples in a large cell touch few columns. A lane holds kNchwSlots columns, of
// as many channels, so that these share what it takes to find the rows. A narrow box takes several
// channels in one slot, a wide one several slots for each channel.

constexpr int32_t kNchwThreads = 128;
constexpr int32_t kNchwWarps = kNchwThreads / 32;
constexpr int kNchwSlots = 8;
constexpr int32_t kNchwMostTaps = 1024;
constexpr int32_t kNchwTileWords = 2560;  // of each warp
// Channels that a slot of narrow columns has side by side.
constexpr int32_t kNchwMostSide = 4;

/// Neighbouring cells of a row and the columns of pixels that they read. In shared memory.
struct alignas(16) Columns {
  int32_t first_cell, cells;
  int32_t most_taps;    // of a cell; 0: no column is read
  int32_t first_pixel;  // of columns that are neighbours
  int32_t count;
  bool listed;       // columns are taps, most_taps for each cell
  int32_t parts;     // slots for each channel,
  int32_t side;      // or channels in each slot
  int32_t channels;  // in all slots
  int32_t pitch;     // words of a row in the tile; behind its columns there is one of zeros
  int32_t rows;      // of cells that the tile holds
  int32_t words;     // of these rows, for one channel and one part
  // Lane / cells and lane / count are lane * factor / 1024.
  int32_t cells_factor, count_factor;
};

/// How sample_nchw_kernel divides a box: grid (box, slice of channels).
struct NchwPlan {
  TableShape tables;
  int32_t channels_per_block;
  uint32_t element_bytes;
  float fill;  // as in Problem
  // Bytes from the start of the shared memory; the tables come first.
  int32_t columns, tiles;

  size_t bytes() const { return tiles + size_t{kNchwWarps} * kNchwTileWords * sizeof(float); }
};

/// The plan for any problem that satisfies tables_apply.
inline NchwPlan nchw_plan(const Problem& problem, uint32_t element_bytes) {
  NchwPlan plan;
  plan.tables = table_shape(problem, kNchwMostTaps);
  // As many channels for the price of one set of tables as leave enough blocks for a large GPU.
  constexpr int64_t kEnoughBlocks = 4096;
  plan.channels_per_block = 128;
  while (plan.channels_per_block > kNchwWarps * kNchwSlots &&
         problem.boxes * ((problem.channels - 1) / plan.channels_per_block + 1) < kEnoughBlocks) {
    plan.channels_per_block /= 2;
  }
  plan.element_bytes = element_bytes;
  plan.fill = static_cast<float>(problem.fill);
  plan.columns = static_cast<int32_t>(plan.tables.bytes<float, false>());
  plan.tiles = plan.columns + static_cast<int32_t>(sizeof(Columns));
  return plan;
}

namespace detail {

__device__ __forceinline__ int32_t least_of_warp(int32_t value) {
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(kFullWarp, value, distance);
    if (other < value) value = other;
  }
  return value;
}

/// By warp 0: the columns of as many cells from `first_cell` on as a warp can take, 32 at most.
/// Not even one cell fits where `channels` of the result is 0.
__device__ __forceinline__ void find_columns(const Tables<float>& tables, int32_t first_cell,
                                             int32_t cells_y, int32_t cells_x, Columns* found) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x);
  Columns columns = {};
  columns.first_cell = first_cell;
  columns.cells = cells_x - first_cell < 32 ? cells_x - first_cell : 32;
  GLIMPSE_NO_UNROLL
  for (;; columns.cells = (columns.cells + 1) / 2) {
    int32_t least = 0x7fffffff, minus_greatest = 0, minus_taps = 0;
    if (lane < columns.cells) {
      const Row row = tables.row_x[first_cell + lane];
      minus_taps = -row.count;
      GLIMPSE_NO_UNROLL
      for (int32_t i = row.first; i < row.first + row.count; ++i) {
        const int32_t pixel = tables.tap[i].pixel;
        if (pixel < least) least = pixel;
        if (-pixel < minus_greatest) minus_greatest = -pixel;
      }
    }
    columns.most_taps = -least_of_warp(minus_taps);
    columns.first_pixel = least_of_warp(least);
    columns.count = -least_of_warp(minus_greatest) - columns.first_pixel + 1;
    columns.listed = columns.cells * columns.most_taps < columns.count;
    if (columns.listed) columns.count = columns.cells * columns.most_taps;
    if (columns.most_taps == 0) {
      columns.first_pixel = 0;  // never read
      columns.count = 1;
    }
    if (columns.count <= 32 * kNchwSlots || columns.cells == 1) break;
  }
  columns.parts = (columns.count + 31) / 32;
  columns.count_factor = 1024 / columns.count + 1;
  columns.cells_factor = 1024 / columns.cells + 1;
  const int32_t fit = 32 * columns.count_factor / 1024;
  columns.side = columns.parts > 1 ? 1 : fit < kNchwMostSide ? fit : kNchwMostSide;
  columns.channels = kNchwSlots / columns.parts * columns.side;
  columns.pitch = ((columns.count < 32 ? columns.count : 32) + 1) | 1;
  // What the channels of a slot write at a time goes to different banks.
  const int32_t padding = columns.side > 1 ? 31 : 0;
  const int32_t most = (kNchwTileWords / (kNchwSlots * columns.side) - padding) / columns.pitch;
  const int32_t batches = (cells_y + most - 1) / most;
  columns.rows = (cells_y + batches - 1) / batches;
  columns.words = columns.rows * columns.pitch;
  columns.words += (columns.count - columns.words) & padding;
  if (lane == 0) *found = columns;
}

/// The pixel of a column, or of another one where there is none.
__device__ __forceinline__ int32_t column_pixel(const Columns& columns, const Tables<float>& tables,
                                                int32_t column) {
  if (!columns.listed) {
    return columns.first_pixel + (column < columns.count ? column : columns.count - 1);
  }
  const int32_t cell = column / columns.most_taps;
  if (cell >= columns.cells) return columns.first_pixel;
  const Row row = tables.row_x[columns.first_cell + cell];
  const int32_t i = column - cell * columns.most_taps;
  return i < row.count ? tables.tap[row.first + i].pixel : columns.first_pixel;
}

/// The pixels of a column that a lane has read last, in every slot.
struct Held {
  int32_t last_pixel, previous_pixel;
  float last[kNchwSlots], previous[kNchwSlots];
};

/// Reads the next kRows rows of pixels that a cell has taps on.
template <int kRows, class T>
__device__ __forceinline__ void add_rows(const T* source, const uint32_t* offset,
                                         const Tap<float>* tap, int32_t stride_y,
                                         uint32_t element_bytes, Held* held, float* sum) {
  Pack<T, 1> read[kRows][kNchwSlots];
  float weight[kRows];
  GLIMPSE_UNROLL
  for (int j = 0; j < kRows; ++j) {
    const Tap<float> at = tap[j];
    weight[j] = at.weight;
    held->previous_pixel = held->last_pixel;
    held->last_pixel = at.pixel;
    const char* row = reinterpret_cast<const char*>(source + at.pixel * stride_y);
    GLIMPSE_UNROLL
    for (int i = 0; i < kNchwSlots; ++i) {
      // A multiply-add, which a constant size would turn into two additions.
      const char* pixel = row + static_cast<uint64_t>(offset[i]) * element_bytes;
      read[j][i] = Pack<T, 1>::load(reinterpret_cast<const T*>(pixel));
    }
  }
  GLIMPSE_UNROLL
  for (int j = 0; j < kRows; ++j) {
    GLIMPSE_UNROLL
    for (int i = 0; i < kNchwSlots; ++i) {
      held->previous[i] = held->last[i];
      read[j][i].unpack(&held->last[i]);
      sum[i] += weight[j] * held->last[i];
    }
  }
}

/// The sums of the rows of pixels of one row of cells, in every slot.
template <class T>
__device__ __forceinline__ void sum_rows(const T* source, const uint32_t* offset,
                                         const Tap<float>* tap, int32_t left, int32_t stride_y,
                                         uint32_t element_bytes, Held* held, float* sum) {
  if (left == 0) return;
  const Tap<float> first = tap[0];
  if (first.pixel == held->last_pixel) {
    GLIMPSE_UNROLL
    for (int i = 0; i < kNchwSlots; ++i) sum[i] += first.weight * held->last[i];
    ++tap;
    --left;
  } else if (left > 1 && first.pixel == held->previous_pixel && tap[1].pixel == held->last_pixel) {
    const float second = tap[1].weight;
    GLIMPSE_UNROLL
    for (int i = 0; i < kNchwSlots; ++i) {
      sum[i] += first.weight * held->previous[i];
      sum[i] += second * held->last[i];
    }
    tap += 2;
    left -= 2;
  }
  GLIMPSE_NO_UNROLL
  for (; left > 1; left -= 2, tap += 2)
    add_rows<2>(source, offset, tap, stride_y, element_bytes, held, sum);
  if (left == 1) add_rows<1>(source, offset, tap, stride_y, element_bytes, held, sum);
}

/// A lane's walk over the results of a batch: one cell of every `step` rows of cells.
struct CellWalk {
  const float* row;  // in the tile
  char* results;     // of the batch
  uint32_t element_bytes;
  uint32_t target;      // from the first result of the batch on
  int32_t y, left;      // row of cells in its channel; rows that are left, of all channels
  int32_t step, rows;   // rows from one result to the next, at most those of a channel
  int32_t row_step;     // words
  int32_t target_step;  // results
  int32_t next_row, next_target;  // more of both to the next channel

  template <class T>
  __device__ __forceinline__ void store(float value) const {
    char* result = results + static_cast<uint64_t>(target) * element_bytes;
    *reinterpret_cast<T*>(result) = Store<T>::from(value);
  }
  __device__ __forceinline__ void next() {
    row += row_step;
    target += target_step;
    y += step;
    left -= step;
    if (y >= rows) {
      y -= rows;
      row += next_row;
      target += next_target;
    }
  }
};

/// Words from the start of a row of the tile to the column of a tap.
__device__ __forceinline__ int32_t column_offset(const Columns& columns, int32_t cell, int32_t j,
                                                 int32_t pixel) {
  const int32_t column =
      columns.listed ? cell * columns.most_taps + j : pixel - columns.first_pixel;
  return column / 32 * columns.words + column % 32;
}

/// The results of a batch where empty cells are zeros. Taps that a cell does not have are at the
/// column of zeros.
template <int kTaps, class T>
__device__ __forceinline__ void sum_columns(const Columns& columns, const Tables<float>& tables,
                                            int32_t cell, CellWalk walk) {
  const Row own = tables.row_x[columns.first_cell + cell];
  int32_t offset[kTaps];
  float weight[kTaps];
  GLIMPSE_UNROLL
  for (int j = 0; j < kTaps; ++j) {
    offset[j] = columns.pitch - 1;
    weight[j] = 0.0f;
    if (j < own.count) {
      const Tap<float> tap = tables.tap[own.first + j];
      offset[j] = column_offset(columns, cell, j, tap.pixel);
      weight[j] = tap.weight;
    }
  }
  GLIMPSE_NO_UNROLL
  for (; walk.left > 0; walk.next()) {
    float sum = 0.0f;
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) sum += weight[j] * walk.row[offset[j]];
    walk.store<T>(sum);
  }
}

/// The same for any number of taps and any fill.
template <class T>
__device__ __forceinline__ void sum_many_columns(const Columns& columns,
                                                 const Tables<float>& tables, const Row* row_y,
                                                 int32_t cell, CellWalk walk, float fill) {
  const Row own = tables.row_x[columns.first_cell + cell];
  GLIMPSE_NO_UNROLL
  for (; walk.left > 0; walk.next()) {
    float sum = row_y[walk.y].count == 0 || own.count == 0 ? fill : 0.0f;
    GLIMPSE_NO_UNROLL
    for (int32_t j = 0; j < own.count; ++j) {
      const Tap<float> tap = tables.tap[own.first + j];
      sum += tap.weight * walk.row[column_offset(columns, cell, j, tap.pixel)];
    }
    walk.store<T>(sum);
  }
}

}  // namespace detail

/// Block: a box and a slice of its channels, which its warps take in turns.
template <class T>
__global__ void __launch_bounds__(kNchwThreads, 5)
    sample_nchw_kernel(GLIMPSE_GRID_CONSTANT Problem problem, GLIMPSE_GRID_CONSTANT NchwPlan plan) {
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread / 32, lane = thread % 32;

  const Tables<float> tables = build_tables<float, false>(problem, k, plan.tables, shared);
  const int32_t cells_y = plan.tables.cells_y, cells_x = plan.tables.cells_x;
  const int32_t cells = cells_y * cells_x;
  const Level& level = problem.level[tables.level < 0 ? 0 : tables.level];
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * plan.channels_per_block;
  const int64_t channels_left = problem.channels - first_channel;
  const int32_t channels = channels_left < plan.channels_per_block
                               ? static_cast<int32_t>(channels_left)
                               : plan.channels_per_block;
  const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n +
                   first_channel * level.stride_c;
  T* pooled = static_cast<T*>(problem.pooled) + (k * problem.channels + first_channel) * cells;
  const auto stride_y = static_cast<int32_t>(level.stride_h);
  const auto stride_x = static_cast<int32_t>(level.stride_w);
  const auto stride_c = static_cast<int32_t>(level.stride_c);
  auto* found = reinterpret_cast<Columns*>(shared + plan.columns);
  auto* tile = reinterpret_cast<float*>(shared + plan.tiles) + warp * kNchwTileWords;

  int32_t first_cell = 0;
  GLIMPSE_NO_UNROLL
  while (tables.fit && first_cell < cells_x) {
    if (first_cell > 0) __syncthreads();
    if (warp == 0) detail::find_columns(tables, first_cell, cells_y, cells_x, found);
    __syncthreads();
    const Columns& columns = *found;
    if (columns.channels == 0) break;
    const int32_t side = columns.parts > 1 ? 0 : lane * columns.count_factor / 1024;
    const bool writes = side < columns.side;
    const int32_t own_column = writes ? lane - side * columns.count : 0;
    float* own_tile = tile + side * columns.words + own_column;
    const int32_t own_pixel = detail::column_pixel(columns, tables, own_column);
    const int32_t slot_words = columns.side * columns.words;
    // Cells that have fewer taps than others read zeros.
    GLIMPSE_NO_UNROLL
    for (int32_t i = lane; i < kNchwSlots * columns.side; i += 32) {
      GLIMPSE_NO_UNROLL
      for (int32_t y = 1; y <= columns.rows; ++y) {
        tile[i * columns.words + y * columns.pitch - 1] = 0.0f;
      }
    }
    const int32_t row_of_lane = lane * columns.cells_factor / 1024;
    const int32_t cell = lane - row_of_lane * columns.cells;

    GLIMPSE_NO_UNROLL
    for (int32_t channel = warp * columns.channels; channel < channels;
         channel += kNchwWarps * columns.channels) {
      const int32_t live =
          channels - channel < columns.channels ? channels - channel : columns.channels;
      const T* source = image + channel * level.stride_c;
      // Lanes without a column of their own, and those of channels behind the last one, read what
      // others read.
      uint32_t offset[kNchwSlots];
      int32_t slot_channel = writes ? side : 0, part = 0;
      GLIMPSE_UNROLL
      for (int i = 0; i < kNchwSlots; ++i) {
        const int32_t of = slot_channel < live ? slot_channel : live - 1;
        int32_t pixel = own_pixel;
        if (part > 0) pixel = detail::column_pixel(columns, tables, part * 32 + lane);
        offset[i] = static_cast<uint32_t>(of * stride_c + pixel * stride_x);
        if (++part == columns.parts) {
          part = 0;
          slot_channel += columns.side;
        }
      }
      detail::Held held;
      held.last_pixel = held.previous_pixel = -1;
      GLIMPSE_UNROLL
      for (int i = 0; i < kNchwSlots; ++i) held.last[i] = held.previous[i] = 0.0f;

      GLIMPSE_NO_UNROLL
      for (int32_t first_row = 0; first_row < cells_y; first_row += columns.rows) {
        const int32_t rows =
            columns.rows < cells_y - first_row ? columns.rows : cells_y - first_row;
        const int32_t pitch = columns.pitch;
        const bool reads = columns.most_taps > 0;
        float* target = own_tile;
        GLIMPSE_NO_UNROLL
        for (int32_t y = first_row; y < first_row + rows; ++y, target += pitch) {
          const Row row = tables.row_y[y];
          float sum[kNchwSlots] = {};
          detail::sum_rows(source, offset, tables.tap + row.first, reads ? row.count : 0, stride_y,
                           plan.element_bytes, &held, sum);
          if (writes) {
            GLIMPSE_UNROLL
            for (int i = 0; i < kNchwSlots; ++i) target[i * slot_words] = sum[i];
          }
        }
        __syncwarp();
        detail::CellWalk walk;
        walk.step = 32 * columns.cells_factor / 1024;
        if (walk.step > rows) walk.step = rows;
        if (row_of_lane < walk.step) {
          walk.row = tile + row_of_lane * pitch;
          walk.target = (first_row + row_of_lane) * cells_x + columns.first_cell + cell;
          walk.y = row_of_lane;
          walk.rows = rows;
          walk.left = live * rows - row_of_lane;
          walk.row_step = walk.step * pitch;
          walk.target_step = walk.step * cells_x;
          walk.next_row = columns.parts * columns.words - rows * pitch;
          walk.next_target = cells - rows * cells_x;
          walk.results = reinterpret_cast<char*>(pooled + static_cast<int64_t>(channel) * cells);
          walk.element_bytes = plan.element_bytes;
          // No switch: a jump table would be read from memory.
          const int32_t taps = plan.fill == 0.0f ? columns.most_taps : kNchwMostTaps;
          if (taps <= 2) {
            detail::sum_columns<2, T>(columns, tables, cell, walk);
          } else if (taps == 3) {
            detail::sum_columns<3, T>(columns, tables, cell, walk);
          } else if (taps == 4) {
            detail::sum_columns<4, T>(columns, tables, cell, walk);
          } else if (taps <= 6) {
            detail::sum_columns<6, T>(columns, tables, cell, walk);
          } else {
            detail::sum_many_columns<T>(columns, tables, tables.row_y + first_row, cell, walk,
                                        plan.fill);
          }
        }
        __syncwarp();
      }
    }
    first_cell += columns.cells;
  }
  if (!tables.fit || first_cell < cells_x) {
    const int32_t columns_left = cells_x - first_cell;
    for (int32_t i = thread; i < channels * cells_y * columns_left; i += kNchwThreads) {
      const int32_t row = i / columns_left, channel = row / cells_y;
      const int32_t cell_y = row - channel * cells_y;
      const int32_t cell_x = first_cell + i - row * columns_left;
      const T* plane = image + channel * level.stride_c;
      const auto load = [&](int32_t y, int32_t x) {
        return load_value(plane[y * stride_y + x * stride_x]);
      };
      float sum;
      if (tables.fit) {
        const Row row_y = tables.row_y[cell_y], row_x = tables.row_x[cell_x];
        sum = row_y.count == 0 || row_x.count == 0 ? plan.fill
                                                   : tables.cell_value(row_y, row_x, load);
      } else {
        sum = cell_value(problem.op, plan.fill, tables.axis[kY], tables.axis[kX], cell_y, cell_x,
                         load);
      }
      pooled[row * cells_x + cell_x] = Store<T>::from(sum);
    }
  }
}

}  // namespace glimpse::cuda
