// SPDX-License-Identifier: BSD-3-Clause
#include "ops/glimpse.h"

#include "ops/checks.h"
#include "ops/library.h"

namespace glimpse::ops {

namespace {

NamedOperator make_glimpse(const char* name, const GlimpseRule& rule, int64_t scale) {
  check(scale >= 0 && scale <= 0xffff, name, "scales must be from 1 to 65535, got ", scale);
  Glimpse glimpse;
  glimpse.rule = rule;
  glimpse.scale = static_cast<int32_t>(scale);
  return {name, Operator(glimpse), scale > 0 ? "y, x" : "y, x, scale", true};
}

}  // namespace

GlimpseRule make_glimpse_rule(const char* name, int64_t version, bool centered, bool normalized) {
  check(version == 1 || version == 2, name, "version must be 1 or 2, got ", version);
  return {static_cast<int32_t>(version), centered ? 1 : 0, normalized ? 1 : 0};
}

NamedOperator decode_glimpse(const std::vector<double>& params) {
  const char* name = "extract_glimpse";
  check(params.size() == 4, name, "expects 4 parameters, got ", params.size());
  const GlimpseRule rule =
      make_glimpse_rule(name, static_cast<int64_t>(params[0]), params[1] != 0, params[2] != 0);
  return make_glimpse(name, rule, static_cast<int64_t>(params[3]));
}

Tensor subpixel_glimpse(Tensor input, Tensor offsets, int64_t height, int64_t width,
                        int64_t version, bool centered, bool normalized, int64_t scale) {
  const char* name = "extract_glimpse";
  const GlimpseRule rule = make_glimpse_rule(name, version, centered, normalized);
  Sampling sampling(make_glimpse(name, rule, scale), std::move(offsets));
  sampling.out_height = height;
  sampling.out_width = width;
  return sample(sampling, {std::move(input)});
}

}  // namespace glimpse::ops
