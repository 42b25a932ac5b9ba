# SPDX-License-Identifier: BSD-3-Clause
"""Stored numbers of torchvision and detectron2: every case of both files, see golden/README.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Tolerance, assert_within

import glimpse_ext
from glimpse_ext import reference

GOLDEN = Path(__file__).parent / "golden"
F32, F64 = torch.float32, torch.float64

# Wider than against the reference: the originals add the samples of a cell one by one.
FORWARD = {
    F32: Tolerance(2e-6, 2e-6, "float32 sums in the order of the original"),
    F64: Tolerance(1e-13, 1e-13, "float64 sums in the order of the original"),
}
BACKWARD = {
    F32: Tolerance(1e-5, 1e-5, "float32 sums in the order of the original"),
    F64: Tolerance(1e-12, 1e-12, "float64 sums in the order of the original"),
}


@functools.cache
def load(name):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        return json.loads(str(stored["meta"])), arrays


class Stored:
    """The arrays of one case by field name, as tensors."""

    def __init__(self, file, index):
        self.meta = load(file)[0][index]
        self.arrays = load(file)[1]
        self.index = index

    def __getitem__(self, field):
        return torch.from_numpy(self.arrays[f"c{self.index}_{field}"])


ROI_ALIGN = [f"{i}-{meta['kind']}" for i, meta in enumerate(load("roi_align")[0])]
PYRAMID = [f"{i}-{meta['n_levels']}_levels" for i, meta in enumerate(load("pyramid")[0])]


def number(case):
    return int(case.split("-")[0])


def test_the_files_are_complete():
    for file, count, field, rows in (("roi_align", 64, "rois", 315), ("pyramid", 10, "boxes", 94)):
        meta, arrays = load(file)
        assert len(meta) == count
        assert sum(len(arrays[f"c{i}_{field}"]) for i in range(count)) == rows


@functools.cache
def moves_across_a_pixel(index):
    """Boxes whose gradient is at a kink: a sample is so near to a pixel that float32 and float64
    put it on different sides, where the slope is another one. Values are continuous there."""
    case = Stored("roi_align", index)
    gradients = []
    for dtype in (F32, F64):
        boxes = case["rois"].to(dtype).requires_grad_()
        meta = case.meta
        pooled = reference.roi_align(
            case["input"],
            boxes,
            meta["output_size"],
            meta["spatial_scale"],
            meta["sampling_ratio"],
            meta["aligned"],
            dtype=dtype,
        )
        gradients.append(torch.autograd.grad(pooled, boxes, case["gout"].to(dtype))[0].double())
    return (gradients[0] - gradients[1]).abs().amax(1) > 1e-4


def test_few_boxes_are_at_a_kink():
    """The comparison that test_roi_align leaves out in float32 is that of one box in 315."""
    assert sum(int(moves_across_a_pixel(i).sum()) for i in range(len(ROI_ALIGN))) <= 3


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", ROI_ALIGN)
def test_roi_align(case, dtype, device):
    stored = Stored("roi_align", number(case))
    meta, suffix = stored.meta, "64" if dtype == F64 else "32"
    image = stored["input"].to(device.torch, dtype).requires_grad_()
    boxes = stored["rois"].to(device.torch, dtype).requires_grad_()
    pooled = glimpse_ext.roi_align(
        image,
        boxes,
        meta["output_size"],
        meta["spatial_scale"],
        meta["sampling_ratio"],
        meta["aligned"],
    )
    to_image, to_boxes = torch.autograd.grad(
        pooled, (image, boxes), stored["gout"].to(device.torch, dtype)
    )
    label = f"roi_align, case={case}, device={device}, dtype={dtype}"
    assert_within(pooled, stored["out" + suffix], FORWARD[dtype], f"{label}, pooled")
    assert_within(to_image, stored["gin" + suffix], BACKWARD[dtype], f"{label}, to the image")
    # There is no box gradient in the originals: these are float64 numbers of a program of our own.
    smooth = slice(None) if dtype == F64 else ~moves_across_a_pixel(number(case))
    tolerance = BACKWARD[F64] if dtype == F64 else Tolerance(5e-5, 5e-5, "float32 positions")
    expected = stored["gbox_ref64"]
    assert_within(to_boxes.cpu()[smooth], expected[smooth], tolerance, f"{label}, to the boxes")


@pytest.mark.parametrize("case", ROI_ALIGN)
def test_roi_align_in_the_other_precision(case, device):
    """float32 calls against the float64 numbers, where the original agrees with itself."""
    stored = Stored("roi_align", number(case))
    meta, firm = stored.meta, ~stored["fragile"]
    pooled = glimpse_ext.roi_align(
        stored["input"].to(device.torch),
        stored["rois"].to(device.torch),
        meta["output_size"],
        meta["spatial_scale"],
        meta["sampling_ratio"],
        meta["aligned"],
    )
    # What is left of "fragile" is the rounding of positions, times the slope of the image.
    tolerance = Tolerance(2e-5, 2e-5, "float32 positions on an image of slope up to 8")
    label = f"roi_align, case={case}, device={device}, float32 against float64"
    assert_within(pooled.cpu()[firm], stored["out64"][firm], tolerance, label)


PEERS = {
    "torchvision": ("tv", {"aligned": False}),
    "detectron2": ("d2", {"aligned": True}),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", PYRAMID)
def test_multiscale(case, peer, device):
    stored = Stored("pyramid", number(case))
    prefix, options = PEERS[peer]
    meta, scales = stored.meta, stored.meta[f"{prefix}_scales"]
    index = stored["image_index"].float()[:, None]
    boxes = torch.cat([index, stored["boxes"]], dim=1)
    levels = stored[f"{prefix}_levels"]
    assert torch.equal(reference.assign_levels(boxes, scales, assign=peer), levels)

    features = [
        stored[f"feat{level}"].to(device.torch).requires_grad_()
        for level in range(meta["n_levels"])
    ]
    pooled = glimpse_ext.multiscale_roi_align(
        features,
        boxes.to(device.torch),
        meta["output_size"],
        scales,
        meta["sampling_ratio"],
        assign=peer,
        **options,
    )
    gradients = torch.autograd.grad(pooled, features, stored["gout"].to(device.torch))
    label = f"multiscale_roi_align, case={case}, peer={peer}, device={device}"
    assert_within(pooled, stored[f"{prefix}_out"], FORWARD[F32], f"{label}, pooled")
    for level, gradient in enumerate(gradients):
        expected = stored[f"{prefix}_gfeat{level}"]
        assert_within(gradient, expected, BACKWARD[F32], f"{label}, to level {level}")
