# SPDX-License-Identifier: BSD-3-Clause
"""Two ways to pool: this package's operators, and ``grid_sample`` as a careful user writes it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

import glimpse_ext
from glimpse_ext import _grid_sample

# A box as large as this is read from the level of stride 16 (level 4 of a pyramid), one half as
# large from stride 8, and so on. With the usual 224 all coins would land on the finest level.
CANONICAL_SIZE = 80
CANONICAL_LEVEL = 4
SAMPLES = 2  # samples per cell and axis


class Pooling(Protocol):
    """What the detector needs: boxes ``[K, 5]`` to pooled features ``[K, C, size, size]``."""

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        """Read each box from the level that suits its size."""
        ...

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Read boxes from full-size pictures ``[N, C, H, W]``."""
        ...


class GlimpsePooling:
    """One operator call, whatever the number of levels, images and boxes."""

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        return glimpse_ext.multiscale_roi_align(
            features,
            boxes,
            (size, size),
            scales,
            sampling_ratio=SAMPLES,
            aligned=True,
            canonical_size=CANONICAL_SIZE,
            canonical_level=CANONICAL_LEVEL,
        )

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        return glimpse_ext.roi_align(image, boxes, (size, size), 1.0, SAMPLES, aligned=True)


class GridSamplePooling:
    """The same numbers from ``grid_sample``, for boxes that lie inside their image."""

    def pyramid(
        self, features: Sequence[Tensor], boxes: Tensor, size: int, scales: Sequence[float]
    ) -> Tensor:
        return _grid_sample.multiscale_roi_align(
            features, boxes, size, scales, SAMPLES, True, CANONICAL_SIZE, CANONICAL_LEVEL
        )

    def image(self, image: Tensor, boxes: Tensor, size: int) -> Tensor:
        return _grid_sample.roi_align(image, boxes, size, 1.0, SAMPLES, True)
