// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace glimpse::ops {

using torch::stable::Tensor;

// Operators on frames; see frame_problem.h. `params` are the members of FrameOperator in order.

Tensor roi_align_rotated(Tensor input, Tensor boxes, double spatial_scale, int64_t pooled_height,
                         int64_t pooled_width, int64_t sampling_ratio, bool aligned, bool clockwise,
                         bool degrees);
std::tuple<Tensor, Tensor> roi_align_max(Tensor input, Tensor boxes, double spatial_scale,
                                         int64_t pooled_height, int64_t pooled_width,
                                         int64_t sampling_ratio, bool aligned);

Tensor frames_sample(Tensor input, Tensor boxes, std::optional<Tensor> image_index,
                     std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                     std::vector<int64_t> output_size, std::vector<int64_t> params,
                     double spatial_scale);
std::tuple<Tensor, Tensor> frames_maximum(Tensor input, Tensor boxes,
                                          std::optional<Tensor> image_index,
                                          std::vector<int64_t> output_size,
                                          std::vector<int64_t> params, double spatial_scale);
Tensor frames_grad_features(Tensor grad, Tensor boxes, std::optional<Tensor> image_index,
                            std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                            std::vector<int64_t> output_size, std::vector<int64_t> params,
                            double spatial_scale, std::vector<int64_t> sizes, bool channels_last);
Tensor frames_grad_boxes(Tensor input, Tensor grad, Tensor boxes, std::optional<Tensor> image_index,
                         std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                         std::vector<int64_t> output_size, std::vector<int64_t> params,
                         double spatial_scale);

}  // namespace glimpse::ops
