# SPDX-License-Identifier: BSD-3-Clause
"""Every operator of this package once more, in plain PyTorch: slow, obvious, exact.

The compiled operators are tested against these functions, and they are public so that a surprising
number can be checked by a second, independent computation. They need nothing but ``torch``, run on
any device, compute in float64 unless told otherwise, and are differentiable to every order through
ordinary autograd.

One axis at a time: a box and an output size place samples on each axis, a sample reads two
neighbouring pixels (its taps), and the taps of all samples of a cell are added up per pixel. The
pooled value is then a sum over rows of a sum over columns. That is what keeps the cost of a box
bounded by the image and not by the box.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "assign_levels",
    "crop",
    "crop_and_resize",
    "crop_batch",
    "extract_glimpse",
    "multiscale_roi_align",
    "paste_masks",
    "paste_masks_to_bits",
    "paste_masks_to_rle",
    "point_sample",
    "roi_align",
    "roi_align_rotated",
]

# The sample count of a cell is a 32-bit number in the compiled operators. A cell that would need
# more is not sampled.
MAX_SAMPLES_PER_CELL = 2**31 - 1


class _AxisTaps(NamedTuple):
    """Taps of one axis of a box: tap j adds weight[j] times pixel[j] to cell[j]."""

    cell: Tensor
    pixel: Tensor
    weight: Tensor


def _leading_true(count: int, holds: Callable[[Tensor], Tensor], cells: Tensor) -> Tensor:
    """Number of leading samples of each cell for which ``holds`` is true, by bisection.

    ``holds`` must not become true again after it was false. Positions do not turn back within a
    cell, in exact or in rounded arithmetic, so the limits found here are exact.
    """
    first = torch.zeros_like(cells)
    last = torch.full_like(cells, count)
    for _ in range(count.bit_length()):
        middle = (first + last) // 2
        further = (first < last) & holds(middle)
        first, last = torch.where(further, middle + 1, first), torch.where(further, last, middle)
    return first


def _roi_axis_taps(
    low: Tensor,
    high: Tensor,
    *,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
    cells: int,
    size: int,
) -> _AxisTaps:
    """Taps of RoIAlign on one axis: a box from ``low`` to ``high``, an image of ``size`` pixels."""
    shift = 0.5 if aligned else 0.0
    origin = low * scale - shift
    extent = (high * scale - shift) - origin
    if not aligned:
        # A comparison with NaN is false, so a NaN extent stays NaN and meets no pixel below.
        extent = torch.where(extent < 1, torch.ones_like(extent), extent)
    step = extent / cells

    # The sample count is a step function of the box: it is used as a constant, without a gradient.
    wanted = float(sampling_ratio) if sampling_ratio > 0 else torch.ceil(step.detach()).item()
    samples = int(wanted) if 0 < wanted <= MAX_SAMPLES_PER_CELL else 0

    def position(cell: Tensor, sample: Tensor) -> Tensor:
        middle = sample.to(step.dtype) + 0.5
        return origin + cell.to(step.dtype) * step + middle * step / max(samples, 1)

    # Only samples from index -1 to index size read anything. They are consecutive, and even if a
    # box has billions of samples these are few, so they are found before any position is stored.
    cell = torch.arange(cells, device=low.device)
    with torch.no_grad():
        if step >= 0:
            start = _leading_true(samples, lambda i: position(cell, i) < -1, cell)
            stop = _leading_true(samples, lambda i: position(cell, i) <= size, cell)
        else:
            start = _leading_true(samples, lambda i: position(cell, i) > size, cell)
            stop = _leading_true(samples, lambda i: position(cell, i) >= -1, cell)
        kept = (stop - start).clamp(min=0)
        cell = torch.repeat_interleave(cell, kept)
        before = torch.repeat_interleave(torch.cumsum(kept, 0) - kept - start, kept)
        sample = torch.arange(cell.numel(), device=low.device) - before

    where = position(cell, sample)
    left = where.detach().floor().clamp(0, size - 1).long()
    # Up to index 0 and from the last pixel on, a sample reads one pixel: the fraction is zero and
    # does not move with the box. On a pixel in between, the right-hand neighbour is read with
    # weight zero, but with a slope.
    moves = (where.detach() > 0) & (left < size - 1)
    fraction = torch.where(moves, where - left, torch.zeros_like(where))
    right = (left + 1).clamp(max=size - 1)

    # Taps of one cell that hit the same pixel merge into one.
    key = torch.cat([cell * size + left, (cell * size + right)[moves]])
    weight = torch.cat([1 - fraction, fraction[moves]]) / max(samples, 1)
    merged, index = torch.unique(key, return_inverse=True)
    weight = weight.new_zeros(merged.numel()).index_add(0, index, weight)
    return _AxisTaps(merged // size, merged % size, weight)


def _pool(image: Tensor, rows: _AxisTaps, columns: _AxisTaps, height: int, width: int) -> Tensor:
    """Weighted pixel sums of one image ``[C, H, W]`` for every cell: ``[C, height, width]``.

    Only pixels with a tap are read. A NaN elsewhere in the image, even under a weight of zero in a
    dense product, would otherwise spread.
    """
    channels = image.shape[0]
    read = image[:, rows.pixel][:, :, columns.pixel]
    by_row = image.new_zeros(channels, height, columns.pixel.numel())
    by_row = by_row.index_add(1, rows.cell, read * rows.weight[:, None])
    cells = image.new_zeros(channels, height, width)
    return cells.index_add(2, columns.cell, by_row * columns.weight)


def _output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(output_size, int):
        return output_size, output_size
    height, width = output_size
    return height, width


def _boxes_matrix(
    boxes: Tensor | Sequence[Tensor], dtype: torch.dtype, columns: str = "x1, y1, x2, y2"
) -> Tensor:
    """Boxes as one ``[K, 5]`` tensor (image, x1, y1, x2, y2) of ``dtype``; or other columns."""
    count = columns.count(",") + 1
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != count + 1:
            raise ValueError(
                f"boxes must be [K, {count + 1}] (image, {columns}), got {list(boxes.shape)}"
            )
        return boxes.to(dtype)
    if len(boxes) == 0:
        raise ValueError(
            f"boxes must be [K, {count + 1}] or one [L, {count}] per image, got an empty list"
        )
    rows = []
    for image, of_image in enumerate(boxes):
        if of_image.ndim != 2 or of_image.shape[1] != count:
            raise ValueError(
                f"boxes[{image}] must be [L, {count}] ({columns}), got {list(of_image.shape)}"
            )
        corners = of_image.to(dtype)
        rows.append(torch.cat([torch.full_like(corners[:, :1], image), corners], dim=1))
    return torch.cat(rows)


class _LocalAxis(NamedTuple):
    """A row of cells: ``origin + cell * step + (sample + 1/2) * step / samples``."""

    origin: Tensor
    step: Tensor
    samples: int
    cells: int

    def position(self, cell: Tensor, sample: Tensor) -> Tensor:
        middle = sample.to(self.step.dtype) + 0.5
        along = middle * self.step / max(self.samples, 1)
        return self.origin + cell.to(self.step.dtype) * self.step + along

    def within(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """First and past-the-last sample of each cell that lies from ``low`` to ``high``."""
        cell = torch.arange(self.cells, device=self.step.device)
        if self.step >= 0:
            start = _leading_true(self.samples, lambda i: self.position(cell, i) < low, cell)
            stop = _leading_true(self.samples, lambda i: self.position(cell, i) <= high, cell)
        else:
            start = _leading_true(self.samples, lambda i: self.position(cell, i) > high, cell)
            stop = _leading_true(self.samples, lambda i: self.position(cell, i) >= low, cell)
        return start, torch.maximum(start, stop)


def _samples(step: Tensor, sampling_ratio: int) -> int:
    wanted = float(sampling_ratio) if sampling_ratio > 0 else torch.ceil(step.detach()).item()
    return int(wanted) if 0 < wanted <= MAX_SAMPLES_PER_CELL else 0


def _corner_axis(
    low: Tensor, high: Tensor, cells: int, scale: float, sampling_ratio: int, aligned: bool
) -> _LocalAxis:
    shift = 0.5 if aligned else 0.0
    origin = low * scale - shift
    extent = (high * scale - shift) - origin
    if not aligned:
        extent = torch.where(extent < 1, torch.ones_like(extent), extent)
    step = extent / cells
    return _LocalAxis(origin, step, _samples(step, sampling_ratio), cells)


def _centred_axis(
    length: Tensor, cells: int, scale: float, sampling_ratio: int, aligned: bool
) -> _LocalAxis:
    extent = length * scale
    if not aligned:
        extent = torch.where(extent < 1, torch.ones_like(extent), extent)
    step = extent / cells
    return _LocalAxis(-extent / 2, step, _samples(step, sampling_ratio), cells)


class _Frame(NamedTuple):
    """Two local axes about a centre (y, x), turned by an angle given as (cosine, sine)."""

    y: _LocalAxis
    x: _LocalAxis
    centre: tuple[Tensor, Tensor]
    turn: tuple[Tensor, Tensor]


def _read_frame(image: Tensor, frame: _Frame, mode: str) -> Tensor:
    """One box of one image ``[C, H, W]``: ``[C, cells of y, cells of x]``."""
    channels, rows, columns = image.shape
    cells_y, cells_x = frame.y.cells, frame.x.cells
    nothing = image.new_zeros(channels, cells_y, cells_x)
    cosine, sine = frame.turn
    finite = all(torch.isfinite(t) for axis in frame[:2] for t in axis[:2])
    finite = finite and all(torch.isfinite(t) for t in (*frame.centre, cosine, sine))
    if frame.y.samples == 0 or frame.x.samples == 0 or not finite:
        return nothing

    # Only local positions inside the turned map can be on it: a box may have billions of samples,
    # so the few that matter are found before any position is stored.
    with torch.no_grad():
        y = torch.tensor([-1.0, -1.0, rows, rows], dtype=image.dtype) - frame.centre[0]
        x = torch.tensor([-1.0, columns, -1.0, columns], dtype=image.dtype) - frame.centre[1]
        spare = 1e-4 * (1 + float(y.abs().max()) + float(x.abs().max()))
        local_y, local_x = y * cosine + x * sine, x * cosine - y * sine
        limits = []
        for axis, local in ((frame.y, local_y), (frame.x, local_x)):
            limits.append(axis.within(float(local.min()) - spare, float(local.max()) + spare))

    def numbers(limit: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        start, stop = limit
        cell = torch.repeat_interleave(torch.arange(len(start)), stop - start)
        before = torch.repeat_interleave(torch.cumsum(stop - start, 0) - stop, stop - start)
        return cell, torch.arange(len(cell)) - before

    (cell_y, sample_y), (cell_x, sample_x) = numbers(limits[0]), numbers(limits[1])
    yy = frame.y.position(cell_y, sample_y)[:, None]
    xx = frame.x.position(cell_x, sample_x)[None, :]
    at_y = yy * cosine - xx * sine + frame.centre[0]
    at_x = yy * sine + xx * cosine + frame.centre[1]
    kept = (at_y >= -1) & (at_y <= rows) & (at_x >= -1) & (at_x <= columns)

    def taps(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        left = torch.where(kept, at.detach(), 0.0).floor().clamp(0, size - 1).long()
        moves = (at.detach() > 0) & (left < size - 1) & kept
        return left, torch.where(moves, left + 1, left), torch.where(moves, at - left, 0.0)

    y0, y1, fy = taps(at_y, rows)
    x0, x1, fx = taps(at_x, columns)
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
    bottom = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
    values = torch.where(kept, top * (1 - fy) + bottom * fy, 0.0)
    if mode == "mean":
        sums = nothing.new_zeros(channels, cells_y, len(cell_x)).index_add(1, cell_y, values)
        sums = nothing.index_add(2, cell_x, sums)
        return sums / frame.y.samples / frame.x.samples

    starts = [[int(v) for v in limit[0]] for limit in limits]
    stops = [[int(v) for v in limit[1]] for limit in limits]
    cells = []
    for i in range(cells_y):
        for j in range(cells_x):
            block = values[:, cell_y == i][:, :, cell_x == j]
            # Samples that were not looked at stand around those that were, as zeros.
            around = (
                int(starts[1][j] > 0),
                int(stops[1][j] < frame.x.samples),
                int(starts[0][i] > 0),
                int(stops[0][i] < frame.y.samples),
            )
            if block.shape[1] == 0 or block.shape[2] == 0:
                cells.append(values.new_zeros(channels))
                continue
            flat = torch.nn.functional.pad(block, around).flatten(1)
            winner = flat.detach().argmax(1, keepdim=True)
            cells.append(flat.gather(1, winner)[:, 0])
    if not cells:
        return nothing
    return torch.stack(cells, 1).reshape(channels, cells_y, cells_x)


def _pool_frames(
    input: Tensor,
    boxes: Tensor,
    output_size: int | Sequence[int],
    frame_of: Callable[[Tensor, int, int], _Frame],
    mode: str,
    dtype: torch.dtype,
    bad_index: str,
) -> Tensor:
    height, width = _output_size(output_size)
    images, channels, rows, columns = input.shape
    input = input.to(dtype)
    pooled = []
    for box in boxes:
        image = _image_index(box[0].detach(), images, bad_index)
        if image is None or rows == 0 or columns == 0 or height == 0 or width == 0:
            pooled.append(input.new_zeros(channels, height, width))
        else:
            pooled.append(_read_frame(input[image], frame_of(box, height, width), mode))
    if not pooled:
        return input.new_zeros(0, channels, height, width)
    return torch.stack(pooled)


def _image_index(number: Tensor, images: int, bad_index: str) -> int | None:
    """The image of a box, its number cut off to an integer; ``None`` if there is no such image."""
    value = number.item()
    if -1 < value < images:
        return int(value)
    if bad_index == "raise":
        raise IndexError(f"the image index of a box must be in [0, {images}), got {value}")
    return None


def _check_bad_index(bad_index: str) -> None:
    if bad_index not in ("zeros", "raise"):
        raise ValueError(f'bad_index must be "zeros" or "raise", got {bad_index!r}')


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    mode: str = "mean",
    *,
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """Mean of bilinear samples in each cell of each box, in plain PyTorch.

    ::

        box from 1 to 3, two cells, two samples each (o), pixel centres (x), aligned=True
        |-----x-----|-----x-----|-----x-----|-----x-----|
        0           1           2           3           4   box coordinates
                       o     o  |  o     o

    Args:
        input: ``[N, C, H, W]`` of any numeric dtype and any strides.
        boxes: ``[K, 5]`` rows (image, x1, y1, x2, y2), or one ``[L, 4]`` tensor of (x1, y1, x2, y2)
            per image. Box coordinates times ``spatial_scale`` count pixels of ``input``; pixel
            ``k`` covers ``k`` to ``k + 1``.
        output_size: cells per box, ``(height, width)`` or one number for both.
        spatial_scale: size of ``input`` over the size of the picture that the boxes refer to.
        sampling_ratio: samples per cell and axis; 0 or less takes one per pixel, rounded up, for
            each box.
        aligned: subtract the half pixel between box coordinates and pixel indices. ``False`` leaves
            it out, as RoIAlign did first, and widens every box to at least one pixel.
        mode: ``"mean"`` of the samples of a cell, or their ``"max"`` for each channel, where a
            sample outside counts as 0 and the first of equals wins. A NaN is larger than all.
        dtype: everything is computed and returned in this dtype. Positions too, so a sample that
            falls on the edge of the image in float32 may be dropped or kept differently in float64.
        bad_index: ``"zeros"`` gives a row of zeros to a box whose image does not exist, ``"raise"``
            raises IndexError.

    Returns:
        ``[K, C, height, width]``. A sample farther than one pixel outside the image counts as 0.
        Boxes without samples (NaN, infinite, ``aligned`` and reversed or empty with adaptive
        sampling, or more than 2**31 - 1 samples in a cell) give zeros.

    Gradients:
        To ``input`` and ``boxes``, of every order. The sample counts are constants. A sample that
        was moved to the edge of the image, or dropped, does not move with the box; a sample on a
        pixel uses the slope to its right.

    Differences from torchvision: coordinates are float64 by default, boxes have gradients, NaN,
    infinite and enormous boxes have a result.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
        >>> roi_align(image, boxes, 2, aligned=True).flatten().tolist()
        [5.0, 6.0, 9.0, 10.0]
    """
    _check_bad_index(bad_index)
    if input.ndim != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    if mode not in ("mean", "max"):
        raise ValueError(f'mode must be "mean" or "max", got {mode!r}')
    if mode == "max":

        def frame_of(box: Tensor, height: int, width: int) -> _Frame:
            _, x1, y1, x2, y2 = box
            return _Frame(
                _corner_axis(y1, y2, height, spatial_scale, sampling_ratio, aligned),
                _corner_axis(x1, x2, width, spatial_scale, sampling_ratio, aligned),
                (box.new_zeros(()), box.new_zeros(())),
                (box.new_ones(()), box.new_zeros(())),
            )

        return _pool_frames(
            input, _boxes_matrix(boxes, dtype), output_size, frame_of, mode, dtype, bad_index
        )
    height, width = _output_size(output_size)
    images, channels, rows, columns = input.shape
    input = input.to(dtype)
    pooled = []
    for box in _boxes_matrix(boxes, dtype):
        image = _image_index(box[0].detach(), images, bad_index)
        if image is None or rows == 0 or columns == 0:
            pooled.append(input.new_zeros(channels, height, width))
            continue

        def taps(low: Tensor, high: Tensor, cells: int, size: int) -> _AxisTaps:
            return _roi_axis_taps(
                low,
                high,
                scale=spatial_scale,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
                cells=cells,
                size=size,
            )

        _, x1, y1, x2, y2 = box
        by_row, by_column = taps(y1, y2, height, rows), taps(x1, x2, width, columns)
        pooled.append(_pool(input[image], by_row, by_column, height, width))
    if not pooled:
        return input.new_zeros(0, channels, height, width)
    return torch.stack(pooled)


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
    clockwise: bool = False,
    angle_unit: str = "degrees",
    *,
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """Mean of bilinear samples in each cell of each rotated box, in plain PyTorch.

    Args:
        input: ``[N, C, H, W]`` of any numeric dtype and any strides.
        boxes: ``[K, 6]`` rows (image, centre x, centre y, width, height, angle), or one ``[L, 5]``
            tensor per image. Coordinates count as in :func:`roi_align`.
        output_size: cells per box, ``(height, width)`` or one number for both.
        spatial_scale: as in :func:`roi_align`.
        sampling_ratio: as in :func:`roi_align`, along the directions of the box.
        aligned: subtract the half pixel between box coordinates and pixel indices from the centre.
            ``False`` leaves it out and widens every side to at least one pixel.
        clockwise: positive angles turn with the clock, on a picture with y pointing down.
        angle_unit: ``"degrees"`` or ``"radians"``.
        dtype: as in :func:`roi_align`.
        bad_index: as in :func:`roi_align`.

    Returns:
        ``[K, C, height, width]``. Boxes without samples, or with a number that is not finite, give
        zeros; so does an angle beyond 2**20 quarter turns.

    Gradients:
        To ``input`` and ``boxes``, of every order, with the rules of :func:`roi_align`.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0, 90.0]])
        >>> roi_align_rotated(image, boxes, 2).round().flatten().tolist()
        [9.0, 5.0, 10.0, 6.0]
    """
    _check_bad_index(bad_index)
    if input.ndim != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    if angle_unit not in ("degrees", "radians"):
        raise ValueError(f'angle_unit must be "degrees" or "radians", got {angle_unit!r}')
    quarter = 90.0 if angle_unit == "degrees" else math.pi / 2
    shift = 0.5 if aligned else 0.0

    def frame_of(box: Tensor, height: int, width: int) -> _Frame:
        _, x, y, box_width, box_height, angle = box
        # Sine and cosine in float64 whatever the dtype, and exact for quarter turns in degrees.
        angle = angle.double()
        whole = torch.round(angle.detach() / quarter)
        rest = (angle - whole * quarter) * (math.pi / 2 / quarter)
        cosine, sine = torch.cos(rest), torch.sin(rest)
        if not abs(float(angle.detach())) <= 2**20 * quarter:
            cosine = sine = torch.full_like(angle, math.nan)
        elif whole % 4 == 1:
            cosine, sine = -sine, cosine
        elif whole % 4 == 2:
            cosine, sine = -cosine, -sine
        elif whole % 4 == 3:
            cosine, sine = sine, -cosine
        if clockwise:
            sine = -sine
        return _Frame(
            _centred_axis(box_height, height, spatial_scale, sampling_ratio, aligned),
            _centred_axis(box_width, width, spatial_scale, sampling_ratio, aligned),
            (y * spatial_scale - shift, x * spatial_scale - shift),
            (cosine.to(dtype), sine.to(dtype)),
        )

    matrix = _boxes_matrix(boxes, dtype, "centre x, centre y, width, height, angle")
    return _pool_frames(input, matrix, output_size, frame_of, "mean", dtype, bad_index)


def assign_levels(
    boxes: Tensor,
    scales: Sequence[float],
    canonical_size: float = 224,
    canonical_level: int = 4,
    assign: str = "torchvision",
) -> Tensor:
    """Pyramid level of each box, from the square root of its area.

    ::

        sqrt(area)   ... 56 ... 112 ... 224 ... 448 ...     canonical_size 224
        level            2       3       4       5          canonical_level 4: scale 1/16

    The two formulas differ in where a small number is added, which decides boxes on the border of
    two levels::

        torchvision   floor(canonical_level + log2(side / canonical_size) + 1e-6)
        detectron2    floor(canonical_level + log2(side / canonical_size + 1e-8))

    Args:
        boxes: ``[K, 4]`` (x1, y1, x2, y2) or ``[K, 5]`` (image, x1, y1, x2, y2), in pixels of the
            picture. The formula is evaluated in the dtype of the boxes, half types in float32.
        scales: of the levels, largest first, each half of the one before.
        canonical_size: side of a box that belongs to ``canonical_level``, in pixels.
        canonical_level: level with scale ``2 ** -canonical_level``.
        assign: ``"torchvision"`` or ``"detectron2"``.

    Returns:
        int64 ``[K]``, positions in ``scales``. A box whose area is negative or NaN belongs to no
        level: -1. With a single level every box belongs to it.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 224.0, 223.9999]])
        >>> assign_levels(boxes, [1 / 4, 1 / 8, 1 / 16, 1 / 32]).tolist()
        [2, 2]
        >>> assign_levels(boxes, [1 / 4, 1 / 8, 1 / 16, 1 / 32], assign="detectron2").tolist()
        [2, 1]
    """
    if assign not in ("torchvision", "detectron2"):
        raise ValueError(f'assign must be "torchvision" or "detectron2", got {assign!r}')
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise ValueError(f"boxes must be [K, 4] or [K, 5], got {list(boxes.shape)}")
    if len(scales) == 1:
        return torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
    x1, y1, x2, y2 = boxes.detach()[:, -4:].unbind(1)
    if boxes.dtype not in (torch.float32, torch.float64):
        x1, y1, x2, y2 = x1.float(), y1.float(), x2.float(), y2.float()
    side = torch.sqrt((x2 - x1) * (y2 - y1))
    if assign == "torchvision":
        level = torch.floor(canonical_level + torch.log2(side / canonical_size) + 1e-6)
    else:
        level = torch.floor(canonical_level + torch.log2(side / canonical_size + 1e-8))
    finest, coarsest = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    none = torch.isnan(level)
    level = torch.where(none, torch.zeros_like(level), level).clamp(finest, coarsest).long()
    return torch.where(none, torch.full_like(level, -1), level - finest)


def multiscale_roi_align(
    features: Sequence[Tensor] | Mapping[str, Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_size: float = 224,
    canonical_level: int = 4,
    assign: str = "torchvision",
    *,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """RoIAlign of each box on the pyramid level that suits its size, in plain PyTorch.

    Args:
        features: one ``[N, C, H, W]`` per level, largest first; the values of a mapping in its
            order.
        boxes: ``[K, 5]`` or one ``[L, 4]`` per image, in pixels of the picture, as in
            :func:`roi_align`.
        output_size: cells per box, ``(height, width)`` or one number for both.
        scales: one per level, see :func:`assign_levels`.
        sampling_ratio: as in :func:`roi_align`.
        aligned: as in :func:`roi_align`.
        canonical_size: see :func:`assign_levels`.
        canonical_level: see :func:`assign_levels`.
        assign: see :func:`assign_levels`.
        levels: integer ``[K]``, the level of each box, instead of computing it. Other numbers than
            those of levels give a row of zeros.
        dtype: everything but the level assignment is computed and returned in this dtype.
        bad_index: as in :func:`roi_align`.

    Returns:
        ``[K, C, height, width]`` in the order of the boxes, whatever their levels.

    Gradients:
        To every level and to the boxes, of every order. The choice of the level is a constant.

    Example:
        >>> features = [torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 16, 16)]
        >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 0.0, 120.0, 120.0]])
        >>> multiscale_roi_align(features, boxes, 1, [1 / 4, 1 / 8]).flatten().tolist()
        [0.0, 1.0]
    """
    _check_bad_index(bad_index)
    maps = list(features.values()) if isinstance(features, Mapping) else list(features)
    if len(maps) != len(scales) or not maps:
        raise ValueError(f"scales must be one per level, got {len(scales)} for {len(maps)} levels")
    if levels is None:
        corners = boxes if isinstance(boxes, Tensor) else torch.cat(list(boxes))
        levels = assign_levels(corners, scales, canonical_size, canonical_level, assign)
    matrix = _boxes_matrix(boxes, dtype)
    height, width = _output_size(output_size)
    no_row = matrix.new_zeros(maps[0].shape[1], height, width)
    pooled = []
    for box, level in zip(matrix, levels.tolist(), strict=True):
        if 0 <= level < len(maps):
            row = roi_align(
                maps[level],
                box[None],
                (height, width),
                scales[level],
                sampling_ratio,
                aligned,
                dtype=dtype,
                bad_index=bad_index,
            )
            pooled.append(row[0])
        else:
            pooled.append(no_row)
    if not pooled:
        return no_row.new_zeros(0, *no_row.shape)
    return torch.stack(pooled)


# ------------------------------------------------------------- one sample per cell, or per point


def _even_places(low: Tensor, high: Tensor, cells: int, scale: float, shift: float) -> Tensor:
    """Middles of cells that divide a box whose ends are edges: ``edge = (number + shift) * scale``.

    In index units, as all places here. A box that is not finite has no places.
    """
    origin, step = (low + shift) * scale - 0.5, (high - low) * scale / cells
    cell = torch.arange(cells, dtype=low.dtype, device=low.device)
    return _finite(origin, step, origin + cell * step + 0.5 * step)


def _corner_places(low: Tensor, high: Tensor, cells: int, scale: float, shift: float) -> Tensor:
    """From one end of a box to the other, where the ends are samples. One cell: its middle."""
    if cells == 1:
        middle = 0.5 * ((low + shift) + (high + shift)) * scale
        return _finite(middle, middle, middle[None])
    origin, step = (low + shift) * scale, (high - low) * scale / (cells - 1)
    cell = torch.arange(cells, dtype=low.dtype, device=low.device)
    return _finite(origin, step, origin + cell * step)


def _finite(origin: Tensor, step: Tensor, places: Tensor) -> Tensor:
    if torch.isfinite(origin) and torch.isfinite(step):
        return places
    return torch.full_like(places, math.nan)


def _place_taps(where: Tensor, size: int, border: str) -> _AxisTaps:
    """Taps of one axis with a sample at each of ``where``, in index units.

    ``"zeros"``: pixels outside are zeros. ``"edge"``: the nearest pixel of the map. ``"centres"``,
    ``"covered"``: samples beyond the outer pixel centres, or edges, have no taps. ``"nearest"``:
    with one tap of weight 1.
    """
    at = where.detach()
    if border == "zeros":
        keep = (at >= -1) & (at <= size)
    elif border == "edge":
        keep = ~torch.isnan(at)
    elif border.startswith("centres"):
        keep = (at >= 0) & (at <= size - 1)
    else:
        keep = (at >= -0.5) & (at <= size - 0.5)
    cell = torch.arange(where.numel(), device=where.device)[keep]
    where, at = where[keep], at[keep]

    if border == "zeros":
        left = at.floor().long()
        weight = torch.cat([1 - (where - left), where - left])
        pixel, cell = torch.cat([left, left + 1]), torch.cat([cell, cell])
        there = (pixel >= 0) & (pixel < size)
        return _AxisTaps(cell[there], pixel[there], weight[there])

    left = at.floor().clamp(0, size - 1).long()
    if border.endswith("nearest"):
        # Halves go up, which is away from zero for all that is inside.
        up = (at - left >= 0.5).long()
        return _AxisTaps(cell, (left + up).clamp(max=size - 1), torch.ones_like(where))
    # On the edge and beyond it a sample reads one pixel and does not move. TensorFlow has that on
    # every pixel.
    moves = (at > 0) & (at < size - 1)
    if border == "centres":
        moves = moves & (at != left)
    fraction = torch.where(moves, where - left, torch.zeros_like(where))
    return _AxisTaps(
        torch.cat([cell, cell[moves]]),
        torch.cat([left, left[moves] + 1]),
        torch.cat([1 - fraction, fraction[moves]]),
    )


def _pool_or_fill(
    image: Tensor, rows: _AxisTaps, columns: _AxisTaps, height: int, width: int, fill: float
) -> Tensor:
    """As :func:`_pool`; ``fill`` where a cell has no tap along either axis."""
    cells = _pool(image, rows, columns, height, width)
    y = torch.zeros(height, dtype=torch.bool, device=image.device)
    x = torch.zeros(width, dtype=torch.bool, device=image.device)
    y[rows.cell], x[columns.cell] = True, True
    return torch.where(y[:, None] & x, cells, torch.full_like(cells, fill))


def crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    size: int | Sequence[int],
    *,
    box_format: str = "normalized",
    align_corners: bool = False,
    padding_mode: str = "zeros",
    image_index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """Bilinear crop of each box, in plain PyTorch.

    Arguments are those of :func:`glimpse_ext.crop`; ``dtype`` and ``bad_index`` are those of
    :func:`roi_align`.

    Returns:
        ``[K, C, height, width]``. Pixels outside the image are zeros, or with ``"border"`` those of
        its edge. A box with a number that is not finite gives zeros.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[-0.5, -0.5, 0.5, 0.5]])
        >>> crop(image, boxes, 2).flatten().tolist()
        [5.0, 6.0, 9.0, 10.0]
    """
    _check_bad_index(bad_index)
    height, width = _output_size(size)
    images, channels, rows, columns = input.shape
    if not isinstance(boxes, Tensor) or boxes.shape[-1] == 5:
        matrix = _boxes_matrix(boxes, dtype)
        numbers, matrix = matrix[:, 0].detach(), matrix[:, 1:]
    else:
        matrix = boxes.to(dtype)
        if image_index is not None:
            numbers = image_index
        else:
            each = len(boxes) // max(images, 1)
            numbers = torch.arange(images).repeat_interleave(each)
    input = input.to(dtype)
    border = {"zeros": "zeros", "border": "edge"}[padding_mode]

    def taps(low: Tensor, high: Tensor, cells: int, pixels: int) -> _AxisTaps:
        extent = pixels - 1 if align_corners else pixels
        scale, shift = (0.5 * extent, 1.0) if box_format == "normalized" else (1.0, 0.0)
        places = _corner_places if align_corners else _even_places
        return _place_taps(places(low, high, cells, scale, shift), pixels, border)

    pooled = []
    for number, (x1, y1, x2, y2) in zip(numbers, matrix, strict=True):
        image = _image_index(number, images, bad_index)
        if image is None:
            pooled.append(input.new_zeros(channels, height, width))
            continue
        by_row, by_column = taps(y1, y2, height, rows), taps(x1, x2, width, columns)
        pooled.append(_pool(input[image], by_row, by_column, height, width))
    return torch.stack(pooled) if pooled else input.new_zeros(0, channels, height, width)


def crop_and_resize(
    image: Tensor,
    boxes: Tensor,
    box_indices: Tensor,
    crop_size: int | Sequence[int],
    method: str = "bilinear",
    extrapolation_value: float = 0.0,
    *,
    convention: str = "tf",
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """TensorFlow's ``crop_and_resize`` on ``[N, C, H, W]``, in plain PyTorch.

    Arguments are those of :func:`glimpse_ext.crop_and_resize`; ``dtype`` and ``bad_index`` are
    those of :func:`roi_align`. Where ``convention`` is ``"tf"`` and ``boxes`` are not float64,
    places are computed in float32 whatever ``dtype`` is, in TensorFlow's order of operations.

    Returns:
        ``[K, C, height, width]``; ``extrapolation_value`` where a sample lies outside, in boxes
        that are not finite, and in boxes without an image.

    Gradients:
        To ``image`` and ``boxes``, of every order. ``"nearest"`` has the box gradient of
        ``"bilinear"``, as in TensorFlow.

    Example:
        >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> box, index = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0])
        >>> crop_and_resize(image, box, index, 3).flatten().tolist()
        [1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0, 3.5, 4.0]
    """
    _check_bad_index(bad_index)
    height, width = _output_size(crop_size)
    images, channels, rows, columns = image.shape
    tf = convention == "tf"
    image = image.to(dtype)
    precision = torch.float32 if tf and boxes.dtype != torch.float64 else dtype
    numbers = boxes.to(precision)
    if tf and precision == torch.float32:
        # TensorFlow flushes subnormal numbers to zero.
        tiny = numbers.detach().abs() < torch.finfo(precision).tiny
        numbers = torch.where(tiny, torch.zeros_like(numbers), numbers)
    inside = "centres" if tf else "covered"

    def taps(low: Tensor, high: Tensor, cells: int, pixels: int, border: str) -> _AxisTaps:
        places = _corner_places if tf else _even_places
        where = places(low, high, cells, pixels - 1 if tf else pixels, 0.0)
        return _place_taps(where.to(dtype), pixels, border)

    def read(of_image: Tensor, box: Tensor, border: str) -> Tensor:
        y1, x1, y2, x2 = box
        by_row, by_column = taps(y1, y2, height, rows, border), taps(x1, x2, width, columns, border)
        return _pool_or_fill(of_image, by_row, by_column, height, width, extrapolation_value)

    pooled = []
    for number, box in zip(box_indices, numbers, strict=True):
        index = _image_index(number, images, bad_index)
        if index is None:
            pooled.append(image.new_full((channels, height, width), extrapolation_value))
            continue
        if method == "bilinear":
            pooled.append(read(image[index], box, inside))
            continue
        value = read(image[index], box.detach(), f"{inside}, nearest")
        if box.requires_grad:
            # Zero, with the derivatives of bilinear sampling in the box.
            value = value + read(image[index], box, inside)
            value = value - read(image[index], box.detach(), inside)
        pooled.append(value)
    return torch.stack(pooled) if pooled else image.new_zeros(0, channels, height, width)


def point_sample(
    input: Tensor,
    points: Tensor,
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Bilinear values at points ``[N, P, 2]`` (x, y) in fractions of images, in plain PyTorch.

    Arguments are those of :func:`glimpse_ext.point_sample`; ``dtype`` is that of :func:`roi_align`.

    Returns:
        ``[N, C, P]``. Pixels outside the image are zeros. A point that is not finite gives zeros.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> point_sample(image, torch.tensor([[[0.5, 0.5]]])).flatten().tolist()
        [7.5]
    """
    images, channels, rows, columns = input.shape
    input, points = input.to(dtype), points.to(dtype)

    def taps(number: Tensor, pixels: int) -> _AxisTaps:
        places = _corner_places if align_corners else _even_places
        scale = pixels - 1 if align_corners else pixels
        return _place_taps(places(number, number, 1, scale, 0.0), pixels, "zeros")

    values = [
        _pool(input[n], taps(y, rows), taps(x, columns), 1, 1)[:, 0, 0]
        for n in range(images)
        for x, y in points[n]
    ]
    if not values:
        return input.new_zeros(images, channels, points.shape[1])
    return torch.stack(values).reshape(images, -1, channels).transpose(1, 2)


def _glimpse_origin(
    offset: Tensor, size: int, extent: int, centered: bool, normalized: bool, version: int
) -> Tensor:
    """The place of the first pixel of a window along one axis, in TensorFlow's order."""
    place = offset
    if normalized:
        place = place * size
    if centered:
        if normalized or version == 1:
            place = place / 2
        # Half of a whole number is exact.
        place = place + size / 2
    if version == 1 or (normalized and centered):
        place = place - extent / 2
    return place


def _whole_glimpse(image: Tensor, place: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    window = image.new_zeros(image.shape[0], *size)
    spans = []
    for origin, pixels, cells in zip(place, image.shape[1:], size, strict=True):
        # NaN and infinity are nowhere, and what is 2**40 pixels away is as far off as they are.
        first = int(origin) if bool(origin.abs() < 2**40) else 2**40
        begin, end = max(first, 0), min(first + cells, pixels)
        if begin >= end:
            return window
        spans.append((slice(begin - first, end - first), slice(begin, end)))
    (to_y, from_y), (to_x, from_x) = spans
    window[:, to_y, to_x] = image[:, from_y, from_x]
    return window


def _glimpse_matrix(place: Tensor, cells: int, scale: int, pixels: int) -> Tensor:
    """[cells, pixels]: the weights with which the pixels of one axis make its cells."""
    weights = place.new_zeros(cells * scale, pixels)
    if bool(place.isfinite()):
        low = place.detach().floor().clamp(-(2.0**40), 2.0**40)
        fraction = (place - low).clamp(0, 1)
        for step, weight in ((0, 1 - fraction), (1, fraction)):
            pixel = torch.arange(cells * scale, device=place.device) + low.to(torch.int64) + step
            row = ((pixel >= 0) & (pixel < pixels)).nonzero().flatten()
            weights = weights.index_put((row, pixel[row]), weight, accumulate=True)
    cells_first: Tensor = weights.unflatten(0, (cells, scale))
    return cells_first.mean(1)


def extract_glimpse(
    input: Tensor,
    size: int | Sequence[int],
    offsets: Tensor,
    centered: bool = True,
    normalized: bool = True,
    *,
    version: int = 2,
    mode: str = "exact",
    scales: Sequence[int] = (1,),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Windows around a point of each image, with zeros outside.

    Args:
        input: ``[N, C, H, W]``; any dtype for ``"exact"`` with a scale of 1.
        size: ``(height, width)`` or one number for both.
        offsets: ``[N, 2]`` of y, x; ``"exact"`` places windows in their dtype.
        centered: whether offsets count from the middle of the image.
        normalized: whether offsets are fractions of the image or pixels.
        version: 2 for ``tf.image.extract_glimpse``, 1 for that of ``tf.compat.v1.image``.
        mode: ``"exact"`` truncates the place to a whole pixel, ``"subpixel"`` interpolates.
        scales: for each s, s * size pixels are reduced to ``size`` by the mean.
        dtype: ``"subpixel"`` is computed and returned in this dtype.

    Returns:
        ``[N, len(scales) * C, height, width]``, scale by scale; ``"exact"`` in the dtype of
        ``input``.

    Gradients:
        To ``input``, and with ``"subpixel"`` to ``offsets``, of every order.

    Example:
        >>> extract_glimpse(torch.eye(3)[None, None], 2, torch.tensor([[1.0, 1.0]])).tolist()
        [[[[1.0, 0.0], [0.0, 0.0]]]]
    """
    height, width = _output_size(size)
    images = []
    for image, offset in zip(input, offsets, strict=True):
        parts = [image.new_zeros(0, height, width, dtype=None if mode == "exact" else dtype)]
        for scale in scales:
            extents = (height * scale, width * scale)
            places = offset if mode == "exact" else offset.to(dtype)
            origins = (
                _glimpse_origin(
                    places[0], image.shape[1], extents[0], centered, normalized, version
                ),
                _glimpse_origin(
                    places[1], image.shape[2], extents[1], centered, normalized, version
                ),
            )
            if mode == "exact":
                part = _whole_glimpse(image, origins, extents)
                if scale > 1:
                    part = part.unflatten(2, (width, scale)).unflatten(1, (height, scale))
                    part = part.mean((2, 4))
            else:
                along_y = _glimpse_matrix(origins[0], height, scale, image.shape[1])
                along_x = _glimpse_matrix(origins[1], width, scale, image.shape[2])
                part = along_y @ image.to(dtype) @ along_x.T
            parts.append(part)
        images.append(torch.cat(parts))
    if not images:
        return input.new_zeros(0, len(scales) * input.shape[1], height, width)
    return torch.stack(images)


def _paste_taps(position: Tensor, cells: Tensor, size: int) -> _AxisTaps:
    """Taps of one sample in each of ``cells`` on a mask of ``size`` pixels with zeros around it."""
    # A comparison with NaN is false, so NaN and infinite positions meet no pixel.
    inside = (position >= -1) & (position < size)
    position, cells = position[inside], cells[inside]
    left = torch.floor(position.detach())
    fraction = position - left
    pixel = torch.cat([left, left + 1]).to(torch.int64)
    weight = torch.cat([1 - fraction, fraction])
    there = (pixel >= 0) & (pixel < size)
    return _AxisTaps(torch.cat([cells, cells])[there], pixel[there], weight[there])


def _paste_axis(low: Tensor, high: Tensor, size: int, cells: int) -> _AxisTaps:
    """detectron2: (cell + 1/2 - low) / (high - low) of the mask, in index units."""
    cell = torch.arange(cells, device=low.device)
    step = low.new_tensor(float(size)) / (high - low)
    origin = (0.5 - low) * step - 0.5
    if not (torch.isfinite(origin) and torch.isfinite(step)):
        # Nothing is read, so nothing moves with the box; zero times infinity would be NaN.
        origin, step = origin.detach(), step.detach()
    return _paste_taps(origin + cell.to(low.dtype) * step, cell, size)


def _snapped_paste_axis(low: Tensor, high: Tensor, size: int, grow: float, cells: int) -> _AxisTaps:
    """torchvision: the mask with a border of one zero, resized to the whole pixels of a grown box.

    ``resize`` holds samples before the first pixel there; that pixel is one of the zeros.
    """
    reach, centre = (high - low) * 0.5 * grow, (high + low) * 0.5
    ends = [(centre - reach).item(), (centre + reach).item()]
    if not all(-(2**63) < end < 2**63 for end in ends):
        ends = [1.0, 0.0]  # no whole pixels of 64 bits
    first, last = int(ends[0]), int(ends[1])
    begin, end = min(max(first, 0), cells), min(max(last + 1, 0), cells)
    cell = torch.arange(begin, max(begin, end), device=low.device)
    width = last - first + 1
    source = (cell.to(low.dtype) + (0.5 - first)) * ((size + 2) / max(width, 1)) - 0.5
    return _paste_taps(source.clamp(min=0) - 1, cell, size)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float | None = 0.5,
    method: str = "detectron2",
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Masks of boxes as masks of the image, in plain PyTorch.

    Args:
        masks: ``[N, Mh, Mw]`` or ``[N, 1, Mh, Mw]``.
        boxes: ``[N, 4]`` of x1, y1, x2, y2 in edge units: pixel k covers k to k + 1.
        image_size: height and width of the image.
        threshold: zero or more gives ``value >= threshold``; below zero, bytes ``255 * value``;
            None, values.
        method: ``"detectron2"``: every pixel of the image is a sample of the mask, with zeros
            outside. ``"torchvision"``: boxes are snapped to whole pixels first.
        dtype: values are computed, and with ``threshold=None`` returned, in this dtype.

    Returns:
        ``[N, H, W]``, or ``[N, 1, H, W]`` where masks have that dimension.

    Gradients:
        Of values to masks, and by ``"detectron2"`` to boxes, of every order.

    Example:
        >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
        >>> paste_masks(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4)).int().tolist()
        [[[0, 0, 1, 0], [0, 1, 0, 0]]]
    """
    if method not in ("detectron2", "torchvision"):
        raise ValueError(f'method must be "detectron2" or "torchvision", got {method!r}')
    height, width = image_size
    rows, columns = masks.shape[-2:]
    pasted = [masks.new_zeros(0, height, width, dtype=dtype)]
    stack = masks.reshape(-1, 1, rows, columns).to(dtype)
    for mask, (x1, y1, x2, y2) in zip(stack, boxes.to(dtype), strict=True):
        if method == "torchvision":
            grow = (columns + 2) / columns
            along_y = _snapped_paste_axis(y1, y2, rows, grow, height)
            along_x = _snapped_paste_axis(x1, x2, columns, grow, width)
        else:
            along_y = _paste_axis(y1, y2, rows, height)
            along_x = _paste_axis(x1, x2, columns, width)
        pasted.append(_pool(mask, along_y, along_x, height, width))
    values = torch.cat(pasted)
    if masks.ndim == 4:
        values = values[:, None]
    if threshold is None:
        return values
    if threshold >= 0:
        return values >= threshold
    return (values * 255).nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8)


def paste_masks_to_bits(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float = 0.5,
    method: str = "detectron2",
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """:func:`paste_masks` with eight pixels of a row in a byte, the first one in its lowest bit.

    Returns:
        ``[N, H, ceil(W / 8)]`` uint8, or ``[N, 1, H, ceil(W / 8)]`` where masks have that
        dimension.

    Example:
        >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
        >>> paste_masks_to_bits(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4)).tolist()
        [[[4], [2]]]
    """
    return pack_bits(paste_masks(masks, boxes, image_size, threshold, method, dtype=dtype))


def pack_bits(images: Tensor) -> Tensor:
    """Bool images ``[..., H, W]`` with eight pixels in a byte, see :func:`paste_masks_to_bits`.

    Example:
        >>> pack_bits(torch.tensor([[True, False, False, True]]))
        tensor([[9]], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(images.to(torch.uint8), (0, -images.shape[-1] % 8))
    pixels = padded.unflatten(-1, (padded.shape[-1] // 8, 8))
    place = torch.arange(8, dtype=torch.uint8, device=images.device)
    return torch.sum(pixels << place, -1, dtype=torch.uint8)


def coco_mask(image: Tensor) -> tuple[bytes, int, list[int]]:
    """COCO's compressed run lengths of a bool image, its pixels, and their tight box.

    Example:
        >>> coco_mask(torch.tensor([[False, True], [False, False]]))
        (b'211', 1, [1, 0, 2, 1])
    """
    pixels = image.T.flatten()  # column after column
    before = torch.cat([pixels.new_zeros(1), pixels[:-1]])[: len(pixels)]
    changes = (pixels != before).nonzero().flatten().tolist()
    ends = [*changes, len(pixels)]
    lengths = [end - start for start, end in zip([0, *changes], ends, strict=True)]
    box = [0, 0, 0, 0]
    if image.any():
        y, x = image.nonzero().unbind(1)
        box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
    return _coco_counts(lengths), int(image.sum()), box


def _coco_counts(lengths: Sequence[int]) -> bytes:
    """COCO's text for run lengths: after the third one, differences to the one before the last."""
    text = bytearray()
    for i, length in enumerate(lengths):
        number = length - lengths[i - 2] if i > 2 else length
        more = True
        while more:
            # Five bits in each character, low ones first; the sixth says whether more follow.
            bits = number & 31
            number >>= 5
            more = number != (-1 if bits & 16 else 0)
            text.append(48 + bits + (32 if more else 0))
    return bytes(text)


def paste_masks_to_rle(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float = 0.5,
    method: str = "detectron2",
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[dict[str, list[int] | bytes]], Tensor, Tensor]:
    """:func:`paste_masks` as COCO's compressed run lengths, by way of the images.

    Returns:
        For each mask a dict with ``size`` and ``counts``; ``[N]`` int64, its pixels; ``[N, 4]``
        int64, its tight box of x1, y1, x2, y2 in edge units, zeros without a pixel.

    Example:
        >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
        >>> paste_masks_to_rle(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4))
        ([{'size': [2, 4], 'counts': b'323'}], tensor([2]), tensor([[1, 0, 3, 2]]))
    """
    height, width = image_size
    pasted = paste_masks(masks, boxes, image_size, threshold, method, dtype=dtype)
    found = [coco_mask(image) for image in pasted.reshape(-1, height, width).cpu()]
    rles: list[dict[str, list[int] | bytes]] = [
        {"size": [height, width], "counts": counts} for counts, _, _ in found
    ]
    areas = torch.tensor([area for _, area, _ in found], dtype=torch.int64)
    tight = torch.tensor([box for _, _, box in found], dtype=torch.int64).reshape(-1, 4)
    return rles, areas, tight


# ------------------------------------------------------------------------------ resized crops


def _filter_taps(
    low: Tensor, high: Tensor, cells: int, size: int, antialias: bool, support: str, padding: str
) -> _AxisTaps:
    """Taps of an axis whose cells weigh pixels by a triangle. Places are float64 edge units."""
    step = (high - low) / cells
    if not (torch.isfinite(low) and torch.isfinite(step)) or step == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=low.device)
        return _AxisTaps(nothing, nothing, low.new_zeros(0))
    reach = torch.ones_like(step)
    if antialias and abs(step) > 1:
        reach = step.abs()
    first, last = (low, high) if step > 0 else (high, low)  # of the window
    if support == "image":
        first = torch.where(first > 0, torch.zeros_like(first), first)
        last = torch.where(last < size, torch.full_like(last, size), last)
    outer = first.detach().floor(), last.detach().ceil() - 1

    # A row for each cell, a column for each pixel.
    cell = torch.arange(cells, dtype=torch.float64, device=low.device)
    centre = ((low - 0.5) + (cell + 0.5) * step)[:, None]
    split = centre.detach().floor()
    begin = torch.maximum((centre - reach).detach().floor() + 1, outer[0])
    end = torch.minimum((centre + reach).detach().floor(), outer[1])

    def triangle(pixel: Tensor) -> Tensor:
        """The height of the filter over the middle of a pixel."""
        away = torch.where(pixel <= centre.detach(), centre - pixel, pixel - centre)
        return 1 - away / reach

    def share(pixel: Tensor) -> Tensor:
        """How much of a pixel the window covers."""
        left = torch.where(first.detach() >= pixel, first, pixel)
        right = torch.where(last.detach() <= pixel + 1, last, pixel + 1)
        return right - left

    def total(begin: Tensor, end: Tensor) -> Tensor:
        """The weights of pixels begin .. end: outer ones, and two arithmetic series in between."""

        def some(holds: Tensor, weight: Tensor) -> Tensor:
            return torch.where(holds, weight, torch.zeros_like(weight))

        at_first = (begin == outer[0]) & (begin <= end)
        at_last = (end == outer[1]) & (begin + at_first.double() <= end)
        weight = some(at_first, triangle(begin) * share(begin))
        weight = weight + some(at_last, triangle(end) * share(end))
        begin, end = begin + at_first.double(), end - at_last.double()
        left, right = (begin, torch.minimum(end, split)), (torch.maximum(begin, split + 1), end)
        for one, other in (left, right):
            series = (triangle(one) + triangle(other)) / 2 * (other - one + 1)
            weight = weight + some(one <= other, series)
        return weight

    everything = total(begin, end)
    valid = (everything > 0) & (begin <= end)
    everything = torch.where(valid, everything, torch.ones_like(everything))
    pixel = torch.arange(size, device=low.device)[None, :]
    inside = (pixel >= begin) & (pixel <= end)
    parts = [(pixel, inside, triangle(pixel.double()) * share(pixel.double()))]
    if padding == "border":
        before, behind = end.clamp(max=-1), begin.clamp(min=size)
        parts.append((pixel[:, :1], begin <= before, total(begin, before)))
        parts.append((pixel[:, -1:], behind <= end, total(behind, end)))
    found = []
    for at, counts, weight in parts:
        row, column = (counts & valid).nonzero().unbind(1)
        found.append(_AxisTaps(row, at[0][column], (weight / everything)[row, column]))
    return _AxisTaps(*(torch.cat(part) for part in zip(*found, strict=True)))


def crop_batch(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    *,
    input_format: str = "NCHW",
    image_index: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    scale: float | None = None,
    antialias: bool = True,
    flip: bool | Tensor | None = None,
    support: str = "box",
    padding_mode: str = "constant",
    fill: float = 0.0,
    dtype: torch.dtype = torch.float64,
    bad_index: str = "zeros",
) -> Tensor:
    """Boxes of images, resized by a filter, scaled and normalised, in plain PyTorch.

    Args and differences as in :func:`glimpse_ext.crop_batch`, but everything is computed and
    returned in ``dtype``, apart from weights, which are always float64; ``bad_index="zeros"`` gives
    a row without pixels, which is ``fill``, to a box whose image does not exist. Second derivatives
    in boxes exist.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        >>> crop_batch(image, boxes, 1).item()
        7.5
    """
    _check_bad_index(bad_index)
    last = {"NCHW": False, "NHWC": True}[input_format]
    single = [image.permute(2, 0, 1) if last else image for image in images]
    count, channels = len(single), single[0].shape[0] if single else 0
    if not single and isinstance(images, Tensor):
        channels = images.shape[3 if last else 1]
    if scale is None:
        first = images if isinstance(images, Tensor) else images[0]
        scale = 1 / 255 if first.dtype == torch.uint8 else 1.0

    columns = 4 if isinstance(boxes, Tensor) and boxes.shape[1] == 4 else 5
    if isinstance(boxes, Tensor) and columns == 4:
        index = torch.arange(len(boxes)) // max(len(boxes) // max(count, 1), 1)
        index = index if image_index is None else image_index
        rows = torch.cat([index[:, None].to(boxes.device, torch.float64), boxes.double()], 1)
    else:
        rows = _boxes_matrix(boxes, torch.float64)
    flips = flip if isinstance(flip, Tensor) else torch.full((len(rows),), bool(flip))
    height, width = _output_size(output_size)

    def per_channel(numbers: float | Sequence[float]) -> Tensor:
        values = torch.as_tensor(numbers, dtype=dtype).flatten()
        return values.to(single[0].device if single else "cpu")[:, None, None]

    results = []
    for box, mirrored in zip(rows, flips.tolist(), strict=True):
        image = _image_index(box[0].detach(), count, bad_index)
        values = rows.new_full((channels, height, width), fill, dtype=dtype)
        if image is not None:
            own = single[image].to(dtype) - fill
            _, x1, y1, x2, y2 = box
            if mirrored:
                x1, x2 = x2, x1
            options = (antialias, support, padding_mode)
            by_row = _filter_taps(y1, y2, height, own.shape[1], *options)
            by_column = _filter_taps(x1, x2, width, own.shape[2], *options)
            by_row, by_column = (
                taps._replace(weight=taps.weight.to(dtype)) for taps in (by_row, by_column)
            )
            values = _pool(own, by_row, by_column, height, width) + fill
        results.append(values * scale)
    out = (
        torch.stack(results) if results else rows.new_zeros(0, channels, height, width, dtype=dtype)
    )
    if mean is not None:
        out = out - per_channel(mean)
    return out if std is None else out / per_channel(std)
