// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: gradients of pooled values to gradients of features.

namespace {

// ------------------------------------------------------------- gradient of the features, shared

/// Where sums of a gradient are kept: the gradient itself, or float scratch for 16-bit types.
template <class A>
struct Plane {
  A* data;  // pixel (first_row, 0) of the first channel
  int64_t stride_c, stride_h, stride_w;
};

template <class T>
Plane<acc_t<T>> plane_of(const GradWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  const Level& level = work.problem->level[work.level];
  if constexpr (std::is_same_v<A, T>) {
    T* image = static_cast<T*>(level.data) + work.image * level.stride_n;
    return {image + work.channel * level.stride_c + work.first_row * level.stride_h, level.stride_c,
            level.stride_h, level.stride_w};
  } else if (work.problem->layout == Layout::kNchw) {
    return {work.plane, int64_t{work.end_row - work.first_row} * level.width, level.width, 1};
  } else {
    return {work.plane, 1, work.channels * level.width, work.channels};
  }
}

template <class T>
void clear_gradient(const GradWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  const Plane<A> plane = plane_of<T>(work);
  const int64_t rows = work.end_row - work.first_row;
  const int64_t width = work.problem->level[work.level].width;
  if (work.problem->layout == Layout::kNchw) {
    for (int64_t c = 0; c < work.channels; ++c) {
      A* channel = plane.data + c * plane.stride_c;
      if (plane.stride_h == width) {
        __builtin_memset(channel, 0, sizeof(A) * static_cast<size_t>(rows * width));
      } else {
        for (int64_t y = 0; y < rows; ++y) {
          __builtin_memset(channel + y * plane.stride_h, 0, sizeof(A) * static_cast<size_t>(width));
        }
      }
    }
    return;
  }
  for (int64_t y = 0; y < rows; ++y) {
    A* row = plane.data + y * plane.stride_h;
    if (plane.stride_w == work.channels) {
      __builtin_memset(row, 0, sizeof(A) * static_cast<size_t>(width * work.channels));
      continue;
    }
    for (int64_t x = 0; x < width; ++x) {
      __builtin_memset(row + x * plane.stride_w, 0, sizeof(A) * static_cast<size_t>(work.channels));
    }
  }
}

/// Rounds `count` sums to the storage type.
template <class T>
void store_rounded(const acc_t<T>* from, int64_t count, T* to) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  if (i < count) {
    store_part(to + i, load_part(from + i, static_cast<int>(count - i)),
               static_cast<int>(count - i));
  }
}

template <class T>
void convert_gradient(const GradWork<acc_t<T>>& work) {
  if constexpr (!std::is_same_v<acc_t<T>, T>) {
    const Level& level = work.problem->level[work.level];
    const Plane<float> plane = plane_of<T>(work);
    T* to = static_cast<T*>(level.data) + work.image * level.stride_n +
            work.channel * level.stride_c + work.first_row * level.stride_h;
    const int64_t rows = work.end_row - work.first_row;
    if (work.problem->layout == Layout::kNchw) {
      for (int64_t c = 0; c < work.channels; ++c) {
        for (int64_t y = 0; y < rows; ++y) {
          store_rounded<T>(plane.data + c * plane.stride_c + y * plane.stride_h, level.width,
                           to + c * level.stride_c + y * level.stride_h);
        }
      }
      return;
    }
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < level.width; ++x) {
        store_rounded<T>(plane.data + y * plane.stride_h + x * plane.stride_w, work.channels,
                         to + y * level.stride_h + x * level.stride_w);
      }
    }
  }
}

/// The touched rows of a plan that lie in the band of the work.
template <class A>
struct Band {
  int32_t first, end;
};
template <class A>
Band<A> band_of(const GradWork<A>& work, const Table<A>& rows) {
  Band<A> band = {0, rows.end};
  while (band.first < band.end && rows.target[band.first] < work.first_row) ++band.first;
  while (band.end > band.first && rows.target[band.end - 1] >= work.end_row) --band.end;
  return band;
}

// ------------------------------------------------------------- gradient of the features, kNchw

/// Adds the weighted sum of N of the rows[cell][c][x] to one row of pixels of all channels.
template <int N, class A>
void add_few_rows(A* pixels, int64_t stride_c, int64_t channels, const A* rows, int64_t block,
                  const int32_t* index, const A* weights, int32_t vectors, int32_t last_valid) {
  constexpr int L = kLanes<A>;
  const int64_t width = int64_t{vectors} * L;
  Vector<A> weight[N];
  const A* row[N];
  for (int t = 0; t < N; ++t) {
    weight[t] = broadcast(weights[t]);
    row[t] = rows + index[t] * block;
  }
  const int32_t whole = last_valid == L ? vectors : vectors - 1;
  for (int64_t c = 0; c < channels; ++c, pixels += stride_c) {
    for (int32_t v = 0; v < whole; ++v) {
      Vector<A> sum = load(pixels + v * L);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + v * L), sum);
      store(pixels + v * L, sum);
    }
    if (whole < vectors) {
      Vector<A> sum = load_part(pixels + whole * L, last_valid);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + whole * L), sum);
      store_part(pixels + whole * L, sum, last_valid);
    }
    for (int t = 0; t < N; ++t) row[t] += width;
  }
}

template <class T>
void grad_cell_by_cell(const GradWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                       const Plane<acc_t<T>>& plane, const T* from) {
  using A = acc_t<T>;
  const Problem& problem = *work.problem;
  for (int64_t c = 0; c < work.channels; ++c, from += cells_of(problem)) {
    A* window = plane.data + c * plane.stride_c + plan.first_column;
    for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
      for (int32_t j = plan.x.first; j < plan.x.end; ++j) {
        const A g = load_value(from[int64_t{i} * problem.out_width + j]);
        for (int32_t ty = plan.y.tap_begin(i); ty < plan.y.tap_end(i); ++ty) {
          const int32_t y = plan.y.index[ty];
          if (y < work.first_row || y >= work.end_row) continue;
          A* row = window + (y - work.first_row) * plane.stride_h;
          const A part = plan.y.weight[ty] * g;
          for (int32_t tx = plan.x.tap_begin(j); tx < plan.x.tap_end(j); ++tx) {
            row[plan.x.index[tx]] += plan.x.weight[tx] * part;
          }
        }
      }
    }
  }
}

template <class T>
void grad_features_nchw(const GradWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  const int32_t together = rows_together(problem);
  const Plane<A> plane = plane_of<T>(work);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const T* from = static_cast<const T*>(problem.pooled) +
                    (plan.box * problem.channels + work.channel) * cells;
    if (plan.narrow) {
      grad_features_narrow<T>(work, plan, plane);
      continue;
    }
    if (plan.planar) {
      grad_features_planar<T>(work, plan, b + 1 < work.count ? work.plans[b + 1] : nullptr, plane);
      continue;
    }
    if (plan.direct) {
      grad_cell_by_cell<T>(work, plan, plane, from);
      continue;
    }
    const Table<A>& rows = plan.y_transposed;
    const Band<A> band = band_of(work, rows);
    if (band.first == band.end) continue;
    const int32_t vectors = plan.vectors;
    const int64_t row_width = int64_t{problem.out_width + 1} * L;
    A* gathered = work.scratch;
    A* columns = gathered + together * row_width;
    A* expanded = columns + int64_t{vectors} * L * L;
    const int64_t block = int64_t{vectors} * L * L;
    for (int32_t first = 0; first < problem.out_height; first += together) {
      const int32_t end =
          first + together < problem.out_height ? first + together : problem.out_height;
      load_cells(from + int64_t{first} * problem.out_width, cells, work.channels, end - first,
                 problem.out_width, gathered);
      for (int32_t i = first; i < end; ++i) {
        const A* row = gathered + (i - first) * row_width;
#define GLIMPSE_CALL(taps) expand_row<taps, A>(row, plan.x_transposed, 0, vectors * L, 1, columns)
        GLIMPSE_WITH_UNIFORM(plan.x_transposed.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
        transpose_back(columns, vectors, expanded + i * block);
      }
    }
    __builtin_memset(expanded + problem.out_height * block, 0,
                     sizeof(A) * static_cast<size_t>(block));  // the zero slot
    for (int32_t r = band.first; r < band.end; ++r) {
      const int32_t tap = rows.tap_begin(r);
      A* pixels =
          plane.data + (rows.target[r] - work.first_row) * plane.stride_h + plan.first_column;
      int32_t taps = rows.tap_end(r) - tap;
      const int32_t* index = rows.index + tap;
      const A* weight = rows.weight + tap;
#define GLIMPSE_CALL(n)                                                                     \
  add_few_rows<n, A>(pixels, plane.stride_c, work.channels, expanded, block, index, weight, \
                     vectors, plan.last_valid)
      GLIMPSE_IN_GROUPS(taps, index, weight, GLIMPSE_CALL)
#undef GLIMPSE_CALL
    }
  }
}

// ------------------------------------------------------------- gradient of the features, kNhwc

/// Bytes of expanded rows that are held at a time.
constexpr int64_t kExpandedBytes = 128 * 1024;

/// Columns that are expanded together for `height` rows of `width` numbers per column.
template <class A>
int32_t columns_together(const Problem& problem, int64_t width, int64_t slots) {
  const int64_t column = (int64_t{problem.out_height} + 1) * width * sizeof(A);
  const int64_t fit = kExpandedBytes / column;
  const int64_t columns = fit < 1 ? 1 : fit;
  return static_cast<int32_t>(columns < slots ? columns : slots);
}

/// Adds the weighted sum of N of the expanded[cell][slot][c] to one row of pixels.
template <int N, class A>
void add_few_pixels(A* pixels, int64_t stride_w, const int32_t* targets, int32_t count,
                    const A* expanded, int64_t block, const int32_t* index, const A* weights,
                    int32_t vectors, int32_t last_valid) {
  constexpr int L = kLanes<A>;
  Vector<A> weight[N];
  const A* row[N];
  for (int t = 0; t < N; ++t) {
    weight[t] = broadcast(weights[t]);
    row[t] = expanded + index[t] * block;
  }
  const int32_t whole = last_valid == L ? vectors : vectors - 1;
  for (int32_t s = 0; s < count; ++s) {
    A* pixel = pixels + targets[s] * stride_w;
    for (int32_t v = 0; v < whole; ++v) {
      Vector<A> sum = load(pixel + v * L);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + v * L), sum);
      store(pixel + v * L, sum);
    }
    if (whole < vectors) {
      Vector<A> sum = load_part(pixel + whole * L, last_valid);
      for (int t = 0; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + whole * L), sum);
      store_part(pixel + whole * L, sum, last_valid);
    }
    for (int t = 0; t < N; ++t) row[t] += int64_t{vectors} * L;
  }
}

template <class T>
void grad_features_nhwc(const GradWork<acc_t<T>>& work) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  const Plane<A> plane = plane_of<T>(work);
  const int32_t vectors = static_cast<int32_t>((work.channels + L - 1) / L);
  const int32_t last_valid = static_cast<int32_t>(work.channels - int64_t{vectors - 1} * L);
  const int64_t width = int64_t{vectors} * L;
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const T* from =
        static_cast<const T*>(problem.pooled) + plan.box * problem.channels * cells + work.channel;
    if (plan.narrow) {
      grad_features_narrow<T>(work, plan, plane);
      continue;
    }
    const Table<A>& rows = plan.y_transposed;
    const Table<A>& columns = plan.x_transposed;
    const Band<A> band = band_of(work, rows);
    if (band.first == band.end) continue;
    const int32_t together = columns_together<A>(problem, width, plan.slots);
    A* row = work.scratch;
    A* expanded = row + (int64_t{problem.out_width} + 1) * width;
    const int64_t block = together * width;
    __builtin_memset(row + problem.out_width * width, 0, sizeof(A) * static_cast<size_t>(width));
    __builtin_memset(expanded + problem.out_height * block, 0,
                     sizeof(A) * static_cast<size_t>(block));  // the zero slots
    for (int32_t first = 0; first < plan.slots; first += together) {
      const int32_t end = first + together < plan.slots ? first + together : plan.slots;
      for (int32_t i = 0; i < problem.out_height; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j) {
          copy_channels(from + (int64_t{i} * problem.out_width + j) * problem.channels,
                        work.channels, vectors, row + j * width);
        }
#define GLIMPSE_CALL(taps) \
  expand_row<taps, A>(row, columns, first, end, vectors, expanded + i * block)
        GLIMPSE_WITH_UNIFORM(columns.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
      }
      for (int32_t r = band.first; r < band.end; ++r) {
        const int32_t tap = rows.tap_begin(r);
        A* pixels = plane.data + (rows.target[r] - work.first_row) * plane.stride_h;
        int32_t taps = rows.tap_end(r) - tap;
        const int32_t* index = rows.index + tap;
        const A* weight = rows.weight + tap;
#define GLIMPSE_CALL(n)                                                                       \
  add_few_pixels<n, A>(pixels, plane.stride_w, columns.target + first, end - first, expanded, \
                       block, index, weight, vectors, last_valid)
        GLIMPSE_IN_GROUPS(taps, index, weight, GLIMPSE_CALL)
#undef GLIMPSE_CALL
      }
    }
  }
}

}  // namespace
