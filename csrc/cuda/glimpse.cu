// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/glimpse.cuh"

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr int64_t kMostGridX = 2147483647;

Stream stream_of(const GlimpseProblem& problem) { return static_cast<Stream>(problem.stream); }

template <int kPack, class T, class Fill>
void launch_copy(const GlimpseProblem& problem, const Fill& fill) {
  constexpr int64_t kMostBlocks = 65536;  // each thread then takes several packs
  const int64_t elements =
      problem.batch * problem.channels * problem.out_height * problem.out_width;
  const int64_t blocks = (elements / kPack + kGlimpseThreads - 1) / kGlimpseThreads;
  launch(copy_glimpse_kernel<T, Fill, kPack>,
         dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), kGlimpseThreads,
         0, stream_of(problem), problem, fill);
}

template <class T>
void copy_without_noise(const GlimpseProblem& problem) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t line =
      problem.out_width * (problem.layout == Layout::kNhwc ? problem.channels : int64_t{1});
  if (line % kPack == 0 && reinterpret_cast<uintptr_t>(problem.output) % 16 == 0) {
    launch_copy<kPack, T>(problem, ZeroFill());
  } else {
    launch_copy<1, T>(problem, ZeroFill());
  }
}

template <class T>
void copy_with_noise(const GlimpseProblem& problem) {
  const int64_t planes = problem.batch * problem.channels;
  if (planes > kMostGridX) {
    throw std::invalid_argument("glimpse_ext: more channels than blocks in a grid");
  }
  auto* statistics = static_cast<Statistics*>(problem.workspace);
  launch(plane_statistics_kernel<T>, dim3(static_cast<unsigned>(planes)), kStatisticsLanes, 0,
         stream_of(problem), problem, statistics);
  NoiseFill fill{statistics};
  if (problem.noise == Noise::kUniform) {
    constexpr int kThreads = 32;
    Statistics* images = statistics + planes;
    launch(image_range_kernel<kThreads>, dim3(static_cast<unsigned>(problem.batch)), kThreads, 0,
           stream_of(problem), problem, static_cast<const Statistics*>(statistics), images);
    fill.statistics = images;
  }
  launch_copy<1, T>(problem, fill);
}

}  // namespace

size_t copy_glimpse_workspace(const GlimpseProblem& problem) {
  if (problem.noise == Noise::kZero) return 0;
  const int64_t images = problem.noise == Noise::kUniform ? problem.batch : 0;
  return sizeof(Statistics) * static_cast<size_t>(problem.batch * problem.channels + images);
}

void copy_glimpse(const GlimpseProblem& problem) {
  if (problem.noise != Noise::kZero) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return copy_with_noise<float>(problem);
      case Dtype::kFloat64:
        return copy_with_noise<double>(problem);
      case Dtype::kFloat16:
        return copy_with_noise<half>(problem);
      case Dtype::kBFloat16:
        return copy_with_noise<bfloat16>(problem);
      case Dtype::kUInt8:
        break;
    }
    throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
  }
  switch (problem.element_bytes) {
    case 1:
      return copy_without_noise<uint8_t>(problem);
    case 2:
      return copy_without_noise<uint16_t>(problem);
    case 4:
      return copy_without_noise<uint32_t>(problem);
    default:
      return copy_without_noise<uint64_t>(problem);
  }
}

}  // namespace glimpse::cuda
