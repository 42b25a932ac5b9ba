# SPDX-License-Identifier: BSD-3-Clause
"""Is this file fit to be handed out? Usage: check_wheel.py WHEEL [--cuda] [--manylinux]

One wheel must serve every Python and every torch on the platform, so the libraries may need
libtorch_cpu but neither libtorch_cuda nor a CUDA runtime, and no C++ or Python symbol of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 25e6  # bytes
ALLOWED = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
ALLOWED |= {"libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}


def lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check_library(path: Path) -> None:
    needed = {
        match[1]
        for line in lines("readelf", "-dW", str(path))
        if (match := re.search(r"NEEDED.*\[(.*)\]", line))
    }
    assert needed <= ALLOWED, f"{path.name} needs {sorted(needed - ALLOWED)}"
    undefined = [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", str(path))]
    foreign = [name for name in undefined if re.match(r"_?Py[A-Z_]|_ZN?K?(2at|3c10|5torch)", name)]
    assert not foreign, f"{path.name} uses symbols outside the stable ABI: {foreign[:5]}"
    print(f"  {path.name}: {path.stat().st_size / 1e6:.1f} MB, needs {', '.join(sorted(needed))}")


def main() -> None:
    wheel, cuda = Path(sys.argv[1]), "--cuda" in sys.argv[2:]
    assert wheel.stat().st_size < LARGEST, f"{wheel.stat().st_size / 1e6:.1f} MB"
    platform = "manylinux_2_" if "--manylinux" in sys.argv[2:] else "(many)?linux_"
    assert re.search(rf"-py3-none-{platform}[\w.]+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        unfit = r"test|conftest|golden|\.(cpp|cu|h|o)$"
        unwanted = [name for name in names if re.search(unfit, name)]
        assert not unwanted, f"not for users: {unwanted}"
        libraries = sorted(name for name in names if name.endswith(".so"))
        expected = ["glimpse_ext/libglimpse_cpu.so"] + ["glimpse_ext/libglimpse_cuda.so"] * cuda
        assert libraries == expected, f"libraries {libraries}, expected {expected}"
        assert {"glimpse_ext/py.typed", "glimpse_ext/__init__.py", "glimpse_ext/cli.py"} <= set(
            names
        ), names
        archive.extractall(folder)
        for library in libraries:
            check_library(Path(folder, library))
    print(f"  {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")


if __name__ == "__main__":
    main()
