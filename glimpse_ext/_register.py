# SPDX-License-Identifier: BSD-3-Clause
"""Registers autograd, fake kernels and batching rules of the operators, once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import _library
from ._autograd import (
    BelowAutograd,
    GradBoxesFunction,
    GradFeaturesFunction,
    SampleFunction,
    differentiates,
    is_eager,
    plain_apply,
    requires_grad,
    sample,
    transforms_active,
)
from ._sampling import (
    Where,
    bind_grad_boxes,
    bind_grad_features,
    bind_sample,
    is_channels_last,
)

_ops = torch.ops.glimpse_ext
_library_impl = torch.library.Library("glimpse_ext", "IMPL")


_apply_sample = plain_apply(SampleFunction)
_TENSORS = 3
"""No operator that samples has more tensor arguments."""


def run_below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    with BelowAutograd():
        return op(*args)


def _below_autograd(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with BelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


Bind = Callable[..., tuple[Sequence[Tensor], Where]]
"""Arguments of an operator, in schema order -> its feature maps and where they are read."""

Dims = dict[int, int]
"""Batch dimension of each batched tensor, by id."""


def _check_fake(name: str, features: Sequence[Tensor], where: Where) -> None:
    """The checks of csrc/ops that a tensor without numbers can fail; same words."""
    boxes = where.boxes
    for feature in features:
        if feature.dim() != 4:
            raise RuntimeError(f"{name}: input must be [N, C, H, W], got {list(feature.shape)}")
        if feature.device != boxes.device:
            raise RuntimeError(
                f"{name}: boxes must be on the device of the features, {feature.device}, "
                f"got {boxes.device}"
            )
    columns = where.sampler.columns.width
    widths = [columns] if where.image_index is not None else [columns + 1]
    if where.image_index is None and where.sampler.even:
        widths.append(columns)
    if boxes.dim() != 2 or boxes.shape[1] not in widths:
        raise RuntimeError(f"{name}: boxes must be [K, {widths[0]}], got {list(boxes.shape)}")


def _fake_pooled(first: Tensor, where: Where, copies: bool) -> Tensor:
    dtype = torch.float32 if first.dtype == torch.uint8 and not copies else first.dtype
    size = (where.boxes.shape[0], first.shape[1], *where.sampler.output_size)
    return torch.empty(
        size,
        dtype=dtype,
        device=first.device,
        memory_format=_memory_format(is_channels_last(first)),
    )


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _dims(args: Sequence[Any], in_dims: Sequence[Any]) -> Dims:
    found: Dims = {}
    for arg, dim in zip(args, in_dims, strict=True):
        if isinstance(arg, Tensor) and dim is not None:
            found[id(arg)] = dim
        elif isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            found.update(_dims(arg, dim))
    return found


def _to_front(tensor: Tensor, dims: Dims, size: int) -> Tensor:
    dim = dims.get(id(tensor))
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _flat(tensor: Tensor, dims: Dims, size: int) -> Tensor:
    """The batch dimension joined with the first one."""
    return _to_front(tensor, dims, size).flatten(0, 1)


def _optional_flat(tensor: Tensor | None, dims: Dims, size: int) -> Tensor | None:
    return None if tensor is None else _flat(tensor, dims, size)


def _batch_where(where: Where, dims: Dims, size: int, images: int, own_images: bool) -> Where:
    """One place for all examples of a batch.

    images: the number of images of one example. Where examples have images of their own, example e
    reads images e*images and on; otherwise all read the same.
    """
    boxes = _to_front(where.boxes, dims, size)
    tangent = None if where.tangent is None else _to_front(where.tangent, dims, size)
    levels = _optional_flat(where.levels, dims, size)
    skip = boxes.shape[-1] - where.sampler.columns.width
    if where.image_index is None and skip == 0:
        # As many boxes for each image.
        count = boxes.shape[1]
        index = torch.arange(count, device=boxes.device) // max(count // max(images, 1), 1)
        index = index.expand(size, count)
        if own_images:
            index = index + images * torch.arange(size, device=boxes.device).unsqueeze(1)
        image_index: Tensor | None = index.flatten()
    elif not own_images:
        image_index = _optional_flat(where.image_index, dims, size)
    else:
        if where.image_index is None:
            index = boxes[..., 0]
            valid = (index > -1) & (index < images)
            index = torch.where(valid, index, torch.zeros_like(index)).to(torch.int64)
            boxes = boxes[..., 1:]
            tangent = None if tangent is None else tangent[..., 1:]
        else:
            index = _to_front(where.image_index, dims, size).to(torch.int64)
            valid = (index >= 0) & (index < images)
        example = torch.arange(size, device=boxes.device).unsqueeze(1)
        # An index outside its own example must not reach into the next one.
        image_index = torch.where(valid, index + example * images, -1).flatten()
    return where._replace(
        boxes=boxes.flatten(0, 1),
        image_index=image_index,
        levels=levels,
        tangent=None if tangent is None else tangent.flatten(0, 1),
    )


def _batch_sample(
    features: Sequence[Tensor], where: Where, dims: Dims, size: int
) -> tuple[Tensor, int]:
    own_images = any(id(f) in dims for f in features)
    one = features[0]
    images = one.shape[0 if dims.get(id(one)) != 0 else 1]
    boxes = where.boxes.shape[0 if dims.get(id(where.boxes)) != 0 else 1]
    flat = [_flat(f, dims, size) for f in features] if own_images else list(features)
    place = _batch_where(where, dims, size, images, own_images)
    pooled = _ops._sample.default(flat, *place.arguments())
    return pooled.unflatten(0, (size, boxes)), 0


def _batch_grad_features(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    grad, where, maps = bind_grad_features(*args)
    dims, size = _dims(args, in_dims), info.batch_size
    images = maps.sizes[0]
    grads = _ops._sample_grad_features.default(
        _flat(grad, dims, size),
        *_batch_where(where, dims, size, images, True).arguments(),
        [size * images, *maps.sizes[1:]],
        maps.channels_last,
    )
    return [g.unflatten(0, (size, images)) for g in grads], [0] * len(grads)


def _batch_grad_boxes(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    features, grad, where = bind_grad_boxes(*args)
    dims, size = _dims(args, in_dims), info.batch_size
    own_images = any(id(f) in dims for f in features)
    one = features[0]
    images = one.shape[0 if dims.get(id(one)) != 0 else 1]
    boxes = where.boxes.shape[0 if dims.get(id(where.boxes)) != 0 else 1]
    columns = where.boxes.shape[-1 if dims.get(id(where.boxes)) != where.boxes.dim() - 1 else -2]
    flat = [_flat(f, dims, size) for f in features] if own_images else list(features)
    place = _batch_where(where, dims, size, images, own_images)
    got = _ops._sample_grad_boxes.default(flat, _flat(grad, dims, size), *place.arguments())
    if got.shape[1] != columns:  # the image column went into an index of its own
        got = torch.nn.functional.pad(got, (1, 0))
    return got.unflatten(0, (size, boxes)), 0


def batch_rows(op: Any) -> Callable[..., tuple[Tensor, int]]:
    """The batching rule of an operator whose rows, those of its first two arguments and of its
    result, do not see each other: rows of all examples are rows of one call."""

    def batch(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        dims, size = _dims(args, in_dims), info.batch_size
        first, second, *rest = args
        rows = first.shape[0 if dims.get(id(first)) != 0 else 1]
        out: Tensor = op(_flat(first, dims, size), _flat(second, dims, size), *rest)
        return out.unflatten(0, (size, rows)), 0

    return batch


def register_sampler(
    name: str,
    bind: Bind,
    transform: Callable[[Any, Where, Sequence[Any]], Tensor] | None = None,
    batch: Callable[..., tuple[Tensor, int]] | None = None,
) -> Callable[..., Tensor]:
    """Gives a registered operator that samples its derivatives, fake kernel and batching rule.

    An operator whose values are not those of the tables but whose derivatives are says how it is
    called inside torch.func (``transform``). ``batch`` stands in for the batching rule.

    Returns the operator as public functions call it: the same numbers by the shortest way.
    """
    op = getattr(_ops, name).default
    _library.add_sampler(name, bind)

    def call(*args: Any) -> Tensor:
        if is_eager():
            # In every schema, the tensors come first.
            if not requires_grad(args[:_TENSORS]):
                return cast(Tensor, run_below_autograd(op, args))
            features, where = bind(*args)
            run = partial(run_below_autograd, op, args)
            return cast(Tensor, _apply_sample(run, where, where.boxes, None, *features))
        if torch.compiler.is_compiling() or not transforms_active():
            # Traced, or in forward mode: the autograd kernel below.
            return cast(Tensor, op(*args))
        features, where = bind(*args)
        return sample(features, where) if transform is None else transform(op, where, args)

    def autograd_kernel(keyset: Any, *args: Any) -> Tensor:
        features, where = bind(*args)

        def run() -> Tensor:
            result: Tensor = _below_autograd(op, keyset, args)
            return result

        if not differentiates(where.boxes, where.tangent, *features):
            return run()
        out: Tensor = SampleFunction.apply(  # type: ignore[no-untyped-call]
            run, where, where.boxes, where.tangent, *features
        )
        return out

    def fake(*args: Any) -> Tensor:
        features, where = bind(*args)
        _check_fake(name, features, where)
        return _fake_pooled(features[0], where, transform is not None)

    def batch_sample(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        features, where = bind(*args)
        return _batch_sample(features, where, _dims(args, in_dims), info.batch_size)

    _library_impl.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(f"glimpse_ext::{name}", fake)
    torch.library.register_vmap(f"glimpse_ext::{name}", batch or batch_sample)
    return call


def _grad_features_kernel(keyset: Any, *args: Any) -> list[Tensor]:
    grad, where, maps = bind_grad_features(*args)

    def run() -> list[Tensor]:
        result: list[Tensor] = _below_autograd(_ops._sample_grad_features.default, keyset, args)
        return result

    if not differentiates(grad, where.boxes, where.tangent):
        return run()
    grads: tuple[Tensor, ...] = GradFeaturesFunction.apply(  # type: ignore[no-untyped-call]
        run, where, maps, grad, where.boxes, where.tangent
    )
    return list(grads)


def _grad_boxes_kernel(keyset: Any, *args: Any) -> Tensor:
    features, grad, where = bind_grad_boxes(*args)

    def run() -> Tensor:
        result: Tensor = _below_autograd(_ops._sample_grad_boxes.default, keyset, args)
        return result

    if not differentiates(grad, where.boxes, where.tangent, *features):
        return run()
    out: Tensor = GradBoxesFunction.apply(  # type: ignore[no-untyped-call]
        run, where, grad, where.boxes, where.tangent, *features
    )
    return out


def _fake_grad_features(*args: Any) -> list[Tensor]:
    grad, _, maps = bind_grad_features(*args)
    sizes = maps.sizes
    return [
        torch.empty(
            (sizes[0], sizes[1], sizes[i], sizes[i + 1]),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=_memory_format(maps.channels_last),
        )
        for i in range(2, len(sizes), 2)
    ]


def _fake_grad_boxes(*args: Any) -> Tensor:
    _, _, where = bind_grad_boxes(*args)
    return torch.empty(where.boxes.shape, dtype=where.boxes.dtype, device=where.boxes.device)


register_sampler("_sample", bind_sample)
_library_impl.impl("_sample_grad_features", _grad_features_kernel, "Autograd", with_keyset=True)
_library_impl.impl("_sample_grad_boxes", _grad_boxes_kernel, "Autograd", with_keyset=True)
torch.library.register_fake("glimpse_ext::_sample_grad_features", _fake_grad_features)
torch.library.register_fake("glimpse_ext::_sample_grad_boxes", _fake_grad_boxes)
torch.library.register_vmap("glimpse_ext::_sample_grad_features", _batch_grad_features)
torch.library.register_vmap("glimpse_ext::_sample_grad_boxes", _batch_grad_boxes)
