// SPDX-License-Identifier: BSD-3-Clause
#include "ops/checks.h"

#include <torch/csrc/stable/device.h>

namespace glimpse::ops {

std::ostream& operator<<(std::ostream& text, DescribedShape shape) {
  text << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    text << (i > 0 ? ", " : "") << shape.tensor.size(i);
  }
  return text << ']';
}

const char* describe_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

std::ostream& operator<<(std::ostream& text, DescribedDevice described) {
  const torch::stable::Device device = described.tensor.device();
  if (device.is_cpu()) return text << "cpu";
  if (device.is_cuda()) return text << "cuda:" << static_cast<int>(device.index());
  return text << "device type " << static_cast<int>(device.type());
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

Dtype storage_dtype(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Byte:
      return Dtype::kUInt8;
    default:
      fail(name, "features must be float64, float32, float16, bfloat16 or uint8, got ",
           describe_dtype(type));
  }
}

void check_same_device(const char* name, const char* what, const Tensor& tensor,
                       const Tensor& like) {
  const torch::stable::Device a = tensor.device(), b = like.device();
  check(a.type() == b.type() && a.index() == b.index(), name, what,
        " must be on the device of the features, ", describe_device(like), ", got ",
        describe_device(tensor));
}

void check_features(const char* name, const std::vector<Tensor>& features, int64_t boxes) {
  check(!features.empty(), name, "expects at least one feature map, got none");
  check(static_cast<int64_t>(features.size()) <= kMaxLevels, name, "takes at most ", kMaxLevels,
        " feature maps, got ", features.size());
  const Tensor& first = features.front();
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& map = features[i];
    check(map.dim() == 4, name, "input must be [N, C, H, W], got ", describe_shape(map));
    storage_dtype(name, map.scalar_type());
    check(map.scalar_type() == first.scalar_type(), name, "feature maps must have one dtype, got ",
          describe_dtype(first.scalar_type()), " and ", describe_dtype(map.scalar_type()));
    check(map.size(0) == first.size(0) && map.size(1) == first.size(1), name,
          "feature maps must have one batch size and channel count, got ", describe_shape(first),
          " and ", describe_shape(map));
    check_same_device(name, "every feature map", map, first);
    check(boxes == 0 || (map.size(2) > 0 && map.size(3) > 0), name,
          "input must have at least one pixel to read boxes from, got ", describe_shape(map));
    check(map.size(2) <= 0x7fffff00 && map.size(3) <= 0x7fffff00, name,
          "input height and width must fit in 32 bits, got ", describe_shape(map));
  }
}

void check_boxes(const char* name, const Tensor& boxes, const std::optional<Tensor>& image_index,
                 const BoxRows& rows, const Tensor& like) {
  if (image_index.has_value()) {
    check(boxes.dim() == 2 && boxes.size(1) == rows.columns, name, "boxes must be [K, ",
          rows.columns, "] (", rows.meaning, ") beside an image index, got ",
          describe_shape(boxes));
    check_index(name, "the image index", *image_index, boxes.size(0), like);
  } else {
    const bool fits = boxes.dim() == 2 && (boxes.size(1) == rows.columns + 1 ||
                                           (rows.even && boxes.size(1) == rows.columns));
    check(fits, name, "boxes must be [K, ", rows.columns + 1, "] (image, ", rows.meaning, ")",
          rows.even ? " or the same without image, as many for each" : "", ", got ",
          describe_shape(boxes));
  }
  check(is_float(boxes.scalar_type()), name,
        "boxes must be float64, float32, float16 or bfloat16, got ",
        describe_dtype(boxes.scalar_type()));
  check_same_device(name, "boxes", boxes, like);
}

void check_index(const char* name, const char* what, const Tensor& index, int64_t boxes,
                 const Tensor& like) {
  check(index.dim() == 1 && index.size(0) == boxes, name, what, " must be [", boxes,
        "], one entry for each box, got ", describe_shape(index));
  const ScalarType type = index.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, name, what,
        " must be int64 or int32, got ", describe_dtype(type));
  check_same_device(name, what, index, like);
}

int64_t check_output_size(const char* name, int64_t size) {
  check(size >= 0 && size <= 0x7fffff00, name,
        "output size must be zero or more and fit in 32 bits, got ", size);
  return size;
}

namespace {

template <class T>
void check_image_index_as(const char* name, const Problem& problem) {
  if (problem.image_index == nullptr && problem.image_column == 0) return;
  for (int64_t k = 0; k < problem.boxes; ++k) {
    double index;
    bool valid;
    if (problem.image_index != nullptr) {
      index = static_cast<double>(problem.image_index[k]);
      valid = problem.image_index[k] >= 0 && problem.image_index[k] < problem.batch;
    } else {
      const T value = static_cast<const T*>(problem.box)[k * problem.box_columns];
      index = static_cast<double>(value);
      valid = value > T(-1) && value < static_cast<T>(problem.batch);
    }
    check(valid, name, "box ", k, " refers to image ", index, ", but the input has ", problem.batch,
          problem.batch == 1 ? " image" : " images");
  }
}

}  // namespace

void check_image_index(const char* name, const Problem& problem) {
  if (problem.dtype == Dtype::kFloat64) {
    check_image_index_as<double>(name, problem);
  } else {
    check_image_index_as<float>(name, problem);
  }
}

}  // namespace glimpse::ops
