# SPDX-License-Identifier: BSD-3-Clause
"""What is aimed at, as data, and which rows of a result reach it.

A target is for one row: a peer's time over ours is at least ``least``, or our time over a yardstick
is at most ``most``. Figures for one instruction set or one way of allocating results say nothing
about a run with another; such a row is shown and is neither hit nor missed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .report import Results, format_ratio
from .suite import ALL_GRADIENTS, Comparison, Row

FLOOR, MEMORY = "floor", "extra bytes"
ANY_LAYOUT = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Target:
    workload: str
    direction: str
    versus: str
    """A peer, a yardstick of ours, the floor of the memory, or the extra bytes of a call."""
    least: float | None = None
    most: float | None = None
    layout: str = "contiguous"
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    launch: str = "eager"
    isa: str | None = None
    hint: bool | None = None
    """Whether large results are advised to huge pages or zeroed lazily; None: either way."""

    def fits(self, row: Row) -> bool:
        asked = ("workload", "direction", "layout", "dtype", "threads", "device", "launch")
        same = all(row[name] == getattr(self, name) for name in asked)
        return same and row["cache"] == ("cold" if self.device == "cuda" else "hot")

    def reached(self, row: Row) -> float | None:
        """None where the row does not say."""
        if not row["ok"]:
            return None
        if self.versus == FLOOR:
            return float(row["times_floor"])
        if self.versus == MEMORY:
            extra = row["peak_extra_bytes"]
            return None if extra is None else float(extra)
        if self.versus in row["own"]:
            return float(row["own"][self.versus]["median"])
        peer = row["peers"].get(self.versus, {})
        if "ratio" not in peer:
            return None
        ratio = float(peer["ratio"]["median"])
        return ratio if self.least is not None else 1 / ratio

    def holds(self, reached: float) -> bool:
        if self.least is not None:
            return reached >= self.least
        assert self.most is not None
        return reached <= self.most

    @property
    def wanted(self) -> str:
        if self.versus == MEMORY:
            return f"< {(self.most or 0) / 1e6:g} MB"
        return f"≥ {self.least:g}×" if self.least is not None else f"≤ {self.most:g}×"

    @property
    def conditions(self) -> str:
        hints = {None: "", True: "hint", False: "no hint"}
        return ", ".join(word for word in (self.isa or "", hints[self.hint]) if word)


def _both_layouts(targets: Sequence[Target]) -> list[Target]:
    return [replace(target, layout=layout) for target in targets for layout in ANY_LAYOUT]


def _cpu() -> Iterator[Target]:
    def torchvision(workload: str, direction: str, least: float, **rest: object) -> Target:
        target = Target(workload, direction, "torchvision", least, isa="avx512")
        return replace(target, **rest)  # type: ignore[arg-type]

    # One thread.
    yield torchvision("W1", "forward", 10)
    yield torchvision("W1", "forward", 14, layout="channels_last")
    yield torchvision("W1", "backward", 9)
    yield torchvision("W1", "backward", 12, hint=True)
    yield torchvision("W2a", "forward", 13)
    yield torchvision("W2a", "forward", 15, layout="channels_last")
    yield torchvision("W2a", "backward", 32)
    yield torchvision("W2b", "forward", 3.3)
    yield torchvision("W2b", "forward", 6, hint=True)
    yield torchvision("W2b", "backward", 34)
    yield torchvision("W3", "forward", 12)
    yield torchvision("W3", "backward", 37)
    yield torchvision("W4a", "forward", 5.3)
    yield torchvision("W4b", "forward", 6)
    yield torchvision("W4a", "backward", 8)
    yield torchvision("W4b", "backward", 8)
    yield Target("W5", "forward", "torchvision", most=0.8)
    yield Target("W5", "forward+backward", "torchvision", most=0.55)

    # Two threads.
    yield torchvision("W1", "forward", 18, threads=2)
    yield torchvision("W3", "forward", 22, threads=2)
    yield torchvision("W1", "backward", 14, threads=2)
    yield torchvision("W3", "backward", 65, threads=2)

    # 16 bits.
    for workload in ("W1", "W2a", "W3"):
        for dtype in ("float16", "bfloat16"):
            for direction in ("forward", "backward"):
                target = Target(workload, direction, "own float32", most=1, dtype=dtype)
                yield replace(target, layout="channels_last")
    yield torchvision("W1", "forward", 150, dtype="float16", layout="channels_last")

    # AVX2 only.
    for workload, backward in (("W1", 6), ("W2a", 13), ("W3", 13)):
        yield torchvision(workload, "forward", 5, isa="avx2")
        yield torchvision(workload, "backward", backward, isa="avx2")
    yield torchvision("W2b", "backward", 13, isa="avx2")

    # The other operators.
    yield Target("W1s", "forward", "grid_sample", 3, isa="avx512")
    yield Target("W1", "forward", "grid_sample", 12, isa="avx512")
    yield Target("W3", "forward", "grid_sample", 12, isa="avx512")
    yield Target("W1s", "forward+backward", "grid_sample", 3.3, isa="avx512")
    for workload in ("W1", "W2a", "W2b", "W3"):
        yield from _both_layouts([Target(workload, "box gradient", "own backward", most=1.8)])
    yield Target("W8a", "forward", "grid_sample", 2, isa="avx512")
    yield Target("W8b", "forward", "grid_sample", 2, isa="avx512")
    yield Target("W8a", ALL_GRADIENTS, "grid_sample", 2, isa="avx512")
    yield Target("W8b", ALL_GRADIENTS, "grid_sample", 3, isa="avx512")
    yield Target("W9", "forward", "grid_sample copies", 15, isa="avx512")
    for workload in ("W6a", "W6b"):
        # With or without a hint: masks leave most of the image to lazy zeros.
        yield Target(workload, "forward", "detectron2's way", 7, isa="avx512")
    # 80 % of the rate of a copy.
    yield Target("W7", "forward", "copy", most=1.25)


def _cuda() -> Iterator[Target]:
    w1 = Target("W1", "forward", "torchvision", 4, device="cuda", launch="graph")
    yield w1
    yield replace(w1, least=6, layout="channels_last")
    for dtype in ("float16", "bfloat16"):
        for layout in ANY_LAYOUT:
            sixteen = replace(w1, dtype=dtype, layout=layout, least=10)
            yield replace(sixteen, versus="torchvision float32")
    backward = replace(w1, direction="backward")
    yield from _both_layouts([backward])
    yield from _both_layouts([replace(backward, dtype="float16", least=10)])
    yield from _both_layouts([replace(backward, versus=MEMORY, least=None, most=1e6)])
    # It waits for the device, so it is compared as a user calls it.
    end_to_end = replace(w1, workload="W4a", launch="eager", least=6)
    yield from _both_layouts([end_to_end])
    yield replace(w1, workload="W2b", least=12)
    for workload in ("W6a", "W6b"):
        paste = replace(w1, workload=workload)
        yield replace(paste, versus="detectron2's way", least=15)
        yield replace(paste, versus=FLOOR, least=None, most=1.3)


TARGETS = (*_cpu(), *_cuda())

COMPARISONS = frozenset(
    Comparison(t.workload, t.versus, t.device, t.dtype, t.layout, t.threads) for t in TARGETS
)
"""What has to be timed to judge them, however slow the peer."""


def _instruction_set(results: Results) -> str:
    """The one that the kernels of the run used."""
    machine = results["machine"]
    if machine["asked_for"]:
        return str(machine["asked_for"])
    known = machine["instruction_sets"]
    if "avx512f" in known:
        return "avx512"
    return "avx2" if "avx2" in known else "baseline"


def _hinted(results: Results) -> bool:
    """Huge pages by a variable of this package or of glibc."""
    said = str(results["machine"]["allocator"]).lower()
    return "huge" in said or "lazy" in said


@dataclass(frozen=True)
class Verdict:
    target: Target
    reached: float | None
    word: str
    """hit, MISS, other (its conditions are not those of the run) or no row."""

    def cells(self) -> list[str]:
        target = self.target
        at = f"{target.dtype} {target.layout}"
        at += f", {target.threads} thread{'s' * (target.threads > 1)}" * (target.device == "cpu")
        at += f", {target.device} {target.launch}" * (target.device != "cpu")
        number = "–"
        if self.reached is not None:
            bytes_ = target.versus == MEMORY
            number = f"{self.reached / 1e6:.3g} MB" if bytes_ else format_ratio(self.reached)
        named = f"{target.versus}, {target.conditions}" if target.conditions else target.versus
        return [target.workload, target.direction, at, named, target.wanted, number, self.word]


def judge(results: Results, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Misses first, then what has no row, then the others; targets of other devices are left out.

    ValueError for results of ``--quick``, whose workloads are not those of the targets.
    """
    if results["quick"]:
        raise ValueError("these results were made with --quick; targets are for whole workloads")
    devices = {row["device"] for row in results["rows"]}
    isa, hinted = _instruction_set(results), _hinted(results)
    verdicts = []
    for target in targets:
        if target.device not in devices:
            continue
        row = next((row for row in results["rows"] if target.fits(row)), None)
        reached = None if row is None else target.reached(row)
        if reached is None:
            word = "no row"
        elif (target.isa or isa) != isa or (target.hint not in (None, hinted)):
            word = "other"
        else:
            word = "hit" if target.holds(reached) else "MISS"
        verdicts.append(Verdict(target, reached, word))
    order = ("MISS", "no row", "hit", "other")
    return sorted(verdicts, key=lambda verdict: order.index(verdict.word))


def markdown(results: Results) -> str:
    """Each target, what was reached, and whether that is a hit."""
    verdicts = judge(results)
    hinted = "with" if _hinted(results) else "without"
    counts = {w: sum(v.word == w for v in verdicts) for w in ("hit", "MISS", "no row", "other")}
    lines = [
        f"{results['machine'].get('gpu') or results['machine']['processor']}, "
        f"{_instruction_set(results)}, {hinted} a hint for large results. "
        f"{counts['hit']} hit, {counts['MISS']} missed, {counts['no row']} without a row, "
        f"{counts['other']} for other instruction sets or another hint.",
        "",
        "| workload | direction | at | against | target | reached | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(verdict.cells())} |" for verdict in verdicts]
    return "\n".join(lines) + "\n"
