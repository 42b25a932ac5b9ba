// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cuda/paste.cuh"

/// Masks into images of bits, in one launch that writes every byte once.
namespace glimpse::cuda {

// Note [Bits of a mask]
// A thread owns a byte of each row of a strip. What its 8 columns read along x is the same in all
// rows, so it stays in registers; their means along x change with the row of the mask only, which
// is every few rows of the image. What is left for a pixel is the mean along y and a comparison.
// The threads of a warp write bytes side by side.

constexpr int32_t kBitsThreads = 64;
constexpr int32_t kBitsRows = 32;  // of a strip

/// Which bytes a block writes.
struct PasteBitsPlan {
  int64_t first_block;  // of this launch
  int32_t strips;       // of an image
  int32_t groups;       // of kBitsThreads bytes of a row
};

/// 8 neighbouring columns of the image: what they read, and the means of two rows of the mask.
template <class T>
struct PasteByte {
  using Number = acc_t<T>;
  int32_t left[8], right[8];
  Number left_weight[8], right_weight[8];
  Number low[8], high[8];

  __device__ __forceinline__ void start(const PasteLine<Number>& line, Cells columns,
                                        int32_t first) {
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 8; ++i) {
      // Columns that read nothing count as background; the nearest one stands in for them.
      const int32_t last = columns.end - 1, at = first + i;
      const int32_t near = at < columns.first ? columns.first : at > last ? last : at;
      const auto tap = PasteTap<Number>::of(line, near, 1);
      left[i] = tap.low;
      right[i] = tap.high;
      left_weight[i] = tap.low_weight;
      right_weight[i] = tap.high_weight;
    }
  }

  __device__ __forceinline__ void spread(const PasteProblem& problem, const T* row,
                                         Number (&means)[8]) const {
    using R = Rounded<Number>;
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 8; ++i) {
      means[i] = (R(left_weight[i]) * R(load_value(row[left[i] * problem.stride_w])) +
                  R(right_weight[i]) * R(load_value(row[right[i] * problem.stride_w])))
                     .value;
    }
  }

  __device__ __forceinline__ void read(const PasteProblem& problem, const T* mask,
                                       const PasteTap<Number>& tap) {
    spread(problem, mask + tap.low * problem.stride_h, low);
    spread(problem, mask + tap.high * problem.stride_h, high);
  }

  __device__ __forceinline__ uint32_t bits(const PasteStore<Number, uint8_t>& store,
                                           const PasteTap<Number>& tap) const {
    using R = Rounded<Number>;
    uint32_t bits = 0;
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < 8; ++i) {
      const R value = R(tap.low_weight) * R(low[i]) + R(tap.high_weight) * R(high[i]);
      bits |= uint32_t{store(value.value)} << i;
    }
    return bits;
  }
};

/// A byte with the bits first .. end - 1.
__device__ __forceinline__ uint32_t bits_between(int32_t first, int32_t end) {
  const int32_t from = first < 0 ? 0 : first > 8 ? 8 : first;
  const int32_t to = end < from ? from : end > 8 ? 8 : end;
  return (1u << to) - (1u << from);
}

/// Block: kBitsThreads bytes of kBitsRows rows of one image. See Note [Bits of a mask].
template <class T>
__global__ void __launch_bounds__(kBitsThreads)
    paste_bits_kernel(GLIMPSE_GRID_CONSTANT PasteProblem problem,
                      GLIMPSE_GRID_CONSTANT PasteBitsPlan plan) {
  using Number = acc_t<T>;
  GLIMPSE_SHARED(PasteWindow<Number>, window, );
  GLIMPSE_SHARED(PasteTap<Number>, row_tap, [kBitsRows]);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  int32_t group, strip;
  const int64_t k =
      split(split(plan.first_block + blockIdx.x, plan.groups, &group), plan.strips, &strip);
  if (thread < 2) {
    const auto line = PasteLine<Number>::of(problem, k, thread);
    window.line[thread] = line;
    window.cells[thread] = reading_cells(line);
  }
  __syncthreads();

  const int32_t first_row = strip * kBitsRows;
  const int32_t left = problem.height - first_row;
  const int32_t count = left < kBitsRows ? left : kBitsRows;  // of rows
  const Cells rows = window.cells[kY], columns = window.cells[kX];
  if (thread < count && first_row + thread >= rows.first && first_row + thread < rows.end) {
    row_tap[thread] = PasteTap<Number>::of(window.line[kY], first_row + thread, 1);
  }
  __syncthreads();

  const int32_t bytes = problem.row_bytes();
  const int32_t byte = group * kBitsThreads + thread;
  if (byte < bytes) {
    const PasteStore<Number, uint8_t> store(problem);
    const T* mask = static_cast<const T*>(problem.mask) + k * problem.stride_n;
    uint8_t* to =
        static_cast<uint8_t*>(problem.image) + (k * problem.height + first_row) * bytes + byte;
    const int32_t first = byte * 8;
    const uint32_t inside = bits_between(0, problem.width - first);
    const uint32_t background = store(Number(0)) != 0 ? inside : 0;
    const uint32_t reached = bits_between(columns.first - first, columns.end - first);
    const int32_t begin = rows.first - first_row;
    const int32_t end = reached != 0 ? rows.end - first_row : begin;
    PasteByte<T> own = {};
    if (begin < end && begin < count) own.start(window.line[kX], columns, first);
    int32_t low = -1, high = -1;
    GLIMPSE_NO_UNROLL
    for (int32_t i = 0; i < count; ++i, to += bytes) {
      uint32_t bits = background;
      if (i >= begin && i < end) {
        const PasteTap<Number> tap = row_tap[i];
        if (tap.low != low || tap.high != high) {
          low = tap.low;
          high = tap.high;
          own.read(problem, mask, tap);
        }
        bits = (own.bits(store, tap) & reached) | (background & ~reached);
      }
      *to = static_cast<uint8_t>(bits);
    }
  }
}

}  // namespace glimpse::cuda
