# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled libraries, or what stands in for them, and says what is missing and why."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _schemas

_FOLDER = Path(__file__).resolve().parent
_OLDEST_TORCH = (2, 11)
_REINSTALL = "pip install --force-reinstall --no-deps glimpse-ext"
_REBUILD = "pip install -e ."
_MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""Of ELF files."""

cpu_path: Path | None = None
cpu_error: str | None = None
cuda_path: Path | None = None
cuda_error: str | None = None
samplers: dict[str, Callable[..., Any]] = {}
"""How the arguments of an operator become what and where it samples."""


class FallbackWarning(UserWarning):
    """The compiled library is not used; the operators run in plain PyTorch."""


class _Unusable(Exception):
    """Why a library cannot be used, and what to do about it."""


class _Mismatch(_Unusable):
    """The library is of other sources than the Python files beside it."""


def _remedy() -> str:
    return _REBUILD if (_FOLDER.parent / "CMakeLists.txt").exists() else _REINSTALL


# ---------------------------------------------------------------------------------------------
# Is this file fit for this process? Asked before it is loaded, because what the dynamic linker says
# of a file that is not fit helps nobody.


def check_torch() -> None:
    """Raises ImportError where torch is too old for all that this package is made of."""
    found = re.findall(r"\d+", torch.__version__)[:2]
    if tuple(map(int, found)) < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f"glimpse_ext needs torch {wanted} or newer and found {torch.__version__}; "
            f'run: pip install "torch>={wanted}"'
        )


def _check_file(path: Path, schemas: Sequence[str]) -> None:
    with path.open("rb") as file:
        header = file.read(20)
        if len(header) < 20 or header[:4] != b"\x7fELF":
            raise _Unusable(f"{path.name} is no library, maybe cut off; run: {_remedy()}")
        (machine,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])
        built_for, here = _MACHINES.get(machine, f"ELF machine {machine}"), platform.machine()
        if here in _MACHINES.values() and built_for != here:
            raise _Unusable(
                f"{path.name} is built for {built_for} and this Python runs on {here}; "
                f"install glimpse-ext for this platform: {_remedy()}"
            )
        file.seek(0)
        text = file.read()
    found = re.search(rb"version: ([^\n\0]{1,40})\ntorch headers: ", text)
    version = found[1].decode(errors="replace") if found else "unknown"
    if version != __version__:
        raise _Mismatch(
            f"{path.name} is of glimpse_ext {version} and the Python files are of {__version__}; "
            f"what an earlier installation left must be replaced, run: {_remedy()}"
        )
    others = [schema.partition("(")[0] for schema in schemas if schema.encode() not in text]
    if others:
        raise _Mismatch(
            f"{path.name} is built from other sources than the Python files: it lacks "
            f"{', '.join(others)} as they are in _schemas.py; run: {_remedy()}"
        )


def _explained(path: Path, error: OSError) -> str:
    """What the dynamic linker says, for people."""
    text = str(error.__cause__ or error)
    if symbol := re.search(r"undefined symbol: (\S+)", text):
        reason = (
            f"torch {torch.__version__} lacks {symbol[1]}, which it needs: one of them is broken "
            "or not an official build"
        )
    elif version := re.search(r"version [`']((GLIBC|GLIBCXX|CXXABI)_[\w.]+)' not found", text):
        whose = "C library" if version[2] == "GLIBC" else "C++ library"
        reason = f"it needs {version[1]}, and the {whose} of this system is older"
    elif missing := re.search(r"(\S+): cannot open shared object file", text):
        reason = f"{missing[1]} was not found"
    else:
        reason = text
    return f"{path.name} does not load with torch {torch.__version__}: {reason}; run: {_remedy()}"


def _load(path: Path, schemas: Sequence[str] = ()) -> None:
    """Raises _Unusable, with nothing loaded."""
    if not path.exists():
        raise _Unusable(f"{path.name} is missing from {_FOLDER}; run: {_remedy()}")
    _check_file(path, schemas)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _Unusable(_explained(path, error)) from error


# ---------------------------------------------------------------------------------------------
# The decision


def _examined() -> bool:
    """Whether this process is the doctor, who has to come in whatever the state of health is."""
    called = sys.argv[1:2] == ["doctor"] and Path(sys.argv[0]).name in ("glimpse-ext", "-m")
    return called or "glimpse_ext.doctor" in sys.orig_argv


def _use_fallback(reason: str) -> None:
    from . import _fallback

    _fallback.register()
    if not _examined():
        warnings.warn(
            f"glimpse_ext runs in plain PyTorch, with the same numbers but ten to a hundred times "
            f"slower: {reason}. GLIMPSE_EXT_FALLBACK=0 makes this an error.",
            FallbackWarning,
            stacklevel=3,
        )


def _load_cpu() -> tuple[Path | None, str | None]:
    wanted = os.environ.get("GLIMPSE_EXT_FALLBACK", "auto")
    if wanted not in ("0", "1", "auto", ""):
        raise ImportError(f"glimpse_ext: GLIMPSE_EXT_FALLBACK must be 0, 1 or auto, got {wanted}")
    path = _FOLDER / "libglimpse_cpu.so"
    if wanted == "1":
        reason = "GLIMPSE_EXT_FALLBACK=1 asks for it"
        _use_fallback(reason)
        return None, reason
    if not path.exists() and (_FOLDER.parent / "CMakeLists.txt").exists() and not _examined():
        raise ImportError(
            f"glimpse_ext: {_FOLDER} is the source folder, which shadows an installed package "
            "when Python starts here; run from another directory, install it in place with: "
            f"{_REBUILD}, or set GLIMPSE_EXT_FALLBACK=1 to do without compiled code"
        )
    try:
        _load(path, _schemas.SCHEMAS)
    except _Unusable as error:
        refuse = wanted == "0" or isinstance(error, _Mismatch)
        if refuse and not _examined():
            raise ImportError(f"glimpse_ext: {error}") from error
        _use_fallback(str(error))
        return None, str(error)
    return path, None


def _load_cuda() -> tuple[Path | None, str | None]:
    path = _FOLDER / "libglimpse_cuda.so"
    if torch.version.cuda is None:
        return None, f"this torch ({torch.__version__}) is built without CUDA"
    if cpu_path is None:
        return None, "it needs the CPU library"
    if not path.exists():
        return None, (
            "glimpse_ext was built without CUDA (glimpse-ext doctor says why); "
            "reinstall it on a machine with nvcc, or from a wheel that has CUDA"
        )
    try:
        _load(path)
    except _Unusable as error:
        return None, str(error)
    return path, None


def _build_info(path: Path | None) -> str | None:
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.glimpse_build_info.restype = ctypes.c_char_p
    text: bytes = library.glimpse_build_info()
    return text.decode()


def add_sampler(name: str, bind: Callable[..., Any]) -> None:
    """Takes note of an operator that samples; its kernel is made where none was loaded."""
    samplers[name] = bind
    if cpu_path is None:
        from . import _fallback

        if name in _fallback.SAMPLERS:
            _fallback.implement(name, _fallback.sampler_kernel(name, bind))


def library_info() -> dict[str, str | None]:
    """What was loaded, from where, and why something was not."""
    return {
        "cpu_library": None if cpu_path is None else str(cpu_path),
        "cuda_library": None if cuda_path is None else str(cuda_path),
        "cpu_error": cpu_error,
        "cuda_error": cuda_error,
        "build_info": _build_info(cpu_path),
        "cuda_build_info": _build_info(cuda_path),
    }


if not _examined():
    check_torch()
cpu_path, cpu_error = _load_cpu()
cuda_path, cuda_error = _load_cuda()
