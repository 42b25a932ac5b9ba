// SPDX-License-Identifier: BSD-3-Clause
// Boxes of images, resized by a filter: crop_batch and its derivatives.
#include "ops/crop_batch.h"

#include "ops/checks.h"
#include "ops/library.h"

namespace glimpse::ops {

namespace {

constexpr const char* kName = "crop_batch";

NamedOperator make_crop_batch(bool antialias, bool beyond, bool edge) {
  Crop crop = {};
  crop.order = Crop::kXyxy;
  crop.unit = Unit::kPixels;
  crop.outside = Crop::kZeros;
  const FilterRule filter = {true, antialias, beyond, edge};
  return {kName, Operator(crop), "x1, y1, x2, y2", true, filter};
}

ScalarType result_type(int64_t code) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                                   ScalarType::Double};
  check(code >= 0 && code < 4, kName, "does not know dtype ", code);
  return kTypes[code];
}

/// One number for each channel, of those or of one for all.
std::vector<double> for_channels(const char* what, const std::vector<double>& numbers,
                                 int64_t channels) {
  const auto count = static_cast<int64_t>(numbers.size());
  check(count == 1 || count == channels, kName, what, " must be one number or one for each of ",
        channels, " channels, got ", count);
  return count == 1 ? std::vector<double>(static_cast<size_t>(channels), numbers[0]) : numbers;
}

}  // namespace

NamedOperator decode_crop_batch(const std::vector<double>& params) {
  check(params.size() == 3, kName, "expects 3 parameters, got ", params.size());
  return make_crop_batch(params[0] != 0, params[1] != 0, params[2] != 0);
}

Tensor crop_batch(std::vector<Tensor> images, Tensor boxes, std::optional<Tensor> image_index,
                  int64_t height, int64_t width, bool antialias, bool beyond, bool edge,
                  double fill, std::vector<double> multiplier, std::vector<double> offset,
                  int64_t dtype, bool channels_last) {
  Sampling sampling(make_crop_batch(antialias, beyond, edge), std::move(boxes));
  sampling.image_index = std::move(image_index);
  sampling.out_height = height;
  sampling.out_width = width;
  check(!images.empty(), kName, "expects at least one image, got none");
  check(images.front().dim() == 4, kName, "images must be [N, C, H, W], got ",
        describe_shape(images.front()));
  const int64_t channels = images.front().size(1);
  BatchResult result;
  result.type = result_type(dtype);
  result.layout = channels_last ? Layout::kNhwc : Layout::kNchw;
  result.fill = fill;
  result.multiplier = for_channels("multiplier", multiplier, channels);
  result.offset = for_channels("offset", offset, channels);
  return sample_batch(sampling, images, result);
}

}  // namespace glimpse::ops
