# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives, batching and shapes of the operators on frames, which are not separable.

Where a box turns, or each channel takes another sample, no pair of axis tables says what is read.
Every sample of a cell then has four taps of its own, and three linear applications of these are
what all derivatives are made of (csrc/frame_problem.h):

* ``sample``         S(x): the mean over the samples of a cell, or one chosen sample of it
* ``grad_features``  B(g): its transpose
* ``grad_boxes``     D(x, g) = ⟨g, ∂S(x)⟩, the gradient to the boxes

each also along a motion v of the boxes (``tangent``), where a weight becomes its derivative along
v: S_v, B_v, and D_v, which needs the mixed second derivative of a bilinear function and the
curvature of a turning position. That closes the algebra for two orders:

=======  =========================================================
S(x)     x: B(g)      boxes: D(x, g)    along v: S_v(x)
B(g)     g: S(x)      boxes: D(x, g)    along v: B_v(g)
D(x, g)  x: B_c(g)    g: S_c(x)         boxes: D_c(x, g)
S_v(x)   x: B_v(g)    v: D(x, g)        boxes: D_v(x, g)
B_v(g)   g: S_v(x)    v: D(x, g)        boxes: D_v(x, g)
D_v      v: D_c(x, g); everything else would be of third order in the boxes and raises
=======  =========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._autograd import (
    BelowAutograd,
    differentiates,
    is_eager,
    plain_apply,
    requires_grad,
    transforms_active,
)
from ._register import (
    _dims,
    _flat,
    _library_impl,
    _memory_format,
    _optional_flat,
    _to_front,
    run_below_autograd,
)
from ._sampling import is_channels_last

_ops = torch.ops.glimpse_ext

ROI_ALIGN, ROTATED = 0, 1
"""FrameOperator::Kind; csrc/geometry/rotated.h."""

_COLUMNS = {ROI_ALIGN: 4, ROTATED: 5}
_NAMES = {ROI_ALIGN: "roi_align_max", ROTATED: "roi_align_rotated"}


@dataclass(frozen=True)
class FrameSampler:
    """The numbers of a call that are not tensors, as the generic operators take them."""

    output_size: tuple[int, int]
    params: tuple[int, ...]
    """Members of FrameOperator: kind, sampling_ratio, aligned, clockwise, degrees."""
    scale: float

    def arguments(self) -> tuple[list[int], list[int], float]:
        return list(self.output_size), [int(p) for p in self.params], float(self.scale)


class FrameWhere(NamedTuple):
    """Where is read: the boxes with what belongs to them, and how."""

    boxes: Tensor
    image_index: Tensor | None
    tangent: Tensor | None
    chosen: Tensor | None
    sampler: FrameSampler

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.boxes,
            self.image_index,
            self.tangent,
            self.chosen,
            *self.sampler.arguments(),
        )


@dataclass(frozen=True)
class FrameMap:
    """Size and memory format of a map that is to be made."""

    size: tuple[int, ...]
    channels_last: bool

    @staticmethod
    def of(input: Tensor) -> FrameMap:
        return FrameMap(tuple(input.shape), is_channels_last(input))

    def arguments(self) -> tuple[list[int], bool]:
        return list(self.size), self.channels_last


def _restored(tensors: Sequence[Any], sampler: FrameSampler) -> FrameWhere:
    boxes, image_index, tangent, chosen = tensors
    return FrameWhere(boxes, image_index, tangent, chosen, sampler)


def _place(args: Sequence[Any]) -> FrameWhere:
    boxes, image_index, tangent, chosen, output_size, params, scale = args
    sampler = FrameSampler(tuple(output_size), tuple(params), scale)
    return FrameWhere(boxes, image_index, tangent, chosen, sampler)


# ---------------------------------------------------------------------------------------------
# The applications. Inside torch.func they are the Functions themselves; outside, the registered
# operators, whose autograd kernels are the same Functions.


def sample(input: Tensor, where: FrameWhere) -> Tensor:
    args = (input, *where.arguments())
    out: Tensor = _call(_Sample, (input, *where), _ops._frames_sample.default, args)
    return out


def grad_features(grad: Tensor, where: FrameWhere, like: FrameMap) -> Tensor:
    args = (grad, *where.arguments(), *like.arguments())
    op = _ops._frames_grad_features.default
    out: Tensor = _call(_GradFeatures, (grad, *where, like), op, args)
    return out


def grad_boxes(input: Tensor, grad: Tensor, where: FrameWhere) -> Tensor:
    args = (input, grad, *where.arguments())
    out: Tensor = _call(_GradBoxes, (input, grad, *where), _ops._frames_grad_boxes.default, args)
    return out


def _call(
    function: type[torch.autograd.Function],
    inputs: tuple[Any, ...],
    op: Any,
    args: tuple[Any, ...],
) -> Any:
    """An application as a Function of ``inputs`` or as the operator of ``args``."""
    if is_eager():
        return _eager(function)(*inputs) if requires_grad(inputs) else run_below_autograd(op, args)
    return function.apply(*inputs) if transforms_active() else op(*args)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The Function in the form of its caller: one for torch.func, a shorter one for all else."""
    if transforms_active():
        return function.apply(*args)
    return _eager(function)(*args)


@cache
def _eager(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``apply`` of the same rules as a Function of the old form, which costs a third."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with BelowAutograd():
            output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    rules = {
        "forward": staticmethod(forward),
        "backward": staticmethod(function.backward),
        "jvp": staticmethod(function.jvp),
    }
    return plain_apply(type(f"{function.__name__}Eager", (torch.autograd.Function,), rules))


def _sum(*terms: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _third_order(where: FrameWhere) -> RuntimeError:
    return RuntimeError(
        f"{_NAMES[where.sampler.params[0]]}: derivatives of third order in the boxes are not "
        "supported"
    )


# ---------------------------------------------------------------------------------------------
# The rules. The tensors of a FrameWhere are inputs of each Function, because they carry gradients;
# image_index and chosen are whole numbers and have none.


class _Sample(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, *place: Any) -> Tensor:
        out: Tensor = _ops._frames_sample.default(input, *FrameWhere(*place).arguments())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, *place = inputs
        *tensors, ctx.sampler = place
        ctx.save_for_backward(input, *tensors)
        ctx.save_for_forward(input, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        need = ctx.needs_input_grad
        to_input = grad_features(grad, where, FrameMap.of(input)) if need[0] else None
        to_boxes = grad_boxes(input, grad, where) if need[1] else None
        plain = where._replace(tangent=None)
        to_tangent = grad_boxes(input, grad, plain) if need[3] else None
        return to_input, to_boxes, None, to_tangent, None, None

    @staticmethod
    def jvp(ctx: Any, *motions: Any) -> Any:
        input, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        if where.tangent is not None and motions[1] is not None:
            raise _third_order(where)
        moved = motions[3] if where.tangent is not None else motions[1]
        return _sum(
            None if motions[0] is None else sample(motions[0], where),
            None if moved is None else sample(input, where._replace(tangent=moved)),
        )


class _GradFeatures(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *rest: Any) -> Tensor:
        *place, like = rest
        out: Tensor = _ops._frames_grad_features.default(
            grad, *FrameWhere(*place).arguments(), *like.arguments()
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, *place, ctx.like = inputs
        *tensors, ctx.sampler = place
        ctx.save_for_backward(grad, *tensors)
        ctx.save_for_forward(grad, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        grad, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        need = ctx.needs_input_grad
        to_grad = sample(cotangent, where) if need[0] else None
        to_boxes = grad_boxes(cotangent, grad, where) if need[1] else None
        plain = where._replace(tangent=None)
        to_tangent = grad_boxes(cotangent, grad, plain) if need[3] else None
        return to_grad, to_boxes, None, to_tangent, None, None, None

    @staticmethod
    def jvp(ctx: Any, *motions: Any) -> Any:
        grad, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        if where.tangent is not None and motions[1] is not None:
            raise _third_order(where)
        moved = motions[3] if where.tangent is not None else motions[1]
        return _sum(
            None if motions[0] is None else grad_features(motions[0], where, ctx.like),
            None if moved is None else grad_features(grad, where._replace(tangent=moved), ctx.like),
        )


class _GradBoxes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, grad: Tensor, *place: Any) -> Tensor:
        out: Tensor = _ops._frames_grad_boxes.default(input, grad, *FrameWhere(*place).arguments())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, grad, *place = inputs
        *tensors, ctx.sampler = place
        ctx.save_for_backward(input, grad, *tensors)
        ctx.save_for_forward(input, grad, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        input, grad, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        need = ctx.needs_input_grad
        moved = where._replace(tangent=cotangent)
        if where.tangent is not None and any(need[:3]):
            raise _third_order(where)
        to_input = grad_features(grad, moved, FrameMap.of(input)) if need[0] else None
        to_grad = sample(input, moved) if need[1] else None
        to_boxes = grad_boxes(input, grad, moved) if need[2] else None
        # Second derivatives are symmetric: ⟨c, D_v⟩ = ⟨v, D_c⟩.
        to_tangent = grad_boxes(input, grad, moved) if need[4] else None
        return to_input, to_grad, to_boxes, None, to_tangent, None, None

    @staticmethod
    def jvp(ctx: Any, *motions: Any) -> Any:
        input, grad, *tensors = ctx.saved_tensors
        where = _restored(tensors, ctx.sampler)
        if where.tangent is not None and motions[2] is not None:
            raise _third_order(where)
        moved = motions[4] if where.tangent is not None else motions[2]
        return _sum(
            None if motions[0] is None else grad_boxes(motions[0], grad, where),
            None if motions[1] is None else grad_boxes(input, motions[1], where),
            None if moved is None else grad_boxes(input, grad, where._replace(tangent=moved)),
        )


class _Maximum(torch.autograd.Function):
    """The largest sample of each cell, and which it is: its derivatives are that sample's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, boxes: Tensor, image_index: Any, sampler: FrameSampler
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = _ops._frames_maximum.default(
            input, boxes, image_index, *sampler.arguments()
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, boxes, image_index, ctx.sampler = inputs
        _, samples = output
        ctx.mark_non_differentiable(samples)
        ctx.save_for_backward(input, boxes, image_index, samples)
        ctx.save_for_forward(input, boxes, image_index, samples)

    @staticmethod
    def _saved(ctx: Any) -> tuple[Tensor, FrameWhere]:
        input, boxes, image_index, samples = ctx.saved_tensors
        return input, FrameWhere(boxes, image_index, None, samples, ctx.sampler)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        input, where = _Maximum._saved(ctx)
        need = ctx.needs_input_grad
        to_input = grad_features(grad, where, FrameMap.of(input)) if need[0] else None
        to_boxes = grad_boxes(input, grad, where) if need[1] else None
        return to_input, to_boxes, None, None

    @staticmethod
    def jvp(ctx: Any, *motions: Any) -> Any:
        input, where = _Maximum._saved(ctx)
        tangent = _sum(
            None if motions[0] is None else sample(motions[0], where),
            None if motions[1] is None else sample(input, where._replace(tangent=motions[1])),
        )
        return tangent, None


# ---------------------------------------------------------------------------------------------
# Batching: examples become rows of boxes, with images of their own behind one another.


def _batch(where: FrameWhere, dims: dict[int, int], size: int, images: int | None) -> FrameWhere:
    """As _batch_where in _register.py: ``images`` of one example, None where they are shared."""
    boxes = _to_front(where.boxes, dims, size)
    tangent = None if where.tangent is None else _to_front(where.tangent, dims, size)
    if images is None:
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
        tangent=None if tangent is None else tangent.flatten(0, 1),
        chosen=_optional_flat(where.chosen, dims, size),
    )


def _length(tensor: Tensor, dims: dict[int, int]) -> int:
    """Of the first dimension without the batch."""
    return tensor.shape[0 if dims.get(id(tensor)) != 0 else 1]


def _images(input: Tensor, dims: dict[int, int]) -> int | None:
    return _length(input, dims) if id(input) in dims else None


def _own(input: Tensor, dims: dict[int, int], size: int) -> Tensor:
    return _flat(input, dims, size) if id(input) in dims else input


def _batch_sample(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    input, where = args[0], _place(args[1:])
    dims, size = _dims(args, in_dims), info.batch_size
    place = _batch(where, dims, size, _images(input, dims))
    pooled = _ops._frames_sample.default(_own(input, dims, size), *place.arguments())
    return pooled.unflatten(0, (size, _length(where.boxes, dims))), 0


def _batch_maximum(
    info: Any, in_dims: Any, *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    input, boxes, image_index, output_size, params, scale = args
    where = _place((boxes, image_index, None, None, output_size, params, scale))
    dims, size = _dims(args, in_dims), info.batch_size
    place = _batch(where, dims, size, _images(input, dims))
    pooled, samples = _ops._frames_maximum.default(
        _own(input, dims, size), place.boxes, place.image_index, output_size, params, scale
    )
    shape = (size, _length(boxes, dims))
    return (pooled.unflatten(0, shape), samples.unflatten(0, shape)), (0, 0)


def _batch_grad_features(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    grad, where = args[0], _place(args[1:-2])
    sizes, channels_last = args[-2:]
    dims, size = _dims(args, in_dims), info.batch_size
    images = sizes[0]
    got = _ops._frames_grad_features.default(
        _flat(grad, dims, size),
        *_batch(where, dims, size, images).arguments(),
        [size * images, *sizes[1:]],
        channels_last,
    )
    return got.unflatten(0, (size, images)), 0


def _batch_grad_boxes(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    input, grad, where = args[0], args[1], _place(args[2:])
    dims, size = _dims(args, in_dims), info.batch_size
    place = _batch(where, dims, size, _images(input, dims))
    got = _ops._frames_grad_boxes.default(
        _own(input, dims, size), _flat(grad, dims, size), *place.arguments()
    )
    if where.image_index is None and place.image_index is not None:
        got = torch.nn.functional.pad(got, (1, 0))  # the image column went into an index
    return got.unflatten(0, (size, _length(where.boxes, dims))), 0


# ---------------------------------------------------------------------------------------------
# Registration.


def _below(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with BelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_kernel(
    op: Any, apply: Callable[..., Any], tensors: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        if not differentiates(*tensors(*args)):
            return _below(op, keyset, args)
        return apply(*args)

    return kernel


def _pooled_size(input: Tensor, boxes: Tensor, output_size: Sequence[int]) -> list[int]:
    return [boxes.shape[0], input.shape[1], *output_size]


def _check_fake(input: Tensor, boxes: Tensor, image_index: Tensor | None, kind: int) -> None:
    """The checks of csrc/ops that a tensor without numbers can fail; same words."""
    name = _NAMES[kind]
    columns = _COLUMNS[kind] + (1 if image_index is None else 0)
    if input.dim() != 4:
        raise RuntimeError(f"{name}: input must be [N, C, H, W], got {list(input.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise RuntimeError(f"{name}: boxes must be [K, {columns}], got {list(boxes.shape)}")
    if input.device != boxes.device:
        raise RuntimeError(
            f"{name}: boxes must be on the device of the features, {input.device}, "
            f"got {boxes.device}"
        )


def _fake_pooled(input: Tensor, boxes: Tensor, output_size: Sequence[int]) -> Tensor:
    dtype = torch.float32 if input.dtype == torch.uint8 else input.dtype
    return torch.empty(
        _pooled_size(input, boxes, output_size),
        dtype=dtype,
        device=input.device,
        memory_format=_memory_format(is_channels_last(input)),
    )


def _fake_sample(input: Tensor, *args: Any) -> Tensor:
    where = _place(args)
    _check_fake(input, where.boxes, where.image_index, where.sampler.params[0])
    return _fake_pooled(input, where.boxes, where.sampler.output_size)


def _fake_maximum(
    input: Tensor, boxes: Tensor, image_index: Tensor | None, output_size: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    _check_fake(input, boxes, image_index, ROI_ALIGN)
    pooled = _fake_pooled(input, boxes, output_size)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


def _fake_grad_features(grad: Tensor, *args: Any) -> Tensor:
    return torch.empty(
        tuple(args[-2]),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_memory_format(args[-1]),
    )


def _fake_grad_boxes(input: Tensor, grad: Tensor, boxes: Tensor, *_: Any) -> Tensor:
    return torch.empty(boxes.shape, dtype=boxes.dtype, device=boxes.device)


def _register(
    name: str,
    apply: Callable[..., Any],
    tensors: Callable[..., tuple[Any, ...]],
    fake: Callable[..., Any],
    batch: Callable[..., Any],
) -> None:
    kernel = _autograd_kernel(getattr(_ops, name).default, apply, tensors)
    _library_impl.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(f"glimpse_ext::{name}", fake)
    torch.library.register_vmap(f"glimpse_ext::{name}", batch)


def _rotated_arguments(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    *params: int,
) -> tuple[Any, ...]:
    """Of _frames_sample, from those of roi_align_rotated."""
    size = [pooled_height, pooled_width]
    return input, boxes, None, None, None, size, [ROTATED, *params], spatial_scale


def _max_arguments(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    *params: int,
) -> tuple[Any, ...]:
    """Of _frames_maximum, from those of roi_align_max."""
    size = [pooled_height, pooled_width]
    return input, boxes, None, size, [ROI_ALIGN, *params, 0, 0], spatial_scale


def _apply_sample(input: Tensor, *args: Any) -> Tensor:
    return cast(Tensor, _apply(_Sample, input, *_place(args)))


def _apply_maximum(
    input: Tensor,
    boxes: Tensor,
    image_index: Tensor | None,
    output_size: Sequence[int],
    params: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    height, width = output_size
    sampler = FrameSampler((height, width), tuple(params), scale)
    return cast(
        tuple[Tensor, Tensor],
        _apply(_Maximum, input, boxes, image_index, sampler),
    )


_register(
    "_frames_sample",
    _apply_sample,
    lambda input, boxes, index, tangent, *_: (input, boxes, tangent),
    _fake_sample,
    _batch_sample,
)
_register(
    "_frames_grad_features",
    lambda grad, *args: _apply(
        _GradFeatures, grad, *_place(args[:-2]), FrameMap(tuple(args[-2]), args[-1])
    ),
    lambda grad, boxes, index, tangent, *_: (grad, boxes, tangent),
    _fake_grad_features,
    _batch_grad_features,
)
_register(
    "_frames_grad_boxes",
    lambda input, grad, *args: _apply(_GradBoxes, input, grad, *_place(args)),
    lambda input, grad, boxes, index, tangent, *_: (input, grad, boxes, tangent),
    _fake_grad_boxes,
    _batch_grad_boxes,
)
_register(
    "_frames_maximum",
    _apply_maximum,
    lambda input, boxes, *_: (input, boxes),
    _fake_maximum,
    _batch_maximum,
)


def _expanded_dims(in_dims: Sequence[Any], count: int) -> list[Any]:
    """Batch dimensions of (input, boxes, ...) for the generic operator's ``count`` arguments."""
    return [*in_dims[:2], *[None] * (count - 2)]


def _batch_rotated(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    generic = _rotated_arguments(*args)
    return _batch_sample(info, _expanded_dims(in_dims, len(generic)), *generic)


def _batch_max(info: Any, in_dims: Any, *args: Any) -> Any:
    generic = _max_arguments(*args)
    return _batch_maximum(info, _expanded_dims(in_dims, len(generic)), *generic)


_register(
    "roi_align_rotated",
    lambda *args: _apply_sample(*_rotated_arguments(*args)),
    lambda input, boxes, *_: (input, boxes),
    lambda *args: _fake_sample(*_rotated_arguments(*args)),
    _batch_rotated,
)
_register(
    "roi_align_max",
    lambda *args: _apply_maximum(*_max_arguments(*args)),
    lambda input, boxes, *_: (input, boxes),
    lambda *args: _fake_maximum(*_max_arguments(*args)),
    _batch_max,
)


# ---------------------------------------------------------------------------------------------
# As public functions call them.


def call_rotated(*args: Any) -> Tensor:
    """The operator roi_align_rotated, also where torch.func transforms surround the call."""
    op = _ops.roi_align_rotated.default
    if is_eager() and not requires_grad(args[:2]):
        return cast(Tensor, run_below_autograd(op, args))
    if not torch.compiler.is_compiling() and (is_eager() or transforms_active()):
        return _apply_sample(*_rotated_arguments(*args))
    out: Tensor = op(*args)
    return out


def call_max(*args: Any) -> Tensor:
    """The values of roi_align_max, also where torch.func transforms surround the call."""
    op = _ops.roi_align_max.default
    if is_eager() and not requires_grad(args[:2]):
        return cast(Tensor, run_below_autograd(op, args)[0])
    if not torch.compiler.is_compiling() and (is_eager() or transforms_active()):
        return _apply_maximum(*_max_arguments(*args))[0]
    out: tuple[Tensor, Tensor] = op(*args)
    return out[0]
