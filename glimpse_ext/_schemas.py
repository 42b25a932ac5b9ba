# SPDX-License-Identifier: BSD-3-Clause
"""The schemas of csrc/ops/library.cpp once more, for where that is not compiled.

The loader compares a library with their names, and the operators in plain PyTorch are registered
with them. tests/test_fallback.py compares each with the compiled one.
"""

_SAMPLING = (
    "Tensor boxes, Tensor? image_index, Tensor? levels, Tensor? tangent, int tangent_axes, "
    "SymInt[] output_size, int op, float[] params, float[] scales, float[] level_rule, float fill"
)
_FRAMES = (
    "Tensor boxes, Tensor? image_index, Tensor? tangent, Tensor? chosen, SymInt[] output_size, "
    "int[] params, float spatial_scale"
)

SCHEMAS = (
    "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "multiscale_roi_align(Tensor[] features, Tensor boxes, Tensor? levels, SymInt pooled_height, "
    "SymInt pooled_width, float[] scales, int sampling_ratio, bool aligned, float canonical_size, "
    "int canonical_level, int assign) -> Tensor",
    "crop(Tensor input, Tensor boxes, Tensor? image_index, SymInt height, SymInt width, int unit, "
    "bool align_corners, int padding) -> Tensor",
    "crop_and_resize(Tensor image, Tensor boxes, Tensor box_indices, SymInt height, SymInt width, "
    "bool align_corners, bool nearest, float extrapolation_value) -> Tensor",
    "point_sample(Tensor input, Tensor points, bool align_corners) -> Tensor",
    "_points_sample(Tensor input, Tensor points, bool align_corners) -> Tensor",
    "_points_gradients(Tensor grad, Tensor points, Tensor? input, bool align_corners, "
    "SymInt[] sizes, bool channels_last, bool to_input) -> Tensor[]",
    "extract_glimpse(Tensor input, Tensor offsets, Tensor? seed, SymInt height, SymInt width, "
    "int version, bool centered, bool normalized, int noise) -> Tensor",
    "subpixel_glimpse(Tensor input, Tensor offsets, SymInt height, SymInt width, int version, "
    "bool centered, bool normalized, int scale) -> Tensor",
    "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, bool snapped) -> Tensor",
    "paste_masks_threshold(Tensor masks, Tensor boxes, SymInt height, SymInt width, "
    "float threshold, bool snapped) -> Tensor",
    "paste_masks_to_bits(Tensor masks, Tensor boxes, SymInt height, SymInt width, "
    "float threshold, bool snapped) -> Tensor",
    "_paste_masks_runs(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, "
    "bool snapped) -> (Tensor counts, Tensor ends, Tensor areas, Tensor boxes)",
    "crop_batch(Tensor[] images, Tensor boxes, Tensor? image_index, SymInt height, SymInt width, "
    "bool antialias, bool beyond, bool edge, float fill, float[] multiplier, float[] offset, "
    "int dtype, bool channels_last) -> Tensor",
    f"_sample(Tensor[] features, {_SAMPLING}) -> Tensor",
    f"_sample_grad_features(Tensor grad, {_SAMPLING}, SymInt[] sizes, bool channels_last) "
    "-> Tensor[]",
    f"_sample_grad_boxes(Tensor[] features, Tensor grad, {_SAMPLING}) -> Tensor",
    "roi_align_rotated(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned, bool clockwise, bool degrees) "
    "-> Tensor",
    "roi_align_max(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> (Tensor output, Tensor samples)",
    f"_frames_sample(Tensor input, {_FRAMES}) -> Tensor",
    "_frames_maximum(Tensor input, Tensor boxes, Tensor? image_index, SymInt[] output_size, "
    "int[] params, float spatial_scale) -> (Tensor output, Tensor samples)",
    f"_frames_grad_features(Tensor grad, {_FRAMES}, SymInt[] sizes, bool channels_last) -> Tensor",
    f"_frames_grad_boxes(Tensor input, Tensor grad, {_FRAMES}) -> Tensor",
)

NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
