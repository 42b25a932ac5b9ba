# SPDX-License-Identifier: BSD-3-Clause
"""What cannot be loaded is named before it is loaded, with what to do about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glimpse_ext
from glimpse_ext import _library, _schemas

PACKAGE = Path(glimpse_ext.__file__).resolve().parent
LIBRARY = _library.cpu_path

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no compiled library")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the loader looks. Nothing is registered: the operators of this process exist."""
    monkeypatch.setattr(_library, "_FOLDER", tmp_path / "glimpse_ext")
    (tmp_path / "glimpse_ext").mkdir()
    monkeypatch.delenv("GLIMPSE_EXT_FALLBACK", raising=False)
    monkeypatch.setattr(_library, "_use_fallback", lambda reason: None)
    return tmp_path / "glimpse_ext"


def put(folder, change=lambda data: data):
    (folder / "libglimpse_cpu.so").write_bytes(change(LIBRARY.read_bytes()))


def of_another_version(data):
    return data.replace(f"version: {glimpse_ext.__version__}\n".encode(), b"version: 0.0.9\n")


def another_machine(data):
    return data[:18] + b"\xb7\x00" + data[20:]  # aarch64


FALLS_BACK = {
    "missing": (None, "libglimpse_cpu.so is missing"),
    "cut off": (lambda data: data[:10], "is no library, maybe cut off"),
    "another file": (lambda data: b"<html>" + data[6:], "is no library"),
}
if _library.platform.machine() == "x86_64":
    FALLS_BACK["another machine"] = (
        another_machine,
        "is built for aarch64 and this Python runs on",
    )


@pytest.mark.parametrize("case", FALLS_BACK)
def test_what_cannot_be_loaded_is_replaced(case, folder):
    change, reason = FALLS_BACK[case]
    if change is not None:
        put(folder, change)
    path, error = _library._load_cpu()
    assert path is None
    assert reason in error
    assert "run: pip install" in error or "platform: pip install" in error


@pytest.mark.parametrize("case", FALLS_BACK)
def test_unless_that_is_forbidden(case, folder, monkeypatch):
    change, reason = FALLS_BACK[case]
    if change is not None:
        put(folder, change)
    monkeypatch.setenv("GLIMPSE_EXT_FALLBACK", "0")
    with pytest.raises(ImportError, match=f"^glimpse_ext: libglimpse_cpu.so.*{reason[-10:]}"):
        _library._load_cpu()


def test_a_library_of_another_version_raises(folder):
    put(folder, of_another_version)
    with pytest.raises(ImportError, match=r"is of glimpse_ext 0\.0\.9 and the Python files are of"):
        _library._load_cpu()


def test_a_library_of_other_sources_raises(folder):
    """One that an editable installation left behind has the same version, but not the operators."""
    put(folder, lambda data: data.replace(b"_frames_maximum(", b"_frames_minimum("))
    with pytest.raises(ImportError, match=r"it lacks _frames_maximum .*run: pip install"):
        _library._load_cpu()


def test_the_source_folder_is_not_mistaken_for_an_installation(folder):
    (folder.parent / "CMakeLists.txt").touch()
    with pytest.raises(ImportError, match=r"shadows an installed package.*pip install -e"):
        _library._load_cpu()


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_an_old_torch_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r'needs torch 2\.11 or newer and found .*"torch>=2\.11"'):
        _library.check_torch()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git1234", "3.0.0"])
def test_a_new_torch_is_not(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    _library.check_torch()


SAID = {
    "undefined symbol: aoti_torch_new_thing": "lacks aoti_torch_new_thing, which it needs",
    "/lib/libc.so.6: version `GLIBC_2.38' not found (required by x.so)": "needs GLIBC_2.38, and "
    "the C library of this system is older",
    "libstdc++.so.6: version `GLIBCXX_3.4.99' not found": "the C++ library of this system is older",
    "libtorch_cpu.so: cannot open shared object file: No": "libtorch_cpu.so was not found",
    "something else": "something else",
}


@pytest.mark.parametrize("said", SAID)
def test_the_words_of_the_linker_are_explained(said, folder, monkeypatch):
    def load_library(path):
        raise OSError(said)

    put(folder)
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    path, error = _library._load_cpu()
    assert path is None
    assert SAID[said] in error
    assert "undefined symbol" not in error
    assert "run: pip install" in error


def test_an_unknown_wish_is_refused(monkeypatch):
    monkeypatch.setenv("GLIMPSE_EXT_FALLBACK", "yes")
    with pytest.raises(ImportError, match="must be 0, 1 or auto, got yes"):
        _library._load_cpu()


def test_every_schema_is_that_of_the_library():
    names = {name for name in torch._C._dispatch_get_all_op_names() if "glimpse_ext::" in name}
    assert names == {f"glimpse_ext::{name}" for name in _schemas.NAMES}
    for schema in _schemas.SCHEMAS:
        name = schema.partition("(")[0]
        compiled = getattr(torch.ops.glimpse_ext, name).default._schema
        assert str(compiled) == f"glimpse_ext::{schema}", name


def test_the_doctor_comes_where_the_import_fails(tmp_path):
    """A library of another version: importing raises, the doctor says why and what to do."""
    copy = tmp_path / "glimpse_ext"
    copy.mkdir()
    for file in PACKAGE.rglob("*.py"):
        target = copy / file.relative_to(PACKAGE)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (copy / LIBRARY.name).write_bytes(of_another_version(LIBRARY.read_bytes()))
    command = [sys.executable, "-m", "glimpse_ext.cli"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    failed = run("demo")
    assert failed.returncode == 1
    assert "ImportError: glimpse_ext: libglimpse_cpu.so is of glimpse_ext 0.0.9" in failed.stderr
    examined = run("doctor")
    assert examined.returncode == 1, examined.stderr
    assert "problem: the CPU library did not load: libglimpse_cpu.so is of" in examined.stdout
    assert "what to do: " in examined.stdout
