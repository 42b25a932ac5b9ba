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


# Where a 32-bit offset would fall somewhere else: inside a plane, behind many images or channels.
SHAPES = {
    "one plane": (1, 1, 2**16, 2**15 + 2),
    "many images": (9, 1, 2**14, 2**14 + 2),
    "many channels": (1, 9, 2**14, 2**14 + 2),
}
WINDOW = 64


def corners(shape, dtype):
    """Pixels for the first and the last corner, boxes on them in the large image, and these
    boxes as if each corner were an image of its own."""
    images, channels, height, width = shape
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 200, (2, channels, WINDOW, WINDOW), generator=generator).to(dtype)
    small = torch.tensor([[0.0, 3.0, 2.5, 9.75, 11.0], [1.0, 52.5, 50.75, 61.5, 63.0]])
    large = small.clone()
    large[1, :3] += torch.tensor([images - 2, width - WINDOW, height - WINDOW])
    large[1, 3:] += torch.tensor([width - WINDOW, height - WINDOW])
    return pixels, large, small


def large_image(shape, pixels, dtype, layout, device):
    image = torch.empty(shape, dtype=dtype, device=device.torch, memory_format=layout).zero_()
    assert image.numel() > 2**31
    image[0, :, :WINDOW, :WINDOW] = pixels[0]
    image[-1, :, -WINDOW:, -WINDOW:] = pixels[1]
    return image


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_of_more_than_2_to_the_31_elements(shape, layout, roomy):
    device, shape = roomy(4), SHAPES[shape]
    pixels, boxes, small = corners(shape, torch.uint8)
    image = large_image(shape, pixels, torch.uint8, layout, device)
    pooled = glimpse_ext.roi_align(image, boxes.to(device.torch), (7, 5), 1.0, 2, True).cpu()
    del image
    # Boxes and steps are exact here, but positions near 65536 are rounded to 2**-7 of a pixel.
    expected = reference.roi_align(pixels, small, (7, 5), 1.0, 2, True)
    assert expected.min() > 0, "every cell of both boxes reads something"
    assert (pooled[0] - expected[0]).abs().max() < 1e-4
    assert (pooled[1] - expected[1]).abs().max() < 200 * 2**-7 * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", ["many images", "many channels"])
def test_gradients_of_an_image_of_more_than_2_to_the_31_elements(shape, layout, roomy):
    device, shape = roomy(15), SHAPES[shape]
    dtype = torch.float16
    pixels, boxes, small = corners(shape, dtype)
    pixels = pixels / 256
    image = large_image(shape, pixels, dtype, layout, device).requires_grad_()
    boxes = boxes.to(device.torch).requires_grad_()
    pooled = glimpse_ext.roi_align(image, boxes, (7, 5), 1.0, 2, True)
    to_image, to_boxes = torch.autograd.grad(pooled, (image, boxes), torch.ones_like(pooled))
    del image, pooled
    assert to_image.shape == shape
    # Each box hands out as much as it has cells, and nothing lands anywhere else.
    first = to_image[0, :, :WINDOW, :WINDOW]
    last = to_image[-1, :, -WINDOW:, -WINDOW:]
    for window in (first, last):
        assert (window.double().sum((1, 2)) - 35).abs().max() < 0.1
        window.zero_()
    assert not any(plane.any() for of_image in to_image for plane in of_image)
    small.requires_grad_()
    expected = reference.roi_align(pixels, small, (7, 5), 1.0, 2, True)
    (expected,) = torch.autograd.grad(expected.sum(), small)
    assert (to_boxes[0].cpu() - expected[0]).abs().max() < 1e-3
    assert (to_boxes[1].cpu() - expected[1]).abs().max() < 0.02 * expected[1].abs().max() + 0.05


def test_a_result_of_more_than_2_to_the_31_elements(roomy):
    """1025 boxes of 4096 channels of 512 cells."""
    device = roomy(10)
    channels, count = 2**12, 2**10 + 1
    image = torch.arange(4.0, dtype=torch.float16).repeat(channels).reshape(1, channels, 2, 2)
    image = image.to(device.torch)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]], device=device.torch).repeat(count, 1)
    pooled = glimpse_ext.roi_align(image, boxes, (16, 32), 1.0, 1, True)
    assert pooled.numel() > 2**31
    assert torch.equal(pooled[-1], pooled[0])
    assert pooled[-1, -1, -1, -1] == 3
    assert pooled[-1, -1, 0, 0] == 0
