# SPDX-License-Identifier: BSD-3-Clause
"""Bridge from pip to CMakeLists.txt, the description of the build. Metadata is in pyproject.toml.

Environment: GLIMPSE_BUILD=1|0 (0: plain PyTorch, nothing is compiled), GLIMPSE_CUDA=auto|0|1,
GLIMPSE_TESTING=0|1 (the test module; default: when editable), GLIMPSE_TORCH_DIR,
TORCH_CUDA_ARCH_LIST, MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL, CMAKE_ARGS.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ENV = os.environ


def find_torch() -> str:
    """The folder of an installed torch that is new enough, found without importing it.

    pip's build isolation replaces sys.path but not sysconfig, so the torch of the environment that
    is installed into stays visible. In sys.path is the one that pip fetched for the build, if any.
    Tools that build in an environment of their own leave the name of the active one in VIRTUAL_ENV.
    """
    active = {"platbase": ENV.get("VIRTUAL_ENV", sys.prefix)}
    known = [sysconfig.get_path("platlib"), sysconfig.get_path("platlib", "posix_prefix", active)]
    for folder in [*known, site.getusersitepackages(), *sys.path]:
        version_file = Path(folder, "torch", "version.py")
        text = version_file.read_text() if version_file.is_file() else ""
        version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
        if version and (int(version[1]), int(version[2])) >= (2, 11):
            return str(version_file.parent)
    return ""


BUILD = ENV.get("GLIMPSE_BUILD", "1") != "0"
TORCH_DIR = ENV.get("GLIMPSE_TORCH_DIR") or find_torch()


class CMakeBuild(build_ext):
    """Configures, builds and copies the libraries into the package, in the tree when editable."""

    def run(self) -> None:
        compilers = [ENV["CXX"].split()[0]] if ENV.get("CXX") else ["c++", "g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            raise SystemExit(
                f"glimpse_ext: no C++ compiler was found (looked for {', '.join(compilers)}). "
                "Install one (Debian and Ubuntu: apt-get install g++), install a wheel, or set "
                "GLIMPSE_BUILD=0 to install without compiled code: the same numbers in plain "
                "PyTorch, many times slower."
            )
        path = ENV.get("PATH", "") + os.pathsep + sysconfig.get_path("scripts")
        cmake, ninja = (shutil.which(tool, path=path) or tool for tool in ("cmake", "ninja"))
        # Everything is passed every time: the cache of an earlier build must not decide.
        options = {
            "TORCH_DIR": TORCH_DIR,
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": ninja,
            "GLIMPSE_CUDA": ENV.get("GLIMPSE_CUDA", "AUTO"),
            "GLIMPSE_TESTING": ENV.get("GLIMPSE_TESTING", "1" if self.inplace else "0"),
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += shlex.split(ENV.get("CMAKE_ARGS", ""))
        jobs = ENV.get("CMAKE_BUILD_PARALLEL_LEVEL") or ENV.get("MAX_JOBS") or str(os.cpu_count())
        build = ROOT / "build" / "cmake"
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)

        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        for pattern in ("libglimpse_*.so", f"_testing{sysconfig.get_config_var('EXT_SUFFIX')}"):
            for old in Path(prefix, "glimpse_ext").glob(pattern):
                old.unlink()  # A library that is not built any more must not be found.
        install = [cmake, "--install", build, "--component", "python", "--prefix", prefix]
        subprocess.run(install if self.inplace else [*install, "--strip"], check=True)


class AnyPythonWheel(bdist_wheel):
    """The libraries use no Python symbol: one wheel per platform serves every Python and torch."""

    def run(self) -> None:
        # What an earlier build left behind, such as a module since removed, must stay out.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if BUILD else "any"


setup(
    ext_modules=[Extension("glimpse_ext.libglimpse", sources=[])] if BUILD else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    # With no torch to build with, torch becomes a build requirement.
    setup_requires=[] if TORCH_DIR or not BUILD else ["torch>=2.11"],
)
