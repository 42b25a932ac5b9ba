# SPDX-License-Identifier: BSD-3-Clause
"""Who serves a call of a function that is replaced: ours, the original, or both to compare them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import is_eager, requires_grad

Function = Callable[..., Any]

# An original calls others that are replaced, too, and is compared as it was.
_only_originals: ContextVar[bool] = ContextVar("glimpse_ext_only_originals", default=False)

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

# As a fraction of the largest value: sums in another order, one rounding to 16 bits, one count of
# 255. Of masks: the share of pixels that lie on the threshold.
_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.uint8: 5e-3,
    torch.bool: 1e-3,
}


@dataclass
class Compared:
    """What ``verify=True`` saw of one function."""

    calls: int = 0
    """Calls that ours served."""
    compared: int = 0
    """Those of them that the original computed, too."""
    differing: int = 0
    """Those whose results or gradients differ by more than rounding."""
    largest: float = 0.0
    """The largest difference, as a fraction of the largest value of the original's result."""
    largest_gradient: float = 0.0
    """The same of the gradients to feature maps."""
    left: dict[str, int] = field(default_factory=dict)
    """Calls that the original served, by reason."""
    failed: dict[str, int] = field(default_factory=dict)
    """Calls that ours served and the original could not, by its error."""


class Report(dict[str, Compared]):
    """By the name of each function. ``print`` shows a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing was compared: that needs patch(..., verify=True)"
        width = max(map(len, self))
        columns = ("calls", "compared", "differing", "result", "gradient")
        lines = [f"{'':{width}}" + "".join(f"  {column:>9}" for column in columns)]
        for name, seen in self.items():
            counts = f"  {seen.calls:>9}  {seen.compared:>9}  {seen.differing:>9}"
            errors = f"  {seen.largest:>9.1e}  {seen.largest_gradient:>9.1e}"
            lines.append(f"{name:{width}}{counts}{errors if seen.compared else ''}")
            lines += [f"    {n} left to the original: {why}" for why, n in seen.left.items()]
            lines += [f"    {n} only ours could do: {why}" for why, n in seen.failed.items()]
        return "\n".join(lines)


class _Run(NamedTuple):
    result: Tensor
    gradients: Sequence[Tensor | None]


def _copied(value: Any, leaves: list[Tensor], widen: bool) -> Any:
    """Arguments with a graph of their own, whose ends are added to `leaves`."""
    if type(value) in (list, tuple):
        return type(value)(_copied(one, leaves, widen) for one in value)
    if not isinstance(value, Tensor):
        return value
    copy = value.detach()
    if widen:
        copy = copy.to(_WIDE.get(copy.dtype, copy.dtype))
    if value.requires_grad:
        leaves.append(copy.requires_grad_())
    return copy


def _run(
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: bool,
    dtype: torch.dtype,
    widen: bool,
) -> _Run:
    """Gradients are those of a weighted sum, whose weights are rounded to `dtype` for everyone."""
    leaves: list[Tensor] = []
    copies = _copied(args, leaves, widen)
    with torch.set_grad_enabled(gradients):
        result = function(*copies, **kwargs)
    if not result.requires_grad:
        return _Run(result, ())
    index = torch.arange(result.numel(), device=result.device)
    weights = torch.cos(index.to(torch.float32)).to(dtype).to(result.dtype).view(result.shape)
    got = torch.autograd.grad(result, leaves, weights, allow_unused=True)
    return _Run(result.detach(), got)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    if theirs.numel() == 0:
        return 0.0
    if theirs.dtype == torch.bool:
        return float((ours ^ theirs).sum() / (ours | theirs).sum().clamp(min=1))
    a, b = ours.detach().double(), theirs.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, a - b).abs().max()
    largest = torch.where(b.isfinite(), b, 0.0).abs().max()
    error = float(apart / largest.clamp(min=1e-30))
    return math.inf if math.isnan(error) else error


class Call:
    """The calls of one function of another library."""

    def __init__(self, name: str, original: Function, compared: Compared | None) -> None:
        self.name = name
        self.original = original
        self.compared = compared

    def __call__(self, ours: Function, left: str | None, *args: Any, **kwargs: Any) -> Any:
        """By ours, which takes the arguments of the original, unless there is a reason against."""
        if torch.compiler.is_compiling():
            return (ours if left is None else self.original)(*args, **kwargs)
        if _only_originals.get():
            return self.original(*args, **kwargs)
        compared = self.compared
        if left is not None:
            if compared is not None:
                compared.left[left] = compared.left.get(left, 0) + 1
            return self.original(*args, **kwargs)
        result = ours(*args, **kwargs)
        if compared is not None:
            compared.calls += 1
            if is_eager():
                self._compare(compared, ours, args, kwargs, result)
        return result

    def _compare(
        self,
        compared: Compared,
        ours: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
    ) -> None:
        dtype = result.dtype
        gradients = requires_grad(args) and result.requires_grad
        token = _only_originals.set(True)
        try:
            # 16-bit maps are compared in float32: originals round positions, or have no kernel.
            wide = dtype in _WIDE
            expected = _run(self.original, args, kwargs, gradients, dtype, wide)
        except Exception as problem:
            why = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
            compared.failed[why] = compared.failed.get(why, 0) + 1
            return
        finally:
            _only_originals.reset(token)
        error = _difference(result.detach(), expected.result)
        if expected.result.dtype != _WIDE.get(dtype, dtype):
            error = math.inf
        apart = [0.0]
        if gradients and error < math.inf:
            mine = _run(ours, args, kwargs, True, dtype, widen=False).gradients
            pairs = zip(mine, expected.gradients, strict=True)
            apart += [_difference(a, b) for a, b in pairs if a is not None and b is not None]
        compared.compared += 1
        compared.largest = max(compared.largest, error)
        compared.largest_gradient = max(compared.largest_gradient, *apart)
        allowed = _ROUNDING.get(dtype, 0.0)
        if max(error, *apart) > allowed:
            compared.differing += 1
            what = f"differs from {list(expected.result.shape)} {expected.result.dtype}"
            if error <= allowed:
                error, what = max(apart), "has a gradient that differs from that"
            warnings.warn(
                f"glimpse_ext.patch: {self.name} gave {list(result.shape)} {dtype} that {what} "
                f"of the original by {error:.1e} of its largest value",
                stacklevel=4,
            )
