# SPDX-License-Identifier: BSD-3-Clause
"""Masks of boxes as masks of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._arguments import choose, size_pair
from ._autograd import differentiates, transforms_active
from ._register import batch_rows, register_sampler, run_below_autograd
from ._sampling import COLUMNS, BoxColumns, Where, make_sampler

_KIND = 3
_AXES = BoxColumns(4, y=(0, 2), x=(1, 3))
COLUMNS[_KIND] = lambda params: _AXES

_NAME = "paste_masks"
METHODS = {"detectron2": False, "torchvision": True}
_ops = torch.ops.glimpse_ext


def _exact_axes(low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """paste_axis of csrc/geometry/conventions.h, in its order of operations."""
    step = size / (high - low)
    return (0.5 - low) * step - 0.5, step


def _snapped_axes(low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """snapped_paste_axis of csrc/geometry/conventions.h, in its order of operations."""
    # Along both directions torchvision grows the box by the width of the mask.
    width = size[..., 1:].double()
    grow = ((width + 2) / width).to(low.dtype)
    reach = (high - low) * 0.5 * grow
    centre = (high + low) * 0.5
    ends = torch.stack([centre - reach, centre + reach])
    whole = (ends.abs() < 2.0**63).all(0)
    first, last = torch.where(whole, ends, torch.zeros_like(ends)).to(torch.int64)
    pixels = last - first + 1
    # Edges may be 64 bits apart.
    wide = (pixels.double() + 2.0**64).to(low.dtype)
    step = (size + 2) / torch.where(pixels > 0, pixels.to(low.dtype), wide)
    origin = (0.5 - first.to(low.dtype)) * step - 1.5
    reads = whole & (last >= first)
    nothing = torch.full_like(origin, torch.inf)
    return torch.where(reads, origin, nothing), torch.where(reads, step, nothing)


def paste_axes(masks: Tensor, boxes: Tensor, snapped: bool) -> Tensor:
    """Origin y, origin x, step y and step x of each mask, with the bits of csrc/geometry.

    The kernels of the derivatives are given axes, because those of a mask are not affine in its
    box; autograd takes derivatives on from the axes to the boxes. These axes count cells from pixel
    0 of the image, where the forward kernels count from the box: in float32 a place on a mask of 28
    pixels at pixel 1000 differs by 1e-5.
    """
    boxes = boxes.to(torch.float64 if masks.dtype == torch.float64 else torch.float32)
    x1, y1, x2, y2 = boxes.unbind(-1)
    low, high = torch.stack([y1, x1], -1), torch.stack([y2, x2], -1)
    height, width = masks.shape[-2:]
    size = torch.stack([torch.full_like(y1, height), torch.full_like(x1, width)], -1)
    with torch.no_grad():
        if snapped:
            return torch.cat(_snapped_axes(low, high, size), -1)
        still = _exact_axes(low, high, size)
        # A box that is too thin to have a derivative gets a zero one, instead of NaN.
        moves = (still[1] / (high - low)).isfinite() & still[0].isfinite()
    axes = _exact_axes(
        torch.where(moves, low, torch.zeros_like(low)),
        torch.where(moves, high, torch.ones_like(high)),
        size,
    )
    return torch.cat([torch.where(moves, *pair) for pair in zip(axes, still, strict=True)], -1)


def _follows(boxes: Tensor) -> bool:
    """Whether a derivative to the boxes is asked for."""
    if torch.is_grad_enabled() and boxes.requires_grad:
        return True
    return (
        forward_ad._current_level >= 0
        and boxes.is_floating_point()
        and forward_ad.unpack_dual(boxes).tangent is not None
    )


def _bind(
    masks: Tensor, boxes: Tensor, height: int, width: int, snapped: bool
) -> tuple[Sequence[Tensor], Where]:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise RuntimeError(
            f"{_NAME}: boxes must be [{masks.shape[0]}, 4] (x1, y1, x2, y2), one for each mask, "
            f"got {list(boxes.shape)}"
        )
    if snapped and _follows(boxes):
        raise ValueError(
            f"{_NAME}: boxes have no derivative with method='torchvision', which rounds them to "
            "whole pixels; detach them or use method='detectron2'"
        )
    sampler = make_sampler((height, width), _KIND, ())
    axes = paste_axes(masks, boxes, snapped)
    features = masks.to(torch.uint8) if masks.dtype == torch.bool else masks
    return [features], Where(axes, None, None, None, 0, sampler)


def _fake_threshold(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> Tensor:
    dtype = torch.bool if threshold >= 0 else torch.uint8
    return torch.empty((masks.shape[0], 1, height, width), dtype=dtype, device=masks.device)


_values = register_sampler("paste_masks", _bind, batch=batch_rows(_ops.paste_masks.default))
_threshold = _ops.paste_masks_threshold.default
torch.library.register_fake("glimpse_ext::paste_masks_threshold", _fake_threshold)
torch.library.register_vmap("glimpse_ext::paste_masks_threshold", batch_rows(_threshold))


def prepare_masks(name: str, masks: Tensor, boxes: Tensor) -> tuple[Tensor, bool]:
    """Masks as ``[N, 1, Mh, Mw]`` of a dtype that kernels read, and whether they had 3 sizes."""
    if not isinstance(masks, Tensor) or not isinstance(boxes, Tensor):
        raise TypeError(f"{name}: masks and boxes must be tensors")
    flat = masks.dim() == 3
    if not flat and (masks.dim() != 4 or masks.shape[1] != 1):
        raise RuntimeError(
            f"{name}: masks must be [N, Mh, Mw] or [N, 1, Mh, Mw], got {list(masks.shape)}"
        )
    if masks.is_complex():
        raise RuntimeError(f"{name}: masks must be real numbers, got {masks.dtype}")
    if not (masks.is_floating_point() or masks.dtype in (torch.bool, torch.uint8)):
        masks = masks.to(torch.float32)
    return (masks.unsqueeze(1) if flat else masks), flat


def image_extent(name: str, image_size: Sequence[int]) -> tuple[int, int]:
    if isinstance(image_size, int):
        raise TypeError(f"{name}: image_size must be (height, width), got {image_size}")
    return size_pair(name, image_size, "image_size")


def outline_arguments(
    name: str,
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float,
    method: str,
) -> tuple[tuple[Tensor, Tensor, int, int, float, bool], bool]:
    """The arguments of operators that store no values of pixels, and whether masks had 3 sizes."""
    masks, flat = prepare_masks(name, masks, boxes)
    height, width = image_extent(name, image_size)
    snapped = choose(name, "method", method, METHODS)
    threshold = float(threshold)
    if threshold != threshold:
        raise ValueError(f"{name}: threshold must be a number, got nan")
    return (masks, boxes, height, width, threshold, snapped), flat


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float | None = 0.5,
    method: str = "detectron2",
) -> Tensor:
    """Masks predicted inside boxes, as masks of the whole image.

    The mask is stretched over its box and read at the centre of each pixel of the image, between
    mask pixels linearly and outside the mask as 0::

        0           1           2           3           4  edge units of the image
        |-----o-----|-----o-----|-----o-----|-----o-----|
                    |--x--|--x--|--x--|--x--|              mask of 4, box 1..3

    so a value fades to 0 between the outer mask pixels' centres and half a mask pixel beyond the
    box. Where the mask is not reached nothing is computed, and for ``bool`` and ``uint8`` results
    no float image is ever made.

    Args:
        masks: ``[N, Mh, Mw]`` or ``[N, 1, Mh, Mw]`` of any real dtype and strides. Integers and
            bool count as the numbers they are.
        boxes: ``[N, 4]`` of x1, y1, x2, y2 in edge units (pixel k covers k to k + 1), any float
            dtype. A reversed box mirrors its mask.
        image_size: height and width of the image.
        threshold: zero or more gives ``bool``, ``value >= threshold``; below zero gives ``uint8``,
            255 times the value without its fraction, at most 255; None gives the value.
        method: ``"detectron2"`` as above, or ``"torchvision"``, which first snaps boxes to whole
            pixels: masks get a border of zeros, boxes grow with it, their edges are truncated, and
            both edge pixels are covered.

    Returns:
        ``[N, H, W]``, or ``[N, 1, H, W]`` where masks have that dimension. Values are in the dtype
        of ``masks``, float32 for integers and bool. Places and sums are float32, float64 where
        ``masks`` are; bool and uint8 results have the same bits on every device. A box with
        NaN, without width or that starts at infinity gives zeros; one that only ends there has
        half of the first mask pixel everywhere, as ever wider boxes do.

        On the CPU a large result with few pixels inside boxes is memory that the operating system
        clears when it is touched, so that images cost what their boxes cost.

    Gradients:
        With ``threshold=None`` to ``masks`` and ``boxes``, of every order, in reverse and forward
        mode and under ``vmap``; with ``method="torchvision"`` to ``masks`` only. Deterministic.
        Derivatives, and values under ``torch.func``, read float32 masks at places that may be
        rounded by 1e-4 of a mask pixel more than the values themselves.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or masks without a pixel.
        ValueError, TypeError: an unknown method, an image size or threshold that is none, a
            derivative to boxes with ``method="torchvision"``.

    Source:
        ``paste_masks_in_image`` of detectron2 (its GPU path, which evaluates every pixel) and of
        torchvision 0.28. Numbers stored from both are tested.

    Differences from ``detectron2.layers.paste_masks_in_image``: its CPU path writes only pixels
    inside the box and a margin of one pixel, so soft edges of large mask pixels are cut off, and
    pixels beyond are False even for a threshold of 0; its GPU path evaluates every pixel, as here.
    Its CPU path raises where a box lies outside the image or is reversed; it samples 16-bit masks
    in 16 bits; masks must be square; without masks it returns uint8 for any threshold.

    Differences from ``torchvision.models.detection.roi_heads.paste_masks_in_image``: the values
    are those of ``threshold=None, method="torchvision"``. It raises for most boxes left of or above
    the image, and it makes the whole resized mask of a box, however far that reaches outside.

    >>> import torch, glimpse_ext
    >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    >>> glimpse_ext.paste_masks(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4))
    tensor([[[False, False,  True, False],
             [False,  True, False, False]]])
    """
    masks, flat = prepare_masks(_NAME, masks, boxes)
    height, width = image_extent(_NAME, image_size)
    snapped = choose(_NAME, "method", method, METHODS)
    if threshold is None:
        arguments = (masks, boxes, height, width, snapped)
        if torch.compiler.is_compiling() or transforms_active() or differentiates(masks, boxes):
            pasted = _values(*arguments)
        else:
            pasted = run_below_autograd(_ops.paste_masks.default, arguments)
    else:
        threshold = float(threshold)
        if threshold != threshold:
            raise ValueError(f"{_NAME}: threshold must be a number or None, got nan")
        pasted = _threshold(masks, boxes, height, width, threshold, snapped)
    return pasted.squeeze(1) if flat else pasted
