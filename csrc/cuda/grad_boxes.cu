// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/grad_boxes.cuh"

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

template <class T, int kChannels>
void grad_boxes_nhwc(const Problem& problem) {
  const TableShape shape = slope_table_shape<float>(problem);
  const int64_t slices = (problem.channels + 32 * kChannels - 1) / (32 * kChannels);
  const int64_t tasks = slices * problem.out_height;
  constexpr int64_t kMostWarps = kTableThreads / 32;
  const auto warps = static_cast<unsigned>(tasks < kMostWarps ? tasks : kMostWarps);
  launch(grad_boxes_nhwc_kernel<T, kChannels>, dim3(static_cast<unsigned>(problem.boxes)),
         32 * warps, shape.bytes<float, true>(), static_cast<Stream>(problem.stream), problem,
         shape);
}

template <class T>
void grad_boxes_cells(const Problem& problem) {
  constexpr int kTogether = sizeof(T) == 8 ? 4 : 8;
  CellsPlan plan;
  plan.tables = slope_table_shape<acc_t<T>>(problem);
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  plan.cell_lanes_log2 = 5;
  while (plan.cell_lanes_log2 > 0 && int64_t{1} << (plan.cell_lanes_log2 - 1) >= cells) {
    --plan.cell_lanes_log2;
  }
  launch(grad_boxes_cells_kernel<T, kTogether>, dim3(static_cast<unsigned>(problem.boxes)),
         kTableThreads, plan.tables.bytes<acc_t<T>, true>(), static_cast<Stream>(problem.stream),
         problem, plan);
}

/// kChannels: of one access where channels are innermost; 0: there is no such kernel.
template <class T, int kChannels>
void grad_boxes_typed(const Problem& problem) {
  if (!tables_apply(problem)) {
    return launch(grad_boxes_simple_kernel<T>, dim3(static_cast<unsigned>(problem.boxes)),
                  kBoxThreads, 0, static_cast<Stream>(problem.stream), problem);
  }
  if constexpr (kChannels > 0) {
    if (problem.layout == Layout::kNhwc && packs_channels<T, kChannels>(problem)) {
      return grad_boxes_nhwc<T, kChannels>(problem);
    }
  }
  grad_boxes_cells<T>(problem);
}

}  // namespace

void grad_boxes(const Problem& problem) {
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
