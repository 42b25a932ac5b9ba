#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels would take on an H200: modelled, not measured. Needs nvcc, no GPU.

    python benchmarks/gpu_model.py --update                  # docs/gpu_model.md and the JSON
    python benchmarks/gpu_model.py --update --workloads W1   # these rows only, the others stay
    python benchmarks/gpu_model.py --check                   # is the stored model of this code?

The machine code of each kernel runs on the host (sass.py, gpu_kernels.py) for the workloads of
``glimpse-ext bench``, so the instruction counts are counts; only the seconds are a model. Needs the
test module ``glimpse_ext._testing`` and a C++ compiler. Where torchvision with CUDA code is
installed (or GLIMPSE_TORCHVISION_LIBRARY names its ``_C.so``), its kernels are counted as well.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import compile_gate  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_report  # noqa: E402
import sass  # noqa: E402
import torch  # noqa: E402
from gpu_kernels import Launch, Recorder  # noqa: E402
from gpu_report import CLASSES, CLOCK, COPY_RATE, L2_RATE, LAUNCH, SMS  # noqa: E402
from torch import Tensor  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "gpu_model.json"
PAGE = ROOT / "docs" / "gpu_model.md"

# ------------------------------------------------------------------------------------------ H200

# Warp instructions that an SM starts in a cycle, by unit. Four schedulers issue one each.
RATES = {
    "issue": 4.0,
    "float": 4.0,
    "multiply-add of integers": 2.0,
    "integer and logic": 2.0,
    "float64": 2.0,
    "conversion and special function": 0.5,
    "uniform": 2.0,
}
_UNITS = {
    "float": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "multiply-add of integers": "IMAD",
    "float64": "DADD DMUL DFMA DSETP DMNMX",
    "conversion and special function": "MUFU F2I I2F F2F FRND POPC FLO BREV",
    "memory": "LD LDG LDGSTS ST STG LDS STS LDL STL RED REDG ATOM ATOMG SHFL LDC",
    "control": "BRA BSSY BSYNC BREAK EXIT CALL RET NOP BAR WARPSYNC DEPBAR LDGDEPBAR YIELD",
}
UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}

CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


def unit_of(operation: str) -> str:
    if operation in UNIT_OF:
        return UNIT_OF[operation]
    if operation.startswith("U") or operation in {"R2UR", "S2UR", "VOTEU"}:
        return "uniform"
    return "integer and logic"


def by_class(launches: Sequence[Launch]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for launch in launches:
        for name, issues in launch.operations.items():
            counts[CLASS_OF.get(name.split(".")[0], "integer")] += issues
    return dict(counts)


# So many warps keep the schedulers of an SM busy; a block of fewer has its share at most.
WARPS_TO_SATURATE = 16


@functools.lru_cache(maxsize=4096)
def _makespan(work: tuple[int, ...], blocks: int, resident: int, most_share: float) -> float:
    """When the last block ends, in units of an SM's rate.

    Blocks go to SMs that have room, in order, and those of one SM share it evenly.
    """
    blocks_of = iter(range(blocks))
    done = [0.0] * SMS  # work done for each block that was on the SM all the time
    since = [0.0] * SMS
    running: list[list[float]] = [[] for _ in range(SMS)]
    events: list[tuple[float, int, int]] = []
    version = [0] * SMS

    def rate(sm: int) -> float:
        return min(most_share, 1 / len(running[sm]))

    def schedule(sm: int) -> None:
        version[sm] += 1
        if running[sm]:
            end = since[sm] + (running[sm][0] - done[sm]) / rate(sm)
            heapq.heappush(events, (end, sm, version[sm]))

    def start(sm: int) -> None:
        i = next(blocks_of, None)
        if i is not None:
            heapq.heappush(running[sm], done[sm] + work[i * len(work) // blocks])

    for _ in range(resident):
        for sm in range(SMS):
            start(sm)
    for sm in range(SMS):
        schedule(sm)
    now = 0.0
    while events:
        now, sm, of = heapq.heappop(events)
        if of != version[sm]:
            continue
        done[sm] = heapq.heappop(running[sm])
        since[sm] = now
        start(sm)
        schedule(sm)
    return now


def imbalance(launch: Launch) -> float:
    """Time of the launch over that of its work spread evenly over all SMs."""
    known = launch.block_issues
    blocks = min(launch.blocks, 40 * SMS * launch.resident)  # more only repeat the middle
    total = sum(known) / len(known) * blocks
    if total == 0:
        return 1.0
    share = min(1.0, launch.block / 32 / WARPS_TO_SATURATE)
    even = total / SMS
    late = _makespan(tuple(known), blocks, launch.resident, share) - even
    return 1 + late / (even * launch.blocks / blocks)


def bounds(launch: Launch) -> dict[str, float]:
    """Seconds that each unit of the SMs, and L2, needs for this launch at its full rate."""
    units: Counter[str] = Counter()
    pipe = 0.0  # cycles of the pipe that L1 and shared memory have in common
    for name, issues in launch.operations.items():
        operation = name.split(".")[0]
        unit = unit_of(operation)
        units["issue"] += issues
        units[unit] += issues
        if unit == "multiply-add of integers":
            units["float"] += issues  # half of the float units
        if unit == "memory":
            # A pass moves 128 bytes; every instruction takes one at least.
            moved = max(launch.lines[name], launch.sectors[name] / 4) + launch.passes[name]
            pipe += max(issues, moved)
    per_cycle = SMS * CLOCK
    found = {unit: units[unit] / (rate * per_cycle) for unit, rate in RATES.items()}
    found["L1 and shared memory"] = pipe / per_cycle
    uneven = imbalance(launch)
    found = {unit: seconds * uneven for unit, seconds in found.items()}
    found["L2"] = 32 * sum(launch.missed.values()) / L2_RATE
    return found


# -------------------------------------------------------------------------------------------- rows


def describe(
    launches: Sequence[Launch], dram_bytes: float, extra_launches: int = 0
) -> dict[str, Any]:
    """One row: what its kernels do and the time that follows. DRAM counts once for all of them."""
    total, parts, binding = 0.0, [], []
    for launch in launches:
        limits = bounds(launch)
        worst = max(limits, key=lambda name: limits[name])
        total += limits[worst]
        binding.append((limits[worst], worst))
        parts.append(
            {
                "kernel": launch.kernel,
                "grid": list(launch.grid),
                "block": launch.block,
                "registers": launch.registers,
                "shared": launch.shared,
                "blocks_per_sm": launch.resident,
                "waves": round(launch.blocks / (SMS * launch.resident), 2),
                "imbalance": round(imbalance(launch), 3),
                "issues": round(launch.issues),
                "blocks_run": launch.blocks_run,
                "error": round(launch.error, 4),
                "longest_warp": launch.longest_warp,
                "microseconds": {k: round(v * 1e6, 2) for k, v in limits.items()},
                "l2_megabytes": round(32e-6 * sum(launch.missed.values()), 2),
                "hot": hot(launch),
                "phases": phases(launch),
            }
        )
    dram = dram_bytes / COPY_RATE
    bound = max(binding)[1] if binding else "DRAM"
    if dram > total:
        total, bound = dram, "DRAM"
    launched = len(launches) + extra_launches
    return {
        "seconds": total + LAUNCH * launched,
        "bound": bound,
        "floor_seconds": dram,
        "launches": launched,
        "issues": round(sum(launch.issues for launch in launches)),
        "error": max((launch.error for launch in launches), default=0.0),
        "classes": {k: round(v) for k, v in by_class(launches).items()},
        "kernels": parts,
    }


def hot(launch: Launch, most: int = 8) -> list[list[Any]]:
    """Where the kernel's own source issues most: file:line, share, most frequent opcodes."""
    lines: Counter[str] = Counter()
    for places, issues in launch.places.items():
        own = [p for p in places if re.search(r"csrc/cuda/\w+\.cuh?$", p[0])] or list(places)
        if own:
            file, line = own[0]
            lines[f"{Path(file).name}:{line}"] += issues
    return [[name, round(issues / launch.issues, 3)] for name, issues in lines.most_common(most)]


def phases(launch: Launch, most: int = 8) -> list[list[Any]]:
    """Shares of the lines of the kernel's body, with all that is inlined there."""
    lines: Counter[str] = Counter()
    for places, issues in launch.places.items():
        if places:
            file, line = places[-1]
            lines[f"{Path(file).name}:{line}"] += issues
    return [[name, round(issues / launch.issues, 3)] for name, issues in lines.most_common(most)]


def modelled() -> list[Any]:
    """The workloads that run on a GPU; of those that only cost a call, one is enough."""
    from glimpse_ext.bench.workloads import WORKLOADS

    return [
        work
        for work in WORKLOADS
        if work.operator != "paste_masks_to_rle" and (not work.overhead or work.name == "W5")
    ]


def workload_rows(
    work: Any, programs: dict[str, sass.Program], budget: float, dtypes: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    from glimpse_ext.bench import suite
    from glimpse_ext.bench.devices import make_device

    device = make_device("cpu")
    plain = suite.Setting(work, device, "float32", "contiguous")
    boxes, operator = plain.boxes(), plain.operator
    touched = suite.touched_pixels(plain, boxes)
    for dtype_name in dtypes:
        for layout in ("contiguous", "channels_last"):
            if work.mask and layout != "contiguous":
                continue
            setting = suite.Setting(work, device, dtype_name, layout)
            maps = setting.features()
            with torch.no_grad():
                result = operator.ours(work, boxes, setting.dtype)(maps)
            floors = suite.floor_bytes(setting, touched, maps, result.nbytes)
            for direction in operator.directions(("forward", "backward", "box gradient")):
                given = boxes.clone().requires_grad_(direction == "box gradient")
                pool = operator.ours(work, given, setting.dtype)
                leaves = [m.detach().requires_grad_(direction == "backward") for m in maps]
                with Recorder(programs, budget) as recorder:
                    if direction == "forward":
                        with torch.no_grad():
                            pool(leaves)
                if direction != "forward":
                    pooled = pool(leaves)
                    up = torch.randn(pooled.shape).to(pooled.dtype)
                    up = torch.empty_like(pooled).copy_(up).detach()
                    wanted = leaves if direction == "backward" else [given]
                    with recorder:
                        torch.autograd.grad(pooled, wanted, up, allow_unused=True)
                row = describe(recorder.launches, floors[direction])
                yield f"{work.name} {direction} {layout} {dtype_name}", row


# ------------------------------------------------------------------------------------- torchvision


def _pointer(tensor: Tensor) -> sass.Parameter:
    return sass.Parameter(struct.pack("<Q", tensor.data_ptr()), 8)


def _int(value: int) -> sass.Parameter:
    return sass.Parameter(struct.pack("<i", value), 4)


def torchvision_launch(
    programs: dict[str, sass.Program],
    direction: str,
    maps: Tensor,
    boxes: Tensor,
    pooled: Tensor,
    work: Any,
    scale: float,
    budget: float,
) -> Launch:
    """Its kernel on these tensors: ``pooled`` is written, or is the gradient that maps get."""
    half = maps.dtype == torch.float16
    name = f"roi_align_{direction}_kernel_impl<{'c10::Half' if half else 'float'}>"
    number = sass.Parameter(struct.pack("<e" if half else "<f", scale), 2 if half else 4)
    channels, height, width = maps.shape[1:]
    sizes = [channels, height, width, work.output_size, work.output_size, work.sampling_ratio]
    ratio = [_int(v) for v in sizes]
    aligned = sass.Parameter(struct.pack("<?", work.aligned), 1)
    count = pooled.numel()
    if direction == "forward":
        parameters = [_int(count), _pointer(maps), number, *ratio, aligned]
        parameters += [_pointer(boxes), _pointer(pooled)]
    else:
        parameters = [_int(count), _pointer(pooled), number, *ratio, aligned]
        parameters += [_pointer(maps), _pointer(boxes)]
        parameters += [_int(v) for v in (*pooled.stride(), maps.numel())]
    grid = (min(-(-count // 512), 4096), 1, 1)
    return gpu_kernels.execute(name, programs[name], parameters, grid, 512, 0, budget)


def torchvision_rows(
    work: Any, programs: dict[str, sass.Program], budget: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What torchvision runs: its kernel per level, the fill of its result, casts and copies.

    ``autocast`` is float32 with a cast of maps and result; channels_last needs a copy of the maps.
    """
    from glimpse_ext.bench import suite
    from glimpse_ext.bench.devices import make_device

    boxes = work.make_boxes()
    level = torch.zeros(len(boxes), dtype=torch.long)
    if len(work.strides) > 1:
        area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
        level = torch.floor(4 + torch.log2(area.sqrt() / 224) + 1e-6).clamp(2, 5).long() - 2
    touched = suite.touched_pixels(
        suite.Setting(work, make_device("cpu"), "float32", "contiguous"), boxes
    )
    for dtype in (torch.float32, torch.float16):
        maps = work.make_features(dtype, "contiguous")
        size = maps[0].element_size()
        map_bytes = sum(m.nbytes for m in maps)
        read = touched * work.channels * size
        for direction in ("forward", "backward"):
            launches = []
            out_bytes = len(boxes) * work.channels * work.output_size**2 * size
            for i, (features, scale) in enumerate(zip(maps, work.scales, strict=True)):
                mine = boxes[level == i].to(dtype).contiguous()
                if len(mine) == 0:
                    continue
                shape = (len(mine), work.channels, work.output_size, work.output_size)
                pooled = torch.zeros(shape, dtype=dtype)
                target = features if direction == "forward" else torch.zeros_like(features)
                launches.append(
                    torchvision_launch(
                        programs, direction, target, mine, pooled, work, scale, budget
                    )
                )
            # The result, or the gradient of the maps, is filled with zeros first.
            filled = out_bytes if direction == "forward" else map_bytes
            moved = read + out_bytes if direction == "forward" else out_bytes + 2 * read
            row = describe(launches, moved, extra_launches=len(launches))
            row["seconds"] += filled / COPY_RATE
            name = str(dtype).removeprefix("torch.")
            key = f"{work.name} {direction}"
            yield f"{key} contiguous {name}", row
            # A copy reads and writes what is not in its layout: the maps, or the gradient.
            copied = 2 * (map_bytes if direction == "forward" else out_bytes)
            copy = {**row, "seconds": row["seconds"] + copied / COPY_RATE + LAUNCH * len(maps)}
            yield f"{key} channels_last {name}", copy
            if dtype == torch.float32:
                # float32 kernels, and 6 bytes for each element that is cast.
                cast = 1.5 * (map_bytes + out_bytes) / COPY_RATE + LAUNCH * (len(maps) + 1)
                yield f"{key} contiguous autocast", {**row, "seconds": row["seconds"] + cast}
                yield f"{key} channels_last autocast", {**copy, "seconds": copy["seconds"] + cast}


# ---------------------------------------------------------------------------------------- validity


def validate(programs: dict[str, sass.Program], theirs: dict[str, sass.Program]) -> dict[str, Any]:
    """The machine code's results, its stores and its barriers, each against another source."""
    import glimpse_ext
    from glimpse_ext import _testing
    from glimpse_ext.bench.devices import make_device
    from glimpse_ext.bench.peers import OPERATORS
    from glimpse_ext.bench.suite import Setting
    from glimpse_ext.bench.workloads import select

    worst: dict[str, float] = {}
    rows = 0
    stored_exactly = True
    for work in modelled():
        small = work.tiny()
        plain = Setting(small, make_device("cpu"), "float32", "contiguous")
        boxes, operator = plain.boxes(), plain.operator
        for name in ("float32", "float16", "bfloat16"):
            dtype = getattr(torch, name)
            for layout in ("contiguous",) if work.mask else ("contiguous", "channels_last"):
                maps = small.make_features(dtype, layout)
                pool = operator.ours(small, boxes, dtype)
                right = pool(maps)
                with Recorder(programs) as recorder:
                    got = pool(maps)
                written = sum(
                    v for x in recorder.launches for k, v in x.bytes.items() if k.startswith("STG")
                )
                # The maximum also says which sample it is, in 4 bytes.
                chosen = 4 * got.numel() if small.operator == "roi_align_max" else 0
                stored_exactly &= written == got.nbytes + chosen
                pairs = [(got, right)]
                if operator.directions(("backward",)):
                    leaves = [m.requires_grad_() for m in maps]
                    result = pool(leaves)
                    up = torch.randn(result.shape, generator=torch.Generator().manual_seed(7))
                    up = torch.empty_like(result).copy_(up.to(dtype)).detach()
                    expected = torch.autograd.grad(result, leaves, up, retain_graph=True)
                    with Recorder(programs):
                        found = torch.autograd.grad(result, leaves, up)
                    pairs += list(zip(found, expected, strict=True))
                for a, b in pairs:
                    gap = (a.double() - b.double()).norm() / max(float(b.double().norm()), 1e-30)
                    worst[name] = max(worst.get(name, 0.0), float(gap))
                rows += len(pairs)

    # Barriers and shuffles: lanes in the machine code, calls of threads in the emulation.
    def calls() -> Counter[str]:
        found: Counter[str] = Counter()
        for _, call, count in _testing.emulation_reached_sites():
            found["barriers" if call == "__syncthreads" else call] += count
        return found

    features = torch.randn(1, 70, 30, 40)
    boxes = torch.tensor([[0, 3.0, 4, 100, 90], [0, 40.5, 33.25, 60, 44], [0, 0, 0, 150, 110]])
    before = calls()
    previous = _testing.use_backend("emulated")
    for layout in (torch.contiguous_format, torch.channels_last):
        glimpse_ext.roi_align(features.contiguous(memory_format=layout), boxes, 7, 0.25, 0, True)
    _testing.use_backend(previous)
    counted = calls() - before
    with Recorder(programs) as recorder:
        for layout in (torch.contiguous_format, torch.channels_last):
            glimpse_ext.roi_align(
                features.contiguous(memory_format=layout), boxes, 7, 0.25, 0, True
            )
    lanes = sum(v for x in recorder.launches for k, v in x.lanes.items() if k.startswith("BAR"))
    found = {
        "results": rows,
        "worst_relative_error": worst,
        "stored_bytes_exact": stored_exactly,
        "barriers_emulation": counted["barriers"],
        "barriers_machine_code": lanes,
    }
    # A sample of blocks against all of them.
    work = select(["W3"])[0]
    maps = work.make_features(torch.float32, "contiguous")
    pool = OPERATORS[work.operator].ours(work, work.make_boxes(), torch.float32)
    totals = []
    for budget in (4e6, math.inf):
        with Recorder(programs, budget) as recorder:
            pool(maps)
        totals.append(recorder.launches[0].issues)
    found["sample_over_complete"] = totals[0] / totals[1]
    if theirs:
        found["torchvision_relative_error"] = _validate_torchvision(theirs)
    return found


def _validate_torchvision(programs: dict[str, sass.Program]) -> float:
    from torchvision.ops import roi_align

    from glimpse_ext.bench.workloads import select

    work = select(["W1"])[0].tiny()
    boxes = work.make_boxes()
    maps = work.make_features(torch.float32, "contiguous")[0].requires_grad_()
    right = roi_align(
        maps, boxes, work.output_size, work.scales[0], work.sampling_ratio, work.aligned
    )
    up = torch.randn_like(right)
    gradient = torch.autograd.grad(right, maps, up)[0]
    got, found = torch.zeros_like(right), torch.zeros_like(maps)
    for direction, target, pooled in (("forward", maps.detach(), got), ("backward", found, up)):
        torchvision_launch(
            programs, direction, target, boxes, pooled, work, work.scales[0], math.inf
        )
    errors = [(a - b).norm() / b.norm() for a, b in ((got, right.detach()), (found, gradient))]
    return float(max(errors))


# --------------------------------------------------------------------------------------------- main


def static_counts(programs: dict[str, sass.Program]) -> dict[str, dict[str, int]]:
    """Instructions of each kernel by opcode."""
    return {
        name: dict(sorted(Counter(line.name for line in program.lines).items()))
        for name, program in sorted(programs.items())
    }


def static_hashes(programs: dict[str, sass.Program]) -> dict[str, str]:
    import hashlib

    return {
        name: hashlib.sha256(json.dumps(counts).encode()).hexdigest()[:12]
        for name, counts in static_counts(programs).items()
    }


def check() -> int:
    stored = json.loads(TABLE.read_text())
    if gpu_kernels.source_hash() == stored["source"]:
        print("the model is of these sources")
        return 0
    version = compile_gate.nvcc_version(compile_gate.find_nvcc())
    if version != stored["nvcc"]:
        print(f"the sources changed, and nvcc {version} is not that of the model: cannot tell")
        return 1
    now = static_hashes(gpu_kernels.compile_kernels())
    changed = sorted(
        k for k in now.keys() | stored["static"].keys() if now.get(k) != stored["static"].get(k)
    )
    for name in changed:
        both = name in now and name in stored["static"]
        print(f"{name}: {'other machine code' if both else 'new or gone'}")
    print(
        "the model is stale: run --update"
        if changed
        else "the sources changed, the machine code did not"
    )
    return 1 if changed else 0


def update(names: list[str], budget: float, dtypes: list[str]) -> int:
    from glimpse_ext.bench.workloads import select

    torch.set_num_threads(1)
    start = time.monotonic()
    programs = gpu_kernels.compile_kernels()
    theirs = gpu_kernels.torchvision_kernels()
    if theirs == {}:
        print("no CUDA build of torchvision: its rows stay as they are")
    stored: dict[str, Any] = {"rows": {}, "torchvision": {}}
    if TABLE.exists() and names:
        stored = json.loads(TABLE.read_text())
    elif TABLE.exists() and not theirs:
        stored["torchvision"] = json.loads(TABLE.read_text())["torchvision"]
    fresh = not names or stored.get("source") != gpu_kernels.source_hash()
    stored["nvcc"] = compile_gate.nvcc_version(compile_gate.find_nvcc())
    stored["source"] = gpu_kernels.source_hash()
    stored["static"] = static_hashes(programs)
    print(f"{len(programs)} kernels, {time.monotonic() - start:.0f} s", flush=True)
    if fresh or "validity" not in stored:
        stored["validity"] = validate(programs, theirs)
        print(stored["validity"], f"{time.monotonic() - start:.0f} s", flush=True)
    for work in select(names) if names else modelled():
        for key, row in workload_rows(work, programs, budget, dtypes):
            stored["rows"][key] = row
            print(
                f"{key}: {row['seconds'] * 1e6:.1f} us, {row['bound']}, "
                f"{row['issues'] / 1e6:.2f} M ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
        if theirs and work.operator in ("roi_align", "multiscale_roi_align"):
            for key, row in torchvision_rows(work, theirs, budget):
                stored["torchvision"][key] = row
                print(f"torchvision {key}: {row['seconds'] * 1e6:.1f} us", flush=True)
        save(stored)
    return 0


def save(stored: dict[str, Any]) -> None:
    from glimpse_ext.bench.workloads import WORKLOADS

    order = {work.name: i for i, work in enumerate(WORKLOADS)}
    for part in ("rows", "torchvision"):
        rows = stored[part]
        stored[part] = {k: rows[k] for k in sorted(rows, key=lambda key: order[key.split()[0]])}
    TABLE.write_text(one_row_per_line(stored))
    PAGE.write_text(gpu_report.page(stored))


def one_row_per_line(stored: dict[str, Any]) -> str:
    """So that a change of a kernel is as many changed lines as there are rows of it."""
    parts = []
    for name, value in stored.items():
        if name in {"rows", "torchvision", "static"}:
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="1 where the stored model is stale")
    action.add_argument("--update", action="store_true", help="run the kernels, rewrite the page")
    parser.add_argument("--workloads", default="", help="of --update: W1,W3; the others stay")
    parser.add_argument("--dtypes", default="float32,float16", help="of --update")
    parser.add_argument(
        "--budget", type=float, default=2e7, help="warp instructions of a launch to run (2e7)"
    )
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    names = [name for name in arguments.workloads.split(",") if name]
    return update(names, arguments.budget, arguments.dtypes.split(","))


if __name__ == "__main__":
    sys.exit(main())
