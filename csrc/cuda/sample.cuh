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
__global__ void __launch_bounds__(256) sample_simple_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
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

// -------------------------------------------------------------------------------------------- NHWC

// Seven warps share 7 or 14 rows of cells evenly, and four such blocks leave 72 registers a thread.
constexpr int32_t kNhwcThreads = 224;

/// How sample_nhwc_kernel divides a box: grid (box, slice of channels, group of workers).
struct NhwcPlan {
  TableShape tables;
  int32_t lanes_log2;        // lanes of a worker; a power of two up to 32
  int32_t cells_per_worker;  // in row-major order
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
            cell_value(problem.op, static_cast<float>(problem.fill), tables.axis[kY],
                       tables.axis[kX], cell / cells_x, cell % cells_x, [&](int32_t y, int32_t x) {
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
      for (int c = 0; c < kChannels; ++c) sum[c] = static_cast<float>(problem.fill);
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
// computes with lanes along channels: weights are the same in all lanes, and neighbouring channels
// lie in different banks because the pitch of a pixel is odd.
//
//   window   [line y][line x][channel, padded]   lines: the rows and columns that carry a tap
//   tile     [channel][cell, padded]             results, turned so that stores run along cells
//
// Few samples in a large cell touch few pixels, so lines are compact: a box of 7x7 cells with 2x2
// samples stages 28x28 pixels at most, whatever its size. Boxes whose pixels do not fit even for
// one channel, and boxes without tables, are evaluated from global memory.

constexpr int32_t kNchwThreads = 256;
constexpr int32_t kNchwMostTaps = 1024;
constexpr int32_t kNchwTileWords = 32 * 65;      // 64 cells of 32 channels, padded
constexpr int32_t kNchwSharedBytes = 48 * 1024;  // four blocks where there are 228 KB, two in 100

/// How sample_nchw_kernel divides a box: grid (box, slice of channels).
struct NchwPlan {
  TableShape tables;
  int32_t channels_per_block;
  int32_t most_lanes_log2;  // channels staged at a time; a power of two up to 32
  // Bytes from the start of the shared memory; the tables come first.
  int32_t opened;        // Row per row: the lines that it opens
  int32_t shared_until;  // int32_t per row, see open_lines
  int32_t line;          // int32_t per line: its offset in a plane; those of y, then those of x
  int32_t lines;         // int32_t: their number
  int32_t tile;
  int32_t window;
  int32_t window_words;
};

/// The plan for any problem that satisfies tables_apply.
inline NchwPlan nchw_plan(const Problem& problem) {
  constexpr auto kWord = static_cast<int32_t>(sizeof(int32_t));
  NchwPlan plan;
  plan.tables = table_shape(problem, kNchwMostTaps);
  const int32_t rows = plan.tables.rows();
  plan.most_lanes_log2 = 5;
  while (plan.most_lanes_log2 > 0 && 1 << (plan.most_lanes_log2 - 1) >= problem.channels) {
    --plan.most_lanes_log2;
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
  plan.tile = plan.lines + kWord;
  plan.window = plan.tile + kNchwTileWords * kWord;
  plan.window_words = (kNchwSharedBytes - plan.window) / kWord;
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

/// As add_columns, for one channel of a staged window. Taps hold offsets in bytes.
template <int kTaps>
__device__ __forceinline__ float window_columns(const char* window, const Tap<float>* tap_y,
                                                const Tap<float>* end_y, const Tap<float>* tap_x) {
  int32_t offset[kTaps];
  float weight[kTaps];
  GLIMPSE_UNROLL
  for (int j = 0; j < kTaps; ++j) {
    const Tap<float> tap = tap_x[j];
    offset[j] = tap.pixel;
    weight[j] = tap.weight;
  }
  float sum = 0.0f;
  GLIMPSE_NO_UNROLL
  for (; tap_y != end_y; ++tap_y) {
    const Tap<float> tap = *tap_y;
    const char* row = window + tap.pixel;
    float row_sum = 0.0f;
    GLIMPSE_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      row_sum += weight[j] * *reinterpret_cast<const float*>(row + offset[j]);
    }
    sum += tap.weight * row_sum;
  }
  return sum;
}

/// Copies kChannels channels of one pixel, `step` elements and `group` floats apart, to a window of
/// float. Float goes by asynchronous copies; other types are all loaded, then converted.
template <int kChannels, class T>
__device__ __forceinline__ void stage_channels(float* target, const T* source, int64_t step,
                                               int32_t group) {
  if constexpr (std::is_same_v<T, float>) {
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) copy_async4(target + i * group, source + i * step);
  } else {
    Pack<T, 1> value[kChannels];
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) value[i] = Pack<T, 1>::load(source + i * step);
    GLIMPSE_UNROLL
    for (int i = 0; i < kChannels; ++i) value[i].unpack(target + i * group);
  }
}

/// Block: a box and a slice of its channels, taken in chunks whose window fits in shared memory.
/// First one thread per row turns the tables into lines; then, chunk by chunk, warps stage channels
/// with lanes along pixels, compute cells with lanes along channels, and store with lanes along
/// cells.
template <class T>
__global__ void __launch_bounds__(kNchwThreads, 4)
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
  int32_t chunk_log2 = plan.most_lanes_log2;  // -1 where not even one channel fits
  while (chunk_log2 >= 0 && pixels * (1 << chunk_log2 | 1) > plan.window_words) --chunk_log2;

  const auto stride_y = static_cast<int32_t>(level.stride_h);
  const auto stride_x = static_cast<int32_t>(level.stride_w);
  if (chunk_log2 < 0 || !tables.fit) {
    for (int32_t i = thread; i < channels * cells; i += kNchwThreads) {
      const int32_t channel = i / cells, cell = i - channel * cells;
      const int32_t cell_y = cell / cells_x, cell_x = cell - cell_y * cells_x;
      const T* plane = image + channel * level.stride_c;
      float sum = 0.0f;
      if (tables.fit) {
        const Row row_y = tables.row_y[cell_y], row_x = tables.row_x[cell_x];
        if (row_y.count == 0 || row_x.count == 0) sum = static_cast<float>(problem.fill);
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
        sum = cell_value(problem.op, static_cast<float>(problem.fill), tables.axis[kY],
                         tables.axis[kX], cell_y, cell_x, [&](int32_t y, int32_t x) {
                           return load_value(plane[y * stride_y + x * stride_x]);
                         });
      }
      pooled[i] = Store<T>::from(sum);
    }
    return;
  }

  const int32_t chunk = 1 << chunk_log2;
  const int32_t pitch = chunk | 1;
  const int32_t pitch_bytes = pitch * static_cast<int32_t>(sizeof(float));
  for (int32_t i = thread; i < rows; i += kNchwThreads) {
    const bool is_y = i < cells_y;
    detail::place_taps(tap, tables.row_y[i], shared_until[i], opened[i].first, is_y ? 0 : lines_y,
                       is_y ? lines_x * pitch_bytes : pitch_bytes, is_y ? stride_y : stride_x,
                       line);
  }
  __syncthreads();

  auto* window = reinterpret_cast<float*>(shared + plan.window);
  auto* tile = reinterpret_cast<float*>(shared + plan.tile);
  // A warp stages every `group`-th channel of its pixels: more channels for the price of finding a
  // pixel when there are fewer groups, more even work for all warps when there are more.
  const int32_t group = chunk < 4 ? chunk : 4;
  const int32_t group_channel = warp % group;
  const int32_t first_pixel = warp / group * 32 + lane;
  const int32_t pixel_step = kWarps / group * 32;
  const detail::GridStep first_place(first_pixel, lines_x > 0 ? lines_x : 1);
  const detail::GridStep place_step(pixel_step, lines_x > 0 ? lines_x : 1);
  const int32_t channel = thread & (chunk - 1);
  const char* own_window = shared + plan.window + channel * static_cast<int32_t>(sizeof(float));
  const int32_t first_cell = thread >> chunk_log2;
  const int32_t cell_step = kNchwThreads >> chunk_log2;
  const detail::GridStep cell_place_step(cell_step, cells_x);
  // Cells that the tile holds, one less where that makes the pitch odd; in batches of equal size.
  const int32_t most_cells = (kNchwTileWords >> chunk_log2) - 1;
  const int32_t batches = (cells + most_cells - 1) / most_cells;
  const int32_t batch = (cells + batches - 1) / batches;
  const int32_t tile_pitch = batch | 1;

  for (int32_t chunk_first = 0; chunk_first < channels; chunk_first += chunk) {
    const int32_t left = channels - chunk_first;
    const int32_t live = left < chunk ? left : chunk;
    if (pixels > 0) {
      const T* first_source = image + (chunk_first + group_channel) * level.stride_c;
      const int64_t step = group * level.stride_c;
      detail::GridStep place = first_place;
      for (int32_t pixel = first_pixel; pixel < pixels; pixel += pixel_step) {
        const T* source = first_source + (line[place.y] + line[lines_y + place.x]);
        float* target = window + pixel * pitch + group_channel;
        int32_t c = group_channel;
        GLIMPSE_NO_UNROLL
        for (; c + 3 * group < live; c += 4 * group) {
          stage_channels<4>(target, source, step, group);
          target += 4 * group;
          source += 4 * step;
        }
        GLIMPSE_NO_UNROLL
        for (; c < live; c += group) {
          stage_channels<1>(target, source, step, group);
          target += group;
          source += step;
        }
        place.add(place_step, lines_x);
      }
    }
    copy_async_wait_all();
    __syncthreads();

    for (int32_t batch_first = 0; batch_first < cells; batch_first += batch) {
      const int32_t batch_end = batch_first + batch < cells ? batch_first + batch : cells;
      if (channel < live) {
        int32_t cell = batch_first + first_cell;
        detail::GridStep place(cell, cells_x);
        for (; cell < batch_end; cell += cell_step) {
          const Row row_y = tables.row_y[place.y], row_x = tables.row_x[place.x];
          const Tap<float>* tap_y = tap + row_y.first;
          const Tap<float>* end_y = tap_y + row_y.count;
          const Tap<float>* tap_x = tap + row_x.first;
          float sum = 0.0f;
          if (row_y.count == 0 || row_x.count == 0) sum = static_cast<float>(problem.fill);
          GLIMPSE_NO_UNROLL
          for (int32_t left = row_x.count; left > 0; left -= 4, tap_x += 4) {
            switch (left) {
              case 1:
                sum += window_columns<1>(own_window, tap_y, end_y, tap_x);
                break;
              case 2:
                sum += window_columns<2>(own_window, tap_y, end_y, tap_x);
                break;
              case 3:
                sum += window_columns<3>(own_window, tap_y, end_y, tap_x);
                break;
              default:
                sum += window_columns<4>(own_window, tap_y, end_y, tap_x);
            }
          }
          tile[channel * tile_pitch + cell - batch_first] = sum;
          place.add(cell_place_step, cells_x);
        }
      }
      __syncthreads();
      for (int32_t c = warp; c < live; c += kWarps) {
        T* target = pooled + static_cast<int64_t>(chunk_first + c) * cells;
        for (int32_t cell = batch_first + lane; cell < batch_end; cell += 32) {
          target[cell] = Store<T>::from(tile[c * tile_pitch + cell - batch_first]);
        }
      }
      // The next batch overwrites the tile. The next chunk has a barrier of its own before that.
      if (batch_end < cells) __syncthreads();
    }
  }
}

}  // namespace glimpse::cuda
