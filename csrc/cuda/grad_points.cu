// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/grad_points.cuh"

#include <cstdint>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

template <class T, class Tile>
void launch_gather(const Problem& problem) {
  GatherPlan plan = {};
  const int64_t blocks = lay_tiles<Tile>(problem, &plan);
  const size_t turned = problem.layout == Layout::kNchw ? Stage<T, Tile>::kTurnBytes : 0;
  for (; plan.first_block < blocks; plan.first_block += kMostBlocks) {
    const int64_t left = blocks - plan.first_block;
    launch(gather_points_kernel<T, Tile>,
           dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)), kGatherThreads,
           turned, static_cast<Stream>(problem.stream), problem, PointSets(problem), plan);
  }
}

/// As few channels in a lane as hold all of them, in slices of at most 4; but only one where the
/// grid would be too small.
template <class T>
void gather(const Problem& problem) {
  const int64_t slices = ceil_div(problem.channels, 4 * 32);
  const int64_t vector = ceil_div(problem.channels, 32 * slices);
  if (vector == 1 || few_blocks<PointTile<4>>(problem)) {
    launch_gather<T, PointTile<1>>(problem);
  } else if (vector == 2) {
    launch_gather<T, PointTile<2>>(problem);
  } else if (vector == 3) {
    launch_gather<T, PointTile<3>>(problem);
  } else {
    launch_gather<T, PointTile<4>>(problem);
  }
}

}  // namespace

bool gathers_points(const Problem& problem) {
  constexpr int64_t kMostSets = 1024;                  // 128 bytes for each point
  constexpr int64_t kMostChannels = int64_t{1} << 28;  // their bytes are counted in 32 bits
  constexpr int64_t kMostQuads = 2147483647;           // of words of sets
  const bool by_rule = problem.image_index == nullptr && problem.image_column == 0;
  if (problem.out_height != 1 || problem.out_width != 1 || problem.op.fixed_samples() != 1 ||
      problem.levels != 1 || !(by_rule || problem.batch == 1) || problem.dtype == Dtype::kFloat64 ||
      problem.dtype == Dtype::kUInt8) {
    return false;
  }
  const PointSets sets(problem);
  return problem.boxes <= kMostGatherBoxes && problem.channels <= kMostChannels &&
         sets.sets() <= kMostSets &&
         problem.batch * sets.sets() <= kMostQuads / (sets.words / PointSets::kSetWords + 32);
}

size_t points_workspace(const Problem& problem) { return PointSets(problem).bytes(problem); }

void points_grad_features(const Problem& problem) {
  const PointSets sets(problem);
  const int64_t blocks = ceil_div(problem.batch * sets.words * 32, kPointThreads);
  launch(prepare_points_kernel,
         dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), kPointThreads, 0,
         static_cast<Stream>(problem.stream), problem, sets);
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
