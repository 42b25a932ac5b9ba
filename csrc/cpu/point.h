// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/box_gradient.h"
#include "geometry/tables.h"
#include "half.h"
#include "problem.h"

namespace glimpse {

// Note [Reading points]
// A point is a box of one cell and one sample: what a box costs, it pays for four pixels. So where
// points are read is computed with all that they share known beforehand. The operator of
// point_sample is spelt out (PlainPoints), so that its formulas, which are those of every box, are
// compiled for it alone; and points that come image by image need no division to find their image.

/// Operator for point_sample, in place of the general one.
template <bool corners>
struct PlainPoints {
  static constexpr Crop kCrop = {Crop::kPoint, Unit::kFraction, corners, Crop::kZeros, 0, 0};

  static bool serves(const Operator& op) {
    return op.kind == Operator::kCrop && op.crop.order == kCrop.order &&
           op.crop.unit == kCrop.unit && (op.crop.align_corners != 0) == corners &&
           op.crop.outside == kCrop.outside && op.crop.single == 0;
  }
  template <class T>
  Axis<T> axis(int32_t direction, const T* box, T scale, int32_t size, int32_t cells) const {
    const Columns columns = kCrop.columns(direction);
    return kCrop.axis(box[columns.lo], box[columns.hi], scale, size, cells);
  }
  int32_t lo_column(int32_t direction) const { return kCrop.columns(direction).lo; }
  int32_t hi_column(int32_t direction) const { return kCrop.columns(direction).hi; }
  template <class T>
  Taps<T> taps(T position, int32_t size) const {
    return kCrop.border().taps(position, size);
  }
};

/// Calls each(op) with the operator of `problem`.
template <class Each>
void with_operator(const Problem& problem, const Each& each) {
  if (problem.tangent_axes == 0) {
    if (PlainPoints<false>::serves(problem.op)) return each(PlainPoints<false>());
    if (PlainPoints<true>::serves(problem.op)) return each(PlainPoints<true>());
  }
  each(problem.op);
}

/// What a point reads along one axis: taps in the weighting of the call.
template <class A>
struct PointAxis {
  Axis<A> axis;
  Taps<A> taps;
};

template <class A, class Op>
PointAxis<A> point_axis(const Op& op, const Problem& problem, const Box<A>& box,
                        Direction direction) {
  const Level& level = problem.level[0];
  const int32_t size = direction == kY ? level.height : level.width;
  PointAxis<A> line;
  line.axis = op.axis(direction, box.edges, static_cast<A>(level.scale), size, 1);
  line.taps.count = 0;
  if (line.axis.samples == 0) return line;
  line.axis.samples = 1;  // Known: what is divided by it is not divided.
  line.taps = op.taps(line.axis.position(0, 0), size);
  if constexpr (std::is_same_v<Op, Operator>) {
    if ((problem.tangent_axes >> direction & 1) != 0) {
      const auto weighting = Weighting<A>::along(line.axis, box.tangent[op.lo_column(direction)],
                                                 box.tangent[op.hi_column(direction)]);
      for (int32_t i = 0; i < line.taps.count; ++i) {
        line.taps.weight[i] =
            weighting(line.taps.weight[i], line.taps.slope[i], line.axis.progress(0, 0));
      }
    }
  }
  return line;
}

/// The pixels that a point reads, as offsets into a plane.
template <class A>
struct Point {
  int64_t image;
  int64_t offset[4];
  A weight[4];
  int32_t count;  // 0: reads nothing
};

template <class A, class Op>
void read_point(const Op& op, const Problem& problem, const Box<A>& box, Point<A>& point) {
  point.image = box.image;
  point.count = 0;
  if (box.level < 0) return;
  const PointAxis<A> along_y = point_axis(op, problem, box, kY);
  const PointAxis<A> along_x = point_axis(op, problem, box, kX);
  const int64_t stride_h = problem.level[0].stride_h, stride_w = problem.level[0].stride_w;
  const Taps<A>&y = along_y.taps, &x = along_x.taps;
  const auto add = [&](int32_t t, int32_t i, int32_t j) {
    point.offset[t] = y.pixel[i] * stride_h + x.pixel[j] * stride_w;
    point.weight[t] = y.weight[i] * x.weight[j];
  };
  if (y.count == 2 && x.count == 2) {
    point.count = 4;
    add(0, 0, 0), add(1, 0, 1), add(2, 1, 0), add(3, 1, 1);
    return;
  }
  for (int32_t i = 0; i < y.count; ++i) {
    for (int32_t j = 0; j < x.count; ++j) add(point.count++, i, j);
  }
}

/// Whether the image of a point is data. Otherwise points come image by image.
inline bool images_vary(const Problem& problem) {
  return problem.image_index != nullptr || problem.image_column != 0;
}

/// Calls visit(k, box) for points first <= k < end.
template <class A, class Visit>
void for_each_point(const Problem& problem, int64_t first, int64_t end, const Visit& visit) {
  if (first >= end) return;
  Box<A> box = read_box<A>(problem, first);
  if (images_vary(problem) || problem.box_level != nullptr) {
    for (int64_t k = first; k < end; ++k) visit(k, read_box<A>(problem, k));
    return;
  }
  int64_t left = problem.boxes_per_image - first % problem.boxes_per_image;
  for (int64_t k = first; k < end; ++k) {
    visit(k, box);
    box.edges += problem.box_columns;
    if (box.tangent != nullptr) box.tangent += problem.box_columns;
    if (--left == 0) {
      left = problem.boxes_per_image;
      if (++box.image >= problem.batch) box.level = -1;
    }
  }
}

/// Room for points, which is not cleared.
template <class A>
class Points {
 public:
  explicit Points(int64_t most) : points_(new Point<A>[static_cast<size_t>(most)]) {}

  Point<A>& operator[](int64_t i) { return points_[static_cast<size_t>(i)]; }
  const Point<A>& operator[](int64_t i) const { return points_[static_cast<size_t>(i)]; }

  /// Point k goes to `to` + k - first.
  void read(const Problem& problem, int64_t first, int64_t end, int64_t to = 0) {
    Point<A>* points = points_.get() + to;
    with_operator(problem, [&](const auto& op) {
      for_each_point<A>(problem, first, end, [&](int64_t k, const Box<A>& box) {
        read_point(op, problem, box, points[k - first]);
      });
    });
  }

 private:
  const std::unique_ptr<Point<A>[]> points_;
};

constexpr int64_t kChannelsTogether = 32;

/// Planes that are read together: small ones as many as the innermost cache holds, which planes of
/// a power of two would fill at the same few places.
inline int64_t planes_of_points(const Problem& problem, size_t element) {
  constexpr int64_t kSmall = 8 << 10, kCache = 16 << 10;
  const int64_t plane =
      int64_t{problem.level[0].height} * problem.level[0].width * static_cast<int64_t>(element);
  if (plane > kSmall) return kChannelsTogether;
  return std::clamp<int64_t>(kCache / std::max<int64_t>(plane, 1), 1, kChannelsTogether);
}

/// The pooled values of points, which are dense or have Problem::pooled_stride.
template <class P>
struct PointValues {
  explicit PointValues(const Problem& problem)
      : data(static_cast<P*>(problem.pooled)), point(problem.channels), image(0), channel(1) {
    if (problem.strided) {
      point = problem.pooled_stride[2];
      image = problem.pooled_stride[0] - problem.boxes_per_image * point;
      channel = problem.pooled_stride[1];
    }
  }

  /// Channel c of point k, which lies in image n.
  P* at(int64_t k, int64_t n, int64_t c) const {
    return data + k * point + n * image + c * channel;
  }

  /// Copies `count` channels from there on.
  template <class A>
  void load(int64_t k, int64_t n, int64_t c, int64_t count, A* to) const {
    const P* from = at(k, n, c);
    if (channel != 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = load_value(from[i * channel]);
    } else if (count == kChannelsTogether) {
      for (int64_t i = 0; i < kChannelsTogether; ++i) to[i] = load_value(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = load_value(from[i]);
    }
  }

  P* data;
  int64_t point, image, channel;  // strides
};

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

/// Some channels that are neighbours. Functions that took or gave vectors would pass them by
/// memory.
template <class A>
struct ChannelLanes {
  static constexpr int64_t kCount = 16 / sizeof(A);
  typedef A type __attribute__((vector_size(16), aligned(sizeof(A)), may_alias));
};

/// Adds the sums of products of `count` channels of a gradient with those of each pixel of a point:
/// lane by lane, then over the lanes.
template <class A>
void add_products(const A* grad, const A* pixels, const Point<A>& point, int64_t count,
                  double* products) {
  using Lanes = ChannelLanes<A>;
  const int64_t whole = count - count % Lanes::kCount;
  with_count(point.count, [&](auto taps) {
    const A* pixel[taps];
    for (int t = 0; t < taps; ++t) pixel[t] = pixels + point.offset[t];
    typename Lanes::type sum[taps] = {};
    for (int64_t c = 0; c < whole; c += Lanes::kCount) {
      const auto one = *reinterpret_cast<const typename Lanes::type*>(grad + c);
      for (int t = 0; t < taps; ++t) {
        sum[t] += one * *reinterpret_cast<const typename Lanes::type*>(pixel[t] + c);
      }
    }
    A rest[taps] = {};
    for (int64_t c = whole; c < count; ++c) {
      for (int t = 0; t < taps; ++t) rest[t] += grad[c] * pixel[t][c];
    }
    for (int t = 0; t < taps; ++t) {
      A total = sum[t][0];
      for (int64_t i = 1; i < Lanes::kCount; ++i) total += sum[t][i];
      products[t] += total + rest[t];
    }
  });
}

/// Adds `count` channels of a gradient, weighted, to each pixel of a point.
template <class A>
void add_weighted(const A* grad, A* pixels, const Point<A>& point, int64_t count) {
  using Lanes = ChannelLanes<A>;
  const int64_t whole = count - count % Lanes::kCount;
  for (int32_t t = 0; t < point.count; ++t) {
    A* to = pixels + point.offset[t];
    const A weight = point.weight[t];
    for (int64_t c = 0; c < whole; c += Lanes::kCount) {
      *reinterpret_cast<typename Lanes::type*>(to + c) +=
          weight * *reinterpret_cast<const typename Lanes::type*>(grad + c);
    }
    for (int64_t c = whole; c < count; ++c) to[c] += weight * grad[c];
  }
}

/// Writes the gradient of points first <= k < end from the products of gradient and pixel at each
/// of their taps, four numbers for each point.
template <class A>
void write_point_gradients(const Problem& problem, int64_t first, int64_t end,
                           const double* products) {
  with_operator(problem, [&](const auto& op) {
    for_each_point<A>(problem, first, end, [&](int64_t k, const Box<A>& box) {
      const double* product = products + 4 * (k - first);
      PointAxis<A> along[2];
      along[kY].taps.count = along[kX].taps.count = 0;
      if (box.level >= 0) {
        along[kY] = point_axis(op, problem, box, kY);
        along[kX] = point_axis(op, problem, box, kX);
      }
      const Taps<A>&y = along[kY].taps, &x = along[kX].taps;
      if (y.count * x.count == 0) return write_box_gradient<A>(op, problem, k, nullptr, {});
      BoxGradient sums = {};
      for (int32_t i = 0; i < y.count; ++i) {
        for (int32_t j = 0; j < x.count; ++j, ++product) {
          sums.origin[kY] += y.slope[i] * x.weight[j] * *product;
          sums.origin[kX] += y.weight[i] * x.slope[j] * *product;
        }
      }
      for (const Direction direction : {kY, kX}) {
        sums.step[direction] = sums.origin[direction] * along[direction].axis.progress(0, 0);
      }
      const Axis<A> axes[2] = {along[kY].axis, along[kX].axis};
      write_box_gradient(op, problem, k, axes, sums);
    });
  });
}

}  // namespace glimpse
