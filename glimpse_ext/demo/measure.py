# SPDX-License-Identifier: BSD-3-Clause
"""The share of pooling in a training step: this package's operators against ``grid_sample``."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import Batch
from .detector import Detector
from .pooling import GlimpsePooling, GridSamplePooling, Pooling

# The two ways round differently: grid_sample gets its positions as numbers from -1 to 1. This is
# the largest difference allowed, as a share of the largest feature.
AGREEMENT = 3e-4


@dataclass
class Recorder:
    """Passes every call on and remembers how to repeat it."""

    pooling: Pooling
    calls: list[tuple[list[Tensor], Callable[[Pooling, list[Tensor]], Tensor]]] = field(
        default_factory=list
    )

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        boxes = boxes.detach()
        self.calls.append(
            (list(features), lambda pooling, maps: pooling.pyramid(maps, boxes, size, scales))
        )
        return self.pooling.pyramid(features, boxes, size, scales)

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        boxes = boxes.detach()
        self.calls.append(([image], lambda pooling, maps: pooling.image(maps[0], boxes, size)))
        return self.pooling.image(image, boxes, size)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare_pooling(detector: Detector, batch: Batch, seed: int, rounds: int) -> dict[str, float]:
    """Time one training step with both poolings, and the pooling calls of that step alone.

    Both do the same work: the same batch, weights and random choices. "Alone" means forward and,
    where the step needs it, backward. Rounds alternate between the two; medians are kept.
    """
    ways: dict[str, Pooling] = {"glimpse_ext": GlimpsePooling(), "grid_sample": GridSamplePooling()}
    device = batch.images.device
    detector = copy.deepcopy(detector)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0)

    def step(pooling: Pooling) -> None:
        detector.pooling = pooling
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        torch.stack(list(detector.loss(batch, generator).values())).sum().backward()
        optimizer.step()

    recorder = Recorder(ways["glimpse_ext"])
    step(recorder)
    calls = []
    for maps, repeat in recorder.calls:
        leaves = [m.detach().requires_grad_(m.requires_grad) for m in maps]
        expected = repeat(ways["glimpse_ext"], leaves).detach()
        difference = float((repeat(ways["grid_sample"], leaves).detach() - expected).abs().max())
        largest = float(expected.abs().max())
        if not difference <= AGREEMENT * largest:
            raise RuntimeError(f"demo: the two poolings differ by {difference} of {largest}")
        calls.append((leaves, repeat, torch.ones_like(expected)))

    def pool(pooling: Pooling) -> None:
        for leaves, repeat, grad in calls:
            pooled = repeat(pooling, leaves)
            if pooled.requires_grad:
                # A level that no box belongs to has no gradient under grid_sample.
                torch.autograd.grad(pooled, leaves, grad, allow_unused=True)

    seconds: dict[str, list[float]] = {}
    for warm in (False,) + (True,) * rounds:
        for name, pooling in ways.items():
            for label, action in (("step", step), ("pooling", pool)):
                start = _now(device)
                action(pooling)
                if warm:
                    seconds.setdefault(f"{name}_{label}", []).append(_now(device) - start)
    result = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    for name in ways:
        result[f"{name}_share"] = result[f"{name}_pooling_seconds"] / result[f"{name}_step_seconds"]
    return result
