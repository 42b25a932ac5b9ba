// SPDX-License-Identifier: BSD-3-Clause
#include "ops/frames.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/layout.h"

namespace glimpse::ops {

namespace {

/// What is read and where: everything of a call but the tensor that it reads or writes.
struct FrameSampling {
  const char* name;  // of the operator, for errors
  FrameOperator op;
  Tensor boxes;
  std::optional<Tensor> image_index, tangent, chosen;
  int64_t out_height, out_width;
  double scale;
};

FrameOperator make_operator(const char* name, const std::vector<int64_t>& params) {
  check(params.size() == 5, name, "expects 5 parameters, got ", params.size());
  check(params[0] >= 0 && params[0] < FrameOperator::kKinds, name, "does not know operator kind ",
        params[0]);
  check(params[1] <= kMaxSamples, name, "sampling_ratio must fit in 31 bits, got ", params[1]);
  const auto flag = [](int64_t value) { return value != 0 ? 1 : 0; };
  return {static_cast<int32_t>(params[0]), static_cast<int32_t>(params[1] < 0 ? 0 : params[1]),
          flag(params[2]), flag(params[3]), flag(params[4])};
}

FrameSampling make_sampling(const std::vector<int64_t>& params, Tensor boxes,
                            std::optional<Tensor> image_index, std::optional<Tensor> tangent,
                            std::optional<Tensor> chosen, const std::vector<int64_t>& output_size,
                            double scale) {
  const bool rotated = !params.empty() && params[0] == FrameOperator::kRotated;
  const char* name = rotated ? "roi_align_rotated" : "roi_align_max";
  check(output_size.size() == 2, name, "expects an output height and width, got ",
        output_size.size(), " numbers");
  return {name,
          make_operator(name, params),
          std::move(boxes),
          std::move(image_index),
          std::move(tangent),
          std::move(chosen),
          output_size[0],
          output_size[1],
          scale};
}

void check_frame_boxes(const FrameSampling& sampling, const Tensor& like) {
  const char* name = sampling.name;
  const Tensor& boxes = sampling.boxes;
  const bool rotated = sampling.op.kind == FrameOperator::kRotated;
  const char* columns = rotated ? "centre x, centre y, width, height, angle)" : "x1, y1, x2, y2)";
  const int64_t count = sampling.op.columns();
  if (sampling.image_index.has_value()) {
    check(boxes.dim() == 2 && boxes.size(1) == count, name, "boxes must be [K, ", count, "] (",
          columns, " beside an image index, got ", describe_shape(boxes));
    check_index(name, "the image index", *sampling.image_index, boxes.size(0), like);
  } else {
    check(boxes.dim() == 2 && boxes.size(1) == count + 1, name, "boxes must be [K, ", count + 1,
          "] (image, ", columns, ", got ", describe_shape(boxes));
  }
  check(is_float(boxes.scalar_type()), name,
        "boxes must be float64, float32, float16 or bfloat16, got ",
        describe_dtype(boxes.scalar_type()));
  check_same_device(name, "boxes", boxes, like);
  if (sampling.tangent.has_value()) {
    const Tensor& tangent = *sampling.tangent;
    check(tangent.dim() == 2 && tangent.size(0) == boxes.size(0) &&
              tangent.size(1) == boxes.size(1) && is_float(tangent.scalar_type()),
          name, "the tangent must be like the boxes, ", describe_shape(boxes), ", got ",
          describe_shape(tangent));
    check_same_device(name, "the tangent", tangent, like);
  }
}

void check_pooled(const FrameSampling& sampling, const char* what, const Tensor& tensor,
                  int64_t channels, const Tensor& like) {
  check(tensor.dim() == 4 && tensor.size(0) == sampling.boxes.size(0) &&
            tensor.size(1) == channels && tensor.size(2) == sampling.out_height &&
            tensor.size(3) == sampling.out_width,
        sampling.name, what, " must be [", sampling.boxes.size(0), ", ", channels, ", ",
        sampling.out_height, ", ", sampling.out_width, "], got ", describe_shape(tensor));
  check_same_device(sampling.name, what, tensor, like);
}

/// A FrameProblem together with the tensors that keep its pointers alive.
class FrameCall {
 public:
  FrameCall(const FrameSampling& sampling, const Tensor& like, ScalarType features_type,
            int64_t batch, int64_t channels, Layout layout)
      : sampling_(sampling) {
    const char* name = sampling.name;
    const ScalarType coordinates =
        features_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    boxes_ = converted(sampling.boxes, coordinates);
    problem.op = sampling.op;
    problem.batch = batch;
    problem.channels = channels;
    problem.boxes = boxes_.size(0);
    problem.out_height = static_cast<int32_t>(check_output_size(name, sampling.out_height));
    problem.out_width = static_cast<int32_t>(check_output_size(name, sampling.out_width));
    problem.dtype = storage_dtype(name, features_type);
    problem.layout = layout;
    problem.box = boxes_.const_data_ptr();
    problem.box_columns = static_cast<int32_t>(boxes_.size(1));
    if (sampling.image_index.has_value()) {
      image_index_ = converted(*sampling.image_index, ScalarType::Long);
      problem.image_index = image_index_->const_data_ptr<int64_t>();
    }
    if (sampling.tangent.has_value()) {
      tangent_ = converted(*sampling.tangent, coordinates);
      problem.tangent = tangent_->const_data_ptr();
    }
    if (sampling.chosen.has_value()) {
      check(sampling.chosen->scalar_type() == ScalarType::Int, name,
            "the chosen samples must be int32, got ",
            describe_dtype(sampling.chosen->scalar_type()));
      check_pooled(sampling, "the chosen samples", *sampling.chosen, channels, like);
      chosen_ = dense(*sampling.chosen, layout);
      problem.chosen = chosen_->const_data_ptr<int32_t>();
    }
    if (current_backend().checks_image_index) check_index_values();
  }

  void set_map(const Tensor& map) {
    problem.map.data = const_cast<void*>(map.const_data_ptr());
    problem.map.stride_n = map.stride(0);
    problem.map.stride_c = map.stride(1);
    problem.map.stride_h = map.stride(2);
    problem.map.stride_w = map.stride(3);
    problem.map.height = static_cast<int32_t>(map.size(2));
    problem.map.width = static_cast<int32_t>(map.size(3));
    problem.map.scale = sampling_.scale;
    map_ = map;
  }

  FrameProblem problem = {};

 private:
  void check_index_values() const {
    // Only what the check of the separable operators reads.
    Problem boxes = {};
    boxes.boxes = problem.boxes;
    boxes.batch = problem.batch;
    boxes.dtype = problem.dtype;
    boxes.box = problem.box;
    boxes.box_columns = problem.box_columns;
    boxes.image_column = problem.box_columns - problem.op.columns();
    boxes.image_index = problem.image_index;
    check_image_index(sampling_.name, boxes);
  }

  const FrameSampling& sampling_;
  Tensor boxes_;
  std::optional<Tensor> image_index_, tangent_, chosen_, map_;
};

void check_input(const FrameSampling& sampling, const Tensor& input) {
  check_features(sampling.name, {input}, sampling.boxes.dim() > 0 ? sampling.boxes.size(0) : 0);
  check_frame_boxes(sampling, input);
}

Tensor readable(const Tensor& input, Layout layout) {
  return readable_as(input, layout) ? input : dense(input, layout);
}

ScalarType pooled_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Byte ? ScalarType::Float : input.scalar_type();
}

Tensor sample(const FrameSampling& sampling, const Tensor& input) {
  check_input(sampling, input);
  const DeviceScope scope(input);
  const Layout layout = layout_of(input);
  FrameCall call(sampling, input, input.scalar_type(), input.size(0), input.size(1), layout);
  const FrameProblem& sizes = call.problem;
  Tensor pooled =
      make_empty(input, {sizes.boxes, sizes.channels, sizes.out_height, sizes.out_width},
                 pooled_type(input), layout);
  if (pooled.numel() == 0) return pooled;
  call.set_map(readable(input, layout));
  call.problem.pooled = pooled.mutable_data_ptr();
  call.problem.stream = scope.stream();
  current_backend().frames_sample(call.problem);
  return pooled;
}

std::tuple<Tensor, Tensor> maximum(const FrameSampling& sampling, const Tensor& input) {
  check_input(sampling, input);
  const DeviceScope scope(input);
  const Layout layout = layout_of(input);
  FrameCall call(sampling, input, input.scalar_type(), input.size(0), input.size(1), layout);
  const FrameProblem& sizes = call.problem;
  // The samples of a cell are counted in 32 bits. Adaptive ones are at most two for each pixel and
  // direction of what a cell can reach of the map.
  constexpr int64_t kMostRatio = 32768, kMostPixels = int64_t{1} << 28;
  check(sizes.op.sampling_ratio <= kMostRatio, sampling.name, "sampling_ratio must be at most ",
        kMostRatio, ", got ", sizes.op.sampling_ratio);
  check((input.size(2) + 64) * (input.size(3) + 64) <= kMostPixels, sampling.name,
        "the map must have at most about 2^28 pixels, got ", describe_shape(input));
  const std::array<int64_t, 4> size = {sizes.boxes, sizes.channels, sizes.out_height,
                                       sizes.out_width};
  Tensor pooled = make_empty(input, size, pooled_type(input), layout);
  Tensor winner = make_empty(input, size, ScalarType::Int, layout);
  if (pooled.numel() > 0) {
    call.set_map(readable(input, layout));
    call.problem.pooled = pooled.mutable_data_ptr();
    call.problem.winner = winner.mutable_data_ptr<int32_t>();
    call.problem.stream = scope.stream();
    current_backend().frames_maximum(call.problem);
  }
  return {pooled, winner};
}

}  // namespace

Tensor roi_align_rotated(Tensor input, Tensor boxes, double spatial_scale, int64_t pooled_height,
                         int64_t pooled_width, int64_t sampling_ratio, bool aligned, bool clockwise,
                         bool degrees) {
  return frames_sample(std::move(input), std::move(boxes), std::nullopt, std::nullopt, std::nullopt,
                       {pooled_height, pooled_width},
                       {FrameOperator::kRotated, sampling_ratio, aligned, clockwise, degrees},
                       spatial_scale);
}

std::tuple<Tensor, Tensor> roi_align_max(Tensor input, Tensor boxes, double spatial_scale,
                                         int64_t pooled_height, int64_t pooled_width,
                                         int64_t sampling_ratio, bool aligned) {
  return frames_maximum(std::move(input), std::move(boxes), std::nullopt,
                        {pooled_height, pooled_width},
                        {FrameOperator::kRoiAlign, sampling_ratio, aligned, 0, 0}, spatial_scale);
}

Tensor frames_sample(Tensor input, Tensor boxes, std::optional<Tensor> image_index,
                     std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                     std::vector<int64_t> output_size, std::vector<int64_t> params,
                     double spatial_scale) {
  return sample(make_sampling(params, std::move(boxes), std::move(image_index), std::move(tangent),
                              std::move(chosen), output_size, spatial_scale),
                input);
}

std::tuple<Tensor, Tensor> frames_maximum(Tensor input, Tensor boxes,
                                          std::optional<Tensor> image_index,
                                          std::vector<int64_t> output_size,
                                          std::vector<int64_t> params, double spatial_scale) {
  return maximum(make_sampling(params, std::move(boxes), std::move(image_index), std::nullopt,
                               std::nullopt, output_size, spatial_scale),
                 input);
}

Tensor frames_grad_features(Tensor grad, Tensor boxes, std::optional<Tensor> image_index,
                            std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                            std::vector<int64_t> output_size, std::vector<int64_t> params,
                            double spatial_scale, std::vector<int64_t> sizes, bool channels_last) {
  const FrameSampling sampling =
      make_sampling(params, std::move(boxes), std::move(image_index), std::move(tangent),
                    std::move(chosen), output_size, spatial_scale);
  const char* name = sampling.name;
  check(sizes.size() == 4, name, "expects the sizes N, C, H, W of the input, got ", sizes.size(),
        " numbers");
  check(is_float(grad.scalar_type()), name, "the gradient must be a float tensor, got ",
        describe_dtype(grad.scalar_type()));
  check_frame_boxes(sampling, grad);
  check_pooled(sampling, "the gradient", grad, sizes[1], grad);
  check(sizes[2] >= 0 && sizes[3] >= 0 && sizes[2] <= 0x7fffff00 && sizes[3] <= 0x7fffff00, name,
        "input height and width must fit in 32 bits, got ", sizes[2], " x ", sizes[3]);
  const DeviceScope scope(grad);
  const Layout layout = channels_last ? Layout::kNhwc : Layout::kNchw;
  FrameCall call(sampling, grad, grad.scalar_type(), sizes[0], sizes[1], layout);
  Tensor features =
      make_empty(grad, {sizes[0], sizes[1], sizes[2], sizes[3]}, grad.scalar_type(), layout);
  if (features.numel() == 0) return features;
  call.set_map(features);
  const Tensor pooled = dense(grad, layout);
  call.problem.pooled = const_cast<void*>(pooled.const_data_ptr());
  call.problem.stream = scope.stream();
  current_backend().frames_grad_features(call.problem);
  return features;
}

Tensor frames_grad_boxes(Tensor input, Tensor grad, Tensor boxes, std::optional<Tensor> image_index,
                         std::optional<Tensor> tangent, std::optional<Tensor> chosen,
                         std::vector<int64_t> output_size, std::vector<int64_t> params,
                         double spatial_scale) {
  const FrameSampling sampling =
      make_sampling(params, std::move(boxes), std::move(image_index), std::move(tangent),
                    std::move(chosen), output_size, spatial_scale);
  check_input(sampling, input);
  check_pooled(sampling, "the gradient", grad, input.size(1), input);
  const DeviceScope scope(input);
  const Layout layout = layout_of(input);
  FrameCall call(sampling, input, input.scalar_type(), input.size(0), input.size(1), layout);
  const ScalarType coordinates =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_boxes =
      make_empty(sampling.boxes, {sampling.boxes.size(0), sampling.boxes.size(1)}, coordinates);
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_boxes);
  } else {
    call.set_map(readable(input, layout));
    const Tensor pooled = dense(grad.scalar_type() == pooled_type(input)
                                    ? grad
                                    : torch::stable::to(grad, pooled_type(input)),
                                layout);
    call.problem.pooled = const_cast<void*>(pooled.const_data_ptr());
    call.problem.grad_box = grad_boxes.mutable_data_ptr();
    call.problem.stream = scope.stream();
    current_backend().frames_grad_boxes(call.problem);
  }
  const ScalarType boxes_type = sampling.boxes.scalar_type();
  return boxes_type == coordinates ? grad_boxes : torch::stable::to(grad_boxes, boxes_type);
}

}  // namespace glimpse::ops
