# SPDX-License-Identifier: BSD-3-Clause
"""Devices, dtypes and layouts that tests run over, and the one place where tolerances are written.

``emulated`` is the CPU with every call sent to the CUDA kernels, compiled for the host; ``simple``
is the CPU with the short loops that its own kernels are a faster form of. ``cuda`` exists where
there is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# A graph that the compiler kept from another build of this package would run with its schemas.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import cases
import pytest
import torch
from torch import Tensor

# An installed wheel has no test module and runs the tests that need none. Where it is there, it
# must load: a broken one would silently leave out every test of the CUDA kernels.
_testing = None
if importlib.util.find_spec("glimpse_ext._testing") is not None:
    _testing = importlib.import_module("glimpse_ext._testing")

# Images here are tiny, and handing a hundred numbers to a second thread costs more than adding
# them. Tests that are about threads choose their number themselves.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Device:
    """Where a test runs. ``torch`` is the device of its tensors."""

    name: str
    torch: torch.device
    raises_on_bad_index: bool

    def __str__(self) -> str:
        return self.name


CPU = Device("cpu", torch.device("cpu"), True)
SIMPLE = Device("simple", torch.device("cpu"), True)
EMULATED = Device("emulated", torch.device("cpu"), False)
CUDA = Device("cuda", torch.device("cuda"), False)

DEVICES = [CPU]
if _testing is not None:
    DEVICES += [SIMPLE, EMULATED]
if torch.cuda.is_available():
    DEVICES.append(CUDA)


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each device in turn; calls on CPU tensors go to its kernels for as long as the test runs."""
    if request.param not in (SIMPLE, EMULATED):
        yield request.param
        return
    previous = _testing.use_backend(request.param.name)
    try:
        yield request.param
    finally:
        _testing.use_backend(previous)


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Calls on CPU tensors go to the kernels of the CPU, whatever device a test is for."""
    previous = _testing.use_backend("cpu") if _testing is not None else None
    try:
        yield
    finally:
        if previous is not None:
            _testing.use_backend(previous)


@pytest.fixture(params=[torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=cases.LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass(frozen=True)
class Tolerance:
    """A number a may differ from b by ``absolute + relative * |b|``."""

    absolute: float
    relative: float
    reason: str


# Positions are computed alike everywhere, so what is left is the rounding of sums and of results.
# Gradients add up many more terms than a pooled value does.
TOLERANCES = {
    "forward": {
        torch.float64: Tolerance(1e-13, 1e-13, "a sum of hundreds of terms in another order"),
        torch.float32: Tolerance(2e-6, 2e-6, "a sum of hundreds of terms in another order"),
        torch.float16: Tolerance(2e-6, 2**-11 * 1.01, "a float32 sum, rounded once to 11 bits"),
        torch.bfloat16: Tolerance(2e-6, 2**-8 * 1.01, "a float32 sum, rounded once to 8 bits"),
    },
    "gradient": {
        torch.float64: Tolerance(1e-12, 1e-12, "a sum over boxes, cells and channels"),
        torch.float32: Tolerance(1e-5, 1e-5, "a sum over boxes, cells and channels"),
        torch.float16: Tolerance(1e-5, 2**-11 * 1.01, "a float32 sum, rounded once to 11 bits"),
        torch.bfloat16: Tolerance(1e-5, 2**-8 * 1.01, "a float32 sum, rounded once to 8 bits"),
    },
}


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tolerance, label: str) -> None:
    """Every element within tolerance, NaN where NaN is expected; says where the worst one is."""
    assert actual.shape == expected.shape, (
        f"{label}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    excess = (a - b).abs() - (tolerance.absolute + tolerance.relative * b.abs())
    same = (a == b) | (a.isnan() & b.isnan())
    excess = torch.where(same, torch.full_like(excess, -1.0), excess.nan_to_num(nan=torch.inf))
    worst = int(excess.argmax())
    if excess.flatten()[worst] <= 0:
        return
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape)]
    pytest.fail(
        f"{label}: at {place} got {a.flatten()[worst].item()!r}, expected "
        f"{b.flatten()[worst].item()!r}; {int((excess > 0).sum())} of {a.numel()} elements differ "
        f"by more than {tolerance.absolute:.2g} + {tolerance.relative:.2g}*|x| "
        f"({tolerance.reason})",
        pytrace=False,
    )


Close = Callable[..., None]


def _label(request: pytest.FixtureRequest, detail: str) -> str:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    named = [f"{key}={value}" for key, value in parameters.items()]
    return ", ".join([request.node.originalname, *named, *([detail] if detail else [])])


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Close:
    """``close(actual, expected, kind, detail)`` with the tolerance for the dtype of ``actual``."""

    def check(actual: Tensor, expected: Tensor, kind: str = "forward", detail: str = "") -> None:
        tolerance = TOLERANCES[kind][actual.dtype]
        assert_within(actual, expected, tolerance, _label(request, detail))

    return check


@pytest.fixture
def same_bits(request: pytest.FixtureRequest) -> Close:
    """``same_bits(actual, expected, detail)``: equal to the last bit, NaN equal to NaN."""

    def check(actual: Tensor, expected: Tensor, detail: str = "") -> None:
        label = _label(request, detail)
        assert actual.dtype == expected.dtype, f"{label}: {actual.dtype}, expected {expected.dtype}"
        assert_within(actual, expected, Tolerance(0, 0, "the bits must be the same"), label)

    return check


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which operators compute on features of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
