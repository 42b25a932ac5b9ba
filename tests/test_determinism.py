# SPDX-License-Identifier: BSD-3-Clause
"""The same bits: in every run, at any number of threads, in any company of boxes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import PYRAMIDS, random_tensor
from conftest import EMULATED, _testing

import glimpse_ext

F32 = torch.float32


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def crowd(device, count, shape, dtype=F32, seed="crowd"):
    """Image, overlapping boxes, and a gradient for (3, 2) cells."""
    n, _, h, w = shape
    unit = (random_tensor((count, 5), torch.float64, seed) + 1) / 2
    x1, y1 = unit[:, 1] * w * 0.8 - 1, unit[:, 2] * h * 0.8 - 1
    columns = [unit[:, 0] * n, x1, y1, x1 + unit[:, 3] * w * 0.7, y1 + unit[:, 4] * h * 0.7]
    boxes = torch.stack(columns, dim=1).to(F32)
    boxes[:, 0] = boxes[:, 0].floor().clamp(max=n - 1)
    image = random_tensor(shape, dtype, f"{seed} image")
    g = random_tensor((count, shape[1], 3, 2), dtype, f"{seed} grad")
    return image.to(device.torch), boxes.to(device.torch), g.to(device.torch)


def everything(image, boxes, g, mode=(-1, False)):
    """Pooled values, gradient to the image and gradient to the boxes."""
    image, boxes = image.detach().requires_grad_(), boxes.detach().requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, g.shape[2:], 1.0, *mode)
    return pooled.detach(), *torch.autograd.grad(pooled, (image, boxes), g)


MODES = [(-1, False), (2, True)]
NAMES = ("pooled", "gradient to the image", "gradient to the boxes")


def sizes(device):
    """Enough boxes and channels for several threads or blocks; few where threads are emulated."""
    return (12, (2, 5, 13, 11)) if device is EMULATED else (200, (2, 40, 33, 29))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_run_to_run(mode, layout, device, dtype, same_bits):
    image, boxes, g = crowd(device, *sizes(device), dtype)
    image = image.contiguous(memory_format=layout)
    first = everything(image, boxes, g, mode)
    for again in range(2):
        for name, a, b in zip(NAMES, everything(image, boxes, g, mode), first, strict=True):
            same_bits(a, b, f"{name}, run {again + 2}")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_number_of_threads(mode, layout, device, dtype, same_bits):
    image, boxes, g = crowd(device, *sizes(device), dtype)
    image = image.contiguous(memory_format=layout)
    with threads(1):
        one = everything(image, boxes, g, mode)
    for count in (2, 3, 7):
        with threads(count):
            many = everything(image, boxes, g, mode)
        for name, a, b in zip(NAMES, many, one, strict=True):
            same_bits(a, b, f"{name}, {count} threads")


def test_threads_and_a_pyramid(device, same_bits):
    pyramid = PYRAMIDS[0]
    features = [f.to(device.torch).requires_grad_() for f in pyramid.features(F32)]
    boxes = pyramid.boxes(F32).to(device.torch).requires_grad_()

    def run():
        pooled = glimpse_ext.multiscale_roi_align(
            features, boxes, pyramid.output_size, pyramid.scales, **pyramid.rule
        )
        g = pyramid.grad(F32).to(device.torch)
        return pooled, *torch.autograd.grad(pooled, (boxes, *features), g)

    with threads(1):
        one = run()
    with threads(2):
        two = run()
    for a, b in zip(two, one, strict=True):
        same_bits(a, b)


if _testing is not None:

    @pytest.mark.parametrize("mode", MODES, ids=str)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_any_order_of_cuda_threads_and_blocks(mode, layout, same_bits):
        previous = _testing.use_backend("emulated")
        seed = _testing.emulation_seed()
        try:
            image, boxes, g = crowd(EMULATED, 8, (2, 5, 13, 11))
            image = image.contiguous(memory_format=layout)
            _testing.emulation_set_seed(0)
            first = everything(image, boxes, g, mode)
            for order in (1, 2, 12345):
                _testing.emulation_set_seed(order)
                for name, a, b in zip(NAMES, everything(image, boxes, g, mode), first, strict=True):
                    same_bits(a, b, f"{name}, seed {order}")
        finally:
            _testing.emulation_set_seed(seed)
            _testing.use_backend(previous)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_order_of_boxes(mode, device, same_bits):
    """A row does not know which place it has: not the pooled values, not the box gradient."""
    image, boxes, g = crowd(device, *sizes(device))
    order = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(1)).to(device.torch)
    pooled, _, to_boxes = everything(image, boxes, g, mode)
    shuffled, _, to_shuffled = everything(image, boxes[order], g[order], mode)
    same_bits(shuffled, pooled[order], "pooled")
    same_bits(to_shuffled, to_boxes[order], "gradient to the boxes")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_order_of_boxes_where_sums_are_exact(mode, device, same_bits):
    """The image gradient adds in box order, so shuffling changes its rounding, and nothing else.
    Small integers on boxes of whole quarters have sums without rounding."""
    image = random_tensor((1, 2, 9, 9), F32, "exact").to(device.torch)
    boxes = torch.tensor(
        [[0, i % 3 + 0.5, i // 3, i % 3 + 4.5, i // 3 + 4] for i in range(9)], device=device.torch
    )
    g = torch.randint(-8, 8, (9, 2, 4, 2), generator=torch.Generator().manual_seed(2)).float()
    g = g.to(device.torch)
    order = torch.tensor([4, 8, 0, 2, 7, 1, 6, 3, 5], device=device.torch)

    def to_image(boxes, g):
        leaf = image.detach().requires_grad_()
        pooled = glimpse_ext.roi_align(leaf, boxes, (4, 2), 1.0, 2, mode[1])
        return torch.autograd.grad(pooled, leaf, g)[0]

    same_bits(to_image(boxes[order], g[order]), to_image(boxes, g))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_split_boxes(mode, device, same_bits):
    image, boxes, g = crowd(device, *sizes(device))
    pooled, _, to_boxes = everything(image, boxes, g, mode)
    cut = len(boxes) // 3
    first = everything(image, boxes[:cut], g[:cut], mode)
    second = everything(image, boxes[cut:], g[cut:], mode)
    same_bits(torch.cat([first[0], second[0]]), pooled, "pooled")
    same_bits(torch.cat([first[2], second[2]]), to_boxes, "gradient to the boxes")
    alone = everything(image, boxes[cut : cut + 1], g[cut : cut + 1], mode)
    same_bits(alone[0][0], pooled[cut], "one box")
    same_bits(alone[2][0], to_boxes[cut], "gradient to one box")


def test_repeated_boxes(device, same_bits):
    image, boxes, g = crowd(device, *sizes(device))
    pooled, _, to_boxes = everything(image, boxes, g)
    twice = everything(image, boxes.repeat(2, 1), g.repeat(2, 1, 1, 1))
    same_bits(twice[0], pooled.repeat(2, 1, 1, 1), "pooled")
    same_bits(twice[2], to_boxes.repeat(2, 1), "gradient to the boxes")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_boxes_that_do_not_touch_a_pixel_do_not_change_its_gradient(mode, device, same_bits):
    """Other boxes of the batch, before, between and after, in another part of the image, in another
    image, or nowhere."""
    _, shape = sizes(device)
    shape = (2, shape[1], shape[2], 2 * shape[3])
    image, boxes, g = crowd(device, 10, shape)
    left = shape[3] // 2 - 2
    boxes[:, 0] = 0
    boxes[:, [1, 3]] = boxes[:, [1, 3]].clamp(max=left)
    strangers = boxes.clone()
    strangers[:4, [1, 3]] += left + 3
    strangers[4:7, 0] = 1
    strangers[7:9, 1:] = 1e6 + torch.arange(4.0, device=device.torch)
    strangers[9, 1] = torch.nan
    mixed = torch.stack([strangers, boxes, strangers.flip(0)], dim=1).flatten(0, 1)
    expected = everything(image, boxes, g, mode)
    got = everything(image, mixed, g.repeat_interleave(3, dim=0), mode)
    same_bits(got[0][1::3], expected[0], "pooled")
    same_bits(got[2][1::3], expected[2], "gradient to the boxes")
    own = got[1][0, :, :, : left + 1]
    same_bits(own, expected[1][0, :, :, : left + 1], "gradient to the image")
    assert expected[1][0, :, :, : left + 1].any()


def test_company_in_the_batch_and_in_the_channels(device, same_bits):
    """An image is pooled alike alone and in a batch, and so is a channel."""
    image, boxes, g = crowd(device, *sizes(device))
    both = everything(image, boxes, g)
    mine = boxes[:, 0] == 1
    alone = boxes[mine].clone()
    alone[:, 0] = 0
    one = everything(image[1:], alone, g[mine])
    same_bits(one[0], both[0][mine], "pooled")
    same_bits(one[1][0], both[1][1], "gradient to the image")
    channel = everything(image[:, 3:4], boxes, g[:, 3:4])
    same_bits(channel[0], both[0][:, 3:4], "pooled, one channel")
    same_bits(channel[1], both[1][:, 3:4], "gradient to the image, one channel")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_size_of_a_call_changes_no_bit(layout, device, same_bits):
    """Kernels, tiles and grids follow from sizes. Enough images for the largest tiles and the
    fullest grid, and enough cells to share a box out; against one image, and one box of it."""
    images = 95
    image, boxes, _ = crowd(device, 2 * images, (images, 72, 9, 11))
    image = image.contiguous(memory_format=layout)
    boxes[:, 0] = torch.arange(2 * images, device=device.torch) % images
    g = random_tensor((2 * images, 72, 14, 5), F32, "size grad").to(device.torch)
    pooled, to_image, to_boxes = everything(image, boxes, g, (2, True))
    mine = boxes[:, 0] == 3
    alone = boxes[mine].clone()
    alone[:, 0] = 0
    one = everything(image[3:4], alone, g[mine], (2, True))
    same_bits(one[0], pooled[mine], "pooled")
    same_bits(one[1][0], to_image[3], "gradient to the image")
    same_bits(one[2], to_boxes[mine], "gradient to the boxes")


def test_the_deterministic_switch_changes_nothing(device, same_bits):
    """There is no faster, random way to switch off, and nothing to refuse."""
    image, boxes, g = crowd(device, *sizes(device))
    expected = everything(image, boxes, g)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        got = everything(image, boxes, g)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        same_bits(a, b, name)
