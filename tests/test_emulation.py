# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA emulation itself, and the CUDA kernels on it under many orders of threads and blocks.

benchmarks/mutate_barriers.py removes the barriers of the kernels one by one and runs what follows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import arrange, random_tensor
from kernel_cases import WORK, Outputs, Work, names, run

import glimpse_ext

_testing = pytest.importorskip(
    "glimpse_ext._testing", reason="an installed wheel has no test module"
)

SEEDS = range(3)


def test_emulation_selftests() -> None:
    rows = _testing.emulation_selftests()
    assert len(rows) >= 15
    failures = [f"{name}: {message}" for name, passed, message in rows if not passed]
    assert not failures, "\n".join(failures)


@pytest.fixture
def hostile_memory() -> Iterator[None]:
    """What an operator does not write reads as NaN: torch fills new tensors in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("work", WORK, ids=str)
def test_kernels_do_not_depend_on_the_order_of_threads(
    work: Work, dtype: torch.dtype, layout: str
) -> None:
    """Every order gives the bits of every other, and the numbers of the CPU kernels."""
    expected = run(work, dtype, layout)
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        first: Outputs | None = None
        for number in SEEDS:
            _testing.emulation_set_seed(number)
            outputs = run(work, dtype, layout)
            first = first or outputs
            for name, actual, same, reference in zip(
                names(work), outputs, first, expected, strict=True
            ):
                assert torch.equal(actual, same), f"{name}: seed {number} gives other bits"
                scale = max(1.0, reference.abs().max().item())
                step = {torch.float32: 1e-5, torch.float16: 2**-10}[reference.dtype]
                error = (actual.double() - reference.double()).abs().max().item()
                assert error <= step * scale, f"{name}: seed {number} is off by {error:.3g}"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_boxes_that_read_nothing_change_no_bit_of_a_gradient(
    dtype: torch.dtype, layout: str
) -> None:
    """Few boxes find their rows prepared in the workspace; for so many, tiles build them."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    unit = random_tensor((9, 4), precision, "prepared boxes") / 2 + 0.5
    boxes = torch.cat([torch.zeros(9, 1), unit[:, :2] * 12, unit[:, :2] * 12 + unit[:, 2:] * 14], 1)
    nothing = torch.tensor([7.0, 0, 0, 5, 5]).expand(2500, 5)  # there is one image
    backend = _testing.use_backend("emulated")
    try:
        grads = []
        for rows in (boxes, torch.cat([boxes, nothing])):
            image = torch.zeros(1, 4, 19, 21, dtype=dtype)
            image = arrange(image, layout).requires_grad_()
            pooled = glimpse_ext.roi_align(image, rows.to(precision), 7, 1.0, 2, aligned=True)
            up = torch.zeros_like(pooled)
            up[:9] = random_tensor((9, 4, 7, 7), dtype, "prepared up")
            grads.append(torch.autograd.grad(pooled, image, up)[0])
    finally:
        _testing.use_backend(backend)
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "cells"), [((66, 71), 24), ((66, 71), 7), ((7, 600), 40)])
def test_gradients_of_images_are_those_of_channels(
    size: tuple[int, int], cells: int, dtype: torch.dtype, layout: str
) -> None:
    """Lanes that are pixels, for three channels, and lanes that are channels: the same bits."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    unit = random_tensor((5, 4), precision, "images") / 2 + 0.5
    extent = torch.tensor([size[1], size[0]], dtype=precision)
    corner = unit[:, :2] * extent * 0.7
    boxes = torch.cat([torch.zeros(5, 1), corner, corner + unit[:, 2:] * extent * 0.6], 1)
    boxes[0, 3:] = boxes[0, 1:3] + 2  # far more cells than pixels
    boxes[1, 1] = torch.nan
    boxes[2, 1:] = torch.tensor([-1e9, -3, 1e9, 9])
    backend = _testing.use_backend("emulated")
    try:
        grads = []
        for channels in (3, 24):
            image = torch.zeros(1, channels, *size, dtype=dtype)
            image = arrange(image, layout).requires_grad_()
            pooled = glimpse_ext.roi_align(image, boxes.to(precision), cells, 1.0, 2, aligned=True)
            up = random_tensor((5, 24, cells, cells), dtype, "images up")[:, :channels]
            grads.append(torch.autograd.grad(pooled, image, up.contiguous())[0])
    finally:
        _testing.use_backend(backend)
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1][:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [8, 16, 1096])
def test_points_in_packs_are_points_one_by_one(channels: int, dtype: torch.dtype) -> None:
    """Packs of channels, more than a block has lanes, and the kernel without packs: one result."""
    image = random_tensor((2, channels, 9, 11), dtype, "points")
    points = random_tensor((2, 5, 2), torch.float32, "points") * 8 + 4
    points[0, 0] = torch.nan
    backend = _testing.use_backend("emulated")
    try:
        one_by_one = glimpse_ext.point_sample(image, points)
        packs = glimpse_ext.point_sample(arrange(image, "channels_last"), points)
    finally:
        _testing.use_backend(backend)
    assert torch.equal(one_by_one, packs)


# What lanes that are cells or points are for: few channels, wide and tall results, many taps,
# every dtype; points of few and of many channels, in whole and in broken warps.
NARROW = {
    "wide": lambda x, b: glimpse_ext.crop(x, b[:, 1:] / 20, (3, 300)),
    "tall": lambda x, b: glimpse_ext.crop(x, b[:, 1:] / 20, (70, 9), padding_mode="border"),
    "filled": lambda x, b: glimpse_ext.crop_and_resize(
        x, b[:, 1:] / 20, torch.arange(len(b)) % len(x), (8, 9), extrapolation_value=2.5
    ),
    "samples": lambda x, b: glimpse_ext.roi_align(x, b, (6, 7), 0.9, 2),
    "adaptive": lambda x, b: glimpse_ext.roi_align(x, b, (6, 7), 1.0, 0),
    "points": lambda x, b: glimpse_ext.point_sample(x, b[:, 1:].reshape(len(x), -1, 2) / 20),
}


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str
)
@pytest.mark.parametrize("channels", [1, 3, 8, 70])
@pytest.mark.parametrize("name", NARROW)
def test_lanes_that_are_cells(name: str, channels: int, dtype: torch.dtype, layout: str) -> None:
    """The numbers of the CPU kernels, also beside pixels that are infinite."""
    image = random_tensor((2, channels, 13, 17), torch.float32, "narrow")
    if dtype == torch.uint8:
        image = image * 100
    else:
        image[0, :, 0, 0] = image[1, :, 12, 16] = float("inf")
    image = arrange(image.to(dtype), layout)
    corner = random_tensor((36, 4), torch.float32, "narrow boxes") * 20
    boxes = torch.cat([torch.arange(36).unsqueeze(1) % 2, corner], 1)
    boxes[3, 1:] = torch.tensor([-4.0, -3, 25, 30])
    boxes[5, 3] = float("nan")
    expected = NARROW[name](image, boxes)
    backend = _testing.use_backend("emulated")
    try:
        actual = NARROW[name](image, boxes)
    finally:
        _testing.use_backend(backend)
    step = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7}[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=step, atol=step, equal_nan=True)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("noise", ["zero", "uniform", "gaussian"])
def test_glimpses_do_not_depend_on_the_order_of_threads(noise: str, layout: str) -> None:
    """Copies and the statistics behind their noise: the bits of the CPU in every order."""
    image = arrange(random_tensor((3, 9, 21, 27), torch.float32, "glimpses"), layout)
    # Inside, partly and wholly outside.
    offsets = torch.tensor([[0.0, 0.1], [0.9, -0.8], [4.0, 0.0]])

    def glimpses() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return glimpse_ext.extract_glimpse(image, (7, 8), offsets, noise=noise, generator=generator)

    expected = glimpses()
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        for number in SEEDS:
            _testing.emulation_set_seed(number)
            assert torch.equal(glimpses(), expected), f"seed {number} gives other bits"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("form", ["paste_masks_to_bits", "paste_masks_to_rle"])
def test_packed_paste_does_not_depend_on_the_order_of_threads(form: str) -> None:
    """Images of 5 x 7, 40 x 600 and 290 x 140 pixels: parts, and more rows than a table has."""
    masks = random_tensor((3, 5, 4), torch.float32, "packed") + 0.5
    paste = getattr(glimpse_ext, form)
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        for size in ((5, 7), (40, 600), (290, 140)):
            unit = torch.tensor([[0.1, 0.2, 0.7, 0.9], [-0.5, -0.5, 1.5, 1.5], [0.8, 0.1, 0.4, 2]])
            boxes = unit * torch.tensor([size[1], size[0]] * 2)
            _testing.use_backend("cpu")
            expected = paste(masks, boxes, size)
            _testing.use_backend("emulated")
            for number in SEEDS:
                _testing.emulation_set_seed(number)
                found = paste(masks, boxes, size)
                same = found == expected if form.endswith("rle") else torch.equal(found, expected)
                assert same, f"{size}: seed {number} gives other bits"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_paste_does_not_depend_on_the_order_of_threads(threshold: float | None) -> None:
    """Images of 3 x 7 and of 90 x 103 pixels: several in one block, and several blocks for one."""
    masks = random_tensor((3, 5, 4), torch.float32, "paste") + 0.5
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        for size in ((3, 7), (90, 103)):
            unit = torch.tensor([[0.1, 0.2, 0.7, 0.9], [-0.5, -0.5, 1.5, 1.5], [0.8, 0.1, 0.4, 2]])
            boxes = unit * torch.tensor([size[1], size[0]] * 2)
            _testing.use_backend("cpu")
            expected = glimpse_ext.paste_masks(masks, boxes, size, threshold)
            _testing.use_backend("emulated")
            for number in SEEDS:
                _testing.emulation_set_seed(number)
                pasted = glimpse_ext.paste_masks(masks, boxes, size, threshold)
                assert torch.equal(pasted, expected), f"{size}: seed {number} gives other bits"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_turned_boxes_give_zeros_in_any_order_of_threads(layout: str) -> None:
    """Tiles that no box reaches are cleared in shared memory, too, before they are stored."""
    image = arrange(random_tensor((1, 5, 9, 11), torch.float32, "no frames"), layout)
    image.requires_grad_()
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        for number in SEEDS:
            _testing.emulation_set_seed(number)
            pooled = glimpse_ext.roi_align_rotated(image, torch.zeros(0, 6), 3)
            (grad,) = torch.autograd.grad(pooled, image, torch.zeros_like(pooled))
            assert not grad.any(), f"seed {number}"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)


def _frame_outputs(mode: str, image: torch.Tensor, boxes: torch.Tensor) -> Outputs:
    """A pooled value, its gradients to the image and the boxes, and the first one's to the up."""
    image, boxes = image.detach().requires_grad_(), boxes.detach().requires_grad_()
    if mode.endswith("max"):
        pooled = glimpse_ext.roi_align(image, boxes[:, :5], (5, 6), 0.9, 2, mode="max")
    else:
        pooled = glimpse_ext.roi_align_rotated(image, boxes, (5, 6), 0.9, 2)
    up = random_tensor(tuple(pooled.shape), image.dtype, "frames up").requires_grad_()
    grads = torch.autograd.grad(pooled, (image, boxes), up, create_graph=True)
    again = torch.autograd.grad(grads[0], up, image.detach())
    return tuple(t.detach() for t in (pooled, *grads, *again))


@pytest.mark.usefixtures("hostile_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("mode", ["rotated", "dense rotated", "max", "dense max"])
def test_frames_do_not_depend_on_the_order_of_threads(
    mode: str, channels: int, dtype: torch.dtype, layout: str
) -> None:
    """Every order gives the bits of every other, and the numbers of the CPU kernels."""
    image = arrange(random_tensor((2, channels, 19, 23), dtype, "frames"), layout)
    # Dense: more boxes and more of their cells touch a pixel than a block lists at a time.
    dense = mode.startswith("dense")
    unit = random_tensor((40 if dense else 9, 6), torch.float32, "frames boxes")
    boxes = unit * torch.tensor([0.99, 12, 10, 14, 12, 180]) + torch.tensor([1.0, 11, 9, 15, 13, 0])
    boxes[:, 0] = boxes[:, 0].floor()
    if dense:
        boxes[:, 3:5] = boxes[:, 3:5] % 2 + 0.5
        if mode == "dense max":
            boxes[:, 3:5] += boxes[:, 1:3]
    expected = _frame_outputs(mode, image, boxes)
    backend = _testing.use_backend("emulated")
    seed = _testing.emulation_seed()
    try:
        first: Outputs | None = None
        for number in SEEDS:
            _testing.emulation_set_seed(number)
            outputs = _frame_outputs(mode, image, boxes)
            first = first or outputs
            for actual, same, reference in zip(outputs, first, expected, strict=True):
                assert torch.equal(actual, same), f"seed {number} gives other bits"
                scale = max(1.0, reference.abs().max().item())
                step = 2**-10 if dtype == torch.float16 else 1e-5
                error = (actual.double() - reference.double()).abs().max().item()
                assert error <= step * scale, f"seed {number} is off by {error:.3g}"
    finally:
        _testing.use_backend(backend)
        _testing.emulation_set_seed(seed)
