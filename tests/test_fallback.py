# SPDX-License-Identifier: BSD-3-Clause
"""The operators in plain PyTorch give the numbers of the compiled ones.

Kernels of both are called here in one process, so every argument that the layer above makes for
derivatives is compared, too. .ci/fallback runs the tests of the operators with nothing else there.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, LAYOUTS, arrange, random_tensor
from conftest import TOLERANCES, Tolerance, assert_within
from operators import OPERATORS
from torch.utils._python_dispatch import TorchDispatchMode

import glimpse_ext
from glimpse_ext import _fallback, _library, _schemas

pytestmark = pytest.mark.skipif(
    _library.cpu_path is None, reason="there is no compiled library to compare with"
)

F32, F64 = torch.float32, torch.float64


class Comparison(TorchDispatchMode):
    """Runs both kernels of every call of an operator of ours, and goes on with the compiled one."""

    def __init__(self, label):
        super().__init__()
        self.label = label
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace != "glimpse_ext":
            return result
        name = function._schema.name.removeprefix("glimpse_ext::")
        self.seen.add(name)
        kernel = _fallback.KERNELS.get(name)
        if kernel is None:
            kernel = _fallback.sampler_kernel(name, _library.samplers[name])
        replaced = kernel(*args)
        for got, expected in zip(flat(replaced), flat(result), strict=True):
            compare(f"{self.label}, {name}", got, expected)
        return result


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def compare(label, got, expected):
    assert got.dtype == expected.dtype, f"{label}: {got.dtype}, expected {expected.dtype}"
    assert got.is_contiguous() == expected.is_contiguous(), f"{label}: another memory format"
    if got.dtype in TOLERANCES["gradient"]:
        tolerance = TOLERANCES["gradient"][got.dtype]
        # Both are rounded: neither is the exact number.
        twice = Tolerance(2 * tolerance.absolute, 2 * tolerance.relative, tolerance.reason)
        assert_within(got, expected, twice, label)
    else:
        assert torch.equal(got, expected), label


NAMED = {case.name: case for case in CASES}
PLACES = ["inside", "partial", "nan", "huge", "edge"]


def compared(op, case, dtype, layout="contiguous"):
    """Values, gradients and gradients of gradients: the names of what was called."""
    image = arrange(case.image(dtype), layout)
    boxes = op.boxes(case).to(F64 if dtype == F64 else F32)
    with Comparison(f"{op}, {case}, {dtype}, {layout}") as comparison:
        if not dtype.is_floating_point:
            op.call(image, boxes, case)
            return comparison.seen
        named = {"image": image, "boxes": boxes}
        leaves = [named[name].requires_grad_() for name in op.gradients]
        values = op.call(image, boxes, case)
        twice = dtype == F64 and "boxes" in op.gradients and case.name == "inside"
        first = torch.autograd.grad(values.square().sum(), leaves, create_graph=twice)
        if twice and op.second:
            torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        elif twice:  # test_the_generic_entries_agree has what cannot be asked for here
            torch.autograd.grad(first[0].square().sum(), leaves)
    return comparison.seen


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_kernels_agree(op):
    for i, name in enumerate(PLACES):
        compared(op, NAMED[name], F64)
        compared(op, NAMED[name], F32, LAYOUTS[i % len(LAYOUTS)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_kernels_agree_on_other_types(dtype):
    for op in OPERATORS:
        if dtype in op.dtypes:
            compared(op, NAMED["partial"], dtype)


def test_noise_is_the_same():
    """Bit for bit: the generator, and the range of uniform noise. Sums of gaussian noise differ."""
    image = random_tensor((3, 2, 9, 11), F32, "noise")
    offsets = torch.tensor([[0.9, -0.7], [0.0, 0.0], [float("nan"), 0]])
    for noise in ("uniform", "gaussian"):
        for mode in ("exact", "subpixel"):
            with Comparison(f"extract_glimpse {noise} {mode}") as comparison:
                glimpse_ext.extract_glimpse(
                    image,
                    (7, 8),
                    offsets,
                    noise=noise,
                    mode=mode,
                    generator=torch.Generator().manual_seed(3),
                )
            assert "extract_glimpse" in comparison.seen


@pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0])
@pytest.mark.parametrize("method", ["detectron2", "torchvision"])
def test_pasted_masks_are_the_same_bits(method, threshold):
    masks = random_tensor((8, 7, 9), F32, "masks").abs()
    boxes = torch.tensor(
        [
            [3.3, 2.1, 17.7, 14.2],
            [-5.5, -4, 9, 30.1],
            [9, 14, 2, 3],
            [5, 5, 5, 9],
            [float("nan"), 1, 2, 3],
            [-1e9, 2, 1e9, 9],
            [40, 1, 60, 8],
            [0, 0, 24, 20],
        ]
    )
    with Comparison(f"paste_masks {method} {threshold}") as comparison:
        glimpse_ext.paste_masks(masks, boxes, (20, 24), threshold, method)
        if threshold >= 0:
            glimpse_ext.paste_masks_to_rle(masks, boxes, (20, 24), threshold, method)
            glimpse_ext.paste_masks_to_bits(masks, boxes, (20, 21), threshold, method)
            assert {"_paste_masks_runs", "paste_masks_to_bits"} <= comparison.seen
    assert "paste_masks_threshold" in comparison.seen


def test_every_operator_is_compared():
    seen = set()
    for op in OPERATORS:
        seen |= compared(op, NAMED["inside"], F64)
        seen |= compared(op, NAMED["inside"], torch.uint8)
    # The last one is for torch.func and for compiled programs.
    elsewhere = {
        "paste_masks_threshold",
        "_paste_masks_runs",
        "paste_masks_to_bits",
        "point_sample",
    }
    assert seen | elsewhere == set(_schemas.NAMES)


def test_the_generic_entries_agree():
    """The operators that ordinary calls do not meet."""
    case = NAMED["partial"]
    image, boxes = case.image(F64), case.boxes(F64)
    ops = torch.ops.glimpse_ext
    with Comparison("generic") as comparison:
        ops.point_sample(image, boxes[:, 1:3] / 8, False)
        for params in ([0, 2, 1, 0, 0], [0, -1, 0, 0, 0]):
            _, chosen = ops._frames_maximum(image, boxes, None, [3, 2], params, 1.0)
            ops._frames_sample(image, boxes, None, None, chosen, [3, 2], params, 1.0)
            ops._frames_sample(image, boxes, None, boxes, None, [3, 2], params, 1.0)
        grad = random_tensor((len(boxes), image.shape[1], 5, 3), F64, "grad")
        for axes, params in itertools.product((1, 2, 3), itertools.product((0.0, 1.0), repeat=3)):
            place = (boxes, None, None, boxes.cos(), axes, [5, 3], 100, params, [1.0], [], 0.0)
            ops._sample([image], *place)
            ops._sample_grad_features(grad, *place, image.shape, True)
            ops._sample_grad_boxes([image], grad, *place)
    assert {"point_sample", "_frames_sample", "_frames_maximum"} <= comparison.seen


# --------------------------------------------------------------------------- without the library

ALONE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import glimpse_ext
    import glimpse_ext.nn
said = [w for w in caught if issubclass(w.category, glimpse_ext.FallbackWarning)]
assert len(said) == 1, said
text = str(said[0].message)
assert "plain PyTorch" in text and "slower" in text and "GLIMPSE_EXT_FALLBACK" in text, text

import torch
assert glimpse_ext.library_info()["cpu_library"] is None
image = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
boxes = torch.tensor([[0, 1.1, 2.35, 4.2, 3.95], [1, 0.4, 1.3, 2.7, 3.5]], dtype=torch.float64)
boxes.requires_grad_()

def pool(image, corners):
    rows = torch.cat([boxes[:, :1].detach(), corners], 1)
    return glimpse_ext.roi_align(image, rows, 2, 1.0, 2, True)

corners = boxes[:, 1:].detach().requires_grad_()
assert torch.autograd.gradcheck(pool, (image, corners), fast_mode=True)
assert torch.autograd.gradgradcheck(pool, (image, corners), fast_mode=True)
still = corners.detach()
forward = torch.func.jvp(lambda c: pool(image.detach(), c), (still,), (still,))
backward = torch.func.vmap(torch.func.grad(lambda c: pool(image.detach(), c).sum()))(
    torch.stack([still, still + 0.25])
)
assert forward[1].isfinite().all() and backward.shape == (2, 2, 4)
try:
    glimpse_ext.roi_align(image, boxes[:, :4], 2)
except RuntimeError as error:
    text = "roi_align: boxes must be [K, 5] (image, x1, y1, x2, y2), got [2, 4]"
    assert str(error).startswith(text), error
else:
    raise AssertionError("boxes of 4 columns were taken")

def traced(x):
    return glimpse_ext.roi_align(x, boxes.detach(), 2).sum()

compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(image), traced(image))
print("all of it works")
"""


def test_without_the_library(tmp_path):
    environment = {**os.environ, "GLIMPSE_EXT_FALLBACK": "1"}
    environment["PYTHONPATH"] = str(_library._FOLDER.parent)
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all of it works" in done.stdout
