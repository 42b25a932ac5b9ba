// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "ops/config.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace glimpse::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws "<name>: <parts...>". Errors are runtime_error only: libtorch versions disagree on the
/// Python type of the others.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* name, const Parts&... parts) {
  std::ostringstream text;
  text << name << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool condition, const char* name, const Parts&... parts) {
  if (!condition) fail(name, parts...);
}

/// Parts of an error that cost something to put into words: they are, when the error is thrown.
struct DescribedShape {  // [2, 3, 8, 8]
  const Tensor& tensor;
};
struct DescribedDevice {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& text, DescribedShape shape);
std::ostream& operator<<(std::ostream& text, DescribedDevice device);

inline DescribedShape describe_shape(const Tensor& tensor) { return {tensor}; }
inline DescribedDevice describe_device(const Tensor& tensor) { return {tensor}; }
const char* describe_dtype(ScalarType type);

/// Features: 4-D, of one supported dtype, one device, one batch size and one channel count, with
/// at least one pixel where there are boxes to read it.
void check_features(const char* name, const std::vector<Tensor>& features, int64_t boxes);

/// What the rows of a box tensor may be.
struct BoxRows {
  int32_t columns;      // without an image column
  const char* meaning;  // of the columns, for errors
  bool even;            // whether image indices may be left out: as many boxes for each image
};

/// Boxes: [K, columns + 1] with the image index in column 0, or [K, columns] with an index apart or
/// as many boxes for each image.
void check_boxes(const char* name, const Tensor& boxes, const std::optional<Tensor>& image_index,
                 const BoxRows& rows, const Tensor& like);

/// A [K] integer tensor on the same device.
void check_index(const char* name, const char* what, const Tensor& index, int64_t boxes,
                 const Tensor& like);

void check_same_device(const char* name, const char* what, const Tensor& tensor,
                       const Tensor& like);

int64_t check_output_size(const char* name, int64_t size);

/// Every image index of `problem` lies inside the batch. Reads the boxes: host memory only.
void check_image_index(const char* name, const Problem& problem);

bool is_float(ScalarType type);
Dtype storage_dtype(const char* name, ScalarType type);

}  // namespace glimpse::ops
