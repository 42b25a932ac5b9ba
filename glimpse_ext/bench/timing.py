# SPDX-License-Identifier: BSD-3-Clause
"""Times that can be compared: interleaved rounds, ratios within a round, medians of those.

Neighbours on a shared machine change absolute times by a factor of two from one minute to the next,
and the state of caches and of the allocator adds to it. So all implementations of a row take turns,
in an order that changes, and a ratio is the median over rounds of ratios taken within one round.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import timer

from .devices import Device, Watch

LEAST_ROUNDS = 3
# Of what takes longer than this in a round, there are enough with fewer.
LONG_SECONDS = 0.5
LEAST_LONG_ROUNDS = 2
COPY_BYTES = 2**26
COPY_ROUND_SECONDS = 0.05


def interleave(watches: Mapping[str, Watch], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call by name and round; NaN where a slow one was left out of a round.

    Each gets about ``seconds`` in all, but `LEAST_ROUNDS` rounds in any case, or
    `LEAST_LONG_ROUNDS`. The first name is timed in every round; when all others are done, the
    rounds end.
    """

    def enough(name: str, index: int) -> bool:
        long = spent[name] > LONG_SECONDS * index
        return index >= (LEAST_LONG_ROUNDS if long else LEAST_ROUNDS) and spent[name] >= seconds

    names = list(watches)
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for index in range(rounds):
        done = {n for n in names if enough(n, index)}
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


def copy_bandwidth(device: Device, threads: int, size: int = COPY_BYTES) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(size // 4, device=device.torch)
    target = torch.empty_like(source)
    target.copy_(source)
    watch = device.watch([lambda: target.copy_(source)], "eager", threads, COPY_ROUND_SECONDS)
    return 2 * source.nbytes / statistics.median(watch() for _ in range(5))
