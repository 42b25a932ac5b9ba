# SPDX-License-Identifier: BSD-3-Clause
"""The three applications of tables (csrc/backend.h) in plain PyTorch: out = Ay · features · Axᵀ.

The rows of both axes of all boxes are lists of taps. A pair of taps, one along y and one along x,
is an entry of a sparse matrix from pixels to cells, and everything here is a product with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._sampling import Where, X, Y, is_channels_last
from . import geometry
from .checks import (
    check,
    check_boxes,
    check_features,
    check_gradient,
    check_index,
    check_output_size,
    check_pooled,
    check_same_device,
    check_tangent,
    images_of,
)
from .filters import FilterRule, filter_taps
from .geometry import Axis, Border

# Numbers that are gathered at a time.
AT_ONCE = 1 << 22

AxisOf = Callable[[Tensor, Tensor, float, int, int], Axis]
"""lo, hi, spatial scale, pixels, cells."""


class Operator(NamedTuple):
    """operators.h."""

    name: str
    columns: str
    even: bool
    border: Border
    axis: AxisOf
    filter: FilterRule | None = None
    """Where cells weigh pixels: Note [Filters]."""


def _roi_align(params: Sequence[float], name: str) -> Operator:
    check(len(params) == 2, name, f"expects 2 parameters, got {len(params)}")
    ratio, aligned = int(params[0]), params[1] != 0
    check(ratio <= geometry.MAX_SAMPLES, name, f"sampling_ratio must fit in 31 bits, got {ratio}")

    def axis(lo: Tensor, hi: Tensor, scale: float, size: int, cells: int) -> Axis:
        return geometry.roi_align_axis(lo, hi, scale, aligned, ratio, cells)

    return Operator(name, "x1, y1, x2, y2", False, Border(1.0, geometry.CLAMP), axis)


_CROPS = (
    ("crop", "x1, y1, x2, y2"),
    ("crop_and_resize", "y1, x1, y2, x2"),
    ("point_sample", "x, y"),
)


def _crop(params: Sequence[float], name: str) -> Operator:
    check(len(params) == 6, name, f"expects 6 parameters, got {len(params)}")
    order, unit, corners, outside, nearest, single = map(int, params)
    name, columns = _CROPS[order] if order in range(len(_CROPS)) else _CROPS[0]
    check(order in range(len(_CROPS)), name, f"does not know box order {order}")
    check(outside in range(3), name, f"does not know padding {outside}")
    check(unit in range(3), name, f"does not know unit {unit}")
    exact = geometry.NEAREST if nearest else geometry.EXACT
    covered = geometry.NEAREST if nearest else geometry.CLAMP
    border = (
        Border(1.0, geometry.DROP),
        Border(torch.inf, geometry.CLAMP),
        Border(0.0, exact) if corners else Border(0.5, covered),
    )[outside]
    make = geometry.corner_aligned_axis if corners else geometry.half_pixel_axis

    def axis(lo: Tensor, hi: Tensor, scale: float, size: int, cells: int) -> Axis:
        if single:
            lo, hi = lo.float(), hi.float()
        return make(lo, hi, unit, size, cells)

    return Operator(name, columns, True, border, axis)


def glimpse_rule(
    name: str, version: float, centered: float, normalized: float
) -> geometry.GlimpseRule:
    check(version in (1, 2), name, f"version must be 1 or 2, got {int(version)}")
    return geometry.GlimpseRule(int(version), centered != 0, normalized != 0)


def _glimpse(params: Sequence[float], name: str) -> Operator:
    check(len(params) == 5, name, f"expects 5 parameters, got {len(params)}")
    rule = glimpse_rule(name, *params[:3])
    scale, whole = int(params[3]), int(params[4])
    check(0 <= scale <= 0xFFFF, name, f"scales must be from 1 to 65535, got {scale}")
    check(whole in range(3), name, f"does not know whole origins {whole}")
    check(whole == 0 or scale == 1, name, f"whole origins have a scale of 1, got {scale}")

    def axis(lo: Tensor, hi: Tensor, _: float, size: int, cells: int) -> Axis:
        if whole:
            return geometry.whole_glimpse_axis(lo, rule, whole == 2, size, cells)
        pixels = torch.full_like(lo, scale) if scale else hi.ceil()
        pixels = torch.where((pixels > 0) & (pixels < 2.0**31), pixels, 0).to(torch.int64)
        return geometry.glimpse_axis(lo, rule, pixels, size, cells)

    # A whole position reads its own pixel only: no neighbour enters, not even with a weight of 0.
    border = Border(0.0, geometry.EXACT) if whole else Border(1.0, geometry.DROP)
    return Operator(name, "y, x" if scale else "y, x, scale", True, border, axis)


def _given_axes(params: Sequence[float], name: str) -> Operator:
    def axis(lo: Tensor, hi: Tensor, scale: float, size: int, cells: int) -> Axis:
        return geometry.given_axis(lo, hi)

    columns = "origin y, origin x, step y, step x"
    return Operator(name, columns, True, Border(1.0, geometry.DROP), axis)


CROP_BATCH = 100
"""A crop with a filter, as the generic operators call it."""


def _crop_batch(params: Sequence[float], name: str) -> Operator:
    check(len(params) == 3, name, f"expects 3 parameters, got {len(params)}")
    antialias, beyond, edge = (param != 0 for param in params)
    op = _crop((0, geometry.PIXELS, 0, 0, 0, 0), name)
    return op._replace(name=name, filter=FilterRule(antialias, beyond, edge))


_OPERATORS = {
    0: ("roi_align", _roi_align),
    1: ("crop", _crop),
    2: ("extract_glimpse", _glimpse),
    3: ("paste_masks", _given_axes),
    CROP_BATCH: ("crop_batch", _crop_batch),
}


def operator_of(where: Where, name: str = "") -> Operator:
    """The operator of a call; ``name`` stands in errors where it is not that of the kind."""
    kind = where.sampler.op
    check(kind in _OPERATORS, "_sample", f"does not know operator kind {kind}")
    of_kind, make = _OPERATORS[kind]
    return make(where.sampler.params, name or of_kind)


# ---------------------------------------------------------------------------------------------
# A call


class Rows(NamedTuple):
    """Merged taps of one axis of all boxes, in the order of boxes, cells, pixels."""

    box: Tensor
    cell: Tensor
    pixel: Tensor
    used: Tensor
    """The weight, or its derivative along the tangent."""
    slope_origin: Tensor
    slope_step: Tensor
    counts: Tensor
    """Of each box, ``[K]``."""
    coverage: Tensor | None = None
    """FilterTaps.coverage, where there is a filter."""


Motion = tuple[Tensor, Tensor] | None
"""Of the origin and of the step of the axis of each box."""


def _filter_rows(
    rule: FilterRule,
    edges: tuple[Tensor, Tensor],
    motion: Motion,
    size: int,
    cells: int,
    dtype: torch.dtype,
) -> Rows:
    taps = filter_taps(rule, *edges, size, cells)
    used, slope_origin, slope_step = (v.to(dtype) for v in taps[3:6])
    if motion is not None:
        origin, step = (v[taps.box] for v in motion)
        used = slope_origin * origin + slope_step * step
    count = torch.bincount(taps.box, minlength=len(edges[0]))
    coverage = taps.coverage.to(dtype)
    return Rows(*taps[:3], used, slope_origin, slope_step, count, coverage)


def _rows(
    axis: Axis,
    motion: Motion,
    op: Operator,
    size: int,
    cells: int,
    dtype: torch.dtype,
) -> Rows:
    bound = torch.full_like(axis.origin, op.border.reach)
    samples = geometry.samples_within(axis, cells, -bound, size - 1 + bound)
    position = axis.position(*samples[:3]).to(dtype)
    taps = geometry.border_taps(op.border, position, size)
    progress = axis.progress(*samples[:3]).to(dtype)[:, None]
    used = taps.weight
    if motion is not None:
        origin, step = (v[samples.box][:, None] for v in motion)
        used = taps.slope * (origin + progress * step)
    numbers = torch.stack([used, taps.slope, taps.slope * progress], 2)[taps.there]
    row = (samples.box * cells + samples.cell)[:, None] * size + taps.pixel
    # Taps of a cell that hit the same pixel merge into one.
    key, index = torch.unique(row[taps.there], return_inverse=True)
    merged = numbers.new_zeros(len(key), 3).index_add_(0, index, numbers)
    box = key // max(size * cells, 1)
    factor = 1 / axis.samples.clamp(min=1).to(dtype)
    merged = merged * factor[box][:, None]
    count = torch.bincount(box, minlength=len(axis.origin))
    weight, slope_origin, slope_step = merged.unbind(1)
    cell, pixel = key // size % max(cells, 1), key % size
    return Rows(box, cell, pixel, weight, slope_origin, slope_step, count)


class Level(NamedTuple):
    """The boxes of one map and their rows."""

    boxes: Tensor
    image: Tensor
    axes: tuple[Axis, Axis]
    rows: tuple[Rows, Rows]
    size: tuple[int, int]

    def entries(self, cells: tuple[int, int], at_once: int) -> Iterator[Entries]:
        height, width = self.size
        y, x = self.rows
        for box, i, j in geometry.pairs(y.counts, x.counts, at_once):
            cell = (self.boxes[box] * cells[0] + y.cell[i]) * cells[1] + x.cell[j]
            pixel = (self.image[box] * height + y.pixel[i]) * width + x.pixel[j]
            yield Entries(box, cell, pixel, i, j)


class Entries(NamedTuple):
    """Entries of the matrix: flat cells and pixels, and the rows that their weights are of."""

    box: Tensor
    cell: Tensor
    pixel: Tensor
    y: Tensor
    x: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pooled_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype


class Call:
    """A call as all three applications see it."""

    def __init__(
        self,
        op: Operator,
        where: Where,
        like: Tensor,
        images: int,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        name, sampler, boxes = op.name, where.sampler, where.boxes
        check_boxes(name, boxes, where.image_index, op.columns, op.even, like)
        if where.levels is not None:
            check_index(name, "levels", where.levels, len(boxes), like)
        check_tangent(name, where.tangent, boxes, like)
        rule = sampler.level_rule
        check(
            len(rule) in (0, 3),
            name,
            "expects a level rule of 3 numbers (kind, canonical size, canonical level), got "
            f"{len(rule)}",
        )
        if rule:
            check(rule[0] in (0, 1), name, f"does not know level rule {int(rule[0])}")
            check(len(sampler.scales) > 0, name, "expects at least one scale, got none")
            for scale in sampler.scales:
                check(0 < scale < 1e30, name, f"scales must be positive, got {scale:g}")
        elif where.levels is None:
            check(
                len(sampler.scales) == 1,
                name,
                "expects a level rule or levels where there are several feature maps",
            )
        check(
            len(sampler.scales) == len(sizes),
            name,
            f"expects one scale for each feature map, got {len(sampler.scales)} scales and "
            f"{len(sizes)} maps",
        )
        self.op, self.where = op, where
        self.cells = check_output_size(name, sampler.output_size)
        self.dtype = compute_dtype(like.dtype)
        self.skip = boxes.shape[1] - (op.columns.count(",") + 1)
        numbers = boxes.to(self.dtype)
        width = boxes.shape[1] - self.skip
        check(where.axes == 0 or where.tangent is not None, name, "tangent axes need a tangent")
        image, valid = images_of(name, numbers, where.image_index, width, images)
        self.levels = list(self._levels(numbers, image, valid, sizes))

    def _levels(
        self, boxes: Tensor, image: Tensor, valid: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Level]:
        where, sampler = self.where, self.where.sampler
        if where.levels is not None:
            level = where.levels.to(torch.int64)
        elif len(sizes) == 1:
            level = torch.zeros_like(image)
        else:
            kind, canonical, middle = sampler.level_rule
            assign = ("torchvision", "detectron2")[int(kind)]
            level = reference.assign_levels(boxes, sampler.scales, canonical, int(middle), assign)
        for number, (size, scale) in enumerate(zip(sizes, sampler.scales, strict=True)):
            mine = (valid & (level == number)).nonzero().flatten()
            if 0 in size:
                mine = mine[:0]
            axes = tuple(self._axis(boxes[mine], d, scale, size[d]) for d in (0, 1))
            rows = tuple(self._row(axes[d], boxes[mine], mine, d, size[d]) for d in (0, 1))
            yield Level(mine, image[mine], (axes[0], axes[1]), (rows[0], rows[1]), size)

    def columns(self, direction: int) -> tuple[int, int]:
        columns = self.where.sampler.columns
        lo, hi = columns.y if direction == 0 else columns.x
        return self.skip + lo, self.skip + hi

    def _axis(self, boxes: Tensor, direction: int, scale: float, size: int) -> Axis:
        lo, hi = self.columns(direction)
        return self.op.axis(boxes[:, lo], boxes[:, hi], scale, size, self.cells[direction])

    def _row(self, axis: Axis, boxes: Tensor, mine: Tensor, direction: int, size: int) -> Rows:
        lo, hi = self.columns(direction)
        motion = None
        if self.where.axes & (Y, X)[direction] and self.where.tangent is not None:
            tangent = self.where.tangent[mine].to(self.dtype)
            by_lo, by_hi = tangent[:, lo], tangent[:, hi]
            motion = (
                axis.origin_lo * by_lo + axis.origin_hi * by_hi,
                axis.step_lo * by_lo + axis.step_hi * by_hi,
            )
        cells, rule = self.cells[direction], self.op.filter
        if rule is not None:
            edges = boxes[:, lo], boxes[:, hi]
            return _filter_rows(rule, edges, motion, size, cells, self.dtype)
        return _rows(axis, motion, self.op, size, cells, self.dtype)


def as_pixels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W] as [N * H * W, C]."""
    count, channels, height, width = tensor.shape
    return tensor.to(dtype).permute(0, 2, 3, 1).reshape(count * height * width, channels)


def from_pixels(
    pixels: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    count, channels, height, width = size
    planes = pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    made = torch.empty(tuple(size), dtype=dtype, device=pixels.device, memory_format=memory)
    return made.copy_(planes)


def _at_once(channels: int) -> int:
    return max(AT_ONCE // max(channels, 1), 1)


def sample(features: Sequence[Tensor], where: Where, name: str = "") -> Tensor:
    op = operator_of(where, name)
    check_features(op.name, features, where.boxes.shape[0] if where.boxes.dim() else 0)
    first = features[0]
    images, channels = first.shape[:2]
    call = Call(op, where, first, images, [(f.shape[2], f.shape[3]) for f in features])
    height, width = call.cells
    boxes = len(where.boxes)
    pooled = first.new_zeros(boxes * height * width, channels, dtype=call.dtype)
    empty = torch.ones(boxes, height, width, dtype=torch.bool, device=first.device)
    for level, feature in zip(call.levels, features, strict=True):
        y, x = level.rows
        pixels = as_pixels(feature, call.dtype)
        for e in level.entries(call.cells, _at_once(channels)):
            weight = (y.used[e.y] * x.used[e.x])[:, None]
            pooled.index_add_(0, e.cell, pixels[e.pixel] * weight)
        if where.sampler.fill != 0:
            reads = [empty.new_zeros(len(level.boxes), cells) for cells in call.cells]
            for read, row in zip(reads, level.rows, strict=True):
                read[row.box, row.cell] = True
            empty[level.boxes] = ~(reads[0][:, :, None] & reads[1][:, None, :])
    if where.sampler.fill != 0:
        pooled.masked_fill_(empty.flatten()[:, None], where.sampler.fill)
    size = (boxes, channels, height, width)
    return from_pixels(pooled, size, pooled_dtype(first.dtype), is_channels_last(first))


def _check_cells(name: str, grad: Tensor, where: Where, channels: int, like: Tensor) -> None:
    height, width = where.sampler.output_size
    check_pooled(name, "the gradient", grad, (len(where.boxes), channels, height, width), like)


def grad_features(
    grad: Tensor, where: Where, sizes: Sequence[int], channels_last: bool
) -> list[Tensor]:
    op = operator_of(where)
    name = op.name
    check(
        len(sizes) >= 4 and len(sizes) % 2 == 0,
        name,
        f"expects the sizes N, C and height, width of each feature map, got {len(sizes)} numbers",
    )
    check_gradient(name, grad)
    images, channels = sizes[:2]
    maps = list(zip(sizes[2::2], sizes[3::2], strict=True))
    call = Call(op, where, grad, images, maps)
    _check_cells(name, grad, where, channels, grad)
    cells = as_pixels(grad, call.dtype)
    grads = []
    for level, (height, width) in zip(call.levels, maps, strict=True):
        y, x = level.rows
        pixels = cells.new_zeros(images * height * width, channels)
        for e in level.entries(call.cells, _at_once(channels)):
            weight = (y.used[e.y] * x.used[e.x])[:, None]
            pixels.index_add_(0, e.pixel, cells[e.cell] * weight)
        size = (images, channels, height, width)
        grads.append(from_pixels(pixels, size, grad.dtype, channels_last))
    return grads


def grad_boxes(features: Sequence[Tensor], grad: Tensor, where: Where) -> Tensor:
    op = operator_of(where)
    name = op.name
    check_features(name, features, where.boxes.shape[0] if where.boxes.dim() else 0)
    first = features[0]
    images, channels = first.shape[:2]
    call = Call(op, where, first, images, [(f.shape[2], f.shape[3]) for f in features])
    _check_cells(name, grad, where, channels, first)
    check_same_device(name, "the gradient", grad, first)
    cells = as_pixels(grad.to(pooled_dtype(first.dtype)), call.dtype)
    result = torch.zeros(where.boxes.shape, dtype=call.dtype, device=first.device)
    for level, feature in zip(call.levels, features, strict=True):
        y, x = level.rows
        pixels = as_pixels(feature, call.dtype)
        # Of each box: d origin y, d step y, d origin x, d step x.
        motions = result.new_zeros(len(level.boxes), 4)
        for e in level.entries(call.cells, _at_once(2 * channels)):
            met = (cells[e.cell] * pixels[e.pixel]).sum(1)
            along_y, along_x = met * x.used[e.x], met * y.used[e.y]
            terms = [
                along_y * y.slope_origin[e.y],
                along_y * y.slope_step[e.y],
                along_x * x.slope_origin[e.x],
                along_x * x.slope_step[e.x],
            ]
            motions.index_add_(0, e.box, torch.stack(terms, 1))
        for direction, axis in enumerate(level.axes):
            origin, step = motions[:, 2 * direction], motions[:, 2 * direction + 1]
            lo, hi = call.columns(direction)
            moves = torch.zeros_like(result[level.boxes])
            moves[:, lo] += origin * axis.origin_lo + step * axis.step_lo
            moves[:, hi] += origin * axis.origin_hi + step * axis.step_hi
            result[level.boxes] += moves
    return result.to(where.boxes.dtype)
