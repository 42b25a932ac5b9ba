# SPDX-License-Identifier: BSD-3-Clause
"""RoIAlign built from ``grid_sample``, as well as it can be written.

This is what the demo and the benchmarks compare with, and nothing else uses it. All boxes of a map
are folded into one tall grid per image, so that the map is shared and never copied per box. Images
with fewer boxes than the fullest one are padded. The numbers are those of ``roi_align`` for boxes
that lie inside their image: ``grid_sample`` moves samples outside to the edge and drops none.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_align(
    image: Tensor,
    boxes: Tensor,
    size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Mean of samples in ``size`` by ``size`` cells of boxes ``[K, 5]``: ``[K, C, size, size]``."""
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
        pooled = _pool(wide, boxes[:, 0], low, extent, size, count)
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
    image: Tensor, owner: Tensor, low: Tensor, extent: Tensor, size: int, samples: tuple[int, int]
) -> Tensor:
    """``low`` and ``extent`` are ``[K, 2]``, x and y, in index units; ``samples`` per cell."""
    images, channels, height, width = image.shape
    if len(owner) == 0:
        return image.new_zeros(0, channels, size, size)
    owner = owner.long()
    count = torch.bincount(owner, minlength=images)
    slots = int(count.max())
    # The place of a box among the boxes of its image.
    order = owner.argsort(stable=True)
    first = count.cumsum(0) - count
    slot = torch.empty_like(owner)
    slot[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]

    def positions(axis: int, pixels: int) -> Tensor:
        """Sample positions ``[K, size * samples]`` of one axis; -1 and 1 are its outer pixels."""
        total = size * samples[axis]
        at = (torch.arange(total, device=low.device) + 0.5) / total
        index = low[:, axis, None] + extent[:, axis, None] * at
        return index * (2 / max(pixels - 1, 1)) - 1

    x, y = positions(0, width), positions(1, height)
    points = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    grid = points.new_zeros(images, slots, *points.shape[1:])
    grid[owner, slot] = points
    folded = grid.flatten(1, 2).to(image.dtype)
    sampled = F.grid_sample(image, folded, padding_mode="border", align_corners=True)
    if samples != (1, 1):
        sampled = F.avg_pool2d(sampled, (samples[1], samples[0]))
    cells = sampled.view(images, channels, slots, size, size)
    return cells.transpose(1, 2)[owner, slot]


def _fold(image: Tensor, grid: Tensor, owner: Tensor, padding: str, align_corners: bool) -> Tensor:
    """Samples ``[K, C, h, w]`` of grids ``[K, h, w, 2]``: one tall grid for each image."""
    images, channels = image.shape[:2]
    count, (height, width) = len(grid), grid.shape[1:3]
    owner = owner.long()
    held = torch.bincount(owner, minlength=images)
    slots = int(held.max()) if count else 0
    order = owner.argsort(stable=True)
    first = held.cumsum(0) - held
    slot = torch.empty_like(owner)
    slot[order] = torch.arange(count, device=owner.device) - first[owner[order]]
    # Boxes that are not there lie outside.
    folded = grid.new_full((images, slots, height, width, 2), 4.0)
    folded[owner, slot] = grid
    sampled = F.grid_sample(
        image,
        folded.flatten(1, 2).to(image.dtype),
        padding_mode=padding,
        align_corners=align_corners,
    )
    cells = sampled.view(images, channels, slots, height, width)
    return cells.transpose(1, 2)[owner, slot]


def _wide(image: Tensor) -> Tensor:
    # grid_sample wants positions in the dtype of the image, and 16 bits are too few for them.
    return image.float() if image.dtype in (torch.float16, torch.bfloat16) else image


def _box_grid(low: Tensor, high: Tensor, size: int, align_corners: bool) -> Tensor:
    """``[K, size, size, 2]`` of boxes whose ends are given in grid_sample's numbers, x and y."""
    theta = torch.zeros(len(low), 2, 3, dtype=low.dtype, device=low.device)
    theta[:, 0, 0], theta[:, 1, 1] = ((high - low) / 2).unbind(1)
    theta[:, :, 2] = (high + low) / 2
    return F.affine_grid(theta, [len(low), 1, size, size], align_corners=align_corners)


def crop(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes ``[K, 5]`` in pixels, one sample in the middle of each cell."""
    height, width = image.shape[2:]
    extent = boxes.new_tensor([width, height])
    low, high = boxes[:, 1:3] / extent * 2 - 1, boxes[:, 3:5] / extent * 2 - 1
    grid = _box_grid(low, high, size, False)
    return _fold(_wide(image), grid, boxes[:, 0], "zeros", False).to(image.dtype)


def crop_and_resize(image: Tensor, boxes: Tensor, owner: Tensor, size: int) -> Tensor:
    """Boxes ``[K, 4]`` of y1, x1, y2, x2 in fractions of the outer pixel centres."""
    numbers = boxes[:, [1, 0, 3, 2]] * 2 - 1
    grid = _box_grid(numbers[:, :2], numbers[:, 2:], size, True)
    return _fold(_wide(image), grid, owner, "zeros", True).to(torch.float32)


def roi_align_rotated(
    image: Tensor, boxes: Tensor, size: int, spatial_scale: float, sampling_ratio: int
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
    sampled = _fold(_wide(image), grid, boxes[:, 0], "border", True)
    return F.avg_pool2d(sampled, sampling_ratio).to(image.dtype)


def extract_glimpse(image: Tensor, size: int, offsets: Tensor) -> Tensor:
    """Whole windows around offsets y, x of TensorFlow's default kind, zeros outside."""
    height, width = image.shape[2:]
    extent = offsets.new_tensor([height, width])
    first = torch.trunc((offsets * extent + extent - size) / 2)[:, [1, 0]]
    ends = offsets.new_tensor([width, height])
    grid = _box_grid(first / ends * 2 - 1, (first + size) / ends * 2 - 1, size, False)
    sampled = F.grid_sample(_wide(image), grid, align_corners=False)
    return sampled.to(image.dtype)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks ``[K, 1, M, M]`` as bool images, mask by mask inside their boxes, as detectron2 does it
    on the CPU."""
    height, width = image_size
    pasted = torch.zeros(len(masks), 1, height, width, dtype=torch.bool, device=masks.device)
    low = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
    high = (boxes[:, 2:].ceil() + 1).int().tolist()
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
        x1, y1 = min(x1, width), min(y1, height)
        left, top, right, bottom = boxes[k].unbind()
        x = torch.arange(x0, x1, device=masks.device, dtype=torch.float32) + 0.5
        y = torch.arange(y0, y1, device=masks.device, dtype=torch.float32) + 0.5
        x = (x - left) / (right - left) * 2 - 1
        y = (y - top) / (bottom - top) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
        part = F.grid_sample(_wide(masks[k : k + 1]), grid[None], align_corners=False)
        pasted[k, 0, y0:y1, x0:x1] = part[0, 0] >= 0.5
    return pasted
