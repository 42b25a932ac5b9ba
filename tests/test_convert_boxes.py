# SPDX-License-Identifier: BSD-3-Clause
"""Boxes from convention to convention: the operators themselves say where a box is."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from cases import random_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import glimpse_ext
from glimpse_ext import convert_boxes
from glimpse_ext.convert_boxes import CONVENTIONS

F32, F64 = torch.float32, torch.float64
NAMES = list(CONVENTIONS)
ON_SAMPLES = ["tf_crop_and_resize", "onnx_resize", "grid_sample_align_corners"]
SIZE = (9, 12)

# ------------------------------------------------------------- what the operators read


def _roi_align(aligned):
    def read(image, boxes, cells):
        boxes = torch.nn.functional.pad(boxes, (1, 0))
        return glimpse_ext.roi_align(image, boxes, cells, 1.0, 2, aligned)

    return read


def _crop(box_format, align_corners):
    def read(image, boxes, cells):
        return glimpse_ext.crop(
            image, boxes, cells, box_format=box_format, align_corners=align_corners
        )

    return read


def _crop_and_resize(convention):
    def read(image, boxes, cells):
        index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return glimpse_ext.crop_and_resize(image, boxes, index, cells, convention=convention)

    return read


# Each operator with the convention of its boxes.
OPERATORS = {
    "roi_align aligned": ("torchvision", _roi_align(True)),
    "roi_align legacy": ("torchvision_legacy", _roi_align(False)),
    "crop pixels": ("torchvision", _crop("pixels", False)),
    "crop": ("grid_sample", _crop("normalized", False)),
    "crop align_corners": ("grid_sample_align_corners", _crop("normalized", True)),
    "crop_and_resize tf": ("tf_crop_and_resize", _crop_and_resize("tf")),
    "crop_and_resize half_pixel": ("tf_half_pixel", _crop_and_resize("half_pixel")),
}

# (version, centered, normalized) of torch.ops.glimpse_ext.subpixel_glimpse.
GLIMPSES = {
    "tf_glimpse": ((1, True, True), (2, True, True)),
    "tf_glimpse_v1_normalized": ((1, False, True),),
    "tf_glimpse_v1_centered": ((1, True, False),),
    "tf_glimpse_v1": ((1, False, False),),
    "tf_glimpse_v2_normalized": ((2, False, True),),
    "tf_glimpse_v2_centered": ((2, True, False),),
    "tf_glimpse_v2": ((2, False, False),),
}


def edges(count: int = 6, size: tuple[int, int] = SIZE, margin: float = 1.0) -> Tensor:
    """x1, y1, x2, y2 in edge units, in the image and wider than a pixel."""
    corner = (random_tensor((count, 2, 2), F64, f"edges {size}") + 1) / 2
    x = corner[:, :, 0].sort(1).values * (size[1] - 2 * margin - 1.5) + margin
    y = corner[:, :, 1].sort(1).values * (size[0] - 2 * margin - 1.5) + margin
    return torch.stack([x[:, 0], y[:, 0], x[:, 1] + 1.5, y[:, 1] + 1.5], 1)


def ramp(y: Tensor, x: Tensor) -> Tensor:
    """A picture that no two places share, given in edge units."""
    return 3 * y - 7 * x + 0.25


def ramp_image(size: tuple[int, int] = SIZE) -> Tensor:
    y, x = (torch.arange(n, dtype=F64) + 0.5 for n in size)
    return ramp(y[:, None], x[None, :])[None, None]


def middles(boxes: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the middles of cells that divide boxes in edge units."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    y, x = ((torch.arange(n, dtype=F64) + 0.5) / n for n in cells)
    return (y1 + (y2 - y1) * y)[:, :, None], (x1 + (x2 - x1) * x)[:, None, :]


@pytest.mark.parametrize("cells", [(1, 1), (2, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_read_the_same_places(operator, cells, device, close):
    """Bilinear samples of a ramp are exact, so what comes out says where was read."""
    convention, read = OPERATORS[operator]
    boxes = edges()
    own = convert_boxes(boxes, "torchvision", convention, SIZE, cells=cells)
    got = read(ramp_image().to(device.torch), own.to(device.torch), cells)
    close(got[:, 0], ramp(*middles(boxes, cells)) + torch.zeros(len(boxes), *cells, dtype=F64))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_ends_of_a_box_are_where_they_were(operator, device, close):
    """Without ``cells`` ends keep their place: samples on them are every second of a finer grid."""
    convention, read = OPERATORS[operator]
    boxes, cells = edges(), (3, 4)
    own = convert_boxes(boxes, "torchvision", convention, SIZE).to(device.torch)
    image = ramp_image().to(device.torch)
    if CONVENTIONS[convention].on_samples:
        got = read(image, own, (2 * cells[0] + 1, 2 * cells[1] + 1))[:, :, 1::2, 1::2]
    else:
        got = read(image, own, cells)
    close(got[:, 0], ramp(*middles(boxes, cells)) + torch.zeros(len(boxes), *cells, dtype=F64))


@pytest.mark.parametrize("convention", GLIMPSES)
def test_glimpses_read_the_same_places(convention, device, close):
    """The window of a glimpse has whole sides; its offset need not be whole."""
    cells = (3, 4)
    first = edges()[:, :2].clamp(max=4)
    boxes = torch.cat([first, first + torch.tensor([4.0, 3.0], dtype=F64)], 1)
    own = convert_boxes(boxes, "torchvision", convention, SIZE)
    close(own[:, 2:], torch.tensor(cells, dtype=F64).expand(len(boxes), 2).contiguous())
    image = ramp_image().to(device.torch).expand(len(boxes), -1, -1, -1)
    for version, centered, normalized in GLIMPSES[convention]:
        got = torch.ops.glimpse_ext.subpixel_glimpse(
            image,
            own[:, :2].contiguous().to(device.torch),
            *cells,
            version,
            centered,
            normalized,
            1,
        )
        close(got[:, 0], ramp(*middles(boxes, cells)), detail=f"version {version}")


@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sample_reads_the_ends(align_corners, close):
    """torch itself, at the corners of boxes."""
    name = "grid_sample_align_corners" if align_corners else "grid_sample"
    boxes = edges()
    own = convert_boxes(boxes, "torchvision", name, SIZE)
    grid = torch.stack([own[:, :2], own[:, 2:]], 1)[None]
    got = torch.nn.functional.grid_sample(ramp_image(), grid, align_corners=align_corners)[0, 0]
    expected = torch.stack([ramp(boxes[:, 1], boxes[:, 0]), ramp(boxes[:, 3], boxes[:, 2])], 1)
    close(got, expected)


# ------------------------------------------------------------------------ worked numbers

# The box of rows 1 to 3 and columns 2 to 4 of a 5×5 image (whole pixels), in edge units 2, 1, 5, 4.
FIVE = {
    "torchvision": (2, 1, 5, 4),
    "torchvision_legacy": (1.5, 0.5, 4.5, 3.5),
    "onnx_half_pixel": (2, 1, 5, 4),
    "onnx_output_half_pixel": (1.5, 0.5, 4.5, 3.5),
    "onnx_resize": (0.125, 0.375, 0.875, 1.125),
    "tf_crop_and_resize": (0.125, 0.375, 0.875, 1.125),
    "tf_half_pixel": (0.2, 0.4, 0.8, 1.0),
    "tf_glimpse": (0, 0.4, 3, 3),
    "tf_glimpse_v1_normalized": (0.5, 0.7, 3, 3),
    "tf_glimpse_v1_centered": (0, 2, 3, 3),
    "tf_glimpse_v1": (2.5, 3.5, 3, 3),
    "tf_glimpse_v2_normalized": (0.2, 0.4, 3, 3),
    "tf_glimpse_v2_centered": (-1.5, -0.5, 3, 3),
    "tf_glimpse_v2": (1, 2, 3, 3),
    "grid_sample": (-0.2, -0.6, 1, 0.6),
    "grid_sample_align_corners": (-0.25, -0.75, 1.25, 0.75),
    "opencv": (1.5, 0.5, 4.5, 3.5),
    "coco": (2, 1, 3, 3),
    "yolo": (0.7, 0.5, 0.6, 0.6),
    "inclusive": (2, 1, 4, 3),
    "pascal_voc": (3, 2, 5, 4),
}


def test_every_convention_has_a_worked_number():
    assert list(FIVE) == NAMES


@pytest.mark.parametrize("dst", NAMES)
@pytest.mark.parametrize("src", NAMES)
def test_five_by_five(src, dst):
    got = convert_boxes(torch.tensor(FIVE[src], dtype=F64), src, dst, (5, 5))
    torch.testing.assert_close(got, torch.tensor(FIVE[dst], dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "box"),
    {
        "grid_sample": (-1, -1, 1, 1),
        "tf_half_pixel": (0, 0, 1, 1),
        "coco": (0, 0, 12, 9),
        "yolo": (0.5, 0.5, 1, 1),
        "inclusive": (0, 0, 11, 8),
        "pascal_voc": (1, 1, 12, 9),
        "tf_glimpse": (0, 0, 9, 12),
    }.items(),
)
def test_the_whole_image(name, box):
    got = convert_boxes(torch.tensor(box, dtype=F64), name, "torchvision", SIZE)
    assert got.tolist() == [0, 0, 12, 9]


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_the_whole_image_between_pixel_centres(name):
    """With as many cells as pixels, 0 to 1 (or -1 to 1) reads every pixel: it is the image."""
    low = -1.0 if name.startswith("grid") else 0.0
    box = torch.tensor([low, low, 1, 1], dtype=F64)
    assert convert_boxes(box, name, "torchvision", SIZE).tolist() == [0.5, 0.5, 11.5, 8.5]
    got = convert_boxes(box, name, "torchvision", SIZE, cells=SIZE)
    torch.testing.assert_close(got, torch.tensor([0, 0, 12, 9], dtype=F64), rtol=0, atol=1e-14)


def test_published_differences():
    """detectron2 shifts by half a pixel what torchvision's default reads half a pixel late, and
    VOC's first pixel is pixel 1."""
    box = torch.tensor([10.0, 20.0, 30.0, 40.0])
    late = convert_boxes(box, "torchvision_legacy", "torchvision", (50, 50))
    assert (late - box).tolist() == [0.5] * 4
    voc = convert_boxes(box, "pascal_voc", "torchvision", (50, 50))
    assert (voc - box).tolist() == [-1, -1, 0, 0]


# ---------------------------------------------------------------------------- properties

numbers = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(numbers, min_size=4, max_size=4),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.tuples(st.integers(2, 2000), st.integers(2, 2000)),
    st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([F32, F64]),
)
def test_there_and_back(box, src, dst, size, cells, dtype):
    boxes = torch.tensor(box, dtype=dtype)
    there = convert_boxes(boxes, src, dst, size, cells=cells)
    back = convert_boxes(there, dst, src, size, cells=cells)
    # Rounding is relative to the largest edge, in pixels, and comes back through the unit of src.
    # From samples to cells a box grows by at most the factor 2 = cells / (cells - 1).
    low, high = convert_boxes(boxes.double(), src, "coco", size), boxes.double().abs().max()
    scale = 4 * float(torch.maximum(low.abs().max(), high) + max(size))
    units = [CONVENTIONS[src].unit.at(side) for side in size]
    bound = 8 * torch.finfo(dtype).eps * scale / min(1.0, *units)
    assert (back - boxes).abs().max() <= bound, f"{boxes.tolist()} came back as {back.tolist()}"
    assert there.dtype == back.dtype == dtype


@given(
    st.lists(numbers, min_size=4, max_size=4),
    st.lists(st.sampled_from(NAMES), min_size=3, max_size=3),
    st.tuples(st.integers(2, 2000), st.integers(2, 2000)),
)
def test_the_way_does_not_matter(box, names, size):
    a, b, c = names
    boxes = torch.tensor(box, dtype=F64)
    straight = convert_boxes(boxes, a, c, size)
    around = convert_boxes(convert_boxes(boxes, a, b, size), b, c, size)
    torch.testing.assert_close(around, straight, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_flip_is_size_less_edge(name, close):
    """A flipped box reads the flipped image, whatever its convention."""
    boxes, cells = edges(), (3, 4)
    x1, y1, x2, y2 = convert_boxes(
        convert_boxes(boxes, "torchvision", name, SIZE), name, "torchvision", SIZE
    ).unbind(1)
    flipped = torch.stack([SIZE[1] - x2, y1, SIZE[1] - x1, y2], 1)
    image = random_tensor((1, 2, *SIZE), F64, "flip")
    read = OPERATORS["crop pixels"][1]
    close(read(image.flip(3), flipped, cells).flip(3), read(image, boxes, cells))


@pytest.mark.parametrize("cells", [None, (3, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name, cells):
    boxes = edges(2).requires_grad_()

    def there(b):
        return convert_boxes(b, "torchvision", name, SIZE, cells=cells)

    def back(b):
        return convert_boxes(b, name, "torchvision", SIZE, cells=cells)

    assert torch.autograd.gradcheck(there, boxes, check_forward_ad=True)
    assert torch.autograd.gradcheck(back, there(boxes).detach().requires_grad_())
    # The way back is the inverse, so the derivatives multiply to one.
    jacobian = torch.func.jacrev(lambda b: back(there(b)))(boxes.detach()[0])
    torch.testing.assert_close(jacobian, torch.eye(4, dtype=F64), rtol=0, atol=1e-13)
    mapped = torch.func.vmap(there)(boxes.detach())
    torch.testing.assert_close(mapped, there(boxes.detach()), rtol=0, atol=0)


def test_shapes_and_dtypes():
    for shape in ((4,), (0, 4), (3, 4), (2, 5, 3, 4)):
        boxes = torch.rand(shape)
        assert convert_boxes(boxes, "coco", "yolo", SIZE).shape == shape
    for dtype in (torch.float16, torch.bfloat16, F32, F64):
        boxes = torch.tensor([1, 2, 3, 4], dtype=dtype)
        for dst in ("torchvision", "coco"):
            assert convert_boxes(boxes, "torchvision", dst, SIZE).dtype == dtype
    for dtype in (torch.uint8, torch.int32, torch.int64):
        boxes = torch.tensor([3, 2, 5, 4], dtype=dtype)
        got = convert_boxes(boxes, "pascal_voc", "torchvision", SIZE)
        assert got.dtype == F32
        assert got.tolist() == [2, 1, 5, 4]
        assert convert_boxes(boxes, "coco", "coco", SIZE).dtype == F32


def test_halves_are_rounded_once():
    boxes = torch.rand(100, 4).mul(200).half()
    got = convert_boxes(boxes, "coco", "grid_sample", (333, 777))
    exact = convert_boxes(boxes.double(), "coco", "grid_sample", (333, 777))
    assert (got.double() - exact).abs().max() <= 2**-11


def test_compiles():
    compiled = torch.compile(convert_boxes, fullgraph=True, backend="eager")
    boxes = edges()
    for size in (SIZE, (17, 30)):
        got = compiled(boxes, "torchvision", "tf_crop_and_resize", size, cells=3)
        expected = convert_boxes(boxes, "torchvision", "tf_crop_and_resize", size, cells=3)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dst", NAMES)
def test_what_is_not_finite_stays_so(dst):
    for bad in (math.nan, math.inf, -math.inf):
        got = convert_boxes(torch.tensor([1.0, bad, 5.0, 6.0]), "torchvision", dst, SIZE)
        assert not got.isfinite().all()
        y = convert_boxes(torch.tensor([1.0, 2.0, 5.0, 6.0]), "torchvision", dst, SIZE)
        assert (got == y).sum() >= 2, "the other axis does not change"


def test_errors():
    box = torch.zeros(4)
    for arguments, error, text in (
        ((box, "coco", "nothing", SIZE), ValueError, "dst must be one of torchvision, .*'nothing'"),
        ((box, "COCO", "coco", SIZE), ValueError, "src must be one of"),
        ((torch.zeros(3, 5), "coco", "yolo", SIZE), ValueError, r"\[\.\.\., 4\], got \[3, 5\]"),
        ((torch.tensor(1.0), "coco", "yolo", SIZE), ValueError, r"got \[\]"),
        (([0, 0, 1, 1], "coco", "yolo", SIZE), TypeError, "must be a tensor, got list"),
        ((box.bool(), "coco", "yolo", SIZE), TypeError, "real numbers, got torch.bool"),
        ((box, "coco", "yolo", (3.0, 4)), TypeError, "two integers"),
        ((box, "coco", "yolo", (3, 4, 5)), TypeError, "two integers"),
        ((box, "coco", "yolo", None), TypeError, "two integers"),
        ((box, "coco", "yolo", (0, 4)), ValueError, "size must be one or more"),
        ((box, "coco", "tf_crop_and_resize", (1, 4)), ValueError, "a side of one pixel"),
    ):
        with pytest.raises(error, match=f"^convert_boxes: .*{text}"):
            convert_boxes(*arguments)
    for cells, error in ((0, ValueError), ((2, 3, 4), TypeError), (2.5, TypeError)):
        with pytest.raises(error, match=r"^convert_boxes: cells"):
            convert_boxes(box, "coco", "yolo", SIZE, cells=cells)


def test_a_side_of_one_pixel_can_be_read():
    """Every fraction is the centre of the only pixel."""
    got = convert_boxes(torch.tensor([0.0, 0.3, 1.0, 0.3]), "tf_crop_and_resize", "coco", (1, 11))
    torch.testing.assert_close(got, torch.tensor([3.5, 0.5, 0, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_names_it(name):
    assert f"``{name}``" in convert_boxes.__doc__


def test_the_examples_of_the_documentation():
    result = doctest.testmod(importlib.import_module("glimpse_ext.convert_boxes"))
    assert result.attempted
    assert result.failed == 0
