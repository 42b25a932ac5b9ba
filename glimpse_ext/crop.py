# SPDX-License-Identifier: BSD-3-Clause
"""One sample for each cell of a box, or for each point: crops and points of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_indices, check_separate_indices, choose, join_boxes, size_pair
from ._points import register_points
from ._register import register_sampler
from ._sampling import COLUMNS, BoxColumns, Sampler, Where, make_sampler

_KIND = 1
_XYXY, _YXYX, _POINT = range(3)
_FRACTION, _NORMALIZED, _PIXELS = range(3)
_ZEROS, _EDGE, _FILL = range(3)
_COLUMNS = {
    _XYXY: BoxColumns(4, y=(1, 3), x=(0, 2)),
    _YXYX: BoxColumns(4, y=(0, 2), x=(1, 3)),
    _POINT: BoxColumns(2, y=(1, 1), x=(0, 0)),
}
COLUMNS[_KIND] = lambda params: _COLUMNS[int(params[0])]

_UNITS = {"normalized": _NORMALIZED, "pixels": _PIXELS}
_PADDINGS = {"zeros": _ZEROS, "border": _EDGE}
_CONVENTIONS = {"tf": True, "half_pixel": False}
_METHODS = {"bilinear": False, "nearest": True}


def _bind_crop(
    input: Tensor,
    boxes: Tensor,
    image_index: Tensor | None,
    height: int,
    width: int,
    unit: int,
    align_corners: bool,
    padding: int,
) -> tuple[Sequence[Tensor], Where]:
    params = (_XYXY, unit, align_corners, padding, 0, 0)
    sampler = make_sampler((height, width), _KIND, params)
    return [input], Where(boxes, image_index, None, None, 0, sampler)


def _bind_crop_and_resize(
    image: Tensor,
    boxes: Tensor,
    box_indices: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    nearest: bool,
    extrapolation_value: float,
) -> tuple[Sequence[Tensor], Where]:
    single = align_corners and boxes.dtype != torch.float64
    params = (_YXYX, _FRACTION, align_corners, _FILL, nearest, single)
    linear = (_YXYX, _FRACTION, align_corners, _FILL, False, single)
    sampler = Sampler(
        (height, width),
        _KIND,
        params,
        (1.0,),
        (),
        extrapolation_value,
        slope_params=linear if nearest else None,
    )
    return [image], Where(boxes, box_indices, None, None, 0, sampler)


def _bind_point_sample(
    input: Tensor, points: Tensor, align_corners: bool
) -> tuple[Sequence[Tensor], Where]:
    params = (_POINT, _FRACTION, align_corners, _ZEROS, 0, 0)
    return [input], Where(points, None, None, None, 0, make_sampler((1, 1), _KIND, params))


_crop = register_sampler("crop", _bind_crop)
_crop_and_resize = register_sampler("crop_and_resize", _bind_crop_and_resize)
_point_sample = register_points(_bind_point_sample)


def crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    size: int | Sequence[int],
    *,
    box_format: str = "normalized",
    align_corners: bool = False,
    padding_mode: str = "zeros",
    image_index: Tensor | None = None,
) -> Tensor:
    """Bilinear crop of each box, resized to ``size``; differentiable in images and boxes.

    The numbers are those of ``torch.nn.functional.affine_grid`` and ``grid_sample`` with the grid
    of the box, without the grid and without a copy of the image for each box::

        |-----x-----|-----x-----|-----x-----|-----x-----|   pixels, x: centres
       -1                       0                       1   normalized, align_corners=False
             -1                 0                 1         normalized, align_corners=True
                       o     o     o     o                  align_corners=False, -0.5..0.5, 4 cells

    Args:
        input: ``[N, C, H, W]`` of float64, float32, float16, bfloat16 or uint8, any strides.
        boxes: x1, y1, x2, y2 in one of these forms: ``[K, 5]`` with the image index in front;
            ``[K, 4]`` beside ``image_index``; ``[K, 4]`` alone, where the first K / N boxes belong
            to the first image and so on; or a list with one ``[L, 4]`` tensor for each image. Any
            float dtype. A reversed box mirrors the crop.
        size: cells, ``height, width`` or one number for both.
        box_format: ``"normalized"``: -1 and 1 are the ends of the image. ``"pixels"``: edge units
            (pixel k covers k to k + 1), or with ``align_corners`` indices (k is the centre of
            pixel k).
        align_corners: whether the ends of image and box are the centres of the outer pixels and
            cells (True), or their outer edges (False).
        padding_mode: ``"zeros"`` or ``"border"``, what pixels outside the image are.
        image_index: ``[K]`` int64 or int32, the image of each box.

    Returns:
        ``[K, C, height, width]`` in the dtype (uint8 gives float32) and memory format of
        ``input``. Coordinates and sums are float32, or float64 where ``input`` is. A box with NaN
        or infinite numbers gives zeros.

    Gradients:
        To ``input`` and ``boxes``, of every order, in reverse and forward mode and under ``vmap``.
        At pixel centres the derivative is the right-hand one; beyond the edge of a ``"border"`` it
        is zero. Deterministic.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on CPU also an image index outside
            the batch. On CUDA such a box gives zeros; see :func:`set_check_indices`.
        ValueError, TypeError: an unknown format or padding, a list of boxes or size that is none.

    Source:
        ``affine_grid`` and ``grid_sample`` of torch 2.13; Jaderberg et al., Spatial Transformer
        Networks, 2015. Numbers stored from them are tested.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> glimpse_ext.crop(image, torch.tensor([[1.0, 1.0, 3.0, 3.0]]), 2, box_format="pixels")
    tensor([[[[ 5.,  6.],
              [ 9., 10.]]]])
    """
    name = "crop"
    if image_index is not None and not isinstance(boxes, Tensor):
        raise TypeError(f"{name}: a list of boxes takes no image_index")
    boxes = join_boxes(name, boxes)
    height, width = size_pair(name, size)
    unit = choose(name, "box_format", box_format, _UNITS)
    padding = choose(name, "padding_mode", padding_mode, _PADDINGS)
    if input.dim() == 4:
        if image_index is not None:
            check_separate_indices(name, image_index, input.shape[0])
        elif boxes.shape[-1] == 5:
            check_indices(name, boxes, input.shape[0])
    return _crop(input, boxes, image_index, height, width, unit, align_corners, padding)


def crop_and_resize(
    image: Tensor,
    boxes: Tensor,
    box_indices: Tensor,
    crop_size: int | Sequence[int],
    method: str = "bilinear",
    extrapolation_value: float = 0.0,
    *,
    convention: str = "tf",
) -> Tensor:
    """``tf.image.crop_and_resize`` on ``[N, C, H, W]`` images, with the same numbers.

    ``convention="tf"``: 0 and 1 are the *centres* of the first and last pixel, the first and last
    sample lie on the ends of the box, and a side of one cell samples its middle::

              0           1           2           3        pixels
        |-----x-----|-----x-----|-----x-----|-----x-----|
              0                                   1        fractions
                          o       o       o       o        box 1/3..1, 4 cells

    ``convention="half_pixel"`` is the corrected grid: 0 and 1 are the outer *edges* of the image,
    and samples lie in the middle of cells that divide the box evenly, as in ``resize`` without
    ``align_corners`` and in OpenCV.

    Args:
        image: ``[N, C, H, W]``, any strides. float64, float32 and uint8 are read as they are;
            other integers, float16 and bfloat16 become float32 first, as in TensorFlow.
        boxes: ``[K, 4]`` of y1, x1, y2, x2 in fractions of the image, any float dtype. A reversed
            box flips the crop.
        box_indices: ``[K]`` int32 or int64, the image of each box.
        crop_size: cells, ``height, width`` or one number for both.
        method: ``"bilinear"`` or ``"nearest"`` (halves away from zero).
        extrapolation_value: the result of samples outside the image: beyond the outer pixel
            centres, or for ``"half_pixel"`` beyond the outer edges. A hard cut; may be NaN.
        convention: ``"tf"`` or ``"half_pixel"``.

    Returns:
        ``[K, C, height, width]`` in float32, or float64 where ``image`` is (TensorFlow rounds that
        to float32), in the memory format of ``image``. Places are computed in TensorFlow's order
        of float32 operations, so inside and outside are decided alike; boxes in float64 are not
        rounded. NaN and infinite boxes give ``extrapolation_value``; TensorFlow raises or crashes.

    Gradients:
        To ``image`` and ``boxes``, of every order. ``"tf"`` follows TensorFlow: a sample on a pixel
        centre has no derivative along that axis, and ``"nearest"`` has the box gradient of
        ``"bilinear"``. ``"half_pixel"`` has the right-hand derivative on pixel centres.
        TensorFlow's gradient rounds its places in another order than its forward pass, so a sample
        on the very edge can differ; here both agree. Deterministic, unlike TensorFlow's on GPUs.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on CPU also an index outside the
            batch. On CUDA such a box gives ``extrapolation_value``.
        ValueError, TypeError: an unknown method or convention, a size that is none.

    Source:
        ``crop_and_resize_op.cc`` of TensorFlow. Numbers stored from TensorFlow 2.21, with its
        gradients, are tested.

    >>> import torch, glimpse_ext
    >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> boxes, index = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0])
    >>> glimpse_ext.crop_and_resize(image, boxes, index, 3)
    tensor([[[[1.0000, 1.5000, 2.0000],
              [2.0000, 2.5000, 3.0000],
              [3.0000, 3.5000, 4.0000]]]])
    """
    name = "crop_and_resize"
    height, width = size_pair(name, crop_size)
    nearest = choose(name, "method", method, _METHODS)
    align_corners = choose(name, "convention", convention, _CONVENTIONS)
    if image.dim() == 4:
        check_separate_indices(name, box_indices, image.shape[0])
    if image.dtype not in (torch.float32, torch.float64, torch.uint8):
        if image.dtype == torch.bool or image.is_complex():
            raise RuntimeError(f"{name}: image must be real numbers, got {image.dtype}")
        image = image.to(torch.float32)
    return _crop_and_resize(
        image, boxes, box_indices, height, width, align_corners, nearest, float(extrapolation_value)
    )


def point_sample(input: Tensor, points: Tensor, align_corners: bool = False) -> Tensor:
    """Bilinear values at points of images: PointRend's ``point_sample``.

    The numbers are those of ``grid_sample(input, 2 * points - 1)`` with zeros outside.

    Args:
        input: ``[N, C, H, W]`` of float64, float32, float16, bfloat16 or uint8, any strides.
        points: ``[N, P, 2]`` of x, y in fractions of the image, any float dtype.
        align_corners: whether 0 and 1 are the centres of the outer pixels (True) or the outer
            edges of the image (False).

    Returns:
        ``[N, C, P]`` in the dtype of ``input`` (uint8 gives float32), in memory in which the
        channels of a point are neighbours. A point that is NaN or infinite gives zeros.

    Gradients:
        To ``input`` and ``points``, of every order, in reverse and forward mode and under
        ``vmap``. Deterministic.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Source:
        Kirillov et al., PointRend, 2020; ``point_sample`` of detectron2, whose stored numbers are
        tested.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> glimpse_ext.point_sample(image, torch.tensor([[[0.5, 0.5], [0.125, 0.875]]]))
    tensor([[[ 7.5000, 12.0000]]])
    """
    name = "point_sample"
    if points.dim() != 3 or points.shape[2] != 2:
        raise RuntimeError(f"{name}: points must be [N, P, 2] (x, y), got {list(points.shape)}")
    if input.dim() == 4 and input.shape[0] != points.shape[0]:
        raise RuntimeError(
            f"{name}: expects points for each image, got {points.shape[0]} lists of points "
            f"and {input.shape[0]} images"
        )
    return _point_sample(input, points, align_corners)
