// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <vector>

#include "cpu/applications.h"
#include "cpu/box_gradient.h"
#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/points.h"

namespace glimpse {
namespace {

/// Channels that are summed together. Depends on nothing but their number: parts are added in
/// order, so the sum is the same however parts are spread over threads.
int64_t channels_of_part(int64_t channels) {
  constexpr int64_t kMostParts = 16, kMultiple = 64;
  const int64_t least = (channels + kMostParts - 1) / kMostParts;
  return (least + kMultiple - 1) / kMultiple * kMultiple;
}

/// Adds up the parts of one box and writes its row.
template <class A>
void write_row(const Problem& problem, const BoxPlan<A>& plan, const BoxGradient* sums,
               int64_t parts, int64_t stride) {
  BoxGradient total = {};
  for (int64_t part = 0; part < parts && !plan.empty; ++part) {
    for (const Direction direction : {kY, kX}) {
      total.origin[direction] += sums[part * stride].origin[direction];
      total.step[direction] += sums[part * stride].step[direction];
    }
  }
  write_box_gradient(problem.op, problem, plan.box, plan.empty ? nullptr : plan.axis, total);
}

template <class T>
void grad_boxes_typed(const Problem& problem) {
  using A = acc_t<T>;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t part = channels_of_part(std::max<int64_t>(problem.channels, 1));
  const int64_t parts = cells == 0 ? 0 : (problem.channels + part - 1) / part;
  std::vector<BoxGradient> sums;
  for (int64_t first = 0; first < problem.boxes; first += kPlanChunk) {
    const int64_t end = std::min(problem.boxes, first + kPlanChunk);
    const PlanSet<A> set(problem, Purpose::kGradBoxes, first, end, kernel.lanes, kernel.sources);
    // Boxes that read nothing stand last.
    const bool has_empty = set.groups().back().level < 0;
    const int64_t count = has_empty ? set.groups().back().first : end - first;
    sums.assign(static_cast<size_t>(parts * count), BoxGradient{});
    const int64_t workers = workers_for(4 * count * problem.channels * cells);
    const int64_t wanted = parts == 0 || workers == 1 ? 1 : (8 * workers + parts - 1) / parts;
    const int64_t runs = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(count, 1));
    const int64_t scratch = kernel.grad_boxes_scratch(problem, set);
    parallel_tasks(count == 0 ? 0 : parts * runs, workers, [&](const auto& next) {
      const Scratch memory(sizeof(A) * static_cast<size_t>(scratch));
      for (int64_t task = next(); task < parts * runs; task = next()) {
        const int64_t run = task % runs;
        const int64_t begin = count * run / runs;
        BoxWork<A> work;
        work.problem = &problem;
        work.plans = set.plans().data() + begin;
        work.count = count * (run + 1) / runs - begin;
        work.channel = task / runs * part;
        work.channels = std::min(part, problem.channels - work.channel);
        work.scratch = memory.template as<A>();
        work.sums = sums.data() + task / runs * count + begin;
        kernel.grad_boxes(work);
      }
    });
    for (int64_t i = 0; i < end - first; ++i) {
      write_row(problem, *set.plans()[i], sums.data() + (i < count ? i : 0), parts, count);
    }
  }
}

}  // namespace

void cpu_grad_boxes(const Problem& problem) {
  if (is_points(problem)) return grad_boxes_of_points(problem);
  with_feature_type(problem.dtype,
                    [&](auto type) { grad_boxes_typed<typename decltype(type)::type>(problem); });
}

}  // namespace glimpse
