// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include "backend.h"

namespace glimpse::ops {

/// The backend that runs this library's calls: the CPU's (or the one that tests put in its place)
/// in libglimpse_cpu, CUDA's in libglimpse_cuda.
const Backend& current_backend();

/// Makes the device of `tensor` current while it lives, and knows its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  void* stream() const { return stream_; }

 private:
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace glimpse::ops
