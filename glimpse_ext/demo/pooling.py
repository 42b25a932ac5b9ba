# SPDX-License-Identifier: BSD-3-Clause
"""Two ways to pool: this package's operators, and ``grid_sample`` as a careful user writes it."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import glimpse_ext

# A box as large as this is read from the level of stride 16 (level 4 of a pyramid), one half as
# large from stride 8, and so on. With the usual 224 all coins would land on the finest level.
CANONICAL_SIZE = 80
CANONICAL_LEVEL = 4
SAMPLES = 2  # samples per cell and axis


class Pooling(Protocol):
    """What the detector needs: boxes ``[K, 5]`` to pooled features ``[K, C, size, size]``."""

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        """Read each box from the level that suits its size."""
        ...

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Read boxes from full-size pictures ``[N, C, H, W]``."""
        ...


class GlimpsePooling:
    """One operator call, whatever the number of levels, images and boxes."""

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        return glimpse_ext.multiscale_roi_align(
            features,
            boxes,
            (size, size),
            scales,
            sampling_ratio=SAMPLES,
            aligned=True,
            canonical_size=CANONICAL_SIZE,
            canonical_level=CANONICAL_LEVEL,
        )

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        return glimpse_ext.roi_align(image, boxes, (size, size), 1.0, SAMPLES, aligned=True)


class GridSamplePooling:
    """The same numbers from ``grid_sample``, for boxes that lie inside their image.

    All boxes of a level are folded into one tall grid per image, so that the feature map is shared
    and never copied per box. Images with fewer boxes than the fullest one are padded.
    """

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        side = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt()
        finest = -round(math.log2(scales[0]))
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE) + 1e-6).long()
        level = (level - finest).clamp(0, len(features) - 1)
        rows = [torch.nonzero(level == index)[:, 0] for index in range(len(features))]
        pooled = [
            self._pool(feature, boxes[row], size, scale)
            for feature, row, scale in zip(features, rows, scales, strict=True)
        ]
        return torch.cat(pooled)[torch.cat(rows).argsort()]

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        return self._pool(image, boxes, size, 1.0)

    def _pool(self, image: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
        images, channels, height, width = image.shape
        if len(boxes) == 0:
            return image.new_zeros(0, channels, size, size)
        owner = boxes[:, 0].long()
        count = torch.bincount(owner, minlength=images)
        slots = int(count.max())
        # The place of a box among the boxes of its image.
        order = owner.argsort(stable=True)
        first = count.cumsum(0) - count
        slot = torch.empty_like(owner)
        slot[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]

        samples = size * SAMPLES
        at = (torch.arange(samples, device=boxes.device) + 0.5) / samples

        def positions(low: Tensor, high: Tensor, pixels: int) -> Tensor:
            """Sample positions ``[K, samples]`` of one axis; -1 and 1 are its outer pixels."""
            index = (low[:, None] + (high - low)[:, None] * at) * scale - 0.5
            return index * (2 / max(pixels - 1, 1)) - 1

        x = positions(boxes[:, 1], boxes[:, 3], width)
        y = positions(boxes[:, 2], boxes[:, 4], height)
        grid = boxes.new_zeros(images, slots, samples, samples, 2)
        grid[owner, slot] = torch.stack(
            torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1
        )
        folded = grid.view(images, slots * samples, samples, 2).to(image.dtype)
        sampled = F.grid_sample(image, folded, padding_mode="border", align_corners=True)
        cells = F.avg_pool2d(sampled, SAMPLES).view(images, channels, slots, size, size)
        return cells.transpose(1, 2)[owner, slot]
