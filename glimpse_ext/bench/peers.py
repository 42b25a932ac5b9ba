# SPDX-License-Identifier: BSD-3-Clause
"""Who is compared: each operator of this package, its reference, and its peers."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import glimpse_ext
from glimpse_ext import _grid_sample, reference

from .workloads import Workload

Pool = Callable[[Sequence[Tensor]], Tensor]
"""Feature maps to the pooled result; the boxes are already in it."""

Make = Callable[[Workload, Tensor, torch.dtype], Pool]
"""Workload, boxes ``[K, 5]`` and dtype of the features to a `Pool`."""

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Peer:
    """Another way to the same numbers. ``package`` must be installed."""

    name: str
    make: Make
    package: str = "torch"
    # Without these dtypes it is left out: what it would do there, another peer does already.
    only: tuple[torch.dtype, ...] | None = None

    def runs(self, dtype: torch.dtype) -> bool:
        installed = importlib.util.find_spec(self.package) is not None
        return installed and (self.only is None or dtype in self.only)


@dataclass(frozen=True)
class Operator:
    ours: Make
    reference: Make
    peers: tuple[Peer, ...]
    differentiable: bool = True  # False: only the forward is timed
    error: float | None = None  # the largest accepted one, where it is not that of the dtype


def per_image(work: Workload, boxes: Tensor) -> list[Tensor]:
    """The boxes as detectors keep them: ``[L, 4]`` for each image."""
    return [boxes[boxes[:, 0] == image, 1:] for image in range(work.batch)]


# --------------------------------------------------------------------------------------- roi_align


def _ours(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale = work.output_size, work.scales[0]
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: glimpse_ext.roi_align(maps[0], boxes, size, scale, ratio, aligned)


def _reference(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale = work.output_size, work.scales[0]
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: reference.roi_align(maps[0], boxes, size, scale, ratio, aligned)


def _torchvision(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    from torchvision.ops import roi_align

    size, scale = work.output_size, work.scales[0]
    ratio, aligned = work.sampling_ratio, work.aligned
    typed = boxes.to(dtype)
    return lambda maps: roi_align(maps[0], typed, size, scale, ratio, aligned)


def _torchvision_float32(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """As torchvision does it under autocast: to float32 and back."""
    wide = _torchvision(work, boxes, torch.float32)
    return lambda maps: wide([maps[0].float()]).to(dtype)


def _grid_sample_roi_align(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale = work.output_size, work.scales[0]
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: _grid_sample.roi_align(maps[0], boxes, size, scale, ratio, aligned)


# ---------------------------------------------------------------------------- multiscale_roi_align


def _ours_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    # One list per image, as the peer gets it; boxes whose gradient is wanted stay one tensor.
    given = boxes if boxes.requires_grad else per_image(work, boxes)
    size, scales = work.output_size, work.scales
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: glimpse_ext.multiscale_roi_align(maps, given, size, scales, ratio, aligned)


def _reference_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scales = work.output_size, work.scales
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: reference.multiscale_roi_align(maps, boxes, size, scales, ratio, aligned)


def _torchvision_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    from torchvision.ops import MultiScaleRoIAlign

    names = [str(level) for level in range(len(work.strides))]
    pooler = MultiScaleRoIAlign(names, work.output_size, work.sampling_ratio)
    rows = [row.to(dtype) for row in per_image(work, boxes)]
    sizes = [work.image] * work.batch

    def pool(maps: Sequence[Tensor]) -> Tensor:
        pooled: Tensor = pooler(dict(zip(names, maps, strict=True)), rows, sizes)
        return pooled

    return pool


def _torchvision_multiscale_float32(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    wide = _torchvision_multiscale(work, boxes, torch.float32)
    return lambda maps: wide([m.float() for m in maps]).to(dtype)


def _grid_sample_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scales = work.output_size, work.scales
    ratio, aligned = work.sampling_ratio, work.aligned
    return lambda maps: _grid_sample.multiscale_roi_align(
        maps, boxes, size, scales, ratio, aligned, canonical_size=224, canonical_level=4
    )


# --------------------------------------------------------------------------------- crops, rotated


def _ours_crop(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, index = work.output_size, boxes[:, 0].long()
    return lambda maps: glimpse_ext.crop(
        maps[0], boxes[:, 1:], size, box_format="pixels", image_index=index
    )


def _reference_crop(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, index = work.output_size, boxes[:, 0].long()
    return lambda maps: reference.crop(
        maps[0], boxes[:, 1:], size, box_format="pixels", image_index=index
    )


def _grid_sample_crop(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    return lambda maps: _grid_sample.crop(maps[0], boxes, work.output_size)


def _fractions(work: Workload, boxes: Tensor) -> Tensor:
    """Boxes of the image as y1, x1, y2, x2 for crop_and_resize."""
    height, width = work.image
    return boxes[:, [2, 1, 4, 3]] / boxes.new_tensor([height, width, height, width])


def _ours_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    index, size = boxes[:, 0].long(), work.output_size
    return lambda maps: glimpse_ext.crop_and_resize(maps[0], _fractions(work, boxes), index, size)


def _reference_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    index, size = boxes[:, 0].long(), work.output_size
    return lambda maps: reference.crop_and_resize(maps[0], _fractions(work, boxes), index, size)


def _grid_sample_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    fractions = _fractions(work, boxes)
    return lambda maps: _grid_sample.crop_and_resize(
        maps[0], fractions, boxes[:, 0], work.output_size
    )


def _copies_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """As it is mostly written: a copy of the map for each box."""
    fractions, index = _fractions(work, boxes), boxes[:, 0].long()
    first = torch.arange(len(boxes), device=boxes.device)
    return lambda maps: _grid_sample.crop_and_resize(
        maps[0][index], fractions, first, work.output_size
    )


def _turned(boxes: Tensor) -> Tensor:
    """Boxes of half the size with an angle each: image, centre x, centre y, width, height, degrees.

    Half the size, so that they lie inside the image however they are turned.
    """
    angle = torch.linspace(-90, 90, max(len(boxes), 1), dtype=boxes.dtype, device=boxes.device)
    low, high = boxes[:, 1:3], boxes[:, 3:5]
    middle, sides = (low + high) / 2, (high - low) / 2
    return torch.cat([boxes[:, :1], middle, sides, angle[: len(boxes), None]], dim=1)


def _ours_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale, ratio = work.output_size, work.scales[0], work.sampling_ratio
    return lambda maps: glimpse_ext.roi_align_rotated(maps[0], _turned(boxes), size, scale, ratio)


def _reference_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale, ratio = work.output_size, work.scales[0], work.sampling_ratio
    return lambda maps: reference.roi_align_rotated(maps[0], _turned(boxes), size, scale, ratio)


def _grid_sample_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, scale, ratio = work.output_size, work.scales[0], work.sampling_ratio
    turned = _turned(boxes)
    return lambda maps: _grid_sample.roi_align_rotated(maps[0], turned, size, scale, ratio)


# --------------------------------------------------------------------------------- without gradient


def _ours_paste(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    return lambda masks: glimpse_ext.paste_masks(masks[0], boxes[:, 1:], work.image)


def _reference_paste(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    return lambda masks: reference.paste_masks(masks[0], boxes[:, 1:], work.image)


def _detectron2_paste(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """The way of detectron2's CPU path."""
    return lambda masks: _grid_sample.paste_masks(masks[0], boxes[:, 1:], work.image)


def _offsets(work: Workload, boxes: Tensor) -> Tensor:
    """The middle of each box, as offsets from the middle of the image: y, x."""
    extent = boxes.new_tensor([work.image[1], work.image[0]])
    return ((boxes[:, 1:3] + boxes[:, 3:5]) / extent - 1)[:, [1, 0]]


def _ours_glimpse(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    offsets, size = _offsets(work, boxes), work.output_size
    return lambda maps: glimpse_ext.extract_glimpse(maps[0], size, offsets, noise="zero")


def _reference_glimpse(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    offsets, size = _offsets(work, boxes), work.output_size
    return lambda maps: reference.extract_glimpse(maps[0], (size, size), offsets, dtype=dtype)


def _grid_sample_glimpse(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    offsets, size = _offsets(work, boxes), work.output_size
    return lambda maps: _grid_sample.extract_glimpse(maps[0], size, offsets)


OPERATORS = {
    "roi_align": Operator(
        _ours,
        _reference,
        (
            Peer("torchvision", _torchvision, "torchvision"),
            Peer("torchvision float32", _torchvision_float32, "torchvision", SIXTEEN_BITS),
            Peer("grid_sample", _grid_sample_roi_align),
        ),
    ),
    "multiscale_roi_align": Operator(
        _ours_multiscale,
        _reference_multiscale,
        (
            Peer("torchvision", _torchvision_multiscale, "torchvision"),
            Peer(
                "torchvision float32", _torchvision_multiscale_float32, "torchvision", SIXTEEN_BITS
            ),
            Peer("grid_sample", _grid_sample_multiscale),
        ),
    ),
    "crop": Operator(_ours_crop, _reference_crop, (Peer("grid_sample", _grid_sample_crop),)),
    "crop_and_resize": Operator(
        _ours_crop_and_resize,
        _reference_crop_and_resize,
        (
            Peer("grid_sample", _grid_sample_crop_and_resize),
            Peer("grid_sample copies", _copies_crop_and_resize),
        ),
    ),
    "roi_align_rotated": Operator(
        _ours_rotated, _reference_rotated, (Peer("grid_sample", _grid_sample_rotated),)
    ),
    # A pixel whose value is the threshold but for its last bits may fall on either side.
    "paste_masks": Operator(
        _ours_paste,
        _reference_paste,
        (Peer("detectron2's way", _detectron2_paste),),
        differentiable=False,
        error=2e-3,
    ),
    "extract_glimpse": Operator(
        _ours_glimpse,
        _reference_glimpse,
        (Peer("grid_sample", _grid_sample_glimpse),),
        differentiable=False,
        error=0.0,
    ),
}
PEER_NAMES = tuple(dict.fromkeys(p.name for operator in OPERATORS.values() for p in operator.peers))
