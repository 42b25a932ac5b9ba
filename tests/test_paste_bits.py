# SPDX-License-Identifier: BSD-3-Clause
"""paste_masks_to_bits: the bits of NumPy for what paste_masks gives; unpack_masks."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import random_tensor
from conftest import CPU, cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import instruction_set
from test_paste import BOXES, MASKS, METHODS, SIZE, boxes_of, masks_of, on, threads
from test_paste_rle import DTYPES, THRESHOLDS, smooth_masks

import glimpse_ext
from glimpse_ext import reference


def packed(images):
    return torch.from_numpy(np.packbits(images.numpy(), axis=-1, bitorder="little"))


def assert_as_pasted(masks, boxes, size, threshold=0.5, method="detectron2", case="", device=CPU):
    where = f"paste_masks_to_bits: {case}, {masks.dtype}, {method}, >= {threshold}, {device}"
    found = glimpse_ext.paste_masks_to_bits(*on(device, masks, boxes), size, threshold, method)
    with cpu_kernels():
        pasted = glimpse_ext.paste_masks(masks, boxes, size, threshold, method)
    assert found.dtype == torch.uint8, where
    expected = packed(pasted)
    assert found.shape == expected.shape, where
    wrong = (found.cpu() != expected).nonzero()
    assert len(wrong) == 0, f"{where}: {len(wrong)} bytes differ, the first at {wrong[0].tolist()}"
    assert torch.equal(glimpse_ext.unpack_masks(found, size).cpu(), pasted), where


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", BOXES)
def test_every_kind_of_box(name, threshold, method, device):
    boxes = boxes_of(name, torch.float32)
    for shape in MASKS:
        masks = masks_of(boxes, shape, torch.float32)
        case = f"{name} {shape}"
        assert_as_pasted(masks, boxes, SIZE, threshold, method, case, device)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 63, 64, 65, 71, 72, 73, 128, 130, 515])
@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_every_width(width, threshold, device):
    """Masks that begin at each pixel of a byte, with words that end behind the row."""
    left = torch.arange(9) + max(0, width - 70) / 3
    boxes = torch.stack([left, left / 3 - 1, left + width / 2 + 1, left + 4], 1)
    masks = smooth_masks(9, 6, "widths")[:, 0]
    assert_as_pasted(masks, boxes, (5, width), threshold, case=f"width {width}", device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_every_dtype_and_any_strides(dtype, device):
    boxes = boxes_of("inside", torch.float64)
    masks = masks_of(boxes, (8, 6), dtype)
    for case, own in {
        "dense": masks,
        "transposed": masks.transpose(1, 2),
        "strided": masks[:, ::2, ::3],
        "expanded": masks[:1].expand(len(boxes), -1, -1),
        "4 dimensions": masks[:, None],
    }.items():
        assert_as_pasted(own, boxes, SIZE, case=case, device=device)


def test_masks_of_a_detector(device):
    """Boxes over several words of 64 columns and strips of rows, and beyond the image."""
    size = (151, 403)
    corner = random_tensor((20, 2), torch.float32, "corner") * 120 + 130
    sides = (random_tensor((20, 2), torch.float32, "sides") * 3).exp()
    boxes = torch.cat([corner, corner + sides * 12], 1)
    for mask_size in (28, 70):
        assert_as_pasted(smooth_masks(20, mask_size, "detector"), boxes, size, device=device)
    noise = random_tensor((20, 1, 28, 28), torch.float32, "noise")
    assert_as_pasted(noise, boxes, size, case="noise", device=device)


def test_large_results():
    """Memory that the system clears, which only masks are written to."""
    boxes = torch.tensor([[300.3, 40.1, 420.7, 90.9], [0, 0, 30, 30], [1300, 700, 1400, 900]] * 4)
    masks = smooth_masks(12, 28, "large")
    assert_as_pasted(masks, boxes, (800, 1333), case="zero pages")
    assert_as_pasted(masks, boxes, (800, 1333), 0.0, case="ones around")


def test_masks_that_are_no_numbers(device):
    """What a mask does not reach is background, whatever it holds."""
    boxes = torch.tensor([[1.0, 1.0, 12.0, 8.0]]).expand(4, 4)
    masks = smooth_masks(4, 6, "special")[:, 0]
    masks[0, 2:4, 1:3] = torch.nan
    masks[1, 2, :] = torch.inf
    masks[2] = 3e38
    masks[3] = torch.nan
    for threshold in (0.5, 0.0):
        assert_as_pasted(masks, boxes, SIZE, threshold, device=device)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 70), (70, 1)])
@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_images_without_extent(size, threshold, device):
    boxes = torch.tensor([[0.0, 0.0, 70.0, 70.0], [3.0, 3.0, 4.0, 4.0]])
    assert_as_pasted(torch.ones(2, 4, 4), boxes, size, threshold, device=device)


def test_no_masks(device):
    masks, boxes = on(device, torch.ones(0, 4, 4), torch.ones(0, 4))
    assert glimpse_ext.paste_masks_to_bits(masks, boxes, (5, 9)).shape == (0, 5, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.integers(1, 160))
def test_any_masks_and_boxes(seed, mask, height, width):
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height, width, height])
    boxes = (torch.rand((3, 4), generator=generator) * 1.6 - 0.3) * extent
    masks = torch.rand((3, mask, mask + seed % 4), generator=generator)
    threshold = [0.5, 0.25, 0.9][seed % 3]
    assert_as_pasted(masks, boxes, (height, width), threshold, METHODS[seed % 2], f"seed {seed}")


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_agrees(method, device):
    """In float64, where no value of these is a rounding away from the threshold."""
    boxes = boxes_of("partial")
    masks = masks_of(boxes, (5, 7)) + 1e-3
    expected = reference.paste_masks_to_bits(masks, boxes, SIZE, 0.3, method)
    masks, boxes = on(device, masks, boxes)
    found = glimpse_ext.paste_masks_to_bits(masks, boxes, SIZE, 0.3, method)
    assert torch.equal(found.cpu(), expected)


def test_vmap(device):
    boxes = torch.stack([boxes_of("inside"), boxes_of("partial")]).float()
    masks = masks_of(range(6), (5, 4), torch.float32).reshape(2, 3, 5, 4)
    masks, boxes = on(device, masks, boxes)

    def bits(own, where):
        return glimpse_ext.paste_masks_to_bits(own, where, SIZE)

    one_by_one = torch.stack([bits(*pair) for pair in zip(masks, boxes, strict=True)])
    assert torch.equal(torch.vmap(bits)(masks, boxes), one_by_one)
    shared = torch.stack([bits(masks[0], where) for where in boxes])
    assert torch.equal(torch.vmap(bits, (None, 0))(masks[0], boxes), shared)


def test_compile():
    """Without a graph break, for images of several sizes."""
    torch._dynamo.reset()

    def area(masks, boxes, size):
        bits = glimpse_ext.paste_masks_to_bits(masks, boxes, size)
        return bits, glimpse_ext.unpack_masks(bits, size).flatten(1).sum(1)

    compiled = torch.compile(area, fullgraph=True, dynamic=True, backend="aot_eager")
    boxes = boxes_of("inside", torch.float32)
    masks = masks_of(boxes, (5, 4), torch.float32)
    for size in ((9, 13), (7, 30), (11, 16)):
        for got, expected in zip(
            compiled(masks, boxes, size), area(masks, boxes, size), strict=True
        ):
            assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_the_number_of_threads_changes_nothing():
    masks = smooth_masks(60, 28, "threads")
    boxes = random_tensor((60, 4), torch.float32, "threads").sort(1).values * 90 + 150
    with threads(1):
        one = glimpse_ext.paste_masks_to_bits(masks, boxes, (300, 300))
    with threads(4):
        assert torch.equal(glimpse_ext.paste_masks_to_bits(masks, boxes, (300, 300)), one)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_give_the_same_bits(isa):
    if instruction_set() not in ("avx512", "avx2"):
        pytest.skip("this CPU has one instruction set only")
    environment = {**os.environ, "GLIMPSE_ISA": isa}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_unpacking_some_masks_makes_no_others():
    bits = torch.zeros(1000, 64, 16, dtype=torch.uint8)
    bits[3, 2, 1] = 5
    images = glimpse_ext.unpack_masks(bits[[3]], (64, 127))
    assert images.shape == (1, 64, 127)
    assert images.nonzero().tolist() == [[0, 2, 8], [0, 2, 10]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": torch.ones(2, 3)}, RuntimeError, r"paste_masks_to_bits: masks must be"),
        ({"masks": torch.ones(1, 0, 3)}, RuntimeError, r"must have at least one pixel"),
        ({"boxes": torch.ones(2, 4)}, RuntimeError, r"paste_masks_to_bits: boxes must be \[1, 4\]"),
        ({"masks": [1]}, TypeError, r"must be tensors"),
        ({"image_size": 7}, TypeError, r"image_size must be \(height, width\), got 7"),
        ({"image_size": (7, -1)}, ValueError, r"zero or more"),
        ({"threshold": -1}, RuntimeError, r"threshold must be zero or more, got -1"),
        ({"threshold": float("nan")}, ValueError, r"threshold must be a number, got nan"),
        ({"method": "other"}, ValueError, r"method must be one of detectron2, torchvision"),
    ],
)
def test_errors(change, error, message):
    arguments = {"masks": torch.ones(1, 4, 4), "boxes": torch.ones(1, 4), "image_size": (5, 6)}
    with pytest.raises(error, match=message):
        glimpse_ext.paste_masks_to_bits(**{**arguments, **change})


@pytest.mark.parametrize(
    ("bits", "size", "error", "message"),
    [
        ([1], (1, 8), TypeError, r"unpack_masks: bits must be a uint8 tensor, got list"),
        (torch.ones(1, 1), (1, 8), TypeError, r"must be a uint8 tensor, got torch.float32"),
        (torch.ones(5, 2).byte(), (5, 8), RuntimeError, r"5 x 8 must be \[..., 5, 1\], got \[5, 2"),
        (torch.ones(5, 1).byte(), (4, 8), RuntimeError, r"must be \[..., 4, 1\], got \[5, 1\]"),
        (torch.ones(5).byte(), (5, 8), RuntimeError, r"must be \[..., 5, 1\], got \[5\]"),
        (torch.ones(5, 1).byte(), 5, TypeError, r"image_size must be \(height, width\)"),
    ],
)
def test_unpacking_errors(bits, size, error, message):
    with pytest.raises(error, match=message):
        glimpse_ext.unpack_masks(bits, size)


if __name__ == "__main__":
    test_masks_of_a_detector(CPU)
    test_masks_that_are_no_numbers(CPU)
