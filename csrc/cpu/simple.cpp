// SPDX-License-Identifier: BSD-3-Clause
//
// The plain backend: for each output one sum over the taps of all samples, in double, serially.
// It has no merged tables and no tricks, and is what the others are compared with.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/backend.h"
#include "cpu/dtypes.h"
#include "cpu/frames.h"
#include "noise.h"

namespace glimpse {
namespace {

/// Offset of element [k, c, y, x] of the pooled tensor.
int64_t pooled_offset(const Problem& problem, int64_t k, int64_t c, int64_t y, int64_t x) {
  if (problem.layout == Layout::kNhwc) {
    return ((k * problem.out_height + y) * problem.out_width + x) * problem.channels + c;
  }
  return ((k * problem.channels + c) * problem.out_height + y) * problem.out_width + x;
}

int64_t level_offset(const Level& level, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * level.stride_n + c * level.stride_c + y * level.stride_h + x * level.stride_w;
}

/// One axis of a box.
template <class T>
struct Line {
  BoxAxis<T> own;
  FilterLine filter;  // where cells weigh pixels

  Line(const Problem& problem, const Box<T>& box, Direction direction)
      : own(box_axis(problem, box, direction)),
        filter(filter_line(problem, box, direction, own.size)) {}
};

/// The pixels of a cell, with weights and slopes of the mean over its samples, or of its filter.
/// visit(pixel, weight, slope_origin, slope_step)
template <class T, class Visit>
void for_each_mean_tap(const Problem& problem, const Line<T>& line, int32_t cell,
                       const Visit& visit) {
  const BoxAxis<T>& own = line.own;
  if (problem.filter.used) {
    FilterSlopes<T> slopes;
    const FilterRow<T> row = line.filter.template row<T>(cell, &slopes);
    for (int32_t i = 0; i < row.count; ++i) {
      T origin, step;
      row.slopes(i, slopes, &origin, &step);
      visit(row.first + i, static_cast<double>(own.weighting.of(row.weight(i), origin, step)),
            static_cast<double>(origin), static_cast<double>(step));
    }
    return;
  }
  const double factor = sample_factor(own.axis);
  for_each_tap(problem.op, own.axis, cell, 0, own.size - 1, own.size,
               [&](int32_t pixel, T weight, T slope, T progress) {
                 visit(pixel, own.weighting(weight, slope, progress) * factor, slope * factor,
                       slope * factor * static_cast<double>(progress));
               });
}

template <class T>
void sample_typed(const Problem& problem) {
  using Number = acc_t<T>;
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  for (int64_t k = 0; k < problem.boxes; ++k) {
    const Box<Number> box = read_box<Number>(problem, k);
    for (int64_t c = 0; c < problem.channels; ++c) {
      for (int32_t i = 0; i < problem.out_height; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j) {
          double sum = 0;
          bool empty = true;
          if (box.level >= 0) {
            const Level& level = problem.level[box.level];
            const auto* features = static_cast<const T*>(level.data);
            const Line<Number> along_y(problem, box, kY), along_x(problem, box, kX);
            for_each_mean_tap(problem, along_y, i, [&](int32_t y, double wy, double, double) {
              for_each_mean_tap(problem, along_x, j, [&](int32_t x, double wx, double, double) {
                sum += wy * wx * load_value(features[level_offset(level, box.image, c, y, x)]);
                empty = false;
              });
            });
          }
          pooled[pooled_offset(problem, k, c, i, j)] =
              Store<pooled_t<T>>::from(static_cast<Number>(empty ? problem.fill : sum));
        }
      }
    }
  }
}

/// Adds the gradient of one box to a [height, width] plane.
template <class T>
void add_box(const Problem& problem, int64_t k, const Box<acc_t<T>>& box, int64_t c,
             std::vector<double>& plane) {
  const auto* grad = static_cast<const T*>(problem.pooled);
  const Line<acc_t<T>> along_y(problem, box, kY), along_x(problem, box, kX);
  for (int32_t i = 0; i < problem.out_height; ++i) {
    for (int32_t j = 0; j < problem.out_width; ++j) {
      const double g = load_value(grad[pooled_offset(problem, k, c, i, j)]);
      for_each_mean_tap(problem, along_y, i, [&](int32_t y, double wy, double, double) {
        for_each_mean_tap(problem, along_x, j, [&](int32_t x, double wx, double, double) {
          plane[static_cast<int64_t>(y) * along_x.own.size + x] += wy * wx * g;
        });
      });
    }
  }
}

template <class T>
void grad_features_typed(const Problem& problem) {
  using Number = acc_t<T>;
  std::vector<double> plane;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    auto* features = static_cast<T*>(level.data);
    for (int64_t n = 0; n < problem.batch; ++n) {
      for (int64_t c = 0; c < problem.channels; ++c) {
        plane.assign(static_cast<int64_t>(level.height) * level.width, 0.0);
        for (int64_t k = 0; k < problem.boxes; ++k) {
          const Box<Number> box = read_box<Number>(problem, k);
          if (box.level == l && box.image == n) add_box<T>(problem, k, box, c, plane);
        }
        for (int32_t y = 0; y < level.height; ++y) {
          for (int32_t x = 0; x < level.width; ++x) {
            features[level_offset(level, n, c, y, x)] = Store<T>::from(
                static_cast<Number>(plane[static_cast<int64_t>(y) * level.width + x]));
          }
        }
      }
    }
  }
}

/// d <pooled, out> / d origin and d step of one axis of a box.
struct AxisGradient {
  double origin = 0, step = 0;
};

template <class T>
AxisGradient axis_gradient(const Problem& problem, int64_t k, const Box<acc_t<T>>& box,
                           Direction direction) {
  using Number = acc_t<T>;
  const Level& level = problem.level[box.level];
  const auto* features = static_cast<const T*>(level.data);
  const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled);
  const Line<Number> along_y(problem, box, kY), along_x(problem, box, kX);
  AxisGradient sum;
  for (int64_t c = 0; c < problem.channels; ++c) {
    for (int32_t i = 0; i < problem.out_height; ++i) {
      for (int32_t j = 0; j < problem.out_width; ++j) {
        const double g = load_value(grad[pooled_offset(problem, k, c, i, j)]);
        for_each_mean_tap(
            problem, along_y, i, [&](int32_t y, double wy, double origin_y, double step_y) {
              for_each_mean_tap(
                  problem, along_x, j, [&](int32_t x, double wx, double origin_x, double step_x) {
                    const double value =
                        g * load_value(features[level_offset(level, box.image, c, y, x)]);
                    sum.origin += value * (direction == kY ? origin_y * wx : wy * origin_x);
                    sum.step += value * (direction == kY ? step_y * wx : wy * step_x);
                  });
            });
      }
    }
  }
  return sum;
}

template <class T>
void grad_boxes_typed(const Problem& problem) {
  using Number = acc_t<T>;
  auto* rows = static_cast<Number*>(problem.grad_box);
  for (int64_t k = 0; k < problem.boxes; ++k) {
    const Box<Number> box = read_box<Number>(problem, k);
    Number* row = rows + k * problem.box_columns;
    std::fill_n(row, problem.box_columns, Number(0));
    if (box.level < 0) continue;
    Number* edges = row + problem.image_column;
    for (const Direction direction : {kY, kX}) {
      const Axis<Number> axis = box_axis(problem, box, direction).axis;
      const AxisGradient g = axis_gradient<T>(problem, k, box, direction);
      edges[problem.op.lo_column(direction)] +=
          static_cast<Number>(g.origin * axis.origin_lo + g.step * axis.step_lo);
      edges[problem.op.hi_column(direction)] +=
          static_cast<Number>(g.origin * axis.origin_hi + g.step * axis.step_hi);
    }
  }
}

void sample(const Problem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { sample_typed<typename decltype(type)::type>(problem); });
}

void grad_features(const Problem& problem) {
  with_gradient_type(problem.dtype, [&](auto type) {
    grad_features_typed<typename decltype(type)::type>(problem);
  });
}

void grad_boxes(const Problem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { grad_boxes_typed<typename decltype(type)::type>(problem); });
}

/// Calls visit(y, x, value) for every pixel of an image, whether its mask reaches it or not, in
/// rows or in columns.
template <class T, class Visit>
void visit_pixels(const PasteProblem& problem, int64_t k, bool in_columns, const Visit& visit) {
  using Number = acc_t<T>;
  const auto* mask = static_cast<const T*>(problem.mask) + k * problem.stride_n;
  const auto along_y = PasteLine<Number>::of(problem, k, kY);
  const auto along_x = PasteLine<Number>::of(problem, k, kX);
  const auto visit_pixel = [&](int32_t i, int32_t j) {
    Number value = 0;
    if (along_y.axis.samples > 0 && along_x.axis.samples > 0) {
      value = paste_value(along_y.taps(i), along_x.taps(j), [&](int32_t y, int32_t x) {
        return load_value(mask[y * problem.stride_h + x * problem.stride_w]);
      });
    }
    visit(i, j, value);
  };
  const int32_t outer = in_columns ? problem.width : problem.height;
  const int32_t inner = in_columns ? problem.height : problem.width;
  for (int32_t i = 0; i < outer; ++i) {
    for (int32_t j = 0; j < inner; ++j) in_columns ? visit_pixel(j, i) : visit_pixel(i, j);
  }
}

template <class T, class Out>
void paste_typed(const PasteProblem& problem) {
  using Number = acc_t<T>;
  const PasteStore<Number, Out> store(problem);
  auto* image = static_cast<Out*>(problem.image);
  for (int64_t k = 0; k < problem.masks; ++k) {
    visit_pixels<T>(problem, k, false,
                    [&](int32_t, int32_t, Number value) { *image++ = store(value); });
  }
}

template <class T>
void paste_bits_typed(const PasteProblem& problem) {
  using Number = acc_t<T>;
  const PasteStore<Number, uint8_t> store(problem);
  const int64_t bytes = problem.row_bytes();
  auto* image = static_cast<uint8_t*>(problem.image);
  std::memset(image, 0, static_cast<size_t>(problem.masks * problem.height * bytes));
  for (int64_t k = 0; k < problem.masks; ++k, image += problem.height * bytes) {
    visit_pixels<T>(problem, k, false, [&](int32_t y, int32_t x, Number value) {
      image[y * bytes + x / 8] |= static_cast<uint8_t>(store(value) << (x % 8));
    });
  }
}

void paste(const PasteProblem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.result == PasteResult::kValue) return paste_typed<T, pooled_t<T>>(problem);
    if (problem.result == PasteResult::kBits) return paste_bits_typed<T>(problem);
    paste_typed<T, uint8_t>(problem);
  });
}

template <class T>
void paste_changes_typed(const PasteProblem& problem, const PasteChanges& changes) {
  using Number = acc_t<T>;
  const PasteStore<Number, uint8_t> store(problem);
  std::fill_n(changes.part_changes, problem.masks * changes.parts, 0);
  int64_t count = 0;
  for (int64_t k = 0; k < problem.masks; ++k) {
    uint8_t before = 0;
    visit_pixels<T>(problem, k, true, [&](int32_t y, int32_t x, Number value) {
      if (store(value) == before) return;
      before = store(value);
      ++changes.part_changes[k * changes.parts + x / PasteChanges::kPartColumns];
      if (count < changes.room) changes.place[count] = x * problem.height + y;
      ++count;
    });
  }
}

void paste_changes(const PasteProblem& problem, const PasteChanges& changes) {
  with_feature_type(problem.dtype, [&](auto type) {
    paste_changes_typed<typename decltype(type)::type>(problem, changes);
  });
}

/// value: of the filter, whose weights have the sum `coverage` where the edge does not stand in.
template <class T>
void crop_batch_typed(const BatchProblem& batch) {
  using Number = acc_t<T>;
  const Problem& problem = batch.problem;
  for (int64_t k = 0; k < problem.boxes; ++k) {
    const Box<Number> box = read_box<Number>(problem, k);
    const BatchImage image = box.level < 0 ? BatchImage{} : batch.image<T>(box.image);
    const auto line = [&](int32_t direction, int32_t size) {
      return box.level < 0 ? FilterLine::of(problem.filter, 0, 0, 0, 1)
                           : filter_line(problem, box, direction, size);
    };
    const FilterLine along_y = line(kY, image.height), along_x = line(kX, image.width);
    for (int32_t i = 0; i < problem.out_height; ++i) {
      const auto row = along_y.row<Number>(i);
      for (int32_t j = 0; j < problem.out_width; ++j) {
        const auto column = along_x.row<Number>(j);
        for (int64_t c = 0; c < problem.channels; ++c) {
          double sum = 0;
          for (int32_t y = 0; y < row.count; ++y) {
            for (int32_t x = 0; x < column.count; ++x) {
              const double weight = static_cast<double>(row.weight(y)) * column.weight(x);
              if (weight == 0) continue;
              const auto* data = static_cast<const T*>(image.data);
              sum +=
                  weight * load_value(data[c * image.stride_c + (row.first + y) * image.stride_h +
                                           (column.first + x) * image.stride_w]);
            }
          }
          const double covered = static_cast<double>(row.coverage) * column.coverage;
          sum += batch.fill * (1 - covered);
          const double value = sum * batch.multiplier[c] + batch.offset[c];
          with_gradient_type(batch.result, [&](auto type) {
            using P = typename decltype(type)::type;
            static_cast<P*>(problem.pooled)[pooled_offset(problem, k, c, i, j)] =
                Store<P>::from(static_cast<acc_t<P>>(value));
          });
        }
      }
    }
  }
}

void crop_batch(const BatchProblem& batch) {
  with_feature_type(batch.problem.dtype,
                    [&](auto type) { crop_batch_typed<typename decltype(type)::type>(batch); });
}

size_t no_workspace(const Problem&) { return 0; }

int64_t image_offset(const GlimpseProblem& problem, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * problem.stride_n + c * problem.stride_c + y * problem.stride_h + x * problem.stride_w;
}

int64_t glimpse_offset(const GlimpseProblem& problem, int64_t n, int64_t c, int64_t y, int64_t x) {
  if (problem.layout == Layout::kNhwc) {
    return ((n * problem.out_height + y) * problem.out_width + x) * problem.channels + c;
  }
  return ((n * problem.channels + c) * problem.out_height + y) * problem.out_width + x;
}

/// The sum of visit(pixel) over a plane in the order of noise.h.
template <class T, class Visit>
double ordered_sum(const GlimpseProblem& problem, int64_t n, int64_t c, const Visit& visit) {
  double lanes[kStatisticsLanes] = {};
  int64_t i = 0;
  for (int64_t y = 0; y < problem.height; ++y) {
    for (int64_t x = 0; x < problem.width; ++x) {
      const T* image = static_cast<const T*>(problem.image);
      lanes[i++ % kStatisticsLanes] +=
          visit(static_cast<double>(load_value(image[image_offset(problem, n, c, y, x)])));
    }
  }
  for (int32_t apart = kStatisticsLanes / 2; apart > 0; apart /= 2) {
    for (int32_t lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
  }
  return lanes[0];
}

template <class T>
Statistics channel_statistics(const GlimpseProblem& problem, int64_t n, int64_t c) {
  const double pixels = static_cast<double>(problem.height) * problem.width;
  Range range = Range::none();
  const double sum = ordered_sum<T>(problem, n, c, [&](double v) {
    range.add(v, v);
    return v;
  });
  Statistics statistics = range.statistics();
  const double mean = sum / pixels;
  statistics.mean = mean;
  statistics.deviation = rounded_sqrt(
      ordered_sum<T>(problem, n, c, [&](double v) { return (v - mean) * (v - mean); }) / pixels);
  return statistics;
}

template <class T>
T glimpse_noise(const GlimpseProblem& problem, int64_t n, int64_t c, int32_t i, int32_t j) {
  const bool gaussian = problem.noise == Noise::kGaussian;
  Statistics statistics = channel_statistics<T>(problem, n, c);
  if (!gaussian) {
    Range range = Range::none();
    for (int64_t other = 0; other < problem.channels; ++other) {
      const Statistics one = channel_statistics<T>(problem, n, other);
      range.add(one.low, one.high);
    }
    statistics = range.statistics();
  }
  return noise_at<T>(gaussian, statistics, static_cast<uint64_t>(*problem.seed), n, c, i, j);
}

void copy_glimpse(const GlimpseProblem& problem) {
  const auto* image = static_cast<const char*>(problem.image);
  const int64_t bytes = problem.element_bytes;
  for (int64_t n = 0; n < problem.batch; ++n) {
    const GlimpseWindow window = glimpse_window(problem, n);
    const auto inside = [](const GlimpseSpan& span, int32_t i) {
      return i >= span.begin && i < span.end;
    };
    for (int64_t c = 0; c < problem.channels; ++c) {
      for (int32_t i = 0; i < problem.out_height; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j) {
          char* out =
              static_cast<char*>(problem.output) + glimpse_offset(problem, n, c, i, j) * bytes;
          if (inside(window.y, i) && inside(window.x, j)) {
            std::memcpy(
                out,
                image + image_offset(problem, n, c, window.y.first + i, window.x.first + j) * bytes,
                bytes);
          } else if (problem.noise == Noise::kZero) {
            std::memset(out, 0, bytes);
          } else {
            with_gradient_type(problem.dtype, [&](auto type) {
              using T = typename decltype(type)::type;
              *reinterpret_cast<T*>(out) = glimpse_noise<T>(problem, n, c, i, j);
            });
          }
        }
      }
    }
  }
}

}  // namespace

const Backend& simple_backend() {
  static const Backend backend = {"simple",
                                  true,
                                  no_workspace,
                                  no_workspace,
                                  [](const Problem&) { return false; },
                                  sample,
                                  grad_features,
                                  grad_boxes,
                                  simple_frames_sample,
                                  simple_frames_maximum,
                                  simple_frames_grad_features,
                                  simple_frames_grad_boxes,
                                  [](const GlimpseProblem&) -> size_t { return 0; },
                                  copy_glimpse,
                                  paste,
                                  paste_changes,
                                  [](const BatchProblem&) -> size_t { return 0; },
                                  crop_batch};
  return backend;
}

}  // namespace glimpse
