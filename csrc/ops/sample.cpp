// SPDX-License-Identifier: BSD-3-Clause
#include "ops/sample.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/layout.h"

namespace glimpse::ops {

namespace {

/// A Problem together with the tensors that keep its pointers alive.
class Call {
 public:
  Call(const Sampling& sampling, ScalarType features_type, int64_t batch, int64_t channels,
       size_t maps, Layout layout)
      : name_(sampling.name) {
    const bool wide = features_type == ScalarType::Double;
    const ScalarType coordinates = wide ? ScalarType::Double : ScalarType::Float;
    boxes_ = converted(sampling.boxes, coordinates);

    check(sampling.scales.size() == maps, name_, "expects one scale for each feature map, got ",
          sampling.scales.size(), " scales and ", maps, " maps");
    problem.op = sampling.op;
    problem.filter = sampling.filter;
    problem.levels = static_cast<int32_t>(maps);
    problem.level_rule = sampling.level_rule;
    problem.batch = batch;
    problem.channels = channels;
    problem.boxes = boxes_.size(0);
    problem.out_height = static_cast<int32_t>(check_output_size(name_, sampling.out_height));
    problem.out_width = static_cast<int32_t>(check_output_size(name_, sampling.out_width));
    problem.dtype = storage_dtype(name_, features_type);
    problem.layout = layout;
    problem.box = boxes_.const_data_ptr();
    problem.box_columns = static_cast<int32_t>(boxes_.size(1));
    problem.image_column = problem.box_columns - problem.op.box_columns();
    problem.fill = sampling.fill;
    if (sampling.image_index.has_value()) {
      image_index_ = converted(*sampling.image_index, ScalarType::Long);
      problem.image_index = image_index_->const_data_ptr<int64_t>();
    } else if (problem.image_column == 0) {
      check(batch == 0 ? problem.boxes == 0 : problem.boxes % batch == 0, name_,
            "expects an image index, or as many boxes for each image, got ", problem.boxes,
            " boxes and ", batch, " images");
      problem.boxes_per_image = batch == 0 ? 1 : std::max<int64_t>(problem.boxes / batch, 1);
    }
    if (sampling.levels.has_value()) {
      levels_ = converted(*sampling.levels, ScalarType::Long);
      problem.box_level = levels_->const_data_ptr<int64_t>();
    }
    if (sampling.tangent_axes != 0) {
      check(sampling.tangent.has_value(), name_, "tangent axes need a tangent");
      tangent_ = converted(*sampling.tangent, coordinates);
      problem.tangent = tangent_->const_data_ptr();
      problem.tangent_axes = static_cast<int32_t>(sampling.tangent_axes);
    }
    if (current_backend().checks_image_index) check_image_index(name_, problem);
  }

  void set_level(size_t index, const Tensor& map, double scale) {
    Level& level = problem.level[index];
    level.data = const_cast<void*>(map.const_data_ptr());
    level.stride_n = map.stride(0);
    level.stride_c = map.stride(1);
    level.stride_h = map.stride(2);
    level.stride_w = map.stride(3);
    level.height = static_cast<int32_t>(map.size(2));
    level.width = static_cast<int32_t>(map.size(3));
    level.scale = scale;
    maps_.push_back(map);
  }

  /// Gives the gradients the pooled values that they read.
  void set_pooled(const Sampling& sampling, const Tensor& grad) {
    if (!sampling.lists) {
      pooled_ = dense(grad, problem.layout);
    } else if (current_backend().reads_strided(problem)) {
      pooled_ = grad;
      problem.strided = 1;
      for (int32_t i = 0; i < 3; ++i) problem.pooled_stride[i] = grad.stride(i);
    } else {
      pooled_ = torch::stable::contiguous(torch::stable::transpose(grad, 1, 2));
    }
    problem.pooled = const_cast<void*>(pooled_->const_data_ptr());
  }

  Problem problem = {};

 private:
  const char* name_;
  Tensor boxes_;
  std::optional<Tensor> image_index_, levels_, tangent_, pooled_;
  std::vector<Tensor> maps_;
};

/// Checks what all three applications share; `like` carries the device.
void check_sampling(const Sampling& sampling, const Tensor& like) {
  const char* name = sampling.name;
  check_boxes(name, sampling.boxes, sampling.image_index, sampling.rows, like);
  if (sampling.levels.has_value()) {
    check_index(name, "levels", *sampling.levels, sampling.boxes.size(0), like);
  }
  if (sampling.tangent.has_value()) {
    const Tensor& tangent = *sampling.tangent;
    check(tangent.dim() == 2 && tangent.size(0) == sampling.boxes.size(0) &&
              tangent.size(1) == sampling.boxes.size(1) && is_float(tangent.scalar_type()),
          name, "the tangent must be like the boxes, ", describe_shape(sampling.boxes), ", got ",
          describe_shape(tangent));
    check_same_device(name, "the tangent", tangent, like);
  }
}

void add_maps(Call& call, const Sampling& sampling, const std::vector<Tensor>& features) {
  const Layout layout = call.problem.layout;
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& map = features[i];
    call.set_level(i, readable_as(map, layout) ? map : dense(map, layout), sampling.scales[i]);
  }
}

/// Room for a call, to be kept until its launches are enqueued: the caching allocator orders its
/// reuse on the stream.
std::optional<Tensor> add_workspace(Call& call, const Tensor& like, size_t bytes) {
  if (bytes == 0) return std::nullopt;
  std::optional<Tensor> workspace = make_workspace(like, bytes);
  call.problem.workspace = workspace->mutable_data_ptr();
  return workspace;
}

void check_grad(const Sampling& sampling, const Tensor& grad, int64_t images, int64_t channels) {
  if (sampling.lists) {
    check(grad.dim() == 3 && grad.size(0) == images && grad.size(1) == channels &&
              images * grad.size(2) == sampling.boxes.size(0),
          sampling.name, "the gradient must be [", images, ", ", channels, ", ",
          images == 0 ? 0 : sampling.boxes.size(0) / images, "], got ", describe_shape(grad));
    return;
  }
  check(grad.dim() == 4 && grad.size(0) == sampling.boxes.size(0) && grad.size(1) == channels &&
            grad.size(2) == sampling.out_height && grad.size(3) == sampling.out_width,
        sampling.name, "the gradient must be [", sampling.boxes.size(0), ", ", channels, ", ",
        sampling.out_height, ", ", sampling.out_width, "], got ", describe_shape(grad));
}

}  // namespace

LevelRule make_level_rule(const char* name, int64_t kind, double canonical_size,
                          int64_t canonical_level, const std::vector<double>& scales) {
  check(kind >= 0 && kind < LevelRule::kKinds, name, "does not know level rule ", kind);
  check(!scales.empty(), name, "expects at least one scale, got none");
  for (const double scale : scales) {
    check(scale > 0 && scale < 1e30, name, "scales must be positive, got ", scale);
  }
  LevelRule rule;
  rule.kind = static_cast<int32_t>(kind);
  rule.canonical_level = static_cast<int32_t>(canonical_level);
  rule.canonical_size = canonical_size;
  rule.first = level_of_scale(scales.front());
  rule.last = level_of_scale(scales.back());
  return rule;
}

Tensor sample(const Sampling& sampling, const std::vector<Tensor>& features) {
  check_features(sampling.name, features, sampling.boxes.dim() > 0 ? sampling.boxes.size(0) : 0);
  const Tensor& first = features.front();
  check_sampling(sampling, first);
  const DeviceScope scope(first);

  const ScalarType type = first.scalar_type();
  const Layout layout = layout_of(first);
  Call call(sampling, type, first.size(0), first.size(1), features.size(), layout);
  const Problem& sizes = call.problem;
  Tensor pooled =
      make_empty(first, {sizes.boxes, sizes.channels, sizes.out_height, sizes.out_width},
                 type == ScalarType::Byte ? ScalarType::Float : type, layout);
  if (pooled.numel() == 0) return pooled;
  add_maps(call, sampling, features);
  call.problem.pooled = pooled.mutable_data_ptr();
  call.problem.stream = scope.stream();
  current_backend().sample(call.problem);
  return pooled;
}

namespace {

/// An image as a kernel of crop_batch reads it: the pixels of a row, or the numbers of a pixel,
/// are neighbours.
Tensor readable_image(const Tensor& image) {
  const bool planes = image.size(3) == 1 || image.stride(3) == 1;
  const bool pixels = (image.size(1) == 1 || image.stride(1) == 1) &&
                      image.stride(3) >= image.size(1) && image.stride(3) <= 4 * image.size(1);
  return planes || pixels ? image : dense(image, layout_of(image));
}

void check_images(const char* name, const std::vector<Tensor>& images, int64_t boxes) {
  const Tensor& first = images.front();
  for (const Tensor& image : images) {
    check_features(name, {image}, boxes);
    check(images.size() == 1 || image.size(0) == 1, name, "images of a list must be one each, got ",
          describe_shape(image));
    check(image.scalar_type() == first.scalar_type(), name, "images must have one dtype, got ",
          describe_dtype(first.scalar_type()), " and ", describe_dtype(image.scalar_type()));
    check(image.size(1) == first.size(1), name, "images must have one channel count, got ",
          describe_shape(first), " and ", describe_shape(image));
    check_same_device(name, "every image", image, first);
  }
}

}  // namespace

Tensor sample_batch(const Sampling& sampling, const std::vector<Tensor>& images,
                    const BatchResult& result) {
  const char* name = sampling.name;
  check_images(name, images, sampling.boxes.dim() > 0 ? sampling.boxes.size(0) : 0);
  const Tensor& first = images.front();
  check_sampling(sampling, first);
  const DeviceScope scope(first);
  const auto count = images.size() == 1 ? first.size(0) : static_cast<int64_t>(images.size());
  Call call(sampling, first.scalar_type(), count, first.size(1), 1, result.layout);
  const Problem& sizes = call.problem;
  Tensor output =
      make_empty(first, {sizes.boxes, sizes.channels, sizes.out_height, sizes.out_width},
                 result.type, result.layout);
  if (output.numel() == 0) return output;

  BatchProblem batch = {};
  std::vector<Tensor> kept;
  std::vector<BatchImage> list;
  for (const Tensor& image : images) {
    kept.push_back(readable_image(image));
    const Tensor& own = kept.back();
    list.push_back({own.const_data_ptr(), own.stride(1), own.stride(2), own.stride(3),
                    static_cast<int32_t>(own.size(2)), static_cast<int32_t>(own.size(3))});
  }
  if (images.size() == 1) {
    call.set_level(0, kept.front(), 1.0);
  } else {
    call.problem.level[0].height = call.problem.level[0].width = 1;
    call.problem.level[0].scale = 1;
    batch.list = list.data();
  }
  call.problem.pooled = output.mutable_data_ptr();
  call.problem.stream = scope.stream();
  batch.problem = call.problem;
  batch.result = storage_dtype(name, result.type);
  batch.fill = result.fill;
  batch.multiplier = result.multiplier.data();
  batch.offset = result.offset.data();
  std::optional<Tensor> workspace;
  if (const size_t bytes = current_backend().crop_batch_workspace(batch); bytes > 0) {
    workspace = make_workspace(first, bytes);
    batch.problem.workspace = workspace->mutable_data_ptr();
  }
  current_backend().crop_batch(batch);
  return output;
}

std::vector<Tensor> sample_grad_features(const Sampling& sampling, const Tensor& grad,
                                         const std::vector<int64_t>& sizes, bool channels_last) {
  const char* name = sampling.name;
  check(sizes.size() >= 4 && sizes.size() % 2 == 0 &&
            sizes.size() / 2 - 1 <= static_cast<size_t>(kMaxLevels),
        name, "expects the sizes N, C and height, width of each feature map, got ", sizes.size(),
        " numbers");
  const size_t maps = sizes.size() / 2 - 1;
  check(is_float(grad.scalar_type()), name, "the gradient must be a float tensor, got ",
        describe_dtype(grad.scalar_type()));
  check_sampling(sampling, grad);
  check_grad(sampling, grad, sizes[0], sizes[1]);
  const DeviceScope scope(grad);

  const Layout layout = channels_last ? Layout::kNhwc : Layout::kNchw;
  Call call(sampling, grad.scalar_type(), sizes[0], sizes[1], maps, layout);
  std::vector<Tensor> grads;
  int64_t elements = 0;
  for (size_t i = 0; i < maps; ++i) {
    const int64_t height = sizes[2 + 2 * i], width = sizes[3 + 2 * i];
    check(height >= 0 && width >= 0 && height <= 0x7fffff00 && width <= 0x7fffff00, name,
          "feature map sizes must fit in 32 bits, got ", height, " x ", width);
    grads.push_back(
        make_empty(grad, {sizes[0], sizes[1], height, width}, grad.scalar_type(), layout));
    call.set_level(i, grads.back(), sampling.scales[i]);
    elements += grads.back().numel();
  }
  if (elements == 0) return grads;
  call.set_pooled(sampling, grad);
  call.problem.stream = scope.stream();
  const auto workspace =
      add_workspace(call, grad, current_backend().grad_features_workspace(call.problem));
  current_backend().grad_features(call.problem);
  return grads;
}

Tensor sample_grad_boxes(const Sampling& sampling, const std::vector<Tensor>& features,
                         const Tensor& grad) {
  const char* name = sampling.name;
  check_features(name, features, sampling.boxes.dim() > 0 ? sampling.boxes.size(0) : 0);
  const Tensor& first = features.front();
  check_sampling(sampling, first);
  check_grad(sampling, grad, first.size(0), first.size(1));
  check_same_device(name, "the gradient", grad, first);
  const DeviceScope scope(first);

  const ScalarType type = first.scalar_type();
  const ScalarType pooled_type = type == ScalarType::Byte ? ScalarType::Float : type;
  const Layout layout = layout_of(first);
  Call call(sampling, type, first.size(0), first.size(1), features.size(), layout);
  const ScalarType coordinates =
      type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_boxes =
      make_empty(sampling.boxes, {sampling.boxes.size(0), sampling.boxes.size(1)}, coordinates);
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_boxes);
  } else {
    add_maps(call, sampling, features);
    call.set_pooled(
        sampling, grad.scalar_type() == pooled_type ? grad : torch::stable::to(grad, pooled_type));
    call.problem.grad_box = grad_boxes.mutable_data_ptr();
    call.problem.stream = scope.stream();
    const auto workspace =
        add_workspace(call, first, current_backend().grad_boxes_workspace(call.problem));
    current_backend().grad_boxes(call.problem);
  }
  const ScalarType boxes_type = sampling.boxes.scalar_type();
  return boxes_type == coordinates ? grad_boxes : torch::stable::to(grad_boxes, boxes_type);
}

}  // namespace glimpse::ops
