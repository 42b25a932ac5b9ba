# SPDX-License-Identifier: BSD-3-Clause
"""Puts the operators of this package where other libraries call their own."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

from ._patch_calls import Call, Compared, Function, Report
from ._patch_libraries import LIBRARIES, Replacement

_lock = threading.RLock()


@dataclass
class Patch:
    """What :func:`patch` replaced; undone by ``undo()`` or at the end of a ``with`` block."""

    libraries: tuple[str, ...]
    report: Report = field(default_factory=Report)
    """With ``verify=True``, a :class:`Compared` by the name of each function. Can be printed."""
    names: list[str] = field(default_factory=list)
    """Every attribute that was replaced."""
    _replaced: list[tuple[Any, Function, Function]] = field(default_factory=list, repr=False)
    """A class or None, the original, and ours."""

    def undo(self) -> None:
        """Puts back what was there. A second call does nothing."""
        with _lock:
            while self._replaced:
                owner, original, ours = self._replaced.pop()
                for holder, name in list(_holders(owner, ours)):
                    setattr(holder, name, original)
            self.names.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def _holders(owner: Any, function: Function) -> Iterator[tuple[Any, str]]:
    """Every attribute that is this function: of its class, or else of all loaded modules."""
    modules = list(sys.modules.values()) if owner is None else [owner]
    for holder in modules:
        if not isinstance(holder, (ModuleType, type)):
            continue
        for name, value in list(vars(holder).items()):
            if value is function:
                yield holder, name


def _find(library: str, replacement: Replacement) -> tuple[Any, Function] | None:
    """The class or None, and the original."""
    if replacement.if_loaded and replacement.module not in sys.modules:
        return None
    try:
        found: Any = importlib.import_module(replacement.module)
    except ModuleNotFoundError as error:
        if error.name == library:
            raise ImportError(f"patch: {library} is not installed") from error
        raise ImportError(_cannot(library, f"needs {error.name}, which is not there")) from error
    except Exception as error:
        # Compiled parts that do not fit this torch raise whatever they like.
        raise ImportError(_cannot(library, f"fails with {error!r}")) from error
    owner = None
    *classes, name = replacement.name.split(".")
    for step in classes:
        found = owner = vars(found).get(step)
    original = None if found is None else vars(found).get(name)
    if original is None:
        version = getattr(sys.modules[library], "__version__", "unknown")
        raise ImportError(f"patch: {library} {version} has no {replacement}")
    if getattr(original, "_glimpse_ext_patch", False):
        raise RuntimeError(f"patch: {replacement} is patched already; undo that patch first")
    return owner, original


def _cannot(library: str, problem: str) -> str:
    return f"patch: importing {library} {problem}; {LIBRARIES[library].remedy}"


def _make(replacement: Replacement, original: Function, report: Report | None) -> Function:
    compared = None if report is None else report.setdefault(str(replacement), Compared())
    function = replacement.make(Call(str(replacement), original, compared))
    function.__module__ = replacement.module
    function.__qualname__ = replacement.name
    function.__name__ = replacement.name.rpartition(".")[2]
    function.__doc__ = original.__doc__
    function._glimpse_ext_patch = True  # type: ignore[attr-defined]
    return function


def patch(*libraries: str, verify: bool = False) -> Patch:
    """Replaces the operators of other libraries by those of this package, in this process.

    ================  ==============================================================================
    library           what is replaced
    ================  ==============================================================================
    ``torchvision``   ``ops.roi_align`` and ``ops.RoIAlign``; ``ops.MultiScaleRoIAlign``, one call
                      for all levels; the pasting of masks in ``models.detection``
    ``detectron2``    ``ROIPooler`` of ``ROIAlign`` and ``ROIAlignV2``, one call for all levels;
                      ``layers.ROIAlign``, ``ROIAlignRotated``, ``roi_align_rotated`` and
                      ``paste_masks_in_image``; PointRend's ``point_sample`` where
                      ``detectron2.projects.point_rend`` is imported already
    ``mmcv``          ``ops.roi_align`` and ``RoIAlign`` (average and maximum),
                      ``roi_align_rotated`` and ``RoIAlignRotated``, ``point_sample`` and
                      ``SimpleRoIAlign``
    ================  ==============================================================================

    Models that exist already are served, too: functions are replaced in every module that holds
    them, also where they were imported by name, and methods in their class. Numbers are the same to
    rounding, bad boxes have a result instead of a crash (docs/special_boxes.md), boxes get
    gradients, and bfloat16 works. docs/patching.md lists what differs.

    Calls that are traced by ``torch.jit.trace``, quantised maps, and devices for which there are no
    operators go to the original. ``torch.jit.script`` and exporters want the originals, so undo the
    patch for them.

    A patch is of the whole process, for all threads. Apply and undo it while no other thread is in
    a model; a thread that is there keeps the function that it has begun with.

    Args:
        libraries: names from the table.
        verify: also call the original each time, compare results and gradients to feature maps,
            warn where they differ by more than rounding, and count in ``Patch.report``. It costs
            what the original costs and twice what ours do. 16-bit maps are compared with what the
            original makes of them in float32. Compiled code is not compared.

    Returns:
        a :class:`Patch`, whose ``undo()`` puts everything back; also a context manager.

    Raises:
        ValueError: no library, or one that is not known.
        ImportError: a library that is not installed, that cannot be imported, or that has not got
            what is to be replaced.
        RuntimeError: what is patched already.

    Where it raises, nothing stays replaced.

    >>> import glimpse_ext
    >>> with glimpse_ext.patch("torchvision", verify=True) as patch:  # doctest: +SKIP
    ...     model(images)
    >>> print(patch.report)  # doctest: +SKIP
    """
    if not libraries or not set(libraries) <= set(LIBRARIES):
        raise ValueError(f"patch: expects names among {sorted(LIBRARIES)}, got {list(libraries)}")
    names = tuple(dict.fromkeys(libraries))
    done = Patch(names)
    with _lock:
        found = [(r, _find(name, r)) for name in names for r in LIBRARIES[name].replacements]
        try:
            for replacement, place in found:
                if place is None:
                    continue
                owner, original = place
                function = _make(replacement, original, done.report if verify else None)
                done._replaced.append((owner, original, function))
                for holder, name in list(_holders(owner, original)):
                    setattr(holder, name, function)
                    path = f".{holder.__qualname__}" if isinstance(holder, type) else ""
                    module = holder.__module__ if isinstance(holder, type) else holder.__name__
                    done.names.append(f"{module}{path}.{name}")
        except BaseException:
            done.undo()
            raise
    done.names.sort()
    return done
