# SPDX-License-Identifier: BSD-3-Clause
"""The operators of this package as standard ONNX operators, for ``glimpse_ext.onnx``.

A function here has the arguments of its operator: tensors are values of the ONNX graph that is
being written, numbers are numbers. What samples once for each cell follows the idea of the whole
package: positions along each axis, in the order of operations of csrc/geometry/conventions.h, then
taps, then the weighted sum of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnxscript import opset18

from .onnx import NotTranslatable

Value = Any
"""A value of the ONNX graph."""

op: Any = opset18
_ops = torch.ops.glimpse_ext
_INT64, _FLOAT, _DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE


def _refuse(name: str, reason: str) -> NotTranslatable:
    return NotTranslatable(f"{name}: has no ONNX equivalent: {reason}")


def _known(name: str, *sizes: Any) -> None:
    if not all(isinstance(size, int) for size in sizes):
        raise _refuse(name, "its output size must be known when the model is exported")


# --------------------------------------------------------------------------------------- numbers


def _constant(number: float | Sequence[float], dtype: Any) -> Value:
    return op.Constant(value=ir.tensor(number, dtype=dtype))


def _integers(*numbers: int) -> Value:
    return _constant(list(numbers), _INT64)


def _coordinate_dtype(image: Value) -> Any:
    """Of coordinates and sums."""
    return _DOUBLE if image.dtype == _DOUBLE else _FLOAT


def _result(values: Value, image: Value) -> Value:
    """``values`` in the dtype that an operator returns for ``image``."""
    if image.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return op.Cast(values, to=image.dtype)
    return values


def _extent(tensor: Value, dimension: int) -> Value:
    """The size of a dimension, ``[1]``."""
    known = tensor.shape[dimension]
    if isinstance(known, int):
        return _integers(known)
    return op.Shape(tensor, start=dimension, end=dimension + 1)


def _range(count: Any) -> Value:
    """0, 1, ... of a number that is known or ``[1]``."""
    if isinstance(count, int):
        return _integers(*range(count))
    zero, one = _constant(0, _INT64), _constant(1, _INT64)
    return op.Range(zero, op.Squeeze(count), one)


def _column(rows: Value, column: int, dtype: Any) -> Value:
    """``[K, 1]`` of ``[K, columns]``."""
    return op.Cast(op.Slice(rows, _integers(column), _integers(column + 1), _integers(1)), to=dtype)


def _columns(rows: Value, first: int, last: int) -> Value:
    return op.Slice(rows, _integers(first), _integers(last), _integers(1))


def _finite(tensor: Value, dtype: Any) -> Value:
    return op.Less(op.Abs(tensor), _constant(float("inf"), dtype))


def _image_of_column(boxes: Value) -> Value:
    """The image of each box ``[K]``, truncated; -1 where that is none."""
    column = op.Squeeze(_column(boxes, 0, _FLOAT), _integers(1))
    none = _constant(-1.0, _FLOAT)
    some = op.And(op.Greater(column, none), _finite(column, _FLOAT))
    return op.Cast(op.Where(some, column, none), to=_INT64)


def _even_images(count: Value, images: Value) -> Value:
    """The image of each row ``[K]`` where all images have as many rows."""
    each = op.Max(op.Div(count, images), _integers(1))
    return op.Div(_range(count), each)


# ----------------------------------------------------------------------------------------- RoiAlign


def _pool(
    name: str,
    image: Value,
    index: Value,
    corners: Value,
    scale: float,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Value:
    """Standard RoiAlign, whose positions, border and adaptive numbers of samples are the same.

    ``half_pixel`` is ``aligned=True``; ``output_half_pixel`` adds no half pixel to the output
    either, in spite of its name.
    """
    _known(name, *size)
    dtype = _coordinate_dtype(image)
    corners = op.Cast(corners, to=dtype)
    # Runtimes may read the memory at a NaN or at an image that is not there. A box wholly outside
    # reads nothing.
    index = op.Cast(index, to=_INT64)
    there = op.And(op.GreaterOrEqual(index, _integers(0)), op.Less(index, _extent(image, 0)))
    finite = op.ReduceSum(op.Cast(_finite(corners, dtype), to=_INT64), _integers(1), keepdims=1)
    sound = op.And(op.Unsqueeze(there, _integers(1)), op.Equal(finite, _integers(4)))
    corners = op.Where(sound, corners, _constant(-3.0 / scale, dtype))
    index = op.Where(there, index, _integers(0))
    if dtype == _DOUBLE:
        # The attribute is a float32; one rounding of the product is what the operator has, too.
        corners, scale = op.Mul(corners, _constant(scale, dtype)), 1.0
    return op.RoiAlign(
        op.Cast(image, to=dtype),
        corners,
        index,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        mode="avg",
        output_height=size[0],
        output_width=size[1],
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=scale,
    )


def _roi_align(
    input: Value,
    boxes: Value,
    spatial_scale: float,
    pooled_height: Any,
    pooled_width: Any,
    sampling_ratio: int,
    aligned: bool,
) -> Value:
    index = _image_of_column(boxes)
    size = (pooled_height, pooled_width)
    corners = _columns(boxes, 1, 5)
    pooled = _pool("roi_align", input, index, corners, spatial_scale, size, sampling_ratio, aligned)
    return _result(pooled, input)


def _roi_align_max(
    input: Value,
    boxes: Value,
    spatial_scale: float,
    pooled_height: Any,
    pooled_width: Any,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Value, Value]:
    """Every sample as a cell of its own, then their maximum.

    ``RoiAlign(mode="max")`` is something else: the largest product of a pixel and its weight.
    """
    name = 'roi_align(mode="max")'
    _known(name, pooled_height, pooled_width)
    if sampling_ratio <= 0:
        raise _refuse(name, "with an adaptive number of samples; pass a positive sampling_ratio")
    index = _image_of_column(boxes)
    size = (pooled_height * sampling_ratio, pooled_width * sampling_ratio)
    samples = _pool(name, input, index, _columns(boxes, 1, 5), spatial_scale, size, 1, aligned)
    square = [sampling_ratio, sampling_ratio]
    largest, _ = op.MaxPool(samples, kernel_shape=square, strides=square)
    largest = _result(largest, input)
    # Which sample it was is what gradients need.
    nothing = ir.tensor([0], dtype=ir.DataType.INT32)
    return largest, op.ConstantOfShape(op.Shape(largest), value=nothing)


def _level_areas(
    scales: Sequence[float],
    canonical_size: float,
    canonical_level: int,
    assign: int,
    dtype: torch.dtype,
) -> list[float]:
    """The smallest area of a box that goes to level 1, 2, ...

    Found with the operator, by bisection over all numbers of ``dtype``, because its formula has a
    logarithm, whose last bit decides for boxes of which there are many: those of whole pixels.
    """
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    maps = [torch.full((1, 1, 1, 1), float(i), dtype=dtype) for i in range(len(scales))]

    def level(area: torch.Tensor) -> torch.Tensor:
        # The middle of the box is the edge of the only pixel.
        half, zero, one = area / 2, torch.zeros_like(area), torch.ones_like(area)
        boxes = torch.stack([zero, -half, zero, half, one], 1)
        rule = (canonical_size, canonical_level, assign)
        pooled: torch.Tensor = _ops.multiscale_roi_align.default(
            maps, boxes, None, 1, 1, list(scales), 1, True, *rule
        )
        return pooled.flatten()

    steps = torch.arange(1.0, len(scales), dtype=torch.float64)
    finest = int(-torch.tensor(scales[0], dtype=torch.float64).log2())
    middle = (canonical_size * 2.0 ** (steps + finest - canonical_level)).square().to(dtype)
    low, high = (middle * 0.9).view(bits), (middle * 1.1).view(bits)
    assert bool((level(low.view(dtype)) < steps).all())
    assert bool((level(high.view(dtype)) >= steps).all())
    while bool((high - low > 1).any()):
        between = low + (high - low) // 2
        reached = level(between.view(dtype)) >= steps
        low, high = torch.where(reached, low, between), torch.where(reached, between, high)
    return [float(area) for area in high.view(dtype)]


def _multiscale_roi_align(
    features: Any,
    boxes: Value,
    levels: Value,
    pooled_height: Any,
    pooled_width: Any,
    scales: Any,
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    assign: int,
) -> Value:
    """The boxes of each level are pooled on it, and their rows put back in order."""
    name = "multiscale_roi_align"
    size = (pooled_height, pooled_width)
    _known(name, *size)
    first = features[0]
    dtype = _coordinate_dtype(first)
    index = _image_of_column(boxes)
    corners = op.Cast(_columns(boxes, 1, 5), to=dtype)
    if levels is None and len(features) == 1:
        way = (scales[0], size, sampling_ratio, aligned)
        return _result(_pool(name, first, index, corners, *way), first)
    if levels is None:
        x1, y1, x2, y2 = (_column(corners, i, dtype) for i in range(4))
        area = op.Squeeze(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)), _integers(1))
        torch_dtype = torch.float64 if dtype == _DOUBLE else torch.float32
        areas = _level_areas(scales, canonical_size, canonical_level, assign, torch_dtype)
        # -1 where the area is negative or NaN.
        level = op.Sub(
            op.Cast(op.GreaterOrEqual(area, _constant(0.0, dtype)), to=_INT64), _integers(1)
        )
        for least in areas:
            larger = op.GreaterOrEqual(area, _constant(least, dtype))
            level = op.Add(level, op.Cast(larger, to=_INT64))
    else:
        level = op.Cast(levels, to=_INT64)
    rows, parts = [], []
    for i, image in enumerate(features):
        own = op.Squeeze(op.NonZero(op.Equal(level, _integers(i))), _integers(0))
        way = (scales[i], size, sampling_ratio, aligned)
        rows.append(own)
        parts.append(_pool(name, image, op.Gather(index, own), op.Gather(corners, own), *way))
    shape = op.Concat(_extent(boxes, 0), _extent(first, 1), _integers(*size), axis=0)
    pooled = op.ScatterND(
        op.Expand(_constant(0.0, dtype), shape),
        op.Unsqueeze(op.Concat(*rows, axis=0), _integers(1)),
        op.Concat(*parts, axis=0),
    )
    return _result(pooled, first)


# --------------------------------------------------------------------------- one sample at a time


class _Border(NamedTuple):
    """csrc/geometry/border.h."""

    reach: float | None
    """How far beyond the outer pixel centres a sample is kept; None: everywhere."""
    drops: bool = False
    """Whether pixels outside are zeros, and not those of the edge."""
    nearest: bool = False


_ZEROS, _EDGE, _ROI = _Border(1.0, drops=True), _Border(None), _Border(1.0)


class _Taps(NamedTuple):
    """Of the samples along one axis: whether they are kept, pixels, and their weights if any."""

    inside: Value
    pixels: list[Value]
    weights: list[Value]


def _taps(position: Value, size: Value, border: _Border, dtype: Any) -> _Taps:
    zero, one = _constant(0.0, dtype), _constant(1.0, dtype)
    last = op.Sub(op.Cast(op.Squeeze(size), to=dtype), one)
    if border.reach is None:
        inside = _finite(position, dtype)
    elif border.drops:
        inside = op.And(op.Greater(position, op.Neg(one)), op.Less(position, op.Add(last, one)))
    else:
        reach = _constant(border.reach, dtype)
        inside = op.And(
            op.GreaterOrEqual(position, op.Neg(reach)),
            op.LessOrEqual(position, op.Add(last, reach)),
        )
    position = op.Where(inside, position, zero)
    if not border.drops:
        position = op.Clip(position, zero, last)
    low = op.Floor(position)
    fraction = op.Sub(position, low)
    if border.nearest:
        # Halves away from zero.
        up = op.GreaterOrEqual(fraction, _constant(0.5, dtype))
        return _Taps(inside, [op.Cast(op.Add(low, op.Cast(up, to=dtype)), to=_INT64)], [])
    high = op.Add(low, one)
    weights = [op.Sub(one, fraction), fraction]
    if border.drops:
        weights = [
            op.Where(op.Less(low, zero), zero, weights[0]),
            op.Where(op.Greater(high, last), zero, weights[1]),
        ]
        low = op.Max(low, zero)
    high = op.Min(high, last)
    return _Taps(inside, [op.Cast(low, to=_INT64), op.Cast(high, to=_INT64)], weights)


def _weighted_sum(total: Value, weights: list[Value], i: int, value: Value) -> Value:
    """``total + weights[i] * value``; no total is 0, and no weights are ones."""
    term = op.Mul(op.Unsqueeze(weights[i], _integers(-1)), value) if weights else value
    return term if total is None else op.Add(total, term)


def _read(image: Value, index: Value, y: _Taps, x: _Taps, fill: float, dtype: Any) -> Value:
    """``[K, C, h, w]`` from taps ``[K, h, 1]`` and ``[K, 1, w]``, or both ``[K, h, w]``.

    Rows of images that are not there are ``fill``.
    """
    images, channels = _extent(image, 0), _extent(image, 1)
    height, width = _extent(image, 2), _extent(image, 3)
    pixels = op.Reshape(
        op.Transpose(image, perm=[0, 2, 3, 1]), op.Concat(_integers(-1), channels, axis=0)
    )
    there = op.And(op.GreaterOrEqual(index, _integers(0)), op.Less(index, images))
    first_row = op.Mul(op.Where(there, index, _integers(0)), height)
    first_row = op.Unsqueeze(first_row, _integers(1, 2))
    # Along x first, as csrc/paste_problem.h: whether a mask meets a threshold is a matter of bits.
    total = None
    for i, row in enumerate(y.pixels):
        start = op.Mul(op.Add(first_row, row), width)
        line = None
        for j, column in enumerate(x.pixels):
            pixel = op.Cast(op.Gather(pixels, op.Add(start, column)), to=dtype)
            line = _weighted_sum(line, x.weights, j, pixel)
        total = _weighted_sum(total, y.weights, i, line)
    inside = op.And(op.And(y.inside, x.inside), op.Unsqueeze(there, _integers(1, 2)))
    kept = op.Where(op.Unsqueeze(inside, _integers(-1)), total, _constant(fill, dtype))
    return op.Transpose(kept, perm=[0, 3, 1, 2])


def _sample(
    image: Value,
    index: Value,
    positions: tuple[Value, Value],
    border: _Border,
    dtype: Any,
    fill: float = 0.0,
) -> Value:
    """From positions along y ``[K, h]`` and x ``[K, w]``."""
    y = op.Unsqueeze(positions[0], _integers(2))
    x = op.Unsqueeze(positions[1], _integers(1))
    return _read(
        image,
        index,
        _taps(y, _extent(image, 2), border, dtype),
        _taps(x, _extent(image, 3), border, dtype),
        fill,
        dtype,
    )


_FRACTION, _NORMALIZED, _PIXELS = range(3)


def _box_positions(
    low: Value,
    high: Value,
    unit: int,
    align_corners: bool,
    size: Value,
    cells: int,
    dtype: Any,
) -> Value:
    """half_pixel_axis and corner_aligned_axis: ``[K, cells]`` from ``[K, 1]``."""
    half, one = _constant(0.5, dtype), _constant(1.0, dtype)
    pixels = one
    if unit != _PIXELS:
        pixels = op.Cast(size, to=dtype)
        pixels = op.Sub(pixels, one) if align_corners else pixels
    span = op.Sub(high, low)
    if unit == _NORMALIZED:
        pixels = op.Mul(pixels, half)
        low, high = op.Add(low, one), op.Add(high, one)
    if align_corners and cells == 1:
        return op.Mul(op.Mul(half, op.Add(low, high)), pixels)
    step = op.Div(op.Mul(span, pixels), _constant(float(cells - align_corners), dtype))
    along = op.Mul(_constant([float(i) for i in range(cells)], dtype), step)
    origin = op.Mul(low, pixels)
    if align_corners:
        return op.Add(origin, along)
    return op.Add(op.Add(op.Sub(origin, half), along), op.Mul(half, step))


def _crop(
    input: Value,
    boxes: Value,
    image_index: Value,
    height: Any,
    width: Any,
    unit: int,
    align_corners: bool,
    padding: int,
) -> Value:
    _known("crop", height, width)
    dtype = _coordinate_dtype(input)
    skip = boxes.shape[1] - 4
    if image_index is not None:
        index = op.Cast(image_index, to=_INT64)
    elif skip == 1:
        index = _image_of_column(boxes)
    else:
        index = _even_images(_extent(boxes, 0), _extent(input, 0))
    x1, y1, x2, y2 = (_column(boxes, skip + i, dtype) for i in range(4))
    y = _box_positions(y1, y2, unit, align_corners, _extent(input, 2), height, dtype)
    x = _box_positions(x1, x2, unit, align_corners, _extent(input, 3), width, dtype)
    values = _sample(input, index, (y, x), _EDGE if padding == 1 else _ZEROS, dtype)
    return _result(values, input)


def _crop_and_resize(
    image: Value,
    boxes: Value,
    box_indices: Value,
    height: Any,
    width: Any,
    align_corners: bool,
    nearest: bool,
    extrapolation_value: float,
) -> Value:
    _known("crop_and_resize", height, width)
    dtype = _coordinate_dtype(image)
    # TensorFlow places samples in float32, also on images of float64.
    place = _FLOAT if align_corners and boxes.dtype != _DOUBLE else dtype
    y1, x1, y2, x2 = (_column(boxes, i, place) for i in range(4))
    y = _box_positions(y1, y2, _FRACTION, align_corners, _extent(image, 2), height, place)
    x = _box_positions(x1, x2, _FRACTION, align_corners, _extent(image, 3), width, place)
    positions = (op.Cast(y, to=dtype), op.Cast(x, to=dtype))
    border = _Border(0.0 if align_corners else 0.5, nearest=nearest)
    index = op.Cast(box_indices, to=_INT64)
    return _sample(image, index, positions, border, dtype, extrapolation_value)


def _point_sample(input: Value, points: Value, align_corners: bool) -> Value:
    dtype = _coordinate_dtype(input)
    index = _even_images(_extent(points, 0), _extent(input, 0))
    x, y = (_column(points, i, dtype) for i in range(2))
    y = _box_positions(y, y, _FRACTION, align_corners, _extent(input, 2), 1, dtype)
    x = _box_positions(x, x, _FRACTION, align_corners, _extent(input, 3), 1, dtype)
    return _result(_sample(input, index, (y, x), _ZEROS, dtype), input)


# ---------------------------------------------------------------------------------------- glimpses


def _glimpse_origin(
    offset: Value,
    version: int,
    centered: bool,
    normalized: bool,
    size: Value,
    extent: int,
    dtype: Any,
) -> Value:
    """glimpse_origin: the first pixel of each window, ``[N, 1]``."""
    two = _constant(2.0, dtype)
    pixels = op.Cast(size, to=dtype)
    origin = op.Mul(offset, pixels) if normalized else offset
    if centered:
        if normalized or version == 1:
            origin = op.Div(origin, two)
        origin = op.Add(origin, op.Div(pixels, two))
    if version == 1 or (normalized and centered):
        origin = op.Sub(origin, _constant(extent / 2, dtype))
    return origin


def _extract_glimpse(
    input: Value,
    offsets: Value,
    seed: Value,
    height: Any,
    width: Any,
    version: int,
    centered: bool,
    normalized: bool,
    noise: int,
) -> Value:
    """Copies: a single tap, of any dtype."""
    name = "extract_glimpse"
    _known(name, height, width)
    if noise != 0:
        raise _refuse(name, 'it draws random numbers; use noise="zero"')
    dtype = _DOUBLE if offsets.dtype == _DOUBLE else _FLOAT
    # Larger than any image, and small enough to be added to.
    far = _constant(2.0**40, dtype)
    taps = []
    for axis, extent in enumerate((height, width)):
        size = _extent(input, 2 + axis)
        origin = _glimpse_origin(
            _column(offsets, axis, dtype), version, centered, normalized, size, extent, dtype
        )
        near = op.Less(op.Abs(origin), far)
        # A conversion truncates toward zero.
        first = op.Cast(op.Where(near, origin, far), to=_INT64)
        pixel = op.Unsqueeze(op.Add(first, _range(extent)), _integers(2 - axis))
        last = op.Sub(size, _integers(1))
        inside = op.And(op.GreaterOrEqual(pixel, _integers(0)), op.LessOrEqual(pixel, last))
        taps.append(_Taps(inside, [op.Where(inside, pixel, _integers(0))], []))
    # Runtimes choose between numbers of few types; these hold all others exactly.
    wide = input.dtype
    if wide in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        wide = _FLOAT
    elif wide not in (_FLOAT, _DOUBLE, _INT64, ir.DataType.UINT8):
        wide = ir.DataType.INT32
    copied = _read(input, _range(_extent(input, 0)), taps[0], taps[1], 0, wide)
    return copied if wide == input.dtype else op.Cast(copied, to=input.dtype)


def _mean_of_squares(values: Value, side: int) -> Value:
    if side == 1:
        return values
    return op.AveragePool(values, kernel_shape=[side, side], strides=[side, side])


def _subpixel_glimpse(
    input: Value,
    offsets: Value,
    height: Any,
    width: Any,
    version: int,
    centered: bool,
    normalized: bool,
    scale: int,
) -> Value:
    name = 'extract_glimpse(mode="subpixel")'
    _known(name, height, width)
    if scale <= 0:
        raise _refuse(name, "of several scales in one call; call it once for each scale")
    dtype = _coordinate_dtype(input)
    positions = []
    for axis, cells in enumerate((height, width)):
        extent = cells * scale
        origin = _glimpse_origin(
            _column(offsets, axis, dtype),
            version,
            centered,
            normalized,
            _extent(input, 2 + axis),
            extent,
            dtype,
        )
        positions.append(op.Add(origin, op.Cast(_range(extent), to=dtype)))
    index = _range(_extent(input, 0))
    values = _sample(input, index, (positions[0], positions[1]), _ZEROS, dtype)
    return _result(_mean_of_squares(values, scale), input)


# -------------------------------------------------------------------------------------------- masks


def _paste_positions(low: Value, high: Value, mask: Value, pixels: Any, dtype: Any) -> Value:
    """paste_axis, counted from the pixel of paste_anchor: ``[N, pixels]`` from ``[N, 1]``."""
    half, zero = _constant(0.5, dtype), _constant(0.0, dtype)
    pixel = op.Cast(_range(pixels), to=dtype)
    count = (
        _constant(float(pixels), dtype) if isinstance(pixels, int) else op.Cast(pixels, to=dtype)
    )
    held = op.And(op.Greater(low, zero), op.Less(low, count))
    anchor = op.Where(held, op.Floor(low), zero)
    low, high = op.Sub(low, anchor), op.Sub(high, anchor)
    step = op.Div(op.Cast(mask, to=dtype), op.Sub(high, low))
    origin = op.Sub(op.Mul(op.Sub(half, low), step), half)
    # An axis that is not finite reads nothing.
    sound = op.And(_finite(origin, dtype), _finite(step, dtype))
    step = op.Where(sound, step, zero)
    origin = op.Where(sound, origin, _constant(-2.0, dtype))
    return op.Add(origin, op.Mul(op.Sub(pixel, anchor), step))


def _pasted(masks: Value, boxes: Value, height: Any, width: Any, snapped: bool) -> Value:
    """``[N, 1, height, width]``, not rounded to the dtype of the masks."""
    if snapped:
        raise _refuse(
            'paste_masks(method="torchvision")',
            "it rounds boxes to whole pixels of any size; use detectron2's method, or paste what "
            "the model returns",
        )
    dtype = _coordinate_dtype(masks)
    x1, y1, x2, y2 = (_column(boxes, i, dtype) for i in range(4))
    y = _paste_positions(y1, y2, _extent(masks, 2), height, dtype)
    x = _paste_positions(x1, x2, _extent(masks, 3), width, dtype)
    return _sample(masks, _range(_extent(masks, 0)), (y, x), _ZEROS, dtype)


def _paste_masks(masks: Value, boxes: Value, height: Any, width: Any, snapped: bool) -> Value:
    return _result(_pasted(masks, boxes, height, width, snapped), masks)


def _paste_masks_threshold(
    masks: Value, boxes: Value, height: Any, width: Any, threshold: float, snapped: bool
) -> Value:
    dtype = _coordinate_dtype(masks)
    values = _pasted(masks, boxes, height, width, snapped)
    if threshold >= 0:
        return op.GreaterOrEqual(values, _constant(threshold, dtype))
    most = _constant(255.0, dtype)
    scaled = op.Clip(op.Mul(values, most), _constant(0.0, dtype), most)
    return op.Cast(scaled, to=ir.DataType.UINT8)


# ----------------------------------------------------------------------------------- rotated boxes


def _rotated_positions(
    length: Value, scale: float, at_least_one: bool, cells: int, ratio: int, dtype: Any
) -> Value:
    """rotated_axis: local positions ``[K, cells * ratio]`` from ``[K, 1]``."""
    one = _constant(1.0, dtype)
    extent = op.Mul(length, _constant(scale, dtype))
    if at_least_one:
        extent = op.Where(op.Less(extent, one), one, extent)
    step = op.Div(extent, _constant(float(cells), dtype))
    origin = op.Neg(op.Div(extent, _constant(2.0, dtype)))
    numbers = range(cells * ratio)
    cell = _constant([float(i // ratio) for i in numbers], dtype)
    along = _constant([i % ratio + 0.5 for i in numbers], dtype)
    within = op.Div(op.Mul(along, step), _constant(float(ratio), dtype))
    return op.Add(op.Add(origin, op.Mul(cell, step)), within)


def _roi_align_rotated(
    input: Value,
    boxes: Value,
    spatial_scale: float,
    pooled_height: Any,
    pooled_width: Any,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
    degrees: bool,
) -> Value:
    name = "roi_align_rotated"
    _known(name, pooled_height, pooled_width)
    if sampling_ratio <= 0:
        raise _refuse(name, "with an adaptive number of samples; pass a positive sampling_ratio")
    dtype = _coordinate_dtype(input)
    index = _image_of_column(boxes)
    x, y, width, height = (_column(boxes, i, dtype) for i in range(1, 5))
    scale, offset = _constant(spatial_scale, dtype), _constant(0.5 if aligned else 0.0, dtype)
    centre_y = op.Sub(op.Mul(y, scale), offset)
    centre_x = op.Sub(op.Mul(x, scale), offset)
    quarter = 90.0 if degrees else torch.pi / 2
    angle = _column(boxes, 5, _DOUBLE)
    # A float does not say where an angle of millions of turns points.
    sound = op.LessOrEqual(op.Abs(angle), _constant(2.0**20 * quarter, _DOUBLE))
    angle = op.Where(sound, angle, _constant(float("nan"), _DOUBLE))
    if degrees:
        angle = op.Mul(angle, _constant(torch.pi / 180, _DOUBLE))
    cosine = op.Unsqueeze(op.Cast(op.Cos(angle), to=dtype), _integers(2))
    sine = op.Sin(op.Neg(angle) if clockwise else angle)
    sine = op.Unsqueeze(op.Cast(sine, to=dtype), _integers(2))

    shape = (spatial_scale, not aligned)
    along_y = _rotated_positions(height, *shape, pooled_height, sampling_ratio, dtype)
    along_x = _rotated_positions(width, *shape, pooled_width, sampling_ratio, dtype)
    local_y, local_x = op.Unsqueeze(along_y, _integers(2)), op.Unsqueeze(along_x, _integers(1))
    turned_y = op.Sub(op.Mul(local_y, cosine), op.Mul(local_x, sine))
    turned_x = op.Add(op.Mul(local_y, sine), op.Mul(local_x, cosine))
    at_y = op.Add(turned_y, op.Unsqueeze(centre_y, _integers(2)))
    at_x = op.Add(turned_x, op.Unsqueeze(centre_x, _integers(2)))
    taps_y = _taps(at_y, _extent(input, 2), _ROI, dtype)
    taps_x = _taps(at_x, _extent(input, 3), _ROI, dtype)
    values = _read(input, index, taps_y, taps_x, 0.0, dtype)
    return _result(_mean_of_squares(values, sampling_ratio), input)


# ----------------------------------------------------------------------------------------- refusals


def _refuses(name: str, reason: str) -> Callable[..., Any]:
    def refuse(*args: Any, **options: Any) -> Any:
        raise _refuse(name, reason)

    return refuse


_DERIVATIVE = "it belongs to a derivative, and ONNX models hold values; export a forward pass"

TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _ops.roi_align.default: _roi_align,
    _ops.roi_align_max.default: _roi_align_max,
    _ops.multiscale_roi_align.default: _multiscale_roi_align,
    _ops.roi_align_rotated.default: _roi_align_rotated,
    _ops.crop.default: _crop,
    _ops.crop_and_resize.default: _crop_and_resize,
    _ops.point_sample.default: _point_sample,
    _ops.extract_glimpse.default: _extract_glimpse,
    _ops.subpixel_glimpse.default: _subpixel_glimpse,
    _ops.paste_masks.default: _paste_masks,
    _ops.paste_masks_threshold.default: _paste_masks_threshold,
    _ops._paste_masks_runs.default: _refuses(
        "paste_masks_to_rle", "run lengths are bytes; encode what the model returns"
    ),
    _ops.paste_masks_to_bits.default: _refuses(
        "paste_masks_to_bits", "export paste_masks, and pack the bool images that the model returns"
    ),
    _ops.crop_batch.default: _refuses(
        "crop_batch",
        "how many pixels a cell weighs depends on its box; export a model that takes the crops",
    ),
    # How extract_glimpse draws its seeds: met before the operator itself.
    torch.ops.aten.randint.generator: _refuses(
        "randint", 'random numbers, as for the noise of extract_glimpse; use noise="zero"'
    ),
    _ops._points_sample.default: _refuses(
        "_points_sample", "it is point_sample outside of graphs; call glimpse_ext.point_sample"
    ),
    **{
        getattr(_ops, name).default: _refuses(name, _DERIVATIVE)
        for name in (
            "_sample",
            "_sample_grad_features",
            "_sample_grad_boxes",
            "_frames_sample",
            "_frames_maximum",
            "_frames_grad_features",
            "_frames_grad_boxes",
            "_points_gradients",
        )
    },
}
