# SPDX-License-Identifier: BSD-3-Clause
"""What a call of a sampling operator is made of, without its feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Y, X, BOTH = 1, 2, 3
AXES = (Y, X)
"""Sets of axes, as bits."""


class BoxColumns(NamedTuple):
    """Columns of a box, not counting an image column."""

    width: int
    y: tuple[int, int]
    """Of the low and high edge along y; one column twice where a single number makes the axis."""
    x: tuple[int, int]


COLUMNS: dict[int, Callable[[tuple[float, ...]], BoxColumns]] = {}
"""The columns of each operator kind, from its params; csrc/geometry/operators.h."""


CURVED: dict[int, str] = {}
"""Kinds whose weights are not linear in the boxes, with the name that errors say: their second
derivatives along an axis are not zero and not known."""


@dataclass(frozen=True)
class Sampler:
    """The numbers of a call that are not tensors, as the generic operators take them.

    A dataclass, because torch.func takes tuples apart.
    """

    output_size: tuple[int, int]
    op: int
    params: tuple[float, ...]
    scales: tuple[float, ...]
    level_rule: tuple[float, ...]
    fill: float = 0.0
    """What stands in cells that read nothing."""
    slope_params: tuple[float, ...] | None = None
    """The params whose slopes are the derivative in the boxes, where they are not ``params``."""

    @property
    def even(self) -> bool:
        """Whether image indices may be left out where each image has as many boxes."""
        return self.op != 0

    @property
    def columns(self) -> BoxColumns:
        return COLUMNS[self.op](self.params)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """As the generic operators take them."""
        return (
            self.output_size,
            self.op,
            tuple(float(p) for p in self.params),
            tuple(float(s) for s in self.scales),
            tuple(float(r) for r in self.level_rule),
            self.fill,
        )

    @cached_property
    def linear(self) -> Sampler:
        """The part that is linear in the feature maps: nothing is filled in."""
        return self if self.fill == 0 else replace(self, fill=0.0)


@lru_cache(maxsize=256)
def _remembered_sampler(
    output_size: tuple[int, int],
    op: int,
    params: tuple[float, ...],
    scales: tuple[float, ...],
    level_rule: tuple[float, ...],
) -> Sampler:
    return Sampler(output_size, op, params, scales, level_rule)


def make_sampler(
    output_size: tuple[int, int],
    op: int,
    params: tuple[float, ...],
    scales: tuple[float, ...] = (1.0,),
    level_rule: tuple[float, ...] = (),
) -> Sampler:
    """A Sampler that fills with zeros; one object for the same numbers, as calls repeat them."""
    try:
        return _remembered_sampler(output_size, op, params, scales, level_rule)
    except TypeError:  # symbolic sizes have no hash
        return Sampler(output_size, op, params, scales, level_rule)


@dataclass(frozen=True)
class Opaque:
    """Arguments in one piece. A dataclass for the reason that Sampler is one."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Maps:
    """Sizes and memory format of feature maps that are to be made."""

    sizes: tuple[int, ...]
    """N, C, then height and width of each map."""
    channels_last: bool

    @staticmethod
    def of(features: Sequence[Tensor]) -> Maps:
        first = features[0]
        sizes = tuple(first.shape)
        for feature in features[1:]:
            sizes += tuple(feature.shape[2:])
        return Maps(sizes, is_channels_last(first))

    def arguments(self) -> tuple[tuple[int, ...], bool]:
        return self.sizes, self.channels_last


class Where(NamedTuple):
    """Where is read: the boxes with what belongs to them, and how."""

    boxes: Tensor
    image_index: Tensor | None
    levels: Tensor | None
    tangent: Tensor | None
    axes: int
    sampler: Sampler

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.boxes,
            self.image_index,
            self.levels,
            self.tangent,
            self.axes,
            *self.sampler.arguments,
        )

    @property
    def image_column(self) -> int:
        """1 where column 0 of the boxes is the image index, else 0."""
        return self.boxes.shape[-1] - self.sampler.columns.width

    def linear(self) -> Where:
        """The part that is linear in the feature maps."""
        if self.sampler.fill == 0:
            return self
        return self._replace(sampler=self.sampler.linear)

    def slopes(self) -> Where:
        """Where derivatives in the boxes are taken."""
        params = self.sampler.slope_params
        if params is None:
            return self
        return self._replace(sampler=replace(self.sampler, params=params, slope_params=None))

    def along(self, axis: int, motion: Tensor, axes: int) -> Where:
        """The same place with ``axes`` in tangent mode, ``axis`` of them along ``motion``."""
        other = BOTH - axis
        if axes & other == 0 or self.tangent is None:
            return self._replace(tangent=motion, axes=axes)
        mask = axis_mask(self, axis)
        return self._replace(tangent=torch.where(mask, motion, self.tangent), axes=axes)


def axis_mask(where: Where, axes: int) -> Tensor:
    skip = where.image_column
    columns = where.sampler.columns
    # Compared on the device: a copy from the host would wait for the device.
    column = torch.arange(where.boxes.shape[1], device=where.boxes.device)
    mask = torch.zeros_like(column, dtype=torch.bool)
    for axis, edges in ((Y, columns.y), (X, columns.x)):
        if axes & axis:
            for edge in edges:
                mask = mask | (column == skip + edge)
    return mask


def restrict(gradient: Tensor, where: Where, axes: int) -> Tensor:
    if axes == BOTH:
        return gradient
    return torch.where(axis_mask(where, axes), gradient, torch.zeros_like(gradient))


def is_channels_last(features: Tensor) -> bool:
    """The memory format of the result: that of the first feature map, as csrc/ops decides it."""
    return not features.is_contiguous() and features.stride(1) == 1 and features.shape[1] > 1


def place(args: Sequence[Any]) -> Where:
    """Where, from the sampling arguments of a generic operator."""
    boxes, image_index, levels, tangent, axes = args[:5]
    output_size, op, params, scales, level_rule, fill = args[5:]
    sampler = Sampler(
        tuple(output_size), op, tuple(params), tuple(scales), tuple(level_rule), float(fill)
    )
    return Where(boxes, image_index, levels, tangent, axes, sampler)


def bind_sample(features: Sequence[Tensor], *args: Any) -> tuple[Sequence[Tensor], Where]:
    return features, place(args)


def bind_grad_features(grad: Tensor, *args: Any) -> tuple[Tensor, Where, Maps]:
    return grad, place(args[:-2]), Maps(tuple(args[-2]), args[-1])


def bind_grad_boxes(
    features: Sequence[Tensor], grad: Tensor, *args: Any
) -> tuple[Sequence[Tensor], Tensor, Where]:
    return features, grad, place(args)
