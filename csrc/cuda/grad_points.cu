// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/grad_points.cuh"

#include <cstdint>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

// 8 columns of 4 channels; of one where the grid would be too small.
using TileOfMany = PointTile<4, 3>;
using TileOfFew = PointTile<1, 3>;

template <class T, class Tile>
void launch_gather(const Problem& problem) {
  GatherPlan plan = {};
  const int64_t blocks = lay_tiles<Tile>(problem, &plan);
  const size_t turned = problem.layout == Layout::kNchw ? Stage<T, Tile>::kTurnBytes : 0;
  launch_blocks(problem, gather_points_kernel<T, Tile>, blocks, turned, plan);
}

template <class T>
void gather(const Problem& problem) {
  few_blocks<TileOfMany>(problem) ? launch_gather<T, TileOfFew>(problem)
                                  : launch_gather<T, TileOfMany>(problem);
}

}  // namespace

bool gathers_points(const Problem& problem) {
  constexpr int64_t kMostSets = 1024;  // 128 bytes for each point
  constexpr int64_t kMostPoints = int64_t{1} << 30;
  const bool by_rule = problem.image_index == nullptr && problem.image_column == 0;
  return problem.out_height == 1 && problem.out_width == 1 && problem.op.fixed_samples() == 1 &&
         problem.levels == 1 && (by_rule || problem.batch == 1) &&
         problem.dtype != Dtype::kFloat64 && problem.dtype != Dtype::kUInt8 &&
         PointSets(problem).points <= kMostPoints && PointSets(problem).sets() <= kMostSets;
}

size_t points_workspace(const Problem& problem) { return PointSets(problem).bytes(problem); }

void points_grad_features(const Problem& problem) {
  launch(prepare_points_kernel, blocks_of_256(problem.batch * PointSets(problem).words * 32),
         kPrepareThreads, 0, static_cast<Stream>(problem.stream), problem);
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return gather<float>(problem);
    case Dtype::kFloat16:
      return gather<half>(problem);
    default:
      return gather<bfloat16>(problem);
  }
}

}  // namespace glimpse::cuda
