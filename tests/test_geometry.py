# SPDX-License-Identifier: BSD-3-Clause
"""Axis tables and level assignment as NumPy arrays, against formulas for one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import glimpse_ext
from glimpse_ext import _testing, reference

# lo, hi, scale, cells, size
AXES = {
    "inside": (1.25, 5.75, 1.0, 3, 9),
    "partly below": (-2.57, 3.53, 1.0, 3, 9),
    "partly above": (4.5, 12.75, 1.0, 2, 9),
    "below": (-9.0, -3.0, 1.0, 2, 9),
    "above": (11.0, 14.0, 1.0, 2, 9),
    "tiny": (3.5, 3.50390625, 1.0, 4, 9),
    "huge": (-300.5, 411.25, 1.0, 5, 9),
    "whole": (0.0, 9.0, 1.0, 9, 9),
    "on the limits": (-1.0, 9.0, 1.0, 2, 9),
    "one beyond": (-0.5, 9.5, 1.0, 1, 9),
    "grid": (2.0, 6.0, 1.0, 2, 9),
    "empty": (3.25, 3.25, 1.0, 2, 9),
    "reversed": (5.75, 1.25, 1.0, 3, 9),
    "reversed, far": (30.0, -20.0, 1.0, 7, 9),
    "quarter": (3.0, 30.75, 0.25, 4, 9),
    "tenth": (3.3, 66.6, 0.1, 3, 9),
    "double": (0.7, 3.9, 2.0, 3, 9),
    "one pixel": (-0.75, 1.75, 1.0, 3, 1),
    "two pixels": (-0.75, 1.75, 1.0, 3, 2),
    "many cells": (0.5, 6.25, 1.0, 28, 9),
    "long": (10.3, 480.9, 1.0, 7, 512),
    "nan low": (math.nan, 4.0, 1.0, 2, 9),
    "nan high": (1.0, math.nan, 1.0, 2, 9),
    "infinite": (-math.inf, math.inf, 1.0, 2, 9),
    "from infinity": (math.inf, 4.0, 1.0, 2, 9),
    "to infinity": (1.0, math.inf, 1.0, 2, 9),
    "enormous": (-1e6, 1e6, 1.0, 3, 9),
}
MODES = [(ratio, aligned) for ratio in (-1, 0, 1, 2, 3, 7) for aligned in (False, True)]
# Adaptive sampling of the enormous box has too many samples to write each of them down.
LISTED = [(axis, mode) for axis in AXES for mode in MODES if axis != "enormous" or mode[0] > 0]
DTYPES = ["float32", "float64"]


def table(axis, mode, dtype):
    lo, hi, scale, cells, size = AXES[axis]
    ratio, aligned = mode
    return _testing.axis_table(
        _testing.roi_align(ratio, aligned), lo, hi, cells, size, scale, dtype
    )


def dense(table, values, cells, size):
    """[cells, size] from the rows of a table; a pixel must not stand twice in one row."""
    matrix = np.zeros((cells, size), values.dtype)
    for cell in range(cells):
        row = slice(table["offset"][cell], table["offset"][cell + 1])
        pixels = table["pixel"][row]
        assert len(set(pixels.tolist())) == len(pixels), f"cell {cell} reads a pixel twice"
        assert ((pixels >= 0) & (pixels < size)).all(), f"cell {cell} reads outside: {pixels}"
        matrix[cell, pixels] = values[row]
    return matrix


def by_formula(axis, mode, dtype):
    """Every sample on its own, each operation rounded to dtype, in the order of the definition.

    Gives samples, positions [cells, samples], and [cells, size] matrices of the weight and of its
    derivatives to lo and hi, which are sums over samples, not yet divided by their number.
    """
    lo, hi, scale, cells, size = AXES[axis]
    ratio, aligned = mode
    t = np.dtype(dtype).type
    with np.errstate(all="ignore"):
        shift = t(0.5) if aligned else t(0)
        start = t(lo) * t(scale) - shift
        extent = (t(hi) * t(scale) - shift) - start
        widened = not aligned and extent < 1
        if widened:
            extent = t(1)
        step = extent / t(cells)
        wanted = ratio if ratio > 0 else (math.ceil(step) if np.isfinite(step) else 0)
        samples = wanted if 0 < wanted < 2**31 else 0
        weight, to_lo, to_hi = (np.zeros((cells, size)) for _ in range(3))
        positions = np.zeros((cells, samples), t)
        for cell in range(cells):
            for i in range(samples):
                p = start + t(cell) * step + (t(i) + t(0.5)) * step / t(samples)
                positions[cell, i] = p
                if not -1 <= p <= size:
                    continue
                if p <= 0 or p >= size - 1:
                    weight[cell, 0 if p <= 0 else size - 1] += 1
                    continue
                left = int(p)
                weight[cell, left] += 1 - (p - t(left))
                weight[cell, left + 1] += p - t(left)
                # How far along the box the sample stands, from 0 at lo to 1 at hi.
                along = (cell + (i + 0.5) / samples) / cells
                moves = (scale, 0.0) if widened else (scale * (1 - along), scale * along)
                for matrix, move in ((to_lo, moves[0]), (to_hi, moves[1])):
                    matrix[cell, left] -= move
                    matrix[cell, left + 1] += move
    return samples, positions, weight, to_lo, to_hi


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("axis", "mode"), LISTED, ids=str)
def test_positions_have_the_bits_of_the_formula(axis, mode, dtype):
    """One operation in another order, or two fused into one, moves samples across the border."""
    samples, positions, *_ = by_formula(axis, mode, dtype)
    got = table(axis, mode, dtype)
    assert got["samples"] == samples
    assert got["position"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got["position"], positions.ravel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("axis", "mode"), LISTED, ids=str)
def test_rows_are_the_sum_over_samples(axis, mode, dtype):
    cells, size = AXES[axis][3:]
    samples, _, weight, to_lo, to_hi = by_formula(axis, mode, dtype)
    got = table(axis, mode, dtype)
    factor = 1 / max(samples, 1)
    bound = 1e-14 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(
        dense(got, got["weight"], cells, size), weight * factor, rtol=bound, atol=bound / 10
    )
    origin, step = (dense(got, got[name], cells, size) for name in ("slope_origin", "slope_step"))
    jacobian = got["jacobian"]
    assert jacobian.shape == (2, 2)
    for column, expected in ((0, to_lo), (1, to_hi)):
        np.testing.assert_allclose(
            origin * jacobian[0, column] + step * jacobian[1, column],
            expected * factor,
            rtol=10 * bound,
            atol=10 * bound,
        )


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_rows_fit_into_the_room_that_is_made_for_them(axis, mode):
    for dtype in DTYPES:
        got = table(axis, mode, dtype)
        assert (np.diff(got["offset"]) <= got["capacity"]).all()
        assert (got["capacity"] <= 2 * AXES[axis][4]).all()


@pytest.mark.parametrize(("axis", "mode"), LISTED, ids=str)
def test_the_weights_of_a_cell_add_up_to_the_share_of_samples_kept(axis, mode):
    got = table(axis, mode, "float64")
    cells, size = AXES[axis][3:]
    sums = dense(got, got["weight"], cells, size).sum(1)
    positions = got["position"].reshape(cells, got["samples"])
    kept = ((positions >= -1) & (positions <= size)).sum(1) / max(got["samples"], 1)
    np.testing.assert_allclose(sums, kept, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "axis", ["inside", "partly below", "huge", "quarter", "tenth", "double", "reversed", "long"]
)
def test_slopes_are_derivatives_of_weights(axis, mode):
    """Central differences of the table itself. No sample of these axes comes near a kink."""
    lo, hi, scale, cells, size = AXES[axis]
    ratio, aligned = mode
    # Away from where a sample lies on a pixel or the number of samples changes.
    lo, hi = lo + 0.01037, hi + 0.02113

    def weights(lo, hi):
        op = _testing.roi_align(ratio, aligned)
        got = _testing.axis_table(op, lo, hi, cells, size, scale)
        return got, dense(got, got["weight"], cells, size)

    got, _ = weights(lo, hi)
    origin, step = (dense(got, got[name], cells, size) for name in ("slope_origin", "slope_step"))
    h = 1e-7
    for column, (d_lo, d_hi) in enumerate(((h, 0), (0, h))):
        difference = (weights(lo + d_lo, hi + d_hi)[1] - weights(lo - d_lo, hi - d_hi)[1]) / (2 * h)
        slope = origin * got["jacobian"][0, column] + step * got["jacobian"][1, column]
        np.testing.assert_allclose(slope, difference, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
def test_the_work_is_bounded(aligned, dtype):
    """A box of 1e9 pixels reads the pixels of the image, each once for each cell that covers it."""
    got = _testing.axis_table(_testing.roi_align(-1, aligned), -5e8, 5e8, 7, 64, 1.0, dtype)
    assert got["samples"] == pytest.approx(1e9 / 7, rel=1e-6)
    assert 0 < len(got["pixel"]) <= 64 + 2 * 7
    assert got["capacity"].sum() <= 64 + 2 * 7
    weight = dense(got, got["weight"], 7, 64)
    assert np.isfinite(weight).all()
    # Only the middle cell covers the image, with one sample on about every pixel.
    assert set(np.nonzero(weight)[0].tolist()) == {3}
    if dtype == "float64":
        inner = weight[3, 1:-1] * got["samples"]
        np.testing.assert_allclose(inner, np.ones_like(inner), atol=0.01)


@pytest.mark.parametrize("extent", [2.0**31, 1e12, 1e300])
def test_more_samples_than_can_be_counted_are_none(extent):
    got = _testing.axis_table(_testing.roi_align(0, True), 0.0, extent, 1, 8)
    assert got["samples"] == 0
    assert len(got["pixel"]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_kernels_read_the_pixels_of_these_tables(axis, mode, dtype, device):
    """Channel c of the image is 1 at column c and 0 elsewhere, so pooling it gives the table back.

    A sample at the border is in or out alike on every device, to the last bit of its position. The
    weights may differ in their last bits: where a box is too large for the tables of a CUDA block,
    the kernel adds samples itself and divides once.
    """
    lo, hi, scale, cells, size = AXES[axis]
    got = table(axis, mode, dtype)
    expected = dense(got, got["weight"], cells, size)
    torch_dtype = getattr(torch, dtype)
    image = torch.eye(size, dtype=torch_dtype, device=device.torch)[None, :, None, :]
    # One row, read in full: the table along y is exactly 1.
    boxes = torch.tensor([[0.0, lo, 0.0, hi, 1.0 / scale]], dtype=torch_dtype, device=device.torch)
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = glimpse_ext.roi_align(
            image.contiguous(memory_format=layout), boxes, (1, cells), scale, *mode
        )
        assert pooled.shape == (1, size, 1, cells)
        weight = pooled[0, :, 0].T.cpu().numpy()
        label = f"{device}, {layout}"
        np.testing.assert_array_equal(weight != 0, expected != 0, err_msg=label)
        np.testing.assert_allclose(
            weight, expected, rtol=8 * np.finfo(dtype).eps, atol=0, err_msg=label
        )


# ------------------------------------------------------------------------------------------ levels


RULES = ["torchvision", "detectron2"]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def level_of(box, rule, dtype="float32", size=224.0, level=4, scales=SCALES):
    return _testing.assign_level(list(map(float, box)), rule, size, level, scales, dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_random_boxes(rule, dtype):
    generator = np.random.default_rng(1)
    corners = generator.uniform(-50, 900, (20_000, 4))
    corners[::3, 2:] = corners[::3, :2] + generator.uniform(1, 300, (len(corners[::3]), 2))
    boxes = torch.from_numpy(corners).to(getattr(torch, dtype))
    expected = reference.assign_levels(boxes, SCALES, assign=rule)
    assert set(expected.tolist()) == {-1, 0, 1, 2, 3}
    got = [level_of(box, rule, dtype) for box in boxes.tolist()]
    assert got == expected.tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_at_their_borders(rule, dtype):
    """Sides within a few representable numbers of every power of two times the canonical size."""
    real = np.dtype(dtype).type
    sides = []
    for power in range(-4, 4):
        below = above = real(224 * 2.0**power)
        sides.append(below)
        for _ in range(40):
            below, above = np.nextafter(below, real(0)), np.nextafter(above, real(np.inf))
            sides += [below, above]
    sides += [real(224 * 2.0**p * (1 - d)) for p in range(-2, 3) for d in (1e-4, 1e-5, 1e-6, 1e-7)]
    boxes = torch.tensor([[0, 0, side, side] for side in sides], dtype=getattr(torch, dtype))
    expected = reference.assign_levels(boxes, SCALES, assign=rule).tolist()
    got = [level_of(box, rule, dtype) for box in boxes.tolist()]
    differ = [(side, a, b) for side, a, b in zip(sides, got, expected, strict=True) if a != b]
    assert not differ, f"side, level, level of the reference: {differ}"


@pytest.mark.parametrize("rule", RULES)
def test_levels_of_special_boxes(rule):
    inf, nan = math.inf, math.nan
    for box, expected in (
        ((0, 0, 0, 0), 0),
        ((5, 5, 5, 90), 0),
        ((0, 0, 1e30, 1e30), 3),
        ((0, 0, 3e38, 3e38), 3),
        ((-inf, -inf, inf, inf), 3),
        ((10, 0, 0, 10), -1),
        ((0, 10, 10, 0), -1),
        ((240, 240, 0, 0), 2),
        ((nan, 0, 1, 1), -1),
        ((0, 0, 1, nan), -1),
        ((inf, 0, inf, 9), -1),
        ((0, 0, 1e-30, 1e-30), 0),
    ):
        assert level_of(box, rule) == expected, box
        assert level_of(box, rule, "float64") == expected, box


def test_log2():
    """Exact for powers of two, within two units in the last place elsewhere."""
    for exponent in range(-1074, 1024):
        assert _testing.log2(2.0**exponent) == exponent
    values = np.exp(np.random.default_rng(2).uniform(-700, 700, 20_000))
    values = np.concatenate([values, 1 + np.random.default_rng(3).uniform(-1e-3, 1e-3, 5_000)])
    expected = np.log2(values.astype(np.longdouble))
    got = np.array([_testing.log2(v) for v in values.tolist()])
    error = np.abs(got - expected) / np.spacing(np.abs(expected).astype(np.float64))
    # Close to 1 the logarithm itself is close to 0, and the error is one of 1, not of 0.
    far = np.abs(expected) > 0.5
    assert error[far].max() <= 2
    assert np.abs(got - expected)[~far].max() <= 1e-16
    assert _testing.log2(0.0) == -math.inf
    assert _testing.log2(math.inf) == math.inf
    assert math.isnan(_testing.log2(-1.0))
    assert math.isnan(_testing.log2(math.nan))
