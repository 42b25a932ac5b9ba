// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: boxes of images with few channels.
//
// Note [Cells in lanes]
// An image of three channels leaves most lanes idle where lanes are channels. Here lanes are the
// cells of a row, or the columns of a window, and each lane picks its taps out of a row that lies
// in registers. In kNhwc the channels of a pixel are neighbours, so a row of pixels is a row of
// elements and a cell is as many elements as there are channels; the same code then serves both
// layouts, with one plane for all channels or one for each.

namespace {

/// Rows of elements: the planes that a call of a kernel serves, and how they lie.
struct Planes {
  int64_t first, count;  // kNchw: channels; kNhwc: 0 and 1
  int32_t interleave;    // elements of a pixel
  int64_t elements;      // of a row of cells
  int64_t pooled;        // offset of the first plane of a box

  template <class A>
  Planes(const Work<A>& work, int64_t box) {
    const Problem& problem = *work.problem;
    const bool nchw = problem.layout == Layout::kNchw;
    first = nchw ? work.channel : 0;
    count = nchw ? work.channels : 1;
    interleave = nchw ? 1 : static_cast<int32_t>(problem.channels);
    elements = int64_t{problem.out_width} * interleave;
    pooled = box * problem.channels * cells_of(problem) + first * cells_of(problem);
  }
};

/// Elements of a row of `columns` columns, and room for reading past it.
template <class A>
int64_t row_room(int64_t elements) {
  constexpr int64_t L = kLanes<A>;
  return (elements + L - 1) / L * L + 2 * L;
}

/// The taps of vector v of taps, one for each lane.
template <class A>
GLIMPSE_INLINE Vector<A> pick(const LaneTable<A>& table, int32_t v, const A* row) {
  const A* from = row + table.base[v];
  const int32_t* index = table.index + int64_t{v} * kLanes<A>;
  const uint8_t kind = table.kind[v];
  const Vector<A> taps = kind & LaneTable<A>::kFar ? pick_far(from, index) : pick_near(from, index);
  return kind & LaneTable<A>::kPartial ? keep<A>(taps, table.tap_mask + int64_t{v} * kLanes<A>)
                                       : taps;
}

/// Block b of table * row.
template <class A>
GLIMPSE_INLINE Vector<A> apply_block(const LaneTable<A>& table, int32_t b, const A* row) {
  constexpr int64_t L = kLanes<A>;
  Vector<A> sum = {};
  for (int32_t v = table.start[b]; v < table.start[b + 1]; ++v) {
    sum = multiply_add(load(table.weight + v * L), pick(table, v, row), sum);
  }
  return sum;
}

template <class T>
void sample_narrow(const Work<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const Problem& problem = *work.problem;
  const Level& level = problem.level[plan.level];
  const Planes planes(work, plan.box);
  const int64_t elements = planes.elements;
  A* row = work.scratch;
  const int64_t whole = elements / L;
  const auto fill = fill_of<pooled_t<T>, A>(problem);
  auto* to = static_cast<pooled_t<T>*>(problem.pooled) + planes.pooled;
  const T* window = image_of<T>(level, plan.image) + planes.first * level.stride_c +
                    (level.width > 1 ? plan.first_column : 0);
  __builtin_memset(row + plan.vectors * L, 0, sizeof(A) * 2 * L);
  for (int64_t c = 0; c < planes.count; ++c, window += level.stride_c) {
    for (int32_t i = 0; i < problem.out_height; ++i, to += elements) {
      if (i < plan.y.first || i >= plan.y.end || plan.y.tap_begin(i) == plan.y.tap_end(i)) {
        fill_cells(to, elements, fill);
        continue;
      }
      const int32_t tap = plan.y.tap_begin(i);
      sum_rows<T>(window, 0, level.stride_h, 1, plan.y.index + tap, plan.y.weight + tap,
                  plan.y.tap_end(i) - tap, plan.vectors, plan.last_valid, row);
      for (int32_t b = 0; b < whole; ++b) store(to + b * L, apply_block(plan.lanes, b, row));
      if (whole < plan.lanes.blocks) {
        store_part(to + whole * L, apply_block(plan.lanes, static_cast<int32_t>(whole), row),
                   static_cast<int>(elements - whole * L));
      }
      for (int32_t u = 0; u < plan.unread_count; ++u) to[plan.unread[u]] = fill;
    }
  }
}

/// Copies a row of cells as A; what follows it up to its room is not read into any sum.
template <class P, class A>
void load_row(const P* from, int64_t elements, A* row) {
  constexpr int64_t L = kLanes<A>;
  int64_t e = 0;
  for (; e + L <= elements; e += L) store(row + e, load(from + e));
  if (e < elements) store(row + e, load_part(from + e, static_cast<int>(elements - e)));
}

template <class T>
void grad_features_narrow(const GradWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                          const Plane<acc_t<T>>& plane) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const Problem& problem = *work.problem;
  const Planes planes(work, plan.box);
  const Table<A>& rows = plan.y_transposed;
  const Band<A> band = band_of(work, rows);
  if (band.first == band.end) return;
  // Only the cells that reach the band.
  const int32_t taps_begin = rows.tap_begin(band.first), taps_end = rows.tap_end(band.end - 1);
  int32_t first = problem.out_height, end = 0;
  for (int32_t t = taps_begin; t < taps_end; ++t) {
    first = rows.index[t] < first ? rows.index[t] : first;
    end = rows.index[t] + 1 > end ? rows.index[t] + 1 : end;
  }
  const int64_t elements = planes.elements;
  const int64_t block = int64_t{plan.vectors} * L;
  A* cells = work.scratch;
  A* expanded = cells + row_room<A>(elements);
  const T* from = static_cast<const T*>(problem.pooled) + planes.pooled;
  for (int64_t c = 0; c < planes.count; ++c, from += problem.out_height * elements) {
    for (int32_t i = first; i < end; ++i) {
      load_row(from + i * elements, elements, cells);
      for (int32_t b = 0; b < plan.vectors; ++b) {
        store(expanded + i * block + b * L,
              b < plan.lanes.blocks ? apply_block(plan.lanes, b, cells) : Vector<A>{});
      }
    }
    for (int32_t r = band.first; r < band.end; ++r) {
      const int32_t tap = rows.tap_begin(r);
      A* pixels = plane.data + c * plane.stride_c +
                  (rows.target[r] - work.first_row) * plane.stride_h + plan.first_column;
      int32_t taps = rows.tap_end(r) - tap;
      const int32_t* index = rows.index + tap;
      const A* weight = rows.weight + tap;
#define GLIMPSE_CALL(n) \
  add_few_rows<n, A>(pixels, 0, 1, expanded, block, index, weight, plan.vectors, plan.last_valid)
      GLIMPSE_IN_GROUPS(taps, index, weight, GLIMPSE_CALL)
#undef GLIMPSE_CALL
    }
  }
}

template <class T>
void grad_boxes_narrow(const Work<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                       BoxGradient& gradient) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const Problem& problem = *work.problem;
  const Level& level = problem.level[plan.level];
  const Planes planes(work, plan.box);
  const int64_t elements = planes.elements;
  const int64_t room = int64_t{plan.vectors} * L + 2 * L;
  // A row of pixels under the weights and the slopes along y.
  A* value = work.scratch;
  A* along_origin = value + room;
  A* along_step = along_origin + room;
  A* cells = along_step + room;
  const auto* from = static_cast<const pooled_t<T>*>(problem.pooled) + planes.pooled;
  const T* window = image_of<T>(level, plan.image) + planes.first * level.stride_c +
                    (level.width > 1 ? plan.first_column : 0);
  for (A* row = value; row < cells; row += room) {
    __builtin_memset(row + plan.vectors * L, 0, sizeof(A) * 2 * L);
  }
  const LaneTable<A>& table = plan.lanes;
  LaneSums<A> sums;
  for (int64_t c = 0; c < planes.count; ++c, window += level.stride_c) {
    for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
      const int32_t tap = plan.y.tap_begin(i), taps = plan.y.tap_end(i) - tap;
      if (taps == 0) continue;
      const auto sum = [&](const A* weights, A* row) {
        sum_rows<T>(window, 0, level.stride_h, 1, plan.y.index + tap, weights + tap, taps,
                    plan.vectors, plan.last_valid, row);
      };
      sum(plan.y.weight, value);
      sum(plan.y.slope_origin, along_origin);
      sum(plan.y.slope_step, along_step);
      load_row(from + (c * problem.out_height + i) * elements, elements, cells);
      for (int32_t b = 0; b < table.blocks; ++b) {
        Vector<A> y_origin = {}, y_step = {}, x_origin = {}, x_step = {};
        for (int32_t v = table.start[b]; v < table.start[b + 1]; ++v) {
          const Vector<A> weight = load(table.weight + v * L);
          y_origin = multiply_add(weight, pick(table, v, along_origin), y_origin);
          y_step = multiply_add(weight, pick(table, v, along_step), y_step);
          const Vector<A> pixel = pick(table, v, value);
          x_origin = multiply_add(load(table.slope_origin + v * L), pixel, x_origin);
          x_step = multiply_add(load(table.slope_step + v * L), pixel, x_step);
        }
        const Vector<A> g = keep<A>(load(cells + b * L), table.row_mask + b * L);
        sums.origin[kY] = multiply_add(g, y_origin, sums.origin[kY]);
        sums.step[kY] = multiply_add(g, y_step, sums.step[kY]);
        sums.origin[kX] = multiply_add(g, x_origin, sums.origin[kX]);
        sums.step[kX] = multiply_add(g, x_step, sums.step[kX]);
      }
    }
  }
  sums.add_to(gradient);
}

}  // namespace
