# SPDX-License-Identifier: BSD-3-Clause
"""Arithmetic on boxes ``[K, 4]`` (x1, y1, x2, y2), edge units."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A predicted change of size is clamped, so that a wild early prediction cannot overflow exp.
LARGEST_LOG_SCALE = 2.0


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``[A, B]``."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clamp_min(0).prod(2)
    return intersection / (area(a)[:, None] + area(b)[None] - intersection).clamp_min(1e-6)


def clip(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Cut boxes at the edges of an image of size (height, width)."""
    height, width = size
    x = boxes[:, 0::2].clamp(0, width)
    y = boxes[:, 1::2].clamp(0, height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-3)


def encode(boxes: Tensor, origins: Tensor) -> Tensor:
    """``boxes`` relative to ``origins``: shift in units of the size, log of the ratio of sizes."""
    centre, size = _centres_and_sizes(boxes)
    origin_centre, origin_size = _centres_and_sizes(origins)
    return torch.cat([(centre - origin_centre) / origin_size, (size / origin_size).log()], dim=1)


def decode(deltas: Tensor, origins: Tensor) -> Tensor:
    """The inverse of `encode`."""
    origin_centre, origin_size = _centres_and_sizes(origins)
    centre = origin_centre + deltas[:, :2] * origin_size
    half = origin_size * deltas[:, 2:].clamp_max(LARGEST_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices of the boxes kept, best first.

    A box is kept when no better *kept* box overlaps it by more than ``threshold``. Starting from
    "all are kept", this sentence is applied to all boxes at once until nothing changes. The k best
    boxes are settled after k rounds, so it ends, at the greedy answer; chains of overlaps are
    short, so a few rounds do.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    beats = (iou(boxes, boxes) > threshold).triu(1)
    keep = torch.ones_like(order, dtype=torch.bool)
    while True:
        settled = ~(beats & keep[:, None]).any(0)
        if torch.equal(settled, keep):
            return order[keep]
        keep = settled


def with_image_index(boxes: Sequence[Tensor]) -> Tensor:
    """One ``[K, 5]`` tensor (image, x1, y1, x2, y2) from the boxes of each image."""
    counts = torch.tensor([len(b) for b in boxes])
    together = torch.cat(list(boxes))
    index = torch.arange(len(boxes)).repeat_interleave(counts).to(together)
    return torch.cat([index[:, None], together], dim=1)
