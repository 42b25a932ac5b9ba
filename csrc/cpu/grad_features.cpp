// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <type_traits>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/points.h"

namespace glimpse {
namespace {

// Note [One owner]
// Each element of a gradient belongs to one task, which clears it and then adds boxes in box order.
// A task owns a block of channels of one image of one level, or a band of its rows. How elements
// are split into tasks therefore changes nothing in any sum, and may depend on the thread count.

/// How the gradient of each level is split.
struct Split {
  int64_t block[kMaxLevels];   // channels
  int64_t blocks[kMaxLevels];  // of all channels
  int64_t largest_block;
  int32_t band[kMaxLevels];       // rows
  int64_t bands[kMaxLevels];      // of all rows
  int64_t begin[kMaxLevels + 1];  // first task of each level
};

template <class T>
Split split(const Problem& problem, const Kernels<T>& kernel, int64_t workers) {
  using A = acc_t<T>;
  constexpr bool kScratch = !std::is_same_v<T, A>;
  const bool nchw = problem.layout == Layout::kNchw;
  const int64_t maps = problem.batch * problem.levels;
  Split result;
  // Long runs of channels suit memory; fewer than 32 would share cache lines between tasks.
  int64_t block = nchw ? kernel.lanes : kScratch ? 64 : 128;
  while (!nchw && block > 32 && maps * (problem.channels / block) < 2 * workers) block /= 2;
  const bool planar = nchw && problem.out_width <= std::min(kernel.sources, 2) * kernel.lanes;
  result.begin[0] = 0;
  result.largest_block = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    result.block[l] =
        planar ? planes_together(level, block, static_cast<int64_t>(sizeof(A))) : block;
    result.largest_block = std::max(result.largest_block, result.block[l]);
    const int64_t blocks = (problem.channels + result.block[l] - 1) / result.block[l];
    result.blocks[l] = blocks;
    const int64_t wanted = workers == 1 ? 1 : (4 * workers + maps * blocks - 1) / (maps * blocks);
    int64_t rows = std::max<int64_t>((level.height + wanted - 1) / wanted, 16);
    if (kScratch && !nchw) {
      constexpr int64_t kScratchElements = 1 << 19;
      rows = std::min(rows,
                      std::max<int64_t>(8, kScratchElements / (block * std::max(level.width, 1))));
    }
    result.band[l] = static_cast<int32_t>(std::min<int64_t>(rows, std::max(level.height, 1)));
    // A map without pixels has no task.
    result.bands[l] = level.width == 0 ? 0 : (level.height + result.band[l] - 1) / result.band[l];
    result.begin[l + 1] = result.begin[l] + problem.batch * blocks * result.bands[l];
  }
  return result;
}

/// Fills in what `task` owns.
template <class A>
void describe_task(const Problem& problem, const Split& split, int64_t task, GradWork<A>& work) {
  int32_t l = 0;
  while (task >= split.begin[l + 1]) ++l;
  task -= split.begin[l];
  const int64_t band = task % split.bands[l];
  const int64_t block = task / split.bands[l] % split.blocks[l];
  work.problem = &problem;
  work.level = l;
  work.image = task / split.bands[l] / split.blocks[l];
  work.channel = block * split.block[l];
  work.channels = std::min(split.block[l], problem.channels - work.channel);
  work.first_row = static_cast<int32_t>(band * split.band[l]);
  work.end_row = std::min(work.first_row + split.band[l], problem.level[l].height);
}

template <class T>
void grad_features_typed(const Problem& problem) {
  using A = acc_t<T>;
  constexpr bool kScratch = !std::is_same_v<T, A>;
  const Kernels<T>& kernel = kernels<T>();
  int64_t pixels = 0, plane = 0;  // elements that a task owns
  for (int32_t l = 0; l < problem.levels; ++l) {
    pixels += int64_t{problem.level[l].height} * problem.level[l].width;
  }
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t workers =
      workers_for(problem.channels * (pixels * problem.batch + 4 * cells * problem.boxes));
  const Split parts = split<T>(problem, kernel, workers);
  for (int32_t l = 0; l < problem.levels; ++l) {
    plane = std::max(plane, parts.block[l] * parts.band[l] * problem.level[l].width);
  }
  const int64_t tasks = parts.begin[problem.levels];
  const int64_t boxes = cells == 0 ? 0 : problem.boxes;
  // Float sums of 16-bit gradients live as long as a task, so they take all boxes at once.
  const int64_t chunk = kScratch ? std::max<int64_t>(boxes, 1) : kPlanChunk;
  int64_t first = 0;
  do {
    const int64_t end = std::min(boxes, first + chunk);
    const PlanSet<A> set(problem, Purpose::kGradFeatures, first, end, kernel.lanes, kernel.sources);
    const int64_t table =
        (kernel.grad_features_scratch(problem, set, parts.largest_block) + 15) / 16 * 16;
    parallel_tasks(tasks, workers, [&](const auto& next) {
      const Scratch memory(sizeof(A) * static_cast<size_t>(table + (kScratch ? plane : 0)));
      for (int64_t task = next(); task < tasks; task = next()) {
        GradWork<A> work;
        describe_task(problem, parts, task, work);
        work.scratch = memory.template as<A>();
        work.plane = memory.template as<A>() + table;
        if (first == 0) kernel.clear(work);
        for (const Group& group : set.groups()) {
          if (group.level != work.level || group.image != work.image) continue;
          work.plans = set.plans().data() + group.first;
          work.count = group.end - group.first;
          kernel.grad_features(work);
        }
        if (kScratch) kernel.convert(work);
      }
    });
    first = end;
  } while (first < boxes);
}

}  // namespace

void cpu_grad_features(const Problem& problem) {
  if (problem.channels == 0 || problem.batch == 0) return;
  if (is_wide_points(problem)) return grad_features_of_points(problem);
  with_gradient_type(problem.dtype, [&](auto type) {
    grad_features_typed<typename decltype(type)::type>(problem);
  });
}

}  // namespace glimpse
