// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/frames.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/frames_grad_chosen.cuh"
#include "cuda/frames_gradients.cuh"
#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr int64_t kMostGridX = 2147483647, kMostGridY = 65535;

Stream stream_of(const FrameProblem& problem) { return static_cast<Stream>(problem.stream); }

unsigned boxes_of(const FrameProblem& problem) {
  if (problem.boxes > kMostGridX) {
    throw std::invalid_argument("glimpse_ext: more boxes than blocks in a grid");
  }
  return static_cast<unsigned>(problem.boxes);
}

/// 24 KB of samples in float and 36 KB in double leave room for several blocks.
FrameTableShape table_shape(const FrameProblem& problem) {
  const int64_t rows = int64_t{problem.out_height} + problem.out_width;
  FrameTableShape shape;
  shape.rows = rows <= 512 ? static_cast<int32_t>(rows) : 0;
  shape.lines = 256;
  shape.taps = 640;
  // With a fixed number of samples no more room is taken than they need.
  const int64_t ratio = problem.op.sampling_ratio;
  if (ratio > 0 && ratio <= 64) {
    const int64_t cells = int64_t{problem.out_height} * problem.out_width;
    if (rows * ratio < shape.lines) shape.lines = static_cast<int32_t>(rows * ratio);
    if (cells * ratio * ratio < shape.taps) {
      shape.taps = static_cast<int32_t>(cells * ratio * ratio);
    }
  }
  return shape;
}

/// Whether channels lie in packs of kChannels in the map and in what is pooled.
template <class T, int kChannels>
bool packs_channels(const FrameProblem& problem) {
  const auto aligned = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  const Level& map = problem.map;
  // The stride of a direction with one element is never used and can be anything.
  return problem.layout == Layout::kNhwc && problem.channels % kChannels == 0 &&
         map.stride_c == 1 && (problem.batch <= 1 || map.stride_n % kChannels == 0) &&
         (map.height <= 1 || map.stride_h % kChannels == 0) &&
         (map.width <= 1 || map.stride_w % kChannels == 0) &&
         aligned(map.data, kChannels * sizeof(T)) &&
         aligned(problem.pooled, kChannels * sizeof(pooled_t<T>));
}

template <class T, int kChannels, bool kMaximum>
void pool(const FrameProblem& problem) {
  FramePlan plan;
  plan.tables = table_shape(problem);
  // As many channels for the price of one table as leave enough blocks for a large GPU.
  constexpr int64_t kEnoughBlocks = 1024;
  plan.channels_per_block = 1024;
  while (plan.channels_per_block > 64 &&
         problem.boxes * ((problem.channels - 1) / plan.channels_per_block + 1) < kEnoughBlocks) {
    plan.channels_per_block /= 2;
  }
  // A few channels are read as fast as they are staged. The tables of more rows leave too little of
  // 64 KB, which is what a block has at least.
  plan.stages = kChannels == 1 && sizeof(acc_t<T>) == 4 && plan.tables.rows > 0 &&
                plan.tables.rows <= 64 && problem.layout == Layout::kNchw && problem.channels >= 8;
  int64_t slices = (problem.channels - 1) / plan.channels_per_block + 1;
  if (slices > kMostGridY) {
    throw std::invalid_argument("glimpse_ext: more channels than blocks in a grid");
  }
  launch(frames_pool_kernel<T, kChannels, kMaximum>,
         dim3(boxes_of(problem), static_cast<unsigned>(slices)), kFrameThreads,
         plan.tables.bytes<acc_t<T>>() + (plan.stages ? kStageWords * sizeof(float) : 0),
         stream_of(problem), problem, plan);
}

template <class T, bool kMaximum>
void pool_layout(const FrameProblem& problem) {
  constexpr int kWide = sizeof(T) == 1 ? 1 : 16 / sizeof(T);
  if constexpr (kWide > 1) {
    if (packs_channels<T, kWide>(problem)) return pool<T, kWide, kMaximum>(problem);
  }
  pool<T, 1, kMaximum>(problem);
}

template <class T>
void sample_typed(const FrameProblem& problem) {
  if (problem.chosen == nullptr) return pool_layout<T, false>(problem);
  launch(frames_chosen_kernel<T>, dim3(boxes_of(problem)), kFrameThreads, 0, stream_of(problem),
         problem);
}

template <class T>
void grad_features_typed(const FrameProblem& problem) {
  const Level& map = problem.map;
  const bool chosen = problem.chosen != nullptr;
  const int64_t tiles =
      int64_t{(map.width - 1) / kTileWidth + 1} * ((map.height - 1) / kTileHeight + 1);
  const int64_t groups = (problem.channels - 1) / 32 + 1;  // of channels
  constexpr int64_t kMostWarps = kGatherWarps<acc_t<T>>;
  const int64_t warps = groups < kMostWarps ? groups : kMostWarps;
  const int64_t chosen_threads = 32 * chosen_warps<acc_t<T>>(problem.layout);
  const int64_t channels = chosen ? chosen_threads : 32 * warps;
  const int64_t slices = (problem.channels - 1) / channels + 1;
  if (tiles > kMostGridX || slices > kMostGridY) {
    throw std::invalid_argument("glimpse_ext: the map has more tiles than a grid has blocks");
  }
  for (int64_t first_image = 0; first_image < problem.batch; first_image += kMostGridY) {
    const int64_t left = problem.batch - first_image;
    const dim3 grid(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(left < kMostGridY ? left : kMostGridY),
                    static_cast<unsigned>(slices));
    if (chosen) {
      launch(frames_grad_chosen_kernel<T>, grid, static_cast<unsigned>(chosen_threads), 0,
             stream_of(problem), problem, first_image);
    } else {
      launch(frames_grad_features_kernel<T>, grid, static_cast<unsigned>(32 * warps), 0,
             stream_of(problem), problem, first_image);
    }
  }
}

template <class T>
void grad_boxes_typed(const FrameProblem& problem) {
  launch(frames_grad_boxes_kernel<T>, dim3(boxes_of(problem)), kFrameThreads, 0, stream_of(problem),
         problem);
}

[[noreturn]] void no_kernel() {
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace

void frames_sample(const FrameProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return sample_typed<float>(problem);
    case Dtype::kFloat64:
      return sample_typed<double>(problem);
    case Dtype::kFloat16:
      return sample_typed<half>(problem);
    case Dtype::kBFloat16:
      return sample_typed<bfloat16>(problem);
    case Dtype::kUInt8:
      return sample_typed<uint8_t>(problem);
  }
  no_kernel();
}

void frames_maximum(const FrameProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return pool_layout<float, true>(problem);
    case Dtype::kFloat64:
      return pool_layout<double, true>(problem);
    case Dtype::kFloat16:
      return pool_layout<half, true>(problem);
    case Dtype::kBFloat16:
      return pool_layout<bfloat16, true>(problem);
    case Dtype::kUInt8:
      return pool_layout<uint8_t, true>(problem);
  }
  no_kernel();
}

void frames_grad_features(const FrameProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return grad_features_typed<float>(problem);
    case Dtype::kFloat64:
      return grad_features_typed<double>(problem);
    case Dtype::kFloat16:
      return grad_features_typed<half>(problem);
    case Dtype::kBFloat16:
      return grad_features_typed<bfloat16>(problem);
    case Dtype::kUInt8:
      break;  // Integers have no gradient.
  }
  no_kernel();
}

void frames_grad_boxes(const FrameProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return grad_boxes_typed<float>(problem);
    case Dtype::kFloat64:
      return grad_boxes_typed<double>(problem);
    case Dtype::kFloat16:
      return grad_boxes_typed<half>(problem);
    case Dtype::kBFloat16:
      return grad_boxes_typed<bfloat16>(problem);
    case Dtype::kUInt8:
      return grad_boxes_typed<uint8_t>(problem);
  }
  no_kernel();
}

}  // namespace glimpse::cuda
