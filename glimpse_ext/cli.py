# SPDX-License-Identifier: BSD-3-Clause
"""The console script ``glimpse-ext``: ``glimpse-ext <command> [options]``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A module with ``main(argv) -> exit status``, imported only when it is called."""

    module: str
    extra: str
    packages: frozenset[str]
    help: str


COMMANDS = {
    "bench": Command(
        "glimpse_ext.bench",
        "bench",
        frozenset({"matplotlib", "tqdm"}),
        "time every operator against its peers; compare and plot results",
    ),
    "demo": Command(
        "glimpse_ext.demo",
        "demo",
        frozenset({"matplotlib", "pycocotools", "scipy", "skimage", "sklearn", "tqdm"}),
        "train a small detector on half a photograph and find the coins of the other half; "
        "--glimpse: learn where to look for a digit",
    ),
    "doctor": Command(
        "glimpse_ext.doctor",
        "",
        frozenset(),
        "say what is installed and loaded, check that it works, and how to repair what does not",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="glimpse-ext",
        description="Box-shaped reads of an image as compiled PyTorch operators.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8} {command.help}" for name, command in COMMANDS.items())
        + "\n\nglimpse-ext <command> --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=" or ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the command")
    arguments = parser.parse_args(argv)
    command = COMMANDS[arguments.command]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in command.packages:
            raise
        print(
            f"glimpse-ext {arguments.command} needs {missing}: "
            f'pip install "glimpse-ext[{command.extra}]"',
            file=sys.stderr,
        )
        return 2
    return int(module.main(arguments.options))


if __name__ == "__main__":
    sys.exit(main())
