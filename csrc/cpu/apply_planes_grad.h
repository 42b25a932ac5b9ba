// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: gradients one plane at a time, see the Note of that name in apply_planes.h.

namespace {

// -------------------------------------------------------------------------- gradient of features

/// Some rows of cells of one channel, loaded with lanes behind them that nothing picks.
template <int Sources, class T>
GLIMPSE_INLINE void load_sources(const T* cells, int64_t at, int64_t count,
                                 Vector<acc_t<T>>* source) {
  constexpr int L = kLanes<acc_t<T>>;
  for (int s = 0; s < Sources; ++s, at += L) {
    source[s] = at + L <= count ? load(cells + at)
                : at < count    ? load_part(cells + at, static_cast<int>(count - at))
                                : Vector<acc_t<T>>{};
  }
}

/// expanded[i][x] of the rows [first, end) of one channel of a box.
template <int Sources, int N, class T>
void expand_cells(const T* cells, int64_t count, int32_t first, int32_t end, int32_t width,
                  const PickTable<acc_t<T>>& picks, acc_t<T>* expanded) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int32_t taps = N != 0 ? N : picks.taps;
  const int64_t row = int64_t{picks.blocks} * L;
  for (int32_t v = 0; v < picks.blocks; ++v) {
    const uint8_t* index = picks.index + int64_t{v} * taps * L;
    const uint16_t* mask = picks.mask + int64_t{v} * taps;
    const A* weights = picks.weight + int64_t{v} * taps * L;
    constexpr int kHeld = N != 0 ? N : 1;
    PickLanes<A> lanes[kHeld];
    Vector<A> weight[kHeld];
    for (int t = 0; t < N; ++t) {
      lanes[t] = PickLanes<A>::from(index + t * L, mask[t]);
      weight[t] = load(weights + t * L);
    }
    for (int32_t i = first; i < end; ++i) {
      Vector<A> source[Sources];
      load_sources<Sources>(cells, int64_t{i} * width, count, source);
      Vector<A> sum = {};
      if constexpr (N != 0) {
        sum = weight[0] * pick<Sources>(source, lanes[0]);
        for (int t = 1; t < N; ++t) {
          sum = multiply_add(weight[t], pick<Sources>(source, lanes[t]), sum);
        }
      } else {
        for (int32_t t = 0; t < taps; ++t) {
          sum =
              multiply_add(load(weights + t * L),
                           pick<Sources>(source, PickLanes<A>::from(index + t * L, mask[t])), sum);
        }
      }
      store(expanded + i * row + v * L, sum);
    }
  }
}

/// Adds to each touched row of [first, end) the weighted sum of N of the rows expanded[cell][x], in
/// windows of V vectors (0: `vectors`). `window` lies in row first_row of the map.
template <int N, int V, class A>
void add_uniform_rows(A* window, int64_t stride_h, int32_t first_row, const Table<A>& rows,
                      int32_t first, int32_t end, const A* expanded, int32_t vectors,
                      int32_t last_valid) {
  constexpr int L = kLanes<A>;
  const int32_t count = V != 0 ? V : vectors;
  const int32_t whole = last_valid == L ? count : count - 1;
  const int64_t block = int64_t{count} * L;
  const int32_t* index = rows.index + int64_t{first} * N;
  const A* weights = rows.weight + int64_t{first} * N;
  for (int32_t r = first; r < end; ++r, index += N, weights += N) {
    A* pixels = window + (rows.target[r] - first_row) * stride_h;
    Vector<A> weight[N];
    const A* row[N];
    for (int t = 0; t < N; ++t) {
      weight[t] = broadcast(weights[t]);
      row[t] = expanded + index[t] * block;
    }
    for (int32_t v = 0; v < whole; ++v) {
      Vector<A> sum = load(pixels + v * L);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + v * L), sum);
      store(pixels + v * L, sum);
    }
    if (whole < count) {
      Vector<A> sum = load_part(pixels + whole * L, last_valid);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + whole * L), sum);
      store_part(pixels + whole * L, sum, last_valid);
    }
  }
}

/// One channel of one box. `window` is its first column in row first_row of the map.
template <class T>
void add_plane(const Problem& problem, const BoxPlan<acc_t<T>>& plan, const Band<acc_t<T>>& band,
               int32_t first, int32_t end, const T* cells, acc_t<T>* window, int64_t stride_h,
               int32_t first_row, acc_t<T>* expanded) {
  using A = acc_t<T>;
  if constexpr (kPickSources<A> > 0) {
    constexpr int L = kLanes<A>;
    const int32_t width = problem.out_width;
    const int64_t count = cells_of(problem);
#define GLIMPSE_CALL(taps) \
  expand_cells<1, taps, T>(cells, count, first, end, width, plan.picks, expanded)
#define GLIMPSE_CALL_FAR(taps) \
  expand_cells<2, taps, T>(cells, count, first, end, width, plan.picks, expanded)
    if (width <= L) {
      GLIMPSE_WITH_TAPS(plan.picks.taps, GLIMPSE_CALL)
    } else {
      GLIMPSE_WITH_TAPS(plan.picks.taps, GLIMPSE_CALL_FAR)
    }
#undef GLIMPSE_CALL_FAR
#undef GLIMPSE_CALL
    const Table<A>& rows = plan.y_transposed;
    const int32_t vectors = plan.vectors;
    const auto add = [&](auto taps) {
      constexpr int N = decltype(taps)::value;
      if (vectors == 1) {
        add_uniform_rows<N, 1, A>(window, stride_h, first_row, rows, band.first, band.end, expanded,
                                  vectors, plan.last_valid);
      } else if (vectors == 2) {
        add_uniform_rows<N, 2, A>(window, stride_h, first_row, rows, band.first, band.end, expanded,
                                  vectors, plan.last_valid);
      } else {
        add_uniform_rows<N, 0, A>(window, stride_h, first_row, rows, band.first, band.end, expanded,
                                  vectors, plan.last_valid);
      }
    };
    switch (rows.uniform) {
      case 2:
        return add(std::integral_constant<int, 2>{});
      case 3:
        return add(std::integral_constant<int, 3>{});
      case 4:
        return add(std::integral_constant<int, 4>{});
      case 5:
        return add(std::integral_constant<int, 5>{});
      case 6:
        return add(std::integral_constant<int, 6>{});
    }
    const int64_t block = int64_t{vectors} * L;
    for (int32_t r = band.first; r < band.end; ++r) {
      const int32_t tap = rows.tap_begin(r);
      A* pixels = window + (rows.target[r] - first_row) * stride_h;
      int32_t taps = rows.tap_end(r) - tap;
      const int32_t* index = rows.index + tap;
      const A* weight = rows.weight + tap;
#define GLIMPSE_CALL(n) \
  add_few_rows<n, A>(pixels, 0, 1, expanded, block, index, weight, vectors, plan.last_valid)
      GLIMPSE_IN_GROUPS(taps, index, weight, GLIMPSE_CALL)
#undef GLIMPSE_CALL
    }
  }
}

/// All channels of a Work of one planar box, of which `following` comes next.
template <class T>
void grad_features_planar(const GradWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                          const BoxPlan<acc_t<T>>* following, const Plane<acc_t<T>>& plane) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const Table<A>& rows = plan.y_transposed;
  const Band<A> band = band_of(work, rows);
  if (band.first == band.end) return;
  // Only the cells that reach the band.
  int32_t first = 0, end = problem.out_height;
  if (band.first > 0 || band.end < rows.end) {
    first = problem.out_height;
    end = 0;
    for (int32_t t = rows.tap_begin(band.first); t < rows.tap_end(band.end - 1); ++t) {
      const int32_t cell = rows.index[t];
      if (cell == problem.out_height) continue;  // the zero slot
      first = cell < first ? cell : first;
      end = cell + 1 > end ? cell + 1 : end;
    }
  }
  A* expanded = work.scratch;
  const int64_t block = int64_t{plan.vectors} * L;
  for (int64_t x = 0; x < block; x += L) {
    store(expanded + problem.out_height * block + x, Vector<A>{});  // the zero slot
  }
  const int64_t cells = cells_of(problem);
  const auto cells_of_box = [&](const BoxPlan<A>& of) {
    return static_cast<const T*>(problem.pooled) +
           (of.box * problem.channels + work.channel) * cells;
  };
  if (following != nullptr) {
    prefetch_cells(cells_of_box(*following),
                   work.channels * cells * static_cast<int64_t>(sizeof(T)));
  }
  const T* from = cells_of_box(plan);
  A* window = plane.data + plan.first_column;
  for (int64_t c = 0; c < work.channels; ++c, from += cells, window += plane.stride_c) {
    add_plane<T>(problem, plan, band, first, end, from, window, plane.stride_h, work.first_row,
                 expanded);
  }
}

// ----------------------------------------------------------------------------- gradient of boxes

/// One channel of one box; N taps along x (0: as many as the table says).
template <int Sources, int N, class T>
void add_slopes_of_plane(const BoxPlan<acc_t<T>>& plan, const T* window, int64_t stride_h,
                         const pooled_t<T>* cells, int64_t count, int32_t width,
                         LaneSums<acc_t<T>>& total) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const PickTable<A>& picks = plan.picks;
  const int32_t taps = N != 0 ? N : picks.taps;
  LaneSums<A> sums = total;
  for (int32_t v = 0; v < picks.blocks; ++v) {
    const uint8_t* index = picks.index + int64_t{v} * taps * L;
    const uint16_t* mask = picks.mask + int64_t{v} * taps;
    const int64_t at = int64_t{v} * taps * L;
    constexpr int kHeld = N != 0 ? N : 1;
    PickLanes<A> lanes[kHeld];
    Vector<A> held[kHeld][3];
    for (int t = 0; t < N; ++t) {
      lanes[t] = PickLanes<A>::from(index + t * L, mask[t]);
      held[t][0] = load(picks.weight + at + t * L);
      held[t][1] = load(picks.slope_origin + at + t * L);
      held[t][2] = load(picks.slope_step + at + t * L);
    }
    const bool whole = v < picks.blocks - 1 || plan.last_valid == L;
    for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
      Vector<A> source[Sources];
      load_sources<Sources>(cells, int64_t{i} * width, count, source);
      // Cells spread over the columns: by weights, and by slopes.
      Vector<A> spread[3] = {};
      for (int32_t t = 0; t < taps; ++t) {
        if constexpr (N != 0) {
          const Vector<A> g = pick<Sources>(source, lanes[t]);
          for (int n = 0; n < 3; ++n) spread[n] = multiply_add(held[t][n], g, spread[n]);
        } else {
          const Vector<A> g = pick<Sources>(source, PickLanes<A>::from(index + t * L, mask[t]));
          spread[0] = multiply_add(load(picks.weight + at + t * L), g, spread[0]);
          spread[1] = multiply_add(load(picks.slope_origin + at + t * L), g, spread[1]);
          spread[2] = multiply_add(load(picks.slope_step + at + t * L), g, spread[2]);
        }
      }
      // Pixels summed along y, likewise.
      Vector<A> summed[3] = {};
      for (int32_t t = plan.y.tap_begin(i); t < plan.y.tap_end(i); ++t) {
        const T* pixels = window + plan.y.index[t] * stride_h + v * L;
        // Columns between those that are tapped are read too; they may hold anything.
        const Vector<A> pixel = keep<A>(whole ? load(pixels) : load_part(pixels, plan.last_valid),
                                        plan.column_mask + v * L);
        summed[0] = multiply_add(broadcast(plan.y.weight[t]), pixel, summed[0]);
        summed[1] = multiply_add(broadcast(plan.y.slope_origin[t]), pixel, summed[1]);
        summed[2] = multiply_add(broadcast(plan.y.slope_step[t]), pixel, summed[2]);
      }
      sums.origin[kX] = multiply_add(spread[1], summed[0], sums.origin[kX]);
      sums.step[kX] = multiply_add(spread[2], summed[0], sums.step[kX]);
      sums.origin[kY] = multiply_add(spread[0], summed[1], sums.origin[kY]);
      sums.step[kY] = multiply_add(spread[0], summed[2], sums.step[kY]);
    }
  }
  total = sums;
}

/// The channels of a Work of one planar box, of which `following` comes next.
template <class T>
void grad_boxes_planar(const BoxWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                       const BoxPlan<acc_t<T>>* following, BoxGradient& gradient) {
  using A = acc_t<T>;
  if constexpr (kPickSources<A> > 0) {
    const Problem& problem = *work.problem;
    const Level& level = problem.level[plan.level];
    const int64_t cells = cells_of(problem);
    const int32_t width = problem.out_width;
    const auto* from = static_cast<const pooled_t<T>*>(problem.pooled) +
                       (plan.box * problem.channels + work.channel) * cells;
    const T* window = image_of<T>(level, plan.image) + work.channel * level.stride_c +
                      (level.width > 1 ? plan.first_column : 0);
    if (following != nullptr) {
      prefetch_cells(from + (following->box - plan.box) * problem.channels * cells,
                     work.channels * cells * static_cast<int64_t>(sizeof(*from)));
    }
    LaneSums<A> sums;
    for (int64_t c = 0; c < work.channels; ++c, from += cells, window += level.stride_c) {
#define GLIMPSE_CALL(sources, taps) \
  add_slopes_of_plane<sources, taps, T>(plan, window, level.stride_h, from, cells, width, sums)
      if (width > kLanes<A>) {
        switch (plan.picks.taps) {
          case 2:
            GLIMPSE_CALL(2, 2);
            break;
          case 3:
            GLIMPSE_CALL(2, 3);
            break;
          default:
            GLIMPSE_CALL(2, 0);
        }
      } else {
        switch (plan.picks.taps) {
          case 1:
            GLIMPSE_CALL(1, 1);
            break;
          case 2:
            GLIMPSE_CALL(1, 2);
            break;
          case 3:
            GLIMPSE_CALL(1, 3);
            break;
          default:
            GLIMPSE_CALL(1, 0);
        }
      }
#undef GLIMPSE_CALL
    }
    sums.add_to(gradient);
  }
}

/// The planar plans of a Work, a few planes at a time; the others are left out. Numbers are summed
/// across lanes once for each box and that many planes.
template <class T>
void grad_boxes_planes(const BoxWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  const Problem& problem = *work.problem;
  constexpr int64_t kFewest = 4;
  for (int64_t first = 0, end; first < work.count; first = end) {
    const BoxPlan<A>& head = *work.plans[first];
    end = first + 1;
    if (!head.planar) continue;
    const Level& level = problem.level[head.level];
    while (end < work.count && work.plans[end]->level == head.level &&
           work.plans[end]->image == head.image) {
      ++end;
    }
    const int64_t fit = planes_together(level, work.channels, sizeof(T));
    const int64_t planes = fit < kFewest ? kFewest : fit;
    const int64_t plane = int64_t{level.height} * level.width;
    const bool ahead =
        level.stride_c == plane && covers_plane(work.plans + first, end - first, level);
    BoxWork<A> part = work;
    for (int64_t c = 0; c < work.channels; c += planes) {
      part.channel = work.channel + c;
      part.channels = work.channels - c < planes ? work.channels - c : planes;
      const int64_t left = work.channels - c - part.channels;
      ReadAhead next(
          image_of<T>(level, head.image) + (part.channel + part.channels) * level.stride_c,
          ahead ? (left < planes ? left : planes) * plane * sizeof(T) : 0, end - first);
      for (int64_t b = first; b < end; ++b) {
        if (!work.plans[b]->planar) continue;
        next.step();
        grad_boxes_planar<T>(part, *work.plans[b], b + 1 < end ? work.plans[b + 1] : nullptr,
                             work.sums[b]);
      }
    }
  }
}

}  // namespace
