# SPDX-License-Identifier: BSD-3-Clause
"""Puts the operators of this package where other libraries call their own."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from .paste_masks import paste_masks
from .roi_align import multiscale_roi_align, roi_align

Function = Callable[..., Any]


@dataclass(frozen=True)
class Replacement:
    """A function of another library and what stands in for it."""

    module: str
    name: str
    make: Callable[[Function], Function]
    """From the original, which serves what ours does not."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Compared:
    """What ``verify=True`` saw of one function."""

    calls: int = 0
    differing: int = 0
    """Calls whose results differ by more than rounding."""
    largest: float = 0.0
    """The largest difference, as a fraction of the largest value of the original's result."""


@dataclass
class Patch:
    """What :func:`patch` replaced; undone by ``undo()`` or at the end of a ``with`` block."""

    libraries: tuple[str, ...]
    replaced: list[tuple[ModuleType, str, Function]] = field(default_factory=list, repr=False)
    report: dict[str, Compared] = field(default_factory=dict)
    """With ``verify=True``, by the name of each function that was called."""

    @property
    def names(self) -> list[str]:
        """Every attribute that was replaced."""
        return sorted(f"{module.__name__}.{name}" for module, name, _ in self.replaced)

    def undo(self) -> None:
        """Puts back what was there. A second call does nothing."""
        while self.replaced:
            module, name, original = self.replaced.pop()
            setattr(module, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def _is_tracing() -> bool:
    """Whether torch.jit.trace, or the older export to ONNX, follows this call."""
    return torch._C._get_tracing_state() is not None


# ------------------------------------------------------------------------------------- torchvision


def _torchvision_roi_align(original: Function) -> Function:
    @functools.wraps(original)
    def replacement(
        input: Tensor,
        boxes: Tensor | list[Tensor],
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> Any:
        if _is_tracing() or input.is_quantized:
            return original(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
        return roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)

    return replacement


def _torchvision_pooler(original: Function) -> Function:
    @functools.wraps(original)
    def replacement(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: Any,
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Any:
        if _is_tracing() or scales is None or mapper is None:
            return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
        if len(x_filtered) == 1:
            return roi_align(x_filtered[0], boxes, output_size, scales[0], sampling_ratio)
        own = (
            type(mapper).__name__ == "LevelMapper"
            and getattr(mapper, "eps", None) == 1e-6
            and (mapper.k_min, mapper.k_max) == (mapper.k_min, mapper.k_min + len(scales) - 1)
        )
        return multiscale_roi_align(
            x_filtered,
            boxes,
            output_size,
            scales,
            sampling_ratio,
            canonical_size=mapper.s0 if own else 224,
            canonical_level=mapper.lvl0 if own else 4,
            levels=None if own else mapper(boxes),
        )

    return replacement


def _torchvision_paste(original: Function) -> Function:
    @functools.wraps(original)
    def replacement(masks: Tensor, boxes: Tensor, img_shape: Any, padding: int = 1) -> Any:
        if _is_tracing() or padding != 1 or not masks.is_floating_point():
            return original(masks, boxes, img_shape, padding)
        return paste_masks(masks, boxes.detach(), img_shape, threshold=None, method="torchvision")

    return replacement


LIBRARIES: dict[str, tuple[Replacement, ...]] = {
    "torchvision": (
        Replacement("torchvision.ops.roi_align", "roi_align", _torchvision_roi_align),
        Replacement("torchvision.ops.poolers", "_multiscale_roi_align", _torchvision_pooler),
        Replacement(
            "torchvision.models.detection.roi_heads", "paste_masks_in_image", _torchvision_paste
        ),
    ),
}


# ------------------------------------------------------------------------------------------- patch


def _holders(function: Function) -> Iterator[tuple[ModuleType, str]]:
    """Every attribute of a loaded module that is this function, under whatever name."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is function:
                yield module, name


def _difference(ours: Any, theirs: Any) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


# Sums in another order; coordinates of 16-bit boxes are rounded by the originals.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1.0, torch.bfloat16: 1.0}


def _verified(name: str, ours: Function, original: Function, report: Compared) -> Function:
    @functools.wraps(ours)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        with torch.no_grad():
            expected = original(*args, **kwargs)
        error = _difference(result, expected)
        report.calls += 1
        report.largest = max(report.largest, error)
        if not error <= _ROUNDING.get(result.dtype, 0.0):
            report.differing += 1
            warnings.warn(
                f"glimpse_ext.patch: {name} gave {list(result.shape)} {result.dtype} that differs "
                f"from {list(expected.shape)} {expected.dtype} of the original by {error:.1e} of "
                "its largest value",
                stacklevel=2,
            )
        return result

    return both


def patch(*libraries: str, verify: bool = False) -> Patch:
    """Replaces the operators of other libraries by those of this package, in this process.

    ================  ==============================================================================
    library           what is replaced
    ================  ==============================================================================
    ``torchvision``   ``ops.roi_align`` and ``ops.RoIAlign``; ``ops.MultiScaleRoIAlign``, one call
                      for all levels; the pasting of masks in ``models.detection``
    ================  ==============================================================================

    Models that exist already are served, too: functions are replaced in every module that holds
    them, also where they were imported by name. What is imported by name while the patch is in
    place stays ours when it is undone. Numbers are the same to rounding, bad boxes have a result
    instead of a crash (docs/special_boxes.md), boxes get gradients, and bfloat16 works.

    Calls that are traced by ``torch.jit.trace``, and quantised maps, go to the original;
    ``torch.jit.script`` wants the originals, so undo the patch for it.

    Args:
        libraries: names from the table.
        verify: also call the original each time, compare, warn where results differ by more than
            rounding, and count in ``Patch.report``. It costs what the original costs.

    Returns:
        a :class:`Patch`, whose ``undo()`` puts everything back; also a context manager.

    Raises:
        ValueError: no library, or one that is not known.
        ImportError: a library that is not installed.

    >>> import glimpse_ext
    >>> with glimpse_ext.patch("torchvision") as patch:  # doctest: +SKIP
    ...     model(images)
    """
    if not libraries or not set(libraries) <= set(LIBRARIES):
        raise ValueError(f"patch: expects names among {sorted(LIBRARIES)}, got {list(libraries)}")
    done = Patch(tuple(libraries))
    replacements = [r for library in dict.fromkeys(libraries) for r in LIBRARIES[library]]
    found = [(r, importlib.import_module(r.module)) for r in replacements]
    for replacement, module in found:
        original = getattr(module, replacement.name)
        if getattr(original, "_glimpse_ext_patch", False):
            raise RuntimeError(f"patch: {replacement} is patched already; undo that patch first")
        function = replacement.make(original)
        if verify:
            report = done.report.setdefault(str(replacement), Compared())
            function = _verified(str(replacement), function, original, report)
        function._glimpse_ext_patch = True  # type: ignore[attr-defined]
        for holder, name in list(_holders(original)):
            done.replaced.append((holder, name, original))
            setattr(holder, name, function)
    return done
