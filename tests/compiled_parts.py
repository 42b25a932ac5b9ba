# SPDX-License-Identifier: BSD-3-Clause
"""Stand-ins for the compiled parts of detectron2 and mmcv, in plain PyTorch.

Both are hard to build for a given torch, and mmcv cannot even be imported without. What is tested
is how their Python calls what is replaced, so their Python is the real one; the few compiled
functions that it reaches are these, which read one sample after the other as the originals do and
share no code with this package. Where the real compiled part is installed it is used.
"""

from __future__ import annotations

import importlib
import math
import sys
import types

import torch


def _read(image, y, x):
    """Bilinear values ``[C, ...]`` of an image ``[C, H, W]`` at index positions."""
    height, width = image.shape[1:]
    outside = (y < -1) | (y > height) | (x < -1) | (x > width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, along = y - top, x - left
    upper = image[:, top, left] * (1 - along) + image[:, top, right] * along
    lower = image[:, bottom, left] * (1 - along) + image[:, bottom, right] * along
    return torch.where(outside, 0.0, upper * (1 - down) + lower * down)


def _samples(start, length, cells, ratio):
    """Positions ``[cells, samples]`` along one side of a box."""
    count = ratio if ratio > 0 else math.ceil(float(length) / cells)
    step = length / cells
    within = (torch.arange(count, dtype=torch.float64) + 0.5) * step / max(count, 1)
    return start + torch.arange(cells, dtype=torch.float64)[:, None] * step + within


def _meshed(y, x):
    """Of two sides: ``[cells of y, cells of x, samples]`` each."""
    shape = (y.shape[0], x.shape[0], y.shape[1], x.shape[1])
    y, x = y[:, None, :, None].expand(shape), x[None, :, None, :].expand(shape)
    return y.flatten(2), x.flatten(2)


def _box(roi, size, scale, ratio, aligned):
    x1, y1, x2, y2 = roi.double() * scale - (0.5 if aligned else 0.0)
    width, height = x2 - x1, y2 - y1
    if aligned:
        assert width >= 0
        assert height >= 0
    else:
        width, height = width.clamp(min=1), height.clamp(min=1)
    return _meshed(_samples(y1, height, size[0], ratio), _samples(x1, width, size[1], ratio))


def _rotated_box(roi, size, scale, ratio, aligned):
    x, y, width, height = roi[:4].double() * scale
    angle = roi[4].double()
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    shift = 0.5 if aligned else 0.0
    along_y, along_x = _meshed(
        _samples(-height / 2, height, size[0], ratio), _samples(-width / 2, width, size[1], ratio)
    )
    cosine, sine = angle.cos(), angle.sin()
    return (
        along_y * cosine - along_x * sine + y - shift,
        along_y * sine + along_x * cosine + x - shift,
    )


def _mean(values):
    return values.sum(-1) / max(values.shape[-1], 1)


def _pool(input, rois, box, *place):
    """Means of samples, as a function of maps that autograd can follow."""
    rows = [
        _mean(_read(input[int(roi[0])], *(p.to(input.dtype) for p in box(roi[1:], *place))))
        for roi in rois
    ]
    return torch.stack(rows) if rows else input.new_zeros(0, input.shape[1], *place[0])


def _into(grad_input, grad, pool):
    """The gradient of what is linear in its maps."""
    maps = torch.zeros_like(grad_input).requires_grad_()
    with torch.enable_grad():
        pooled = pool(maps)
    if pooled.requires_grad:
        grad_input.copy_(torch.autograd.grad(pooled, maps, grad)[0])


class Extension(types.ModuleType):
    """Has every function that an import looks for; those that are not above raise."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"{name} has no stand-in")

        return missing


# -------------------------------------------------------------------------------------------- mmcv


def _roi_align_forward(
    input,
    rois,
    output,
    argmax_y,
    argmax_x,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    place = ((aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
    if pool_mode == 1:
        output.copy_(_pool(input, rois, _box, *place))
        return
    for index, roi in enumerate(rois):
        y, x = (p.to(input.dtype) for p in _box(roi[1:], *place))
        values, winner = _read(input[int(roi[0])], y, x).max(-1)
        output[index] = values
        channels = input.shape[1]
        for positions, kept in ((y, argmax_y), (x, argmax_x)):
            all_channels = positions.expand(channels, *positions.shape)
            kept[index] = all_channels.gather(-1, winner.unsqueeze(-1)).squeeze(-1)


def _roi_align_backward(
    grad_output,
    rois,
    argmax_y,
    argmax_x,
    grad_input,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    def largest(maps):
        rows = []
        for roi, y, x in zip(rois, argmax_y, argmax_x, strict=True):
            channels = [
                _read(channel[None], *at)[0]
                for channel, *at in zip(maps[int(roi[0])], y, x, strict=True)
            ]
            rows.append(torch.stack(channels))
        return torch.stack(rows)

    place = ((aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
    mean = pool_mode == 1
    _into(grad_input, grad_output, lambda m: _pool(m, rois, _box, *place) if mean else largest(m))


def _turned(rois, clockwise):
    return torch.cat([rois[:, :5], -rois[:, 5:] if clockwise else rois[:, 5:]], 1)


def _rotated_forward(
    input,
    rois,
    output,
    pooled_height,
    pooled_width,
    spatial_scale,
    sampling_ratio,
    aligned,
    clockwise,
):
    place = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned)
    output.copy_(_pool(input, _turned(rois, clockwise), _rotated_box, *place))


def _rotated_backward(
    top_grad,
    rois,
    bottom_grad,
    pooled_height,
    pooled_width,
    spatial_scale,
    sampling_ratio,
    aligned,
    clockwise,
):
    place = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned)
    turned = _turned(rois, clockwise)
    _into(bottom_grad, top_grad, lambda maps: _pool(maps, turned, _rotated_box, *place))


def complete_mmcv() -> bool:
    """Gives mmcv a compiled part if it has none. Returns whether that was so."""
    try:
        importlib.import_module("mmcv._ext")
    except ImportError:
        extension = Extension("mmcv._ext")
        extension.roi_align_forward = _roi_align_forward
        extension.roi_align_backward = _roi_align_backward
        extension.roi_align_rotated_forward = _rotated_forward
        extension.roi_align_rotated_backward = _rotated_backward
        sys.modules["mmcv._ext"] = extension
        return True
    return False


# -------------------------------------------------------------------------------------- detectron2


def _in_radians(rois):
    return torch.cat([rois[:, :5], rois[:, 5:] * (math.pi / 180)], 1)


def _degrees_forward(
    input: torch.Tensor,
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
) -> torch.Tensor:
    place = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, True)
    return _pool(input, _in_radians(rois), _rotated_box, *place)


def _degrees_backward(
    grad: torch.Tensor,
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
) -> torch.Tensor:
    place = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, True)
    into = grad.new_zeros(batch_size, channels, height, width)
    _into(into, grad, lambda maps: _pool(maps, _in_radians(rois), _rotated_box, *place))
    return into


_operators = torch.library.Library("detectron2", "FRAGMENT")


def complete_detectron2() -> bool:
    """Gives detectron2 a compiled part if it has none. Returns whether that was so."""
    detectron2 = importlib.import_module("detectron2")
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        # Older releases call the module, newer ones the operators that it registers.
        extension = Extension("detectron2._C")
        extension.roi_align_rotated_forward = _degrees_forward
        extension.roi_align_rotated_backward = _degrees_backward
        sys.modules["detectron2._C"] = detectron2._C = extension
        # Under autograd, which the backward uses for itself.
        more = "float spatial_scale, int pooled_height, int pooled_width"
        size = "int batch_size, int channels, int height, int width"
        for name, function, arguments in (
            ("forward", _degrees_forward, f"{more}, int sampling_ratio"),
            ("backward", _degrees_backward, f"{more}, {size}, int sampling_ratio"),
        ):
            full = f"roi_align_rotated_{name}"
            _operators.define(f"{full}(Tensor input, Tensor rois, {arguments}) -> Tensor")
            _operators.impl(full, function, "CompositeImplicitAutograd")
        return True
    return False
