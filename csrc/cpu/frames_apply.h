// SPDX-License-Identifier: BSD-3-Clause
//
// The loops over channels of operators on frames. Included once per instruction set, inside its
// namespace (see frames_baseline.cpp). In kNhwc lanes are channels. In kNchw the taps of a cell are
// scattered over a plane, so what is shared is the table: four planes are read with one look at it.

#include "cpu/simd.h"

namespace {

/// First pooled value or gradient of a box.
template <class P>
GLIMPSE_INLINE P* of_box(const FrameProblem& problem, int64_t box) {
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  return static_cast<P*>(problem.pooled) + box * problem.channels * cells;
}

// ------------------------------------------------------------------------------------------ sample

template <class T, int kPlanes>
GLIMPSE_INLINE void sample_planes(const CellTable<acc_t<T>>& table, int64_t cells, const T* plane,
                                  int64_t stride_c, pooled_t<T>* pooled) {
  using A = acc_t<T>;
  const int64_t* offset = table.offset.data();
  const A* weight = table.weight.data();
  for (int64_t cell = 0; cell < cells; ++cell) {
    A sum[kPlanes] = {};
    for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
      const T* pixel = plane + offset[i];
      for (int p = 0; p < kPlanes; ++p) sum[p] += weight[i] * load_value(pixel[p * stride_c]);
    }
    for (int p = 0; p < kPlanes; ++p) {
      pooled[p * cells + cell] = Store<pooled_t<T>>::from(sum[p]);
    }
  }
}

/// kVectors vectors of channels, the last of which has `tail` of them (0: all).
template <class T, int kVectors>
GLIMPSE_INLINE void sample_lanes(const CellTable<acc_t<T>>& table, int64_t cells, const T* image,
                                 int64_t channels, int tail, pooled_t<T>* pooled) {
  using A = acc_t<T>;
  const int64_t* offset = table.offset.data();
  const A* weight = table.weight.data();
  for (int64_t cell = 0; cell < cells; ++cell) {
    Vector<A> sum[kVectors] = {};
    for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
      const T* pixel = image + offset[i];
      const Vector<A> w = broadcast(weight[i]);
      for (int v = 0; v < kVectors; ++v) {
        const T* at = pixel + v * kLanes<A>;
        sum[v] += w * (tail != 0 && v == kVectors - 1 ? load_part(at, tail) : load(at));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      pooled_t<T>* to = pooled + cell * channels + v * kLanes<A>;
      if (tail != 0 && v == kVectors - 1) {
        store_part(to, sum[v], tail);
      } else {
        store(to, sum[v]);
      }
    }
  }
}

template <class T>
void sample(const FrameProblem& problem, const CellTable<acc_t<T>>& table, int64_t channel,
            int64_t end) {
  constexpr int kWidth = kLanes<acc_t<T>>;
  const Level& map = problem.map;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const T* image = static_cast<const T*>(map.data) + table.image * map.stride_n;
  pooled_t<T>* pooled = of_box<pooled_t<T>>(problem, table.box);
  if (problem.layout == Layout::kNchw) {
    for (; channel + 4 <= end; channel += 4) {
      sample_planes<T, 4>(table, cells, image + channel * map.stride_c, map.stride_c,
                          pooled + channel * cells);
    }
    for (; channel < end; ++channel) {
      sample_planes<T, 1>(table, cells, image + channel * map.stride_c, map.stride_c,
                          pooled + channel * cells);
    }
    return;
  }
  for (; channel + 4 * kWidth <= end; channel += 4 * kWidth) {
    sample_lanes<T, 4>(table, cells, image + channel, problem.channels, 0, pooled + channel);
  }
  for (; channel < end; channel += kWidth) {
    const int64_t left = end - channel;
    sample_lanes<T, 1>(table, cells, image + channel, problem.channels,
                       left < kWidth ? static_cast<int>(left) : 0, pooled + channel);
  }
}

// -------------------------------------------------------------------------------- gradient to maps

template <class T, int kPlanes>
GLIMPSE_INLINE void spread_planes(const CellTable<acc_t<T>>& table, int64_t cells, const T* grad,
                                  acc_t<T>* plane, int64_t stride_c) {
  using A = acc_t<T>;
  const int64_t* offset = table.offset.data();
  const A* weight = table.weight.data();
  for (int64_t cell = 0; cell < cells; ++cell) {
    A g[kPlanes];
    for (int p = 0; p < kPlanes; ++p) g[p] = load_value(grad[p * cells + cell]);
    for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
      A* pixel = plane + offset[i];
      for (int p = 0; p < kPlanes; ++p) pixel[p * stride_c] += weight[i] * g[p];
    }
  }
}

template <class T, int kVectors>
GLIMPSE_INLINE void spread_lanes(const CellTable<acc_t<T>>& table, int64_t cells, const T* grad,
                                 int64_t channels, int tail, acc_t<T>* image) {
  using A = acc_t<T>;
  const int64_t* offset = table.offset.data();
  const A* weight = table.weight.data();
  for (int64_t cell = 0; cell < cells; ++cell) {
    Vector<A> g[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const T* at = grad + cell * channels + v * kLanes<A>;
      g[v] = tail != 0 && v == kVectors - 1 ? load_part(at, tail) : load(at);
    }
    for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
      A* pixel = image + offset[i];
      const Vector<A> w = broadcast(weight[i]);
      for (int v = 0; v < kVectors; ++v) {
        A* at = pixel + v * kLanes<A>;
        if (tail != 0 && v == kVectors - 1) {
          store_part(at, load_part(at, tail) + w * g[v], tail);
        } else {
          store(at, load(at) + w * g[v]);
        }
      }
    }
  }
}

template <class T>
void grad_features(const FrameProblem& problem, const CellTable<acc_t<T>>& table, int64_t channel,
                   int64_t end, acc_t<T>* sums, int64_t stride_c) {
  constexpr int kWidth = kLanes<acc_t<T>>;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const T* grad = of_box<const T>(problem, table.box);
  if (problem.layout == Layout::kNchw) {
    for (; channel + 2 <= end; channel += 2) {
      spread_planes<T, 2>(table, cells, grad + channel * cells, sums + channel * stride_c,
                          stride_c);
    }
    for (; channel < end; ++channel) {
      spread_planes<T, 1>(table, cells, grad + channel * cells, sums + channel * stride_c,
                          stride_c);
    }
    return;
  }
  for (; channel + 4 * kWidth <= end; channel += 4 * kWidth) {
    spread_lanes<T, 4>(table, cells, grad + channel, problem.channels, 0, sums + channel);
  }
  for (; channel < end; channel += kWidth) {
    const int64_t left = end - channel;
    spread_lanes<T, 1>(table, cells, grad + channel, problem.channels,
                       left < kWidth ? static_cast<int>(left) : 0, sums + channel);
  }
}

// ------------------------------------------------------------------------------- gradient to boxes

/// Multiplies the gradient into the pixels first: one number for each tap, whatever the channels.
template <class T>
void grad_boxes(const FrameProblem& problem, const CellTable<acc_t<T>>& table, acc_t<T>* scratch,
                double* columns) {
  using A = acc_t<T>;
  using Grad = pooled_t<T>;
  constexpr int kWidth = kLanes<A>;
  const Level& map = problem.map;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t channels = problem.channels;
  const T* image = static_cast<const T*>(map.data) + table.image * map.stride_n;
  const Grad* grad = of_box<const Grad>(problem, table.box);
  const int64_t* offset = table.offset.data();
  const auto taps = static_cast<int32_t>(table.offset.size());
  for (int32_t i = 0; i < taps; ++i) scratch[i] = A(0);
  if (problem.layout == Layout::kNchw) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = image + c * map.stride_c;
      for (int64_t cell = 0; cell < cells; ++cell) {
        const A g = load_value(grad[c * cells + cell]);
        for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
          scratch[i] += g * load_value(plane[offset[i]]);
        }
      }
    }
  } else {
    for (int64_t cell = 0; cell < cells; ++cell) {
      const Grad* g = grad + cell * channels;
      for (int32_t i = table.start[cell]; i < table.start[cell + 1]; ++i) {
        const T* pixel = image + offset[i];
        Vector<A> sum = {};
        int64_t c = 0;
        for (; c + kWidth <= channels; c += kWidth) sum += load(g + c) * load(pixel + c);
        if (c < channels) {
          const int left = static_cast<int>(channels - c);
          sum += load_part(g + c, left) * load_part(pixel + c, left);
        }
        scratch[i] = static_cast<A>(sum_lanes<A>(sum));
      }
    }
  }
  for (int32_t i = 0; i < taps; ++i) {
    for (int32_t column = 0; column < kFrameColumns; ++column) {
      columns[column] += static_cast<double>(scratch[i]) * table.weight[i * kFrameColumns + column];
    }
  }
}

// ----------------------------------------------------------------------------------------- maximum

/// The values of a sample in kPlanes neighbouring channels.
template <class T, int kPlanes>
GLIMPSE_INLINE void tap_values(const SampleTap<acc_t<T>>& tap, const Level& map, const T* plane,
                               acc_t<T>* value) {
  const T* pixel = plane + tap.offset;
  const int64_t offsets[4] = {0, map.stride_w, map.stride_h, map.stride_h + map.stride_w};
  if (tap.highs == 3) {
    for (int p = 0; p < kPlanes; ++p, pixel += map.stride_c) {
      value[p] = tap.weight[0] * load_value(pixel[0]) +
                 tap.weight[1] * load_value(pixel[offsets[1]]) +
                 tap.weight[2] * load_value(pixel[offsets[2]]) +
                 tap.weight[3] * load_value(pixel[offsets[3]]);
    }
    return;
  }
  for (int p = 0; p < kPlanes; ++p, pixel += map.stride_c) {
    value[p] = tap.weight[0] * load_value(pixel[0]);
    if ((tap.highs & 2) != 0) value[p] += tap.weight[1] * load_value(pixel[offsets[1]]);
    if ((tap.highs & 1) != 0) value[p] += tap.weight[2] * load_value(pixel[offsets[2]]);
  }
}

/// best, which: the largest so far of `count` channels. Nothing here branches, so it vectorises.
template <class A>
GLIMPSE_INLINE void take_larger(const A* candidate, int32_t index, bool first, int64_t count,
                                A* best, int32_t* which) {
  if (first) {
    for (int64_t c = 0; c < count; ++c) best[c] = candidate[c];
    for (int64_t c = 0; c < count; ++c) which[c] = index;
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const bool larger =
        (candidate[c] > best[c]) | ((candidate[c] != candidate[c]) & (best[c] == best[c]));
    which[c] = larger ? index : which[c];
    best[c] = larger ? candidate[c] : best[c];
  }
}

template <class T>
GLIMPSE_INLINE void maximum_lanes(const FrameProblem& problem, const SampleTable<acc_t<T>>& table,
                                  int64_t cell, const T* image, acc_t<T>* candidate, acc_t<T>* best,
                                  int32_t* which) {
  using A = acc_t<T>;
  const Level& map = problem.map;
  const int64_t channels = problem.channels;
  const int64_t offsets[4] = {0, map.stride_w, map.stride_h, map.stride_h + map.stride_w};
  const int32_t first = table.candidates[cell];
  for (int32_t i = first; i < table.candidates[cell + 1]; ++i) {
    for (int64_t c = 0; c < channels; ++c) candidate[c] = A(0);
    if (table.candidate[i].tap >= 0) {
      const SampleTap<A>& tap = table.tap[table.candidate[i].tap];
      for (int32_t t = 0; t < 4; ++t) {
        if ((t & 1) != 0 && (tap.highs & 2) == 0) continue;
        if ((t & 2) != 0 && (tap.highs & 1) == 0) continue;
        const T* pixel = image + tap.offset + offsets[t];
        const A weight = tap.weight[t];
        for (int64_t c = 0; c < channels; ++c) candidate[c] += weight * load_value(pixel[c]);
      }
    }
    take_larger(candidate, table.candidate[i].index, i == first, channels, best, which);
  }
}

template <class T, int kPlanes>
GLIMPSE_INLINE void maximum_planes(const FrameProblem& problem, const SampleTable<acc_t<T>>& table,
                                   int64_t cells, const T* plane, pooled_t<T>* pooled,
                                   int32_t* winner) {
  using A = acc_t<T>;
  for (int64_t cell = 0; cell < cells; ++cell) {
    A best[kPlanes] = {}, value[kPlanes] = {};
    int32_t which[kPlanes] = {};
    const int32_t first = table.candidates[cell];
    for (int32_t i = first; i < table.candidates[cell + 1]; ++i) {
      const Candidate candidate = table.candidate[i];
      if (candidate.tap >= 0) {
        tap_values<T, kPlanes>(table.tap[candidate.tap], problem.map, plane, value);
      } else {
        for (int p = 0; p < kPlanes; ++p) value[p] = A(0);
      }
      take_larger(value, candidate.index, i == first, kPlanes, best, which);
    }
    for (int p = 0; p < kPlanes; ++p) {
      pooled[p * cells + cell] = Store<pooled_t<T>>::from(best[p]);
      winner[p * cells + cell] = which[p];
    }
  }
}

/// Every cell has a candidate: a cell without samples on the map has a dropped one.
template <class T>
void maximum(const FrameProblem& problem, const SampleTable<acc_t<T>>& table, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const Level& map = problem.map;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t channels = problem.channels;
  const T* image = static_cast<const T*>(map.data) + table.frame.image * map.stride_n;
  pooled_t<T>* pooled = of_box<pooled_t<T>>(problem, table.box);
  int32_t* winner = problem.winner + table.box * channels * cells;
  if (problem.layout == Layout::kNhwc) {
    A* best = scratch + channels;
    for (int64_t cell = 0; cell < cells; ++cell) {
      maximum_lanes<T>(problem, table, cell, image, scratch, best, winner + cell * channels);
      for (int64_t c = 0; c < channels; ++c) {
        pooled[cell * channels + c] = Store<pooled_t<T>>::from(best[c]);
      }
    }
    return;
  }
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    maximum_planes<T, 4>(problem, table, cells, image + c * map.stride_c, pooled + c * cells,
                         winner + c * cells);
  }
  for (; c < channels; ++c) {
    maximum_planes<T, 1>(problem, table, cells, image + c * map.stride_c, pooled + c * cells,
                         winner + c * cells);
  }
}

}  // namespace

template <class T>
const FrameKernels<T>& frame_kernels() {
  if constexpr (std::is_same_v<T, uint8_t>) {
    static constexpr FrameKernels<T> table = {sample<T>, nullptr, grad_boxes<T>, maximum<T>};
    return table;
  } else {
    static constexpr FrameKernels<T> table = {sample<T>, grad_features<T>, grad_boxes<T>,
                                              maximum<T>};
    return table;
  }
}

template const FrameKernels<float>& frame_kernels();
template const FrameKernels<double>& frame_kernels();
template const FrameKernels<half>& frame_kernels();
template const FrameKernels<bfloat16>& frame_kernels();
template const FrameKernels<uint8_t>& frame_kernels();

#undef GLIMPSE_INLINE
