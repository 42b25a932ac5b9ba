# SPDX-License-Identifier: BSD-3-Clause
"""RoIAlign on one feature map and on a pyramid of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_indices, choose, join_boxes, size_pair
from ._autograd_frames import call_max
from ._register import register_sampler
from ._sampling import COLUMNS, BoxColumns, Where, make_sampler

_KIND = 0
_COLUMNS = BoxColumns(4, y=(1, 3), x=(0, 2))
COLUMNS[_KIND] = lambda params: _COLUMNS

_ASSIGN = {"torchvision": 0, "detectron2": 1}
_MODES = {"mean": False, "max": True}


def _place(
    boxes: Tensor,
    levels: Tensor | None,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    level_rule: tuple[float, ...],
) -> Where:
    sampler = make_sampler(output_size, _KIND, (sampling_ratio, aligned), tuple(scales), level_rule)
    return Where(boxes, None, levels, None, 0, sampler)


def _bind_roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Sequence[Tensor], Where]:
    size = (pooled_height, pooled_width)
    return [input], _place(boxes, None, size, (spatial_scale,), sampling_ratio, aligned, ())


def _bind_multiscale(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    assign: int,
) -> tuple[Sequence[Tensor], Where]:
    size = (pooled_height, pooled_width)
    rule = (assign, canonical_size, canonical_level)
    return features, _place(boxes, levels, size, scales, sampling_ratio, aligned, rule)


_roi_align = register_sampler("roi_align", _bind_roi_align)
_multiscale_roi_align = register_sampler("multiscale_roi_align", _bind_multiscale)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "mean",
) -> Tensor:
    """Mean of bilinear samples in each cell of each box (RoIAlign, He et al. 2017).

    Signature, defaults and numbers are those of ``torchvision.ops.roi_align``::

        |-----x-----|-----x-----|-----x-----|-----x-----|   x pixel centre, edge units 0 to 4
                       o     o     o     o                  aligned=True, box 1..3, 4 cells
                             o     o     o     o            aligned=False: half a pixel late

    Args:
        input: ``[N, C, H, W]`` of float64, float32, float16, bfloat16 or uint8, any strides.
        boxes: ``[K, 5]`` rows of image index, x1, y1, x2, y2, or a list with one ``[L, 4]`` tensor
            for each image, in edge units (pixel k covers k to k + 1) of the image that the feature
            map was made from. Any float dtype, independent of that of ``input``. The image index
            is truncated.
        output_size: cells per box, ``height, width`` or one number for both.
        spatial_scale: feature map pixels per image pixel.
        sampling_ratio: samples per cell and direction. 0 or less: as many as the cell covers
            pixels, rounded up.
        aligned: whether box edges are edges (True, as in detectron2) or are read as pixel indices,
            half a pixel late, with sides of at least one pixel (False, as in the 2017 paper).
        mode: ``"mean"`` of the samples of a cell, or their ``"max"`` for each channel.

    Returns:
        ``[K, C, height, width]`` in the dtype (uint8 gives float32) and memory format of
        ``input``: channels_last in, channels_last out. Coordinates and sums are float32, or
        float64 where ``input`` is.

    Samples farther than one pixel outside the map count as 0, nearer ones read the edge pixel.
    A box that is NaN, infinite, or reversed or empty under adaptive sampling gives zeros; a
    reversed box with a positive ``sampling_ratio`` and ``aligned=True`` is mirrored.

    With ``mode="max"`` the samples, numbers and gradients are those of mmcv's
    ``pool_mode="max"``: a sample outside the map takes part as a 0, the first of equal samples
    wins, and gradients go to the taps of the winner and, through its position, to the box. Where
    mmcv starts its search at -10000 (-FLT_MAX on CUDA) and gives that number to a cell without
    samples, this starts at minus infinity and gives 0; a winner one pixel outside the map, whose
    position mmcv takes for "none", has a gradient here. A NaN wins over every number, as in
    ``torch.max``. ``sampling_ratio`` is at most 32768.

    Gradients:
        To ``input`` and ``boxes``, of every order, in reverse and forward mode, under ``vmap`` and
        ``torch.func``. Numbers of samples count as constant; the jump where samples leave the map
        has no derivative. Every result has the same bits in every run, at any number of threads.
        With ``mode="max"`` the winner counts as constant, and a third derivative in the boxes
        raises.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on CPU also an image index outside
            the batch. On CUDA such a box gives zeros; see :func:`set_check_indices`.
        ValueError, TypeError: a list of boxes, an output size or a mode that is none.

    Source:
        He et al., Mask R-CNN, 2017; the kernels of torchvision 0.28 and, for ``mode="max"``, those
        of mmcv. Numbers stored from both are tested, and torchvision itself.

    Differences from torchvision: boxes have gradients, box and image dtypes may differ, bfloat16,
    uint8 and channels_last are native, NaN and huge boxes neither crash nor cost more than the
    map, and nothing is computed in half precision.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> boxes = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
    >>> glimpse_ext.roi_align(image, boxes, output_size=2, aligned=True)
    tensor([[[[ 5.,  6.],
              [ 9., 10.]]]])
    >>> glimpse_ext.roi_align(image, boxes, 1, sampling_ratio=2, aligned=True, mode="max")
    tensor([[[[10.]]]])
    """
    name = "roi_align"
    boxes = join_boxes(name, boxes)
    height, width = size_pair(name, output_size)
    largest = choose(name, "mode", mode, _MODES)
    if input.dim() == 4:
        check_indices(name, boxes, input.shape[0])
    if largest:
        return call_max(input, boxes, spatial_scale, height, width, sampling_ratio, aligned)
    return _roi_align(input, boxes, spatial_scale, height, width, sampling_ratio, aligned)


def multiscale_roi_align(
    features: Sequence[Tensor] | Mapping[Any, Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_size: float = 224,
    canonical_level: int = 4,
    assign: str = "torchvision",
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIAlign of each box on the feature map of a pyramid that fits its size, in one call.

    Numbers are those of ``torchvision.ops.MultiScaleRoIAlign`` (``aligned=False``,
    ``assign="torchvision"``) or of detectron2's ``ROIPooler`` (``aligned=True``,
    ``assign="detectron2"``), without their loop over levels and without waiting for the device.

    Args:
        features: feature maps ``[N, C, H_l, W_l]``, finest first, at most 8; a mapping is taken in
            its order. One dtype and device.
        boxes: as in :func:`roi_align`.
        output_size: as in :func:`roi_align`.
        scales: feature map pixels per image pixel, one for each map.
        sampling_ratio: as in :func:`roi_align`.
        aligned: as in :func:`roi_align`.
        canonical_size: the box side, in image pixels, that belongs to ``canonical_level``.
        canonical_level: level numbers are minus log2 of the scale: 4 is scale 1/16.
        assign: which formula chooses the level; they differ by where their epsilon stands.
            ``"torchvision"``: floor(level + log2(side / size) + 1e-6),
            ``"detectron2"``: floor(level + log2(side / size + 1e-8)), with side the square root of
            the area, in the dtype of the coordinates (float64 where the maps are), limited to the
            maps there are. A box with exactly one negative side gets no level and gives zeros.
        levels: ``[K]`` int64 or int32 indices into ``features`` that replace the formula; an index
            outside gives a row of zeros.

    Returns:
        ``[K, C, height, width]``, rows in the order of ``boxes``, dtype and memory format of the
        first map.

    Gradients:
        As in :func:`roi_align`. The choice of levels has none, and maps that no box falls on get
        one of zeros. Bad boxes: as in :func:`roi_align`, too.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, no map or more than 8; on CPU also
            an image index outside the batch. On CUDA such a box gives zeros.
        ValueError, TypeError: a list of boxes, an output size or an ``assign`` that is none.

    Source:
        Lin et al., Feature Pyramid Networks, 2017, equation 1; ``LevelMapper`` of torchvision and
        ``assign_boxes_to_levels`` of detectron2. Numbers stored from both are tested.

    >>> import torch, glimpse_ext
    >>> maps = [torch.randn(1, 8, 64 // s, 64 // s) for s in (4, 8, 16)]
    >>> boxes = torch.tensor([[0.0, 4.0, 4.0, 40.0, 36.0]])
    >>> glimpse_ext.multiscale_roi_align(maps, boxes, 7, scales=(1 / 4, 1 / 8, 1 / 16)).shape
    torch.Size([1, 8, 7, 7])
    """
    name = "multiscale_roi_align"
    maps = list(features.values()) if isinstance(features, Mapping) else list(features)
    boxes = join_boxes(name, boxes)
    height, width = size_pair(name, output_size)
    rule = choose(name, "assign", assign, _ASSIGN)
    if maps and maps[0].dim() == 4:
        check_indices(name, boxes, maps[0].shape[0])
        if torch.is_autocast_enabled(maps[0].device.type):
            # Levels may leave an autocast region in different dtypes.
            dtype = maps[0].dtype
            for other in maps[1:]:
                dtype = torch.promote_types(dtype, other.dtype)
            maps = [m.to(dtype) for m in maps]
    return _multiscale_roi_align(
        maps,
        boxes,
        levels,
        height,
        width,
        [float(scale) for scale in scales],
        sampling_ratio,
        aligned,
        float(canonical_size),
        canonical_level,
        rule,
    )
