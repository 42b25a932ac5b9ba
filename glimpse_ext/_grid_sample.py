# SPDX-License-Identifier: BSD-3-Clause
"""RoIAlign built from ``grid_sample``, as well as it can be written.

This is what the demo and the benchmarks compare with, and nothing else uses it. All boxes of a map
are folded into one tall grid per image, so that the map is shared and never copied per box. Images
with fewer boxes than the fullest one are padded. The numbers are those of ``roi_align`` for boxes
that lie inside their image: ``grid_sample`` moves samples outside to the edge and drops none.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slots(NamedTuple):
    """The place of each box among the boxes of its image, and how many places an image has."""

    owner: Tensor
    slot: Tensor
    places: int


def slots_of(owner: Tensor, images: int) -> Slots:
    """Waits for the device, unless there is one image: make it once where images stay the same."""
    owner, boxes = owner.long(), len(owner)
    if images == 1:
        return Slots(owner, torch.arange(boxes, device=owner.device), boxes)
    held = torch.bincount(owner, minlength=images)
    order = owner.argsort(stable=True)
    first = held.cumsum(0) - held
    slot = torch.empty_like(owner)
    slot[order] = torch.arange(boxes, device=owner.device) - first[owner[order]]
    return Slots(owner, slot, int(held.max()) if boxes else 0)


def roi_align(
    image: Tensor,
    boxes: Tensor,
    size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    slots: Slots | None = None,
) -> Tensor:
    """Mean of samples in ``size`` by ``size`` cells of boxes ``[K, 5]``: ``[K, C, size, size]``.

    ``slots`` are those of the image column, where they are known; adaptive sampling has its own.
    """
    low = boxes[:, 1:3] * spatial_scale
    extent = (boxes[:, 3:5] - boxes[:, 1:3]) * spatial_scale
    if aligned:
        low = low - 0.5
    else:
        extent = extent.clamp(min=1)
    # grid_sample wants positions in the dtype of the image, and 16 bits are too few for them.
    wide = image.float() if image.dtype in (torch.float16, torch.bfloat16) else image
    if sampling_ratio > 0:
        count = (sampling_ratio, sampling_ratio)
        pooled = _pool(wide, boxes[:, 0], low, extent, size, count, slots)
    else:
        # A grid has one number of samples per cell: boxes that need the same share one.
        counts = torch.ceil(extent.detach() / size).long().clamp(min=1)
        kinds, kind = counts.unique(dim=0, return_inverse=True)
        rows = [torch.nonzero(kind == index)[:, 0] for index in range(len(kinds))]
        parts = [
            _pool(wide, boxes[row, 0], low[row], extent[row], size, (int(x), int(y)))
            for row, (x, y) in zip(rows, kinds.tolist(), strict=True)
        ]
        pooled = _in_box_order(parts, rows)
    return pooled.to(image.dtype)


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    size: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
) -> Tensor:
    """Each box from the map of a pyramid that suits its size, by torchvision's rule."""
    side = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt()
    finest = -round(math.log2(scales[0]))
    level = torch.floor(canonical_level + torch.log2(side / canonical_size) + 1e-6).long()
    level = (level - finest).clamp(0, len(features) - 1)
    rows = [torch.nonzero(level == index)[:, 0] for index in range(len(features))]
    parts = [
        roi_align(feature, boxes[row], size, scale, sampling_ratio, aligned)
        for feature, row, scale in zip(features, rows, scales, strict=True)
    ]
    return _in_box_order(parts, rows)


def _in_box_order(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts))[torch.cat(list(rows)).argsort()]


def _pool(
    image: Tensor,
    owner: Tensor,
    low: Tensor,
    extent: Tensor,
    size: int,
    samples: tuple[int, int],
    slots: Slots | None = None,
) -> Tensor:
    """``low`` and ``extent`` are ``[K, 2]``, x and y, in index units; ``samples`` per cell."""
    channels, height, width = image.shape[1:]
    if len(owner) == 0:
        return image.new_zeros(0, channels, size, size)

    def positions(axis: int, pixels: int) -> Tensor:
        """Sample positions ``[K, size * samples]`` of one axis; -1 and 1 are its outer pixels."""
        total = size * samples[axis]
        at = (torch.arange(total, device=low.device) + 0.5) / total
        index = low[:, axis, None] + extent[:, axis, None] * at
        return index * (2 / max(pixels - 1, 1)) - 1

    x, y = positions(0, width), positions(1, height)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return _fold(
        image, grid, slots or slots_of(owner, len(image)), "border", True, (samples[1], samples[0])
    )


def _fold(
    image: Tensor,
    grid: Tensor,
    slots: Slots,
    padding: str,
    align_corners: bool,
    samples: tuple[int, int] = (1, 1),
) -> Tensor:
    """Means of ``samples`` of grids ``[K, h, w, 2]``: one tall grid for each image."""
    images, channels = image.shape[:2]
    if images == 1:
        folded = grid[None]
    else:
        # Boxes that are not there lie outside.
        folded = grid.new_full((images, slots.places, *grid.shape[1:]), 4.0)
        folded[slots.owner, slots.slot] = grid
    sampled = F.grid_sample(
        image,
        folded.flatten(1, 2).to(image.dtype),
        padding_mode=padding,
        align_corners=align_corners,
    )
    if samples != (1, 1):
        sampled = F.avg_pool2d(sampled, samples)
    height, width = grid.shape[1] // samples[0], grid.shape[2] // samples[1]
    cells = sampled.view(images, channels, slots.places, height, width).transpose(1, 2)
    return cells[0] if images == 1 else cells[slots.owner, slots.slot]


def _wide(image: Tensor) -> Tensor:
    # grid_sample wants positions in the dtype of the image, and 16 bits are too few for them.
    return image.float() if image.dtype in (torch.float16, torch.bfloat16) else image


def _box_grid(low: Tensor, high: Tensor, size: int, align_corners: bool) -> Tensor:
    """``[K, size, size, 2]`` of boxes whose ends are given in grid_sample's numbers, x and y."""
    theta = torch.zeros(len(low), 2, 3, dtype=low.dtype, device=low.device)
    theta[:, 0, 0], theta[:, 1, 1] = ((high - low) / 2).unbind(1)
    theta[:, :, 2] = (high + low) / 2
    return F.affine_grid(theta, [len(low), 1, size, size], align_corners=align_corners)


def _numbers(x: Tensor, y: Tensor, width: int, height: int) -> Tensor:
    """Edges of pixels as grid_sample's numbers ``[K, 2]``; a tensor of sizes would be copied."""
    return torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=1)


def crop(image: Tensor, boxes: Tensor, size: int, slots: Slots) -> Tensor:
    """Boxes ``[K, 5]`` in pixels, one sample in the middle of each cell."""
    height, width = image.shape[2:]
    low, high = (_numbers(boxes[:, k], boxes[:, k + 1], width, height) for k in (1, 3))
    grid = _box_grid(low, high, size, False)
    return _fold(_wide(image), grid, slots, "zeros", False).to(image.dtype)


def crop_and_resize(image: Tensor, boxes: Tensor, size: int, slots: Slots) -> Tensor:
    """Boxes ``[K, 4]`` of y1, x1, y2, x2 in fractions of the outer pixel centres."""
    low, high = (_numbers(boxes[:, k + 1], boxes[:, k], 1, 1) for k in (0, 2))
    grid = _box_grid(low, high, size, True)
    return _fold(_wide(image), grid, slots, "zeros", True).to(torch.float32)


def roi_align_rotated(
    image: Tensor,
    boxes: Tensor,
    size: int,
    spatial_scale: float,
    sampling_ratio: int,
    slots: Slots,
) -> Tensor:
    """Boxes ``[K, 6]``: image, centre x, centre y, width, height, degrees."""
    height, width = image.shape[2:]
    centre, sides = boxes[:, 1:3] * spatial_scale - 0.5, boxes[:, 3:5] * spatial_scale
    count = size * sampling_ratio
    unit = (torch.arange(count, dtype=boxes.dtype, device=boxes.device) + 0.5) / count - 0.5
    x, y = unit * sides[:, :1], unit * sides[:, 1:]
    turn = torch.deg2rad(boxes[:, 5])[:, None, None]
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
    at_y = y * turn.cos() - x * turn.sin() + centre[:, 1, None, None]
    at_x = y * turn.sin() + x * turn.cos() + centre[:, 0, None, None]
    grid = torch.stack([at_x * (2 / (width - 1)) - 1, at_y * (2 / (height - 1)) - 1], dim=-1)
    samples = (sampling_ratio, sampling_ratio)
    return _fold(_wide(image), grid, slots, "border", True, samples).to(image.dtype)


def point_sample(image: Tensor, points: Tensor) -> Tensor:
    """PointRend's: ``[N, P, 2]`` of x, y in fractions of the images, zeros outside."""
    grid = (2 * points - 1).unsqueeze(2)
    wide = _wide(image)
    sampled = F.grid_sample(wide, grid.to(wide.dtype), align_corners=False)
    return sampled.squeeze(3).to(image.dtype)


def extract_glimpse(image: Tensor, size: int, offsets: Tensor) -> Tensor:
    """Whole windows around offsets y, x of TensorFlow's default kind, zeros outside."""
    height, width = image.shape[2:]
    y = torch.trunc((offsets[:, 0] * height + height - size) / 2)
    x = torch.trunc((offsets[:, 1] * width + width - size) / 2)
    low, high = (_numbers(x + side, y + side, width, height) for side in (0, size))
    grid = _box_grid(low, high, size, False)
    sampled = F.grid_sample(_wide(image), grid, align_corners=False)
    return sampled.to(image.dtype)


# What detectron2's masks in float32 may take on a GPU.
_PASTE_BYTES = 2**30


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], by_box: bool) -> Tensor:
    """Masks ``[K, 1, M, M]`` as bool images, as detectron2 does it.

    On the CPU it goes mask by mask and samples inside their boxes (``by_box``); on a GPU it samples
    the whole image for as many masks at a time as memory allows.
    """
    height, width = image_size
    pasted = torch.zeros(len(masks), 1, height, width, dtype=torch.bool, device=masks.device)
    if not by_box:
        chunks = max(1, math.ceil(len(masks) * height * width * 4 / _PASTE_BYTES))
        for part in torch.arange(len(masks), device=masks.device).chunk(chunks):
            grid = _paste_grid(boxes[part], (0, 0), (width, height))
            read = F.grid_sample(_wide(masks[part]), grid, align_corners=False)
            pasted[part] = read >= 0.5
        return pasted
    low = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
    high = (boxes[:, 2:].ceil() + 1).int().tolist()
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
        x1, y1 = min(x1, width), min(y1, height)
        grid = _paste_grid(boxes[k : k + 1], (x0, y0), (x1, y1))
        part = F.grid_sample(_wide(masks[k : k + 1]), grid, align_corners=False)
        pasted[k, 0, y0:y1, x0:x1] = part[0, 0] >= 0.5
    return pasted


def _paste_grid(boxes: Tensor, low: tuple[int, int], high: tuple[int, int]) -> Tensor:
    """Places on the masks of boxes ``[K, 4]``, for the pixels from ``low`` to ``high``, x and y."""
    places = []
    for axis in range(2):
        first, last = boxes[:, axis, None], boxes[:, axis + 2, None]
        pixel = torch.arange(low[axis], high[axis], device=boxes.device, dtype=torch.float32) + 0.5
        places.append((pixel - first) / (last - first) * 2 - 1)
    x, y = places
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
