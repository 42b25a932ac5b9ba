# SPDX-License-Identifier: BSD-3-Clause
"""Every box-shaped read of an image as fast, deterministic, differentiable PyTorch operators."""

from . import _library, reference
from ._arguments import set_check_indices
from .crop import crop, crop_and_resize, point_sample
from .extract_glimpse import extract_glimpse
from .roi_align import multiscale_roi_align, roi_align

__all__ = [
    "crop",
    "crop_and_resize",
    "extract_glimpse",
    "multiscale_roi_align",
    "point_sample",
    "reference",
    "roi_align",
    "set_check_indices",
]

__version__ = "0.1.0"

library_info = _library.library_info
