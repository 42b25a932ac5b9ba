# SPDX-License-Identifier: BSD-3-Clause
"""Masks of boxes as masks of images with one bit for each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._register import batch_rows
from .paste_masks import image_extent, outline_arguments

_NAME = "paste_masks_to_bits"
_bits = torch.ops.glimpse_ext.paste_masks_to_bits.default


def _fake_bits(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, snapped: bool
) -> Tensor:
    size = (masks.shape[0], 1, height, (width + 7) // 8)
    return torch.empty(size, dtype=torch.uint8, device=masks.device)


torch.library.register_fake("glimpse_ext::paste_masks_to_bits", _fake_bits)
torch.library.register_vmap("glimpse_ext::paste_masks_to_bits", batch_rows(_bits))


def paste_masks_to_bits(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    threshold: float = 0.5,
    method: str = "detectron2",
) -> Tensor:
    """The masks of :func:`paste_masks` with one bit for each pixel: an eighth of their memory.

    Pixel x of a row is bit ``x % 8``, counted from the lowest one, of byte ``x // 8``::

        pixels   0 1 1 0 0 1 0 1 | 1 0                    image 10 pixels wide
        bytes         0xa6       | 0x01                   bits behind the last pixel are 0

    That is ``numpy.packbits(pasted, axis=-1, bitorder="little")``. In this order pixel x of a row
    is bit x of the row as one long number, so that it is found without turning bits round, and
    words of any size can be taken from the bytes; NumPy's default is the other one, the first pixel
    in the highest bit. Both count and combine alike: ``a & b`` are the pixels that two masks share.

    No image of whole bytes is ever made.

    Args:
        masks, boxes, image_size, method: as in :func:`paste_masks`.
        threshold: zero or more; bits are ``value >= threshold``.

    Returns:
        ``[N, H, ceil(W / 8)]`` uint8, or ``[N, 1, H, ceil(W / 8)]`` where masks have that
        dimension; :func:`unpack_masks` makes bool images of them. They hold exactly what
        :func:`paste_masks` has, on every device.

    No gradients. Deterministic; works under ``torch.compile`` and ``vmap`` and in CUDA graphs.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, a negative threshold.
        ValueError, TypeError: an unknown method, an image size or threshold that is none.

    >>> import torch, glimpse_ext
    >>> mask = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    >>> glimpse_ext.paste_masks_to_bits(mask, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (2, 4))
    tensor([[[4],
             [2]]], dtype=torch.uint8)
    """
    arguments, flat = outline_arguments(_NAME, masks, boxes, image_size, threshold, method)
    bits: Tensor = _bits(*arguments)
    return bits.squeeze(1) if flat else bits


def unpack_masks(bits: Tensor, image_size: Sequence[int]) -> Tensor:
    """The bool images of :func:`paste_masks_to_bits`.

    Take some masks of many, ``unpack_masks(bits[kept], image_size)``, and only those are made.

    Args:
        bits: ``[..., H, ceil(W / 8)]`` uint8, the lowest bit first.
        image_size: height and width of the images in pixels.

    Returns:
        ``[..., H, W]`` bool, the numbers of
        ``numpy.unpackbits(bits, axis=-1, count=W, bitorder="little")``.

    Gradients:
        none: bits have none.

    Raises:
        TypeError, RuntimeError: bits that are no uint8 tensor, or not of images of this size.

    >>> import torch, glimpse_ext
    >>> glimpse_ext.unpack_masks(torch.tensor([[[4], [2]]], dtype=torch.uint8), (2, 4))
    tensor([[[False, False,  True, False],
             [False,  True, False, False]]])
    """
    name = "unpack_masks"
    height, width = image_extent(name, image_size)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        found = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"{name}: bits must be a uint8 tensor, got {found}")
    if bits.dim() < 2 or bits.shape[-2] != height or bits.shape[-1] != (width + 7) // 8:
        raise RuntimeError(
            f"{name}: bits of images of {height} x {width} must be "
            f"[..., {height}, {(width + 7) // 8}], got {list(bits.shape)}"
        )
    single = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & single).flatten(-2)[..., :width] != 0
