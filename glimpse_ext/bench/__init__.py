# SPDX-License-Identifier: BSD-3-Clause
"""``glimpse-ext bench``: how fast the operators are, against every peer and against memory.

==============  ===================================================
`workloads`     what is read: maps and boxes, by name
`peers`         who else can do it, and the reference
`suite`         checks every result, then has it timed: rows
`devices`       the watches of the CPU and of CUDA
`timing`        interleaved rounds, ratios, bandwidth of a copy
`memory`        peak memory of a call
`overhead`      what a call costs, layer by layer
`report`        JSON, the table of the terminal and of docs/speed.md
`targets`       what is aimed at, and which rows reach it
`compare`       two results: what became slower
`again`         rows whose rounds scatter, once more
`plot`          the picture
==============  ===================================================
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import overhead, report, targets, workloads
from .again import SCATTER, measured_again
from .compare import TOLERANCE, compare
from .devices import Device, make_device
from .peers import COMPILED, PEER_NAMES
from .plot import plot
from .suite import DIRECTIONS, DTYPES, Part, Plan, Row, Runner
from .workloads import LAYOUTS

ABOUT = """\
Times every operator on named workloads against each installed peer. Every result is compared with
a float64 one, which is compared with the reference, before it is timed. What the columns mean:
benchmarks/README.md in the source.

Without --dtypes the plan of a whole run is taken: float32, and 16 bits for W1, W2a and W3 in
channels_last; on CUDA every dtype for everything.
"""

RESULTS = "results.json"
PICTURE = "results.png"
OVERHEAD = "overhead.json"

MINUTES = 20.0
QUICK_MINUTES = 1.7
QUICK_WORKLOADS = ("W1", "W2", "W3", "W4a", "W5", "W6a", "W7", "W8a", "W9", "W10", "W11a")
# What goes by without regard to --minutes: rounds that are the least there may be, slow peers.
FORECAST_FACTOR = 1.15
SIXTEEN_BIT_WORKLOADS = ("W1", "W2a", "W3")
# Compiling takes a minute for each of them.
COMPILED_WORKLOADS = ("W1",)


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
    several("--dtypes", list(DTYPES), [], f"of {', '.join(DTYPES)} (default: see above)")
    several("--layouts", list(LAYOUTS), list(LAYOUTS), f"of {', '.join(LAYOUTS)} (default: both)")
    several("--directions", DIRECTIONS, DIRECTIONS, f"of {', '.join(DIRECTIONS)} (default: all)")
    several("--peers", PEER_NAMES, PEER_NAMES, f"of {', '.join(PEER_NAMES)} (default: all)")
    parser.add_argument(
        "--compiled",
        nargs="*",
        metavar="NAME",
        help=f"workloads that are compared with {' and '.join(COMPILED)}, which takes a minute "
        f"each (default: {' '.join(COMPILED_WORKLOADS)}; none with --quick)",
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        metavar="N",
        default=sorted({1, cores}),
        help="numbers of CPU threads (default: 1 and all cores)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="about how long all rows may take together; slow peers can take longer "
        "(default: %(default)g)",
    )
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="rounds of each row")
    parser.add_argument(
        "--patience",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="leave out peers whose forward takes longer, except where a target is about them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two minutes on two cores: fewer and smaller workloads, forward and backward, "
        "contiguous",
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
    other.add_argument(
        "--again",
        type=Path,
        metavar="RESULTS",
        help=f"measure once more the rows of a whole run whose rounds scatter by more than "
        f"{SCATTER:g}, and put them into the file",
    )
    other.add_argument(
        "--overhead", action="store_true", help="only what a call costs, layer by layer"
    )
    other.add_argument(
        "--targets",
        type=Path,
        metavar="RESULTS",
        help="say which targets a whole run reached; the exit status is 1 if it missed one",
    )
    other.add_argument("--readme", type=Path, metavar="RESULTS", help="print the table in Markdown")
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
    if arguments.rounds < 1 or min(arguments.threads) < 1 or arguments.minutes <= 0:
        parser.error("--rounds and --threads must be at least 1, and --minutes more than 0")
    return arguments


def make_plan(arguments: argparse.Namespace) -> Plan:
    """ValueError for a workload that does not exist."""
    chosen = tuple(workloads.WORKLOADS)
    if arguments.quick:
        chosen = tuple(workloads.select(list(QUICK_WORKLOADS)))
    if arguments.workloads:
        chosen = tuple(workloads.select(arguments.workloads))
    directions = tuple(arguments.directions)
    compiled = arguments.compiled
    if compiled is None:
        compiled = () if arguments.quick or arguments.tiny else COMPILED_WORKLOADS
    everything = Part(
        workloads=chosen,
        devices=tuple(arguments.devices),
        dtypes=tuple(arguments.dtypes) or ("float32",),
        layouts=tuple(arguments.layouts),
        threads=tuple(arguments.threads),
        directions=directions,
    )
    parts: tuple[Part, ...] = (everything,)
    if not arguments.dtypes and not arguments.quick:
        parts = _whole_run(everything)
    plan = Plan(
        parts=parts,
        peers=tuple(arguments.peers),
        compiled=tuple(compiled),
        rounds=arguments.rounds,
        minutes=arguments.minutes,
        patience=arguments.patience,
        needed=frozenset() if arguments.quick or arguments.tiny else targets.COMPARISONS,
    )
    if arguments.quick:
        short = tuple(d for d in directions if d in ("forward", "backward")) or directions
        part = dataclasses.replace(
            everything,
            workloads=tuple(workload.quick() for workload in chosen),
            layouts=everything.layouts[:1],
            directions=short,
        )
        plan = dataclasses.replace(
            plan,
            parts=(part,),
            rounds=min(plan.rounds, 5),
            round_seconds=0.01,
            seconds=0.4,
            minutes=min(plan.minutes or QUICK_MINUTES, QUICK_MINUTES),
        )
    if arguments.tiny:
        parts = tuple(
            dataclasses.replace(part, workloads=tuple(w.tiny() for w in part.workloads))
            for part in plan.parts
        )
        plan = dataclasses.replace(plan, parts=parts, round_seconds=1e-4, seconds=0.02)
    return plan


def _whole_run(everything: Part) -> tuple[Part, ...]:
    """What is worth the time of slow peers. On the CPU, with one thread: in the first layout all
    directions, in the other one each gradient alone; with several threads: forward and backward; in
    16 bits: these, in channels_last, where float32 has to be matched. On CUDA all.
    """

    def part(layouts: Sequence[str], threads: Sequence[int], directions: Sequence[str]) -> Part:
        return dataclasses.replace(
            everything,
            devices=("cpu",),
            layouts=tuple(layouts),
            threads=tuple(threads),
            directions=tuple(d for d in everything.directions if d in directions),
        )

    layouts, threads = everything.layouts, everything.threads
    simple = ("forward", "backward")
    parts = (
        part(layouts[:1], threads[:1], DIRECTIONS),
        part(layouts[1:], threads[:1], (*simple, "box gradient")),
        part(layouts[:1], threads[1:], simple),
        part(layouts[1:], threads[1:], simple),
        dataclasses.replace(
            part([name for name in layouts if name == "channels_last"], threads[:1], simple),
            workloads=tuple(w for w in everything.workloads if w.name in SIXTEEN_BIT_WORKLOADS),
            dtypes=("float16", "bfloat16"),
        ),
    )
    on_cuda = dataclasses.replace(everything, devices=("cuda",), dtypes=tuple(DTYPES))
    return (parts if "cpu" in everything.devices else ()) + (
        (on_cuda,) if "cuda" in everything.devices else ()
    )


def forecast(runner: Runner) -> str:
    """How long it will take, in words."""
    rows = f"{runner.steps} rows"
    if runner.plan.minutes is None:
        return rows
    return f"{rows} in about {FORECAST_FACTOR * runner.plan.minutes:.0f} minutes"


def run(
    plan: Plan, quick: bool = False, devices: Mapping[str, Device] | None = None
) -> report.Results:
    """Results of a plan, as they are saved."""
    runner = Runner(plan, devices)
    results: dict[str, Any] = {"schema": report.SCHEMA, **report.environment(), "quick": quick}
    print(forecast(runner), file=sys.stderr)
    often = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(total=runner.steps, unit="row", dynamic_ncols=True, mininterval=often) as bar:

        def progress(row: Row) -> None:
            bar.set_postfix_str(report.describe(row), refresh=False)
            bar.update()

        rows = runner.run(progress)
        results["seconds"] = bar.format_dict["elapsed"]
    plan_facts = dataclasses.asdict(plan)
    del plan_facts["needed"]
    for part in plan_facts["parts"]:
        part["workloads"] = [work["name"] for work in part["workloads"]]
    plan_facts["workloads"] = {w.name: dataclasses.asdict(w) for w in plan.workloads}
    results["unfinished"] = runner.unfinished
    results |= {"plan": plan_facts, "copy_bytes_per_second": runner.bandwidths, "rows": rows}
    return results


def _overhead(arguments: argparse.Namespace) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    works = overhead.TINY
    if arguments.workloads:
        works = tuple(w for w in workloads.select(arguments.workloads) if w.overhead)
    found = {}
    for name in arguments.devices:
        found[name] = overhead.measure(make_device(name), works)
        print(f"{name}\n\n{overhead.table(found[name])}\n")
    results = {**report.environment(), "seconds": found}
    (arguments.out / OVERHEAD).write_text(json.dumps(results, indent=1) + "\n")
    print(arguments.out / OVERHEAD)
    return 0


def _act(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        old, new = map(report.load, arguments.compare)
        comparison = compare(old, new, arguments.tolerance)
        print(comparison)
        return 1 if comparison.worse else 0
    if arguments.overhead:
        return _overhead(arguments)
    if arguments.targets:
        results = report.load(arguments.targets)
        print(targets.markdown(results), end="")
        return 1 if any(verdict.word == "MISS" for verdict in targets.judge(results)) else 0
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
    if arguments.again:
        results = measured_again(report.load(arguments.again), plan, run)
        report.save(results, arguments.again)
        print(report.table({**results, "rows": [r for r in results["rows"] if r.get("again")]}))
        return 0
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
