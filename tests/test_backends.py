# SPDX-License-Identifier: BSD-3-Clause
"""The CPU kernels against the plain loops of the ``simple`` backend, over random calls.

A call is drawn from a seed: operator numbers, sizes, strides, dtype, layout, levels, tangents, and
boxes from ordinary to hostile. All three applications of the tables must agree. Run as a script,
the file checks a range of seeds in its own process, which is how each instruction set is tested.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import _testing
from torch import Tensor

import glimpse_ext

pytestmark = pytest.mark.skipif(_testing is None, reason="the test module is not in a wheel")

SEEDS = 60
EDGES = 60
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]

# Both backends add the same terms, one in double and one in the dtype of its sums, and then round
# once: what lies beside the middle between two numbers may become the one or the other.
SUM_ERROR = {torch.float64: 2e-14}
STORE_ERROR = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass
class Call:
    """One call of the generic operators."""

    features: list[Tensor]
    grad: Tensor
    boxes: Tensor
    image_index: Tensor | None
    levels: Tensor | None
    tangent: Tensor | None
    axes: int
    output_size: tuple[int, int]
    params: tuple[float, float]
    scales: list[float]
    level_rule: list[float]

    def __str__(self) -> str:
        first = self.features[0]
        return (
            f"{first.dtype}, {[tuple(f.shape) for f in self.features]} with strides "
            f"{[f.stride() for f in self.features]}, {len(self.boxes)} boxes, output "
            f"{self.output_size}, sampling_ratio {self.params[0]}, aligned {self.params[1]}, "
            f"tangent axes {self.axes}, levels {self.levels}"
        )

    def where(self) -> tuple[object, ...]:
        return (
            *(self.boxes, self.image_index, self.levels, self.tangent, self.axes),
            *(list(self.output_size), 0, list(self.params), self.scales, self.level_rule, 0.0),
        )

    def sample(self) -> Tensor:
        return torch.ops.glimpse_ext._sample(self.features, *self.where())

    def grad_features(self) -> list[Tensor]:
        first = self.features[0]
        sizes = [first.shape[0], first.shape[1]]
        for feature in self.features:
            sizes += [feature.shape[2], feature.shape[3]]
        channels_last = first.stride(1) == 1 and first.shape[1] > 1
        return torch.ops.glimpse_ext._sample_grad_features(
            self.grad, *self.where(), sizes, channels_last
        )

    def grad_boxes(self) -> Tensor:
        return torch.ops.glimpse_ext._sample_grad_boxes(self.features, self.grad, *self.where())


def hostile(rng: Random, box: list[float]) -> None:
    """Spoils a box x1, y1, x2, y2 in one of the ways that users find."""
    kind = rng.randrange(7)
    if kind == 0:
        box[rng.randrange(4)] = nan
    elif kind == 1:
        box[rng.randrange(4)] = rng.choice([inf, -inf])
    elif kind == 2:
        box[0], box[2] = -1e9, 1e9
    elif kind == 3:
        box[1], box[3] = -1e6, 1e6
    elif kind == 4:
        box[0], box[2] = box[2], box[0]
    elif kind == 5:
        box[2:] = box[:2]
    else:
        box[0] = 1e30


def draw_box(rng: Random, height: float, width: float) -> list[float]:
    """In units of the image; most lie inside, some stick out, some are on whole pixels."""
    reach = rng.choice([0.0, 0.0, 5.0])
    x, y = rng.uniform(-reach, 0.8 * width), rng.uniform(-reach, 0.8 * height)
    w, h = rng.uniform(0, 0.7 * width + reach), rng.uniform(0, 0.7 * height + reach)
    if rng.random() < 0.2:
        x, y, w, h = float(int(x)), float(int(y)), float(int(w)), float(int(h))
    box = [x, y, x + w, y + h]
    if rng.random() < 0.15:
        hostile(rng, box)
    return box


def draw_map(
    rng: Random, numbers: torch.Generator, size: list[int], dtype: torch.dtype, nhwc: bool
) -> Tensor:
    """A feature map, dense or a view into a larger one, with now and then a number that is none."""
    n, c, h, w = size
    pad = rng.choice([0, 0, 3])
    shape = (n, h, w + pad, c + pad) if nhwc else (n, c, h + pad, w + pad)
    values = torch.rand(shape, generator=numbers, dtype=torch.float64) * 2 - 1
    if rng.random() < 0.3 and dtype is not torch.uint8:
        # Scattered, or a column or row that boxes beside it must not notice.
        strange = torch.rand(shape, generator=numbers) < 0.01
        y, x = rng.randrange(h), rng.randrange(w)
        if rng.random() < 0.7:
            strange[:] = False
            along_y = strange.movedim(1 if nhwc else 2, 0)
            along_x = strange.movedim(2 if nhwc else 3, 0)
            if rng.random() < 0.7:
                along_x[x] = True
            else:
                along_y[y] = True
        values[strange] = rng.choice([nan, inf, -inf])
    stored = (values.abs() * 255 if dtype is torch.uint8 else values).to(dtype)
    if nhwc:
        return stored[:, :, :w, :c].permute(0, 3, 1, 2)
    return stored[:, :, :h, :w]


def draw_call(seed: int) -> Call:
    rng = Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    nhwc = seed // len(DTYPES) % 2 == 1
    batch = rng.randint(1, 3)
    channels = rng.choice([1, 2, 3, rng.randint(4, 16), rng.randint(17, 40)])
    output_size = (rng.randint(1, 8), rng.choice([1, 2, 7, 7, 8, rng.randint(9, 40)]))
    count = rng.randint(0, 8)
    if rng.random() < 0.15:  # enough for several threads, and for several blocks of channels
        channels, output_size, count = rng.randint(64, 140), (7, 7), rng.randint(10, 20)
    maps = rng.choice([1, 1, 1, rng.randint(2, 4)])
    scales = [1.0 / (2 << i) for i in range(maps)] if maps > 1 else [rng.uniform(0.1, 1.5)]
    features = []
    for _ in range(maps):
        wide = rng.random() < 0.05
        size = [batch, channels, rng.randint(1, 24), rng.randint(1, 2500 if wide else 40)]
        features.append(draw_map(rng, numbers, size, dtype, nhwc))

    number = torch.float64 if dtype is torch.float64 else torch.float32
    rows = []
    for _ in range(count):
        at = rng.randrange(maps)
        height, width = features[at].shape[2] / scales[at], features[at].shape[3] / scales[at]
        rows.append(draw_box(rng, height, width))
    boxes = torch.tensor(rows, dtype=number).reshape(-1, 4)
    image = torch.tensor([rng.randrange(batch) for _ in rows], dtype=torch.int64)
    image_index = None
    if rng.random() < 0.5:
        boxes = torch.cat([image[:, None].to(number), boxes], 1)
    else:
        image_index = image
    levels = None
    if rng.random() < 0.3:
        levels = torch.tensor([rng.randint(-1, maps) for _ in rows], dtype=torch.int64)
    tangent, axes = None, 0
    if rng.random() < 0.4:
        axes = rng.randint(1, 3)
        motion = torch.rand(boxes.shape, generator=numbers, dtype=torch.float64) - 0.5
        tangent = motion.to(number)
    pooled = torch.float32 if dtype is torch.uint8 else dtype
    shape = (count, channels, *output_size)
    grad = torch.rand(shape, generator=numbers, dtype=torch.float64) * 2 - 1
    if rng.random() < 0.1:
        grad[torch.rand(grad.shape, generator=numbers) < 0.01] = nan
    ratio = rng.choice([-1, 0, 1, 2, 2, 3, rng.randint(4, 30)])
    return Call(
        features=features,
        grad=grad.to(pooled),
        boxes=boxes,
        image_index=image_index,
        levels=levels,
        tangent=tangent,
        axes=axes,
        output_size=output_size,
        params=(float(ratio), float(rng.randrange(2))),
        scales=scales,
        level_rule=[float(rng.randrange(2)), rng.uniform(10, 60), 3.0] if maps > 1 else [],
    )


@contextmanager
def backend(name: str) -> Iterator[None]:
    previous = _testing.use_backend(name)
    try:
        yield
    finally:
        _testing.use_backend(previous)


def difference(actual: Tensor, expected: Tensor, terms: float, dtype: torch.dtype) -> str | None:
    """What is wrong with `actual`, a sum of about `terms` terms of size 1, or None.

    Infinite and NaN pixels only have to reach the same elements: merged taps may make NaN of what
    is infinite sample by sample, and the reverse.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (actual, expected))
        return f"got {got}, expected {wanted}"
    if actual.numel() == 0:
        return None
    a, b = actual.double(), expected.double()
    finite = b.isfinite()
    largest = float(b[finite].abs().max()) if finite.any() else 0.0
    bound = SUM_ERROR.get(dtype, 4e-6) * (terms + largest)
    bound = bound + STORE_ERROR.get(actual.dtype, 0) * b.abs()
    wrong = torch.where(finite & a.isfinite(), (a - b).abs() > bound, finite != a.isfinite())
    if not wrong.any():
        return None
    excess = torch.where(wrong, (a - b).abs().nan_to_num(inf, inf), -1.0)
    worst = [int(i) for i in torch.unravel_index(excess.argmax(), a.shape)]
    return (
        f"{int(wrong.sum())} of {a.numel()} elements, worst at {worst}: "
        f"got {a[tuple(worst)].item()!r}, expected {b[tuple(worst)].item()!r}"
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def draw_edges(seed: int) -> Call:
    """Windows and outputs around whole numbers of vectors, and blocks of channels with a rest."""
    rng = Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    number = torch.float64 if dtype is torch.float64 else torch.float32
    widths = [1, 3, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
    ends = [1, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33]
    width = rng.choice([2, 15, 16, 17, 33, 48, 65, 90])
    output_size = (rng.randint(1, 15), rng.choice(ends))
    rows = []
    for w in rng.sample(widths, 6):
        # A window of w columns: from the middle of the first one to that of the last one.
        x = rng.choice([0, max(0, width - w), rng.randint(0, max(0, width - w))])
        y, h = rng.uniform(-2, 20), rng.uniform(1, 25)
        rows.append([x + 0.5, y, x + w - 0.5 + rng.choice([0, 0.25]), y + h])
    channels = rng.choice([5, 9, 17, 20, 33])
    pooled = torch.float32 if dtype is torch.uint8 else dtype
    shape = (len(rows), channels, *output_size)
    return Call(
        features=[draw_map(rng, numbers, [1, channels, rng.randint(1, 40), width], dtype, False)],
        grad=(torch.rand(shape, generator=numbers, dtype=torch.float64) * 2 - 1).to(pooled),
        boxes=torch.tensor(rows, dtype=number),
        image_index=torch.zeros(len(rows), dtype=torch.int64),
        levels=None,
        tangent=None,
        axes=0,
        output_size=output_size,
        params=(float(rng.choice([0, 1, 2, 2, 3])), 1.0),
        scales=[1.0],
        level_rule=[],
    )


def failures(seed: int, draw: Callable[[int], Call]) -> list[str]:
    """How the CPU kernels differ from the simple ones, and from themselves on more threads."""
    call = draw(seed)
    dtype = call.features[0].dtype
    applications = {"sample": call.sample, "grad_boxes": call.grad_boxes}
    if dtype is not torch.uint8:
        applications["grad_features"] = call.grad_features
    size = 255.0 if dtype is torch.uint8 else 1.0
    cells = call.grad.numel() / max(1, call.grad.shape[0])
    motion = 50.0 if call.axes else 1.0
    terms = {
        "sample": size * motion,
        "grad_boxes": size * motion * (4 * cells) ** 0.5,
        "grad_features": motion * (1 + call.grad[:, 0].numel()) ** 0.5,
    }
    found = []
    for name, apply in applications.items():
        with backend("simple"):
            expected = apply()
        results = {}
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results[threads] = apply()
        torch.set_num_threads(1)
        if name != "grad_features":
            expected, results = [expected], {n: [r] for n, r in results.items()}
        for i, wanted in enumerate(expected):
            label = f"{draw.__name__}({seed}), {name}" + (
                f"[{i}]" if name == "grad_features" else ""
            )
            problem = difference(results[1][i], wanted, terms[name], dtype)
            if problem is not None:
                found.append(f"{label}: {problem}; {call}")
            if not torch.equal(bits(results[1][i]), bits(results[3][i])):
                found.append(f"{label}: 1 and 3 threads give different bits; {call}")
    return found


def instruction_set() -> str:
    """The kernels that this process uses."""
    library = ctypes.CDLL(str(Path(glimpse_ext.__file__).with_name("libglimpse_cpu.so")))
    library.glimpse_cpu_isa.restype = ctypes.c_char_p
    return library.glimpse_cpu_isa().decode()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_cpu_kernels_agree_with_plain_loops(seed: int) -> None:
    found = failures(seed, draw_call)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("seed", range(EDGES))
def test_windows_and_outputs_around_whole_vectors(seed: int) -> None:
    found = failures(seed, draw_edges)
    assert not found, "\n".join(found)


def test_draws_reach_every_kernel() -> None:
    """A random test is as good as what it draws."""
    calls = [draw_call(seed) for seed in range(SEEDS)]
    for dtype in DTYPES:
        for nhwc in (False, True):
            drawn = [
                c
                for c in calls
                if c.features[0].dtype is dtype
                and (c.features[0].stride(1) == 1 and c.features[0].shape[1] > 1) is nhwc
            ]
            assert any(len(c.boxes) > 1 for c in drawn), (dtype, nhwc)
    assert {c.axes for c in calls} == {0, 1, 2, 3}
    assert {len(c.features) for c in calls} == {1, 2, 3, 4}
    assert any(len(c.boxes) == 0 for c in calls)
    assert any(f.shape[3] > 300 for c in calls for f in c.features)
    assert any(not c.features[0].isfinite().all() for c in calls)
    assert any(c.grad.numel() > 3 * 2**14 for c in calls)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_agree_too(isa: str) -> None:
    best = instruction_set()
    if best == isa:
        return  # The other tests of this file ran on it.
    if best == "baseline":
        pytest.skip(f"this CPU has no {isa}")
    environment = {**os.environ, "GLIMPSE_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, __file__, isa, str(SEEDS)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def main(isa: str, seeds: int) -> int:
    if instruction_set() != isa:
        print(f"wanted the kernels of {isa}, got {instruction_set()}")
        return 1
    found = [line for seed in range(seeds) for line in failures(seed, draw_call)]
    found += [line for seed in range(min(seeds, EDGES)) for line in failures(seed, draw_edges)]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
