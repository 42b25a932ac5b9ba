# SPDX-License-Identifier: BSD-3-Clause
"""Masks of boxes as run lengths of their image, without the image."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ._arguments import choose
from .paste_masks import outline_arguments

_NAME = "paste_masks_to_rle"
_runs = torch.ops.glimpse_ext._paste_masks_runs.default
_DEVICE_PIXELS = 2**31
"""Images of so many pixels are left to the CPU: places in them are numbers of 32 bits elsewhere."""


def _fake_runs(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = masks.shape[0]
    text = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty((text,), dtype=torch.uint8),
        torch.empty((count, 1), dtype=torch.int64),
        torch.empty((count, 1), dtype=torch.int64),
        torch.empty((count, 4), dtype=torch.int64),
    )


torch.library.register_fake("glimpse_ext::_paste_masks_runs", _fake_runs)


class RLE(TypedDict):
    """A mask in COCO's compressed run lengths, as pycocotools takes and gives it."""

    size: list[int]
    counts: bytes | str


class PastedRLE(NamedTuple):
    """What :func:`paste_masks_to_rle` returns with ``with_boxes=True``."""

    rles: list[RLE]
    areas: Tensor
    """``[N]`` int64 on the CPU, pixels of each mask: ``pycocotools.mask.area``."""
    boxes: Tensor
    """``[N, 4]`` int64 on the CPU, the tight box of each mask: x1, y1, x2, y2 in edge units (pixel
    k covers k to k + 1), zeros if it has no pixel. ``pycocotools.mask.toBbox`` says the same as x,
    y, width, height: ``torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)``."""


def paste_masks_to_rle(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float = 0.5,
    method: str = "detectron2",
    *,
    with_boxes: bool = False,
    counts: str = "bytes",
) -> list[RLE] | PastedRLE:
    """The masks of :func:`paste_masks` as COCO run lengths, without making their images.

    The bytes are those of ``pycocotools.mask.encode`` of the pasted masks. Only pixels near the
    outline of a mask are computed, so the time depends on the outlines and not on the size of the
    image; pasting writes and encoding reads every pixel.

    Args:
        masks: as in :func:`paste_masks`. On a GPU the places where pixels change are found there,
            and come to the CPU in one copy, which waits for all that computes them.
        boxes: ``[N, 4]``, as in :func:`paste_masks`.
        image_size: height and width of the image.
        threshold: zero or more; pixels are ``value >= threshold``.
        method: as in :func:`paste_masks`.
        with_boxes: whether to return areas and tight boxes, too; they cost nothing more.
        counts: ``"bytes"`` as ``pycocotools.mask.encode`` gives them, or ``"str"``, which JSON can
            hold. Every function of pycocotools takes both, and so does ``COCO.loadRes``.

    Returns:
        For each mask a dict with ``size`` (height, width) and ``counts``; with ``with_boxes=True``
        a :class:`PastedRLE`. Boxes that are NaN, reversed, far away or huge give what
        :func:`paste_masks` has for them.

    No gradients, and not under ``torch.compile``, ``vmap`` or in a CUDA graph: lengths are data.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, a negative threshold.
        ValueError, TypeError: an unknown method or type of counts, an image size or threshold that
            is none.

    Source:
        ``maskApi.c`` of pycocotools, with which results are compared byte for byte.

    >>> import torch, glimpse_ext
    >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    >>> glimpse_ext.paste_masks_to_rle(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4))
    [{'size': [2, 4], 'counts': b'323'}]
    """
    arguments, _ = outline_arguments(_NAME, masks, boxes, image_size, threshold, method)
    masks, boxes, height, width, *rule = arguments
    as_text = choose(_NAME, "counts", counts, {"bytes": False, "str": True})
    if masks.device != boxes.device:
        raise RuntimeError(
            f"{_NAME}: boxes must be on the device of the masks, {masks.device}, got {boxes.device}"
        )
    if height * width >= _DEVICE_PIXELS:
        masks, boxes = masks.cpu(), boxes.cpu()
    with torch.no_grad():
        written, ends, areas, tight = _runs(masks, boxes, height, width, *rule)
    text = ctypes.string_at(written.data_ptr(), written.numel()) if written.numel() > 0 else b""
    whole: bytes | str = text.decode("ascii") if as_text else text
    place: list[int] = ends.flatten().tolist()
    rles: list[RLE] = [
        {"size": [height, width], "counts": whole[start:end]}
        for start, end in zip([0, *place], place, strict=False)
    ]
    return PastedRLE(rles, areas.flatten(), tight) if with_boxes else rles
