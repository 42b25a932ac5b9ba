# SPDX-License-Identifier: BSD-3-Clause
"""``glimpse-ext bench``: how fast the operators are, against every peer and against memory.

==============  ===================================================
`workloads`     what is read: maps and boxes, by name
`peers`         who else can do it, and the reference
`suite`         checks every result, then has it timed: rows
`timing`        interleaved rounds, ratios, bandwidth of a copy
`memory`        peak memory of a call
`report`        JSON, the table of the terminal and of the README
`compare`       two results: what became slower
`plot`          the picture
==============  ===================================================
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import report, workloads
from .compare import TOLERANCE, compare
from .peers import PEER_NAMES
from .plot import plot
from .suite import DIRECTIONS, DTYPES, Plan, Row, Runner
from .workloads import LAYOUTS

ABOUT = """\
Times every operator on named workloads against each installed peer. Every result is compared with
a float64 one, which is compared with the reference, before it is timed. What the columns mean:
benchmarks/README.md in the source.
"""

RESULTS = "results.json"
PICTURE = "results.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="glimpse-ext bench",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(name: str, known: Sequence[str], default: Sequence[str], about: str) -> None:
        parser.add_argument(
            name, nargs="+", choices=known, metavar=name[2:].upper(), default=default, help=about
        )

    names = " ".join(w.name for w in workloads.WORKLOADS)
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", help=f"some of {names} (default: all; W2: both)"
    )
    several("--devices", ("cpu", "cuda"), ["cpu"], "cpu and/or cuda (default: cpu)")
    several("--dtypes", list(DTYPES), ["float32"], f"of {', '.join(DTYPES)} (default: float32)")
    several("--layouts", list(LAYOUTS), list(LAYOUTS), f"of {', '.join(LAYOUTS)} (default: both)")
    several("--directions", DIRECTIONS, DIRECTIONS, f"of {', '.join(DIRECTIONS)} (default: all)")
    several("--peers", PEER_NAMES, PEER_NAMES, f"of {', '.join(PEER_NAMES)} (default: all)")
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        metavar="N",
        default=sorted({1, cores}),
        help="numbers of CPU threads (default: 1 and all cores)",
    )
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="rounds of each row")
    parser.add_argument(
        "--patience",
        type=float,
        default=Plan.patience,
        metavar="SECONDS",
        help="leave out peers whose forward takes longer (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two minutes on two cores: smaller workloads, forward and backward, contiguous",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("glimpse-bench"),
        help=f"folder for {RESULTS} and {PICTURE} (default: %(default)s)",
    )
    other = parser.add_argument_group("instead of a run").add_mutually_exclusive_group()
    other.add_argument(
        "--plot",
        type=Path,
        nargs="+",
        metavar=("RESULTS", "PICTURE"),
        help="draw results; the picture is RESULTS with .png, or the given .png or .svg files",
    )
    other.add_argument("--readme", type=Path, metavar="RESULTS", help="print the README's table")
    other.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="say what became slower beyond noise; the exit status is 1 if anything did",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="smaller changes are none for --compare (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if "cuda" in arguments.devices and not torch.cuda.is_available():
        parser.error("torch finds no GPU; leave out --devices cuda")
    if arguments.rounds < 1 or min(arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return arguments


def make_plan(arguments: argparse.Namespace) -> Plan:
    """ValueError for a workload that does not exist."""
    chosen = workloads.WORKLOADS
    if arguments.workloads:
        chosen = workloads.select(arguments.workloads)
    plan = Plan(
        workloads=tuple(chosen),
        devices=tuple(arguments.devices),
        dtypes=tuple(arguments.dtypes),
        layouts=tuple(arguments.layouts),
        threads=tuple(arguments.threads),
        directions=tuple(arguments.directions),
        peers=tuple(arguments.peers),
        rounds=arguments.rounds,
        patience=arguments.patience,
    )
    if arguments.quick:
        plan = dataclasses.replace(
            plan,
            workloads=tuple(workload.quick() for workload in chosen),
            layouts=plan.layouts[:1],
            directions=tuple(d for d in plan.directions if d in ("forward", "backward"))
            or plan.directions,
            rounds=min(plan.rounds, 5),
            round_seconds=0.01,
            seconds=0.4,
        )
    if arguments.tiny:
        plan = dataclasses.replace(
            plan,
            workloads=tuple(workload.tiny() for workload in chosen),
            round_seconds=1e-4,
            seconds=0.02,
        )
    return plan


def run(plan: Plan, quick: bool = False) -> report.Results:
    """Results of a plan, as they are saved."""
    runner = Runner(plan)
    results: dict[str, Any] = {"schema": report.SCHEMA, **report.environment(), "quick": quick}
    often = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(total=plan.steps, unit="row", dynamic_ncols=True, mininterval=often) as bar:

        def progress(row: Row) -> None:
            bar.set_postfix_str(report.describe(row), refresh=False)
            bar.update()

        rows = runner.run(progress)
    plan_facts = dataclasses.asdict(plan)
    plan_facts["workloads"] = {w["name"]: w for w in plan_facts["workloads"]}
    results |= {"plan": plan_facts, "copy_bytes_per_second": runner.bandwidths, "rows": rows}
    return results


def _act(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        old, new = map(report.load, arguments.compare)
        comparison = compare(old, new, arguments.tolerance)
        print(comparison)
        return 1 if comparison.worse else 0
    if arguments.readme:
        print(report.markdown(report.load(arguments.readme)), end="")
        return 0
    if arguments.plot:
        source, *pictures = arguments.plot
        for picture in pictures or [source.with_suffix(".png")]:
            plot(report.load(source), picture)
            print(picture)
        return 0
    plan = make_plan(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = run(plan, arguments.quick or arguments.tiny)
    report.save(results, arguments.out / RESULTS)
    print(report.table(results))
    print(f"\n{arguments.out / RESULTS}")
    if any("ratio" in peer for row in results["rows"] for peer in row["peers"].values()):
        plot(results, arguments.out / PICTURE)
        print(arguments.out / PICTURE)
    return 0 if all(row["ok"] for row in results["rows"]) else 1


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return _act(arguments)
    except (OSError, ValueError) as error:
        print(f"glimpse-ext bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
