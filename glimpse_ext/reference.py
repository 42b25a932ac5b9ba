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

__all__ = ["assign_levels", "multiscale_roi_align", "paste_masks", "roi_align"]

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


def _boxes_matrix(boxes: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Boxes as one ``[K, 5]`` tensor (image, x1, y1, x2, y2) of ``dtype``."""
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"boxes must be [K, 5] (image, x1, y1, x2, y2), got {list(boxes.shape)}"
            )
        return boxes.to(dtype)
    if len(boxes) == 0:
        raise ValueError("boxes must be [K, 5] or one [L, 4] per image, got an empty list")
    rows = []
    for image, of_image in enumerate(boxes):
        if of_image.ndim != 2 or of_image.shape[1] != 4:
            raise ValueError(
                f"boxes[{image}] must be [L, 4] (x1, y1, x2, y2), got {list(of_image.shape)}"
            )
        corners = of_image.to(dtype)
        rows.append(torch.cat([torch.full_like(corners[:, :1], image), corners], dim=1))
    return torch.cat(rows)


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
