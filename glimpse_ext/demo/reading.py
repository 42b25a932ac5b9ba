# SPDX-License-Identifier: BSD-3-Clause
"""``glimpse-ext demo --glimpse``: learn where to look, by gradient through the offsets.

Handwritten digits lie anywhere on larger noisy canvases. A small recurrent reader sees a canvas
only through glimpses. The same reader with its gaze held in the middle is trained alike, and
says how much of the accuracy comes from looking around.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from . import reader, reading_picture

STEPS = 600
QUICK_STEPS = 5
CHANCE = 0.1
EXPECTED_ACCURACY = 0.75
HELD_OUT_SEED = 1  # of places and noise: every run is asked the same


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(-1) == labels).float().mean().item()


def run(device: torch.device, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """The whole demo. Writes ``reader.png`` and ``reader.json``; returns the latter."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = reader.load_digits_apart()
    print(
        f"sklearn.datasets.load_digits: {len(training.labels)} digits to train on, "
        f"{len(held_out.labels)} held out,\neach {reader.DIGIT} x {reader.DIGIT} pixels anywhere "
        f"on a noisy canvas of {reader.CANVAS} x {reader.CANVAS}."
    )
    everyone = torch.arange(len(held_out.labels))
    asked = reader.place(held_out, everyone, torch.Generator().manual_seed(HELD_OUT_SEED))
    asked = asked.to(device)
    readings, losses = {}, {}
    for way, moves in (("moving", True), ("fixed", False)):
        model = reader.build(moves, seed, device)
        generator = torch.Generator().manual_seed(seed)
        losses[way] = reader.train(model, training, steps, generator, device, f"{way} gaze")
        with torch.no_grad():
            readings[way] = model(asked.images)
    moving, fixed = readings["moving"], readings["fixed"]
    middle = (asked.corners + reader.DIGIT / 2) * 2 / reader.CANVAS - 1
    distance = (moving.gaze - middle).norm(dim=-1).mean(1) * reader.CANVAS / 2
    summary = {
        "seed": seed,
        "steps": steps,
        "device": str(device),
        "chance": CHANCE,
        "accuracy": accuracy(moving.scores[-1], asked.labels),
        "accuracy_by_look": [accuracy(scores, asked.labels) for scores in moving.scores],
        "fixed_gaze_accuracy": accuracy(fixed.scores[-1], asked.labels),
        "pixels_from_digit_by_look": distance.tolist(),
        "losses": losses,
    }
    reading_picture.draw(out / "reader.png", asked, moving, summary)
    summary["seconds"] = time.perf_counter() - start
    (out / "reader.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def report(summary: dict[str, Any], out: Path) -> str:
    looks = ", ".join(f"{a:.0%}" for a in summary["accuracy_by_look"])
    far = ", ".join(f"{d:.1f}" for d in summary["pixels_from_digit_by_look"])
    return (
        f"held-out digits  {summary['accuracy']:.1%} right; {summary['fixed_gaze_accuracy']:.1%} "
        f"with the gaze held in the middle; chance is {summary['chance']:.0%}\n"
        f"look by look     {looks} right, {far} pixels off the digit\n"
        f"wrote            {out / 'reader.png'} and {out / 'reader.json'} "
        f"after {summary['seconds']:.0f} s"
    )


def main(device: torch.device, seed: int, steps: int, out: Path) -> int:
    summary = run(device, seed, steps, out)
    print(report(summary, out))
    found = summary["accuracy"] >= EXPECTED_ACCURACY
    # A short run is not expected to learn anything; a full one that does not has failed.
    if steps >= STEPS and not (found and summary["accuracy"] > 2 * summary["fixed_gaze_accuracy"]):
        print(
            f"demo: a full run should read at least {EXPECTED_ACCURACY:.0%} of the held-out "
            "digits, and twice as many as with a fixed gaze"
        )
        return 1
    return 0
