// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: kNchw, boxes whose rows fit into a few vectors.
//
// Note [One plane at a time]
// Channels in lanes want as many planes at hand as a vector has lanes; those of a large map fit
// into no cache that is near. Here lanes are cells or columns, and all boxes of a map are served on
// a few planes before the next ones. Along x nothing is transposed: a row of a window (or of cells)
// lies in registers, and each lane picks its taps out of it.
//
//     rows of pixels       sum along y      pick and sum along x
//     x ->                 x ->             cells ->
//     [ . . . . . . . . ]  [ . . . . ] 0    [ . . . ] 0
//     [ . . . . . . . . ]  [ . . . . ] 1    [ . . . ] 1
//
// A cell adds the same terms in the same order as where channels are lanes, so its bits are the
// same. Against channels in lanes this took 0.46 to 0.85 of the time of a sample, 0.72 to 0.84 of
// that of a gradient of the features (AVX-512 on Zen 4, 1 MB of L2 cache, one thread, 256
// channels).

namespace {

/// Brings memory that is needed soon into the L2 cache, in steps.
class ReadAhead {
 public:
  ReadAhead(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes), step_(bytes / steps + 64) {}
  void step() {
    const char* stop = end_ - next_ < step_ ? end_ : next_ + step_;
    for (; next_ < stop; next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
  int64_t step_;
};

/// Brings all of a few cells near.
inline void prefetch_cells(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 3);
  }
}

/// Calls call(n) with the number of taps of every lane as a literal, 0 where there are many.
#define GLIMPSE_WITH_TAPS(taps, call) \
  switch (taps) {                     \
    case 1:                           \
      call(1);                        \
      break;                          \
    case 2:                           \
      call(2);                        \
      break;                          \
    case 3:                           \
      call(3);                        \
      break;                          \
    case 4:                           \
      call(4);                        \
      break;                          \
    case 5:                           \
      call(5);                        \
      break;                          \
    case 6:                           \
      call(6);                        \
      break;                          \
    default:                          \
      call(0);                        \
  }

// -------------------------------------------------------------------------------------- forward

/// sums[i][x]: rows of cells, of N taps each, in windows of V vectors (0: `vectors`).
template <int N, int V, class T>
void sum_uniform_rows(const T* window, int64_t stride_h, const Table<acc_t<T>>& y, int32_t vectors,
                      int32_t last_valid, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int32_t count = V != 0 ? V : vectors;
  const int32_t whole = last_valid == L ? count : count - 1;
  const int32_t* index = y.index;
  const A* weights = y.weight;
  for (int32_t i = y.first; i < y.end; ++i, index += N, weights += N, sums += count * L) {
    Vector<A> weight[N];
    const T* row[N];
    for (int t = 0; t < N; ++t) {
      weight[t] = broadcast(weights[t]);
      row[t] = window + index[t] * stride_h;
    }
    for (int32_t v = 0; v < whole; ++v) {
      Vector<A> sum = weight[0] * load(row[0] + v * L);
      for (int t = 1; t < N; ++t) sum = multiply_add(weight[t], load(row[t] + v * L), sum);
      store(sums + v * L, sum);
    }
    if (whole < count) {
      Vector<A> sum = weight[0] * load_part(row[0] + whole * L, last_valid);
      for (int t = 1; t < N; ++t) {
        sum = multiply_add(weight[t], load_part(row[t] + whole * L, last_valid), sum);
      }
      store(sums + whole * L, sum);
    }
  }
}

/// `rows` rows of cells from sums[i][x]; N taps each (0: as many as the table says).
template <int Sources, int N, class P, class A>
void pick_cells(const BoxPlan<A>& plan, const A* sums, int32_t rows, int32_t width, P* to) {
  constexpr int L = kLanes<A>;
  const PickTable<A>& picks = plan.picks;
  const int32_t taps = N != 0 ? N : picks.taps;
  const int64_t end = int64_t{rows} * width;
  const int64_t row = int64_t{plan.vectors} * L;
  const int32_t packed = plan.packed;
  for (int32_t b = 0; b < picks.blocks; ++b) {
    const uint8_t* index = picks.index + int64_t{b} * taps * L;
    const uint16_t* mask = picks.mask + int64_t{b} * taps;
    const A* weights = picks.weight + int64_t{b} * taps * L;
    constexpr int kHeld = N != 0 ? N : 1;
    PickLanes<A> lanes[kHeld];
    Vector<A> weight[kHeld];
    for (int t = 0; t < N; ++t) {
      lanes[t] = PickLanes<A>::from(index + t * L, mask[t]);
      weight[t] = load(weights + t * L);
    }
    const int32_t left = packed * width - b * L;
    const int32_t valid = left < L ? left : L;
    // The lanes behind a row are those of the next row, which is written later.
    const bool spill = valid == L || picks.blocks == 1;
    for (int32_t i = 0; i < rows; i += packed) {
      Vector<A> source[Sources];
      for (int s = 0; s < Sources; ++s) source[s] = load(sums + i * row + s * L);
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
      const int64_t at = int64_t{i} * width + b * L;
      if (spill && at + L <= end) {
        store(to + at, sum);
      } else {
        store_part(to + at, sum, static_cast<int>(end - at < valid ? end - at : valid));
      }
    }
  }
}

/// Elements of scratch for planar plans.
template <class A>
int64_t planar_scratch(const Problem& problem, const PlanSet<A>& plans) {
  if (plans.max_planar_vectors() == 0) return 0;
  constexpr int64_t kSpare = 4;  // sources that are loaded, but not picked from
  return ((int64_t{problem.out_height} + 1) * plans.max_planar_vectors() + kSpare) * kLanes<A>;
}

/// One channel of one box.
template <class T>
void sample_plane(const Problem& problem, const BoxPlan<acc_t<T>>& plan, const T* window,
                  int64_t stride_h, acc_t<T>* sums, pooled_t<T>* to) {
  using A = acc_t<T>;
  if constexpr (kPickSources<A> > 0) {
    const int32_t width = problem.out_width;
    const int32_t rows = plan.y.end - plan.y.first;
    const int32_t vectors = plan.vectors;
    pooled_t<T>* reached = to + int64_t{plan.y.first} * width;
    const auto sum = [&](auto taps) {
      constexpr int N = decltype(taps)::value;
      if (vectors == 1) {
        sum_uniform_rows<N, 1, T>(window, stride_h, plan.y, vectors, plan.last_valid, sums);
      } else if (vectors == 2) {
        sum_uniform_rows<N, 2, T>(window, stride_h, plan.y, vectors, plan.last_valid, sums);
      } else {
        sum_uniform_rows<N, 0, T>(window, stride_h, plan.y, vectors, plan.last_valid, sums);
      }
    };
    switch (plan.y.uniform) {
      case 2:
        sum(std::integral_constant<int, 2>{});
        break;
      case 3:
        sum(std::integral_constant<int, 3>{});
        break;
      case 4:
        sum(std::integral_constant<int, 4>{});
        break;
      case 5:
        sum(std::integral_constant<int, 5>{});
        break;
      case 6:
        sum(std::integral_constant<int, 6>{});
        break;
      default:
        for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
          const int32_t tap = plan.y.tap_begin(i), taps = plan.y.tap_end(i) - tap;
          if (taps == 0) continue;
          sum_rows<T>(window, 0, stride_h, 1, plan.y.index + tap, plan.y.weight + tap, taps,
                      vectors, plan.last_valid,
                      sums + int64_t{i - plan.y.first} * vectors * kLanes<A>);
        }
    }
    const auto pick_from = [&](auto sources) {
      constexpr int S = decltype(sources)::value;
#define GLIMPSE_CALL(taps) pick_cells<S, taps, pooled_t<T>, A>(plan, sums, rows, width, reached)
      GLIMPSE_WITH_TAPS(plan.picks.taps, GLIMPSE_CALL)
#undef GLIMPSE_CALL
    };
    if (vectors > 2) {
      if constexpr (kPickSources<A> > 2) pick_from(std::integral_constant<int, 4>{});
    } else if (vectors == 2 || plan.packed == 2) {
      pick_from(std::integral_constant<int, 2>{});
    } else {
      pick_from(std::integral_constant<int, 1>{});
    }
    const auto fill = fill_of<pooled_t<T>, A>(problem);
    fill_cells(to, int64_t{plan.y.first} * width, fill);
    fill_cells(to + int64_t{plan.y.end} * width, int64_t{problem.out_height - plan.y.end} * width,
               fill);
    for (int32_t i = plan.y.first; plan.y.uniform == 0 && i < plan.y.end; ++i) {
      if (plan.y.tap_begin(i) == plan.y.tap_end(i)) {
        fill_cells(to + int64_t{i} * width, width, fill);
      }
    }
    for (int32_t u = 0; u < plan.unread_count; ++u) {
      for (int32_t i = plan.y.first; i < plan.y.end; ++i) {
        to[int64_t{i} * width + plan.unread[u]] = fill;
      }
    }
  }
}

/// Whether the windows of some boxes cover so much of a plane that reading all of it ahead pays.
template <class A>
bool covers_plane(const BoxPlan<A>* const* plans, int64_t count, const Level& level) {
  const int64_t pixels = int64_t{level.height} * level.width;
  int64_t covered = 0;
  for (int64_t b = 0; b < count && 5 * covered < 3 * pixels; ++b) {
    const Table<A>& y = plans[b]->y;
    if (!plans[b]->planar) continue;
    const int64_t first = y.index[0], last = y.index[y.tap_end(y.end - 1) - 1];
    const int64_t rows = (last < first ? first - last : last - first) + 1;
    covered += rows * plans[b]->vectors * kLanes<A>;
  }
  return 5 * covered >= 3 * pixels;
}

/// The planar plans of a Work, map by map; the others are left out.
template <class T>
void sample_planes(const Work<acc_t<T>>& work) {
  using A = acc_t<T>;
  const Problem& problem = *work.problem;
  const int64_t cells = cells_of(problem);
  for (int64_t first = 0, end; first < work.count; first = end) {
    const BoxPlan<A>& head = *work.plans[first];
    end = first + 1;
    if (!head.planar) continue;
    while (end < work.count && !work.plans[end]->empty && work.plans[end]->level == head.level &&
           work.plans[end]->image == head.image) {
      ++end;
    }
    const Level& level = problem.level[head.level];
    const int64_t plane = int64_t{level.height} * level.width;
    const int64_t together = planes_together(level, work.channels, sizeof(T));
    const bool ahead =
        level.stride_c == plane && covers_plane(work.plans + first, end - first, level);
    for (int64_t c = 0; c < work.channels; c += together) {
      const int64_t channels = work.channels - c < together ? work.channels - c : together;
      const T* image = image_of<T>(level, head.image) + (work.channel + c) * level.stride_c;
      const int64_t left = work.channels - c - channels;
      ReadAhead next(image + channels * level.stride_c,
                     ahead ? (left < together ? left : together) * plane * sizeof(T) : 0,
                     end - first);
      for (int64_t b = first; b < end; ++b) {
        const BoxPlan<A>& plan = *work.plans[b];
        if (!plan.planar) continue;
        next.step();
        const T* window = image + (level.width > 1 ? plan.first_column : 0);
        auto* to = static_cast<pooled_t<T>*>(problem.pooled) +
                   (plan.box * problem.channels + work.channel + c) * cells;
        for (int64_t i = 0; i < channels; ++i, window += level.stride_c, to += cells) {
          sample_plane<T>(problem, plan, window, level.stride_h, work.scratch, to);
        }
      }
    }
  }
}

}  // namespace
