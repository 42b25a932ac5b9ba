// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <vector>

#include "ops/sample.h"

namespace glimpse::ops {

/// RoIAlign from the numbers that the generic operators carry: sampling_ratio, aligned.
NamedOperator decode_roi_align(const std::vector<double>& params);

}  // namespace glimpse::ops
