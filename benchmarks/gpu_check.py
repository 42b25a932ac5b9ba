#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""What only a real GPU can show: the second half of gpu_check.sh, which builds first.

    python benchmarks/gpu_check.py OUT                     # every part
    python benchmarks/gpu_check.py OUT --parts timing      # one of them
    python benchmarks/gpu_check.py OUT --dry-run           # on the CPU at tiny sizes: does it run?

Every part runs in a process of its own with a time limit, so that a crash or a hang costs one part.
OUT/<date>-<gpu>.json and .md are rewritten after each; parts of an earlier call on that day stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

Report = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large everything runs."""

    device: torch.device
    dry: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------------------------------- workloads


@dataclass(frozen=True)
class Workload:
    """Pooling as a detector does it; strides are image pixels per feature map pixel."""

    name: str
    what: str
    strides: tuple[int, ...]
    channels: int
    boxes: int
    output_size: int
    sampling_ratio: int
    image: tuple[int, int] = (800, 1344)
    batch: int = 2

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(self.image[0] // s, self.image[1] // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    def tiny(self) -> Workload:
        return replace(self, channels=8, boxes=10, image=(64, 96))


WORKLOADS = [
    Workload("W1", "box head on a pyramid", (4, 8, 16, 32), 256, 1000, 7, 2),
    Workload("W2b", "C4 box head, adaptive sampling", (16,), 1024, 512, 14, 0),
    Workload("W3", "mask head on a pyramid", (4, 8, 16, 32), 256, 256, 14, 2),
]


def make_boxes(work: Workload, seed: int = 0) -> Tensor:
    """[K, 5], sorted by image: sides log-normal about 80 pixels, 70 % near one of 12 objects."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    count = work.boxes
    height, width = work.image
    extent = torch.tensor([width, height], dtype=torch.float64)
    image = torch.arange(count) * work.batch // count
    side = (80 * normal(count).exp()).clamp(8, min(work.image))
    aspect = (0.45 * normal(count)).exp()
    sides = torch.stack([side * aspect.sqrt(), side / aspect.sqrt()], 1)
    objects = uniform(work.batch, 12, 2) * extent
    near = objects[image, torch.randint(0, 12, (count,), generator=generator)]
    near = near + 0.3 * sides * normal(count, 2)
    anywhere = uniform(count, 2) * extent
    centre = torch.where(uniform(count, 1) < 0.7, near, anywhere)
    low = (centre - sides / 2).clamp(min=0).minimum(extent - 1)
    high = (centre + sides / 2).minimum(extent).maximum(low + 1)
    return torch.cat([image[:, None].double(), low, high], 1).float()


def make_features(
    setting: Setting, work: Workload, dtype: torch.dtype, layout: str, seed: int
) -> list[Tensor]:
    generator = torch.Generator(setting.device).manual_seed(seed)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    maps = []
    for height, width in work.sizes:
        shape = (work.batch, work.channels, height, width)
        values = torch.randn(shape, generator=generator, device=setting.device)
        maps.append(values.to(dtype).contiguous(memory_format=form))
    return maps


def assigned_levels(work: Workload, boxes: Tensor) -> Tensor:
    """Index of the map of each box, as torchvision assigns it."""
    if len(work.strides) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64)
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    first = int(math.log2(work.strides[0]))
    level = torch.floor(4 + torch.log2(area.sqrt() / 224) + 1e-6)
    return level.clamp(first, first + len(work.strides) - 1).long() - first


# --------------------------------------------------------------------------------- implementations

Pool = Callable[[Sequence[Tensor]], Tensor | list[Tensor]]


def pool_here(work: Workload, boxes: Tensor) -> Pool:
    import glimpse_ext

    size = work.output_size
    if len(work.strides) == 1:
        scale = work.scales[0]
        return lambda maps: glimpse_ext.roi_align(maps[0], boxes, size, scale, work.sampling_ratio)
    return lambda maps: glimpse_ext.multiscale_roi_align(
        maps, boxes, size, work.scales, work.sampling_ratio
    )


def pool_torchvision(work: Workload, boxes: Tensor) -> Pool:
    """One call per level with the boxes already split: the best case, without the level loop."""
    from torchvision.ops import roi_align

    levels = assigned_levels(work, boxes.cpu()).to(boxes.device)
    split = [boxes[levels == level] for level in range(len(work.strides))]

    def pool(maps: Sequence[Tensor]) -> list[Tensor]:
        pooled = []
        for features, rows, scale in zip(maps, split, work.scales, strict=True):
            # There is no bfloat16 kernel there.
            wide = features.float() if features.dtype == torch.bfloat16 else features
            rows = rows.to(wide.dtype)
            one = roi_align(wide, rows, work.output_size, scale, work.sampling_ratio)
            pooled.append(one.to(features.dtype))
        return pooled

    return pool


def pool_torchvision_module(work: Workload, boxes: Tensor) -> Pool:
    """MultiScaleRoIAlign as detectors call it. It waits for the device at every level."""
    from torchvision.ops import MultiScaleRoIAlign

    names = [str(i) for i in range(len(work.strides))]
    module = MultiScaleRoIAlign(names, work.output_size, work.sampling_ratio)
    rows = [boxes[boxes[:, 0] == image, 1:] for image in range(work.batch)]

    def pool(maps: Sequence[Tensor]) -> Tensor:
        wide = [m.float() if m.dtype == torch.bfloat16 else m for m in maps]
        typed = [r.to(wide[0].dtype) for r in rows]
        pooled: Tensor = module(
            dict(zip(names, wide, strict=True)), typed, [work.image] * work.batch
        )
        return pooled.to(maps[0].dtype)

    return pool


def pool_grid_sample(work: Workload, boxes: Tensor) -> Pool:
    """grid_sample at 2x2 points per cell and their mean; the grids are made beforehand."""
    levels = assigned_levels(work, boxes.cpu()).to(boxes.device)
    cells, samples = work.output_size, 2
    step = (torch.arange(cells * samples, device=boxes.device) + 0.5) / (cells * samples)
    grids: list[tuple[int, int, Tensor]] = []
    for level, (height, width) in enumerate(work.sizes):
        for image in range(work.batch):
            rows = boxes[(levels == level) & (boxes[:, 0] == image), 1:] * work.scales[level]
            if len(rows) == 0:
                continue
            x = rows[:, :1] + (rows[:, 2:3] - rows[:, :1]).clamp(min=1) * step
            y = rows[:, 1:2] + (rows[:, 3:] - rows[:, 1:2]).clamp(min=1) * step
            # The legacy convention takes edges for pixel indices: half a pixel further.
            x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
            shape = (len(rows), cells * samples, cells * samples)
            grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
            grids.append((level, image, grid.flatten(0, 1)[None].contiguous()))

    def pool(maps: Sequence[Tensor]) -> list[Tensor]:
        pooled = []
        for level, image, grid in grids:
            features = maps[level][image : image + 1]
            points = torch.nn.functional.grid_sample(
                features, grid.to(features.dtype), padding_mode="border", align_corners=False
            )
            boxes_here = grid.shape[1] // (cells * samples)
            shape = (features.shape[1], boxes_here, cells, samples, cells, samples)
            pooled.append(points[0].reshape(shape).mean((3, 5)).transpose(0, 1))
        return pooled

    return pool


@dataclass(frozen=True)
class Implementation:
    name: str
    make: Callable[[Workload, Tensor], Pool]
    captures: bool = True  # into a CUDA graph
    pyramid_only: bool = False


IMPLEMENTATIONS = [
    Implementation("glimpse_ext", pool_here),
    Implementation("torchvision", pool_torchvision),
    Implementation("MultiScaleRoIAlign", pool_torchvision_module, False, True),
    Implementation("grid_sample", pool_grid_sample),
]


# ------------------------------------------------------------------------------------------- timing

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    spread: float  # between the quartiles


def summarise(samples: list[float]) -> Time:
    quarters = statistics.quantiles(samples, n=4)
    return Time(statistics.median(samples), quarters[2] - quarters[0])


def run_calls(calls: Calls, count: int) -> None:
    for i in range(count):
        calls[i % len(calls)]()


def plan(setting: Setting, calls: Calls) -> tuple[int, int]:
    """Calls per sample and samples: 20 of 20, fewer where a call takes long."""
    if setting.dry:
        return 2, 2
    run_calls(calls, len(calls))
    setting.synchronize()
    start = time.perf_counter()
    run_calls(calls, len(calls))
    setting.synchronize()
    seconds = (time.perf_counter() - start) / len(calls)
    per_sample = max(1, min(20, int(0.05 / seconds)))
    return per_sample, max(5, min(20, int(0.5 / (seconds * per_sample))))


def time_eager(setting: Setting, calls: Calls) -> Time:
    """Host included: what a loop of calls costs."""
    per_sample, count = plan(setting, calls)
    samples = []
    for _ in range(count):
        setting.synchronize()
        start = time.perf_counter()
        run_calls(calls, per_sample)
        setting.synchronize()
        samples.append((time.perf_counter() - start) / per_sample * 1e6)
    return summarise(samples)


def time_graph(setting: Setting, calls: Calls, stream: torch.cuda.Stream) -> Time:
    """Device only: a captured graph of calls, replayed."""
    per_sample, count = plan(setting, calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run_calls(calls, per_sample)
    samples = []
    for _ in range(count + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / per_sample)
    return summarise(samples[2:])


@contextmanager
def side_stream(setting: Setting) -> Iterator[torch.cuda.Stream | None]:
    """Backward runs on the stream of its forward, so both must run where the graph is captured."""
    if setting.device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(setting.device)
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        yield stream
    stream.synchronize()


def as_list(pooled: Tensor | list[Tensor]) -> list[Tensor]:
    return pooled if isinstance(pooled, list) else [pooled]


def time_implementation(
    setting: Setting, implementation: Implementation, work: Workload, sets: list[list[Tensor]]
) -> Report:
    """Forward and backward (to the features) on several sets of features in turn."""
    boxes = make_boxes(work).to(setting.device)
    pool = implementation.make(work, boxes)
    rows: Report = {}
    with side_stream(setting) as stream:
        leaves = [[m.detach().requires_grad_() for m in maps] for maps in sets]
        pooled = [as_list(pool(maps)) for maps in leaves]
        grads = [[torch.randn_like(one) for one in many] for many in pooled]

        def forward(maps: list[Tensor]) -> Callable[[], object]:
            def call() -> object:
                with torch.no_grad():
                    return pool(maps)

            return call

        def backward(i: int) -> Callable[[], object]:
            return lambda: torch.autograd.grad(
                pooled[i], leaves[i], grads[i], retain_graph=True, allow_unused=True
            )

        for direction, calls in (
            ("forward", [forward(maps) for maps in sets]),
            ("backward", [backward(i) for i in range(len(sets))]),
        ):
            row: Report = {"eager": vars(time_eager(setting, calls))}
            if stream is not None and implementation.captures:
                try:
                    row["graph"] = vars(time_graph(setting, calls, stream))
                except RuntimeError as error:
                    row["graph_error"] = str(error).splitlines()[0]
            rows[direction] = row
    return rows


def bandwidth(setting: Setting) -> Report:
    """Bytes per second of a large copy (read and written bytes) and of a large fill."""
    count = 2**16 if setting.dry else 2**28
    source = torch.rand(count, device=setting.device)
    target = torch.empty_like(source)
    copy = time_eager(setting, [lambda: target.copy_(source)])
    fill = time_eager(setting, [lambda: target.fill_(1.5)])
    return {
        "copy": 2 * source.nbytes / copy.median * 1e6,
        "fill": source.nbytes / fill.median * 1e6,
    }


def touched_pixels(setting: Setting, work: Workload) -> int:
    """Pixels of all maps and images that some box reads."""
    single = replace(work, channels=1)
    maps = make_features(setting, single, torch.float32, "contiguous", 0)
    for m in maps:
        m.requires_grad_()
    pooled = pool_here(single, make_boxes(work).to(setting.device))(maps)
    assert isinstance(pooled, Tensor)
    grads = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))
    return sum(int((g != 0).sum()) for g in grads)


def part_timing(setting: Setting) -> Report:
    rates = bandwidth(setting)
    rows = []
    skipped = set()
    for work in WORKLOADS:
        work = work.tiny() if setting.dry else work
        pixels = touched_pixels(setting, work)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                # More than the L2 cache holds, so that every call reads from memory.
                sets = [
                    make_features(setting, work, dtype, layout, seed)
                    for seed in range(2 if setting.dry else 4)
                ]
                size = sets[0][0].element_size()
                output = work.boxes * work.channels * work.output_size**2 * size
                feature_bytes = sum(m.nbytes for m in sets[0])
                floors = {
                    "forward": pixels * work.channels * size + output,
                    "backward": feature_bytes + output,
                }
                for implementation in IMPLEMENTATIONS:
                    if implementation.pyramid_only and len(work.strides) == 1:
                        continue
                    row: Report = {
                        "workload": work.name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "layout": layout,
                        "implementation": implementation.name,
                        "floor_us": {
                            key: value / rates["copy"] * 1e6 for key, value in floors.items()
                        },
                    }
                    try:
                        row |= time_implementation(setting, implementation, work, sets)
                    except ImportError as error:
                        skipped.add(str(error))
                        continue
                    except RuntimeError as error:
                        row["error"] = str(error).splitlines()[0]
                    rows.append(row)
                    if setting.device.type == "cuda":
                        torch.cuda.empty_cache()
    failed = [row for row in rows if row["implementation"] == "glimpse_ext" and "error" in row]
    return {"ok": not failed, "bytes_per_second": rates, "rows": rows, "skipped": sorted(skipped)}


# -------------------------------------------------------------------------------- correctness parts


def pooled_and_grads(
    work: Workload, maps: Sequence[Tensor], boxes: Tensor, grad: Tensor | None = None
) -> list[Tensor]:
    """Pooled values, gradients of the maps and of the boxes."""
    maps = [m.detach().requires_grad_() for m in maps]
    boxes = boxes.detach().requires_grad_()
    pooled = pool_here(work, boxes)(maps)
    assert isinstance(pooled, Tensor)
    grad = torch.ones_like(pooled) if grad is None else grad
    return [pooled.detach(), *torch.autograd.grad(pooled, [*maps, boxes], grad)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def small_work(setting: Setting) -> list[Workload]:
    works = [replace(work, channels=min(work.channels, 256), boxes=200) for work in WORKLOADS]
    return [work.tiny() for work in works] if setting.dry else works


def combinations(setting: Setting) -> Iterator[tuple[Workload, torch.dtype, str]]:
    for work in small_work(setting):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                yield work, dtype, layout


def part_hostile(setting: Setting) -> Report:
    """NaN, infinite, huge and empty boxes, bad indices, and sizes that reach every kernel.

    Also what compute-sanitizer watches. Results are compared with those of the CPU kernels.
    """
    import cases
    import kernel_cases

    import glimpse_ext

    under_sanitizer = "GLIMPSE_UNDER_SANITIZER" in os.environ
    count, faults = 0, []

    def compare(label: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        nonlocal count
        count += 1
        for a, b in zip(actual, expected, strict=True):
            step = 2**-7 if b.dtype in (torch.float16, torch.bfloat16) else 1e-4
            scale = b.double().abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
            close = torch.isclose(
                a.cpu().double(), b.double(), rtol=step, atol=step * max(1.0, scale), equal_nan=True
            )
            if not bool(close.all()):
                faults.append(label)
                return

    def small(case: cases.Case, mode: cases.Mode, features: Tensor) -> list[Tensor]:
        features = features.detach().requires_grad_()
        boxes = case.boxes(torch.float32).to(features.device).requires_grad_()
        pooled = glimpse_ext.roi_align(
            features,
            boxes,
            case.output_size,
            case.spatial_scale,
            mode.sampling_ratio,
            mode.aligned,
        )
        grads = torch.autograd.grad(pooled, [features, boxes], torch.ones_like(pooled))
        return [pooled.detach(), *grads]

    # Every instruction is slow under the sanitizer, and it looks at addresses and not at numbers.
    modes = cases.MODES[:2] if under_sanitizer else cases.MODES
    layouts = ["contiguous", "channels_last"] if under_sanitizer else cases.LAYOUTS
    for case in cases.CASES:
        for mode in modes:
            for layout in layouts:
                for dtype in (torch.float32, torch.float16):
                    image = cases.arrange(case.image(dtype), layout)
                    there = cases.arrange(image.to(setting.device), layout)
                    label = f"{case} {mode} {layout} {dtype}"
                    compare(label, small(case, mode, there), small(case, mode, image))

    works = kernel_cases.WORK[:2] if setting.dry else kernel_cases.WORK
    for work in works:
        for dtype in (torch.float32, torch.float16):
            for layout in ("contiguous", "channels_last"):
                outputs = kernel_cases.run(work, dtype, layout, str(setting.device))
                if not under_sanitizer:
                    label = f"{work} {dtype} {layout}"
                    compare(label, outputs, kernel_cases.run(work, dtype, layout))

    if setting.device.type == "cuda":
        features = torch.ones(2, 5, 8, 8, device=setting.device, requires_grad=True)
        rows = [[float(i), 1.0, 1.0, 5.0, 5.0] for i in (-1, 0, 2, 1e9, math.nan, 1)]
        boxes = torch.tensor(rows, device=setting.device)
        pooled = glimpse_ext.roi_align(features, boxes, 2)
        filled = pooled.flatten(1).abs().sum(1) != 0
        torch.autograd.grad(pooled.sum(), features)
        if filled.tolist() != [False, True, False, False, False, True]:
            faults.append("rows with a bad image index are not zero")
    setting.synchronize()
    return {"ok": not faults, "cases": count, "faults": faults[:20]}


def part_streams(setting: Setting) -> Report:
    """Inputs that a slow stream has yet to write: a launch on any other stream reads NaN."""
    faults = []
    for work, dtype, layout in combinations(setting):
        boxes = make_boxes(work).to(setting.device)
        maps = make_features(setting, work, dtype, layout, 1)
        expected = pooled_and_grads(work, maps, boxes)
        late = [torch.full_like(m, math.nan) for m in maps]
        setting.synchronize()
        with side_stream(setting) as stream:
            if stream is not None:
                torch.cuda._sleep(20_000_000)
            for empty, full in zip(late, maps, strict=True):
                empty.copy_(full)
            actual = pooled_and_grads(work, late, boxes)
        setting.synchronize()
        if not same(actual, expected):
            faults.append(f"{work.name} {dtype} {layout}")
    devices = torch.cuda.device_count() if setting.device.type == "cuda" else 0
    if devices > 1:
        work = small_work(setting)[0]
        maps = make_features(setting, work, torch.float32, "contiguous", 1)
        here, there = (
            pooled_and_grads(
                work, [m.to(f"cuda:{i}") for m in maps], make_boxes(work).to(f"cuda:{i}")
            )
            for i in (0, devices - 1)
        )
        if not same([t.cpu() for t in here], [t.cpu() for t in there]):
            faults.append("the last device gives other bits than the first")
    return {"ok": not faults, "devices": devices, "faults": faults}


def part_graphs(setting: Setting) -> Report:
    """Forward and backward captured once, replayed with other features and other boxes."""
    if setting.device.type != "cuda":
        return {"ok": True, "skipped": "there are no graphs without CUDA"}
    faults = []
    for work, dtype, layout in combinations(setting):
        features = [make_features(setting, work, dtype, layout, seed) for seed in range(3)]
        boxes = [make_boxes(work, seed).to(setting.device) for seed in range(3)]
        expected = [pooled_and_grads(work, f, b) for f, b in zip(features, boxes, strict=True)]
        maps, rows = [m.clone() for m in features[0]], boxes[0].clone()
        with side_stream(setting) as stream:
            pooled_and_grads(work, maps, rows)
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = pooled_and_grads(work, maps, rows)
        for i in (1, 2, 0):
            for static, fresh in zip(maps, features[i], strict=True):
                static.copy_(fresh)
            rows.copy_(boxes[i])
            graph.replay()
            torch.cuda.synchronize()
            if not same(captured, expected[i]):
                faults.append(f"{work.name} {dtype} {layout}, replay {i}")
    return {"ok": not faults, "faults": faults}


def part_repeats(setting: Setting) -> Report:
    """The same bits in every run, alone or with other boxes."""
    faults = []
    repeats = 2 if setting.dry else 25
    for work, dtype, layout in combinations(setting):
        boxes = make_boxes(work).to(setting.device)
        maps = make_features(setting, work, dtype, layout, 1)
        first = pooled_and_grads(work, maps, boxes)
        if not all(same(first, pooled_and_grads(work, maps, boxes)) for _ in range(repeats)):
            faults.append(f"{work.name} {dtype} {layout}: runs differ")
        half = pooled_and_grads(work, maps, boxes[::2])
        if not same([first[0][::2], first[-1][::2]], [half[0], half[-1]]):
            faults.append(f"{work.name} {dtype} {layout}: other boxes change a box")
    return {"ok": not faults, "repeats": repeats, "faults": faults}


def part_memory(setting: Setting) -> Report:
    """Bytes that backward needs beyond the gradient that it returns."""
    rows: list[Report] = []
    for work in WORKLOADS:
        work = work.tiny() if setting.dry else work
        for layout in ("contiguous", "channels_last"):
            boxes = make_boxes(work).to(setting.device)
            maps = make_features(setting, work, torch.float32, layout, 1)
            for m in maps:
                m.requires_grad_()
            pooled = pool_here(work, boxes)(maps)
            assert isinstance(pooled, Tensor)
            grad = torch.ones_like(pooled)
            extra = None
            if setting.device.type == "cuda":
                torch.autograd.grad(pooled, maps, grad, retain_graph=True)
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                result = torch.autograd.grad(pooled, maps, grad)
                torch.cuda.synchronize()
                returned = sum(r.nbytes for r in result)
                extra = torch.cuda.max_memory_allocated() - before - returned
            gradient = sum(m.nbytes for m in maps)
            rows.append(
                {
                    "workload": work.name,
                    "layout": layout,
                    "gradient_bytes": gradient,
                    "extra_bytes": extra,
                }
            )
    # The caching allocator rounds every map up to 2 MB at most, and workspaces to 512 bytes.
    limit = 2**20 + 4 * 2**21
    ok = all(row["extra_bytes"] is None or row["extra_bytes"] < limit for row in rows)
    return {"ok": ok, "rows": rows}


def part_no_sync(setting: Setting) -> Report:
    """Nothing waits for the device: torch raises on every synchronising call."""
    import glimpse_ext

    if setting.device.type != "cuda":
        return {"ok": True, "skipped": "nothing to wait for without CUDA"}
    for work, dtype, layout in combinations(setting):
        boxes = make_boxes(work).to(setting.device)
        rows = [boxes[boxes[:, 0] == i, 1:] for i in range(work.batch)]
        maps = make_features(setting, work, dtype, layout, 1)
        pooled_and_grads(work, maps, boxes)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pooled_and_grads(work, maps, boxes)
            glimpse_ext.roi_align(maps[0], rows, 7)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


# -------------------------------------------------------------------------- parts that run programs


def run_program(command: list[str], limit: float, **variables: str) -> tuple[int, str]:
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return 124, text + f"\nstopped after {limit:.0f} s"
    return done.returncode, done.stdout


def tail(text: str, lines: int = 30) -> list[str]:
    return text.strip().splitlines()[-lines:]


def part_tests(setting: Setting) -> Report:
    """The test suite on device cuda."""
    if setting.dry:
        selection = ["tests/test_emulation.py", "-k", "selftests"]
    else:
        selection = ["tests", "-k", "cuda", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    status, output = run_program(command, LIMITS["tests"] - 10)
    ran = re.search(r"(\d+) passed", output)
    return {
        "ok": status == 0 and ran is not None,
        "summary": tail(output, 1)[0] if output.strip() else "",
        "output": [] if status == 0 else tail(output),
    }


def sanitize(setting: Setting, tool: str) -> Report:
    program = shutil.which("compute-sanitizer")
    if program is None:
        for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
            path = Path(folder or "", "bin", "compute-sanitizer")
            if folder and path.exists():
                program = str(path)
    here = [sys.executable, str(Path(__file__).resolve()), "-", "--part", "hostile"]
    if setting.dry:
        status, output = run_program([*here, "--dry-run"], LIMITS[tool] - 10)
        return {"ok": status == 0, "skipped": "there is nothing to sanitize without CUDA"}
    if program is None:
        return {"ok": False, "error": "compute-sanitizer was not found"}
    # One allocation per tensor: otherwise reads beyond a tensor stay inside the allocator's pool.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GLIMPSE_UNDER_SANITIZER": "1"}
    options = ["--tool", tool, "--show-backtrace", "device"]
    status, output = run_program([program, *options, *here], LIMITS[tool] - 10, **variables)
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(reports) if "SUMMARY" in line), None)
    # Kernels of torch run in the same process; only those of this package are the subject.
    ours = [line for line in reports if "glimpse" in line]
    return {
        "ok": status == 0 and summary is not None and not ours,
        "summary": summary.strip("= ") if summary else f"exit status {status}",
        "reports": ours[:20],
        "output": tail(output, 60) if status != 0 or ours else [],
    }


def part_memcheck(setting: Setting) -> Report:
    """Accesses out of bounds or misaligned, in global, shared and local memory."""
    return sanitize(setting, "memcheck")


def part_racecheck(setting: Setting) -> Report:
    """Shared memory that two threads use without a barrier between them."""
    return sanitize(setting, "racecheck")


def part_synccheck(setting: Setting) -> Report:
    """Barriers that some threads of a block do not reach."""
    return sanitize(setting, "synccheck")


PARTS: dict[str, Callable[[Setting], Report]] = {
    "hostile": part_hostile,
    "streams": part_streams,
    "graphs": part_graphs,
    "no_sync": part_no_sync,
    "repeats": part_repeats,
    "memory": part_memory,
    "timing": part_timing,
    "memcheck": part_memcheck,
    "racecheck": part_racecheck,
    "synccheck": part_synccheck,
    "tests": part_tests,
}
LIMITS = dict.fromkeys(PARTS, 120) | {
    "timing": 240,
    "memcheck": 240,
    "racecheck": 240,
    "synccheck": 240,
    "tests": 540,
}


# ------------------------------------------------------------------------------------------- report


def environment(setting: Setting) -> Report:
    import glimpse_ext

    facts: Report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": setting.dry,
        "glimpse_ext": getattr(glimpse_ext, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        import torchvision

        facts["torchvision"] = torchvision.__version__
    except ImportError:
        facts["torchvision"] = None
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        status, output = run_program(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 30
        )
        if status == 0:
            names = query.split(",")
            values = output.strip().splitlines()[0].split(", ")
            facts |= dict(zip(names, values, strict=False))
    return facts


def best(row: Report, direction: str) -> float | None:
    """Microseconds by graph replay, or eager where nothing can be captured."""
    times = row.get(direction, {})
    chosen = times.get("graph") or times.get("eager")
    return chosen["median"] if chosen else None


def timing_table(timing: Report) -> list[str]:
    peers = [i.name for i in IMPLEMENTATIONS[1:]]
    rates = timing["bytes_per_second"]
    columns = ["workload", "dtype", "layout", "direction", "µs", "× floor", "eager µs", *peers]
    lines = [
        f"Copy {rates['copy'] / 1e9:.0f} GB/s (bytes read and written), fill "
        f"{rates['fill'] / 1e9:.0f} GB/s. Times are microseconds by graph replay; the floor is",
        "unique bytes over the copy rate; a peer's column is its time over ours.",
        "MultiScaleRoIAlign waits for the device, so it is compared by eager times.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    table: dict[tuple[str, str, str], dict[str, Report]] = {}
    for row in timing["rows"]:
        key = (row["workload"], row["dtype"], row["layout"])
        table.setdefault(key, {})[row["implementation"]] = row
    for key, rows in table.items():
        ours = rows.get("glimpse_ext", {})
        for direction in ("forward", "backward"):
            mine = best(ours, direction)
            if mine is None:
                lines.append(f"| {' | '.join(key)} | {direction} | {ours.get('error', '–')} |")
                continue
            eager = ours[direction]["eager"]["median"]
            cells = [f"{mine:.1f}", f"{mine / ours['floor_us'][direction]:.2f}", f"{eager:.1f}"]
            for implementation in IMPLEMENTATIONS[1:]:
                row = rows.get(implementation.name, {})
                if implementation.captures and "graph" in row.get(direction, {}):
                    ratio = row[direction]["graph"]["median"] / mine
                elif direction in row:
                    ratio = row[direction]["eager"]["median"] / eager
                else:
                    cells.append("error" if "error" in row else "–")
                    continue
                cells.append(f"{ratio:.1f}×")
            lines.append(f"| {' | '.join(key)} | {direction} | {' | '.join(cells)} |")
    return lines


def markdown(results: Report) -> str:
    facts = results["environment"]
    gpu = facts.get("gpu", "no GPU (dry run)")
    lines = [
        "# Check on a GPU",
        "",
        f"{facts['date']}, {gpu}, torch {facts['torch']}, torchvision {facts['torchvision']}, "
        f"driver {facts.get('driver_version', '–')}. Made by `benchmarks/gpu_check.sh`.",
        "",
        "| part | result | seconds | remarks |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in results["parts"].items():
        remark = part.get("skipped") or part.get("summary") or part.get("error") or ""
        if not remark and part.get("faults"):
            remark = "; ".join(part["faults"][:3])
        if not remark and name == "memory":
            extra = [row["extra_bytes"] for row in part["rows"] if row["extra_bytes"] is not None]
            remark = f"at most {max(extra, default=0)} bytes beside the gradient"
        remark = str(remark).replace("|", "/")
        verdict = "passed" if part["ok"] else "**failed**"
        lines.append(f"| {name} | {verdict} | {part.get('seconds', 0):.0f} | {remark} |")
    if results["parts"].get("timing", {}).get("rows"):
        lines += ["", "## Times", "", *timing_table(results["parts"]["timing"])]
    return "\n".join(lines) + "\n"


def last_report(output: str) -> Report | None:
    """What a child printed; libraries may print more behind it."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"ok": '):
            try:
                report: Report = json.loads(line)
            except ValueError:
                return None
            return report
    return None


def run_part(name: str, setting: Setting) -> Report:
    try:
        with torch.random.fork_rng(devices=[]):
            return PARTS[name](setting)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]} | {
            "output": tail(traceback.format_exc())
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU; --dry-run tries the script without one")
    setting = Setting(torch.device("cpu" if dry else "cuda:0"), dry)

    if arguments.part:  # a child: one part, its report as the last line
        report = run_part(arguments.part, setting)
        print(json.dumps(report))
        return 0 if report["ok"] else 1

    names = arguments.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: Report = {"environment": environment(setting), "parts": {}}
    facts = results["environment"]
    gpu = re.sub(r"\W+", "-", facts.get("gpu", "dry run")).strip("-").lower()
    written = arguments.out / f"{facts['date'][:10]}-{gpu}.json"
    if written.exists():
        results["parts"] = json.loads(written.read_text())["parts"]
    for name in names:
        print(f"{name}: ", end="", flush=True)
        start = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "-", "--part", name]
        status, output = run_program([*command, *(["--dry-run"] if dry else [])], LIMITS[name])
        failed = {"ok": False, "error": f"exit status {status}", "output": tail(output)}
        report = last_report(output) or failed
        report["seconds"] = round(time.monotonic() - start, 1)
        results["parts"][name] = report
        print("passed" if report["ok"] else "FAILED", f"({report['seconds']} s)", flush=True)
        written.write_text(json.dumps(results, indent=1) + "\n")
        written.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
