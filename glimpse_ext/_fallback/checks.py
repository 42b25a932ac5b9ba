# SPDX-License-Identifier: BSD-3-Clause
"""The checks of csrc/ops on the tensors of a call, in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

MAX_LEVELS = 8
LARGEST_SIDE = 0x7FFFFF00
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fail(name: str, *parts: object) -> NoReturn:
    raise RuntimeError(f"{name}: {''.join(map(str, parts))}")


def check(condition: bool, name: str, *parts: object) -> None:
    if not condition:
        fail(name, *(list(part) if isinstance(part, torch.Size) else part for part in parts))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_float(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS


def check_storage(name: str, dtype: torch.dtype) -> None:
    check(
        dtype in _FLOATS or dtype == torch.uint8,
        name,
        "features must be float64, float32, float16, bfloat16 or uint8, got ",
        dtype_name(dtype),
    )


def check_same_device(name: str, what: str, tensor: Tensor, like: Tensor) -> None:
    check(
        tensor.device == like.device,
        name,
        f"{what} must be on the device of the features, {like.device}, got {tensor.device}",
    )


def check_features(name: str, features: Sequence[Tensor], boxes: int) -> None:
    check(len(features) > 0, name, "expects at least one feature map, got none")
    check(
        len(features) <= MAX_LEVELS,
        name,
        f"takes at most {MAX_LEVELS} feature maps, got {len(features)}",
    )
    first = features[0]
    for one in features:
        check(one.dim() == 4, name, "input must be [N, C, H, W], got ", one.shape)
        check_storage(name, one.dtype)
        check(
            one.dtype == first.dtype,
            name,
            f"feature maps must have one dtype, got {dtype_name(first.dtype)} and "
            f"{dtype_name(one.dtype)}",
        )
        check(
            one.shape[:2] == first.shape[:2],
            name,
            "feature maps must have one batch size and channel count, got ",
            first.shape,
            " and ",
            one.shape,
        )
        check_same_device(name, "every feature map", one, first)
        check(
            boxes == 0 or 0 not in one.shape[2:],
            name,
            "input must have at least one pixel to read boxes from, got ",
            one.shape,
        )
        check(
            max(one.shape[2:]) <= LARGEST_SIDE,
            name,
            "input height and width must fit in 32 bits, got ",
            one.shape,
        )


def check_index(name: str, what: str, index: Tensor, boxes: int, like: Tensor) -> None:
    check(
        index.dim() == 1 and len(index) == boxes,
        name,
        f"{what} must be [{boxes}], one entry for each box, got ",
        index.shape,
    )
    check(
        index.dtype in (torch.int64, torch.int32),
        name,
        f"{what} must be int64 or int32, got {dtype_name(index.dtype)}",
    )
    check_same_device(name, what, index, like)


def check_box_numbers(name: str, boxes: Tensor, like: Tensor) -> None:
    check(
        is_float(boxes),
        name,
        "boxes must be float64, float32, float16 or bfloat16, got ",
        dtype_name(boxes.dtype),
    )
    check_same_device(name, "boxes", boxes, like)


def check_boxes(
    name: str,
    boxes: Tensor,
    image_index: Tensor | None,
    columns: str,
    even: bool,
    like: Tensor,
) -> None:
    count = columns.count(",") + 1
    if image_index is not None:
        check(
            boxes.dim() == 2 and boxes.shape[1] == count,
            name,
            f"boxes must be [K, {count}] ({columns}) beside an image index, got ",
            boxes.shape,
        )
        check_index(name, "the image index", image_index, len(boxes), like)
    else:
        widths = (count + 1, count) if even else (count + 1,)
        check(
            boxes.dim() == 2 and boxes.shape[1] in widths,
            name,
            f"boxes must be [K, {count + 1}] (image, {columns})",
            " or the same without image, as many for each" if even else "",
            ", got ",
            boxes.shape,
        )
    check_box_numbers(name, boxes, like)


def check_tangent(name: str, tangent: Tensor | None, boxes: Tensor, like: Tensor) -> None:
    if tangent is None:
        return
    check(
        tangent.shape == boxes.shape and is_float(tangent),
        name,
        "the tangent must be like the boxes, ",
        boxes.shape,
        ", got ",
        tangent.shape,
    )
    check_same_device(name, "the tangent", tangent, like)


def check_output_size(name: str, sizes: Sequence[int]) -> tuple[int, int]:
    check(len(sizes) == 2, name, f"expects an output height and width, got {len(sizes)} numbers")
    for size in sizes:
        check(
            0 <= size <= LARGEST_SIDE,
            name,
            f"output size must be zero or more and fit in 32 bits, got {size}",
        )
    height, width = sizes
    return height, width


def check_gradient(name: str, grad: Tensor) -> None:
    check(is_float(grad), name, "the gradient must be a float tensor, got ", dtype_name(grad.dtype))


def check_pooled(
    name: str, what: str, tensor: Tensor, size: tuple[int, int, int, int], like: Tensor
) -> None:
    check(tuple(tensor.shape) == size, name, f"{what} must be {list(size)}, got ", tensor.shape)
    check_same_device(name, what, tensor, like)


def images_of(
    name: str, boxes: Tensor, image_index: Tensor | None, columns: int, images: int
) -> tuple[Tensor, Tensor]:
    """The image of each box, and whether there is one. Raises on the CPU where there is none."""
    if image_index is not None:
        index = image_index.to(torch.int64)
        valid = (index >= 0) & (index < images)
    elif boxes.shape[1] == columns:
        count = len(boxes)
        check(
            count == 0 if images == 0 else count % images == 0,
            name,
            "expects an image index, or as many boxes for each image, got "
            f"{count} boxes and {images} images",
        )
        index = torch.arange(count, device=boxes.device) // max(count // max(images, 1), 1)
        return index, torch.ones_like(index, dtype=torch.bool)
    else:
        index = boxes[:, 0]
        valid = (index > -1) & (index < images)
    if boxes.device.type == "cpu" and not bool(valid.all()):
        k = int((~valid).to(torch.int64).argmax())
        number = index[k].item()
        fail(
            name,
            f"box {k} refers to image {number:g}, but the input has {images} "
            f"image{'' if images == 1 else 's'}",
        )
    return torch.where(valid, index, 0).to(torch.int64), valid
