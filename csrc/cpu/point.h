// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/box_gradient.h"
#include "geometry/tables.h"
#include "problem.h"

namespace glimpse {

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

/// Writes the gradient of point k from the products of gradient and pixel at each of its taps.
template <class A>
void write_point_gradient(const Problem& problem, int64_t k, const Point<A>& point,
                          const double* products) {
  BoxGradient sums = {};
  for (const Direction direction : {kY, kX}) {
    for (int32_t t = 0; t < point.count; ++t) {
      sums.origin[direction] += point.slope[direction][t] * products[t];
    }
    if (point.count > 0) {
      sums.step[direction] = sums.origin[direction] * point.progress[direction];
    }
  }
  write_box_gradient(problem, k, point.count > 0 ? point.axis : nullptr, sums);
}

}  // namespace glimpse
