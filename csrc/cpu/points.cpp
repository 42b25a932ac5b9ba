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

constexpr int64_t kPointsTogether = 256;

/// Calls body(begin, end) for runs of points, on several threads where that pays.
template <class Body>
void for_each_run(const Problem& problem, const Body& body) {
  const int64_t runs = (problem.boxes + kPointsTogether - 1) / kPointsTogether;
  const int64_t workers = workers_for(4 * problem.boxes * problem.channels);
  parallel_tasks(runs, workers, [&](const auto& next) {
    for (int64_t run = next(); run < runs; run = next()) {
      const int64_t begin = run * kPointsTogether;
      body(begin, std::min(begin + kPointsTogether, problem.boxes));
    }
  });
}

template <class T>
void sample_planes(const Problem& problem) {
  using A = acc_t<T>;
  const Level& level = problem.level[0];
  const auto fill = Store<pooled_t<T>>::from(static_cast<A>(problem.fill));
  const int64_t block = planes_of_points(problem, sizeof(T));
  for_each_run(problem, [&](int64_t begin, int64_t end) {
    Points<A> points(end - begin);
    points.read(problem, begin, end);
    for (int64_t first = 0; first < problem.channels; first += block) {
      const int64_t count = std::min(block, problem.channels - first);
      auto* to = static_cast<pooled_t<T>*>(problem.pooled) + begin * problem.channels + first;
      for (int64_t k = begin; k < end; ++k, to += problem.channels) {
        const Point<A>& point = points[k - begin];
        if (point.count == 0) {
          std::fill_n(to, count, fill);
          continue;
        }
        const T* plane = static_cast<const T*>(level.data) + point.image * level.stride_n +
                         first * level.stride_c;
        with_count(point.count, [&](auto taps) {
          const int64_t step = level.stride_c;
          const Point<A> at = point;
          const auto value = [&](const T* from) {
            A sum = at.weight[0] * load_value(from[at.offset[0]]);
            for (int t = 1; t < taps; ++t) sum += at.weight[t] * load_value(from[at.offset[t]]);
            return Store<pooled_t<T>>::from(sum);
          };
          int64_t c = 0;
          for (; c + 4 <= count; c += 4, plane += 4 * step) {
            const auto a = value(plane), b = value(plane + step);
            const auto d = value(plane + 2 * step), e = value(plane + 3 * step);
            to[c] = a, to[c + 1] = b, to[c + 2] = d, to[c + 3] = e;
          }
          for (; c < count; ++c, plane += step) to[c] = value(plane);
        });
      }
    }
  });
}

/// Where the channels of a pixel are neighbours.
template <class T>
void sample_pixels(const Problem& problem) {
  const Level& level = problem.level[0];
  const T fill = static_cast<T>(problem.fill);
  const int64_t channels = problem.channels;
  for_each_run(problem, [&](int64_t begin, int64_t end) {
    Points<T> points(end - begin);
    points.read(problem, begin, end);
    T* __restrict to = static_cast<T*>(problem.pooled) + begin * channels;
    for (int64_t k = begin; k < end; ++k, to += channels) {
      const Point<T>& point = points[k - begin];
      if (point.count == 0) {
        std::fill_n(to, channels, fill);
        continue;
      }
      const T* image = static_cast<const T*>(level.data) + point.image * level.stride_n;
      with_count(point.count, [&](auto taps) {
        const T* pixel[taps];
        T weight[taps];
        for (int t = 0; t < taps; ++t) {
          pixel[t] = image + point.offset[t];
          weight[t] = point.weight[t];
        }
        for (int64_t c = 0; c < channels; ++c) {
          T sum = weight[0] * pixel[0][c];
          for (int t = 1; t < taps; ++t) sum += weight[t] * pixel[t][c];
          to[c] = sum;
        }
      });
    }
  });
}

template <class T>
void grad_boxes_planes(const Problem& problem) {
  using A = acc_t<T>;
  const Level& level = problem.level[0];
  const PointValues<const pooled_t<T>> pooled(problem);
  const int64_t block = planes_of_points(problem, sizeof(T));
  for_each_run(problem, [&](int64_t begin, int64_t end) {
    Points<A> points(end - begin);
    points.read(problem, begin, end);
    double products[4 * kPointsTogether] = {};  // of gradient and pixel, for each tap of each point
    for (int64_t first = 0; first < problem.channels; first += block) {
      const int64_t count = std::min(block, problem.channels - first);
      for (int64_t k = begin; k < end; ++k) {
        const Point<A>& point = points[k - begin];
        if (point.count == 0) continue;
        const auto* from = pooled.at(k, point.image, first);
        const T* plane = static_cast<const T*>(level.data) + point.image * level.stride_n +
                         first * level.stride_c;
        with_count(point.count, [&](auto taps) {
          const int64_t step = level.stride_c, values = pooled.channel;
          A sum[taps] = {};
          for (int64_t c = 0; c < count; ++c, plane += step, from += values) {
            const A g = load_value(*from);
            for (int t = 0; t < taps; ++t) sum[t] += g * load_value(plane[point.offset[t]]);
          }
          for (int t = 0; t < taps; ++t) products[4 * (k - begin) + t] += sum[t];
        });
      }
    }
    write_point_gradients<A>(problem, begin, end, products);
  });
}

template <class T>
void grad_boxes_pixels(const Problem& problem) {
  const Level& level = problem.level[0];
  const PointValues<const T> pooled(problem);
  for_each_run(problem, [&](int64_t begin, int64_t end) {
    Points<T> points(end - begin);
    points.read(problem, begin, end);
    double products[4 * kPointsTogether] = {};
    for (int64_t k = begin; k < end; ++k) {
      const Point<T>& point = points[k - begin];
      if (point.count == 0) continue;
      const T* image = static_cast<const T*>(level.data) + point.image * level.stride_n;
      for (int64_t first = 0; first < problem.channels; first += kChannelsTogether) {
        const int64_t count = std::min(kChannelsTogether, problem.channels - first);
        T grad[kChannelsTogether];
        pooled.load(k, point.image, first, count, grad);
        add_products(grad, image + first, point, count, products + 4 * (k - begin));
      }
    }
    write_point_gradients<T>(problem, begin, end, products);
  });
}

/// The points of each image, in their order.
template <class T>
class PointsByImage {
 public:
  PointsByImage(const Problem& problem, const Problem& seen)
      : points_(problem.boxes),
        counted_(!images_vary(problem)),
        each_(problem.boxes == 0 ? 0 : problem.boxes_per_image) {
    const int64_t workers = workers_for(16 * problem.boxes);
    const int64_t grain = workers == 1 ? std::max<int64_t>(problem.boxes, 1) : 1024;
    parallel_for(0, problem.boxes, grain,
                 [&](int64_t begin, int64_t end) { points_.read(seen, begin, end, begin); });
    if (counted_) return;
    start_.assign(static_cast<size_t>(problem.batch) + 1, 0);
    order_.resize(static_cast<size_t>(problem.boxes));
    for (int64_t k = 0; k < problem.boxes; ++k) {
      if (points_[k].count > 0) ++start_[points_[k].image + 1];
    }
    for (int64_t n = 0; n < problem.batch; ++n) start_[n + 1] += start_[n];
    std::vector<int64_t> place(start_.begin(), start_.end() - 1);
    for (int64_t k = 0; k < problem.boxes; ++k) {
      if (points_[k].count > 0) order_[place[points_[k].image]++] = k;
    }
  }

  /// Calls visit(k, point) for the points of an image that read something.
  template <class Visit>
  void for_each(int64_t image, const Visit& visit) const {
    if (!counted_) {
      for (int64_t i = start_[image]; i < start_[image + 1]; ++i) {
        visit(order_[i], points_[order_[i]]);
      }
      return;
    }
    for (int64_t k = image * each_; k < (image + 1) * each_; ++k) {
      if (points_[k].count > 0) visit(k, points_[k]);
    }
  }

 private:
  Points<T> points_;
  const bool counted_;
  const int64_t each_;
  std::vector<int64_t> start_, order_;
};

/// Adds the gradient of points to a block of channels that lie `channel` apart.
template <class T>
void add_to_planes(const PointsByImage<T>& points, const PointValues<const T>& pooled,
                   int64_t image, int64_t first, int64_t count, T* planes, int64_t channel) {
  points.for_each(image, [&](int64_t k, const Point<T>& point) {
    const T* from = pooled.at(k, image, first);
    with_count(point.count, [&](auto taps) {
      const Point<T> at = point;
      const int64_t step = pooled.channel;
      T* plane = planes;
      for (int64_t c = 0; c < count; ++c, plane += channel, from += step) {
        const T grad = *from;
        for (int t = 0; t < taps; ++t) plane[at.offset[t]] += at.weight[t] * grad;
      }
    });
  });
}

/// The same where channels are neighbours.
template <class T>
void add_to_pixels(const PointsByImage<T>& points, const PointValues<const T>& pooled,
                   int64_t image, int64_t first, int64_t count, T* pixels) {
  points.for_each(image, [&](int64_t k, const Point<T>& point) {
    T grad[kChannelsTogether];
    pooled.load(k, image, first, count, grad);
    add_weighted(grad, pixels, point, count);
  });
}

/// Tasks are (image, block of channels). The kernels of pixels take the blocks of an image one
/// after the other where images alone are enough tasks: rows of memory are then written in full.
template <class T>
void grad_features_typed(const Problem& problem) {
  const Level& level = problem.level[0];
  const bool planes = problem.layout == Layout::kNchw;
  const bool tiled = planes && uses_tiles(problem);
  const int64_t pixels = int64_t{level.height} * level.width;
  const int64_t workers =
      workers_for(problem.channels * (problem.batch * pixels + 8 * problem.boxes));
  const PointsByImage<T> points(problem, tiled ? in_tiles(problem) : problem);
  const PointValues<const T> pooled(problem);
  const bool whole = !planes && (workers == 1 || problem.batch >= 2 * workers);
  const int64_t block = whole              ? problem.channels
                        : planes && !tiled ? planes_of_points(problem, sizeof(T))
                                           : kChannelsTogether;
  const int64_t blocks = (problem.channels + block - 1) / block, tasks = problem.batch * blocks;
  parallel_tasks(tasks, workers, [&](const auto& next) {
    std::optional<Tile<T>> tile;
    if (tiled) tile.emplace(level);
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t image = task / blocks, first = task % blocks * block;
      const int64_t count = std::min(block, problem.channels - first);
      T* to = static_cast<T*>(level.data) + image * level.stride_n + first * level.stride_c;
      if (tiled) {
        tile->clear();
        add_to_pixels(points, pooled, image, first, count, tile->data());
        tile->store(to, count);
      } else if (planes) {
        std::fill_n(to, count * pixels, T(0));
        add_to_planes(points, pooled, image, first, count, to, level.stride_c);
      } else {
        if (whole) {
          std::fill_n(to, pixels * count, T(0));
        } else {
          for (int64_t i = 0; i < pixels; ++i) std::fill_n(to + i * problem.channels, count, T(0));
        }
        for (int64_t c = 0; c < count; c += kChannelsTogether) {
          add_to_pixels(points, pooled, image, first + c, std::min(kChannelsTogether, count - c),
                        to + c);
        }
      }
    }
  });
}

}  // namespace

bool is_points(const Problem& problem) {
  if (problem.out_height != 1 || problem.out_width != 1 || problem.levels != 1 ||
      problem.op.fixed_samples() != 1 || problem.filter.used) {
    return false;
  }
  // Of 16 bits that are neighbours, vectors of another instruction set convert many at once.
  return problem.layout == Layout::kNchw || problem.dtype == Dtype::kFloat32 ||
         problem.dtype == Dtype::kFloat64;
}

bool is_wide_points(const Problem& problem) {
  return (problem.dtype == Dtype::kFloat32 || problem.dtype == Dtype::kFloat64) &&
         is_points(problem);
}

void sample_points(const Problem& problem) {
  if (problem.layout == Layout::kNhwc) {
    return problem.dtype == Dtype::kFloat64 ? sample_pixels<double>(problem)
                                            : sample_pixels<float>(problem);
  }
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    uses_tiles(problem) ? sample_tiles<T>(problem) : sample_planes<T>(problem);
  });
}

void grad_boxes_of_points(const Problem& problem) {
  if (problem.layout == Layout::kNhwc) {
    return problem.dtype == Dtype::kFloat64 ? grad_boxes_pixels<double>(problem)
                                            : grad_boxes_pixels<float>(problem);
  }
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    uses_tiles(problem) ? grad_boxes_tiles<T>(problem) : grad_boxes_planes<T>(problem);
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
