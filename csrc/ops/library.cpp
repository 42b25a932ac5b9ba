// SPDX-License-Identifier: BSD-3-Clause
// The table of contents: every schema, and which function runs it.
#include "ops/library.h"

#include <torch/csrc/stable/library.h>

#include "ops/checks.h"
#include "ops/crop.h"
#include "ops/crop_batch.h"
#include "ops/frames.h"
#include "ops/glimpse.h"
#include "ops/roi_align.h"
#include "ops/sample.h"

namespace glimpse::ops {

namespace {

// An operator as the generic entries carry it: kind, then its numbers.
NamedOperator decode_operator(int64_t kind, const std::vector<double>& params) {
  switch (kind) {
    case Operator::kRoiAlign:
      return decode_roi_align(params);
    case Operator::kCrop:
      return decode_crop(params);
    case Operator::kGlimpse:
      return decode_glimpse(params);
    case Operator::kGivenAxes:
      return {"paste_masks", Operator(GivenAxes{}), "origin y, origin x, step y, step x", true};
    case kCropBatchKind:
      return decode_crop_batch(params);
    default:
      fail("_sample", "does not know operator kind ", kind);
  }
}

Sampling decode(const Tensor& boxes, const std::optional<Tensor>& image_index,
                const std::optional<Tensor>& levels, const std::optional<Tensor>& tangent,
                int64_t tangent_axes, const std::vector<int64_t>& output_size, int64_t kind,
                const std::vector<double>& params, const std::vector<double>& scales,
                const std::vector<double>& level_rule, double fill) {
  const NamedOperator named = decode_operator(kind, params);
  check(output_size.size() == 2, named.name, "expects an output height and width, got ",
        output_size.size(), " numbers");
  Sampling sampling(named, boxes);
  sampling.image_index = image_index;
  sampling.levels = levels;
  sampling.tangent = tangent;
  sampling.tangent_axes = tangent_axes;
  sampling.out_height = output_size[0];
  sampling.out_width = output_size[1];
  sampling.scales = scales;
  sampling.fill = fill;
  check(level_rule.empty() || level_rule.size() == 3, named.name,
        "expects a level rule of 3 numbers (kind, canonical size, canonical level), got ",
        level_rule.size());
  if (!level_rule.empty()) {
    sampling.level_rule =
        make_level_rule(named.name, static_cast<int64_t>(level_rule[0]), level_rule[1],
                        static_cast<int64_t>(level_rule[2]), scales);
  } else {
    check(scales.size() == 1 || levels.has_value(), named.name,
          "expects a level rule or levels where there are several feature maps");
  }
  return sampling;
}

Tensor sample_entry(std::vector<Tensor> features, Tensor boxes, std::optional<Tensor> image_index,
                    std::optional<Tensor> levels, std::optional<Tensor> tangent,
                    int64_t tangent_axes, std::vector<int64_t> output_size, int64_t kind,
                    std::vector<double> params, std::vector<double> scales,
                    std::vector<double> level_rule, double fill) {
  return sample(decode(boxes, image_index, levels, tangent, tangent_axes, output_size, kind, params,
                       scales, level_rule, fill),
                features);
}

std::vector<Tensor> sample_grad_features_entry(
    Tensor grad, Tensor boxes, std::optional<Tensor> image_index, std::optional<Tensor> levels,
    std::optional<Tensor> tangent, int64_t tangent_axes, std::vector<int64_t> output_size,
    int64_t kind, std::vector<double> params, std::vector<double> scales,
    std::vector<double> level_rule, double fill, std::vector<int64_t> sizes, bool channels_last) {
  return sample_grad_features(decode(boxes, image_index, levels, tangent, tangent_axes, output_size,
                                     kind, params, scales, level_rule, fill),
                              grad, sizes, channels_last);
}

Tensor sample_grad_boxes_entry(std::vector<Tensor> features, Tensor grad, Tensor boxes,
                               std::optional<Tensor> image_index, std::optional<Tensor> levels,
                               std::optional<Tensor> tangent, int64_t tangent_axes,
                               std::vector<int64_t> output_size, int64_t kind,
                               std::vector<double> params, std::vector<double> scales,
                               std::vector<double> level_rule, double fill) {
  return sample_grad_boxes(decode(boxes, image_index, levels, tangent, tangent_axes, output_size,
                                  kind, params, scales, level_rule, fill),
                           features, grad);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
  m.impl("crop", TORCH_BOX(&crop));
  m.impl("crop_and_resize", TORCH_BOX(&crop_and_resize));
  m.impl("point_sample", TORCH_BOX(&point_sample));
  m.impl("_points_sample", TORCH_BOX(&points_sample));
  m.impl("_points_gradients", TORCH_BOX(&points_gradients));
  m.impl("extract_glimpse", TORCH_BOX(&extract_glimpse));
  m.impl("subpixel_glimpse", TORCH_BOX(&subpixel_glimpse));
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
  m.impl("paste_masks_threshold", TORCH_BOX(&paste_masks_threshold));
  m.impl("paste_masks_to_bits", TORCH_BOX(&paste_masks_to_bits));
  m.impl("_paste_masks_runs", TORCH_BOX(&paste_masks_runs));
  m.impl("crop_batch", TORCH_BOX(&crop_batch));
  m.impl("_sample", TORCH_BOX(&sample_entry));
  m.impl("_sample_grad_features", TORCH_BOX(&sample_grad_features_entry));
  m.impl("_sample_grad_boxes", TORCH_BOX(&sample_grad_boxes_entry));
  m.impl("roi_align_rotated", TORCH_BOX(&roi_align_rotated));
  m.impl("roi_align_max", TORCH_BOX(&roi_align_max));
  m.impl("_frames_sample", TORCH_BOX(&frames_sample));
  m.impl("_frames_maximum", TORCH_BOX(&frames_maximum));
  m.impl("_frames_grad_features", TORCH_BOX(&frames_grad_features));
  m.impl("_frames_grad_boxes", TORCH_BOX(&frames_grad_boxes));
}

}  // namespace

#if defined(GLIMPSE_CUDA_LIBRARY)

STABLE_TORCH_LIBRARY_IMPL(glimpse_ext, CUDA, m) { register_kernels(m); }

#else

// Sampling arguments of the generic operators, which carry every derivative of the named ones:
// tangent_axes says which axes (1: y, 2: x) use the derivative of their weights along `tangent`.
#define GLIMPSE_SAMPLING_SCHEMA                                                            \
  "Tensor boxes, Tensor? image_index, Tensor? levels, Tensor? tangent, int tangent_axes, " \
  "SymInt[] output_size, int op, float[] params, float[] scales, float[] level_rule, float fill"

// The same for operators on frames (frame_problem.h): `tangent` makes every weight its derivative
// along that motion, `chosen` takes one sample of a cell instead of their mean.
#define GLIMPSE_FRAMES_SCHEMA                                                                  \
  "Tensor boxes, Tensor? image_index, Tensor? tangent, Tensor? chosen, SymInt[] output_size, " \
  "int[] params, float spatial_scale"

STABLE_TORCH_LIBRARY(glimpse_ext, m) {
  m.def(
      "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
      "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "multiscale_roi_align(Tensor[] features, Tensor boxes, Tensor? levels, "
      "SymInt pooled_height, SymInt pooled_width, float[] scales, int sampling_ratio, "
      "bool aligned, float canonical_size, int canonical_level, int assign) -> Tensor");
  m.def(
      "crop(Tensor input, Tensor boxes, Tensor? image_index, SymInt height, SymInt width, "
      "int unit, bool align_corners, int padding) -> Tensor");
  m.def(
      "crop_and_resize(Tensor image, Tensor boxes, Tensor box_indices, SymInt height, "
      "SymInt width, bool align_corners, bool nearest, float extrapolation_value) -> Tensor");
  m.def("point_sample(Tensor input, Tensor points, bool align_corners) -> Tensor");
  m.def("_points_sample(Tensor input, Tensor points, bool align_corners) -> Tensor");
  m.def(
      "_points_gradients(Tensor grad, Tensor points, Tensor? input, bool align_corners, "
      "SymInt[] sizes, bool channels_last, bool to_input) -> Tensor[]");
  m.def(
      "extract_glimpse(Tensor input, Tensor offsets, Tensor? seed, SymInt height, SymInt width, "
      "int version, bool centered, bool normalized, int noise) -> Tensor");
  m.def(
      "subpixel_glimpse(Tensor input, Tensor offsets, SymInt height, SymInt width, int version, "
      "bool centered, bool normalized, int scale) -> Tensor");
  m.def(
      "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, bool snapped) -> "
      "Tensor");
  m.def(
      "paste_masks_threshold(Tensor masks, Tensor boxes, SymInt height, SymInt width, "
      "float threshold, bool snapped) -> Tensor");
  m.def(
      "paste_masks_to_bits(Tensor masks, Tensor boxes, SymInt height, SymInt width, "
      "float threshold, bool snapped) -> Tensor");
  m.def(
      "_paste_masks_runs(Tensor masks, Tensor boxes, SymInt height, SymInt width, "
      "float threshold, bool snapped) -> (Tensor counts, Tensor ends, Tensor areas, Tensor boxes)");
  m.def(
      "crop_batch(Tensor[] images, Tensor boxes, Tensor? image_index, SymInt height, SymInt width, "
      "bool antialias, bool beyond, bool edge, float fill, float[] multiplier, float[] offset, "
      "int dtype, bool channels_last) -> Tensor");
  m.def("_sample(Tensor[] features, " GLIMPSE_SAMPLING_SCHEMA ") -> Tensor");
  m.def("_sample_grad_features(Tensor grad, " GLIMPSE_SAMPLING_SCHEMA
        ", SymInt[] sizes, bool channels_last) -> Tensor[]");
  m.def("_sample_grad_boxes(Tensor[] features, Tensor grad, " GLIMPSE_SAMPLING_SCHEMA
        ") -> Tensor");
  m.def(
      "roi_align_rotated(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
      "SymInt pooled_width, int sampling_ratio, bool aligned, bool clockwise, bool degrees) "
      "-> Tensor");
  m.def(
      "roi_align_max(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
      "SymInt pooled_width, int sampling_ratio, bool aligned) -> (Tensor output, Tensor samples)");
  m.def("_frames_sample(Tensor input, " GLIMPSE_FRAMES_SCHEMA ") -> Tensor");
  m.def(
      "_frames_maximum(Tensor input, Tensor boxes, Tensor? image_index, SymInt[] output_size, "
      "int[] params, float spatial_scale) -> (Tensor output, Tensor samples)");
  m.def("_frames_grad_features(Tensor grad, " GLIMPSE_FRAMES_SCHEMA
        ", SymInt[] sizes, bool channels_last) -> Tensor");
  m.def("_frames_grad_boxes(Tensor input, Tensor grad, " GLIMPSE_FRAMES_SCHEMA ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glimpse_ext, CPU, m) { register_kernels(m); }

#endif

}  // namespace glimpse::ops

#if !defined(GLIMPSE_BUILD_VERSION)
#define GLIMPSE_BUILD_VERSION "unknown"
#endif
#if !defined(GLIMPSE_BUILD_TORCH)
#define GLIMPSE_BUILD_TORCH "unknown"
#endif
#if !defined(GLIMPSE_BUILD_CUDA)
#define GLIMPSE_BUILD_CUDA "none"
#endif
#if !defined(GLIMPSE_BUILD_ARCHS)
#define GLIMPSE_BUILD_ARCHS "none"
#endif

/// What this library was built from, as "key: value" lines.
extern "C" __attribute__((visibility("default"))) const char* glimpse_build_info() {
  return "version: " GLIMPSE_BUILD_VERSION
         "\n"
         "torch headers: " GLIMPSE_BUILD_TORCH
         "\n"
         "CUDA: " GLIMPSE_BUILD_CUDA
         "\n"
         "CUDA architectures: " GLIMPSE_BUILD_ARCHS
         "\n"
         "compiler: " __VERSION__;
}
