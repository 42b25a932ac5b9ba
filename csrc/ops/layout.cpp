// SPDX-License-Identifier: BSD-3-Clause
#include "ops/layout.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

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

namespace {

std::array<int64_t, 4> strides_of(const std::array<int64_t, 4>& size, Layout layout) {
  if (layout == Layout::kNhwc) {
    return {size[1] * size[3] * size[2], 1, size[1] * size[3], size[1]};
  }
  const auto at_least_1 = [&](int dim) { return size[dim] > 1 ? size[dim] : 1; };
  const int64_t row = at_least_1(3), plane = row * at_least_1(2);
  return {plane * at_least_1(1), plane, row, 1};
}

Tensor empty_strided(int32_t device_type, int32_t device_index, int64_t dims, const int64_t* size,
                     const int64_t* strides, ScalarType type) {
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* size, const int64_t* strides,
                     ScalarType type) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  return empty_strided(device_type, device_index, dims, size, strides, type);
}

bool is_dense(const Tensor& tensor, Layout layout) {
  if (layout == Layout::kNchw) return tensor.is_contiguous();
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(dim);
    if (size != 1 && tensor.stride(dim) != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

Tensor make_empty(const Tensor& like, std::array<int64_t, 4> size, ScalarType type, Layout layout) {
  const std::array<int64_t, 4> strides = strides_of(size, layout);
  Tensor made = empty_strided(like, 4, size.data(), strides.data(), type);
#if !defined(GLIMPSE_CUDA_LIBRARY)
  prepare_result(made.mutable_data_ptr(), static_cast<size_t>(made.numel()) * made.element_size());
#endif
  return made;
}

Tensor make_empty(const Tensor& like, std::array<int64_t, 2> size, ScalarType type) {
  const std::array<int64_t, 2> strides = {size[1] > 1 ? size[1] : 1, 1};
  return empty_strided(like, 2, size.data(), strides.data(), type);
}

Tensor make_workspace(const Tensor& like, size_t bytes) {
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  return empty_strided(like, 1, &size, &stride, ScalarType::Byte);
}

Tensor make_on_host(std::initializer_list<int64_t> size, ScalarType type) {
  std::vector<int64_t> strides(size.size());
  int64_t elements = 1;
  for (size_t dim = size.size(); dim-- > 0;) {
    strides[dim] = elements;
    const int64_t length = size.begin()[dim];
    elements *= length > 1 ? length : 1;
  }
  return empty_strided(aoti_torch_device_type_cpu(), 0, static_cast<int64_t>(size.size()),
                       size.begin(), strides.data(), type);
}

Tensor dense(const Tensor& tensor, Layout layout) {
  if (is_dense(tensor, layout)) return tensor;
  return torch::stable::contiguous(tensor, memory_format(layout));
}

Tensor seen_as(const Tensor& tensor, std::initializer_list<int64_t> size,
               std::initializer_list<int64_t> strides) {
  constexpr int64_t kFurther = 0;  // elements beyond the first one of `tensor`
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(size.size()), size.begin(),
                                     strides.begin(), kFurther, &handle));
  return Tensor(handle);
}

Tensor converted(const Tensor& tensor, ScalarType type) {
  const Tensor& typed = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

}  // namespace glimpse::ops
