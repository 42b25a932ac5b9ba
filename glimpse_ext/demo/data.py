# SPDX-License-Identifier: BSD-3-Clause
"""The photograph, labelled by classical segmentation: a half to train on and a half held out."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation
from torch import Tensor

import glimpse_ext

# The photograph shows four rows of six coins. The line between the rows 149 and 150 runs through
# the wide gap between the second and the third row of coins, so it cuts none of them.
SPLIT_ROW = 150
COINS_PER_HALF = 12

# Grey values that are surely cloth and surely metal; the watershed decides about those between.
SURELY_BACKGROUND = 30
SURELY_COIN = 150
# Dust specks also pass the thresholds. The smallest coin has about a thousand pixels.
SMALLEST_COIN = 500


@dataclass(frozen=True)
class Half:
    """One half of the photograph with its labels.

    image: ``[H, W]`` float in 0..1.   masks: ``[G, H, W]`` bool.
    boxes: ``[G, 4]`` (x1, y1, x2, y2), edge units.
    """

    name: str
    image: Tensor
    masks: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Batch:
    """Training crops.

    images: ``[N, 1, S, S]`` in 0..1.   boxes and masks: one tensor of G rows per crop.
    """

    images: Tensor
    boxes: list[Tensor]
    masks: list[Tensor]


def label_coins(photograph: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Number the coins of the photograph: 0 is background, 1..G are the coins.

    Two markers (dark cloth, bright metal) are grown by a watershed over the edge strength, holes
    are filled, thin spurs and dust are removed. No learned model or hand annotation takes part.
    """
    markers = np.zeros(photograph.shape, dtype=np.int32)
    markers[photograph < SURELY_BACKGROUND] = 1
    markers[photograph > SURELY_COIN] = 2
    regions = segmentation.watershed(filters.sobel(photograph), markers)
    metal = morphology.opening(ndimage.binary_fill_holes(regions == 2), morphology.disk(3))
    numbered = measure.label(segmentation.clear_border(metal))
    large = [r.label for r in measure.regionprops(numbered) if r.area >= SMALLEST_COIN]
    coins, _, _ = segmentation.relabel_sequential(np.where(np.isin(numbered, large), numbered, 0))
    return np.asarray(coins, dtype=np.int32)


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes ``[G, 4]`` in edge units around non-empty masks ``[G, H, W]``."""

    def extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
        first = occupied.int().argmax(1)
        last = occupied.shape[1] - occupied.flip(1).int().argmax(1)
        return first, last

    x1, x2 = extent(masks.any(1))
    y1, y2 = extent(masks.any(2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def load_halves() -> tuple[Half, Half]:
    """The upper half (to train on) and the lower half (held out) of scikit-image's ``coins``.

    The file is part of the scikit-image package, so nothing is downloaded.
    """
    photograph = data.coins()
    labels = label_coins(photograph)

    def half(name: str, rows: slice) -> Half:
        part = torch.from_numpy(labels[rows].copy())
        numbers = part.unique()
        masks = part == numbers[numbers > 0][:, None, None]
        image = torch.from_numpy(photograph[rows].astype(np.float32) / 255)
        return Half(name, image, masks, boxes_of(masks))

    return half("upper half", slice(0, SPLIT_ROW)), half("lower half", slice(SPLIT_ROW, None))


class Crops:
    """Endless random crops of one half.

    Position, zoom, aspect, quarter turns, flips, light and noise vary. The photograph and its masks
    are stacked as the channels of one image, and one call of ``roi_align`` cuts and resizes all
    crops of a batch: a crop is a box, and outside the photograph RoIAlign reads zero.
    """

    def __init__(
        self,
        half: Half,
        size: int,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device,
    ):
        self.layers = torch.cat([half.image[None], half.masks.float()])[None].to(device)
        self.areas = half.masks.sum((1, 2)).to(device)
        self.size, self.batch_size = size, batch_size
        self.generator, self.device = generator, device

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def next(self) -> Batch:
        height, width = self.layers.shape[-2:]
        windows, zooms = [], []
        for _ in range(self.batch_size):
            zoom = math.exp(self.uniform(math.log(0.7), math.log(1.5)))
            aspect = math.exp(self.uniform(-0.1, 0.1))
            w, h = self.size / (zoom * aspect), self.size * aspect / zoom
            x = self.uniform(w / 3, width - w / 3)
            y = self.uniform(h / 3, height - h / 3)
            windows.append([0.0, x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            zooms.append(zoom)
        size = (self.size, self.size)
        boxes = torch.tensor(windows, device=self.device)
        crops = glimpse_ext.roi_align(self.layers, boxes, size, 1.0, sampling_ratio=2, aligned=True)
        examples = [self.finish(crop, zoom) for crop, zoom in zip(crops, zooms, strict=True)]
        return Batch(
            torch.stack([e[0] for e in examples]),
            [e[1] for e in examples],
            [e[2] for e in examples],
        )

    def finish(self, crop: Tensor, zoom: float) -> tuple[Tensor, Tensor, Tensor]:
        """Turn, flip and light one crop ``[1 + G, S, S]``; return its image, boxes and masks."""
        turns = int(torch.randint(4, (), generator=self.generator))
        crop = torch.rot90(crop, turns, (1, 2))
        if self.uniform(0, 1) < 0.5:
            crop = crop.flip(2)
        noise = torch.randn(crop[:1].shape, generator=self.generator).to(self.device)
        light = crop[:1].clamp_min(1e-3) ** math.exp(self.uniform(-0.3, 0.3))
        image = (
            self.uniform(0.7, 1.3) * light + self.uniform(-0.1, 0.1) + self.uniform(0, 0.04) * noise
        )
        masks = crop[1:] > 0.5
        # A sliver of a coin at the edge of the crop is not worth finding; from a quarter on it is.
        masks = masks[masks.sum((1, 2)) > 0.25 * zoom**2 * self.areas]
        return image, boxes_of(masks), masks
