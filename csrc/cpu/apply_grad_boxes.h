// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: gradients of pooled values to gradients of boxes.

namespace {

// ------------------------------------------------------------------------ gradient of the boxes

/// Sums of one box and block of channels, still spread over lanes.
template <class A>
struct LaneSums {
  Vector<A> origin[2] = {}, step[2] = {};

  void add_to(BoxGradient& sums) const {
    for (int d = 0; d < 2; ++d) {
      sums.origin[d] += sum_lanes<A>(origin[d]);
      sums.step[d] += sum_lanes<A>(step[d]);
    }
  }
};

/// The terms of one row of cells that come from the slopes along x.
template <class A>
void add_column_slopes(const A* cells, const A* columns, const Table<A>& table, int32_t vectors,
                       LaneSums<A>& sums) {
  constexpr int L = kLanes<A>;
  const int64_t width = int64_t{vectors} * L;
  for (int32_t j = 0; j < table.end; ++j) {
    if (table.start[j] == table.start[j + 1]) continue;  // reads nothing, not even a NaN gradient
    for (int32_t v = 0; v < vectors; ++v) {
      Vector<A> origin = {}, step = {};
      for (int32_t t = table.start[j]; t < table.start[j + 1]; ++t) {
        const Vector<A> column = load(columns + table.index[t] * width + v * L);
        origin = multiply_add(broadcast(table.slope_origin[t]), column, origin);
        step = multiply_add(broadcast(table.slope_step[t]), column, step);
      }
      const Vector<A> g = load(cells + j * width + v * L);
      sums.origin[kX] = multiply_add(g, origin, sums.origin[kX]);
      sums.step[kX] = multiply_add(g, step, sums.step[kX]);
    }
  }
}

/// Steps between neighbouring cells and channels of the pooled values.
struct CellStrides {
  int64_t cell, channel;
};

template <class T>
void add_cell_by_cell(const Problem& problem, const BoxPlan<acc_t<T>>& plan, const Level& level,
                      const T* window, int64_t stride_x, int64_t channels, const pooled_t<T>* from,
                      const CellStrides& strides, BoxGradient& sums) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < channels; ++c, window += level.stride_c) {
    for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
      for (int32_t j = plan.x.first; j < plan.x.end; ++j) {
        const A g = load_value(
            from[c * strides.channel + (int64_t{i} * problem.out_width + j) * strides.cell]);
        for (int32_t ty = plan.y.tap_begin(i); ty < plan.y.tap_end(i); ++ty) {
          const T* row = window + plan.y.index[ty] * level.stride_h;
          A value = 0, along_origin = 0, along_step = 0;
          for (int32_t tx = plan.x.tap_begin(j); tx < plan.x.tap_end(j); ++tx) {
            const A pixel = load_value(row[plan.x.index[tx] * stride_x]);
            value += plan.x.weight[tx] * pixel;
            along_origin += plan.x.slope_origin[tx] * pixel;
            along_step += plan.x.slope_step[tx] * pixel;
          }
          sums.origin[kY] += g * plan.y.slope_origin[ty] * value;
          sums.step[kY] += g * plan.y.slope_step[ty] * value;
          sums.origin[kX] += g * plan.y.weight[ty] * along_origin;
          sums.step[kX] += g * plan.y.weight[ty] * along_step;
        }
      }
    }
  }
}

template <class T>
void grad_boxes_nchw(const BoxWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  grad_boxes_planes<T>(work);
  for (int64_t channel = work.channel; channel < work.channel + work.channels; channel += L) {
    const int64_t left = work.channel + work.channels - channel;
    const int64_t channels = left < L ? left : L;
    for (int64_t b = 0; b < work.count; ++b) {
      const BoxPlan<A>& plan = *work.plans[b];
      if (plan.planar) continue;
      const auto* from = static_cast<const pooled_t<T>*>(problem.pooled) +
                         (plan.box * problem.channels + channel) * cells;
      const Level& level = problem.level[plan.level];
      const T* window = image_of<T>(level, plan.image) + channel * level.stride_c +
                        (level.width > 1 ? plan.first_column : 0);
      if (plan.narrow) {
        Work<A> block = work;
        block.channel = channel;
        block.channels = channels;
        grad_boxes_narrow<T>(block, plan, work.sums[b]);
        continue;
      }
      if (plan.direct) {
        add_cell_by_cell<T>(problem, plan, level, window, level.width > 1 ? 1 : 0, channels, from,
                            {1, cells}, work.sums[b]);
        continue;
      }
      const int32_t vectors = plan.vectors;
      const int64_t block = int64_t{vectors} * L * L;
      A* row = work.scratch;
      A* columns = row + (int64_t{problem.out_width} + 1) * L;
      A* expanded = columns + block;
      A* sums_y = expanded + block;
      LaneSums<A> sums;
      for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
        load_cells(from + int64_t{i} * problem.out_width, cells, channels, 1, problem.out_width,
                   row);
#define GLIMPSE_CALL(taps) expand_row<taps, A>(row, plan.x_transposed, 0, vectors * L, 1, columns)
        GLIMPSE_WITH_UNIFORM(plan.x_transposed.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
        transpose_back(columns, vectors, expanded);
        __builtin_memset(sums_y, 0, sizeof(A) * static_cast<size_t>(block));
        for (int32_t t = plan.y.start[i - plan.y.first]; t < plan.y.start[i - plan.y.first + 1];
             ++t) {
          const Vector<A> weight = broadcast(plan.y.weight[t]);
          const T* pixels = window + plan.y.index[t] * level.stride_h;
          Vector<A> product = {};
          for (int64_t c = 0; c < channels; ++c, pixels += level.stride_c) {
            for (int32_t v = 0; v < vectors; ++v) {
              const bool whole = v < vectors - 1 || plan.last_valid == L;
              // Columns between those that are tapped are read too; they may hold anything.
              const Vector<A> pixel =
                  keep<A>(whole ? load(pixels + v * L) : load_part(pixels + v * L, plan.last_valid),
                          plan.column_mask + v * L);
              const int64_t at = (c * vectors + v) * L;
              product = multiply_add(load(expanded + at), pixel, product);
              store(sums_y + at, multiply_add(weight, pixel, load(sums_y + at)));
            }
          }
          sums.origin[kY] =
              multiply_add(broadcast(plan.y.slope_origin[t]), product, sums.origin[kY]);
          sums.step[kY] = multiply_add(broadcast(plan.y.slope_step[t]), product, sums.step[kY]);
        }
        transpose_columns(sums_y, vectors, columns);
        add_column_slopes(row, columns, plan.x, 1, sums);
      }
      sums.add_to(work.sums[b]);
    }
  }
}

/// Channel vectors that grad_boxes_nhwc takes at a time.
constexpr int32_t kBoxVectors = 8;

template <class T>
void grad_boxes_nhwc(const BoxWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const Level& level = problem.level[plan.level];
    const Table<A>& columns = plan.x_transposed;
    if (plan.narrow) {
      grad_boxes_narrow<T>(work, plan, work.sums[b]);
      continue;
    }
    if (plan.direct) {
      add_cell_by_cell<T>(problem, plan, level,
                          image_of<T>(level, plan.image) + work.channel * level.stride_c,
                          level.stride_w, work.channels,
                          static_cast<const pooled_t<T>*>(problem.pooled) +
                              plan.box * problem.channels * cells + work.channel,
                          {problem.channels, 1}, work.sums[b]);
      continue;
    }
    int64_t channel = work.channel;
    const int64_t end = work.channel + work.channels;
    while (channel < end) {
      const int64_t channels = end - channel < kBoxVectors * L ? end - channel : kBoxVectors * L;
      const int32_t vectors = static_cast<int32_t>((channels + L - 1) / L);
      const int32_t last_valid = static_cast<int32_t>(channels - int64_t{vectors - 1} * L);
      const int64_t width = int64_t{vectors} * L;
      const auto* from = static_cast<const pooled_t<T>*>(problem.pooled) +
                         plan.box * problem.channels * cells + channel;
      const T* image = image_of<T>(level, plan.image) + channel;
      A* row = work.scratch;
      A* expanded = row + (int64_t{problem.out_width} + 1) * width;
      A* sums_y = expanded + plan.slots * width;
      __builtin_memset(row + problem.out_width * width, 0, sizeof(A) * static_cast<size_t>(width));
      LaneSums<A> sums;
      for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j) {
          copy_channels(from + (int64_t{i} * problem.out_width + j) * problem.channels, channels,
                        vectors, row + j * width);
        }
#define GLIMPSE_CALL(taps) expand_row<taps, A>(row, columns, 0, plan.slots, vectors, expanded)
        GLIMPSE_WITH_UNIFORM(columns.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
        __builtin_memset(sums_y, 0, sizeof(A) * static_cast<size_t>(plan.slots * width));
        for (int32_t t = plan.y.start[i - plan.y.first]; t < plan.y.start[i - plan.y.first + 1];
             ++t) {
          const Vector<A> weight = broadcast(plan.y.weight[t]);
          const T* pixels = image + plan.y.index[t] * level.stride_h;
          Vector<A> product = {};
          for (int32_t s = 0; s < plan.slots; ++s) {
            const T* pixel = pixels + columns.target[s] * level.stride_w;
            for (int32_t v = 0; v < vectors; ++v) {
              const bool whole = v < vectors - 1 || last_valid == L;
              const Vector<A> value =
                  whole ? load(pixel + v * L) : load_part(pixel + v * L, last_valid);
              const int64_t at = s * width + v * L;
              product = multiply_add(load(expanded + at), value, product);
              store(sums_y + at, multiply_add(weight, value, load(sums_y + at)));
            }
          }
          sums.origin[kY] =
              multiply_add(broadcast(plan.y.slope_origin[t]), product, sums.origin[kY]);
          sums.step[kY] = multiply_add(broadcast(plan.y.slope_step[t]), product, sums.step[kY]);
        }
        add_column_slopes(row, sums_y, plan.x, vectors, sums);
      }
      sums.add_to(work.sums[b]);
      channel += channels;
    }
  }
}

}  // namespace
