// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grad_features.cuh"

namespace glimpse::cuda {

// Note [Gather of points]
// A point is a box of one cell and one sample: four pixels at most, and an image has thousands of
// them. Looking at each of them in each tile would take longer than adding them. So the first
// kernel leaves, beside the pixels and weights of each point, sets of points as bits: one set for
// each row of pixels, and one for each column of tiles. A warp of the second kernel owns a row of
// pixels of one tile, and the points that touch it are those in both sets: 32 of them are found, in
// their order, by one `and`. The warps of a block do not wait for each other.
//
// Terms and their order are those of Note [Gather backward], so the bits are, too.

constexpr int32_t kPointColumns = 8;  // of a tile

/// A row of kPointColumns pixels in each warp, kVector times 32 channels in it.
template <int32_t kVector>
using PointTile = Tile<float, kPointColumns, kVector, (kVector > 2 ? 3 : 4)>;

/// The first pixel of a point, and the weights there and one pixel further; 0 where there is none.
struct alignas(8) PointPlace {
  int32_t y, x;
};
struct alignas(16) PointWeights {
  float y[2], x[2];
};

/// Sizes, and what the first kernel leaves for the second in Problem::workspace. Made at launch.
struct PointSets {
  int64_t points;        // of each image, which has those from image * points on
  int32_t height;        // sets of rows come first
  int32_t tile_columns;  // those of the columns of tiles follow
  int64_t words;         // of 32 points, in each set; a multiple of kSetWords
  PointWeights* weights;
  PointPlace* place;
  uint32_t* set;

  static constexpr int32_t kSetWords = 4;  // that a lane reads at once

  explicit PointSets(const Problem& problem) {
    const bool by_rule = problem.image_index == nullptr && problem.image_column == 0;
    points = by_rule && problem.boxes > 0 ? problem.boxes_per_image : problem.boxes;
    height = problem.level[0].height;
    tile_columns = (problem.level[0].width + kPointColumns - 1) / kPointColumns;
    words = (points + 32 * kSetWords - 1) / (32 * kSetWords) * kSetWords;
    weights = static_cast<PointWeights*>(problem.workspace);
    set = reinterpret_cast<uint32_t*>(weights + problem.boxes);
    place = reinterpret_cast<PointPlace*>(set + problem.batch * sets() * words);
  }

  GLIMPSE_HD int64_t sets() const { return int64_t{height} + tile_columns; }  // of an image

  size_t bytes(const Problem& problem) const {
    return static_cast<size_t>(problem.boxes) * (sizeof(PointWeights) + sizeof(PointPlace)) +
           static_cast<size_t>(problem.batch * sets() * words) * sizeof(uint32_t);
  }
};

// -------------------------------------------------------------------------------- sets of points

/// Both weights of a point along one axis, and the first pixel.
struct PointTaps {
  int32_t pixel;
  float weight[2];

  /// Pixels with a weight.
  __device__ __forceinline__ Cells pixels() const {
    return {weight[0] != 0 ? pixel : pixel + 1, weight[1] != 0 ? pixel + 2 : pixel + 1};
  }
};

__device__ __forceinline__ PointTaps point_taps(const Problem& problem, const Box<float>& box,
                                                int32_t direction) {
  const BoxAxis<float> line = box_axis(problem, box, direction);
  PointTaps found = {0, {0, 0}};
  if (line.axis.samples == 0) return found;
  const Taps<float> taps = sample_taps(problem.op, line, 0, 0);
  found.pixel = taps.pixel[0];
  if (taps.count > 0) found.weight[0] = taps.weight[0];
  if (taps.count > 1) found.weight[1] = taps.weight[1];
  return found;
}

/// Bits first - base .. end - base - 1, as far as they are bits of a word.
__device__ __forceinline__ uint32_t bits_of(Cells range, int32_t base) {
  const int32_t low = range.first > base ? range.first - base : 0;
  const int32_t high = range.end - base < 32 ? range.end - base : 32;
  return low < high ? kFullWarp >> (32 - (high - low)) << low : 0;
}

/// Lane i gets bit i of all lanes.
__device__ __forceinline__ uint32_t turn_bits(uint32_t bits) {
  uint32_t low = 0x0000ffffu;
  GLIMPSE_UNROLL
  for (int32_t step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, bits, step);
    bits = (threadIdx.x & step) == 0 ? (bits & low) | (other & low) << step
                                     : (bits & ~low) | (other & ~low) >> step;
    low ^= low << step / 2;
  }
  return bits;
}

/// Writes a word of each of `count` sets: bit i is whether lane i has the number of the set among
/// `own`. All lanes of a warp call it.
__device__ __forceinline__ void write_sets(Cells own, int32_t count, int64_t words,
                                           uint32_t* word) {
  const auto lane = static_cast<int32_t>(threadIdx.x & 31);
  GLIMPSE_NO_UNROLL
  for (int32_t base = 0; base < count; base += 32) {
    uint32_t bits = bits_of(own, base);
    if (__ballot_sync(kFullWarp, bits != 0) != 0) bits = turn_bits(bits);
    if (base + lane < count) word[(base + lane) * words] = bits;
  }
}

constexpr int32_t kPointThreads = 128;

/// Warp: 32 points of one image.
__global__ void __launch_bounds__(kPointThreads, 4)
    prepare_points_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                          GLIMPSE_GRID_CONSTANT PointSets sets) {
  const auto lane = static_cast<int32_t>(threadIdx.x & 31);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x / 32;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  for (int64_t i = first; i < problem.batch * sets.words; i += stride) {
    int32_t word;
    const int64_t image = split(i, static_cast<int32_t>(sets.words), &word);
    const int64_t point = int64_t{word} * 32 + lane;
    PointTaps y = {0, {0, 0}}, x = {0, {0, 0}};
    if (point < sets.points) {
      const int64_t k = image * sets.points + point;
      const Box<float> box = read_box<float>(problem, k);
      if (box.level >= 0) {
        y = point_taps(problem, box, kY);
        x = point_taps(problem, box, kX);
      }
      sets.place[k] = {y.pixel, x.pixel};
      sets.weights[k] = {{y.weight[0], y.weight[1]}, {x.weight[0], x.weight[1]}};
    }
    Cells rows = y.pixels(), columns = x.pixels();
    columns.first /= kPointColumns;
    columns.end = (columns.end + kPointColumns - 1) / kPointColumns;
    // Where a pixel without a weight lies in another tile, or no pixel has one.
    if (x.weight[0] == 0 && x.weight[1] == 0) columns = {0, 0};
    uint32_t* set = sets.set + image * sets.sets() * sets.words + word;
    write_sets(rows, sets.height, sets.words, set);
    write_sets(columns, sets.tile_columns, sets.words, set + sets.height * sets.words);
  }
}

// ---------------------------------------------------------------------------------------- sums

/// What a warp knows of the points that it adds next; in shared memory.
struct PointQueue {
  static constexpr int32_t kAtOnce = 32;  // points that are added together
  static constexpr uint32_t kRoom = 256;  // a power of two: kAtOnce - 1 and those of kSetWords

  /// A point as the row of pixels of this warp sees it.
  struct alignas(16) Visit {
    float row;        // weight along y
    float low, high;  // weights along x: of `column` of the tile, and of the one behind it
    int32_t column;
  };

  Visit visit[kAtOnce];
  alignas(16) int32_t point[kAtOnce];  // of the visits
  int32_t waiting[kRoom];              // points in their order, as a ring
};

/// Adds the product of a gradient and its weight along y to two neighbouring pixels, the first of
/// which is one of kCount from kFirst on. Found by bisection, so that sums stay in registers.
template <class Tile, int32_t kFirst, int32_t kCount>
__device__ __forceinline__ void add_to_columns(const float (&product)[Tile::kVector],
                                               const PointQueue::Visit& visit,
                                               TileSums<Tile>& sums) {
  if constexpr (kCount > 1) {
    constexpr int32_t kHalf = kCount / 2;
    if (visit.column < kFirst + kHalf) {
      add_to_columns<Tile, kFirst, kHalf>(product, visit, sums);
    } else {
      add_to_columns<Tile, kFirst + kHalf, kCount - kHalf>(product, visit, sums);
    }
  } else {
    const auto add = [&](float (&pixel)[Tile::kVector], float weight) {
      // Not times zero, for gradients that are infinite or NaN.
      if (weight == 0) return;
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) pixel[v] += weight * product[v];
    };
    add(sums.value[kFirst], visit.low);
    if constexpr (kFirst + 1 < Tile::kColumns) add(sums.value[kFirst + 1], visit.high);
  }
}

/// Adds the `count` points that wait from `head` on to the row of pixels of this warp.
template <class T, class Tile>
__device__ __forceinline__ void add_points(const Problem& problem, const PointSets& sets,
                                           const TilePlace& tile, uint32_t head, int32_t count,
                                           PointQueue& queue, TileSums<Tile>& sums) {
  constexpr int32_t kLoads = 4;  // points whose gradients are loaded together
  const auto lane = static_cast<int32_t>(threadIdx.x & 31);
  const int64_t first_point = tile.image * sets.points;
  __syncwarp();  // what waits has been written, and the last visits have been read
  {
    PointQueue::Visit visit = {0, 0, 0, 0};
    int32_t point = 0;  // beyond the last one: any point, with weights of 0
    if (lane < count) {
      point = queue.waiting[(head + static_cast<uint32_t>(lane)) % PointQueue::kRoom];
      const int64_t k = first_point + point;
      const int2 place = load_readonly(reinterpret_cast<const int2*>(sets.place) + k);
      const float4 weights = load_readonly(reinterpret_cast<const float4*>(sets.weights) + k);
      const int32_t column = place.y - tile.x;
      const int32_t row = tile.y + static_cast<int32_t>(threadIdx.x >> 5);
      visit.row = place.x == row ? weights.x : weights.y;
      visit.low = column < 0 ? weights.w : weights.z;
      visit.high = column < 0 || column == Tile::kColumns - 1 ? 0 : weights.w;
      visit.column = column < 0 ? 0 : column;
    }
    queue.visit[lane] = visit;
    queue.point[lane] = point;
  }
  __syncwarp();
  const int64_t channel = int64_t{tile.slice} * Tile::kChannels + lane;
  const T* grad = static_cast<const T*>(problem.pooled) + first_point * problem.channels + channel;
  bool has[Tile::kVector];  // which of the channels of this lane there are
  GLIMPSE_UNROLL
  for (int32_t v = 0; v < Tile::kVector; ++v) has[v] = channel + 32 * v < problem.channels;
  const auto stride = static_cast<int32_t>(problem.channels * static_cast<int64_t>(sizeof(T)));
  GLIMPSE_NO_UNROLL
  for (int32_t i = 0; i < count; i += kLoads) {
    const int4 four = *reinterpret_cast<const int4*>(queue.point + i);
    const int32_t point[kLoads] = {four.x, four.y, four.z, four.w};
    Pack<T, 1> loaded[kLoads][Tile::kVector];
    GLIMPSE_UNROLL
    for (int32_t j = 0; j < kLoads; ++j) {
      const auto* own = reinterpret_cast<const T*>(reinterpret_cast<const char*>(grad) +
                                                   int64_t{point[j]} * stride);
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) {
        loaded[j][v] = has[v] ? Pack<T, 1>::load(own + 32 * v) : Pack<T, 1>::zero();
      }
    }
    GLIMPSE_UNROLL
    for (int32_t j = 0; j < kLoads; ++j) {
      const float4 words = *reinterpret_cast<const float4*>(queue.visit + i + j);
      PointQueue::Visit visit;
      memcpy(&visit, &words, sizeof(visit));
      float product[Tile::kVector];
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) {
        loaded[j][v].unpack(product + v);
        product[v] *= visit.row;
      }
      add_to_columns<Tile, 0, Tile::kColumns>(product, visit, sums);
    }
  }
}

/// Adds all points that touch the row of pixels of this warp.
template <class T, class Tile>
__device__ __forceinline__ void add_row(const Problem& problem, const PointSets& sets,
                                        const TilePlace& tile, PointQueue& queue,
                                        TileSums<Tile>& sums) {
  const auto lane = static_cast<int32_t>(threadIdx.x & 31),
             warp = static_cast<int32_t>(threadIdx.x >> 5);
  const auto quads = static_cast<int32_t>(sets.words / PointSets::kSetWords);
  const auto* quad_of_sets = reinterpret_cast<const uint4*>(sets.set);
  const auto first_set = static_cast<int32_t>(tile.image * sets.sets());
  const int32_t in_row = (first_set + tile.y + warp) * quads;
  const int32_t in_column = (first_set + sets.height + tile.x / kPointColumns) * quads;
  int32_t next = lane;  // quad of words
  uint32_t head = 0;    // of what waits
  int32_t count = 0;
  int32_t enough = PointQueue::kAtOnce;
  do {
    uint32_t own[PointSets::kSetWords] = {};
    uint32_t pending = 0;
    GLIMPSE_NO_UNROLL
    while (pending == 0 && next - lane < quads) {
      uint32_t both = 0;
      if (next < quads) {
        const uint4 one = load_readonly(quad_of_sets + in_column + next);
        if ((one.x | one.y | one.z | one.w) != 0) {
          const uint4 other = load_readonly(quad_of_sets + in_row + next);
          own[0] = one.x & other.x, own[1] = one.y & other.y;
          own[2] = one.z & other.z, own[3] = one.w & other.w;
          both = own[0] | own[1] | own[2] | own[3];
        }
      }
      pending = __ballot_sync(kFullWarp, both != 0);
      next += 32;
    }
    if (pending == 0) enough = 1;  // none will come
    do {
      if (pending != 0) {
        const int32_t source = __ffs(static_cast<int>(pending)) - 1;
        pending &= pending - 1;
        const int32_t first = (next - lane - 32 + source) * PointSets::kSetWords * 32 + lane;
        GLIMPSE_UNROLL
        for (int32_t j = 0; j < PointSets::kSetWords; ++j) {
          const uint32_t bits = __shfl_sync(kFullWarp, own[j], source);
          if (bits == 0) continue;
          if ((bits >> lane & 1) != 0) {
            const int32_t before = __popc(bits & ((1u << lane) - 1));
            queue.waiting[(head + static_cast<uint32_t>(count + before)) % PointQueue::kRoom] =
                first + 32 * j;
          }
          count += __popc(bits);
        }
      }
      GLIMPSE_NO_UNROLL
      while (count >= enough) {
        const int32_t added = count < PointQueue::kAtOnce ? count : PointQueue::kAtOnce;
        add_points<T, Tile>(problem, sets, tile, head, added, queue, sums);
        head += added;
        count -= added;
      }
    } while (pending != 0);
  } while (enough > 1);
}

/// Stores the row of pixels of this warp where channels are innermost.
template <class T, class Tile>
__device__ __forceinline__ void store_nhwc(const Problem& problem, const TilePlace& tile,
                                           const TileSums<Tile>& sums) {
  const Level& level = problem.level[0];
  const int32_t y = tile.y + static_cast<int32_t>(threadIdx.x >> 5);
  const int64_t channel = int64_t{tile.slice} * Tile::kChannels + (threadIdx.x & 31);
  T* pixel = static_cast<T*>(level.data) + tile.image * level.stride_n + y * level.stride_h +
             tile.x * level.stride_w + channel * level.stride_c;
  const int32_t width = level.width - tile.x;
  GLIMPSE_UNROLL
  for (int32_t j = 0; j < Tile::kColumns; ++j) {
    if (j < width) {
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) {
        if (channel + 32 * v < problem.channels) {
          pixel[32 * v * level.stride_c] = Store<T>::from(sums.value[j][v]);
        }
      }
    }
    pixel += level.stride_w;
  }
}

/// Block: a tile by kChannels channels. Warp: a row of pixels. Lane: kVector channels, 32 apart, of
/// kColumns pixels, summed in registers.
template <class T, class Tile>
__global__ void __launch_bounds__(kGatherThreads, Tile::kBlocks)
    gather_points_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                         GLIMPSE_GRID_CONSTANT PointSets sets,
                         GLIMPSE_GRID_CONSTANT GatherPlan plan) {
  GLIMPSE_DYNAMIC_SHARED(turn);  // where rows are innermost
  GLIMPSE_SHARED(TilePlace, tile, );
  GLIMPSE_SHARED(PointQueue, queues, [kGatherWarps]);
  if (threadIdx.x == 0) tile = place_of_block<Tile>(problem, plan);
  __syncthreads();
  const auto warp = static_cast<int32_t>(threadIdx.x >> 5);
  if (tile.y + warp >= problem.level[0].height) return;
  TileSums<Tile> sums;
  sums.clear();
  add_row<T, Tile>(problem, sets, tile, queues[warp], sums);
  if (problem.layout == Layout::kNhwc) return store_nhwc<T>(problem, tile, sums);
  store_nchw<T>(problem, tile, reinterpret_cast<float*>(turn) + warp * Stage<T, Tile>::kTurned,
                sums);
}

}  // namespace glimpse::cuda
