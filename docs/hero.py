# SPDX-License-Identifier: BSD-3-Clause
"""The picture at the top of the README: one photograph, and what five operators make of it.

    python docs/hero.py [FILE]      writes docs/hero.png, or FILE

Every tile is the result of the call that is written over it. The background is transparent and the
colours have contrast on white and on black. The photograph is skimage.data.coffee (public domain);
`pip install ".[demo]"` has it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Polygon, Rectangle
from scipy import ndimage
from skimage import data
from torch import Tensor

import glimpse_ext

PICTURE = Path(__file__).resolve().parent / "hero.png"
CROP, ALIGN, TURNED, GLIMPSE, MASK = "#2f81f7", "#d97706", "#2da44e", "#d6409f", "#8b6cef"
WORDS = "#808892"
LINE = 2.4

# x1, y1, x2, y2 in edge units; centre x, centre y, width, height, degrees; x, y.
HANDLE = (186.0, 216.0, 282.0, 312.0)
CUP = (170.0, 16.0, 412.0, 210.0)
SPOON = (389.0, 196.0, 92.0, 276.0, -12.0)
EYE = (286.0, 148.0)
WHOLE = (72.0, 12.0, 484.0, 394.0)
CELLS, WINDOW, MASK_SIDE = 7, 48, 28


def photograph() -> Tensor:
    """[1, 3, H, W] of 0 to 1."""
    return torch.from_numpy(data.coffee()).permute(2, 0, 1)[None].float() / 255


def mask_of_whole(image: Tensor) -> Tensor:
    """[1, 28, 28]: what a mask head would say of the box of cup and saucer, red and white."""
    red, green, blue = image[0]
    reddish = (green < 0.5 * red) & (blue < 0.45 * red) & (red > 0.12)
    whitish = (image[0].amin(0) > 0.42) & (image[0].amax(0) - image[0].amin(0) < 0.3)
    labels, _ = ndimage.label(ndimage.binary_opening((reddish | whitish).numpy(), iterations=2))
    largest = torch.from_numpy(labels).flatten().bincount()[1:].argmax() + 1
    whole = ndimage.binary_fill_holes(ndimage.binary_closing(labels == int(largest), iterations=6))
    box = torch.tensor([[0.0, *WHOLE]])
    inside = torch.from_numpy(whole).float()[None, None]
    return glimpse_ext.roi_align(inside, box, MASK_SIDE, aligned=True)[:, 0]


def shown(tile: Tensor) -> Any:
    return tile.permute(1, 2, 0).clamp(0, 1).numpy()


def corners(x: float, y: float, width: float, height: float, degrees: float) -> list[list[float]]:
    """Of a rotated box: counter-clockwise on a picture whose y points down."""
    angle = torch.tensor(degrees).deg2rad()
    cos, sin = float(angle.cos()), float(angle.sin())
    ends = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    local = [(a * width, b * height) for a, b in ends]
    return [[x + u * cos + v * sin, y - u * sin + v * cos] for u, v in local]


def place(axes: Any, image: Any, colour: str, title: str, **options: Any) -> None:
    height, width = image.shape[:2]
    options.setdefault("interpolation", "nearest")
    axes.imshow(image, extent=(0, width, height, 0), **options)
    axes.set_title(title, color=colour, fontsize=11.5, family="monospace", pad=6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(LINE)


def box_of(x1: float, y1: float, x2: float, y2: float, **options: Any) -> Rectangle:
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **options)


def draw_photograph(axes: Any, image: Tensor) -> None:
    place(axes, shown(image[0]), WORDS, "", interpolation="bilinear")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.add_patch(box_of(*WHOLE, edgecolor=MASK, linewidth=LINE))
    x1, y1, x2, y2 = CUP
    axes.add_patch(box_of(*CUP, edgecolor=ALIGN, linewidth=LINE))
    for i in range(1, CELLS):
        x, y = x1 + i * (x2 - x1) / CELLS, y1 + i * (y2 - y1) / CELLS
        axes.plot([x, x], [y1, y2], color=ALIGN, linewidth=0.8)
        axes.plot([x1, x2], [y, y], color=ALIGN, linewidth=0.8)
    steps = (torch.arange(2 * CELLS) + 0.5) / (2 * CELLS)
    ys, xs = torch.meshgrid(y1 + steps * (y2 - y1), x1 + steps * (x2 - x1), indexing="ij")
    axes.plot(xs.flatten(), ys.flatten(), ".", color="white", markersize=2.2)
    axes.add_patch(box_of(*HANDLE, edgecolor=CROP, linewidth=LINE))
    axes.add_patch(Polygon(corners(*SPOON), fill=False, edgecolor=TURNED, linewidth=LINE))
    x, y = EYE
    for scale in (1, 2, 4):
        reach = scale * WINDOW / 2
        square = (x - reach, y - reach, x + reach, y + reach)
        axes.add_patch(box_of(*square, edgecolor=GLIMPSE, linewidth=LINE, linestyle=(0, (3, 2))))
    axes.plot(x, y, "+", color=GLIMPSE, markersize=11, markeredgewidth=LINE)


def main(path: Path) -> None:
    image = photograph()
    height, width = image.shape[2:]

    handle = glimpse_ext.crop(image, torch.tensor([[0.0, *HANDLE]]), 112, box_format="pixels")
    cup = glimpse_ext.roi_align(
        image, torch.tensor([[0.0, *CUP]]), CELLS, sampling_ratio=2, aligned=True
    )
    spoon = glimpse_ext.roi_align_rotated(image, torch.tensor([[0.0, *SPOON]]), (168, 56))
    offset = torch.tensor([[2 * EYE[1] / height - 1, 2 * EYE[0] / width - 1]])
    glimpses = glimpse_ext.extract_glimpse(image, WINDOW, offset, noise="zero", scales=(1, 2, 4))
    mask = mask_of_whole(image)
    pasted = glimpse_ext.paste_masks(mask, torch.tensor([WHOLE]), (height, width))[0]

    figure = plt.figure(figsize=(13.6, 4.3), dpi=120)

    def tile(left: float, bottom: float, wide: float, high: float) -> Any:
        return figure.add_axes((left, bottom, wide, high))

    draw_photograph(tile(0.004, 0.02, 0.445, 0.95), image)
    place(tile(0.462, 0.46, 0.143, 0.452), shown(handle[0]), CROP, "crop")
    place(tile(0.622, 0.46, 0.178, 0.452), shown(cup[0]), ALIGN, "roi_align", aspect=194 / 242)
    place(tile(0.861, 0.025, 0.094, 0.89), shown(spoon[0]), TURNED, "roi_align_rotated")
    for i, part in enumerate(glimpses[0].unflatten(0, (3, 3))):
        title = "extract_glimpse" if i == 1 else ""
        place(tile(0.462 + 0.0635 * i, 0.1, 0.058, 0.184), shown(part), GLIMPSE, title)
    place(tile(0.662, 0.1, 0.058, 0.184), mask[0].numpy(), MASK, "28×28", cmap="gray", vmin=0)
    outside = torch.where(pasted, image[0], 0.22 * image[0])
    place(tile(0.726, 0.025, 0.12, 0.259), shown(outside), MASK, "paste_masks")
    figure.savefig(path, transparent=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
