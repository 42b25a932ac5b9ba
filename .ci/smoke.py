# SPDX-License-Identifier: BSD-3-Clause
"""Does the installed package work under this torch? Values and gradients against the reference.

Run from a folder that holds no glimpse_ext, so that the installed one is imported.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import glimpse_ext
from glimpse_ext import reference


def compare(
    name: str, ours: Callable[..., Tensor], expected: Callable[..., Tensor], *leaves: Tensor
) -> None:
    """Same values and same gradients of a random contraction, for every leaf."""
    got, want = ours(*leaves), expected(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(got)
    for ours_grad, want_grad in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, want_grad, rtol=1e-9, atol=1e-9)
        assert ours_grad.abs().sum() > 0
    print(f"  {name}: forward and gradients agree with the reference")


def main() -> None:
    installed = Path(glimpse_ext.__file__).resolve()
    assert installed.is_relative_to(Path(sysconfig.get_path("platlib")).resolve()), installed
    print(f"torch {torch.__version__}: {installed.parent.name} from {installed.parent.parent.name}")

    torch.manual_seed(0)
    image = torch.randn(2, 5, 24, 31, dtype=torch.float64, requires_grad=True)
    small = torch.randn(2, 5, 12, 16, dtype=torch.float64, requires_grad=True)
    corner = torch.rand(7, 2, dtype=torch.float64) * 10
    size = torch.rand(7, 2, dtype=torch.float64) * 12 + 1
    boxes = torch.cat([torch.arange(7)[:, None] % 2, corner, corner + size], 1).requires_grad_()

    for aligned in (True, False):
        arguments = ((3, 4), 0.9, 2, aligned)
        compare(
            f"roi_align(aligned={aligned})",
            lambda x, b, a=arguments: glimpse_ext.roi_align(x, b, *a),
            lambda x, b, a=arguments: reference.roi_align(x, b, *a),
            image,
            boxes,
        )
    pyramid = ((3, 4), (1.0, 0.5))
    middle = {"canonical_size": 8, "canonical_level": 1}  # So that both levels get boxes.
    compare(
        "multiscale_roi_align",
        lambda x, y, b: glimpse_ext.multiscale_roi_align([x, y], b, *pyramid, **middle),
        lambda x, y, b: reference.multiscale_roi_align([x, y], b, *pyramid, **middle),
        image,
        small,
        boxes,
    )


if __name__ == "__main__":
    main()
