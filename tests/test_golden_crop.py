# SPDX-License-Identifier: BSD-3-Clause
"""Stored numbers of grid_sample, PointRend and crop_and_resize, see golden/README.md."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import Tolerance, assert_within
from test_golden import BACKWARD, F32, F64, FORWARD, GOLDEN, Stored, load, number

import glimpse_ext
from glimpse_ext import reference

CROP = [
    f"{i}-{m['padding_mode']}{'-corners' if m['align_corners'] else ''}"
    for i, m in enumerate(load("crop")[0])
]
POINTS = list(range(len(load("point_sample")[0])))


def crop_arguments(stored):
    meta = stored.meta
    return meta["out_hw"], {
        "align_corners": meta["align_corners"],
        "padding_mode": meta["padding_mode"],
    }


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", CROP)
def test_crop(case, dtype, device):
    stored = Stored("crop", number(case))
    suffix = "64" if dtype == F64 else "32"
    size, options = crop_arguments(stored)
    image = stored["image"].to(device.torch, dtype).requires_grad_()
    boxes = stored["box"].to(device.torch, dtype).requires_grad_()
    got = glimpse_ext.crop(image, boxes, size, **options)
    to_image, to_boxes = torch.autograd.grad(got, (image, boxes), stored["gout"].to(got))
    label = f"crop, case={case}, device={device}, dtype={dtype}"
    # grid_sample makes places from a grid of rounded numbers, so float32 places differ by roundings
    # of -1..1 times half the image, and values by those times the slope between pixels.
    forward = FORWARD[F64] if dtype == F64 else Tolerance(5e-6, 5e-6, "places of a float32 grid")
    backward = BACKWARD[F64] if dtype == F64 else Tolerance(4e-5, 4e-5, "places of a float32 grid")
    assert_within(got, stored["out" + suffix], forward, label)
    assert_within(to_image, stored["gimage" + suffix], backward, f"{label}, to the image")
    firm = ~stored["gbox_fragile"]
    expected = stored["gbox" + suffix]
    assert_within(to_boxes.cpu()[firm], expected[firm], backward, f"{label}, to the boxes")


@pytest.mark.parametrize("case", CROP)
def test_reference_crop(case):
    stored = Stored("crop", number(case))
    size, options = crop_arguments(stored)
    got = reference.crop(stored["image"], stored["box"], size, **options)
    assert_within(got, stored["out64"], FORWARD[F64], f"reference.crop, case={case}")


@pytest.mark.parametrize("case", POINTS)
def test_point_sample(case, device):
    stored = Stored("point_sample", case)
    align = stored.meta["align_corners"]
    image, points = stored["input"].double(), stored["points"].double()
    label = f"point_sample, case={case}, device={device}"
    got = glimpse_ext.point_sample(image.to(device.torch), points.to(device.torch), align)
    assert_within(got, stored["out64"], FORWARD[F64], label)
    assert_within(
        reference.point_sample(image, points, align), stored["out64"], FORWARD[F64], label
    )


# -------------------------------------------------------------------------------------- TensorFlow


@functools.cache
def tf_file(which):
    with np.load(GOLDEN / f"crop_and_resize_{which}.npz") as stored:
        return {key: stored[key] for key in stored.files}


class TfCase:
    """The arrays of one case; images as [N, C, H, W]."""

    def __init__(self, which, index):
        self.arrays, self.index = tf_file(which), index

    def raw(self, field):
        return self.arrays[f"c{self.index:03d}_{field}"]

    def tensor(self, field):
        return torch.from_numpy(np.ascontiguousarray(self.raw(field)))

    def image(self, field):
        array = self.raw(field)
        # torch has no arithmetic for uint16; TensorFlow makes all of these float32.
        wide = array.astype(np.float32) if array.dtype.kind in "iu" else array
        return torch.from_numpy(wide).permute(0, 3, 1, 2)

    def crop(self, image, boxes, size, function=glimpse_ext.crop_and_resize, **options):
        index = self.tensor("box_ind").to(image.device)
        return function(image, boxes, index, tuple(int(n) for n in size), **options)


def cases_of(which):
    stored = tf_file(which)
    return [f"{i}-{stored['tags'][i]}" for i in range(int(stored["n_cases"]))]


def test_the_files_are_complete():
    assert len(CROP) == 32
    assert len(POINTS) == 6
    assert [len(cases_of(w)) for w in ("forward", "grad_image", "grad_boxes")] == [176, 176, 163]


def check_forward(function, case, device, label):
    """All boxes, those on the last bit of the edge too: places have TensorFlow's bits."""
    stored = TfCase("forward", number(case))
    image = stored.image("image").to(device)
    boxes, size = stored.tensor("boxes").to(device), stored.raw("crop_size")
    method = str(stored.raw("method"))
    value = float(stored.raw("extrapolation_value"))
    got = stored.crop(image, boxes, size, function, method=method, extrapolation_value=value)
    # TensorFlow's result is float32; ours is float64 for a float64 image.
    got, expected = got.to(F32), stored.image("output")
    largest = float(image.abs().max()) if image.numel() else 0.0
    tolerance = Tolerance(2e-6 * (1 + largest), 0, "three roundings of a product of two weights")
    if method == "nearest":
        tolerance = Tolerance(0, 0, "nearest copies pixels")
    assert_within(got, expected, tolerance, f"crop_and_resize, case={case}, {label}")


@pytest.mark.parametrize("case", cases_of("forward"))
def test_crop_and_resize(case, device):
    check_forward(glimpse_ext.crop_and_resize, case, device.torch, f"device={device}")


@pytest.mark.parametrize("case", cases_of("forward"))
def test_reference_crop_and_resize(case):
    check_forward(reference.crop_and_resize, case, torch.device("cpu"), "reference")


@pytest.mark.parametrize("case", cases_of("grad_image"))
def test_crop_and_resize_image_gradient(case, device):
    stored = TfCase("grad_image", number(case))
    n, height, width, channels = (int(v) for v in stored.raw("image_size"))
    expected, grads = stored.image("output"), stored.image("grads")
    image = torch.zeros(n, channels, height, width, dtype=expected.dtype, device=device.torch)
    image.requires_grad_()
    boxes = stored.tensor("boxes").to(device.torch)
    got = stored.crop(image, boxes, grads.shape[2:], method=str(stored.raw("method")))
    (got,) = torch.autograd.grad(got, image, grads.to(got))
    assert got.dtype == expected.dtype
    # TensorFlow adds in the dtype of the image, so half is rounded at every one of its additions.
    additions = max(len(boxes) * grads.shape[2] * grads.shape[3], 1)
    eps = torch.finfo(expected.dtype if expected.dtype == torch.float16 else F32).eps
    largest = float(grads.abs().max()) if grads.numel() else 0.0
    tolerance = Tolerance(
        eps / 4 * additions * largest, 2 * eps, "sums in the order of the original"
    )
    label = f"crop_and_resize, case={case}, device={device}, to the image"
    assert_within(got.double(), expected.double(), tolerance, label)


@pytest.mark.parametrize("case", cases_of("grad_boxes"))
def test_crop_and_resize_box_gradient(case, device):
    """Without the boxes of which TensorFlow's two passes read different places."""
    stored = TfCase("grad_boxes", number(case))
    image, grads = stored.image("image").float().to(device.torch), stored.image("grads")
    boxes = stored.tensor("boxes").to(device.torch).requires_grad_()
    got = stored.crop(image, boxes, grads.shape[2:])
    (got,) = torch.autograd.grad(got, boxes, grads.to(got))
    firm = ~stored.tensor("rounding_sensitive")
    # Relative to the sum of absolute terms: every cell adds a difference of pixels, times a
    # gradient and the size of the image.
    largest = float(image.abs().max() * 2) if image.numel() else 0.0
    terms = float(grads.abs().sum((1, 2, 3)).max()) if grads.numel() else 0.0
    bound = 4e-8 * largest * terms * max(image.shape[2:])
    tolerance = Tolerance(bound, 1e-5, "float32 sums in the order of the original")
    label = f"crop_and_resize, case={case}, device={device}, to the boxes"
    assert_within(got.cpu()[firm], stored.tensor("output")[firm], tolerance, label)


def test_most_boxes_are_compared():
    flagged = [TfCase("grad_boxes", i).raw("rounding_sensitive") for i in range(163)]
    assert sum(f.sum() for f in flagged) < 0.25 * sum(len(f) for f in flagged)
