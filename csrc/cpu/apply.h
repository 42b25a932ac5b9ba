// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels: apply the tables of plan.h to all channels. Included once per instruction set,
// inside its namespace (see apply_baseline.cpp).
//
// Note [Channels in lanes]
// Boxes are narrow: a row of a window is shorter than a few vectors, and each cell wants its own
// few columns. So lanes are channels wherever columns are chosen, for both layouts. In kNhwc
// memory is like that. In kNchw a vector runs along x while rows are summed, where every lane does
// the same; then squares of lanes x lanes numbers are transposed in registers, and each cell adds
// its columns for all channels at once.
//
//     rows of 8 channels       sum along y        transposed          sum along x
//     x ->                     x ->               channels ->         channels ->
//     [ . . . . . . . . ]      [ . . . . ] c 0    [ . . . . ] x 0     [ . . . . ] cell 0
//     [ . . . . . . . . ] ...  [ . . . . ] c 1    [ . . . . ] x 1     [ . . . . ] cell 1
//
// Gradients go the same way backwards.

#include "cpu/simd.h"

namespace {

/// Calls apply with the compile-time number of taps of a row, 0 where rows differ.
#define GLIMPSE_WITH_UNIFORM(uniform, call) \
  switch (uniform) {                        \
    case 2:                                 \
      call(2);                              \
      break;                                \
    case 3:                                 \
      call(3);                              \
      break;                                \
    case 4:                                 \
      call(4);                              \
      break;                                \
    case 5:                                 \
      call(5);                              \
      break;                                \
    case 6:                                 \
      call(6);                              \
      break;                                \
    default:                                \
      call(0);                              \
  }

/// Calls call(n) for the taps of a row in groups, in order. Each call adds to what is there, so
/// that the groups change no sum.
#define GLIMPSE_IN_GROUPS(taps, index, weight, call)            \
  for (; taps > 4; taps -= 4, index += 4, weight += 4) call(4); \
  switch (taps) {                                               \
    case 1:                                                     \
      call(1);                                                  \
      break;                                                    \
    case 2:                                                     \
      call(2);                                                  \
      break;                                                    \
    case 3:                                                     \
      call(3);                                                  \
      break;                                                    \
    case 4:                                                     \
      call(4);                                                  \
      break;                                                    \
  }

template <class T>
int64_t cells_of(const Problem& problem) {
  return int64_t{problem.out_height} * problem.out_width;
}

/// Rows of cells that are transposed together: enough to fill vectors, few enough for the cache.
inline int32_t rows_together(const Problem& problem) {
  const int32_t wanted = 512 / (problem.out_width > 0 ? problem.out_width : 1);
  const int32_t rows = wanted < 1 ? 1 : wanted;
  return rows < problem.out_height ? rows : problem.out_height;
}

template <class T>
const T* image_of(const Level& level, int64_t image) {
  return static_cast<const T*>(level.data) + image * level.stride_n;
}

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

/// sums[c][x] -> columns[x][c].
template <class A>
void transpose_columns(const A* sums, int32_t vectors, A* columns) {
  constexpr int L = kLanes<A>;
  for (int32_t v = 0; v < vectors; ++v) {
    Vector<A> square[L];
    for (int c = 0; c < L; ++c) square[c] = load(sums + (c * vectors + v) * L);
    transpose(square);
    for (int x = 0; x < L; ++x) store(columns + (v * L + x) * L, square[x]);
  }
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
        A sum = 0;
        if (i >= plan.y.first && i < plan.y.end) {
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
  const int64_t cells = cells_of<T>(problem);
  const int32_t together = rows_together(problem);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    auto* to = static_cast<pooled_t<T>*>(problem.pooled) +
               (plan.box * problem.channels + work.channel) * cells;
    if (plan.empty) {
      __builtin_memset(to, 0, sizeof(*to) * static_cast<size_t>(work.channels * cells));
      continue;
    }
    const Level& level = problem.level[plan.level];
    const T* window = image_of<T>(level, plan.image) + work.channel * level.stride_c +
                      (level.width > 1 ? plan.first_column : 0);
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
          __builtin_memset(row, 0, sizeof(A) * static_cast<size_t>(problem.out_width) * L);
          continue;
        }
        const int32_t tap = plan.y.tap_begin(i);
        sum_rows<T>(window, level.stride_c, level.stride_h, work.channels, plan.y.index + tap,
                    plan.y.weight + tap, plan.y.tap_end(i) - tap, vectors, plan.last_valid, sums);
        transpose_columns(sums, vectors, columns);
#define GLIMPSE_CALL(taps) sum_columns<taps, A>(columns, plan.x, row)
        GLIMPSE_WITH_UNIFORM(plan.x.uniform, GLIMPSE_CALL)
#undef GLIMPSE_CALL
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
  const int64_t cells = cells_of<T>(problem);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    auto* to = static_cast<pooled_t<T>*>(problem.pooled) + plan.box * problem.channels * cells +
               work.channel;
    if (plan.empty) {
      for (int64_t i = 0; i < cells; ++i, to += problem.channels) {
        __builtin_memset(to, 0, sizeof(*to) * static_cast<size_t>(work.channels));
      }
      continue;
    }
    const Level& level = problem.level[plan.level];
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

// ------------------------------------------------------------- gradient of the features, shared

/// expanded[s] = the weighted sum of the cells that tap slot s, for slots first..end - 1; rows of
/// one length (Taps) or several (0). Cells and slots are `vectors` vectors wide.
template <int Taps, class A>
void expand_row(const A* cells, const Table<A>& table, int32_t first, int32_t end, int32_t vectors,
                A* expanded) {
  constexpr int L = kLanes<A>;
  const int64_t width = int64_t{vectors} * L;
  for (int32_t s = first; s < end; ++s, expanded += width) {
    if constexpr (Taps != 0) {
      Vector<A> weight[Taps];
      const A* cell[Taps];
      for (int t = 0; t < Taps; ++t) {
        weight[t] = broadcast(table.weight[s * Taps + t]);
        cell[t] = cells + table.index[s * Taps + t] * width;
      }
      for (int32_t v = 0; v < vectors; ++v) {
        Vector<A> sum = weight[0] * load(cell[0] + v * L);
        for (int t = 1; t < Taps; ++t) sum = multiply_add(weight[t], load(cell[t] + v * L), sum);
        store(expanded + v * L, sum);
      }
    } else {
      for (int32_t v = 0; v < vectors; ++v) {
        Vector<A> sum = {};
        for (int32_t t = table.start[s]; t < table.start[s + 1]; ++t) {
          sum = multiply_add(broadcast(table.weight[t]),
                             load(cells + table.index[t] * width + v * L), sum);
        }
        store(expanded + v * L, sum);
      }
    }
  }
}

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

/// Cells of `rows` rows of one box, channels in lanes, each row followed by the zero slot.
template <class P, class A>
void load_cells(const P* from, int64_t stride, int64_t channels, int32_t rows, int32_t width,
                A* cells) {
  constexpr int L = kLanes<A>;
  const int64_t count = int64_t{rows} * width;
  int32_t column = 0;
  for (int64_t i = 0; i < count; i += L) {
    const int32_t valid = static_cast<int32_t>(count - i < L ? count - i : L);
    Vector<A> square[L];
    for (int64_t c = 0; c < L; ++c) {
      square[c] = c >= channels ? Vector<A>{}
                  : valid == L  ? load(from + c * stride + i)
                                : load_part(from + c * stride + i, valid);
    }
    transpose(square);
    for (int x = 0; x < valid; ++x) {
      store(cells, square[x]);
      cells += L;
      if (++column == width) {
        store(cells, Vector<A>{});
        cells += L;
        column = 0;
      }
    }
  }
}

/// columns[x][c] -> sums[c][x].
template <class A>
void transpose_back(const A* columns, int32_t vectors, A* sums) {
  constexpr int L = kLanes<A>;
  for (int32_t v = 0; v < vectors; ++v) {
    Vector<A> square[L];
    for (int x = 0; x < L; ++x) square[x] = load(columns + (v * L + x) * L);
    transpose(square);
    for (int c = 0; c < L; ++c) store(sums + (c * vectors + v) * L, square[c]);
  }
}

/// Adds the weighted sum of N of the rows[cell][c][x] to one row of pixels of all channels.
template <int N, class A>
void add_few_rows(A* pixels, int64_t stride_c, int64_t channels, const A* rows,
                  const int32_t* index, const A* weights, int32_t vectors, int32_t last_valid) {
  constexpr int L = kLanes<A>;
  const int64_t width = int64_t{vectors} * L;
  Vector<A> weight[N];
  const A* row[N];
  for (int t = 0; t < N; ++t) {
    weight[t] = broadcast(weights[t]);
    row[t] = rows + index[t] * width * L;
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
  for (int64_t c = 0; c < work.channels; ++c) {
    A* window = plane.data + c * plane.stride_c + plan.first_column;
    for (int32_t i = 0; i < problem.out_height; ++i) {
      for (int32_t j = 0; j < problem.out_width; ++j, ++from) {
        if (i < plan.y.first || i >= plan.y.end) continue;
        const A g = load_value(*from);
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
  const int64_t cells = cells_of<T>(problem);
  const int32_t together = rows_together(problem);
  const Plane<A> plane = plane_of<T>(work);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const T* from = static_cast<const T*>(problem.pooled) +
                    (plan.box * problem.channels + work.channel) * cells;
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
#define GLIMPSE_CALL(n)                                                                       \
  add_few_rows<n, A>(pixels, plane.stride_c, work.channels, expanded, index, weight, vectors, \
                     plan.last_valid)
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

template <class P, class A>
void copy_channels(const P* from, int64_t channels, int32_t vectors, A* to) {
  constexpr int L = kLanes<A>;
  for (int32_t v = 0; v < vectors - 1; ++v) store(to + v * L, load(from + v * L));
  const int32_t last = vectors - 1;
  const int32_t valid = static_cast<int32_t>(channels - int64_t{last} * L);
  store(to + last * L, valid == L ? load(from + last * L) : load_part(from + last * L, valid));
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
  const int64_t cells = cells_of<T>(problem);
  const Plane<A> plane = plane_of<T>(work);
  const int32_t vectors = static_cast<int32_t>((work.channels + L - 1) / L);
  const int32_t last_valid = static_cast<int32_t>(work.channels - int64_t{vectors - 1} * L);
  const int64_t width = int64_t{vectors} * L;
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const T* from =
        static_cast<const T*>(problem.pooled) + plan.box * problem.channels * cells + work.channel;
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
      for (int32_t j = 0; j < problem.out_width; ++j) {
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
  const int64_t cells = cells_of<T>(problem);
  for (int64_t channel = work.channel; channel < work.channel + work.channels; channel += L) {
    const int64_t left = work.channel + work.channels - channel;
    const int64_t channels = left < L ? left : L;
    for (int64_t b = 0; b < work.count; ++b) {
      const BoxPlan<A>& plan = *work.plans[b];
      const auto* from = static_cast<const pooled_t<T>*>(problem.pooled) +
                         (plan.box * problem.channels + channel) * cells;
      const Level& level = problem.level[plan.level];
      const T* window = image_of<T>(level, plan.image) + channel * level.stride_c +
                        (level.width > 1 ? plan.first_column : 0);
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
  const int64_t cells = cells_of<T>(problem);
  for (int64_t b = 0; b < work.count; ++b) {
    const BoxPlan<A>& plan = *work.plans[b];
    const Level& level = problem.level[plan.level];
    const Table<A>& columns = plan.x_transposed;
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

// ----------------------------------------------------------------------------------- the table

template <class T>
int64_t sample_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  if (problem.layout == Layout::kNhwc) return 0;
  return L *
         (2 * plans.max_vectors() * L + 1 + int64_t{rows_together(problem)} * problem.out_width);
}

template <class T>
int64_t grad_features_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans,
                              int64_t channels) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  if (problem.layout == Layout::kNchw) {
    return int64_t{rows_together(problem)} * (problem.out_width + 1) * L +
           plans.max_vectors() * L * L * (int64_t{problem.out_height} + 2);
  }
  const int64_t width = (channels + L - 1) / L * L;
  // A last block with fewer channels expands more columns at a time, within the same bounds.
  const int64_t column = width * (int64_t{problem.out_height} + 1);
  const int64_t fit = kExpandedBytes / static_cast<int64_t>(sizeof(acc_t<T>));
  const int64_t together = column > fit ? column : fit;
  const int64_t all = column * plans.max_slots();
  return width * (problem.out_width + 1) + (together < all ? together : all);
}

template <class T>
int64_t grad_boxes_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  if (problem.layout == Layout::kNchw) {
    return (int64_t{problem.out_width} + 1) * L + 3 * plans.max_vectors() * L * L;
  }
  return kBoxVectors * L * (int64_t{problem.out_width} + 1 + 2 * int64_t{plans.max_slots()});
}

template <class T>
void sample(const Work<acc_t<T>>& work) {
  work.problem->layout == Layout::kNchw ? sample_nchw<T>(work) : sample_nhwc<T>(work);
}
template <class T>
void grad_features(const GradWork<acc_t<T>>& work) {
  work.problem->layout == Layout::kNchw ? grad_features_nchw<T>(work) : grad_features_nhwc<T>(work);
}
template <class T>
void grad_boxes(const BoxWork<acc_t<T>>& work) {
  work.problem->layout == Layout::kNchw ? grad_boxes_nchw<T>(work) : grad_boxes_nhwc<T>(work);
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, uint8_t>) {
    static constexpr Kernels<T> table = {
        kLanes<float>, sample_scratch<T>, nullptr, grad_boxes_scratch<T>, sample<T>,
        nullptr,       nullptr,           nullptr, grad_boxes<T>};
    return table;
  } else {
    static constexpr Kernels<T> table = {
        kLanes<acc_t<T>>,      sample_scratch<T>,   grad_features_scratch<T>,
        grad_boxes_scratch<T>, sample<T>,           clear_gradient<T>,
        grad_features<T>,      convert_gradient<T>, grad_boxes<T>};
    return table;
  }
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<half>& kernels();
template const Kernels<bfloat16>& kernels();
template const Kernels<uint8_t>& kernels();

#undef GLIMPSE_WITH_UNIFORM
#undef GLIMPSE_IN_GROUPS
#undef GLIMPSE_INLINE
