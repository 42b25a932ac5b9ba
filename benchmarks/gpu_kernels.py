# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels as sm_90 machine code, and every launch of them recorded on the host.

:func:`compile_kernels` compiles csrc/cuda and disassembles it. Inside :class:`Recorder` each launch
of the emulated backend goes to the interpreter of ``sass.py`` instead: the code that the GPU would
run, on the arguments that it would get. Large launches run a sample of their blocks.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import pickle
import re
import subprocess
import tempfile
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import compile_gate
import sass

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = "90"

# Of an SM of compute capability 9.0.
SM_THREADS, SM_BLOCKS, SM_REGISTERS, SM_SHARED = 2048, 32, 65536, 228 * 1024
L1_AND_SHARED = 256 * 1024


def find_tool(name: str) -> str | None:
    """From the toolkit, or the copy that the Triton package carries."""
    nvdisasm = compile_gate.find_nvdisasm(compile_gate.find_nvcc())
    if nvdisasm is None:
        return None
    beside = Path(nvdisasm).with_name(name)
    return str(beside) if beside.exists() else None


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def source_hash() -> str:
    """Of all that the machine code is made from."""
    digest = hashlib.sha256()
    files = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "geometry").glob("*.h")]
    files += [*(ROOT / "csrc" / "cuda").iterdir()]
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _disassemble(cubin: Path, line_information: bool) -> dict[str, sass.Program]:
    nvdisasm, cuobjdump = find_tool("nvdisasm"), find_tool("cuobjdump")
    if nvdisasm is None or cuobjdump is None:
        raise RuntimeError("nvdisasm and cuobjdump are needed; CUDA builds of torch bring them")
    flags = ["--print-line-info-inline"] if line_information else []
    listing = _output(nvdisasm, "--print-code", *flags, str(cubin))
    programs = sass.parse(listing)
    usage = _output(cuobjdump, "-res-usage", str(cubin))
    for match in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage):
        name, registers, shared = match.groups()
        if name in programs:
            programs[name].registers = int(registers)
            programs[name].static_shared = int(shared)
    return programs


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(source: Path) -> dict[str, sass.Program]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [compile_gate.find_nvcc(), "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo"]
        command += [f"-I{ROOT / 'csrc'}", f"-arch=sm_{ARCHITECTURE}", "-cubin", "-o", str(cubin)]
        subprocess.run([*command, str(source)], check=True)
        return _disassemble(cubin, line_information=True)


def compile_kernels(jobs: int = 2) -> dict[str, sass.Program]:
    """Every kernel of csrc/cuda by its short name. Kept in the temporary folder, by source."""
    version = compile_gate.nvcc_version(compile_gate.find_nvcc())
    tag = hashlib.sha256(f"{source_hash()} {version} {ROOT}".encode() + _own_source()).hexdigest()
    kept = Path(tempfile.gettempdir(), f"glimpse_sass_{os.getuid()}_{tag[:16]}.pickle")
    if kept.exists() and kept.stat().st_uid == os.getuid():
        made: dict[str, sass.Program] = pickle.loads(kept.read_bytes())
        return made
    made = _compile_kernels(jobs)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(pickle.dumps(made))
    partial.replace(kept)
    return made


def _own_source() -> bytes:
    return Path(__file__).read_bytes() + Path(sass.__file__).read_bytes()


def _compile_kernels(jobs: int) -> dict[str, sass.Program]:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        programs = {k: v for part in pool.map(_compile, sources()) for k, v in part.items()}
    names = compile_gate.short_names(programs)
    return {names[mangled]: program for mangled, program in programs.items()}


def torchvision_kernels() -> dict[str, sass.Program]:
    """The RoIAlign kernels out of torchvision's wheel, or none where there is no such wheel."""
    spec = importlib.util.find_spec("torchvision")
    cuobjdump = find_tool("cuobjdump")
    library = None
    if spec is not None and spec.origin is not None:
        library = Path(spec.origin).with_name("_C.so")
    override = os.environ.get("GLIMPSE_TORCHVISION_LIBRARY")
    if override:
        library = Path(override)
    if cuobjdump is None or library is None or not library.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump, "-xelf", f"sm_{ARCHITECTURE}", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            data = cubin.read_bytes()
            if b"29roi_align_forward_kernel_impl" not in data:
                continue
            programs = _disassemble(cubin, line_information=False)
            names = compile_gate.short_names(programs)
            return {re.sub(r"^.*?(roi_align)", r"\1", names[k]): v for k, v in programs.items()}
    return {}


# ----------------------------------------------------------------------------------------- launches


@dataclass
class Launch:
    """A kernel that ran: what all of its blocks did, estimated from those that ran here."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    registers: int
    resident: int  # blocks of an SM
    blocks_run: int
    error: float  # relative standard error of the issues, from the spread between blocks
    issues: float
    longest_warp: int
    block_issues: list[int]
    lanes: Counter[str]  # that were active, by opcode
    operations: Counter[str]  # issues by opcode with its modifiers
    sectors: Counter[str]  # 32-byte sectors of global memory, by opcode
    lines: Counter[str]
    passes: Counter[str]  # through shared memory
    missed: Counter[str]  # sectors that L1 does not have
    bytes: Counter[str]
    places: Counter[tuple[tuple[str, int], ...]] = field(default_factory=Counter)
    read_bytes: int = 0  # distinct, of the blocks that ran
    written_bytes: int = 0

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def complete(self) -> bool:
        return self.blocks_run == self.blocks


def resident_blocks(registers: int, shared: int, block: int) -> int:
    warps = -(-block // 32)
    by_registers = SM_REGISTERS // (-(-registers // 8) * 8 * 32 * warps) if registers else SM_BLOCKS
    by_shared = SM_SHARED // max(1, shared)
    return max(1, min(SM_BLOCKS, SM_THREADS // (warps * 32), by_registers, by_shared))


def execute(
    name: str,
    program: sass.Program,
    parameters: Sequence[sass.Parameter],
    grid: tuple[int, int, int],
    block: int,
    dynamic_shared: int,
    budget: float,
) -> Launch:
    """Run the launch, or as many blocks, evenly spread, as make up about ``budget`` issues."""
    blocks = math.prod(grid)
    # On sm_90 the static size includes the kilobyte that the system takes.
    shared = max(program.static_shared, 1024) + dynamic_shared
    resident = resident_blocks(program.registers, shared, block)
    l1 = max(16 * 1024, (L1_AND_SHARED - resident * shared) // resident)
    every = range(blocks)
    which: Sequence[int] = every
    if blocks > 64:
        pilot = spread(blocks, 32)
        tried = sass.run(program, parameters, grid, block, pilot, l1)
        mean = sum(tried.block_issues) / len(pilot)
        if mean * blocks > budget:
            which = spread(blocks, max(64, int(budget / max(mean, 1))))
    counts = sass.run(program, parameters, grid, block, which, l1)
    scale = blocks / len(which)
    mean = sum(counts.block_issues) / len(which)
    spread_of = sum((x - mean) ** 2 for x in counts.block_issues) / max(1, len(which) - 1)
    complete = len(which) == blocks
    error = 0.0 if complete or mean == 0 else math.sqrt(spread_of / len(which)) / mean
    launch = Launch(
        kernel=name,
        grid=grid,
        block=block,
        shared=shared,
        registers=program.registers,
        resident=resident,
        blocks_run=len(which),
        error=error,
        issues=sum(counts.issues) * scale,
        longest_warp=counts.longest_warp,
        block_issues=counts.block_issues,
        lanes=Counter(),
        operations=Counter(),
        sectors=Counter(),
        lines=Counter(),
        passes=Counter(),
        missed=Counter(),
        bytes=Counter(),
        read_bytes=32 * counts.read_sectors,
        written_bytes=32 * counts.written_sectors,
    )
    for i, line in enumerate(program.lines):
        if counts.issues[i] == 0:
            continue
        launch.operations[line.name] += counts.issues[i] * scale
        launch.places[line.places] += counts.issues[i] * scale
        for what in ("lanes", "sectors", "lines", "passes", "missed", "bytes"):
            value = getattr(counts, what)[i]
            if value:
                getattr(launch, what)[line.name] += value * scale
    return launch


def spread(blocks: int, count: int) -> list[int]:
    """About ``count`` block indices, one from each of as many equal stretches, always the same."""
    count = min(count, blocks)
    picked = []
    for i in range(count):
        low, high = blocks * i // count, blocks * (i + 1) // count
        draw = int(hashlib.blake2b(f"{i}".encode(), digest_size=4).hexdigest(), 16)
        picked.append(low + draw % (high - low))
    return picked


class _Described(ctypes.Structure):
    """emulation::KernelLaunch"""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64),
        ("parameter", ctypes.POINTER(ctypes.c_void_p)),
        ("size", ctypes.POINTER(ctypes.c_uint64)),
        ("alignment", ctypes.POINTER(ctypes.c_uint64)),
    ]


class Recorder:
    """Within it, calls on CPU tensors run the machine code; ``launches`` says what it did."""

    def __init__(self, programs: dict[str, sass.Program], budget: float = math.inf) -> None:
        from glimpse_ext import _testing

        self.launches: list[Launch] = []
        self.budget = budget
        self._programs = programs
        self._testing = _testing
        self._names = _kernel_names(str(_testing.__file__))
        self._message = ctypes.create_string_buffer(4096)
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Described))
        self._callback = kind(self._launched)

    def _launched(self, described: ctypes._Pointer[_Described]) -> int | None:
        try:
            launch = described[0]
            name = self._names[launch.kernel - _base_address(str(self._testing.__file__))]
            parameters = [
                sass.Parameter(
                    ctypes.string_at(launch.parameter[i], launch.size[i]), launch.alignment[i]
                )
                for i in range(launch.parameters)
            ]
            grid = (launch.grid[0], launch.grid[1], launch.grid[2])
            self.launches.append(
                execute(
                    name,
                    self._programs[name],
                    parameters,
                    grid,
                    launch.block,
                    launch.shared,
                    self.budget,
                )
            )
        except Exception as error:  # must not pass through C++ as a Python exception
            self._message.value = f"{type(error).__name__}: {error}".encode()[:4000]
            return ctypes.addressof(self._message)
        return None

    def __enter__(self) -> Recorder:
        self._previous = self._testing.use_backend("emulated")
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._testing.emulation_set_launcher(address)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._testing.emulation_set_launcher(0)
        self._testing.use_backend(self._previous)


@functools.cache
def _kernel_names(library: str) -> dict[int, str]:
    """Short name of each function of a library by its offset; the kernels are hidden symbols."""
    mangled = {}
    for line in _output("nm", "--defined-only", library).splitlines():
        address, kind, name = line.split(" ", 2)
        if kind in "tTwW" and "_kernel" in name:
            mangled[int(address, 16)] = name
    short = compile_gate.short_names(mangled.values())
    return {address: short[name] for address, name in mangled.items()}


@functools.cache
def _base_address(library: str) -> int:
    path = os.path.realpath(library)
    with open("/proc/self/maps") as maps:
        starts = [int(m.split("-")[0], 16) for m in maps if os.path.realpath(m.split()[-1]) == path]
    return min(starts)
