# SPDX-License-Identifier: BSD-3-Clause
"""Boxes of images as a batch for a network: cropped, resized, scaled and converted in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import check_indices, check_separate_indices, choose, join_boxes, size_pair
from ._autograd import (
    differentiates,
    grad_boxes,
    grad_features,
    is_eager,
    plain_apply,
    requires_grad,
    sample,
    transforms_active,
)
from ._register import _below_autograd, _library_impl, run_below_autograd
from ._sampling import COLUMNS, CURVED, BoxColumns, Maps, Where, make_sampler

_NAME = "crop_batch"
_KIND = 100
_COLUMNS = BoxColumns(4, y=(1, 3), x=(0, 2))
COLUMNS[_KIND] = lambda params: _COLUMNS
CURVED[_KIND] = _NAME
_MAPS = 8
"""Images that one call of the generic operators can read."""

_op = torch.ops.glimpse_ext.crop_batch.default
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FORMATS = {"NCHW": False, "NHWC": True}
_SUPPORTS = {"box": False, "image": True}
_PADDINGS = {"constant": False, "border": True}


class _Call(NamedTuple):
    """The arguments of the operator, in schema order."""

    images: Sequence[Tensor]
    boxes: Tensor
    image_index: Tensor | None
    height: int
    width: int
    antialias: bool
    beyond: bool
    edge: bool
    fill: float
    multiplier: Sequence[float]
    offset: Sequence[float]
    dtype: int
    channels_last: bool

    @property
    def images_type(self) -> torch.dtype:
        """In which everything is computed."""
        wide = self.images[0].dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def per_channel(self, numbers: Sequence[float]) -> Tensor:
        device = self.images[0].device
        return torch.tensor(list(numbers), dtype=self.images_type, device=device)[:, None, None]

    def as_result(self, values: Tensor) -> Tensor:
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(_DTYPES[self.dtype]).contiguous(memory_format=memory)

    def places(self) -> list[tuple[slice, Where]]:
        """The images that are read at a time, and where: several are levels of a pyramid."""
        size = (self.height, self.width)
        params = (self.antialias, self.beyond, self.edge)
        count = len(self.images)
        if count == 1:
            sampler = make_sampler(size, _KIND, params)
            return [(slice(0, 1), Where(self.boxes, self.image_index, None, None, 0, sampler))]
        boxes, index = self.boxes, self.image_index
        if index is None and boxes.shape[1] == 5:
            numbers = boxes[:, 0].detach()
            valid = (numbers > -1) & (numbers < count)
            index = torch.where(valid, numbers, torch.full_like(numbers, -1)).to(torch.int64)
            boxes = boxes[:, 1:]
        elif index is None:
            index = torch.arange(boxes.shape[0], device=boxes.device)
            index = index // max(boxes.shape[0] // count, 1)
        places = []
        for first in range(0, count, _MAPS):
            some = slice(first, min(first + _MAPS, count))
            sampler = make_sampler(size, _KIND, params, (1.0,) * (some.stop - first))
            where = Where(boxes, torch.zeros_like(index), index - first, None, 0, sampler)
            places.append((some, where))
        return places


def _compose(call: _Call) -> Tensor:
    """The same from differentiable parts."""
    images = call.images
    if call.fill != 0:
        # What is not read counts as zero, so zero is made to stand for the fill value.
        images = [image.to(call.images_type) - call.fill for image in images]
    elif images[0].dtype != torch.uint8:
        images = [image.to(call.images_type) for image in images]
    values = None
    for some, where in call.places():
        own = sample(images[some], where)
        values = own if values is None else values + own
    assert values is not None
    if call.fill != 0:
        values = values + call.fill
    values = values * call.per_channel(call.multiplier) + call.per_channel(call.offset)
    return call.as_result(values)


class _CropBatchFunction(torch.autograd.Function):
    """Reverse mode of an ordinary call: the operator, and the gradients of its parts."""

    @staticmethod
    def forward(ctx: Any, run: Any, call: _Call, boxes: Tensor, *images: Tensor) -> Tensor:
        # Images are kept only when a gradient to the boxes will read them.
        ctx.save_for_backward(boxes, *(images if ctx.needs_input_grad[2] else ()))
        ctx.call = call._replace(
            images=[image.new_empty(0) for image in images[:1]], boxes=boxes.new_empty(0)
        )
        ctx.sizes = [Maps.of([image]) for image in images]
        ctx.type = images[0].dtype
        result: Tensor = run()
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        boxes, *images = ctx.saved_tensors
        call: _Call = ctx.call
        sizes: list[Maps] = ctx.sizes
        _, _, to_boxes, *to_images = ctx.needs_input_grad
        grad = grad.to(call.images_type) * call.per_channel(call.multiplier)
        grads: list[Tensor | None] = [None] * len(sizes)
        box_terms: list[Tensor] = []
        # As many images as there were; what they hold is not asked for.
        call = call._replace(images=images or [grad] * len(sizes), boxes=boxes)
        for some, where in call.places():
            if any(to_images):
                own = sizes[some]
                maps = Maps(
                    own[0].sizes + tuple(side for other in own[1:] for side in other.sizes[2:]),
                    own[0].channels_last,
                )
                for i, one in enumerate(grad_features(grad, where, maps), some.start):
                    grads[i] = one.to(ctx.type)
            if to_boxes:
                read = images[some]
                if call.fill != 0:
                    read = [image.to(grad.dtype) - call.fill for image in read]
                elif ctx.type != torch.uint8:
                    read = [image.to(grad.dtype) for image in read]
                box_terms.append(grad_boxes(read, grad, where))
        to_box = None
        if box_terms:
            to_box = box_terms[0]
            for term in box_terms[1:]:
                to_box = to_box + term
            if to_box.shape[1] != boxes.shape[1]:  # the image column went into an index of its own
                to_box = torch.nn.functional.pad(to_box, (1, 0))
        return None, None, to_box, *grads


_apply = plain_apply(_CropBatchFunction)


def _run(*args: Any) -> Tensor:
    call = _Call(*args)
    if is_eager():
        run = partial(run_below_autograd, _op, args)
        if not requires_grad((call.images, call.boxes)):
            plain: Tensor = run()
            return plain
        result: Tensor = _apply(run, call, call.boxes, *call.images)
        return result
    if not torch.compiler.is_compiling() and transforms_active():
        return _compose(call)
    traced: Tensor = _op(*args)
    return traced


def _autograd_kernel(keyset: Any, *args: Any) -> Tensor:
    call = _Call(*args)
    if differentiates(call.boxes, *call.images):
        return _compose(call)
    below: Tensor = _below_autograd(_op, keyset, args)
    return below


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    first = call.images[0]
    if first.dim() != 4:
        raise RuntimeError(f"{_NAME}: input must be [N, C, H, W], got {list(first.shape)}")
    if call.boxes.dim() != 2 or call.boxes.shape[1] not in (4, 5):
        raise RuntimeError(f"{_NAME}: boxes must be [K, 5] or [K, 4], got {list(call.boxes.shape)}")
    if first.device != call.boxes.device:
        raise RuntimeError(
            f"{_NAME}: boxes must be on the device of the features, {first.device}, "
            f"got {call.boxes.device}"
        )
    size = (call.boxes.shape[0], first.shape[1], call.height, call.width)
    memory = torch.channels_last if call.channels_last else torch.contiguous_format
    return torch.empty(size, dtype=_DTYPES[call.dtype], device=first.device, memory_format=memory)


_library_impl.impl(_NAME, _autograd_kernel, "Autograd", with_keyset=True)
torch.library.register_fake("glimpse_ext::crop_batch", _fake)


def _as_batches(images: Tensor | Sequence[Tensor], format: str) -> list[Tensor]:
    """One batch [N, C, H, W], or several of one image each; nothing is copied."""
    last = choose(_NAME, "input_format", format, _FORMATS)
    one = "[N, H, W, C]" if last else "[N, C, H, W]"
    single = "[H, W, C]" if last else "[C, H, W]"
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise RuntimeError(f"{_NAME}: images must be {one}, got {list(images.shape)}")
        return [images.permute(0, 3, 1, 2) if last else images]
    if not isinstance(images, (list, tuple)):
        raise TypeError(
            f"{_NAME}: images must be a tensor {one} or a list of {single}, "
            f"got {type(images).__name__}"
        )
    if len(images) == 0:
        raise ValueError(f"{_NAME}: images must be a tensor {one} or a non-empty list, got []")
    batches = []
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"{_NAME}: images[{i}] must be a tensor, got {type(image).__name__}")
        if image.dim() != 3:
            raise RuntimeError(f"{_NAME}: images[{i}] must be {single}, got {list(image.shape)}")
        batches.append((image.permute(2, 0, 1) if last else image).unsqueeze(0))
    return batches


def _numbers(name: str, value: float | Sequence[float] | None, default: float) -> list[float]:
    if value is None:
        return [default]
    if isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {name} must be numbers, which the host knows, got a tensor")
    numbers = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
    if not numbers:
        raise ValueError(f"{_NAME}: {name} must be one number or one for each channel, got none")
    return numbers


def _affine(
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    scale: float | None,
    dtype: torch.dtype,
) -> tuple[list[float], list[float]]:
    """(value * scale - mean) / std as value * multiplier + offset."""
    if scale is None:
        scale = 1.0 / 255.0 if dtype == torch.uint8 else 1.0
    means, stds = _numbers("mean", mean, 0.0), _numbers("std", std, 1.0)
    if len(means) != len(stds) and 1 not in (len(means), len(stds)):
        raise ValueError(
            f"{_NAME}: mean and std must be of the same length, got {len(means)} and {len(stds)}"
        )
    for value in stds:
        if value == 0:
            raise ValueError(f"{_NAME}: std must not be zero")
    count = max(len(means), len(stds))
    means, stds = (n * count if len(n) == 1 else n for n in (means, stds))
    return (
        [scale / s for s in stds],
        [-m / s if m != 0 else 0.0 for m, s in zip(means, stds, strict=True)],
    )


def _flipped(boxes: Tensor, flip: bool | Tensor) -> Tensor:
    """A box from right to left is read from right to left."""
    columns = boxes.shape[1]
    if columns not in (4, 5):
        return boxes  # an error that the operator explains
    order = [2, 1, 0, 3] if columns == 4 else [0, 3, 2, 1, 4]
    mirrored = torch.stack([boxes[:, i] for i in order], 1)
    if isinstance(flip, Tensor):
        if flip.dtype != torch.bool or flip.dim() != 1 or flip.shape[0] != boxes.shape[0]:
            raise ValueError(
                f"{_NAME}: flip must be a bool or a bool tensor [{boxes.shape[0]}], "
                f"got {flip.dtype} {list(flip.shape)}"
            )
        return torch.where(flip[:, None], mirrored, boxes)
    return mirrored


def crop_batch(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    *,
    input_format: str = "NCHW",
    image_index: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    scale: float | None = None,
    antialias: bool = True,
    flip: bool | Tensor | None = None,
    support: str = "box",
    padding_mode: str = "constant",
    fill: float = 0.0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Boxes of images as a batch for a network: crop, resize, scale, normalise, convert, in one.

    For boxes of whole pixels the numbers are those of this loop of torchvision's
    (``torchvision.transforms.v2.functional``), but for rounding::

        for image, (x1, y1, x2, y2) in ...:
            one = to_dtype(crop(image, y1, x1, y2 - y1, x2 - x1), torch.float32, scale=True)
            one = normalize(resize(one, output_size, antialias=True), mean, std)

    and boxes between pixels are in between. Each cell weighs the pixels around its middle by a
    triangle, as ``interpolate(mode="bilinear", align_corners=False)`` and PIL do: as wide as the
    cell where it is shrunk and ``antialias`` is set, as wide as a pixel otherwise. Weights are
    divided by their sum. A pixel that the box covers in part has that part of its weight::

        |-----x-----|-----x-----|-----x-----|-----x-----|-----x-----|   x: pixel centres
                    [           |     ^     |           ]               a cell of 3 pixels, 1..4
                    1/3        2/3    1    2/3         1/3              weights, before their sum

    Args:
        images: ``[N, C, H, W]``, or a list of ``[C, H, W]`` of any sizes; or with channels last,
            see ``input_format``. uint8, float32, float16, bfloat16 or float64, any strides.
        boxes: x1, y1, x2, y2 in pixels, edge units (pixel k covers k to k + 1), in one of these
            forms: ``[K, 5]`` with the image index in front; ``[K, 4]`` beside ``image_index``;
            ``[K, 4]`` alone, where the first K / N boxes belong to the first image and so on; or a
            list with one ``[L, 4]`` tensor for each image. Any float dtype. A reversed box mirrors
            its crop.
        output_size: ``height, width`` or one number for both.
        input_format: ``"NCHW"``, or ``"NHWC"`` as decoders have it (lists: CHW or HWC).
        image_index: ``[K]`` int64 or int32, the image of each box.
        mean, std: for each channel or one for all, in units of the scaled image:
            ``(value * scale - mean) / std``.
        scale: of pixel values; 1 / 255 for uint8 and 1 for others where it is None.
        antialias: whether the triangle is as wide as a cell.
        flip: mirrors all crops (True) or some (``[K]`` bool) from left to right.
        support: which pixels a cell may read. ``"box"``: those of the box, as if it were cropped
            first. ``"image"``: those beyond it in the image as well, which is
            ``PIL.Image.resize(box=...)``.
        padding_mode: what pixels outside the image are: ``"constant"``, the ``fill`` value, or
            ``"border"``, the nearest pixel of the image.
        fill: a pixel value, before ``scale``.
        dtype: of the result: float32, float16, bfloat16 or float64.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last``.

    Returns:
        ``[K, C, height, width]``. Weights are found in float64; sums are float32, or float64 where
        the images are, and rounded once to ``dtype``. Boxes that are empty, NaN or infinite read
        nothing: they are ``fill`` everywhere, scaled and normalised like any other pixel. The cost
        of a box is bounded by its image, however large the box is.

    Gradients:
        To float ``images`` and to ``boxes``, exact, with the width of the filter. In reverse and
        forward mode and under ``vmap``; a box edge on the edge of a pixel has the derivative of a
        shrinking box. The weights are not linear in the box: second derivatives in boxes (twice in
        a box) raise, those in images and mixed ones exist. Deterministic.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on CPU also an image index outside
            the batch. On CUDA such a box is empty; see :func:`set_check_indices`.
        ValueError, TypeError: an unknown option, a list or size that is none.

    >>> import torch, glimpse_ext
    >>> image = torch.arange(48, dtype=torch.uint8).reshape(1, 4, 4, 3)
    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    >>> batch = glimpse_ext.crop_batch(image, boxes, 2, input_format="NHWC", scale=1.0)
    >>> batch[0, 0]
    tensor([[10.7143, 15.4286],
            [29.5714, 34.2857]])
    """
    if image_index is not None and not isinstance(boxes, Tensor):
        raise TypeError(f"{_NAME}: a list of boxes takes no image_index")
    batches = _as_batches(images, input_format)
    boxes = join_boxes(_NAME, boxes)
    height, width = size_pair(_NAME, output_size)
    beyond = choose(_NAME, "support", support, _SUPPORTS)
    edge = choose(_NAME, "padding_mode", padding_mode, _PADDINGS)
    if dtype not in _DTYPES:
        raise ValueError(
            f"{_NAME}: dtype must be float32, float16, bfloat16 or float64, got {dtype}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{_NAME}: memory_format must be contiguous_format or channels_last, "
            f"got {memory_format}"
        )
    multiplier, offset = _affine(mean, std, scale, batches[0].dtype)
    count = batches[0].shape[0] if len(batches) == 1 else len(batches)
    if image_index is not None:
        check_separate_indices(_NAME, image_index, count)
    elif boxes.shape[-1] == 5:
        check_indices(_NAME, boxes, count)
    if flip is not None and flip is not False and boxes.dim() == 2:
        boxes = _flipped(boxes, flip)
    return _run(
        batches,
        boxes,
        image_index,
        height,
        width,
        bool(antialias),
        beyond,
        edge,
        float(fill),
        multiplier,
        offset,
        _DTYPES.index(dtype),
        memory_format == torch.channels_last,
    )
