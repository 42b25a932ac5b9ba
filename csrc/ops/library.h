// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// The functions behind the schemas in library.cpp, one block per file that defines them.

namespace glimpse::ops {

using torch::stable::Tensor;

// roi_align.cpp
Tensor roi_align(Tensor input, Tensor boxes, double spatial_scale, int64_t pooled_height,
                 int64_t pooled_width, int64_t sampling_ratio, bool aligned);
Tensor multiscale_roi_align(std::vector<Tensor> features, Tensor boxes,
                            std::optional<Tensor> levels, int64_t pooled_height,
                            int64_t pooled_width, std::vector<double> scales,
                            int64_t sampling_ratio, bool aligned, double canonical_size,
                            int64_t canonical_level, int64_t assign);

// crop.cpp
Tensor crop(Tensor input, Tensor boxes, std::optional<Tensor> image_index, int64_t height,
            int64_t width, int64_t unit, bool align_corners, int64_t padding);
Tensor crop_and_resize(Tensor image, Tensor boxes, Tensor box_indices, int64_t height,
                       int64_t width, bool align_corners, bool nearest, double extrapolation_value);
Tensor point_sample(Tensor input, Tensor points, bool align_corners);
// The same with points [N, P, 2] and values [N, C, P], and what of its gradients is asked for: the
// one to the input, then the one to the points, for which `input` is given.
Tensor points_sample(Tensor input, Tensor points, bool align_corners);
std::vector<Tensor> points_gradients(Tensor grad, Tensor points, std::optional<Tensor> input,
                                     bool align_corners, std::vector<int64_t> sizes,
                                     bool channels_last, bool to_input);

// crop_batch.cpp: `images` are one batch, or several of one image each
Tensor crop_batch(std::vector<Tensor> images, Tensor boxes, std::optional<Tensor> image_index,
                  int64_t height, int64_t width, bool antialias, bool beyond, bool edge,
                  double fill, std::vector<double> multiplier, std::vector<double> offset,
                  int64_t dtype, bool channels_last);

// glimpse.cpp
Tensor extract_glimpse(Tensor input, Tensor offsets, std::optional<Tensor> seed, int64_t height,
                       int64_t width, int64_t version, bool centered, bool normalized,
                       int64_t noise);
Tensor subpixel_glimpse(Tensor input, Tensor offsets, int64_t height, int64_t width,
                        int64_t version, bool centered, bool normalized, int64_t scale);

// paste.cpp
Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, bool snapped);
Tensor paste_masks_threshold(Tensor masks, Tensor boxes, int64_t height, int64_t width,
                             double threshold, bool snapped);
Tensor paste_masks_to_bits(Tensor masks, Tensor boxes, int64_t height, int64_t width,
                           double threshold, bool snapped);

// paste_runs.cpp
// On the CPU, whatever device the masks are on: `counts` of all masks behind one another, where
// each ends, areas, tight boxes.
std::tuple<Tensor, Tensor, Tensor, Tensor> paste_masks_runs(Tensor masks, Tensor boxes,
                                                            int64_t height, int64_t width,
                                                            double threshold, bool snapped);

}  // namespace glimpse::ops
