# SPDX-License-Identifier: BSD-3-Clause
"""The tables of every device are those of the CPU, bit for bit.

Channel ``y * W + x`` of the image is 1 at pixel (y, x) and 0 elsewhere, so the pooled value of that
channel is the product of two weights and nothing is added to it: any difference is in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import conftest
import pytest
import torch
from cases import Case
from operators import OPERATORS, Operator
from torch import Tensor

import glimpse_ext

_HEIGHT, _WIDTH = 5, 7


def _one_hot(dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    pixels = _HEIGHT * _WIDTH
    image = torch.eye(pixels, dtype=dtype).reshape(1, pixels, _HEIGHT, _WIDTH)
    return image.contiguous(memory_format=memory_format)


def _boxes(count: int) -> Tensor:
    """Sides from a fraction of a pixel to far beyond the map; half of them end on its edges."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(count, 2, generator=generator) * 14 - 4
    side = torch.exp(torch.rand(count, 2, generator=generator) * 9 - 3)
    boxes = torch.cat([torch.zeros(count, 1), first, first + side], 1)
    boxes[: count // 2, 3] = _WIDTH + 0.5
    boxes[: count // 2, 4] = _HEIGHT + 0.5
    boxes[count // 4 : count // 2, 1:3] = -0.5
    return boxes


def _paths() -> Iterator[object]:
    """One sample a cell everywhere. More of them where every path adds those that share a pixel
    before it multiplies the two directions, as channels_last float32 does."""
    for dtype in (torch.float32, torch.float64):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            yield dtype, memory_format, 1
    for sampling_ratio in (3, -1):
        yield torch.float32, torch.channels_last, sampling_ratio


@pytest.mark.parametrize(("dtype", "memory_format", "sampling_ratio"), list(_paths()))
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("device", conftest.DEVICES[1:], ids=str, indirect=True)
def test_tables_have_the_bits_of_the_cpu(
    device: conftest.Device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    if device.name == "simple" and sampling_ratio != 1:
        pytest.skip("the short loops multiply the two directions sample by sample")
    image, boxes = _one_hot(dtype, memory_format), _boxes(24)
    numbers = ((3, 4), 0.7, sampling_ratio, aligned)
    got = glimpse_ext.roi_align(image.to(device.torch), boxes.to(device.torch), *numbers).cpu()
    _check_same_bits(got, on_cpu(glimpse_ext.roi_align, image, boxes, *numbers), device)


_ONE_SAMPLE = [
    op
    for op in OPERATORS
    if op.public.startswith(("crop", "point_sample", "extract_glimpse"))
    and "scale 2" not in op.name
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", _ONE_SAMPLE, ids=str)
@pytest.mark.parametrize("device", conftest.DEVICES[1:], ids=str, indirect=True)
def test_operators_of_one_sample_have_the_bits_of_the_cpu(
    device: conftest.Device, op: Operator, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Boxes that end on the edge of the image, on its outer pixel centres, and anywhere."""
    rows = _boxes(24).double()
    rows[::2, 1:] -= 0.5
    shape = (1, _HEIGHT * _WIDTH, _HEIGHT, _WIDTH)
    case = Case("tables", tuple(map(tuple, rows.tolist())), shape, (3, 4))
    image, boxes = _one_hot(dtype, memory_format), op.boxes(case).to(dtype)
    got = op.call(image.to(device.torch), boxes.to(device.torch), case).cpu()
    _check_same_bits(got, on_cpu(op.call, image, boxes, case), device)


def _check_same_bits(got: Tensor, expected: Tensor, device: conftest.Device) -> None:
    assert got.any()
    different = [tuple(place) for place in (got != expected).nonzero().tolist()]
    assert not different, (
        f"{len(different)} of {got.numel()} weights differ on {device}, first at {different[0]}: "
        f"{got[different[0]]!r} and {expected[different[0]]!r}"
    )


def on_cpu(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    previous = conftest._testing.use_backend("cpu")
    try:
        return function(*arguments)
    finally:
        conftest._testing.use_backend(previous)
