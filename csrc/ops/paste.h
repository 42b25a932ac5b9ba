// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "paste_problem.h"

namespace glimpse::ops {

using torch::stable::Tensor;

/// A PasteProblem without its image, together with the tensors that keep its pointers alive.
struct PasteCall {
  PasteCall(const char* name, const Tensor& masks, const Tensor& boxes, int64_t height,
            int64_t width, bool snapped, PasteResult result, double threshold);

  PasteProblem problem = {};

 private:
  Tensor boxes_;
};

}  // namespace glimpse::ops
