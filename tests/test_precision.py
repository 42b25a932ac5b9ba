# SPDX-License-Identifier: BSD-3-Clause
"""How far every storage type is from float64, on images that are the same to the last bit."""

from __future__ import annotations

import pytest
import torch
from cases import random_tensor
from conftest import EMULATED

import glimpse_ext
from glimpse_ext import reference

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# Largest mean of |x - float64| / (1 + |float64|), of pooled values, gradient to the image, gradient
# to the boxes. Storage rounds to 2**-12 (float16) or 2**-9 (bfloat16) of a value at most; box
# gradients are stored like the boxes, in float32.
BOUNDS = {
    F64: (1e-15, 1e-14, 1e-14),
    F32: (1e-6, 1e-6, 1e-5),
    F16: (1e-3, 1e-3, 1e-3),
    BF16: (1e-3, 1e-3, 1e-3),
}


def problem(device):
    """Images and gradients whose numbers every type holds exactly: k/128 with |k| <= 128."""
    count, channels, size = (6, 3, 16) if device is EMULATED else (48, 16, 48)
    image = (random_tensor((2, channels, size, size), F64, "precision") * 128).round() / 128
    unit = (random_tensor((count, 4), F64, "precision boxes") + 1) / 2
    x1, y1 = unit[:, 0] * size * 0.6, unit[:, 1] * size * 0.6
    columns = [x1, y1, x1 + 1 + unit[:, 2] * size * 0.3, y1 + 1 + unit[:, 3] * size * 0.3]
    boxes = (torch.stack(columns, dim=1) * 64).round() / 64
    index = (torch.arange(count) % 2).to(F64)[:, None]
    g = (random_tensor((count, channels, 4, 4), F64, "precision grad") * 128).round() / 128
    return image, torch.cat([index, boxes], dim=1), g


def run(function, image, boxes, g, **options):
    image, boxes = image.detach().requires_grad_(), boxes.detach().requires_grad_()
    pooled = function(image, boxes, 4, 1.0, -1, True, **options)
    return pooled.detach(), *torch.autograd.grad(pooled, (image, boxes), g)


def test_error_of_every_dtype(device, record_property, capsys):
    image, boxes, g = problem(device)
    exact = run(reference.roi_align, image, boxes, g)
    lines = [f"mean and largest error against float64, {device}: |x - y| / (1 + |y|)"]
    lines.append(f"{'':10}{'pooled':>20}{'to the image':>20}{'to the boxes':>20}")
    failures = []
    for dtype, bounds in BOUNDS.items():
        boxes_dtype = F64 if dtype == F64 else F32
        arguments = (image.to(dtype), boxes.to(boxes_dtype), g.to(dtype))
        got = run(glimpse_ext.roi_align, *(a.to(device.torch) for a in arguments))
        row = str(dtype).split(".")[1].ljust(10)
        for a, b, bound in zip(got, exact, bounds, strict=True):
            error = (a.cpu().double() - b).abs() / (1 + b.abs())
            row += f"{error.mean():>11.1e}{error.max():>9.1e}"
            if not error.mean() <= bound:
                failures.append(f"{dtype}: mean error {error.mean():.2e}, bound {bound:.0e}")
        lines.append(row)
    report = "\n".join(lines)
    record_property("dtype_errors", report)
    with capsys.disabled():
        print(f"\n{report}")
    assert not failures, "\n".join([*failures, report])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_cell_of_thousands_of_samples_is_not_summed_in_half(dtype, device):
    """torchvision's half kernel gives 1.0 here, because a half sum stops growing at 2048."""
    size = 64
    image = 1.5 + random_tensor((1, 1, size, size), F64, "half sum") * 0.5
    image = image.to(dtype)
    boxes = torch.tensor([[0.0, 0, 0, size, size]])
    pooled = glimpse_ext.roi_align(image.to(device.torch), boxes.to(device.torch), 1, aligned=True)
    exact = image.double().mean().item()
    assert abs(exact - 1.5) < 0.02
    # One rounding of the result: half of the distance between two numbers of that type near 1.5.
    assert abs(pooled.item() - exact) <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_gradient_of_thousands_of_boxes_is_not_summed_in_half(dtype, device):
    """Ones from 4096 boxes: a sum in half stops at 2048 (float16) or 256 (bfloat16)."""
    count = 512 if device is EMULATED else 4096
    image = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device.torch, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 0, 1, 1]], device=device.torch).repeat(count, 1)
    glimpse_ext.roi_align(image, boxes, 1, aligned=True).sum().backward()
    assert image.grad.item() == count


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_positions_are_not_computed_in_half(dtype, device):
    """float16 has no number between 2000 and 2001, and bfloat16 none between 2000 and 2008. Boxes
    in float32 beside a half image keep what they say."""
    image = (torch.arange(2048) % 8).to(dtype).expand(1, 1, 1, 2048).to(device.torch)
    boxes = torch.tensor([[0.0, 2001.25, 0, 2001.75, 1]], device=device.torch)
    pooled = glimpse_ext.roi_align(image, boxes, 1, sampling_ratio=1, aligned=True)
    assert pooled.item() == 1.0
    boxes[0, 1::2] += 0.5
    pooled = glimpse_ext.roi_align(image, boxes, 1, sampling_ratio=1, aligned=True)
    assert pooled.item() == 1.5
