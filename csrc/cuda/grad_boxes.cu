// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/grad_boxes.cuh"

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr int64_t kMostBoxes = 2147483647;  // blocks of a grid

/// Tables with slopes take twice the room of those without; this leaves space for two blocks on
/// devices with 100 KB, and for all boxes on maps of up to about 1000 x 1000 pixels.
template <class Number>
TableShape slope_table_shape(const Problem& problem) {
  return table_shape(problem, sizeof(Number) == 8 ? 1024 : 2048);
}

/// Whether every pixel and every cell starts on an access of kChannels channels.
template <class T, int kChannels>
bool packs_channels(const Problem& problem) {
  const auto aligned = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  if (problem.channels % kChannels != 0 ||
      !aligned(problem.pooled, kChannels * sizeof(pooled_t<T>))) {
    return false;
  }
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    // The stride of a direction with one element is never used and can be anything.
    if ((problem.batch > 1 && level.stride_n % kChannels != 0) ||
        (level.height > 1 && level.stride_h % kChannels != 0) ||
        (level.width > 1 && level.stride_w % kChannels != 0) || level.stride_c != 1 ||
        !aligned(level.data, kChannels * sizeof(T))) {
      return false;
    }
  }
  return true;
}

/// Blocks that share a box, so that few boxes fill a large device, if each still has enough to do
/// for the tables that it builds. Channels and cells alone decide, not the number of boxes: a box
/// has the same bits alone and among others.
int32_t slices_of(const Problem& problem) {
  constexpr int64_t kLeastWork = 14, kMostSlices = 16;  // the former in rows of cells x 32 channels
  const int64_t slices = (problem.channels + 31) / 32 * problem.out_height / kLeastWork;
  if (problem.boxes == 0) return 1;
  return slices > kMostSlices ? kMostSlices : slices > 1 ? static_cast<int32_t>(slices) : 1;
}

dim3 grid_of(const Problem& problem) {
  return dim3(static_cast<unsigned>(problem.boxes), static_cast<unsigned>(slices_of(problem)));
}

template <class T, int kChannels>
void grad_boxes_nhwc(const Problem& problem) {
  const TableShape shape = slope_table_shape<float>(problem);
  const int64_t tasks =
      (problem.channels + 32 * kChannels - 1) / (32 * kChannels) * problem.out_height;
  constexpr int64_t kMostWarps = kTableThreads / 32;
  const auto warps = static_cast<unsigned>(tasks < kMostWarps ? tasks : kMostWarps);
  launch(grad_boxes_nhwc_kernel<T, kChannels>, grid_of(problem), 32 * warps,
         shape.bytes<float, true>(), static_cast<Stream>(problem.stream), problem, shape);
}

template <class T>
void grad_boxes_taps(const Problem& problem) {
  constexpr int kTogether = sizeof(T) == 8 ? 4 : 8;
  const TableShape shape = slope_table_shape<acc_t<T>>(problem);
  launch(grad_boxes_taps_kernel<T, kTogether>, grid_of(problem), kTableThreads,
         shape.bytes<acc_t<T>, true>() + cell_list_bytes(shape),
         static_cast<Stream>(problem.stream), problem, shape);
}

/// kChannels: of one access where channels are innermost; 0: there is no such kernel.
template <class T, int kChannels>
void grad_boxes_slices(const Problem& problem) {
  if (!tables_apply(problem)) {
    return launch(grad_boxes_simple_kernel<T>, grid_of(problem), kBoxThreads, 0,
                  static_cast<Stream>(problem.stream), problem);
  }
  if constexpr (kChannels > 0) {
    if (problem.layout == Layout::kNhwc && packs_channels<T, kChannels>(problem)) {
      return grad_boxes_nhwc<T, kChannels>(problem);
    }
  }
  grad_boxes_taps<T>(problem);
}

template <class T, int kChannels>
void grad_boxes_typed(const Problem& problem) {
  grad_boxes_slices<T, kChannels>(problem);
  const int32_t slices = slices_of(problem);
  if (slices == 1) return;
  launch(grad_boxes_sum_kernel<acc_t<T>>,
         dim3(static_cast<unsigned>((problem.boxes + kSumThreads - 1) / kSumThreads)), kSumThreads,
         0, static_cast<Stream>(problem.stream), problem, slices);
}

}  // namespace

size_t grad_boxes_workspace(const Problem& problem) {
  if (problem.filter.used) return 0;
  const int32_t slices = slices_of(problem);
  if (slices == 1) return 0;
  const size_t sums =
      problem.dtype == Dtype::kFloat64 ? sizeof(BoxSums<double>) : sizeof(BoxSums<float>);
  return static_cast<size_t>(problem.boxes) * static_cast<size_t>(slices) * sums;
}

void grad_boxes(const Problem& problem) {
  if (problem.filter.used) return filter_grad_boxes(problem);
  if (problem.boxes > kMostBoxes) {
    throw std::invalid_argument("glimpse_ext: more boxes than blocks in a grid");
  }
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return grad_boxes_typed<float, 4>(problem);
    case Dtype::kFloat16:
      return grad_boxes_typed<half, 8>(problem);
    case Dtype::kBFloat16:
      return grad_boxes_typed<bfloat16, 8>(problem);
    case Dtype::kFloat64:
      return grad_boxes_typed<double, 0>(problem);
    case Dtype::kUInt8:
      return grad_boxes_typed<uint8_t, 4>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
