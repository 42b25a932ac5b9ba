# SPDX-License-Identifier: BSD-3-Clause
"""Modules equal the functions, and torchvision's modules where it is installed."""

from __future__ import annotations

import doctest
import inspect
import math

import pytest
import torch
from cases import PYRAMIDS, random_tensor

import glimpse_ext
import glimpse_ext.nn as gnn

F32, F64 = torch.float32, torch.float64
IMAGE = random_tensor((2, 3, 16, 20), F64, "nn")
ROWS = torch.tensor(
    [[0, 1.5, 2.25, 9.0, 8.5], [1, 3.0, 0.5, 18.5, 14.0], [1, 4.25, 4.0, 5.0, 7.5]], dtype=F64
)
FRACTIONS = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.5, 0.0, 1.2, 0.7]], dtype=F64)
INDEX = torch.tensor([1, 0])
OFFSETS = torch.tensor([[0.25, -0.5], [0.0, 0.75]])


def equal(got, expected):
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_roi_align():
    for arguments in ((7,), ((3, 2), 0.5, 2, True), ((1, 4), 2.0, 0, False)):
        equal(gnn.RoIAlign(*arguments)(IMAGE, ROWS), glimpse_ext.roi_align(IMAGE, ROWS, *arguments))
    boxes = [ROWS[:1, 1:], ROWS[1:, 1:]]
    equal(gnn.RoIAlign(2)(IMAGE, boxes), glimpse_ext.roi_align(IMAGE, boxes, 2))
    largest = gnn.RoIAlign(2, 1.0, 3, True, "max")
    equal(largest(IMAGE, ROWS), glimpse_ext.roi_align(IMAGE, ROWS, 2, 1.0, 3, True, mode="max"))
    assert "mode='max'" in repr(largest)
    assert repr(gnn.RoIAlign(7, 0.25, 2)) == (
        "RoIAlign(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=False)"
    )


def test_crop():
    options = {"box_format": "pixels", "align_corners": True, "padding_mode": "border"}
    equal(gnn.Crop((3, 4))(IMAGE, ROWS), glimpse_ext.crop(IMAGE, ROWS, (3, 4)))
    equal(gnn.Crop(3, **options)(IMAGE, ROWS), glimpse_ext.crop(IMAGE, ROWS, 3, **options))
    boxes = FRACTIONS * 2 - 1
    equal(gnn.Crop(3)(IMAGE, boxes, INDEX), glimpse_ext.crop(IMAGE, boxes, 3, image_index=INDEX))
    assert repr(gnn.Crop(3)) == (
        "Crop(size=(3, 3), box_format='normalized', align_corners=False, padding_mode='zeros')"
    )


def test_crop_and_resize():
    inputs = (IMAGE, FRACTIONS, INDEX)
    equal(gnn.CropAndResize(3)(*inputs), glimpse_ext.crop_and_resize(*inputs, 3))
    equal(
        gnn.CropAndResize((3, 2), "nearest", 7.0, convention="half_pixel")(*inputs),
        glimpse_ext.crop_and_resize(*inputs, (3, 2), "nearest", 7.0, convention="half_pixel"),
    )


class Later:
    """Stands for a function, and keeps what it was called with."""

    def __call__(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        return arguments[0]


@pytest.mark.parametrize(
    ("module", "name", "inputs", "arguments", "options"),
    [
        (
            gnn.RoIAlignRotated((3, 2), 0.5, 2, False, True, "radians"),
            "roi_align_rotated",
            (IMAGE, ROWS),
            (IMAGE, ROWS, (3, 2), 0.5, 2, False, True, "radians"),
            {},
        ),
        (
            gnn.Glimpse(3, False, False, "zero", version=1, mode="subpixel", scales=(1, 2)),
            "extract_glimpse",
            (IMAGE, OFFSETS),
            (IMAGE, (3, 3), OFFSETS, False, False, "zero"),
            {"version": 1, "mode": "subpixel", "scales": (1, 2), "generator": None},
        ),
        (
            gnn.PasteMasks(-1.0, "torchvision"),
            "paste_masks",
            (IMAGE, ROWS, (30, 40)),
            (IMAGE, ROWS, (30, 40), -1.0, "torchvision"),
            {},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_arguments_arrive(module, name, inputs, arguments, options, monkeypatch):
    """In the order of the function, whose own parameters they have."""
    later = Later()
    function = getattr(glimpse_ext, name, None)
    monkeypatch.setattr(glimpse_ext, name, later, raising=False)
    module(*inputs)
    assert later.options == options
    assert len(later.arguments) == len(arguments)
    for a, b in zip(later.arguments, arguments, strict=True):
        assert a is b or a == b
    if inspect.isfunction(function):
        inspect.signature(function).bind(*arguments, **options)
        defaults = inspect.signature(function).parameters
        for key, parameter in inspect.signature(type(module)).parameters.items():
            assert parameter.default == defaults[key].default, key


@pytest.mark.parametrize("aligned", [False, True])
def test_pooler(aligned):
    for pyramid in PYRAMIDS:
        maps, boxes = pyramid.features(), pyramid.boxes()
        lists = [boxes[boxes[:, 0] == i, 1:] for i in range(pyramid.batch)]
        pooler = gnn.ROIPooler(
            pyramid.output_size,
            pyramid.scales,
            2,
            "ROIAlignV2" if aligned else "ROIAlign",
            pyramid.rule["canonical_size"],
            pyramid.rule["canonical_level"],
        )
        expected = glimpse_ext.multiscale_roi_align(
            maps,
            lists,
            pyramid.output_size,
            pyramid.scales,
            2,
            aligned,
            assign="detectron2",
            **pyramid.rule,
        )
        equal(pooler(maps, lists), expected)

        class Boxes:
            def __init__(self, tensor):
                self.tensor = tensor

        equal(pooler(maps, [Boxes(own) for own in lists]), expected)
        assert pooler(maps, []).shape == (0, 3, *pyramid.output_size)


def test_rotated_pooler(monkeypatch):
    """Each box from its level, in the order of the boxes."""

    def each_row(features, rows, size, scale, ratio):
        return (
            features[rows[:, 0].long()][:, :, : size[0], : size[1]] * scale
            + rows[:, 5, None, None, None]
        )

    monkeypatch.setattr(glimpse_ext, "roi_align_rotated", each_row, raising=False)
    maps = [torch.ones(2, 3, 8, 8), 10 * torch.ones(2, 3, 4, 4)]
    boxes = [
        torch.tensor([[5.0, 5, 300, 300, 1], [5, 5, 10, 10, 2]]),
        torch.tensor([[0.0, 0, 250, 300, 3]]),
    ]
    pooler = gnn.ROIPooler(2, (1 / 8, 1 / 16), 2, "ROIAlignRotated")
    got = pooler(maps, boxes)
    assert got.shape == (3, 3, 2, 2)
    assert got[:, 0, 0, 0].tolist() == [10 / 16 + 1, 1 / 8 + 2, 10 / 16 + 3]


def test_whole_calls():
    """The functions themselves, with the arguments of the module."""
    rows = torch.tensor([[1, 8.0, 7.0, 9.0, 5.0, 30.0]], dtype=F64)
    equal(
        gnn.RoIAlignRotated(3, 0.5, 2, clockwise=True)(IMAGE, rows),
        glimpse_ext.roi_align_rotated(IMAGE, rows, 3, 0.5, 2, clockwise=True),
    )
    glimpse = gnn.Glimpse(3, noise="zero", mode="subpixel", scales=(1, 2))
    equal(
        glimpse(IMAGE, OFFSETS),
        glimpse_ext.extract_glimpse(
            IMAGE, 3, OFFSETS, noise="zero", mode="subpixel", scales=(1, 2)
        ),
    )
    masks, boxes = IMAGE[:, :1], ROWS[:2, 1:]
    equal(
        gnn.PasteMasks(None)(masks, boxes, (9, 11)),
        glimpse_ext.paste_masks(masks, boxes, (9, 11), None),
    )


def test_scales_are_those_of_the_call():
    """torchvision keeps the scales of the first call, and reads other images in wrong places."""
    module = gnn.MultiScaleRoIAlign(["a", "b"], 2, 2, canonical_scale=32)
    maps = {
        "a": random_tensor((1, 2, 16, 16), F64, "a"),
        "b": random_tensor((1, 2, 8, 8), F64, "b"),
    }
    boxes = [torch.tensor([[4.0, 4, 20, 24], [1.0, 1, 60, 62]], dtype=F64)]
    for height, scales in ((64, (1 / 4, 1 / 8)), (128, (1 / 8, 1 / 16)), (64, (1 / 4, 1 / 8))):
        expected = glimpse_ext.multiscale_roi_align(
            maps, boxes, 2, scales, 2, canonical_size=32, canonical_level=4
        )
        equal(module(maps, boxes, [(height, height)]), expected)
        assert module.state_dict() == {}


def test_errors():
    for call, error, text in (
        (lambda: gnn.RoIAlign((1, 2, 3)), ValueError, "RoIAlign: output_size"),
        (lambda: gnn.Crop(2.5), TypeError, "Crop: output_size must be int"),
        (lambda: gnn.ROIPooler(7, (0.25,), 2, "ROIPool"), ValueError, "ROIPooler: pooler_type"),
        (lambda: gnn.ROIPooler(7, (0.25, 0.1), 2, "ROIAlign"), ValueError, "must halve"),
        (lambda: gnn.ROIPooler(7, (), 2, "ROIAlign"), ValueError, "must halve"),
        (lambda: gnn.ROIPooler(7, (0.3, 0.15), 2, "ROIAlign"), ValueError, "powers of two"),
        (lambda: gnn.ROIPooler(7, (0.5,), 2, "ROIAlign", 0), ValueError, "must be positive"),
        (lambda: gnn.ROIPooler(7, (0.5,), 2, "ROIAlign")([], []), ValueError, "expects 1 maps"),
        (
            lambda: gnn.MultiScaleRoIAlign(["a"], 2, 2)({"b": IMAGE}, [], [(1, 1)]),
            ValueError,
            "maps named",
        ),
        (
            lambda: gnn.MultiScaleRoIAlign(["a"], 2, 2)({"a": IMAGE}, [], []),
            ValueError,
            "at least one image shape",
        ),
    ):
        with pytest.raises(error, match=text):
            call()


def test_modules_can_be_compiled():
    module = gnn.MultiScaleRoIAlign(["a"], 2, 2)
    boxes = [ROWS[:1, 1:], ROWS[1:, 1:]]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    equal(compiled({"a": IMAGE}, boxes, [(32, 40)]), module({"a": IMAGE}, boxes, [(32, 40)]))


def test_the_examples_of_the_documentation():
    result = doctest.testmod(gnn)
    assert result.attempted
    assert result.failed == 0


# -------------------------------------------------------------------------------------- torchvision


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip(
        "torchvision", reason="the peer to compare with is not installed"
    ).ops


def close(got, expected):
    bound = 1e-13 if got.dtype == F64 else 2e-6
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_torchvision_roi_align(peer, dtype):
    for arguments in ((7, 1.0, 2), ((3, 2), 0.5, 2, True), ((1, 4), 2.0, 0, False)):
        inputs = IMAGE.to(dtype), ROWS.to(dtype)
        close(gnn.RoIAlign(*arguments)(*inputs), peer.RoIAlign(*arguments)(*inputs))
    assert repr(gnn.RoIAlign(7, 0.25, 2)) == repr(peer.RoIAlign((7, 7), 0.25, 2))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "c"], ["b"]], ids="".join)
def test_torchvision_multiscale(peer, names, dtype):
    sizes = {"a": (64, 80), "b": (32, 40), "c": (16, 20)}
    maps = {n: random_tensor((2, 3, *size), dtype, n) for n, size in sizes.items()}
    corner = (random_tensor((40, 2), F64, "corners") + 1) * 100
    side = torch.exp2((random_tensor((40, 2), F64, "sides") + 1) * 4)
    boxes = torch.cat([corner, corner + side], 1).to(dtype)
    lists = [boxes[:15], boxes[15:]]
    for shapes in ([(256, 320), (250, 300)], [(255, 319), (200, 100)], [(300, 330), (64, 999)]):
        options = {"canonical_scale": 64, "canonical_level": 3}
        expected = peer.MultiScaleRoIAlign(names, 3, 2, **options)(maps, lists, shapes)
        got = gnn.MultiScaleRoIAlign(names, 3, 2, **options)(maps, lists, shapes)
        close(got, expected)
    assert math.isfinite(float(expected.sum()))
    assert repr(gnn.MultiScaleRoIAlign(names, 7, 2)) == repr(peer.MultiScaleRoIAlign(names, 7, 2))
