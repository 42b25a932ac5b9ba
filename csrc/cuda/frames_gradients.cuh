// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/frames.cuh"
#include "frame_problem.h"
#include "half.h"

/// The gradients of operators on frames: to boxes, a block for each, and to the map, by owners that
/// gather.
namespace glimpse::cuda {

// ------------------------------------------------------------------------------------------- boxes

/// Derivatives of the value of a sample in y, in x and in both, from the pixels at its taps.
template <class T>
struct SampleSlopes {
  T in_y, in_x, in_both;

  __device__ __forceinline__ static SampleSlopes of(const FrameTaps<T>& taps, T low_low, T low_high,
                                                    T high_low, T high_high) {
    const T *wy = taps.y.weight, *wx = taps.x.weight, *sy = taps.y.slope, *sx = taps.x.slope;
    const T low_x = sx[0] * low_low + sx[1] * low_high;
    const T high_x = sx[0] * high_low + sx[1] * high_high;
    SampleSlopes slopes;
    slopes.in_x = wy[0] * low_x + wy[1] * high_x;
    slopes.in_both = sy[0] * low_x + sy[1] * high_x;
    slopes.in_y = sy[0] * (wx[0] * low_low + wx[1] * low_high) +
                  sy[1] * (wx[0] * high_low + wx[1] * high_high);
    return slopes;
  }
};

/// Block: a box. Lanes are channels in kNhwc, warps are cells; lanes are cells in kNchw, warps are
/// groups of channels. The pooled gradient is multiplied into the pixels of a sample first, which
/// leaves four numbers for all channels of a thread.
template <class T>
__global__ void __launch_bounds__(kFrameThreads)
    frames_grad_boxes_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem) {
  using Number = acc_t<T>;
  constexpr int32_t kWarps = kFrameThreads / 32;
  GLIMPSE_SHARED(FrameBox<Number>, box, );
  GLIMPSE_SHARED(Number, warp_sums, [kWarps][kFrameColumns]);
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) box = read_frame<Number>(problem, k);
  __syncthreads();
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Number sums[kFrameColumns] = {};
  if (box.reads) {
    const Level& map = problem.map;
    const FrameStrides strides(problem);
    const T* image = static_cast<const T*>(map.data) + box.image * map.stride_n;
    const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled) + k * strides.box;
    const bool nhwc = problem.layout == Layout::kNhwc;
    const int64_t cells = int64_t{problem.out_height} * problem.out_width;
    const int64_t first_channel = nhwc ? lane : warp, channel_step = nhwc ? 32 : kWarps;
    const Number factor = problem.chosen != nullptr ? Number(1) : frame_factor(box.frame);
    // One sample, read in every channel from `begin` on that this thread has.
    const auto add = [&](const FramePoint<Number>& point, const FrameTaps<Number>& taps,
                         int64_t cell, int64_t begin, int64_t end) {
      Number low_low = 0, low_high = 0, high_low = 0, high_high = 0;
      const int64_t low = taps.y.pixel[0] * map.stride_h + taps.x.pixel[0] * map.stride_w;
      const bool has_y = taps.y.count == 2, has_x = taps.x.count == 2;
      GLIMPSE_NO_UNROLL
      for (int64_t channel = begin; channel < end; channel += channel_step) {
        const T* at = image + channel * map.stride_c + low;
        const Number g = load_value(grad[channel * strides.channel + cell * strides.cell]);
        low_low += g * load_value(at[0]);
        if (has_x) low_high += g * load_value(at[map.stride_w]);
        if (has_y) high_low += g * load_value(at[map.stride_h]);
        if (has_y && has_x) high_high += g * load_value(at[map.stride_h + map.stride_w]);
      }
      const auto slopes = SampleSlopes<Number>::of(taps, low_low, low_high, high_low, high_high);
      for_each_column_slope(box, point, slopes.in_y, slopes.in_x, slopes.in_both,
                            [&](int32_t column, Number slope) { sums[column] += factor * slope; });
    };
    for (int64_t cell = nhwc ? warp : lane; cell < cells; cell += nhwc ? kWarps : 32) {
      const auto cell_y = static_cast<int32_t>(cell / problem.out_width);
      const auto cell_x = static_cast<int32_t>(cell - int64_t{cell_y} * problem.out_width);
      if (problem.chosen == nullptr) {
        for_each_sample(problem, box, cell_y, cell_x, [&](const auto& point, const auto& taps) {
          add(point, taps, cell, first_channel, problem.channels);
        });
        continue;
      }
      GLIMPSE_NO_UNROLL
      for (int64_t channel = first_channel; channel < problem.channels; channel += channel_step) {
        const int32_t chosen =
            problem.chosen[k * strides.box + channel * strides.channel + cell * strides.cell];
        for_chosen_sample(problem, box, cell_y, cell_x, chosen,
                          [&](const auto& point, const auto& taps) {
                            add(point, taps, cell, channel, channel + 1);
                          });
      }
    }
  }
  GLIMPSE_UNROLL
  for (int32_t column = 0; column < kFrameColumns; ++column) {
    for (int32_t distance = 16; distance > 0; distance /= 2) {
      sums[column] += __shfl_down_sync(kFullWarp, sums[column], distance);
    }
    if (lane == 0) warp_sums[warp][column] = sums[column];
  }
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) >= problem.box_columns) return;
  const int32_t column =
      static_cast<int32_t>(threadIdx.x) - (problem.box_columns - problem.op.columns());
  Number sum = 0;
  for (int32_t i = 0; i < kWarps && column >= 0; ++i) sum += warp_sums[i][column];
  static_cast<Number*>(problem.grad_box)[k * problem.box_columns + threadIdx.x] = sum;
}

// ---------------------------------------------------------------------------------------- features

// Note [Gather on frames]
// A block owns a tile of pixels in some channels. It walks all boxes; those that can touch the tile
// are taken eight at a time, one by each warp: lane p turns pixel p of the tile into the local
// frame and lists the cells that touch it, with their weights. Then all threads add the listed
// cells to the channels that they own, box after box in the order of the boxes. A list that is too
// short for its cells ends the round: boxes up to it are added, and the next round goes on there.

constexpr int32_t kTileWidth = 8, kTileHeight = 4;  // one lane for each pixel
constexpr int32_t kTileWarps = kFrameThreads / 32;
constexpr int32_t kTileList = 8;

/// Numbers that each thread owns: few where finding a weight takes many registers.
template <class Number, bool kChosen>
constexpr int kTileOwned = kChosen || sizeof(Number) == 8 ? 4 : 8;
/// Channels of a block.
template <class Number, bool kChosen>
constexpr int kTileChannels = kTileWarps * kTileOwned<Number, kChosen>;

template <class T>
struct alignas(8) CellWeight {
  int32_t cell;
  T weight;
};

/// The weight of pixel (y, x) in a sample; 0 where it is no tap. `touches` becomes true if it is.
template <class T>
__device__ __forceinline__ T pixel_weight(const FrameTaps<T>& taps, const TapWeights<T>& weights,
                                          int32_t y, int32_t x, bool* touches) {
  const bool low_y = taps.y.pixel[0] == y, high_y = taps.y.count == 2 && taps.y.pixel[1] == y;
  const bool low_x = taps.x.pixel[0] == x, high_x = taps.x.count == 2 && taps.x.pixel[1] == x;
  if (!((low_y || high_y) && (low_x || high_x))) return T(0);
  *touches = true;
  const T low = low_x ? weights.value[0] : weights.value[1];
  const T high = low_x ? weights.value[2] : weights.value[3];
  return low_y ? low : high;
}

/// Lists the cells from `first` on that touch pixel (y, x), row by row. Returns their number, and
/// in `next` the cell where the list became full, or -1.
template <class T>
__device__ __forceinline__ int32_t list_cells(const FrameProblem& problem, const FrameBox<T>& box,
                                              int32_t y, int32_t x, int32_t first,
                                              CellWeight<T>* list, int32_t* next) {
  *next = -1;
  if (first < 0) return 0;
  const FrameReach<T> reach = FrameReach<T>::of(box.frame, y, y, x, x);
  const Axis<T>&axis_y = box.frame.axis[0], &axis_x = box.frame.axis[1];
  const CellRange rows = cells_within(axis_y, problem.out_height, reach.low[0], reach.high[0]);
  const CellRange columns = cells_within(axis_x, problem.out_width, reach.low[1], reach.high[1]);
  const T factor = frame_factor(box.frame);
  int32_t count = 0;
  GLIMPSE_NO_UNROLL
  for (int32_t cell_y = rows.first; cell_y < rows.end; ++cell_y) {
    const SampleRange range_y = samples_within(axis_y, cell_y, reach.low[0], reach.high[0]);
    GLIMPSE_NO_UNROLL
    for (int32_t cell_x = columns.first; cell_x < columns.end; ++cell_x) {
      const int32_t cell = cell_y * problem.out_width + cell_x;
      if (cell < first) continue;
      const SampleRange range_x = samples_within(axis_x, cell_x, reach.low[1], reach.high[1]);
      T weight = 0;
      bool touches = false;
      GLIMPSE_NO_UNROLL
      for (int32_t i = range_y.first; i < range_y.end; ++i) {
        GLIMPSE_NO_UNROLL
        for (int32_t j = range_x.first; j < range_x.end; ++j) {
          const FramePoint<T> point = frame_point(box.frame, cell_y, i, cell_x, j);
          const FrameTaps<T> taps = FrameTaps<T>::at(box.frame, point.local_y, point.local_x,
                                                     problem.map.height, problem.map.width);
          if (!taps.kept()) continue;
          weight += pixel_weight(taps, sample_weights(box, point, taps), y, x, &touches);
        }
      }
      if (!touches) continue;
      if (count == kTileList) {
        *next = cell;
        return count;
      }
      list[count++] = {cell, weight * factor};
    }
  }
  return count;
}

/// Grid: (tiles, images from first_image on, slices of channels). See Note [Gather on frames].
template <class T, bool kChosen>
__global__ void __launch_bounds__(kFrameThreads, 1)
    frames_grad_features_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem, int64_t first_image) {
  using Number = acc_t<T>;
  using Entry = CellWeight<Number>;
  constexpr int kOwned = kTileOwned<Number, kChosen>;
  GLIMPSE_SHARED(FrameBox<Number>, boxes, [kTileWarps]);
  GLIMPSE_SHARED(Entry, list, [kTileWarps][32][kTileList]);
  GLIMPSE_SHARED(int32_t, listed, [kTileWarps][32]);
  GLIMPSE_SHARED(int32_t, resume, [kTileWarps][32]);  // where a list became full, or -1
  GLIMPSE_SHARED(int32_t, hit, [kFrameThreads]);      // boxes of this stretch that meet the tile
  GLIMPSE_SHARED(unsigned, ballots, [kTileWarps]);
  GLIMPSE_SHARED(int32_t, full, [kTileWarps]);

  const Level& map = problem.map;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int32_t tiles_x = (map.width - 1) / kTileWidth + 1;
  const auto tile_y = static_cast<int32_t>(blockIdx.x / static_cast<unsigned>(tiles_x));
  const auto tile_x = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(tiles_x));
  const int32_t first_y = tile_y * kTileHeight, first_x = tile_x * kTileWidth;
  const int32_t end_y = first_y + kTileHeight < map.height ? first_y + kTileHeight : map.height;
  const int32_t end_x = first_x + kTileWidth < map.width ? first_x + kTileWidth : map.width;
  const int32_t pixel_y = first_y + lane / kTileWidth, pixel_x = first_x + lane % kTileWidth;
  const int64_t image = first_image + blockIdx.y;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.z) * kTileChannels<Number, kChosen>;
  const bool nhwc = problem.layout == Layout::kNhwc;
  // What this thread owns: in kNchw one pixel in kOwned channels, in kNhwc one or two channels of
  // four pixels.
  const auto owned_pixel = [&](int i) { return nhwc ? warp * 4 + (i & 3) : lane; };
  const auto owned_channel = [&](int i) {
    return first_channel + (nhwc ? lane + 32 * (i >> 2) : warp * kOwned + i);
  };
  const FrameStrides strides(problem);
  Number sums[kOwned] = {};

  for (int64_t base = 0; base < problem.boxes; base += kFrameThreads) {
    bool meets = false;
    if (base + threadIdx.x < problem.boxes) {
      const FrameBox<Number> box = read_frame<Number>(problem, base + threadIdx.x);
      if (box.reads && box.image == image) {
        const FrameReach<Number> reach =
            FrameReach<Number>::of(box.frame, first_y, end_y - 1, first_x, end_x - 1);
        const CellRange rows =
            cells_within(box.frame.axis[0], problem.out_height, reach.low[0], reach.high[0]);
        const CellRange columns =
            cells_within(box.frame.axis[1], problem.out_width, reach.low[1], reach.high[1]);
        meets = rows.first < rows.end && columns.first < columns.end;
      }
    }
    const unsigned ballot = __ballot_sync(kFullWarp, meets);
    if (lane == 0) ballots[warp] = ballot;
    __syncthreads();
    int32_t hits = 0, place = 0;
    for (int32_t i = 0; i < kTileWarps; ++i) {
      if (i == warp) place = hits + __popc(ballot & ((1u << lane) - 1u));
      hits += __popc(ballots[i]);
    }
    if (meets) hit[place] = static_cast<int32_t>(threadIdx.x);
    resume[warp][lane] = 0;
    __syncthreads();

    // Warp 0 goes on where its box was left; all other boxes are new.
    for (int32_t first = 0; first < hits;) {
      const int32_t own = first + warp;
      int32_t count = 0, next = -1;
      if (own < hits && lane == 0) boxes[warp] = read_frame<Number>(problem, base + hit[own]);
      const int32_t begin = warp == 0 ? resume[0][lane] : 0;
      __syncthreads();
      if (own < hits && pixel_y < map.height && pixel_x < map.width) {
        count = list_cells(problem, boxes[warp], pixel_y, pixel_x, begin, list[warp][lane], &next);
      }
      listed[warp][lane] = count;
      resume[warp][lane] = next;
      const unsigned unfinished = __ballot_sync(kFullWarp, next >= 0);
      if (lane == 0) full[warp] = unfinished != 0 ? 1 : 0;
      __syncthreads();
      int32_t last = 0;
      while (last < kTileWarps - 1 && full[last] == 0) ++last;
      for (int32_t w = 0; w <= last && first + w < hits; ++w) {
        const int64_t box_offset = (base + hit[first + w]) * strides.box;
        GLIMPSE_UNROLL
        for (int i = 0; i < kOwned; ++i) {
          const int32_t pixel = owned_pixel(i);
          const int64_t channel = owned_channel(i);
          if (channel >= problem.channels) continue;
          const int64_t offset = box_offset + channel * strides.channel;
          const int32_t entries = listed[w][pixel];
          GLIMPSE_NO_UNROLL
          for (int32_t e = 0; e < entries; ++e) {
            const Entry entry = list[w][pixel][e];
            const int64_t at = offset + entry.cell * strides.cell;
            Number weight = entry.weight;
            if constexpr (kChosen) {
              const int32_t cell_y = entry.cell / problem.out_width;
              bool touches = false;
              weight = 0;
              for_chosen_sample(problem, boxes[w], cell_y, entry.cell - cell_y * problem.out_width,
                                problem.chosen[at], [&](const auto& point, const auto& taps) {
                                  weight = pixel_weight(taps, sample_weights(boxes[w], point, taps),
                                                        first_y + pixel / kTileWidth,
                                                        first_x + pixel % kTileWidth, &touches);
                                });
              if (!touches) continue;
            }
            sums[i] += weight * load_value(static_cast<const T*>(problem.pooled)[at]);
          }
        }
      }
      const bool again = full[last] != 0;
      const int32_t left_at = resume[last][lane];
      __syncthreads();
      // A pixel that is done with this box has -1 there, and lists nothing.
      if (warp == 0) resume[0][lane] = again ? left_at : 0;
      first += again ? last : kTileWarps;
    }
  }

  GLIMPSE_UNROLL
  for (int i = 0; i < kOwned; ++i) {
    const int32_t pixel = owned_pixel(i);
    const int32_t y = first_y + pixel / kTileWidth, x = first_x + pixel % kTileWidth;
    const int64_t channel = owned_channel(i);
    if (channel >= problem.channels || y >= map.height || x >= map.width) continue;
    static_cast<T*>(map.data)[image * map.stride_n + channel * map.stride_c + y * map.stride_h +
                              x * map.stride_w] = Store<T>::from(sums[i]);
  }
}

}  // namespace glimpse::cuda
