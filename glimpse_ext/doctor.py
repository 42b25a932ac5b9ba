# SPDX-License-Identifier: BSD-3-Clause
"""``glimpse-ext doctor``: what is installed, what loaded and why not, are the numbers right.

The exit status is 0 if all is well and 1 otherwise; each problem comes with what to do about it.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import glimpse_ext
from glimpse_ext import reference

OLDEST_TORCH = (2, 11)

# Instruction sets that matter to the CPU kernels, by the names Linux gives them.
ISA_FLAGS = (
    *("sse4_2", "avx", "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "asimd", "asimdhp", "sve", "sve2", "bf16"),
)

# Float32 results against the float64 reference: |x - y| <= tolerance * (1 + |y|).
FORWARD_TOLERANCE = 2e-6
BACKWARD_TOLERANCE = 1e-5

BUILD_CUDA = "GLIMPSE_CUDA=1 pip install --force-reinstall --no-deps ."
REINSTALL = "reinstall the package: pip install --force-reinstall --no-deps glimpse-ext"


class Problem(NamedTuple):
    """Something is wrong. ``remedy`` says what to do."""

    what: str
    remedy: str


@dataclasses.dataclass
class Report:
    """Facts by section, problems, and remarks: things worth knowing that are not wrong."""

    facts: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append(Problem(what, remedy))

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            **self.facts,
            "problems": [problem._asdict() for problem in self.problems],
            "remarks": self.remarks,
        }

    def __str__(self) -> str:
        lines = []
        for section, facts in self.facts.items():
            lines.append(section)
            width = max(map(len, facts), default=0)
            lines.extend(f"  {name:{width}}  {value}" for name, value in facts.items())
            lines.append("")
        lines.extend(f"remark: {remark}" for remark in self.remarks)
        for what, remedy in self.problems:
            lines.extend((f"problem: {what}", f"  what to do: {remedy}"))
        lines.append("all is well" if self.healthy else f"{len(self.problems)} problem(s) found")
        return "\n".join(lines)


def library_info() -> Mapping[str, Any]:
    """What the loader knows: both libraries, why one is not loaded, what they were built from."""
    try:
        library = importlib.import_module("glimpse_ext._library")
        info: Mapping[str, Any] = library.library_info()
    except Exception as error:  # A broken installation is what this command is for.
        return {"cpu_error": f"{type(error).__name__}: {error}"}
    return info


def instruction_sets() -> list[str]:
    """The flags of `ISA_FLAGS` that this processor has; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    return [flag for flag in ISA_FLAGS if flag in flags]


def processor_name() -> str:
    try:
        name = re.search(r"^model name\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or "unknown"


def huge_pages() -> str:
    """Whether large results ask for huge pages, and what the system allows."""
    try:
        memory = importlib.import_module("glimpse_ext._memory")
        wanted = "on" if memory.huge_pages() else "off"
        allowed = memory.system_huge_pages() or "unknown"
    except Exception as error:  # A broken installation is what this command is for.
        return f"unknown: {type(error).__name__}"
    return f"{wanted} (glimpse_ext.set_huge_pages), the system's mode is {allowed}"


def build_facts(info: Mapping[str, Any], library: str) -> dict[str, str]:
    """What the cpu or cuda library says it was built from: its "key: value" lines."""
    text = info.get("build_info" if library == "cpu" else f"{library}_build_info") or ""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {key: value for key, _, value in pairs if value.strip()}


def architectures(built_for: str) -> list[tuple[int, int, bool]]:
    """CUDA architectures as in "8.0 9.0+PTX": (major, minor, whether as PTX too)."""
    found = re.findall(r"(\d+)\.(\d)[a-z]?(\+PTX)?", built_for)
    return [(int(major), int(minor), bool(ptx)) for major, minor, ptx in found]


def runs_on(capability: tuple[int, int], built: Sequence[tuple[int, int, bool]]) -> bool:
    """Device code runs on its own major version, minor version or later; PTX on all later ones."""
    return any(
        (major == capability[0] and minor <= capability[1])
        or (ptx and (major, minor) <= capability)
        for major, minor, ptx in built
    )


def check_versions(report: Report) -> None:
    report.facts["versions"] = {
        "glimpse_ext": str(getattr(glimpse_ext, "__version__", "unknown")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "installed in": str(Path(glimpse_ext.__file__ or "").parent),
    }
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < OLDEST_TORCH:
        report.problem(
            f"torch {torch.__version__} is too old",
            f'pip install "torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"',
        )


def check_machine(report: Report) -> None:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    report.facts["machine"] = {
        "platform": platform.platform(),
        "processor": processor_name(),
        "instruction sets": " ".join(instruction_sets()) or "unknown",
        "torch uses": str(torch.backends.cpu.get_cpu_capability()),
        "cores": str(cores),
        "threads": str(threads),
        "huge pages": huge_pages(),
    }
    if threads < cores:
        report.remarks.append(
            f"torch uses {threads} of {cores} cores (torch.set_num_threads, OMP_NUM_THREADS)"
        )


def check_libraries(report: Report, info: Mapping[str, Any]) -> None:
    cpu, cuda = info.get("cpu_library"), info.get("cuda_library")
    cpu_error = str(info.get("cpu_error") or "no reason is known")
    cuda_error = str(info.get("cuda_error") or "no reason is known")
    report.facts["libraries"] = {
        "cpu": str(cpu) if cpu else f"not loaded: {cpu_error}",
        "cuda": str(cuda) if cuda else f"not loaded: {cuda_error}",
    }
    for name in ("cpu", "cuda"):
        built = build_facts(info, name)
        if built:
            report.facts[f"{name} library"] = built
    if not cpu:
        forced = os.environ.get("GLIMPSE_EXT_FALLBACK") == "1"
        remedy = "unset GLIMPSE_EXT_FALLBACK" if forced else REINSTALL
        report.problem(f"the CPU library did not load: {cpu_error}", remedy)
        report.remarks.append("operators run in plain PyTorch: the same numbers, much slower")
    if torch.cuda.is_available() and not cuda:
        report.problem(
            f"torch sees a GPU, but the CUDA library did not load: {cuda_error}",
            f"build it, with nvcc on PATH: {BUILD_CUDA}",
        )


def check_devices(report: Report, info: Mapping[str, Any]) -> None:
    facts = {"torch built for CUDA": str(torch.version.cuda or "no")}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["GPUs"] = str(count)
    built = architectures(build_facts(info, "cuda").get("CUDA architectures", ""))
    for index in range(count):
        capability = torch.cuda.get_device_capability(index)
        number = f"{capability[0]}.{capability[1]}"
        facts[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)} (architecture {number})"
        if info.get("cuda_library") and built and not runs_on(capability, built):
            report.problem(
                f"the CUDA library has no code for cuda:{index} (architecture {number})",
                f"build it for this GPU: TORCH_CUDA_ARCH_LIST={number} {BUILD_CUDA}",
            )
    if count == 0 and Path("/proc/driver/nvidia/version").exists():
        report.remarks.append(
            "this machine has an NVIDIA driver but torch sees no GPU: is torch a CPU build?"
        )
    report.facts["devices"] = facts


Pool = Callable[[Tensor, Tensor], Tensor]


def pooled_and_gradient(pool: Pool, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled boxes, and the gradient of a weighted sum of them with respect to the image."""
    image = image.detach().requires_grad_()
    pooled = pool(image, boxes)
    weight = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype, device=pooled.device)
    (gradient,) = torch.autograd.grad((pooled * weight.view(pooled.shape)).sum(), image)
    return pooled.detach(), gradient


def worst_error(value: Tensor, expected: Tensor) -> float:
    """Largest ``|x - y| / (1 + |y|)``; infinite if a number is missing or not finite."""
    if value.shape != expected.shape or not bool(value.isfinite().all()):
        return float("inf")
    expected = expected.double().cpu()
    return float(((value.double().cpu() - expected).abs() / (1 + expected.abs())).max())


def self_check(report: Report, devices: Sequence[str]) -> None:
    """roi_align forward and backward on each device against the float64 reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 5, 17, 23, generator=generator)
    corners = torch.rand(6, 4, generator=generator) * torch.tensor([12.0, 8.0, 12.0, 8.0])
    corners[:, 2:] += corners[:, :2] - 2
    boxes = torch.cat([torch.arange(6.0)[:, None] % 2, corners], dim=1)

    def compiled(image: Tensor, boxes: Tensor) -> Tensor:
        return glimpse_ext.roi_align(image, boxes, (3, 4), 0.9, aligned=True)

    def expected(image: Tensor, boxes: Tensor) -> Tensor:
        return reference.roi_align(image, boxes, (3, 4), 0.9, aligned=True)

    right = pooled_and_gradient(expected, image.double(), boxes.double())
    facts = {}
    for device in devices:
        try:
            got = pooled_and_gradient(compiled, image.to(device), boxes.to(device))
        except Exception as error:  # Whatever it is, the report has to come out.
            facts[device] = f"failed: {type(error).__name__}: {error}"
            report.problem(f"roi_align does not run on {device}: {error}", REINSTALL)
            continue
        forward, backward = (worst_error(g, r) for g, r in zip(got, right, strict=True))
        good = forward <= FORWARD_TOLERANCE and backward <= BACKWARD_TOLERANCE
        facts[device] = f"{'ok' if good else 'WRONG'}, error {forward:.1e}, gradient {backward:.1e}"
        if not good:
            report.problem(f"roi_align gives wrong numbers on {device}", REINSTALL)
    report.facts["self check (against glimpse_ext.reference)"] = facts


def examine() -> Report:
    """Everything this command finds out."""
    report = Report()
    info = library_info()
    check_versions(report)
    check_machine(report)
    check_libraries(report, info)
    check_devices(report, info)
    devices = ["cpu"]
    if info.get("cuda_library") and torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    self_check(report, devices)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glimpse-ext doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report.as_dict(), indent=1) if arguments.json else report)
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
