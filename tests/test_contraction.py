# SPDX-License-Identifier: BSD-3-Clause
"""Positions round the same way on host and device: neither compiler fuses a multiply and an add."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_PROBE = _ROOT / "csrc" / "testing" / "geometry_probe.cu"
# Its kernels copy, place windows and draw noise: every number in them must be that of the host.
_GLIMPSE = _ROOT / "csrc" / "cuda" / "glimpse.cu"


def _ptx(folder: Path, *options: str, source: Path = _PROBE) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: nothing compiles the geometry for a device here")
    target = folder / "probe.ptx"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-ptx", *options, f"-I{_ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    return target.read_text()


@pytest.mark.parametrize(
    ("source", "kernel"),
    [(_PROBE, "geometry_probe"), (_GLIMPSE, "plane_statistics_kernel")],
    ids=["geometry", "glimpse"],
)
def test_device_arithmetic_fuses_nothing(source: Path, kernel: str, tmp_path: Path) -> None:
    ptx = _ptx(tmp_path, source=source)
    assert kernel in ptx
    assert len(re.findall(r"\b(?:add|sub|mul|div)\.rn\.f(?:32|64)", ptx)) > 20
    fused = re.findall(r"\bfma\.[a-z0-9.]*", ptx)
    assert not fused, f"{source.name} compiled by nvcc holds {len(fused)} fused operations: {fused}"


def test_the_probe_would_show_a_fused_operation(tmp_path: Path) -> None:
    """The same file with plain operators is fused by nvcc, so the test above can fail."""
    source = (_ROOT / "csrc" / "geometry" / "rounded.h").read_text()
    plain = re.sub(r"single_intrinsic\(a\.value, b\.value\)", "a.value symbol b.value", source)
    plain = re.sub(r"double_intrinsic\(a\.value, b\.value\)", "a.value symbol b.value", plain)
    assert plain != source
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry" / "rounded.h").write_text(plain)
    assert re.search(r"\bfma\.rn\.f32", _ptx(tmp_path, f"-I{tmp_path}", "-O3"))
