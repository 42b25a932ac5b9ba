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

/// Calls call(n) with the number of taps of every row as a literal, 0 where rows differ.
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

inline int64_t cells_of(const Problem& problem) {
  return int64_t{problem.out_height} * problem.out_width;
}

/// What stands in cells that read nothing.
template <class P, class A>
P fill_of(const Problem& problem) {
  return Store<P>::from(static_cast<A>(problem.fill));
}

/// to[0] = ... = to[count - 1] = value.
template <class P>
void fill_cells(P* to, int64_t count, P value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
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

/// The channels of one cell, those missing in the last vector as zeros.
template <class P, class A>
void copy_channels(const P* from, int64_t channels, int32_t vectors, A* to) {
  constexpr int L = kLanes<A>;
  for (int32_t v = 0; v < vectors - 1; ++v) store(to + v * L, load(from + v * L));
  const int32_t last = vectors - 1;
  const int32_t valid = static_cast<int32_t>(channels - int64_t{last} * L);
  store(to + last * L, valid == L ? load(from + last * L) : load_part(from + last * L, valid));
}

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

template <class A>
struct Plane;

// Of apply_narrow.h, for plans that say so.
template <class T>
void sample_narrow(const Work<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan);
template <class T>
void grad_features_narrow(const GradWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                          const Plane<acc_t<T>>& plane);
template <class T>
void grad_boxes_narrow(const Work<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                       BoxGradient& gradient);

// Of apply_planes.h and apply_planes_grad.h, for plans that say so.
template <class T>
void sample_planes(const Work<acc_t<T>>& work);
template <class T>
void grad_features_planar(const GradWork<acc_t<T>>& work, const BoxPlan<acc_t<T>>& plan,
                          const BoxPlan<acc_t<T>>* following, const Plane<acc_t<T>>& plane);
template <class T>
void grad_boxes_planes(const BoxWork<acc_t<T>>& work);

}  // namespace

#include "cpu/apply_grad_boxes.h"
#include "cpu/apply_grad_features.h"
#include "cpu/apply_paste.h"
#include "cpu/apply_sample.h"
// Need the functions above.
#include "cpu/apply_batch.h"
#include "cpu/apply_narrow.h"
#include "cpu/apply_planes.h"
#include "cpu/apply_planes_grad.h"

namespace {

// ----------------------------------------------------------------------------------- the table

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
int64_t sample_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const int64_t narrow = (plans.max_narrow_vectors() + 2) * L;
  if (problem.layout == Layout::kNhwc) return narrow;
  const int64_t wide =
      L * (2 * plans.max_vectors() * L + 1 + int64_t{rows_together(problem)} * problem.out_width);
  return larger(larger(wide, narrow), planar_scratch<acc_t<T>>(problem, plans));
}

template <class T>
int64_t grad_features_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans,
                              int64_t channels) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const int64_t narrow = plans.max_narrow_vectors() == 0
                             ? 0
                             : row_room<acc_t<T>>(problem.out_width * problem.channels) +
                                   plans.max_narrow_vectors() * L * problem.out_height;
  if (problem.layout == Layout::kNchw) {
    return larger(int64_t{rows_together(problem)} * (problem.out_width + 1) * L +
                      plans.max_vectors() * L * L * (int64_t{problem.out_height} + 2),
                  larger(narrow, planar_scratch<acc_t<T>>(problem, plans)));
  }
  const int64_t width = (channels + L - 1) / L * L;
  // A last block with fewer channels expands more columns at a time, within the same bounds.
  const int64_t column = width * (int64_t{problem.out_height} + 1);
  const int64_t fit = kExpandedBytes / static_cast<int64_t>(sizeof(acc_t<T>));
  const int64_t together = column > fit ? column : fit;
  const int64_t all = column * plans.max_slots();
  return larger(width * (problem.out_width + 1) + (together < all ? together : all), narrow);
}

template <class T>
int64_t grad_boxes_scratch(const Problem& problem, const PlanSet<acc_t<T>>& plans) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const int64_t narrow = plans.max_narrow_vectors() == 0
                             ? 0
                             : row_room<acc_t<T>>(problem.out_width * problem.channels) +
                                   3 * (plans.max_narrow_vectors() + 2) * L;
  if (problem.layout == Layout::kNchw) {
    return larger((int64_t{problem.out_width} + 1) * L + 3 * plans.max_vectors() * L * L, narrow);
  }
  return larger(kBoxVectors * L * (int64_t{problem.out_width} + 1 + 2 * int64_t{plans.max_slots()}),
                narrow);
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
    static constexpr Kernels<T> table = {kLanes<float>,
                                         kPickSources<float>,
                                         sample_scratch<T>,
                                         nullptr,
                                         grad_boxes_scratch<T>,
                                         sample<T>,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         grad_boxes<T>,
                                         paste_spread<T>,
                                         paste_values<T>,
                                         paste_bytes<float>,
                                         paste_bits<float>,
                                         paste_sides<float>,
                                         batch_rows<T>,
                                         batch_interleave<float>,
                                         batch_cells<float>,
                                         batch_store<float>};
    return table;
  } else {
    static constexpr Kernels<T> table = {kLanes<acc_t<T>>,
                                         kPickSources<acc_t<T>>,
                                         sample_scratch<T>,
                                         grad_features_scratch<T>,
                                         grad_boxes_scratch<T>,
                                         sample<T>,
                                         clear_gradient<T>,
                                         grad_features<T>,
                                         convert_gradient<T>,
                                         grad_boxes<T>,
                                         paste_spread<T>,
                                         paste_values<T>,
                                         paste_bytes<acc_t<T>>,
                                         paste_bits<acc_t<T>>,
                                         paste_sides<acc_t<T>>,
                                         batch_rows<T>,
                                         batch_interleave<acc_t<T>>,
                                         batch_cells<acc_t<T>>,
                                         batch_store<acc_t<T>>};
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
#undef GLIMPSE_WITH_TAPS
#undef GLIMPSE_MEMBER
#undef GLIMPSE_INLINE
