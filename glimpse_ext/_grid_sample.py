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
