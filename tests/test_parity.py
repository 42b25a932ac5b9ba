# SPDX-License-Identifier: BSD-3-Clause
"""Against the torchvision that is installed: the same call, the same numbers.

This file needs glimpse_ext, torch, torchvision and pytest and nothing else, so that it runs
anywhere against an installed wheel: ``pytest <path>/test_parity.py`` from any directory.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import OrderedDict

import pytest
import torch

import glimpse_ext

torchvision = pytest.importorskip("torchvision", reason="the peer to compare with is not installed")

F32, F64 = torch.float32, torch.float64

# float32 sums in another order; float64 shows that nothing but rounding is different.
FORWARD = {F32: 2e-6, F64: 1e-13}
BACKWARD = {F32: 1e-5, F64: 1e-12}

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def where(request):
    """The device. Not called ``device``, which is a fixture of the other tests here."""
    return request.param


def error(got, expected):
    """Largest |x - y| / (1 + |y|)."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).abs() / (1 + expected.abs())).max().item()


def random_boxes(kind, count, batch, height, width, scale, seed):
    """[K, 5] of float64 in multiples of 1/64, in the coordinates that ``scale`` takes to pixels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(count, generator=generator, dtype=F64) * (high - low) + low

    if kind == "inside":
        x1, y1 = uniform(0, width / 2), uniform(0, height / 2)
        x2, y2 = x1 + uniform(0.5, width / 2), y1 + uniform(0.5, height / 2)
    elif kind == "partial":
        x1, y1 = uniform(-width, width), uniform(-height, height)
        x2, y2 = x1 + uniform(1, 1.5 * width), y1 + uniform(1, 1.5 * height)
    elif kind == "outside":
        x1, y1 = uniform(width + 1, 2 * width), uniform(-3 * height, -2 * height)
        x2, y2 = x1 + uniform(1, width), y1 + uniform(1, height)
    elif kind == "tiny":
        x1, y1 = uniform(0, width), uniform(0, height)
        x2, y2 = x1 + uniform(0.05, 0.5), y1 + uniform(0.05, 0.5)
    elif kind == "huge":
        x1, y1 = uniform(-20 * width, 0), uniform(-20 * height, 0)
        x2, y2 = uniform(width, 20 * width), uniform(height, 20 * height)
    elif kind == "grid":
        x1, y1 = uniform(0, width / 2).round(), uniform(0, height / 2).round()
        x2, y2 = (x1 + uniform(1, width / 2)).round(), (y1 + uniform(1, height / 2)).round()
    else:
        assert kind == "reversed"
        x1, y1 = uniform(width / 2, width), uniform(height / 2, height)
        x2, y2 = uniform(0, width / 2 - 1), uniform(0, height / 2 - 1)
    index = (uniform(0, batch)).floor().clamp(max=batch - 1)
    corners = (torch.stack([x1, y1, x2, y2], dim=1) * 64).round() / 64
    return torch.cat([index[:, None], corners / scale], dim=1)


KINDS = ["inside", "partial", "outside", "tiny", "huge", "grid", "reversed"]


def gradients(function, image, boxes, arguments, seed=7):
    image = image.detach().requires_grad_()
    pooled = function(image, boxes, *arguments)
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(pooled.shape, generator=generator, dtype=F64).to(pooled)
    (to_image,) = torch.autograd.grad(pooled, image, g)
    return pooled.detach(), to_image


# torchvision's CPU kernel may raise for aligned reversed boxes with adaptive sampling: see
# test_reversed_boxes.
MODES = [
    (kind, ratio, aligned)
    for kind in KINDS
    for ratio in (-1, 0, 1, 2, 3)
    for aligned in (False, True)
    if not (kind == "reversed" and aligned and ratio <= 0)
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("kind", "ratio", "aligned"), MODES)
def test_values_and_gradients(kind, ratio, aligned, dtype, where):
    batch, channels, height, width = 2, 3, 19, 23
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, channels, height, width, generator=generator, dtype=F64) * 2 - 1
    image = image.to(where, dtype)
    for seed, scale, size in ((2, 1.0, (7, 7)), (3, 0.25, (3, 5)), (4, 0.0625, (1, 2))):
        boxes = random_boxes(kind, 12, batch, height, width, scale, seed).to(where, dtype)
        arguments = (size, scale, ratio, aligned)
        got = gradients(glimpse_ext.roi_align, image, boxes, arguments)
        expected = gradients(torchvision.ops.roi_align, image, boxes, arguments)
        label = f"{kind}, ratio {ratio}, aligned {aligned}, {dtype}, scale {scale}"
        assert error(got[0], expected[0]) <= FORWARD[dtype], f"{label}: pooled"
        assert error(got[1], expected[1]) <= BACKWARD[dtype], f"{label}: gradient"


def test_the_size_of_a_detector(where, capsys):
    """FPN features and proposals as they occur, with the errors printed."""
    generator = torch.Generator().manual_seed(5)
    lines = ["largest |x - y| / (1 + |y|) against torchvision, float32"]
    for stride, size in ((4, 7), (8, 14), (16, 7)):
        height, width = 400 // stride, 544 // stride
        image = torch.randn(2, 32, height, width, generator=generator).to(where)
        boxes = random_boxes("partial", 100, 2, height, width, 1 / stride, stride).to(where, F32)
        arguments = (size, 1 / stride, 2, False)
        got = gradients(glimpse_ext.roi_align, image, boxes, arguments)
        expected = gradients(torchvision.ops.roi_align, image, boxes, arguments)
        forward, backward = (error(a, b) for a, b in zip(got, expected, strict=True))
        lines.append(f"  stride {stride:2}, {size:2} cells: {forward:.1e} {backward:.1e}")
        assert forward <= FORWARD[F32]
        assert backward <= BACKWARD[F32]
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_reversed_boxes(where):
    """Adaptive and aligned: zeros here. torchvision gives zeros too, or fails to allocate."""
    image = torch.rand(1, 2, 9, 9, dtype=F64, device=where)
    boxes = torch.tensor([[0.0, 8, 1, 2, 7]], dtype=F64, device=where)
    assert not glimpse_ext.roi_align(image, boxes, 2, aligned=True).any()
    with contextlib.suppress(ValueError, RuntimeError, MemoryError):
        assert not torchvision.ops.roi_align(image, boxes, 2, aligned=True).any()


def test_memory_layouts(where):
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(2, 4, 12, 11, generator=generator).to(where)
    boxes = random_boxes("inside", 6, 2, 12, 11, 1.0, 6).to(where, F32)
    expected = torchvision.ops.roi_align(image, boxes, (3, 2))
    for view in (
        image.contiguous(memory_format=torch.channels_last),
        image.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([image, image], dim=-1)[..., 1],
    ):
        assert error(glimpse_ext.roi_align(view, boxes, (3, 2)), expected) <= FORWARD[F32]
    strided = torch.stack([boxes, boxes], dim=1)[:, 1]
    assert error(glimpse_ext.roi_align(image, strided, (3, 2)), expected) <= FORWARD[F32]


def test_boxes_as_one_tensor_per_image(where):
    generator = torch.Generator().manual_seed(8)
    image = torch.rand(3, 2, 10, 10, generator=generator).to(where)
    boxes = random_boxes("inside", 5, 1, 10, 10, 1.0, 8)[:, 1:].to(where, F32)
    for per_image in (
        [boxes[:2], boxes[2:4], boxes[4:]],
        [boxes[:3], boxes[:0], boxes[3:]],
        [boxes[:3], boxes[3:]],
        [boxes[:0], boxes[:0], boxes[:0]],
        (boxes, boxes, boxes),
    ):
        got = glimpse_ext.roi_align(image, per_image, 3)
        expected = torchvision.ops.roi_align(image, per_image, 3)
        assert error(got, expected) <= FORWARD[F32]


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [((2, 3, 5, 4), 0, 2), ((2, 0, 5, 4), 3, 2), ((2, 3, 5, 4), 3, (0, 2)), ((0, 3, 5, 4), 0, 2)],
    ids=str,
)
def test_empty_results(shape, count, size, where):
    image = torch.ones(shape, device=where)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]], device=where).repeat(count, 1)
    got = gradients(glimpse_ext.roi_align, image, boxes, (size,))
    expected = gradients(torchvision.ops.roi_align, image, boxes, (size,))
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) == 0


def test_an_image_index_is_cut_off(where):
    image = torch.arange(3.0, device=where).reshape(3, 1, 1, 1).expand(3, 1, 4, 4).contiguous()
    index = torch.tensor([0.0, 0.9, -0.9, 1.5, 2.9])
    boxes = torch.cat([index[:, None], torch.tensor([[0.0, 0, 4, 4]]).expand(5, 4)], dim=1)
    got = glimpse_ext.roi_align(image, boxes.to(where), 1)
    assert error(got, torchvision.ops.roi_align(image, boxes.to(where), 1)) == 0


def test_the_signature():
    """Names, order and defaults: changing the import is the whole migration. What is more has to
    be named."""
    ours = list(inspect.signature(glimpse_ext.roi_align).parameters.values())
    theirs = inspect.signature(torchvision.ops.roi_align).parameters.values()
    same, more = ours[: len(theirs)], ours[len(theirs) :]
    assert [(p.name, p.default) for p in same] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in more)


@pytest.mark.parametrize(
    ("image", "boxes", "size"),
    [
        (torch.zeros(1, 1, 4, 4), torch.zeros(2, 4), 2),
        (torch.zeros(1, 1, 4, 4), torch.zeros(2, 6), 2),
        (torch.zeros(1, 1, 4, 4), torch.zeros(5), 2),
        (torch.zeros(1, 4, 4), torch.zeros(1, 5), 2),
        (torch.zeros(1, 1, 4, 4), [], 2),
        (torch.zeros(1, 1, 4, 4), [torch.zeros(2, 5)], 2),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2.5),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 5), 2),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 5, dtype=torch.int64), 2),
    ],
)
def test_what_is_an_error_there_is_one_here(image, boxes, size):
    for function in (torchvision.ops.roi_align, glimpse_ext.roi_align):
        with pytest.raises((AssertionError, IndexError, ValueError, TypeError, RuntimeError)):
            function(image, boxes, size)


def test_half_is_nearer_to_float64_than_torchvision_is(where):
    generator = torch.Generator().manual_seed(9)
    image = (torch.rand(1, 4, 48, 48, generator=generator) + 1).half().to(where)
    boxes = random_boxes("inside", 20, 1, 48, 48, 1.0, 9)
    boxes = boxes.half().double()  # numbers that half boxes can hold
    arguments = ((2, 2), 1.0, -1, True)
    exact = torchvision.ops.roi_align(image.double(), boxes.to(where), *arguments)
    ours = glimpse_ext.roi_align(image, boxes.half().to(where), *arguments)
    theirs = torchvision.ops.roi_align(image, boxes.half().to(where), *arguments)
    ours, theirs = ((x.double() - exact).abs().mean().item() for x in (ours, theirs))
    assert ours < 1e-3
    assert ours <= theirs * 1.01, f"mean error {ours:.1e} here, {theirs:.1e} in torchvision"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, where):
    """torchvision then computes in float32 and gives the dtype of the input, as is done here."""
    generator = torch.Generator().manual_seed(10)
    image = torch.rand(1, 4, 16, 16, generator=generator).to(where, dtype)
    boxes = random_boxes("inside", 6, 1, 16, 16, 1.0, 10).to(where, F32)
    with torch.autocast(where, dtype=dtype):
        got = glimpse_ext.roi_align(image, boxes, 3)
        expected = torchvision.ops.roi_align(image, boxes, 3)
    # Both round a float32 number to the dtype; sums in another order can round to its neighbour.
    assert error(got, expected) <= torch.finfo(dtype).eps


# ------------------------------------------------------------------------- MultiScaleRoIAlign


def pyramid(where, levels=4, image_size=(256, 320), dtype=F32):
    generator = torch.Generator().manual_seed(11)
    maps = OrderedDict()
    for level in range(levels):
        height, width = (side >> (level + 2) for side in image_size)
        maps[f"p{level}"] = torch.randn(2, 3, height, width, generator=generator).to(where, dtype)
    return maps


def per_image_boxes(where, dtype=F32):
    """Sides from 4 to 700 pixels, for every level, and those at the change of a level."""
    generator = torch.Generator().manual_seed(12)
    result = []
    for _ in range(2):
        side = 2 ** (torch.rand(30, 2, generator=generator, dtype=F64) * 7.5 + 2)
        corner = torch.rand(30, 2, generator=generator, dtype=F64) * 200 - 40
        boxes = torch.cat([corner, corner + side], dim=1)
        borders = [112, 111.9999, 112.0001, 224, 223.9999, 223.99, 448, 447.9999]
        borders = torch.tensor([[8, 16, 8 + s, 16 + s] for s in borders], dtype=F64)
        result.append(torch.cat([boxes, borders]).to(where, dtype))
    return result


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_multiscale(levels, ratio, where):
    maps, boxes = pyramid(where, levels), per_image_boxes(where)
    pooler = torchvision.ops.MultiScaleRoIAlign(list(maps), 7, ratio)
    scales = [2.0 ** -(level + 2) for level in range(levels)]
    results = []
    for pool in (
        lambda maps: glimpse_ext.multiscale_roi_align(maps, boxes, 7, scales, ratio),
        lambda maps: pooler(maps, boxes, [(256, 320)] * 2),
    ):
        leaves = OrderedDict((k, v.detach().requires_grad_()) for k, v in maps.items())
        pooled = pool(leaves)
        g = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(13)).to(where)
        results.append((pooled, *torch.autograd.grad(pooled, list(leaves.values()), g)))
    got, expected = results
    assert pooler.scales == scales
    assert error(got[0], expected[0]) <= FORWARD[F32]
    for level, (a, b) in enumerate(zip(got[1:], expected[1:], strict=True)):
        assert error(a, b) <= BACKWARD[F32], f"gradient to level {level}"


def test_multiscale_of_special_boxes(where):
    """A box with one negative side is on no level and stays zero; one with two is pooled."""
    maps = pyramid(where)
    boxes = torch.tensor(
        [[60, 50, 10, 90], [60, 90, 10, 50], [20, 20, 20, 20], [1, 2, 3000, 4000], [9, 9, 70, 5]],
        dtype=F32,
        device=where,
    )
    pooler = torchvision.ops.MultiScaleRoIAlign(list(maps), 3, 2)
    expected = pooler(maps, [boxes, boxes[:1]], [(256, 320)] * 2)
    got = glimpse_ext.multiscale_roi_align(maps, [boxes, boxes[:1]], 3, pooler.scales)
    assert error(got, expected) <= FORWARD[F32]
    assert not got[0].any()
    assert got[1].any()


def test_levels_of_many_boxes(where):
    """On maps that hold the number of their level, a box around the pixel pools its level."""
    count = 100_000
    generator = torch.Generator().manual_seed(14)
    side = 2 ** (torch.rand(count, 2, generator=generator) * 8 + 2)
    square = torch.rand(count, generator=generator) < 0.5
    side[square, 1] = side[square, 0]
    boxes = torch.cat([-side / 2, side / 2], dim=1).to(where)
    levels = torchvision.ops.poolers.LevelMapper(2, 5)([boxes])
    assert set(levels.tolist()) == {0, 1, 2, 3}
    scales = [2.0**-level for level in range(2, 6)]
    maps = [torch.full((1, 1, 1, 1), float(level), device=where) for level in range(4)]
    pooled = glimpse_ext.multiscale_roi_align(maps, [boxes], 1, scales, 1)
    assert torch.equal(pooled.flatten().to(levels), levels)
    assert torch.equal(glimpse_ext.reference.assign_levels(boxes, scales).to(levels), levels)


def test_in_the_place_of_torchvisions(where, monkeypatch):
    """MultiScaleRoIAlign itself, with its roi_align replaced by name."""
    maps, boxes = pyramid(where), per_image_boxes(where)
    pooler = torchvision.ops.MultiScaleRoIAlign(list(maps), 7, 2)
    expected = pooler(maps, boxes, [(256, 320)] * 2)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return glimpse_ext.roi_align(*args, **kwargs)

    monkeypatch.setattr(torchvision.ops.poolers, "roi_align", counted)
    got = pooler(maps, boxes, [(256, 320)] * 2)
    assert calls
    assert error(got, expected) <= FORWARD[F32]


# ------------------------------------------------------------------------ where torchvision is not


def test_what_crashes_or_is_missing_there_works_here(where):
    """Nothing is compared: torchvision would end the process, refuse, or answer with zeros."""
    image = torch.rand(1, 2, 8, 8, device=where)
    hostile = torch.tensor(
        [[0, math.nan, 1, 4, 4], [0, -math.inf, 1, math.inf, 4], [0, -1e9, -1e9, 1e9, 1e9]],
        device=where,
    )
    for ratio in (-1, 2):
        assert glimpse_ext.roi_align(image, hostile, 7, 1.0, ratio).isfinite().all()
    boxes = torch.tensor([[0.0, 1.3, 1.2, 5.1, 6.4]], device=where, requires_grad=True)
    glimpse_ext.roi_align(image, boxes, 2).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad[:, 1:].all()
    assert glimpse_ext.roi_align(image.bfloat16(), boxes, 2).dtype == torch.bfloat16
