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
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from glimpse_ext import bench  # noqa: E402
from glimpse_ext.bench import report as bench_report  # noqa: E402
from glimpse_ext.bench.memory import peak_extra  # noqa: E402
from glimpse_ext.bench.peers import OPERATORS, PEER_NAMES  # noqa: E402
from glimpse_ext.bench.suite import DTYPES, Part, Plan  # noqa: E402
from glimpse_ext.bench.workloads import LAYOUTS, WORKLOADS, Workload, select  # noqa: E402

Report = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large everything runs."""

    device: torch.device
    dry: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------ inputs of the bench


def one_of_each() -> list[Workload]:
    """A workload of every operator, and the two others that reach kernels of their own."""
    chosen: dict[str, Workload] = {}
    for work in WORKLOADS:
        if not work.overhead:
            chosen.setdefault(work.operator, work)
    return [*chosen.values(), *select(["W2b", "W11b"])]


def small_works(setting: Setting) -> list[Workload]:
    """Few enough boxes to run them many times."""
    if setting.dry:
        return [work.tiny() for work in one_of_each()]
    thin = [replace(work, channels=min(work.channels, 256)) for work in one_of_each()]
    return [work if work.whole else replace(work, boxes=min(work.boxes, 200)) for work in thin]


@dataclass(frozen=True)
class Inputs:
    """What a call of our operator is given."""

    work: Workload
    maps: list[Tensor]
    rows: Tensor
    dtype: torch.dtype
    """Of the result; that of the maps where they are not bytes."""

    @classmethod
    def make(
        cls, setting: Setting, work: Workload, dtype: torch.dtype, layout: str, seed: int = 0
    ) -> Inputs:
        maps = [m.to(setting.device) for m in work.make_features(dtype, layout, seed)]
        rows = OPERATORS[work.operator].place(work, work.make_boxes(seed))
        return cls(work, maps, rows.to(setting.device), dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.maps, self.rows]

    def every_other(self) -> Inputs:
        operator = OPERATORS[self.work.operator]
        index = torch.arange(0, self.rows.shape[operator.rows], 2, device=self.rows.device)
        maps = [m[index] for m in self.maps] if operator.paired else self.maps
        return Inputs(self.work, maps, self.rows.index_select(operator.rows, index), self.dtype)

    def call(self) -> list[Tensor]:
        """The result and every gradient there is. It makes nothing that a graph cannot hold."""
        operator = OPERATORS[self.work.operator]
        maps, rows = self.maps, self.rows
        if "maps" in operator.gradients:
            maps = [m.detach().requires_grad_() for m in maps]
        if "boxes" in operator.gradients:
            rows = rows.detach().requires_grad_()
        pooled = operator.ours(self.work, rows, self.dtype)(maps)
        wanted = [t for t in (*maps, rows) if t.requires_grad]
        if not wanted:
            return [pooled]
        grads = torch.autograd.grad(pooled, wanted, torch.ones_like(pooled))
        return [pooled.detach(), *grads]


def combinations(setting: Setting) -> Iterator[tuple[Workload, torch.dtype, str]]:
    for work in small_works(setting):
        for dtype in DTYPES.values():
            for layout in list(LAYOUTS)[:1] if work.mask else LAYOUTS:
                yield work, dtype, layout


def label_of(work: Workload, dtype: torch.dtype, layout: str) -> str:
    return f"{work.name} {work.operator} {str(dtype).removeprefix('torch.')} {layout}"


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


# ------------------------------------------------------------------------------------------- timing


def run_bench(setting: Setting, part: Part, seconds: float) -> Report:
    """`glimpse-ext bench` on this device; rows that are not done in time are left out."""
    plan = Plan(
        (part,), PEER_NAMES, rounds=9, minutes=seconds / 60, patience=2.0, stops=not setting.dry
    )
    if setting.dry:
        short = replace(part, devices=("cpu",), workloads=tuple(w.tiny() for w in part.workloads))
        plan = replace(plan, parts=(short,), rounds=2, round_seconds=1e-4, seconds=0.0)
    results = bench.run(plan, quick=setting.dry)
    wrong = [bench_report.describe(row) for row in results["rows"] if not row["ok"]]
    slower = [row for row in results["rows"] if row["ok"] and bench_report.slower_than(row)]
    remark = f"{len(results['rows'])} rows, a peer is faster in {len(slower)}"
    if results["unfinished"]:
        remark += f"; no time for {results['unfinished']}"
    return {"ok": not wrong, "summary": remark, "faults": wrong[:20], "results": results}


def part_timing(setting: Setting) -> Report:
    """Float32, contiguous and channels_last: every workload."""
    works = tuple(select(["W1", "W3"]) if setting.dry else WORKLOADS)
    part = Part(works, ("cuda",), directions=("forward", "backward"))
    return run_bench(setting, part, LIMITS["timing"] - 60)


def part_timing16(setting: Setting) -> Report:
    """16 bits, for feature maps."""
    names = ["W1"] if setting.dry else ["W1", "W2", "W3", "W4", "W10"]
    dtypes = ("float16", "bfloat16")
    part = Part(tuple(select(names)), ("cuda",), dtypes, directions=("forward", "backward"))
    return run_bench(setting, part, LIMITS["timing16"] - 60)


# -------------------------------------------------------------------------------- correctness parts


def part_hostile(setting: Setting) -> Report:
    """NaN, infinite, huge and empty boxes, bad indices, and sizes that reach every kernel.

    Also what compute-sanitizer watches. Results are compared with those of the CPU kernels.
    """
    import cases
    import kernel_cases
    import operators

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

    def small(operator: operators.Operator, case: cases.Case, image: Tensor) -> list[Tensor]:
        image = image.detach()
        rows = operator.boxes(case).float().to(image.device)
        leaves = {"image": image, "boxes": rows}
        wanted = [leaves[name].requires_grad_() for name in operator.gradients]
        result = operator.call(image, rows, case)
        grads = torch.autograd.grad(result, wanted, torch.ones_like(result))
        return [result.detach(), *grads]

    # Every instruction is slow under the sanitizer, and it looks at addresses and not at numbers.
    layouts = ["contiguous", "channels_last"] if under_sanitizer else cases.LAYOUTS
    step = 11 if under_sanitizer or setting.dry else 1
    for number, operator in enumerate(operators.OPERATORS):
        for case in cases.CASES[number % step :: step]:
            for layout in layouts:
                for dtype in (torch.float32, torch.float16):
                    image = cases.arrange(case.image(dtype), layout)
                    there = cases.arrange(image.to(setting.device), layout)
                    label = f"{operator} {case} {layout} {dtype}"
                    compare(label, small(operator, case, there), small(operator, case, image))

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


def unwritten(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 0


def part_streams(setting: Setting) -> Report:
    """Inputs that a slow stream has yet to write: a launch on any other stream reads others."""
    faults = []
    for work, dtype, layout in combinations(setting):
        full = Inputs.make(setting, work, dtype, layout)
        expected = full.call()
        late = replace(full, maps=[torch.full_like(m, unwritten(m.dtype)) for m in full.maps])
        setting.synchronize()
        with side_stream(setting) as stream:
            if stream is not None:
                torch.cuda._sleep(20_000_000)
            for empty, source in zip(late.maps, full.maps, strict=True):
                empty.copy_(source)
            actual = late.call()
        setting.synchronize()
        if not same(actual, expected):
            faults.append(label_of(work, dtype, layout))
    devices = torch.cuda.device_count() if setting.device.type == "cuda" else 0
    for work in small_works(setting) if devices > 1 else []:
        here, there = (
            Inputs.make(
                replace(setting, device=torch.device("cuda", i)), work, torch.float32, "contiguous"
            ).call()
            for i in (0, devices - 1)
        )
        if not same([t.cpu() for t in here], [t.cpu() for t in there]):
            faults.append(f"{work.name}: the last device gives other bits than the first")
    return {"ok": not faults, "devices": devices, "faults": faults}


def capture(setting: Setting, inputs: Inputs) -> tuple[Callable[[], object], list[Tensor]]:
    """A graph of a call, and the tensors that a replay fills; without CUDA the call itself."""
    with side_stream(setting) as stream:
        if stream is None:
            captured = inputs.call()

            def again() -> None:
                for old, new in zip(captured, inputs.call(), strict=True):
                    old.copy_(new)

            return again, captured
        for _ in range(3):
            inputs.call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = inputs.call()
    return graph.replay, captured


def part_graphs(setting: Setting) -> Report:
    """Forward and backward captured once, replayed with other features and other boxes."""
    faults = []
    for work, dtype, layout in combinations(setting):
        all_inputs = [Inputs.make(setting, work, dtype, layout, seed) for seed in range(3)]
        expected = [inputs.call() for inputs in all_inputs]
        first = all_inputs[0]
        maps = [m.clone() for m in first.maps]
        static = replace(first, maps=maps, rows=first.rows.clone())
        replay, captured = capture(setting, static)
        for i in (1, 2, 0):
            for target, fresh in zip(static.tensors, all_inputs[i].tensors, strict=True):
                target.copy_(fresh)
            setting.synchronize()
            replay()
            setting.synchronize()
            if not same(captured, expected[i]):
                faults.append(f"{label_of(work, dtype, layout)}, replay {i}")
    return {"ok": not faults, "faults": faults}


def part_repeats(setting: Setting) -> Report:
    """The same bits in every run, alone or with other boxes."""
    faults = []
    repeats = 2 if setting.dry else 25
    for work, dtype, layout in combinations(setting):
        label = label_of(work, dtype, layout)
        inputs = Inputs.make(setting, work, dtype, layout, 1)
        first = inputs.call()
        if not all(same(first, inputs.call()) for _ in range(repeats)):
            faults.append(f"{label}: runs differ")
        half = inputs.every_other().call()
        # Points are along the last dimension of the result.
        points = OPERATORS[work.operator].rows == 1
        kept = first[0][..., ::2] if points else first[0][::2]
        if not same([kept], half[:1]):
            faults.append(f"{label}: other boxes change a box")
        if "boxes" in OPERATORS[work.operator].gradients:
            kept = first[-1][:, ::2] if points else first[-1][::2]
            if not same([kept], half[-1:]):
                faults.append(f"{label}: other boxes change the gradient of a box")
    return {"ok": not faults, "repeats": repeats, "faults": faults}


def part_memory(setting: Setting) -> Report:
    """Bytes that backward needs beyond the gradient that it returns."""
    rows: list[Report] = []
    for work in one_of_each():
        operator = OPERATORS[work.operator]
        if "maps" not in operator.gradients:
            continue
        work = work.tiny() if setting.dry else work
        for layout in LAYOUTS:
            inputs = Inputs.make(setting, work, torch.float32, layout, 1)
            maps = [m.requires_grad_() for m in inputs.maps]
            pooled = operator.ours(work, inputs.rows, torch.float32)(maps)
            grad = torch.ones_like(pooled)

            def backward(
                pooled: Tensor = pooled, maps: list[Tensor] = maps, grad: Tensor = grad
            ) -> tuple[Tensor, ...]:
                return torch.autograd.grad(pooled, maps, grad, retain_graph=True)

            backward()
            extra = peak_extra(backward, setting.device) if not setting.dry else None
            rows.append(
                {
                    "workload": work.name,
                    "layout": layout,
                    "gradient_bytes": sum(m.nbytes for m in maps),
                    "extra_bytes": extra,
                }
            )
    # The caching allocator rounds every map up to 2 MB at most, and workspaces to 512 bytes.
    limit = 2**20 + 4 * 2**21
    over = [f"{r['workload']} {r['layout']}" for r in rows if (r["extra_bytes"] or 0) >= limit]
    return {"ok": not over, "faults": over, "rows": rows}


def part_no_sync(setting: Setting) -> Report:
    """Nothing waits for the device: torch raises on every synchronising call."""
    faults = []
    for work, dtype, layout in combinations(setting):
        inputs = Inputs.make(setting, work, dtype, layout, 1)
        inputs.call()
        if setting.device.type != "cuda":
            continue
        setting.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            inputs.call()
        except RuntimeError as error:
            faults.append(f"{label_of(work, dtype, layout)}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": not faults, "faults": faults}


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
    "timing16": part_timing16,
    "memcheck": part_memcheck,
    "racecheck": part_racecheck,
    "synccheck": part_synccheck,
    "tests": part_tests,
}
# Seconds; together half an hour.
LIMITS = dict.fromkeys(PARTS, 70) | {
    "hostile": 90,
    "graphs": 90,
    "repeats": 90,
    "timing": 300,
    "timing16": 150,
    "memcheck": 160,
    "racecheck": 160,
    "synccheck": 160,
    "tests": 390,
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
    for name, part in results["parts"].items():
        if part.get("table"):
            lines += ["", f"## {name}", "", part["table"].strip()]
    return "\n".join(lines) + "\n"


def keep_results(report: Report, path: Path) -> None:
    """Results of the bench in a file of their own, for its other commands; their table here."""
    results = report.pop("results", None)
    if results is not None:
        bench_report.save(results, path)
        report["bench"] = path.name
        report["table"] = bench_report.markdown(results)


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
        keep_results(report, written.with_name(f"{written.stem}-{name}.json"))
        report["seconds"] = round(time.monotonic() - start, 1)
        results["parts"][name] = report
        print("passed" if report["ok"] else "FAILED", f"({report['seconds']} s)", flush=True)
        written.write_text(json.dumps(results, indent=1) + "\n")
        written.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
