// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/frames.cuh"
#include "cuda/frames_gradients.cuh"
#include "frame_problem.h"
#include "half.h"

/// The gradient to the map of the maximum, whose samples are chosen for each channel.
namespace glimpse::cuda {

// Note [Gather of chosen samples]
// As Note [Gather on frames], but every channel of a cell has a sample of its own, so what is
// listed are cells: those with a sample that touches the tile, in the order of boxes and cells, and
// with the taps of all of their samples behind each other. A lane is a channel; it reads which
// sample is its own and finds the taps by that number. Cells with more samples than a warp has
// lanes are listed alone, and each lane evaluates its sample.
//
// A warp turns 32 samples of one box into taps at a time, its slot. The boxes of a round, one for
// each warp, are divided into slots, which warps take in turn, so small boxes share a round and a
// large one takes several.
//
// In kNchw the numbers of neighbouring channels are far apart. So a warp copies those of its
// channels for some of the listed cells to shared memory, with lanes that are cells.

/// Warps of a block, at most.
template <class Number>
constexpr int32_t kChosenWarps = sizeof(Number) == 8 ? 4 : 8;
/// Sums of a channel are so far apart: lanes are channels and each is at a pixel of its own.
constexpr int32_t kChosenPitch = 32;
constexpr int32_t kChosenSums = (kTilePixels + 1) * kChosenPitch;  // of a warp
/// Cells whose numbers a warp copies at a time, and how far apart they are: odd, so that lanes may
/// be cells or channels.
constexpr int32_t kChosenStage = 16, kChosenStagePitch = kTilePixels + 1;

/// What a cell has for a channel.
template <class T>
struct alignas(2 * sizeof(T)) ChosenValue {
  T value;
  int32_t chosen;
};
/// Copies take the place of the sums of half of the warps.
static_assert(kChosenStage * kChosenStagePitch * sizeof(ChosenValue<float>) ==
              kChosenSums * sizeof(float));

/// Warps of a block.
template <class Number>
GLIMPSE_HD int32_t chosen_warps(Layout layout) {
  return layout == Layout::kNhwc ? kChosenWarps<Number> : kChosenWarps<Number> / 2;
}

/// The cells of a box that may touch a tile.
struct ChosenCells {
  int32_t first_y, first_x, columns, count;
  int32_t samples;  // of a cell; 0: more than a slot has
  int32_t in_slot;  // cells of a slot
  int32_t slots;
};

template <class T>
__device__ __forceinline__ FrameReach<T> tile_reach(const FrameBox<T>& box,
                                                    const GatherTile& tile) {
  return FrameReach<T>::of(box.frame, tile.first_y, tile.end_y - 1, tile.first_x, tile.end_x - 1);
}

template <class T>
__device__ __forceinline__ ChosenCells chosen_cells(const FrameProblem& problem,
                                                    const FrameBox<T>& box,
                                                    const GatherTile& tile) {
  const Axis<T>&axis_y = box.frame.axis[0], &axis_x = box.frame.axis[1];
  const FrameReach<T> reach = tile_reach(box, tile);
  const CellRange rows = cells_within(axis_y, problem.out_height, reach.low[0], reach.high[0]);
  const CellRange columns = cells_within(axis_x, problem.out_width, reach.low[1], reach.high[1]);
  const int64_t samples = int64_t{axis_y.samples} * axis_x.samples;
  ChosenCells cells;
  cells.first_y = rows.first;
  cells.first_x = columns.first;
  cells.columns = columns.end > columns.first ? columns.end - columns.first : 0;
  cells.count = rows.end > rows.first ? (rows.end - rows.first) * cells.columns : 0;
  cells.samples = samples <= 32 ? static_cast<int32_t>(samples) : 0;
  cells.in_slot = cells.samples > 0 ? 32 / cells.samples : 32;
  cells.slots = cells.count > 0 ? (cells.count - 1) / cells.in_slot + 1 : 0;
  return cells;
}

/// A listed cell.
struct alignas(16) ChosenCell {
  int64_t at;  // in `pooled`, in channel 0
  int32_t cell;
  uint8_t box;      // of the round
  uint8_t samples;  // that have taps; 0: none has
  uint8_t first;    // the taps of the first one
};

/// Where the taps of a sample go. Those outside of the tile go to a pixel that nobody reads.
struct alignas(8) ChosenPlaces {
  uint16_t sum[4];  // of the first channel

  __device__ __forceinline__ static ChosenPlaces outside() {
    constexpr uint16_t kOutside = kTilePixels * kChosenPitch;
    return {{kOutside, kOutside, kOutside, kOutside}};
  }
  /// Whether a tap is inside.
  template <class T>
  __device__ __forceinline__ bool place(const GatherTile& tile, const FrameTaps<T>& taps) {
    bool touches = false;
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
      const bool has = (taps.y.count == 2 || i / 2 == 0) && (taps.x.count == 2 || i % 2 == 0);
      const int32_t y = taps.y.pixel[i / 2], x = taps.x.pixel[i % 2];
      const bool inside =
          has && y >= tile.first_y && y < tile.end_y && x >= tile.first_x && x < tile.end_x;
      const int32_t pixel =
          inside ? (y - tile.first_y) * kTileWidth + x - tile.first_x : kTilePixels;
      sum[i] = static_cast<uint16_t>(pixel * kChosenPitch);
      touches = touches || inside;
    }
    return touches;
  }
};
template <class T>
struct alignas(4 * sizeof(T)) ChosenWeights {
  TapWeights<T> of;
};

/// Adds a value at the taps of a sample to the sums of a channel.
template <class T>
__device__ __forceinline__ void add_at(T* own, const TapWeights<T>& weights,
                                       const ChosenPlaces& places, T value) {
  // Places differ but for the one that nobody reads.
  T sum[4];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < 4; ++i) sum[i] = own[places.sum[i]];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < 4; ++i) own[places.sum[i]] = sum[i] + weights.value[i] * value;
}

/// Grid: (tiles, images from first_image on, slices of channels). See Note [Gather of chosen
/// samples].
template <class T>
__global__ void __launch_bounds__(32 * kChosenWarps<acc_t<T>>, 3)
    frames_grad_chosen_kernel(GLIMPSE_GRID_CONSTANT FrameProblem problem, int64_t first_image) {
  using Number = acc_t<T>;
  constexpr int32_t kWarps = kChosenWarps<Number>;
  GLIMPSE_SHARED(Number, sums, [kWarps * kChosenSums]);  // and copies
  GLIMPSE_SHARED(ChosenWeights<Number>, weights, [32 * kWarps]);
  GLIMPSE_SHARED(ChosenPlaces, places, [32 * kWarps]);
  GLIMPSE_SHARED(ChosenCell, list, [32 * kWarps]);
  GLIMPSE_SHARED(FrameBox<Number>, boxes, [kWarps]);
  GLIMPSE_SHARED(ChosenCells, cells_of, [kWarps]);
  GLIMPSE_SHARED(int32_t, hit, [32 * kWarps]);  // boxes of this stretch that meet the tile
  GLIMPSE_SHARED(unsigned, ballots, [kWarps]);
  GLIMPSE_SHARED(int32_t, listed, [kWarps]);

  const Level& map = problem.map;
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const unsigned lower_lanes = (1u << lane) - 1u;
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
  const int64_t channel = first_channel + lane, channels_left = problem.channels - first_channel;
  const int32_t channels = channels_left < 32 ? static_cast<int32_t>(channels_left) : 32;
  const FrameStrides strides(problem);
  const auto* pooled = static_cast<const T*>(problem.pooled);
  Number* own = sums + warp * kChosenSums + lane;
  auto* stage = reinterpret_cast<ChosenValue<Number>*>(sums + warps * kChosenSums) +
                warp * (kChosenStage * kChosenStagePitch);
  for (int32_t i = 0; i <= kTilePixels; ++i) own[i * kChosenPitch] = 0;

  for (int64_t base = 0; base < problem.boxes; base += threads) {
    bool meets = false;
    if (base + threadIdx.x < problem.boxes) {
      const FrameBox<Number> box = read_frame<Number>(problem, base + threadIdx.x);
      const FrameReach<Number> reach = tile_reach(box, tile);
      const Axis<Number>&axis_y = box.frame.axis[0], &axis_x = box.frame.axis[1];
      meets = box.reads && box.image == image &&
              may_reach(axis_y, problem.out_height, reach.low[0], reach.high[0]) &&
              may_reach(axis_x, problem.out_width, reach.low[1], reach.high[1]);
    }
    const unsigned ballot = __ballot_sync(kFullWarp, meets);
    if (lane == 0) ballots[warp] = ballot;
    __syncthreads();
    int32_t hits = 0, place = 0;
    for (int32_t i = 0; i < warps; ++i) {
      if (i == warp) place = hits + __popc(ballot & lower_lanes);
      hits += __popc(ballots[i]);
    }
    if (meets) hit[place] = static_cast<int32_t>(threadIdx.x);
    __syncthreads();

    for (int32_t first = 0; first < hits; first += warps) {
      const int32_t taken = hits - first < warps ? hits - first : warps;
      if (static_cast<int32_t>(threadIdx.x) < taken) {
        const FrameBox<Number> box = read_frame<Number>(problem, base + hit[first + threadIdx.x]);
        boxes[threadIdx.x] = box;
        cells_of[threadIdx.x] = chosen_cells(problem, box, tile);
      }
      __syncthreads();
      int64_t slots = 0;
      for (int32_t i = 0; i < taken; ++i) slots += cells_of[i].slots;
      for (int64_t slot = 0; slot < slots; slot += warps) {
        int64_t number = slot + warp;  // in its box
        int32_t at = 0;
        for (; at < taken; ++at) {
          const int32_t of_box = cells_of[at].slots;
          if (number < of_box) break;
          number -= of_box;
        }
        bool touches = false;
        int32_t cell = 0, group = 0, samples = 1;  // the samples of a cell are a group of lanes
        if (at < taken) {
          const FrameBox<Number>& box = boxes[at];
          const ChosenCells cells = cells_of[at];
          samples = cells.samples > 0 ? cells.samples : 1;
          group = lane / samples;
          const auto index = static_cast<int32_t>(number) * cells.in_slot + group;
          if (group < cells.in_slot && index < cells.count) {
            const int32_t row = index / cells.columns;
            const int32_t y = cells.first_y + row;
            const int32_t x = cells.first_x + index - row * cells.columns;
            cell = y * problem.out_width + x;
            if (cells.samples > 0) {
              ChosenPlaces found = ChosenPlaces::outside();
              TapWeights<Number> weight{};
              for_chosen_sample(problem, box, y, x, lane - group * samples,
                                [&](const auto& point, const auto& taps) {
                                  touches = found.place(tile, taps);
                                  weight = sample_weights(box, point, taps);
                                });
              places[threadIdx.x] = found;
              weights[threadIdx.x] = {weight};
            } else {
              const FrameReach<Number> reach = tile_reach(box, tile);
              const SampleRange in_y =
                  samples_within(box.frame.axis[0], y, reach.low[0], reach.high[0]);
              const SampleRange in_x =
                  samples_within(box.frame.axis[1], x, reach.low[1], reach.high[1]);
              touches = in_y.first < in_y.end && in_x.first < in_x.end;
            }
          }
        }
        const unsigned touching = __ballot_sync(kFullWarp, touches);
        const int32_t group_lane = group * samples;
        const bool lists =
            lane == group_lane && ((touching >> group_lane) & (0xffffffffu >> (32 - samples))) != 0;
        const unsigned lists_ballot = __ballot_sync(kFullWarp, lists);
        if (lane == 0) listed[warp] = __popc(lists_ballot);
        __syncthreads();
        int32_t count = 0, listed_at = 0;
        for (int32_t i = 0; i < warps; ++i) {
          if (i == warp) listed_at = count + __popc(lists_ballot & lower_lanes);
          count += listed[i];
        }
        if (lists) {
          ChosenCell entry;
          entry.at = (base + hit[first + at]) * strides.box + cell * strides.cell;
          entry.cell = cell;
          entry.box = static_cast<uint8_t>(at);
          entry.samples = static_cast<uint8_t>(cells_of[at].samples);
          entry.first = static_cast<uint8_t>(threadIdx.x);
          list[listed_at] = entry;
        }
        __syncthreads();

        for (int32_t begin = 0; begin < count && channels > 0; begin += kChosenStage) {
          const int32_t some = count - begin < kChosenStage ? count - begin : kChosenStage;
          if (!nhwc) {
            // Half of the cells leave half of the lanes to other channels.
            const int32_t lanes_log2 = some > 8 ? 4 : some > 4 ? 3 : 2;
            const int32_t i = lane & ((1 << lanes_log2) - 1), step = 32 >> lanes_log2;
            if (i < some) {
              int32_t c = lane >> lanes_log2;
              int64_t from = list[begin + i].at + (first_channel + c) * strides.channel;
              for (; c < channels; c += step, from += step * strides.channel) {
                stage[i * kChosenStagePitch + c] = {load_value(pooled[from]), problem.chosen[from]};
              }
            }
            __syncwarp();
          }
          if (lane < channels) {
            ChosenValue<Number> next{};
            const auto fetch = [&](int32_t i) {
              if (nhwc) {
                const int64_t from = list[begin + i].at + channel;
                next = {load_value(pooled[from]), problem.chosen[from]};
              } else {
                next = stage[i * kChosenStagePitch + lane];
              }
            };
            fetch(0);
            GLIMPSE_NO_UNROLL
            for (int32_t i = 0; i < some; ++i) {
              const ChosenCell entry = list[begin + i];
              const ChosenValue<Number> here = next;
              if (i + 1 < some) fetch(i + 1);
              if (entry.samples > 0) {
                if (here.chosen < 0 || here.chosen >= entry.samples) continue;
                const int32_t taps = entry.first + here.chosen;
                add_at(own, weights[taps].of, places[taps], here.value);
                continue;
              }
              const FrameBox<Number>& box = boxes[entry.box];
              const int32_t y = entry.cell / problem.out_width;
              for_chosen_sample(problem, box, y, entry.cell - y * problem.out_width, here.chosen,
                                [&](const auto& point, const auto& taps) {
                                  ChosenPlaces found;
                                  if (!found.place(tile, taps)) return;
                                  add_at(own, sample_weights(box, point, taps), found, here.value);
                                });
            }
          }
          if (!nhwc) __syncwarp();
        }
        __syncthreads();
      }
    }
  }

  T* target = static_cast<T*>(map.data) + image * map.stride_n;
  if (nhwc) {
    if (lane >= channels) return;
    target += channel * map.stride_c + tile.first_y * map.stride_h + tile.first_x * map.stride_w;
    const int32_t width = tile.end_x - tile.first_x;
    GLIMPSE_NO_UNROLL
    for (int32_t y = 0; y < tile.end_y - tile.first_y; ++y, target += map.stride_h) {
      T* pixel = target;
      GLIMPSE_UNROLL
      for (int32_t x = 0; x < kTileWidth; ++x, pixel += map.stride_w) {
        if (x < width) *pixel = Store<T>::from(own[(y * kTileWidth + x) * kChosenPitch]);
      }
    }
    return;
  }
  // Sums of a pixel turn by its number, so that lanes may be pixels.
  GLIMPSE_NO_UNROLL
  for (int32_t pixel = 0; pixel < kTilePixels; pixel += 4) {
    Number sum[4];
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 4; ++i) sum[i] = own[(pixel + i) * kChosenPitch];
    __syncwarp();
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
      own[(pixel + i) * kChosenPitch - lane + ((lane + pixel + i) & 31)] = sum[i];
    }
  }
  __syncwarp();
  const int32_t y = tile.first_y + lane / kTileWidth, x = tile.first_x + lane % kTileWidth;
  if (y >= tile.end_y || x >= tile.end_x) return;
  target += first_channel * map.stride_c + y * map.stride_h + x * map.stride_w;
  const Number* turned = own - lane + lane * kChosenPitch;
  GLIMPSE_NO_UNROLL
  for (int32_t c = 0; c < channels; ++c) {
    *target = Store<T>::from(turned[(c + lane) & 31]);
    target += map.stride_c;
  }
}

}  // namespace glimpse::cuda
