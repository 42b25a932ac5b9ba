# SPDX-License-Identifier: BSD-3-Clause
"""Where calls run and how their time is taken there.

A device makes watches: what gives the seconds of one call when it is called. The CPU has one kind.
CUDA has two: ``eager`` is a loop of calls by the clock of the host, which waits for the device at
the end, so it is what a user waits for; ``graph`` is the replay of a captured CUDA graph of calls
by events, so it is the time of the device alone. Both are taken ``cold``, where calls take turns on
several sets of maps that do not fit into the L2 cache together, and ``hot``, on one set.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch.utils.benchmark import Timer, timer

Call = Callable[[], object]
Calls = Sequence[Call]

# Calls slower than this are timed one at a time, without a warm-up in every round.
SLOW_SECONDS = 0.2
WARM_UPS = 3
MOST_IN_GRAPH = 20
LEAST_REPLAYS = 5
# Without a size from torch: more than any L2 cache up to now.
L2_BYTES = 2**27
MOST_SETS = 8


class NotCaptured(RuntimeError):
    """A call that no CUDA graph can hold, and why."""


class Watch(Protocol):
    def __call__(self) -> float:
        """Seconds of one call, over a round."""


class Device(Protocol):
    """``launches`` are the kinds of rows: how calls are launched, and whether maps are cached."""

    @property
    def name(self) -> str: ...

    @property
    def torch(self) -> torch.device: ...

    @property
    def launches(self) -> tuple[tuple[str, str], ...]: ...

    def sets(self, nbytes: int) -> int:
        """How many sets of maps of ``nbytes`` it takes to be cold."""

    def scope(self) -> AbstractContextManager[None]:
        """Everything that is timed is made and called inside."""

    def synchronize(self) -> None: ...

    def watch(
        self,
        calls: Calls,
        launch: str,
        threads: int,
        round_seconds: float,
        first_seconds: float = 0.0,
    ) -> Watch:
        """``calls`` are equal but for their maps, and each has run before, the first one for
        ``first_seconds``, if that is known.

        NotCaptured if ``launch`` is ``"graph"`` and a call waits for the device.
        """


class Rotation:
    """Calls in turn."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._next = 0

    def __call__(self) -> object:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        return call()


def in_turn(calls: Calls) -> Call:
    return calls[0] if len(calls) == 1 else Rotation(calls)


# ------------------------------------------------------------------------------------------- CPU


class CpuWatch:
    """A round is a block of calls of about ``round_seconds``, or one call that takes longer."""

    def __init__(
        self, call: Call, threads: int, round_seconds: float, first_seconds: float = 0.0
    ) -> None:
        self._call = call
        self._round_seconds = round_seconds
        self._timer = Timer("call()", globals={"call": call}, num_threads=threads)
        # A first call may take somewhat longer than the others.
        self._slow = first_seconds > 2 * SLOW_SECONDS or self._once() > SLOW_SECONDS

    def _once(self) -> float:
        start = timer()
        self._call()
        return float(timer() - start)

    def __call__(self) -> float:
        if self._slow:
            return self._once()
        return float(self._timer.blocked_autorange(min_run_time=self._round_seconds).median)


class Cpu:
    name = "cpu"
    torch = torch.device("cpu")
    launches = (("eager", "hot"),)

    def sets(self, nbytes: int) -> int:
        return 1

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def watch(
        self,
        calls: Calls,
        launch: str,
        threads: int,
        round_seconds: float,
        first_seconds: float = 0.0,
    ) -> Watch:
        return CpuWatch(in_turn(calls), threads, round_seconds, first_seconds)


# ------------------------------------------------------------------------------------------ CUDA


class EagerWatch:
    """Calls in a row, host included. ``device_seconds`` are the same by events."""

    def __init__(self, cuda: Cuda, calls: Calls, round_seconds: float) -> None:
        self._cuda = cuda
        self._call = in_turn(calls)
        self.device_seconds: list[float] = []
        seconds = self._run(len(calls))
        self._count = max(len(calls), min(1000, round(round_seconds / max(seconds, 1e-7))))
        self.device_seconds.clear()

    def _run(self, count: int) -> float:
        self._cuda.synchronize()
        start = self._cuda.now()

        def calls() -> None:
            for _ in range(count):
                self._call()

        self.device_seconds.append(self._cuda.by_events(calls) / count)
        return (self._cuda.now() - start) / count

    def __call__(self) -> float:
        return self._run(self._count)


class GraphWatch:
    """Replays of a graph of calls: the device alone, without the host."""

    def __init__(self, cuda: Cuda, calls: Calls, round_seconds: float) -> None:
        self._cuda = cuda
        self._calls = calls  # a replay reads their tensors
        seconds = cuda.by_events(calls[0])
        wanted = round(round_seconds / LEAST_REPLAYS / max(seconds, 1e-7))
        # Each set as often as the others.
        turns = max(1, min(MOST_IN_GRAPH, wanted) // len(calls))
        self._count = turns * len(calls)
        self._replay = cuda.capture(list(calls) * turns)
        self._replay()
        self._replays = max(1, min(LEAST_REPLAYS, round(round_seconds / (seconds * self._count))))

    def __call__(self) -> float:
        times = [self._cuda.by_events(self._replay) for _ in range(self._replays)]
        return statistics.median(times) / self._count


class Cuda:
    """``api`` is torch.cuda, or stands in for it in tests."""

    name = "cuda"
    launches = (("graph", "cold"), ("eager", "cold"), ("graph", "hot"), ("eager", "hot"))

    def __init__(self, device: torch.device | None = None, api: Any = torch.cuda) -> None:
        self.torch = torch.device("cuda", 0) if device is None else device
        self._api = api
        self._stream: Any = None
        self.now = timer

    def sets(self, nbytes: int) -> int:
        cache = getattr(self._api.get_device_properties(self.torch), "L2_cache_size", L2_BYTES)
        return max(2, min(MOST_SETS, -(-2 * cache // max(nbytes, 1)) + 1))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """A side stream, on which alone a graph can be captured.

        A backward runs on the stream of its forward, so forwards run there from the beginning.
        """
        before = self._api.current_stream(self.torch)
        # Always the same: the allocator keeps freed memory for each stream.
        self._stream = stream = self._stream or self._api.Stream(self.torch)
        stream.wait_stream(before)
        with self._api.stream(stream):
            yield
        before.wait_stream(stream)

    def synchronize(self) -> None:
        self._api.synchronize(self.torch)

    def watch(
        self,
        calls: Calls,
        launch: str,
        threads: int,
        round_seconds: float,
        first_seconds: float = 0.0,
    ) -> Watch:
        if launch == "graph":
            return GraphWatch(self, calls, round_seconds)
        return EagerWatch(self, calls, round_seconds)

    def by_events(self, call: Call) -> float:
        """Seconds between two events around ``call``; afterwards the device has done it."""
        start, end = (self._api.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def waits(self, call: Call) -> str | None:
        """Why ``call`` waits for the device, or None if it does not."""
        self.synchronize()
        self._api.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            self._api.set_sync_debug_mode("default")
            self.synchronize()
        return None

    def capture(self, calls: Calls) -> Call:
        """All ``calls`` as one graph, to be replayed. It must be called in `scope`."""
        # A capture that fails leaves the allocator in an unusable state, so this comes before it.
        reason = self.waits(calls[0])
        if reason is not None:
            raise NotCaptured(f"waits for the device, eager only: {reason}")
        for call in calls[:WARM_UPS]:
            call()
        self.synchronize()
        graph = self._api.CUDAGraph()
        with self._api.graph(graph, stream=self._api.current_stream(self.torch)):
            for call in calls:
                call()
        replay: Call = graph.replay
        return replay


def place(device: str, threads: int) -> str:
    """The device in words; threads are of the CPU."""
    if device != "cpu":
        return device
    return "1 thread" if threads == 1 else f"{threads} threads"


def make_device(name: str) -> Device:
    return Cuda() if name == "cuda" else Cpu()
