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
// A block owns a tile of pixels, in 32 channels for each of its warps. It walks all boxes; those
// that can touch the tile are taken several at a time, one by each warp, whose lanes turn the
// samples in reach into taps and list those that touch the tile. Then every warp adds all listed
// samples to the sums of its own channels, in the order of boxes, cells and samples. A list that is
// too short for its samples ends the round: boxes up to it are added, and the next round goes on
// there.
//
// Sums lie in shared memory, because which pixel a sample touches is known only as it is read. A
// lane is a channel, and no other lane reads or writes its sums.

constexpr int32_t kTileWidth = 8, kTileHeight = 4;
constexpr int32_t kTilePixels = kTileWidth * kTileHeight;
/// Sums of a channel are so far apart: odd, so that lanes may be channels or pixels.
constexpr int32_t kTilePitch = 33;
/// Samples that a warp lists.
constexpr int32_t kGatherList = 32;
/// Warps of a block, at most.
template <class Number>
constexpr int32_t kGatherWarps = sizeof(Number) == 8 ? 4 : 8;

/// A sample with the sums of its taps, those outside of the tile at a place that nobody reads.
template <class T>
struct alignas(16) GatherEntry {
  T weight[4];
  int32_t cell;
  uint16_t place[4];
};

/// Samples of one direction that may be in reach, counted over all cells.
struct SampleLines {
  int64_t first, count;

  template <class T>
  __device__ __forceinline__ static SampleLines within(const Axis<T>& axis, int32_t cells, T low,
                                                       T high) {
    CellRange range = cells_within(axis, cells, low, high);
    SampleRange begin{0, 0}, end{0, 0};
    GLIMPSE_NO_UNROLL
    for (; range.first < range.end; ++range.first) {
      begin = samples_within(axis, range.first, low, high);
      if (begin.first < begin.end) break;
    }
    GLIMPSE_NO_UNROLL
    for (; range.first < range.end; --range.end) {
      end = samples_within(axis, range.end - 1, low, high);
      if (end.first < end.end) break;
    }
    if (range.first >= range.end) return {0, 0};
    const int64_t first = int64_t{range.first} * axis.samples + begin.first;
    return {first, int64_t{range.end - 1} * axis.samples + end.end - first};
  }
};

/// Quotient and remainder of numbers that are not negative, nearly always of 32 bits.
__device__ __forceinline__ int64_t divide(int64_t number, int64_t by, int64_t* remainder) {
  if ((number | by) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(number) / static_cast<uint32_t>(by);
    *remainder = static_cast<uint32_t>(number) - quotient * static_cast<uint32_t>(by);
    return quotient;
  }
  *remainder = number % by;
  return number / by;
}

/// By a warp: lists the samples of a box, from number `begin` of those in reach on, that touch the
/// tile of pixels from (tile.first_y, tile.first_x) on. Returns how many, and in `next` the number
/// where the list became full, or -1.
struct GatherTile {
  int32_t first_y, end_y, first_x, end_x;
};
template <class T>
__device__ __forceinline__ int32_t list_samples(const FrameProblem& problem, const FrameBox<T>& box,
                                                const GatherTile& tile, int64_t begin,
                                                GatherEntry<T>* list, int64_t* next) {
  const Axis<T>&axis_y = box.frame.axis[0], &axis_x = box.frame.axis[1];
  const FrameReach<T> reach =
      FrameReach<T>::of(box.frame, tile.first_y, tile.end_y - 1, tile.first_x, tile.end_x - 1);
  const auto y = SampleLines::within(axis_y, problem.out_height, reach.low[0], reach.high[0]);
  const auto x = SampleLines::within(axis_x, problem.out_width, reach.low[1], reach.high[1]);
  // Where all samples of a cell are in reach they follow each other.
  const bool whole = y.count % axis_y.samples == 0 && x.count % axis_x.samples == 0 &&
                     y.first % axis_y.samples == 0 && x.first % axis_x.samples == 0;
  const int64_t group_y = whole ? axis_y.samples : 1, group_x = whole ? axis_x.samples : 1;
  const int64_t groups_x = x.count / group_x, total = y.count * x.count;
  const T factor = frame_factor(box.frame);
  const auto lane = static_cast<int32_t>(threadIdx.x & 31);
  int32_t count = 0;
  *next = -1;
  GLIMPSE_NO_UNROLL
  for (int64_t base = begin; base < total; base += 32) {
    GatherEntry<T> entry;
    bool touches = false;
    if (base + lane < total) {
      int64_t within, in_x, row_x, sample_y, sample_x;
      const int64_t group = divide(base + lane, group_y * group_x, &within);
      const int64_t in_y = divide(within, group_x, &in_x);
      const int64_t row_y = divide(group, groups_x, &row_x);
      const auto cell_y =
          static_cast<int32_t>(divide(y.first + row_y * group_y + in_y, axis_y.samples, &sample_y));
      const auto cell_x =
          static_cast<int32_t>(divide(x.first + row_x * group_x + in_x, axis_x.samples, &sample_x));
      const FramePoint<T> point = frame_point(box.frame, cell_y, static_cast<int32_t>(sample_y),
                                              cell_x, static_cast<int32_t>(sample_x));
      const FrameTaps<T> taps = FrameTaps<T>::at(box.frame, point.local_y, point.local_x,
                                                 problem.map.height, problem.map.width);
      if (taps.kept()) {
        const TapWeights<T> weights = sample_weights(box, point, taps);
        entry.cell = cell_y * problem.out_width + cell_x;
        GLIMPSE_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
          const bool has = (taps.y.count == 2 || i / 2 == 0) && (taps.x.count == 2 || i % 2 == 0);
          const int32_t pixel_y = taps.y.pixel[i / 2], pixel_x = taps.x.pixel[i % 2];
          const bool inside = has && pixel_y >= tile.first_y && pixel_y < tile.end_y &&
                              pixel_x >= tile.first_x && pixel_x < tile.end_x;
          const int32_t pixel =
              inside ? (pixel_y - tile.first_y) * kTileWidth + pixel_x - tile.first_x : kTilePixels;
          entry.place[i] = static_cast<uint16_t>(pixel * kTilePitch);
          entry.weight[i] = inside ? weights.value[i] * factor : T(0);
          touches = touches || inside;
        }
      }
    }
    const unsigned ballot = __ballot_sync(kFullWarp, touches);
    if (count + __popc(ballot) > kGatherList) {
      *next = base;
      break;
    }
    if (touches) list[count + __popc(ballot & ((1u << lane) - 1u))] = entry;
    count += __popc(ballot);
  }
  return count;
}

/// Grid: (tiles, images from first_image on, slices of channels). See Note [Gather on frames].
template <class T>
__global__ void __launch_bounds__(32 * kGatherWarps<acc_t<T>>, 2)
    frames_grad_features_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem, int64_t first_image) {
  using Number = acc_t<T>;
  constexpr int32_t kWarps = kGatherWarps<Number>;
  GLIMPSE_SHARED(FrameBox<Number>, boxes, [kWarps]);
  GLIMPSE_SHARED(GatherEntry<Number>, list, [kWarps][kGatherList]);
  GLIMPSE_SHARED(Number, sums, [kWarps][(kTilePixels + 1) * kTilePitch]);
  GLIMPSE_SHARED(int64_t, resume, [kWarps]);  // where a list became full, or -1
  GLIMPSE_SHARED(int32_t, listed, [kWarps]);
  GLIMPSE_SHARED(int32_t, hit, [32 * kWarps]);  // boxes of this stretch that meet the tile
  GLIMPSE_SHARED(unsigned, ballots, [kWarps]);

  const Level& map = problem.map;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const auto threads = static_cast<int32_t>(blockDim.x);
  const int32_t warps = threads / 32;
  const int32_t tiles_x = (map.width - 1) / kTileWidth + 1;
  const auto tile_y = static_cast<int32_t>(blockIdx.x / static_cast<unsigned>(tiles_x));
  const auto tile_x = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(tiles_x));
  GatherTile tile;
  tile.first_y = tile_y * kTileHeight;
  tile.first_x = tile_x * kTileWidth;
  tile.end_y = tile.first_y + kTileHeight < map.height ? tile.first_y + kTileHeight : map.height;
  tile.end_x = tile.first_x + kTileWidth < map.width ? tile.first_x + kTileWidth : map.width;
  const int64_t image = first_image + blockIdx.y;
  const int64_t first_channel = (int64_t{blockIdx.z} * warps + warp) * 32;
  const int64_t channel = first_channel + lane;
  const FrameStrides strides(problem);
  const T* pooled = static_cast<const T*>(problem.pooled) + channel * strides.channel;
  const auto cell_stride =
      static_cast<int32_t>(strides.cell);  // channels, of which a grid has less
  Number* own = sums[warp] + lane;
  for (int32_t i = 0; i <= kTilePixels; ++i) own[i * kTilePitch] = 0;

  for (int64_t base = 0; base < problem.boxes; base += threads) {
    bool meets = false;
    if (base + threadIdx.x < problem.boxes) {
      const FrameBox<Number> box = read_frame<Number>(problem, base + threadIdx.x);
      if (box.reads && box.image == image) {
        const auto reach = FrameReach<Number>::of(box.frame, tile.first_y, tile.end_y - 1,
                                                  tile.first_x, tile.end_x - 1);
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
    for (int32_t i = 0; i < warps; ++i) {
      if (i == warp) place = hits + __popc(ballot & ((1u << lane) - 1u));
      hits += __popc(ballots[i]);
    }
    if (meets) hit[place] = static_cast<int32_t>(threadIdx.x);
    __syncthreads();

    // Warp 0 goes on where its box was left; all other boxes are new.
    int64_t left_at = 0;
    for (int32_t first = 0; first < hits;) {
      if (first + warp < hits) {
        if (lane == 0) boxes[warp] = read_frame<Number>(problem, base + hit[first + warp]);
        __syncwarp();
        int64_t next;
        const int32_t count =
            list_samples(problem, boxes[warp], tile, warp == 0 ? left_at : 0, list[warp], &next);
        if (lane == 0) {
          listed[warp] = count;
          resume[warp] = next;
        }
      }
      __syncthreads();
      const int32_t taken = hits - first < warps ? hits - first : warps;
      int32_t last = 0;
      while (last < taken - 1 && resume[last] < 0) ++last;
      left_at = resume[last];
      if (channel < problem.channels) {
        GLIMPSE_NO_UNROLL
        for (int32_t w = 0; w <= last; ++w) {
          const T* grad = pooled + (base + hit[first + w]) * strides.box;
          const int32_t count = listed[w];
          int32_t cell = -1;
          Number value = 0;
          GLIMPSE_NO_UNROLL
          for (int32_t e = 0; e < count; ++e) {
            const GatherEntry<Number> entry = list[w][e];
            if (entry.cell != cell) {
              cell = entry.cell;
              value = load_value(grad[int64_t{cell} * cell_stride]);
            }
            // Places differ but for the one that nobody reads.
            Number sum[4];
            GLIMPSE_UNROLL
            for (int32_t i = 0; i < 4; ++i) sum[i] = own[entry.place[i]];
            GLIMPSE_UNROLL
            for (int32_t i = 0; i < 4; ++i) own[entry.place[i]] = sum[i] + entry.weight[i] * value;
          }
        }
      }
      first += left_at >= 0 ? last : warps;
      if (left_at < 0) left_at = 0;
      __syncthreads();
    }
  }

  T* target = static_cast<T*>(map.data) + image * map.stride_n;
  if (problem.layout == Layout::kNhwc) {
    if (channel >= problem.channels) return;
    target += channel * map.stride_c + tile.first_y * map.stride_h + tile.first_x * map.stride_w;
    const int32_t width = tile.end_x - tile.first_x;
    GLIMPSE_NO_UNROLL
    for (int32_t y = 0; y < tile.end_y - tile.first_y; ++y, target += map.stride_h) {
      T* pixel = target;
      GLIMPSE_UNROLL
      for (int32_t x = 0; x < kTileWidth; ++x, pixel += map.stride_w) {
        if (x < width) *pixel = Store<T>::from(own[(y * kTileWidth + x) * kTilePitch]);
      }
    }
    return;
  }
  __syncwarp();
  const int32_t y = tile.first_y + lane / kTileWidth, x = tile.first_x + lane % kTileWidth;
  if (y >= tile.end_y || x >= tile.end_x) return;
  target += first_channel * map.stride_c + y * map.stride_h + x * map.stride_w;
  const int64_t left = problem.channels - first_channel;
  const int32_t channels = left < 32 ? static_cast<int32_t>(left) : 32;
  GLIMPSE_NO_UNROLL
  for (int32_t c = 0; c < channels; ++c) {
    *target = Store<T>::from(sums[warp][lane * kTilePitch + c]);
    target += map.stride_c;
  }
}

}  // namespace glimpse::cuda
