# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled libraries and says what is missing and why."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_OLDEST_TORCH = (2, 11)

cpu_path: Path | None = None
cuda_path: Path | None = None
cuda_error: str | None = None


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load_cpu() -> Path:
    if _torch_version() < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f"glimpse_ext needs torch {wanted} or newer and found {torch.__version__}; "
            f'run: pip install "torch>={wanted}"'
        )
    path = _FOLDER / "libglimpse_cpu.so"
    if not path.exists():
        if (_FOLDER.parent / "CMakeLists.txt").exists():
            raise ImportError(
                f"glimpse_ext: {_FOLDER} is the source folder, which shadows an installed package "
                "when Python starts here; run from another directory or install it in place with: "
                "pip install -e ."
            )
        raise ImportError(
            f"glimpse_ext: {path.name} is missing from {_FOLDER}; reinstall the package"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"glimpse_ext: {path.name} does not load with torch {torch.__version__}: "
            f"{error.__cause__ or error}; reinstall glimpse-ext for this platform"
        ) from error
    return path


def _load_cuda() -> tuple[Path | None, str | None]:
    path = _FOLDER / "libglimpse_cuda.so"
    if torch.version.cuda is None:
        return None, f"this torch ({torch.__version__}) is built without CUDA"
    if not path.exists():
        return None, (
            "glimpse_ext was built without CUDA (glimpse-ext doctor says why); "
            "reinstall it on a machine with nvcc, or from a wheel that has CUDA"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return None, f"{path.name} does not load: {error.__cause__ or error}"
    return path, None


def _build_info(path: Path | None) -> str | None:
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.glimpse_build_info.restype = ctypes.c_char_p
    text: bytes = library.glimpse_build_info()
    return text.decode()


def library_info() -> dict[str, str | None]:
    """What was loaded, from where, and why something was not."""
    return {
        "cpu_library": None if cpu_path is None else str(cpu_path),
        "cuda_library": None if cuda_path is None else str(cuda_path),
        "cpu_error": None,
        "cuda_error": cuda_error,
        "build_info": _build_info(cpu_path),
        "cuda_build_info": _build_info(cuda_path),
    }


cpu_path = _load_cpu()
cuda_path, cuda_error = _load_cuda()
