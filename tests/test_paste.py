# SPDX-License-Identifier: BSD-3-Clause
"""paste_masks: what must hold for any implementation, the reference, then stored numbers."""

from __future__ import annotations

import functools
import json
import time
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import random_tensor
from conftest import (
    CPU,
    CUDA,
    DEVICES,
    EMULATED,
    TOLERANCES,
    Tolerance,
    _testing,
    assert_within,
    compute_dtype,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap

import glimpse_ext
from glimpse_ext import reference
from glimpse_ext.paste_masks import paste_axes

F32, F64 = torch.float32, torch.float64
ops = torch.ops.glimpse_ext

METHODS = ["detectron2", "torchvision"]
SIZE = (9, 13)

# On an image of 9 x 13 pixels.
BOXES = {
    "inside": ((1.25, 1.5, 7.75, 7.0), (3.0, 2.0, 4.0, 5.0), (2.5, 0.75, 12.25, 8.5)),
    "partial": ((-2.5, 2.25, 3.5, 6.5), (4.5, 3.0, 19.75, 5.0), (1.5, -4.0, 5.5, 12.5)),
    "outside": ((-9, 1, -3, 5), (19.5, 1, 32, 5), (1, -8, 4, -3.5), (1, 14, 4, 15)),
    "whole": ((0, 0, 13, 9), (-1, -1, 14, 10), (-20, -30, 40, 50)),
    "tiny": ((3.5, 4.5, 3.50390625, 4.625), (5.25, 2.75, 5.75, 3.25), (12, 8, 13, 9)),
    "mirrored": ((7.75, 1.5, 1.25, 7), (1.25, 7, 5.75, 1.5), (12.1, 8.2, 0.7, 0.9)),
    "zero": ((3.25, 4.5, 3.25, 4.5), (2, 1.5, 5, 1.5), (2.5, 1, 2.5, 6), (0, 0, 0, 0)),
    "nan": ((nan, 1, 4, 5), (1, nan, 4, 5), (1, 1, nan, 5), (1, 1, 4, nan), (1, 2, 5, 6)),
    "infinite": ((-inf, 1, 4, 5), (1, 1, inf, 5), (1, -inf, 4, inf), (inf, inf, inf, inf)),
    "enormous": ((-1e9, 1, 1e9, 5), (1, -3e7, 5, 2e6), (1e20, 1, 2e20, 5), (1, 2, 3e38, 6)),
}
MASKS = [(1, 1), (5, 5), (3, 8), (28, 28), (40, 21)]


def masks_of(boxes, shape, dtype=F64, seed="mask"):
    """Numbers from -1/4 to 5/4, so that results reach beyond 0 and 1."""
    values = (random_tensor((len(boxes), *shape), F64, f"{seed} {shape}") * 3 + 2) / 4
    if dtype == torch.bool:
        return values > 0.5
    return (values * 3).clamp(min=0).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def boxes_of(name, dtype=F64):
    return torch.tensor(BOXES[name], dtype=dtype)


def on(device, *tensors):
    return [t.to(device.torch) for t in tensors]


# ------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_stays_constant(method, device):
    """A box beyond the image covers it with the value of its mask, to the last bit."""
    boxes = torch.tensor([[-31.7, -25.3, 49.1, 41.9]])
    for value in (1.0, 0.3):
        masks, where = on(device, torch.full((1, 28, 28), value), boxes)
        pasted = glimpse_ext.paste_masks(masks, where, SIZE, None, method)
        assert_within(pasted, torch.full((1, *SIZE), value), Tolerance(1e-7, 0, "2 roundings"), "")
        assert value < 1 or glimpse_ext.paste_masks(masks, where, SIZE, 1.0, method).all()


def test_a_mask_of_the_size_of_its_box_is_copied(device, same_bits):
    mask = random_tensor((1, 4, 6), F32, "copied")
    masks, boxes = on(device, mask, torch.tensor([[2.0, 3.0, 8.0, 7.0]]))
    expected = torch.zeros(1, *SIZE)
    expected[:, 3:7, 2:8] = mask
    same_bits(glimpse_ext.paste_masks(masks, boxes, SIZE, None).cpu(), expected)


def test_a_full_mask_fills_its_box(device):
    """Soft edges reach half a mask pixel out of the box, which is less than a pixel here."""
    masks, boxes = on(device, torch.ones(1, 28, 28), torch.tensor([[2.0, 3.0, 6.0, 5.0]]))
    expected = torch.zeros(1, *SIZE, dtype=torch.bool)
    expected[0, 3:5, 2:6] = True
    assert torch.equal(glimpse_ext.paste_masks(masks, boxes, SIZE).cpu(), expected)


def test_a_reversed_box_mirrors_the_mask(device, close):
    masks, boxes = on(device, masks_of(range(1), (5, 4)), torch.tensor([[1.3, 2.2, 9.4, 7.9]]))
    for columns, dims in (([2, 1, 0, 3], [2]), ([0, 3, 2, 1], [1]), ([2, 3, 0, 1], [1, 2])):
        close(
            glimpse_ext.paste_masks(masks, boxes[:, columns], SIZE, None),
            glimpse_ext.paste_masks(masks.flip(dims), boxes, SIZE, None),
            detail=f"{columns}",
        )


@pytest.mark.parametrize("method", METHODS)
def test_shifting_a_box_by_pixels_shifts_the_result(method, device, close):
    """Away from 0, towards which torchvision truncates."""
    boxes = boxes_of("inside") + 4
    masks, boxes = on(device, masks_of(boxes, (5, 5)), boxes)
    shift = torch.tensor([2.0, 3.0, 2.0, 3.0], device=device.torch)
    moved = glimpse_ext.paste_masks(masks, boxes + shift, (15, 20), None, method)
    close(moved[:, 3:, 2:], glimpse_ext.paste_masks(masks, boxes, (12, 18), None, method))


def test_threshold_zero_is_true_everywhere(device):
    boxes = boxes_of("nan")
    masks, boxes = on(device, masks_of(boxes, (3, 3)).abs(), boxes)
    assert glimpse_ext.paste_masks(masks, boxes, SIZE, 0.0).all()
    assert glimpse_ext.paste_masks(masks, boxes, SIZE, -0.0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BOXES)
def test_bits_do_not_depend_on_the_device(name, method, device, same_bits):
    """A value meets a threshold by its last bit, so values and bytes are the same everywhere."""
    boxes = boxes_of(name, F32)
    for shape in MASKS:
        for dtype in (F32, torch.float16, torch.uint8):
            masks = masks_of(boxes, shape, dtype)
            for threshold in (None, 0.5, 0.0, -1.0):
                args = (SIZE, threshold, method)
                same_bits(
                    glimpse_ext.paste_masks(*on(device, masks, boxes), *args).cpu(),
                    on_simple(masks, boxes, *args),
                    f"{shape} {dtype} {threshold}",
                )


def on_simple(*args):
    previous = _testing.use_backend("simple") if _testing is not None else None
    try:
        return glimpse_ext.paste_masks(*args)
    finally:
        if previous is not None:
            _testing.use_backend(previous)


def test_masks_are_independent(device, same_bits):
    boxes = torch.cat([boxes_of("inside"), boxes_of("partial"), boxes_of("nan")])
    masks, boxes = on(device, masks_of(boxes, (5, 4), F32), boxes.float())
    for threshold in (None, 0.5, -1.0):
        together = glimpse_ext.paste_masks(masks, boxes, SIZE, threshold)
        for k in range(len(boxes)):
            alone = glimpse_ext.paste_masks(masks[k : k + 1], boxes[k : k + 1], SIZE, threshold)
            same_bits(together[k : k + 1], alone, f"mask {k} at {threshold}")


@pytest.mark.parametrize("threshold", [None, 0.5, -1.0])
def test_layouts_and_dimensions(threshold, device, same_bits):
    """Strides do not matter, and [N, 1, Mh, Mw] gives [N, 1, H, W]."""
    boxes = boxes_of("inside", F32)
    masks, boxes = on(device, masks_of(boxes, (5, 6), F32), boxes)
    expected = glimpse_ext.paste_masks(masks, boxes, SIZE, threshold)
    poisoned = torch.full((3, 2, 6, 13), nan, device=device.torch)
    strided = poisoned[:, 1:, 1:, 1::2]
    strided.copy_(masks[:, None])
    layouts = {
        "strided": strided,
        "transposed": masks.transpose(1, 2).contiguous().transpose(1, 2)[:, None],
        "channels_last": masks[:, None].contiguous(memory_format=torch.channels_last),
        "expanded": masks[:1, None].expand(3, 1, 5, 6),
    }
    for name, other in layouts.items():
        pasted = glimpse_ext.paste_masks(other, boxes, SIZE, threshold)
        assert pasted.shape == (3, 1, *SIZE)
        assert pasted.is_contiguous()
        if name == "expanded":
            same_bits(pasted[0, 0], expected[0], name)
        else:
            same_bits(pasted[:, 0], expected, name)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about threads of the host")
def test_threads_change_nothing(same_bits):
    """Few masks are split into rows; large results are zero pages. Gradients have one owner."""
    boxes = torch.tensor([[30.5, 20.25, 190.0, 300.75], [-50.0, 100.0, 700.0, 180.5]])
    masks = masks_of(boxes, (28, 28), F32)

    def everything():
        m, b = masks.clone().requires_grad_(), boxes.clone().requires_grad_()
        values = glimpse_ext.paste_masks(m, b, (700, 900), None)
        g = random_tensor(tuple(values.shape), F32, "threads")
        bits = [glimpse_ext.paste_masks(masks, boxes, (700, 900), t) for t in (0.5, 0.0, -1.0)]
        return [values.detach(), *torch.autograd.grad(values, (m, b), g), *bits]

    with threads(1):
        expected = everything()
    for count in (2, 5):
        with threads(count):
            for name, (a, b) in enumerate(zip(everything(), expected, strict=True)):
                same_bits(a, b, f"{count} threads, result {name}")


def test_zero_pages_are_an_ordinary_result(device, same_bits):
    """A result of many pixels and small boxes can be written, kept and freed like any other."""
    boxes = torch.tensor([[100.5, 50.0, 140.0, 99.5], [3.0, 600.0, 60.0, 640.0]])
    masks = masks_of(boxes, (7, 7), F32)
    for threshold in (0.5, -1.0, None):
        pasted = glimpse_ext.paste_masks(*on(device, masks, boxes), (1000, 600), threshold)
        same_bits(pasted.cpu(), on_simple(masks, boxes, (1000, 600), threshold), f"{threshold}")
        kept = pasted[1, 600:640].clone()
        pasted[0].zero_()
        assert not pasted[0].any()
        assert torch.equal(pasted[1, 600:640], kept)


# -------------------------------------------------------------------------- equals the reference


def near_values(actual, expected, label):
    """Places are rounded too: by a few units in the last place of a number of mask pixels."""
    base = TOLERANCES["forward"][actual.dtype]
    places = 1e-12 if actual.dtype == F64 else 1e-5
    tolerance = Tolerance(base.absolute + places, base.relative, "rounded places on the mask")
    assert_within(actual, expected, tolerance, label)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BOXES)
def test_equals_reference(name, method, device, dtype):
    # A box is snapped by its last bit, so the reference snaps in the same precision.
    wide = compute_dtype(dtype)
    boxes = boxes_of(name, wide)
    for shape in MASKS:
        masks = masks_of(boxes, shape, dtype)
        expected = reference.paste_masks(
            masks, boxes, SIZE, None, method, dtype=wide if method == "torchvision" else F64
        )
        pasted = glimpse_ext.paste_masks(*on(device, masks, boxes), SIZE, None, method)
        assert pasted.dtype == dtype
        near_values(pasted, expected, f"{name} {shape} {method} {device}")


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int64], ids=str)
def test_integers_are_numbers(kind, device):
    boxes = boxes_of("partial", F32)
    masks = masks_of(boxes, (5, 3), torch.uint8).to(kind)
    pasted = glimpse_ext.paste_masks(*on(device, masks, boxes), SIZE, None)
    assert pasted.dtype == F32
    near_values(pasted, reference.paste_masks(masks, boxes, SIZE, None), f"{kind} {device}")


def test_places_are_as_good_far_from_the_origin(device):
    """In float32 a box at pixel 30000 is read as exactly as one at pixel 0."""
    near = torch.tensor([[3.25, 0.5, 40.75, 4.75], [44.0, 4.5, 1.5, 0.25]])
    masks, boxes = on(device, masks_of(near, (3, 28), F32), near)
    shift = torch.tensor([30000.0, 0.0, 30000.0, 0.0], device=device.torch)
    moved = glimpse_ext.paste_masks(masks, boxes + shift, (5, 30050), None)
    expected = reference.paste_masks(masks.cpu(), near, (5, 50), None)
    near_values(moved[:, :, 30000:], expected, f"{device}")
    assert not moved[:, :, :29990].any()


def test_thresholds_and_bytes(device):
    """Of the float64 values, where no value is within rounding of a step."""
    boxes = torch.cat([boxes_of("inside"), boxes_of("partial")])
    masks = masks_of(boxes, (7, 7))
    values = reference.paste_masks(masks, boxes, SIZE, None)
    inputs = on(device, masks, boxes)
    for threshold in (0.0, 0.3, 0.5, 1.0, 1e-50, 7.0):
        got = glimpse_ext.paste_masks(*inputs, SIZE, threshold).cpu()
        assert got.dtype == torch.bool
        far = (values - threshold).abs() > 1e-9
        assert torch.equal(got[far], (values >= threshold)[far]), threshold
    got = glimpse_ext.paste_masks(*inputs, SIZE, -0.5).cpu()
    assert got.dtype == torch.uint8
    scaled = values * 255
    far = (scaled - scaled.round()).abs() > 1e-6
    assert (far & (values > 0.01) & (values < 1)).sum() > 100
    assert torch.equal(got[far], scaled.clamp(0, 255).to(torch.uint8)[far])
    assert got.max() == 255


def test_numbers_that_are_none_in_a_mask(device):
    """Only pixels that read them see them; bytes of NaN are 0, of infinity 255."""
    masks = torch.ones(1, 4, 4)
    masks[0, 0, 0], masks[0, 3, 3] = nan, inf
    masks, boxes = on(device, masks, torch.tensor([[2.0, 2.0, 10.0, 10.0]]))
    values = glimpse_ext.paste_masks(masks, boxes, (12, 12), None)[0].cpu()
    expected = reference.paste_masks(masks.cpu(), boxes.cpu(), (12, 12), None)[0]
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.isinf(), expected.isinf())
    assert values.isnan().any()
    assert values.isinf().any()
    as_bytes = glimpse_ext.paste_masks(masks, boxes, (12, 12), -1.0)[0].cpu()
    assert not as_bytes[values.isnan()].any()
    assert (as_bytes[values.isinf()] == 255).all()
    assert not glimpse_ext.paste_masks(masks, boxes, (12, 12))[0].cpu()[values.isnan()].any()


# ------------------------------------------------------------------------------------ derivatives

# No sample on the centre of a mask pixel or half a mask pixel outside.
SMOOTH = torch.tensor([[0.83, 1.07, 4.31, 5.19], [-1.57, 2.21, 6.53, 3.59]], dtype=F64)


def smooth_inputs(device):
    masks, boxes = on(device, masks_of(SMOOTH, (3, 2)), SMOOTH.clone())
    return masks, boxes


def values(masks, boxes):
    return glimpse_ext.paste_masks(masks, boxes, (5, 6), None)


@pytest.mark.parametrize("wanted", ["masks", "boxes", "both"])
def test_gradcheck(wanted, device):
    masks, boxes = smooth_inputs(device)
    masks.requires_grad_(wanted != "boxes")
    boxes.requires_grad_(wanted != "masks")
    assert torch.autograd.gradcheck(values, (masks, boxes), check_forward_ad=True)
    if device is not EMULATED or wanted == "both":
        assert torch.autograd.gradgradcheck(values, (masks, boxes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BOXES)
def test_the_gradient_is_the_adjoint(name, method, device, close):
    """<A m, g> = <m, A^T g>: pasting is linear in the masks, whatever the boxes are."""
    boxes = boxes_of(name)
    for shape in ((1, 1), (3, 8)):
        masks, where = on(device, masks_of(boxes, shape), boxes)
        masks.requires_grad_()
        pasted = glimpse_ext.paste_masks(masks, where, SIZE, None, method)
        g = random_tensor(tuple(pasted.shape), F64, "adjoint").to(device.torch)
        (to_masks,) = torch.autograd.grad(pasted, masks, g)
        close((pasted * g).sum(), (masks * to_masks).sum(), "gradient", f"{shape}")


@pytest.mark.parametrize("name", BOXES)
def test_gradients_equal_reference(name, device, close):
    boxes = boxes_of(name)
    masks = masks_of(boxes, (3, 4))
    g = random_tensor((len(boxes), *SIZE), F64, "gradient")
    got, expected = [], []
    for function, where, out in (
        (glimpse_ext.paste_masks, device.torch, got),
        (reference.paste_masks, torch.device("cpu"), expected),
    ):
        m, b = (t.to(where).requires_grad_() for t in (masks, boxes))
        out += torch.autograd.grad(function(m, b, SIZE, None), (m, b), g.to(where))
    close(got[0], expected[0], "gradient", "masks")
    assert got[1].isfinite().all(), "the gradient to a box is a number, whatever the box is"
    usual = expected[1].isfinite().all(1) & ((boxes[:, 2:] - boxes[:, :2]).abs() > 0.1).all(1)
    close(got[1].cpu()[usual], expected[1][usual], "gradient", "boxes")


def test_large_outputs_have_the_gradients_of_small_ones(device, close):
    """Kernels for outputs of many cells: those that the mask does not reach are not visited."""
    boxes = torch.tensor([[5.3, 3.1, 17.9, 11.7], [9.6, 2.2, 1.3, 19.4]], dtype=F64)
    small, offset = (24, 22), torch.tensor([0.0, 1030.0, 0.0, 1030.0], dtype=F64)
    masks, boxes, offset = on(device, masks_of(boxes, (7, 5)), boxes, offset)
    g = random_tensor((2, *small), F64, "large").to(device.torch)
    got = []
    for shift, height in ((0 * offset, small[0]), (offset, 1030 + small[0])):
        m, b = masks.clone().requires_grad_(), boxes.clone().requires_grad_()
        pasted = glimpse_ext.paste_masks(m, b + shift, (height, small[1]), None)
        gradients = torch.autograd.grad(
            pasted[:, -small[0] :], (m, b), g, create_graph=device is not EMULATED
        )
        got.append(list(gradients))
        if device is not EMULATED:
            got[-1] += torch.autograd.grad(gradients[1].sum(), (m, b))
    for number, (a, b) in enumerate(zip(*got, strict=True)):
        assert_within(b, a, Tolerance(1e-9, 1e-9, "positions near 1030"), f"gradient {number}")


@pytest.mark.filterwarnings("error")
def test_bits_have_no_gradient(device):
    masks, boxes = smooth_inputs(device)
    for threshold in (0.5, -1.0):
        pasted = glimpse_ext.paste_masks(masks.requires_grad_(), boxes, SIZE, threshold)
        assert not pasted.requires_grad
    assert not glimpse_ext.paste_masks(masks.detach(), boxes, SIZE, None).requires_grad
    assert glimpse_ext.paste_masks(masks, boxes, SIZE, None).requires_grad


def test_transforms(device, close):
    masks, boxes = smooth_inputs(device)
    stack = torch.stack([masks, masks.flip(0), masks * 2])
    moved = torch.stack([boxes, boxes + 0.11, boxes - 0.07])
    looped = torch.stack([values(m, b) for m, b in zip(stack, moved, strict=True)])
    close(vmap(values)(stack, moved), looped)
    close(
        vmap(values, in_dims=(None, 2))(masks, moved.movedim(0, 2)),
        vmap(values, (None, 0))(masks, moved),
    )
    raw = vmap(lambda m, b: ops.paste_masks(m[:, None], b, 5, 6, False))(stack, moved)
    close(raw[:, :, 0], looped)
    bits = vmap(lambda m, b: glimpse_ext.paste_masks(m, b, (5, 6)))(stack, moved)
    assert torch.equal(bits, looped >= 0.5)
    for argnums in (0, 1):
        close(
            jacfwd(values, argnums)(masks, boxes), jacrev(values, argnums)(masks, boxes), "gradient"
        )


@pytest.mark.skipif(_testing is None, reason="needs the test module")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("snapped", [False, True], ids=METHODS)
def test_axes_in_python_have_the_bits_of_the_geometry(snapped, dtype):
    """Derivatives are taken of axes that Python computes."""
    rows = [row for name in BOXES for row in BOXES[name]]
    unit = random_tensor((200, 4), F64, "axes")
    boxes = torch.cat([torch.tensor(rows, dtype=F64), unit * 1000, unit * 2e18, unit * 1e-30]).to(
        dtype
    )
    height, width = 28, 21
    masks = torch.zeros(len(boxes), 1, height, width, dtype=dtype)
    axes = paste_axes(masks, boxes, snapped)
    name = str(dtype).removeprefix("torch.")
    read = 0
    for box, axis in zip(boxes.tolist(), axes.tolist(), strict=True):
        for direction, size in ((0, height), (1, width)):
            lo, hi = box[1 - direction], box[3 - direction]
            origin, step, samples = _testing.paste_axis(lo, hi, size, width, snapped, name)
            read += samples
            if samples == 0:
                assert not np.isfinite(axis[direction] + axis[direction + 2]), (box, direction)
            else:
                assert (axis[direction], axis[direction + 2]) == (origin, step), (box, direction)
    assert read > 500


def test_boxes_that_are_snapped_have_no_derivative(device):
    masks, boxes = smooth_inputs(device)

    def snapped(m, b):
        return glimpse_ext.paste_masks(m, b, SIZE, None, "torchvision")

    message = r"paste_masks: boxes have no derivative with method='torchvision'"
    with pytest.raises(ValueError, match=message):
        snapped(masks, boxes.clone().requires_grad_())
    with pytest.raises(ValueError, match=message), forward_ad.dual_level():
        snapped(masks, forward_ad.make_dual(boxes, torch.ones_like(boxes)))
    with pytest.raises(ValueError, match=message):
        jacrev(snapped, argnums=1)(masks, boxes)
    with torch.no_grad():
        assert snapped(masks, boxes.clone().requires_grad_()).any()
    assert torch.autograd.gradcheck(lambda m: snapped(m, boxes), masks.requires_grad_())


# ---------------------------------------------------------------------------------------- hostile

numbers = st.one_of(
    st.floats(width=32),
    st.floats(-20, 30, width=32),
    st.sampled_from([0.0, 4.0, 1e9, -1e9, nan, inf]),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    boxes=st.lists(st.lists(numbers, min_size=4, max_size=4), max_size=3),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(0, 12), st.integers(0, 20)),
    threshold=st.sampled_from([None, 0.5, 0.0, -1.0]),
    method=st.sampled_from(METHODS),
)
def test_any_box(boxes, shape, size, threshold, method, device):
    where = torch.tensor(boxes, dtype=F32).reshape(-1, 4)
    masks = masks_of(where, shape, F32)
    pasted = glimpse_ext.paste_masks(*on(device, masks, where), size, threshold, method).cpu()
    assert pasted.shape == (len(boxes), *size)
    expected = on_simple(masks, where, size, threshold, method)
    assert torch.equal(pasted, expected)
    if threshold is None and method == "detectron2":
        m, b = masks.to(device.torch).requires_grad_(), where.to(device.torch).requires_grad_()
        grads = torch.autograd.grad(glimpse_ext.paste_masks(m, b, size, None).sum(), (m, b))
        assert grads[0].isfinite().all()
        assert not grads[1].isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_work_is_bounded_by_the_result(method):
    """A box of 1e9 pixels costs its image; a mask of a million pixels costs what is read of it."""
    begin = time.perf_counter()
    huge = torch.tensor([[-5e8, -5e8, 5e8, 5e8]])
    glimpse_ext.paste_masks(torch.ones(1, 28, 28), huge, (50, 60), 0.5, method)
    small = torch.tensor([[3.25, 4.5, 4.75, 6.0]])
    masks = torch.ones(1, 1, 1).expand(1, 2_000_000, 2_000_000)
    glimpse_ext.paste_masks(masks, small, (50, 60), 0.5, method)
    assert time.perf_counter() - begin < 1.0


# ------------------------------------------------------------------------------ errors, framework


def test_nothing_to_paste(device):
    masks, boxes = on(device, torch.zeros(0, 7, 7), torch.zeros(0, 4))
    assert glimpse_ext.paste_masks(masks, boxes, SIZE).shape == (0, *SIZE)
    assert glimpse_ext.paste_masks(masks, boxes, SIZE).dtype == torch.bool
    assert glimpse_ext.paste_masks(masks[:, None], boxes, SIZE, -1.0).shape == (0, 1, *SIZE)
    masks, boxes = on(device, torch.ones(2, 7, 7), torch.ones(2, 4).requires_grad_())
    for size in ((0, 5), (5, 0)):
        assert glimpse_ext.paste_masks(masks, boxes, size).shape == (2, *size)
        out = glimpse_ext.paste_masks(masks, boxes, size, None)
        assert not torch.autograd.grad(out.sum(), boxes)[0].any()


M, B = torch.ones(2, 7, 7), torch.ones(2, 4)
ERRORS = {
    "masks dimensions": (
        RuntimeError,
        r"masks must be \[N, Mh, Mw\] or .*got \[7, 7\]",
        (M[0], B, SIZE),
    ),
    "mask channels": (
        RuntimeError,
        r"masks must be .*got \[2, 3, 7, 7\]",
        (M[:, None].expand(2, 3, 7, 7), B, SIZE),
    ),
    "empty masks": (RuntimeError, r"at least one pixel, got \[2, 1, 0, 7\]", (M[:, :0], B, SIZE)),
    "boxes": (RuntimeError, r"boxes must be \[2, 4\] .*got \[2, 5\]", (M, torch.ones(2, 5), SIZE)),
    "number of boxes": (RuntimeError, r"boxes must be \[2, 4\] .*got \[1, 4\]", (M, B[:1], SIZE)),
    "boxes dtype": (RuntimeError, r"boxes must be float64.*got int64", (M, B.long(), SIZE)),
    "complex": (
        RuntimeError,
        r"masks must be real numbers, got torch.complex64",
        (M.cfloat(), B, SIZE),
    ),
    "not tensors": (TypeError, r"must be tensors", ([[1.0]], B, SIZE)),
    "one size": (TypeError, r"image_size must be \(height, width\), got 9", (M, B, 9)),
    "three sizes": (ValueError, r"image_size .*got 3 numbers", (M, B, (1, 2, 3))),
    "float size": (TypeError, r"image_size must be int, got float", (M, B, (1.0, 2))),
    "negative size": (ValueError, r"image_size must be zero or more, got -1", (M, B, (-1, 2))),
    "method": (
        ValueError,
        r"method must be one of detectron2, torchvision, got 'x'",
        (M, B, SIZE, 0.5, "x"),
    ),
    "threshold": (ValueError, r"threshold must be a number or None, got nan", (M, B, SIZE, nan)),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("threshold", [0.5, None])
def test_errors(name, threshold):
    error, message, arguments = ERRORS[name]
    if len(arguments) == 3:
        arguments = (*arguments, threshold)
    with pytest.raises(error, match=f"^paste_masks: .*{message}|^paste_masks: {message}"):
        glimpse_ext.paste_masks(*arguments)


REAL_DEVICES = [d for d in DEVICES if d in (CPU, CUDA)]


@pytest.mark.parametrize("device", REAL_DEVICES, ids=str)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_compile(threshold, device, close):
    def run(masks, boxes, image):
        return glimpse_ext.paste_masks(masks, boxes, image.shape[-2:], threshold)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, size in ((2, (5, 6)), (1, (8, 7))):
        masks, boxes = on(device, masks_of(SMOOTH, (3, 2))[:count], SMOOTH[:count])
        image = torch.zeros(1, 3, *size, device=device.torch)
        got, expected = [], []
        for function, out in ((compiled, got), (run, expected)):
            m, b = masks.clone().requires_grad_(), boxes.clone().requires_grad_()
            out.append(function(m, b, image))
            if threshold is None:
                out += torch.autograd.grad(out[0].sum(), (m, b))
        for a, b in zip(got, expected, strict=True):
            if a.dtype == torch.bool:
                assert torch.equal(a, b)
            else:
                close(a, b, "gradient")


# --------------------------------------------------------------- stored numbers of the originals


@functools.cache
def golden():
    with np.load(Path(__file__).parent / "golden" / "paste.npz") as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        return json.loads(str(stored["meta"])), arrays


class Stored:
    """The arrays of one case by field name, as tensors. None where the original raised."""

    def __init__(self, index):
        self.size = tuple(golden()[0][index]["image_shape"])
        self.index = index

    def __getitem__(self, field):
        array = golden()[1].get(f"c{self.index}_{field}")
        if array is None:
            error = "tv_error" if field == "tv_float" else f"{field}_error"
            assert error in golden()[0][self.index]
            return None
        if "bool" in field or "near" in field:
            shape = (len(self["masks"]), *self.size)
            bits = np.unpackbits(array, count=int(np.prod(shape)))
            return torch.from_numpy(bits.reshape(shape)).bool()
        return torch.from_numpy(array)


CASES = range(16)
# Both compute places in float32, in another order: half a pixel of an error of 1e-5 in a place.
GOLDEN = Tolerance(2e-5, 0, "places in float32, computed in another order")


def test_the_file_is_complete():
    assert len(golden()[0]) == 16
    assert sum(len(Stored(i)["masks"]) for i in CASES) == 48
    assert sum(Stored(i)["tv_float"] is None for i in CASES) == 1


@pytest.mark.parametrize("index", CASES)
def test_detectron2(index, device):
    case = Stored(index)
    inputs = on(device, case["masks"], case["boxes"])
    expected = case["d2_float_full"]
    values = glimpse_ext.paste_masks(*inputs, case.size, None).cpu()
    assert_within(values, expected, GOLDEN, f"case {index}")
    bits = glimpse_ext.paste_masks(*inputs, case.size).cpu()
    away = ~case["d2_near_05"]
    assert away.float().mean() > 0.99
    assert torch.equal(bits[away], case["d2_bool_full_05"][away])


def margin(boxes, size):
    """Where detectron2's CPU path writes."""
    inside = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = max(int(np.floor(x1)) - 1, 0), max(int(np.floor(y1)) - 1, 0)
        inside[k, top : max(int(np.ceil(y2)) + 1, 0), left : max(int(np.ceil(x2)) + 1, 0)] = True
    return inside


@pytest.mark.parametrize("index", CASES)
def test_detectron2_on_the_cpu(index, device):
    """The same where its CPU path writes, at every threshold; it leaves the rest at 0."""
    case = Stored(index)
    inputs = on(device, case["masks"], case["boxes"])
    inside = margin(case["boxes"], case.size)
    values = case["d2_float_full"]
    for field, threshold in (
        ("d2_cpu_bool_05", 0.5),
        ("d2_cpu_bool_03", 0.3),
        ("d2_cpu_bool_00", 0.0),
        ("d2_cpu_u8", -1.0),
    ):
        expected = case[field]
        if expected is None:
            continue
        got = glimpse_ext.paste_masks(*inputs, case.size, threshold).cpu()
        if threshold < 0:
            assert (got.int() - expected.int()).abs()[inside].max() <= 1, field
            continue
        away = inside if threshold == 0 else inside & ((values - threshold).abs() > 2e-5)
        assert torch.equal(got[away], expected[away]), field
        assert not expected[~inside].any(), field


@pytest.mark.parametrize("index", CASES)
def test_torchvision(index, device):
    case = Stored(index)
    inputs = on(device, case["masks"][:, None], case["boxes"])
    pasted = glimpse_ext.paste_masks(*inputs, case.size, None, "torchvision").cpu()
    expected = case["tv_float"]
    if expected is None:  # it cannot paste a box above the image
        expected = reference.paste_masks(
            case["masks"][:, None], case["boxes"], case.size, None, "torchvision", dtype=F32
        )
    assert_within(pasted, expected, GOLDEN, f"case {index}")
