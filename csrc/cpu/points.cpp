// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/points.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/box_gradient.h"
#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "geometry/tables.h"

namespace glimpse {
namespace {

/// What a point reads: up to two pixels in each direction, as offsets into a plane.
template <class A>
struct Point {
  int64_t image;  // -1: reads nothing
  int64_t offset[4];
  A weight[4];
  int32_t count;
  Axis<A> axis[2];
  A slope[2][4];  // d weight / d origin along y and along x
  A progress[2];
};

template <class A>
Point<A> read_point(const Problem& problem, int64_t k) {
  Point<A> point;
  point.image = -1;
  point.count = 0;
  const Box<A> box = read_box<A>(problem, k);
  if (box.level < 0) return point;
  const Level& level = problem.level[box.level];
  const BoxAxis<A> along_y = box_axis(problem, box, kY), along_x = box_axis(problem, box, kX);
  point.axis[kY] = along_y.axis;
  point.axis[kX] = along_x.axis;
  const auto each_tap = [&](const BoxAxis<A>& line, const auto& visit) {
    for_each_tap(problem.op, line.axis, 0, 0, line.size - 1, line.size,
                 [&](int32_t pixel, A weight, A slope, A progress) {
                   visit(pixel, line.weighting(weight, slope, progress), slope, progress);
                 });
  };
  each_tap(along_y, [&](int32_t y, A weight_y, A slope_y, A progress_y) {
    each_tap(along_x, [&](int32_t x, A weight_x, A slope_x, A progress_x) {
      const int32_t t = point.count++;
      point.offset[t] = y * level.stride_h + x * level.stride_w;
      point.weight[t] = weight_y * weight_x;
      point.slope[kY][t] = slope_y * weight_x;
      point.slope[kX][t] = weight_y * slope_x;
      point.progress[kY] = progress_y;
      point.progress[kX] = progress_x;
    });
  });
  if (point.count > 0) point.image = box.image;
  return point;
}

/// Calls each<N>() with the number of taps as a literal.
template <class Each>
void with_count(int32_t count, const Each& each) {
  switch (count) {
    case 1:
      return each(std::integral_constant<int, 1>());
    case 2:
      return each(std::integral_constant<int, 2>());
    case 3:
      return each(std::integral_constant<int, 3>());
    default:
      return each(std::integral_constant<int, 4>());
  }
}

constexpr int64_t kChannelsTogether = 32;
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
        const Point<A>& point = points[k - begin];
        BoxGradient sums = {};
        for (const Direction direction : {kY, kX}) {
          for (int32_t t = 0; t < point.count; ++t) {
            sums.origin[direction] += point.slope[direction][t] * products[4 * (k - begin) + t];
          }
          if (point.count > 0) {
            sums.step[direction] = sums.origin[direction] * point.progress[direction];
          }
        }
        write_box_gradient(problem, k, point.count > 0 ? point.axis : nullptr, sums);
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
  std::vector<Point<T>> points(static_cast<size_t>(problem.boxes));
  parallel_for(0, problem.boxes, 256, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) points[k] = read_point<T>(problem, k);
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
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t image = task / blocks, first = task % blocks * kChannelsTogether;
      const int64_t count = std::min(kChannelsTogether, problem.channels - first);
      T* planes = static_cast<T*>(level.data) + image * level.stride_n + first * level.stride_c;
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
  with_feature_type(problem.dtype,
                    [&](auto type) { sample_typed<typename decltype(type)::type>(problem); });
}

void grad_boxes_of_points(const Problem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { grad_boxes_typed<typename decltype(type)::type>(problem); });
}

void grad_features_of_points(const Problem& problem) {
  if (problem.dtype == Dtype::kFloat64) {
    grad_features_typed<double>(problem);
  } else {
    grad_features_typed<float>(problem);
  }
}

}  // namespace glimpse
