# SPDX-License-Identifier: BSD-3-Clause
"""Runs workloads: makes inputs, checks every result, times what is right, gives rows of numbers."""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from . import timing
from .devices import Device, NotCaptured, make_device, place
from .memory import measured, peak_extra
from .peers import OPERATORS, Make, Operator, Peer, Pool
from .timing import Spread, interleave, ratios, summarise
from .workloads import LAYOUTS, Workload

Row = dict[str, Any]

OURS = "glimpse_ext"
BACKWARDS = ("backward", "forward+backward")
ALL_GRADIENTS = "forward+backward+boxes"
DIRECTIONS = ("forward", *BACKWARDS, ALL_GRADIENTS, "box gradient")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Largest accepted norm of the error over the norm of the float64 result. Positions are float32, so
# a sample may be off by 1e-5 pixels; a box gradient takes the slope there, and that may then be the
# slope on the other side of a pixel.
OUR_ERROR = {torch.float32: 5e-5, torch.float16: 4e-4, torch.bfloat16: 3.2e-3}
BOX_ERROR = 3e-2
# grid_sample takes its positions as numbers from -1 to 1. A peer beyond this is timed and marked.
PEER_ERROR = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
PEER_BOX_ERROR = 1e-1
# Of a mask's pixels those whose value is about the threshold may differ, one of some thousand.
PEER_MASK_ERROR = 2e-2
# In float64 this package and its reference differ by rounding only.
REFERENCE_ERROR = 1e-9
REFERENCE_BOXES = 48
# From a call of this length on, `_forecast` takes the time to be proportional to the boxes.
LONG_SECONDS = 1.0
REFERENCE_CHANNELS = 2
REFERENCE_MASKS = 5
# From one measurement of the rate of a copy to the next.
BANDWIDTH_SECONDS = 10.0
# A time is never shared out below this for each implementation of a row.
LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Part:
    """Every combination of these."""

    workloads: tuple[Workload, ...]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    threads: tuple[int, ...] = (1,)
    directions: tuple[str, ...] = DIRECTIONS


class Comparison(NamedTuple):
    """A peer in one setting."""

    workload: str
    peer: str
    device: str
    dtype: str
    layout: str
    threads: int


@dataclass(frozen=True)
class Plan:
    """What to run and how long."""

    parts: tuple[Part, ...]
    peers: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()  # workloads that are compared with compiled peers, too
    rounds: int = 9
    round_seconds: float = 0.03
    seconds: float = 4.0  # for each implementation of a row, see timing.interleave
    minutes: float | None = None  # for all rows together
    stops: bool = False  # after these minutes, with the rows that there are
    patience: float = 10.0  # a peer whose forward takes longer is left out
    needed: frozenset[Comparison] = frozenset()  # unless it is one of these
    compile_patience: float = 60.0

    def settings(self, devices: Mapping[str, Device]) -> Iterator[Setting]:
        first = next((layout for part in self.parts for layout in part.layouts), "")
        for part in self.parts:
            for device in part.devices:
                for work in part.workloads:
                    # A mask has one channel: one layout.
                    both = part.layouts
                    layouts = tuple(x for x in both if x == first) if work.mask else both
                    # Threads are of the CPU; the GPU has its own.
                    counts = part.threads if device == "cpu" else part.threads[:1]
                    wanted = OPERATORS[work.operator].directions(part.directions)
                    for dtype in part.dtypes:
                        for layout in layouts:
                            for threads in counts:
                                yield Setting(work, devices[device], dtype, layout, threads, wanted)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        return tuple(dict.fromkeys(work for part in self.parts for work in part.workloads))

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(device for part in self.parts for device in part.devices))


@dataclass(frozen=True)
class Setting:
    work: Workload
    device: Device
    dtype_name: str
    layout: str
    threads: int = 1
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.work.operator]

    @property
    def rows(self) -> int:
        return len(self.directions) * len(self.device.launches)

    def features(self, seed: int = 0) -> list[Tensor]:
        made = self.work.make_features(self.dtype, self.layout, seed)
        return [m.to(self.device.torch) for m in made]

    def boxes(self) -> Tensor:
        """The numbers that the operator takes."""
        placed = self.operator.place(self.work, self.work.make_boxes())
        return placed.to(self.device.torch)

    def __str__(self) -> str:
        return f"{self.work.name} {self.dtype_name} {self.layout} on {self.place}"

    @property
    def place(self) -> str:
        return place(self.device.name, self.threads)


class TooSlow(RuntimeError):
    """It took longer than it may."""


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """TooSlow after ``seconds``, between two steps of Python; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"{what} takes more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------ correct first


@dataclass(frozen=True)
class Expected:
    """The float64 result and its gradients, for an upstream gradient ``grad``."""

    pooled: Tensor
    grad: Tensor | None = None
    grad_features: list[Tensor] = field(default_factory=list)
    grad_boxes: Tensor | None = None

    def of(self, direction: str) -> list[Tensor]:
        """What a call of ``direction`` returns."""
        if direction == "forward":
            return [self.pooled]
        boxes = [] if self.grad_boxes is None else [self.grad_boxes]
        if direction == "box gradient":
            return boxes
        return self.grad_features + (boxes if direction == ALL_GRADIENTS else [])


def _with_gradients(
    make: Make, work: Workload, maps: Sequence[Tensor], boxes: Tensor, grad: Tensor | None = None
) -> Expected:
    """``grad`` is made where none is given."""
    wanted = OPERATORS[work.operator].gradients
    leaves = [m.detach().double().contiguous().requires_grad_() for m in maps]
    if "boxes" in wanted:
        boxes = boxes.detach().clone().requires_grad_()
    pooled = make(work, boxes, torch.float64)(leaves)
    if grad is None:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(pooled.shape, generator=generator)
    asked = [*leaves, boxes] if "boxes" in wanted else leaves
    found = torch.autograd.grad(pooled, asked, grad.to(pooled), allow_unused=True)
    known = [
        g if g is not None else torch.zeros_like(m) for g, m in zip(found, leaves, strict=False)
    ]
    grad_boxes = found[-1] if "boxes" in wanted else None
    return Expected(pooled.detach(), grad, known, grad_boxes)


def relative_error(values: Sequence[Tensor | None], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected; infinite if shapes differ."""
    difference = norm = 0.0
    for value, right in zip(values, expected, strict=True):
        if value is not None and value.shape != right.shape:
            return math.inf
        if right.dtype == torch.bool:
            # Numbers of a whole image for each mask would take longer than pasting them.
            wrong = right if value is None else value != right
            difference += int(torch.count_nonzero(wrong))
            norm += int(torch.count_nonzero(right))
            continue
        gap = right if value is None else value.detach().to(right) - right
        difference += float(gap.square().sum())
        norm += float(right.square().sum())
    if math.isnan(difference):
        return math.inf
    return math.sqrt(difference / norm) if norm > 0 else math.sqrt(difference)


@dataclass(frozen=True)
class Errors:
    """Of what a call returns; boxes are apart because their limit is."""

    maps: float
    boxes: float

    @classmethod
    def of(cls, values: Sequence[Tensor | None], right: Sequence[Tensor], direction: str) -> Errors:
        split = {"box gradient": 0, ALL_GRADIENTS: len(right) - 1}.get(direction, len(right))
        return cls(
            relative_error(values[:split], right[:split]),
            relative_error(values[split:], right[split:]),
        )

    @property
    def largest(self) -> float:
        return max(self.maps, self.boxes)

    def within(self, maps: float, boxes: float) -> bool:
        return self.maps <= maps and self.boxes <= boxes


def _some(setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> tuple[list[Tensor], Tensor]:
    """A part that the reference is fast enough for: some rows of two channels."""
    work, operator = setting.work, setting.operator
    most = REFERENCE_MASKS if work.mask else REFERENCE_BOXES
    count = boxes.shape[operator.rows]
    index = torch.arange(0, count, max(1, count // most), device=boxes.device)
    thin = [m[:, :: max(1, work.channels - 1)][:, :REFERENCE_CHANNELS] for m in maps]
    if operator.paired:
        thin = [m[index] for m in thin]
    return thin, boxes.index_select(operator.rows, index)


def expected_result(setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> Expected:
    """Our float64 result; a part of it is compared with the reference, which would take minutes."""
    work, operator = setting.work, setting.operator
    thin, few = _some(setting, maps, boxes)
    if not operator.gradients:
        own = operator.ours(work, few, setting.dtype)(thin)
        right = operator.reference(work, few, setting.dtype)(thin)
        _compare_with_reference(setting, "forward", [own], [right], operator.error or 0)
        return Expected(operator.ours(work, boxes, setting.dtype)(maps))
    ours = _with_gradients(operator.ours, work, thin, few.double())
    known = _with_gradients(operator.reference, work, thin, few.double(), ours.grad)
    for direction in operator.directions(DIRECTIONS):
        _compare_with_reference(
            setting, direction, ours.of(direction), known.of(direction), REFERENCE_ERROR
        )
    return _with_gradients(operator.ours, work, maps, boxes)


def _compare_with_reference(
    setting: Setting,
    direction: str,
    ours: Sequence[Tensor],
    right: Sequence[Tensor],
    limit: float,
) -> None:
    error = relative_error(ours, right)
    if not error <= limit:
        raise RuntimeError(
            f"bench: {setting} {direction} differs from the reference by {error:.1e}"
        )


# ----------------------------------------------------------------------------------- what is timed


def make_call(
    direction: str, make: Make, setting: Setting, maps: Sequence[Tensor], boxes: Tensor, up: Tensor
) -> Callable[[], list[Tensor | None]]:
    """One call of ``direction``. It returns what it computed, as a list."""
    if direction in ("box gradient", ALL_GRADIENTS):
        boxes = boxes.detach().clone().requires_grad_()
    pool: Pool = make(setting.work, boxes, setting.dtype)
    if direction == "forward":

        def forward() -> list[Tensor | None]:
            with torch.no_grad():
                return [pool(maps)]

        return forward

    leaves = list(maps)
    wanted = [boxes]
    if direction != "box gradient":
        leaves = [m.detach().requires_grad_() for m in maps]
        wanted = [*leaves, boxes] if direction == ALL_GRADIENTS else leaves
    pooled = pool(leaves)
    # A gradient comes back in the layout of the result, and is what every call is given.
    grad = torch.empty_like(pooled).copy_(up).detach()
    if direction in ("forward+backward", ALL_GRADIENTS):
        del pooled

        def both() -> list[Tensor | None]:
            return list(torch.autograd.grad(pool(leaves), wanted, grad, allow_unused=True))

        return both

    def backward() -> list[Tensor | None]:
        found = torch.autograd.grad(pooled, wanted, grad, retain_graph=True, allow_unused=True)
        return list(found)

    return backward


def touched_pixels(setting: Setting, boxes: Tensor) -> int:
    """Pixels of all maps and images that some box reads."""
    work = setting.work
    if not setting.operator.gradients:
        return 0
    shapes = [(work.batch, 1, *size) for size in work.sizes]
    leaves = [torch.zeros(s, device=boxes.device, requires_grad=True) for s in shapes]
    pooled = setting.operator.ours(work, boxes, torch.float32)(leaves)
    grads = torch.autograd.grad(pooled, leaves, torch.ones_like(pooled))
    return sum(int(torch.count_nonzero(g)) for g in grads)


def floor_bytes(
    setting: Setting, touched: int, maps: Sequence[Tensor], pooled: int
) -> dict[str, int]:
    """Unique bytes that must be read and written; ``pooled`` are those of the result."""
    gradient = sum(m.nbytes for m in maps)
    read = touched * setting.work.channels * maps[0].element_size()
    if not setting.operator.gradients:
        return {"forward": gradient + pooled}
    return {
        "forward": read + pooled,
        "backward": pooled + gradient,
        "forward+backward": read + pooled + pooled + gradient,
        ALL_GRADIENTS: read + pooled + read + pooled + gradient,
        "box gradient": read + pooled,
    }


def _forecast(make: Make, setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> float:
    """Seconds of a forward with all boxes, by ever more of them until it takes a while."""
    rows = setting.operator.rows
    whole = boxes.shape[rows]
    count = whole if setting.work.whole else min(4, whole)
    while True:
        index = torch.linspace(0, whole - 1, count).long().to(boxes.device)
        pool = make(setting.work, boxes.index_select(rows, index), setting.dtype)
        with torch.no_grad():
            setting.device.synchronize()
            start = timer()
            pool(maps)
            setting.device.synchronize()
            seconds = float(timer() - start)
        # What does not grow with the boxes counts for little in a call as long as this.
        if seconds > LONG_SECONDS or count == whole:
            return seconds * whole / count
        count = min(4 * count, whole)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _no_gradient(values: Sequence[Tensor | None], right: Sequence[Tensor]) -> bool:
    """Whether something that is wanted was not computed."""
    return any(
        value is None and bool(known.any()) for value, known in zip(values, right, strict=True)
    )


@dataclass(frozen=True)
class Candidate:
    """Somebody who can do the row: us, or a peer."""

    make: Make
    peer: Peer | None = None

    @property
    def convention(self) -> Make | None:
        return None if self.peer is None else self.peer.convention

    def does(self, direction: str) -> bool:
        if self.peer is None:
            return True
        if self.peer.compiled:
            # The others would need further compilations.
            return direction in ("forward", "forward+backward")
        return direction != "box gradient"


@dataclass(frozen=True)
class FirstCall:
    """What is known before the time is taken."""

    seconds: float
    extra: int | None
    errors: Errors


Sets = Sequence[Sequence[Tensor]]


class Runner:
    """Rows of a plan, one setting after the other."""

    def __init__(self, plan: Plan, devices: Mapping[str, Device] | None = None) -> None:
        self.plan = plan
        self.devices = devices or {name: make_device(name) for name in plan.devices}
        self.steps = sum(setting.rows for setting in plan.settings(self.devices))
        self._left = self.steps
        self.unfinished: list[str] = []
        self._start = timer()
        self._rates: dict[str, list[float]] = {}
        self._rated: dict[str, float] = {}
        self._expected: dict[tuple[str, str, str], Expected] = {}

    def run(self, progress: Callable[[Row], None]) -> list[Row]:
        """All rows; ``progress`` is called after each."""
        rows = []
        before = torch.get_num_threads()
        self._start = timer()
        try:
            for setting in self.plan.settings(self.devices):
                if self.plan.stops and self._minutes_left <= 0:
                    self.unfinished.append(str(setting))
                    continue
                torch.set_num_threads(setting.threads)
                with setting.device.scope():
                    for row in self._setting(setting):
                        rows.append(row)
                        self._left -= 1
                        progress(row)
        finally:
            torch.set_num_threads(before)
        self._complete(rows)
        return rows

    def _complete(self, rows: Sequence[Row]) -> None:
        """What only the whole run knows: the rate of a copy, and what a call costs."""
        calls = {_same_call(row): row["seconds"] for row in rows if row["ok"] and row["overhead"]}
        for row in rows:
            rate = self.bandwidths[place(row["device"], row["threads"])]
            row["floor_seconds"] = row["floor_bytes"] / rate
            if row["ok"]:
                row["times_floor"] = row["seconds"] / row["floor_seconds"]
                row["call_seconds"] = calls.get(_same_call(row))

    @property
    def _minutes_left(self) -> float:
        if self.plan.minutes is None:
            return math.inf
        return self.plan.minutes - float(timer() - self._start) / 60

    @property
    def bandwidths(self) -> dict[str, float]:
        """Bytes per second of a copy by device and threads: medians over the run, as times are."""
        return {key: statistics.median(rates) for key, rates in self._rates.items()}

    def _measure_bandwidth(self, setting: Setting) -> None:
        """Again and again, because neighbours change it, but not for every setting."""
        now = float(timer())
        if now - self._rated.get(setting.place, -math.inf) < BANDWIDTH_SECONDS:
            return
        self._rated[setting.place] = now
        size = timing.COPY_BYTES * (16 if setting.device.torch.type == "cuda" else 1)
        rate = timing.copy_bandwidth(setting.device, setting.threads, size)
        self._rates.setdefault(setting.place, []).append(rate)

    def _seconds(self, implementations: int) -> float:
        """For each implementation of the next row, so that the rows that are left fit."""
        # Half of a row goes into inputs, checks, first calls and memory.
        share = 60 * self._minutes_left / max(self._left, 1) / 2 / implementations
        return min(self.plan.seconds, max(LEAST_SECONDS, share))

    def _setting(self, setting: Setting) -> Iterator[Row]:
        self._measure_bandwidth(setting)
        work, device = setting.work, setting.device
        boxes = setting.boxes()
        first = setting.features()
        count = device.sets(sum(m.nbytes for m in first))
        sets = [first, *(setting.features(seed) for seed in range(1, count))]
        key = (work.name, setting.dtype_name, device.name)
        if key not in self._expected:
            self._expected = {key: expected_result(setting, first, boxes)}
        expected = self._expected[key]
        with torch.no_grad():
            pooled = setting.operator.ours(work, boxes, setting.dtype)(first).nbytes
        floors = floor_bytes(setting, touched_pixels(setting, boxes), first, pooled)
        candidates, left_out = self._candidates(setting, first, boxes)
        for direction in setting.directions:
            for row in self._measure(setting, direction, candidates, sets, boxes, expected):
                yield {
                    "workload": work.name,
                    "what": work.what,
                    "operator": work.operator,
                    "overhead": work.overhead,
                    "direction": direction,
                    "dtype": setting.dtype_name,
                    "layout": setting.layout,
                    "device": device.name,
                    "threads": setting.threads,
                    **row,
                    "floor_bytes": floors[direction],
                    "peers": row["peers"] | (left_out if direction != "box gradient" else {}),
                }
        if any(c.peer is not None and c.peer.compiled for c in candidates.values()):
            torch.compiler.reset()

    def _candidates(
        self, setting: Setting, maps: Sequence[Tensor], boxes: Tensor
    ) -> tuple[dict[str, Candidate], dict[str, Row]]:
        """Ours first, then the peers that can run; and why the others cannot."""
        candidates, left_out = {OURS: Candidate(setting.operator.ours)}, {}
        for peer in setting.operator.peers:
            if peer.name not in self.plan.peers or not peer.runs(setting.dtype):
                continue
            if peer.compiled and not self._compiles(setting):
                continue
            try:
                if peer.compiled:
                    self._compile(peer, setting, maps, boxes)
                else:
                    seconds = _forecast(peer.make, setting, maps, boxes)
                    if seconds > self.plan.patience and not self._needs(peer, setting):
                        raise TooSlow(f"a forward takes about {seconds:.0f} s")
            except (RuntimeError, NotImplementedError, ImportError) as error:
                left_out[peer.name] = {"left_out": _first_line(error)}
                continue
            candidates[peer.name] = Candidate(peer.make, peer)
        return candidates, left_out

    def _needs(self, peer: Peer, setting: Setting) -> bool:
        work, device = setting.work.name, setting.device.name
        dtype, layout, threads = setting.dtype_name, setting.layout, setting.threads
        return Comparison(work, peer.name, device, dtype, layout, threads) in self.plan.needed

    def _compiles(self, setting: Setting) -> bool:
        """Compilations take a minute, so they are not made for each layout and thread number."""
        first = next(
            s for s in self.plan.settings(self.devices) if s.work.name == setting.work.name
        )
        return setting.work.name in self.plan.compiled and str(first) == str(setting)

    def _compile(self, peer: Peer, setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> None:
        pool = peer.make(setting.work, boxes, setting.dtype)
        try:
            with deadline(self.plan.compile_patience, "compiling"), torch.no_grad():
                pool(maps)
        except Exception as error:
            torch.compiler.reset()
            raise TooSlow(_first_line(error)) from error

    def _measure(
        self,
        setting: Setting,
        direction: str,
        candidates: Mapping[str, Candidate],
        sets: Sets,
        boxes: Tensor,
        expected: Expected,
    ) -> Iterator[Row]:
        """A row for each way to launch."""
        right = expected.of(direction)
        grad = boxes if expected.grad is None else expected.grad.to(setting.dtype).to(boxes.device)
        calls: dict[str, list[Callable[[], list[Tensor | None]]]] = {}
        firsts: dict[str, FirstCall] = {}
        failed: dict[str, Row] = {}

        def make(make: Make, maps: Sets, kind: str) -> list[Callable[[], list[Tensor | None]]]:
            return [make_call(kind, make, setting, m, boxes, grad) for m in maps]

        for name, candidate in candidates.items():
            if not candidate.does(direction):
                continue
            try:
                with self._first_calls(name):
                    own = make(candidate.make, sets, direction)
                    start = timer()
                    values, extra = measured(own[0], setting.device.torch)
                    seconds = float(timer() - start)
                if candidate.convention is not None:
                    with torch.no_grad():
                        other = candidate.convention(setting.work, boxes, setting.dtype)(sets[0])
                    errors = Errors.of(values, [other], direction)
                elif _no_gradient(values, right) and name != OURS:
                    raise NotImplementedError("it has no gradient to the boxes")
                else:
                    errors = Errors.of(values, right, direction)
                del values
                for call in own[1:]:
                    call()
            except (RuntimeError, NotImplementedError) as error:
                if name == OURS:
                    raise
                failed[name] = {"left_out": _first_line(error)}
                continue
            if seconds < timing.LONG_SECONDS:
                # Something may have been made at the first call that stays.
                extra = peak_extra(own[0], setting.device.torch)
            calls[name] = own
            firsts[name] = FirstCall(seconds, extra, errors)
        good = firsts[OURS].errors.within(*self._limits(setting, direction))
        base: Row = {"ok": good, "error": firsts[OURS].errors.largest}
        if good:
            yardsticks = self._yardsticks(setting, direction, sets, boxes, expected)
        for launch, cache in setting.device.launches:
            row: Row = {"launch": launch, "cache": cache, **base, "peers": dict(failed)}
            if not good:
                yield row
                continue
            used = {n: c if cache == "cold" else c[:1] for n, c in (calls | yardsticks).items()}
            row |= self._time(setting, launch, used, firsts, row["peers"])
            row["peak_extra_bytes"] = firsts[OURS].extra
            for name, peer in row["peers"].items():
                if "ratio" in peer:
                    first = firsts[name]
                    limit = PEER_MASK_ERROR if setting.work.mask else PEER_ERROR[setting.dtype]
                    peer["error"] = first.errors.largest
                    peer["accurate"] = first.errors.within(limit, PEER_BOX_ERROR)
                    peer["peak_extra_bytes"] = first.extra
            yield row

    def _first_calls(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if name == OURS else deadline(self.plan.compile_patience, "a call")

    @staticmethod
    def _limits(setting: Setting, direction: str) -> tuple[float, float]:
        """Of the errors of maps and boxes."""
        operator = setting.operator
        limit = operator.error if direction == "forward" else operator.gradient_error
        if limit is None:
            limit = operator.error if operator.error is not None else OUR_ERROR[setting.dtype]
        return limit, max(BOX_ERROR, operator.gradient_error or 0)

    def _yardsticks(
        self, setting: Setting, direction: str, sets: Sets, boxes: Tensor, expected: Expected
    ) -> dict[str, list[Callable[[], list[Tensor | None]]]]:
        """What a row of ours is compared with beside the peers."""
        ours, grad = setting.operator.ours, expected.grad
        if direction == "box gradient":
            # What it costs beside our own gradient to the maps, which the same tables give.
            assert grad is not None
            grad = grad.to(setting.dtype).to(boxes.device)
            return {
                "own backward": [make_call("backward", ours, setting, m, boxes, grad) for m in sets]
            }
        if direction == "forward" and setting.operator.copies:
            pooled = ours(setting.work, boxes, setting.dtype)(sets[0])
            return {"copy": [lambda: [pooled.clone()]] * len(sets)}
        if setting.dtype != torch.float32 and direction in ("forward", "backward"):
            wide = Setting(setting.work, setting.device, "float32", setting.layout, setting.threads)
            up = boxes if grad is None else grad.to(boxes.device)
            return {
                "own float32": [
                    make_call(direction, ours, wide, [m.float() for m in maps], boxes, up)
                    for maps in sets
                ]
            }
        return {}

    def _time(
        self,
        setting: Setting,
        launch: str,
        calls: Mapping[str, Sequence[Callable[[], list[Tensor | None]]]],
        firsts: Mapping[str, FirstCall],
        peers: dict[str, Row],
    ) -> Row:
        """Times of ours; those of the peers are put into ``peers``."""
        watches = {}
        for name, own in calls.items():
            try:
                first = firsts[name].seconds if name in firsts else 0.0
                watches[name] = setting.device.watch(
                    own, launch, setting.threads, self.plan.round_seconds, first
                )
            except NotCaptured as error:
                if name == OURS:
                    raise
                peers[name] = {"left_out": str(error)}
        times = interleave(watches, self.plan.rounds, self._seconds(len(watches)))
        row: Row = {**_seconds(times[OURS]), "own": {}}
        on_device = getattr(watches[OURS], "device_seconds", None)
        if on_device:
            row["device_seconds"] = statistics.median(on_device)
        for name in times:
            if name == OURS:
                continue
            if name in YARDSTICKS:
                row["own"][name] = asdict(summarise(ratios(times[OURS], times[name])))
                continue
            ratio: Spread = summarise(ratios(times[name], times[OURS]))
            peers[name] = {**_seconds(times[name]), "ratio": asdict(ratio)}
        return row


YARDSTICKS = {
    "own backward": "our gradient to the maps",
    "own float32": "the same on float32 maps",
    "copy": "a copy of as many bytes",
}


def _same_call(row: Row) -> tuple[Any, ...]:
    names = ("operator", "direction", "dtype", "layout", "device", "threads", "launch", "cache")
    return tuple(row[name] for name in names)


def _seconds(times: Sequence[float]) -> Row:
    spread = summarise(times)
    rounds = sum(not math.isnan(t) for t in times)
    return {"seconds": spread.median, "seconds_spread": [spread.low, spread.high], "rounds": rounds}
