// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/paste_changes.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

template <class T>
void paste_changes_typed(const PasteProblem& problem, const PasteChanges& changes) {
  constexpr int64_t kMostBlocks = 2147483647;
  const int64_t blocks = problem.masks * changes.parts;
  const auto stream = static_cast<Stream>(problem.stream);
  for (auto* kernel : {paste_count_kernel<T>, paste_list_kernel<T>}) {
    for (int64_t first = 0; first < blocks; first += kMostBlocks) {
      const int64_t left = blocks - first;
      launch(kernel, dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)),
             kChangesThreads, 0, stream, problem, changes, first);
    }
  }
}

}  // namespace

void paste_changes(const PasteProblem& problem, const PasteChanges& changes) {
  if (problem.height == 0 || problem.width == 0) return;
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return paste_changes_typed<float>(problem, changes);
    case Dtype::kFloat16:
      return paste_changes_typed<half>(problem, changes);
    case Dtype::kBFloat16:
      return paste_changes_typed<bfloat16>(problem, changes);
    case Dtype::kFloat64:
      return paste_changes_typed<double>(problem, changes);
    case Dtype::kUInt8:
      return paste_changes_typed<uint8_t>(problem, changes);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
