// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/points.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/point.h"
#include "cpu/point_tiles.h"

namespace glimpse {
namespace {

constexpr int64_t kPointsTogether = 512;

template <class T>
void sample_typed(const Problem& problem) {
  using A = acc_t<T>;
  const Level& level = problem.level[0];
  const auto fill = Store<pooled_t<T>>::from(static_cast<A>(problem.fill));
  const int64_t runs = (problem.boxes + kPointsTogether - 1) / kPointsTogether;
  const int64_t workers = workers_for(4 * problem.boxes * problem.channels);
  parallel_tasks(runs, workers, [&](const auto& next) {
    std::vector<Point<A>> points;
    for (int64_t run = next(); run < runs; run = next()) {
      const int64_t begin = run * kPointsTogether;
      const int64_t end = std::min(begin + kPointsTogether, problem.boxes);
      points.clear();
      for (int64_t k = begin; k < end; ++k) points.push_back(read_point<A>(problem, k));
      for (int64_t first = 0; first < problem.channels; first += kChannelsTogether) {
        const int64_t count = std::min(kChannelsTogether, problem.channels - first);
        for (int64_t k = begin; k < end; ++k) {
          const Point<A>& point = points[k - begin];
          auto* to = static_cast<pooled_t<T>*>(problem.pooled) + k * problem.channels + first;
          if (point.count == 0) {
            std::fill_n(to, count, fill);
            continue;
          }
          const T* plane = static_cast<const T*>(level.data) + point.image * level.stride_n +
                           first * level.stride_c;
          with_count(point.count, [&](auto taps) {
            for (int64_t c = 0; c < count; ++c, plane += level.stride_c) {
              A sum = point.weight[0] * load_value(plane[point.offset[0]]);
              for (int t = 1; t < taps; ++t) {
                sum += point.weight[t] * load_value(plane[point.offset[t]]);
              }
              to[c] = Store<pooled_t<T>>::from(sum);
            }
          });
        }
      }
    }
  });
}

template <class T>
void grad_boxes_typed(const Problem& problem) {
  using A = acc_t<T>;
  const Level& level = problem.level[0];
  const int64_t runs = (problem.boxes + kPointsTogether - 1) / kPointsTogether;
  const int64_t workers = workers_for(4 * problem.boxes * problem.channels);
  parallel_tasks(runs, workers, [&](const auto& next) {
    std::vector<Point<A>> points;
    std::vector<double> products;  // of gradient and pixel, for each tap of each point
    for (int64_t run = next(); run < runs; run = next()) {
      const int64_t begin = run * kPointsTogether;
      const int64_t end = std::min(begin + kPointsTogether, problem.boxes);
      points.clear();
      for (int64_t k = begin; k < end; ++k) points.push_back(read_point<A>(problem, k));
      products.assign(4 * static_cast<size_t>(end - begin), 0.0);
      for (int64_t first = 0; first < problem.channels; first += kChannelsTogether) {
        const int64_t count = std::min(kChannelsTogether, problem.channels - first);
        for (int64_t k = begin; k < end; ++k) {
          const Point<A>& point = points[k - begin];
          if (point.count == 0) continue;
          const auto* from =
              static_cast<const pooled_t<T>*>(problem.pooled) + k * problem.channels + first;
          const T* plane = static_cast<const T*>(level.data) + point.image * level.stride_n +
                           first * level.stride_c;
          with_count(point.count, [&](auto taps) {
            A sum[taps] = {};
            for (int64_t c = 0; c < count; ++c, plane += level.stride_c) {
              const A g = load_value(from[c]);
              for (int t = 0; t < taps; ++t) sum[t] += g * load_value(plane[point.offset[t]]);
            }
            for (int t = 0; t < taps; ++t) products[4 * (k - begin) + t] += sum[t];
          });
        }
      }
      for (int64_t k = begin; k < end; ++k) {
        write_point_gradient(problem, k, points[k - begin], products.data() + 4 * (k - begin));
      }
    }
  });
}

template <class T>
void grad_features_typed(const Problem& problem) {
  const Level& level = problem.level[0];
  const int64_t blocks = (problem.channels + kChannelsTogether - 1) / kChannelsTogether;
  const int64_t tasks = problem.batch * blocks;
  const int64_t pixels = int64_t{level.height} * level.width;
  const int64_t workers =
      workers_for(problem.channels * (problem.batch * pixels + 8 * problem.boxes));
  const bool tiled = uses_tiles(problem);
  const Problem seen = tiled ? in_tiles(problem) : problem;
  std::vector<Point<T>> points(static_cast<size_t>(problem.boxes));
  parallel_for(0, problem.boxes, 256, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) points[k] = read_point<T>(seen, k);
  });
  std::vector<int64_t> start(static_cast<size_t>(problem.batch) + 1, 0), order(points.size());
  for (const Point<T>& point : points) {
    if (point.image >= 0) ++start[point.image + 1];
  }
  for (int64_t n = 0; n < problem.batch; ++n) start[n + 1] += start[n];
  std::vector<int64_t> place(start.begin(), start.end() - 1);
  for (int64_t k = 0; k < problem.boxes; ++k) {
    if (points[k].image >= 0) order[place[points[k].image]++] = k;
  }
  parallel_tasks(tasks, workers, [&](const auto& next) {
    std::optional<Tile<T>> tile;
    if (tiled) tile.emplace(level);
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t image = task / blocks, first = task % blocks * kChannelsTogether;
      const int64_t count = std::min(kChannelsTogether, problem.channels - first);
      T* planes = static_cast<T*>(level.data) + image * level.stride_n + first * level.stride_c;
      if (tiled) {
        tile->clear();
        T grad[kChannelsTogether] = {};
        for (int64_t i = start[image]; i < start[image + 1]; ++i) {
          const Point<T>& point = points[order[i]];
          const T* from =
              static_cast<const T*>(problem.pooled) + order[i] * problem.channels + first;
          std::copy_n(from, count, grad);
          for (int32_t t = 0; t < point.count; ++t) {
            T* to = tile->data() + point.offset[t];
            for (int64_t c = 0; c < kChannelsTogether; ++c) to[c] += point.weight[t] * grad[c];
          }
        }
        tile->store(planes, count);
        continue;
      }
      for (int64_t c = 0; c < count; ++c) std::fill_n(planes + c * level.stride_c, pixels, T(0));
      for (int64_t i = start[image]; i < start[image + 1]; ++i) {
        const Point<T>& point = points[order[i]];
        const T* from = static_cast<const T*>(problem.pooled) + order[i] * problem.channels + first;
        with_count(point.count, [&](auto taps) {
          T* plane = planes;
          for (int64_t c = 0; c < count; ++c, plane += level.stride_c) {
            for (int t = 0; t < taps; ++t) plane[point.offset[t]] += point.weight[t] * from[c];
          }
        });
      }
    }
  });
}

}  // namespace

bool is_points(const Problem& problem) {
  return problem.out_height == 1 && problem.out_width == 1 && problem.levels == 1 &&
         problem.layout == Layout::kNchw && problem.op.fixed_samples() == 1;
}

void sample_points(const Problem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    uses_tiles(problem) ? sample_tiles<T>(problem) : sample_typed<T>(problem);
  });
}

void grad_boxes_of_points(const Problem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    uses_tiles(problem) ? grad_boxes_tiles<T>(problem) : grad_boxes_typed<T>(problem);
  });
}

void grad_features_of_points(const Problem& problem) {
  if (problem.dtype == Dtype::kFloat64) {
    grad_features_typed<double>(problem);
  } else {
    grad_features_typed<float>(problem);
  }
}

}  // namespace glimpse
