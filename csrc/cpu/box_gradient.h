// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>

#include "problem.h"

namespace glimpse {

/// Sums of one box: d / d origin and d / d step of the y and the x axis.
struct BoxGradient {
  double origin[2], step[2];
};

/// Writes the gradient of box k: from its axes, null where it reads nothing, to its edges.
template <class A, class Op>
[[gnu::always_inline]] inline void write_box_gradient(const Op& op, const Problem& problem,
                                                      int64_t k, const Axis<A>* axes,
                                                      const BoxGradient& sums) {
  A* row = static_cast<A*>(problem.grad_box) + k * problem.box_columns;
  std::fill_n(row, problem.box_columns, A(0));
  if (axes == nullptr) return;
  A* edges = row + problem.image_column;
  for (const Direction direction : {kY, kX}) {
    const Axis<A>& axis = axes[direction];
    const double origin = sums.origin[direction], step = sums.step[direction];
    // Added, because several edges may be one column.
    edges[op.lo_column(direction)] += static_cast<A>(origin * axis.origin_lo + step * axis.step_lo);
    edges[op.hi_column(direction)] += static_cast<A>(origin * axis.origin_hi + step * axis.step_hi);
  }
}

}  // namespace glimpse
