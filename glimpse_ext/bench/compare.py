# SPDX-License-Identifier: BSD-3-Clause
"""Two results of the same machine: which rows became slower, beyond what the noise explains.

A time alone says little on a shared machine. What is compared is the ratio to each peer that both
runs have, and to the floor where there is none: a row is worse if it fell against every one of
them, by more than the tolerance and by more than the spread between rounds of both runs.
"""

from dataclasses import dataclass

from .report import PACKAGES, Results, describe, row_key
from .suite import Row

TOLERANCE = 0.1


@dataclass(frozen=True)
class Change:
    """``factor`` is how many times faster the new run is; 0 where its numbers are wrong."""

    row: str
    factor: float
    against: str


@dataclass(frozen=True)
class Comparison:
    worse: list[Change]
    better: list[Change]
    missing: list[str]
    remarks: list[str]

    def __str__(self) -> str:
        lines = [f"remark: {remark}" for remark in self.remarks]
        lines += [f"not in the new results: {row}" for row in self.missing]
        for word, changes in (("better", self.better), ("WORSE", self.worse)):
            for change in sorted(changes, key=lambda c: c.factor, reverse=True):
                what = f"{change.factor:.2f} of the old speed, against {change.against}"
                lines.append(f"{word}: {change.row}: {what if change.factor else 'wrong numbers'}")
        lines.append(f"{len(self.worse)} worse, {len(self.better)} better")
        return "\n".join(lines)


Yardsticks = dict[str, tuple[float, float, float]]


def _yardsticks(row: Row) -> Yardsticks:
    """Speed relative to each peer and to the floor: low, median and high."""
    found: Yardsticks = {
        name: (peer["ratio"]["low"], peer["ratio"]["median"], peer["ratio"]["high"])
        for name, peer in row["peers"].items()
        if "ratio" in peer
    }
    for name, own in row["own"].items():
        found[name] = (1 / own["high"], 1 / own["median"], 1 / own["low"])
    low, high = row["seconds_spread"]
    floor = row["floor_seconds"]
    found["floor"] = (floor / high, floor / row["seconds"], floor / low)
    return found


def _compare_rows(label: str, old: Row, new: Row, tolerance: float) -> tuple[bool, Change] | None:
    """Whether it is worse, and how much; None for no change beyond noise."""
    before, after = _yardsticks(old), _yardsticks(new)
    names = [name for name in before if name in after and name != "floor"] or ["floor"]
    factors = {name: after[name][1] / before[name][1] for name in names}
    closest = min(names, key=lambda name: abs(factors[name] - 1))
    change = Change(label, factors[closest], closest)
    if all(after[n][2] < before[n][0] and factors[n] < 1 - tolerance for n in names):
        return True, change
    if all(after[n][0] > before[n][2] and factors[n] > 1 + tolerance for n in names):
        return False, change
    return None


def compare(old: Results, new: Results, tolerance: float = TOLERANCE) -> Comparison:
    """ValueError if the two are results of different workloads."""
    if old["quick"] != new["quick"]:
        raise ValueError("one of the results was made with --quick; their workloads differ")
    remarks = [
        f"{section} {name} differs: {one.get(name)} and {two.get(name)}"
        for section, names in (
            ("machine", ("processor", "cores", "gpu", "asked_for", "allocator")),
            ("versions", ("torch", *PACKAGES)),
        )
        for one, two in [(old[section], new[section])]
        for name in names
        if one.get(name) != two.get(name)
    ]
    result = Comparison([], [], [], remarks)
    now = {row_key(row): row for row in new["rows"]}
    for row in old["rows"]:
        label = describe(row)
        other = now.get(row_key(row))
        if other is None:
            result.missing.append(label)
        elif row["ok"] and not other["ok"]:
            result.worse.append(Change(label, 0.0, "the float64 result"))
        elif row["ok"]:
            found = _compare_rows(label, row, other, tolerance)
            if found is not None:
                (result.worse if found[0] else result.better).append(found[1])
    return result
