// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>

#include "problem.h"

// How tensors lie in memory, and tensors that lie as a kernel wants them.

namespace glimpse::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The layout of a call is that of its first feature map. A map is read in place whenever the
/// stride that the layout wants to be 1 is 1; slices and crops of maps are therefore not copied.
Layout layout_of(const Tensor& map);
bool readable_as(const Tensor& map, Layout layout);

torch::headeronly::MemoryFormat memory_format(Layout layout);

/// A result, which will be written in full; Note [Pages in advance]. By way of the C interface of
/// torch: the dispatcher, which torch::stable::empty asks, takes longer than a small kernel.
Tensor make_empty(const Tensor& like, std::array<int64_t, 4> size, ScalarType type, Layout layout);
Tensor make_empty(const Tensor& like, std::array<int64_t, 2> size, ScalarType type);
/// The same of `bytes` bytes.
Tensor make_workspace(const Tensor& like, size_t bytes);
/// A dense tensor in host memory, whatever device a call runs on.
Tensor make_on_host(std::initializer_list<int64_t> size, ScalarType type);

/// `tensor` without gaps in `layout`; itself where it is so.
Tensor dense(const Tensor& tensor, Layout layout);

/// The memory of `tensor`, which the caller knows to be so, as another shape: a tensor of its own
/// and not a view. By way of the C interface, for the same reason.
Tensor seen_as(const Tensor& tensor, std::initializer_list<int64_t> size,
               std::initializer_list<int64_t> strides);

/// `tensor` contiguous and of `type`; itself where it is so.
Tensor converted(const Tensor& tensor, ScalarType type);

}  // namespace glimpse::ops
