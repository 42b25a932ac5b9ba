# SPDX-License-Identifier: BSD-3-Clause
"""csrc/geometry on tensors: what is there a number of one box is here a number of each box."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SAMPLES = 2**31 - 1
FRACTION, NORMALIZED, PIXELS = range(3)
"""Unit of conventions.h."""


class Axis(NamedTuple):
    """axis.h; ``[K]`` each. Slopes are numbers, or tensors where a box can be clamped."""

    origin: Tensor
    step: Tensor
    phase: float
    samples: Tensor
    origin_lo: Tensor | float = 0.0
    origin_hi: Tensor | float = 0.0
    step_lo: Tensor | float = 0.0
    step_hi: Tensor | float = 0.0

    def position(self, box: Tensor, cell: Tensor, sample: Tensor) -> Tensor:
        step, samples = self.step[box], self.samples[box].clamp(min=1)
        dtype = step.dtype
        within = (sample.to(dtype) + self.phase) * step / samples.to(dtype)
        return self.origin[box] + cell.to(dtype) * step + within

    def progress(self, box: Tensor, cell: Tensor, sample: Tensor) -> Tensor:
        dtype = self.step.dtype
        samples = self.samples[box].clamp(min=1).to(dtype)
        return cell.to(dtype) + (sample.to(dtype) + self.phase) / samples

    def read_by(self, reads: Tensor) -> Axis:
        """The same without samples in boxes that read nothing."""
        return self._replace(samples=torch.where(reads, self.samples, 0))


# ---------------------------------------------------------------------------------------------
# conventions.h and rotated.h


def _counts(step: Tensor, sampling_ratio: int) -> Tensor:
    if sampling_ratio > 0:
        return torch.full_like(step, sampling_ratio, dtype=torch.int64)
    counts = (step > 0) & (step <= MAX_SAMPLES - 127)
    return torch.where(counts, step, 0).ceil().to(torch.int64)


def roi_align_axis(
    lo: Tensor, hi: Tensor, scale: float, aligned: bool, sampling_ratio: int, cells: int
) -> Axis:
    offset = 0.5 if aligned else 0.0
    start, end = lo * scale - offset, hi * scale - offset
    extent = end - start
    clamped = extent < 1 if not aligned else torch.zeros_like(extent, dtype=torch.bool)
    step = torch.where(clamped, 1.0, extent) / cells
    slope = torch.where(clamped, 0.0, torch.full_like(step, scale) / cells)
    samples = _counts(step, sampling_ratio)
    return Axis(start, step, 0.5, samples, scale, 0.0, -slope, slope)


def rotated_axis(
    length: Tensor, scale: float, minimum_one: bool, sampling_ratio: int, cells: int
) -> Axis:
    extent = length * scale
    clamped = extent < 1 if minimum_one else torch.zeros_like(extent, dtype=torch.bool)
    extent = torch.where(clamped, 1.0, extent)
    step = extent / cells
    moves = torch.where(clamped, 0.0, torch.full_like(step, scale))
    samples = _counts(step, sampling_ratio)
    return Axis(-extent / 2, step, 0.5, samples, 0.0, -moves / 2, 0.0, moves / cells)


def _once(origin: Tensor, step: Tensor, phase: float, *slopes: float) -> Axis:
    samples = (torch.isfinite(origin) & torch.isfinite(step)).to(torch.int64)
    return Axis(origin, step, phase, samples, *slopes)


def half_pixel_axis(lo: Tensor, hi: Tensor, unit: int, size: int, cells: int) -> Axis:
    shift = 1.0 if unit == NORMALIZED else 0.0
    pixels = {FRACTION: float(size), NORMALIZED: size * 0.5, PIXELS: 1.0}[unit]
    origin = (lo + shift) * pixels - 0.5
    step = (hi - lo) * pixels / cells
    slope = pixels / max(cells, 1)
    return _once(origin, step, 0.5, pixels, 0.0, -slope, slope)


def corner_aligned_axis(lo: Tensor, hi: Tensor, unit: int, size: int, cells: int) -> Axis:
    pixels = {FRACTION: float(size - 1), NORMALIZED: (size - 1) * 0.5, PIXELS: 1.0}[unit]
    if unit == FRACTION and lo.dtype == torch.float32:
        tiny = torch.finfo(torch.float32).tiny
        lo, hi = (torch.where(v.abs() < tiny, 0.0, v) for v in (lo, hi))
    shift = 1.0 if unit == NORMALIZED else 0.0
    first = lo + shift
    if cells == 1:
        middle = 0.5 * (first + (hi + shift)) * pixels
        return _once(middle, torch.zeros_like(middle), 0.0, 0.5 * pixels, 0.5 * pixels)
    step = (hi - lo) * pixels / (cells - 1)
    slope = pixels / (cells - 1)
    return _once(first * pixels, step, 0.0, pixels, 0.0, -slope, slope)


class GlimpseRule(NamedTuple):
    version: int
    centered: bool
    normalized: bool

    def origin(self, offset: Tensor, size: int, extent: Tensor | int) -> Tensor:
        place = offset
        if self.normalized:
            place = place * size
        if self.centered:
            if self.normalized or self.version == 1:
                place = place / 2
            place = place + size / 2
        if self.version == 1 or (self.normalized and self.centered):
            place = place - extent / 2
        return place

    def slope(self, size: int) -> float:
        halved = self.centered and (self.normalized or self.version == 1)
        return (size if self.normalized else 1.0) * (0.5 if halved else 1.0)


def glimpse_axis(offset: Tensor, rule: GlimpseRule, scale: Tensor, size: int, cells: int) -> Axis:
    step = scale.to(offset.dtype)
    axis = _once(rule.origin(offset, size, cells * step), step, 0.0, rule.slope(size))
    return axis._replace(samples=axis.samples * scale)


def truncated(origin: Tensor) -> Tensor:
    """The integer origin of a whole glimpse; infinite where it has none."""
    return torch.where(origin.abs() < 2.0**63, origin.trunc(), math.inf)


def whole_glimpse_axis(
    offset: Tensor, rule: GlimpseRule, single: bool, size: int, cells: int
) -> Axis:
    place = offset.float() if single else offset
    first = truncated(rule.origin(place, size, cells)).to(offset.dtype)
    return _once(first, torch.ones_like(first), 0.0)


def given_axis(origin: Tensor, step: Tensor) -> Axis:
    return _once(origin, step, 0.0, 1.0, 0.0, 0.0, 1.0)


# ---------------------------------------------------------------------------------------------
# border.h

CLAMP, DROP, EXACT, NEAREST = range(4)


class Border(NamedTuple):
    reach: float
    mode: int


class Taps(NamedTuple):
    """``[S, 2]`` each; ``there`` says which of the two taps of a sample exist."""

    there: Tensor
    pixel: Tensor
    weight: Tensor
    slope: Tensor


def border_taps(border: Border, position: Tensor, size: int) -> Taps:
    inside = (position >= -border.reach) & (position <= (size - 1) + border.reach)
    low = torch.where(inside, position, 0.0).floor().clamp(-2, size)
    fraction = torch.where(inside, position, 0.0) - low
    pixel = low.to(torch.int64)
    one, none = torch.ones_like(fraction), torch.zeros_like(fraction)
    if border.mode == DROP:
        first, second = (pixel >= 0) & (pixel < size), (pixel >= -1) & (pixel + 1 < size)
        pixels = torch.stack([pixel, pixel + 1], 1)
        there = torch.stack([first, second], 1) & inside[:, None]
        return Taps(
            there,
            pixels.clamp(0, max(size - 1, 0)),
            torch.stack([1 - fraction, fraction], 1),
            torch.stack([-one, one], 1),
        )
    outer = (low < 0) | (low >= size - 1)
    if border.mode == NEAREST:
        up = ~outer & (fraction >= 0.5)
        both = torch.zeros_like(inside)
    else:
        up = both = torch.zeros_like(inside)
        moves = position > 0 if border.mode == CLAMP else fraction > 0
        both = inside & ~outer & moves
    pixel = (pixel + up.to(torch.int64)).clamp(0, size - 1)
    fraction = torch.where(both, fraction, none)
    slope = torch.where(both, one, none)
    return Taps(
        torch.stack([inside, both], 1),
        torch.stack([pixel, (pixel + 1).clamp(max=size - 1)], 1),
        torch.stack([1 - fraction, fraction], 1),
        torch.stack([-slope, slope], 1),
    )


# ---------------------------------------------------------------------------------------------
# tables.h


class Samples(NamedTuple):
    """Samples of all boxes in the order of boxes, cells, samples. ``first``, ``counts``: of each
    cell, ``[K, cells]``."""

    box: Tensor
    cell: Tensor
    sample: Tensor
    first: Tensor
    counts: Tensor

    def of_boxes(self) -> Tensor:
        """Their number in each box."""
        return self.counts.sum(1)


def _passed(axis: Axis, bound: Tensor, inclusive: bool, cells: int) -> Tensor:
    """first_beyond of tables.h for each box and cell."""
    boxes = len(axis.origin)
    box = torch.arange(boxes, device=axis.origin.device)[:, None].expand(boxes, cells)
    cell = torch.arange(cells, device=box.device).expand(boxes, cells)
    samples = axis.samples[:, None].expand(boxes, cells)
    growing = ~(axis.step < 0)[:, None]
    low, high = torch.zeros_like(samples), samples
    for _ in range(int(samples.max()).bit_length() if samples.numel() else 0):
        middle = (low + high) // 2
        position = axis.position(box, cell, torch.where(growing, middle, samples - 1 - middle))
        beyond = position >= bound if inclusive else position > bound
        searching = low < high
        low = torch.where(searching & ~beyond, middle + 1, low)
        high = torch.where(searching & beyond, middle, high)
    return low


def samples_within(axis: Axis, cells: int, low: Tensor, high: Tensor) -> Samples:
    """The samples whose position may lie in [low, high] of their box; all where they are few."""
    few = 8
    samples = axis.samples[:, None].expand(-1, cells)
    begin, end = torch.zeros_like(samples), samples
    if bool((samples > few).any()):
        first = _passed(axis, low[:, None], True, cells)
        last = torch.maximum(first, _passed(axis, high[:, None], False, cells))
        mirrored = (axis.step < 0)[:, None]
        first, last = (
            torch.where(mirrored, samples - last, first),
            torch.where(mirrored, samples - first, last),
        )
        begin = torch.where(samples > few, first, begin)
        end = torch.where(samples > few, last, end)
        some = begin < end
        begin, end = torch.where(some, begin, 0), torch.where(some, end, 0)
    count = end - begin
    number = torch.arange(int(count.sum()), device=count.device)
    flat = count.flatten()
    row = torch.repeat_interleave(torch.arange(flat.numel(), device=count.device), flat)
    before = torch.cumsum(flat, 0) - flat
    sample = number - before[row] + begin.flatten()[row]
    return Samples(row // max(cells, 1), row % max(cells, 1), sample, begin, count)


def pairs(first: Tensor, second: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All pairs of a row of the first and one of the second list that belong to the same box.

    first, second: how many rows each box has, ``[K]``; rows lie in the order of boxes. Gives (box,
    first row, second row) of at most ``at_once`` pairs at a time.
    """
    count = first * second
    ends = torch.cumsum(count, 0)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - count
    first_starts, second_starts = torch.cumsum(first, 0) - first, torch.cumsum(second, 0) - second
    for begin in range(0, total, at_once):
        number = torch.arange(begin, min(begin + at_once, total), device=ends.device)
        box = torch.searchsorted(ends, number, right=True)
        number = number - starts[box]
        width = second[box]
        yield box, first_starts[box] + number // width, second_starts[box] + number % width
