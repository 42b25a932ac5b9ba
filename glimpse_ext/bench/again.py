# SPDX-License-Identifier: BSD-3-Clause
"""Rows whose rounds scatter, measured once more.

A round that something else on the machine disturbs scatters the times of one row; the rows beside
it are good. Rows are chosen by that alone, not by what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import report, workloads
from .suite import Part, Plan, Row

SCATTER = 1.5
"""Of the slowest usual round of ours over the fastest."""


def scatters(row: Row) -> bool:
    """Whether the times of our rounds differ by more than SCATTER."""
    if not row["ok"]:
        return False
    low, high = row["seconds_spread"]
    return bool(high > SCATTER * low)


def plan_of(rows: list[Row], plan: Plan) -> Plan:
    """A plan that has these rows, each with as many rounds as it may have, and others beside."""
    wanted: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        setting = row["workload"], row["device"], row["dtype"], row["layout"], row["threads"]
        wanted.setdefault(setting, []).append(row["direction"])
    parts = []
    for (work, device, dtype, layout, threads), directions in wanted.items():
        chosen = tuple(w for w in workloads.WORKLOADS if w.name == work)
        parts.append(
            Part(
                chosen, (device,), (dtype,), (layout,), (threads,), tuple(dict.fromkeys(directions))
            )
        )
    return replace(plan, parts=tuple(parts), minutes=None)


def measured_again(
    results: report.Results, plan: Plan, run: Callable[[Plan], report.Results]
) -> report.Results:
    """The results with such rows replaced; ``again`` says how many, when and of which commit.

    ValueError where the results are of another machine, other versions or small workloads.
    """
    here = report.environment()
    if results["quick"]:
        raise ValueError("only rows of a whole run are measured again")
    # What has been installed since was not there to be compared with.
    theirs = {name: version for name, version in results["versions"].items() if version}
    ours = {name: here["versions"].get(name) for name in theirs}
    for old, new in ((theirs, ours), (results["machine"], here["machine"])):
        if old != new:
            raise ValueError(f"the results are of {old}, here is {new}")
    rows = [row for row in results["rows"] if scatters(row)]
    if not rows:
        return results
    keys = {report.row_key(row) for row in rows}
    fresh = run(plan_of(rows, plan))
    found = {report.row_key(row): row for row in fresh["rows"]}
    replaced = [
        {**found[key], "call_seconds": row.get("call_seconds"), "again": True}
        if (key := report.row_key(row)) in keys & found.keys()
        else row
        for row in results["rows"]
    ]
    note = {
        "date": fresh["date"],
        "commit": fresh["commit"],
        "rows": len(keys & found.keys()),
        "scatter": SCATTER,
    }
    return {**results, "rows": replaced, "again": [*results.get("again", []), note]}
