# SPDX-License-Identifier: BSD-3-Clause
"""The model of the CUDA kernels' time: the parser of machine code, the interpreter, the page."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not (BENCHMARKS / "gpu_model.py").exists():
    pytest.skip("an installed wheel has no benchmarks folder", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import gpu_kernels  # noqa: E402
import gpu_model  # noqa: E402
import gpu_report  # noqa: E402
import sass  # noqa: E402

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None,
    reason="the interpreter is C++ and there is no compiler",
)

# out[thread] = 3 * thread, and 100 more for odd threads, which leave the path of the others.
LISTING = """
	.section	.text._Z4tinyPi,"ax",@progbits
	.align	128
_Z4tinyPi:
.text._Z4tinyPi:
	//## File "/csrc/cuda/tiny.cu", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ULDC.64 UR4, c[0x0][0x210] ;
        /*0020*/                   BSSY B0, `(.L_x_1) ;
	//## File "/csrc/add.h", line 9 inlined at "/csrc/cuda/tiny.cu", line 4
	//## File "/csrc/cuda/tiny.cu", line 4
        /*0030*/                   LOP3.LUT P0, RZ, R0.reuse, 0x1, RZ, 0xc0, !PT ;
        /*0040*/                   IMAD R2, R0, 0x3, RZ ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   VIADD R2, R2, 0x64 ;
.L_x_0:
        /*0070*/                   BSYNC B0 ;
.L_x_1:
	//## File "/csrc/cuda/tiny.cu", line 5
        /*0080*/                   IMAD.WIDE.U32 R4, R0, 0x4, UR4 ;
        /*0090*/                   STG.E desc[UR6][R4.64], R2 ;
        /*00a0*/                   EXIT ;
"""


def tiny() -> sass.Program:
    return sass.parse(LISTING)["_Z4tinyPi"]


def test_the_parser_reads_guards_operands_labels_and_places() -> None:
    program = tiny()
    assert [line.operation for line in program.lines[:4]] == ["S2R", "ULDC", "BSSY", "LOP3"]
    assert program.lines[5].guard == "@!P0"
    assert program.lines[3].operands == ("P0", "RZ", "R0", "0x1", "RZ", "0xc0", "!PT")
    assert program.labels[".L_x_0"] == 0x70
    assert program.lines[0].places == (("/csrc/cuda/tiny.cu", 3),)
    assert program.lines[4].places == (("/csrc/add.h", 9), ("/csrc/cuda/tiny.cu", 4))


@needs_compiler
def test_the_interpreter_counts_what_warps_issue() -> None:
    out = torch.full((96,), -1, dtype=torch.int32)
    pointer = sass.Parameter(struct.pack("<Q", out.data_ptr()), 8)
    counts = sass.run(tiny(), [pointer], (1, 1, 1), 96, [0], 16 * 1024)
    thread = torch.arange(96, dtype=torch.int32)
    assert torch.equal(out, 3 * thread + 100 * (thread % 2))
    assert counts.issues == [3, 3, 3, 3, 3, 3, 3, 6, 3, 3, 3], "BSYNC once for each of two paths"
    assert counts.lanes[6] == 48, "only odd threads add 100"
    assert counts.sectors[9] == counts.missed[9] == 12, "32 stores of 4 bytes are 4 sectors"
    assert counts.block_issues == [36]
    assert counts.written_sectors == 12


@needs_compiler
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("NEWOP R2, R0 ;", "does not know"),
        ("STG.E desc[UR6][RZ.64], R2 ;", "bad global address"),
        ("LDS R2, [R0+0x80000] ;", "shared memory"),
    ],
)
def test_what_the_interpreter_cannot_run_is_an_error(text: str, what: str) -> None:
    listing = LISTING.replace("VIADD R2, R2, 0x64 ;", text)
    program = sass.parse(listing)["_Z4tinyPi"]
    with pytest.raises(RuntimeError, match=what):
        sass.run(program, [sass.Parameter(bytes(8), 8)], (1, 1, 1), 32, [0], 16 * 1024)


def test_a_sample_of_blocks_is_spread_evenly() -> None:
    picked = gpu_kernels.spread(1000, 100)
    assert len(set(picked)) == 100
    assert all(10 * i <= block < 10 * i + 10 for i, block in enumerate(picked))


def test_resident_blocks_follow_registers_shared_memory_and_threads() -> None:
    assert gpu_kernels.resident_blocks(64, 1024, 256) == 4
    assert gpu_kernels.resident_blocks(32, 1024, 1024) == 2
    assert gpu_kernels.resident_blocks(32, 100 * 1024, 128) == 2
    assert gpu_kernels.resident_blocks(16, 1024, 32) == 32


def test_the_page_is_that_of_the_stored_model() -> None:
    stored = json.loads(gpu_model.TABLE.read_text())
    assert gpu_model.PAGE.read_text() == gpu_report.page(stored)
    assert "modelled, not measured" in gpu_model.PAGE.read_text().splitlines()[0]
    for key, row in stored["rows"].items():
        assert row["seconds"] >= row["floor_seconds"], key


@pytest.mark.slow
@needs_compiler
def test_the_machine_code_computes_what_the_cpu_kernels_do() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if importlib.util.find_spec("glimpse_ext._testing") is None:
        pytest.skip("the test module is not built")
    if gpu_kernels.find_tool("nvdisasm") is None or gpu_kernels.find_tool("cuobjdump") is None:
        pytest.skip("no nvdisasm and cuobjdump; CUDA builds of torch bring them")
    valid = gpu_model.validate(gpu_kernels.compile_kernels(), {})
    assert valid["results"] > 100
    assert valid["stored_bytes_exact"]
    assert valid["barriers_emulation"] == valid["barriers_machine_code"]
    limits = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
    for name, limit in limits.items():
        assert valid["worst_relative_error"][name] < limit, name
