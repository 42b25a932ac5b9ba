# SPDX-License-Identifier: BSD-3-Clause
"""Memory of results on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

from . import _library

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def set_huge_pages(advise: bool) -> bool:
    """Asks the system for huge pages for large results on the CPU; returns the previous setting.

    Off at first, or on where the environment says ``GLIMPSE_HUGE_PAGES=1``. Results and gradients
    of 4 MiB and more are then advised to pages of 2 MiB before they are written. Numbers stay the
    same.

    A large result is mostly memory that the process has just been given, and making it in pages of
    4 KiB costs more than most operators compute. With one thread of a two-core machine, of the time
    without: RoIAlign of 1024 channels (103 MB) 0.6, of a pyramid to 14 x 14 (205 MB) 0.7, the
    gradient of a map of 69 MB 0.65, crops of 224 x 224 pixels (38 MB) 0.5. Results of less than
    about 32 MB often lie in memory that was used before, and gain nothing.

    What it costs: memory is taken in steps of 2 MiB, and where it is fragmented the system may stop
    to move pages together, which can make a call several times slower. It needs Linux with
    transparent huge pages set to ``madvise`` or ``always``; elsewhere nothing happens.
    ``glimpse-ext doctor`` shows both. Masks pasted into few pixels of large images keep small
    pages.

    >>> import glimpse_ext
    >>> before = glimpse_ext.set_huge_pages(True)
    >>> glimpse_ext.set_huge_pages(before)
    True
    """
    if _library.cpu_path is None:  # PyTorch makes the results.
        return False
    library = ctypes.CDLL(str(_library.cpu_path))
    previous = bool(library.glimpse_huge_pages())
    library.glimpse_set_huge_pages(int(bool(advise)))
    return previous


def huge_pages() -> bool:
    """What set_huge_pages has set."""
    if _library.cpu_path is None:
        return False
    return bool(ctypes.CDLL(str(_library.cpu_path)).glimpse_huge_pages())


def system_huge_pages() -> str | None:
    """What the system allows, ``never``, ``madvise`` or ``always``; None where it does not say."""
    try:
        words = _SYSTEM.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)
