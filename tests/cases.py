# SPDX-License-Identifier: BSD-3-Clause
"""Named boxes on small images: what every test of an operator runs over."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import inf, nan

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mode:
    """How a cell is sampled: the two arguments that choose formulas."""

    sampling_ratio: int
    aligned: bool

    def __str__(self) -> str:
        samples = f"{self.sampling_ratio}x" if self.sampling_ratio > 0 else "adaptive"
        return f"{'aligned' if self.aligned else 'legacy'}-{samples}"


MODES = [Mode(-1, False), Mode(2, False), Mode(-1, True), Mode(3, True)]

LAYOUTS = ["contiguous", "channels_last", "strided"]


@dataclass(frozen=True)
class Case:
    """Boxes with the image they are read from. Rows are (image, x1, y1, x2, y2)."""

    name: str
    rows: tuple[tuple[float, ...], ...]
    shape: tuple[int, int, int, int] = (2, 3, 9, 7)
    output_size: tuple[int, int] = (3, 2)
    spatial_scale: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def pooled_shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), self.shape[1], *self.output_size)

    def boxes(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 5).to(dtype)

    def image(self, dtype: torch.dtype = torch.float64, salt: str = "image") -> Tensor:
        return random_tensor(self.shape, dtype, f"{self.name} {salt}")

    def grad(self, dtype: torch.dtype = torch.float64, salt: str = "grad") -> Tensor:
        return random_tensor(self.pooled_shape, dtype, f"{self.name} {salt}")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: str) -> Tensor:
    """The same numbers for the same seed, on every machine: in [-1, 1), or whole for uint8."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    # 2**-9 is exact in float32 and nearly so in half types: dtypes then see about the same image.
    return (values * 512).round().div(512).to(dtype)


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same image in another memory layout. What lies between its strides is NaN, or 255."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    assert layout == "strided", layout
    n, c, h, w = tensor.shape
    poison = 255 if tensor.dtype == torch.uint8 else nan
    storage = torch.full((n, h + 2, c + 1, 2 * w + 1), poison, dtype=tensor.dtype)
    view = storage.to(tensor.device)[:, 1:-1, 1:, 1::2].permute(0, 2, 1, 3)
    view.copy_(tensor)
    return view


# The image of most cases is 7 wide and 9 high, so a sample is kept from index -1 to 7 and -1 to 9.
CASES = [
    Case(
        "inside", ((0, 1.25, 1.5, 5.75, 7.0), (1, 0.75, 2.125, 4.5, 4.625), (0, 2.3, 1.1, 6.2, 8.4))
    ),
    Case(
        "partial",
        (
            (0, -2.5, 2.25, 3.5, 6.5),
            (1, 4.5, 3.0, 9.75, 5.0),
            (1, 1.5, -4.0, 5.5, 2.5),
            (0, 2, 7, 6, 13),
        ),
    ),
    Case(
        "outside",
        (
            (0, -9.0, 1.0, -3.0, 5.0),
            (0, 9.5, 1.0, 12.0, 5.0),
            (1, 1.0, -8.0, 4.0, -2.5),
            (1, 1.0, 11.0, 4.0, 15.0),
            (1, 7.25, 8.75, 8.25, 10.0),
        ),
    ),
    Case(
        "tiny",
        (
            (0, 3.5, 4.5, 3.50390625, 4.625),
            (1, 2.25, 2.75, 2.5, 2.765625),
            (0, 6.5, 8.5, 6.75, 8.75),
        ),
    ),
    Case("huge", ((0, -40, -50, 60, 70), (1, -300.5, 2, 411.25, 6), (0, 2, -1000, 5, 1000))),
    Case(
        "edge",
        (
            (0, 0, 0, 7, 9),
            (1, -1, -1, 7, 9),
            (0, 6, 8, 7, 9),
            (1, 0, 0, 8, 10),
            (0, -1, 2, 0, 3),
            (1, 7, 9, 8, 10),
        ),
    ),
    Case("grid", ((0, 1, 1, 5, 7), (1, 0, 0, 4, 6), (0, 2, 3, 4, 6), (1, 0.5, 0.5, 4.5, 6.5))),
    Case(
        "zero",
        ((0, 3.25, 4.5, 3.25, 4.5), (1, 2, 1.5, 5, 1.5), (0, 2.5, 1, 2.5, 6), (1, 0, 0, 0, 0)),
    ),
    Case(
        "mirrored",
        (
            (0, 5.75, 1.5, 1.25, 7),
            (1, 1.25, 7, 5.75, 1.5),
            (0, 6.1, 8.2, 0.7, 0.9),
            (1, 9, 4, -3, 2),
        ),
    ),
    Case(
        "nan",
        (
            (0, nan, 1, 4, 5),
            (0, 1, nan, 4, 5),
            (1, 1, 1, nan, 5),
            (1, 1, 1, 4, nan),
            (0, *[nan] * 4),
            (1, 1, 2, 5, 6),
        ),
    ),
    Case(
        "infinite",
        (
            (0, -inf, 1, 4, 5),
            (0, 1, 1, inf, 5),
            (1, 1, -inf, 4, inf),
            (1, -inf, -inf, inf, inf),
            (0, inf, 1, -inf, 5),
            (0, inf, inf, inf, inf),
            (1, 1, 2, 5, 6),
        ),
    ),
    Case(
        "enormous",
        (
            (0, -1e9, 1, 1e9, 5),
            (0, 1, -3e7, 5, 2e6),
            (1, -1e30, 0, 1e30, 5),
            (1, 1e20, 1, 2e20, 5),
            (0, 1, 2, 3e38, 6),
        ),
    ),
    Case("index", ((0.9, 1, 2, 5, 6), (-0.9, 1, 2, 5, 6), (1.5, 1, 2, 5, 6), (1, 2, 3, 4, 8))),
    Case(
        "one_pixel",
        ((0, 0, 0, 1, 1), (1, -0.75, 0.25, 1.75, 0.5), (0, 0.5, 0.5, 3, 3)),
        shape=(2, 3, 1, 1),
    ),
    Case("one_row", ((0, 0, 0, 6, 1), (0, 2.5, -1, 11.25, 2)), shape=(1, 2, 1, 12)),
    Case("one_cell", ((0, 1.25, 1.5, 5.75, 7), (1, -3, 4, 20, 5)), output_size=(1, 1)),
    Case(
        "scaled",
        ((0, 3.0, 5.5, 21.25, 30.75), (1, -6, 2, 40, 17.5), (1, 8, 8, 9, 9)),
        spatial_scale=0.25,
        output_size=(2, 5),
    ),
    Case("tenth", ((0, 11.0, 7.0, 52.0, 81.0), (1, 3.3, 4.4, 55.5, 66.6)), spatial_scale=0.1),
    Case(
        "channels",
        ((0, 1.25, 0.5, 5.75, 4), (0, -2, 1, 3, 9)),
        shape=(1, 37, 5, 6),
        output_size=(2, 2),
    ),
    Case(
        "cells",
        ((0, 0.5, 0.5, 10.25, 12.75), (0, 3, 2, 4, 3)),
        shape=(1, 2, 13, 11),
        output_size=(7, 9),
    ),
]

# No sample is on a pixel or near a border and no image index is at a jump, so that derivatives
# exist in every sense.
SMOOTH_CASES = [
    Case(
        "inside",
        ((0.5, 0.83, 1.07, 4.31, 5.19), (1.5, 1.29, 2.13, 3.97, 4.61)),
        shape=(2, 1, 6, 5),
        output_size=(2, 1),
    ),
    Case(
        "partial",
        ((0.5, -2.57, 1.21, 3.53, 4.59), (0.5, 2.57, 1.11, 7.77, 3.21)),
        shape=(1, 2, 5, 6),
        output_size=(1, 2),
    ),
    Case(
        "scaled",
        ((0.5, 3.07, 5.51, 17.23, 20.77), (0.5, 9.01, 8.03, 11.19, 9.41)),
        shape=(1, 1, 7, 5),
        output_size=(2, 2),
        spatial_scale=0.25,
    ),
]


@dataclass(frozen=True)
class Pyramid:
    """Boxes for several feature maps of one picture. Rows are (image, x1, y1, x2, y2)."""

    name: str
    rows: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, int], ...] = ((16, 14), (8, 7), (4, 4))
    scales: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16)
    batch: int = 2
    channels: int = 3
    output_size: tuple[int, int] = (2, 3)
    # Small boxes for small maps: level 2 serves sides below 16, level 3 from 16, level 4 from 32.
    rule: dict[str, float] = field(
        default_factory=lambda: {"canonical_size": 32, "canonical_level": 4}
    )

    def __str__(self) -> str:
        return self.name

    @property
    def pooled_shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), self.channels, *self.output_size)

    def boxes(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 5).to(dtype)

    def features(self, dtype: torch.dtype = torch.float64, salt: str = "") -> list[Tensor]:
        shapes = [(self.batch, self.channels, h, w) for h, w in self.sizes]
        return [random_tensor(shape, dtype, f"{self.name} {shape} {salt}") for shape in shapes]

    def grad(self, dtype: torch.dtype = torch.float64, salt: str = "grad") -> Tensor:
        return random_tensor(self.pooled_shape, dtype, f"{self.name} {salt}")


PYRAMIDS = [
    Pyramid(
        "every_level",
        (
            (0, 3.1, 5.2, 12.3, 15.7),
            (1, 10.4, 2.6, 33.1, 28.3),
            (0, -4.2, 3.3, 50.9, 60.1),
            (1, 40.1, 50.2, 44.4, 55.5),
            (0, 8.3, 8.1, 25.7, 26.9),
        ),
    ),
    Pyramid(
        "borders",  # sides exactly at, just below and just above the change of level
        (
            (0, 0, 0, 16, 16),
            (0, 0, 0, 16, 15.9999),
            (1, 8, 8, 40, 40),
            (1, 8, 8, 40, 39.9999),
            (0, 8, 8, 40.0001, 40),
        ),
    ),
    Pyramid(
        "special",
        (
            (0, 5, 5, 5, 5),
            (1, 20, 20, 10, 40),
            (0, 30, 30, 10, 10),
            (1, nan, 2, 30, 40),
            (0, -inf, 2, inf, 40),
            (1, -1e9, -1e9, 1e9, 1e9),
            (0, 1, 2, 1e30, 3e30),
            (1, 10.4, 2.6, 33.1, 28.3),
        ),
    ),
    Pyramid(
        "single",
        ((0, 3.1, 5.2, 12.3, 15.7), (1, 20, 20, 10, 40)),
        sizes=((16, 14),),
        scales=(1 / 4,),
    ),
]

SMOOTH_PYRAMID = Pyramid(
    "smooth",
    ((0, 3.11, 5.23, 12.37, 15.71), (0, 10.41, 2.63, 33.17, 28.31), (0, -4.27, 3.37, 50.93, 60.13)),
    sizes=((8, 7), (4, 4), (3, 2)),
    scales=(1 / 8, 1 / 16, 1 / 32),
    batch=1,
    channels=2,
    output_size=(2, 2),
    rule={"canonical_size": 16, "canonical_level": 4},
)
