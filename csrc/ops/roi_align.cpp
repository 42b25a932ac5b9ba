// SPDX-License-Identifier: BSD-3-Clause
#include "ops/roi_align.h"

#include "ops/checks.h"
#include "ops/library.h"
#include "ops/sample.h"

namespace glimpse::ops {

namespace {

NamedOperator make_roi_align(const char* name, int64_t sampling_ratio, bool aligned) {
  check(sampling_ratio <= kMaxSamples, name, "sampling_ratio must fit in 31 bits, got ",
        sampling_ratio);
  const RoiAlign roi_align = {static_cast<int32_t>(sampling_ratio < 0 ? 0 : sampling_ratio),
                              aligned ? 1 : 0};
  return {name, Operator(roi_align), "x1, y1, x2, y2", false};
}

}  // namespace

NamedOperator decode_roi_align(const std::vector<double>& params) {
  check(params.size() == 2, "roi_align", "expects 2 parameters, got ", params.size());
  return make_roi_align("roi_align", static_cast<int64_t>(params[0]), params[1] != 0);
}

Tensor roi_align(Tensor input, Tensor boxes, double spatial_scale, int64_t pooled_height,
                 int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  const char* name = "roi_align";
  Sampling sampling(make_roi_align(name, sampling_ratio, aligned), std::move(boxes));
  sampling.out_height = pooled_height;
  sampling.out_width = pooled_width;
  sampling.scales = {spatial_scale};
  return sample(sampling, {std::move(input)});
}

Tensor multiscale_roi_align(std::vector<Tensor> features, Tensor boxes,
                            std::optional<Tensor> levels, int64_t pooled_height,
                            int64_t pooled_width, std::vector<double> scales,
                            int64_t sampling_ratio, bool aligned, double canonical_size,
                            int64_t canonical_level, int64_t assign) {
  const char* name = "multiscale_roi_align";
  Sampling sampling(make_roi_align(name, sampling_ratio, aligned), std::move(boxes));
  sampling.levels = std::move(levels);
  sampling.out_height = pooled_height;
  sampling.out_width = pooled_width;
  sampling.level_rule = make_level_rule(name, assign, canonical_size, canonical_level, scales);
  sampling.scales = std::move(scales);
  return sample(sampling, features);
}

}  // namespace glimpse::ops
