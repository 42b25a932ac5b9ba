# SPDX-License-Identifier: BSD-3-Clause
"""What of other libraries is replaced, and by what: a table of names and functions.

A replacement has the parameters of the original under the same names, some of which callers look
up in its code. It says why the original should serve a call, if so; `Call` does the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library
from ._patch_calls import Call, Function
from .crop import crop, point_sample
from .paste_masks import paste_masks
from .roi_align import multiscale_roi_align, roi_align
from .roi_align_rotated import roi_align_rotated


@dataclass(frozen=True)
class Replacement:
    """A function of another library, or a method of a class, and what stands in for it."""

    module: str
    name: str
    make: Callable[[Call], Function]
    if_loaded: bool = False
    """Whether the module is left alone where nobody has imported it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Library:
    """What is replaced in one package."""

    replacements: tuple[Replacement, ...]
    remedy: str
    """What to do when it cannot be imported."""


MOST_LEVELS = 8
_DEVICES = {"cpu", "meta", *(["cuda"] if _library.cuda_path else [])}


def _left(*maps: Any) -> str | None:
    """Why the original serves a call on these maps, if it does."""
    if torch._C._get_tracing_state() is not None:
        return "traced by torch.jit"
    for one in maps:
        if not isinstance(one, Tensor):
            return f"{type(one).__name__} instead of a tensor"
        if one.is_quantized:
            return "quantised map"
        if one.device.type not in _DEVICES:
            return f"no operators for {one.device.type}"
    return None


def _left_pyramid(maps: Any) -> str | None:
    if not isinstance(maps, (list, tuple)) or len(maps) == 0:
        return "maps are not in a list"
    if len(maps) > MOST_LEVELS:
        return f"more than {MOST_LEVELS} levels"
    return _left(*maps)


# ------------------------------------------------------------------------------------- torchvision


def _torchvision_roi_align(call: Call) -> Function:
    def replacement(
        input: Tensor,
        boxes: Tensor | list[Tensor],
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Any:
        left = _left(input)
        return call(
            roi_align, left, input, boxes, output_size, spatial_scale, sampling_ratio, aligned
        )

    return replacement


def _torchvision_pooler(call: Call) -> Function:
    def ours(
        maps: list[Tensor],
        boxes: list[Tensor],
        output_size: Any,
        sampling_ratio: int,
        scales: list[float],
        mapper: Any,
    ) -> Any:
        if len(maps) == 1:
            return roi_align(maps[0], boxes, output_size, scales[0], sampling_ratio)
        own = (
            type(mapper).__name__ == "LevelMapper"
            and getattr(mapper, "eps", None) == 1e-6
            and mapper.k_max == mapper.k_min + len(scales) - 1
            and scales[0] == 2.0**-mapper.k_min
        )
        return multiscale_roi_align(
            maps,
            boxes,
            output_size,
            scales,
            sampling_ratio,
            canonical_size=mapper.s0 if own else 224,
            canonical_level=mapper.lvl0 if own else 4,
            levels=None if own else mapper(boxes),
        )

    def replacement(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: Any,
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Any:
        left = _left_pyramid(x_filtered)
        if scales is None or mapper is None:
            left = "scales are not set"
        return call(ours, left, x_filtered, boxes, output_size, sampling_ratio, scales, mapper)

    return replacement


def _torchvision_paste(call: Call) -> Function:
    def ours(masks: Tensor, boxes: Tensor, img_shape: Any, padding: int) -> Any:
        return paste_masks(masks, boxes.detach(), img_shape, threshold=None, method="torchvision")

    def replacement(masks: Tensor, boxes: Tensor, img_shape: Any, padding: int = 1) -> Any:
        left = _left(masks, boxes)
        if left is None and padding != 1:
            left = "padding other than 1"
        if left is None and not masks.is_floating_point():
            left = "masks of whole numbers"
        return call(ours, left, masks, boxes, img_shape, padding)

    return replacement


# -------------------------------------------------------------------------------------- detectron2


def _detectron2_roi_align(call: Call) -> Function:
    def ours(layer: Any, input: Tensor, rois: Tensor) -> Any:
        return roi_align(
            input,
            rois,
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )

    def replacement(self: Any, input: Tensor, rois: Tensor) -> Any:
        return call(ours, _left(input, rois), self, input, rois)

    return replacement


def _detectron2_rotated(call: Call) -> Function:
    def replacement(
        input: Tensor, roi: Tensor, output_size: Any, spatial_scale: float, sampling_ratio: int
    ) -> Any:
        left = _left(input, roi)
        return call(roi_align_rotated, left, input, roi, output_size, spatial_scale, sampling_ratio)

    return replacement


def _detectron2_rotated_layer(call: Call) -> Function:
    def ours(layer: Any, input: Tensor, rois: Tensor) -> Any:
        return roi_align_rotated(
            input, rois, layer.output_size, layer.spatial_scale, layer.sampling_ratio
        )

    def replacement(self: Any, input: Tensor, rois: Tensor) -> Any:
        return call(ours, _left(input, rois), self, input, rois)

    return replacement


def _detectron2_pooler(call: Call) -> Function:
    layers = importlib.import_module("detectron2.layers")
    poolers = importlib.import_module("detectron2.modeling.poolers")

    def ours(pooler: Any, maps: list[Tensor], box_lists: list[Any]) -> Any:
        first = pooler.level_poolers[0]
        boxes = [boxes.tensor for boxes in box_lists]
        if len(maps) == 1:
            return roi_align(
                maps[0],
                boxes,
                first.output_size,
                first.spatial_scale,
                first.sampling_ratio,
                first.aligned,
            )
        levels = None
        if maps[0].dtype != boxes[0].dtype and torch.float64 in (maps[0].dtype, boxes[0].dtype):
            # Ours are chosen in the dtype of coordinates, theirs in that of boxes.
            levels = poolers.assign_boxes_to_levels(
                box_lists,
                pooler.min_level,
                pooler.max_level,
                pooler.canonical_box_size,
                pooler.canonical_level,
            )
        return multiscale_roi_align(
            maps,
            boxes,
            pooler.output_size,
            [level.spatial_scale for level in pooler.level_poolers],
            first.sampling_ratio,
            first.aligned,
            pooler.canonical_box_size,
            pooler.canonical_level,
            "detectron2",
            levels=levels,
        )

    def replacement(self: Any, x: list[Tensor], box_lists: list[Any]) -> Any:
        left = _left_pyramid(x)
        if left is None:
            if not isinstance(x, list) or not isinstance(box_lists, list):
                left = "maps or boxes are not in a list"
            elif len(x) != len(self.level_poolers) or not 0 < len(box_lists) == len(x[0]):
                left = "numbers of maps, images and lists of boxes do not fit"
            elif any(type(level) is not layers.ROIAlign for level in self.level_poolers):
                left = f"levels are {type(self.level_poolers[0]).__name__}"
        return call(ours, left, self, x, box_lists)

    return replacement


def _detectron2_paste(call: Call) -> Function:
    def ours(masks: Tensor, boxes: Any, image_shape: Any, threshold: float) -> Any:
        height, width = image_shape
        boxes = boxes if isinstance(boxes, Tensor) else boxes.tensor
        return paste_masks(masks, boxes, (int(height), int(width)), threshold)

    def replacement(masks: Tensor, boxes: Any, image_shape: Any, threshold: float = 0.5) -> Any:
        left = _left(masks)
        if left is None and len(masks) == 0:
            left = "no masks"
        return call(ours, left, masks, boxes, image_shape, threshold)

    return replacement


# Of both libraries: the first keyword is not an argument of ours.


def _left_points(input: Any, points: Any, kwargs: dict[str, Any]) -> str | None:
    left = _left(input, points)
    if left is None and kwargs:
        left = f"{', '.join(sorted(kwargs))} given"
    if left is None and (input.dim() != 4 or points.dim() not in (3, 4)):
        left = "not images and their points"
    return left


def _points(input: Tensor, points: Tensor, align_corners: bool | None = None) -> Tensor:
    flat = points.flatten(1, 2) if points.dim() == 4 else points
    # In the memory order of grid_sample, which callers may take a view of.
    values = point_sample(input, flat, bool(align_corners)).contiguous()
    return values.unflatten(2, points.shape[1:3]) if points.dim() == 4 else values


def _detectron2_points(call: Call) -> Function:
    def replacement(input: Tensor, point_coords: Tensor, **kwargs: Any) -> Any:
        others = {name: value for name, value in kwargs.items() if name != "align_corners"}
        left = _left_points(input, point_coords, others)
        return call(_points, left, input, point_coords, **kwargs)

    return replacement


# -------------------------------------------------------------------------------------------- mmcv


def _mmcv_roi_align(call: Call) -> Function:
    def ours(
        input: Tensor,
        rois: Tensor,
        output_size: Any,
        spatial_scale: float,
        sampling_ratio: int,
        pool_mode: str,
        aligned: bool,
    ) -> Any:
        mode = "max" if pool_mode == "max" else "mean"
        return roi_align(
            input, rois, output_size, spatial_scale, sampling_ratio, aligned, mode=mode
        )

    def replacement(
        input: Tensor,
        rois: Tensor,
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
    ) -> Any:
        left = _left(input, rois)
        if left is None and pool_mode not in ("avg", "max"):
            left = f"pool_mode {pool_mode!r}"
        return call(
            ours, left, input, rois, output_size, spatial_scale, sampling_ratio, pool_mode, aligned
        )

    return replacement


def _mmcv_rotated_ours(
    input: Tensor,
    rois: Tensor,
    output_size: Any,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Tensor:
    return roi_align_rotated(
        input,
        rois,
        output_size,
        spatial_scale,
        sampling_ratio,
        aligned,
        clockwise,
        angle_unit="radians",
    )


def _mmcv_rotated(call: Call) -> Function:
    def replacement(
        input: Tensor,
        rois: Tensor,
        output_size: Any,
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = True,
        clockwise: bool = False,
    ) -> Any:
        return call(
            _mmcv_rotated_ours,
            _left(input, rois),
            input,
            rois,
            output_size,
            spatial_scale,
            sampling_ratio,
            aligned,
            clockwise,
        )

    return replacement


def _mmcv_rotated_layer(call: Call) -> Function:
    def ours(layer: Any, input: Tensor, rois: Tensor) -> Any:
        return _mmcv_rotated_ours(
            input,
            rois,
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
            layer.clockwise,
        )

    def replacement(self: Any, input: Tensor, rois: Tensor) -> Any:
        return call(ours, _left(input, rois), self, input, rois)

    return replacement


def _mmcv_points(call: Call) -> Function:
    def replacement(
        input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any
    ) -> Any:
        left = _left_points(input, points, kwargs)
        return call(_points, left, input, points, align_corners, **kwargs)

    return replacement


def _mmcv_simple_layer(call: Call) -> Function:
    def ours(layer: Any, features: Tensor, rois: Tensor) -> Any:
        corners = rois[:, 1:].detach() * layer.spatial_scale
        if not layer.aligned:
            # Theirs count fractions of the image from the centre of its first pixel to that of
            # its last.
            height, width = features.shape[2:]
            shrink = [(width - 1) / width, (height - 1) / height] * 2
            corners = corners * corners.new_tensor(shrink) + 0.5
        boxes = torch.cat([rois[:, :1].detach(), corners], dim=1)
        return crop(features, boxes, layer.output_size, box_format="pixels")

    def replacement(self: Any, features: Tensor, rois: Tensor) -> Any:
        return call(ours, _left(features, rois), self, features, rois)

    return replacement


LIBRARIES = {
    "torchvision": Library(
        (
            Replacement("torchvision.ops.roi_align", "roi_align", _torchvision_roi_align),
            Replacement("torchvision.ops.poolers", "_multiscale_roi_align", _torchvision_pooler),
            Replacement(
                "torchvision.models.detection.roi_heads", "paste_masks_in_image", _torchvision_paste
            ),
        ),
        "install the torchvision that belongs to this torch",
    ),
    "detectron2": Library(
        (
            Replacement("detectron2.layers.roi_align", "ROIAlign.forward", _detectron2_roi_align),
            Replacement(
                "detectron2.layers.roi_align_rotated", "roi_align_rotated", _detectron2_rotated
            ),
            Replacement(
                "detectron2.layers.roi_align_rotated",
                "ROIAlignRotated.forward",
                _detectron2_rotated_layer,
            ),
            Replacement("detectron2.modeling.poolers", "ROIPooler.forward", _detectron2_pooler),
            Replacement("detectron2.layers.mask_ops", "paste_masks_in_image", _detectron2_paste),
            # Importing it registers PointRend's heads, which may be loaded under another name.
            Replacement(
                "detectron2.projects.point_rend.point_features",
                "point_sample",
                _detectron2_points,
                if_loaded=True,
            ),
        ),
        "its Python files are enough; its compiled extension is not needed for what is replaced",
    ),
    "mmcv": Library(
        (
            Replacement("mmcv.ops.roi_align", "roi_align", _mmcv_roi_align),
            Replacement("mmcv.ops.roi_align_rotated", "roi_align_rotated", _mmcv_rotated),
            Replacement(
                "mmcv.ops.roi_align_rotated", "RoIAlignRotated.forward", _mmcv_rotated_layer
            ),
            Replacement("mmcv.ops.point_sample", "point_sample", _mmcv_points),
            Replacement("mmcv.ops.point_sample", "SimpleRoIAlign.forward", _mmcv_simple_layer),
        ),
        "mmcv-lite has no operators; install mmcv with its extension built for this torch",
    ),
}
