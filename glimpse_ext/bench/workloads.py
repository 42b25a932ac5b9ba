# SPDX-License-Identifier: BSD-3-Clause
"""Named workloads: feature maps and boxes as a detector makes them.

A new operator adds its workloads here and its entry in ``peers.OPERATORS``; timing, checks, tables
and plots know neither.
"""

import math
import string
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

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
    boxes: int
    sides: tuple[float, float]
    output_size: int
    operator: str = "roi_align"
    strides: tuple[int, ...] = (1,)
    channels: int = 256
    sampling_ratio: int = 2
    aligned: bool = True
    image: tuple[int, int] = (800, 1344)
    batch: int = 1
    mask: int = 0
    """Side of the masks that are pasted; 0: feature maps are read."""
    pixels: bool = False
    """Whether the images are pictures of bytes; the dtype is then that of the result."""
    points: int = 0
    """Points in each box, where points are read."""
    overhead: bool = False
    """Whether next to nothing is computed, so that the time is what a call costs."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(self.image[0] // s, self.image[1] // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    @property
    def whole(self) -> bool:
        """Whether each image or mask belongs to a box, so that boxes cannot be left out alone."""
        return self.batch == self.boxes or self.mask > 0

    def quick(self) -> "Workload":
        """About an eighth of the work; call overhead stays what it is."""
        if self.overhead:
            return self
        channels = self.channels // 4 if self.channels >= 64 else self.channels
        batch = self.batch // 2 if self.batch == self.boxes else self.batch
        return replace(self, channels=channels, boxes=self.boxes // 2, batch=batch)

    def tiny(self) -> "Workload":
        """A size for tests: only good to see that everything runs."""
        if self.overhead:
            return self
        low, high = self.sides
        return replace(
            self,
            channels=min(self.channels, 4),
            boxes=6,
            batch=min(self.batch, 6),
            sides=(min(low, 24), min(high, 90)),
            image=(64, 96),
            points=min(self.points, 9),
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
        """Normal random maps on the CPU, one per stride; or masks ``[K, 1, M, M]`` from 0 to 1.

        Masks are smooth, as a network gives them.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.mask:
            coarse = 2 * torch.randn((self.boxes, 1, 5, 5), generator=generator)
            size = (self.mask, self.mask)
            smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
            return [smooth.sigmoid().to(dtype)]
        if self.pixels:
            shape = (self.batch, self.channels, *self.image)
            picture = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return [picture.contiguous(memory_format=LAYOUTS[layout])]
        maps = []
        for height, width in self.sizes:
            shape = (self.batch, self.channels, height, width)
            made = torch.randn(shape, generator=generator).to(dtype)
            maps.append(made.contiguous(memory_format=LAYOUTS[layout]))
        return maps


_PYRAMID = (4, 8, 16, 32)

_W1 = Workload("W1", "fpn_p2_7x7: finest pyramid level, 512 boxes", 512, (16, 112), 7, strides=(4,))
_W4 = Workload(
    name="W4a",
    what="pooler_1000, 7x7: four levels, two images",
    boxes=1000,
    sides=(16, 600),
    output_size=7,
    operator="multiscale_roi_align",
    strides=_PYRAMID,
    aligned=False,
    batch=2,
)
_TINY = Workload(
    name="W5",
    what="tiny: what a call of roi_align costs",
    boxes=4,
    sides=(64, 160),
    output_size=7,
    strides=(8,),
    channels=16,
    image=(256, 256),
    overhead=True,
)
_PASTE = Workload(
    name="W6a",
    what="paste_100: bool masks of 28x28 into 800x1333",
    boxes=100,
    sides=(64, 400),
    output_size=0,
    operator="paste_masks",
    channels=1,
    image=(800, 1333),
    mask=28,
)
_IMAGES = Workload(
    name="W7",
    what="glimpse_64: exact windows of 64x64, zeros outside",
    boxes=64,
    sides=(64, 65),
    output_size=64,
    operator="extract_glimpse",
    channels=3,
    image=(224, 224),
    batch=64,
)
_CROP = replace(
    _IMAGES,
    name="W8a",
    what="crop_64: boxes of images to 112x112",
    sides=(120, 215),
    output_size=112,
    operator="crop",
)
_RESIZE = Workload(
    name="W9",
    what="crop_and_resize_100: 14x14 of a feature map",
    boxes=100,
    sides=(64, 400),
    output_size=14,
    operator="crop_and_resize",
    strides=(8,),
    batch=2,
)
# Rotated boxes have half of these sides, so that they lie inside however they are turned.
_ROTATED = replace(
    _W1,
    name="W10",
    what="rotated: boxes of the size of W1 at all angles",
    sides=(32, 224),
    operator="roi_align_rotated",
)
_POINTS = Workload(
    name="W11a",
    what="point_sample: 28x28 points in each of 100 boxes, finest pyramid level",
    boxes=100,
    sides=(16, 400),
    output_size=0,
    operator="point_sample",
    strides=(4,),
    points=784,
)

_BATCH = Workload(
    name="W13a",
    what="crop_batch_64: boxes of 8 pictures, antialiased to 224x224 and normalised",
    boxes=64,
    sides=(100, 600),
    output_size=224,
    operator="crop_batch",
    channels=3,
    image=(720, 1280),
    batch=8,
    pixels=True,
)


# Where an image is read, and not a map of an eighth of its size.
_SMALL: dict[str, Any] = {"image": (64, 64), "sides": (16, 40)}


def _tiny(letter: str, like: Workload, **changes: Any) -> Workload:
    """As W5, for another operator."""
    name = like.operator
    tiny = replace(
        _TINY, name=f"W5{letter}", what=f"tiny: what a call of {name} costs", operator=name
    )
    return replace(tiny, strides=like.strides, aligned=like.aligned, **changes)


WORKLOADS = [
    _W1,
    replace(_W1, name="W1s", what="W1 with one sample per cell", sampling_ratio=1),
    replace(
        _W1,
        name="W2a",
        what="p4_adaptive: large boxes, adaptive sampling",
        sides=(224, 448),
        strides=(16,),
        sampling_ratio=0,
    ),
    Workload(
        name="W2b",
        what="c4_adaptive: C4 box head, 1024 channels",
        boxes=128,
        sides=(32, 800),
        output_size=14,
        strides=(16,),
        channels=1024,
        sampling_ratio=0,
    ),
    Workload("W3", "mask_head_14x14: 128 boxes", 128, (112, 224), 14, strides=(8,)),
    _W4,
    replace(_W4, name="W4b", what="pooler_1000, 14x14: four levels, two images", output_size=14),
    _TINY,
    _tiny("m", _W4),
    _tiny("c", _CROP, batch=4, **_SMALL),
    _tiny("r", _RESIZE),
    _tiny("g", _IMAGES, batch=4, output_size=16, **_SMALL),
    _tiny("p", _PASTE, channels=1, mask=14, **_SMALL),
    _tiny("t", _ROTATED),
    _tiny("s", _POINTS, points=16),
    _tiny("b", _BATCH, batch=4, channels=3, pixels=True, **_SMALL),
    _PASTE,
    replace(
        _PASTE,
        name="W6b",
        what="paste_100: bool masks of 28x28 into 1080x1920",
        sides=(64, 540),
        image=(1080, 1920),
    ),
    replace(
        _PASTE,
        name="W6c",
        what="paste_100 as COCO run lengths, 800x1333",
        operator="paste_masks_to_rle",
    ),
    replace(
        _PASTE,
        name="W6d",
        what="paste_100 as COCO run lengths, 1080x1920",
        operator="paste_masks_to_rle",
        sides=(64, 540),
        image=(1080, 1920),
    ),
    _IMAGES,
    _CROP,
    replace(_CROP, name="W8b", what="crop_64: boxes of images to 224x224", output_size=224),
    _RESIZE,
    _ROTATED,
    _POINTS,
    replace(
        _POINTS,
        name="W11b",
        what="point_sample: 14x14 points in each of 1000 coarse masks of 80 classes",
        boxes=1000,
        batch=1000,
        sides=(4.0, 6.5),
        strides=(1,),
        channels=80,
        image=(7, 7),
        points=196,
    ),
    replace(_W1, name="W12", what="W1 with the largest sample of a cell", operator="roi_align_max"),
    _BATCH,
    replace(
        _BATCH,
        name="W13b",
        what="crop_batch_256: small boxes of 8 pictures to 64x64",
        boxes=256,
        sides=(24, 160),
        output_size=64,
    ),
]


def select(names: list[str]) -> list[Workload]:
    """The workloads of these names. ValueError where there is none.

    A name without its letter means all that have one (W2 is W2a and W2b), unless it is a name; and
    ``W5*`` is what begins so.
    """
    chosen: list[Workload] = []
    for name in names:
        found = [w for w in WORKLOADS if w.name == name] or [
            w
            for w in WORKLOADS
            if name == w.name.rstrip(string.ascii_lowercase) or fnmatchcase(w.name, name)
        ]
        if not found:
            known = ", ".join(workload.name for workload in WORKLOADS)
            raise ValueError(f"there is no workload {name}; there are {known}")
        chosen += [workload for workload in found if workload not in chosen]
    return chosen
