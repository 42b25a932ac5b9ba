# SPDX-License-Identifier: BSD-3-Clause
"""The table of all operators: what test_operators.py runs over, and docs/support_matrix.py counts.

An operator takes an image ``[N, C, H, W]`` and ``boxes``, the numbers that say where is read. What
else it takes is in its functions here. A new operator adds a row, or several where it has arguments
that choose formulas, and has all properties tested on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor

import glimpse_ext
from glimpse_ext import convert_boxes, reference

F64 = torch.float64
ALL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)

Call = Callable[[Tensor, Tensor, Case], Tensor]


def _float_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype


@dataclass(frozen=True)
class Operator:
    """A row of the table."""

    name: str
    public: str
    """The public function, with the argument that selects it where there are several."""
    boxes: Callable[[Case], Tensor]
    """The float64 numbers of a case."""
    call: Call
    reference: Callable[[Tensor, Tensor, Case, torch.dtype], Tensor]
    gradients: tuple[str, ...] = ("image", "boxes")
    """Arguments that have a gradient."""
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    result: Callable[[torch.dtype], torch.dtype] = _float_of
    rows: int = 0
    """The dimension of ``boxes`` along which they are independent."""
    outputs: int = 0
    """The same dimension of the result."""
    image_column: bool = True
    """Whether column 0 of the boxes is their image."""
    image_rows: bool = False
    """Whether an image belongs to each row."""
    fill: float = 0.0
    """What stands where nothing is read."""
    box_slopes: bool = True
    """Whether the gradient to the boxes is the derivative of the result."""
    second: bool = True
    """Whether the gradient to the boxes has a derivative in the boxes."""
    linear: bool = True
    """Whether the result is linear in the image, but for the fill value."""

    def __str__(self) -> str:
        return self.name

    def with_indices(self, boxes: Tensor, like: Tensor) -> Tensor:
        """``boxes`` with the image column of ``like``, where there is one."""
        if self.image_column:
            return torch.cat([like[..., :1].expand_as(boxes[..., :1]), boxes[..., 1:]], -1)
        return boxes

    def take(self, image: Tensor, boxes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the rows."""
        return (image[index] if self.image_rows else image), boxes.index_select(self.rows, index)


# ---------------------------------------------------------------------- the numbers of a case


def _pixel_rows(case: Case) -> Tensor:
    """Image and x1, y1, x2, y2 in edge units of the map."""
    rows = case.boxes()
    return torch.cat([rows[:, :1], rows[:, 1:] * case.spatial_scale], 1)


def _rows_as(convention: str) -> Callable[[Case], Tensor]:
    def boxes(case: Case) -> Tensor:
        rows = _pixel_rows(case)
        # A map of one pixel has one place between the centres of its outer pixels.
        size = [max(side, 2) if convention in _CORNERS else side for side in case.shape[2:]]
        corners = convert_boxes(rows[:, 1:], "torchvision", convention, size)
        return torch.cat([rows[:, :1], corners], 1)

    return boxes


_CORNERS = ("tf_crop_and_resize", "grid_sample_align_corners")


def _points(case: Case) -> Tensor:
    """Both corners of every box, in every image."""
    _, _, h, w = case.shape
    corners = _pixel_rows(case)[:, 1:].reshape(-1, 2) / torch.tensor([w, h], dtype=F64)
    return corners.expand(case.shape[0], -1, -1).contiguous()


def _offsets(centered: bool, normalized: bool) -> Callable[[Case], Tensor]:
    """An offset for each image, from the boxes in turn."""

    def offsets(case: Case) -> Tensor:
        n, _, h, w = case.shape
        rows = _pixel_rows(case)
        y, x = rows[:n, 2], rows[:n, 1]
        if len(y) < n:
            y, x = torch.full((n,), 0.3, dtype=F64), torch.full((n,), 0.7, dtype=F64)
        if normalized:
            y, x = (y / h * 2 - 1, x / w * 2 - 1) if centered else (y / h, x / w)
        return torch.stack([y, x], 1)

    return offsets


# -------------------------------------------------------------------------------- the operators


def _roi_align(ratio: int, aligned: bool, mode: str = "mean") -> Operator:
    def arguments(case: Case) -> tuple[object, ...]:
        return case.output_size, case.spatial_scale, ratio, aligned

    samples = str(ratio) if ratio > 0 else "adaptive"
    return Operator(
        f"roi_align {'aligned' if aligned else 'legacy'} {samples} {mode}",
        "roi_align" if mode == "mean" else f'roi_align(mode="{mode}")',
        lambda case: case.boxes(),
        lambda image, boxes, case: glimpse_ext.roi_align(image, boxes, *arguments(case), mode=mode),
        lambda image, boxes, case, dtype: reference.roi_align(
            image, boxes, *arguments(case), mode=mode, dtype=dtype
        ),
        linear=mode == "mean",
    )


def _rotated(case: Case) -> Tensor:
    """Centre, size and angle of every box, turned a little more from one to the next."""
    rows = case.boxes()
    low, high = rows[:, 1:3], rows[:, 3:5]
    angle = 20.0 + 25 * torch.arange(len(rows), dtype=F64)[:, None]
    return torch.cat([rows[:, :1], (low + high) / 2, high - low, angle], 1)


def _roi_align_rotated(ratio: int, aligned: bool, clockwise: bool) -> Operator:
    def arguments(case: Case) -> tuple[object, ...]:
        return case.output_size, case.spatial_scale, ratio, aligned, clockwise

    samples = str(ratio) if ratio > 0 else "adaptive"
    return Operator(
        f"roi_align_rotated {'aligned' if aligned else 'legacy'} {samples}",
        "roi_align_rotated",
        _rotated,
        lambda image, boxes, case: glimpse_ext.roi_align_rotated(image, boxes, *arguments(case)),
        lambda image, boxes, case, dtype: reference.roi_align_rotated(
            image, boxes, *arguments(case), dtype=dtype
        ),
    )


def _multiscale() -> Operator:
    """Two parts of the image as a pyramid. They share no pixel, so no gradients are added."""

    def arguments(case: Case) -> tuple[object, ...]:
        return case.output_size, (1.0, 0.5), 2, False, 4, 1

    def maps(image: Tensor) -> list[Tensor]:
        part = image.shape[2] // 2
        return [image[:, :, part:], image[:, :, :part] if part else image]

    return Operator(
        "multiscale_roi_align",
        "multiscale_roi_align",
        lambda case: case.boxes(),
        lambda image, boxes, case: glimpse_ext.multiscale_roi_align(
            maps(image), boxes, *arguments(case)
        ),
        lambda image, boxes, case, dtype: reference.multiscale_roi_align(
            maps(image), boxes, *arguments(case), dtype=dtype
        ),
    )


def _crop(box_format: str, align_corners: bool, padding: str) -> Operator:
    options = {"box_format": box_format, "align_corners": align_corners, "padding_mode": padding}
    convention = "grid_sample_align_corners" if align_corners else "grid_sample"
    return Operator(
        f"crop {box_format}{' corners' if align_corners else ''} {padding}",
        "crop",
        _pixel_rows if box_format == "pixels" else _rows_as(convention),
        lambda image, boxes, case: glimpse_ext.crop(image, boxes, case.output_size, **options),
        lambda image, boxes, case, dtype: reference.crop(
            image, boxes, case.output_size, dtype=dtype, **options
        ),
    )


def _crop_batch(antialias: bool, support: str, padding: str) -> Operator:
    options = {"antialias": antialias, "support": support, "padding_mode": padding, "scale": 1.0}

    def call(image: Tensor, boxes: Tensor, case: Case) -> Tensor:
        dtype = _float_of(image.dtype)
        last = not image.is_contiguous() and image.shape[1] > 1 and image.stride(1) == 1
        memory = torch.channels_last if last else torch.contiguous_format
        return glimpse_ext.crop_batch(
            image, boxes, case.output_size, dtype=dtype, memory_format=memory, **options
        )

    return Operator(
        f"crop_batch {'antialias ' if antialias else ''}{support} {padding}",
        "crop_batch",
        _pixel_rows,
        call,
        lambda image, boxes, case, dtype: reference.crop_batch(
            image, boxes, case.output_size, dtype=dtype, **options
        ),
        second=False,
    )


def _crop_and_resize(convention: str, method: str) -> Operator:
    fill = 0.375

    def split(boxes: Tensor) -> tuple[Tensor, Tensor]:
        return boxes[:, 1:], boxes[:, 0].detach().to(torch.int64)

    return Operator(
        f"crop_and_resize {convention} {method}",
        "crop_and_resize",
        _rows_as({"tf": "tf_crop_and_resize", "half_pixel": "tf_half_pixel"}[convention]),
        lambda image, boxes, case: glimpse_ext.crop_and_resize(
            image, *split(boxes), case.output_size, method, fill, convention=convention
        ),
        lambda image, boxes, case, dtype: reference.crop_and_resize(
            image,
            *split(boxes),
            case.output_size,
            method,
            fill,
            convention=convention,
            dtype=dtype,
        ),
        result=lambda dtype: dtype if dtype == F64 else torch.float32,
        fill=fill,
        box_slopes=method == "bilinear",
    )


def _point_sample(align_corners: bool) -> Operator:
    return Operator(
        f"point_sample{' corners' if align_corners else ''}",
        "point_sample",
        _points,
        lambda image, points, case: glimpse_ext.point_sample(image, points, align_corners),
        lambda image, points, case, dtype: reference.point_sample(
            image, points, align_corners, dtype=dtype
        ),
        image_column=False,
        rows=1,
        outputs=2,
    )


def _glimpse(
    version: int, centered: bool, normalized: bool, scale: int, mode: str = "subpixel"
) -> Operator:
    rule = (centered, normalized)
    options = {"version": version, "mode": mode, "scales": (scale,)}
    exact = mode == "exact"
    words = f"{' centered' if centered else ''}{' normalized' if normalized else ''}"
    return Operator(
        f"glimpse v{version}{words} scale {scale} {mode}",
        "extract_glimpse" if exact else f'extract_glimpse(mode="{mode}")',
        _offsets(centered, normalized),
        lambda image, offsets, case: glimpse_ext.extract_glimpse(
            image, case.output_size, offsets, *rule, "zero", **options
        ),
        lambda image, offsets, case, dtype: reference.extract_glimpse(
            image, case.output_size, offsets, *rule, dtype=dtype, **options
        ),
        gradients=("image",) if exact else ("image", "boxes"),
        result=(lambda dtype: dtype) if exact else _float_of,
        image_column=False,
        image_rows=True,
    )


def _paste(method: str) -> Operator:
    """The first channel of each image is a mask, and one of the boxes is where it belongs."""
    size = (6, 5)

    def boxes(case: Case) -> Tensor:
        n, _, h, w = case.shape
        scale = torch.tensor([size[1] / w, size[0] / h] * 2, dtype=F64)
        rows = _pixel_rows(case)[:n, 1:] * scale
        plain = torch.tensor([[0.3, 0.4, 3.1, 4.2]], dtype=F64).expand(n, 4)
        return torch.cat([rows, plain[len(rows) :]])

    return Operator(
        f"paste_masks {method}",
        "paste_masks(threshold=None)"
        if method == "detectron2"
        else f'paste_masks(threshold=None, method="{method}")',
        boxes,
        lambda masks, boxes, case: glimpse_ext.paste_masks(masks[:, :1], boxes, size, None, method),
        lambda masks, boxes, case, dtype: reference.paste_masks(
            masks[:, :1], boxes, size, None, method, dtype=dtype
        ),
        gradients=("image", "boxes") if method == "detectron2" else ("image",),
        image_column=False,
        image_rows=True,
    )


OPERATORS = [
    _roi_align(-1, False),
    _roi_align(2, True),
    _roi_align(-1, False, "max"),
    _roi_align(3, True, "max"),
    _roi_align_rotated(-1, True, False),
    _roi_align_rotated(2, False, True),
    _multiscale(),
    _crop("normalized", False, "zeros"),
    _crop("normalized", True, "border"),
    _crop("pixels", False, "border"),
    _crop_and_resize("tf", "bilinear"),
    _crop_and_resize("tf", "nearest"),
    _crop_and_resize("half_pixel", "bilinear"),
    _crop_and_resize("half_pixel", "nearest"),
    _crop_batch(True, "box", "constant"),
    _crop_batch(True, "image", "border"),
    _crop_batch(False, "box", "border"),
    _point_sample(False),
    _point_sample(True),
    _glimpse(2, True, True, 1),
    _glimpse(1, True, False, 2),
    _glimpse(2, True, True, 1, "exact"),
    _glimpse(1, False, True, 1, "exact"),
    _paste("detectron2"),
    _paste("torchvision"),
]
