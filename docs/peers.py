# SPDX-License-Identifier: BSD-3-Clause
"""Runs the reproducers of docs/peers.md: every output on that page is what its program printed.

    python docs/peers.py --check    fails where a program prints something else
    python docs/peers.py --update   writes the outputs into the page

It needs the peers that the page names. A program is a Python block that is followed by a text
block, and runs in a process of its own from the root of the repository, since some of them end it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

import glimpse_ext

PAGE = Path(__file__).resolve().parent / "peers.md"
PEERS = ("torch", "torchvision", "kornia")
# Imported once: every program is a fork of this process.
IMPORTS = ("numpy", "kornia", "torchvision.models.detection", glimpse_ext.__name__)
SECONDS = 60
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.M | re.S)
# A comment in programs that do not print the same each time: they are run and not compared.
VARIES = "# differs from run to run"
VERSIONS = re.compile(r"(?<=<!-- versions -->\n).*?(?=\n<!-- end of versions -->)", re.S)


def versions() -> str:
    found = (f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in PEERS)
    return f"{', '.join(found)}, on a CPU."


def output(program: str) -> str:
    """What a program prints, and how it ended if that was not the end of it."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        os.dup2(writable, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        # What was printed before the end is kept.
        sys.stdout.reconfigure(line_buffering=True)
        status = 0
        try:
            exec(compile(program, str(PAGE), "exec"), {"__name__": "__main__"})
        except BaseException as error:
            print(short(error))
            status = 1
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        text += f"(ended by signal {-status}: {signal.strsignal(-status)})\n"
    return text


def short(error: BaseException) -> str:
    """The last line that Python prints of an error, without what follows its first sentence."""
    line = traceback.format_exception_only(error)[0].splitlines()[0]
    return line if len(line) <= 110 else f"{line[:110]}..."


def renewed(page: str) -> Iterator[tuple[str, str]]:
    """Each program of the page with what it prints now."""
    for program, _ in BLOCK.findall(page):
        yield program, output(program)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    os.chdir(PAGE.parent.parent)
    for name in IMPORTS:
        importlib.import_module(name)
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    page = PAGE.read_text()
    printed = dict(renewed(page))
    if arguments.check:
        printed |= {p: text for p, text in BLOCK.findall(page) if VARIES in p}
    new = BLOCK.sub(lambda m: f"```python\n{m[1]}```\n\n```text\n{printed[m[1]]}```\n", page)
    new = VERSIONS.sub(versions(), new)
    if arguments.update:
        PAGE.write_text(new)
        return 0
    difference = list(difflib.unified_diff(page.split("\n"), new.split("\n"), lineterm="", n=1))
    print("\n".join(difference) if arguments.check else new)
    return 1 if arguments.check and difference else 0


if __name__ == "__main__":
    sys.exit(main())
