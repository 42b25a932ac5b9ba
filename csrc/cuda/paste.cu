// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/paste.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

template <class T, class Out>
void paste_typed(const PasteProblem& problem) {
  constexpr int64_t kMostBlocks = 2147483647;
  constexpr int64_t kBlockPacks = int64_t{kPastePacks} * kPasteThreads;
  // One pack more than fits, because an image may start and end inside a pack.
  const int64_t packs = int64_t{problem.height} * problem.width / kPasteCells<Out> + 2;
  PastePlan plan;
  plan.blocks_per_mask = (packs + kBlockPacks - 1) / kBlockPacks;
  const int64_t blocks = problem.masks * plan.blocks_per_mask;
  for (plan.first_block = 0; plan.first_block < blocks; plan.first_block += kMostBlocks) {
    const int64_t left = blocks - plan.first_block;
    launch(paste_kernel<T, Out>,
           dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)), kPasteThreads, 0,
           static_cast<Stream>(problem.stream), problem, plan);
  }
}

template <class T>
void paste_typed(const PasteProblem& problem) {
  if (problem.result == PasteResult::kValue) return paste_typed<T, pooled_t<T>>(problem);
  paste_typed<T, uint8_t>(problem);
}

}  // namespace

void paste(const PasteProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return paste_typed<float>(problem);
    case Dtype::kFloat16:
      return paste_typed<half>(problem);
    case Dtype::kBFloat16:
      return paste_typed<bfloat16>(problem);
    case Dtype::kFloat64:
      return paste_typed<double>(problem);
    case Dtype::kUInt8:
      return paste_typed<uint8_t>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
