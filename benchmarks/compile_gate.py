#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every CUDA kernel for every architecture and holds what comes out against a table.

    python benchmarks/compile_gate.py --check     # what CI runs: fails when code got worse
    python benchmarks/compile_gate.py --update    # rewrites the table after a deliberate change

Needs nvcc, no GPU. Registers, spills, stack and static shared memory come from ptxas; 128-bit loads
and atomics are counted in the PTX and, where nvdisasm is found, in the machine code as well. The
table is benchmarks/results/compile_gate.json, docs/compile_gate.md is its summary.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "compile_gate.json"
SUMMARY = ROOT / "docs" / "compile_gate.md"
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]

# Registers may move by this much before it counts as a change: compilers allocate in steps.
REGISTER_SLACK = 4


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. ``None``: not known, for lack of a disassembler."""

    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    stack: int  # bytes per thread
    static_shared: int  # bytes
    vector_loads: int  # 128-bit loads from global memory in the PTX
    atomics: int  # atom and red in the PTX
    sass_vector_loads: int | None  # LDG.E.128
    sass_atomics: int | None  # ATOM, ATOMG, ATOMS, RED, REDG
    sass_local: int | None  # LDL and STL


Table = dict[str, dict[str, Kernel]]  # kernel, architecture

# Why the kernels without 128-bit loads have none.
NARROW_LOADS = {
    "`sample_nhwc_kernel<T, 1>` and `<T, 2>`, `frames_pool_kernel<T, 1>`": "they are chosen where "
    "channels, strides or an address do not come in 16 bytes",
    "`sample_cells_kernel`, `sample_planes_kernel`": "lanes are cells or points, whose pixels lie "
    "where boxes are; of few channels there is no pack",
    "`sample_nchw_kernel`": "rows of pixels start anywhere; neighbouring lanes read neighbours",
    "`sample_simple_kernel`, `gather_simple_kernel`, `grad_boxes_simple_kernel`": "any strides, "
    "any sizes: one element at a time",
    "`grad_boxes_taps_kernel`": "lanes are taps along x, side by side but not aligned; a lane "
    "loads 8 channels at a time",
    "`grad_boxes_sum_kernel`": "adds a few numbers for each box",
    "`frames_chosen_kernel`, `frames_grad_chosen_kernel`": "every channel of a cell has a sample "
    "of its own",
    "`frames_grad_features_kernel`, `frames_grad_boxes_kernel`": "lanes are channels or pixels "
    "side by side; a warp reads 64 to 256 bytes in one piece",
    "`paste_kernel`": "masks are small and stay in L1; stores are 16 bytes",
    "`paste_bits_kernel`, `paste_count_kernel`, `paste_list_kernel`": "masks stay in L1, and a "
    "thread reads them for a row of the mask at a time",
    "`copy_glimpse_kernel` with noise, `plane_statistics_kernel`": "bound by the arithmetic of the "
    "noise and of sums in double",
}


# ------------------------------------------------------------------------------------------ compile


def find_nvcc() -> str:
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if folder and Path(folder, "bin", "nvcc").exists():
            return str(Path(folder, "bin", "nvcc"))
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        sys.exit("compile_gate: no nvcc was found (CUDA_HOME, CUDACXX, PATH)")
    return nvcc


def find_nvdisasm(nvcc: str) -> str | None:
    """From the toolkit, or the copy that the Triton package carries."""
    candidates = [shutil.which("nvdisasm"), str(Path(nvcc).resolve().parent / "nvdisasm")]
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        candidates.append(str(Path(folder, "backends", "nvidia", "bin", "nvdisasm")))
    return next((path for path in candidates if path and Path(path).exists()), None)


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """``sample_nhwc_kernel<float, 4>`` for each mangled name."""
    names = list(mangled)
    if not names:
        return {}
    text = "\n".join(names)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return dict(zip(names, map(shorten, done.stdout.splitlines()), strict=True))


def shorten(signature: str) -> str:
    text = signature.replace("(anonymous namespace)::", "").replace("glimpse::cuda::", "")
    text = text.replace("glimpse::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i]
    return text


def properties(log: str) -> dict[str, dict[str, int]]:
    """Numbers of each kernel in the output of ``ptxas -v``."""
    kernels: dict[str, dict[str, int]] = {}
    name = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match.group(1)
            kernels[name] = {"static_shared": 0}
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match.group(1)  # may be a device function that was not inlined
        elif name not in kernels:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            for key, value in zip(
                ("stack", "spill_stores", "spill_loads"), match.groups(), strict=True
            ):
                kernels[name][key] = int(value)
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[name]["registers"] = int(match.group(1))
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[name]["static_shared"] = int(shared.group(1))
    return kernels


def count_ptx(ptx: str) -> dict[str, dict[str, int]]:
    """128-bit global loads and atomics of each entry function."""
    counts: dict[str, dict[str, int]] = {}
    for match in re.finditer(r"\.entry\s+(\w+)\s*\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL):
        name, body = match.groups()
        wide = re.findall(r"\bld\.global(?:\.\w+)*\.(?:v4\.[bfus]32|v2\.[bfus]64)\b", body)
        atomics = re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", body, re.MULTILINE)
        counts[name] = {"vector_loads": len(wide), "atomics": len(atomics)}
    return counts


def count_sass(sass: str) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)", sass, flags=re.MULTILINE)
    for name, body in zip(sections[1::2], sections[2::2], strict=True):
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", body, re.M
        )
        counts[name] = {
            "sass_vector_loads": sum(bool(re.match(r"LDG\..*\b128\b", i)) for i in instructions),
            "sass_atomics": sum(bool(re.match(r"(ATOM[GS]?|REDG?)\b", i)) for i in instructions),
            "sass_local": sum(bool(re.match(r"(LDL|STL)\b", i)) for i in instructions),
        }
    return counts


def compile_one(nvcc: str, nvdisasm: str | None, source: Path, architecture: str) -> Table:
    number = architecture.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["--keep", "--keep-dir", folder, "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
        known = properties(done.stderr + done.stdout)
        for ptx in Path(folder).glob("*.ptx"):
            for name, counts in count_ptx(ptx.read_text()).items():
                known[name].update(counts)
        sass: dict[str, dict[str, int]] = {}
        if nvdisasm is not None and known:
            disassemble = [nvdisasm, "--print-code", str(cubin)]
            text = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
            sass = count_sass(text)
    nothing = {"sass_vector_loads": None, "sass_atomics": None, "sass_local": None}
    names = short_names(known)
    return {
        f"{source.stem}: {names[name]}": {
            architecture: Kernel(**numbers, **sass.get(name, nothing))
        }
        for name, numbers in known.items()
    }


def compile_all(architectures: list[str], jobs: int, need_nvdisasm: bool) -> tuple[Table, str]:
    nvcc = find_nvcc()
    nvdisasm = find_nvdisasm(nvcc)
    if nvdisasm is None and need_nvdisasm:
        sys.exit("compile_gate: --update needs nvdisasm; CUDA builds of torch bring it with Triton")
    if nvdisasm is None:
        print("no nvdisasm: 128-bit loads and atomics are counted in the PTX only")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        sys.exit("csrc/cuda holds no kernel")
    table: Table = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        work = [(source, architecture) for source in sources for architecture in architectures]
        done: Iterable[Table] = pool.map(lambda pair: compile_one(nvcc, nvdisasm, *pair), work)
        try:
            from tqdm import tqdm

            done = tqdm(done, total=len(work), unit="compile")
        except ImportError:
            pass
        for part in done:
            for kernel, numbers in part.items():
                table.setdefault(kernel, {}).update(numbers)
    return table, nvcc_version(nvcc)


# -------------------------------------------------------------------------------------------- table


def load() -> tuple[Table, str]:
    stored = json.loads(TABLE.read_text())
    names = [field.name for field in fields(Kernel)]
    table = {
        kernel: {
            architecture: Kernel(**dict(zip(names, numbers, strict=True)))
            for architecture, numbers in by_architecture.items()
        }
        for kernel, by_architecture in stored["kernels"].items()
    }
    return table, stored["nvcc"]


def save(table: Table, version: str) -> None:
    """One line per kernel and architecture, so that a change is one changed line."""
    kernels = []
    for kernel in sorted(table):
        rows = [
            f"      {json.dumps(architecture)}: {json.dumps(list(asdict(numbers).values()))}"
            for architecture, numbers in table[kernel].items()
        ]
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(rows) + "\n    }")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(
        "{\n"
        f'  "nvcc": {json.dumps(version)},\n'
        f'  "columns": {json.dumps([field.name for field in fields(Kernel)])},\n'
        '  "kernels": {\n' + ",\n".join(kernels) + "\n  }\n}\n"
    )


def span(values: Iterable[int]) -> str:
    numbers = sorted(set(values))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def summarise(table: Table, version: str) -> str:
    architectures = next(iter(table.values())).keys()
    lines = [
        "# What the compiler makes of the CUDA kernels",
        "",
        f"nvcc {version}, architectures {', '.join(architectures)}; a range is over architectures.",
        "No kernel has an atomic: every output element has one owner. None has a stack or spills.",
        "Generated by:",
        "",
        "```",
        "python benchmarks/compile_gate.py --update",
        "```",
        "",
        "| kernel | registers | spills (bytes) | stack (bytes) | static shared (bytes) "
        "| 128-bit loads, PTX | LDG.E.128, machine code |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in sorted(table):
        all_of = list(table[kernel].values())
        sass = [numbers.sass_vector_loads for numbers in all_of]
        cells = [
            f"`{kernel}`",
            span(numbers.registers for numbers in all_of),
            span(numbers.spill_stores + numbers.spill_loads for numbers in all_of),
            span(numbers.stack for numbers in all_of),
            span(numbers.static_shared for numbers in all_of),
            span(numbers.vector_loads for numbers in all_of),
            "–" if None in sass else span(number for number in sass if number is not None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Kernels without 128-bit loads, and why:", ""]
    lines += [f"- {kernels}: {why}" for kernels, why in NARROW_LOADS.items()]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- check


def faults(kernel: str, architecture: str, numbers: Kernel) -> list[str]:
    """What no kernel may have, whatever the table says."""
    found = []
    if numbers.atomics or numbers.sass_atomics:
        found.append("it contains an atomic, so results depend on the order of threads")
    if numbers.spill_stores or numbers.spill_loads or numbers.stack or numbers.sass_local:
        found.append(
            f"it has {numbers.stack} bytes of stack and spills {numbers.spill_stores} bytes; "
            "__launch_bounds__ and what it keeps in registers do not go together"
        )
    return [f"{kernel} [{architecture}]: {text}" for text in found]


def changes(kernel: str, architecture: str, now: Kernel, was: Kernel, same_nvcc: bool) -> list[str]:
    found = []
    if same_nvcc and now.registers > was.registers + REGISTER_SLACK:
        found.append(f"{now.registers} registers, was {was.registers}")
    for name in ("spill_stores", "spill_loads", "stack"):
        if getattr(now, name) > getattr(was, name):
            found.append(f"{name} of {getattr(now, name)} bytes, was {getattr(was, name)}")
    if was.vector_loads and not now.vector_loads:
        found.append(f"no 128-bit load in the PTX, was {was.vector_loads}")
    if was.sass_vector_loads and now.sass_vector_loads == 0:
        found.append(f"no LDG.E.128 in the machine code, was {was.sass_vector_loads}")
    return [f"{kernel} [{architecture}]: {text}" for text in found]


def compare(now: Table, was: Table, architectures: list[str], same_nvcc: bool) -> list[str]:
    found = [f"{kernel}: not in the table" for kernel in sorted(now.keys() - was.keys())]
    found += [f"{kernel}: gone" for kernel in sorted(was.keys() - now.keys())]
    for kernel in sorted(now):
        for architecture in architectures:
            numbers = now[kernel].get(architecture)
            before: Mapping[str, Kernel] = was.get(kernel, {})
            if numbers is not None:
                found += faults(kernel, architecture, numbers)
            if numbers is not None and architecture in before:
                found += changes(kernel, architecture, numbers, before[architecture], same_nvcc)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the table")
    action.add_argument("--update", action="store_true", help="rewrite the table")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="of --check only")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    arguments = parser.parse_args()
    architectures = ARCHITECTURES if arguments.update else arguments.architectures.split(",")

    table, version = compile_all(architectures, arguments.jobs, arguments.update)
    if arguments.update:
        found = compare(table, table, architectures, same_nvcc=True)
        if not found:
            save(table, version)
            SUMMARY.parent.mkdir(exist_ok=True)
            SUMMARY.write_text(summarise(table, version))
    else:
        stored, stored_version = load()
        same_nvcc = stored_version == version
        if not same_nvcc:
            print(f"nvcc {version}, the table is of {stored_version}: registers are not compared")
        found = compare(table, stored, architectures, same_nvcc)
    for line in found:
        print(line)
    print(f"{len(table)} kernels, {len(architectures)} architectures: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
