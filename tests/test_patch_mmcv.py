# SPDX-License-Identifier: BSD-3-Clause
"""patch("mmcv"): the Python of mmcv that is installed, with our operators inside and without.

mmcv-lite has mmcv's Python and no compiled part; compiled_parts.py then has the few functions that
are called.
"""

from __future__ import annotations

import math

import compiled_parts
import pytest
import torch

import glimpse_ext

pytest.importorskip("mmcv", reason="the library to patch is not installed: pip install mmcv-lite")
STAND_IN = compiled_parts.complete_mmcv()
ops = pytest.importorskip("mmcv.ops")

SIZE = 24, 30


def maps(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


def rois(rotated=False):
    """In image pixels, twice those of the maps; some reach outside."""
    generator = torch.Generator().manual_seed(1)
    count = 12
    corner = torch.rand(count, 2, generator=generator) * 40 - 4
    side = torch.rand(count, 2, generator=generator) * 30 + 0.5
    image = (torch.arange(count) * 2 // count)[:, None]
    if not rotated:
        return torch.cat([image, corner, corner + side], 1).double()
    angle = (torch.rand(count, 1, generator=generator) * 2 - 1) * 2 * math.pi
    return torch.cat([image, corner + side / 2, side, angle], 1).double()


def both(call, features, verify=True):
    """Result and gradient of the original, of ours, and what verify saw."""
    found = []
    for patched in (False, True):
        leaf = features.clone().requires_grad_()
        if patched:
            with glimpse_ext.patch("mmcv", verify=verify) as patch:
                result = call(leaf)
        else:
            result = call(leaf)
        weights = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).view(result.shape)
        (result * weights).sum().backward()
        found.append((result.detach(), leaf.grad))
    return (*found, patch.report)


def check(call, name, features=None):
    features = maps() if features is None else features
    original, ours, report = both(call, features)
    torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-11)
    assert (report[name].compared, report[name].differing) == (1, 0), f"\n{report}"
    assert ours[1].abs().sum() > 0


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "legacy"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align(pool_mode, aligned, sampling_ratio):
    name = "mmcv.ops.roi_align.roi_align"
    check(lambda f: ops.roi_align(f, rois(), (3, 5), 0.5, sampling_ratio, pool_mode, aligned), name)
    layer = ops.RoIAlign((3, 5), 0.5, sampling_ratio, pool_mode, aligned)
    check(lambda f: layer(f, rois()), name)


def test_roi_align_by_its_defaults():
    check(lambda f: ops.roi_align(f, rois(), 4), "mmcv.ops.roi_align.roi_align")


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "legacy"])
@pytest.mark.parametrize("clockwise", [True, False], ids=["clockwise", "counter-clockwise"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_rotated(aligned, clockwise, sampling_ratio):
    boxes, more = rois(rotated=True), (0.5, sampling_ratio, aligned, clockwise)
    path = "mmcv.ops.roi_align_rotated."
    check(lambda f: ops.roi_align_rotated(f, boxes, (3, 5), *more), path + "roi_align_rotated")
    layer = ops.RoIAlignRotated((3, 5), *more)
    check(lambda f: layer(f, boxes), path + "RoIAlignRotated.forward")


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 4)], ids=["list", "grid"])
def test_point_sample(align_corners, shape):
    points = torch.rand(2, *shape, 2, dtype=torch.float64) * 1.2 - 0.1
    name = "mmcv.ops.point_sample.point_sample"
    check(lambda f: ops.point_sample(f, points, align_corners), name)
    with glimpse_ext.patch("mmcv"):
        assert ops.point_sample(maps(), points).is_contiguous()


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "legacy"])
def test_simple_roi_align(aligned):
    layer = ops.SimpleRoIAlign((3, 5), 0.5, aligned=aligned)
    # The original takes the size of the map in float32.
    original, ours, report = both(lambda f: layer(f, rois()), maps())
    torch.testing.assert_close(ours, original, rtol=1e-6, atol=1e-6)
    assert report["mmcv.ops.point_sample.SimpleRoIAlign.forward"].compared == 1


def test_what_the_original_serves():
    with glimpse_ext.patch("mmcv", verify=True) as patch:
        expected = ops.point_sample(maps(), torch.rand(2, 5, 2).double(), mode="nearest")
        with pytest.raises(AssertionError):
            ops.roi_align(maps(), rois(), 3, 1.0, 0, "median")
    assert expected.shape == (2, 3, 5)
    assert patch.report["mmcv.ops.point_sample.point_sample"].left == {"mode given": 1}
    assert patch.report["mmcv.ops.roi_align.roi_align"].left == {"pool_mode 'median'": 1}


def test_bfloat16_maps_with_float32_boxes():
    features, boxes = maps(torch.bfloat16), rois().float()
    with glimpse_ext.patch("mmcv", verify=True) as patch:
        pooled = ops.RoIAlign(3, 0.5, 2)(features, boxes)
    assert pooled.dtype == torch.bfloat16
    assert patch.report["mmcv.ops.roi_align.roi_align"].differing == 0


def test_undo():
    def current():
        module = ops.roi_align.__module__, ops.RoIAlignRotated.forward.__module__
        return ops.roi_align, vars(ops.RoIAlignRotated)["forward"], module

    before = current()
    with glimpse_ext.patch("mmcv") as patch:
        assert all(a is not b for a, b in zip(current()[:2], before[:2], strict=True))
        assert "mmcv.ops.roi_align_rotated.RoIAlignRotated.forward" in patch.names
        assert "mmcv.ops.roi_align" in patch.names
    assert current() == before


# --------------------------------------------------------------- differences (docs/patching.md)


def test_rows_of_simple_roi_align_belong_to_their_boxes():
    """The original returns the rows of image 0 first, whatever the order of the boxes."""
    layer, mixed = ops.SimpleRoIAlign(3, 0.5), rois().flip(0)
    alone = torch.cat([layer(maps(), roi[None]) for roi in mixed])
    assert not torch.allclose(layer(maps(), mixed), alone)
    with glimpse_ext.patch("mmcv"):
        torch.testing.assert_close(layer(maps(), mixed), alone, rtol=1e-5, atol=1e-5)


def test_no_boxes_for_simple_roi_align():
    layer, none = ops.SimpleRoIAlign(3, 0.5), rois()[:0]
    with pytest.raises((RuntimeError, ValueError)):
        layer(maps(), none)
    with glimpse_ext.patch("mmcv"):
        assert layer(maps(), none).shape == (0, 3, 3, 3)


def test_reversed_boxes():
    reversed_box = torch.tensor([[0.0, 20, 20, 10, 10]], dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)):
        ops.roi_align(maps(), reversed_box, 3)
    with glimpse_ext.patch("mmcv"):
        assert not ops.roi_align(maps(), reversed_box, 3).any()
