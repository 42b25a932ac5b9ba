# SPDX-License-Identifier: BSD-3-Clause
"""Axes of crops, glimpses and pasted masks, and every border: NumPy, one sample at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import glimpse_ext
from glimpse_ext import _testing

DTYPES = ["float32", "float64"]
inf, nan = math.inf, math.nan

# lo, hi, cells, size. The numbers are those of the unit, whatever it is.
AXES = {
    "whole, fractions": (0.0, 1.0, 9, 9),
    "whole, normalized": (-1.0, 1.0, 4, 9),
    "inside": (0.13, 0.71, 3, 9),
    "partly below": (-0.57, 0.63, 4, 9),
    "partly above": (0.41, 1.83, 3, 9),
    "below": (-9.0, -3.0, 2, 9),
    "above": (11.0, 14.0, 2, 9),
    "pixels": (1.25, 5.75, 3, 9),
    "on pixels": (1.0, 5.0, 5, 9),
    "ends at the edge": (0.28071204, 1.0, 19, 11),
    "one cell": (0.2, 0.9, 1, 9),
    "reversed": (0.83, 0.21, 3, 9),
    "empty": (0.4, 0.4, 2, 9),
    "many cells": (0.05, 0.95, 28, 9),
    "one pixel": (-0.75, 0.6, 3, 1),
    "two pixels": (-0.75, 1.6, 3, 2),
    "long": (0.03, 0.98, 7, 512),
    "subnormal": (-1e-40, 1.0, 3, 5),
    "enormous": (-1e9, 1e9, 3, 9),
    "beyond integers": (-1e30, 1e30, 3, 9),
    "overflow": (-3e38, 3e38, 2, 9),
    "nan low": (nan, 0.5, 2, 9),
    "nan high": (0.5, nan, 2, 9),
    "infinite": (-inf, inf, 2, 9),
    "from infinity": (inf, 0.5, 1, 9),
}

UNITS = ["fraction", "normalized", "pixels"]
BORDERS = {
    "roi": _testing.roi_border(),
    "zeros": _testing.zeros_border(),
    "edge": _testing.edge_border(),
    "fill": _testing.fill_border(),
    "fill, nearest": _testing.fill_border(nearest=True),
    "covered": _testing.covered_border(),
    "covered, nearest": _testing.covered_border(nearest=True),
}
REACH = {"roi": 1, "zeros": 1, "edge": inf, "fill": 0, "covered": 0.5}

# ------------------------------------------------------------------- the formulas once more


def flushed(t, v):
    """A number that is subnormal in float32 is 0 to TensorFlow."""
    v = t(v)
    return t(0) if t is np.float32 and abs(v) < np.finfo(t).tiny else v


def half_pixel(t, lo, hi, unit, size, cells):
    """Cells divide the box; a sample is in the middle of its cell."""
    shift = t(1) if unit == "normalized" else t(0)
    pixels = {"pixels": t(1), "fraction": t(size), "normalized": t(size) * t(0.5)}[unit]
    origin = (t(lo) + shift) * pixels - t(0.5)
    step = ((t(hi) - t(lo)) * pixels) / t(cells)
    return origin, step, [origin + t(k) * step + t(0.5) * step for k in range(cells)]


def corners(t, lo, hi, unit, size, cells):
    """The outer samples lie on the ends of the box, between the centres of the outer pixels."""
    pixels = {"pixels": t(1), "fraction": t(size - 1), "normalized": t(size - 1) * t(0.5)}[unit]
    if unit == "fraction":
        lo, hi = flushed(t, lo), flushed(t, hi)
    shift = t(1) if unit == "normalized" else t(0)
    a, b = t(lo) + shift, t(hi) + shift
    if cells == 1:
        middle = t(0.5) * (a + b) * pixels
        return middle, t(0), [middle]
    origin, step = a * pixels, ((t(hi) - t(lo)) * pixels) / t(cells - 1)
    return origin, step, [origin + t(k) * step for k in range(cells)]


def glimpse_origin(t, offset, version, centered, normalized, size, extent):
    v = t(offset)
    if normalized:
        v = v * t(size)
    if version == 2:
        if normalized and centered:
            v = v / t(2) + t(size) / t(2) - t(extent) / t(2)
        elif centered:
            v = v + t(size) / t(2)
        return v
    if centered:
        v = v / t(2) + t(size) / t(2)
    return v - t(extent) / t(2)


def weights_of(border, p, size):
    """Weight and slope of every pixel for a sample at p: hat functions, one rule at a time."""
    weight, slope = np.zeros(size), np.zeros(size)
    reach = REACH[border.split(",")[0]]
    if not (-reach <= p <= size - 1 + reach):
        return weight, slope
    k = np.arange(size)
    if "nearest" in border:
        left = np.floor(p)
        weight[int(np.clip(left + (p - left >= 0.5), 0, size - 1))] = 1
        return weight, slope
    q = p if border == "zeros" else np.clip(p, 0, size - 1)
    weight = np.maximum(0, 1 - np.abs(q - k))
    moves = {
        "zeros": True,
        "fill": p != np.floor(p),
    }.get(border, 0 < p < size - 1)
    if moves:
        left = int(np.floor(p))
        slope[k == left] = -1
        slope[k == left + 1] = 1
    return weight, slope


def dense(table, values, cells, size):
    matrix = np.zeros((cells, size), values.dtype)
    for cell in range(cells):
        row = slice(table["offset"][cell], table["offset"][cell + 1])
        pixels = table["pixel"][row]
        assert len(set(pixels.tolist())) == len(pixels), f"cell {cell} reads a pixel twice"
        assert ((pixels >= 0) & (pixels < size)).all(), f"cell {cell} reads outside: {pixels}"
        matrix[cell, pixels] = values[row]
    return matrix


def check_rows(table, positions, border, cells, size, dtype):
    """Rows are the sum over samples of the hats at their positions."""
    got = [dense(table, table[name], cells, size) for name in ("weight", "slope_origin")]
    expected = np.zeros((2, cells, size))
    for cell, row in enumerate(positions):
        for p in row:
            expected[:, cell] += np.stack(weights_of(border, np.float64(p), size)) / len(row)
    bound = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(got[0], expected[0], rtol=bound, atol=bound)
    np.testing.assert_allclose(got[1], expected[1], rtol=bound, atol=bound)


def check_jacobian(op, axis, dtype, table):
    """Origin and step are straight lines in lo and hi, so any difference is the derivative."""
    lo, hi, cells, size = axis
    if not (np.isfinite(lo) and np.isfinite(hi) and abs(lo) < 1e3):
        return
    for column, (a, b) in enumerate(((1.0, 0.0), (0.0, 1.0))):
        moved = _testing.axis_table(op, lo + a, hi + b, cells, size, 1.0, "float64")
        back = _testing.axis_table(op, lo - a, hi - b, cells, size, 1.0, "float64")
        for row, name in enumerate(("origin", "step")):
            expected = (moved[name] - back[name]) / 2
            bound = 1e-9 if dtype == "float64" else 1e-5
            assert table["jacobian"][row, column] == pytest.approx(expected, rel=bound, abs=bound)


# ----------------------------------------------------------------------------------------- crop

CROPS = [
    (unit, align, outside)
    for unit in UNITS
    for align in (False, True)
    for outside in ("zeros", "edge", "fill")
]


def border_of(align, outside, nearest=False):
    if outside != "fill":
        return outside
    return ("fill" if align else "covered") + (", nearest" if nearest else "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", CROPS, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_crop(axis, mode, dtype):
    """Positions to the bit; rows and slopes to rounding."""
    lo, hi, cells, size = AXES[axis]
    unit, align, outside = mode
    op = _testing.crop(unit, align, outside)
    got = _testing.axis_table(op, lo, hi, cells, size, 1.0, dtype)
    t = np.dtype(dtype).type
    with np.errstate(all="ignore"):
        origin, step, positions = (corners if align else half_pixel)(t, lo, hi, unit, size, cells)
    if not (np.isfinite(origin) and np.isfinite(step)):
        assert got["samples"] == 0
        assert len(got["pixel"]) == 0
        return
    assert got["samples"] == 1
    np.testing.assert_array_equal(got["position"], np.array(positions, t))
    rows = np.array(positions, t)[:, None]
    check_rows(got, rows, border_of(align, outside), cells, size, dtype)
    assert (np.diff(got["offset"]) <= got["capacity"]).all()
    check_jacobian(op, AXES[axis], dtype, got)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_nearest_crop(axis, align):
    lo, hi, cells, size = AXES[axis]
    op = _testing.crop("fraction", align, "fill", nearest=True)
    got = _testing.axis_table(op, lo, hi, cells, size, 1.0, "float32")
    if got["samples"]:
        rows = got["position"][:, None]
        check_rows(got, rows, border_of(align, "fill", True), cells, size, "float32")
        assert not got["slope_origin"].any()


@pytest.mark.parametrize("axis", AXES)
def test_single_positions_in_double(axis):
    """crop_and_resize of float64 images reads where it reads float32 images."""
    lo, hi, cells, size = AXES[axis]
    op = _testing.crop("fraction", True, "fill", single=True)
    narrow = _testing.axis_table(op, lo, hi, cells, size, 1.0, "float32")
    wide = _testing.axis_table(op, lo, hi, cells, size, 1.0, "float64")
    assert wide["samples"] == narrow["samples"]
    assert wide["position"].dtype == np.float64
    np.testing.assert_array_equal(wide["position"], narrow["position"].astype(np.float64))


@pytest.mark.parametrize("align", [False, True])
def test_crop_has_the_formula_of_grid_sample(align):
    """theta of the box, the grid of affine_grid, and grid_sample's way to pixels."""
    generator = np.random.default_rng(0)
    for size, cells in itertools.product((1, 2, 7, 40), (1, 2, 5, 8)):
        lo, hi = generator.uniform(-1.5, 1.5, 2)
        j = np.arange(cells)
        if align:
            u = 2 * j / (cells - 1) - 1 if cells > 1 else np.zeros(1)
        else:
            u = (2 * j + 1) / cells - 1
        g = (hi - lo) / 2 * u + (hi + lo) / 2
        expected = (g + 1) / 2 * (size - 1) if align else ((g + 1) * size - 1) / 2
        got = _testing.axis_table(_testing.crop("normalized", align, "zeros"), lo, hi, cells, size)
        np.testing.assert_allclose(got["position"], expected, rtol=0, atol=1e-13 * size)


# -------------------------------------------------------------------------------------- glimpse

RULES = [(v, c, n) for v in (1, 2) for c in (False, True) for n in (False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_glimpse(axis, rule, scale, dtype):
    offset, _, cells, size = AXES[axis]
    op = _testing.glimpse(*rule, scale)
    got = _testing.axis_table(op, offset, nan, cells, size, 1.0, dtype)
    t = np.dtype(dtype).type
    with np.errstate(all="ignore"):
        origin = glimpse_origin(t, offset, *rule, size, cells * scale)
    if not np.isfinite(origin):
        assert got["samples"] == 0
        assert len(got["pixel"]) == 0
        return
    assert got["samples"] == scale
    cell, sample = np.meshgrid(np.arange(cells), np.arange(scale), indexing="ij")
    positions = t(origin) + cell.astype(t) * t(scale) + sample.astype(t)
    np.testing.assert_array_equal(got["position"], positions.ravel())
    if abs(offset) < 1e9:
        check_rows(got, positions, "zeros", cells, size, dtype)
    assert (np.diff(got["offset"]) <= got["capacity"]).all()
    check_jacobian(op, AXES[axis], dtype, got)


@pytest.mark.parametrize("scale", [nan, -1.0, 0.0, 0.5, 1.0, 2.2, 3.0, inf, 1e30])
def test_the_scale_of_a_glimpse_can_be_a_number_of_the_box(scale):
    """Rounded up to whole pixels; one that counts nothing reads nothing."""
    got = _testing.axis_table(_testing.glimpse(2, False, False, 0), 1.5, scale, 2, 9)
    whole = math.ceil(scale) if 0 < scale < 2**31 else 0
    assert got["samples"] == whole
    if whole:
        expected = _testing.axis_table(_testing.glimpse(2, False, False, whole), 1.5, nan, 2, 9)
        np.testing.assert_array_equal(got["position"], expected["position"])


# ---------------------------------------------------------------------------------------- paste


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [1, 5, 28])
def test_paste(mask, dtype):
    """detectron2: pixel j is at (j + 1/2 - lo) / (hi - lo) * mask - 1/2 of the mask."""
    t = np.dtype(dtype).type
    for lo, hi in ((2.25, 9.5), (-3.5, 4.0), (8.0, 3.0), (0.0, 12.0), (5.0, 5.125), (-40.0, 60.0)):
        origin, step = _testing.paste_axis("detectron2", lo, hi, mask, dtype)
        got = _testing.axis_table(_testing.given_axes(), origin, step, 12, mask, 1.0, dtype)
        j = np.arange(12)
        expected = (j + 0.5 - lo) / (hi - lo) * mask - 0.5
        bound = 4 * np.finfo(t).eps * (np.abs(expected).max() + mask)
        np.testing.assert_allclose(got["position"], expected, rtol=0, atol=bound)
        check_rows(got, got["position"][:, None], "zeros", 12, mask, dtype)


@pytest.mark.parametrize("mask", [1, 5, 28])
def test_snapped_paste(mask):
    """torchvision: grown by a pixel of the mask on each side, cut to whole pixels, resized."""
    for lo, hi in ((2.25, 9.5), (-3.5, 4.0), (0.3, 0.4), (-40.0, 60.0)):
        half, middle = (hi - lo) / 2 * (mask + 2) / mask, (hi + lo) / 2
        first, last = math.trunc(middle - half), math.trunc(middle + half)
        width = max(last - first + 1, 1)
        origin, step = _testing.paste_axis("torchvision", lo, hi, mask)
        got = _testing.axis_table(_testing.given_axes(), origin, step, 12, mask)
        # In the mask with its border of zeros, whose first pixel is pixel -1.
        expected = (np.arange(12) - first + 0.5) * (mask + 2) / width - 0.5 - 1
        np.testing.assert_allclose(got["position"], expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["detectron2", "torchvision"])
def test_hostile_pastes(method, dtype):
    """A box that has no width, or no place, reads nothing; the others stay inside of the mask."""
    for lo, hi in itertools.product(
        (nan, inf, -inf, 3e38, -3e38, 1e19, -1e300, 2.0, 2.5), repeat=2
    ):
        origin, step = _testing.paste_axis(method, lo, hi, 7, dtype)
        got = _testing.axis_table(_testing.given_axes(), origin, step, 5, 7, 1.0, dtype)
        dense(got, got["weight"], 5, 7)
        assert np.isfinite(got["weight"]).all()
        if method == "torchvision":
            nowhere = not (np.isfinite(lo) and np.isfinite(hi))
        else:
            # A box that ends at infinity shows the edge of the mask everywhere: the formula.
            nowhere = lo == hi or np.isnan(lo) or np.isnan(hi) or np.isinf(lo)
        if nowhere:
            assert len(got["pixel"]) == 0, (lo, hi)


# -------------------------------------------------------------------------------------- borders


def positions_to_try(size, dtype):
    t = np.dtype(dtype).type
    kinks = [
        -1.0,
        -0.5,
        0.0,
        0.5,
        1.0,
        size - 2,
        size - 1.5,
        size - 1,
        size - 0.5,
        size,
        size + 0.5,
    ]
    near = [
        np.nextafter(t(k), t(toward)) for k in kinks for toward in (-inf, inf) if np.isfinite(t(k))
    ]
    far = [nan, inf, -inf, 1e9, -1e9, 2.0**31, 2.0**31 - 1, -(2.0**31), 2.0**63, 1e30, -1e30]
    small = [-0.0, 1e-40, -1e-40, 1e-320, -1e-320, 1e-7, -1e-7]
    inner = [0.25, 0.3, 1.7, size / 2 + 0.123, size - 1.3]
    return np.array([*kinks, *near, *far, *small, *inner], t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 9, 1000])
@pytest.mark.parametrize("border", BORDERS)
def test_borders(border, size, dtype):
    positions = positions_to_try(size, dtype)
    taps = _testing.border_taps(BORDERS[border], positions.tolist(), size, dtype)
    eps = np.finfo(dtype).eps
    for i, p in enumerate(positions):
        weight, slope = np.zeros(size), np.zeros(size)
        for j in range(taps["count"][i]):
            assert 0 <= taps["pixel"][i, j] < size, f"{p!r} reads {taps['pixel'][i]}"
            weight[taps["pixel"][i, j]] += taps["weight"][i, j]
            slope[taps["pixel"][i, j]] += taps["slope"][i, j]
        label = f"position {p!r}"
        expected_weight, expected_slope = weights_of(border, np.float64(p), size)
        np.testing.assert_allclose(weight, expected_weight, rtol=0, atol=eps, err_msg=label)
        np.testing.assert_array_equal(slope, expected_slope, err_msg=label)
        reach = REACH[border.split(",")[0]]
        assert taps["inside"][i] == (-reach <= p <= size - 1 + reach), label
        assert taps["inside"][i] or taps["count"][i] == 0, label


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("border", BORDERS)
def test_borders_of_the_largest_map(border, dtype):
    size = 0x7FFFFF00  # the operators take no larger ones
    t = np.dtype(dtype).type
    positions = [t(p) for p in (-2, 0, 2.0**30, 2.0**31 - 2, 2.0**31, 2.0**32, inf, nan)]
    positions += [np.nextafter(t(2.0**31), t(0)), np.nextafter(t(2.0**31), t(inf))]
    taps = _testing.border_taps(BORDERS[border], [float(p) for p in positions], size, dtype)
    for i, p in enumerate(positions):
        for j in range(taps["count"][i]):
            assert 0 <= taps["pixel"][i, j] < size, f"{p!r} reads {taps['pixel'][i]}"


@pytest.mark.parametrize("border", BORDERS)
def test_inside_a_border_weights_add_up_to_one(border):
    """A constant stays constant where no tap is left out."""
    size = 9
    positions = np.random.default_rng(3).uniform(-2, size + 1, 500)
    taps = _testing.border_taps(BORDERS[border], positions.tolist(), size)
    sums = np.where(np.arange(2) < taps["count"][:, None], taps["weight"], 0).sum(1)
    whole = taps["inside"] & ((positions >= 0) & (positions <= size - 1) | (border != "zeros"))
    np.testing.assert_allclose(sums[whole], 1, rtol=1e-15)
    assert (sums[~taps["inside"]] == 0).all()
    assert whole.any()


# --------------------------------------------------------------------- kernels read these tables


def read_columns(kind, image, lo, hi, cells):
    """Weight of every column of a [1, size, 1, size] image that is one-hot in the channel."""
    n = image.shape[3]
    boxes = torch.tensor([[lo, hi]], dtype=torch.float64).to(image.dtype).to(image.device)
    zero = torch.zeros_like(boxes[:, :1])
    name, *options = kind
    if name == "crop":
        unit, align, padding = options
        top, bottom = (-1.0, 1.0) if unit == "normalized" else (0.0, 0.0 if align else 1.0)
        box = torch.cat([boxes[:, :1], zero + top, boxes[:, 1:], zero + bottom], 1)
        pooled = glimpse_ext.crop(
            image, box, (1, cells), box_format=unit, align_corners=align, padding_mode=padding
        )
    else:
        (convention, method) = options
        box = torch.stack([zero[:, 0], boxes[:, 0], zero[:, 0] + 1, boxes[:, 1]], 1)
        index = torch.zeros(1, dtype=torch.int64, device=image.device)
        pooled = glimpse_ext.crop_and_resize(
            image, box, index, (1, cells), method, convention=convention
        )
    assert pooled.shape == (1, n, 1, cells)
    return pooled[0, :, 0].T.cpu().numpy()


KERNELS = [
    ("crop", unit, align, padding)
    for unit in ("normalized", "pixels")
    for align in (False, True)
    for padding in ("zeros", "border")
] + [
    ("crop_and_resize", convention, method)
    for convention in ("tf", "half_pixel")
    for method in ("bilinear", "nearest")
]


def operator_of(kind, dtype):
    name, *options = kind
    if name == "crop":
        unit, align, padding = options
        return _testing.crop(unit, align, {"zeros": "zeros", "border": "edge"}[padding])
    convention, method = options
    tf = convention == "tf"
    single = tf and dtype != "float64"
    return _testing.crop("fraction", tf, "fill", nearest=method == "nearest", single=single)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KERNELS, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_kernels_read_the_pixels_of_these_tables(axis, kind, dtype, device):
    """As in test_geometry: inside and outside alike to the last bit, on every device."""
    lo, hi, cells, size = AXES[axis]
    got = _testing.axis_table(operator_of(kind, dtype), lo, hi, cells, size, 1.0, dtype)
    expected = dense(got, got["weight"], cells, size)
    image = torch.eye(size, dtype=getattr(torch, dtype), device=device.torch)[None, :, None, :]
    weight = read_columns(kind, image, lo, hi, cells)
    np.testing.assert_array_equal(weight, expected, err_msg=f"{device}")
