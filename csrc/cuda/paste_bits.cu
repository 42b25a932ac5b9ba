// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/paste_bits.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

template <class T>
void paste_bits_typed(const PasteProblem& problem) {
  constexpr int64_t kMostBlocks = 2147483647;
  PasteBitsPlan plan;
  plan.strips = (problem.height - 1) / kBitsRows + 1;
  plan.groups = (problem.row_bytes() - 1) / kBitsThreads + 1;
  const int64_t blocks = problem.masks * plan.strips * plan.groups;
  for (plan.first_block = 0; plan.first_block < blocks; plan.first_block += kMostBlocks) {
    const int64_t left = blocks - plan.first_block;
    launch(paste_bits_kernel<T>,
           dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)), kBitsThreads, 0,
           static_cast<Stream>(problem.stream), problem, plan);
  }
}

}  // namespace

void paste_bits(const PasteProblem& problem) {
  if (problem.height == 0 || problem.width == 0) return;
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return paste_bits_typed<float>(problem);
    case Dtype::kFloat16:
      return paste_bits_typed<half>(problem);
    case Dtype::kBFloat16:
      return paste_bits_typed<bfloat16>(problem);
    case Dtype::kFloat64:
      return paste_bits_typed<double>(problem);
    case Dtype::kUInt8:
      return paste_bits_typed<uint8_t>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
