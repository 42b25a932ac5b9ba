# SPDX-License-Identifier: BSD-3-Clause
"""The operators in plain PyTorch, for where the compiled library cannot be had.

What stands above the schemas (arguments, derivatives, batching, tracing) is the same in both cases;
here are kernels for what stands below: the checks, formulas and sums of csrc. Positions are rounded
as there, so the same samples are inside or outside; sums have another order. On CUDA they are
atomic, so that results may differ by their rounding from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _schemas
from .._sampling import (
    Where,
    bind_grad_boxes,
    bind_grad_features,
    bind_sample,
)
from . import batch, copies, frames, separable
from .checks import check

_NAMES_IN_ERRORS = {"multiscale_roi_align": "multiscale_roi_align"}
"""Of operators whose errors have another name than those of their kind."""


def _sample(*args: Any) -> Tensor:
    return separable.sample(*bind_sample(*args))


def _sample_grad_features(*args: Any) -> list[Tensor]:
    grad, where, maps = bind_grad_features(*args)
    return separable.grad_features(grad, where, maps.sizes, maps.channels_last)


def _sample_grad_boxes(*args: Any) -> Tensor:
    return separable.grad_boxes(*bind_grad_boxes(*args))


def _roi_align_rotated(
    input: Tensor, boxes: Tensor, scale: float, height: int, width: int, *params: int
) -> Tensor:
    return frames.sample(
        input, boxes, None, None, None, [height, width], [1, *map(int, params)], scale
    )


def _roi_align_max(
    input: Tensor, boxes: Tensor, scale: float, height: int, width: int, *params: int
) -> tuple[Tensor, Tensor]:
    params = (0, *map(int, params), 0, 0)
    return frames.maximum(input, boxes, None, [height, width], params, scale)


# ---------------------------------------------------------------------------------------------
# Lists of points


def _of_lists(points: Tensor, align_corners: bool, images: int) -> Where:
    from ..crop import _bind_point_sample  # which needs the operators to exist

    name = "point_sample"
    check(
        points.dim() == 3 and points.shape[2] == 2,
        name,
        "points must be [N, P, 2] (x, y), got ",
        points.shape,
    )
    check(
        len(points) == images,
        name,
        f"expects points for each image, got {len(points)} lists of points and {images} images",
    )
    return _bind_point_sample(points, points.reshape(-1, 2), align_corners)[1]


def _points_sample(input: Tensor, points: Tensor, align_corners: bool) -> Tensor:
    check(input.dim() == 4, "point_sample", "input must be [N, C, H, W], got ", input.shape)
    values = separable.sample([input], _of_lists(points, align_corners, len(input)))
    # The channels of a point are neighbours.
    return values.reshape(*points.shape[:2], input.shape[1]).transpose(1, 2)


def _points_gradients(
    grad: Tensor,
    points: Tensor,
    input: Tensor | None,
    align_corners: bool,
    sizes: Sequence[int],
    channels_last: bool,
    to_input: bool,
) -> list[Tensor]:
    name = "point_sample"
    check(len(sizes) == 4, name, f"expects the sizes N, C, height, width, got {len(sizes)} numbers")
    where = _of_lists(points, align_corners, sizes[0])
    size = (sizes[0], sizes[1], points.shape[1])
    check(tuple(grad.shape) == size, name, f"the gradient must be {list(size)}, got ", grad.shape)
    cells = grad.transpose(1, 2).reshape(-1, sizes[1], 1, 1)
    gradients = []
    if to_input:
        gradients += separable.grad_features(cells, where, sizes, channels_last)
    if input is not None:
        gradients.append(separable.grad_boxes([input], cells, where).reshape(points.shape))
    return gradients


# ---------------------------------------------------------------------------------------------
# Registration

KERNELS: dict[str, Callable[..., Any]] = {
    "_points_sample": _points_sample,
    "_points_gradients": _points_gradients,
    "extract_glimpse": copies.extract_glimpse,
    "paste_masks": copies.paste_masks,
    "paste_masks_threshold": copies.paste_masks_threshold,
    "paste_masks_to_bits": copies.paste_masks_to_bits,
    "crop_batch": batch.crop_batch,
    "_paste_masks_runs": copies.paste_masks_runs,
    "_sample": _sample,
    "_sample_grad_features": _sample_grad_features,
    "_sample_grad_boxes": _sample_grad_boxes,
    "roi_align_rotated": _roi_align_rotated,
    "roi_align_max": _roi_align_max,
    "_frames_sample": frames.sample,
    "_frames_maximum": frames.maximum,
    "_frames_grad_features": frames.grad_features,
    "_frames_grad_boxes": frames.grad_boxes,
}
"""By operator; those of SAMPLERS are made by sampler_kernel."""

SAMPLERS = frozenset(
    {
        "roi_align",
        "multiscale_roi_align",
        "crop",
        "crop_and_resize",
        "point_sample",
        "subpixel_glimpse",
    }
)
"""Operators that are nothing but a place to sample at: they are implemented by what binds them."""

_registered: list[torch.library.Library] = []


def register() -> None:
    """Defines the operators, and implements those that stand for themselves."""
    library = torch.library.Library("glimpse_ext", "DEF")
    _registered.append(library)
    for schema in _schemas.SCHEMAS:
        library.define(schema)
    for name in _schemas.NAMES:
        if name not in SAMPLERS:
            implement(name, KERNELS.get(name) or _missing(name))


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        raise RuntimeError(
            f"{name}: is not there in plain PyTorch; it needs the compiled library, and "
            "glimpse-ext doctor says why that is not used"
        )

    return kernel


def implement(name: str, kernel: Callable[..., Any]) -> None:
    for key in ("CPU", "CUDA"):
        _registered[0].impl(name, kernel, key)


def sampler_kernel(
    name: str, bind: Callable[..., tuple[Sequence[Tensor], Where]]
) -> Callable[..., Tensor]:
    """Of an operator that samples at the place that its arguments are bound to."""

    def kernel(*args: Any) -> Tensor:
        features, where = bind(*args)
        return separable.sample(features, where, _NAMES_IN_ERRORS.get(name, ""))

    return kernel
