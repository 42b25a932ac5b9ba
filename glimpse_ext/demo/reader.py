# SPDX-License-Identifier: BSD-3-Clause
"""A reader that moves its gaze: glimpse, think, look elsewhere, name the digit.

Where to look is learned from the label alone: the loss reaches the offsets of
``extract_glimpse(mode="subpixel")`` by ordinary back-propagation, where the recurrent models of
attention before had to use reinforcement learning because their windows were whole pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import glimpse_ext

DIGIT = 8  # pixels of a side
CANVAS = 40
NOISE = 0.15  # standard deviation; ink is 0 to 1
TRAINING_DIGITS = 1297  # of 1797; the last 500, of other writers, are held out

GLIMPSE = 10
SCALES = (1, 2, 4)  # the coarsest window of the first look is the whole canvas
LOOKS = 4
LEARNING_RATE = 5e-3
LARGEST_GRADIENT = 1.0
BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """images: ``[D, 8, 8]`` in 0..1.   labels: ``[D]``."""

    images: Tensor
    labels: Tensor


def load_digits_apart() -> tuple[Digits, Digits]:
    """scikit-learn's handwritten digits, to train on and held out.

    The file is part of the scikit-learn package, so nothing is downloaded.
    """
    digits = load_digits()
    images = torch.from_numpy(np.asarray(digits.images, dtype=np.float32) / 16)
    labels = torch.from_numpy(np.asarray(digits.target, dtype=np.int64))
    first, rest = slice(None, TRAINING_DIGITS), slice(TRAINING_DIGITS, None)
    return Digits(images[first], labels[first]), Digits(images[rest], labels[rest])


@dataclass(frozen=True)
class Canvases:
    """images: ``[N, 1, S, S]``.   corners: ``[N, 2]``, y and x of the digit.   labels: ``[N]``."""

    images: Tensor
    corners: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Canvases":
        return Canvases(self.images.to(device), self.corners.to(device), self.labels.to(device))


def place(
    digits: Digits, chosen: Tensor, generator: torch.Generator, spread: float = 1.0
) -> Canvases:
    """The chosen digits, each anywhere on a canvas of noise of its own.

    spread: how far from the middle digits may lie; 1 is anywhere.
    """
    count = len(chosen)
    images = NOISE * torch.randn(count, 1, CANVAS, CANVAS, generator=generator)
    free = CANVAS - DIGIT
    where = 0.5 + spread * (torch.rand(count, 2, generator=generator) - 0.5)
    corners = (where * (free + 1)).long().clamp(0, free)
    for image, corner, ink in zip(images, corners, digits.images[chosen], strict=True):
        y, x = corner.tolist()
        image[0, y : y + DIGIT, x : x + DIGIT] += ink
    return Canvases(images, corners, digits.labels[chosen])


def draw_canvases(
    digits: Digits,
    count: int,
    generator: torch.Generator,
    device: torch.device,
    spread: float = 1.0,
) -> Canvases:
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    return place(digits, chosen, generator, spread).to(device)


@dataclass(frozen=True)
class Reading:
    """scores: ``[LOOKS, N, 10]`` after each look.   gaze: ``[LOOKS, N, 2]``, offsets y and x."""

    scores: Tensor
    gaze: Tensor


class Reader(nn.Module):
    """Looks LOOKS times, first at the middle. With ``moves=False`` it stays there.

    glimpse -> memory -> what to look for -> where in the glimpse that is -> next offset
    """

    def __init__(self, moves: bool = True, width: int = 128, features: int = 8):
        super().__init__()
        self.moves, self.width = moves, width
        self.see = nn.Linear(len(SCALES) * GLIMPSE**2, width)
        self.locate = nn.Linear(2, width)
        self.think = nn.GRUCell(width, width)
        self.name = nn.Linear(width, 10)
        self.notice = nn.Conv2d(1, features, 3, padding=1)
        self.wish = nn.Linear(width, features)
        self.scale: Tensor
        self.places: Tensor
        scale = torch.tensor(SCALES).float()[:, None, None]
        self.register_buffer("scale", scale)
        # Where the cells of each scale lie, in offsets from the middle of the glimpse.
        steps = (torch.arange(GLIMPSE) - (GLIMPSE - 1) / 2) * 2 / CANVAS * scale
        down, right = steps.transpose(1, 2).expand(-1, -1, GLIMPSE), steps.expand(-1, GLIMPSE, -1)
        self.register_buffer("places", torch.stack([down, right], -1).reshape(-1, 2))

    def forward(self, images: Tensor) -> Reading:
        memory = images.new_zeros(len(images), self.width)
        offsets = images.new_zeros(len(images), 2)
        scores, gaze = [], []
        for _ in range(LOOKS):
            gaze.append(offsets)
            glimpse = glimpse_ext.extract_glimpse(
                images, GLIMPSE, offsets, noise="zero", mode="subpixel", scales=SCALES
            )
            # The mean over s * s pixels has the noise of one divided by s.
            glimpse = glimpse * self.scale
            seen = functional.relu(self.see(glimpse.flatten(1)) + self.locate(offsets))
            memory = self.think(seen, memory)
            scores.append(self.name(memory))
            if self.moves:
                offsets = (offsets + self.next_move(glimpse, memory)).clamp(-1, 1)
        return Reading(torch.stack(scores), torch.stack(gaze))

    def next_move(self, glimpse: Tensor, memory: Tensor) -> Tensor:
        """The mean place of what the memory asks for, in offsets from the middle."""
        noticed = functional.relu(self.notice(glimpse.flatten(0, 1)[:, None]))
        by_scale = noticed.unflatten(0, (-1, len(SCALES))).flatten(3)
        wanted = torch.einsum("nsfp,nf->nsp", by_scale, self.wish(memory))
        return wanted.flatten(1).softmax(1) @ self.places


def build(moves: bool, seed: int, device: torch.device) -> Reader:
    """A reader whose weights depend on the seed only; the same for both kinds of gaze."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Reader(moves).to(device)


def train(
    reader: Reader,
    digits: Digits,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
    title: str,
) -> list[float]:
    """The loss of each step. Shows a progress bar.

    Digits lie in the middle at first and everywhere from the middle of the training on: who
    cannot read yet has no reason to look anywhere.
    """
    optimizer = torch.optim.Adam(reader.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(steps, 10), pct_start=0.2
    )
    losses = []
    reader.train()
    with tqdm(total=steps, desc=title, unit="step") as bar:
        for step in range(steps):
            spread = min(1.0, 2 * step / steps)
            canvases = draw_canvases(digits, BATCH_SIZE, generator, device, spread)
            reading = reader(canvases.images)
            # Each look is asked, so that the gaze has a reason to move at once.
            loss = torch.stack(
                [functional.cross_entropy(s, canvases.labels) for s in reading.scores]
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    reader.eval()
    return losses
