// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/split.cuh"
#include "cuda/tables.cuh"
#include "frame_problem.h"
#include "half.h"

/// Operators on frames: sample by sample, because nothing is separable.
///
///   frames_pool_kernel            mean or maximum over the samples of each cell
///   frames_chosen_kernel          one sample of each cell, for each channel its own
///   frames_grad_boxes_kernel      the gradient to a box, of both         (frames_gradients.cuh)
///   frames_grad_features_kernel   the gradient to the map, of the mean   (frames_gradients.cuh)
///   frames_grad_chosen_kernel     the same, of the chosen samples        (frames_grad_chosen.cuh)
///
/// Every output has one owner, which adds in a fixed order; nothing is cleared, nothing is atomic.
namespace glimpse::cuda {

constexpr int32_t kFrameThreads = 256;

/// Offsets of a tensor like `pooled`.
struct FrameStrides {
  int64_t box, channel, cell;

  __device__ __forceinline__ explicit FrameStrides(const FrameProblem& problem) {
    const int64_t cells = int64_t{problem.out_height} * problem.out_width;
    const bool nhwc = problem.layout == Layout::kNhwc;
    box = problem.channels * cells;
    channel = nhwc ? 1 : cells;
    cell = nhwc ? problem.channels : 1;
  }
};

/// What a sample reads, without arrays, so that nothing lands on the stack.
template <class T>
struct alignas(16) FrameTap {
  int32_t y, x;   // the low pixel of each direction
  int32_t highs;  // bit 0: a high pixel along y, bit 1: along x; -1: dropped
  T low_low, low_high, high_low, high_high;  // weights of (y, x)

  __device__ __forceinline__ static FrameTap of(const FrameTaps<T>& taps,
                                                const TapWeights<T>& weights) {
    FrameTap tap;
    tap.y = taps.y.pixel[0];
    tap.x = taps.x.pixel[0];
    tap.highs = taps.kept() ? (taps.y.count == 2 ? 1 : 0) | (taps.x.count == 2 ? 2 : 0) : -1;
    tap.low_low = weights.value[0];
    tap.low_high = weights.value[1];
    tap.high_low = weights.value[2];
    tap.high_high = weights.value[3];
    return tap;
  }

  /// visit(weight, offset) for each tap, offsets in elements from pixel (0, 0).
  template <class Visit>
  __device__ __forceinline__ void for_each(int64_t stride_h, int64_t stride_w,
                                           const Visit& visit) const {
    const int64_t offset = y * stride_h + x * stride_w;
    visit(low_low, offset);
    if ((highs & 2) != 0) visit(low_high, offset + stride_w);
    if ((highs & 1) != 0) {
      visit(high_low, offset + stride_h);
      if ((highs & 2) != 0) visit(high_high, offset + stride_h + stride_w);
    }
  }
};

// -------------------------------------------------------------------------------------------- pool

// Note [Samples of a block]
// A block serves one box and builds its samples once for all of its channels. The samples of a
// cell are a rectangle whose rows depend on the cell's row and whose columns depend on its column
// only, so all of a box are one grid of lines:
//
//   starts of y cells | starts of x cells | lines: y0 y1 .. x0 x1 .. | taps, [line y][line x]
//
// A box with more lines or taps than there is room for gets no table, and each thread evaluates
// the samples that it needs.

template <class T>
struct alignas(2 * sizeof(T)) FrameLine {
  T local, progress;
};

/// What a block sets aside; decided at launch from sizes alone.
struct FrameTableShape {
  int32_t rows;   // cells of both directions, or 0: no tables
  int32_t lines;  // room
  int32_t taps;   // room

  template <class T>
  GLIMPSE_HD size_t lines_offset() const {
    const size_t end = static_cast<size_t>(rows + 2) * sizeof(int32_t);
    return (end + 15) / 16 * 16;
  }
  template <class T>
  GLIMPSE_HD size_t taps_offset() const {
    const size_t end = lines_offset<T>() + static_cast<size_t>(lines) * sizeof(FrameLine<T>);
    return (end + 15) / 16 * 16;
  }
  template <class T>
  GLIMPSE_HD size_t bytes() const {
    return rows == 0 ? 0 : taps_offset<T>() + static_cast<size_t>(taps) * sizeof(FrameTap<T>);
  }
};

/// How frames_pool_kernel divides a box: grid (box, slice of channels).
struct FramePlan {
  FrameTableShape tables;
  int32_t channels_per_block;  // a multiple of the channels of a thread
  bool stages;                 // Note [Staged samples]
};

/// The samples of box `box` in shared memory. All threads call it, after a barrier; barriers
/// inside. False where they have no room.
template <class T>
__device__ __forceinline__ bool build_frame_tables(const FrameProblem& problem,
                                                   const FrameBox<T>& box,
                                                   const FrameTableShape& shape, char* shared) {
  if (shape.rows == 0) return false;
  auto* start = reinterpret_cast<int32_t*>(shared);
  auto* line = reinterpret_cast<FrameLine<T>*>(shared + shape.template lines_offset<T>());
  auto* tap = reinterpret_cast<FrameTap<T>*>(shared + shape.template taps_offset<T>());
  const auto thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
  const int32_t cells_y = problem.out_height, cells_x = problem.out_width;
  // Starts of the cells of y are start[0..cells_y], those of x follow after them.
  const auto range_of = [&](int32_t row) {
    const int32_t direction = row < cells_y ? kY : kX;
    return direction == kY
               ? samples_within(box.frame.axis[0], row, box.reach.low[0], box.reach.high[0])
               : samples_within(box.frame.axis[1], row - cells_y, box.reach.low[1],
                                box.reach.high[1]);
  };
  for (int32_t row = thread; row < shape.rows; row += threads) {
    const SampleRange range = range_of(row);
    const int32_t count = range.end - range.first;
    start[row < cells_y ? row : row + 1] = count < shape.lines ? count : shape.lines + 1;
  }
  __syncthreads();
  if (thread == 0) {
    for (int32_t direction = 0; direction < 2; ++direction) {
      int32_t* own = direction == kY ? start : start + cells_y + 1;
      const int32_t cells = direction == kY ? cells_y : cells_x;
      int32_t sum = 0;
      GLIMPSE_NO_UNROLL
      for (int32_t i = 0; i < cells; ++i) {
        const int32_t count = own[i];
        own[i] = sum;
        sum = sum + count <= shape.lines ? sum + count : shape.lines + 1;
      }
      own[cells] = sum;
    }
  }
  __syncthreads();
  const int32_t lines_y = start[cells_y], lines_x = start[cells_y + 1 + cells_x];
  if (int64_t{lines_y} + lines_x > shape.lines || int64_t{lines_y} * lines_x > shape.taps) {
    return false;
  }
  for (int32_t row = thread; row < shape.rows; row += threads) {
    const SampleRange range = range_of(row);
    const bool along_y = row < cells_y;
    const Axis<T> axis = along_y ? box.frame.axis[0] : box.frame.axis[1];
    const int32_t cell = along_y ? row : row - cells_y;
    int32_t next = along_y ? start[row] : lines_y + start[row + 1];
    GLIMPSE_NO_UNROLL
    for (int32_t i = range.first; i < range.end; ++i, ++next) {
      line[next] = {axis.position(cell, i), axis.progress(cell, i)};
    }
  }
  __syncthreads();
  for (int32_t i = thread; i < lines_y * lines_x; i += threads) {
    const FrameLine<T> y = line[i / lines_x], x = line[lines_y + i % lines_x];
    const FramePoint<T> point{y.local, x.local, y.progress, x.progress};
    const FrameTaps<T> taps =
        FrameTaps<T>::at(box.frame, y.local, x.local, problem.map.height, problem.map.width);
    tap[i] = FrameTap<T>::of(taps, sample_weights(box, point, taps));
  }
  __syncthreads();
  return true;
}

/// The values of a sample in kChannels neighbouring channels of `image`.
template <class T, int kChannels>
__device__ __forceinline__ void add_frame_tap(const Level& map, const FrameTap<acc_t<T>>& tap,
                                              const T* image, acc_t<T>* sum) {
  tap.for_each(map.stride_h, map.stride_w, [&](acc_t<T> weight, int64_t offset) {
    acc_t<T> value[kChannels];
    Pack<T, kChannels>::load(image + offset).unpack(value);
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) sum[c] += weight * value[c];
  });
}

/// The reduction of the samples of a cell: their mean, or the largest and which it is.
template <class T, int kChannels, bool kMaximum>
struct FrameReduction {
  using Number = acc_t<T>;
  Number value[kChannels];
  int32_t sample[kChannels];  // kMaximum
  bool any[kChannels];        // kMaximum

  __device__ __forceinline__ FrameReduction() {
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      value[c] = 0;
      sample[c] = -1;
      any[c] = false;
    }
  }
  __device__ __forceinline__ void add(const Level& map, const FrameTap<Number>& tap, const T* image,
                                      int32_t index) {
    if constexpr (!kMaximum) {
      if (tap.highs >= 0) add_frame_tap<T, kChannels>(map, tap, image, value);
    } else {
      Number candidate[kChannels] = {};
      if (tap.highs >= 0) add_frame_tap<T, kChannels>(map, tap, image, candidate);
      take(candidate, tap.highs >= 0 ? index : -1);
    }
  }
  __device__ __forceinline__ void drop() {
    const Number zero[kChannels] = {};
    take(zero, -1);
  }

 private:
  __device__ __forceinline__ void take(const Number* candidate, int32_t index) {
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      Maximum<Number> largest{value[c], sample[c], any[c]};
      largest.take(candidate[c], index);
      value[c] = largest.value;
      sample[c] = largest.sample;
      any[c] = largest.any;
    }
  }
};

/// DroppedAround of a cell whose window has so many samples along y and x.
template <class T>
__device__ __forceinline__ DroppedAround dropped_around(const FrameBox<T>& box, int32_t cell_y,
                                                        int32_t cell_x, int32_t samples_y,
                                                        int32_t samples_x) {
  if (samples_y == box.frame.axis[0].samples && samples_x == box.frame.axis[1].samples) {
    return {false, false, false, false};
  }
  return DroppedAround::of(box.frame, cell_window(box, cell_y, cell_x));
}

// Note [Staged samples]
// In kNchw, cells of a warp read pixels that lie in as many lines of memory, and cells of a turned
// box have no order that helps. So the block copies the pixels that samples reach to shared memory,
// row by row with lanes along x, some channels at a time; of each row only the run of pixels
// between the first and the last that is read, because the rectangle around a turned box is twice
// as large. Lanes are channels then, and cells that share a warp differ in their channels'
// addresses only.

constexpr int32_t kStageRows = 128;
constexpr int32_t kStageWords = 10240;  // 40 KB: the window, and the results of all cells behind it

/// A row of the map in the window: pixels first .. first + count - 1, of which the first is number
/// `start` of the window.
struct StageRow {
  int32_t first, count, start;
};

/// Means or maxima of all cells of a box in the channels of `image`, `pooled` and `winner`, where
/// its samples fit. All threads call it, after build_frame_tables; barriers inside. False where
/// they do not fit, and then nothing has changed.
template <class T, bool kMaximum>
__device__ __forceinline__ bool pool_staged(const FrameProblem& problem, const FrameBox<float>& box,
                                            const int32_t* start_y, const int32_t* start_x,
                                            FrameTap<float>* table, float* window, const T* image,
                                            int32_t channels, pooled_t<T>* pooled,
                                            int32_t* winner) {
  constexpr int32_t kWarps = kFrameThreads / 32;
  GLIMPSE_SHARED(StageRow, stage, [kStageRows]);
  GLIMPSE_SHARED(int2, reached, [kWarps]);
  GLIMPSE_SHARED(int32_t, stage_pixels, );
  const Level& map = problem.map;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread & 31, warp = thread >> 5;
  const int32_t cells_x = problem.out_width, cells = problem.out_height * cells_x;
  const int32_t lines_x = start_x[cells_x], taps = start_y[problem.out_height] * lines_x;

  int32_t low = 2147483647, high = -1;
  for (int32_t i = thread; i < taps; i += kFrameThreads) {
    const int32_t highs = table[i].highs, y = table[i].y;
    if (highs < 0) continue;
    low = y < low ? y : low;
    const int32_t last = y + (highs & 1);
    high = last > high ? last : high;
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    const int32_t other_low = __shfl_xor_sync(kFullWarp, low, distance);
    const int32_t other_high = __shfl_xor_sync(kFullWarp, high, distance);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (lane == 0) reached[warp] = make_int2(low, high);
  __syncthreads();
  for (int32_t i = 0; i < kWarps; ++i) {
    low = reached[i].x < low ? reached[i].x : low;
    high = reached[i].y > high ? reached[i].y : high;
  }
  const int32_t rows = high < 0 ? 0 : high - low + 1;
  if (rows > kStageRows) return false;
  for (int32_t row = thread; row < rows; row += kFrameThreads) {
    int32_t first = 2147483647, end = 0;
    GLIMPSE_NO_UNROLL
    for (int32_t i = 0; i < taps; ++i) {
      const int32_t highs = table[i].highs, x = table[i].x;
      const int32_t below = low + row - table[i].y;
      if (highs < 0 || (below != 0 && !(below == 1 && (highs & 1) != 0))) continue;
      first = x < first ? x : first;
      const int32_t behind = x + 1 + (highs >> 1);
      end = behind > end ? behind : end;
    }
    stage[row].first = end > 0 ? first : 0;
    stage[row].count = end > 0 ? end - first : 0;
  }
  __syncthreads();
  if (thread == 0) {
    int32_t sum = 0;
    GLIMPSE_NO_UNROLL
    for (int32_t row = 0; row < rows; ++row) {
      stage[row].start = sum;
      sum += stage[row].count;
      if (sum > kStageWords) sum = kStageWords;  // too many in any case
    }
    stage_pixels = sum;
  }
  __syncthreads();
  const int32_t pixels = stage_pixels;
  const int32_t tile_pitch = cells | 1;
  const int32_t tiles = kMaximum ? 2 : 1;  // values, and which samples they are
  // Odd, so that lanes may be pixels or channels.
  int32_t chunk_log2 = 5;
  while (chunk_log2 > 0 &&
         (pixels + 1) * ((1 << chunk_log2) + 1) + ((tiles * tile_pitch) << chunk_log2) >
             kStageWords) {
    --chunk_log2;
  }
  if (chunk_log2 == 0) return false;
  const int32_t chunk = 1 << chunk_log2, pitch = chunk + 1;
  // From here on a tap has the places of its low pixels in the window, for its two rows. The others
  // see it after the barrier that the window needs.
  for (int32_t i = thread; i < taps; i += kFrameThreads) {
    const int32_t highs = table[i].highs, x = table[i].x;
    if (highs < 0) continue;
    const StageRow row = stage[table[i].y - low];
    const StageRow next = stage[table[i].y - low + (highs & 1)];
    table[i].y = (row.start + x - row.first) * pitch;
    table[i].x = (next.start + x - next.first) * pitch;
  }

  float* tile = window + pixels * pitch;
  auto* samples = reinterpret_cast<int32_t*>(tile + chunk * tile_pitch);
  const int32_t channel = thread & (chunk - 1);
  const float* own = window + channel;
  const int32_t first_cell = thread >> chunk_log2, step = kFrameThreads >> chunk_log2;
  const int32_t first_y = first_cell / cells_x, first_x = first_cell - first_y * cells_x;
  const int32_t step_y = step / cells_x, step_x = step - step_y * cells_x;
  const float factor = frame_factor(box.frame);
  const auto add_to = [&](float sum, const FrameTap<float>& tap) {
    sum += tap.low_low * own[tap.y];
    if ((tap.highs & 2) != 0) sum += tap.low_high * own[tap.y + pitch];
    if ((tap.highs & 1) != 0) {
      sum += tap.high_low * own[tap.x];
      if ((tap.highs & 2) != 0) sum += tap.high_high * own[tap.x + pitch];
    }
    return sum;
  };
  for (int32_t base = 0; base < channels; base += chunk) {
    const int32_t live = channels - base < chunk ? channels - base : chunk;
    for (int32_t row = warp; row < rows; row += kWarps) {
      const StageRow run = stage[row];
      for (int32_t x = lane; x < run.count; x += 32) {
        const T* source = image + base * map.stride_c + (low + row) * map.stride_h +
                          (run.first + x) * map.stride_w;
        float* target = window + (run.start + x) * pitch;
        const auto stage_channel = [&](int32_t c) {
          if constexpr (sizeof(T) == 4) {
            copy_async4(target + c, source);
          } else {
            target[c] = load_value(*source);
          }
          source += map.stride_c;
        };
        int32_t c = 0;
        GLIMPSE_NO_UNROLL
        for (; c + 3 < live; c += 4) {
          GLIMPSE_UNROLL
          for (int32_t i = 0; i < 4; ++i) stage_channel(c + i);
        }
        GLIMPSE_NO_UNROLL
        for (; c < live; ++c) stage_channel(c);
      }
    }
    copy_async_wait_all();
    __syncthreads();
    if (channel < live) {
      int32_t cell_y = first_y, cell_x = first_x;
      GLIMPSE_NO_UNROLL
      for (int32_t cell = first_cell; cell < cells; cell += step) {
        const int32_t end_y = start_y[cell_y + 1];
        const int32_t begin_x = start_x[cell_x], end_x = start_x[cell_x + 1];
        if constexpr (kMaximum) {
          const auto dropped =
              dropped_around(box, cell_y, cell_x, end_y - start_y[cell_y], end_x - begin_x);
          auto largest = Maximum<float>::none();
          if (dropped.before) largest.take(0, -1);
          int32_t index = 0;
          GLIMPSE_NO_UNROLL
          for (int32_t y = start_y[cell_y]; y < end_y; ++y) {
            if (dropped.left) largest.take(0, -1);
            GLIMPSE_NO_UNROLL
            for (int32_t x = begin_x; x < end_x; ++x, ++index) {
              const FrameTap<float> tap = table[y * lines_x + x];
              if (tap.highs < 0) {
                largest.take(0, -1);
              } else {
                largest.take(add_to(0, tap), index);
              }
            }
            if (dropped.right) largest.take(0, -1);
          }
          if (dropped.after) largest.take(0, -1);
          tile[channel * tile_pitch + cell] = largest.value;
          samples[channel * tile_pitch + cell] = largest.sample;
        } else {
          float sum = 0;
          GLIMPSE_NO_UNROLL
          for (int32_t y = start_y[cell_y]; y < end_y; ++y) {
            GLIMPSE_NO_UNROLL
            for (int32_t x = begin_x; x < end_x; ++x) {
              const FrameTap<float> tap = table[y * lines_x + x];
              if (tap.highs >= 0) sum = add_to(sum, tap);
            }
          }
          tile[channel * tile_pitch + cell] = sum * factor;
        }
        cell_y += step_y;
        cell_x += step_x;
        if (cell_x >= cells_x) {
          cell_x -= cells_x;
          ++cell_y;
        }
      }
    }
    __syncthreads();
    for (int32_t c = warp; c < live; c += kWarps) {
      const int64_t target = int64_t{base + c} * cells;
      GLIMPSE_NO_UNROLL
      for (int32_t i = lane; i < cells; i += 32) {
        pooled[target + i] = Store<pooled_t<T>>::from(tile[c * tile_pitch + i]);
        if constexpr (kMaximum) winner[target + i] = samples[c * tile_pitch + i];
      }
    }
    // The next chunk waits for this one's window, and its barrier for this one's tile.
  }
  return true;
}

/// Block: a box and a slice of its channels. Thread: one cell of kChannels channels at a time;
/// neighbouring threads are neighbours in memory, channels in kNhwc and cells in kNchw.
template <class T, int kChannels, bool kMaximum>
__global__ void __launch_bounds__(kFrameThreads, 2)
    frames_pool_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem,
                       GLIMPSE_GRID_CONSTANT FramePlan plan) {
  using Number = acc_t<T>;
  GLIMPSE_DYNAMIC_SHARED(shared);
  GLIMPSE_SHARED(FrameBox<Number>, box, );
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) box = read_frame<Number>(problem, k);
  __syncthreads();
  const bool tables = box.reads && build_frame_tables<Number>(problem, box, plan.tables, shared);

  const int64_t first = static_cast<int64_t>(blockIdx.y) * plan.channels_per_block;
  const int64_t left = problem.channels - first;
  const int64_t channels = left < plan.channels_per_block ? left : plan.channels_per_block;
  const auto packs = static_cast<int32_t>(channels / kChannels);
  const int32_t cells_x = problem.out_width;
  const int64_t cells = int64_t{problem.out_height} * cells_x;
  const FrameStrides strides(problem);
  const auto* start = reinterpret_cast<const int32_t*>(shared);
  const auto* table = reinterpret_cast<const FrameTap<Number>*>(
      shared + plan.tables.template taps_offset<Number>());
  const Number factor = box.reads ? frame_factor(box.frame) : Number(0);
  if constexpr (kChannels == 1 && sizeof(Number) == 4) {
    if (tables && plan.stages) {
      const int64_t channel = first * problem.map.stride_c + box.image * problem.map.stride_n;
      const int64_t target = k * strides.box + first * strides.channel;
      auto* window = reinterpret_cast<float*>(shared + plan.tables.template bytes<float>());
      if (pool_staged<T, kMaximum>(problem, box, start, start + problem.out_height + 1,
                                   reinterpret_cast<FrameTap<float>*>(
                                       shared + plan.tables.template taps_offset<float>()),
                                   window, static_cast<const T*>(problem.map.data) + channel,
                                   static_cast<int32_t>(channels),
                                   static_cast<pooled_t<T>*>(problem.pooled) + target,
                                   problem.winner + target)) {
        return;
      }
    }
  }
  for (int64_t i = threadIdx.x; i < packs * cells; i += blockDim.x) {
    const bool nhwc = problem.layout == Layout::kNhwc;
    int32_t inner;  // a pack of channels in kNhwc, a cell in kNchw
    const auto outer =
        static_cast<int32_t>(split(i, nhwc ? packs : static_cast<int32_t>(cells), &inner));
    const int64_t channel = first + int64_t{nhwc ? inner : outer} * kChannels;
    const int32_t cell = nhwc ? outer : inner;
    const int32_t cell_y = cell / cells_x, cell_x = cell - cell_y * cells_x;
    FrameReduction<T, kChannels, kMaximum> sum;
    if (box.reads) {
      const T* image = static_cast<const T*>(problem.map.data) + box.image * problem.map.stride_n +
                       channel * problem.map.stride_c;
      if (!tables) {
        if constexpr (kMaximum) {
          for_each_candidate(problem, box, cell_y, cell_x, [&](int32_t index, const auto& taps) {
            const TapWeights<Number> weights =
                TapWeights<Number>::product(taps.y.weight, taps.x.weight);
            sum.add(problem.map, FrameTap<Number>::of(taps, weights), image, index);
          });
        } else {
          for_each_sample(problem, box, cell_y, cell_x, [&](const auto& point, const auto& taps) {
            const TapWeights<Number> weights = sample_weights(box, point, taps);
            sum.add(problem.map, FrameTap<Number>::of(taps, weights), image, 0);
          });
        }
      } else {
        const int32_t* start_x = start + problem.out_height + 1;
        const int32_t lines_x = start_x[cells_x];
        const int32_t begin_y = start[cell_y], end_y = start[cell_y + 1];
        const int32_t begin_x = start_x[cell_x], end_x = start_x[cell_x + 1];
        DroppedAround dropped{false, false, false, false};
        if constexpr (kMaximum) {
          dropped = dropped_around(box, cell_y, cell_x, end_y - begin_y, end_x - begin_x);
          if (dropped.before) sum.drop();
        }
        int32_t index = 0;
        GLIMPSE_NO_UNROLL
        for (int32_t y = begin_y; y < end_y; ++y) {
          if (dropped.left) sum.drop();
          GLIMPSE_NO_UNROLL
          for (int32_t x = begin_x; x < end_x; ++x, ++index) {
            sum.add(problem.map, table[y * lines_x + x], image, index);
          }
          if (dropped.right) sum.drop();
        }
        if (dropped.after) sum.drop();
      }
    }
    const int64_t offset = k * strides.box + channel * strides.channel + cell * strides.cell;
    auto* pooled = static_cast<pooled_t<T>*>(problem.pooled) + offset;
    GLIMPSE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if constexpr (kMaximum) {
        problem.winner[offset + c] = sum.sample[c];
      } else {
        sum.value[c] *= factor;
      }
    }
    Pack<pooled_t<T>, kChannels>::from(sum.value).store(pooled);
  }
}

/// Block: a box. Thread: one output at a time, which is one sample of its cell.
template <class T>
__global__ void __launch_bounds__(kFrameThreads, 2)
    frames_chosen_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(FrameBox<Number>, box, );
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) box = read_frame<Number>(problem, k);
  __syncthreads();
  const FrameStrides strides(problem);
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const bool nhwc = problem.layout == Layout::kNhwc;
  for (int64_t i = threadIdx.x; i < strides.box; i += blockDim.x) {
    const int64_t channel = nhwc ? i % problem.channels : i / cells;
    const auto cell = static_cast<int32_t>(nhwc ? i / problem.channels : i % cells);
    const int32_t cell_y = cell / problem.out_width;
    Number value[1] = {};
    if (box.reads) {
      const T* image = static_cast<const T*>(problem.map.data) + box.image * problem.map.stride_n +
                       channel * problem.map.stride_c;
      for_chosen_sample(
          problem, box, cell_y, cell - cell_y * problem.out_width,
          problem.chosen[k * strides.box + i], [&](const auto& point, const auto& taps) {
            const auto tap = FrameTap<Number>::of(taps, sample_weights(box, point, taps));
            add_frame_tap<T, 1>(problem.map, tap, image, value);
          });
    }
    static_cast<pooled_t<T>*>(problem.pooled)[k * strides.box + i] =
        Store<pooled_t<T>>::from(value[0]);
  }
}

}  // namespace glimpse::cuda
