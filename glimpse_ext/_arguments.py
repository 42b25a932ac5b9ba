# SPDX-License-Identifier: BSD-3-Clause
"""Python-side arguments that more than one operator takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_check_indices = False


def set_check_indices(check: bool) -> bool:
    """Makes a bad image index raise on every device, and returns the previous setting.

    On CPU it always raises. On CUDA a box whose image index is outside the batch gives a row of
    zeros, because telling the host would make it wait for the device; with ``True`` every call
    waits and raises.

    >>> import glimpse_ext
    >>> before = glimpse_ext.set_check_indices(True)
    >>> glimpse_ext.set_check_indices(before)
    True
    """
    global _check_indices
    previous, _check_indices = _check_indices, bool(check)
    return previous


def check_indices(name: str, boxes: Tensor, images: int) -> None:
    """Raises for the first image index outside the batch, if asked for by set_check_indices."""
    if not _check_indices or torch.compiler.is_compiling() or boxes.dim() != 2:
        return
    index = boxes[:, 0]
    bad = ~((index > -1) & (index < images))
    if bool(bad.any()):
        first = int(bad.to(torch.int64).argmax())
        raise RuntimeError(
            f"{name}: box {first} refers to image {index[first].item():g}, "
            f"but the input has {images} image{'' if images == 1 else 's'}"
        )


def check_separate_indices(name: str, index: Tensor, images: int) -> None:
    """Raises on an image index outside the batch where the caller asked for that."""
    if not _check_indices or torch.compiler.is_compiling() or index.dim() != 1:
        return
    bad = (index < 0) | (index >= images)
    if bool(bad.any()):
        first = int(bad.to(torch.int64).argmax())
        raise RuntimeError(
            f"{name}: box {first} refers to image {int(index[first])}, "
            f"but the input has {images} image{'' if images == 1 else 's'}"
        )


T = TypeVar("T")


def choose(name: str, argument: str, value: str, choices: Mapping[str, T]) -> T:
    """The choice that `value` names."""
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def size_pair(
    name: str, size: int | Sequence[int], argument: str = "output_size"
) -> tuple[int, int]:
    """(height, width) from one number or two; symbolic sizes pass through."""
    if isinstance(size, (tuple, list, torch.Size)):
        if len(size) != 2:
            raise ValueError(
                f"{name}: {argument} must be an int or (height, width), got {len(size)} numbers"
            )
        height, width = size
    else:
        height = width = size
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{name}: {argument} must be int, got {type(side).__name__}")
        if isinstance(side, int) and side < 0:
            raise ValueError(f"{name}: {argument} must be zero or more, got {side}")
    return height, width


def join_boxes(name: str, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """[K, 5] boxes from a [K, 5] tensor or from one [L, 4] tensor for each image."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(
            f"{name}: boxes must be a [K, 5] tensor or a list of [L, 4] tensors, "
            f"got {type(boxes).__name__}"
        )
    if len(boxes) == 0:
        raise ValueError(f"{name}: boxes must be a [K, 5] tensor or a non-empty list, got []")
    for image, own in enumerate(boxes):
        if not isinstance(own, Tensor):
            raise TypeError(f"{name}: boxes[{image}] must be a tensor, got {type(own).__name__}")
        if own.dim() != 2 or own.shape[1] != 4:
            raise ValueError(
                f"{name}: boxes[{image}] must be [L, 4] (x1, y1, x2, y2), got {list(own.shape)}"
            )
    # 16-bit numbers do not count images: bfloat16 ends at 256.
    dtype = boxes[0].dtype
    for own in boxes[1:]:
        dtype = torch.promote_types(dtype, own.dtype)
    if dtype in (torch.float16, torch.bfloat16) and len(boxes) > 256:
        dtype = torch.float32
    rows = [
        torch.nn.functional.pad(own.to(dtype), (1, 0), value=float(image))
        for image, own in enumerate(boxes)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
