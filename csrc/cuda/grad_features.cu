// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/grad_features.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr size_t kMostSharedBytes = 48 * 1024;  // of a block, without asking for more
constexpr int64_t kFewChannels = 4;
constexpr int64_t kManyPixels = 4096;             // of all maps
constexpr int64_t kMostCells = int64_t{1} << 30;  // cells of a box are counted in 32 bits

/// `most_cells` of a box can be held at once.
template <class Tile>
GatherPlan plan_gather(const Problem& problem, size_t stage_bytes, int32_t most_cells,
                       int64_t* blocks) {
  GatherPlan plan = {};
  plan.prepared = prepares_rows<typename Tile::Number>(problem);
  *blocks = lay_tiles<Tile>(problem, &plan);

  plan.cells_y = problem.out_height < kMostHeldCells ? problem.out_height : kMostHeldCells;
  plan.cells_x = problem.out_width < kMostHeldCells ? problem.out_width : kMostHeldCells;
  // Columns that are held in parts belong to one band at a time.
  if (plan.cells_x < problem.out_width || plan.cells_y * plan.cells_x > most_cells) {
    if (plan.cells_y > kBand) plan.cells_y = kBand;
    if (plan.cells_y * plan.cells_x > most_cells) plan.cells_x = most_cells / plan.cells_y;
  }
  if (plan.cells_y < problem.out_height || plan.cells_x < problem.out_width) {
    plan.group_shift = 5;
    plan.slots = 1;
    TileWeights<Tile>::lay_out(&plan);
    return plan;
  }
  const int32_t cells = plan.cells_y > plan.cells_x ? plan.cells_y : plan.cells_x;
  // A group of lanes has a lane for each cell. Half of the groups of the block build along y and
  // half along x, once.
  plan.group_shift = cells <= 8 ? 3 : cells <= 16 ? 4 : 5;
  plan.slots = kGatherThreads / 2 >> plan.group_shift;
  const size_t fixed = stage_bytes + fixed_shared_bytes<typename Tile::Number>();
  const int32_t groups = 32 >> plan.group_shift;
  TileWeights<Tile>::lay_out(&plan);
  while (plan.slots > groups && fixed + plan.weight_bytes > kMostSharedBytes) {
    plan.slots /= 2;
    TileWeights<Tile>::lay_out(&plan);
  }
  return plan;
}

template <class Tile, class Kernel>
void launch_gather(const Problem& problem, Kernel kernel, size_t stage_bytes, size_t least_bytes,
                   int32_t most_cells, bool flat) {
  int64_t blocks = 0;
  GatherPlan plan = plan_gather<Tile>(problem, stage_bytes, most_cells, &blocks);
  plan.flat = flat;
  size_t bytes = stage_bytes + plan.weight_bytes;
  if (bytes < least_bytes) bytes = least_bytes;
  launch_blocks(problem, kernel, blocks, bytes, plan);
}

bool aligned_to_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, class Tile>
void launch_nhwc(const Problem& problem) {
  launch_gather<Tile>(problem, gather_nhwc_kernel<T, Tile>, 0, 0, kMostHeldCells * kMostHeldCells,
                      false);
}

template <class T, class Tile>
void launch_nchw(const Problem& problem) {
  using Stage = Stage<T, Tile>;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  // An odd distance of channels; neighbouring channels of all boxes in pieces of 16 bytes.
  const bool flat = plane % 2 == 1 && plane <= Stage::kCells &&
                    problem.out_height <= kMostHeldCells && problem.out_width <= kMostHeldCells &&
                    problem.channels * plane * static_cast<int64_t>(sizeof(T)) % 16 == 0 &&
                    aligned_to_16(problem.pooled);
  launch_gather<Tile>(problem, gather_nchw_kernel<T, Tile>, Stage::kBytes, Stage::kTurnBytes,
                      Stage::kCells, flat);
}

/// Whether every pixel of every map, and every cell, starts on 16 bytes that hold `count` channels.
bool packs(const Problem& problem, int64_t count) {
  if (problem.channels % count != 0 || !aligned_to_16(problem.pooled)) return false;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    if (level.stride_c != 1 || level.stride_n % count != 0 || level.stride_h % count != 0 ||
        level.stride_w % count != 0 || !aligned_to_16(level.data)) {
      return false;
    }
  }
  return true;
}

// 32 sums a lane: 8 columns of 4 channels, or 4 columns of 8 channels.
using TileOfFloat = Tile<float, 8, 4, 3>;
using TileOf16Bit = Tile<float, 4, 8, 2>;
// Channels one by one, where they do not come in packs.
template <class Number>
using TileOfOdd = Tile<Number, 8, 1, sizeof(Number) == 8 ? 2 : 3>;
// 16 columns of 2 channels; of one where a box would not fit.
using TileNchw = Tile<float, 16, 2, 2>;
using TileNchwLarge = Tile<float, 16, 1, 3>;
// Of a grid that would be too small: more blocks, and more work in all.
using TileNchwSmall = Tile<float, 8, 1, 3>;
using TileNchwDouble = Tile<double, 8, 1, 2>;

template <class T>
void launch_odd(const Problem& problem) {
  launch_nhwc<T, TileOfOdd<acc_t<T>>>(problem);
}

void gather_nhwc(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return packs(problem, 4) ? launch_nhwc<float, TileOfFloat>(problem)
                               : launch_odd<float>(problem);
    case Dtype::kFloat16:
      return packs(problem, 8) ? launch_nhwc<half, TileOf16Bit>(problem)
                               : launch_odd<half>(problem);
    case Dtype::kBFloat16:
      return packs(problem, 8) ? launch_nhwc<bfloat16, TileOf16Bit>(problem)
                               : launch_odd<bfloat16>(problem);
    default:
      return launch_odd<double>(problem);
  }
}

template <class T>
void launch_nchw(const Problem& problem) {
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  if (few_blocks<TileNchw>(problem)) {
    launch_nchw<T, TileNchwSmall>(problem);
  } else if (plane <= Stage<T, TileNchw>::kCells) {
    launch_nchw<T, TileNchw>(problem);
  } else {
    launch_nchw<T, TileNchwLarge>(problem);
  }
}

void gather_nchw(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return launch_nchw<float>(problem);
    case Dtype::kFloat16:
      return launch_nchw<half>(problem);
    case Dtype::kBFloat16:
      return launch_nchw<bfloat16>(problem);
    default:
      return launch_nchw<double, TileNchwDouble>(problem);
  }
}

template <class T>
void launch_pixels(const Problem& problem) {
  using Tile = PixelTile<acc_t<T>>;
  GatherPlan plan = {};
  const int64_t blocks = lay_tiles<Tile>(problem, &plan);
  launch_blocks(problem, gather_pixels_kernel<T>, blocks, 0, plan);
}

void gather_pixels(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return launch_pixels<float>(problem);
    case Dtype::kFloat16:
      return launch_pixels<half>(problem);
    case Dtype::kBFloat16:
      return launch_pixels<bfloat16>(problem);
    default:
      return launch_pixels<double>(problem);
  }
}

template <class Number>
void prepare(const Problem& problem) {
  const bool rows = prepares_rows<Number>(problem);
  const int64_t box_rows = rows ? int64_t{problem.out_height} + problem.out_width : 1;
  launch(rows ? prepare_kernel<Number, true> : prepare_kernel<Number, false>,
         blocks_of_256(problem.boxes * box_rows), kPrepareThreads, 0,
         static_cast<Stream>(problem.stream), problem);
}

template <class Number>
void gather_simple(const Problem& problem) {
  int64_t most = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    const int64_t elements = problem.batch * problem.channels * level.height * level.width;
    if (elements > most) most = elements;
  }
  launch(gather_simple_kernel<Number>, blocks_of_256(most), 256, 0,
         static_cast<Stream>(problem.stream), problem);
}

}  // namespace

size_t grad_features_workspace(const Problem& problem) {
  if (problem.filter.used) return filter_workspace(problem);
  if (gathers_points(problem)) return points_workspace(problem);
  return problem.dtype == Dtype::kFloat64 ? prepared_bytes<double>(problem)
                                          : prepared_bytes<float>(problem);
}

void grad_features(const Problem& problem) {
  if (problem.filter.used) return filter_grad_features(problem);
  if (problem.dtype == Dtype::kUInt8) {
    throw std::invalid_argument("glimpse_ext: integer features have no gradient");
  }
  if (gathers_points(problem)) return points_grad_features(problem);
  const bool wide = problem.dtype == Dtype::kFloat64;
  wide ? prepare<double>(problem) : prepare<float>(problem);
  if (int64_t{problem.out_height} * problem.out_width > kMostCells ||
      problem.boxes > kMostGatherBoxes) {
    return wide ? gather_simple<double>(problem) : gather_simple<float>(problem);
  }
  // Lanes that are channels would be idle, but smaller tiles make more blocks of a small map.
  int64_t pixels = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    pixels += problem.batch * problem.level[l].height * problem.level[l].width;
  }
  if (problem.channels <= kFewChannels && pixels >= kManyPixels) return gather_pixels(problem);
  if (problem.layout == Layout::kNhwc) return gather_nhwc(problem);
  gather_nchw(problem);
}

}  // namespace glimpse::cuda
