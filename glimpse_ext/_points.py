# SPDX-License-Identifier: BSD-3-Clause
"""Points in lists, ``[N, P, 2]``, whose values are ``[N, C, P]``.

Everything of a sample holds for them, cell by cell: tracing, torch.func and derivatives of
gradients reshape the lists and call what samples boxes. An ordinary call is small, and so are its
gradients: they are one operator and one node each, since each view around a node of the graph costs
a quarter of a small call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._autograd import (
    BelowAutograd,
    differentiates,
    grad_boxes,
    grad_features,
    is_eager,
    plain_apply,
    requires_grad,
)
from ._register import (
    Bind,
    _below_autograd,
    _dims,
    _flat,
    _library_impl,
    batch_rows,
    register_sampler,
)
from ._sampling import Maps, is_channels_last

_ops = torch.ops.glimpse_ext


def _values(
    sample: Callable[..., Tensor], input: Tensor, points: Tensor, align_corners: bool
) -> Tensor:
    """By the operator for single points ``[K, 2]``."""
    values = sample(input, points.reshape(-1, 2), align_corners)
    return values.reshape(*points.shape[:2], values.shape[1]).transpose(1, 2)


def _gradients(
    bind: Bind,
    grad: Tensor,
    points: Tensor,
    input: Tensor | None,
    align_corners: bool,
    maps: Maps,
    to_input: bool,
) -> list[Tensor]:
    """The same, of every order, for the gradients that are asked for: to input, to points."""
    _, where = bind(grad, points.reshape(-1, 2), align_corners)
    cells = grad.transpose(1, 2).reshape(-1, grad.shape[1], 1, 1)
    gradients = list(grad_features(cells, where, maps)) if to_input else []
    if input is not None:
        gradients.append(grad_boxes([input], cells, where).reshape(points.shape))
    return gradients


def register_points(bind: Bind) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """Gives the operators of point_sample their derivatives, fake kernels and batching rules.

    Returns the one on lists as the public function calls it.
    """
    sample = register_sampler("point_sample", bind)
    values_op, gradients_op = _ops._points_sample.default, _ops._points_gradients.default

    class PointsFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, align_corners: bool, input: Tensor, points: Tensor) -> Tensor:
            # The input is kept only when a gradient to the points will read it.
            ctx.save_for_backward(points, input if ctx.needs_input_grad[2] else None)
            ctx.align_corners = align_corners
            ctx.maps = tuple(input.shape), is_channels_last(input)
            with BelowAutograd():
                values: Tensor = values_op(input, points, align_corners)
            return values

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            points, input = ctx.saved_tensors
            _, to_input, to_points = ctx.needs_input_grad
            if not torch.is_grad_enabled() and is_eager():
                with BelowAutograd():
                    got = gradients_op(grad, points, input, ctx.align_corners, *ctx.maps, to_input)
            else:
                maps = Maps(*ctx.maps)
                got = _gradients(bind, grad, points, input, ctx.align_corners, maps, to_input)
            return None, got[0] if to_input else None, got[-1] if to_points else None

    apply = plain_apply(PointsFunction)

    def call(input: Tensor, points: Tensor, align_corners: bool) -> Tensor:
        if not is_eager():
            return _values(sample, input, points, align_corners)
        if requires_grad((input, points)):
            result: Tensor = apply(align_corners, input, points)
            return result
        with BelowAutograd():
            values: Tensor = values_op(input, points, align_corners)
        return values

    def values_kernel(keyset: Any, input: Tensor, points: Tensor, align_corners: bool) -> Tensor:
        if differentiates(input, points):
            return _values(_ops.point_sample.default, input, points, align_corners)
        below: Tensor = _below_autograd(values_op, keyset, (input, points, align_corners))
        return below

    def gradients_kernel(keyset: Any, *args: Any) -> list[Tensor]:
        grad, points, input, align_corners, sizes, channels_last, to_input = args
        if differentiates(grad, points, input):
            maps = Maps(tuple(sizes), channels_last)
            return _gradients(bind, grad, points, input, align_corners, maps, to_input)
        below: list[Tensor] = _below_autograd(gradients_op, keyset, args)
        return below

    _library_impl.impl("_points_sample", values_kernel, "Autograd", with_keyset=True)
    _library_impl.impl("_points_gradients", gradients_kernel, "Autograd", with_keyset=True)
    return call


def _fake_values(input: Tensor, points: Tensor, align_corners: bool) -> Tensor:
    dtype = torch.float32 if input.dtype == torch.uint8 else input.dtype
    size = (points.shape[0], points.shape[1], input.shape[1])
    return torch.empty(size, dtype=dtype, device=input.device).transpose(1, 2)


def _fake_gradients(
    grad: Tensor,
    points: Tensor,
    input: Tensor | None,
    align_corners: bool,
    sizes: Sequence[int],
    channels_last: bool,
    to_input: bool,
) -> list[Tensor]:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    gradients = [grad.new_empty(tuple(sizes)).to(memory_format=memory)] if to_input else []
    return gradients if input is None else [*gradients, torch.empty_like(points)]


def _batch_gradients(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    grad, points, input, align_corners, sizes, channels_last, to_input = args
    dims, size = _dims(args, in_dims), info.batch_size
    images = sizes[0]
    gradients = _ops._points_gradients.default(
        _flat(grad, dims, size),
        _flat(points, dims, size),
        None if input is None else _flat(input, dims, size),
        align_corners,
        [size * images, *sizes[1:]],
        channels_last,
        to_input,
    )
    return [g.unflatten(0, (size, images)) for g in gradients], [0] * len(gradients)


torch.library.register_fake("glimpse_ext::_points_sample", _fake_values)
torch.library.register_fake("glimpse_ext::_points_gradients", _fake_gradients)
torch.library.register_vmap("glimpse_ext::_points_sample", batch_rows(_ops._points_sample.default))
torch.library.register_vmap("glimpse_ext::_points_gradients", _batch_gradients)
