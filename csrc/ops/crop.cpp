// SPDX-License-Identifier: BSD-3-Clause
// One sample per cell: crop, crop_and_resize, point_sample.
#include "ops/crop.h"

#include <algorithm>

#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/library.h"

namespace glimpse::ops {

namespace {

NamedOperator make_crop(const char* name, const Crop& crop) {
  check(crop.order >= 0 && crop.order < Crop::kOrders, name, "does not know box order ",
        crop.order);
  check(crop.outside >= 0 && crop.outside < Crop::kOutsides, name, "does not know padding ",
        crop.outside);
  check(crop.unit >= Unit::kFraction && crop.unit <= Unit::kPixels, name, "does not know unit ",
        static_cast<int32_t>(crop.unit));
  const char* columns = crop.order == Crop::kXyxy   ? "x1, y1, x2, y2"
                        : crop.order == Crop::kYxyx ? "y1, x1, y2, x2"
                                                    : "x, y";
  return {name, Operator(crop), columns, true};
}

}  // namespace

NamedOperator decode_crop(const std::vector<double>& params) {
  check(params.size() == 6, "crop", "expects 6 parameters, got ", params.size());
  Crop crop;
  crop.order = static_cast<int32_t>(params[0]);
  crop.unit = static_cast<Unit>(static_cast<int32_t>(params[1]));
  crop.align_corners = params[2] != 0;
  crop.outside = static_cast<int32_t>(params[3]);
  crop.nearest = params[4] != 0;
  crop.single = params[5] != 0;
  const char* name = crop.order == Crop::kYxyx    ? "crop_and_resize"
                     : crop.order == Crop::kPoint ? "point_sample"
                                                  : "crop";
  return make_crop(name, crop);
}

Tensor crop(Tensor input, Tensor boxes, std::optional<Tensor> image_index, int64_t height,
            int64_t width, int64_t unit, bool align_corners, int64_t padding) {
  Crop crop = {};
  crop.order = Crop::kXyxy;
  crop.unit = static_cast<Unit>(unit);
  crop.align_corners = align_corners;
  crop.outside = static_cast<int32_t>(padding);
  Sampling sampling(make_crop("crop", crop), std::move(boxes));
  sampling.image_index = std::move(image_index);
  sampling.out_height = height;
  sampling.out_width = width;
  return sample(sampling, {std::move(input)});
}

Tensor crop_and_resize(Tensor image, Tensor boxes, Tensor box_indices, int64_t height,
                       int64_t width, bool align_corners, bool nearest,
                       double extrapolation_value) {
  Crop crop = {};
  crop.order = Crop::kYxyx;
  crop.unit = Unit::kFraction;
  crop.align_corners = align_corners;
  crop.outside = Crop::kFill;
  crop.nearest = nearest;
  // TensorFlow computes places in float for every image. Boxes that are double ask for more.
  crop.single = align_corners && boxes.scalar_type() != ScalarType::Double;
  Sampling sampling(make_crop("crop_and_resize", crop), std::move(boxes));
  sampling.image_index = std::move(box_indices);
  sampling.out_height = height;
  sampling.out_width = width;
  sampling.fill = extrapolation_value;
  return sample(sampling, {std::move(image)});
}

namespace {

Sampling sampling_of_points(Tensor points, bool align_corners) {
  Crop crop = {};
  crop.order = Crop::kPoint;
  crop.unit = Unit::kFraction;
  crop.align_corners = align_corners;
  crop.outside = Crop::kZeros;
  Sampling sampling(make_crop("point_sample", crop), std::move(points));
  sampling.out_height = sampling.out_width = 1;
  return sampling;
}

/// Points [N, P, 2] as boxes.
Sampling sampling_of_lists(const Tensor& points, bool align_corners, int64_t images) {
  const char* name = "point_sample";
  check(points.dim() == 3 && points.size(2) == 2, name, "points must be [N, P, 2] (x, y), got ",
        describe_shape(points));
  check(points.size(0) == images, name, "expects points for each image, got ", points.size(0),
        " lists of points and ", images, " images");
  Sampling sampling = sampling_of_points(seen_as(converted(points, points.scalar_type()),
                                                 {points.size(0) * points.size(1), 2}, {2, 1}),
                                         align_corners);
  sampling.lists = true;
  return sampling;
}

}  // namespace

Tensor point_sample(Tensor input, Tensor points, bool align_corners) {
  return sample(sampling_of_points(std::move(points), align_corners), {std::move(input)});
}

Tensor points_sample(Tensor input, Tensor points, bool align_corners) {
  check(input.dim() == 4, "point_sample", "input must be [N, C, H, W], got ",
        describe_shape(input));
  const Sampling sampling = sampling_of_lists(points, align_corners, input.size(0));
  const Tensor values = sample(sampling, {input});
  const int64_t channels = input.size(1), count = points.size(1);
  return seen_as(values, {input.size(0), channels, count},
                 {std::max<int64_t>(count * channels, 1), 1, std::max<int64_t>(channels, 1)});
}

std::vector<Tensor> points_gradients(Tensor grad, Tensor points, std::optional<Tensor> input,
                                     bool align_corners, std::vector<int64_t> sizes,
                                     bool channels_last, bool to_input) {
  check(sizes.size() == 4, "point_sample", "expects the sizes N, C, height, width, got ",
        sizes.size(), " numbers");
  const Sampling sampling = sampling_of_lists(points, align_corners, sizes[0]);
  std::vector<Tensor> gradients;
  if (to_input) gradients = sample_grad_features(sampling, grad, sizes, channels_last);
  if (input.has_value()) {
    const Tensor to_points = sample_grad_boxes(sampling, {*input}, grad);
    gradients.push_back(seen_as(to_points, {points.size(0), points.size(1), 2},
                                {std::max<int64_t>(2 * points.size(1), 1), 2, 1}));
  }
  return gradients;
}

}  // namespace glimpse::ops
