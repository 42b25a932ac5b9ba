# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of one call beyond what it returns.

On CUDA this is what torch's allocator counts. On the CPU no allocator sees all of it, so it is the
resident memory of the process: unused heap is given back first, the high-water mark of the kernel
is set back, and both are read around the call. That needs Linux with glibc and is exact to some
hundred kilobytes; where it cannot be had, there is no number.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {key}")
    return int(found[1]) * 1024


def _returned_bytes(result: object) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Sequence):
        return sum(_returned_bytes(one) for one in result)
    return 0


def peak_extra(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond the tensors that ``call`` returns; None where it cannot be measured."""
    return measured(call, device)[1]


def measured(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What ``call`` returns, and its `peak_extra`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return result, max(peak - before - _returned_bytes(result), 0)
    try:
        # Otherwise the call would find memory that was used before and seem to need none.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text(_RESET_HIGH_WATER)
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    peak = _resident("VmHWM")
    return result, max(peak - before - _returned_bytes(result), 0)
