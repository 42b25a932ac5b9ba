// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <vector>

#include "ops/sample.h"

namespace glimpse::ops {

/// Sub-pixel glimpses from the numbers that the generic operators carry: version, centered,
/// normalized, scale.
NamedOperator decode_glimpse(const std::vector<double>& params);

/// TensorFlow's rule for the place of a window.
GlimpseRule make_glimpse_rule(const char* name, int64_t version, bool centered, bool normalized);

}  // namespace glimpse::ops
