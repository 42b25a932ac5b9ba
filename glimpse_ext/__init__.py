# SPDX-License-Identifier: BSD-3-Clause
"""Every box-shaped read of an image as fast, deterministic, differentiable PyTorch operators."""

from . import _library, reference
from . import extract_glimpse as _extract_glimpse  # noqa: F401
from ._arguments import set_check_indices
from .crop import crop, crop_and_resize, point_sample
from .paste_masks import paste_masks
from .roi_align import multiscale_roi_align, roi_align

__all__ = [
    "crop",
    "crop_and_resize",
    "multiscale_roi_align",
    "paste_masks",
    "point_sample",
    "reference",
    "roi_align",
    "set_check_indices",
]

__version__ = "0.1.0"

library_info = _library.library_info
