# SPDX-License-Identifier: BSD-3-Clause
"""paste_masks_to_rle: the bytes of pycocotools for what paste_masks gives, without the image."""

from __future__ import annotations

import json
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
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_backends import instruction_set
from test_paste import BOXES, MASKS, METHODS, SIZE, boxes_of, masks_of, on, threads

import glimpse_ext
from glimpse_ext import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
THRESHOLDS = [0.5, 0.0, 1.0, 1e-38, 0.3]


def smooth_masks(count: int, size: int, seed: str) -> torch.Tensor:
    """Blobs as a mask head gives them."""
    coarse = random_tensor((count, 1, 5, 5), torch.float32, seed) * 2
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").sigmoid()


def assert_as_pasted(masks, boxes, size, threshold=0.5, method="detectron2", case="", device=CPU):
    arguments = (*on(device, masks, boxes), size, threshold, method)
    found = glimpse_ext.paste_masks_to_rle(*arguments, with_boxes=True)
    with cpu_kernels():
        pasted = glimpse_ext.paste_masks(masks, boxes, size, threshold, method)
    pasted = pasted.reshape(len(boxes), *size)
    for k, image in enumerate(pasted):
        where = f"paste_masks_to_rle: {case} mask {k}, {masks.dtype}, {method}, >= {threshold}"
        where = f"{where}, {device}"
        expected = coco.encode(np.asfortranarray(image.numpy().astype(np.uint8)))
        assert found.rles[k] == expected, where
        assert found.areas[k] == coco.area(expected) == image.sum(), where
        left, top, width, height = coco.toBbox(expected).tolist()
        tight = [left, top, left + width, top + height]
        assert found.boxes[k].tolist() == tight, where
        rows, columns = (image.any(1 - dim).nonzero().flatten().tolist() for dim in (0, 1))
        assert tight == ([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else [0] * 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", BOXES)
def test_every_kind_of_box(name, threshold, method, device):
    boxes = boxes_of(name, torch.float32)
    for shape in MASKS:
        masks = masks_of(boxes, shape, torch.float32)
        case = f"{name} {shape}"
        assert_as_pasted(masks, boxes, SIZE, threshold, method, case, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_every_dtype_and_any_strides(dtype, device):
    boxes = boxes_of("inside", torch.float64)
    masks = masks_of(boxes, (8, 6), dtype)
    for case, own in {
        "dense": masks,
        "transposed": masks.transpose(1, 2),
        "strided": masks[:, ::2, ::3],
        "expanded": masks[:1].expand(len(boxes), -1, -1),
    }.items():
        assert_as_pasted(own, boxes, SIZE, case=case, device=device)


def test_masks_of_a_detector(device):
    """Boxes over several words of 64 columns, beyond the image, and thinner than a pixel."""
    size = (301, 403)
    corner = random_tensor((40, 2), torch.float32, "corner") * 120 + 150
    sides = (random_tensor((40, 2), torch.float32, "sides") * 3).exp()
    boxes = torch.cat([corner, corner + sides * 12], 1)
    for mask_size in (28, 70):
        assert_as_pasted(smooth_masks(40, mask_size, "detector"), boxes, size, device=device)
        noise = random_tensor((40, 1, mask_size, mask_size), torch.float32, "noise")
        assert_as_pasted(noise, boxes, size, case="noise", device=device)


def test_wide_and_long_masks(device):
    """Masks far wider than vectors, onto few columns and onto many."""
    for shape in ((3, 200), (200, 3), (1, 77)):
        masks = random_tensor((4, *shape), torch.float32, f"{shape}")
        boxes = torch.tensor(
            [[3.3, 2.1, 9.2, 11.0], [-40.5, 1, 300, 9], [88, 3, -3, 1], [0.1, 0.2, 90, 12]]
        )
        assert_as_pasted(masks, boxes, (13, 91), 0.2, case=f"{shape}", device=device)


def test_more_changes_than_there_is_room_for(device):
    """Rough masks over all of a narrow image; pixel 0 and the last one are ones."""
    masks = random_tensor((3, 1, 40, 40), torch.float32, "rough")
    masks[:, :, 0, 0] = masks[:, :, -1, -1] = 1
    boxes = torch.tensor([[-1.0, -1.0, 41.0, 301.0]]).expand(3, 4)
    assert_as_pasted(masks, boxes, (300, 40), 0.25, case="rough", device=device)


def test_values_on_the_threshold(device):
    """Means of numbers that equal the threshold fall on both sides of it, pixel by pixel."""
    boxes = torch.tensor([[1.3, 2.1, 55.7, 60.9], [0.1, 0.2, 63.9, 63.7]])
    for value in (0.3, 0.1, 0.7):
        masks = torch.full((2, 28, 28), value)
        assert_as_pasted(masks, boxes, (64, 64), value, case="constant", device=device)
        near = value * (1 + 6e-8 * random_tensor((2, 28, 28), torch.float32, "near").round())
        assert_as_pasted(near, boxes, (64, 64), value, case="near", device=device)


def test_masks_that_are_no_numbers(device):
    boxes = torch.tensor([[1.0, 1.0, 12.0, 8.0]]).expand(3, 4)
    masks = smooth_masks(3, 6, "special")[:, 0]
    masks[0, 2:4, 1:3] = torch.nan
    masks[1, 2, :] = torch.inf
    masks[1, 4, :] = -torch.inf
    masks[2] = 3e38
    for threshold in (0.5, 0.0):
        assert_as_pasted(masks, boxes, SIZE, threshold, device=device)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 70), (70, 1)])
@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_images_without_extent(size, threshold, device):
    boxes = torch.tensor([[0.0, 0.0, 70.0, 70.0], [3.0, 3.0, 4.0, 4.0]])
    arguments = (*on(device, torch.ones(2, 4, 4), boxes), size, threshold)
    found = glimpse_ext.paste_masks_to_rle(*arguments)
    pasted = glimpse_ext.paste_masks(*arguments).cpu()
    for rle, image in zip(found, pasted, strict=True):
        assert rle == coco.encode(np.asfortranarray(image.numpy().astype(np.uint8)))


def test_no_masks(device):
    masks, boxes = on(device, torch.ones(0, 4, 4), torch.ones(0, 4))
    assert glimpse_ext.paste_masks_to_rle(masks, boxes, (5, 6)) == []


def test_runs_of_more_than_31_bits(device):
    """No image is made: this one would have 2^40 pixels."""
    if device.name == "simple":
        pytest.skip("it looks at every pixel, and so has none of such images")
    side = 1 << 20
    boxes = torch.tensor([[2.0, 3.0, 6.0, 5.0]], dtype=torch.float64)
    masks, boxes = on(device, torch.ones(1, 28, 28, dtype=torch.float64), boxes)
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


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_agrees(method, device):
    """In float64, where no value of these is a rounding away from the threshold."""
    boxes = boxes_of("partial")
    masks = masks_of(boxes, (5, 7)) + 1e-3
    rles, areas, tight = reference.paste_masks_to_rle(masks, boxes, SIZE, 0.3, method)
    masks, boxes = on(device, masks, boxes)
    found = glimpse_ext.paste_masks_to_rle(masks, boxes, SIZE, 0.3, method, with_boxes=True)
    assert found.rles == rles
    assert torch.equal(found.areas, areas)
    assert torch.equal(found.boxes, tight)


def test_the_reference_writes_what_pycocotools_does():
    """Runs of every length that text has a form for, as far as an image can have them."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(60, generator=generator) * 12).exp2().int().tolist()
    bits = torch.tensor([i % 2 for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.uint8)
    expected = coco.encode(np.asfortranarray(bits.numpy()[:, None]))["counts"]
    assert reference._coco_counts(lengths) == expected
    assert (
        reference._coco_counts([0, *lengths])
        == coco.encode(np.asfortranarray(1 - bits.numpy()[:, None]))["counts"]
    )


def test_counts_for_json():
    """As text they survive a file, and are the same masks to pycocotools."""
    masks, boxes = smooth_masks(3, 28, "json"), boxes_of("inside", torch.float32)
    as_bytes = glimpse_ext.paste_masks_to_rle(masks, boxes, SIZE)
    as_text = glimpse_ext.paste_masks_to_rle(masks, boxes, SIZE, counts="str")
    assert all(type(rle["counts"]) is bytes for rle in as_bytes)
    assert [{**rle, "counts": rle["counts"].decode()} for rle in as_bytes] == as_text
    read = json.loads(json.dumps(as_text))
    assert (coco.decode(read) == coco.decode(as_bytes)).all()
    assert coco.iou(read, as_bytes, [0] * 3).diagonal().tolist() == [1, 1, 1]


@pytest.mark.parametrize("counts", ["bytes", "str"])
def test_coco_takes_them_as_results(counts, capsys):
    """Through COCO.loadRes and COCOeval: masks that are the annotations are found, all of them."""
    size = (120, 160)
    corners = random_tensor((6, 2), torch.float32, "coco").abs() * 60
    boxes = torch.cat([corners, corners + 50], 1)
    masks = smooth_masks(6, 28, "coco")
    masks[:, :, 8:20, 8:20] = 1
    found = glimpse_ext.paste_masks_to_rle(masks, boxes, size, with_boxes=True, counts=counts)
    tight = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "height": size[0], "width": size[1]}],
        "categories": [{"id": 1, "name": "blob"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": dict(found.rles[k]),
                "area": int(found.areas[k]),
                "bbox": tight[k].tolist(),
            }
            for k in range(6)
        ],
    }
    truth.createIndex()
    results = truth.loadRes(
        [
            {"image_id": 1, "category_id": 1, "segmentation": rle, "score": 0.9 - k / 10}
            for k, rle in enumerate(found.rles)
        ]
    )
    for k, annotation in enumerate(results.loadAnns(results.getAnnIds())):
        assert annotation["area"] == found.areas[k]
        assert list(annotation["bbox"]) == tight[k].tolist()
    evaluation = COCOeval(truth, results, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1), capsys.readouterr().out


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
        ({"counts": "list"}, ValueError, r"counts must be one of bytes, str, got 'list'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"masks": torch.ones(1, 4, 4), "boxes": torch.ones(1, 4), "image_size": (5, 6)}
    with pytest.raises(error, match=message):
        glimpse_ext.paste_masks_to_rle(**{**arguments, **change})


if __name__ == "__main__":
    test_masks_of_a_detector(CPU)
    test_wide_and_long_masks(CPU)
    test_values_on_the_threshold(CPU)
    test_masks_that_are_no_numbers(CPU)
