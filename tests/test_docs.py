# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says is what the code does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

if not DOCS.is_dir():
    pytest.skip("an installed package has no docs", allow_module_level=True)


def run(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )


@pytest.mark.skipif(conftest._testing is None, reason="the table counts tests of CUDA kernels")
def test_the_support_matrix_is_what_tests_cover():
    result = run(DOCS / "support_matrix.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
