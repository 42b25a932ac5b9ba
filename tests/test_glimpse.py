# SPDX-License-Identifier: BSD-3-Clause
"""Glimpses: TensorFlow's numbers to the bit, noise, sub-pixel windows and their derivatives."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import LAYOUTS, arrange

from glimpse_ext import extract_glimpse, reference

GOLDEN = Path(__file__).parent / "golden"
F32, F64 = torch.float32, torch.float64
RULES = [
    (version, centered, normalized)
    for version in (1, 2)
    for centered in (True, False)
    for normalized in (True, False)
]


def rule_name(rule):
    version, centered, normalized = rule
    return f"v{version}{'-centered' * centered}{'-normalized' * normalized}"


def bits(tensor):
    """The numbers of a tensor as integers: NaN payloads and signs of zeros differ in them."""
    size = tensor.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integers[size])


def assert_bits(actual, expected, label):
    assert actual.dtype == expected.dtype, f"{label}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{label}: {list(actual.shape)}, expected {list(expected.shape)}"
    )
    differ = int((bits(actual) != bits(expected)).sum())
    assert differ == 0, f"{label}: {differ} of {actual.numel()} elements have other bits"


# TensorFlow's numbers


@functools.cache
def stored(file):
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


class Stored:
    """One stored case: fields by name; images as [N, C, H, W]."""

    def __init__(self, file, index):
        self.arrays, self.prefix = stored(file), f"c{index:03d}_"
        self.tag = str(self.arrays["tags"][index])

    def __getitem__(self, field):
        array = self.arrays[self.prefix + field]
        if array.ndim == 0:
            return array.item()
        tensor = torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor

    def call(self, device, layout="contiguous", **options):
        return extract_glimpse(
            arrange(self["image"].to(device.torch), layout),
            self["size"].tolist(),
            self["offsets"].to(device.torch),
            self["centered"],
            self["normalized"],
            version=self["version"],
            **options,
        )


def stored_cases(file):
    return [Stored(file, i) for i in range(int(stored(file)["n_cases"]))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", [1, 2])
def test_stored_windows_to_the_bit(version, layout, device):
    cases = stored_cases(f"extract_glimpse_v{version}_zero")
    assert len(cases) == 213
    for index, case in enumerate(cases):
        label = f"version {version}, case {index} ({case.tag}), {device}, {layout}"
        assert_bits(case.call(device, layout, noise="zero"), case["output"], label)


@pytest.mark.parametrize("version", [1, 2])
def test_reference_has_the_stored_windows(version):
    for index, case in enumerate(stored_cases(f"extract_glimpse_v{version}_zero")):
        got = reference.extract_glimpse(
            case["image"],
            case["size"].tolist(),
            case["offsets"],
            case["centered"],
            case["normalized"],
            version=version,
        )
        assert_bits(got, case["output"], f"version {version}, case {index} ({case.tag})")


@pytest.mark.parametrize("version", [1, 2])
def test_stored_windows_at_whole_places_by_interpolation(version, device):
    """Where nothing was truncated both modes agree, as far as float32 offsets are whole."""
    compared = 0
    for index, case in enumerate(stored_cases(f"extract_glimpse_v{version}_zero")):
        image = case["image"]
        if image.numel() == 0 or not image.isfinite().all():
            continue  # 0 * inf is NaN: interpolation may spread such a pixel by one
        aligned = case["integer_aligned"]
        got = case.call(device, noise="zero", mode="subpixel").cpu()[aligned]
        expected = case["output"][aligned]
        compared += len(got)
        torch.testing.assert_close(
            got, expected, atol=1e-4, rtol=1e-4, msg=lambda m, i=index: f"case {i}: {m}"
        )
    assert compared > 40


@pytest.mark.parametrize("index", range(8))
def test_stored_noise(index, device):
    """Copied pixels are exact, and noise lies where TensorFlow's does and in its range."""
    case = Stored("extract_glimpse_noise", index)
    noise = case.tag.split("/")[0]
    generator = torch.Generator().manual_seed(index)
    got = case.call(device, noise=noise, generator=generator).cpu()
    image, expected = case["image"], case["output"]
    copied = case["copied_mask"][:, None].expand_as(got)
    assert torch.equal(got[copied], expected[copied]), case.tag
    dims = (1, 2, 3) if noise == "uniform" else (2, 3)
    low, high = image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
    for field in (got, expected):
        assert ((field >= low) & (field <= high) | copied).all(), case.tag
    if "outside" in case.tag:
        # 4096 numbers of each channel; of theirs, only one channel is independent of the others.
        torch.testing.assert_close(got.mean((2, 3)), expected.mean((2, 3)), atol=0.15, rtol=0.05)
        torch.testing.assert_close(got.std((2, 3)), expected.std((2, 3)), atol=0.1, rtol=0.05)


def facts():
    found = json.loads((GOLDEN / "tf_unit_facts.json").read_text())["facts"]
    return [f for f in found if "limpse" in f["op"] and f.get("verified_by_run", True)]


FACTS = facts()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["test"].split(".")[1])
def test_what_the_unit_tests_of_tensorflow_assert(fact, device):
    version = 1 if "raw V1" in fact["op"] else 2
    if "expected_row_numbers_1based" in fact:
        rows, columns = fact["image_rows_cols"]
        offsets = torch.tensor([fact["offset_row_col"]], device=device.torch)
        across = {"row": torch.arange(1.0, rows + 1)[:, None].expand(rows, columns)}
        across["col"] = torch.arange(1.0, columns + 1)[None].expand(rows, columns)
        outside = [
            torch.tensor([n is None for n in fact[f"expected_{axis}_numbers_1based"]])
            for axis in ("row", "col")
        ]
        noisy = outside[0][:, None] | outside[1][None]
        for axis, image in across.items():
            got = extract_glimpse(image[None, None].to(device.torch), fact["size"], offsets).cpu()
            numbers = torch.tensor([n or 0 for n in fact[f"expected_{axis}_numbers_1based"]])
            wanted = numbers[:, None] if axis == "row" else numbers[None]
            wanted = wanted.expand(fact["size"]).float()
            assert torch.equal(got[0, 0][~noisy], wanted[~noisy])
            assert ((got[0, 0] >= 0) & (got[0, 0] <= max(rows, columns))).all()
        return
    if fact["test"].endswith("testEmptyTensor"):
        empty = torch.zeros(0, 0, 4, 3, device=device.torch)
        got = extract_glimpse(empty, 1, torch.zeros(0, 2, device=device.torch))
        assert got.shape == (0, 0, 1, 1)
        return
    if fact["test"].endswith("testGlimpseNegativeInput"):
        with pytest.raises(ValueError, match="size must be zero or more, got -63"):
            extract_glimpse(torch.zeros(1, 1, 3, 3), fact["size"], torch.zeros(1, 2))
        return
    image = torch.arange(25.0, device=device.torch).reshape(1, 1, 5, 5)
    offsets = torch.tensor([fact["offset_row_col"]], dtype=F32, device=device.torch)
    options = {"centered": fact["centered"], "normalized": fact["normalized"], "version": version}
    got = extract_glimpse(image, fact["size"], offsets, noise=fact["noise"], **options)
    assert got[0, 0].tolist() == fact["expected"]


def test_every_fact_is_used():
    assert len(FACTS) == 18
