#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/precision.md: errors of each storage type against float64, beside torchvision's.

    python benchmarks/precision.py

Images hold numbers that every type stores exactly, so what is left is what the operators do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import glimpse_ext

PAGE = Path(__file__).resolve().parent.parent / "docs" / "precision.md"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZE, CHANNELS, BOXES, CELLS = (200, 336), 16, 500, 7

Pool = Callable[[Tensor, Tensor], Tensor]


def ours(image: Tensor, boxes: Tensor) -> Tensor:
    return glimpse_ext.roi_align(image, boxes, CELLS, 0.25, 2, True)


def torchvision(image: Tensor, boxes: Tensor) -> Tensor:
    from torchvision.ops import roi_align

    # It asks for boxes in the type of the image.
    return roi_align(image, boxes.to(image.dtype), CELLS, 0.25, 2, True)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def eighths(*size: int) -> Tensor:
        return torch.randint(-8, 9, size, generator=generator).double() / 8

    height, width = SIZE
    corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width, height]) * 3.6
    side = 16 + torch.rand(BOXES, 2, generator=generator) * 96
    boxes = torch.cat([torch.zeros(BOXES, 1), corner, corner + side], 1)
    return eighths(1, CHANNELS, height, width), boxes, eighths(BOXES, CHANNELS, CELLS, CELLS)


def run(pool: Pool, image: Tensor, boxes: Tensor, grad: Tensor) -> list[Tensor]:
    image = image.clone().requires_grad_()
    pooled = pool(image, boxes)
    return [pooled.detach().double(), torch.autograd.grad(pooled, image, grad)[0].double()]


def error(got: Tensor, exact: Tensor) -> str:
    distance = (got - exact).abs() / (1 + exact.abs())
    return f"{distance.mean():.1e} | {distance.max():.1e}"


def main() -> None:
    image, boxes, grad = problem()
    exact = run(ours, image, boxes.double(), grad)
    peers: dict[str, Pool] = {"glimpse_ext": ours}
    versions = f"torch {torch.__version__}"
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = torchvision
        versions += f", torchvision {importlib.metadata.version('torchvision')}"
    lines = [
        "# Precision",
        "",
        f"Printed by `python benchmarks/precision.py` on the CPU with {versions}.",
        "",
        f"RoIAlign, {BOXES} float32 boxes of 16 to 112 pixels, {CELLS}×{CELLS} cells, 2×2 "
        f"samples each, a map of {SIZE[0]}×{SIZE[1]}; error |x − y| / (1 + |y|) against float64.",
        "",
        "| storage | | pooled: mean | largest | gradient to the image: mean | largest |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES[1:]:
        for name, pool in peers.items():
            row = f"| {str(dtype).split('.')[1]} | {name} | "
            try:
                got = run(pool, image.to(dtype), boxes, grad.to(dtype))
            except (RuntimeError, NotImplementedError) as reason:
                row += f"raises: {str(reason).splitlines()[0][:60]} | | |"
            else:
                row += " | ".join(error(a, b) for a, b in zip(got, exact, strict=True)) + " |"
            lines.append(row)
    text = "\n".join(lines) + "\n"
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
