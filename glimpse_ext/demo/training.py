# SPDX-License-Identifier: BSD-3-Clause
"""The training loop."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .data import Crops
from .detector import Detector
from .pooling import Pooling

LEARNING_RATE = 2e-3
WARM_UP = 0.2  # share of the steps during which the learning rate rises
LARGEST_GRADIENT = 5.0


@dataclass(frozen=True)
class History:
    """One number per step: the total loss, and its parts by name."""

    total: list[float]
    parts: dict[str, list[float]]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic kernels, so that a seed gives the same detector every time."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def build_detector(pooling: Pooling, seed: int, device: torch.device) -> Detector:
    """A detector with random weights that depend on the seed only, not on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(pooling).to(device)


def train(detector: Detector, crops: Crops, steps: int, generator: torch.Generator) -> History:
    """AdamW with a one-cycle learning rate. Shows a progress bar."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(steps, 10), pct_start=WARM_UP
    )
    history = History([], {})
    detector.train()
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(steps):
            losses = detector.loss(crops.next(), generator)
            values = torch.stack(list(losses.values()))
            total = values.sum()
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            parts = dict(zip(losses, values.tolist(), strict=True))
            history.total.append(sum(parts.values()))
            for name, value in parts.items():
                history.parts.setdefault(name, []).append(value)
            bar.set_postfix(loss=f"{history.total[-1]:.3f}", refresh=False)
            bar.update()
    detector.eval()
    return history
