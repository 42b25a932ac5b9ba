# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of every order, batching and shapes of all separable operators, written once.

An operator is ``out = Ay(boxes) · features · Ax(boxes)ᵀ`` for each box. Axis tables are piecewise
affine in the box edges along their own direction, so each may be differentiated once and vanishes
the second time. Three linear applications, in which each axis uses either its weights or their
derivative along a tangent of the boxes, are therefore closed under differentiation:

* ``sample``         S(x)    = Ay · x · Axᵀ
* ``grad_features``  B(g)    = Ayᵀ · g · Ax, summed over boxes
* ``grad_boxes``     D(x, g) = < g, S(x) differentiated in the box edges of one direction, for both >

``axes`` is the set of axes (1: y, 2: x) in tangent mode. In ``D`` it concerns, for the edges of one
direction, the other direction. With ``u`` a motion of the boxes, ``mix(v, u, a)`` the tangent that
is ``u`` along axis ``a`` and ``v`` along the other one:

* S along boxes: the sum over axes a not in ``axes`` of S with ``axes + a`` and ``mix(v, u, a)``;
* S along its tangent: the sum over axes a in ``axes`` of S with ``mix(v, u, a)``;
* B likewise, and the adjoints of both are D restricted to those axes;
* D along boxes or tangent: D with both axes in tangent mode along that motion, since the edges of
  one direction see only the motion of the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import _library  # noqa: F401  (the operators must exist before they are used here)

_Y, _X, _BOTH = 1, 2, 3
_AXES = (_Y, _X)

_ops = torch.ops.glimpse_ext


@dataclass(frozen=True)
class Sampler:
    """The numbers of a call that are not tensors, as the generic operators take them.

    A dataclass, because torch.func takes tuples apart.
    """

    output_size: tuple[int, int]
    op: int
    params: tuple[float, ...]
    scales: tuple[float, ...]
    level_rule: tuple[float, ...]
    y_columns: tuple[int, int]
    """Columns of the low and high box edge along y, counted after the image column."""
    x_columns: tuple[int, int]

    def arguments(self) -> tuple[list[int], int, list[float], list[float], list[float]]:
        return (
            list(self.output_size),
            self.op,
            [float(p) for p in self.params],
            [float(s) for s in self.scales],
            [float(r) for r in self.level_rule],
        )


@dataclass(frozen=True)
class Maps:
    """Sizes and memory format of feature maps that are to be made."""

    sizes: tuple[int, ...]
    """N, C, then height and width of each map."""
    channels_last: bool

    @staticmethod
    def of(features: Sequence[Tensor]) -> Maps:
        first = features[0]
        sizes = [first.shape[0], first.shape[1]]
        for feature in features:
            sizes += [feature.shape[2], feature.shape[3]]
        return Maps(tuple(sizes), is_channels_last(first))

    def arguments(self) -> tuple[list[int], bool]:
        return list(self.sizes), self.channels_last


class Where(NamedTuple):
    """Where is read: the boxes with what belongs to them, and how."""

    boxes: Tensor
    image_index: Tensor | None
    levels: Tensor | None
    tangent: Tensor | None
    axes: int
    sampler: Sampler

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.boxes,
            self.image_index,
            self.levels,
            self.tangent,
            self.axes,
            *self.sampler.arguments(),
        )

    def along(self, axis: int, motion: Tensor, axes: int) -> Where:
        """The same place with ``axes`` in tangent mode, ``axis`` of them along ``motion``."""
        other = _BOTH - axis
        if axes & other == 0 or self.tangent is None:
            return self._replace(tangent=motion, axes=axes)
        mask = _axis_mask(self, axis)
        return self._replace(tangent=torch.where(mask, motion, self.tangent), axes=axes)


def _axis_mask(where: Where, axes: int) -> Tensor:
    skip = where.boxes.shape[1] - 4
    sampler = where.sampler
    # Compared on the device: a copy from the host would wait for the device.
    column = torch.arange(where.boxes.shape[1], device=where.boxes.device)
    mask = torch.zeros_like(column, dtype=torch.bool)
    for axis, edges in ((_Y, sampler.y_columns), (_X, sampler.x_columns)):
        if axes & axis:
            for edge in edges:
                mask = mask | (column == skip + edge)
    return mask


def _restrict(gradient: Tensor, where: Where, axes: int) -> Tensor:
    if axes == _BOTH:
        return gradient
    return torch.where(_axis_mask(where, axes), gradient, torch.zeros_like(gradient))


def is_channels_last(features: Tensor) -> bool:
    """The memory format of the result: that of the first feature map, as csrc/ops decides it."""
    return not features.is_contiguous() and features.stride(1) == 1 and features.shape[1] > 1


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def transforms_active() -> bool:
    """Whether torch.func transforms surround this call.

    Refuses forward mode inside forward mode, for which an autograd Function silently loses the
    tangents of the outer level.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise RuntimeError(
            "glimpse_ext: torch.func.jvp (or jacfwd) inside another one is not supported by "
            "torch's autograd Functions; use jacfwd(jacrev(f)) or jacrev(jacrev(f))"
        )
    return True


# ---------------------------------------------------------------------------------------------
# The three applications. Outside torch.func they are the registered operators, whose autograd
# kernels are below; inside, autograd Functions with the rules that torch.func asks for.


def sample(features: Sequence[Tensor], where: Where) -> Tensor:
    if transforms_active():
        result: Tensor = _SampleTransform.apply(  # type: ignore[no-untyped-call]
            where.image_index,
            where.levels,
            where.axes,
            where.sampler,
            where.boxes,
            where.tangent,
            *features,
        )
        return result
    out: Tensor = _ops._sample.default(list(features), *where.arguments())
    return out


def grad_features(grad: Tensor, where: Where, maps: Maps) -> tuple[Tensor, ...]:
    if transforms_active():
        result: tuple[Tensor, ...] = _GradFeaturesTransform.apply(  # type: ignore[no-untyped-call]
            where.image_index,
            where.levels,
            where.axes,
            where.sampler,
            maps,
            grad,
            where.boxes,
            where.tangent,
        )
        return result
    return tuple(
        _ops._sample_grad_features.default(grad, *where.arguments(), *maps.arguments())
    )


def grad_boxes(features: Sequence[Tensor], grad: Tensor, where: Where) -> Tensor:
    if transforms_active():
        result: Tensor = _GradBoxesTransform.apply(  # type: ignore[no-untyped-call]
            where.image_index,
            where.levels,
            where.axes,
            where.sampler,
            grad,
            where.boxes,
            where.tangent,
            *features,
        )
        return result
    out: Tensor = _ops._sample_grad_boxes.default(list(features), grad, *where.arguments())
    return out


# ---------------------------------------------------------------------------------------------
# The rules: vector-Jacobian and Jacobian-vector products of the three applications.


class _Needs(NamedTuple):
    features: bool
    boxes: bool
    tangent: bool
    grad: bool = False


class _Gradients(NamedTuple):
    features: tuple[Tensor | None, ...]
    boxes: Tensor | None
    tangent: Tensor | None
    grad: Tensor | None = None


def _split(gradient: Tensor, where: Where, needs: _Needs) -> tuple[Tensor | None, Tensor | None]:
    """A gradient to box motions: to the boxes on plain axes, to the tangent on tangent axes."""
    to_boxes = _restrict(gradient, where, _BOTH & ~where.axes) if needs.boxes else None
    to_tangent = _restrict(gradient, where, where.axes) if needs.tangent else None
    return to_boxes, to_tangent


def _sample_vjp(
    features: Sequence[Tensor] | None,
    where: Where,
    grad: Tensor,
    needs: _Needs,
    maps: Maps,
) -> _Gradients:
    to_features: tuple[Tensor | None, ...] = (None,) * (len(maps.sizes) // 2 - 1)
    to_boxes = to_tangent = None
    if needs.features:
        to_features = grad_features(grad, where, maps)
    if needs.boxes or needs.tangent:
        assert features is not None
        to_boxes, to_tangent = _split(grad_boxes(features, grad, where), where, needs)
    return _Gradients(to_features, to_boxes, to_tangent)


def _grad_features_vjp(
    grad: Tensor, where: Where, cotangents: Sequence[Tensor], needs: _Needs
) -> _Gradients:
    to_grad = to_boxes = to_tangent = None
    if needs.grad:
        to_grad = sample(cotangents, where)
    if needs.boxes or needs.tangent:
        to_boxes, to_tangent = _split(grad_boxes(cotangents, grad, where), where, needs)
    return _Gradients((), to_boxes, to_tangent, to_grad)


def _grad_boxes_vjp(
    features: Sequence[Tensor], grad: Tensor, where: Where, cotangent: Tensor, needs: _Needs
) -> _Gradients:
    to_features: list[list[Tensor]] = [[] for _ in features]
    to_grad: list[Tensor] = []
    for axis in _AXES:
        moved = where.along(axis, cotangent, axis | (where.axes & ~axis))
        if needs.features:
            grads = grad_features(grad, moved, Maps.of(features))
            for terms, term in zip(to_features, grads, strict=True):
                terms.append(term)
        if needs.grad:
            to_grad.append(sample(features, moved))
    to_boxes = to_tangent = None
    if needs.boxes or needs.tangent:
        moved = where._replace(tangent=cotangent, axes=_BOTH)
        to_boxes, to_tangent = _split(grad_boxes(features, grad, moved), where, needs)
    return _Gradients(
        tuple(_sum(terms) if terms else None for terms in to_features),
        to_boxes,
        to_tangent,
        _sum(to_grad) if to_grad else None,
    )


def _motions(
    where: Where, boxes_tangent: Tensor | None, tangent_tangent: Tensor | None
) -> list[Where]:
    """The places whose applications add up to the derivative along motions of boxes and tangent."""
    moved = []
    for axis in _AXES:
        motion = tangent_tangent if where.axes & axis else boxes_tangent
        if motion is not None:
            moved.append(where.along(axis, motion, where.axes | axis))
    return moved


def _filled(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(primal) if tangent is None else tangent
        for tangent, primal in zip(tangents, primals, strict=True)
    ]


def _sample_jvp(
    features: Sequence[Tensor],
    where: Where,
    features_tangents: Sequence[Tensor | None],
    boxes_tangent: Tensor | None,
    tangent_tangent: Tensor | None,
) -> Tensor | None:
    terms = [sample(features, moved) for moved in _motions(where, boxes_tangent, tangent_tangent)]
    if any(t is not None for t in features_tangents):
        terms.append(sample(_filled(features_tangents, features), where))
    return _sum(terms) if terms else None


def _grad_features_jvp(
    grad: Tensor,
    where: Where,
    maps: Maps,
    grad_tangent: Tensor | None,
    boxes_tangent: Tensor | None,
    tangent_tangent: Tensor | None,
) -> tuple[Tensor, ...] | None:
    terms = [
        grad_features(grad, moved, maps)
        for moved in _motions(where, boxes_tangent, tangent_tangent)
    ]
    if grad_tangent is not None:
        terms.append(grad_features(grad_tangent, where, maps))
    if not terms:
        return None
    return tuple(_sum(list(same)) for same in zip(*terms, strict=True))


def _grad_boxes_jvp(
    features: Sequence[Tensor],
    grad: Tensor,
    where: Where,
    features_tangents: Sequence[Tensor | None],
    grad_tangent: Tensor | None,
    boxes_tangent: Tensor | None,
    tangent_tangent: Tensor | None,
) -> Tensor | None:
    terms = []
    if any(t is not None for t in features_tangents):
        terms.append(grad_boxes(_filled(features_tangents, features), grad, where))
    if grad_tangent is not None:
        terms.append(grad_boxes(features, grad_tangent, where))
    if where.axes == 0:
        motion = boxes_tangent
    elif where.axes == _BOTH:
        motion = tangent_tangent
    elif boxes_tangent is None and tangent_tangent is None:
        motion = None
    else:
        like = torch.zeros_like(where.boxes)
        motion = torch.where(
            _axis_mask(where, where.axes),
            like if tangent_tangent is None else tangent_tangent,
            like if boxes_tangent is None else boxes_tangent,
        )
    if motion is not None:
        terms.append(grad_boxes(features, grad, where._replace(tangent=motion, axes=_BOTH)))
    return _sum(terms) if terms else None


# ---------------------------------------------------------------------------------------------
# Reverse and forward mode outside torch.func: Functions of the old form, which cost a third of the
# new one. `run` executes the operator below autograd; `where` is what the tensors after it are from.


def _save_for_jvp(ctx: Any, *tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


class _SampleFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, run: Callable[[], Tensor], where: Where, boxes: Tensor, tangent: Any, *features: Any
    ) -> Tensor:
        del boxes, tangent
        # Feature maps are kept only when a box gradient will read them.
        keep = features if any(ctx.needs_input_grad[2:4]) else ()
        ctx.save_for_backward(where.boxes, where.tangent, *keep)
        ctx.where = where._replace(boxes=None, tangent=None)
        ctx.maps = Maps.of(features)
        _save_for_jvp(ctx, where.boxes, where.tangent, *features)
        return run()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        boxes, tangent, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[4:]), need[2], need[3])
        got = _sample_vjp(features or None, where, grad, needs, ctx.maps)
        return (None, None, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        boxes, tangent, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _sample_jvp(features, where, tangents[4:], tangents[2], tangents[3])


class _GradFeaturesFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: Callable[[], list[Tensor]],
        where: Where,
        maps: Maps,
        grad: Tensor,
        boxes: Tensor,
        tangent: Any,
    ) -> tuple[Tensor, ...]:
        del boxes, tangent
        ctx.save_for_backward(where.boxes, where.tangent, grad)
        _save_for_jvp(ctx, where.boxes, where.tangent, grad)
        ctx.where = where._replace(boxes=None, tangent=None)
        ctx.maps = maps
        return tuple(run())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # type: ignore[override]
        boxes, tangent, grad = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        need = ctx.needs_input_grad
        needs = _Needs(False, need[4], need[5], need[3])
        got = _grad_features_vjp(grad, where, cotangents, needs)
        return None, None, None, got.grad, got.boxes, got.tangent

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        boxes, tangent, grad = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _grad_features_jvp(grad, where, ctx.maps, *tangents[3:])


class _GradBoxesFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: Callable[[], Tensor],
        where: Where,
        grad: Tensor,
        boxes: Tensor,
        tangent: Any,
        *features: Any,
    ) -> Tensor:
        del boxes, tangent
        ctx.save_for_backward(where.boxes, where.tangent, grad, *features)
        _save_for_jvp(ctx, where.boxes, where.tangent, grad, *features)
        ctx.where = where._replace(boxes=None, tangent=None)
        return run()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # type: ignore[override]
        boxes, tangent, grad, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[5:]), need[3], need[4], need[2])
        got = _grad_boxes_vjp(features, grad, where, cotangent, needs)
        return (None, None, got.grad, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        boxes, tangent, grad, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _grad_boxes_jvp(features, grad, where, tangents[5:], *tangents[2:5])


# ---------------------------------------------------------------------------------------------
# torch.func: Functions of the new form. Their forward calls the operators themselves, whose
# batching rules are registered below.


class _SampleTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        image_index: Any, levels: Any, axes: int, sampler: Sampler, boxes: Any, tangent: Any, *features: Any
    ) -> Tensor:
        where = Where(boxes, image_index, levels, tangent, axes, sampler)
        out: Tensor = _ops._sample.default(list(features), *where.arguments())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image_index, levels, axes, sampler, boxes, tangent, *features = inputs
        ctx.save_for_backward(boxes, image_index, levels, tangent, *features)
        ctx.save_for_forward(boxes, image_index, levels, tangent, *features)
        ctx.axes, ctx.sampler = axes, sampler

    @staticmethod
    def _saved(ctx: Any) -> tuple[Where, list[Tensor]]:
        boxes, image_index, levels, tangent, *features = ctx.saved_tensors
        return Where(boxes, image_index, levels, tangent, ctx.axes, ctx.sampler), features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        where, features = _SampleTransform._saved(ctx)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[6:]), need[4], need[5])
        got = _sample_vjp(features, where, grad, needs, Maps.of(features))
        return (None, None, None, None, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        where, features = _SampleTransform._saved(ctx)
        return _sample_jvp(features, where, tangents[6:], tangents[4], tangents[5])


class _GradFeaturesTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        image_index: Any,
        levels: Any,
        axes: int,
        sampler: Sampler,
        maps: Maps,
        grad: Any,
        boxes: Any,
        tangent: Any,
    ) -> tuple[Tensor, ...]:
        where = Where(boxes, image_index, levels, tangent, axes, sampler)
        return tuple(
            _ops._sample_grad_features.default(
                grad, *where.arguments(), *maps.arguments()
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image_index, levels, axes, sampler, maps, grad, boxes, tangent = inputs
        ctx.save_for_backward(boxes, image_index, levels, tangent, grad)
        ctx.save_for_forward(boxes, image_index, levels, tangent, grad)
        ctx.axes, ctx.sampler, ctx.maps = axes, sampler, maps

    @staticmethod
    def _saved(ctx: Any) -> tuple[Where, Tensor]:
        boxes, image_index, levels, tangent, grad = ctx.saved_tensors
        return Where(boxes, image_index, levels, tangent, ctx.axes, ctx.sampler), grad

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # type: ignore[override]
        where, grad = _GradFeaturesTransform._saved(ctx)
        need = ctx.needs_input_grad
        got = _grad_features_vjp(
            grad, where, cotangents, _Needs(False, need[6], need[7], need[5])
        )
        return (None,) * 5 + (got.grad, got.boxes, got.tangent)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        where, grad = _GradFeaturesTransform._saved(ctx)
        return _grad_features_jvp(
            grad, where, ctx.maps, tangents[5], tangents[6], tangents[7]
        )


class _GradBoxesTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        image_index: Any,
        levels: Any,
        axes: int,
        sampler: Sampler,
        grad: Any,
        boxes: Any,
        tangent: Any,
        *features: Any,
    ) -> Tensor:
        where = Where(boxes, image_index, levels, tangent, axes, sampler)
        out: Tensor = _ops._sample_grad_boxes.default(list(features), grad, *where.arguments())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image_index, levels, axes, sampler, grad, boxes, tangent, *features = inputs
        ctx.save_for_backward(boxes, image_index, levels, tangent, grad, *features)
        ctx.save_for_forward(boxes, image_index, levels, tangent, grad, *features)
        ctx.axes, ctx.sampler = axes, sampler

    @staticmethod
    def _saved(ctx: Any) -> tuple[Where, Tensor, list[Tensor]]:
        boxes, image_index, levels, tangent, grad, *features = ctx.saved_tensors
        where = Where(boxes, image_index, levels, tangent, ctx.axes, ctx.sampler)
        return where, grad, features

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # type: ignore[override]
        where, grad, features = _GradBoxesTransform._saved(ctx)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[7:]), need[5], need[6], need[4])
        got = _grad_boxes_vjp(features, grad, where, cotangent, needs)
        return (None, None, None, None, got.grad, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        where, grad, features = _GradBoxesTransform._saved(ctx)
        return _grad_boxes_jvp(
            features, grad, where, tangents[7:], tangents[4], tangents[5], tangents[6]
        )


# ---------------------------------------------------------------------------------------------
# Registration: autograd kernels (reverse and forward mode), fake kernels, batching rules.

_library_impl = torch.library.Library("glimpse_ext", "IMPL")


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether reverse or forward mode follows any of these tensors."""
    used = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not used and forward_ad._current_level >= 0:
        used = any(
            t is not None
            and t.is_floating_point()
            and forward_ad.unpack_dual(t).tangent is not None
            for t in tensors
        )
    if used:
        _refuse_transforms()
    return used


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "glimpse_ext: torch.func cannot differentiate through torch.ops.glimpse_ext; "
            "call the functions of glimpse_ext instead"
        )


def _below_autograd(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


Bind = Callable[..., tuple[Sequence[Tensor], Where]]
"""Arguments of an operator, in schema order -> its feature maps and where they are read."""

Dims = dict[int, int]
"""Batch dimension of each batched tensor, by id."""


def _fake_pooled(first: Tensor, where: Where) -> Tensor:
    dtype = torch.float32 if first.dtype == torch.uint8 else first.dtype
    size = (where.boxes.shape[0], first.shape[1], *where.sampler.output_size)
    return torch.empty(
        size, dtype=dtype, device=first.device, memory_format=_memory_format(is_channels_last(first))
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


def _batch_where(where: Where, dims: Dims, size: int, images: int | None) -> Where:
    """One place for all examples of a batch.

    images: the number of images of one example where examples have images of their own, so that
    example e reads images e*images and on; None where all examples read the same images.
    """
    boxes = _to_front(where.boxes, dims, size)
    tangent = None if where.tangent is None else _to_front(where.tangent, dims, size)
    levels = _optional_flat(where.levels, dims, size)
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
        levels=levels,
        tangent=None if tangent is None else tangent.flatten(0, 1),
    )


def _batch_sample(
    features: Sequence[Tensor], where: Where, dims: Dims, size: int
) -> tuple[Tensor, int]:
    own_images = any(id(f) in dims for f in features)
    one = features[0]
    images = one.shape[0 if dims.get(id(one)) != 0 else 1] if own_images else None
    boxes = where.boxes.shape[0 if dims.get(id(where.boxes)) != 0 else 1]
    flat = [_flat(f, dims, size) for f in features] if own_images else list(features)
    place = _batch_where(where, dims, size, images)
    pooled = _ops._sample.default(flat, *place.arguments())
    return pooled.unflatten(0, (size, boxes)), 0


def _batch_grad_features(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    grad, where, maps = _bind_grad_features(*args)
    dims, size = _dims(args, in_dims), info.batch_size
    images = maps.sizes[0]
    grads = _ops._sample_grad_features.default(
        _flat(grad, dims, size),
        *_batch_where(where, dims, size, images).arguments(),
        [size * images, *maps.sizes[1:]],
        maps.channels_last,
    )
    return [g.unflatten(0, (size, images)) for g in grads], [0] * len(grads)


def _batch_grad_boxes(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    features, grad, where = _bind_grad_boxes(*args)
    dims, size = _dims(args, in_dims), info.batch_size
    own_images = any(id(f) in dims for f in features)
    one = features[0]
    images = one.shape[0 if dims.get(id(one)) != 0 else 1] if own_images else None
    boxes = where.boxes.shape[0 if dims.get(id(where.boxes)) != 0 else 1]
    columns = where.boxes.shape[-1 if dims.get(id(where.boxes)) != where.boxes.dim() - 1 else -2]
    flat = [_flat(f, dims, size) for f in features] if own_images else list(features)
    place = _batch_where(where, dims, size, images)
    got = _ops._sample_grad_boxes.default(flat, _flat(grad, dims, size), *place.arguments())
    if got.shape[1] != columns:  # the image column went into an index of its own
        got = torch.nn.functional.pad(got, (1, 0))
    return got.unflatten(0, (size, boxes)), 0


def _where(args: Sequence[Any]) -> Where:
    """Where, from the sampling arguments of a generic operator."""
    boxes, image_index, levels, tangent, axes, output_size, op, params, scales, level_rule = args
    y_columns, x_columns = COLUMNS[op]
    sampler = Sampler(
        tuple(output_size), op, tuple(params), tuple(scales), tuple(level_rule), y_columns, x_columns
    )
    return Where(boxes, image_index, levels, tangent, axes, sampler)


def _bind_sample(features: Sequence[Tensor], *args: Any) -> tuple[Sequence[Tensor], Where]:
    return features, _where(args)


def _bind_grad_features(grad: Tensor, *args: Any) -> tuple[Tensor, Where, Maps]:
    return grad, _where(args[:-2]), Maps(tuple(args[-2]), args[-1])


def _bind_grad_boxes(
    features: Sequence[Tensor], grad: Tensor, *args: Any
) -> tuple[Sequence[Tensor], Tensor, Where]:
    return features, grad, _where(args)


COLUMNS: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
"""Columns of the box edges along y and x for each operator kind; csrc/geometry/operators.h."""


def register_sampler(name: str, bind: Bind) -> None:
    """Gives a registered operator that samples its derivatives, fake kernel and batching rule."""
    op = getattr(_ops, name).default

    def autograd_kernel(keyset: Any, *args: Any) -> Tensor:
        features, where = bind(*args)
        def run() -> Tensor:
            result: Tensor = _below_autograd(op, keyset, args)
            return result

        if not _differentiates(where.boxes, where.tangent, *features):
            return run()
        out: Tensor = _SampleFunction.apply(  # type: ignore[no-untyped-call]
            run, where, where.boxes, where.tangent, *features
        )
        return out

    def fake(*args: Any) -> Tensor:
        features, where = bind(*args)
        return _fake_pooled(features[0], where)

    def batch(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        features, where = bind(*args)
        return _batch_sample(features, where, _dims(args, in_dims), info.batch_size)

    _library_impl.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(f"glimpse_ext::{name}", fake)
    torch.library.register_vmap(f"glimpse_ext::{name}", batch)


def _grad_features_kernel(keyset: Any, *args: Any) -> list[Tensor]:
    grad, where, maps = _bind_grad_features(*args)
    def run() -> list[Tensor]:
        result: list[Tensor] = _below_autograd(
            _ops._sample_grad_features.default, keyset, args
        )
        return result

    if not _differentiates(grad, where.boxes, where.tangent):
        return run()
    grads: tuple[Tensor, ...] = _GradFeaturesFunction.apply(  # type: ignore[no-untyped-call]
        run, where, maps, grad, where.boxes, where.tangent
    )
    return list(grads)


def _grad_boxes_kernel(keyset: Any, *args: Any) -> Tensor:
    features, grad, where = _bind_grad_boxes(*args)
    def run() -> Tensor:
        result: Tensor = _below_autograd(_ops._sample_grad_boxes.default, keyset, args)
        return result

    if not _differentiates(grad, where.boxes, where.tangent, *features):
        return run()
    out: Tensor = _GradBoxesFunction.apply(  # type: ignore[no-untyped-call]
        run, where, grad, where.boxes, where.tangent, *features
    )
    return out


def _fake_grad_features(*args: Any) -> list[Tensor]:
    grad, _, maps = _bind_grad_features(*args)
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
    _, _, where = _bind_grad_boxes(*args)
    return torch.empty(where.boxes.shape, dtype=where.boxes.dtype, device=where.boxes.device)


register_sampler("_sample", _bind_sample)
_library_impl.impl("_sample_grad_features", _grad_features_kernel, "Autograd", with_keyset=True)
_library_impl.impl("_sample_grad_boxes", _grad_boxes_kernel, "Autograd", with_keyset=True)
torch.library.register_fake("glimpse_ext::_sample_grad_features", _fake_grad_features)
torch.library.register_fake("glimpse_ext::_sample_grad_boxes", _fake_grad_boxes)
torch.library.register_vmap("glimpse_ext::_sample_grad_features", _batch_grad_features)
torch.library.register_vmap("glimpse_ext::_sample_grad_boxes", _batch_grad_boxes)
