# SPDX-License-Identifier: BSD-3-Clause
"""Named workloads: feature maps and boxes as a detector makes them.

A new operator adds its workloads here and its entry in ``peers.OPERATORS``; timing, checks, tables
and plots know neither.
"""

import math
import string
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Workload:
    """Boxes read from feature maps. ``strides`` are image pixels per feature map pixel.

    Box sides are log-uniform between ``sides`` and height over width is log-uniform from 0.6 to
    1.6; boxes lie inside the image. ``sampling_ratio`` 0 is adaptive.
    """

    name: str
    what: str
    operator: str
    strides: tuple[int, ...]
    channels: int
    boxes: int
    sides: tuple[float, float]
    output_size: int
    sampling_ratio: int
    aligned: bool
    image: tuple[int, int] = (800, 1344)
    batch: int = 1
    mask: int = 0
    """Side of the masks that are pasted; 0: feature maps are read."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(self.image[0] // s, self.image[1] // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    def quick(self) -> "Workload":
        """About an eighth of the work; call overhead stays what it is."""
        if self.boxes < 10:
            return self
        channels = self.channels // 4 if self.channels >= 64 else self.channels
        batch = self.batch // 2 if self.batch == self.boxes else self.batch
        return replace(self, channels=channels, boxes=self.boxes // 2, batch=batch)

    def tiny(self) -> "Workload":
        """A size for tests: only good to see that everything runs."""
        low, high = self.sides
        return replace(
            self,
            channels=min(self.channels, 4),
            boxes=6,
            batch=min(self.batch, 6),
            sides=(min(low, 24), min(high, 90)),
            image=(64, 96),
        )

    def make_boxes(self, seed: int = 0) -> Tensor:
        """``[K, 5]`` float32 on the CPU, sorted by image: image, x1, y1, x2, y2."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        count = self.boxes
        extent = torch.tensor([self.image[1], self.image[0]], dtype=torch.float64)
        low, high = (math.log(side) for side in self.sides)
        side = torch.exp(low + (high - low) * uniform(count))
        aspect = torch.exp(math.log(0.6) + (math.log(1.6) - math.log(0.6)) * uniform(count))
        sides = torch.stack([side / aspect.sqrt(), side * aspect.sqrt()], 1)
        # A box as wide as the image would have samples exactly on pixels, where the gradient to the
        # box jumps, and rounding would choose the side.
        sides = sides.minimum(extent * (0.93 + 0.06 * uniform(count, 2)))
        corner = (extent - sides) * uniform(count, 2)
        image = torch.arange(count) * self.batch // max(count, 1)
        return torch.cat([image[:, None].double(), corner, corner + sides], 1).float()

    def make_features(self, dtype: torch.dtype, layout: str, seed: int = 0) -> list[Tensor]:
        """Normal random maps on the CPU, one per stride; or masks ``[K, 1, M, M]`` from 0 to 1."""
        generator = torch.Generator().manual_seed(seed)
        if self.mask:
            shape = (self.boxes, 1, self.mask, self.mask)
            return [torch.rand(shape, generator=generator).to(dtype)]
        maps = []
        for height, width in self.sizes:
            shape = (self.batch, self.channels, height, width)
            made = torch.randn(shape, generator=generator).to(dtype)
            maps.append(made.contiguous(memory_format=LAYOUTS[layout]))
        return maps


_PYRAMID = (4, 8, 16, 32)

WORKLOADS = [
    Workload(
        name="W1",
        what="fpn_p2_7x7: finest pyramid level, 512 boxes",
        operator="roi_align",
        strides=(4,),
        channels=256,
        boxes=512,
        sides=(16, 112),
        output_size=7,
        sampling_ratio=2,
        aligned=True,
    ),
    Workload(
        name="W2a",
        what="p4_adaptive: large boxes, adaptive sampling",
        operator="roi_align",
        strides=(16,),
        channels=256,
        boxes=512,
        sides=(224, 448),
        output_size=7,
        sampling_ratio=0,
        aligned=True,
    ),
    Workload(
        name="W2b",
        what="c4_adaptive: C4 box head, 1024 channels",
        operator="roi_align",
        strides=(16,),
        channels=1024,
        boxes=128,
        sides=(32, 800),
        output_size=14,
        sampling_ratio=0,
        aligned=True,
    ),
    Workload(
        name="W3",
        what="mask_head_14x14: 128 boxes",
        operator="roi_align",
        strides=(8,),
        channels=256,
        boxes=128,
        sides=(112, 224),
        output_size=14,
        sampling_ratio=2,
        aligned=True,
    ),
    Workload(
        name="W4a",
        what="pooler_1000, 7x7: four levels, two images",
        operator="multiscale_roi_align",
        strides=_PYRAMID,
        channels=256,
        boxes=1000,
        sides=(16, 600),
        output_size=7,
        sampling_ratio=2,
        aligned=False,
        batch=2,
    ),
    Workload(
        name="W4b",
        what="pooler_1000, 14x14: four levels, two images",
        operator="multiscale_roi_align",
        strides=_PYRAMID,
        channels=256,
        boxes=1000,
        sides=(16, 600),
        output_size=14,
        sampling_ratio=2,
        aligned=False,
        batch=2,
    ),
    Workload(
        name="W5",
        what="tiny: what a call costs",
        operator="roi_align",
        strides=(8,),
        channels=16,
        boxes=4,
        sides=(64, 160),
        output_size=7,
        sampling_ratio=2,
        aligned=True,
        image=(256, 256),
    ),
    Workload(
        name="W6a",
        what="paste_100: bool masks of 28x28 into 800x1333",
        operator="paste_masks",
        strides=(1,),
        channels=1,
        boxes=100,
        sides=(64, 400),
        output_size=0,
        sampling_ratio=1,
        aligned=True,
        image=(800, 1333),
        mask=28,
    ),
    Workload(
        name="W6b",
        what="paste_100: bool masks of 28x28 into 1080x1920",
        operator="paste_masks",
        strides=(1,),
        channels=1,
        boxes=100,
        sides=(64, 540),
        output_size=0,
        sampling_ratio=1,
        aligned=True,
        image=(1080, 1920),
        mask=28,
    ),
    Workload(
        name="W7",
        what="glimpse_64: exact windows of 64x64, zeros outside",
        operator="extract_glimpse",
        strides=(1,),
        channels=3,
        boxes=64,
        sides=(64, 65),
        output_size=64,
        sampling_ratio=1,
        aligned=True,
        image=(224, 224),
        batch=64,
    ),
    Workload(
        name="W8a",
        what="crop_64: boxes of images to 112x112",
        operator="crop",
        strides=(1,),
        channels=3,
        boxes=64,
        sides=(120, 215),
        output_size=112,
        sampling_ratio=1,
        aligned=True,
        image=(224, 224),
        batch=64,
    ),
    Workload(
        name="W8b",
        what="crop_64: boxes of images to 224x224",
        operator="crop",
        strides=(1,),
        channels=3,
        boxes=64,
        sides=(120, 215),
        output_size=224,
        sampling_ratio=1,
        aligned=True,
        image=(224, 224),
        batch=64,
    ),
    Workload(
        name="W9",
        what="crop_and_resize_100: 14x14 of a feature map",
        operator="crop_and_resize",
        strides=(8,),
        channels=256,
        boxes=100,
        sides=(64, 400),
        output_size=14,
        sampling_ratio=1,
        aligned=True,
        batch=2,
    ),
    Workload(
        name="W10",
        what="rotated: boxes of the size of W1 at all angles",
        operator="roi_align_rotated",
        strides=(4,),
        channels=256,
        boxes=512,
        sides=(32, 224),
        output_size=7,
        sampling_ratio=2,
        aligned=True,
    ),
]


def select(names: list[str]) -> list[Workload]:
    """The workloads of these names; W2 means W2a and W2b. ValueError where there is none."""
    chosen = []
    for name in names:
        found = [w for w in WORKLOADS if name in (w.name, w.name.rstrip(string.ascii_lowercase))]
        if not found:
            known = ", ".join(workload.name for workload in WORKLOADS)
            raise ValueError(f"there is no workload {name}; there are {known}")
        chosen += [workload for workload in found if workload not in chosen]
    return chosen
