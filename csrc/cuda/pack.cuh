// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "half.h"

namespace glimpse::cuda {

namespace detail {

/// The type that moves kBytes in one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

/// kCount neighbours in memory, moved as one word of up to 16 bytes. It stays packed until it is
/// used, so a load that is under way costs no more registers than it has bytes.
template <class T, int kCount>
struct Pack {
  using Word = typename detail::Word<sizeof(T) * kCount>::type;
  Word word;

  /// `source` is aligned to the whole pack.
  __device__ __forceinline__ static Pack load(const T* source) {
    return {load_readonly(reinterpret_cast<const Word*>(source))};
  }
  __device__ __forceinline__ static Pack zero() {
    Pack pack;
    memset(&pack.word, 0, sizeof(pack.word));
    return pack;
  }
  __device__ __forceinline__ static Pack from(const acc_t<T>* values) {
    T stored[kCount];
    GLIMPSE_UNROLL
    for (int i = 0; i < kCount; ++i) stored[i] = Store<T>::from(values[i]);
    Pack pack;
    memcpy(&pack.word, stored, sizeof(pack.word));
    return pack;
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (kCount == 1) {
      T value;
      memcpy(&value, &word, sizeof(T));
      *target = value;  // a memcpy to memory would store byte by byte
    } else {
      *reinterpret_cast<Word*>(target) = word;
    }
  }
  __device__ __forceinline__ void unpack(acc_t<T>* values) const {
    T stored[kCount];
    memcpy(stored, &word, sizeof(word));
    GLIMPSE_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = load_value(stored[i]);
  }
};

}  // namespace glimpse::cuda
