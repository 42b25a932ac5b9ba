# SPDX-License-Identifier: BSD-3-Clause
"""point_sample where an image has many points for its size and is turned over first."""

from __future__ import annotations

import pytest
import torch

import glimpse_ext
from glimpse_ext import reference

# Whole blocks of channels, a part of one, and both.
CHANNELS = (16, 32, 45)


def make(channels, dtype=torch.float32, images=2, height=9, width=11, count=60):
    generator = torch.Generator().manual_seed(channels)
    image = torch.randn(images, channels, height, width, generator=generator, dtype=torch.float64)
    # Odd multiples of 1/1024 have exact places, never on the centre of a pixel. Some lie outside,
    # one nowhere.
    points = torch.rand(images, count, 2, generator=generator) * 1.3 - 0.15
    points = ((points * 512).round() * 2 + 1) / 1024
    points[:, 1, 0] = torch.nan
    return image.to(dtype), points


@pytest.mark.parametrize("channels", CHANNELS)
def test_values_and_gradients_are_those_of_the_reference(channels, device, dtype, close):
    image, points = make(channels, dtype)
    image, points = image.to(device.torch).requires_grad_(), points.to(device.torch)
    points.requires_grad_()
    values = glimpse_ext.point_sample(image, points)
    # The point that is nowhere reads nothing and has no gradient, but the reference's is NaN.
    own, place = image.detach().double().requires_grad_(), points.detach().double()
    place = torch.where(place.isnan(), 9.0, place).requires_grad_()
    expected = reference.point_sample(own, place)
    close(values, expected)
    grad = torch.linspace(-1, 1, values.numel(), device=device.torch).reshape(values.shape)
    got = torch.autograd.grad(values, [image, points], grad.to(dtype))
    right = torch.autograd.grad(expected, [own, place], grad.to(dtype).double())
    for name, one, other in zip(("image", "points"), got, right, strict=True):
        close(one, other, "gradient", name)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_point_is_read_alike_with_few_others_and_with_many(channels, dtype):
    image, points = make(channels, dtype)
    many = glimpse_ext.point_sample(image, points)
    for first in range(0, points.shape[1], 20):
        few = glimpse_ext.point_sample(image, points[:, first : first + 20])
        assert torch.equal(few, many[:, :, first : first + 20]), f"points from {first} on"


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_gradient_is_the_same_for_every_memory_format_of_it(channels):
    image, points = make(channels)
    image.requires_grad_()
    points = points.nan_to_num(0.5).requires_grad_()
    grad = torch.randn(2, channels, points.shape[1])
    apart = grad.transpose(1, 2).contiguous().transpose(1, 2)
    first, second = (
        torch.autograd.grad(glimpse_ext.point_sample(image, points), [image, points], one)
        for one in (grad, apart)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def views(tensor):
    """The same numbers in the middle of other memory, dense, with gaps, and the other way round."""
    dense = torch.stack([tensor + 1, tensor, tensor - 1])[1]
    gaps = torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
    return [dense, gaps, tensor.transpose(0, 1).contiguous().transpose(0, 1)]


def test_lists_are_read_as_they_lie(device, close):
    image, points = make(20)
    image, points = image.to(device.torch), points.nan_to_num(0.5).to(device.torch)
    grad = torch.randn(2, 20, points.shape[1], device=device.torch)

    def run(image, points, grad):
        image, points = image.detach().requires_grad_(), points.detach().requires_grad_()
        values = glimpse_ext.point_sample(image, points)
        return values.detach(), *torch.autograd.grad(values, [image, points], grad)

    right = run(image, points, grad)
    last = image.contiguous(memory_format=torch.channels_last)
    others = [(one, points, grad) for one in [*views(image), last]]
    others += [(image, one, grad) for one in views(points)]
    others += [(image, points, one) for one in views(grad)]
    others += [(last, points, one) for one in views(grad)]
    for at, other in enumerate(others):
        for name, one, expected in zip(
            ("values", "image", "points"), run(*other), right, strict=True
        ):
            close(one, expected, "gradient", f"{name}, view {at}")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_result_may_be_changed_in_place(layout):
    image, points = make(20)
    image = image.contiguous(memory_format=layout).requires_grad_()
    values = glimpse_ext.point_sample(image, points)
    assert values._base is None
    right = torch.autograd.grad(values.sum() * 3, image, retain_graph=True)[0]
    values *= 3
    assert torch.equal(torch.autograd.grad(values.sum(), image)[0], right)


def test_every_thread_count_gives_the_same_bits():
    image, points = make(45, images=3, height=30, width=40, count=700)
    image.requires_grad_()
    points.requires_grad_()

    def run():
        values = glimpse_ext.point_sample(image, points)
        return values.detach(), *torch.autograd.grad(values.square().sum(), [image, points])

    before = torch.get_num_threads()
    alone = run()
    torch.set_num_threads(3)
    try:
        for name, one, other in zip(("values", "image", "points"), alone, run(), strict=True):
            assert torch.equal(one, other), f"{name} differ with three threads"
    finally:
        torch.set_num_threads(before)


def test_a_pixel_that_is_nan_stays_where_it_is_read():
    image, points = make(32)
    points = points.nan_to_num(0.5)
    image[0, 5, 4, 4] = torch.nan
    values = glimpse_ext.point_sample(image, points)
    touched = (points[0, :, 0] * 11 - 4.5).abs().lt(1) & (points[0, :, 1] * 9 - 4.5).abs().lt(1)
    assert torch.equal(values[0, 5].isnan(), touched)
    assert not values[1].isnan().any()
    values[0, 5] = 0
    assert not values.isnan().any(), "a NaN has reached another channel"
