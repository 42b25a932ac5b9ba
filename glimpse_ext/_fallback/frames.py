# SPDX-License-Identifier: BSD-3-Clause
"""The applications on frames (csrc/frame_problem.h) in plain PyTorch, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._sampling import is_channels_last
from . import geometry
from .checks import (
    LARGEST_SIDE,
    check,
    check_boxes,
    check_features,
    check_gradient,
    check_output_size,
    check_pooled,
    check_tangent,
    dtype_name,
    images_of,
)
from .geometry import Axis, Border, Samples, Taps
from .separable import AT_ONCE, as_pixels, compute_dtype, from_pixels, pooled_dtype

_ROI_ALIGN, _ROTATED = 0, 1
_NAMES = ("roi_align_max", "roi_align_rotated")
_COLUMNS = ("x1, y1, x2, y2", "centre x, centre y, width, height, angle")
_MOST_QUARTER_TURNS = 2.0**20
_RADIANS = 0.017453292519943295


class Where(NamedTuple):
    """The arguments that all operators on frames share, but for the map."""

    boxes: Tensor
    image_index: Tensor | None
    tangent: Tensor | None
    chosen: Tensor | None
    output_size: Sequence[int]
    params: Sequence[int]
    scale: float

    @property
    def name(self) -> str:
        return _NAMES[_ROTATED if len(self.params) and self.params[0] == _ROTATED else _ROI_ALIGN]


def _sincos(angle: Tensor, degrees: bool) -> tuple[Tensor, Tensor]:
    """sincos.h: exact for quarter turns in degrees, NaN where a turn has no fraction left."""
    quarter = 90.0 if degrees else torch.pi / 2
    angle = torch.where(angle.abs() <= _MOST_QUARTER_TURNS * quarter, angle.double(), torch.nan)
    whole = torch.round(angle / quarter)
    rest = (angle - whole * quarter) * (torch.pi / 2 / quarter)
    sine, cosine = torch.sin(rest), torch.cos(rest)
    turn = whole.nan_to_num() % 4
    quarters = ((1, cosine, -sine), (2, -sine, -cosine), (3, -cosine, sine))
    for number, turned_sine, turned_cosine in quarters:
        sine = torch.where(turn == number, turned_sine, sine)
        cosine = torch.where(turn == number, turned_cosine, cosine)
    return sine, cosine


class Frame(NamedTuple):
    """frame.h; ``[K]`` each."""

    axes: tuple[Axis, Axis]
    centre: tuple[Tensor, Tensor]
    cosine: Tensor
    sine: Tensor
    centre_slope: float
    angle_slope: float
    rotated: bool

    @staticmethod
    def of(boxes: Tensor, where: Where) -> Frame:
        kind, ratio, aligned, clockwise, degrees = where.params
        cells, scale = where.output_size, where.scale
        ratio = max(ratio, 0)
        if kind == _ROI_ALIGN:
            x1, y1, x2, y2 = boxes.unbind(1)
            zero = torch.zeros_like(x1)
            axes = (
                geometry.roi_align_axis(y1, y2, scale, bool(aligned), ratio, cells[0]),
                geometry.roi_align_axis(x1, x2, scale, bool(aligned), ratio, cells[1]),
            )
            return Frame(axes, (zero, zero), zero + 1, zero, 0.0, 0.0, False)
        x, y, width, height, angle = boxes.unbind(1)
        offset = 0.5 if aligned else 0.0
        sine, cosine = (v.to(boxes.dtype) for v in _sincos(angle, bool(degrees)))
        unit = _RADIANS if degrees else 1.0
        return Frame(
            (
                geometry.rotated_axis(height, scale, not aligned, ratio, cells[0]),
                geometry.rotated_axis(width, scale, not aligned, ratio, cells[1]),
            ),
            (y * scale - offset, x * scale - offset),
            cosine,
            -sine if clockwise else sine,
            scale,
            -unit if clockwise else unit,
            True,
        )

    def reach(self, size: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """FrameReach: bounds of the local positions that may lie on the map."""
        (cy, cx), c, s = self.centre, self.cosine, self.sine
        y0, y1, x0, x1 = -1.0 - cy, size[0] - cy, -1.0 - cx, size[1] - cx
        largest = torch.stack([y0, y1, x0, x1]).abs().amax(0)
        margin = largest * (1e-14 if c.dtype == torch.float64 else 4e-6)

        def span(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            low = torch.minimum(a, b) + torch.minimum(c, d) - margin
            return low, torch.maximum(a, b) + torch.maximum(c, d) + margin

        return span(c * y0, c * y1, s * x0, s * x1), span(-s * y0, -s * y1, c * x0, c * x1)


class Visit(NamedTuple):
    """Samples of cells: what they read, and which row of the result is theirs."""

    box: Tensor
    row: Tensor
    plane: Tensor
    """The plane of pixels that is read."""
    number: Tensor
    """Of the sample in the window of its cell."""
    local: tuple[Tensor, Tensor]
    progress: tuple[Tensor, Tensor]
    taps: tuple[Taps, Taps]

    @property
    def there(self) -> Tensor:
        """``[S, 2, 2]``: which products of taps exist."""
        y, x = self.taps
        return y.there[:, :, None] & x.there[:, None, :]

    @property
    def kept(self) -> Tensor:
        return self.taps[0].there[:, 0] & self.taps[1].there[:, 0]


def _product(y: Tensor, x: Tensor) -> Tensor:
    return y[:, :, None] * x[:, None, :]


class Call:
    """A call as all applications see it."""

    def __init__(self, where: Where, like: Tensor, size: Sequence[int]) -> None:
        name, boxes = where.name, where.boxes
        images, channels, height, width = size
        self.where, self.channels, self.size = where, channels, (height, width)
        self.cells = check_output_size(name, where.output_size)
        self.dtype = compute_dtype(like.dtype)
        columns = _COLUMNS[where.params[0]].count(",") + 1
        self.skip = boxes.shape[1] - columns
        numbers = boxes.to(self.dtype)
        # Images must be named, as many for each image is not a form of these operators.
        image, valid = images_of(name, numbers, where.image_index, -1, images)
        if where.chosen is not None:
            check(
                where.chosen.dtype == torch.int32,
                name,
                f"the chosen samples must be int32, got {dtype_name(where.chosen.dtype)}",
            )
            self.check_pooled("the chosen samples", where.chosen, like)
        self.image = image
        self.frame = Frame.of(numbers[:, self.skip :], where)
        reads = valid & (height > 0 and width > 0)
        y, x = self.frame.axes
        reads = reads & (y.samples > 0) & (x.samples > 0)
        self.frame = self.frame._replace(axes=(y.read_by(reads), x.read_by(reads)))
        reach = self.frame.reach(self.size)
        self.samples: tuple[Samples, Samples] = (
            geometry.samples_within(self.frame.axes[0], self.cells[0], *reach[0]),
            geometry.samples_within(self.frame.axes[1], self.cells[1], *reach[1]),
        )
        y, x = self.frame.axes
        factor = y.samples.clamp(min=1).to(self.dtype).reciprocal()
        self.factor = factor * x.samples.clamp(min=1).to(self.dtype).reciprocal()
        if where.chosen is not None:
            self.factor = torch.ones_like(self.factor)
        self.motion: Tensor | None = None
        if where.tangent is not None:
            self.motion = self._columns(where.tangent.to(self.dtype)[:, self.skip :])

    @staticmethod
    def _columns(numbers: Tensor) -> Tensor:
        """[K, 5]."""
        return torch.nn.functional.pad(numbers, (0, 5 - numbers.shape[1]))

    def check_pooled(self, what: str, tensor: Tensor, like: Tensor) -> None:
        size = (len(self.where.boxes), self.channels, *self.cells)
        check_pooled(self.where.name, what, tensor, size, like)

    @property
    def folded(self) -> bool:
        """Whether each channel reads samples of its own: rows and planes are then of one number."""
        return self.where.chosen is not None

    def pixels(self, map: Tensor) -> Tensor:
        """Of a map, as visits read them."""
        return map.to(self.dtype).reshape(-1, 1) if self.folded else as_pixels(map, self.dtype)

    def from_rows(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """[N, C, H, W] from the rows of a result or the pixels of a map."""
        if self.folded:
            return rows.reshape(tuple(size))
        return rows.reshape(size[0], *size[2:], size[1]).permute(0, 3, 1, 2)

    def visits(self) -> Iterator[Visit]:
        y, x = self.samples
        height, width = self.cells
        if self.where.chosen is not None:
            yield from self._chosen(self.where.chosen)
            return
        at_once = max(AT_ONCE // (8 * max(self.channels, 1)), 1)
        for box, i, j in geometry.pairs(y.of_boxes(), x.of_boxes(), at_once):
            row = (box * height + y.cell[i]) * width + x.cell[j]
            number = (y.sample[i] - y.first[box, y.cell[i]]) * x.counts[box, x.cell[j]]
            number = number + x.sample[j] - x.first[box, x.cell[j]]
            cell, sample = (y.cell[i], x.cell[j]), (y.sample[i], x.sample[j])
            yield self._visit(box, row, self.image[box], number, cell, sample)

    def _chosen(self, chosen: Tensor) -> Iterator[Visit]:
        y, x = self.samples
        height, width = self.cells
        flat = chosen.contiguous().flatten().to(torch.int64)
        for begin in range(0, flat.numel(), AT_ONCE):
            number = flat[begin : begin + AT_ONCE]
            row = torch.arange(begin, begin + len(number), device=flat.device)
            cell_x, cell_y = row % width, row // width % height
            channel = row // (width * height) % self.channels
            box = row // (width * height * self.channels)
            columns = x.counts[box, cell_x]
            # Nothing that a caller can put into `chosen` leads outside the cell.
            real = (number >= 0) & (number < y.counts[box, cell_y] * columns)
            box, row, number, columns, channel, cell_y, cell_x = (
                v[real] for v in (box, row, number, columns, channel, cell_y, cell_x)
            )
            sample = (
                y.first[box, cell_y] + number // columns,
                x.first[box, cell_x] + number % columns,
            )
            plane = self.image[box] * self.channels + channel
            yield self._visit(box, row, plane, number, (cell_y, cell_x), sample)

    def _visit(
        self,
        box: Tensor,
        row: Tensor,
        plane: Tensor,
        number: Tensor,
        cell: tuple[Tensor, Tensor],
        sample: tuple[Tensor, Tensor],
    ) -> Visit:
        frame = self.frame
        y, x = (axis.position(box, cell[d], sample[d]) for d, axis in enumerate(frame.axes))
        cosine, sine = frame.cosine[box], frame.sine[box]
        at_y = y * cosine - x * sine + frame.centre[0][box]
        at_x = y * sine + x * cosine + frame.centre[1][box]
        border = Border(1.0, geometry.CLAMP)
        taps = (
            geometry.border_taps(border, at_y, self.size[0]),
            geometry.border_taps(border, at_x, self.size[1]),
        )
        along = [axis.progress(box, cell[d], sample[d]) for d, axis in enumerate(frame.axes)]
        return Visit(box, row, plane, number, (y, x), (along[0], along[1]), taps)

    def entries(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """``[S, 2, 2]``: the pixels of the products of taps, and their weights."""
        y, x = visit.taps
        height, width = self.size
        pixel = (visit.plane[:, None, None] * height + y.pixel[:, :, None]) * width
        pixel = pixel + x.pixel[:, None, :]
        weight = _product(y.weight, x.weight)
        if self.motion is not None:
            slopes_y, slopes_x = self.slopes(visit)
            motion = self.motion[visit.box]
            by_y, by_x = (
                (slopes * motion).sum(1)[:, None, None] for slopes in (slopes_y, slopes_x)
            )
            weight = by_y * _product(y.slope, x.weight) + by_x * _product(y.weight, x.slope)
        return pixel, weight * self.factor[visit.box][:, None, None]

    def slopes(self, visit: Visit, turned: bool = False) -> tuple[Tensor, Tensor]:
        """PositionSlopes::at, or along the motion of the boxes: of y and of x, ``[S, 5]``."""
        frame, box = self.frame, visit.box

        def of(slope: Tensor | float) -> Tensor:
            if isinstance(slope, Tensor):
                return slope[box]
            return torch.full_like(visit.local[0], slope)

        lows, highs = [], []
        for axis, progress in zip(frame.axes, visit.progress, strict=True):
            lows.append(of(axis.origin_lo) + progress * of(axis.step_lo))
            highs.append(of(axis.origin_hi) + progress * of(axis.step_hi))
        zero = torch.zeros_like(highs[0])
        if not frame.rotated:
            if turned:
                return (torch.stack([zero] * 5, 1),) * 2
            return (
                torch.stack([zero, lows[0], zero, highs[0], zero], 1),
                torch.stack([lows[1], zero, highs[1], zero, zero], 1),
            )
        high_y, high_x = highs
        cosine, sine, slope = frame.cosine[box], frame.sine[box], frame.angle_slope
        (y, x), centre = visit.local, zero + frame.centre_slope
        turned_y, turned_x = y * cosine - x * sine, y * sine + x * cosine
        if not turned:
            return (
                torch.stack([zero, centre, -sine * high_x, cosine * high_y, -slope * turned_x], 1),
                torch.stack([centre, zero, cosine * high_x, sine * high_y, slope * turned_y], 1),
            )
        assert self.motion is not None
        motion = self.motion[box]
        turn = slope * motion[:, 4]
        moved_y, moved_x = high_y * motion[:, 3], high_x * motion[:, 2]
        angle_y = -slope * (moved_y * sine + moved_x * cosine + turn * turned_y)
        angle_x = slope * (moved_y * cosine - moved_x * sine - turn * turned_x)
        return (
            torch.stack([zero, zero, -turn * cosine * high_x, -turn * sine * high_y, angle_y], 1),
            torch.stack([zero, zero, -turn * sine * high_x, turn * cosine * high_y, angle_x], 1),
        )


def _check_operator(where: Where) -> None:
    name, params = where.name, where.params
    check(
        len(where.output_size) == 2,
        name,
        f"expects an output height and width, got {len(where.output_size)} numbers",
    )
    check(len(params) == 5, name, f"expects 5 parameters, got {len(params)}")
    check(params[0] in (0, 1), name, f"does not know operator kind {params[0]}")
    check(
        params[1] <= geometry.MAX_SAMPLES,
        name,
        f"sampling_ratio must fit in 31 bits, got {params[1]}",
    )


def _check_boxes(where: Where, like: Tensor) -> None:
    name = where.name
    check_boxes(name, where.boxes, where.image_index, _COLUMNS[where.params[0]], False, like)
    check_tangent(name, where.tangent, where.boxes, like)


def _call(where: Where, input: Tensor) -> Call:
    _check_operator(where)
    check_features(where.name, [input], where.boxes.shape[0] if where.boxes.dim() else 0)
    _check_boxes(where, input)
    return Call(where, input, input.shape)


def _made(values: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    made = torch.empty(values.shape, dtype=dtype, device=values.device, memory_format=memory)
    return made.copy_(values)


def sample(input: Tensor, *place: Any) -> Tensor:
    where = Where(*place)
    call = _call(where, input)
    boxes, channels = len(where.boxes), input.shape[1]
    size = (boxes, channels, *call.cells)
    pixels = call.pixels(input)
    rows = pixels.new_zeros(
        boxes * channels * call.cells[0] * call.cells[1] // max(pixels.shape[1], 1),
        pixels.shape[1],
    )
    for visit in call.visits():
        pixel, weight = call.entries(visit)
        there = visit.there
        row = visit.row[:, None, None].expand_as(pixel)[there]
        rows.index_add_(0, row, pixels[pixel[there]] * weight[there][:, None])
    return _made(call.from_rows(rows, size), pooled_dtype(input.dtype), is_channels_last(input))


def grad_features(grad: Tensor, *args: Any) -> Tensor:
    *place, sizes, channels_last = args
    where = Where(*place)
    name = where.name
    _check_operator(where)
    check(
        len(sizes) == 4,
        name,
        f"expects the sizes N, C, H, W of the input, got {len(sizes)} numbers",
    )
    check_gradient(name, grad)
    _check_boxes(where, grad)
    check_pooled(name, "the gradient", grad, (len(where.boxes), sizes[1], *where.output_size), grad)
    check(
        all(0 <= side <= LARGEST_SIDE for side in sizes[2:]),
        name,
        f"input height and width must fit in 32 bits, got {sizes[2]} x {sizes[3]}",
    )
    call = Call(where, grad, sizes)
    rows = call.pixels(grad)
    count = sizes[0] * sizes[1] * sizes[2] * sizes[3] // max(rows.shape[1], 1)
    pixels = rows.new_zeros(count, rows.shape[1])
    for visit in call.visits():
        pixel, weight = call.entries(visit)
        there = visit.there
        row = visit.row[:, None, None].expand_as(pixel)[there]
        pixels.index_add_(0, pixel[there], rows[row] * weight[there][:, None])
    return _made(call.from_rows(pixels, sizes), grad.dtype, channels_last)


def grad_boxes(input: Tensor, grad: Tensor, *place: Any) -> Tensor:
    where = Where(*place)
    call = _call(where, input)
    call.check_pooled("the gradient", grad, input)
    pixels, rows = call.pixels(input), call.pixels(grad.to(pooled_dtype(input.dtype)))
    found = pixels.new_zeros(len(where.boxes), 5)
    for visit in call.visits():
        y, x = visit.taps
        pixel, _ = call.entries(visit)
        there = visit.there
        row = visit.row[:, None, None].expand_as(pixel)[there]
        met = torch.zeros_like(pixel, dtype=call.dtype)
        met[there] = (rows[row] * pixels[pixel[there]]).sum(1)
        met = met * call.factor[visit.box][:, None, None]

        def total(of_y: Tensor, of_x: Tensor, met: Tensor = met) -> Tensor:
            return (met * _product(of_y, of_x)).sum((1, 2))[:, None]

        in_y, in_x = total(y.slope, x.weight), total(y.weight, x.slope)
        slopes_y, slopes_x = call.slopes(visit)
        if call.motion is None:
            moves = in_y * slopes_y + in_x * slopes_x
        else:
            motion = call.motion[visit.box]
            # A bilinear function bends in no direction alone.
            in_both = total(y.slope, x.slope)
            by_y = in_both * (slopes_x * motion).sum(1)[:, None]
            by_x = in_both * (slopes_y * motion).sum(1)[:, None]
            turned_y, turned_x = call.slopes(visit, turned=True)
            moves = by_y * slopes_y + by_x * slopes_x + in_y * turned_y + in_x * turned_x
        # What is dropped does not move, whatever numbers it has.
        found.index_add_(0, visit.box, moves.masked_fill(~visit.kept[:, None], 0.0))
    result = torch.zeros(where.boxes.shape, dtype=call.dtype, device=input.device)
    columns = result.shape[1] - call.skip
    result[:, call.skip :] = found[:, :columns]
    return result.to(where.boxes.dtype)


def maximum(
    input: Tensor,
    boxes: Tensor,
    image_index: Tensor | None,
    output_size: Sequence[int],
    params: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    where = Where(boxes, image_index, None, None, output_size, params, scale)
    call = _call(where, input)
    name = where.name
    check(params[1] <= 32768, name, f"sampling_ratio must be at most 32768, got {params[1]}")
    check(
        (input.shape[2] + 64) * (input.shape[3] + 64) <= 2**28,
        name,
        "the map must have at most about 2^28 pixels, got ",
        input.shape,
    )
    pixels = call.pixels(input)
    cells = len(boxes) * call.cells[0] * call.cells[1]
    around, around_order = _dropped_around(call)
    largest = pixels.new_full((cells, pixels.shape[1]), -torch.inf)
    largest = torch.where(around[:, None], 0.0, largest)
    is_nan = torch.zeros_like(largest, dtype=torch.bool)
    for visit, values in _candidates(call, pixels):
        row = visit.row[:, None].expand_as(values)
        nans = values.isnan()
        largest.scatter_reduce_(0, row, values.masked_fill(nans, -torch.inf), "amax")
        is_nan.view(torch.uint8).scatter_reduce_(0, row, nans.view(torch.uint8), "amax")
    # The first of equals wins: samples have the even numbers of an order, dropped ones the odd.
    last = torch.iinfo(torch.int64).max
    order = torch.full_like(largest, last, dtype=torch.int64)
    zero_wins = around[:, None] & ~is_nan & (largest == 0)
    order = torch.where(zero_wins, around_order[:, None], order)
    for visit, values in _candidates(call, pixels):
        row = visit.row
        wins = torch.where(is_nan[row], values.isnan(), values == largest[row])
        mine = 2 * visit.number + torch.where(visit.kept, 2, 1)
        mine = torch.where(wins, mine[:, None], last)
        order.scatter_reduce_(0, row[:, None].expand_as(mine), mine, "amin")
    any_sample = order != last
    values = torch.where(is_nan, torch.nan, torch.where(any_sample, largest, 0.0))
    sample_number = torch.where(any_sample & (order % 2 == 0), order // 2 - 1, -1)
    size = (len(boxes), input.shape[1], *call.cells)
    channels_last = is_channels_last(input)
    return (
        from_pixels(values, size, pooled_dtype(input.dtype), channels_last),
        from_pixels(sample_number, size, torch.int32, channels_last),
    )


def _candidates(call: Call, pixels: Tensor) -> Iterator[tuple[Visit, Tensor]]:
    """Samples with their values, ``[S, C]``: zeros where they are dropped."""
    for visit in call.visits():
        y, x = visit.taps
        pixel, _ = call.entries(visit)
        weight = _product(y.weight, x.weight)
        value = pixels.new_zeros(len(visit.row), pixels.shape[1])
        for i in range(2):
            for j in range(2):
                there = visit.there[:, i, j]
                read = pixels[pixel[there, i, j]] * weight[there, i, j][:, None]
                value[there] = value[there] + read
        yield visit, value


def _dropped_around(call: Call) -> tuple[Tensor, Tensor]:
    """Of each cell, whether samples outside its window are dropped, and the order of the first."""
    (y, x), (axis_y, axis_x) = call.samples, call.frame.axes

    def cells(of_y: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(of_y), of_y.shape[1], of_x.shape[1])
        return of_y[:, :, None].expand(shape), of_x[:, None, :].expand(shape)

    rows, columns = cells(y.counts, x.counts)
    first_row, first_column = cells(y.first, x.first)
    all_rows, all_columns = axis_y.samples[:, None, None], axis_x.samples[:, None, None]
    window = rows * columns
    samples = all_rows * all_columns > 0
    before = samples & ((window == 0) | (first_row > 0))
    left = samples & (first_column > 0)
    right = samples & (first_column + columns < all_columns)
    after = samples & (first_row + rows < all_rows)
    order = torch.where(right, 2 * columns + 1, 2 * window + 1)
    order = torch.where(before | left, 1, order)
    return (before | left | right | after).flatten(), order.flatten()
