# SPDX-License-Identifier: BSD-3-Clause
"""Compiles a small detector to FOLDER/detector.pt2, which main.cpp runs without Python.

Usage: export.py FOLDER. Beside the model lie inputs of several sizes with the results of this very
process, as case0.pt and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import glimpse_ext

SCALES = (1 / 4, 1 / 8)


class Detector(nn.Module):
    """Two levels of features, RoIAlign on the one that fits each box, a score for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=4, padding=2)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 7 * 7, 32), nn.ReLU())
        self.scores = nn.Linear(32, 5)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        fine = self.stem(image).relu()
        coarse = self.down(fine).relu()
        pooled = glimpse_ext.multiscale_roi_align(
            [fine, coarse], boxes, 7, SCALES, aligned=True, canonical_size=32, canonical_level=3
        )
        return self.scores(self.head(pooled)).sigmoid()


def case(images: int, height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """An image and boxes of many sizes, some of which leave it."""
    generator = torch.Generator().manual_seed(count)
    image = torch.rand(images, 3, height, width, generator=generator)
    unit = torch.rand(count, 4, generator=generator)
    extent = torch.tensor([width, height])
    low = (unit[:, :2] * 1.2 - 0.1) * extent
    high = low + (unit[:, 2:] * 0.7) ** 2 * extent
    index = torch.arange(count)[:, None] % images
    return image, torch.cat([index, low, high], 1)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = Detector().eval()
    with torch.no_grad():
        for i, sizes in enumerate([(1, 64, 96, 9), (2, 120, 88, 250), (1, 64, 64, 2)]):
            image, boxes = case(*sizes)
            pooled = glimpse_ext.roi_align(image, boxes, 7, 1.0, 2, True)
            tensors = {
                "image": image,
                "boxes": boxes,
                "scores": model(image, boxes),
                "pooled": pooled,
            }
            torch.save(tensors, folder / f"case{i}.pt")

    # Any number of images and boxes, and sides that both levels divide.
    rows, columns = (8 * torch.export.Dim(name, min=2, max=256) for name in ("rows", "columns"))
    images, count = (torch.export.Dim(name, min=1, max=4096) for name in ("images", "count"))
    program = torch.export.export(
        model, case(2, 64, 96, 9), dynamic_shapes=({0: images, 2: rows, 3: columns}, {0: count})
    )
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "detector.pt2")
        )
    print(path)


if __name__ == "__main__":
    main()
