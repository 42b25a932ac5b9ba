# SPDX-License-Identifier: BSD-3-Clause
"""Who is compared: each operator of this package, its reference, and its peers."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import glimpse_ext
from glimpse_ext import _grid_sample, reference

from .workloads import Workload

Pool = Callable[[Sequence[Tensor]], Tensor]
"""Feature maps to the pooled result; the boxes are already in it."""

Make = Callable[[Workload, Tensor, torch.dtype], Pool]
"""Workload, numbers as `Operator.place` gives them, and dtype of the features to a `Pool`."""

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Peer:
    """Another way to the same numbers. ``package`` must be installed."""

    name: str
    make: Make
    package: str = "torch"
    # Without these dtypes it is left out: what it would do there, another peer does already.
    only: tuple[torch.dtype, ...] | None = None
    # Compiled at run time, which takes a minute: timed only where it is asked for.
    compiled: bool = False
    # Ours by the convention of this peer, where it has not that of the workload.
    convention: Make | None = None

    def runs(self, dtype: torch.dtype) -> bool:
        installed = importlib.util.find_spec(self.package) is not None
        return installed and (self.only is None or dtype in self.only)


def _image_first(work: Workload, boxes: Tensor) -> Tensor:
    return boxes


@dataclass(frozen=True)
class Operator:
    ours: Make
    reference: Make
    peers: tuple[Peer, ...]
    place: Callable[[Workload, Tensor], Tensor] = _image_first
    """The numbers that the operator takes, from boxes of image, x1, y1, x2, y2."""
    rows: int = 0
    """The dimension of these numbers along which they are independent."""
    paired: bool = False
    """Whether an image or mask belongs to each row."""
    gradients: tuple[str, ...] = ("maps", "boxes")
    """What is differentiated; with nothing, only the forward is timed."""
    error: float | None = None
    """The largest accepted one, where it is not that of the dtype."""
    gradient_error: float | None = None
    """The same for gradients."""
    copies: bool = False
    """Whether the result is a copy, so that a copy of as many bytes is the yardstick."""

    def directions(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Those of ``wanted`` that it has: what ends in boxes or begins with box needs them."""
        has = {"forward": True, "backward": "maps" in self.gradients}
        has["forward+backward"] = has["backward"]
        return tuple(d for d in wanted if has.get(d, "boxes" in self.gradients))


def _imported(module: str, name: str) -> Any:
    """From a package that may be missing."""
    return getattr(importlib.import_module(module), name)


def per_image(work: Workload, boxes: Tensor) -> list[Tensor]:
    """The boxes as detectors keep them: ``[L, 4]`` for each image."""
    return [boxes[boxes[:, 0] == image, 1:] for image in range(work.batch)]


def slots_of(work: Workload, boxes: Tensor) -> _grid_sample.Slots:
    """Which box is of which image is known where boxes are made; it costs nothing in a call."""
    return _grid_sample.slots_of(boxes[:, 0].detach(), work.batch)


# --------------------------------------------------------------------------------------- roi_align


def _roi_align(function: Callable[..., Tensor], **options: Any) -> Make:
    """Of a function with the arguments of torchvision's."""

    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        rest = (work.output_size, work.scales[0], work.sampling_ratio, work.aligned)
        return lambda maps: function(maps[0], boxes, *rest, **options)

    return make


def _through_float32(make: Make) -> Make:
    """As torchvision does it under autocast: to float32 and back."""

    def wider(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        wide = make(work, boxes, torch.float32)
        return lambda maps: wide([m.float() for m in maps]).to(dtype)

    return wider


def _torchvision(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    from torchvision.ops import roi_align

    return _roi_align(roi_align)(work, boxes.to(dtype), dtype)


def _mmcv(mode: str) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        roi_align = _imported("mmcv.ops", "roi_align")
        size, typed = (work.output_size, work.output_size), boxes.to(dtype)
        rest = (size, work.scales[0], work.sampling_ratio, mode, work.aligned)
        return lambda maps: roi_align(maps[0].contiguous(), typed, *rest)

    return make


def _grid_sample_roi_align(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    return _roi_align(_grid_sample.roi_align, slots=slots_of(work, boxes))(work, boxes, dtype)


def _compiled(function: Callable[..., Tensor]) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False)
        return _roi_align(compiled)(work, boxes, dtype)

    return make


def _reference_float32(image: Tensor, boxes: Tensor, *rest: Any) -> Tensor:
    return reference.roi_align(image, boxes, *rest, dtype=image.dtype)


# ---------------------------------------------------------------------------- multiscale_roi_align


def _ours_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    # One list per image, as the peer gets it; boxes whose gradient is wanted stay one tensor.
    given = boxes if boxes.requires_grad else per_image(work, boxes)
    rest = (work.output_size, work.scales, work.sampling_ratio, work.aligned)
    return lambda maps: glimpse_ext.multiscale_roi_align(maps, given, *rest)


def _reference_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    rest = (work.output_size, work.scales, work.sampling_ratio, work.aligned)
    return lambda maps: reference.multiscale_roi_align(maps, boxes, *rest)


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


def _grid_sample_multiscale(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    rest = (work.output_size, work.scales, work.sampling_ratio, work.aligned, 224, 4)
    return lambda maps: _grid_sample.multiscale_roi_align(maps, boxes, *rest)


# -------------------------------------------------------------------------------- rotated boxes


def _turned(work: Workload, boxes: Tensor) -> Tensor:
    """Boxes of half the size with an angle each: image, centre x, centre y, width, height, degrees.

    Half the size, so that they lie inside the image however they are turned.
    """
    angle = torch.linspace(-90, 90, max(len(boxes), 1), dtype=boxes.dtype, device=boxes.device)
    low, high = boxes[:, 1:3], boxes[:, 3:5]
    middle, sides = (low + high) / 2, (high - low) / 2
    return torch.cat([boxes[:, :1], middle, sides, angle[: len(boxes), None]], dim=1)


def _rotated(function: Callable[..., Tensor]) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        rest = (work.output_size, work.scales[0], work.sampling_ratio)
        return lambda maps: function(maps[0], boxes, *rest)

    return make


def _detectron2_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size = (work.output_size, work.output_size)
    kind = _imported("detectron2.layers", "ROIAlignRotated")
    pooler = kind(size, work.scales[0], work.sampling_ratio)
    typed = boxes.to(dtype)

    def pool(maps: Sequence[Tensor]) -> Tensor:
        pooled: Tensor = pooler(maps[0].contiguous(), typed)
        return pooled

    return pool


def _mmcv_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    roi_align_rotated = _imported("mmcv.ops", "roi_align_rotated")
    typed = torch.cat([boxes[:, :5], boxes[:, 5:].deg2rad()], dim=1).to(dtype)
    size = (work.output_size, work.output_size)
    rest = (size, work.scales[0], work.sampling_ratio, True, False)
    return lambda maps: roi_align_rotated(maps[0].contiguous(), typed, *rest)


def _grid_sample_rotated(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    rest = (work.output_size, work.scales[0], work.sampling_ratio, slots_of(work, boxes))
    return lambda maps: _grid_sample.roi_align_rotated(maps[0], boxes, *rest)


# ----------------------------------------------------------------------------- crops and points


def _crop(function: Callable[..., Tensor]) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        return lambda maps: function(maps[0], boxes, work.output_size, box_format="pixels")

    return make


def _grid_sample_crop(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, slots = work.output_size, slots_of(work, boxes)
    return lambda maps: _grid_sample.crop(maps[0], boxes, size, slots)


def _fractions(work: Workload, boxes: Tensor) -> Tensor:
    """Image, y1, x1, y2, x2 as crop_and_resize takes them."""
    height, width = work.image
    return boxes[:, [0, 2, 1, 4, 3]] / boxes.new_tensor([1, height, width, height, width])


def _crop_and_resize(function: Callable[..., Tensor]) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        index, size = boxes[:, 0].long(), work.output_size
        if boxes.requires_grad:
            return lambda maps: function(maps[0], boxes[:, 1:], index, size)
        corners = boxes[:, 1:].contiguous()
        return lambda maps: function(maps[0], corners, index, size)

    return make


def _grid_sample_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    size, slots = work.output_size, slots_of(work, boxes)
    return lambda maps: _grid_sample.crop_and_resize(maps[0], boxes[:, 1:], size, slots)


def _copies_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """As it is mostly written: a copy of the map for each box."""
    index, size = boxes[:, 0].long(), work.output_size
    first = torch.arange(len(boxes), device=boxes.device)
    own = _grid_sample.Slots(first, torch.zeros_like(first), 1)
    return lambda maps: _grid_sample.crop_and_resize(maps[0][index], boxes[:, 1:], size, own)


def _kornia_crop_and_resize(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """Four corners of each box in pixels; an image belongs to each."""
    crop_and_resize = _imported("kornia.geometry.transform", "crop_and_resize")
    index, size = boxes[:, 0].long(), (work.output_size, work.output_size)
    height, width = work.sizes[0]
    ends = boxes.new_tensor([height - 1, width - 1, height - 1, width - 1])

    def pool(maps: Sequence[Tensor]) -> Tensor:
        y1, x1, y2, x2 = (boxes[:, 1:] * ends).unbind(1)
        corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).view(-1, 4, 2)
        cropped: Tensor = crop_and_resize(maps[0][index], corners, size)
        return cropped.float()

    return pool


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _whole(work: Workload, boxes: Tensor) -> Tensor:
    """Boxes of whole pixels, as a loop that crops takes them."""
    return boxes.round()


def _crop_batch(function: Callable[..., Tensor], typed: bool = False) -> Make:
    """``typed``: the function has a dtype of its own."""

    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        size = work.output_size

        def pool(maps: Sequence[Tensor]) -> Tensor:
            count = maps[0].shape[1]
            options: dict[str, Any] = {"mean": _MEAN[:count], "std": _STD[:count]}
            if not typed:
                options["dtype"] = dtype
            cropped: Tensor = function(maps[0], boxes, size, **options)
            return cropped.to(dtype)

        return pool

    return make


def _torchvision_loop(bytes_first: bool) -> Make:
    """Crop, resize, normalise, box by box. Bytes are resized faster, and rounded to bytes."""

    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        v2 = importlib.import_module("torchvision.transforms.v2.functional")
        rows = boxes.int().tolist()
        size = [work.output_size, work.output_size]

        def pool(maps: Sequence[Tensor]) -> Tensor:
            parts = []
            for image, x1, y1, x2, y2 in rows:
                one = v2.crop(maps[0][image], y1, x1, y2 - y1, x2 - x1)
                if bytes_first:
                    one = v2.to_dtype(v2.resize(one, size, antialias=True), torch.float32, True)
                else:
                    one = v2.resize(v2.to_dtype(one, torch.float32, True), size, antialias=True)
                parts.append(v2.normalize(one, list(_MEAN), list(_STD)))
            return torch.stack(parts).to(dtype)

        return pool

    return make


def _kornia_crop_batch(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """Without antialiasing, and from corner to corner: other numbers, of about the same use."""
    crop_and_resize = _imported("kornia.geometry.transform", "crop_and_resize")
    size = (work.output_size, work.output_size)
    corners = [
        (image, own[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2))
        for image, own in enumerate(per_image(work, boxes))
        if len(own)
    ]
    mean, std = (boxes.new_tensor(numbers)[:, None, None] for numbers in (_MEAN, _STD))

    def pool(maps: Sequence[Tensor]) -> Tensor:
        wide = maps[0].float() / 255
        parts = [
            crop_and_resize(wide[image].expand(len(own), *wide.shape[1:]), own, size)
            for image, own in corners
        ]
        return ((torch.cat(parts) - mean) / std).to(dtype)

    return pool


def _points(work: Workload, boxes: Tensor) -> Tensor:
    """Random points in the boxes of each image, ``[N, P, 2]`` of x, y in fractions of it."""
    generator = torch.Generator().manual_seed(len(boxes))
    unit = torch.rand(len(boxes), work.points, 2, generator=generator).to(boxes)
    extent = boxes.new_tensor([work.image[1], work.image[0]])
    low, high = boxes[:, None, 1:3], boxes[:, None, 3:5]
    return ((low + unit * (high - low)) / extent).view(work.batch, -1, 2)


def _point_sample(function: Callable[..., Tensor]) -> Make:
    def make(work: Workload, points: Tensor, dtype: torch.dtype) -> Pool:
        return lambda maps: function(maps[0], points)

    return make


# --------------------------------------------------------------------------------- masks, glimpses


def _paste(function: Callable[..., Tensor], **options: Any) -> Make:
    def make(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
        corners = boxes[:, 1:].contiguous()
        return lambda masks: function(masks[0], corners, work.image, **options)

    return make


def _detectron2s_way(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    by_box = boxes.device.type == "cpu"
    return _paste(_grid_sample.paste_masks, by_box=by_box)(work, boxes, dtype)


def _detectron2_paste(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    paste_masks_in_image = _imported("detectron2.layers", "paste_masks_in_image")
    corners = boxes[:, 1:].contiguous()

    def pool(masks: Sequence[Tensor]) -> Tensor:
        pasted: Tensor = paste_masks_in_image(masks[0][:, 0], corners, work.image, 0.5)
        return pasted[:, None]

    return pool


def _torchvision_paste(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """It gives soft masks of the whole image, so they are compared with 0.5 as users do it."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    corners = boxes[:, 1:].contiguous()

    def pool(masks: Sequence[Tensor]) -> Tensor:
        pasted: Tensor = paste_masks_in_image(masks[0], corners, work.image)
        return pasted >= 0.5

    return pool


def _runs(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """Their areas stand for the run lengths of masks."""
    corners = boxes[:, 1:].contiguous()

    def pool(masks: Sequence[Tensor]) -> Tensor:
        found = glimpse_ext.paste_masks_to_rle(masks[0], corners, work.image, with_boxes=True)
        assert isinstance(found, glimpse_ext.PastedRLE)
        return found.areas

    return pool


def _reference_runs(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    pasted = _paste(reference.paste_masks)(work, boxes, dtype)
    return lambda masks: pasted(masks).flatten(1).sum(1)


def _detectron2s_runs(work: Workload, boxes: Tensor, dtype: torch.dtype) -> Pool:
    """As detectron2's COCO evaluator does: images of masks, each encoded by pycocotools."""
    from pycocotools import mask as coco

    pasted = _detectron2s_way(work, boxes, dtype)

    def pool(masks: Sequence[Tensor]) -> Tensor:
        images = pasted(masks)[:, 0].cpu().numpy()
        rles = [coco.encode(image[:, :, None].astype("uint8", order="F"))[0] for image in images]
        return torch.tensor(coco.area(rles).astype("int64"))

    return pool


def _offsets(work: Workload, boxes: Tensor) -> Tensor:
    """The middle of each box, as offsets from the middle of the image: y, x."""
    extent = boxes.new_tensor([work.image[1], work.image[0]])
    return ((boxes[:, 1:3] + boxes[:, 3:5]) / extent - 1)[:, [1, 0]].contiguous()


def _ours_glimpse(work: Workload, offsets: Tensor, dtype: torch.dtype) -> Pool:
    size = work.output_size
    return lambda maps: glimpse_ext.extract_glimpse(maps[0], size, offsets, noise="zero")


def _reference_glimpse(work: Workload, offsets: Tensor, dtype: torch.dtype) -> Pool:
    size = (work.output_size, work.output_size)
    return lambda maps: reference.extract_glimpse(maps[0], size, offsets, dtype=maps[0].dtype)


def _grid_sample_glimpse(work: Workload, offsets: Tensor, dtype: torch.dtype) -> Pool:
    return lambda maps: _grid_sample.extract_glimpse(maps[0], work.output_size, offsets)


_TORCHVISION = Peer("torchvision", _torchvision, "torchvision")
_TORCHVISION_PYRAMID = Peer("torchvision", _torchvision_multiscale, "torchvision")


def _also_through_float32(peer: Peer) -> tuple[Peer, Peer]:
    wide = Peer(f"{peer.name} float32", _through_float32(peer.make), peer.package, SIXTEEN_BITS)
    return peer, wide


OPERATORS = {
    "roi_align": Operator(
        _roi_align(glimpse_ext.roi_align),
        _roi_align(reference.roi_align),
        (
            *_also_through_float32(_TORCHVISION),
            Peer("grid_sample", _grid_sample_roi_align),
            Peer("mmcv", _mmcv("avg"), "mmcv"),
            Peer("compiled reference", _compiled(_reference_float32), compiled=True),
            Peer("compiled grid_sample", _compiled(_grid_sample.roi_align), compiled=True),
        ),
    ),
    # Where two samples differ by their last bits, rounding chooses the winner and so the pixels
    # that get the gradient.
    "roi_align_max": Operator(
        _roi_align(glimpse_ext.roi_align, mode="max"),
        _roi_align(reference.roi_align, mode="max"),
        (Peer("mmcv", _mmcv("max"), "mmcv"),),
        gradient_error=5e-2,
    ),
    "multiscale_roi_align": Operator(
        _ours_multiscale,
        _reference_multiscale,
        (
            *_also_through_float32(_TORCHVISION_PYRAMID),
            Peer("grid_sample", _grid_sample_multiscale),
        ),
    ),
    "roi_align_rotated": Operator(
        _rotated(glimpse_ext.roi_align_rotated),
        _rotated(reference.roi_align_rotated),
        (
            Peer("grid_sample", _grid_sample_rotated),
            Peer("detectron2", _detectron2_rotated, "detectron2"),
            Peer("mmcv", _mmcv_rotated, "mmcv"),
        ),
        place=_turned,
    ),
    "crop": Operator(
        _crop(glimpse_ext.crop),
        _crop(reference.crop),
        (Peer("grid_sample", _grid_sample_crop),),
    ),
    "crop_and_resize": Operator(
        _crop_and_resize(glimpse_ext.crop_and_resize),
        _crop_and_resize(reference.crop_and_resize),
        (
            Peer("grid_sample", _grid_sample_crop_and_resize),
            Peer("grid_sample copies", _copies_crop_and_resize),
            Peer("kornia", _kornia_crop_and_resize, "kornia"),
        ),
        place=_fractions,
    ),
    "crop_batch": Operator(
        _crop_batch(glimpse_ext.crop_batch),
        _crop_batch(reference.crop_batch, typed=True),
        (
            Peer("torchvision loop", _torchvision_loop(False), "torchvision"),
            Peer("torchvision loop of bytes", _torchvision_loop(True), "torchvision"),
            Peer("kornia", _kornia_crop_batch, "kornia"),
        ),
        place=_whole,
        gradients=(),
        error=4e-3,
    ),
    "point_sample": Operator(
        _point_sample(glimpse_ext.point_sample),
        _point_sample(reference.point_sample),
        (Peer("grid_sample", _point_sample(_grid_sample.point_sample)),),
        place=_points,
        rows=1,
    ),
    # A pixel whose value is the threshold but for its last bits may fall on either side.
    "paste_masks": Operator(
        _paste(glimpse_ext.paste_masks),
        _paste(reference.paste_masks),
        (
            Peer("detectron2's way", _detectron2s_way),
            Peer("detectron2", _detectron2_paste, "detectron2"),
            Peer(
                "torchvision",
                _torchvision_paste,
                "torchvision",
                convention=_paste(glimpse_ext.paste_masks, method="torchvision"),
            ),
        ),
        paired=True,
        gradients=(),
        error=2e-3,
    ),
    "paste_masks_to_rle": Operator(
        _runs,
        _reference_runs,
        (Peer("detectron2's way and pycocotools", _detectron2s_runs, "pycocotools"),),
        paired=True,
        gradients=(),
        error=2e-3,
    ),
    "extract_glimpse": Operator(
        _ours_glimpse,
        _reference_glimpse,
        (Peer("grid_sample", _grid_sample_glimpse),),
        place=_offsets,
        paired=True,
        gradients=("maps",),
        error=0.0,
        copies=True,
    ),
}
PEERS = tuple(peer for operator in OPERATORS.values() for peer in operator.peers)
PEER_NAMES = tuple(dict.fromkeys(peer.name for peer in PEERS))
COMPILED = tuple(dict.fromkeys(peer.name for peer in PEERS if peer.compiled))
