# SPDX-License-Identifier: BSD-3-Clause
"""RoIAlign of rotated boxes: reference, stored numbers, symmetries, derivatives, hostile boxes."""

from __future__ import annotations

import functools
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import LAYOUTS, arrange, random_tensor
from conftest import EMULATED, Tolerance, _testing, assert_within, compute_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap

import glimpse_ext
from glimpse_ext import reference

F32, F64 = torch.float32, torch.float64
ops = torch.ops.glimpse_ext


@dataclass(frozen=True)
class Case:
    """Boxes with the image they are read from. Rows: image, centre x, centre y, w, h, degrees."""

    name: str
    rows: tuple[tuple[float, ...], ...]
    shape: tuple[int, int, int, int] = (2, 3, 9, 7)
    output_size: tuple[int, int] = (3, 2)
    spatial_scale: float = 1.0

    def __str__(self):
        return self.name

    def boxes(self, dtype=F64):
        return torch.tensor(self.rows, dtype=F64).reshape(-1, 6).to(dtype)

    def image(self, dtype=F64):
        return random_tensor(self.shape, dtype, self.name)

    def grad(self, dtype=F64):
        size = (len(self.rows), self.shape[1], *self.output_size)
        return random_tensor(size, dtype, f"{self.name} grad")


CASES = [
    Case("inside", ((0, 3.4, 4.6, 4.1, 5.3, 33), (1, 3.1, 4.2, 3.7, 2.9, -71.5))),
    Case(
        "partial",
        (
            (0, 0.3, 4.1, 5.2, 6.7, 20),
            (1, 6.6, 8.4, 4.7, 5.1, 130),
            (0, 3.2, -1.1, 7.3, 3.9, 250.5),
        ),
    ),
    Case("outside", ((0, -9.2, 3.1, 4, 5, 45), (1, 3.3, 30.7, 5, 6, -10))),
    Case("covering", ((0, 3.3, 4.7, 40.1, 60.3, 12), (1, 5.1, 2.2, 100.3, 3.7, 77))),
    Case("tiny", ((0, 3.52, 4.51, 0.013, 0.021, 15), (1, 6.71, 8.83, 0.11, 0.07, -200))),
    Case("thin", ((0, 3.4, 4.6, 9.1, 0.31, 37), (1, 2.7, 3.9, 0.27, 11.3, 61))),
    Case("turns", ((0, 3.4, 4.6, 4.1, 5.3, 365.25), (1, 3.1, 4.2, 3.7, 2.9, -4321.5))),
    Case("zero", ((0, 3.3, 4.6, 0, 3.2, 30), (1, 2.2, 3.3, 0, 0, 5), (0, 3.3, 4.6, 2.5, 0, 30))),
    Case("negative", ((0, 3.3, 4.6, -3.1, 4.4, 30), (1, 3.1, 4.2, -3.7, -2.9, 100))),
    Case("one_pixel", ((0, 0.4, 0.6, 1.3, 1.7, 30), (1, 0.5, 0.5, 0.4, 0.3, 60)), (2, 3, 1, 1)),
    Case("one_row", ((0, 3.1, 0.5, 6.3, 1.2, 10),), (1, 2, 1, 12)),
    Case("scaled", ((0, 14.1, 17.7, 21.3, 15.9, 40), (1, 9.3, 8.8, 30.1, 7.7, -25)),
         output_size=(2, 5), spatial_scale=0.25),
    Case("channels", ((0, 2.9, 2.3, 4.3, 3.7, 50),), (1, 70, 5, 6), (2, 2)),
    Case("cells", ((0, 5.2, 6.3, 9.7, 8.1, 25), (0, 5.2, 6.3, 1.9, 1.3, 25)),
         (1, 2, 13, 11), (7, 9)),
]  # fmt: skip

MODES = [(-1, True), (2, True), (-1, False), (3, False)]


def pooler(case, mode, function=glimpse_ext.roi_align_rotated, **options):
    def pool(image, boxes):
        return function(image, boxes, case.output_size, case.spatial_scale, *mode, **options)

    return pool


@functools.cache
def expected(case, mode, dtype):
    """Pooled values and both gradients, computed in the precision of the operator."""
    wide = compute_dtype(dtype)
    image = case.image(dtype).to(wide).requires_grad_()
    boxes = case.boxes(wide).requires_grad_()
    pooled = pooler(case, mode, reference.roi_align_rotated, dtype=wide)(image, boxes)
    if not pooled.requires_grad:  # nothing is read
        return pooled, torch.zeros_like(image), torch.zeros_like(boxes)
    gradients = torch.autograd.grad(
        pooled, (image, boxes), case.grad(dtype).to(wide), allow_unused=True
    )
    zeros = (torch.zeros_like(image), torch.zeros_like(boxes))
    filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
    return pooled.detach(), *filled


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
        g = arrange(case.grad(dtype).to(device.torch), layout)
        got_image, got_boxes = torch.autograd.grad(pooled, (image, boxes), g)
        close(got_image, to_image, "gradient", f"{layout}, to the image")
        # Arms of several pixels and angles in degrees, times float32 positions.
        scale = 1 + to_boxes.abs().max()
        close(got_boxes / scale, to_boxes / scale, "gradient", f"{layout}, to the boxes")
        assert not got_boxes[:, 0].any()


def test_uint8_images(device, close):
    case, mode = CASES[0], (2, True)
    image = random_tensor(case.shape, torch.uint8, "bytes")
    boxes = case.boxes(F32).to(device.torch).requires_grad_()
    wide = case.boxes(F32).requires_grad_()
    values = pooler(case, mode, reference.roi_align_rotated, dtype=F32)(image, wide)
    pooled = pooler(case, mode)(image.to(device.torch), boxes)
    close(pooled / 255, values / 255)
    g = case.grad(F32)
    got = torch.autograd.grad(pooled, boxes, g.to(device.torch))[0]
    close(got / 255, torch.autograd.grad(values, wide, g)[0] / 255, "gradient")


# ----------------------------------------------------------------------------------------- golden

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def stored():
    with np.load(GOLDEN / "rotated.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return json.loads(str(file["meta"])), arrays


@pytest.mark.parametrize("index", range(24))
def test_stored_numbers(index, device):
    """detectron2 and mmcv in both precisions; float32 also against float64 where they agree."""
    metas, arrays = stored()
    assert len(metas) == 24
    meta = metas[index]

    def field(name):
        return arrays[f"c{index}_{name}"]

    peers = {
        "d2": (field("rois_deg"), (True, False, "degrees")),
        "mm": (field("rois_rad"), (meta["mm_aligned"], meta["mm_clockwise"], "radians")),
    }
    for peer, (boxes, options) in peers.items():
        firm = ~field(f"{peer}_fragile")
        for dtype, suffix in ((F64, "64"), (F32, "32")):
            label = f"case {index}, peer={peer}, device={device}, dtype={dtype}"
            image = field("input").to(device.torch, dtype).requires_grad_()
            pooled = glimpse_ext.roi_align_rotated(
                image,
                boxes.to(device.torch, dtype),
                meta["output_size"],
                meta["spatial_scale"],
                meta["sampling_ratio"],
                *options,
            )
            (gradient,) = torch.autograd.grad(pooled, image, field("gout").to(device.torch, dtype))
            reason = "sums and sine of the originals"
            exact = Tolerance(1e-13, 1e-13, reason)
            # Positions of float32 boxes, whose angle the originals round before its sine is taken.
            near = Tolerance(5e-6, 5e-6, reason)
            tolerance = exact if dtype == F64 else near
            rows = slice(None) if dtype == F64 else firm
            assert_within(pooled[rows], field(f"{peer}_out{suffix}")[rows], tolerance, label)
            if dtype == F64 or bool(firm.all()):
                assert_within(gradient, field(f"{peer}_gin{suffix}"), tolerance, label + ", image")
            if dtype == F32:
                other = Tolerance(3e-5, 3e-5, "float32 positions on an image of slope up to 8")
                assert_within(pooled[rows], field(f"{peer}_out64")[rows], other, label + ", 64")


# ------------------------------------------------------------------------------------- symmetries


def corners(boxes):
    index, x, y, w, h = boxes[:, :5].unbind(1)
    return torch.stack([index, x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)


@pytest.mark.parametrize("ratio", [-1, 2])
def test_without_an_angle_it_is_roi_align(ratio, device, close):
    for case in CASES[:5]:
        boxes = case.boxes().to(device.torch)
        boxes[:, 5] = 0
        image = case.image().to(device.torch)
        straight = glimpse_ext.roi_align(
            image, corners(boxes), case.output_size, 1.0, ratio, aligned=True
        )
        close(pooler(case, (ratio, True))(image, boxes), straight, "forward", case.name)


@pytest.mark.parametrize("turns", [1, 2, 3, -5])
def test_a_quarter_turn_of_picture_and_box(turns, device, close):
    """Turning both by quarter turns changes nothing."""
    case = CASES[0]
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    turned, moved = image, boxes.clone()
    for _ in range(turns % 4):
        width = turned.shape[3]
        turned = torch.rot90(turned, 1, (2, 3))
        moved[:, 1:3] = torch.stack([moved[:, 2], width - moved[:, 1]], 1)
    moved[:, 5] += 90 * turns
    mode = (-1, True)
    close(pooler(case, mode)(turned, moved), pooler(case, mode)(image, boxes))


def test_quarter_turns_are_exact(device, same_bits):
    """No rounding of pi moves a sample: 90 degrees permute cells, to the bit."""
    image = random_tensor((1, 3, 8, 8), F32, "square").to(device.torch)
    straight = torch.tensor([[0.0, 4, 4, 8, 8, 0]], device=device.torch)
    for turns in range(-8, 9):
        box = straight.clone()
        box[:, 5] = 90.0 * turns
        pooled = glimpse_ext.roi_align_rotated(image, box, 8, sampling_ratio=1)
        same_bits(pooled, torch.rot90(image, -turns, (2, 3)).contiguous(), f"{turns} quarter turns")


def test_units_and_senses_of_an_angle(device, close):
    case, mode = CASES[1], (2, True)
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    pooled = pooler(case, mode)(image, boxes)
    other = boxes.clone()
    other[:, 5] = -boxes[:, 5]
    close(pooler(case, mode, clockwise=True)(image, other), pooled, "forward", "clockwise")
    other[:, 5] = torch.deg2rad(boxes[:, 5])
    close(pooler(case, mode, angle_unit="radians")(image, other), pooled, "forward", "radians")
    other[:, 5] = boxes[:, 5] + 720
    close(pooler(case, mode)(image, other), pooled, "forward", "two turns")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_gradient_is_the_adjoint(mode, device, close):
    for case in CASES:
        image = case.image().to(device.torch).requires_grad_()
        boxes, g = case.boxes().to(device.torch), case.grad().to(device.torch)
        (to_image,) = torch.autograd.grad(pooler(case, mode)(image, boxes), image, g)
        probe = random_tensor(case.shape, F64, "probe").to(device.torch)
        pooled = pooler(case, mode)(probe, boxes)
        close((pooled * g).sum(), (probe * to_image).sum(), "gradient", case.name)


def test_many_boxes_on_few_pixels(device, close):
    """More boxes than a block looks at together, more cells than it lists for a pixel."""
    count = 300
    unit = (random_tensor((count, 6), F64, "crowd") + 1) / 2
    boxes = unit * torch.tensor([0.9, 7, 6, 2.5, 2.5, 360], dtype=F64)
    image = random_tensor((1, 2, 6, 7), F64, "crowd").to(device.torch).requires_grad_()
    g = random_tensor((count, 2, 5, 4), F64, "crowd grad")
    pooled = glimpse_ext.roi_align_rotated(image, boxes.to(device.torch), (5, 4), 1.0, 1)
    wide = image.detach().cpu().requires_grad_()
    values = reference.roi_align_rotated(wide, boxes, (5, 4), 1.0, 1)
    close(pooled, values)
    (got,) = torch.autograd.grad(pooled, image, g.to(device.torch))
    close(got, torch.autograd.grad(values, wide, g)[0], "gradient")


def test_boxes_are_independent(device, same_bits):
    boxes = torch.cat([case.boxes(F32) for case in CASES[:6]]).to(device.torch)
    image = random_tensor((2, 5, 9, 7), F32, "independent").to(device.torch)
    together = glimpse_ext.roi_align_rotated(image, boxes, (3, 2))
    for k in range(len(boxes)):
        alone = glimpse_ext.roi_align_rotated(image, boxes[k : k + 1], (3, 2))
        same_bits(alone[0], together[k], f"box {k}")


def test_a_list_of_boxes_for_each_image(device, same_bits):
    case = CASES[0]
    image, boxes = case.image().to(device.torch), case.boxes().to(device.torch)
    same_bits(
        pooler(case, MODES[0])(image, [boxes[:1, 1:], boxes[1:, 1:]]),
        pooler(case, MODES[0])(image, boxes),
    )


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads(layout, device, dtype, same_bits):
    count, shape = (12, (2, 5, 13, 11)) if device is EMULATED else (150, (2, 70, 33, 29))
    unit = (random_tensor((count, 6), F64, "threads") + 1) / 2
    scale = torch.tensor([2, shape[3], shape[2], 12, 12, 360], dtype=F64)
    boxes = (unit * scale).to(F32).to(device.torch)
    boxes[:, 0] = boxes[:, 0].floor().clamp(max=1)
    image = arrange(random_tensor(shape, dtype, "threads").to(device.torch), layout)
    g = random_tensor((count, shape[1], 3, 2), dtype, "threads grad").to(device.torch)

    def everything():
        x, b = image.detach().requires_grad_(), boxes.detach().requires_grad_()
        pooled = glimpse_ext.roi_align_rotated(x, b, (3, 2))
        return pooled.detach(), *torch.autograd.grad(pooled, (x, b), g)

    with threads(1):
        one = everything()
    for number in (1, 3, 7):
        with threads(number):
            for a, b in zip(everything(), one, strict=True):
                same_bits(a, b, f"{number} threads")


# ------------------------------------------------------------------------------------ derivatives

# No sample is on a pixel or near a border, so that derivatives exist in every sense.
SMOOTH = Case(
    "smooth", ((0.5, 2.43, 2.61, 2.17, 3.11, 33), (1.5, 0.31, 4.27, 3.9, 2.3, -71)),
    shape=(2, 1, 6, 5), output_size=(2, 1),
)  # fmt: skip
FOLLOWED = {"image": (True, False), "boxes": (False, True), "both": (True, True)}
OPTIONS = {
    "degrees": {},
    "radians": {"angle_unit": "radians", "clockwise": True, "aligned": False},
}


def smooth(device, options=OPTIONS["degrees"]):
    image, boxes = SMOOTH.image().to(device.torch), SMOOTH.boxes().to(device.torch)
    if "angle_unit" in options:
        boxes[:, 5] = torch.deg2rad(boxes[:, 5])

    def pool(x, b):
        return glimpse_ext.roi_align_rotated(x, b, SMOOTH.output_size, 1.0, 2, **options)

    return pool, image, boxes


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("followed", FOLLOWED)
def test_derivatives_of_first_and_second_order(followed, options, device):
    pool, image, boxes = smooth(device, OPTIONS[options])
    needs = FOLLOWED[followed]
    inputs = (image.requires_grad_(needs[0]), boxes.requires_grad_(needs[1]))
    assert torch.autograd.gradcheck(pool, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, inputs, check_fwd_over_rev=True)


def test_a_third_derivative_in_the_boxes_raises(device):
    pool, image, boxes = smooth(device)
    boxes.requires_grad_()
    (first,) = torch.autograd.grad(pool(image, boxes).sum(), boxes, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_align_rotated: derivatives of third order"):
        torch.autograd.grad(second.sum(), boxes)
    image.requires_grad_()
    (first,) = torch.autograd.grad(pool(image, boxes).sum(), boxes, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="third order"):
        torch.autograd.grad(second.sum(), image)


def test_transforms(device, close):
    pool, image, boxes = smooth(device)

    def of_boxes(b):
        return (pool(image, b) ** 2).sum()

    hessian = torch.autograd.functional.hessian(of_boxes, boxes)
    close(jacfwd(jacrev(of_boxes))(boxes), hessian, "gradient", "jacfwd of jacrev")
    close(jacrev(jacrev(of_boxes))(boxes), hessian, "gradient", "jacrev of jacrev")
    images = torch.stack([image, image.flip(3), 2 * image])
    many = torch.stack([boxes, boxes + 0.1, boxes - 0.1])
    many[:, :, 0] = boxes[:, 0]
    each = torch.stack([pool(x, b) for x, b in zip(images, many, strict=True)])
    close(vmap(pool)(images, many), each, "forward", "vmap of both")
    close(vmap(pool, (None, 0))(image, many)[0], each[0], "forward", "vmap of boxes")
    close(vmap(pool, (0, None))(images, boxes)[0], each[0], "forward", "vmap of images")

    def to_boxes(x, b):
        return jacrev(lambda inner: (pool(x, inner) ** 2).sum())(b)

    each = torch.stack([to_boxes(x, b) for x, b in zip(images, many, strict=True)])
    close(vmap(to_boxes)(images, many), each, "gradient", "vmap of a gradient")


def test_forward_mode(device, close):
    pool, image, boxes = smooth(device)
    moves = random_tensor(tuple(boxes.shape), F64, "move").to(device.torch)
    step = 1e-6
    with forward_ad.dual_level():
        pooled = pool(image, forward_ad.make_dual(boxes, moves))
        tangent = forward_ad.unpack_dual(pooled).tangent
    central = (pool(image, boxes + step * moves) - pool(image, boxes - step * moves)) / (2 * step)
    assert_within(tangent, central, Tolerance(1e-8, 1e-8, "central differences"), str(device))


# ---------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("column", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_a_number_that_is_none(column, value, ratio, device):
    """The box gives zeros, and so do its gradients; the box beside it is pooled as if alone."""
    boxes = torch.tensor([[0, 3.1, 2.7, 4, 5, 30], [0, 2.9, 3.2, 3, 4, 60.0]]).to(device.torch)
    boxes[0, column] = value
    boxes.requires_grad_()
    image = random_tensor((1, 2, 6, 6), F32, "hostile").to(device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align_rotated(image, boxes, (2, 3), 1.0, ratio)
    to_image, to_boxes = torch.autograd.grad(pooled.sum(), (image, boxes))
    assert not pooled[0].any()
    assert not to_boxes[0].any()
    alone = glimpse_ext.roi_align_rotated(image, boxes[1:], (2, 3), 1.0, ratio)
    assert torch.equal(pooled[1:], alone)
    assert torch.equal(to_image, torch.autograd.grad(alone.sum(), image)[0])


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_sizes_that_overflow(angle, device):
    """Some of the samples have finite positions, others have none: only the former may be read."""
    image = random_tensor((1, 2, 6, 6), F32, "overflow").to(device.torch).requires_grad_()
    rows = [[0, 3.0, 3, w, h, angle] for w in (2.0, 3e38, -3e38) for h in (2.0, 3e38)]
    boxes = torch.tensor(rows, device=device.torch).requires_grad_()
    for ratio in (2, 5, 9):
        pooled = glimpse_ext.roi_align_rotated(image, boxes, (2, 3), 1.0, ratio)
        gradients = torch.autograd.grad(pooled.sum(), (image, boxes))
        assert pooled.isfinite().all()
        assert gradients[0].isfinite().all()


def test_an_angle_beyond_all_turns(device):
    image = torch.ones(1, 1, 6, 6, dtype=F64, device=device.torch)
    for unit, quarter in (("degrees", 90.0), ("radians", math.pi / 2)):
        box = torch.tensor([[0, 3.0, 3, 2, 2, 0.99 * 2**20 * quarter]], dtype=F64)
        box = box.repeat(2, 1).to(device.torch)
        box[1, 5] *= 1.02
        pooled = glimpse_ext.roi_align_rotated(image, box, 2, angle_unit=unit)
        assert (pooled[0] - 1).abs().max() < 1e-12
        assert not pooled[1].any()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_enormous_boxes_cost_no_more_than_the_map(dtype, device, close):
    rows = (
        (0, 8.0, 8, 1e9, 1e9, 30),
        (0, 8.0, 8, 1e9, 3.1, 77),
        (0, 1e9, 8, 2.1e9, 2.0, 3),
        (0, 8.0, 8, 1e30, 1e30, 30),
        (0, 1e30, 8, 4.0, 4.0, 30),
        (0, 8.0, 8, 3e38, 2.0, 45),
    )
    case = Case("enormous", rows, (1, 2, 16, 15), (3, 2))
    image = case.image(dtype).to(device.torch).requires_grad_()
    boxes = case.boxes(dtype).to(device.torch).requires_grad_()
    start = time.perf_counter()
    pooled = pooler(case, (-1, True))(image, boxes)
    g = torch.ones_like(pooled)
    gradients = torch.autograd.grad(pooled, (image, boxes), g)
    seconds = time.perf_counter() - start
    assert seconds < (60 if device is EMULATED else 5), f"{seconds:.1f} s on {device}"
    assert all(gradient.isfinite().all() for gradient in (pooled, *gradients))
    if dtype == F64:
        close(pooled, expected(case, (-1, True), dtype)[0])


finite = st.floats(-40, 40, width=32)
wild = st.one_of(finite, st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    rows=st.lists(st.tuples(wild, wild, wild, wild, wild), min_size=1, max_size=3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    cells=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    ratio=st.integers(-1, 3),
    aligned=st.booleans(),
)
def test_any_box_on_any_map(rows, height, width, cells, ratio, aligned, device):
    """Finite and the same as the simple loops, whatever the numbers are."""
    boxes = torch.tensor([(0.0, *row) for row in rows], dtype=F32)
    boxes[:, 3:5] = boxes[:, 3:5].clamp(max=60) if ratio < 1 else boxes[:, 3:5]
    image = random_tensor((1, 2, height, width), F64, "any")
    g = random_tensor((len(rows), 2, *cells), F64, "any grad")

    def run(target):
        x = image.to(target.torch).clone().requires_grad_()
        b = boxes.to(target.torch).double().requires_grad_()
        pooled = glimpse_ext.roi_align_rotated(x, b, cells, 1.0, ratio, aligned)
        return pooled, *torch.autograd.grad(pooled, (x, b), g.to(target.torch))

    got = run(device)
    values = reference.roi_align_rotated(image, boxes.double(), cells, 1.0, ratio, aligned)
    assert all(t.isfinite().all() for t in got[:2])
    tolerance = Tolerance(1e-11, 1e-11, "positions of hundreds of pixels")
    assert_within(got[0], values, tolerance, f"{device}: {rows}")
    # <A x, g> = <x, A^T g>
    inner = (got[0].detach().cpu() * g).sum() - (image * got[1].cpu()).sum()
    assert abs(float(inner)) < 1e-9 * (1 + float(g.abs().sum()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_tensors(layout, device):
    image = arrange(torch.zeros(2, 3, 5, 6, device=device.torch), layout)
    boxes = torch.tensor([[0, 2.0, 2, 2, 2, 30]], device=device.torch)
    for x, b, size in (
        (image, boxes[:0], (2, 3)),
        (image[:, :0], boxes, (2, 3)),
        (image, boxes, (0, 3)),
        (image, boxes, (2, 0)),
        (image[:0], boxes[:0], (2, 3)),
    ):
        x, b = x.detach().requires_grad_(), b.detach().requires_grad_()
        pooled = glimpse_ext.roi_align_rotated(x, b, size)
        assert pooled.shape == (len(b), x.shape[1], *size)
        to_image, to_boxes = torch.autograd.grad(pooled.sum(), (x, b))
        assert to_image.shape == x.shape
        assert not to_image.any()
        assert to_boxes.shape == b.shape
        assert not to_boxes.any()


# ----------------------------------------------------------------------------------------- errors

IMAGE, BOX = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 4.0, 4, 3, 2, 30]])
WRONG = {
    "boxes of 5 columns": ((IMAGE, BOX[:, :5], 2), RuntimeError, r"\[K, 6\].*got \[1, 5\]"),
    "a flat box": ((IMAGE, BOX[0], 2), RuntimeError, r"\[K, 6\].*got \[6\]"),
    "integer boxes": ((IMAGE, BOX.long(), 2), RuntimeError, "float64.*got int64"),
    "a list of 4 columns": ((IMAGE, [BOX[:, :4]], 2), ValueError, r"\[L, 5\].*got \[1, 4\]"),
    "an empty list": ((IMAGE, [], 2), ValueError, r"\[K, 6\].*got \[\]"),
    "an image of 3 dimensions": ((IMAGE[0], BOX, 2), RuntimeError, r"\[N, C, H, W\], got"),
    "an integer image": ((IMAGE.long(), BOX, 2), RuntimeError, "float64.*got int64"),
    "a map without pixels": ((IMAGE[:, :, :0], BOX, 2), RuntimeError, "at least one pixel"),
    "a size of three": ((IMAGE, BOX, (1, 2, 3)), ValueError, r"\(height, width\), got 3"),
    "an unknown unit": ((IMAGE, BOX, 2, 1.0, -1, True, False, "turns"), ValueError, "got 'turns'"),
    "a ratio beyond 31 bits": ((IMAGE, BOX, 2, 1.0, 2**31), RuntimeError, "31 bits, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_came(name):
    args, kind, message = WRONG[name]
    with pytest.raises(kind, match=f"roi_align_rotated: .*{message}"):
        glimpse_ext.roi_align_rotated(*args)


def test_an_image_index_outside_the_batch(device):
    image = torch.ones(2, 3, 8, 8, device=device.torch)
    box = BOX.to(device.torch).clone()
    for index in (2, -1, 1e20, nan):
        box[:, 0] = index
        if device.raises_on_bad_index:
            with pytest.raises(RuntimeError, match="roi_align_rotated: box 0 refers to image"):
                glimpse_ext.roi_align_rotated(image, box, 2)
        else:
            assert not glimpse_ext.roi_align_rotated(image, box, 2).any()


def test_compile():
    def loss(image, boxes):
        return (glimpse_ext.roi_align_rotated(image, boxes, (2, 1), 1.0, 2) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 1):
        image = SMOOTH.image().requires_grad_()
        boxes = SMOOTH.boxes()[:count].requires_grad_()
        got = torch.autograd.grad(compiled(image, boxes), (image, boxes))
        want = torch.autograd.grad(loss(image, boxes), (image, boxes))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ sincos


@pytest.mark.skipif(_testing is None, reason="needs the test module")
def test_sine_and_cosine():
    """Within two units in the last place of the exact value, and of exact quarter turns."""
    generator = torch.Generator().manual_seed(0)
    scales = [1e-8, 0.1, 1.0, 10.0, 1e3, 1e6]
    for scale in scales:
        for angle in ((torch.rand(200, generator=generator, dtype=F64) - 0.5) * scale).tolist():
            for got, want in zip(
                _testing.sincos(angle, False), (math.sin(angle), math.cos(angle)), strict=True
            ):
                assert abs(got - want) <= 2 * math.ulp(want), (angle, got, want)
            degrees = math.degrees(angle)
            whole = round(degrees / 90)
            rest = math.radians(degrees - 90 * whole)
            sine, cosine = math.sin(rest), math.cos(rest)
            want_sine = (sine, cosine, -sine, -cosine)[whole % 4]
            assert abs(_testing.sincos(degrees, True)[0] - want_sine) <= 2 * math.ulp(want_sine)
    for turns in range(-1000, 1000):
        exact = ((0, 1), (1, 0), (0, -1), (-1, 0))[turns % 4]
        assert _testing.sincos(90.0 * turns, True) == exact
    for angle in (nan, inf, -inf, 1e9, 1e300):
        assert all(math.isnan(v) for v in _testing.sincos(angle, True))
    assert all(math.isnan(v) for v in _testing.sincos(2e6, False))
