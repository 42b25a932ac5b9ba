#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""What ``glimpse_ext.patch("torchvision")`` does to the time of a Mask R-CNN's parts.

    python benchmarks/patch.py                       # a minute on two cores
    python benchmarks/patch.py --threads 1 --json patch.json
    python benchmarks/patch.py --device cuda

The model is torchvision's ``maskrcnn_resnet50_fpn`` with random weights; maps and boxes are those
of one image of 800 by 1344 pixels. With and without the patch take turns, and a ratio is the median
over rounds of ratios within a round, above 1 where the patch makes it faster. Results are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from timeit import default_timer
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn, roi_heads

import glimpse_ext
from glimpse_ext.bench.timing import interleave, ratios, summarise

IMAGE = 800, 1344
STRIDES = 4, 8, 16, 32
PROPOSALS, DETECTIONS = 1000, 100

Part = Callable[[], Any]


def boxes_of(count: int, device: str) -> Tensor:
    """Inside the image, with sides from 16 to 600 pixels, as many of each octave."""
    generator = torch.Generator().manual_seed(count)
    height, width = IMAGE
    sides = 16 * (600 / 16) ** torch.rand(count, 1, generator=generator)
    sides = sides * 1.6 ** torch.empty(count, 2).uniform_(-0.5, 0.5, generator=generator)
    room = torch.tensor([width, height]) - sides
    corners = torch.rand(count, 2, generator=generator) * room
    return torch.cat([corners, corners + sides], 1).to(device)


def parts(device: str) -> dict[str, Part]:
    """Each part of the model that is patched, as a call without arguments."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).to(device)
    heads = model.roi_heads
    height, width = IMAGE
    maps = {
        str(level): torch.randn(1, 256, height // stride, width // stride, device=device)
        for level, stride in enumerate(STRIDES)
    }
    found: dict[str, Part] = {}
    for name, pool, count in (
        ("box pooler", heads.box_roi_pool, PROPOSALS),
        ("mask pooler", heads.mask_roi_pool, DETECTIONS),
    ):
        boxes = [boxes_of(count, device)]

        def forward(pool: Any = pool, boxes: list[Tensor] = boxes) -> Tensor:
            with torch.no_grad():
                return pool(maps, boxes, [IMAGE])

        def training(pool: Any = pool, boxes: list[Tensor] = boxes) -> tuple[Tensor, ...]:
            leaves = {name: one.detach().requires_grad_() for name, one in maps.items()}
            pooled = pool(leaves, boxes, [IMAGE])
            return torch.autograd.grad(pooled, list(leaves.values()), torch.ones_like(pooled))

        found[f"{name}, {count} boxes, forward"] = forward
        found[f"{name}, {count} boxes, forward and backward"] = training
    masks = torch.rand(DETECTIONS, 1, 28, 28, device=device)
    pasted = boxes_of(DETECTIONS, device)
    found[f"paste_masks_in_image, {DETECTIONS} masks"] = lambda: roi_heads.paste_masks_in_image(
        masks, pasted, IMAGE
    )
    return found


def apart(ours: Any, theirs: Any) -> float:
    """As a fraction of the largest value."""
    if isinstance(theirs, tuple):
        return max(apart(a, b) for a, b in zip(ours, theirs, strict=True))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def measure(part: Part, rounds: int, seconds: float, device: str) -> dict[str, float]:
    def watch(patched: bool) -> Callable[[], float]:
        def once() -> float:
            patch = glimpse_ext.patch("torchvision") if patched else None
            try:
                return timed()
            finally:
                if patch is not None:
                    patch.undo()

        return once

    def timed() -> float:
        wait()
        start = default_timer()
        part()
        wait()
        return default_timer() - start

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    theirs = part()
    with glimpse_ext.patch("torchvision"):
        ours = part()
    error = apart(ours, theirs)
    if not error < 1e-4:
        raise SystemExit(f"results differ by {error:.1e} of the largest value")
    del ours, theirs
    times = interleave({"patched": watch(True), "torchvision": watch(False)}, rounds, seconds)
    kept = {name: [t for t in own if not math.isnan(t)] for name, own in times.items()}
    ratio = summarise(ratios(times["torchvision"], times["patched"]))
    return {
        "torchvision_ms": 1e3 * summarise(kept["torchvision"]).median,
        "patched_ms": 1e3 * summarise(kept["patched"]).median,
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each part and side")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = {
        name: measure(part, options.rounds, options.seconds, options.device)
        for name, part in parts(options.device).items()
    }
    print(f"{options.device}, {options.threads} threads, torch {torch.__version__}\n")
    print("| part | torchvision ms | patched ms | times faster (quartiles) |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['torchvision_ms']:.1f} | {row['patched_ms']:.1f} "
            f"| {row['ratio']:.1f} ({row['ratio_low']:.1f} to {row['ratio_high']:.1f}) |"
        )
    if options.json:
        context = {k: str(v) for k, v in vars(options).items()} | {"torch": torch.__version__}
        options.json.write_text(json.dumps({"context": context, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
