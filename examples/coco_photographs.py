# SPDX-License-Identifier: BSD-3-Clause
"""Writes a small data set in COCO's format, made of the photographs that scikit-image brings.

    python examples/coco_photographs.py out/photographs --train 240 --val 40

Coins and pieces of a brick wall lie, turned and scaled, on other photographs, partly on top of each
other. The training split uses the upper coins and the left halves of the photographs, the
validation split the lower coins and the right halves. The layout is that of COCO: a folder of
pictures for each split and ``annotations/instances_SPLIT.json``, where pieces that are seen whole
are polygons and everything else is in run lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as coco_mask
from skimage import data
from torch import Tensor
from torchvision.io import write_png

import glimpse_ext
from glimpse_ext.demo.data import load_halves

# Identifiers with a gap, as COCO's own have.
CATEGORIES = {"coin": 1, "brick": 3}
BACKGROUNDS = ("astronaut", "chelsea", "coffee", "grass", "gravel", "rocket")
OBJECTS = (2, 6)  # fewest and most of a picture
SIDES = (28.0, 84.0)  # of an object's box before it is turned, in pixels
# Less than this part of an object is not worth finding.
VISIBLE = 0.25


@dataclass(frozen=True)
class Thing:
    """An object cut out: ``[3, S, S]`` pixels in 0..1 and ``[S, S]`` bool, where it is."""

    name: str
    pixels: Tensor
    mask: Tensor
    polygon: list[tuple[float, float]] | None
    """The corners (x, y) of the mask, where that is a polygon."""


def colour(photograph: Any) -> Tensor:
    """``[3, H, W]`` in 0..1."""
    pixels = torch.from_numpy(photograph.copy()).float() / 255
    return pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def rasterise(polygon: Sequence[tuple[float, float]], height: int, width: int) -> Tensor:
    """The pixels that COCO's tools give a polygon."""
    flat = [number for corner in polygon for number in corner]
    return decode(coco_mask.frPyObjects([flat], height, width)[0])


def decode(rle: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(coco_mask.decode(rle)).bool()


def encode(mask: Tensor) -> dict[str, Any]:
    rle: dict[str, Any] = coco_mask.encode(mask.to(torch.uint8).t().contiguous().t().numpy())
    return {**rle, "counts": rle["counts"].decode()}


class Scenes:
    """The pictures of one split. Picture ``i`` depends on the seed, the split and ``i`` only."""

    def __init__(self, split: str, size: tuple[int, int], seed: int) -> None:
        held_out = split != "train"
        self.size = size
        self.seed = 2 * seed + held_out
        coins = load_halves()[held_out]
        self.coins = torch.cat([coins.image[None], coins.masks.float()])[None]
        self.coin_boxes = coins.boxes
        self.wall = self.half(colour(data.brick()), held_out)
        self.backgrounds = [self.half(colour(getattr(data, b)()), held_out) for b in BACKGROUNDS]

    @staticmethod
    def half(photograph: Tensor, right: bool) -> Tensor:
        return photograph.chunk(2, dim=2)[right].contiguous()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.random))

    def choose(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.random))

    def background(self) -> Tensor:
        photograph = self.backgrounds[self.choose(len(self.backgrounds))]
        height, width = self.size
        # The largest window of the right shape, times a zoom, anywhere inside.
        scale = min(photograph.shape[1] / height, photograph.shape[2] / width)
        scale *= self.uniform(0.5, 1.0)
        x = self.uniform(0, photograph.shape[2] - scale * width)
        y = self.uniform(0, photograph.shape[1] - scale * height)
        box = torch.tensor([[0, x, y, x + scale * width, y + scale * height]])
        return glimpse_ext.roi_align(photograph[None], box, self.size, aligned=True)[0]

    def coin(self, side: int) -> Thing:
        """Any coin of this half, turned, a little darker or redder than it is."""
        number = self.choose(len(self.coin_boxes))
        x1, y1, x2, y2 = self.coin_boxes[number].tolist()
        length = 1.1 * max(x2 - x1, y2 - y1)
        turn = self.uniform(0, 360)
        box = torch.tensor([[0, (x1 + x2) / 2, (y1 + y2) / 2, length, length, turn]])
        layers = self.coins[:, [0, 1 + number]]
        grey, mask = glimpse_ext.roi_align_rotated(layers, box, side, sampling_ratio=2)[0]
        tint = torch.tensor([1.0, self.uniform(0.75, 1.0), self.uniform(0.5, 1.0)])
        return Thing("coin", tint[:, None, None] * grey, mask > 0.5, None)

    def brick(self, side: int) -> Thing:
        """A piece of the wall with four corners."""
        length = 1.5 * side
        x = self.uniform(0, self.wall.shape[2] - length)
        y = self.uniform(0, self.wall.shape[1] - length)
        box = torch.tensor([[0, x, y, x + length, y + length]])
        pixels = glimpse_ext.roi_align(self.wall[None], box, side, aligned=True)[0]
        turn = self.uniform(0, math.tau)
        polygon = []
        for quarter in range(4):
            angle = turn + (quarter + self.uniform(-0.25, 0.25)) * math.tau / 4
            reach = side * self.uniform(0.38, 0.49)
            x, y = side / 2 + reach * math.cos(angle), side / 2 + reach * math.sin(angle)
            polygon.append((round(x, 2), round(y, 2)))
        red = torch.tensor([1.0, 0.6, 0.45])
        return Thing("brick", red[:, None, None] * pixels, rasterise(polygon, side, side), polygon)

    def picture(self, index: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """``[3, H, W]`` uint8 and its annotations, without identifiers."""
        self.random = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        pixels = self.background()
        height, width = self.size
        things: list[tuple[Thing, Tensor, int, int]] = []
        for _ in range(OBJECTS[0] + self.choose(OBJECTS[1] - OBJECTS[0] + 1)):
            side = int(min(math.exp(self.uniform(*map(math.log, SIDES))), height, width))
            thing = self.coin(side) if self.uniform(0, 1) < 0.6 else self.brick(side)
            x, y = self.choose(width - side + 1), self.choose(height - side + 1)
            window = (slice(y, y + side), slice(x, x + side))
            mask = torch.zeros(self.size, dtype=torch.bool)
            mask[window] = thing.mask
            pixels[:, window[0], window[1]] = torch.where(
                thing.mask, thing.pixels, pixels[:, window[0], window[1]]
            )
            # What comes later lies on top.
            things = [(t, seen & ~mask, *corner) for t, seen, *corner in things]
            things.append((thing, mask, x, y))
        noise = 0.02 * torch.randn(pixels.shape, generator=self.random)
        pixels = self.uniform(0.7, 1.1) * pixels + noise
        annotations = [annotate(*thing) for thing in things if visible(*thing[:2])]
        return (255 * pixels).round().clamp(0, 255).to(torch.uint8), annotations


def visible(thing: Thing, seen: Tensor) -> bool:
    return int(seen.sum()) > VISIBLE * int(thing.mask.sum())


def annotate(thing: Thing, seen: Tensor, x: int, y: int) -> dict[str, Any]:
    rle = encode(seen)
    segmentation: Any = rle
    if thing.polygon is not None and seen.sum() == thing.mask.sum():
        moved = [(round(a + x, 2), round(b + y, 2)) for a, b in thing.polygon]
        segmentation = [[number for corner in moved for number in corner]]
        rle = encode(rasterise(moved, *seen.shape))
    return {
        "category_id": CATEGORIES[thing.name],
        "segmentation": segmentation,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
    }


def write_split(folder: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    scenes = Scenes(split, size, seed)
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for index in range(count):
        pixels, found = scenes.picture(index)
        image = {"id": index + 1, "file_name": f"{index + 1:06d}.png"}
        write_png(pixels, str(folder / split / image["file_name"]))
        images.append({**image, "height": size[0], "width": size[1]})
        for annotation in found:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append({**ids, **annotation})
    content = {
        "info": {"description": "coins and bricks on photographs of scikit-image"},
        "images": images,
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
        "annotations": annotations,
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write(folder: Path, train: int, val: int, size: tuple[int, int], seed: int = 0) -> None:
    """The data set in ``folder``; at once or not at all. One that is there already is kept."""
    made_of = {"train": train, "val": val, "size": list(size), "seed": seed}
    marker = folder / "made_of.json"
    if marker.exists():
        if json.loads(marker.read_text()) != made_of:
            raise SystemExit(f"{folder} holds another data set: {marker.read_text()}")
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    write_split(unfinished, "train", train, size, seed)
    write_split(unfinished, "val", val, size, seed)
    (unfinished / marker.name).write_text(json.dumps(made_of))
    try:
        unfinished.rename(folder)
    except OSError:
        # Another machine with the same disk was first.
        shutil.rmtree(unfinished)
        if not marker.exists():
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=240, help="pictures to train on")
    parser.add_argument("--val", type=int, default=40, help="pictures to validate on")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), help="height and width")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.train, args.val, tuple(args.size), args.seed)


if __name__ == "__main__":
    main()
