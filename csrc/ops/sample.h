// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "geometry/operators.h"
#include "geometry/pyramid.h"
#include "ops/checks.h"

namespace glimpse::ops {

using torch::stable::Tensor;

/// An operator with what errors say of it.
struct NamedOperator {
  const char* name;
  Operator op;
  const char* columns;  // of a box
  bool even;            // image indices may be left out where each image has as many boxes
  FilterRule filter = {};
};

/// What is read and where: everything of a call but the tensor that it reads or writes.
struct Sampling {
  Sampling(const NamedOperator& named, Tensor boxes)
      : name(named.name),
        op(named.op),
        filter(named.filter),
        rows({named.op.box_columns(), named.columns, named.even}),
        boxes(std::move(boxes)) {}

  const char* name;
  Operator op;
  FilterRule filter;
  BoxRows rows;
  Tensor boxes;
  std::optional<Tensor> image_index;
  std::optional<Tensor> levels;
  std::optional<Tensor> tangent;
  int64_t tangent_axes = 0;
  int64_t out_height = 0, out_width = 0;
  double fill = 0;
  bool lists = false;  // boxes are points, and their gradient is [images, channels, points]
  std::vector<double> scales = {1.0};  // one per feature map
  LevelRule level_rule = {};
};

/// The rule that assigns boxes to the maps of a pyramid with these scales.
LevelRule make_level_rule(const char* name, int64_t kind, double canonical_size,
                          int64_t canonical_level, const std::vector<double>& scales);

/// Pooled values [K, C, out_height, out_width] in the memory format of the first feature map.
Tensor sample(const Sampling& sampling, const std::vector<Tensor>& features);

/// What becomes of the values of sample_batch.
struct BatchResult {
  ScalarType type;
  Layout layout;
  double fill;                             // of pixels outside the image
  std::vector<double> multiplier, offset;  // of each channel
};

/// Boxes of images [N, C, H, W], or of several [1, C, H, W] of any sizes.
Tensor sample_batch(const Sampling& sampling, const std::vector<Tensor>& images,
                    const BatchResult& result);

/// Gradients to the feature maps. sizes: N, C, then height and width of each map.
std::vector<Tensor> sample_grad_features(const Sampling& sampling, const Tensor& grad,
                                         const std::vector<int64_t>& sizes, bool channels_last);

/// Gradient to the boxes, in their shape and dtype.
Tensor sample_grad_boxes(const Sampling& sampling, const std::vector<Tensor>& features,
                         const Tensor& grad);

}  // namespace glimpse::ops
