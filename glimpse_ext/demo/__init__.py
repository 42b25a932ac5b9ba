# SPDX-License-Identifier: BSD-3-Clause
"""``glimpse-ext demo``: train a small detector on half a photograph, find the coins of the other.

It shows this package at its main job. Features are pooled by ``multiscale_roi_align``; mask targets
and training crops are cut by ``roi_align``; the masks of which it reports the average precision are
pasted into the photograph by ``paste_masks``.

==============  ===================================================
`data`          the photograph, its labels, its halves, random crops
`boxes`         overlap, box coding, non-maximum suppression
`pooling`       the two ways to pool: this package, ``grid_sample``
`detector`      backbone, pyramid, proposals, box head, mask head
`training`      the loop
`evaluation`    average precision, by pycocotools
`measure`       the share of pooling in a training step
`picture`       the PNG
==============  ===================================================

``glimpse-ext demo --glimpse`` is another one, in `reading`, `reader` and `reading_picture`: a
recurrent reader learns where to look, by the gradient in the offsets of ``extract_glimpse``.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import glimpse_ext

from . import data, evaluation, measure, picture, reading, training
from .pooling import GlimpsePooling

STEPS = 200
CROP_SIZE = 160
BATCH_SIZE = 4
ROUNDS = 7  # of the timing; medians are kept
QUICK_STEPS, QUICK_ROUNDS = 4, 1
EXPECTED_AP50 = 0.8

ABOUT = """\
Trains a small two-stage detector (backbone, feature pyramid, region proposals, box head, mask
head) on the upper half of scikit-image's photograph of coins and finds the coins of the lower half.

The labels come from classical segmentation (watershed), not from people, and both halves belong
to one photograph: the average precision says that the detector and its operators work, not how well
it would do on other photographs.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="glimpse-ext demo",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument(
        "--seed", type=int, default=0, help="weights, crops and sampling (default: 0)"
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("glimpse-demo"),
        help="folder to write to (default: glimpse-demo)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that everything runs"
    )
    parser.add_argument(
        "--glimpse",
        action="store_true",
        help="instead: a reader that learns where to look for a handwritten digit "
        f"({reading.STEPS} steps)",
    )
    arguments = parser.parse_args(argv)
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.steps is None:
        full, quick = (
            (reading.STEPS, reading.QUICK_STEPS) if arguments.glimpse else (STEPS, QUICK_STEPS)
        )
        arguments.steps = quick if arguments.quick else full
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "glimpse_ext": glimpse_ext.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "device_name": (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        "threads": torch.get_num_threads(),
    }


def run(device: torch.device, seed: int, steps: int, rounds: int, out: Path) -> dict[str, Any]:
    """The whole demo. Writes ``coins.png`` and ``coins.json`` into ``out``; returns the latter."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    upper, lower = data.load_halves()
    print(
        f"skimage.data.coins: training on the {upper.name} ({len(upper.boxes)} coins), "
        f"held out is the {lower.name} ({len(lower.boxes)} coins).\n"
        "Labels come from classical segmentation (watershed), not from people; "
        "both halves belong to one photograph."
    )
    generator = torch.Generator().manual_seed(seed)
    crops = data.Crops(upper, CROP_SIZE, BATCH_SIZE, generator, device)
    with training.deterministic():
        detector = training.build_detector(GlimpsePooling(), seed, device)
        history = training.train(detector, crops, steps, generator)
        found = detector(lower.image[None, None].to(device))[0].cpu()
    precision = evaluation.average_precision(lower, found)
    times = measure.compare_pooling(detector, crops.next(), seed, rounds)

    summary = {
        **describe(device),
        "seed": seed,
        "steps": steps,
        "photograph": "skimage.data.coins",
        "trained_on": upper.name,
        "held_out": lower.name,
        "labels": "classical segmentation (watershed); the split is spatial, within one photograph",
        "held_out_coins": len(lower.boxes),
        "precision": precision,
        "times": times,
        "losses": {"total": history.total, **history.parts},
        "detections": [
            {"box": box, "score": score}
            for box, score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True)
        ],
    }
    picture.draw(out / "coins.png", lower, found, precision, history.total, times)
    summary["seconds"] = time.perf_counter() - start
    (out / "coins.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def report(summary: dict[str, Any], out: Path) -> str:
    precision, times = summary["precision"], summary["times"]

    def way(name: str) -> str:
        return (
            f"{times[f'{name}_step_seconds'] * 1e3:.0f} ms, "
            f"{times[f'{name}_share']:.0%} of it pooling"
        )

    return (
        f"held-out half   box AP {precision['box_AP']:.3f} (AP@0.5 {precision['box_AP50']:.3f}), "
        f"mask AP {precision['mask_AP']:.3f} (AP@0.5 {precision['mask_AP50']:.3f})\n"
        f"training step   {way('glimpse_ext')}; with grid_sample {way('grid_sample')}\n"
        f"wrote           {out / 'coins.png'} and {out / 'coins.json'} "
        f"after {summary['seconds']:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.glimpse:
        device = torch.device(arguments.device)
        return reading.main(device, arguments.seed, arguments.steps, arguments.out)
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    summary = run(
        torch.device(arguments.device), arguments.seed, arguments.steps, rounds, arguments.out
    )
    print(report(summary, arguments.out))
    # A short run is not expected to find anything; a full one that does not find the coins failed.
    if arguments.steps >= STEPS and summary["precision"]["box_AP50"] < EXPECTED_AP50:
        print(
            f"demo: a full run should reach AP@0.5 of at least {EXPECTED_AP50} on the held-out half"
        )
        return 1
    return 0
