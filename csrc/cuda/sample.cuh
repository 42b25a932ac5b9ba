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

/// pooled = Ay * features * Ax^T. Three kernels compute it:
///
///   sample_simple_kernel  any type, any strides; one thread per output, no tables
///   sample_nhwc_kernel    lanes are neighbouring channels and read them with wide loads
///   sample_nchw_kernel    the window of a box is staged in shared memory, lanes are channels
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

/// A block: 256 >> lanes_log2 points, one cell of one sample each. A worker of 1 << lanes_log2
/// lanes owns a point, a lane kChannels neighbouring channels of it at a time: finding the taps is
/// shared by a pack, and tables would be mostly overhead.
template <class T, int kChannels>
__global__ void __launch_bounds__(256)
    sample_points_kernel(GLIMPSE_GRID_CONSTANT Problem problem, int32_t lanes_log2) {
  const int32_t lanes = 1 << lanes_log2;
  const int64_t worker =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> lanes_log2;
  const int64_t workers = (static_cast<int64_t>(gridDim.x) * blockDim.x) >> lanes_log2;
  const int64_t first = static_cast<int64_t>(threadIdx.x & (lanes - 1)) * kChannels;
  const auto fill = static_cast<float>(problem.fill);
  for (int64_t k = worker; k < problem.boxes; k += workers) {
    Taps<float> y, x;
    y.count = x.count = 0;
    const Box<float> box = read_box<float>(problem, k);
    if (box.level >= 0) {
      y = sample_taps(problem.op, box_axis(problem, box, kY), 0, 0);
      x = sample_taps(problem.op, box_axis(problem, box, kX), 0, 0);
    }
    const Level& level = problem.level[box.level < 0 ? 0 : box.level];
    auto* pooled = static_cast<T*>(problem.pooled) + k * problem.channels;
    for (int64_t channel = first; channel < problem.channels; channel += lanes * kChannels) {
      float sum[kChannels];
      GLIMPSE_UNROLL
      for (int c = 0; c < kChannels; ++c) sum[c] = y.count == 0 || x.count == 0 ? fill : 0.0f;
      const auto add_row = [&](int32_t pixel, float weight) {
        const T* row = static_cast<const T*>(level.data) + box.image * level.stride_n +
                       pixel * level.stride_h + channel;
        float low[kChannels], high[kChannels] = {};
        Pack<T, kChannels>::load(row + x.pixel[0] * level.stride_w).unpack(low);
        if (x.count == 2) Pack<T, kChannels>::load(row + x.pixel[1] * level.stride_w).unpack(high);
        GLIMPSE_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          float value = x.weight[0] * low[c];
          if (x.count == 2) value += x.weight[1] * high[c];
          sum[c] += weight * value;
        }
      };
      if (y.count > 0 && x.count > 0) {
        add_row(y.pixel[0], y.weight[0]);
        if (y.count == 2) add_row(y.pixel[1], y.weight[1]);
      }
      Pack<T, kChannels>::from(sum).store(pooled + channel);
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

// Note [Staging a window]
// In NCHW, a lane that owns a channel would read one element of each sector it touches. So the
// block first copies the pixels that carry a tap to shared memory, with lanes along x, and then
// computes with lanes along channels, two in each: weights are the same for all channels of a cell,
// so what a lane spends on finding them serves both.
//
//   window   [line y][line x][channel, padded]   lines: the rows and columns that carry a tap
//   tile     [channel][cell, padded]             results, turned so that stores run along cells
//
// The pitch of a pixel is twice an odd number of words. So 16 lanes that write one channel of 16
// pixels and 16 that write the next one use all banks, and pairs of channels are read as 8 bytes.
//
// Few samples in a large cell touch few pixels, so lines are compact: a box of 7x7 cells with 2x2
// samples stages 28x28 pixels at most, whatever its size. Boxes whose pixels do not fit even for
// one channel, and boxes without tables, are evaluated from global memory.

constexpr int32_t kNchwThreads = 256;
constexpr int32_t kNchwMostTaps = 1024;
constexpr int32_t kNchwTileCells = 64;  // of each channel
// What a block may have without asking. Three blocks share 164 KB or more, and two share 100 KB.
constexpr int32_t kNchwSharedBytes = 48 * 1024;

/// How sample_nchw_kernel divides a box: grid (box, slice of channels).
struct NchwPlan {
  TableShape tables;
  int32_t channels_per_block;
  int32_t most_chunk_log2;  // channels staged at a time; a power of two from 2 to 64
  // Bytes from the start of the shared memory; the tables come first.
  int32_t opened;        // Row per row: the lines that it opens
  int32_t shared_until;  // int32_t per row, see open_lines
  int32_t line;          // int32_t per line: its offset in a plane; those of y, then those of x
  int32_t lines;         // int32_t: their number
  int32_t window;        // and the tile behind it
  int32_t words;         // of both
  float fill;            // as in Problem
};

/// The plan for any problem that satisfies tables_apply.
inline NchwPlan nchw_plan(const Problem& problem) {
  constexpr auto kWord = static_cast<int32_t>(sizeof(int32_t));
  NchwPlan plan;
  plan.tables = table_shape(problem, kNchwMostTaps);
  const int32_t rows = plan.tables.rows();
  plan.most_chunk_log2 = 6;
  while (plan.most_chunk_log2 > 1 && 1 << (plan.most_chunk_log2 - 1) >= problem.channels) {
    --plan.most_chunk_log2;
  }
  // As many channels for the price of one set of tables as leave enough blocks for a large GPU.
  constexpr int64_t kEnoughBlocks = 1536;
  plan.channels_per_block = 256;
  while (plan.channels_per_block > 32 &&
         problem.boxes * ((problem.channels - 1) / plan.channels_per_block + 1) < kEnoughBlocks) {
    plan.channels_per_block /= 2;
  }
  plan.opened = static_cast<int32_t>(plan.tables.bytes<float, false>());
  plan.shared_until = plan.opened + rows * static_cast<int32_t>(sizeof(Row));
  plan.line = plan.shared_until + rows * kWord;
  plan.lines = plan.line + plan.tables.room * kWord;
  plan.window = (plan.lines + kWord + 15) / 16 * 16;
  plan.words = (kNchwSharedBytes - plan.window) / kWord;
  plan.fill = static_cast<float>(problem.fill);
  return plan;
}

namespace detail {

__device__ __forceinline__ bool ascends(const Tap<float>* tap, Row row) {
  GLIMPSE_NO_UNROLL
  for (int32_t i = 1; i < row.count; ++i) {
    if (tap[row.first + i - 1].pixel >= tap[row.first + i].pixel) return false;
  }
  return true;
}

/// Decides which taps of `row` find their line among those of `before`, the row of the cell before
/// it: the ones at pixels up to the result. All others open a line of their own, in the order of
/// the taps; their number goes to `opened`. The result is -1 or the last pixel of `before`.
///
/// Rows share only where both ascend, neither end moves back, and the shared pixels are the last
/// two of `before`. Then the last tap of every row is in the newest line so far and the shared
/// pixel next to it in the line before, which is all that place_taps needs to know.
__device__ __forceinline__ int32_t open_lines(const Tap<float>* tap, Row before, Row row,
                                              int32_t* opened) {
  *opened = row.count;
  if (before.count == 0 || row.count == 0) return -1;
  const int32_t last = tap[before.first + before.count - 1].pixel;
  const int32_t next_to_last = before.count > 1 ? tap[before.first + before.count - 2].pixel : -1;
  if (tap[row.first].pixel < tap[before.first].pixel ||
      tap[row.first + row.count - 1].pixel < last || !ascends(tap, before) || !ascends(tap, row)) {
    return -1;
  }
  int32_t shared = 0;
  GLIMPSE_NO_UNROLL
  for (; shared < row.count && tap[row.first + shared].pixel <= last; ++shared) {
    const int32_t pixel = tap[row.first + shared].pixel;
    if (pixel != last && (pixel != last - 1 || pixel != next_to_last)) return -1;
  }
  *opened = row.count - shared;
  return last;
}

/// Writes the lines that `row` opens, as offsets pixel * stride into a plane, and turns its taps
/// from pixels to offsets into the window, (line - origin) * pitch.
__device__ __forceinline__ void place_taps(Tap<float>* tap, Row row, int32_t shared_until,
                                           int32_t first_opened, int32_t origin, int32_t pitch,
                                           int32_t stride, int32_t* line_offset) {
  int32_t next = first_opened;
  GLIMPSE_NO_UNROLL
  for (int32_t i = row.first; i < row.first + row.count; ++i) {
    const int32_t pixel = tap[i].pixel;
    int32_t line = first_opened - 1 - (shared_until - pixel);
    if (pixel > shared_until) {
      line = next++;
      line_offset[line] = pixel * stride;
    }
    tap[i].pixel = (line - origin) * pitch;
  }
}

/// A position in a grid that is walked row by row.
struct GridStep {
  int32_t y, x;

  __device__ __forceinline__ GridStep(int32_t index, int32_t width)
      : y(index / width), x(index - y * width) {}

  /// index += step.
  __device__ __forceinline__ void add(const GridStep& step, int32_t width) {
    y += step.y;
    x += step.x;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
};

}  // namespace detail

/// Words from a pixel of a staged window to the next one: twice an odd number.
__device__ __forceinline__ int32_t window_pitch(int32_t chunk_log2) {
  return chunk_log2 == 1 ? 2 : (1 << chunk_log2) + 2;
}

/// As add_columns, for two channels of a staged window. Taps hold offsets in bytes.
template <int kTaps>
__device__ __forceinline__ void add_window_columns(const char* window, const Tap<float>* tap_y,
                                                   const Tap<float>* end_y, const Tap<float>* tap_x,
                                                   float2* sum) {
  int32_t offset[kTaps];
  float weight[kTaps];
  GLIMPSE_UNROLL
  for (int j = 0; j < kTaps; ++j) {
    const Tap<float> tap = tap_x[j];
    offset[j] = tap.pixel;
    weight[j] = tap.weight;
  }
  GLIMPSE_NO_UNROLL
  for (; tap_y != end_y; ++tap_y) {
    const Tap<float> tap = *tap_y;
    const char* row = window + tap.pixel;
    float2 row_sum = make_float2(0.0f, 0.0f);
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      const float2 value = *reinterpret_cast<const float2*>(row + offset[j]);
      row_sum.x += weight[j] * value.x;
      row_sum.y += weight[j] * value.y;
    }
    sum->x += tap.weight * row_sum.x;
    sum->y += tap.weight * row_sum.y;
  }
}

/// Copies kChannels channels of one pixel, `step` elements and kApart floats apart, to a window of
/// float. Float goes by asynchronous copies; other types are all loaded, then converted.
template <int kChannels, int kApart, class T>
__device__ __forceinline__ void stage_channels(float* target, const T* source, int64_t step) {
  if constexpr (std::is_same_v<T, float>) {
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) copy_async4(target + i * kApart, source + i * step);
  } else {
    Pack<T, 1> value[kChannels];
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) value[i] = Pack<T, 1>::load(source + i * step);
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) value[i].unpack(target + i * kApart);
  }
}

/// Block: a box and a slice of its channels, taken in chunks whose window fits in shared memory.
/// First one thread per row turns the tables into lines; then, chunk by chunk, warps stage channels
/// with lanes along pixels, compute cells with lanes along channels, and store with lanes along
/// cells.
template <class T>
__global__ void __launch_bounds__(kNchwThreads, 3)
    sample_nchw_kernel(GLIMPSE_GRID_CONSTANT Problem problem, GLIMPSE_GRID_CONSTANT NchwPlan plan) {
  GLIMPSE_DYNAMIC_SHARED(shared);
  const int64_t k = blockIdx.x;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread / 32, lane = thread % 32;
  constexpr int32_t kWarps = kNchwThreads / 32;

  const Tables<float> tables = build_tables<float, false>(problem, k, plan.tables, shared);
  auto* tap = reinterpret_cast<Tap<float>*>(shared + plan.tables.taps_offset<float>());
  const int32_t cells_y = plan.tables.cells_y, cells_x = plan.tables.cells_x;
  const int32_t rows = cells_y + cells_x, cells = cells_y * cells_x;
  const Level& level = problem.level[tables.level < 0 ? 0 : tables.level];
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * plan.channels_per_block;
  const int64_t channels_left = problem.channels - first_channel;
  const int32_t channels = channels_left < plan.channels_per_block
                               ? static_cast<int32_t>(channels_left)
                               : plan.channels_per_block;
  const T* image = static_cast<const T*>(level.data) + tables.image * level.stride_n +
                   first_channel * level.stride_c;
  T* pooled = static_cast<T*>(problem.pooled) + (k * problem.channels + first_channel) * cells;

  // Lines.
  auto* opened = reinterpret_cast<Row*>(shared + plan.opened);
  auto* shared_until = reinterpret_cast<int32_t*>(shared + plan.shared_until);
  auto* line = reinterpret_cast<int32_t*>(shared + plan.line);
  auto* lines = reinterpret_cast<int32_t*>(shared + plan.lines);
  for (int32_t i = thread; i < rows; i += kNchwThreads) {
    opened[i].count = 0;
    if (tables.fit) {
      const bool first = i == 0 || i == cells_y;
      shared_until[i] = detail::open_lines(tap, first ? Row{0, 0} : tables.row_y[i - 1],
                                           tables.row_y[i], &opened[i].count);
    }
  }
  __syncthreads();
  if (warp == 0) {
    const int32_t sum = detail::pack_rows(opened, rows, plan.tables.room);
    if (lane == 0) *lines = sum;
  }
  __syncthreads();
  const int32_t lines_y = opened[cells_y].first;
  const int32_t lines_x = *lines - lines_y;
  const int32_t pixels = lines_y * lines_x;
  // Rows of cells that the tile holds, or a part of one row: what is stored from it at a time.
  int32_t batch_rows = kNchwTileCells / cells_x;
  if (batch_rows > cells_y) batch_rows = cells_y;
  const int32_t batch_columns = batch_rows > 0 ? cells_x : kNchwTileCells;
  if (batch_rows == 0) batch_rows = 1;
  const int32_t tile_pitch = batch_rows * batch_columns | 1;
  int32_t chunk_log2 = plan.most_chunk_log2;  // 0 where not even two channels fit
  while (chunk_log2 > 0 &&
         pixels * window_pitch(chunk_log2) + (tile_pitch << chunk_log2) > plan.words) {
    --chunk_log2;
  }

  const auto stride_y = static_cast<int32_t>(level.stride_h);
  const auto stride_x = static_cast<int32_t>(level.stride_w);
  if (chunk_log2 == 0 || !tables.fit) {
    for (int32_t i = thread; i < channels * cells; i += kNchwThreads) {
      const int32_t channel = i / cells, cell = i - channel * cells;
      const int32_t cell_y = cell / cells_x, cell_x = cell - cell_y * cells_x;
      const T* plane = image + channel * level.stride_c;
      float sum = 0.0f;
      if (tables.fit) {
        const Row row_y = tables.row_y[cell_y], row_x = tables.row_x[cell_x];
        if (row_y.count == 0 || row_x.count == 0) sum = plan.fill;
        GLIMPSE_NO_UNROLL
        for (int32_t y = row_y.first; y < row_y.first + row_y.count; ++y) {
          const T* row = plane + tap[y].pixel * stride_y;
          float row_sum = 0.0f;
          GLIMPSE_NO_UNROLL
          for (int32_t x = row_x.first; x < row_x.first + row_x.count; ++x) {
            row_sum += tap[x].weight * load_value(row[tap[x].pixel * stride_x]);
          }
          sum += tap[y].weight * row_sum;
        }
      } else {
        sum = cell_value(
            problem.op, plan.fill, tables.axis[kY], tables.axis[kX], cell_y, cell_x,
            [&](int32_t y, int32_t x) { return load_value(plane[y * stride_y + x * stride_x]); });
      }
      pooled[i] = Store<T>::from(sum);
    }
    return;
  }

  const int32_t chunk = 1 << chunk_log2;
  const int32_t pitch = window_pitch(chunk_log2);
  const int32_t pitch_bytes = pitch * static_cast<int32_t>(sizeof(float));
  for (int32_t i = thread; i < rows; i += kNchwThreads) {
    const bool is_y = i < cells_y;
    detail::place_taps(tap, tables.row_y[i], shared_until[i], opened[i].first, is_y ? 0 : lines_y,
                       is_y ? lines_x * pitch_bytes : pitch_bytes, is_y ? stride_y : stride_x,
                       line);
  }
  __syncthreads();

  auto* window = reinterpret_cast<float*>(shared + plan.window);
  float* tile = window + pixels * pitch;
  // Half of a warp stages one channel of 16 pixels, the other half the next channel. A warp takes
  // every kPairs-th pair: more channels for the price of finding a pixel were it fewer, more even
  // work for all warps were it more.
  constexpr int32_t kPairs = 2, kChannelStep = 2 * kPairs;
  const int32_t staged_channel = warp % kPairs * 2 + lane / 16;
  const int32_t first_pixel = warp / kPairs * 16 + lane % 16;
  constexpr int32_t kPixelStep = kWarps / kPairs * 16;
  const detail::GridStep first_place(first_pixel, lines_x > 0 ? lines_x : 1);
  const detail::GridStep place_step(kPixelStep, lines_x > 0 ? lines_x : 1);
  // Lanes of a cell are pairs of channels. Cells are taken column by column: those of a warp share
  // their taps along x, so that they branch alike.
  const int32_t lanes_log2 = chunk_log2 - 1;
  const int32_t channel = (thread & (chunk / 2 - 1)) * 2;
  const char* own_window = shared + plan.window + channel * static_cast<int32_t>(sizeof(float));
  const int32_t first_cell = thread >> lanes_log2;
  const int32_t cell_step = kNchwThreads >> lanes_log2;

  for (int32_t chunk_first = 0; chunk_first < channels; chunk_first += chunk) {
    const int32_t left = channels - chunk_first;
    const int32_t live = left < chunk ? left : chunk;
    if (pixels > 0) {
      const T* first_source = image + (chunk_first + staged_channel) * level.stride_c;
      const int64_t step = kChannelStep * level.stride_c;
      detail::GridStep place = first_place;
      for (int32_t pixel = first_pixel; pixel < pixels; pixel += kPixelStep) {
        const T* source = first_source + (line[place.y] + line[lines_y + place.x]);
        float* target = window + pixel * pitch + staged_channel;
        int32_t c = staged_channel;
        GLIMPSE_NO_UNROLL
        for (; c + 3 * kChannelStep < live; c += 4 * kChannelStep) {
          stage_channels<4, kChannelStep>(target, source, step);
          target += 4 * kChannelStep;
          source += 4 * step;
        }
        GLIMPSE_NO_UNROLL
        for (; c < live; c += kChannelStep) {
          stage_channels<1, kChannelStep>(target, source, step);
          target += kChannelStep;
          source += step;
        }
        place.add(place_step, lines_x);
      }
    }
    copy_async_wait_all();
    __syncthreads();

    int32_t batch_y = 0, batch_x = 0;  // its first cell
    while (batch_y < cells_y) {
      const int32_t rows_left = cells_y - batch_y, columns_left = cells_x - batch_x;
      const int32_t own_rows = rows_left < batch_rows ? rows_left : batch_rows;
      const int32_t own_columns = columns_left < batch_columns ? columns_left : batch_columns;
      const int32_t batch_cells = own_rows * own_columns;
      if (channel < live) {
        const detail::GridStep place_step(cell_step, own_rows);  // y: columns, x: rows
        detail::GridStep place(first_cell, own_rows);
        for (int32_t i = first_cell; i < batch_cells; i += cell_step) {
          const Row row_y = tables.row_y[batch_y + place.x];
          const Row row_x = tables.row_x[batch_x + place.y];
          const Tap<float>* tap_y = tap + row_y.first;
          const Tap<float>* end_y = tap_y + row_y.count;
          const Tap<float>* tap_x = tap + row_x.first;
          float2 sum = make_float2(0.0f, 0.0f);
          if (row_y.count == 0 || row_x.count == 0) sum = make_float2(plan.fill, plan.fill);
          GLIMPSE_NO_UNROLL
          for (int32_t left = row_x.count; left > 0; left -= 4, tap_x += 4) {
            switch (left) {
              case 1:
                add_window_columns<1>(own_window, tap_y, end_y, tap_x, &sum);
                break;
              case 2:
                add_window_columns<2>(own_window, tap_y, end_y, tap_x, &sum);
                break;
              case 3:
                add_window_columns<3>(own_window, tap_y, end_y, tap_x, &sum);
                break;
              default:
                add_window_columns<4>(own_window, tap_y, end_y, tap_x, &sum);
            }
          }
          float* target = tile + channel * tile_pitch + place.x * own_columns + place.y;
          target[0] = sum.x;
          target[tile_pitch] = sum.y;
          place.add(place_step, own_rows);
        }
      }
      __syncthreads();
      if (tile_pitch == cells) {  // a tile without padding is what the results look like
        T* target = pooled + static_cast<int64_t>(chunk_first) * cells;
        GLIMPSE_NO_UNROLL
        for (int32_t i = thread; i < live * cells; i += kNchwThreads) {
          target[i] = Store<T>::from(tile[i]);
        }
      } else {
        const float* own_tile = tile + warp * tile_pitch + lane;
        T* target = pooled + static_cast<int64_t>(chunk_first + warp) * cells + batch_y * cells_x +
                    batch_x + lane;
        GLIMPSE_NO_UNROLL
        for (int32_t c = warp; c < live; c += kWarps) {
          GLIMPSE_NO_UNROLL
          for (int32_t i = 0; i < batch_cells - lane; i += 32) {
            target[i] = Store<T>::from(own_tile[i]);
          }
          own_tile += kWarps * tile_pitch;
          target += int64_t{kWarps} * cells;
        }
      }
      batch_x += own_columns;
      if (batch_x == cells_x) {
        batch_x = 0;
        batch_y += own_rows;
      }
      // The next batch overwrites the tile. The next chunk has a barrier of its own before that.
      if (batch_y < cells_y) __syncthreads();
    }
  }
}

}  // namespace glimpse::cuda
