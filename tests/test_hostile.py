# SPDX-License-Identifier: BSD-3-Clause
"""Input that nobody meant: it has a documented result, a bounded cost, and crashes nothing."""

from __future__ import annotations

import re
import time
from math import inf, nan

import pytest
import torch
from cases import MODES, Mode, random_tensor
from conftest import CPU, TOLERANCES, assert_within
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import glimpse_ext
from glimpse_ext import reference

F32, F64 = torch.float32, torch.float64


def gradients(device, image, boxes, size, mode, scale=1.0):
    """Pooled values and both gradients, to an incoming gradient of ones."""
    image = image.to(device.torch).requires_grad_()
    boxes = boxes.to(device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, size, scale, mode.sampling_ratio, mode.aligned)
    return pooled, *torch.autograd.grad(pooled.sum(), (image, boxes))


# ---------------------------------------------------------------------------- boxes with a result


# Legacy mode widens a reversed box to one pixel, and one that ends at -inf is reversed: see below.
NOT_NUMBERS = [
    (value, column, mode)
    for value in (nan, inf, -inf)
    for column in (1, 2, 3, 4)
    for mode in MODES
    if mode.aligned or column <= 2 or value != -inf
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("value", "column", "mode"), NOT_NUMBERS, ids=str)
def test_a_number_that_is_none(value, column, mode, dtype, device):
    """The box gives zeros, and so do its gradients; the box beside it is pooled as if alone."""
    boxes = torch.tensor([[0, 1.0, 1.5, 4.0, 5.0], [0, 1.25, 1.0, 4.75, 5.0]], dtype=dtype)
    boxes[0, column] = value
    image = random_tensor((1, 2, 6, 6), dtype, "hostile")
    pooled, to_image, to_boxes = gradients(device, image, boxes, (2, 3), mode)
    assert not pooled[0].any()
    assert not to_boxes[0].any()
    alone = gradients(device, image, boxes[1:], (2, 3), mode)
    assert torch.equal(pooled[1:], alone[0])
    assert torch.equal(to_image, alone[1])
    assert torch.equal(to_boxes[1:], alone[2])


@pytest.mark.parametrize("column", [3, 4])
def test_a_box_that_ends_at_minus_infinity(column, device):
    """Legacy mode widens it to one pixel from where it starts, as it does any reversed box."""
    boxes = torch.tensor([[0, 1.0, 1.5, 4.0, 5.0]], dtype=F64)
    widened = boxes.clone()
    boxes[0, column] = -inf
    widened[0, column] = boxes[0, column - 2] + 1
    image = random_tensor((1, 2, 6, 6), F64, "hostile")
    for ratio in (-1, 2):
        pooled, _, to_boxes = gradients(device, image, boxes, 2, Mode(ratio, False))
        assert torch.equal(pooled, gradients(device, image, widened, 2, Mode(ratio, False))[0])
        assert pooled.any()
        assert to_boxes.isfinite().all()
        assert to_boxes[0, column] == 0


def test_an_empty_box(device):
    """Adaptive sampling takes nothing; samples that were asked for are taken at the point."""
    image = random_tensor((1, 2, 6, 6), F64, "hostile")
    point = torch.tensor([[0.0, 2.75, 3.25, 2.75, 3.25]], dtype=F64)
    line = torch.tensor([[0.0, 2.75, 1.0, 2.75, 4.0]], dtype=F64)
    for boxes in (point, line):
        pooled, to_image, to_boxes = gradients(device, image, boxes, 2, Mode(-1, True))
        assert not pooled.any()
        assert not to_image.any()
        assert not to_boxes.any()
    pooled = gradients(device, image, point, 2, Mode(3, True))[0]
    # Index 2.25 along x and 2.75 along y: the four pixels around it, as in any interpolation.
    weight = torch.tensor([0.25, 0.75], dtype=F64)[:, None] * torch.tensor([0.75, 0.25], dtype=F64)
    expected = (image[0, :, 2:4, 2:4] * weight).sum((1, 2))
    torch.testing.assert_close(pooled.cpu(), expected[None, :, None, None].expand_as(pooled))


def test_a_reversed_box(device):
    image = random_tensor((1, 2, 6, 6), F64, "hostile")
    for boxes in ([[0.0, 5, 1, 1, 4]], [[0.0, 1, 4, 5, 1]], [[0.0, 5, 4, 1, 1]]):
        boxes = torch.tensor(boxes, dtype=F64)
        pooled, _, to_boxes = gradients(device, image, boxes, 2, Mode(-1, True))
        assert not pooled.any()
        assert not to_boxes.any()
        assert gradients(device, image, boxes, 2, Mode(2, True))[0].any(), "mirrored"
        assert gradients(device, image, boxes, 2, Mode(-1, False))[0].any(), "one pixel"


# ------------------------------------------------------------------------------------ bounded cost


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("extent", [1e9, 6e9])
def test_a_box_of_billions_of_pixels_costs_what_the_image_costs(extent, aligned, dtype, device):
    """Sample by sample this would be 1e18 reads."""
    rows = [
        (0, -extent, -extent, extent, extent),
        (0, 2.0, -extent, 5.0, extent),
        (0, 3.0, 3.0, extent, extent),
        (0, -extent, -extent, 3.0, 3.0),
    ]
    boxes = torch.tensor(rows, dtype=dtype)
    image = random_tensor((1, 3, 8, 8), dtype, "billions") + 2
    mode = Mode(-1, aligned)
    started = time.perf_counter()
    pooled, to_image, to_boxes = gradients(device, image, boxes, 7, mode)
    seconds = time.perf_counter() - started
    assert seconds < 2, f"{seconds:.1f} s for 4 boxes on 8 x 8 pixels"
    for tensor in (pooled, to_image, to_boxes):
        assert tensor.isfinite().all()
    expected = reference.roi_align(image, boxes, 7, 1.0, -1, aligned, dtype=dtype)
    assert expected.any()
    assert_within(pooled, expected, TOLERANCES["forward"][dtype], f"{device} {dtype}")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_more_samples_in_a_cell_than_can_be_counted(mode, device):
    boxes = torch.tensor([[0.0, -1e12, 1, 1e12, 4], [0, -1e300, -1e300, 1e300, 1e300]], dtype=F64)
    image = random_tensor((1, 2, 6, 6), F64, "uncountable")
    pooled, to_image, to_boxes = gradients(device, image, boxes, 2, mode)
    if mode.sampling_ratio <= 0:
        assert not pooled.any()
        assert not to_image.any()
        assert not to_boxes.any()
    else:
        expected = reference.roi_align(image, boxes, 2, 1.0, mode.sampling_ratio, mode.aligned)
        torch.testing.assert_close(pooled.cpu(), expected)


def test_a_large_sampling_ratio(device):
    """On the CPU a cell costs its samples along y plus those along x, never their product. A CUDA
    cell without tables does cost the product, so it is asked for many samples, but not for any
    number of them. So do the simple loops."""
    ratio = 200_000 if device is CPU else 1_000
    image = torch.arange(6.0, dtype=F64).expand(1, 1, 6, 6)
    boxes = torch.tensor([[0.0, 1.25, 1.5, 4.75, 4.5]], dtype=F64)
    started = time.perf_counter()
    pooled, _, to_boxes = gradients(device, image.contiguous(), boxes, 1, Mode(ratio, True))
    assert time.perf_counter() - started < 5
    # The mean over ever more samples tends to the integral: the middle of a ramp.
    assert abs(pooled.item() - 2.5) < 1e-9
    assert (to_boxes.cpu() - torch.tensor([[0, 0.5, 0, 0.5, 0]])).abs().max() < 1e-9


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_scale_that_is_none(mode, device):
    image = random_tensor((1, 2, 6, 6), F64, "scale")
    boxes = torch.tensor([[0.0, 1, 1, 4, 4]], dtype=F64)
    for scale in (nan, inf, -inf):
        assert not gradients(device, image, boxes, 2, mode, scale)[0].any(), scale
    for scale in (0.0, -1.0, 1e-300, 1e300):
        pooled = gradients(device, image, boxes, 2, mode, scale)[0]
        expected = reference.roi_align(image, boxes, 2, scale, mode.sampling_ratio, mode.aligned)
        torch.testing.assert_close(pooled.cpu(), expected, msg=f"scale {scale}")


# ------------------------------------------------------------------------------------- image index

BAD_INDEX = [-1.0, -1e9, 2.0, 2.5, 1e9, nan, inf, -inf]


@pytest.mark.parametrize("dtype", [F64, F32, torch.float16], ids=str)
@pytest.mark.parametrize("index", BAD_INDEX, ids=str)
def test_an_image_that_does_not_exist(index, dtype, device):
    image = random_tensor((2, 3, 6, 6), dtype, "index").to(device.torch)
    boxes = torch.tensor([[1.0, 1, 1, 4, 5], [index, 1, 1, 4, 5], [0.0, 2, 1, 5, 4]])
    boxes = boxes.to(device.torch)
    if device.raises_on_bad_index:
        with pytest.raises(RuntimeError, match=r"roi_align: box 1 refers to image .*2 images"):
            glimpse_ext.roi_align(image, boxes, 2)
        with pytest.raises(RuntimeError, match=r"multiscale_roi_align: box 1 refers to image"):
            glimpse_ext.multiscale_roi_align([image, image], boxes, 2, (1, 0.5))
        return
    image, boxes = image.requires_grad_(), boxes.requires_grad_()
    good = torch.tensor([0, 2], device=device.torch)
    for pool in (
        lambda i, b: glimpse_ext.roi_align(i, b, 2),
        lambda i, b: glimpse_ext.multiscale_roi_align([i, i], b, 2, (1, 0.5)),
    ):
        pooled = pool(image, boxes)
        assert not pooled[1].any(), "a box of no image gives zeros"
        assert torch.equal(pooled[good], pool(image, boxes[good]))
        got = torch.autograd.grad(pooled.sum(), (image, boxes))
        expected = torch.autograd.grad(pool(image, boxes[good]).sum(), (image, boxes))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert not got[1][1].any()


def test_indices_are_checked_where_asked_for(device):
    image = torch.zeros(2, 1, 4, 4, device=device.torch)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2], [2.0, 0, 0, 2, 2]], device=device.torch)
    before = glimpse_ext.set_check_indices(True)
    try:
        assert glimpse_ext.set_check_indices(True) is True, "the previous setting is returned"
        with pytest.raises(RuntimeError, match=r"roi_align: box 1 refers to image 2.*2 images"):
            glimpse_ext.roi_align(image, boxes, 2)
        with pytest.raises(RuntimeError, match=r"multiscale_roi_align: box 1 refers to image 2"):
            glimpse_ext.multiscale_roi_align([image, image], boxes, 2, (1, 0.5))
        glimpse_ext.roi_align(image, boxes[:1], 2)
    finally:
        glimpse_ext.set_check_indices(before)


def test_an_index_is_cut_off_not_rounded(device):
    image = (
        torch.tensor([1.0, 2.0, 3.0], device=device.torch).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    )
    index = torch.tensor([0.0, 0.999, -0.999, 1.5, 2.999])
    boxes = torch.cat([index[:, None], torch.tensor([[0.0, 0, 4, 4]]).expand(5, 4)], dim=1)
    pooled = glimpse_ext.roi_align(image, boxes.to(device.torch), 1)
    assert pooled.flatten().tolist() == [1, 1, 1, 2, 3]


def test_an_image_of_another_example_of_vmap(device):
    """Examples of a batch are pooled in one call; an index must not reach into the next example."""
    images = (
        torch.arange(1.0, 5.0, device=device.torch).reshape(2, 2, 1, 1, 1).expand(2, 2, 1, 4, 4)
    )
    boxes = torch.tensor([[0.0, 0, 0, 4, 4], [1, 0, 0, 4, 4]], device=device.torch)
    pool = torch.vmap(lambda i, b: glimpse_ext.roi_align(i, b, 1), in_dims=(0, None))
    assert pool(images, boxes).flatten().tolist() == [1, 2, 3, 4]
    boxes[1, 0] = 2
    if device.raises_on_bad_index:
        with pytest.raises(RuntimeError, match="roi_align: box 1 refers to image"):
            pool(images, boxes)
    else:
        assert pool(images, boxes).flatten().tolist() == [1, 0, 3, 0]


# ------------------------------------------------------------------------------------------- empty


EMPTY = {
    "no boxes": ((2, 3, 5, 4), 0, (2, 3)),
    "no channels": ((2, 0, 5, 4), 4, (2, 3)),
    "no rows": ((2, 3, 5, 4), 4, (0, 3)),
    "no columns": ((2, 3, 5, 4), 4, (2, 0)),
    "no images and no boxes": ((0, 3, 5, 4), 0, (2, 3)),
    "no pixels and no boxes": ((2, 3, 0, 4), 0, (2, 3)),
    "nothing at all": ((0, 0, 0, 0), 0, (0, 0)),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_tensors(case, device, dtype):
    shape, count, size = EMPTY[case]
    image = torch.ones(shape, dtype=dtype, device=device.torch, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]], device=device.torch).repeat(count, 1)
    boxes.requires_grad_()
    for pool in (
        lambda: glimpse_ext.roi_align(image, boxes, size),
        lambda: glimpse_ext.multiscale_roi_align([image, image], boxes, size, (1, 0.5)),
    ):
        pooled = pool()
        assert pooled.shape == (count, shape[1], *size)
        assert pooled.dtype == dtype
        to_image, to_boxes = torch.autograd.grad(pooled, (image, boxes), torch.ones_like(pooled))
        assert to_image.shape == image.shape
        assert to_boxes.shape == boxes.shape
        assert not to_image.any()
        assert not to_boxes.any()


def test_boxes_of_no_image(device):
    """Boxes are there, images are not: no index can be right."""
    image = torch.zeros(0, 2, 4, 4, device=device.torch)
    boxes = torch.zeros(3, 5, device=device.torch)
    if device.raises_on_bad_index:
        with pytest.raises(RuntimeError, match=r"roi_align: box 0 refers to image 0.*0 images"):
            glimpse_ext.roi_align(image, boxes, 2)
    else:
        assert not glimpse_ext.roi_align(image, boxes, 2).any()


# ----------------------------------------------------------------------------- pixels not numbers


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_pixel_that_no_sample_reads_is_not_used(layout, mode, device, dtype, close):
    """NaN around the box, in the other image and in the other channel stays there."""
    image = torch.full((2, 3, 9, 9), nan, dtype=dtype)
    image[1, 1, 2:6, 3:7] = 1.5
    image = image.to(device.torch).contiguous(memory_format=layout)
    boxes = torch.tensor([[1.0, 3.75, 2.75, 5.75, 4.75]], device=device.torch)
    if mode.aligned:
        boxes[:, 1:] += 0.5
    pooled = glimpse_ext.roi_align(image, boxes, 2, 1.0, mode.sampling_ratio, mode.aligned)
    close(pooled[0, 1], torch.full((2, 2), 1.5))
    assert pooled[0, [0, 2]].isnan().all()


def test_a_gradient_that_is_not_a_number_stays_with_its_pixels(device):
    image = torch.ones(1, 1, 8, 8, device=device.torch, requires_grad=True)
    boxes = torch.tensor([[0.0, 1.25, 1.25, 2.75, 2.75], [0, 5, 5, 7, 7]], device=device.torch)
    g = torch.ones(2, 1, 2, 2, device=device.torch)
    g[0] = nan
    pooled = glimpse_ext.roi_align(image, boxes, 2, 1.0, 1, aligned=True)
    (to_image,) = torch.autograd.grad(pooled, image, g)
    assert to_image[0, 0, :3, :3].isnan().any()
    assert to_image[0, 0, 3:].isfinite().all()
    assert to_image[0, 0, :, 3:].isfinite().all()


# ----------------------------------------------------------------------------------------- fuzzing

# Numbers where something happens: whole and half, around the edges of small images, tiny and huge.
coordinates = st.one_of(
    st.floats(-3, 12, width=32),
    st.integers(-16, 64).map(lambda i: i / 4),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1e9, -1e9, 2.0**31, 3e38, -3e38]),
)

problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(
            st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)
        ),
        "corners": st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4),
        "size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "scale": st.sampled_from([1.0, 0.5, 0.25, 0.1, 2.0, 1 / 3]),
        "ratio": st.integers(-1, 4),
        "aligned": st.booleans(),
        "layout": st.sampled_from([torch.contiguous_format, torch.channels_last]),
        "dtype": st.sampled_from([F32, F64]),
    }
)


def same_as_reference(problem, device):
    shape, dtype = problem["shape"], problem["dtype"]
    index = [float(k % shape[0]) for k in range(len(problem["corners"]))]
    rows = [(i, *corners) for i, corners in zip(index, problem["corners"], strict=True)]
    boxes = torch.tensor(rows, dtype=dtype)
    image = random_tensor(shape, dtype, "fuzz")
    arguments = (problem["size"], problem["scale"], problem["ratio"], problem["aligned"])
    results = []
    for function, options, place in (
        (glimpse_ext.roi_align, {}, device.torch),
        (reference.roi_align, {"dtype": dtype}, torch.device("cpu")),
    ):
        i = image.to(place).contiguous(memory_format=problem["layout"]).requires_grad_()
        b = boxes.to(place).requires_grad_()
        pooled = function(i, b, *arguments, **options)
        g = random_tensor(tuple(pooled.shape), dtype, "fuzz grad").to(place)
        results.append((pooled, *torch.autograd.grad(pooled, (i, b), g)))
    names = ("forward", "pooled"), ("gradient", "to the image"), ("gradient", "to the boxes")
    for (kind, name), got, expected in zip(names, *results, strict=True):
        label = f"{name}, device={device}, {problem}"
        assert_within(got, expected, TOLERANCES[kind][dtype], label)


fuzzing = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

regular = {"size": (2, 3), "scale": 1.0, "layout": torch.contiguous_format, "dtype": F32}


@given(problem=problems)
@example(
    problem={
        **regular,
        "shape": (1, 2, 1, 1),
        "corners": [(-1.0, -1.0, 1.0, 1.0)],
        "ratio": 4,
        "aligned": False,
    }
)
@example(
    problem={
        **regular,
        "shape": (1, 2, 9, 9),
        "corners": [(-0.0, -0.0, 2.0**31, 2.0**31)],
        "ratio": 0,
        "aligned": True,
    }
)
@settings(fuzzing, max_examples=150)
def test_any_boxes_equal_the_reference(device, problem):
    same_as_reference(problem, device)


@pytest.mark.slow
@given(problem=problems)
@settings(fuzzing, max_examples=1_000)
def test_many_boxes_equal_the_reference(device, problem):
    same_as_reference(problem, device)


anything = st.one_of(coordinates, st.floats(width=32))


@given(
    rows=st.lists(st.tuples(*[anything] * 5), max_size=5),
    levels=st.none() | st.lists(st.integers(-(2**40), 2**40), min_size=5, max_size=5),
    ratio=st.integers(-(2**40), 40),
    aligned=st.booleans(),
    assign=st.sampled_from(["torchvision", "detectron2"]),
)
@settings(fuzzing, max_examples=80)
def test_no_numbers_crash_a_pyramid(device, rows, levels, ratio, aligned, assign):
    """A result of the right shape, or an error that names the operator."""
    boxes = torch.tensor(rows, dtype=F32).reshape(-1, 5).to(device.torch)
    features = [torch.ones(2, 2, 5, 4, device=device.torch) for _ in range(2)]
    if levels is not None:
        levels = torch.tensor(levels[: len(rows)], dtype=torch.int64, device=device.torch)
    try:
        pooled = glimpse_ext.multiscale_roi_align(
            features, boxes, 2, (0.5, 0.25), ratio, aligned, 8, 2, assign, levels=levels
        )
    except RuntimeError as error:
        if not device.raises_on_bad_index or not re.match(
            r"multiscale_roi_align: box ", str(error)
        ):
            raise
        return
    assert pooled.shape == (len(rows), 2, 2, 2)
    assert pooled.isfinite().all()
    assert pooled.min() >= 0 if pooled.numel() else True
    assert pooled.max() <= 1 + 1e-5 if pooled.numel() else True
