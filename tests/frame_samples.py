# SPDX-License-Identifier: BSD-3-Clause
"""Arguments for every registered operator on frames, with and without what is optional."""

from __future__ import annotations

import torch
from cases import random_tensor

ops = torch.ops.glimpse_ext


def frame_samples(device):
    def draw(*shape, salt=""):
        return random_tensor(shape, torch.float64, f"frames {shape} {salt}").to(device.torch)

    def grads(t):
        return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    def tensor(rows, dtype=torch.float64):
        return torch.tensor(rows, dtype=dtype, device=device.torch)

    image, grad = draw(2, 4, 9, 7), draw(3, 4, 2, 3)
    last = image.contiguous(memory_format=torch.channels_last)
    index = tensor([1, 0, 1], torch.int64)
    turned = tensor([[0, 3.1, 4.2, 3, 4, 30], [1, 2, 6.3, 5, 2.2, -70], [1, 9, 2, 4, 3, 200.0]])
    turning = draw(3, 6)
    corners = tensor([[0, 1.1, 1.2, 4.3, 5.4], [1, 2, 3.1, 6.6, 9.2], [1, -2, 2, 3, 3.5]])
    moving = draw(3, 5)
    chosen = (draw(3, 4, 2, 3, salt="chosen") * 5).to(torch.int32)
    rotated = ([2, 3], [1, 2, 1, 0, 1], 1.0)
    largest = ([2, 3], [0, 2, 1, 0, 0], 1.0)
    size = [2, 4, 9, 7]
    return {
        "roi_align_rotated": (
            ops.roi_align_rotated.default,
            (image, turned, 1.0, 2, 3, 2, True, False, True),
        ),
        "roi_align_rotated gradients": (
            ops.roi_align_rotated.default,
            (grads(image), grads(turned), 1.0, 2, 3, -1, True, True, False),
        ),
        "roi_align_rotated channels_last": (
            ops.roi_align_rotated.default,
            (grads(last), turned, 0.5, 2, 3, -1, False, False, True),
        ),
        "roi_align_rotated uint8": (
            ops.roi_align_rotated.default,
            (image.to(torch.uint8), turned, 1.0, 2, 3, 2, True, False, True),
        ),
        "roi_align_rotated no boxes": (
            ops.roi_align_rotated.default,
            (image, turned[:0], 1.0, 2, 3, 2, True, False, True),
        ),
        "roi_align_max": (
            ops.roi_align_max.default,
            (grads(image), grads(corners), 1.0, 2, 3, 2, True),
        ),
        "roi_align_max channels_last": (
            ops.roi_align_max.default,
            (grads(last), corners, 1.0, 2, 3, -1, False),
        ),
        "_frames_maximum": (
            ops._frames_maximum.default,
            (grads(image), grads(corners[:, 1:]), index, *largest),
        ),
        "_frames_sample": (
            ops._frames_sample.default,
            (grads(image), grads(turned), None, None, None, *rotated),
        ),
        "_frames_sample tangent": (
            ops._frames_sample.default,
            (grads(image), turned, None, grads(turning), None, *rotated),
        ),
        "_frames_sample image index": (
            ops._frames_sample.default,
            (grads(last), grads(turned[:, 1:]), index, None, None, *rotated),
        ),
        "_frames_sample chosen": (
            ops._frames_sample.default,
            (grads(image), grads(corners), None, grads(moving), chosen, *largest),
        ),
        "_frames_grad_features": (
            ops._frames_grad_features.default,
            (grads(grad), grads(turned), None, None, None, *rotated, size, False),
        ),
        "_frames_grad_features chosen": (
            ops._frames_grad_features.default,
            (grads(grad), corners, None, grads(moving), chosen, *largest, size, True),
        ),
        "_frames_grad_boxes": (
            ops._frames_grad_boxes.default,
            (grads(image), grads(grad), grads(turned), None, None, None, *rotated),
        ),
        "_frames_grad_boxes tangent": (
            ops._frames_grad_boxes.default,
            (image, grad, turned, None, grads(turning), None, *rotated),
        ),
        "_frames_grad_boxes chosen": (
            ops._frames_grad_boxes.default,
            (grads(image), grads(grad), grads(corners[:, 1:]), index, None, chosen, *largest),
        ),
    }
