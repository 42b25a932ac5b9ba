# SPDX-License-Identifier: BSD-3-Clause
"""Runs workloads: makes inputs, checks every result, times what is right, gives rows of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from . import timing
from .memory import peak_extra
from .peers import OPERATORS, Make, Pool
from .timing import Call, Stopwatch, interleave, ratios, rotate, summarise
from .workloads import LAYOUTS, Workload

Row = dict[str, Any]

OURS = "glimpse_ext"
DIRECTIONS = ("forward", "backward", "forward+backward", "box gradient")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Largest accepted norm of the error over the norm of the float64 result. Positions are float32, so
# a sample may be off by 1e-5 pixels; a box gradient takes the slope there, and that may then be the
# slope on the other side of a pixel.
OUR_ERROR = {torch.float32: 5e-5, torch.float16: 4e-4, torch.bfloat16: 3.2e-3}
BOX_ERROR = 3e-2
# grid_sample takes its positions as numbers from -1 to 1. A peer beyond this is timed and marked.
PEER_ERROR = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# In float64 this package and its reference differ by rounding only.
REFERENCE_ERROR = 1e-9
REFERENCE_BOXES = 48
# From a call of this length on, `_forecast` takes the time to be proportional to the boxes.
LONG_SECONDS = 1.0
REFERENCE_CHANNELS = 2
REFERENCE_MASKS = 5


@dataclass(frozen=True)
class Plan:
    """What to run and how long."""

    workloads: tuple[Workload, ...]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    threads: tuple[int, ...] = (1,)
    directions: tuple[str, ...] = DIRECTIONS
    peers: tuple[str, ...] = ()
    rounds: int = 9
    round_seconds: float = 0.03
    seconds: float = 4.0  # for each implementation of a row, see timing.interleave
    patience: float = 10.0  # a peer whose forward takes longer is left out

    def settings(self) -> Iterator[Setting]:
        for device in self.devices:
            for workload in self.workloads:
                for dtype in self.dtypes:
                    for layout in self.layouts:
                        # Threads are of the CPU; the GPU has its own.
                        for threads in self.threads if device == "cpu" else self.threads[:1]:
                            yield Setting(workload, torch.device(device), dtype, layout, threads)

    def directions_of(self, workload: Workload) -> tuple[str, ...]:
        if OPERATORS[workload.operator].differentiable:
            return self.directions
        return tuple(d for d in self.directions if d == "forward")

    @property
    def steps(self) -> int:
        return sum(len(self.directions_of(setting.work)) for setting in self.settings())


@dataclass(frozen=True)
class Setting:
    work: Workload
    device: torch.device
    dtype_name: str
    layout: str
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def features(self, seed: int = 0) -> list[Tensor]:
        made = self.work.make_features(self.dtype, self.layout, seed)
        return [m.to(self.device) for m in made]

    def __str__(self) -> str:
        return f"{self.work.name} {self.dtype_name} {self.layout} on {self.place}"

    @property
    def place(self) -> str:
        return place(self.device.type, self.threads)


def place(device: str, threads: int) -> str:
    """The device in words; threads are of the CPU."""
    if device != "cpu":
        return device
    return "1 thread" if threads == 1 else f"{threads} threads"


# ------------------------------------------------------------------------------------ correct first


@dataclass(frozen=True)
class Expected:
    """The float64 result and its gradients, for an upstream gradient ``grad``."""

    pooled: Tensor
    grad: Tensor
    grad_features: list[Tensor]
    grad_boxes: Tensor

    def of(self, direction: str) -> list[Tensor]:
        if direction == "forward":
            return [self.pooled]
        return [self.grad_boxes] if direction == "box gradient" else self.grad_features


def _with_gradients(
    make: Make, work: Workload, maps: Sequence[Tensor], boxes: Tensor, grad: Tensor
) -> Expected:
    leaves = [m.detach().double().contiguous().requires_grad_() for m in maps]
    boxes = boxes.detach().clone().requires_grad_()
    pooled = make(work, boxes, torch.float64)(leaves)
    found = torch.autograd.grad(pooled, [*leaves, boxes], grad.to(pooled), allow_unused=True)
    known = [
        g if g is not None else torch.zeros_like(m) for g, m in zip(found, leaves, strict=False)
    ]
    assert found[-1] is not None
    return Expected(pooled.detach(), grad, known, found[-1])


def relative_error(values: Sequence[Tensor | None], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected; infinite if shapes differ."""
    difference = norm = 0.0
    for value, right in zip(values, expected, strict=True):
        if value is not None and value.shape != right.shape:
            return math.inf
        gap = right if value is None else value.detach().to(right) - right
        difference += float(gap.square().sum())
        norm += float(right.square().sum())
    if math.isnan(difference):
        return math.inf
    return math.sqrt(difference / norm) if norm > 0 else math.sqrt(difference)


def _expected_value(setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> Expected:
    """As expected_result where there is a value only, whose limit is that of the operator."""
    work, operator = setting.work, OPERATORS[setting.work.operator]
    # Masks have a row of their own for each box, so some of them are enough.
    step = max(1, len(boxes) // REFERENCE_MASKS) if work.mask else 1
    few, thin = boxes[::step], [m[::step] if work.mask else m for m in maps]
    own = operator.ours(work, few, setting.dtype)(thin)
    error = relative_error([own], [operator.reference(work, few, setting.dtype)(thin).double()])
    if not error <= (operator.error or 0):
        raise RuntimeError(f"bench: {setting} forward differs from the reference by {error:.1e}")
    pooled = operator.ours(work, boxes, setting.dtype)(maps)
    return Expected(pooled.double(), boxes.new_empty(0), [], boxes.new_empty(0))


def expected_result(setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> Expected:
    """Our float64 result; a part of it is compared with the reference, which would take minutes."""
    work, operator = setting.work, OPERATORS[setting.work.operator]
    if not operator.differentiable:
        return _expected_value(setting, maps, boxes)
    few = boxes[:: max(1, len(boxes) // REFERENCE_BOXES)]
    thin = [m[:, :: max(1, work.channels - 1)][:, :REFERENCE_CHANNELS] for m in maps]
    generator = torch.Generator().manual_seed(7)
    size = (work.output_size, work.output_size)
    grad = torch.randn(len(few), thin[0].shape[1], *size, generator=generator).to(boxes.device)
    ours = _with_gradients(operator.ours, work, thin, few.double(), grad)
    right = _with_gradients(operator.reference, work, thin, few.double(), grad)
    for direction in DIRECTIONS:
        error = relative_error(ours.of(direction), right.of(direction))
        if not error <= REFERENCE_ERROR:
            raise RuntimeError(
                f"bench: {setting} {direction} differs from the reference by {error:.1e}"
            )
    grad = torch.randn(len(boxes), work.channels, *size, generator=generator)
    return _with_gradients(
        operator.ours, work, maps, boxes, grad.to(setting.dtype).to(boxes.device)
    )


# ----------------------------------------------------------------------------------- what is timed


def make_call(
    direction: str, make: Make, setting: Setting, maps: Sequence[Tensor], boxes: Tensor, up: Tensor
) -> Callable[[], list[Tensor | None]]:
    """One call of ``direction``. It returns what it computed, as a list."""
    if direction == "box gradient":
        boxes = boxes.detach().clone().requires_grad_()
    pool: Pool = make(setting.work, boxes, setting.dtype)
    if direction == "forward":

        def forward() -> list[Tensor | None]:
            with torch.no_grad():
                return [pool(maps)]

        return forward

    wanted = [boxes]
    leaves = list(maps)
    if direction != "box gradient":
        leaves = [m.detach().requires_grad_() for m in maps]
        wanted = leaves
    pooled = pool(leaves)
    # A gradient comes back in the layout of the result.
    grad = torch.empty_like(pooled).copy_(up).detach()
    if direction == "forward+backward":

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
    if not OPERATORS[work.operator].differentiable:
        return 0
    shapes = [(work.batch, 1, *size) for size in work.sizes]
    leaves = [torch.zeros(s, device=setting.device, requires_grad=True) for s in shapes]
    pooled = OPERATORS[work.operator].ours(work, boxes, torch.float32)(leaves)
    grads = torch.autograd.grad(pooled, leaves, torch.ones_like(pooled))
    return sum(int(torch.count_nonzero(g)) for g in grads)


def floor_bytes(setting: Setting, touched: int, maps: Sequence[Tensor]) -> dict[str, int]:
    """Unique bytes that must be read and written."""
    work, size = setting.work, maps[0].element_size()
    if work.mask:
        return {"forward": maps[0].nbytes + work.boxes * work.image[0] * work.image[1]}
    if not OPERATORS[work.operator].differentiable:
        return {"forward": 2 * work.boxes * work.channels * work.output_size**2 * size}
    read = touched * work.channels * size
    pooled = work.boxes * work.channels * work.output_size**2 * size
    gradient = sum(m.nbytes for m in maps)
    return {
        "forward": read + pooled,
        "backward": pooled + gradient,
        "forward+backward": read + pooled + pooled + gradient,
        "box gradient": read + pooled,
    }


def _forecast(make: Make, setting: Setting, maps: Sequence[Tensor], boxes: Tensor) -> float:
    """Seconds of a forward with all boxes, by ever more of them until it takes a while."""
    seconds, count = 0.0, min(4, len(boxes))
    if setting.work.batch == len(boxes) or setting.work.mask:
        count = len(boxes)  # each image or mask has its box
    while True:
        few = boxes[torch.linspace(0, len(boxes) - 1, count).long().to(boxes.device)]
        pool = make(setting.work, few, setting.dtype)
        with torch.no_grad():
            start = timer()
            pool(maps)
            seconds = float(timer() - start)
        # What does not grow with the boxes counts for little in a call as long as this.
        if seconds > LONG_SECONDS or count == len(boxes):
            return seconds * len(boxes) / count
        count = min(4 * count, len(boxes))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Runner:
    """Rows of a plan, one setting after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._rates: dict[str, list[float]] = {}
        self._expected: dict[tuple[str, str, str], Expected] = {}

    def _rows(self) -> Iterator[Row]:
        before = torch.get_num_threads()
        try:
            for setting in self.plan.settings():
                torch.set_num_threads(setting.threads)
                yield from self._setting(setting)
        finally:
            torch.set_num_threads(before)

    def run(self, progress: Callable[[Row], None]) -> list[Row]:
        """All rows; ``progress`` is called after each."""
        rows = []
        for row in self._rows():
            rows.append(row)
            progress(row)
        for row in rows:
            rate = self.bandwidths[place(row["device"], row["threads"])]
            row["floor_seconds"] = row["floor_bytes"] / rate
            if row["ok"]:
                row["times_floor"] = row["seconds"] / row["floor_seconds"]
        return rows

    @property
    def bandwidths(self) -> dict[str, float]:
        """Bytes per second of a copy by device and threads: medians over the run, as times are."""
        return {key: statistics.median(rates) for key, rates in self._rates.items()}

    def _measure_bandwidth(self, setting: Setting) -> None:
        size = timing.COPY_BYTES * (16 if setting.device.type == "cuda" else 1)
        rate = timing.copy_bandwidth(setting.device, setting.threads, size)
        self._rates.setdefault(setting.place, []).append(rate)

    def _setting(self, setting: Setting) -> Iterator[Row]:
        self._measure_bandwidth(setting)
        work = setting.work
        boxes = work.make_boxes().to(setting.device)
        sets = [setting.features(seed) for seed in range(self._buffers(setting))]
        key = (work.name, setting.dtype_name, setting.device.type)
        if key not in self._expected:
            self._expected = {key: expected_result(setting, sets[0], boxes)}
        expected = self._expected[key]
        floors = floor_bytes(setting, touched_pixels(setting, boxes), sets[0])
        makes, left_out = self._implementations(setting, sets[0], boxes)
        for direction in self.plan.directions_of(work):
            row: Row = {
                "workload": work.name,
                "what": work.what,
                "direction": direction,
                "dtype": setting.dtype_name,
                "layout": setting.layout,
                "device": setting.device.type,
                "threads": setting.threads,
            }
            of_row = {OURS: makes[OURS]} if direction == "box gradient" else makes
            row |= self._measure(setting, direction, of_row, sets, boxes, expected)
            row["floor_bytes"] = floors[direction]
            if direction != "box gradient":
                row["peers"] |= left_out
            yield row

    def _buffers(self, setting: Setting) -> int:
        """Sets of features: on CUDA enough of them that none stays in the L2 cache."""
        if setting.device.type != "cuda":
            return 1
        cache = getattr(torch.cuda.get_device_properties(setting.device), "L2_cache_size", 2**26)
        one = sum(setting.work.batch * setting.work.channels * h * w for h, w in setting.work.sizes)
        return max(2, min(8, math.ceil(2 * cache / (one * setting.dtype.itemsize)) + 1))

    def _implementations(
        self, setting: Setting, maps: Sequence[Tensor], boxes: Tensor
    ) -> tuple[dict[str, Make], dict[str, Row]]:
        """Ours first, then the peers that can run; and why the others cannot."""
        operator = OPERATORS[setting.work.operator]
        makes, left_out = {OURS: operator.ours}, {}
        for peer in operator.peers:
            if peer.name not in self.plan.peers or not peer.runs(setting.dtype):
                continue
            try:
                seconds = _forecast(peer.make, setting, maps, boxes)
            except (RuntimeError, NotImplementedError) as error:
                left_out[peer.name] = {"left_out": _first_line(error)}
                continue
            if seconds > self.plan.patience:
                left_out[peer.name] = {"left_out": f"a forward takes about {seconds:.0f} s"}
                continue
            makes[peer.name] = peer.make
        return makes, left_out

    def _measure(
        self,
        setting: Setting,
        direction: str,
        makes: dict[str, Make],
        sets: Sequence[Sequence[Tensor]],
        boxes: Tensor,
        expected: Expected,
    ) -> Row:
        right = expected.of(direction)
        limit = BOX_ERROR if direction == "box gradient" else OUR_ERROR[setting.dtype]
        own_limit = OPERATORS[setting.work.operator].error
        if own_limit is not None:
            limit = own_limit
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        failed: dict[str, Row] = {}
        for name, make in makes.items():
            try:
                own = [make_call(direction, make, setting, m, boxes, expected.grad) for m in sets]
                errors[name] = relative_error(own[0](), right)
            except (RuntimeError, NotImplementedError) as error:
                if name == OURS:
                    raise
                failed[name] = {"left_out": _first_line(error)}
                continue
            calls[name] = rotate(own)
        row: Row = {"ok": errors[OURS] <= limit, "error": errors[OURS], "peers": failed}
        if not row["ok"]:
            return row
        if direction == "box gradient":
            # What it costs beside our own gradient to the image, which the same tables give.
            own = [
                make_call("backward", makes[OURS], setting, m, boxes, expected.grad) for m in sets
            ]
            calls["own backward"] = rotate(own)
        watches = {
            name: Stopwatch(call, setting.device, setting.threads, self.plan.round_seconds)
            for name, call in calls.items()
        }
        times = interleave(watches, self.plan.rounds, self.plan.seconds)
        row |= _seconds(times[OURS])
        row["peak_extra_bytes"] = peak_extra(calls[OURS], setting.device)
        for name in times:
            if name == OURS:
                continue
            if name == "own backward":
                ratio = summarise(ratios(times[OURS], times[name]))
                row["times_own_backward"] = asdict(ratio)
                continue
            row["peers"][name] = {
                **_seconds(times[name]),
                "ratio": asdict(summarise(ratios(times[name], times[OURS]))),
                "error": errors[name],
                "accurate": errors[name] <= PEER_ERROR[setting.dtype],
                "peak_extra_bytes": peak_extra(calls[name], setting.device),
            }
        return row


def _seconds(times: Sequence[float]) -> Row:
    spread = summarise(times)
    rounds = sum(not math.isnan(t) for t in times)
    return {"seconds": spread.median, "seconds_spread": [spread.low, spread.high], "rounds": rounds}
