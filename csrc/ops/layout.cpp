// SPDX-License-Identifier: BSD-3-Clause
#include "ops/layout.h"

#include <torch/csrc/stable/ops.h>

#if !defined(GLIMPSE_CUDA_LIBRARY)
#include "cpu/pages.h"
#endif

namespace glimpse::ops {

using torch::headeronly::MemoryFormat;

Layout layout_of(const Tensor& map) {
  if (map.is_contiguous()) return Layout::kNchw;
  return map.stride(1) == 1 && map.size(1) > 1 ? Layout::kNhwc : Layout::kNchw;
}

bool readable_as(const Tensor& map, Layout layout) {
  return layout == Layout::kNchw ? map.stride(3) == 1 || map.size(3) == 1
                                 : map.stride(1) == 1 || map.size(1) == 1;
}

MemoryFormat memory_format(Layout layout) {
  return layout == Layout::kNhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor make_empty(const Tensor& like, std::array<int64_t, 4> size, ScalarType type, Layout layout) {
  Tensor made = torch::stable::empty({size.data(), size.size()}, type, std::nullopt, like.device(),
                                     std::nullopt, memory_format(layout));
#if !defined(GLIMPSE_CUDA_LIBRARY)
  prepare_result(made.mutable_data_ptr(), static_cast<size_t>(made.numel()) * made.element_size());
#endif
  return made;
}

Tensor dense(const Tensor& tensor, Layout layout) {
  return torch::stable::contiguous(tensor, memory_format(layout));
}

Tensor converted(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor
                                                                : torch::stable::to(tensor, type));
}

}  // namespace glimpse::ops
