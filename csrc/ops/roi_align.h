// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <vector>

#include "geometry/operators.h"

namespace glimpse::ops {

/// RoiAlign from the numbers that the generic operators carry: sampling_ratio, aligned.
RoiAlign decode_roi_align(const std::vector<double>& params);

}  // namespace glimpse::ops
