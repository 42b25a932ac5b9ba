# SPDX-License-Identifier: BSD-3-Clause
"""Results as JSON, as a table for the terminal, and as one in Markdown."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import glimpse_ext
from glimpse_ext import doctor

from .devices import place
from .peers import PEER_NAMES
from .suite import YARDSTICKS, Row

SCHEMA = 2
Results = dict[str, Any]

# Whoever else takes part, beside torch.
PACKAGES = ("torchvision", "detectron2", "mmcv", "kornia")

# What makes two rows measurements of the same thing.
KEY = ("workload", "direction", "dtype", "layout", "device", "threads", "launch", "cache")
INACCURATE = "†"


def row_key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def describe(row: Row) -> str:
    what = f"{row['workload']} {row['direction']} {row['dtype']} {row['layout']}"
    return f"{what} on {_where(row)}"


def _where(row: Row) -> str:
    """The device in words; on the CPU there is one way to launch."""
    where = place(row["device"], row["threads"])
    return where if row["device"] == "cpu" else f"{where} {row['launch']} {row['cache']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the package runs from, with + where files differ from it."""
    folder = Path(glimpse_ext.__file__ or "").resolve().parent
    if not (folder.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> Results:
    """Machine, versions, commit and date."""
    cores = len(os.sched_getaffinity(0))
    machine: Results = {
        "processor": doctor.processor_name(),
        "instruction_sets": doctor.instruction_sets(),
        "asked_for": os.environ.get("GLIMPSE_ISA"),
        "cores": cores,
        "huge_pages": doctor.huge_pages(),
        "platform": platform.platform(),
        "allocator": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "GLIMPSE_")) and name != "GLIMPSE_ISA"
        },
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["compute_capability"] = f"{properties.major}.{properties.minor}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine,
        "versions": {
            "glimpse_ext": glimpse_ext.__version__,
            "torch": torch.__version__,
            **{package: _version(package) for package in PACKAGES},
            "python": platform.python_version(),
        },
    }


def save(results: Results, path: Path) -> None:
    def short(value: Any) -> Any:
        """Four digits are more than any of these times has."""
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        return [short(one) for one in value] if isinstance(value, (list, tuple)) else value

    path.write_text(json.dumps(short(results), indent=1) + "\n")


def load(path: Path) -> Results:
    """Results of an earlier run; ValueError if the file holds none of this schema."""
    try:
        results: Results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} holds no benchmark results of schema {SCHEMA}")
    return results


def format_seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 9.95 else f"{ratio:.0f}×"


def _peer_cell(peer: Row | None) -> str:
    if peer is None:
        return "–"
    if "left_out" in peer:
        return "left out"
    return format_ratio(peer["ratio"]["median"]) + ("" if peer["accurate"] else INACCURATE)


def slower_than(row: Row) -> list[str]:
    """Peers that are faster here."""
    peers = {name: peer for name, peer in row["peers"].items() if "ratio" in peer}
    return [name for name, peer in peers.items() if peer["ratio"]["median"] < 1]


def peers_in(rows: Sequence[Row]) -> list[str]:
    return [name for name in PEER_NAMES if any(name in row["peers"] for row in rows)]


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    numeric = [False] * 5 + [True] * (len(header) - 6) + [False]

    def put(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([put(header), "  ".join("-" * width for width in widths), *map(put, lines)])


def _remark(row: Row) -> str:
    if not row["ok"]:
        return f"WRONG: error {row['error']:.1e}, not timed"
    slower = slower_than(row)
    return f"slower than {', '.join(slower)}" if slower else ""


def _own_cell(row: Row) -> str:
    return " ".join(f"{own['median']:.2g}" for own in row.get("own", {}).values()) or "–"


def table(results: Results) -> str:
    """Every row for the terminal: wrong ones first, then those where a peer is faster."""
    rows: list[Row] = results["rows"]
    peers = peers_in(rows)
    header = ["workload", "direction", "dtype", "layout", "on", "time", "× floor", "call", "× own"]
    header += [*peers, "extra MB", ""]
    lines = []
    for row in sorted(rows, key=lambda row: (row["ok"], not slower_than(row))):
        line = [row["workload"], row["direction"], row["dtype"], row["layout"], _where(row)]
        extra, call = row.get("peak_extra_bytes"), row.get("call_seconds")
        line += [
            format_seconds(row["seconds"]) if row["ok"] else "–",
            f"{row['times_floor']:.3g}" if row["ok"] else "–",
            format_seconds(call) if call else "–",
            _own_cell(row),
            *(_peer_cell(row["peers"].get(name)) for name in peers),
            "–" if extra is None else f"{extra / 1e6:.1f}",
            _remark(row),
        ]
        lines.append(line)
    notes = [
        "A peer's column is its time over ours, the median of ratios within interleaved rounds.",
        "call: the same call where next to nothing is computed (W5). × own: our time over that of "
        + "; ".join(YARDSTICKS.values())
        + ".",
    ]
    if any(not p.get("accurate", True) for row in rows for p in row["peers"].values()):
        notes.append(f"{INACCURATE} the peer's own result is far from the float64 one.")
    reasons = dict.fromkeys(
        f"{name}: {peer['left_out']}"
        for row in rows
        for name, peer in row["peers"].items()
        if "left_out" in peer
    )
    notes += [f"left out: {reason}" for reason in reasons]
    rates = (f"{k}: {v / 1e9:.1f} GB/s" for k, v in results["copy_bytes_per_second"].items())
    notes.append("The floor is unique bytes over the rate of a copy: " + "; ".join(rates) + ".")
    if results["quick"]:
        notes.append("--quick: a quarter of the channels, half of the boxes; not comparable.")
    return "\n".join([_grid(header, lines), "", *notes])


def setting_of(row: Row) -> str:
    """Device or threads, and the dtype if it is not float32, in words."""
    where = _where(row)
    return where if row["dtype"] == "float32" else f"{where}, {row['dtype']}"


def column(row: Row) -> str:
    """The setting of a row as the heading of its column."""
    last = ", channels_last" if row["layout"] == "channels_last" else ""
    return setting_of(row) + last


def _markdown_cell(row: Row, peers: Sequence[str]) -> str:
    compared = " / ".join(_peer_cell(row["peers"].get(name)) for name in peers)
    bold = "**" if compared and not slower_than(row) else ""
    parts = [f"{bold}{compared}{bold}"] if compared else []
    parts += [f"{own['median']:.2g}× {YARDSTICKS[name]}" for name, own in row["own"].items()]
    floor = "" if row["seconds"] < 1e-4 else f" ({row['times_floor']:.2g}×)"
    return ", ".join([*parts, format_seconds(row["seconds"]) + floor])


def markdown(results: Results) -> str:
    """The table of docs/speed.md: a line for each workload and direction, by setting."""
    rows: list[Row] = [row for row in results["rows"] if row["ok"]]
    settings = list(dict.fromkeys(column(row) for row in rows))
    if not rows:
        return "No row was timed.\n"
    found = {(r["workload"], r["direction"], column(r)): r for r in rows}
    machine, versions = results["machine"], results["versions"]
    where = machine.get("gpu") if rows[0]["device"] == "cuda" else machine["processor"]
    commit = results["commit"] or ""
    changed = " with changes" if commit.endswith("+") else ""
    commit = f", commit {commit[:10]}{changed}" if commit else ""
    lines = [
        f"{where}, {machine['cores']} cores, torch {versions['torch']}, torchvision "
        f"{versions['torchvision']}, {results['date'][:10]}{commit}. Cells: time of the peers over "
        "ours, then our time (× the floor). Where a peer is faster, the line comes first."
    ]
    for again in results.get("again", []):
        lines[0] += (
            f" {again['rows']} rows whose rounds scattered by more than {again['scatter']:g} were "
            "measured once more."
        )
    if results["quick"]:
        lines += ["", "Made by `--quick`: smaller workloads."]
    lines += [
        "",
        "| workload | direction | peers | " + " | ".join(settings) + " |",
        "|---|---|---|" + "---|" * len(settings),
    ]
    # Where a peer is faster, in any column, comes first.
    keys = dict.fromkeys((r["workload"], r["direction"]) for r in rows)
    of_key = {key: [r for r in rows if (r["workload"], r["direction"]) == key] for key in keys}
    for workload, direction in sorted(
        keys, key=lambda key: not any(slower_than(row) for row in of_key[key])
    ):
        cells = []
        peers = peers_in(of_key[workload, direction])
        for setting in settings:
            row = found.get((workload, direction, setting))
            cells.append("–" if row is None else _markdown_cell(row, peers))
        who = " / ".join(peers) or "–"
        lines.append(f"| {workload} | {direction} | {who} | {' | '.join(cells)} |")
    names = dict.fromkeys((row["workload"], row["what"]) for row in rows)
    lines += ["", "; ".join(f"{name} {what}" for name, what in names) + "."]
    if any(not p.get("accurate", True) for row in rows for p in row["peers"].values()):
        lines.append(f"{INACCURATE} the peer's own result is far from the float64 one.")
    return "\n".join(lines) + "\n"
