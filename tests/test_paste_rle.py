# SPDX-License-Identifier: BSD-3-Clause
"""paste_masks_to_rle: the bytes of pycocotools for what paste_masks gives, without the image."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import random_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from test_backends import instruction_set
from test_paste import BOXES, MASKS, METHODS, SIZE, boxes_of, masks_of, threads

import glimpse_ext

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
THRESHOLDS = [0.5, 0.0, 1.0, 1e-38, 0.3]


def smooth_masks(count: int, size: int, seed: str) -> torch.Tensor:
    """Blobs as a mask head gives them."""
    coarse = random_tensor((count, 1, 5, 5), torch.float32, seed) * 2
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").sigmoid()


def assert_as_pasted(masks, boxes, size, threshold=0.5, method="detectron2", case=""):
    found = glimpse_ext.paste_masks_to_rle(masks, boxes, size, threshold, method, with_boxes=True)
    pasted = glimpse_ext.paste_masks(masks, boxes, size, threshold, method)
    pasted = pasted.reshape(len(boxes), *size)
    for k, image in enumerate(pasted):
        where = f"paste_masks_to_rle: {case} mask {k}, {masks.dtype}, {method}, >= {threshold}"
        expected = coco.encode(np.asfortranarray(image.numpy().astype(np.uint8)))
        assert found.rles[k] == expected, where
        assert found.areas[k] == image.sum(), where
        rows, columns = (image.any(1 - dim).nonzero().flatten().tolist() for dim in (0, 1))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else [0, 0, 0, 0]
        assert found.boxes[k].tolist() == tight, where


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", BOXES)
def test_every_kind_of_box(name, threshold, method):
    boxes = boxes_of(name, torch.float32)
    for shape in MASKS:
        masks = masks_of(boxes, shape, torch.float32)
        assert_as_pasted(masks, boxes, SIZE, threshold, method, f"{name} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_every_dtype_and_any_strides(dtype):
    boxes = boxes_of("inside", torch.float64)
    masks = masks_of(boxes, (8, 6), dtype)
    assert_as_pasted(masks, boxes, SIZE)
    assert_as_pasted(masks.transpose(1, 2), boxes, SIZE, case="transposed")
    assert_as_pasted(masks[:, ::2, ::3], boxes, SIZE, case="strided")
    assert_as_pasted(masks[:1].expand(len(boxes), -1, -1), boxes, SIZE, case="expanded")


def test_masks_of_a_detector():
    """Boxes over several words of 64 columns, beyond the image, and thinner than a pixel."""
    size = (301, 403)
    corner = random_tensor((40, 2), torch.float32, "corner") * 120 + 150
    sides = (random_tensor((40, 2), torch.float32, "sides") * 3).exp()
    boxes = torch.cat([corner, corner + sides * 12], 1)
    for mask_size in (28, 70):
        assert_as_pasted(smooth_masks(40, mask_size, "detector"), boxes, size)
        noise = random_tensor((40, 1, mask_size, mask_size), torch.float32, "noise")
        assert_as_pasted(noise, boxes, size, case="noise")


def test_values_on_the_threshold():
    """Means of numbers that equal the threshold fall on both sides of it, pixel by pixel."""
    boxes = torch.tensor([[1.3, 2.1, 55.7, 60.9], [0.1, 0.2, 63.9, 63.7]])
    for value in (0.3, 0.1, 0.7):
        masks = torch.full((2, 28, 28), value)
        assert_as_pasted(masks, boxes, (64, 64), value, case="constant")
        near = value * (1 + 6e-8 * random_tensor((2, 28, 28), torch.float32, "near").round())
        assert_as_pasted(near, boxes, (64, 64), value, case="near")


def test_masks_that_are_no_numbers():
    boxes = torch.tensor([[1.0, 1.0, 12.0, 8.0]]).expand(3, 4)
    masks = smooth_masks(3, 6, "special")[:, 0]
    masks[0, 2:4, 1:3] = torch.nan
    masks[1, 2, :] = torch.inf
    masks[1, 4, :] = -torch.inf
    masks[2] = 3e38
    assert_as_pasted(masks, boxes, SIZE)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 70), (70, 1)])
@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_images_without_extent(size, threshold):
    boxes = torch.tensor([[0.0, 0.0, 70.0, 70.0], [3.0, 3.0, 4.0, 4.0]])
    found = glimpse_ext.paste_masks_to_rle(torch.ones(2, 4, 4), boxes, size, threshold)
    pasted = glimpse_ext.paste_masks(torch.ones(2, 4, 4), boxes, size, threshold)
    for rle, image in zip(found, pasted, strict=True):
        assert rle == coco.encode(np.asfortranarray(image.numpy().astype(np.uint8)))


def test_no_masks():
    assert glimpse_ext.paste_masks_to_rle(torch.ones(0, 4, 4), torch.ones(0, 4), (5, 6)) == []


def test_runs_of_more_than_31_bits():
    """No image is made: this one would have 2^40 pixels."""
    side = 1 << 20
    boxes = torch.tensor([[2.0, 3.0, 6.0, 5.0]], dtype=torch.float64)
    masks = torch.ones(1, 28, 28, dtype=torch.float64)
    found = glimpse_ext.paste_masks_to_rle(masks, boxes, (side, side), with_boxes=True)
    assert found.areas.tolist() == [8]
    assert found.boxes.tolist() == [[2, 3, 6, 5]]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 140), st.integers(1, 90))
def test_any_masks_and_boxes(seed, mask, height, width):
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height, width, height])
    boxes = (torch.rand((3, 4), generator=generator) * 1.6 - 0.3) * extent
    if seed % 3 == 0:
        boxes = boxes.round()
    masks = torch.rand((3, mask, mask + seed % 4), generator=generator)
    threshold = [0.5, 0.25, 0.9][seed % 3]
    assert_as_pasted(masks, boxes, (height, width), threshold, METHODS[seed % 2], f"seed {seed}")


def test_the_number_of_threads_changes_nothing():
    masks = smooth_masks(60, 28, "threads")
    boxes = random_tensor((60, 4), torch.float32, "threads").sort(1).values * 90 + 150
    with threads(1):
        one = glimpse_ext.paste_masks_to_rle(masks, boxes, (300, 300))
    with threads(4):
        assert glimpse_ext.paste_masks_to_rle(masks, boxes, (300, 300)) == one


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_give_the_same_bytes(isa):
    if instruction_set() not in ("avx512", "avx2"):
        pytest.skip("this CPU has one instruction set only")
    environment = {**os.environ, "GLIMPSE_ISA": isa}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": torch.ones(2, 3)}, RuntimeError, r"paste_masks_to_rle: masks must be"),
        ({"masks": torch.ones(1, 0, 3)}, RuntimeError, r"must have at least one pixel"),
        ({"boxes": torch.ones(2, 4)}, RuntimeError, r"paste_masks_to_rle: boxes must be \[1, 4\]"),
        ({"boxes": torch.ones(1, 4, device="meta")}, RuntimeError, r"device of the masks"),
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
        glimpse_ext.paste_masks_to_rle(**{**arguments, **change})


if __name__ == "__main__":
    test_masks_of_a_detector()
    test_values_on_the_threshold()
    test_masks_that_are_no_numbers()
