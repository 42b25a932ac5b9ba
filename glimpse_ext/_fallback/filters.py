# SPDX-License-Identifier: BSD-3-Clause
"""csrc/geometry/filter.h on tensors: rows of weights of cells that weigh pixels. All is float64.

Numbers of boxes are ``[K, 1]``, and numbers of their cells ``[K, cells]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FilterRule(NamedTuple):
    antialias: bool
    beyond: bool
    edge: bool


class FilterTaps(NamedTuple):
    """Of all boxes, in the order of boxes, cells, pixels."""

    box: Tensor
    cell: Tensor
    pixel: Tensor
    weight: Tensor
    slope_origin: Tensor
    slope_step: Tensor
    coverage: Tensor
    """Of each cell the sum of its weights; with those of the edge it is 1."""


class _Moving(NamedTuple):
    """Numbers, and how they follow the origin and the step of their axis."""

    value: Tensor
    origin: Tensor
    step: Tensor

    def times(self, other: _Moving) -> _Moving:
        return _Moving(
            self.value * other.value,
            self.origin * other.value + self.value * other.origin,
            self.step * other.value + self.value * other.step,
        )

    def divided_by(self, other: _Moving) -> _Moving:
        share = self.value / other.value
        return _Moving(
            share,
            (self.origin - share * other.origin) / other.value,
            (self.step - share * other.step) / other.value,
        )

    def of_taps(self, box: Tensor, cell: Tensor) -> _Moving:
        return _Moving(*(_of_taps(numbers, box, cell) for numbers in self))


def _of_taps(numbers: Tensor, box: Tensor, cell: Tensor) -> Tensor:
    return numbers[box, torch.zeros_like(cell) if numbers.shape[1] == 1 else cell]


def _where(holds: Tensor, first: _Moving, second: _Moving) -> _Moving:
    return _Moving(*(torch.where(holds, a, b) for a, b in zip(first, second, strict=True)))


def _sum(*terms: tuple[Tensor, _Moving]) -> _Moving:
    """Of the terms that hold."""

    def of(column: int) -> Tensor:
        parts = [torch.where(holds, numbers[column], 0.0) for holds, numbers in terms]
        return torch.stack(parts).sum(0)

    return _Moving(of(0), of(1), of(2))


def _share(pixel: Tensor, low: _Moving, high: _Moving) -> _Moving:
    """How much of pixels of the window low .. high it covers."""
    none = torch.zeros_like(pixel)
    begin = _where(low.value >= pixel, low, _Moving(pixel, none, none))
    end = _where(high.value <= pixel + 1, high, _Moving(pixel + 1, none, none))
    return _Moving(*(b - a for a, b in zip(begin, end, strict=True)))


class _Line:
    """FilterLine: one axis of each box."""

    def __init__(self, rule: FilterRule, lo: Tensor, hi: Tensor, size: int, cells: int) -> None:
        lo, hi = lo.double()[:, None], hi.double()[:, None]
        step = (hi - lo) / max(cells, 1)
        self.valid = torch.isfinite(lo) & torch.isfinite(step) & (step != 0)
        # Boxes that read nothing go along with numbers of their own.
        lo, hi = torch.where(self.valid, lo, 0.0), torch.where(self.valid, hi, float(cells))
        step = torch.where(self.valid, step, 1.0)
        wide = (step.abs() > 1) & rule.antialias
        self.reach = torch.where(wide, step.abs(), 1.0)
        self.reach_step = torch.where(wide, step.sign(), 0.0)
        none = torch.zeros_like(step)
        first, second = _Moving(lo, none + 1, none), _Moving(hi, none + 1, none + cells)
        self.low, self.high = _where(step > 0, first, second), _where(step > 0, second, first)
        if rule.beyond:
            self.low = _where(self.low.value > 0, _Moving(none, none, none), self.low)
            end = _Moving(none + size, none, none)
            self.high = _where(self.high.value < size, end, self.high)
        self.low_pixel = self.low.value.floor()
        self.high_pixel = self.high.value.ceil() - 1
        middle = torch.arange(cells, dtype=torch.float64, device=lo.device) + 0.5
        self.middle = middle.expand(len(lo), cells)
        self.centre = (lo - 0.5) + self.middle * step

    def _series(self, first: Tensor, last: Tensor, side: Tensor | float) -> _Moving:
        """The sum of pixels first .. last, all on one side of the centre and covered in full."""
        count = last - first + 1
        tents = [1 - side * (pixel - self.centre) / self.reach for pixel in (first, last)]
        total = count * (tents[0] + tents[1]) * 0.5
        along_centre = side * count / self.reach
        along_reach = (count - total) / self.reach
        along_step = along_centre * self.middle + along_reach * self.reach_step
        return _Moving(total, along_centre, along_step)

    def _outer(self, pixel: Tensor) -> _Moving:
        side = torch.where(pixel > self.centre, 1.0, -1.0).double()
        return self._series(pixel, pixel, side).times(_share(pixel, self.low, self.high))

    def mass(self, first: Tensor, last: Tensor) -> _Moving:
        """The weights of the pixels first .. last of the window, added up."""
        at_first = first == self.low_pixel
        begin = first + at_first.double()
        at_last = (last == self.high_pixel) & (begin <= last)
        end = last - at_last.double()
        split = self.centre.floor()
        left, right = torch.minimum(end, split), torch.maximum(begin, split + 1)
        return _sum(
            (at_first, self._outer(first)),
            (at_last, self._outer(last)),
            (begin <= left, self._series(begin, left, -1.0)),
            (right <= end, self._series(right, end, 1.0)),
        )


def filter_taps(rule: FilterRule, lo: Tensor, hi: Tensor, size: int, cells: int) -> FilterTaps:
    """lo, hi: ``[K]``, edge units. A box that is empty or not finite has no taps."""
    line = _Line(rule, lo, hi, size, cells)
    # A pixel at the right-hand end has no weight, but the right-hand slope.
    first = torch.maximum((line.centre - line.reach).floor() + 1, line.low_pixel)
    last = torch.minimum((line.centre + line.reach).floor(), line.high_pixel)
    whole = line.mass(first, last)
    reads = line.valid & (first <= last) & (whole.value > 0)
    whole = whole._replace(value=torch.where(reads, whole.value, 1.0))

    end = float(size - 1)
    own_first, own_last = first.clamp(min=0), last.clamp(max=end)
    read_first, read_last = own_first, own_last
    coverage = torch.ones_like(line.centre)
    if rule.edge:
        read_first, read_last = first.clamp(0, end), last.clamp(0, end)
    else:
        reads = reads & (own_first <= own_last)
        inside = line.mass(own_first, own_last).value / whole.value
        coverage = torch.where((first < 0) | (last > end), inside, coverage)
    coverage = torch.where(reads, coverage, 0.0)

    counts = torch.where(reads, read_last - read_first + 1, 0.0).to(torch.int64).flatten()
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    number = torch.arange(len(row), device=row.device) - (torch.cumsum(counts, 0) - counts)[row]
    box, cell = row // max(cells, 1), row % max(cells, 1)

    def of_taps(numbers: Tensor) -> Tensor:
        return _of_taps(numbers, box, cell)

    pixel = of_taps(read_first) + number
    distance, inverse = pixel - of_taps(line.centre), 1 / of_taps(line.reach)
    side = torch.where(distance > 0, inverse, -inverse)
    wider = distance.abs() * inverse.square() * of_taps(line.reach_step)
    tent = _Moving(
        (1 - distance.abs() * inverse).clamp(min=0), side, side * of_taps(line.middle) + wider
    )
    share = _share(pixel, line.low.of_taps(box, cell), line.high.of_taps(box, cell))
    weight = tent.times(share).divided_by(whole.of_taps(box, cell))
    own = (pixel >= of_taps(own_first)) & (pixel <= of_taps(own_last))
    terms = [(own, weight)]
    if rule.edge:
        before = line.mass(first, last.clamp(max=-1)).divided_by(whole)
        behind = line.mass(first.clamp(min=size), last).divided_by(whole)
        at_first = (pixel == of_taps(read_first)) & (of_taps(first) < 0)
        at_last = (pixel == of_taps(read_last)) & (of_taps(last) > end)
        terms += [(at_first, before.of_taps(box, cell)), (at_last, behind.of_taps(box, cell))]
    return FilterTaps(box, cell, pixel.to(torch.int64), *_sum(*terms), coverage)
