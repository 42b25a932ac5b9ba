# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of more than 2**31 elements, where 32-bit offsets would wrap: `pytest -m slow`."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, CUDA, DEVICES

import glimpse_ext
from glimpse_ext import reference

pytestmark = pytest.mark.slow

GIB = 2**30


def free_bytes(device):
    if device is CUDA:
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )


@pytest.fixture(params=[d for d in DEVICES if d in (CPU, CUDA)], ids=str)
def roomy(request):
    """Emulated kernels are left out: billions of pixels take hours there."""

    def need(gib):
        free = free_bytes(request.param) / GIB
        if free < gib:
            pytest.skip(f"needs {gib} GiB of free memory, found {free:.1f}")
        return request.param

    return need


# Each image has 2**30 + 2**16 pixels, so that the third one begins beyond 2**31 elements and ends
# beyond 3 * 2**30; a 32-bit offset would fall into the first image, or out of memory.
SIDE = 2**15
SHAPE = (3, 1, SIDE, SIDE + 2)
ROWS = [(2.0, SIDE - 9.5, SIDE - 7.25, SIDE - 2.5, SIDE - 1.0), (0.0, 3.0, 2.5, 9.75, 11.0)]
WINDOW = 64


def corner_and_boxes(device, dtype):
    """The pixels around the boxes, as a small image with boxes at the same places."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.randint(0, 200, (2, 1, WINDOW, WINDOW), generator=generator).to(dtype)
    small = torch.tensor(ROWS)
    small[0] -= torch.tensor(
        [1, SIDE + 2 - WINDOW, SIDE - WINDOW, SIDE + 2 - WINDOW, SIDE - WINDOW]
    )
    return corner.to(device.torch), torch.tensor(ROWS).to(device.torch), small


def place(image, corner):
    image[2, :, -WINDOW:, -WINDOW:] = corner[1]
    image[0, :, :WINDOW, :WINDOW] = corner[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_image_of_more_than_2_to_the_31_elements(layout, dtype, roomy):
    device = roomy(4 if dtype == torch.uint8 else 8)
    shape = SHAPE
    if layout == torch.channels_last:
        # With one channel the layouts are the same; two channels of half the width.
        shape = (3, 2, SIDE, SIDE // 2 + 1)
    corner, boxes, small = corner_and_boxes(device, dtype)
    boxes = boxes.clone()
    boxes[0, [1, 3]] += shape[3] - SHAPE[3]
    image = torch.zeros(shape, dtype=dtype, device=device.torch, memory_format=layout)
    assert image.numel() > 2**31
    place(image, corner.expand(-1, shape[1], -1, -1))
    pooled = glimpse_ext.roi_align(image, boxes, (7, 5), 1.0, 2, True)
    expected = reference.roi_align(corner.cpu(), small, (7, 5), 1.0, 2, True, dtype=torch.float32)
    # Positions near 32768 are rounded to 2**-8 of a pixel, and pixels differ by up to 200; a
    # float16 near 200 is rounded to 1/8.
    assert expected.min(), "every cell of both boxes reads something"
    error = (pooled.cpu().double() - expected).abs()
    assert error[0].max() <= 2
    assert error[1].max() <= 0.1


def test_gradients_of_an_image_of_more_than_2_to_the_31_elements(roomy):
    device = roomy(14)
    image = torch.zeros(SHAPE, dtype=torch.float16, device=device.torch)
    corner, boxes, small = corner_and_boxes(device, torch.float16)
    place(image, corner / 200)
    image.requires_grad_()
    boxes.requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, (7, 5), 1.0, 2, True)
    to_image, to_boxes = torch.autograd.grad(pooled, (image, boxes), torch.ones_like(pooled))
    assert to_image.shape == SHAPE
    # Each box hands out as much as it has cells; nothing may land anywhere else.
    for image_number, window in (
        (2, (slice(SIDE - WINDOW, None), slice(SIDE + 2 - WINDOW, None))),
        (0, (slice(0, WINDOW), slice(0, WINDOW))),
    ):
        inside = to_image[image_number, 0][window]
        assert abs(inside.double().sum().item() - 35) < 0.1
        outside = to_image[image_number].clone()
        outside[0][window] = 0
        assert not outside.any()
    assert not to_image[1].any()
    small.requires_grad_()
    expected = reference.roi_align(corner.cpu().float() / 200, small, (7, 5), 1.0, 2, True)
    (expected,) = torch.autograd.grad(expected.sum(), small)
    assert (to_boxes[1].cpu() - expected[1]).abs().max() < 0.05
    assert to_boxes[0, 1:].any()


def test_a_result_of_more_than_2_to_the_31_elements(roomy):
    """1025 boxes of 4096 channels of 512 cells."""
    device = roomy(10)
    channels, boxes_count = 2**12, 2**10 + 1
    image = torch.arange(4.0, dtype=torch.float16).repeat(channels).reshape(1, channels, 2, 2)
    image = image.to(device.torch)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]], device=device.torch).repeat(boxes_count, 1)
    pooled = glimpse_ext.roi_align(image, boxes, (16, 32), 1.0, 1, True)
    assert pooled.numel() > 2**31
    assert torch.equal(pooled[-1], pooled[0])
    assert pooled[-1, -1, -1, -1] == 3
    assert pooled[-1, -1, 0, 0] == 0
    del pooled
