// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: features to pooled values.

namespace {

// ------------------------------------------------------------------------------ sample, kNchw

/// sums[c][x] = the weighted sum of N rows of pixels, or that added to what is there (Add).
template <int N, bool Add, class T>
void sum_few_rows(const T* window, int64_t stride_c, int64_t stride_h, int64_t channels,
                  const int32_t* rows, const acc_t<T>* weights, int32_t vectors, int32_t last_valid,
                  acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  Vector<A> weight[N];
  int64_t offset[N];
  for (int t = 0; t < N; ++t) {
    weight[t] = broadcast(weights[t]);
    offset[t] = rows[t] * stride_h;
  }
  const int32_t whole = last_valid == L ? vectors : vectors - 1;
  for (int64_t c = 0; c < channels; ++c, window += stride_c, sums += vectors * L) {
    const T* row[N];
    for (int t = 0; t < N; ++t) row[t] = window + offset[t];
    for (int32_t v = 0; v < whole; ++v) {
      Vector<A> sum = Add ? multiply_add(weight[0], load(row[0] + v * L), load(sums + v * L))
                          : weight[0] * load(row[0] + v * L);
      for (int t = 1; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + v * L), sum);
      store(sums + v * L, sum);
    }
    if (whole < vectors) {
      Vector<A> sum = Add ? load(sums + whole * L) : Vector<A>{};
      for (int t = 0; t < N; ++t) {
        sum = multiply_add(weight[t], load_part(row[t] + whole * L, last_valid), sum);
      }
      store(sums + whole * L, sum);
    }
  }
}

/// sums[c][x] of a row of cells: any number of taps along y, but at least one.
template <class T>
void sum_rows(const T* window, int64_t stride_c, int64_t stride_h, int64_t channels,
              const int32_t* rows, const acc_t<T>* weights, int32_t taps, int32_t vectors,
              int32_t last_valid, acc_t<T>* sums) {
#define GLIMPSE_CALL(n, add)                                                            \
  sum_few_rows<n, add, T>(window, stride_c, stride_h, channels, rows, weights, vectors, \
                          last_valid, sums)
  switch (taps) {
    case 1:
      return GLIMPSE_CALL(1, false);
    case 2:
      return GLIMPSE_CALL(2, false);
    case 3:
      return GLIMPSE_CALL(3, false);
    case 4:
      return GLIMPSE_CALL(4, false);
    case 5:
      return GLIMPSE_CALL(5, false);
    case 6:
      return GLIMPSE_CALL(6, false);
  }
  GLIMPSE_CALL(4, false);
  for (rows += 4, weights += 4, taps -= 4; taps >= 4; rows += 4, weights += 4, taps -= 4) {
    GLIMPSE_CALL(4, true);
  }
  for (; taps > 0; ++rows, ++weights, --taps) GLIMPSE_CALL(1, true);
#undef GLIMPSE_CALL
}

/// One row of cells, channels in lanes.
template <int Taps, class A>
void sum_columns(const A* columns, const Table<A>& table, A* cells) {
  constexpr int L = kLanes<A>;
  if (Taps != 0) {
    const int32_t* index = table.index;
    const A* weight = table.weight;
    for (int32_t j = 0; j < table.end; ++j, index += Taps, weight += Taps) {
      Vector<A> sum = broadcast(weight[0]) * load(columns + index[0] * L);
      for (int t = 1; t < Taps; ++t) {
        sum = multiply_add(broadcast(weight[t]), load(columns + index[t] * L), sum);
      }
      store(cells + int64_t{j} * L, sum);
    }
    return;
  }
  for (int32_t j = 0; j < table.end; ++j) {
    Vector<A> sum = {};
    for (int32_t t = table.start[j]; t < table.start[j + 1]; ++t) {
      sum = multiply_add(broadcast(table.weight[t]), load(columns + table.index[t] * L), sum);
    }
    store(cells + int64_t{j} * L, sum);
  }
}

/// cells[i][c] -> to[c * stride + i] for i < count.
template <class P, class A>
void store_cells(const A* cells, int64_t count, int64_t channels, P* to, int64_t stride) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; i += L) {
    // The last square steps back where it can: the numbers written twice are the same.
    if (i + L > count && count >= L) i = count - L;
    const int32_t valid = static_cast<int32_t>(count - i < L ? count - i : L);
    Vector<A> square[L];
    for (int x = 0; x < L; ++x) square[x] = x < valid ? load(cells + (i + x) * L) : Vector<A>{};
    transpose(square);
    for (int64_t c = 0; c < channels; ++c) {
      if (valid == L) {
        store(to + c * stride + i, square[c]);
      } else {
        store_part(to + c * stride + i, square[c], valid);
      }
    }
  }
}

template <class T>
void sample_cell_by_cell(const Problem& problem, const BoxPlan<acc_t<T>>& plan, const T* window,
                         const Level& level, int64_t channels, pooled_t<T>* to) {
  using A = acc_t<T>;
  const int64_t step = level.width > 1 ? 1 : 0;
  for (int64_t c = 0; c < channels; ++c, window += level.stride_c) {
    for (int32_t i = 0; i < problem.out_height; ++i) {
      for (int32_t j = 0; j < problem.out_width; ++j, ++to) {
        A sum = static_cast<A>(problem.fill);
        if (i >= plan.y.first && i < plan.y.end && plan.y.tap_begin(i) < plan.y.tap_end(i) &&
            j >= plan.x.first && j < plan.x.end && plan.x.tap_begin(j) < plan.x.tap_end(j)) {
          sum = 0;
          for (int32_t ty = plan.y.tap_begin(i); ty < plan.y.tap_end(i); ++ty) {
            const T* row = window + plan.y.index[ty] * level.stride_h;
            A part = 0;
            for (int32_t tx = plan.x.tap_begin(j); tx < plan.x.tap_end(j); ++tx) {
              part += plan.x.weight[tx] * load_value(row[plan.x.index[tx] * step]);
            }
            sum += plan.y.weight[ty] * part;
          }
        }
        *to = Store<pooled_t<T>>::from(sum);
      }
    }
  }
}

template <class T>
void sample_nchw(const Work<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  const int32_t together = rows_together(problem);
  sample_planes<T>(work);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    if (plan.planar) continue;
    auto* to = static_cast<pooled_t<T>*>(problem.pooled) +
               (plan.box * problem.channels + work.channel) * cells;
    if (plan.empty) {
      fill_cells(to, work.channels * cells, fill_of<pooled_t<T>, A>(problem));
      continue;
    }
    const Level& level = problem.level[plan.level];
    const T* window = image_of<T>(level, plan.image) + work.channel * level.stride_c +
                      (level.width > 1 ? plan.first_column : 0);
    if (plan.narrow) {
      sample_narrow<T>(work, plan);
      continue;
    }
    if (plan.direct) {
      sample_cell_by_cell<T>(problem, plan, window, level, work.channels, to);
      continue;
    }
    const int32_t vectors = plan.vectors;
    A* sums = work.scratch;
    A* columns = sums + vectors * L * L;
    A* gathered = columns + (vectors * L + 1) * L;
    // Missing channels of the last block are summed along x like the others, and not stored.
    __builtin_memset(sums + work.channels * vectors * L, 0,
                     sizeof(A) * static_cast<size_t>((L - work.channels) * vectors * L));
    store(columns + vectors * L * L, Vector<A>{});  // the zero slot
    for (int32_t first = 0; first < problem.out_height; first += together) {
      const int32_t end =
          first + together < problem.out_height ? first + together : problem.out_height;
      A* row = gathered;
      for (int32_t i = first; i < end; ++i, row += int64_t{problem.out_width} * L) {
        if (i < plan.y.first || i >= plan.y.end || plan.y.tap_begin(i) == plan.y.tap_end(i)) {
          fill_cells(row, int64_t{problem.out_width} * L, static_cast<A>(problem.fill));
          continue;
        }
        const int32_t tap = plan.y.tap_begin(i);
        sum_rows<T>(window, level.stride_c, level.stride_h, work.channels, plan.y.index + tap,
                    plan.y.weight + tap, plan.y.tap_end(i) - tap, vectors, plan.last_valid, sums);
        transpose_columns(sums, vectors, columns);
#define GLIMPSE_CALL(taps) sum_columns<taps, A>(columns, plan.x, row)
        GLIMPSE_WITH_UNIFORM(plan.x.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
        for (int32_t u = 0; u < plan.unread_count; ++u) {
          store(row + int64_t{plan.unread[u]} * L, broadcast(static_cast<A>(problem.fill)));
        }
      }
      store_cells(gathered, int64_t{end - first} * problem.out_width, work.channels,
                  to + int64_t{first} * problem.out_width, cells);
    }
  }
}

// ------------------------------------------------------------------------------ sample, kNhwc

/// N vectors of channels of all cells of one box; only the first `last_valid` channels of the last
/// vector where Part is set.
template <class T, int N, bool Part>
void sample_channels(const Problem& problem, const BoxPlan<acc_t<T>>& plan, const Level& level,
                     const T* image, int32_t last_valid, pooled_t<T>* to) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  for (int32_t i = 0; i < problem.out_height; ++i) {
    const bool inside = i >= plan.y.first && i < plan.y.end;
    const int32_t y_begin = inside ? plan.y.tap_begin(i) : 0;
    const int32_t y_end = inside ? plan.y.tap_end(i) : 0;
    for (int32_t j = 0; j < problem.out_width; ++j, to += problem.channels) {
      const int32_t x_begin = plan.x.tap_begin(j), x_end = plan.x.tap_end(j);
      Vector<A> sum[N] = {};
      if (y_begin == y_end || x_begin == x_end) {
        for (int v = 0; v < N; ++v) sum[v] = broadcast(static_cast<A>(problem.fill));
      }
      for (int32_t ty = y_begin; ty < y_end; ++ty) {
        const T* row = image + plan.y.index[ty] * level.stride_h;
        for (int32_t tx = x_begin; tx < x_end; ++tx) {
          const T* pixel = row + plan.x.index[tx] * level.stride_w;
          const Vector<A> weight = broadcast(plan.y.weight[ty] * plan.x.weight[tx]);
          for (int v = 0; v < N - 1; ++v)
            sum[v] = multiply_add(weight, load(pixel + v * L), sum[v]);
          const T* last = pixel + (N - 1) * L;
          sum[N - 1] =
              multiply_add(weight, Part ? load_part(last, last_valid) : load(last), sum[N - 1]);
        }
      }
      for (int v = 0; v < N - 1; ++v) store(to + v * L, sum[v]);
      if (Part) {
        store_part(to + (N - 1) * L, sum[N - 1], last_valid);
      } else {
        store(to + (N - 1) * L, sum[N - 1]);
      }
    }
  }
}

template <class T>
void sample_nhwc(const Work<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    auto* to = static_cast<pooled_t<T>*>(problem.pooled) + plan.box * problem.channels * cells +
               work.channel;
    if (plan.empty) {
      for (int64_t i = 0; i < cells; ++i, to += problem.channels) {
        fill_cells(to, work.channels, fill_of<pooled_t<T>, A>(problem));
      }
      continue;
    }
    const Level& level = problem.level[plan.level];
    if (plan.narrow) {
      sample_narrow<T>(work, plan);
      continue;
    }
    const T* image = image_of<T>(level, plan.image) + work.channel;
    int64_t left = work.channels;
    for (; left >= 8 * L; left -= 8 * L, image += 8 * L, to += 8 * L) {
      sample_channels<T, 8, false>(problem, plan, level, image, L, to);
    }
    for (; left >= 4 * L; left -= 4 * L, image += 4 * L, to += 4 * L) {
      sample_channels<T, 4, false>(problem, plan, level, image, L, to);
    }
    for (; left >= L; left -= L, image += L, to += L) {
      sample_channels<T, 1, false>(problem, plan, level, image, L, to);
    }
    if (left > 0) {
      sample_channels<T, 1, true>(problem, plan, level, image, static_cast<int32_t>(left), to);
    }
  }
}

}  // namespace
