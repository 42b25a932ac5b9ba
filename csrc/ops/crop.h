// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <vector>

#include "ops/sample.h"

namespace glimpse::ops {

/// crop, crop_and_resize or point_sample from the numbers that the generic operators carry: those
/// of struct Crop in its order.
NamedOperator decode_crop(const std::vector<double>& params);

}  // namespace glimpse::ops
