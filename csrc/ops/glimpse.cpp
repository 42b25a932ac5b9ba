// SPDX-License-Identifier: BSD-3-Clause
#include "ops/glimpse.h"

#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/layout.h"
#include "ops/library.h"

namespace glimpse::ops {

namespace {

NamedOperator make_glimpse(const char* name, const GlimpseRule& rule, int64_t scale,
                           int64_t whole) {
  check(scale >= 0 && scale <= 0xffff, name, "scales must be from 1 to 65535, got ", scale);
  check(whole >= 0 && whole < Glimpse::kWholes, name, "does not know whole origins ", whole);
  check(whole == Glimpse::kFraction || scale == 1, name, "whole origins have a scale of 1, got ",
        scale);
  Glimpse glimpse;
  glimpse.rule = rule;
  glimpse.scale = static_cast<int32_t>(scale);
  glimpse.whole = static_cast<int32_t>(whole);
  return {name, Operator(glimpse), scale > 0 ? "y, x" : "y, x, scale", true};
}

/// Checks the tensors of a copy.
void check_windows(const char* name, const Tensor& input, const Tensor& offsets) {
  check(input.dim() == 4, name, "input must be [N, C, H, W], got ", describe_shape(input));
  const size_t bytes = input.element_size();
  check(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, name,
        "input must have elements of 1, 2, 4 or 8 bytes, got ",
        describe_dtype(input.scalar_type()));
  check(input.size(2) <= 0x7fffff00 && input.size(3) <= 0x7fffff00, name,
        "input height and width must fit in 32 bits, got ", describe_shape(input));
  check(offsets.dim() == 2 && offsets.size(0) == input.size(0) && offsets.size(1) == 2, name,
        "offsets must be [", input.dim() > 0 ? input.size(0) : 0, ", 2] (y, x), got ",
        describe_shape(offsets));
  check(is_float(offsets.scalar_type()), name,
        "offsets must be float64, float32, float16 or bfloat16, got ",
        describe_dtype(offsets.scalar_type()));
  check_same_device(name, "offsets", offsets, input);
}

}  // namespace

GlimpseRule make_glimpse_rule(const char* name, int64_t version, bool centered, bool normalized) {
  check(version == 1 || version == 2, name, "version must be 1 or 2, got ", version);
  return {static_cast<int32_t>(version), centered ? 1 : 0, normalized ? 1 : 0};
}

NamedOperator decode_glimpse(const std::vector<double>& params) {
  const char* name = "extract_glimpse";
  check(params.size() == 5, name, "expects 5 parameters, got ", params.size());
  const GlimpseRule rule =
      make_glimpse_rule(name, static_cast<int64_t>(params[0]), params[1] != 0, params[2] != 0);
  return make_glimpse(name, rule, static_cast<int64_t>(params[3]), static_cast<int64_t>(params[4]));
}

Tensor subpixel_glimpse(Tensor input, Tensor offsets, int64_t height, int64_t width,
                        int64_t version, bool centered, bool normalized, int64_t scale) {
  const char* name = "extract_glimpse";
  const GlimpseRule rule = make_glimpse_rule(name, version, centered, normalized);
  Sampling sampling(make_glimpse(name, rule, scale, Glimpse::kFraction), std::move(offsets));
  sampling.out_height = height;
  sampling.out_width = width;
  return sample(sampling, {std::move(input)});
}

Tensor extract_glimpse(Tensor input, Tensor offsets, std::optional<Tensor> seed, int64_t height,
                       int64_t width, int64_t version, bool centered, bool normalized,
                       int64_t noise) {
  const char* name = "extract_glimpse";
  check_windows(name, input, offsets);
  GlimpseProblem problem = {};
  problem.rule = make_glimpse_rule(name, version, centered, normalized);
  problem.batch = input.size(0);
  problem.channels = input.size(1);
  problem.height = static_cast<int32_t>(input.size(2));
  problem.width = static_cast<int32_t>(input.size(3));
  problem.out_height = static_cast<int32_t>(check_output_size(name, height));
  problem.out_width = static_cast<int32_t>(check_output_size(name, width));
  problem.element_bytes = static_cast<int32_t>(input.element_size());
  check(noise >= 0 && noise <= static_cast<int64_t>(Noise::kGaussian), name, "does not know noise ",
        noise);
  problem.noise = static_cast<Noise>(noise);
  if (problem.noise != Noise::kZero) {
    check(is_float(input.scalar_type()), name,
          "noise needs an image of float64, float32, float16 or bfloat16, got ",
          describe_dtype(input.scalar_type()), "; use noise=\"zero\"");
    problem.dtype = storage_dtype(name, input.scalar_type());
    check(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, name,
          "noise needs a seed, one int64 number");
    check_same_device(name, "the seed", *seed, input);
    problem.seed = seed->const_data_ptr<int64_t>();
  }
  const DeviceScope scope(input);

  problem.layout = layout_of(input);
  Tensor output = make_empty(input, {problem.batch, problem.channels, height, width},
                             input.scalar_type(), problem.layout);
  if (output.numel() == 0) return output;
  // float16 and bfloat16 offsets are those numbers; places are computed in float.
  const bool wide = offsets.scalar_type() == ScalarType::Double;
  const Tensor places = converted(offsets, wide ? ScalarType::Double : ScalarType::Float);
  problem.offset = places.const_data_ptr();
  problem.double_offset = wide ? 1 : 0;
  problem.image = input.const_data_ptr();
  problem.stride_n = input.stride(0);
  problem.stride_c = input.stride(1);
  problem.stride_h = input.stride(2);
  problem.stride_w = input.stride(3);
  problem.output = output.mutable_data_ptr();
  problem.stream = scope.stream();
  std::optional<Tensor> workspace;
  const size_t bytes = current_backend().copy_glimpse_workspace(problem);
  if (bytes > 0) {
    workspace = make_workspace(input, bytes);
    problem.workspace = workspace->mutable_data_ptr();
  }
  current_backend().copy_glimpse(problem);
  return output;
}

}  // namespace glimpse::ops
