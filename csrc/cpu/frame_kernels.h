// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cpu/frame_tables.h"
#include "half.h"

namespace glimpse {

/// Loops over the channels [channel, end) of one box with its table. Kernels that make sums for the
/// map get them as `sums`, laid out like FrameSums says.
template <class T>
struct FrameKernels {
  using A = acc_t<T>;
  void (*sample)(const FrameProblem&, const CellTable<A>&, int64_t channel, int64_t end);
  /// Adds to the sums of one image.
  void (*grad_features)(const FrameProblem&, const CellTable<A>&, int64_t channel, int64_t end,
                        A* sums, int64_t stride_c);
  /// scratch: as many numbers as the table has taps.
  void (*grad_boxes)(const FrameProblem&, const CellTable<A>&, A* scratch, double* columns);
  void (*maximum)(const FrameProblem&, const SampleTable<A>&, A* scratch);
};

namespace baseline {
template <class T>
const FrameKernels<T>& frame_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
const FrameKernels<T>& frame_kernels();
}
#endif

}  // namespace glimpse
