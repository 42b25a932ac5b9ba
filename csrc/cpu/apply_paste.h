// SPDX-License-Identifier: BSD-3-Clause
//
// Part of apply.h: masks into images. Sums are not fused, because a value meets a threshold by its
// last bit and all devices must agree (paste_value).

namespace {

/// A row of the mask as numbers.
template <class T>
void load_row(const T* row, const PasteColumns<acc_t<T>>& columns) {
  constexpr int L = kLanes<acc_t<T>>;
  int32_t x = 0;
  if (columns.stride == 1) {
    for (; x + L <= columns.size; x += L) store(columns.row + x, load(row + x));
  }
  for (; x < columns.size; ++x) columns.row[x] = load_value(row[x * columns.stride]);
}

template <class T>
void paste_spread(const T* row, const PasteColumns<acc_t<T>>& columns, acc_t<T>* to) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int32_t* left = columns.pixel[0];
  const int32_t* right = columns.pixel[1];
  const A* weight_left = columns.weight[0];
  const A* weight_right = columns.weight[1];
  if (columns.base != nullptr) {
    load_row(row, columns);
    for (int32_t x = 0; x < columns.count; x += L) {
      const A* from = columns.row + columns.base[x / L];
      store(to + x, load(weight_left + x) * pick_near(from, left + x) +
                        load(weight_right + x) * pick_near(from, right + x));
    }
    return;
  }
  for (int32_t x = 0; x < columns.count; ++x) {
    to[x] = weight_left[x] * load_value(row[left[x] * columns.stride]) +
            weight_right[x] * load_value(row[right[x] * columns.stride]);
  }
}

template <class T>
void paste_values(const PasteRow<acc_t<T>>& row, pooled_t<T>* to) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Vector<A> above = broadcast(row.weight[0]), below = broadcast(row.weight[1]);
  int32_t x = 0;
  for (; x + L <= row.count; x += L) {
    store(to + x, above * load(row.spread[0] + x) + below * load(row.spread[1] + x));
  }
  if (x < row.count) {
    const int left = row.count - x;
    store_part(
        to + x,
        above * load_part(row.spread[0] + x, left) + below * load_part(row.spread[1] + x, left),
        left);
  }
}

/// A loop that compilers turn into vectors, given that bytes are nobody else's memory.
template <class A, class Finish>
GLIMPSE_INLINE void blend_bytes(const A* __restrict above, const A* __restrict below,
                                A weight_above, A weight_below, int32_t count, const Finish& finish,
                                uint8_t* __restrict to) {
  for (int32_t x = 0; x < count; ++x)
    to[x] = finish(weight_above * above[x] + weight_below * below[x]);
}

template <class A>
void paste_bytes(const PasteRow<A>& row, const PasteStore<A, uint8_t>& finish, uint8_t* to) {
  const auto blend = [&](const auto& to_byte) {
    blend_bytes(row.spread[0], row.spread[1], row.weight[0], row.weight[1], row.count, to_byte, to);
  };
  if (finish.quantize) return blend([](A value) { return quantized(value); });
  const A threshold = finish.threshold;
  blend([threshold](A value) { return static_cast<uint8_t>(value >= threshold ? 1 : 0); });
}

/// One bit for each of 64 columns.
template <class A, class Test>
GLIMPSE_INLINE uint64_t test_columns(const Test& test) {
  constexpr int L = kLanes<A>;
  uint64_t word = 0;
  for (int v = 0; v < 64 / L; ++v) word |= static_cast<uint64_t>(test(v)) << (v * L);
  return word;
}

template <class A>
void paste_bits(const PasteBlock<A>& block, uint64_t* to) {
  constexpr int L = kLanes<A>;
  constexpr uint64_t kLaneBits = ~uint64_t{0} >> (64 - L);
  const Vector<A> threshold = broadcast(block.threshold);
  for (int32_t y = 0; y < block.rows; ++y) to[y] = block.ones;
  for (int v = 0; v < 64 / L; ++v) {
    if ((block.unknown >> (v * L) & kLaneBits) == 0) continue;
    const Vector<A> spread_above = load(block.spread[0] + v * L);
    const Vector<A> spread_below = load(block.spread[1] + v * L);
    for (int32_t y = 0; y < block.rows; ++y) {
      const Vector<A> value = broadcast(block.weight[0][y]) * spread_above +
                              broadcast(block.weight[1][y]) * spread_below;
      to[y] |= static_cast<uint64_t>(not_less(value, threshold)) << (v * L);
    }
  }
}

/// A mean of two numbers is rounded three times, and so are its weights. NaN is on no side; nor is
/// a huge number, which times a weight of 0 might be NaN.
template <class A>
void paste_sides(const A* spread, int32_t words, A threshold, uint64_t* above, uint64_t* below) {
  constexpr int L = kLanes<A>;
  const Vector<A> limit = broadcast(threshold), zero = {}, huge = broadcast(A(1e30));
  const Vector<A> margin = broadcast(16 * std::numeric_limits<A>::epsilon());
  for (int32_t w = 0; w < words; ++w, spread += 64) {
    const auto magnitude = [&](int v) {
      const Vector<A> value = load(spread + v * L);
      return larger_of<A>(value, zero - value);
    };
    const uint64_t small = test_columns<A>([&](int v) { return not_less(huge, magnitude(v)); });
    above[w] = small & test_columns<A>([&](int v) {
                 return not_less(load(spread + v * L) - margin * magnitude(v), limit);
               });
    below[w] = small & ~test_columns<A>([&](int v) {
                 return not_less(load(spread + v * L) + margin * magnitude(v), limit);
               });
  }
}

}  // namespace
