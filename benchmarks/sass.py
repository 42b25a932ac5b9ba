# SPDX-License-Identifier: BSD-3-Clause
"""Machine code of CUDA kernels (sm_90): the listing of nvdisasm, parsed, and run on the host.

``parse`` turns a listing into :class:`Program` objects, ``run`` gives one to the interpreter of
``sass_machine.cpp`` and returns how often each instruction was issued and what memory it touched.
An instruction that it does not know is an error where it is reached; nothing is guessed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("sass_machine.cpp")
PARAMETERS_AT = 0x210  # in constant bank 0, on sm_90
INSTRUCTION_BYTES = 16

(NONE, REG, UREG, IMM, CONST, PRED, UPRED, ADDRESS, LABEL, BARRIER) = range(10)
NO_REG, NO_UREG, TRUE = 255, 63, 7


def _words(text: str) -> list[str]:
    return text.split()


# The order of these three is that of sass_machine.cpp.
FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(
        _words(
            "X HI WIDE U32 EX L W LONG SX32 SH FTZ SIGNED DIV ALL UP DOWN BFLY F32 BF16 NAN "
            "RSQ RCP 64H EX2 LG2 SIN COS SQRT SHORT CAS COLLECTIVE CONV"
        )
    )
}
COMPARISONS = {
    name: number
    for number, name in enumerate(
        _words("LT EQ LE GT NE GE LTU EQU LEU GTU NEU GEU NUM NAN"), start=1
    )
}
FORMATS = {
    name: number for number, name in enumerate(_words("S32 U32 S64 U64 F32 F64 U16 S16 U8 S8 F16"))
}
ROUNDINGS = {"RN": 0, "RM": 1, "FLOOR": 1, "RP": 2, "CEIL": 2, "RZ": 3, "TRUNC": 3}
SPECIAL = {"SRZ": 0, "SR_TID.X": 1, "SR_TID.Y": 2, "SR_TID.Z": 3, "SR_CTAID.X": 4}
SPECIAL |= {"SR_CTAID.Y": 5, "SR_CTAID.Z": 6, "SR_LANEID": 7, "SR_CgaCtaId": 8, "SR_SWINHI": 10}
FLOATS = {"FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSET", "FSEL", "FCHK", "MUFU", "FRND", "F2FP"}
FLOATS |= {"F2F", "F2I"}
DOUBLES = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
HALVES = {"HADD2", "HMUL2", "HFMA2"}
MEMORY = {"LD", "LDG", "LDS", "LDL", "LDGSTS", "ST", "STG", "STS", "STL", "RED", "REDG", "ATOM"}
MEMORY |= {"ATOMG", "LDC", "ULDC"}


class _Operand(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint8),
        ("negative", ctypes.c_uint8),
        ("absolute", ctypes.c_uint8),
        ("inverted", ctypes.c_uint8),
        ("reg", ctypes.c_int16),
        ("ureg", ctypes.c_int16),
        ("half", ctypes.c_uint8),
        ("wide", ctypes.c_uint8),
        ("scale", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
        ("value", ctypes.c_int64),
    ]


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_uint16),
        ("guard", ctypes.c_uint8),
        ("guard_inverted", ctypes.c_uint8),
        ("guard_uniform", ctypes.c_uint8),
        ("operands", ctypes.c_uint8),
        ("bytes", ctypes.c_uint8),
        ("compare", ctypes.c_uint8),
        ("combine", ctypes.c_uint8),
        ("rounding", ctypes.c_uint8),
        ("source", ctypes.c_uint8),
        ("target", ctypes.c_uint8),
        ("flags", ctypes.c_uint32),
        ("operand", _Operand * 8),
    ]


class _Count(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("issues", "lanes", "sectors", "lines", "passes", "missed", "bytes")
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.POINTER(_Instruction)),
        ("instructions", ctypes.c_uint64),
        ("constants", ctypes.c_char_p),
        ("constant_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("l1_bytes", ctypes.c_uint32),
        ("blocks", ctypes.c_uint64),
        ("which", ctypes.POINTER(ctypes.c_uint64)),
        ("counts", ctypes.POINTER(_Count)),
        ("block_issues", ctypes.POINTER(ctypes.c_uint64)),
        ("longest_warp", ctypes.POINTER(ctypes.c_uint64)),
        ("read_sectors", ctypes.POINTER(ctypes.c_uint64)),
        ("written_sectors", ctypes.POINTER(ctypes.c_uint64)),
    ]


# ------------------------------------------------------------------------------------------- parse


@dataclass(frozen=True)
class Line:
    """One instruction of a listing. ``places``: file and line, innermost function first."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    places: tuple[tuple[str, int], ...] = ()

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Program:
    """A kernel and the functions that it calls, which lie behind it."""

    name: str
    lines: list[Line]
    labels: dict[str, int]
    registers: int = 0
    static_shared: int = 0
    _code: object = field(default=None, repr=False)

    def code(self) -> ctypes.Array[_Instruction]:
        if self._code is None:
            made = (_Instruction * len(self.lines))()
            for line, into in zip(self.lines, made, strict=True):
                try:
                    _encode(line, self.labels, into)
                except ValueError:  # raises where it is reached: rare paths may hold anything
                    into.operation, into.operands = _operations()["UNKNOWN"], 0
                    into.guard = TRUE  # not that of predicate 0
            self._code = made
        return self._code  # type: ignore[return-value]


_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
)
_PLACE = re.compile(r'//## File "([^"]*)", line (\d+)')


def parse(listing: str) -> dict[str, Program]:
    """Every kernel in the output of ``nvdisasm --print-code``, with or without line information."""
    programs: dict[str, Program] = {}
    sections = re.split(r"^\s*\.section\s+\.text\.([\w$.]+).*$", listing, flags=re.MULTILINE)
    for name, body in zip(sections[1::2], sections[2::2], strict=True):
        lines: list[Line] = []
        labels: dict[str, int] = {}
        pending: list[str] = []
        places: tuple[tuple[str, int], ...] = ()
        in_places = False
        for text in body.splitlines():
            if match := _INSTRUCTION.match(text):
                address, guard, operation, operands = match.groups()
                for label in pending:
                    labels[label] = int(address, 16)
                pending.clear()
                in_places = False
                lines.append(
                    Line(int(address, 16), guard or "", operation, _split(operands), places)
                )
            elif match := _PLACE.search(text):
                place = (match.group(1), int(match.group(2)))
                places = (*places, place) if in_places else (place,)
                in_places = "inlined at" in text
            elif match := re.match(r"^([.$\w]+):", text):
                pending.append(match.group(1))
        programs[name] = Program(name, lines, labels)
    return programs


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip().replace(".reuse", "") for part in text.split(",") if part.strip())


def _encode(line: Line, labels: dict[str, int], into: _Instruction) -> None:
    names = _operations()
    if line.operation not in names:
        raise ValueError(f"sass: {line.name} at {line.address:#x} is not known")
    into.operation = names[line.operation]
    into.guard = TRUE
    if line.guard:
        guard = line.guard[1:]
        into.guard_inverted = guard.startswith("!")
        guard = guard.lstrip("!")
        into.guard_uniform = guard.startswith("U")
        into.guard = _predicate_number(guard)
    _modifiers(line, into)
    operands = list(line.operands)
    if line.operation == "HFMA2" and len(operands) == 5:
        # Two halves as one immediate, the high one first.
        high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in operands[3:])
        operands[3:] = [hex(high << 16 | low)]
    if line.operation == "RET":
        operands = [operands[0].split()[0]]
    if line.operation == "QSPC":
        operands = operands[:1]
    if line.operation == "BAR":
        operands = []
    if line.operation == "WARPSYNC":
        operands = []
    if line.operation == "BSSY":
        operands = operands[:1]
    if line.operation in {"DEPBAR", "LDGDEPBAR", "NOP", "YIELD"}:
        operands = []
    into.operands = len(operands)
    for text, operand in zip(operands, into.operand, strict=False):
        _operand(line, text, labels, operand)


def _modifiers(line: Line, into: _Instruction) -> None:
    operation, *parts = line.name.split(".")
    flags = 0
    into.bytes = 4
    into.source, into.target = FORMATS["S32"], FORMATS["F32"]
    formats = [part for part in parts if part in FORMATS]
    for part in parts:
        if part in FLAGS and part not in {"F32", "U32", "64H"}:
            flags |= FLAGS[part]
    if "64H" in line.name:
        flags |= FLAGS["64H"]
        flags |= FLAGS["RSQ"] if "RSQ64H" in line.name else FLAGS["RCP"]
    if operation in {"IMAD", "UIMAD", "ISETP", "UISETP"} or "MNMX" in operation:
        flags |= FLAGS["U32"] if "U32" in parts else 0
    if operation in {"SHF", "USHF"}:
        flags |= FLAGS["U32"] if {"U32", "U64"} & set(parts) else 0
        flags |= FLAGS["LONG"] if {"U64", "S64"} & set(parts) else 0
    if operation in {"FLO", "UFLO"}:
        flags |= FLAGS["U32"] if "U32" in parts else 0
    if operation in {"HADD2", "REDG", "RED"} and "F32" in parts:
        flags |= FLAGS["F32"]
    if operation == "CS2R" and "32" in parts:
        flags |= FLAGS["F32"]
    if operation in MEMORY:
        for part, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2), ("64", 8), ("128", 16)):
            if part in parts:
                into.bytes = size
        if {"S8", "S16"} & set(parts):
            flags |= FLAGS["SIGNED"]
    for part in parts:
        if part in COMPARISONS and operation.endswith(("SETP", "SET")):
            into.compare = COMPARISONS[part]
        if part in ROUNDINGS:
            into.rounding = ROUNDINGS[part]
    combined = [part for part in parts if part in {"AND", "OR", "XOR"}]
    into.combine = {"AND": 0, "OR": 1, "XOR": 2}[combined[0]] if combined else 0
    if operation == "F2F":  # to, from
        into.target, into.source = (FORMATS[name] for name in formats)
    elif operation == "F2I":
        whole = [name for name in formats if not name.startswith("F")]
        into.target = FORMATS[whole[0] if whole else "S32"]
        into.source = FORMATS["F64" if "F64" in formats else "F32"]
    elif operation == "I2F":
        whole = [name for name in formats if not name.startswith("F")]
        into.source = FORMATS[whole[0] if whole else "S32"]
        into.target = FORMATS["F64" if "F64" in formats else "F32"]
    elif operation == "I2FP":
        into.source = FORMATS["U32" if "U32" in formats else "S32"]
    elif operation == "FRND":
        into.source = FORMATS["F64" if "F64" in formats else "F32"]
    into.flags = flags


def _predicate_number(text: str) -> int:
    name = text.lstrip("U")
    return TRUE if name == "PT" else int(name[1:])


_REGISTER = re.compile(r"^(U?R)(\d+|Z)((?:\.\w+)*)$")


def _operand(line: Line, text: str, labels: dict[str, int], into: _Operand) -> None:
    into.reg, into.ureg, into.scale = NO_REG, NO_UREG, 1
    if text in SPECIAL:
        into.kind, into.value = IMM, SPECIAL[text]
        return
    if match := re.search(r"`\((.+)\)", text):
        into.kind = LABEL
        if match.group(1) in labels:
            into.value = labels[match.group(1)] // INSTRUCTION_BYTES
        elif not match.group(1).startswith("_Z"):
            raise ValueError(f"sass: no label {match.group(1)}")
        return
    if re.match(r"^B\d+$", text):
        into.kind, into.reg = BARRIER, int(text[1:])
        return
    bare = text
    if bare.startswith("!"):
        into.inverted, bare = 1, bare[1:]
    if re.match(r"^U?P(\d|T)$", bare):
        into.kind = UPRED if bare.startswith("U") else PRED
        into.reg = _predicate_number(bare)
        return
    if bare == "PR":
        into.kind = NONE
        return
    if "[" in bare and not bare.lstrip("-~|").startswith("c["):
        _address(bare, into)
        return
    if re.match(r"^[-~|]*U?R|^[-~|]*c\[", bare):
        into.negative = bare.startswith("-")
        bare = bare.lstrip("-")
        if bare.startswith("~"):
            into.inverted, bare = 1, bare[1:]
        if bare.startswith("|"):
            into.absolute = 1
            bare = bare.replace("|", "")
        if match := re.match(r"^c\[0x([0-9a-f]+)\]\[([^\]]*)\]", bare):
            if match.group(1) != "0":
                raise ValueError(f"sass: constant bank {match.group(1)} at {line.address:#x}")
            _address(f"[{match.group(2)}]", into)
            into.kind = CONST
            return
        match = _REGISTER.match(bare)
        if match is None:
            raise ValueError(f"sass: operand {text} of {line.name} at {line.address:#x}")
        kind, number, suffix = match.groups()
        into.kind = REG if kind == "R" else UREG
        into.half = 1 if "H0_H0" in suffix else 2 if "H1_H1" in suffix else 0
        if kind == "R":
            into.reg = NO_REG if number == "Z" else int(number)
        else:
            into.ureg = NO_UREG if number == "Z" else int(number)
        return
    into.kind, into.value, into.inverted = IMM, _immediate(line, text), 0


def _address(text: str, into: _Operand) -> None:
    """``desc[UR4][R2.64+UR6+0x10]``: the descriptor says nothing about where."""
    into.kind = ADDRESS
    inside = text[text.rindex("[") + 1 : text.rindex("]")].replace("+-", "-")
    for sign, part in re.findall(r"([+-]?)([^+-]+)", inside):
        if match := re.match(r"^(U?R)(\d+|Z)((?:\.\w+)*)$", part):
            kind, number, suffix = match.groups()
            if kind == "UR":
                into.ureg = NO_UREG if number == "Z" else int(number)
            else:
                into.reg = NO_REG if number == "Z" else int(number)
                if ".U32" in suffix:
                    into.wide = 2
                elif ".64" in suffix:
                    into.wide = 1
                if scaled := re.search(r"\.X(\d+)", suffix):
                    into.scale = int(scaled.group(1))
        else:
            value = int(part, 16)
            into.value += -value if sign == "-" else value


def _immediate(line: Line, text: str) -> int:
    if re.match(r"^-?0x[0-9a-f]+$", text):
        value = int(text, 16)
        return value if line.operation in DOUBLES else value & 0xFFFFFFFF
    names = {"+INF": math.inf, "-INF": -math.inf, "+QNAN": math.nan, "-QNAN": -math.nan}
    number = names[text] if text in names else float(text)
    if line.operation in DOUBLES:
        return int(struct.unpack("<q", struct.pack("<d", number))[0])
    if line.operation in HALVES:
        half = struct.unpack("<H", struct.pack("<e", number))[0]
        return int(half << 16 | half)
    if line.operation not in FLOATS:
        raise ValueError(f"sass: number {text} of {line.name} at {line.address:#x}")
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


# --------------------------------------------------------------------------------------------- run


@functools.cache
def _library() -> ctypes.CDLL:
    """The interpreter, compiled once per version of its source."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("sass: no C++ compiler was found (CXX, g++, c++)")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"glimpse_sass_{os.getuid()}_{digest}.so")
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.so")
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-ffp-contract=off"]
        command += ["-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True)
        made.replace(target)
    library = ctypes.CDLL(str(target))
    library.sass_operations.restype = ctypes.c_char_p
    library.sass_size.restype = ctypes.c_uint64
    library.sass_run.restype = ctypes.c_char_p
    for which, structure in enumerate((_Operand, _Instruction, _Count, _Launch)):
        assert library.sass_size(which) == ctypes.sizeof(structure), structure
    return library


@functools.cache
def _operations() -> dict[str, int]:
    names = _library().sass_operations().decode().split()
    return {name: number for number, name in enumerate(names)}


@dataclass(frozen=True)
class Parameter:
    data: bytes
    alignment: int


def constant_bank(parameters: Iterable[Parameter], grid: Sequence[int], block: int) -> bytes:
    bank = bytearray(PARAMETERS_AT)
    struct.pack_into("<6I", bank, 0, block, 1, 1, *grid)
    struct.pack_into("<I", bank, 0x28, 4096 - 256)  # top of the stack, see kLocalBytes
    for parameter in parameters:
        bank += bytes(-(len(bank) - PARAMETERS_AT) % parameter.alignment)
        bank += parameter.data
    return bytes(bank + bytes(-len(bank) % 16 + 16))


@dataclass
class Counts:
    """What the blocks of one launch did; per instruction where it is a list."""

    issues: list[int]
    lanes: list[int]
    sectors: list[int]
    lines: list[int]
    passes: list[int]
    missed: list[int]
    bytes: list[int]
    block_issues: list[int]
    longest_warp: int
    read_sectors: int
    written_sectors: int


def run(
    program: Program,
    parameters: Iterable[Parameter],
    grid: Sequence[int],
    block: int,
    which: Sequence[int],
    l1_bytes: int,
) -> Counts:
    """Run the blocks with the linear indices ``which``. Addresses are those of this process."""
    library = _library()
    code = program.code()
    bank = constant_bank(parameters, grid, block)
    counts = (_Count * len(code))()
    issues = (ctypes.c_uint64 * max(1, len(which)))()
    longest, read, written = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
    launch = _Launch(
        code,
        len(code),
        bank,
        len(bank),
        (ctypes.c_uint32 * 3)(*grid),
        block,
        l1_bytes,
        len(which),
        (ctypes.c_uint64 * max(1, len(which)))(*which),
        counts,
        issues,
        ctypes.pointer(longest),
        ctypes.pointer(read),
        ctypes.pointer(written),
    )
    wrong = library.sass_run(ctypes.byref(launch))
    if wrong is not None:
        raise RuntimeError(f"sass: {program.name}: {wrong.decode()}")
    columns = {name: [int(getattr(count, name)) for count in counts] for name, _ in _Count._fields_}
    return Counts(
        **columns,
        block_issues=list(issues[: len(which)]),
        longest_warp=longest.value,
        read_sectors=read.value,
        written_sectors=written.value,
    )
