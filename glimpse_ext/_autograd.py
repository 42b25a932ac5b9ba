# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of every order, batching and shapes of all separable operators, written once.

An operator is ``out = Ay(boxes) · features · Ax(boxes)ᵀ`` for each box. Axis tables are piecewise
affine in the box edges along their own direction, so each may be differentiated once and vanishes
the second time. Three linear applications, in which each axis uses either its weights or their
derivative along a tangent of the boxes, are therefore closed under differentiation:

* ``sample``         S(x)    = Ay · x · Axᵀ
* ``grad_features``  B(g)    = Ayᵀ · g · Ax, summed over boxes
* ``grad_boxes``     D(x, g) = ⟨g, ∂S(x)⟩ for the box edges of one direction, for both

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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import _library  # noqa: F401  (the operators must exist before they are used here)
from ._sampling import (
    AXES,
    BOTH,
    CURVED,
    Maps,
    Opaque,
    Sampler,
    Where,
    axis_mask,
    restrict,
)

_ops = torch.ops.glimpse_ext


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
    if not _in_transforms():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise RuntimeError(
            "glimpse_ext: torch.func.jvp (or jacfwd) inside another one is not supported by "
            "torch's autograd Functions; use jacfwd(jacrev(f)) or jacrev(jacrev(f))"
        )
    return True


_is_compiling = torch.compiler.is_compiling
_in_transforms = torch._C._are_functorch_transforms_active
BelowAutograd: Callable[[], AbstractContextManager[object]] = torch._C._AutoDispatchBelowAutograd


def is_eager() -> bool:
    """Whether this is an ordinary call: not traced, nor in torch.func, nor in forward mode."""
    return not (_is_compiling() or _in_transforms() or forward_ad._current_level >= 0)


def requires_grad(tensors: Sequence[Any]) -> bool:
    """Whether reverse mode follows any of these tensors, or of those in a list among them."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            if tensor.requires_grad:
                return True
        elif isinstance(tensor, (list, tuple)) and requires_grad(tensor):
            return True
    return False


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether reverse or forward mode follows any of these tensors."""
    used = requires_grad(tensors)
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
    if _in_transforms():
        raise RuntimeError(
            "glimpse_ext: torch.func cannot differentiate through torch.ops.glimpse_ext; "
            "call the functions of glimpse_ext instead"
        )


def _skip_unneeded_autograd(*tensors: Tensor | None) -> AbstractContextManager[object]:
    """Below autograd where nothing asks for a derivative: saves the trip through its kernel."""
    if _is_compiling() or differentiates(*tensors):
        return _NOTHING
    return BelowAutograd()


_NOTHING: AbstractContextManager[object] = nullcontext()


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
    with _skip_unneeded_autograd(where.boxes, where.tangent, *features):
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
    with _skip_unneeded_autograd(where.boxes, where.tangent, grad):
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
    with _skip_unneeded_autograd(where.boxes, where.tangent, grad, *features):
        out: Tensor = _ops._sample_grad_boxes.default(list(features), grad, *where.arguments())
    return out


def _refuse_second(where: Where) -> None:
    """Where a rule below takes second derivatives along an axis for zero, but they are not."""
    name = CURVED.get(where.sampler.op)
    if name is not None:
        raise RuntimeError(
            f"{name}: second derivatives in the boxes are not known: expects at most one "
            "derivative in the boxes, got a derivative of it"
        )


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
    to_boxes = restrict(gradient, where, BOTH & ~where.axes) if needs.boxes else None
    to_tangent = restrict(gradient, where, where.axes) if needs.tangent else None
    return to_boxes, to_tangent


def _sample_vjp(
    features: Sequence[Tensor] | None,
    where: Where,
    grad: Tensor,
    needs: _Needs,
    maps: Maps,
) -> _Gradients:
    where = where.linear()
    to_features: tuple[Tensor | None, ...] = (None,) * (len(maps.sizes) // 2 - 1)
    to_boxes = to_tangent = None
    if needs.features:
        to_features = grad_features(grad, where, maps)
    if needs.boxes or needs.tangent:
        if needs.boxes and where.axes:
            _refuse_second(where)
        assert features is not None
        to_boxes, to_tangent = _split(grad_boxes(features, grad, where.slopes()), where, needs)
    return _Gradients(to_features, to_boxes, to_tangent)


def _grad_features_vjp(
    grad: Tensor, where: Where, cotangents: Sequence[Tensor], needs: _Needs
) -> _Gradients:
    where = where.linear()
    to_grad = to_boxes = to_tangent = None
    if needs.grad:
        to_grad = sample(cotangents, where)
    if needs.boxes or needs.tangent:
        if needs.boxes and where.axes:
            _refuse_second(where)
        to_boxes, to_tangent = _split(grad_boxes(cotangents, grad, where.slopes()), where, needs)
    return _Gradients((), to_boxes, to_tangent, to_grad)


def _grad_boxes_vjp(
    features: Sequence[Tensor], grad: Tensor, where: Where, cotangent: Tensor, needs: _Needs
) -> _Gradients:
    where = where.linear()
    to_features: list[list[Tensor]] = [[] for _ in features]
    to_grad: list[Tensor] = []
    for axis in AXES:
        moved = where.along(axis, cotangent, axis | (where.axes & ~axis))
        if needs.features:
            grads = grad_features(grad, moved, Maps.of(features))
            for terms, term in zip(to_features, grads, strict=True):
                terms.append(term)
        if needs.grad:
            to_grad.append(sample(features, moved))
    to_boxes = to_tangent = None
    if needs.boxes or needs.tangent:
        if needs.boxes:
            _refuse_second(where)
        moved = where._replace(tangent=cotangent, axes=BOTH)
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
    if where.axes and boxes_tangent is not None:
        _refuse_second(where)
    moved = []
    for axis in AXES:
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
    where = where.linear()
    moves = _motions(where.slopes(), boxes_tangent, tangent_tangent)
    terms = [sample(features, moved) for moved in moves]
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
    where = where.linear()
    terms = [
        grad_features(grad, moved, maps)
        for moved in _motions(where.slopes(), boxes_tangent, tangent_tangent)
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
    where = where.linear()
    if boxes_tangent is not None:
        _refuse_second(where)
    terms = []
    if any(t is not None for t in features_tangents):
        terms.append(grad_boxes(_filled(features_tangents, features), grad, where))
    if grad_tangent is not None:
        terms.append(grad_boxes(features, grad_tangent, where))
    if where.axes == 0:
        motion = boxes_tangent
    elif where.axes == BOTH:
        motion = tangent_tangent
    elif boxes_tangent is None and tangent_tangent is None:
        motion = None
    else:
        like = torch.zeros_like(where.boxes)
        motion = torch.where(
            axis_mask(where, where.axes),
            like if tangent_tangent is None else tangent_tangent,
            like if boxes_tangent is None else boxes_tangent,
        )
    if motion is not None:
        terms.append(grad_boxes(features, grad, where._replace(tangent=motion, axes=BOTH)))
    return _sum(terms) if terms else None


# ---------------------------------------------------------------------------------------------
# Reverse and forward mode outside torch.func: Functions of the old form, which cost a third of the
# new one. `run` executes the operator below autograd; the tensors after `where` stand in it too.


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the part for torch.func, for eager calls: a few microseconds."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def _save_for_jvp(ctx: Any, *tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


class SampleFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[], Tensor],
        where: Where,
        boxes: Tensor,
        tangent: Any,
        *features: Any,
    ) -> Tensor:
        del boxes, tangent
        # Feature maps are kept only when a box gradient will read them.
        keep = features if any(ctx.needs_input_grad[2:4]) else ()
        ctx.save_for_backward(where.boxes, where.tangent, *keep)
        ctx.where = where
        ctx.maps = Maps.of(features)
        _save_for_jvp(ctx, where.boxes, where.tangent, *features)
        return run()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        boxes, tangent, *features = ctx.saved_tensors
        where = ctx.where
        need = ctx.needs_input_grad
        if not (need[2] or need[3] or torch.is_grad_enabled()) and is_eager():
            # The usual case by the shortest way: the same as below.
            with BelowAutograd():
                grads = _ops._sample_grad_features.default(
                    grad,
                    boxes,
                    where.image_index,
                    where.levels,
                    tangent,
                    where.axes,
                    *where.sampler.linear.arguments,
                    *ctx.maps.arguments(),
                )
            return (None, None, None, None, *grads)
        where = where._replace(boxes=boxes, tangent=tangent)
        needs = _Needs(any(need[4:]), need[2], need[3])
        got = _sample_vjp(features or None, where, grad, needs, ctx.maps)
        return (None, None, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        boxes, tangent, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _sample_jvp(features, where, tangents[4:], tangents[2], tangents[3])


class GradFeaturesFunction(torch.autograd.Function):
    @staticmethod
    def forward(
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
        ctx.where = where
        ctx.maps = maps
        return tuple(run())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        boxes, tangent, grad = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        need = ctx.needs_input_grad
        needs = _Needs(False, need[4], need[5], need[3])
        got = _grad_features_vjp(grad, where, cotangents, needs)
        return None, None, None, got.grad, got.boxes, got.tangent

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        boxes, tangent, grad = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _grad_features_jvp(grad, where, ctx.maps, *tangents[3:])


class GradBoxesFunction(torch.autograd.Function):
    @staticmethod
    def forward(
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
        ctx.where = where
        return run()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        boxes, tangent, grad, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[5:]), need[3], need[4], need[2])
        got = _grad_boxes_vjp(features, grad, where, cotangent, needs)
        return (None, None, got.grad, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        boxes, tangent, grad, *features = ctx.saved_tensors
        where = ctx.where._replace(boxes=boxes, tangent=tangent)
        return _grad_boxes_jvp(features, grad, where, tangents[5:], *tangents[2:5])


# ---------------------------------------------------------------------------------------------
# torch.func: Functions of the new form. Their forward calls the operators themselves, whose
# batching rules are registered below.


class _SampleTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        image_index: Any,
        levels: Any,
        axes: int,
        sampler: Sampler,
        boxes: Any,
        tangent: Any,
        *features: Any,
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
    def backward(ctx: Any, grad: Tensor) -> Any:
        where, features = _SampleTransform._saved(ctx)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[6:]), need[4], need[5])
        got = _sample_vjp(features, where, grad, needs, Maps.of(features))
        return (None, None, None, None, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, features = _SampleTransform._saved(ctx)
        return _sample_jvp(features, where, tangents[6:], tangents[4], tangents[5])


class _CopyTransform(torch.autograd.Function):
    """An operator that copies what ``sampler`` samples, and fills in numbers of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: Any, arguments: Any, sampler: Sampler, seed: Any, offsets: Any, image: Any
    ) -> Tensor:
        del sampler
        out: Tensor = op(image, offsets, seed, *arguments.values)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, sampler, _, offsets, image = inputs
        ctx.save_for_backward(offsets, image)
        ctx.save_for_forward(offsets, image)
        ctx.sampler = sampler

    @staticmethod
    def _saved(ctx: Any) -> tuple[Where, Tensor]:
        offsets, image = ctx.saved_tensors
        return Where(offsets, None, None, None, 0, ctx.sampler), image

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        where, image = _CopyTransform._saved(ctx)
        got = _sample_vjp(
            None, where, grad, _Needs(ctx.needs_input_grad[5], False, False), Maps.of([image])
        )
        return (None,) * 5 + got.features

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, image = _CopyTransform._saved(ctx)
        return _sample_jvp([image], where, tangents[5:], None, None)


def copy_in_transform(op: Any, where: Where, args: Sequence[Any]) -> Tensor:
    """``op(image, offsets, seed, ...)`` where torch.func transforms surround the call."""
    image, offsets, seed, *rest = args
    out: Tensor = _CopyTransform.apply(  # type: ignore[no-untyped-call]
        op, Opaque(tuple(rest)), where.sampler, seed, offsets, image
    )
    return out


class _GradFeaturesTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
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
            _ops._sample_grad_features.default(grad, *where.arguments(), *maps.arguments())
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
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        where, grad = _GradFeaturesTransform._saved(ctx)
        need = ctx.needs_input_grad
        got = _grad_features_vjp(grad, where, cotangents, _Needs(False, need[6], need[7], need[5]))
        return (None,) * 5 + (got.grad, got.boxes, got.tangent)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, grad = _GradFeaturesTransform._saved(ctx)
        return _grad_features_jvp(grad, where, ctx.maps, tangents[5], tangents[6], tangents[7])


class _GradBoxesTransform(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
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
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        where, grad, features = _GradBoxesTransform._saved(ctx)
        need = ctx.needs_input_grad
        needs = _Needs(any(need[7:]), need[5], need[6], need[4])
        got = _grad_boxes_vjp(features, grad, where, cotangent, needs)
        return (None, None, None, None, got.grad, got.boxes, got.tangent, *got.features)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, grad, features = _GradBoxesTransform._saved(ctx)
        return _grad_boxes_jvp(
            features, grad, where, tangents[7:], tangents[4], tangents[5], tangents[6]
        )
