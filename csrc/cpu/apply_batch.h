// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: rows of cells that weigh pixels.
//
// Note [Channels of a pixel in a quad]
// Pictures have three channels, and a cell of a resized crop reads a run of pixels. A vector of
// four lanes that starts at a pixel holds its channels and a number of the next one, which nobody
// uses: so a tap costs a load, a broadcast weight and an addition, wherever the pixel is, and no
// lane is gathered. Rows of pixels are summed before that, in vectors as long as there are, where
// it does not matter which element is what.

namespace {

template <class T>
void batch_rows(const T* from, int64_t stride, const int32_t* rows, const acc_t<T>* weights,
                int32_t taps, int32_t vectors, int32_t last_valid, acc_t<T>* to) {
  sum_rows<T>(from, 0, stride, 1, rows, weights, taps, vectors, last_valid, to);
}

template <class A>
void batch_interleave(const A* planes, int64_t stride, int32_t channels, int32_t pixels, A* to) {
  for (int32_t x = 0; x < pixels; x += 4) {
    Quad<A> square[4] = {};
    for (int32_t c = 0; c < channels; ++c) square[c] = load_quad(planes + c * stride + x);
    transpose_quads<A>(square);
    for (int32_t i = 0; i < 4; ++i) store_quad(to + 4 * (int64_t{x} + i), square[i]);
  }
}

/// One cell of Taps pixels, or of any number of them (0).
template <int Taps, class A>
GLIMPSE_INLINE Quad<A> sum_pixels(const A* pixel, int32_t pitch, const A* weight, int32_t taps) {
  Quad<A> sum = quad_of(weight[0]) * load_quad(pixel);
  if constexpr (Taps > 0) {
    for (int t = 1; t < Taps; ++t) {
      sum = quad_multiply_add(quad_of(weight[t]), load_quad(pixel + t * pitch), sum);
    }
  } else {
    for (int32_t t = 1; t < taps; ++t) {
      pixel += pitch;
      sum = quad_multiply_add(quad_of(weight[t]), load_quad(pixel), sum);
    }
  }
  return sum;
}

template <int Taps, class A>
void batch_cells_of(const BatchCells<A>& cells, int32_t pitch, int64_t stride, A* to) {
  const Quad<A> multiplier = load_quad(cells.multiplier), offset = load_quad(cells.offset);
  const A* row = cells.row;
  const A* weight = cells.weight;
  const A* fill = cells.fill;
  const int32_t* first = cells.first;
  const int32_t* start = cells.start;
  const int32_t pixel = cells.pitch, uniform = cells.taps, count = cells.count;
  const int32_t channels = cells.channels;
  const auto value = [&](int32_t j) {
    const int32_t begin = Taps > 0 ? j * Taps : uniform > 0 ? j * uniform : start[j];
    const int32_t taps = Taps > 0 ? Taps : uniform > 0 ? uniform : start[j + 1] - begin;
    Quad<A> sum = {};
    if (Taps > 0 || taps > 0) {
      sum = sum_pixels<Taps>(row + int64_t{first[j]} * pixel, pixel, weight + begin, taps);
    }
    if (fill != nullptr) sum = sum + quad_of(fill[j]);
    return quad_multiply_add(sum, multiplier, offset);
  };
  if (pitch > 0) {
    // What a quad writes behind its own channels is written again by the next one.
    const bool whole = channels == pitch || channels == 4;
    for (int32_t j = 0; j < count; ++j, to += pitch) {
      const Quad<A> v = value(j);
      if (whole) {
        store_quad(to, v);
      } else {
        for (int32_t c = 0; c < channels; ++c) to[c] = v[c];
      }
    }
    return;
  }
  for (int32_t j = 0; j < count; j += 4) {
    Quad<A> square[4] = {};
    if (count - j >= 4) {
      for (int32_t i = 0; i < 4; ++i) square[i] = value(j + i);
    } else {
      for (int32_t i = 0; i < count - j; ++i) square[i] = value(j + i);
    }
    transpose_quads<A>(square);
    for (int32_t c = 0; c < channels; ++c) store_quad(to + c * stride + j, square[c]);
  }
}

template <class A>
void batch_cells(const BatchCells<A>& cells, int32_t pitch, int64_t stride, A* to) {
  switch (cells.taps) {
#define GLIMPSE_CASE(n) \
  case n:               \
    return batch_cells_of<n>(cells, pitch, stride, to);
    GLIMPSE_CASE(1)
    GLIMPSE_CASE(2)
    GLIMPSE_CASE(3)
    GLIMPSE_CASE(4)
    GLIMPSE_CASE(5)
    GLIMPSE_CASE(6)
    GLIMPSE_CASE(7)
    GLIMPSE_CASE(8)
#undef GLIMPSE_CASE
  }
  batch_cells_of<0>(cells, pitch, stride, to);
}

template <class P, class A>
void store_elements(const A* from, int64_t count, P* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t<P>, A>) {
    constexpr int L = kLanes<A>;
    for (; i + L <= count; i += L) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = Store<P>::from(static_cast<acc_t<P>>(from[i]));
}

/// Elements at .. at + count - 1 of `to`.
template <class A>
void batch_store(const A* from, int64_t count, Dtype dtype, void* to, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat64:
      return store_elements(from, count, static_cast<double*>(to) + at);
    case Dtype::kFloat16:
      return store_elements(from, count, static_cast<half*>(to) + at);
    case Dtype::kBFloat16:
      return store_elements(from, count, static_cast<bfloat16*>(to) + at);
    default:
      return store_elements(from, count, static_cast<float*>(to) + at);
  }
}

}  // namespace
