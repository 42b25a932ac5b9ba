// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cpu/box_gradient.h"
#include "cpu/plan.h"
#include "half.h"
#include "paste_problem.h"
#include "problem.h"

namespace glimpse {

/// Channels and plans that one call of a kernel serves. kNchw: at most as many channels as a
/// vector has lanes.
template <class A>
struct Work {
  const Problem* problem;
  const BoxPlan<A>* const* plans;
  int64_t count;
  int64_t channel, channels;
  A* scratch;
};

/// The part of a feature gradient that one call owns: rows [first_row, end_row) of some channels
/// of one image. All plans of the Work belong to that image and level.
template <class A>
struct GradWork : Work<A> {
  int32_t level;
  int64_t image;
  int32_t first_row, end_row;
  A* plane;  // float sums of 16-bit gradients: [channels, rows, width], [rows, width, channels]
};

template <class A>
struct BoxWork : Work<A> {
  BoxGradient* sums;  // [count], added to
};

/// What the columns of an image that a mask reaches read of a row of it: two pixels each. Of a
/// single one both slots hold one half, so that nothing is read that does not count.
template <class A>
struct PasteColumns {
  int32_t count;  // a multiple of the lanes of all vectors
  const int32_t* pixel[2];
  const A* weight[2];
  /// Where it is given, columns whose pixels lie close together share a vector: pixels are counted
  /// from the one that stands here for each vector, and lie less than two vectors behind it.
  const int32_t* base;
  A* row;          // room for `size` numbers and two vectors
  int32_t size;    // pixels of a row of the mask
  int64_t stride;  // between them, in elements
};

/// A row of the image: two rows of the mask, spread over its columns, with their weights.
template <class A>
struct PasteRow {
  const A* spread[2];
  A weight[2];
  int32_t count;
};

/// 64 columns of rows of the image that lie between two rows of the mask.
template <class A>
struct PasteBlock {
  const A* spread[2];
  const A* weight[2];  // of each row
  int32_t rows;
  A threshold;
  /// Columns whose pixels must be compared with the threshold, as bits; of the others, those that
  /// are known to meet it in all rows.
  uint64_t ones, unknown;
};

/// The cells of a row that weigh pixels, of up to four channels: cell j reads `taps` pixels from
/// first[j] on, or where that is 0 those of start[j] .. start[j + 1] - 1.
template <class A>
struct BatchCells {
  const A* row;  // pixels, `pitch` elements each; what lies behind the last one is not NaN
  int32_t pitch;
  int32_t count;  // cells
  int32_t taps;   // of every cell, or 0
  const int32_t* first;
  const int32_t* start;  // of the weights
  const A* weight;
  int32_t channels;
  A multiplier[4], offset[4];
  const A* fill;  // null or [count]: what is added before both
};

/// Kernels of one instruction set for the storage type T.
template <class T>
struct Kernels {
  using A = acc_t<T>;
  int32_t lanes;    // of a vector of A
  int32_t sources;  // vectors that a lane can pick from
  /// Scratch that each kernel needs, in elements of A.
  int64_t (*sample_scratch)(const Problem&, const PlanSet<A>&);
  int64_t (*grad_features_scratch)(const Problem&, const PlanSet<A>&, int64_t channels);
  int64_t (*grad_boxes_scratch)(const Problem&, const PlanSet<A>&);
  void (*sample)(const Work<A>&);
  void (*clear)(const GradWork<A>&);          // zeroes the owned part
  void (*grad_features)(const GradWork<A>&);  // adds boxes to it
  void (*convert)(const GradWork<A>&);        // stores float sums as 16 bits
  void (*grad_boxes)(const BoxWork<A>&);
  void (*paste_spread)(const T* row, const PasteColumns<A>&, A* to);
  void (*paste_values)(const PasteRow<A>&, pooled_t<T>* to);
  void (*paste_bytes)(const PasteRow<A>&, const PasteStore<A, uint8_t>&, uint8_t* to);
  void (*paste_bits)(const PasteBlock<A>&, uint64_t* to);  // a word of columns for each row
  /// Columns whose numbers lie so far above or below a threshold that the mean of two of them does.
  void (*paste_sides)(const A* spread, int32_t words, A threshold, uint64_t* above,
                      uint64_t* below);
  /// Rows of pixels, weighted and added up: elements first .. of `vectors` vectors, of which the
  /// last one may read last_valid elements.
  void (*batch_rows)(const T* from, int64_t stride, const int32_t* rows, const A* weights,
                     int32_t taps, int32_t vectors, int32_t last_valid, A* to);
  /// Planes of `pixels` elements, `stride` apart, as pixels of four elements.
  void (*batch_interleave)(const A* planes, int64_t stride, int32_t channels, int32_t pixels,
                           A* to);
  /// Cells as pixels of `pitch` elements, or where that is 0 as planes `stride` apart.
  void (*batch_cells)(const BatchCells<A>&, int32_t pitch, int64_t stride, A* to);
  void (*batch_store)(const A* from, int64_t count, Dtype dtype, void* to, int64_t at);
};

namespace baseline {
template <class T>
const Kernels<T>& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}
#endif

/// The kernels of the instruction set in use. uint8_t has no gradient kernels.
template <class T>
const Kernels<T>& kernels();

}  // namespace glimpse
