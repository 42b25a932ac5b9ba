# SPDX-License-Identifier: BSD-3-Clause
"""The operators as modules, with the constructor arguments of the modules that they replace.

Modules have no parameters and no state: what they compute depends on their arguments and the call,
never on an earlier call.

>>> import torch, glimpse_ext.nn
>>> pool = glimpse_ext.nn.RoIAlign((7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)
>>> pool
RoIAlign(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)
>>> pool(torch.randn(1, 8, 16, 16), [torch.tensor([[4.0, 4.0, 40.0, 36.0]])]).shape
torch.Size([1, 8, 7, 7])
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._arguments import size_pair
from .crop import crop, crop_and_resize
from .crop_batch import crop_batch
from .roi_align import multiscale_roi_align, roi_align

__all__ = [
    "Crop",
    "CropAndResize",
    "CropBatch",
    "Glimpse",
    "MultiScaleRoIAlign",
    "PasteMasks",
    "ROIPooler",
    "RoIAlign",
    "RoIAlignRotated",
]


def _public(name: str) -> Callable[..., Tensor]:
    """A function of the package, looked up when it is called."""
    import glimpse_ext

    function: Callable[..., Tensor] = getattr(glimpse_ext, name)
    return function


class _Sampler(nn.Module):
    """A module that shows its arguments."""

    _shown: tuple[str, ...] = ()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)


class RoIAlign(_Sampler):
    """:func:`glimpse_ext.roi_align` as ``torchvision.ops.RoIAlign``.

    Args:
        output_size: cells per box, ``height, width`` or one number for both.
        spatial_scale: feature map pixels per image pixel.
        sampling_ratio: samples per cell and direction; 0 or less is adaptive.
        aligned: whether box edges are edges (True, detectron2), or are read half a pixel late.
        mode: ``"mean"`` of the samples of a cell, or another reduction of ``roi_align``.

    Differences from torchvision: ``spatial_scale``, ``sampling_ratio`` and ``aligned`` have the
    defaults of the function, and ``mode``.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
        mode: str = "mean",
    ) -> None:
        super().__init__()
        self.output_size = size_pair("RoIAlign", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.mode = mode
        self._shown = ("output_size", "spatial_scale", "sampling_ratio", "aligned")
        if mode != "mean":
            self._shown += ("mode",)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """``[K, C, height, width]`` from ``[N, C, H, W]`` and boxes as in ``roi_align``."""
        # The mean is the default, and all that the function has to know.
        pool: Callable[..., Tensor] = roi_align
        reduction = {} if self.mode == "mean" else {"mode": self.mode}
        return pool(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            **reduction,
        )


class RoIAlignRotated(_Sampler):
    """``glimpse_ext.roi_align_rotated`` as detectron2's ``ROIAlignRotated``; mmcv's arguments too.

    Args:
        output_size: cells per box, ``height, width`` or one number for both.
        spatial_scale: feature map pixels per image pixel.
        sampling_ratio: samples per cell and direction; 0 or less is adaptive.
        aligned: whether the centre of a box is in edge units, or is read half a pixel late.
        clockwise: the direction of positive angles.
        angle_unit: ``"degrees"`` (detectron2) or ``"radians"`` (mmcv).
    """

    _shown = (
        "output_size",
        "spatial_scale",
        "sampling_ratio",
        "aligned",
        "clockwise",
        "angle_unit",
    )

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = True,
        clockwise: bool = False,
        angle_unit: str = "degrees",
    ) -> None:
        super().__init__()
        self.output_size = size_pair("RoIAlignRotated", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.clockwise = clockwise
        self.angle_unit = angle_unit

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """``[K, C, height, width]`` from ``[K, 6]`` image, x, y, width, height, angle."""
        return _public("roi_align_rotated")(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            self.clockwise,
            self.angle_unit,
        )


class MultiScaleRoIAlign(_Sampler):
    """:func:`glimpse_ext.multiscale_roi_align` as ``torchvision.ops.MultiScaleRoIAlign``.

    Args:
        featmap_names: keys of the feature maps to read, in the order of the mapping.
        output_size: cells per box, ``height, width`` or one number for both.
        sampling_ratio: samples per cell and direction; 0 or less is adaptive.
        canonical_scale: box side that belongs to ``canonical_level``, in image pixels.
        canonical_level: level number, minus log2 of the scale.

    The scale of a map is the power of two next to its height over that of the largest image, as in
    torchvision. Difference from torchvision: it is found anew in each call, not kept from the first
    one for the life of the module, so images of another size are read at the right places.
    """

    _shown = ("featmap_names", "output_size", "sampling_ratio")

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = size_pair("MultiScaleRoIAlign", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(
        self,
        x: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        image_shapes: Sequence[Sequence[int]],
    ) -> Tensor:
        """``[K, C, height, width]``, the boxes of the first image first.

        x: maps by name.   boxes: one ``[L, 4]`` of x1, y1, x2, y2 for each image, in image pixels.
        image_shapes: height and width of each image.
        """
        maps = [value for key, value in x.items() if key in self.featmap_names]
        if not maps:
            raise ValueError(
                f"MultiScaleRoIAlign: expects maps named {self.featmap_names}, got {list(x)}"
            )
        if len(image_shapes) == 0:
            raise ValueError("MultiScaleRoIAlign: expects at least one image shape, got []")
        height = max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(value.shape[-2] / height)) for value in maps]
        return multiscale_roi_align(
            maps,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            canonical_size=self.canonical_scale,
            canonical_level=self.canonical_level,
        )


class ROIPooler(_Sampler):
    """:func:`glimpse_ext.multiscale_roi_align` as detectron2's ``ROIPooler``.

    Args:
        output_size: cells per box, ``height, width`` or one number for both.
        scales: of the levels, finest first: consecutive powers of two.
        sampling_ratio: samples per cell and direction; 0 or less is adaptive.
        pooler_type: ``"ROIAlignV2"`` (box edges are edges), ``"ROIAlign"`` (half a pixel late) or
            ``"ROIAlignRotated"``. There is no ``"ROIPool"``.
        canonical_box_size: box side that belongs to ``canonical_level``, in image pixels.
        canonical_level: level number, minus log2 of the scale.

    Difference from detectron2: several levels may have an output that is not square.
    """

    _shown = ("output_size", "scales", "sampling_ratio", "pooler_type")

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        name = "ROIPooler"
        if pooler_type not in ("ROIAlign", "ROIAlignV2", "ROIAlignRotated"):
            raise ValueError(
                f"{name}: pooler_type must be one of ROIAlign, ROIAlignV2, ROIAlignRotated, "
                f"got {pooler_type!r}"
            )
        self.output_size = size_pair(name, output_size)
        self.scales = [float(scale) for scale in scales]
        levels = [-math.log2(scale) for scale in self.scales]
        if not levels or any(abs(a - levels[0] - i) > 1e-6 for i, a in enumerate(levels)):
            raise ValueError(f"{name}: scales must halve from level to level, got {list(scales)}")
        if abs(levels[0] - round(levels[0])) > 1e-6:
            raise ValueError(f"{name}: scales must be powers of two, got {list(scales)}")
        if canonical_box_size <= 0:
            raise ValueError(
                f"{name}: canonical_box_size must be positive, got {canonical_box_size}"
            )
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """``[K, C, height, width]``, the boxes of the first image first.

        x: one map for each scale.   box_lists: for each image ``[L, 4]`` of x1, y1, x2, y2, or
        ``[L, 5]`` of x, y, width, height, angle where they are rotated; or detectron2's ``Boxes``.
        """
        if len(x) != len(self.scales):
            raise ValueError(
                f"ROIPooler: expects {len(self.scales)} maps, one for each scale, got {len(x)}"
            )
        if len(box_lists) == 0:
            return x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        boxes = [own if isinstance(own, Tensor) else own.tensor for own in box_lists]
        if self.pooler_type == "ROIAlignRotated":
            return self._rotated(x, boxes)
        return multiscale_roi_align(
            x,
            boxes,
            self.output_size,
            self.scales,
            self.sampling_ratio,
            aligned=self.pooler_type == "ROIAlignV2",
            canonical_size=self.canonical_box_size,
            canonical_level=self.canonical_level,
            assign="detectron2",
        )

    def _rotated(self, x: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        pool = _public("roi_align_rotated")
        rows = torch.cat(
            [nn.functional.pad(own, (1, 0), value=float(i)) for i, own in enumerate(boxes)]
        )
        if len(x) == 1:
            return pool(x[0], rows, self.output_size, self.scales[0], self.sampling_ratio)
        corners = nn.functional.pad(rows[:, 3:5], (2, 0))
        levels = reference.assign_levels(
            corners, self.scales, self.canonical_box_size, self.canonical_level, "detectron2"
        )
        index = [torch.nonzero(levels == level)[:, 0] for level in range(len(x))]
        parts = [
            pool(features, rows[own], self.output_size, scale, self.sampling_ratio)
            for features, own, scale in zip(x, index, self.scales, strict=True)
        ]
        pooled = parts[0].new_zeros(len(rows), *parts[0].shape[1:])
        return pooled.index_copy(0, torch.cat(index), torch.cat(parts))


class Crop(_Sampler):
    """:func:`glimpse_ext.crop`: a bilinear crop of each box.

    Args:
        size: cells, ``height, width`` or one number for both.
        box_format: ``"normalized"`` or ``"pixels"``.
        align_corners: whether the ends of boxes are pixel centres and outer samples.
        padding_mode: ``"zeros"`` or ``"border"``.
    """

    _shown = ("size", "box_format", "align_corners", "padding_mode")

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        box_format: str = "normalized",
        align_corners: bool = False,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.size = size_pair("Crop", size)
        self.box_format = box_format
        self.align_corners = align_corners
        self.padding_mode = padding_mode

    def forward(
        self,
        input: Tensor,
        boxes: Tensor | Sequence[Tensor],
        image_index: Tensor | None = None,
    ) -> Tensor:
        """``[K, C, height, width]`` from ``[N, C, H, W]`` and boxes as in ``crop``."""
        return crop(
            input,
            boxes,
            self.size,
            box_format=self.box_format,
            align_corners=self.align_corners,
            padding_mode=self.padding_mode,
            image_index=image_index,
        )


class CropAndResize(_Sampler):
    """:func:`glimpse_ext.crop_and_resize`, with the arguments of ``tf.image.crop_and_resize``.

    Args:
        crop_size: cells, ``height, width`` or one number for both.
        method: ``"bilinear"`` or ``"nearest"``.
        extrapolation_value: what stands outside of the image.
        convention: ``"tf"`` or ``"half_pixel"``.
    """

    _shown = ("crop_size", "method", "extrapolation_value", "convention")

    def __init__(
        self,
        crop_size: int | Sequence[int],
        method: str = "bilinear",
        extrapolation_value: float = 0.0,
        *,
        convention: str = "tf",
    ) -> None:
        super().__init__()
        self.crop_size = size_pair("CropAndResize", crop_size)
        self.method = method
        self.extrapolation_value = extrapolation_value
        self.convention = convention

    def forward(self, image: Tensor, boxes: Tensor, box_indices: Tensor) -> Tensor:
        """``[K, C, height, width]`` from ``[N, C, H, W]``, ``[K, 4]`` and ``[K]``."""
        return crop_and_resize(
            image,
            boxes,
            box_indices,
            self.crop_size,
            self.method,
            self.extrapolation_value,
            convention=self.convention,
        )


class CropBatch(_Sampler):
    """:func:`glimpse_ext.crop_batch`: boxes of images as a batch for a network.

    Args:
        output_size: ``height, width`` or one number for both.
        options: the keyword arguments of ``crop_batch`` that are not tensors.
    """

    def __init__(self, output_size: int | Sequence[int], **options: Any) -> None:
        super().__init__()
        self.output_size = size_pair("CropBatch", output_size)
        known = inspect.signature(crop_batch).parameters
        for name in options:
            if name not in known or name in ("images", "boxes", "image_index"):
                raise TypeError(f"CropBatch: expects options of crop_batch, got {name!r}")
        self.options = options

    def extra_repr(self) -> str:
        shown = {"output_size": self.output_size, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        boxes: Tensor | Sequence[Tensor],
        image_index: Tensor | None = None,
    ) -> Tensor:
        """``[K, C, height, width]`` from images and boxes as in ``crop_batch``."""
        return crop_batch(images, boxes, self.output_size, image_index=image_index, **self.options)


class Glimpse(_Sampler):
    """``glimpse_ext.extract_glimpse``, with the arguments of ``tf.image.extract_glimpse``.

    Args:
        size: pixels of the window, ``height, width`` or one number for both.
        centered: whether offsets count from the middle of the image.
        normalized: whether offsets count in sizes of the image.
        noise: ``"uniform"``, ``"gaussian"`` or ``"zero"``, what stands outside of the image.
        version: of TensorFlow's operator, 1 or 2.
        mode: ``"exact"``: whole pixels as in TensorFlow, or ``"subpixel"``: differentiable.
        scales: pixels of the image along a pixel of the window, one glimpse for each.
        generator: of the noise.
    """

    _shown = ("size", "centered", "normalized", "noise", "version", "mode", "scales")

    def __init__(
        self,
        size: int | Sequence[int],
        centered: bool = True,
        normalized: bool = True,
        noise: str = "uniform",
        *,
        version: int = 2,
        mode: str = "exact",
        scales: Sequence[int] = (1,),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.size = size_pair("Glimpse", size)
        self.centered = centered
        self.normalized = normalized
        self.noise = noise
        self.version = version
        self.mode = mode
        self.scales = tuple(scales)
        self.generator = generator

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """Windows of ``[N, C, H, W]`` images at ``[N, 2]`` offsets y, x."""
        return _public("extract_glimpse")(
            input,
            self.size,
            offsets,
            self.centered,
            self.normalized,
            self.noise,
            version=self.version,
            mode=self.mode,
            scales=self.scales,
            generator=self.generator,
        )


class PasteMasks(_Sampler):
    """``glimpse_ext.paste_masks``: masks predicted in boxes, as masks of the image.

    Args:
        threshold: from which a value counts as inside; see the function for its special values.
        method: ``"detectron2"`` or ``"torchvision"``.
    """

    _shown = ("threshold", "method")

    def __init__(self, threshold: float | None = 0.5, method: str = "detectron2") -> None:
        super().__init__()
        self.threshold = threshold
        self.method = method

    def forward(self, masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> Tensor:
        """Masks of ``image_size`` from masks of boxes x1, y1, x2, y2 in edge units."""
        return _public("paste_masks")(masks, boxes, image_size, self.threshold, self.method)
