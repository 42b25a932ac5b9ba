# SPDX-License-Identifier: BSD-3-Clause
"""The share of pooling in a training step, with torchvision's operators and with ours.

    python examples/measure_pooling.py                  # arguments as for train_maskrcnn.py

The same batch, weights and random choices both times; rounds alternate, medians are printed.
Pooling means the calls of a step for boxes, masks and mask targets, forward and, where it is
needed, back.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import train_maskrcnn
from coco_detection import CocoDetection, Order, load
from torch import Tensor
from torchvision.models.detection import roi_heads
from torchvision.ops import poolers

import glimpse_ext

ROUNDS = 7
# Where a training step pools. patch() replaces these very attributes.
PLACES: tuple[tuple[ModuleType, str], ...] = (
    (poolers, "_multiscale_roi_align"),
    (roi_heads, "roi_align"),
)
Call = tuple[ModuleType, str, tuple[Any, ...]]


@contextlib.contextmanager
def recorded(calls: list[Call]) -> Any:
    originals = [getattr(*place) for place in PLACES]

    def recorder(module: ModuleType, name: str, original: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            calls.append((module, name, args))
            return original(*args)

        return call

    for (module, name), original in zip(PLACES, originals, strict=True):
        setattr(module, name, recorder(module, name, original))
    try:
        yield
    finally:
        for (module, name), original in zip(PLACES, originals, strict=True):
            setattr(module, name, original)


def repeat(call: Call) -> None:
    module, name, (maps, *rest) = call
    many = isinstance(maps, list)
    leaves = [m.detach().requires_grad_(m.requires_grad) for m in (maps if many else [maps])]
    pooled: Tensor = getattr(module, name)(leaves if many else leaves[0], *rest)
    if pooled.requires_grad:
        torch.autograd.grad(pooled, leaves, torch.ones_like(pooled), allow_unused=True)


def measure(run: train_maskrcnn.Run, batch: Any) -> dict[str, float]:
    cuda = run.place.device.type == "cuda"

    def step() -> None:
        torch.manual_seed(0)
        train_maskrcnn.train_step(run, *batch)

    calls: list[Call] = []
    with recorded(calls):
        step()
    assert calls, "nothing was pooled"

    def pooling() -> None:
        for call in calls:
            repeat(call)

    actions: dict[str, Callable[[], None]] = {"step": step, "pooling": pooling}
    seconds: dict[str, list[float]] = {}
    for counted in (False, *(True,) * ROUNDS):
        for way in ("torchvision", "glimpse_ext"):
            ours = way == "glimpse_ext"
            with glimpse_ext.patch("torchvision") if ours else contextlib.nullcontext():
                for label, action in actions.items():
                    if cuda:
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    action()
                    if cuda:
                        torch.cuda.synchronize()
                    if counted:
                        taken = time.perf_counter() - start
                        seconds.setdefault(f"{way}_{label}", []).append(taken)
    result = {f"{name}_seconds": statistics.median(taken) for name, taken in seconds.items()}
    for way in ("torchvision", "glimpse_ext"):
        result[f"{way}_share"] = result[f"{way}_pooling_seconds"] / result[f"{way}_step_seconds"]
    for label in actions:
        pairs = zip(seconds[f"torchvision_{label}"], seconds[f"glimpse_ext_{label}"], strict=True)
        result[f"{label}_ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = train_maskrcnn.parse(argv)
    args.lr = 0.0  # every step is the same step
    place = train_maskrcnn.join(args)
    try:
        dataset = CocoDetection(train_maskrcnn.source(args, place), args.split, True)
        batch = next(iter(load(dataset, Order(len(dataset), args.batch, 0, 1, args.seed), 0)))
        run = train_maskrcnn.prepare(args, place, len(dataset.categories) + 1, 10**6)
        run.model.train()
        print(json.dumps({**vars(args), **measure(run, batch)}, default=str))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
