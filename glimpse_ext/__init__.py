# SPDX-License-Identifier: BSD-3-Clause
"""Every box-shaped read of an image as fast, deterministic, differentiable PyTorch operators."""

from pathlib import Path as _Path

__version__ = "0.1.0"

from . import _library, nn, onnx, reference
from ._arguments import set_check_indices
from ._library import FallbackWarning
from ._memory import set_huge_pages
from .convert_boxes import convert_boxes
from .crop import crop, crop_and_resize, point_sample
from .crop_batch import crop_batch
from .extract_glimpse import extract_glimpse
from .paste_masks import paste_masks
from .paste_masks_to_bits import paste_masks_to_bits, unpack_masks
from .paste_masks_to_rle import PastedRLE, paste_masks_to_rle
from .patching import Patch, patch
from .roi_align import multiscale_roi_align, roi_align
from .roi_align_rotated import roi_align_rotated

__all__ = [
    "FallbackWarning",
    "PastedRLE",
    "Patch",
    "convert_boxes",
    "crop",
    "crop_and_resize",
    "crop_batch",
    "extract_glimpse",
    "multiscale_roi_align",
    "nn",
    "onnx",
    "paste_masks",
    "paste_masks_to_bits",
    "paste_masks_to_rle",
    "patch",
    "point_sample",
    "reference",
    "roi_align",
    "roi_align_rotated",
    "set_check_indices",
    "set_huge_pages",
    "unpack_masks",
]

library_info = _library.library_info

cmake_prefix_path = str(_Path(__file__).resolve().parent / "share" / "cmake")
"""Where CMake's ``find_package(glimpse_ext)`` finds the libraries of this installation."""
