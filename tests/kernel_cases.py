# SPDX-License-Identifier: BSD-3-Clause
"""Calls whose sizes together reach every CUDA kernel and make every barrier in it matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import arrange, random_tensor
from torch import Tensor

import glimpse_ext


@dataclass(frozen=True)
class Work:
    """A call whose features, boxes and output have sizes that reach particular kernels."""

    name: str
    channels: int
    output_size: tuple[int, int]
    sampling_ratio: int
    levels: tuple[tuple[int, int], ...] = ((21, 27),)
    batch: int = 2
    boxes: int = 12
    largest: float = 1.2  # box side, in units of the image side

    def __str__(self) -> str:
        return self.name

    def make_boxes(self) -> Tensor:
        unit = random_tensor((self.boxes, 4), torch.float64, self.name) / 2 + 0.5
        height, width = self.levels[0]
        # Sides from a fraction of a pixel to beyond the image, and some corners outside of it.
        side = 0.3 + (unit[:, 2:] ** 3) * self.largest * torch.tensor([width, height])
        start = (unit[:, :2] * 1.3 - 0.3) * torch.tensor([width, height])
        image = torch.arange(self.boxes) % self.batch
        return torch.cat([image[:, None], start, start + side], 1).float()


WORK = [
    Work("one_channel", 1, (3, 2), 2),
    Work("images", 3, (24, 9), 1, levels=((67, 70),), boxes=5),
    Work("fpn_box_head", 36, (7, 7), 2),
    Work("mask_head", 64, (14, 14), 2, boxes=7),
    Work("channel_tail", 133, (5, 4), 2, boxes=9),
    Work("many_channels", 264, (3, 3), 2, boxes=6),
    Work("adaptive", 40, (7, 7), 0),
    Work("adaptive_large_cells", 33, (2, 3), 0, levels=((70, 90),), boxes=6),
    Work("large_output", 5, (40, 33), 0, boxes=4),
    Work("many_rows", 12, (30, 20), 2, boxes=3),
    Work("many_rows_adaptive", 12, (20, 31), 0, boxes=3),
    Work("many_large_outputs", 2, (90, 40), 1, boxes=14, batch=1),
    Work("larger_output", 3, (1030, 2), 1, boxes=2, batch=1),
    Work("wide_output", 12, (2, 70), 2, boxes=4),
    Work("many_boxes", 8, (2, 2), 2, levels=((30, 34),), boxes=300),
    Work("pyramid", 34, (7, 7), 2, levels=((40, 44), (20, 22), (10, 11), (5, 6)), boxes=20),
    Work("pyramid_adaptive", 9, (3, 4), 0, levels=((33, 48), (17, 24), (9, 12)), boxes=40),
    Work("cells_of_many_columns", 9, (2, 3), 0, levels=((6, 900),), boxes=4),
    Work("samples_beyond_tables", 6, (4, 4), 200, boxes=2, batch=1),
    Work("many_images", 72, (3, 5), 2, levels=((9, 11),), boxes=90, batch=90),
    Work("many_images_even_cells", 70, (3, 4), 2, levels=((9, 11),), boxes=90, batch=90),
    Work("many_images_many_cells", 34, (20, 21), 1, levels=((9, 11),), boxes=90, batch=140),
]

Outputs = tuple[Tensor, ...]


def run(work: Work, dtype: torch.dtype, layout: str, device: str = "cpu") -> Outputs:
    """Pooled values, gradients of all features and of the boxes."""
    features = [
        arrange(
            random_tensor((work.batch, work.channels, h, w), dtype, f"{work} {h}").to(device),
            layout,
        )
        for h, w in work.levels
    ]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = work.make_boxes().to(device, precision)
    for leaf in (*features, boxes):
        leaf.requires_grad_()
    if len(features) == 1:
        pooled = glimpse_ext.roi_align(
            features[0], boxes, work.output_size, 1.0, work.sampling_ratio, aligned=True
        )
    else:
        pooled = glimpse_ext.multiscale_roi_align(
            features,
            boxes,
            work.output_size,
            [0.5**level for level in range(len(features))],
            work.sampling_ratio,
            canonical_size=20,
            canonical_level=1,
        )
    weights = random_tensor(tuple(pooled.shape), pooled.dtype, f"{work} grad").to(device)
    grads = torch.autograd.grad(pooled, [*features, boxes], weights)
    return (pooled.detach(), *grads)


def names(work: Work) -> list[str]:
    levels = [f"gradient of level {i}" for i in range(len(work.levels))]
    return ["pooled values", *levels, "gradient of the boxes"]
