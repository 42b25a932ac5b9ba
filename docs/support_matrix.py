# SPDX-License-Identifier: BSD-3-Clause
"""The README's table of what each operator supports, counted from the tests.

A cell is a test of tests/test_operators.py that pytest collects for this operator on every device.
What has no test, or one that is skipped, is not in the table, so nothing untested can be claimed.

    python docs/support_matrix.py            prints the table
    python docs/support_matrix.py --check    fails where the README says something else
    python docs/support_matrix.py --update   writes it into the README
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

# The kernels that a device of the tests runs. A GPU in the machine changes nothing in the table.
DEVICES = {"cpu": "CPU", "emulated": "CUDA"}

# Columns: what is claimed, and the test that it is claimed by.
PROPERTIES = {
    "double backward": "test_double_backward",
    "forward mode": "test_forward_mode",
    "`vmap`": "test_vmap",
    "any threads, same bits": "test_any_number_of_threads",
    "`compile`": "test_compile",
}
# torch.compile sees the schema and the fake kernel, which are one for all devices.
ONE_DEVICE = {"test_compile"}
DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8")


class Collector:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


class Row:
    """What the tests of one public operator run over."""

    def __init__(self) -> None:
        self.operators: dict[str, Any] = {}
        self.tested: dict[str, set[tuple[str, str]]] = defaultdict(set)
        """Of each test, the (operator, device) it is run for."""
        self.dtypes: set[tuple[str, str, str]] = set()
        """(operator, device, dtype) whose values are tested."""
        self.gradients: set[tuple[str, str, str, str]] = set()
        """The same, with the argument that the gradient belongs to."""


def collect() -> dict[str, Row]:
    """The rows by public name, from the parameters of collected tests."""
    collector = Collector()
    tests = ROOT / "tests"
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", str(tests / "test_operators.py")]
    sys.path.insert(0, str(tests))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main([*arguments, f"--rootdir={ROOT}"], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected:\n{said.getvalue()}")
    rows: dict[str, Row] = defaultdict(Row)
    for item in collector.items:
        skipped = item.get_closest_marker("skip") or item.get_closest_marker("xfail")
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if skipped or "op" not in parameters:
            continue
        operator, name = parameters["op"], getattr(item, "originalname", item.name)
        device = str(parameters.get("device", "cpu"))
        row = rows[operator.public]
        row.operators[operator.name] = operator
        row.tested[name].add((operator.name, device))
        dtype = str(parameters.get("dtype")).removeprefix("torch.")
        if name == "test_values":
            row.dtypes.add((operator.name, device, dtype))
        if name == "test_gradients":
            row.gradients.add((operator.name, device, dtype, parameters["to"]))
    return rows


def devices_of(row: Row, test: str) -> list[str]:
    """Devices on which a test runs for every operator of the row, or for one if that is enough."""
    found = []
    for device, shown in DEVICES.items():
        done = [name for name in row.operators if (name, device) in row.tested[test]]
        if done and (test in ONE_DEVICE or len(done) == len(row.operators)):
            found.append(shown)
    return found


def everywhere(row: Row) -> list[tuple[str, str]]:
    return [(name, device) for name in row.operators for device in DEVICES]


def dtypes_of(row: Row) -> list[str]:
    """Dtypes of images whose values are tested, for every operator of the row on every device."""
    return [d for d in DTYPES if all((*where, d) in row.dtypes for where in everywhere(row))]


def gradients_of(row: Row) -> list[str]:
    """Arguments whose gradients are tested, in every dtype of the image that has one."""
    found = []
    for to in ("image", "boxes"):
        dtypes = [d for d in dtypes_of(row) if to != "image" or d != "uint8"]
        needed = [(*where, d, to) for where in everywhere(row) for d in dtypes]
        if needed and all(one in row.gradients for one in needed):
            found.append(to)
    return found


def cell(row: Row, test: str) -> str:
    found = devices_of(row, test)
    if test == "test_double_backward" and not all(o.second for o in row.operators.values()):
        return "not twice in boxes" if len(found) == len(DEVICES) else "–"
    if len(found) == len(DEVICES) or (found and test in ONE_DEVICE):
        return "✓"
    return ", ".join(found) or "–"


def table() -> str:
    rows = collect()
    head = ["operator", "kernels", "image dtypes", "gradients to", *PROPERTIES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for public in sorted(rows):
        row = rows[public]
        cells = [
            f"`{public}`",
            ", ".join(devices_of(row, "test_every_case")) or "–",
            ", ".join(dtypes_of(row)) or "–",
            ", ".join(gradients_of(row)) or "–",
            *(cell(row, test) for test in PROPERTIES.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "CUDA kernels run on the host in these tests, see [docs/emulation.md](docs/emulation.md), "
        "and on a GPU where there is one. An image of uint8 has no gradient, its boxes have; "
        "`boxes` are all numbers that say where is read, points and offsets too. Each cell is a "
        "test of [tests/test_operators.py](tests/test_operators.py) that exists for this "
        "operator; the table is written by `python docs/support_matrix.py --update`."
    )
    return "\n".join([*lines, "", note])


def in_readme(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no lines {BEGIN} and {END}")
    return before, inside.strip("\n"), after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the README")
    parser.add_argument("--update", action="store_true", help="write into the README")
    options = parser.parse_args(arguments)
    made = table()
    if options.update:
        before, _, after = in_readme(README.read_text())
        README.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
    elif options.check:
        _, found, _ = in_readme(README.read_text())
        if found != made:
            print(
                "README.md does not say what the tests cover; run docs/support_matrix.py --update"
            )
            print(made)
            return 1
    else:
        print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
