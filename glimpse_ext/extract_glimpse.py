# SPDX-License-Identifier: BSD-3-Clause
"""Glimpses: windows of one size around a point of each image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._register import register_sampler
from ._sampling import COLUMNS, BoxColumns, Sampler, Where

_KIND = 2
_ONE_SCALE = BoxColumns(2, y=(0, 0), x=(1, 1))
_SCALE_COLUMN = BoxColumns(3, y=(0, 2), x=(1, 2))
COLUMNS[_KIND] = lambda params: _ONE_SCALE if params[3] > 0 else _SCALE_COLUMN


def _bind_subpixel(
    input: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    version: int,
    centered: bool,
    normalized: bool,
    scale: int,
) -> tuple[Sequence[Tensor], Where]:
    params = (version, centered, normalized, scale)
    sampler = Sampler((height, width), _KIND, params, (1.0,), ())
    return [input], Where(offsets, None, None, None, 0, sampler)


_subpixel_glimpse = register_sampler("subpixel_glimpse", _bind_subpixel)
