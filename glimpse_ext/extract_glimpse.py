# SPDX-License-Identifier: BSD-3-Clause
"""Glimpses: windows of one size around a point of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._arguments import choose, size_pair
from ._autograd import copy_in_transform
from ._register import register_sampler
from ._sampling import COLUMNS, BoxColumns, Where, is_channels_last, make_sampler

_NAME = "extract_glimpse"
_KIND = 2
_FRACTION, _TRUNCATED, _TRUNCATED_SINGLE = range(3)
_ONE_SCALE = BoxColumns(2, y=(0, 0), x=(1, 1))
_SCALE_COLUMN = BoxColumns(3, y=(0, 2), x=(1, 2))
COLUMNS[_KIND] = lambda params: _ONE_SCALE if params[3] > 0 else _SCALE_COLUMN

_NOISES = {"uniform": 1, "gaussian": 2, "zero": 0}
_MODES = {"exact": True, "subpixel": False}
_LARGEST_SEED = 2**63 - 1
# float32 counts pixels one by one up to here.
_LARGEST_SINGLE = 2**24


def _bind_exact(
    input: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    version: int,
    centered: bool,
    normalized: bool,
    noise: int,
) -> tuple[Sequence[Tensor], Where]:
    """The linear part of a copy: the derivatives are those of one sample on each whole pixel."""
    _refuse_offset_gradients(offsets)
    whole = _TRUNCATED if offsets.dtype == torch.float64 else _TRUNCATED_SINGLE
    params = (version, centered, normalized, 1, whole)
    sampler = make_sampler((height, width), _KIND, params)
    return [input], Where(offsets, None, None, None, 0, sampler)


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
    params = (version, centered, normalized, scale, _FRACTION)
    sampler = make_sampler((height, width), _KIND, params)
    return [input], Where(offsets, None, None, None, 0, sampler)


def _batch_exact(
    info: Any,
    in_dims: Any,
    input: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, int]:
    op, size = torch.ops.glimpse_ext.extract_glimpse.default, info.batch_size

    def examples(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor.unsqueeze(0).expand(size, *tensor.shape)
        return tensor.movedim(dim, 0)

    images, places = examples(input, in_dims[0]), examples(offsets, in_dims[1])
    if seed is None:
        out: Tensor = op(images.flatten(0, 1), places.flatten(0, 1), None, *rest)
        return out.unflatten(0, (size, images.shape[1])), 0
    # Noise knows its image by number, and the images of every example count from 0.
    seeds = examples(seed, in_dims[2])
    rows = [op(*example, *rest) for example in zip(images, places, seeds, strict=True)]
    return torch.stack(rows), 0


_exact_glimpse = register_sampler("extract_glimpse", _bind_exact, copy_in_transform, _batch_exact)
_subpixel_glimpse = register_sampler("subpixel_glimpse", _bind_subpixel)


def _moves(tensor: Tensor) -> bool:
    """Whether a derivative of any kind is asked for."""
    if not tensor.is_floating_point():
        return False
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _refuse_offset_gradients(offsets: Tensor) -> None:
    if _moves(offsets):
        raise RuntimeError(
            f"{_NAME}: whole windows have no derivative in the offsets; "
            'use mode="subpixel", or pass offsets.detach()'
        )


def _check_tensors(input: Tensor, offsets: Tensor) -> None:
    if input.dim() != 4:
        raise RuntimeError(f"{_NAME}: input must be [N, C, H, W], got {list(input.shape)}")
    if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.shape[0] != input.shape[0]:
        raise RuntimeError(
            f"{_NAME}: offsets must be [{input.shape[0]}, 2] (y, x), got {list(offsets.shape)}"
        )
    if not offsets.is_floating_point():
        raise RuntimeError(
            f"{_NAME}: offsets must be float64, float32, float16 or bfloat16, got {offsets.dtype}"
        )


def _check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(scales, (tuple, list)) or any(
        isinstance(s, bool) or not isinstance(s, int) for s in scales
    ):
        raise TypeError(f"{_NAME}: scales must be a tuple of int, got {scales!r}")
    if not scales or min(scales) < 1:
        raise ValueError(f"{_NAME}: scales must be one or more positive numbers, got {scales!r}")
    return tuple(scales)


def _draw_seeds(input: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = input.device if generator is None else generator.device
    seeds = torch.randint(_LARGEST_SEED, (count,), generator=generator, device=device)
    return seeds.to(input.device)


def _exact(
    input: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    size: tuple[int, int],
    rule: tuple[int, bool, bool],
    noise: int,
) -> Tensor:
    """Windows of whole pixels of one scale."""
    _refuse_offset_gradients(offsets)
    if input.dtype != torch.float64 and _moves(input):
        # Derivatives find their windows in the precision of the image. Sides one by one: the
        # larger of two that are symbols would make a graph that holds for one order of them.
        sides = (*input.shape[2:], *size)
        wide = offsets.dtype == torch.float64 or any(side > _LARGEST_SINGLE for side in sides)
        if wide:
            copied = _exact_glimpse(input.double(), offsets, seed, *size, *rule, noise)
            return copied.to(input.dtype)
    return _exact_glimpse(input, offsets, seed, *size, *rule, noise)


def _mean(glimpse: Tensor, scale: int, size: tuple[int, int]) -> Tensor:
    """The mean over scale x scale pixels; 16-bit numbers are added up in float32."""
    if 0 in glimpse.shape:
        return glimpse.new_empty(*glimpse.shape[:2], *size)
    single = glimpse.dtype in (torch.float16, torch.bfloat16)
    wide = glimpse.float() if single else glimpse
    return torch.nn.functional.avg_pool2d(wide, scale).to(glimpse.dtype)


def _join_scales(rows: Tensor, scales: int, channels_last: bool) -> Tensor:
    """[N * scales, C, h, w] -> [N, scales * C, h, w]."""
    if scales == 1:
        return rows
    images: Tensor = rows.unflatten(0, (-1, scales))
    if not channels_last:
        return images.flatten(1, 2)
    return images.permute(0, 3, 4, 1, 2).flatten(3, 4).permute(0, 3, 1, 2)


def extract_glimpse(
    input: Tensor,
    size: int | Sequence[int],
    offsets: Tensor,
    centered: bool = True,
    normalized: bool = True,
    noise: str = "uniform",
    *,
    version: int = 2,
    mode: str = "exact",
    scales: Sequence[int] = (1,),
    generator: torch.Generator | None = None,
) -> Tensor:
    """``tf.image.extract_glimpse`` on ``[N, C, H, W]`` images: one window of each image.

    The first pixel of a window of g pixels in an image of S, along each axis, is the number below
    without its fraction (truncated toward zero)::

        normalized  centered   version 2          version 1
        yes         yes        (o*S + S - g)/2    (o*S + S - g)/2
        yes         no         o*S                o*S - g/2
        no          yes        o + S/2            o/2 + S/2 - g/2
        no          no         o                  o - g/2

        |-----x-----|-----x-----|-----x-----|-----x-----|   an image of 4 pixels
       -1                       0                       1   offsets, normalized and centered

    So only where both are set, or in version 1, does the offset point at the middle of the window;
    elsewhere it points at its first pixel. -1 and 1 are the outer edges of the image, not the
    centres of its outer pixels.

    Args:
        input: ``[N, C, H, W]``, any strides. ``"exact"``: any dtype of 1, 2, 4 or 8 bytes.
            ``"subpixel"``: float64, float32, float16, bfloat16 or uint8.
        size: pixels of the result, ``height, width`` or one number for both.
        offsets: ``[N, 2]`` of y, x, any float dtype. Windows are placed in float32, float64
            offsets in float64. A window whose offset is NaN or infinite lies outside the image.
        centered: whether offsets count from the middle of the image (True) or its first pixel.
        normalized: whether offsets are fractions of the image or pixels.
        noise: what stands outside the image: ``"zero"``, ``"uniform"`` between the least and the
            largest number of the image, or ``"gaussian"`` with mean, standard deviation and range
            of its channel. These are TensorFlow's distributions, but each image and channel has
            noise of its own: TensorFlow repeats one field for all, so that the glimpses of a batch
            are correlated. Noise needs a float image; one that is NaN makes NaN.
        version: 2 for ``tf.image``, 1 for ``tf.compat.v1.image``.
        mode: ``"exact"`` copies pixels bit for bit. ``"subpixel"`` keeps the fraction of the place
            and interpolates, with zeros outside: the same numbers where the fraction is 0, and
            differentiable in the offsets. Noise then fills in what is missing to full coverage.
        scales: factors s of a retina. Each gives the window of ``s * size`` pixels reduced to
            ``size`` by the mean over s × s pixels.
        generator: where seeds are drawn; that of the device of ``input`` by default. One call
            draws one number for each scale if there is noise, whether or not a window leaves its
            image. The same seed gives the same noise on CPU and CUDA and in every memory format.

    Returns:
        ``[N, len(scales) * C, height, width]`` in the dtype (``"subpixel"`` turns uint8 into
        float32) and memory format of ``input``, scale by scale:
        ``.unflatten(1, (len(scales), C))`` separates them.

    Gradients:
        To ``input``, and with ``"subpixel"`` to ``offsets``, of every order, in reverse and
        forward mode and under ``vmap``. Noise counts as a constant. At whole places the derivative
        in the offsets is the right-hand one. Deterministic.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; ``"exact"`` with offsets that
            require a gradient.
        ValueError, TypeError: an unknown noise, version or mode, a size or scales that are none.

    Source:
        ``attention_ops.cc`` of TensorFlow, whose stored windows (2.21, both versions) are met bit
        for bit; Mnih et al., Recurrent Models of Visual Attention, 2014, for ``scales``.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> glimpse_ext.extract_glimpse(image, 2, torch.tensor([[0.0, 0.5]]), noise="zero")
    tensor([[[[ 6.,  7.],
              [10., 11.]]]])
    >>> glimpse_ext.extract_glimpse(
    ...     image, 2, torch.tensor([[0.0, 0.25]]), noise="zero", mode="subpixel"
    ... )
    tensor([[[[ 5.5000,  6.5000],
              [ 9.5000, 10.5000]]]])
    """
    exact = choose(_NAME, "mode", mode, _MODES)
    noise_kind = choose(_NAME, "noise", noise, _NOISES)
    if version not in (1, 2):
        raise ValueError(f"{_NAME}: version must be 1 or 2, got {version!r}")
    height, width = size_pair(_NAME, size, "size")
    scales = _check_scales(scales)
    _check_tensors(input, offsets)
    if noise_kind and not input.is_floating_point():
        raise RuntimeError(
            f'{_NAME}: noise needs a float image, got {input.dtype}; use noise="zero"'
        )
    if exact and max(scales) > 1 and not input.is_floating_point():
        raise RuntimeError(f"{_NAME}: scales beyond 1 need a float image, got {input.dtype}")

    rule = (version, bool(centered), bool(normalized))
    channels_last = is_channels_last(input)
    seeds = _draw_seeds(input, len(scales), generator) if noise_kind else None

    def seed(i: int) -> Tensor | None:
        return None if seeds is None else seeds[i : i + 1]

    if exact:
        parts = [
            _exact(input, offsets, seed(i), (height * s, width * s), rule, noise_kind)
            for i, s in enumerate(scales)
        ]
        parts = [
            part if s == 1 else _mean(part, s, (height, width))
            for part, s in zip(parts, scales, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    if len(scales) == 1:
        rows, scale = offsets, scales[0]
    else:
        # One row for each image and scale: y, x, scale. 16-bit numbers might not hold the scale.
        single = offsets.dtype in (torch.float16, torch.bfloat16)
        wide = offsets.float() if single else offsets
        padded = [torch.nn.functional.pad(wide, (0, 1), value=float(s)) for s in scales]
        rows, scale = torch.stack(padded, dim=1).flatten(0, 1), 0
    if input.shape[2] == 0 or input.shape[3] == 0:
        # Nothing to read: every window lies outside.
        found = _exact(input, offsets.detach(), seed(0), (height, width), rule, noise_kind)
        return found.repeat(1, len(scales), 1, 1)
    glimpse = _subpixel_glimpse(input, rows, height, width, *rule, scale)
    if noise_kind:
        glimpse = _add_noise(glimpse, input, rows, seeds, (height, width), rule, scale, noise_kind)
    return _join_scales(glimpse, len(scales), channels_last)


def _add_noise(
    glimpse: Tensor,
    input: Tensor,
    rows: Tensor,
    seeds: Tensor | None,
    size: tuple[int, int],
    rule: tuple[int, bool, bool],
    scale: int,
    noise: int,
) -> Tensor:
    """Noise in place of what lies outside: its share of a cell is what a glimpse of ones lacks."""
    assert seeds is not None
    images, _, height, width = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    # One row of ones is read as the whole image.
    ones = input.new_ones((1, 1, 1, width), dtype=dtype).expand(images, 1, height, width)
    missing = 1 - _subpixel_glimpse(ones, rows, *size, *rule, scale)
    outside = rows.new_full((images, 2), float("nan"))
    fields = [
        _exact_glimpse(input.detach(), outside, seeds[i : i + 1], *size, *rule, noise)
        for i in range(seeds.shape[0])
    ]
    field = fields[0] if len(fields) == 1 else torch.stack(fields, dim=1).flatten(0, 1)
    # The noise of an image with NaN or infinite pixels must not reach into what is covered.
    # Weights add up to 1 but for their rounding.
    covered = missing.detach() <= 1e-6
    field = torch.where(covered & ~field.isfinite(), torch.zeros_like(field), field)
    return (glimpse + missing * field).to(input.dtype)
