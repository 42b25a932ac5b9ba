# SPDX-License-Identifier: BSD-3-Clause
"""ONNX: how ``torch.onnx.export`` writes the operators of this package in standard operators.

Needs ``pip install onnx onnxscript``; the models run in any runtime, without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["NotTranslatable", "translation_table"]


class NotTranslatable(RuntimeError):
    """A call has no equivalent in standard ONNX operators; the message names it and says why.

    ``torch.onnx.export`` raises its own error and has this one as a cause.
    """


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export(..., dynamo=True)`` takes as its ``custom_translation_table``.

    RoIAlign, on one map and on a pyramid, becomes the standard operator ``RoiAlign``, which reads
    the same samples with the same border; its maximum becomes a ``MaxPool`` over single samples,
    because ``RoiAlign(mode="max")`` takes the maximum of weighted pixels and not of samples. What
    reads one sample for each cell (crops, points, glimpses, pasted masks) and rotated boxes become
    the positions of the samples, four ``Gather`` and their weighted sum. Numbers agree to the
    rounding of sums, at the borders too; batch, boxes and image sizes may be dynamic.

    16-bit and uint8 images are read as float32, as the operators here do. A box that is NaN or
    infinite, or that names an image which is not there, gives zeros (or the fill value).

    A call without an equivalent raises :class:`NotTranslatable`: noise, the maximum and rotated
    boxes with an adaptive number of samples, masks with ``method="torchvision"``, run lengths and
    bits of masks, ``crop_batch``, derivatives, and an output size that is not known when the model
    is exported.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.

    >>> import torch, glimpse_ext
    >>> model = glimpse_ext.nn.RoIAlign(7, spatial_scale=0.25, aligned=True).eval()
    >>> images, boxes = torch.randn(1, 8, 32, 32), torch.tensor([[0, 4.0, 4.0, 40.0, 36.0]])
    >>> program = torch.onnx.export(  # doctest: +SKIP
    ...     model,
    ...     (images, boxes),
    ...     dynamo=True,
    ...     dynamic_shapes=({0: "n", 2: "h", 3: "w"}, {0: "k"}),
    ...     custom_translation_table=glimpse_ext.onnx.translation_table(),
    ... )
    """
    from ._onnx import TRANSLATIONS

    return dict(TRANSLATIONS)
