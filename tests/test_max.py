# SPDX-License-Identifier: BSD-3-Clause
"""roi_align with mode="max": the reference, mmcv's numbers, ties, NaN, derivatives."""

from __future__ import annotations

import functools
import json
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import CASES, LAYOUTS, MODES, Case, Mode, arrange, random_tensor
from conftest import EMULATED, Tolerance, assert_within, compute_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap

import glimpse_ext
from glimpse_ext import reference

F32, F64 = torch.float32, torch.float64
ops = torch.ops.glimpse_ext


def pooler(case, mode, function=glimpse_ext.roi_align, **options):
    def pool(image, boxes):
        return function(
            image,
            boxes,
            case.output_size,
            case.spatial_scale,
            mode.sampling_ratio,
            mode.aligned,
            mode="max",
            **options,
        )

    return pool


@functools.cache
def expected(case, mode, dtype):
    """Pooled values and both gradients, computed in the precision of the operator."""
    wide = compute_dtype(dtype)
    image = case.image(dtype).to(wide).requires_grad_()
    boxes = case.boxes(wide).requires_grad_()
    pooled = pooler(case, mode, reference.roi_align, dtype=wide)(image, boxes)
    zeros = (torch.zeros_like(image), torch.zeros_like(boxes))
    if not pooled.requires_grad:  # nothing is read
        return pooled, *zeros
    gradients = torch.autograd.grad(
        pooled, (image, boxes), case.grad(dtype).to(wide), allow_unused=True
    )
    filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
    return pooled.detach(), *filled


# Where two samples of a cell are equal but for rounding, which of them wins depends on the
# order of operations. In float64 that does not happen in these cases.
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, mode, device, dtype, close):
    values, to_image, to_boxes = expected(case, mode, dtype)
    for layout in LAYOUTS:
        image = arrange(case.image(dtype).to(device.torch), layout).requires_grad_()
        boxes = case.boxes(compute_dtype(dtype)).to(device.torch).requires_grad_()
        pooled = pooler(case, mode)(image, boxes)
        assert pooled.dtype == dtype
        if layout == "channels_last" and not image.is_contiguous():
            assert pooled.is_contiguous(memory_format=torch.channels_last)
        close(pooled, values, "forward", layout)
        if dtype != F64:
            continue
        g = arrange(case.grad(dtype).to(device.torch), layout)
        got_image, got_boxes = torch.autograd.grad(pooled, (image, boxes), g)
        close(got_image, to_image, "gradient", f"{layout}, to the image")
        close(got_boxes, to_boxes, "gradient", f"{layout}, to the boxes")
        assert not got_boxes[:, 0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_dtype(layout, device, dtype, close):
    """Few samples in general position: the winners are clear in every precision."""
    case, mode = CASES[0], Mode(2, True)
    _, to_image, to_boxes = expected(case, mode, dtype)
    image = arrange(case.image(dtype).to(device.torch), layout).requires_grad_()
    boxes = case.boxes(compute_dtype(dtype)).to(device.torch).requires_grad_()
    g = arrange(case.grad(dtype).to(device.torch), layout)
    got = torch.autograd.grad(pooler(case, mode)(image, boxes), (image, boxes), g)
    close(got[0], to_image, "gradient", "to the image")
    close(got[1], to_boxes, "gradient", "to the boxes")


def test_uint8_images(device, close):
    case, mode = CASES[0], Mode(2, True)
    image = random_tensor(case.shape, torch.uint8, "bytes")
    boxes = case.boxes(F32)
    values = pooler(case, mode, reference.roi_align, dtype=F32)(image, boxes)
    pooled = pooler(case, mode)(image.to(device.torch), boxes.to(device.torch))
    close(pooled / 255, values / 255)


# ----------------------------------------------------------------------------------------- golden

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def stored():
    with np.load(GOLDEN / "mmcv_max.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return json.loads(str(file["meta"])), arrays


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("index", range(20))
def test_stored_numbers(index, dtype, device):
    metas, arrays = stored()
    assert len(metas) == 20
    meta, suffix = metas[index], "64" if dtype == F64 else "32"

    def field(name):
        return arrays[f"c{index}_{name}"]

    image = field("input").to(device.torch, dtype).requires_grad_()
    pooled = glimpse_ext.roi_align(
        image,
        field("rois").to(device.torch, dtype),
        meta["output_size"],
        meta["spatial_scale"],
        meta["sampling_ratio"],
        meta["aligned"],
        mode="max",
    )
    # -10000 is what mmcv starts its search with, and gives to a cell without samples.
    known = field("out" + suffix) != -10000
    label = f"case {index}, device={device}, dtype={dtype}"
    exact = Tolerance(1e-14, 1e-14, "four products in another order")
    tolerance = exact if dtype == F64 else Tolerance(1e-6, 1e-6, exact.reason)
    assert_within(pooled.cpu()[known], field("out" + suffix)[known], tolerance, label)
    assert not pooled.cpu()[~known].any()
    # y = -1 is a position that mmcv takes for none: it sends no gradient there.
    g = field("gout").to(dtype) * (field("argmax_y" + suffix) != -1)
    (gradient,) = torch.autograd.grad(pooled, image, g.to(device.torch))
    tolerance = Tolerance(1e-13, 1e-13, "sums over boxes in another order")
    tolerance = tolerance if dtype == F64 else Tolerance(1e-5, 1e-5, tolerance.reason)
    assert_within(gradient, field("gin" + suffix), tolerance, f"{label}, to the image")


# ------------------------------------------------------------------------------------- properties


def test_one_sample_is_its_own_maximum(device, close):
    case = CASES[1]
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    for aligned in (False, True):
        largest = pooler(case, Mode(1, aligned))(image, boxes)
        mean = glimpse_ext.roi_align(image, boxes, case.output_size, 1.0, 1, aligned)
        close(largest, mean, "forward", f"aligned={aligned}")


def test_no_sample_is_larger(device):
    case, mode = CASES[0], Mode(3, True)
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    height, width = case.output_size
    each = glimpse_ext.roi_align(image, boxes, (3 * height, 3 * width), 1.0, 1, True)
    largest = torch.nn.functional.max_pool2d(each, 3)
    assert (pooler(case, mode)(image, boxes) - largest).abs().max() < 1e-12


def test_negative_values_and_samples_outside(device):
    """A sample outside is a 0, which is larger than all that is on this map."""
    image = torch.full((1, 2, 6, 6), -20000.0, dtype=F64, device=device.torch).requires_grad_()
    boxes = torch.tensor([[0, 1.0, 1, 5, 5], [0, 4.0, 1, 12, 5], [0, 9, 9, 12, 12]], dtype=F64)
    boxes = boxes.to(device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, 1, 1.0, 2, True, mode="max")
    assert (pooled[0] == -20000).all()
    assert not pooled[1:].any()
    to_image, to_boxes = torch.autograd.grad(pooled.sum(), (image, boxes))
    assert to_image.sum() == 2, "one winner for each of two channels of the first box"
    assert not to_boxes.any()


def test_the_first_of_equals_wins(device):
    """On a constant map all samples are equal: the gradient goes to the taps of the first one."""
    image = torch.ones(1, 3, 8, 8, dtype=F64, device=device.torch).requires_grad_()
    box = torch.tensor([[0.0, 2, 2, 6, 6]], dtype=F64, device=device.torch)
    for layout in LAYOUTS:
        x = arrange(image.detach(), layout).requires_grad_()
        pooled = glimpse_ext.roi_align(x, box, 1, 1.0, 4, True, mode="max")
        (gradient,) = torch.autograd.grad(pooled.sum(), x)
        first = torch.zeros_like(gradient)
        first[:, :, 2, 2] = 1
        assert torch.equal(gradient, first), f"{device}, {layout}"


def test_more_samples_than_have_a_table(device, close):
    """Too many samples to write down are evaluated one by one, with the same numbers."""
    ratio = 20 if device is EMULATED else 90
    case = Case("many", ((0, 0.7, 0.9, 5.3, 6.1), (1, 4.2, 1.3, 9.9, 4.4)), (2, 2, 7, 6), (3, 3))
    mode = Mode(ratio, True)
    values, to_image, to_boxes = expected(case, mode, F64)
    image = case.image().to(device.torch).requires_grad_()
    boxes = case.boxes().to(device.torch).requires_grad_()
    pooled = pooler(case, mode)(image, boxes)
    got = torch.autograd.grad(pooled, (image, boxes), case.grad().to(device.torch))
    close(pooled, values)
    close(got[0], to_image, "gradient", "to the image")
    close(got[1], to_boxes, "gradient", "to the boxes")
    # Forward mode reads the chosen samples.
    moves = random_tensor((2, 5), F64, "moves").to(device.torch)
    with forward_ad.dual_level():
        dual = pooler(case, mode)(image.detach(), forward_ad.make_dual(boxes.detach(), moves))
        tangent = forward_ad.unpack_dual(dual).tangent
    close((tangent * case.grad().to(device.torch)).sum(), (got[1] * moves).sum(), "gradient")


def test_nan_wins(device):
    """As in torch.max; a box that does not read the NaN does not see it."""
    image = random_tensor((1, 3, 8, 8), F64, "nan").to(device.torch)
    image[0, 1, 3, 3] = nan
    boxes = torch.tensor([[0.0, 1, 1, 6, 6], [0, 5, 5, 8, 8]], dtype=F64, device=device.torch)
    for layout in LAYOUTS:
        pooled = glimpse_ext.roi_align(arrange(image, layout), boxes, 1, 1.0, 4, True, mode="max")
        assert pooled.isnan().flatten().tolist() == [False, True, False, False, False, False]
    image[0, 1, 3, 3] = -inf
    pooled = glimpse_ext.roi_align(image, boxes, 1, 1.0, 4, True, mode="max")
    assert pooled.isfinite().all()


def test_without_samples_it_is_zero(device):
    image = torch.full((1, 2, 6, 6), -3.0, device=device.torch).requires_grad_()
    rows = [[0, 2, 2, 2, 4], [0, 4, 4, 2, 2], [0, nan, 2, 3, 4], [0, 1, 1, inf, 4]]
    boxes = torch.tensor(rows, device=device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, (2, 3), 1.0, -1, True, mode="max")
    gradients = torch.autograd.grad(pooled.sum(), (image, boxes))
    assert not any(t.any() for t in (pooled, *gradients))


def test_samples_as_the_operator_returns_them(device):
    """Numbers of samples in the cell, row by row, -1 where a dropped one wins."""
    image = torch.zeros(1, 1, 8, 8, device=device.torch)
    image[0, 0, 3, 4] = 1
    boxes = torch.tensor([[0.0, 2, 2, 6, 6], [0, 20, 20, 24, 24]], device=device.torch)
    values, samples = ops.roi_align_max(image, boxes, 1.0, 1, 1, 4, True)
    assert values.flatten().tolist() == [1, 0]
    assert samples.dtype == torch.int32
    assert samples.flatten().tolist() == [4 * 1 + 2, -1]


@pytest.mark.parametrize("wrong", [-5, 4, 10**6, 2**31 - 1])
def test_samples_that_are_none(wrong, device):
    """Whatever is passed as a sample, nothing outside its cell is read."""
    image = random_tensor((1, 2, 6, 6), F64, "none").to(device.torch)
    boxes = torch.tensor([[0.0, 1, 1, 5, 5]], dtype=F64, device=device.torch)
    chosen = torch.full((1, 2, 1, 1), wrong, dtype=torch.int32, device=device.torch)
    g = torch.ones(1, 2, 1, 1, dtype=F64, device=device.torch)
    place = (boxes, None, None, chosen, [1, 1], [0, 2, 1, 0, 0], 1.0)
    assert not ops._frames_sample(image, *place).any()
    assert not ops._frames_grad_features(g, *place, [1, 2, 6, 6], False).any()
    assert not ops._frames_grad_boxes(image, g, *place).any()


def test_boxes_are_independent(device, same_bits):
    boxes = torch.cat([case.boxes(F32) for case in CASES[:5]]).to(device.torch)
    image = random_tensor((2, 5, 9, 7), F32, "independent").to(device.torch)
    together = glimpse_ext.roi_align(image, boxes, (3, 2), mode="max")
    for k in range(len(boxes)):
        alone = glimpse_ext.roi_align(image, boxes[k : k + 1], (3, 2), mode="max")
        same_bits(alone[0], together[k], f"box {k}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads(layout, device, dtype, same_bits):
    count, shape = (12, (2, 5, 13, 11)) if device is EMULATED else (150, (2, 70, 33, 29))
    unit = (random_tensor((count, 5), F64, "threads") + 1) / 2
    scale = torch.tensor([2, shape[3] / 2, shape[2] / 2, 14, 14], dtype=F64)
    boxes = (unit * scale).to(F32).to(device.torch)
    boxes[:, 0] = boxes[:, 0].floor().clamp(max=1)
    boxes[:, 3:] += boxes[:, 1:3]
    image = arrange(random_tensor(shape, dtype, "threads").to(device.torch), layout)
    g = random_tensor((count, shape[1], 3, 2), dtype, "threads grad").to(device.torch)

    def everything():
        x, b = image.detach().requires_grad_(), boxes.detach().requires_grad_()
        pooled = glimpse_ext.roi_align(x, b, (3, 2), mode="max")
        return pooled.detach(), *torch.autograd.grad(pooled, (x, b), g)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        for number in (1, 3, 7):
            torch.set_num_threads(number)
            for a, b in zip(everything(), one, strict=True):
                same_bits(a, b, f"{number} threads")
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------ derivatives

# No sample is on a pixel or near a border and no two are equal, so that derivatives exist.
SMOOTH = Case(
    "smooth",
    ((0.5, 0.83, 1.07, 4.31, 5.19), (1.5, 1.29, 2.13, 3.97, 4.61)),
    shape=(2, 2, 6, 5),
    output_size=(2, 1),
)
FOLLOWED = {"image": (True, False), "boxes": (False, True), "both": (True, True)}


def smooth(device):
    image, boxes = SMOOTH.image().to(device.torch), SMOOTH.boxes().to(device.torch)
    return pooler(SMOOTH, Mode(2, True)), image, boxes


@pytest.mark.parametrize("followed", FOLLOWED)
def test_derivatives_of_first_and_second_order(followed, device):
    pool, image, boxes = smooth(device)
    needs = FOLLOWED[followed]
    inputs = (image.requires_grad_(needs[0]), boxes.requires_grad_(needs[1]))
    assert torch.autograd.gradcheck(pool, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, inputs, check_fwd_over_rev=True)


def test_a_third_derivative_in_the_boxes_raises(device):
    pool, image, boxes = smooth(device)
    boxes.requires_grad_()
    (first,) = torch.autograd.grad(pool(image, boxes).sum(), boxes, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_align_max: derivatives of third order"):
        torch.autograd.grad(second.sum(), boxes)


def test_transforms(device, close):
    pool, image, boxes = smooth(device)

    def of_boxes(b):
        return (pool(image, b) ** 2).sum()

    hessian = torch.autograd.functional.hessian(of_boxes, boxes)
    close(jacfwd(jacrev(of_boxes))(boxes), hessian, "gradient", "jacfwd of jacrev")
    images = torch.stack([image, image.flip(3), 2 * image])
    many = torch.stack([boxes, boxes + 0.1, boxes - 0.1])
    many[:, :, 0] = boxes[:, 0]
    each = torch.stack([pool(x, b) for x, b in zip(images, many, strict=True)])
    close(vmap(pool)(images, many), each, "forward", "vmap of both")
    close(vmap(pool, (None, 0))(image, many)[0], each[0], "forward", "vmap of boxes")

    def to_both(x, b):
        return jacrev(lambda *inner: (pool(*inner) ** 2).sum(), (0, 1))(x, b)

    for i, got in enumerate(vmap(to_both)(images, many)):
        each = torch.stack([to_both(x, b)[i] for x, b in zip(images, many, strict=True)])
        close(got, each, "gradient", f"vmap of gradient {i}")


def test_forward_mode(device):
    pool, image, boxes = smooth(device)
    moves = random_tensor(tuple(boxes.shape), F64, "move").to(device.torch)
    step = 1e-6
    with forward_ad.dual_level():
        pooled = pool(image, forward_ad.make_dual(boxes, moves))
        tangent = forward_ad.unpack_dual(pooled).tangent
    central = (pool(image, boxes + step * moves) - pool(image, boxes - step * moves)) / (2 * step)
    assert_within(tangent, central, Tolerance(1e-8, 1e-8, "central differences"), str(device))


# ---------------------------------------------------------------------------------------- hostile

finite = st.floats(-40, 40, width=32)
wild = st.one_of(finite, st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.tuples(wild, wild, wild, wild), min_size=1, max_size=3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    cells=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    ratio=st.integers(-1, 3),
    aligned=st.booleans(),
)
def test_any_box_on_any_map(rows, height, width, cells, ratio, aligned, device):
    """The numbers of the reference, or zeros, whatever the box is; finite gradients to the map."""
    boxes = torch.tensor([(0.0, *row) for row in rows], dtype=F64)
    image = random_tensor((1, 2, height, width), F64, "any").to(device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align(
        image, boxes.to(device.torch), cells, 1.0, ratio, aligned, mode="max"
    )
    values = reference.roi_align(
        image.detach().cpu(), boxes, cells, 1.0, ratio, aligned, mode="max"
    )
    tolerance = Tolerance(1e-11, 1e-11, "positions of hundreds of pixels")
    assert_within(pooled, values, tolerance, f"{device}: {rows}")
    g = torch.ones_like(pooled)
    (gradient,) = torch.autograd.grad(pooled, image, g)
    # Each cell gives its 1 to the taps of one sample, whose weights add up to 1, or to none.
    nonzero = (pooled != 0).sum()
    assert abs(float(gradient.sum() - nonzero)) < 1e-9 * (1 + pooled.numel())


# ----------------------------------------------------------------------------------------- errors

IMAGE, BOX = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 4.0, 4, 6, 7]])


def test_errors_say_what_came():
    with pytest.raises(ValueError, match="roi_align: mode must be one of mean, max, got 'sum'"):
        glimpse_ext.roi_align(IMAGE, BOX, 2, mode="sum")
    with pytest.raises(RuntimeError, match=r"roi_align_max: boxes must be \[K, 5\].*got \[1, 4\]"):
        glimpse_ext.roi_align(IMAGE, BOX[:, :4], 2, mode="max")
    with pytest.raises(RuntimeError, match=r"roi_align_max: sampling_ratio .* 32768, got 40000"):
        glimpse_ext.roi_align(IMAGE, BOX, 2, sampling_ratio=40000, mode="max")
    place = (BOX, None, None, torch.zeros(1, 3, 2, 2), [2, 2], [0, 2, 1, 0, 0], 1.0)
    with pytest.raises(RuntimeError, match="roi_align_max: the chosen samples must be int32"):
        ops._frames_sample(IMAGE, *place)


def test_an_image_index_outside_the_batch(device):
    image, box = torch.ones(2, 3, 8, 8, device=device.torch), BOX.to(device.torch).clone()
    box[:, 0] = 2
    if device.raises_on_bad_index:
        with pytest.raises(RuntimeError, match="roi_align_max: box 0 refers to image 2"):
            glimpse_ext.roi_align(image, box, 2, mode="max")
    else:
        assert not glimpse_ext.roi_align(image, box, 2, mode="max").any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_tensors(layout, device):
    image = arrange(torch.zeros(2, 3, 5, 6, device=device.torch), layout)
    boxes = torch.tensor([[0, 2.0, 2, 4, 4]], device=device.torch)
    for x, b, size in (
        (image, boxes[:0], (2, 3)),
        (image[:, :0], boxes, (2, 3)),
        (image, boxes, (0, 3)),
        (image[:0], boxes[:0], (2, 3)),
    ):
        x, b = x.detach().requires_grad_(), b.detach().requires_grad_()
        pooled = glimpse_ext.roi_align(x, b, size, mode="max")
        assert pooled.shape == (len(b), x.shape[1], *size)
        to_image, to_boxes = torch.autograd.grad(pooled.sum(), (x, b))
        assert to_image.shape == x.shape
        assert not to_image.any()
        assert not to_boxes.any()


def test_compile():
    pool = pooler(SMOOTH, Mode(2, True))

    def loss(image, boxes):
        return (pool(image, boxes) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 1):
        image = SMOOTH.image().requires_grad_()
        boxes = SMOOTH.boxes()[:count].requires_grad_()
        got = torch.autograd.grad(compiled(image, boxes), (image, boxes))
        want = torch.autograd.grad(loss(image, boxes), (image, boxes))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
