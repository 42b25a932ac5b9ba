# SPDX-License-Identifier: BSD-3-Clause
"""Boxes from any convention to any other: which place of a picture a number names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import choose


class _Linear(NamedTuple):
    """A number that depends on the size of the image along an axis."""

    constant: float
    per_pixel: float = 0.0

    def at(self, size: int) -> float:
        return self.constant + self.per_pixel * size


_ONE = _Linear(1)
_SIZE = _Linear(0, 1)
_HALF_SIZE = _Linear(0, 0.5)
_SIZE_LESS_ONE = _Linear(-1, 1)

# What the two numbers of an axis are.
_ENDS, _FIRST_EXTENT, _MIDDLE_EXTENT = range(3)


class _Convention(NamedTuple):
    """Along an axis, the number v is at ``zero + v * unit`` in edge units."""

    columns: tuple[int, int, int, int]
    """Of the two numbers along y, then of those along x."""
    zero: _Linear
    unit: _Linear
    form: int = _ENDS
    extent: _Linear = _ONE
    """Pixels in a unit of the extent, where there is one."""
    last: float = 0.0
    """How far the box goes on after its second number, in pixels."""
    on_samples: bool = False
    """Whether the ends of the box are its outer samples, and not the edges of its outer cells."""

    def to_edges(self, a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
        low = a * self.unit.at(size) + self.zero.at(size)
        if self.form == _ENDS:
            return low, b * self.unit.at(size) + (self.zero.at(size) + self.last)
        extent = b * self.extent.at(size)
        if self.form == _MIDDLE_EXTENT:
            low = low - extent / 2
        return low, low + extent

    def of_edges(self, low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
        unit, zero = self.unit.at(size), self.zero.at(size)
        if self.form == _ENDS:
            return (low - zero) / unit, (high - (zero + self.last)) / unit
        extent = high - low
        at = low + extent / 2 if self.form == _MIDDLE_EXTENT else low
        return (at - zero) / unit, extent / self.extent.at(size)


_XYXY, _YXYX = (1, 3, 0, 2), (0, 2, 1, 3)

_EDGES = _Convention(_XYXY, _Linear(0), _ONE)
_INDICES = _Convention(_XYXY, _Linear(0.5), _ONE)
_CENTRES = _Convention(_YXYX, _Linear(0.5), _SIZE_LESS_ONE, on_samples=True)
_MIDDLE = _Convention(_YXYX, _HALF_SIZE, _HALF_SIZE, _MIDDLE_EXTENT)

CONVENTIONS = {
    "torchvision": _EDGES,
    "torchvision_legacy": _INDICES,
    "onnx_half_pixel": _EDGES,
    "onnx_output_half_pixel": _INDICES,
    "onnx_resize": _CENTRES,
    "tf_crop_and_resize": _CENTRES,
    "tf_half_pixel": _Convention(_YXYX, _Linear(0), _SIZE),
    "tf_glimpse": _MIDDLE,
    "tf_glimpse_v1_normalized": _MIDDLE._replace(zero=_Linear(0), unit=_SIZE),
    "tf_glimpse_v1_centered": _MIDDLE._replace(unit=_Linear(0.5)),
    "tf_glimpse_v1": _MIDDLE._replace(zero=_Linear(0), unit=_ONE),
    "tf_glimpse_v2_normalized": _Convention(_YXYX, _Linear(0), _SIZE, _FIRST_EXTENT),
    "tf_glimpse_v2_centered": _Convention(_YXYX, _HALF_SIZE, _ONE, _FIRST_EXTENT),
    "tf_glimpse_v2": _Convention(_YXYX, _Linear(0), _ONE, _FIRST_EXTENT),
    "grid_sample": _Convention(_XYXY, _HALF_SIZE, _HALF_SIZE),
    "grid_sample_align_corners": _Convention(
        _XYXY, _HALF_SIZE, _Linear(-0.5, 0.5), on_samples=True
    ),
    "opencv": _INDICES,
    "coco": _Convention(_XYXY, _Linear(0), _ONE, _FIRST_EXTENT),
    "yolo": _Convention(_XYXY, _Linear(0), _SIZE, _MIDDLE_EXTENT, extent=_SIZE),
    "inclusive": _Convention(_XYXY, _Linear(0), _ONE, last=1),
    "pascal_voc": _Convention(_XYXY, _Linear(-1), _ONE, last=1),
}
"""Every convention by its name."""


def _pair(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, at least 1; symbolic sizes pass through."""
    name = "convert_boxes"
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    integers = all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not integers:
        raise TypeError(f"{name}: {argument} must be (height, width), two integers, got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"{name}: {argument} must be one or more, got {value!r}")
    return pair[0], pair[1]


def _move_ends(low: Tensor, high: Tensor, cells: int, to_samples: bool) -> tuple[Tensor, Tensor]:
    """From the edges of the outer cells to their samples, half a cell inwards, or back."""
    if cells == 1:
        # The one sample is in the middle of the box either way.
        return low, high
    half = (high - low) / (2 * cells) if to_samples else (low - high) / (2 * (cells - 1))
    return low + half, high - half


def convert_boxes(
    boxes: Tensor,
    src: str,
    dst: str,
    size: int | Sequence[int],
    *,
    cells: int | Sequence[int] | None = None,
) -> Tensor:
    """The same places of an image in the numbers of another convention.

    Every convention names places along an axis of ``S`` pixels. In edge units pixel k covers k to
    k + 1, so its centre is at k + 1/2; a picture of each is in ``docs/coordinates.md``:

    =============================  ======================  =======================================
    name                           numbers                 place of a number v, in edge units
    =============================  ======================  =======================================
    ``torchvision``                x1, y1, x2, y2          v. ``roi_align(aligned=True)``,
                                                           detectron2, ``crop`` in pixels
    ``torchvision_legacy``         x1, y1, x2, y2          v + 1/2. ``roi_align(aligned=False)``
    ``onnx_half_pixel``            x1, y1, x2, y2          v. ONNX RoiAlign, its default
    ``onnx_output_half_pixel``     x1, y1, x2, y2          v + 1/2. ONNX RoiAlign
    ``onnx_resize``                y1, x1, y2, x2          v(S - 1) + 1/2 (a). ONNX Resize with
                                                           ``tf_crop_and_resize``
    ``tf_crop_and_resize``         y1, x1, y2, x2          v(S - 1) + 1/2 (a). ``crop_and_resize``
    ``tf_half_pixel``              y1, x1, y2, x2          vS. ``crop_and_resize``,
                                                           ``convention="half_pixel"``
    ``tf_glimpse``                 y, x, height, width     middle at (v + 1)S/2. Centered and
                                                           normalized, both versions
    ``tf_glimpse_v1_normalized``   y, x, height, width     middle at vS
    ``tf_glimpse_v1_centered``     y, x, height, width     middle at v/2 + S/2
    ``tf_glimpse_v1``              y, x, height, width     middle at v
    ``tf_glimpse_v2_normalized``   y, x, height, width     first edge at vS
    ``tf_glimpse_v2_centered``     y, x, height, width     first edge at v + S/2
    ``tf_glimpse_v2``              y, x, height, width     first edge at v
    ``grid_sample``                x1, y1, x2, y2          (v + 1)S/2. ``align_corners=False``
    ``grid_sample_align_corners``  x1, y1, x2, y2          (v + 1)(S - 1)/2 + 1/2 (a).
                                                           ``align_corners=True``
    ``opencv``                     x1, y1, x2, y2          v + 1/2. Pixel centres are whole numbers,
                                                           as in ``remap`` and ``warpAffine``
    ``coco``                       x, y, width, height     v
    ``yolo``                       x, y, width, height     middle at vS; sides in fractions, too
    ``inclusive``                  x1, y1, x2, y2          v, and v + 1 for x2 and y2: the first and
                                                           the last pixel, counted from 0
    ``pascal_voc``                 x1, y1, x2, y2          v - 1, and v for x2 and y2: the first
                                                           and the last pixel, counted from 1
    =============================  ======================  =======================================

    Height and width of a glimpse are the ``size`` of the window, in pixels.

    (a): operators whose outer samples lie *on* the ends of the box. In all others the ends are the
    edges of cells, with the samples in their middle, so the ends of a box can have the same place
    and its samples not. ``cells`` asks for the samples: between a convention with an (a) and one
    without, the ends move by half a cell, and an operator with that output size reads the same
    places.

    To flip boxes, flip edges: in edge units x becomes W - x (never W - 1 - x), and x1 and x2 swap.

    Args:
        boxes: ``[..., 4]``, any numbers; integers become float32.
        src: the convention of ``boxes``.
        dst: the convention of the result.
        size: height and width of the image that the operator reads, or one number for both. With
            a ``spatial_scale`` that is the feature map, and boxes are multiplied by it before.
        cells: the output size of the operator, ``height, width`` or one number for both.

    Returns:
        ``[..., 4]`` in the dtype of ``boxes``; 16-bit numbers are converted in float32 and rounded
        once. Converting back gives the same numbers, to rounding. NaN and infinity stay what they
        are, in the numbers that depend on them.

    Gradients:
        Plain torch: of every order, in every mode.

    Raises:
        ValueError: an unknown convention, a shape that is not ``[..., 4]``, a side of ``size``
            below 1, or of 1 where ``dst`` counts from the centre of the first pixel to that of the
            last, which are one place then.
        TypeError: boxes that are no tensor of real numbers; sizes that are no integers.

    Source:
        The formulas are those of the operators here and, for the others, of
        https://onnx.ai/onnx/operators/onnx__RoiAlign.html, onnx__Resize.html
        (``tf_crop_and_resize``), https://cocodataset.org/#format-data and detectron2's reader of
        Pascal VOC annotations.

    ``torchvision_legacy`` widens boxes of less than a pixel; no conversion can undo that.

    >>> import torch, glimpse_ext
    >>> box = torch.tensor([1.0, 1.0, 3.0, 3.0])
    >>> glimpse_ext.convert_boxes(box, "torchvision", "grid_sample", (4, 4))
    tensor([-0.5000, -0.5000,  0.5000,  0.5000])
    >>> glimpse_ext.convert_boxes(box, "torchvision", "tf_glimpse", (4, 4))
    tensor([0., 0., 2., 2.])
    """
    name = "convert_boxes"
    source = choose(name, "src", src, CONVENTIONS)
    target = choose(name, "dst", dst, CONVENTIONS)
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name}: boxes must be a tensor, got {type(boxes).__name__}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{name}: boxes must be real numbers, got {boxes.dtype}")
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: boxes must be [..., 4], got {list(boxes.shape)}")
    size = _pair("size", size)
    if target.on_samples and min(size) == 1:
        raise ValueError(
            f"{name}: {dst} has one number for all places of a side of one pixel, got {size}"
        )
    count = None if cells is None else _pair("cells", cells)

    dtype = boxes.dtype if boxes.is_floating_point() else torch.float32
    wide = boxes.to(torch.promote_types(dtype, torch.float32))
    if source is target:
        return wide.to(dtype)
    numbers: list[Tensor | None] = [None] * 4
    for axis in range(2):
        first, second = source.columns[2 * axis : 2 * axis + 2]
        low, high = source.to_edges(wide[..., first], wide[..., second], size[axis])
        if count is not None and source.on_samples != target.on_samples:
            low, high = _move_ends(low, high, count[axis], target.on_samples)
        first, second = target.columns[2 * axis : 2 * axis + 2]
        numbers[first], numbers[second] = target.of_edges(low, high, size[axis])
    return torch.stack([number for number in numbers if number is not None], dim=-1).to(dtype)
