// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/paste.cuh"

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

template <class T, class Out>
void paste_typed(const PasteProblem& problem) {
  if (problem.height == 0 || problem.width == 0) return;
  constexpr int64_t kMostBlocks = 2147483647;
  // One pack more than fits, because an image may start and end inside a pack.
  const int64_t packs = int64_t{problem.height} * problem.width / kPasteCells<Out> + 2;
  PastePlan plan;
  plan.blocks_per_mask = (packs + kPasteBlockPacks - 1) / kPasteBlockPacks;
  plan.reciprocal = 0xffffffffu / static_cast<uint32_t>(problem.width);
  // 32 KB. Offsets of mask pixels in a row are 32 bits wide there.
  constexpr int32_t kMostColumns = sizeof(acc_t<T>) == 8 ? 1024 : 2048;
  plan.columns = problem.width < kMostColumns ? problem.width : kMostColumns;
  const int64_t reach = (problem.mask_width - int64_t{1}) * problem.stride_w;
  if (reach > 2147483647 || reach < -2147483647 - 1) plan.columns = 0;
  const auto shared = static_cast<size_t>(plan.columns) * sizeof(PasteTap<acc_t<T>>);
  const int64_t blocks = problem.masks * plan.blocks_per_mask;
  for (plan.first_block = 0; plan.first_block < blocks; plan.first_block += kMostBlocks) {
    const int64_t left = blocks - plan.first_block;
    launch(paste_kernel<T, Out>,
           dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)), kPasteThreads,
           shared, static_cast<Stream>(problem.stream), problem, plan);
  }
}

template <class T>
void paste_typed(const PasteProblem& problem) {
  if (problem.result == PasteResult::kValue) return paste_typed<T, pooled_t<T>>(problem);
  paste_typed<T, uint8_t>(problem);
}

}  // namespace

void paste(const PasteProblem& problem) {
  if (problem.result == PasteResult::kBits) return paste_bits(problem);
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
