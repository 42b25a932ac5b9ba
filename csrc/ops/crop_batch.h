// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <cstdint>
#include <vector>

#include "ops/sample.h"

namespace glimpse::ops {

/// What the generic operators call it: not a kind of Operator, but a Crop with a filter.
constexpr int64_t kCropBatchKind = 100;

/// From the numbers that the generic operators carry.
NamedOperator decode_crop_batch(const std::vector<double>& params);

}  // namespace glimpse::ops
