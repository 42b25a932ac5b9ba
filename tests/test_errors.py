# SPDX-License-Identifier: BSD-3-Clause
"""Arguments that do not fit: an error that names the operator, what it expects, and what came."""

from __future__ import annotations

import pytest
import torch

import glimpse_ext

F32 = torch.float32


def good(device):
    return {
        "input": torch.zeros(2, 3, 8, 8, device=device.torch),
        "boxes": torch.tensor([[0.0, 1, 1, 4, 4]], device=device.torch),
        "output_size": 2,
    }


def good_pyramid(device):
    return {
        "features": [torch.zeros(2, 3, size, size, device=device.torch) for size in (8, 4)],
        "boxes": torch.tensor([[0.0, 1, 1, 4, 4]], device=device.torch),
        "output_size": 2,
        "scales": (0.5, 0.25),
    }


# name: (changes to the arguments, exception, what the text says was expected, and what came)
WRONG = {
    "input with 3 dimensions": (
        {"input": torch.zeros(3, 8, 8)},
        RuntimeError,
        "[N, C, H, W]",
        "[3, 8, 8]",
    ),
    "input with 5 dimensions": (
        {"input": torch.zeros(1, 2, 3, 8, 8)},
        RuntimeError,
        "[N, C, H, W]",
        "[1, 2, 3, 8, 8]",
    ),
    "input of int64": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
        RuntimeError,
        "float64, float32, float16, bfloat16 or uint8",
        "int64",
    ),
    "input of complex numbers": (
        {"input": torch.zeros(2, 3, 8, 8, dtype=torch.complex64)},
        RuntimeError,
        "float64, float32, float16, bfloat16 or uint8",
        "omplex",
    ),
    "input without pixels": (
        {"input": torch.zeros(2, 3, 0, 8)},
        RuntimeError,
        "at least one pixel",
        "[2, 3, 0, 8]",
    ),
    "boxes with 4 columns": (
        {"boxes": torch.zeros(7, 4)},
        RuntimeError,
        "[K, 5] (image, x1, y1, x2, y2)",
        "[7, 4]",
    ),
    "boxes with 1 dimension": ({"boxes": torch.zeros(5)}, RuntimeError, "[K, 5]", "[5]"),
    "boxes with 3 dimensions": (
        {"boxes": torch.zeros(2, 3, 5)},
        RuntimeError,
        "[K, 5]",
        "[2, 3, 5]",
    ),
    "boxes without dimension": ({"boxes": torch.tensor(1.0)}, RuntimeError, "[K, 5]", "[]"),
    "boxes of int64": (
        {"boxes": torch.zeros(2, 5, dtype=torch.int64)},
        RuntimeError,
        "float64, float32, float16 or bfloat16",
        "int64",
    ),
    "boxes as numbers": ({"boxes": 3.0}, TypeError, "[K, 5] tensor or a list", "float"),
    "boxes as None": ({"boxes": None}, TypeError, "[K, 5] tensor or a list", "NoneType"),
    "an empty list of boxes": ({"boxes": []}, ValueError, "non-empty list", "[]"),
    "a list with 5 columns": (
        {"boxes": [torch.zeros(2, 4), torch.zeros(3, 5)]},
        ValueError,
        "boxes[1] must be [L, 4] (x1, y1, x2, y2)",
        "[3, 5]",
    ),
    "a list with 1 dimension": (
        {"boxes": [torch.zeros(4)]},
        ValueError,
        "boxes[0] must be [L, 4]",
        "[4]",
    ),
    "a list of lists": (
        {"boxes": [[1.0, 2.0, 3.0, 4.0]]},
        TypeError,
        "boxes[0] must be a tensor",
        "list",
    ),
    "a list of int64": (
        {"boxes": [torch.zeros(2, 4, dtype=torch.int64)]},
        RuntimeError,
        "float64, float32, float16 or bfloat16",
        "int64",
    ),
    "a negative output size": ({"output_size": -1}, ValueError, "zero or more", "-1"),
    "a negative width": ({"output_size": (2, -3)}, ValueError, "zero or more", "-3"),
    "three output sizes": ({"output_size": (2, 2, 2)}, ValueError, "(height, width)", "3"),
    "a fractional output size": ({"output_size": 2.5}, TypeError, "int", "float"),
    "a fractional height": ({"output_size": (2.0, 2)}, TypeError, "int", "float"),
    "an output size beyond 32 bits": (
        {"output_size": (2**31, 1)},
        RuntimeError,
        "fit in 32 bits",
        str(2**31),
    ),
    "a sampling ratio beyond 31 bits": (
        {"sampling_ratio": 2**31},
        RuntimeError,
        "sampling_ratio must fit in 31 bits",
        str(2**31),
    ),
}

WRONG_PYRAMID = {
    "no features": ({"features": []}, RuntimeError, "at least one", "none"),
    "nine levels": (
        {"features": [torch.zeros(1, 1, 2, 2)] * 9, "scales": [1.0] * 9},
        RuntimeError,
        "at most 8",
        "9",
    ),
    "a map with 3 dimensions": (
        {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8)]},
        RuntimeError,
        "[N, C, H, W]",
        "[3, 8, 8]",
    ),
    "maps of two dtypes": (
        {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4, dtype=torch.float64)]},
        RuntimeError,
        "one dtype",
        "float32 and float64",
    ),
    "maps of two batch sizes": (
        {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 4)]},
        RuntimeError,
        "one batch size and channel count",
        "[1, 3, 4, 4]",
    ),
    "maps of two channel counts": (
        {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]},
        RuntimeError,
        "one batch size and channel count",
        "[2, 4, 4, 4]",
    ),
    "too few scales": ({"scales": (0.5,)}, RuntimeError, "one scale for each", "1 scales and 2"),
    "no scales": ({"scales": ()}, RuntimeError, "at least one scale", "none"),
    "a negative scale": ({"scales": (0.5, -0.25)}, RuntimeError, "positive", "-0.25"),
    "a scale of nan": ({"scales": (float("nan"), 0.5)}, RuntimeError, "positive", "nan"),
    "another rule": ({"assign": "mmcv"}, ValueError, "torchvision, detectron2", "'mmcv'"),
    "levels of the wrong length": (
        {"levels": torch.zeros(3, dtype=torch.int64)},
        RuntimeError,
        "levels must be [1]",
        "[3]",
    ),
    "levels of the wrong shape": (
        {"levels": torch.zeros(1, 1, dtype=torch.int64)},
        RuntimeError,
        "levels must be [1]",
        "[1, 1]",
    ),
    "levels of float32": (
        {"levels": torch.zeros(1)},
        RuntimeError,
        "int64 or int32",
        "float32",
    ),
}
# What is wrong with boxes and sizes of one map is wrong with those of several.
WRONG_PYRAMID |= {name: entry for name, entry in WRONG.items() if not {"input"} & entry[0].keys()}


def on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device.torch)
    if isinstance(value, list):
        return [on(device, item) for item in value]
    return value


def check_error(name, call, entry, device):
    changes, kind, expected, came = entry
    with pytest.raises(kind) as caught:
        call(**{key: on(device, value) for key, value in changes.items()})
    text = str(caught.value).splitlines()[0]
    assert text.startswith(f"{name}: "), text
    assert expected in text, text
    assert came in text.split(expected, 1)[1], f"what came stands after what was expected: {text}"


@pytest.mark.parametrize("case", WRONG)
def test_roi_align(case, device):
    def call(**changes):
        glimpse_ext.roi_align(**{**good(device), **changes})

    check_error("roi_align", call, WRONG[case], device)


@pytest.mark.parametrize("case", WRONG_PYRAMID)
def test_multiscale_roi_align(case, device):
    def call(**changes):
        glimpse_ext.multiscale_roi_align(**{**good_pyramid(device), **changes})

    check_error("multiscale_roi_align", call, WRONG_PYRAMID[case], device)


def test_the_arguments_that_errors_start_from_are_right(device):
    assert glimpse_ext.roi_align(**good(device)).shape == (1, 3, 2, 2)
    assert glimpse_ext.multiscale_roi_align(**good_pyramid(device)).shape == (1, 3, 2, 2)


def test_errors_are_the_same_with_gradients(device):
    """Autograd and torch.func call the operators in their own ways; the checks stand behind all."""
    arguments = good(device)
    arguments["input"].requires_grad_()
    arguments["boxes"] = torch.zeros(7, 4, device=device.torch, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^roi_align: boxes must be \[K, 5\].*\[7, 4\]"):
        glimpse_ext.roi_align(**arguments)

    def loss(image):
        return glimpse_ext.roi_align(image, arguments["boxes"].detach(), 2).sum()

    with pytest.raises(RuntimeError, match=r"^roi_align: boxes must be \[K, 5\].*\[7, 4\]"):
        torch.func.grad(loss)(arguments["input"].detach())


def test_the_bare_operators_check_too(device):
    """Checks are behind the dispatcher, so C++ and torch.ops callers meet them as well."""
    image, boxes = good(device)["input"], good(device)["boxes"]
    with pytest.raises(RuntimeError, match=r"roi_align: boxes must be \[K, 5\].*\[1, 4\]"):
        torch.ops.glimpse_ext.roi_align(image, boxes[:, :4], 1.0, 2, 2, -1, False)
    with pytest.raises(RuntimeError, match=r"roi_align: output size must be zero or more.*-2"):
        torch.ops.glimpse_ext.roi_align(image, boxes, 1.0, -2, 2, -1, False)
    with pytest.raises(RuntimeError, match=r"multiscale_roi_align: expects one scale"):
        torch.ops.glimpse_ext.multiscale_roi_align(
            [image, image], boxes, None, 2, 2, [1.0], -1, False, 224.0, 4, 0
        )
    with pytest.raises(RuntimeError, match="level rule 7"):
        torch.ops.glimpse_ext.multiscale_roi_align(
            [image, image], boxes, None, 2, 2, [1.0, 0.5], -1, False, 224.0, 4, 7
        )


def test_tensors_of_two_devices():
    """The other device here is "meta", which every machine has."""
    image, boxes = torch.zeros(1, 1, 4, 4), torch.zeros(2, 5)
    for call in (
        lambda: glimpse_ext.roi_align(image, boxes.to("meta"), 2),
        lambda: glimpse_ext.roi_align(image.to("meta"), boxes, 2),
        lambda: glimpse_ext.multiscale_roi_align([image, image.to("meta")], boxes, 2, (1, 0.5)),
    ):
        with pytest.raises(RuntimeError, match=r"roi_align: .* on the device of"):
            call()


if torch.cuda.is_available():

    def test_tensors_of_cpu_and_cuda():
        image, boxes = torch.zeros(1, 1, 4, 4), torch.zeros(2, 5)
        for call, name in (
            (lambda: glimpse_ext.roi_align(image.cuda(), boxes, 2), "roi_align"),
            (lambda: glimpse_ext.roi_align(image, boxes.cuda(), 2), "roi_align"),
            (
                lambda: glimpse_ext.multiscale_roi_align([image, image.cuda()], boxes, 2, (1, 0.5)),
                "multiscale_roi_align",
            ),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: .* must be on the device of"):
                call()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="antialias"):
        glimpse_ext.roi_align(torch.zeros(1, 1, 2, 2), torch.zeros(1, 5), 1, antialias=True)
