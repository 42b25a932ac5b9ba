# SPDX-License-Identifier: BSD-3-Clause
"""crop_batch in plain PyTorch. Its derivatives are those of the generic operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._sampling import Where, make_sampler
from .checks import (
    check,
    check_boxes,
    check_features,
    check_output_size,
    check_same_device,
    dtype_name,
    images_of,
)
from .separable import AT_ONCE, CROP_BATCH, Call, Rows, compute_dtype, operator_of

_NAME = "crop_batch"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _for_channels(what: str, numbers: Sequence[float], channels: int) -> list[float]:
    check(
        len(numbers) in (1, channels),
        _NAME,
        f"{what} must be one number or one for each of {channels} channels, got {len(numbers)}",
    )
    return list(numbers) * channels if len(numbers) == 1 else list(numbers)


def _check_images(images: Sequence[Tensor], boxes: int) -> None:
    first = images[0]
    for image in images:
        check_features(_NAME, [image], boxes)
        check(
            len(images) == 1 or len(image) == 1,
            _NAME,
            "images of a list must be one each, got ",
            image.shape,
        )
        check(
            image.dtype == first.dtype,
            _NAME,
            f"images must have one dtype, got {dtype_name(first.dtype)} and "
            f"{dtype_name(image.dtype)}",
        )
        check(
            image.shape[1] == first.shape[1],
            _NAME,
            "images must have one channel count, got ",
            first.shape,
            " and ",
            image.shape,
        )
        check_same_device(_NAME, "every image", image, first)


class _Weights(NamedTuple):
    """Those of one axis of one box, in the order of cells."""

    cell: Tensor
    pixel: Tensor
    weight: Tensor


def _of_boxes(rows: Rows) -> Iterator[_Weights]:
    """Pixels of no weight are not read at all, whatever they are."""
    some = rows.used != 0
    counts = torch.bincount(rows.box[some], minlength=len(rows.counts)).tolist()
    columns = (column[some].split(counts) for column in (rows.cell, rows.pixel, rows.used))
    return map(_Weights, *columns)


def _add(sums: Tensor, weights: _Weights, pixels: Tensor) -> None:
    """sums[cell] += weight * pixels[pixel], a limited number at a time."""
    at_once = max(AT_ONCE // max(pixels[:1].numel(), 1), 1)
    for cell, pixel, weight in zip(*(column.split(at_once) for column in weights), strict=True):
        sums.index_add_(0, cell, pixels[pixel] * weight[:, None, None])


def _resized(
    image: Tensor, y: _Weights, x: _Weights, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """A box of an image ``[C, H, W]``: rows of pixels are added up, then the pixels of a row."""
    values = image.new_zeros(size[1], size[0], len(image), dtype=dtype)
    if len(y.cell) and len(x.cell):
        top, left = int(y.pixel.min()), int(x.pixel.min())
        window = image[:, top : int(y.pixel.max()) + 1, left : int(x.pixel.max()) + 1]
        rows = values.new_zeros(size[0], window.shape[2], len(image))
        _add(rows, y._replace(pixel=y.pixel - top), window.to(dtype).permute(1, 2, 0))
        _add(values, x._replace(pixel=x.pixel - left), rows.transpose(0, 1))
    return values.permute(2, 1, 0)


def crop_batch(
    images: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor | None,
    height: int,
    width: int,
    antialias: bool,
    beyond: bool,
    edge: bool,
    fill: float,
    multiplier: Sequence[float],
    offset: Sequence[float],
    dtype: int,
    channels_last: bool,
) -> Tensor:
    check(len(images) > 0, _NAME, "expects at least one image, got none")
    first, count = images[0], len(images)
    check(first.dim() == 4, _NAME, "images must be [N, C, H, W], got ", first.shape)
    channels = first.shape[1]
    check(dtype in range(len(_DTYPES)), _NAME, f"does not know dtype {dtype}")
    multipliers = _for_channels("multiplier", multiplier, channels)
    offsets = _for_channels("offset", offset, channels)
    _check_images(images, boxes.shape[0] if boxes.dim() else 0)

    params = (antialias, beyond, edge)
    sampler = make_sampler((height, width), CROP_BATCH, params, (1.0,) * count)
    where = Where(boxes, image_index, None, None, 0, sampler)
    op = operator_of(where)
    if count > 1:
        # The images of a list are levels with one image each.
        check_boxes(_NAME, boxes, image_index, op.columns, op.even, first)
        check_output_size(_NAME, sampler.output_size)
        numbers = boxes.to(compute_dtype(first.dtype))
        image, valid = images_of(_NAME, numbers, image_index, 4, count)
        levels = torch.where(valid, image, -1)
        where = where._replace(
            boxes=boxes[:, -4:], image_index=torch.zeros_like(levels), levels=levels
        )
    call = Call(op, where, first, len(first), [(one.shape[2], one.shape[3]) for one in images])

    size = (len(boxes), channels, height, width)
    values = first.new_zeros(size, dtype=call.dtype)
    covered = values.new_zeros(len(boxes), 1, height, width)
    for level, pixels in zip(call.levels, images, strict=True):
        parts = zip(*(_of_boxes(rows) for rows in level.rows), strict=True)
        places = zip(level.boxes.tolist(), level.image.tolist(), parts, strict=True)
        for k, n, (y, x) in places:
            values[k] = _resized(pixels[n], y, x, (height, width), call.dtype)
        by_row, by_column = (rows.coverage for rows in level.rows)
        assert by_row is not None
        assert by_column is not None
        covered[level.boxes, 0] = by_row[:, :, None] * by_column[:, None, :]
    if fill != 0:
        values += torch.where(covered != 1, fill * (1 - covered), 0.0)
    scale, shift = (values.new_tensor(n)[:, None, None] for n in (multipliers, offsets))
    memory = torch.channels_last if channels_last else torch.contiguous_format
    values = values * scale + shift
    made = torch.empty(size, dtype=_DTYPES[dtype], device=first.device, memory_format=memory)
    return made.copy_(values)
