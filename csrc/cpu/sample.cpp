// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/applications.h"

#include <algorithm>

#include "cpu/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/points.h"

namespace glimpse {
namespace {

/// Tasks are (block of channels, run of boxes). A kNchw block is what fits into a vector, so that
/// its planes stay in the cache for all boxes; blocks come first, so that threads share a plane
/// only where there are fewer blocks than threads.
template <class T>
void sample_typed(const Problem& problem) {
  using A = acc_t<T>;
  const Kernels<T>& kernel = kernels<T>();
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const bool nchw = problem.layout == Layout::kNchw;
  const int64_t block = nchw ? kernel.lanes : problem.channels;
  const int64_t blocks = (problem.channels + block - 1) / block;
  for (int64_t first = 0; first < problem.boxes; first += kPlanChunk) {
    const int64_t end = std::min(problem.boxes, first + kPlanChunk);
    const PlanSet<A> set(problem, Purpose::kSample, first, end, kernel.lanes, kernel.sources);
    const int64_t workers = workers_for((end - first) * problem.channels * cells);
    const int64_t wanted = workers == 1 ? 1
                           : nchw       ? (4 * workers + blocks - 1) / blocks
                                        : 16 * workers;
    const int64_t runs = std::clamp<int64_t>(wanted, 1, end - first);
    const int64_t scratch = kernel.sample_scratch(problem, set);
    parallel_tasks(blocks * runs, workers, [&](const auto& next) {
      const Scratch memory(sizeof(A) * static_cast<size_t>(scratch));
      for (int64_t task = next(); task < blocks * runs; task = next()) {
        const int64_t run = task % runs;
        const int64_t begin = (end - first) * run / runs;
        Work<A> work;
        work.problem = &problem;
        work.plans = set.plans().data() + begin;
        work.count = (end - first) * (run + 1) / runs - begin;
        work.channel = task / runs * block;
        work.channels = std::min(block, problem.channels - work.channel);
        work.scratch = memory.template as<A>();
        kernel.sample(work);
      }
    });
  }
}

}  // namespace

void cpu_sample(const Problem& problem) {
  if (problem.channels == 0 || problem.out_height == 0 || problem.out_width == 0) return;
  if (is_points(problem)) return sample_points(problem);
  with_feature_type(problem.dtype,
                    [&](auto type) { sample_typed<typename decltype(type)::type>(problem); });
}

}  // namespace glimpse
