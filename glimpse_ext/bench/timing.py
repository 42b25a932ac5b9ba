# SPDX-License-Identifier: BSD-3-Clause
"""Times that can be compared: interleaved rounds, ratios within a round, medians of those.

Neighbours on a shared machine change absolute times by a factor of two from one minute to the next,
and the state of caches and of the allocator adds to it. So all implementations of a row take turns,
in an order that changes, and a ratio is the median over rounds of ratios taken within one round.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer, timer

Call = Callable[[], object]

LEAST_ROUNDS = 3
# Calls slower than this are timed one at a time, without a warm-up in every round.
SLOW_SECONDS = 0.2
COPY_BYTES = 2**26


class Rotation:
    """Calls in turn. On CUDA, each on buffers of its own, so that none finds its own in cache."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._next = 0

    def __call__(self) -> object:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        return call()


def rotate(calls: Sequence[Call]) -> Call:
    return calls[0] if len(calls) == 1 else Rotation(calls)


@dataclass
class Stopwatch:
    """Seconds per call, taken in rounds of about ``round_seconds``.

    ``call`` must have run before: what only a first call does is nobody's speed.
    """

    call: Call
    device: torch.device
    threads: int
    round_seconds: float
    first_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.first_seconds = self._once()
        self._timer = Timer("call()", globals={"call": self.call}, num_threads=self.threads)

    def _once(self) -> float:
        start = timer()  # waits for the device
        self.call()
        return float(timer() - start)

    def __call__(self) -> float:
        if self.device.type == "cuda":
            return self._events()
        if self.first_seconds > SLOW_SECONDS:
            return self._once()
        return float(self._timer.blocked_autorange(min_run_time=self.round_seconds).median)

    def _events(self) -> float:
        """Device time of calls in a row; host time where the host is slower than the device."""
        count = max(1, min(1000, round(self.round_seconds / self.first_seconds)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.call()
        start.record()
        for _ in range(count):
            self.call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count


def interleave(
    watches: Mapping[str, Stopwatch], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call by name and round; NaN where a slow one was left out of a round.

    Each gets about ``seconds`` in all, but `LEAST_ROUNDS` rounds in any case. The first name is
    timed in every round; when all others are done, the rounds end.
    """
    names = list(watches)
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for index in range(rounds):
        done = {n for n in names if index >= LEAST_ROUNDS and spent[n] >= seconds}
        if done >= set(names[1:] or names):
            break
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if name in done and name != names[0]:
                times[name].append(math.nan)
                continue
            start = timer()
            times[name].append(watches[name]())
            spent[name] += timer() - start
    return times


@dataclass(frozen=True)
class Spread:
    """Median and quartiles; with fewer than four values, the extremes."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Spread:
    kept = [value for value in values if not math.isnan(value)]
    if len(kept) < 4:
        return Spread(statistics.median(kept), min(kept), max(kept))
    low, middle, high = statistics.quantiles(kept, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratios(times: Sequence[float], over: Sequence[float]) -> list[float]:
    """Round by round; NaN where one of them was left out."""
    return [a / b for a, b in zip(times, over, strict=True)]


def copy_bandwidth(device: torch.device, threads: int, size: int = COPY_BYTES) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    watch = Stopwatch(lambda: target.copy_(source), device, threads, 0.05)
    return 2 * source.nbytes / statistics.median(watch() for _ in range(5))
