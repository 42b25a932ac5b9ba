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
}
PEER_NAMES = tuple(dict.fromkeys(p.name for operator in OPERATORS.values() for p in operator.peers))
