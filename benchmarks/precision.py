#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/precision.md: errors of each storage type against float64, beside those of the peers.

    python benchmarks/precision.py

Images hold numbers that every type stores exactly, so what is left is what the operators do. The
float64 result is that of this package, which a row of float64 shows to be that of the peers, too. A
peer takes part if it is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import glimpse_ext
from glimpse_ext import _grid_sample

PAGE = Path(__file__).resolve().parent.parent / "docs" / "precision.md"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Pool = Callable[[Tensor, Tensor], Tensor]
"""An image and boxes to the result; boxes are float32, or float64 beside a float64 image."""


@dataclass
class Comparison:
    title: str
    what: str
    image: Tensor
    boxes: Tensor
    result: tuple[int, ...]
    ours: Pool
    peers: dict[str, Pool] = field(default_factory=dict)


def eighths(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randint(-8, 9, size, generator=generator).double() / 8


def boxes_in(
    generator: torch.Generator, count: int, size: tuple[int, int], sides: tuple[float, float]
) -> Tensor:
    """Image 0, x1, y1, x2, y2 in pixels, inside of them; float32 holds the numbers."""
    extent = torch.tensor([size[1], size[0]])
    side = sides[0] + torch.rand(count, 2, generator=generator) * (sides[1] - sides[0])
    corner = 1 + torch.rand(count, 2, generator=generator) * (extent - 2 - side)
    return torch.cat([torch.zeros(count, 1), corner, corner + side], 1)


# ----------------------------------------------------------------------------------------- RoIAlign


def roi_align() -> Comparison:
    generator = torch.Generator().manual_seed(0)
    size, count, cells = (200, 336), 500, 7
    rest = (cells, 0.25, 2, True)

    def torchvision(image: Tensor, boxes: Tensor) -> Tensor:
        from torchvision.ops import roi_align

        # It asks for boxes in the type of the image.
        return roi_align(image, boxes.to(image.dtype), *rest)

    def autocast(image: Tensor, boxes: Tensor) -> Tensor:
        """As torchvision does it under autocast."""
        return torchvision(image.float(), boxes.float()).to(image.dtype)

    return Comparison(
        "RoIAlign",
        f"{count} boxes of 16 to 112 pixels, {cells}×{cells} cells, 2×2 samples each, of a map of "
        f"{size[0]}×{size[1]} at stride 4.",
        eighths(generator, 1, 16, *size),
        boxes_in(generator, count, (4 * size[0], 4 * size[1]), (16, 112)),
        (count, 16, cells, cells),
        lambda image, boxes: glimpse_ext.roi_align(image, boxes, *rest),
        {
            "torchvision": torchvision,
            "torchvision through float32 (autocast)": autocast,
            "grid_sample through float32": lambda image, boxes: _grid_sample.roi_align(
                image, boxes, *rest
            ),
        },
    )


# -------------------------------------------------------------------------------------------- crops


def theta_of(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 in -1..1 as the matrix of affine_grid."""
    x1, y1, x2, y2 = boxes.unbind(1)
    zero = torch.zeros_like(x1)
    rows = [(x2 - x1) / 2, zero, (x1 + x2) / 2, zero, (y2 - y1) / 2, (y1 + y2) / 2]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def crop() -> Comparison:
    generator = torch.Generator().manual_seed(1)
    size, count, cells = (480, 640), 32, 64
    boxes = boxes_in(generator, count, size, (80, 400))

    def sampled(image: Tensor, boxes: Tensor, dtype: torch.dtype) -> Tensor:
        pixels = boxes.new_tensor([size[1], size[0]] * 2)
        theta = theta_of(2 * boxes[:, 1:] / pixels - 1).to(dtype)
        grid = F.affine_grid(theta, [count, 1, cells, cells], align_corners=False)
        wide = image.to(dtype).expand(count, -1, -1, -1)
        return F.grid_sample(wide, grid, align_corners=False).to(image.dtype)

    def kornia(image: Tensor, boxes: Tensor) -> Tensor:
        from kornia.geometry.transform import crop_and_resize

        # Corners are indices, and without align_corners the box is that of their outer samples.
        half = (boxes[:, 3:] - boxes[:, 1:3]) / cells / 2
        low, high = boxes[:, 1:3] - 0.5 + half, boxes[:, 3:] - 0.5 - half
        (x1, y1), (x2, y2) = low.unbind(1), high.unbind(1)
        corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1).view(-1, 4, 2)
        images = image.expand(count, -1, -1, -1)
        cropped: Tensor = crop_and_resize(images, corners.to(image.dtype), (cells, cells))
        return cropped

    return Comparison(
        "Crops",
        f"{count} boxes of 80 to 400 pixels of an image of {size[0]}×{size[1]}, to {cells}×"
        f"{cells}: `crop`.",
        eighths(generator, 1, 3, *size),
        boxes,
        (count, 3, cells, cells),
        lambda image, boxes: glimpse_ext.crop(image, boxes, cells, box_format="pixels"),
        {
            "grid_sample": lambda image, boxes: sampled(image, boxes, image.dtype),
            "grid_sample through float32": lambda image, boxes: sampled(
                image, boxes, torch.promote_types(image.dtype, torch.float32)
            ),
            "kornia": kornia,
        },
    )


def points() -> Comparison:
    generator = torch.Generator().manual_seed(2)
    size, count = (200, 336), 20000
    places = torch.rand(1, count, 2, generator=generator) * 0.98 + 0.01

    def sampled(image: Tensor, places: Tensor) -> Tensor:
        grid = (2 * places - 1).unsqueeze(2).to(image.dtype)
        return F.grid_sample(image, grid, align_corners=False).squeeze(3)

    return Comparison(
        "Points",
        f"{count} points of a map of {size[0]}×{size[1]}: `point_sample`.",
        eighths(generator, 1, 16, *size),
        places,
        (1, 16, count),
        glimpse_ext.point_sample,
        {"grid_sample": sampled, "grid_sample through float32": _grid_sample.point_sample},
    )


def paste() -> Comparison:
    generator = torch.Generator().manual_seed(3)
    count, side, size = 20, 28, (240, 320)
    boxes = boxes_in(generator, count, size, (40, 200))[:, 1:]

    def torchvision(masks: Tensor, boxes: Tensor) -> Tensor:
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        pasted: Tensor = paste_masks_in_image(masks, boxes.to(masks.dtype), size)
        return pasted

    def detectron2s_way(masks: Tensor, boxes: Tensor) -> Tensor:
        """The grid of its GPU path, in the type of the masks."""
        places = []
        for axis, pixels in ((0, size[1]), (1, size[0])):
            first, last = boxes[:, axis, None], boxes[:, axis + 2, None]
            pixel = torch.arange(pixels, dtype=boxes.dtype) + 0.5
            places.append((pixel - first) / (last - first) * 2 - 1)
        x, y = places
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
        return F.grid_sample(masks, grid.to(masks.dtype), align_corners=False)

    return Comparison(
        "Masks",
        f"{count} masks of {side}×{side} in boxes of 40 to 200 pixels of an image of {size[0]}×"
        f"{size[1]}: `paste_masks(threshold=None)`. torchvision rounds boxes to whole pixels, in "
        "every type.",
        eighths(generator, count, 1, side, side),
        boxes,
        (count, 1, *size),
        lambda masks, boxes: glimpse_ext.paste_masks(masks, boxes, size, None),
        {"detectron2's way": detectron2s_way, "torchvision": torchvision},
    )


# -------------------------------------------------------------------------------------------- page


def run(pool: Pool, image: Tensor, boxes: Tensor, grad: Tensor) -> list[Tensor]:
    image = image.clone().requires_grad_()
    pooled = pool(image, boxes)
    return [pooled.detach().double(), torch.autograd.grad(pooled, image, grad)[0].double()]


def run_apart(pool: Pool, *arguments: Tensor) -> list[Tensor] | str:
    """The same in a process of its own; in words where there is no result."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        child = os.fork()
        if child == 0:
            try:
                result: list[Tensor] | str = run(pool, *arguments)
            except (RuntimeError, NotImplementedError) as reason:
                result = f"raises: {str(reason).splitlines()[0][:70]}"
            torch.save(result, path)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            return "ends the process"
        found: list[Tensor] | str = torch.load(path)
        return found


def error(got: Tensor, exact: Tensor) -> str:
    distance = (got - exact).abs() / (1 + exact.abs())
    wrong = int((~got.isfinite()).sum())
    if wrong:
        return f"{wrong} of {got.numel()} not finite | "
    return f"{distance.mean():.1e} | {distance.max():.1e}"


def section(comparison: Comparison) -> list[str]:
    generator = torch.Generator().manual_seed(4)
    image, boxes = comparison.image, comparison.boxes
    grad = eighths(generator, *comparison.result)
    exact = run(comparison.ours, image, boxes.double(), grad)
    lines = [
        f"## {comparison.title}",
        "",
        comparison.what,
        "",
        "| storage | | value: mean | largest | gradient to the image: mean | largest |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, pool in {"glimpse_ext": comparison.ours, **comparison.peers}.items():
            if not installed(name) or (dtype == torch.float64 and "float32" in name):
                continue
            row = f"| {str(dtype).split('.')[1]} | {name} | "
            got = run_apart(pool, image.to(dtype), boxes.to(wide), grad.to(dtype))
            if isinstance(got, str):
                row += f"{got} | | | |"
            else:
                row += " | ".join(error(a, b) for a, b in zip(got, exact, strict=True)) + " |"
            lines.append(row)
    return [*lines, ""]


PACKAGES = ("torchvision", "kornia")


def installed(name: str) -> bool:
    package = name.split()[0]
    return package not in PACKAGES or importlib.util.find_spec(package) is not None


def main() -> None:
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    versions = [f"torch {torch.__version__.split('+')[0]}"]
    versions += [f"{p} {importlib.metadata.version(p)}" for p in PACKAGES if installed(p)]
    lines = [
        "# Precision",
        "",
        f"Printed by `python benchmarks/precision.py` on a CPU with {', '.join(versions)}.",
        "",
        "Error |x − y| / (1 + |y|) against float64, of pixels that every type stores exactly. This "
        "package keeps boxes in float32 beside 16-bit images and computes places and sums in "
        "float32: what is left is the rounding of the result to its type. Peers do as their "
        "documentation says, which for most means that boxes or grids have the type of the image; "
        "*through float32* converts the image first, at the price of a copy of twice its size.",
        "",
    ]
    for comparison in (roi_align(), crop(), points(), paste()):
        lines += section(comparison)
    text = "\n".join(lines).rstrip() + "\n"
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
