// SPDX-License-Identifier: BSD-3-Clause
//
// Operators on frames by the plainest loops: for each output one sum over the taps of all samples,
// in double, serially.
#include <algorithm>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/frames.h"

namespace glimpse {
namespace {

/// Calls visit(k, box, c, cell_y, cell_x) for each output, box by box.
template <class T, class Visit>
void for_each_output(const FrameProblem& problem, const Visit& visit) {
  for (int64_t k = 0; k < problem.boxes; ++k) {
    const FrameBox<T> box = read_frame<T>(problem, k);
    for (int64_t c = 0; c < problem.channels; ++c) {
      for (int32_t i = 0; i < problem.out_height; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j) visit(k, box, c, i, j);
      }
    }
  }
}

/// Calls visit(point, taps, factor) for the samples that make an output.
template <class T, class Visit>
void for_each_part(const FrameProblem& problem, int64_t k, const FrameBox<T>& box, int64_t c,
                   int32_t i, int32_t j, const Visit& visit) {
  if (!box.reads) return;
  if (problem.chosen != nullptr) {
    const int32_t chosen = problem.chosen[pooled_offset(problem, k, c, i, j)];
    for_chosen_sample(problem, box, i, j, chosen,
                      [&](const auto& point, const auto& taps) { visit(point, taps, 1.0); });
    return;
  }
  const double factor = frame_factor(box.frame);
  for_each_sample(problem, box, i, j,
                  [&](const auto& point, const auto& taps) { visit(point, taps, factor); });
}

int64_t map_offset(const Level& map, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * map.stride_n + c * map.stride_c + y * map.stride_h + x * map.stride_w;
}

/// sum of weights_y[i] * weights_x[j] * load(pixel y[i], pixel x[j])
template <class T, class Load>
double weighted(const FrameTaps<T>& taps, const T* weights_y, const T* weights_x,
                const Load& load) {
  double sum = 0;
  for (int32_t i = 0; i < taps.y.count; ++i) {
    for (int32_t j = 0; j < taps.x.count; ++j) {
      sum +=
          static_cast<double>(weights_y[i]) * weights_x[j] * load(taps.y.pixel[i], taps.x.pixel[j]);
    }
  }
  return sum;
}

template <class T>
void sample_typed(const FrameProblem& problem) {
  using Number = acc_t<T>;
  const auto* features = static_cast<const T*>(problem.map.data);
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  for_each_output<Number>(problem, [&](int64_t k, const auto& box, int64_t c, int32_t i,
                                       int32_t j) {
    double sum = 0;
    for_each_part(problem, k, box, c, i, j,
                  [&](const auto& point, const auto& taps, double factor) {
                    const TapWeights<Number> weights = sample_weights(box, point, taps);
                    for (int32_t a = 0; a < taps.y.count; ++a) {
                      for (int32_t b = 0; b < taps.x.count; ++b) {
                        const int64_t offset =
                            map_offset(problem.map, box.image, c, taps.y.pixel[a], taps.x.pixel[b]);
                        sum += factor * weights.value[2 * a + b] * load_value(features[offset]);
                      }
                    }
                  });
    pooled[pooled_offset(problem, k, c, i, j)] = Store<pooled_t<T>>::from(static_cast<Number>(sum));
  });
}

template <class T>
void maximum_typed(const FrameProblem& problem) {
  using Number = acc_t<T>;
  const auto* features = static_cast<const T*>(problem.map.data);
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  for_each_output<Number>(
      problem, [&](int64_t k, const auto& box, int64_t c, int32_t i, int32_t j) {
        Maximum<double> largest = Maximum<double>::none();
        if (box.reads) {
          for_each_candidate(problem, box, i, j, [&](int32_t index, const auto& taps) {
            largest.take(
                weighted(taps, taps.y.weight, taps.x.weight,
                         [&](int32_t y, int32_t x) -> double {
                           return load_value(features[map_offset(problem.map, box.image, c, y, x)]);
                         }),
                index);
          });
        }
        const int64_t offset = pooled_offset(problem, k, c, i, j);
        pooled[offset] = Store<pooled_t<T>>::from(static_cast<Number>(largest.value));
        problem.winner[offset] = largest.sample;
      });
}

template <class T>
void grad_features_typed(const FrameProblem& problem) {
  using Number = acc_t<T>;
  const Level& map = problem.map;
  const auto* grad = static_cast<const T*>(problem.pooled);
  auto* features = static_cast<T*>(map.data);
  const int64_t plane = int64_t{map.height} * map.width;
  std::vector<double> sums(static_cast<size_t>(problem.batch * problem.channels * plane), 0.0);
  for_each_output<Number>(
      problem, [&](int64_t k, const auto& box, int64_t c, int32_t i, int32_t j) {
        const double g = load_value(grad[pooled_offset(problem, k, c, i, j)]);
        for_each_part(problem, k, box, c, i, j,
                      [&](const auto& point, const auto& taps, double factor) {
                        const TapWeights<Number> weights = sample_weights(box, point, taps);
                        double* own = sums.data() + (box.image * problem.channels + c) * plane;
                        for (int32_t a = 0; a < taps.y.count; ++a) {
                          for (int32_t b = 0; b < taps.x.count; ++b) {
                            own[int64_t{taps.y.pixel[a]} * map.width + taps.x.pixel[b]] +=
                                factor * weights.value[2 * a + b] * g;
                          }
                        }
                      });
      });
  const double* sum = sums.data();
  for (int64_t n = 0; n < problem.batch; ++n) {
    for (int64_t c = 0; c < problem.channels; ++c) {
      for (int32_t y = 0; y < map.height; ++y) {
        for (int32_t x = 0; x < map.width; ++x) {
          features[map_offset(map, n, c, y, x)] = Store<T>::from(static_cast<Number>(*sum++));
        }
      }
    }
  }
}

template <class T>
void grad_boxes_typed(const FrameProblem& problem) {
  using Number = acc_t<T>;
  const auto* features = static_cast<const T*>(problem.map.data);
  const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled);
  const int32_t columns = problem.op.columns();
  std::vector<double> sums(static_cast<size_t>(problem.boxes) * kFrameColumns, 0.0);
  for_each_output<Number>(problem, [&](int64_t k, const auto& box, int64_t c, int32_t i,
                                       int32_t j) {
    double* own = sums.data() + k * kFrameColumns;
    const double g = load_value(grad[pooled_offset(problem, k, c, i, j)]);
    for_each_part(
        problem, k, box, c, i, j, [&](const auto& point, const auto& taps, double factor) {
          const auto load = [&](int32_t y, int32_t x) -> double {
            return load_value(features[map_offset(problem.map, box.image, c, y, x)]);
          };
          const double in_y = weighted(taps, taps.y.slope, taps.x.weight, load);
          const double in_x = weighted(taps, taps.y.weight, taps.x.slope, load);
          const double in_both = weighted(taps, taps.y.slope, taps.x.slope, load);
          for_each_column_slope(box, point, in_y, in_x, in_both, [&](int32_t column, double slope) {
            own[column] += g * factor * slope;
          });
        });
  });
  auto* rows = static_cast<Number*>(problem.grad_box);
  for (int64_t k = 0; k < problem.boxes; ++k) {
    Number* row = rows + k * problem.box_columns;
    std::fill_n(row, problem.box_columns, Number(0));
    Number* own = row + problem.box_columns - columns;
    for (int32_t i = 0; i < columns; ++i) {
      own[i] = static_cast<Number>(sums[static_cast<size_t>(k * kFrameColumns + i)]);
    }
  }
}

}  // namespace

void simple_frames_sample(const FrameProblem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { sample_typed<typename decltype(type)::type>(problem); });
}

void simple_frames_maximum(const FrameProblem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { maximum_typed<typename decltype(type)::type>(problem); });
}

void simple_frames_grad_features(const FrameProblem& problem) {
  with_gradient_type(problem.dtype, [&](auto type) {
    grad_features_typed<typename decltype(type)::type>(problem);
  });
}

void simple_frames_grad_boxes(const FrameProblem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { grad_boxes_typed<typename decltype(type)::type>(problem); });
}

}  // namespace glimpse
