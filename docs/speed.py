# SPDX-License-Identifier: BSD-3-Clause
"""The tables of docs/speed.md and the README's part of them, from results that were measured.

    python docs/speed.py            prints what is missed
    python docs/speed.py --check    fails where a page or an explanation is not that of the results
    python docs/speed.py --update   writes tables and plot

Results are the newest files of benchmarks/results made by `glimpse-ext bench`: `*-cpu.json`, the
same with huge pages (`*-cpu-huge-pages.json`) and with AVX2 only (`*-cpu-avx2.json`); and what a
call costs (`*-cpu-overhead.json`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from glimpse_ext.bench import overhead, report, targets
from glimpse_ext.bench.plot import plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = {
    "cpu": "As installed",
    "cpu-huge-pages": "Large results in huge pages (`GLIMPSE_HUGE_PAGES=1`)",
    "cpu-avx2": "Without AVX-512 (`GLIMPSE_ISA=avx2`)",
}
"""The first one is the whole; of the others only targets that need them are shown."""
# In docs/speed.md and its plot alone.
NOT_IN_PLOT = ("W1s", "W6b", "W6d", "W8b", "W11a", "W11b", "W12")
IN_README = ("W1", "W2b", "W4a", "W5", "W6a", "W6c", "W7", "W8a", "W9", "W10")
"""Beside every workload in which a peer is faster."""

# Why a target is missed, by run, workload, direction and what it is against.
WHY: dict[tuple[str, str, str, str], str] = {
    ("cpu", "W7", "forward", "copy"): (
        "The yardstick copies one piece of memory. Windows are rows of 256 bytes, which begin and "
        "end within cache lines and lie a row of the image apart."
    ),
    ("cpu", "W2a", "backward", "own float32"): (
        "bfloat16 has no instruction that widens it on the way to a sum, as float16 has; on large "
        "boxes the sums are the work, not the bytes. The rounds lie on both sides of 1."
    ),
    ("cpu", "W3", "box gradient", "own backward"): (
        "It reads the maps and the gradients of cells, where the gradient to the maps reads the "
        "latter only. The rounds lie on both sides of 1.8."
    ),
}


def newest(run: str) -> Path:
    found = sorted(RESULTS.glob(f"????-??-??-{run}.json"))
    if not found:
        raise SystemExit(f"benchmarks/results has no file of {run}")
    return found[-1]


def key(run: str, verdict: targets.Verdict) -> tuple[str, str, str, str]:
    target = verdict.target
    return run, target.workload, target.direction, target.versus


def verdicts(run: str) -> list[targets.Verdict]:
    """Those of the first run, and of the others what needs them."""
    found = targets.judge(report.load(newest(run)))
    if run == "cpu":
        return [v for v in found if v.word != "other"]
    needed = {"cpu-huge-pages": lambda t: t.hint, "cpu-avx2": lambda t: t.isa == "avx2"}[run]
    return [v for v in found if needed(v.target) and v.word in ("hit", "MISS")]


def problems() -> Iterator[str]:
    missed = {key(run, v) for run in RUNS for v in verdicts(run) if v.word != "hit"}
    yield from (f"not explained: {' '.join(k)}" for k in sorted(missed - WHY.keys()))
    yield from (f"explained, but not missed: {' '.join(k)}" for k in sorted(WHY.keys() - missed))


def targets_table() -> str:
    lines = []
    for run, title in RUNS.items():
        found = verdicts(run)
        hits = sum(v.word == "hit" for v in found)
        lines += [
            f"### {title}",
            "",
            f"`benchmarks/results/{newest(run).name}`: {hits} of {len(found)} reached.",
            "",
            "| workload | direction | at | against | target | reached | | why |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for verdict in found:
            why = "" if verdict.word == "hit" else WHY.get(key(run, verdict), "")
            lines.append(f"| {' | '.join([*verdict.cells(), why])} |")
        lines.append("")
    return "\n".join(lines)


def plain(row: report.Row) -> bool:
    return row["direction"] in ("forward", "backward") and row["dtype"] == "float32"


def in_plot(row: report.Row) -> bool:
    name = row["workload"]
    return plain(row) and name not in NOT_IN_PLOT and not re.fullmatch("W5[a-z]", name)


def in_readme(row: report.Row) -> bool:
    return plain(row) and row["workload"] in IN_README


def brief(results: report.Results) -> report.Results:
    return {**results, "rows": [row for row in results["rows"] if in_plot(row)]}


def settings_of(rows: list[report.Row]) -> list[str]:
    return list(dict.fromkeys(report.column(row) for row in rows))


def against_the_fastest(row: report.Row) -> str:
    """How many times longer the fastest peer takes, who that is, and our time."""
    ratios = {n: p["ratio"]["median"] for n, p in row["peers"].items() if "ratio" in p}
    time = report.format_seconds(row["seconds"])
    if not ratios:
        return time
    name = min(ratios, key=lambda n: ratios[n])
    ratio = report.format_ratio(ratios[name])
    return f"{f'**{ratio}**' if ratios[name] >= 1 else ratio} {name}, {time}"


def described(row: report.Row) -> str:
    """A workload with its operator, unless what it is names that."""
    what = row["what"].split(": ")[-1]
    operator = "" if row["operator"] in what else f"`{row['operator']}`, "
    return f"{row['workload']}: {operator}{what}"


def readme_table(results: report.Results) -> str:
    """A line for each workload and direction; first all those in which some peer is faster."""
    rows = [r for r in results["rows"] if r["ok"] and plain(r)]
    slower = {(r["workload"], r["direction"]) for r in rows if report.slower_than(r)}
    rows = [r for r in rows if in_readme(r) or (r["workload"], r["direction"]) in slower]
    settings = settings_of(rows)
    keys = dict.fromkeys((r["workload"], r["direction"]) for r in rows)
    found = {(r["workload"], r["direction"], report.column(r)): r for r in rows}
    names = {r["workload"]: described(r) for r in rows}
    versions, commit = results["versions"], results["commit"][:10]
    lines = [
        f"{results['machine']['processor']}, {results['machine']['cores']} cores, torch "
        f"{versions['torch']}, torchvision {versions['torchvision']}, {results['date'][:10]}, "
        f"commit {commit}. Cells: time of the fastest peer over ours, who that is, our time. Lines "
        "in which a peer is faster come first, whichever workloads they are of.",
        "",
        "| workload | direction | " + " | ".join(settings) + " |",
        "|---|---|" + "---|" * len(settings),
    ]
    for workload, direction in sorted(keys, key=lambda key: key not in slower):
        cells = [
            against_the_fastest(found[workload, direction, setting])
            if (workload, direction, setting) in found
            else "–"
            for setting in settings
        ]
        lines.append(f"| {names[workload]} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overhead_table() -> str:
    results = json.loads(newest("cpu-overhead").read_text())
    commit = results["commit"][:10]
    return (
        f"{results['machine']['processor']}, torch {results['versions']['torch']}, one thread, "
        f"{results['date'][:10]}, commit {commit}.\n\n{overhead.table(results['seconds']['cpu'])}\n"
    )


def blocks() -> dict[tuple[Path, str], str]:
    """What stands between the marks of each page."""
    results = report.load(newest("cpu"))
    page = ROOT / "docs" / "speed.md"
    return {
        (ROOT / "README.md", "speed"): readme_table(results),
        (page, "targets"): targets_table(),
        (page, "overhead"): overhead_table(),
        (page, "rows"): report.markdown(results),
    }


def replaced(text: str, name: str, block: str) -> str:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{block}{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    if not arguments.check and not arguments.update:
        for run in RUNS:
            for verdict in verdicts(run):
                if verdict.word != "hit":
                    why = WHY.get(key(run, verdict), "NOT EXPLAINED")
                    print(run, *verdict.cells(), why, sep=" | ")
        return 0
    wrong = list(problems())
    for (page, name), block in blocks().items():
        text = page.read_text()
        new = replaced(text, name, block)
        if arguments.update:
            page.write_text(new)
        elif new != text:
            wrong.append(f"{page.name}: {name} is not what the results say")
    if arguments.update:
        results = report.load(newest("cpu"))
        plot(brief(results), ROOT / "docs" / "speed.png")
        plot(results, ROOT / "docs" / "speed_all.png")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
