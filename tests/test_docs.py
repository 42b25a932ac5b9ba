# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says is what the code does."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

from glimpse_ext import convert_boxes
from glimpse_ext.convert_boxes import CONVENTIONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

if not DOCS.is_dir():
    pytest.skip("an installed package has no docs", allow_module_level=True)


def run(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )


@pytest.mark.skipif(conftest._testing is None, reason="the table counts tests of CUDA kernels")
def test_the_support_matrix_is_what_tests_cover():
    result = run(DOCS / "support_matrix.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_speed_is_what_was_measured():
    """Tables are those of the stored results, and whatever misses its target is explained."""
    result = run(DOCS / "speed.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", ["coordinates.md", "borders.md", "crop_batch.md"])
def test_worked_examples(page):
    """Every example of the page, one after the other, as it is printed there."""
    result = doctest.testfile(str(DOCS / page), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


needs_geometry = pytest.mark.skipif(
    conftest._testing is None, reason="pictures are made by the test module"
)


@pytest.fixture(scope="module")
def pictures():
    specification = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@needs_geometry
def test_pictures_are_those_of_the_geometry(pictures):
    """Numbers, drawings and texts: made anew and compared with what is in the repository."""
    made = pictures.pictures()
    stored = json.loads(pictures.DATA.read_text())
    assert made == stored
    for path, content in pictures.files(made).items():
        assert path.read_text() == content, f"{path.name}; run docs/pictures.py --update"
    drawn = {path.stem for path in pictures.FOLDER.glob("*.svg")}
    assert drawn == set(made), "a picture that nothing makes"


@needs_geometry
def test_every_convention_has_its_section(pictures):
    page = (DOCS / "coordinates.md").read_text()
    same = {"onnx_half_pixel", "onnx_output_half_pixel", "onnx_resize"}
    for name in CONVENTIONS:
        assert f"`{name}`" in page
        if name not in same:
            assert f"## `{name}`: " in page
            assert f"<!-- picture: {name} -->" in page
            assert f"(coordinates/{name}.svg)" in page


@needs_geometry
def test_pictures_agree_with_convert_boxes(pictures):
    """The box and the ruler of each picture, which come from the kernels' formulas."""
    made = pictures.pictures()
    for name in CONVENTIONS.keys() & made.keys():
        picture = made[name]
        a, b = picture["numbers"]
        columns = CONVENTIONS[name].columns
        box = torch.empty(4, dtype=torch.float64)
        box[list(columns)] = torch.tensor([a, b, a, b], dtype=torch.float64)
        x1, y1, x2, y2 = convert_boxes(box, name, "torchvision", (5, 5)).tolist()
        assert (x1, x2) == pytest.approx(picture["box"]), name
        assert (y1, y2) == pytest.approx(picture["box"]), name
        for label, place in picture["ticks"]:
            # The first number of an axis, or the place between two equal ones.
            box[list(columns)] = torch.tensor([float(label), 0, float(label), 0]).double()
            if CONVENTIONS[name].form == 0:
                box[:] = float(label)
            low, _, high, _ = convert_boxes(box, name, "torchvision", (5, 5)).tolist()
            assert (low + high) / 2 == pytest.approx(place), f"{name}, {label}"


@needs_geometry
def test_text_pictures_have_their_marks_in_place(pictures):
    """Twelve columns are a pixel: what is read off the page is what the numbers say."""
    for name, picture in pictures.pictures().items():
        if picture["kind"] != "axis":
            continue
        pixels, _, box, samples = pictures.text(picture).split("\n")

        def places(line, marks):
            line = line[: pictures.COLUMNS * pictures.SIZE + pictures.MARGIN + 1]
            return [
                (i - pictures.MARGIN) / pictures.COLUMNS for i, c in enumerate(line) if c in marks
            ]

        assert places(pixels, "|") == [0, 1, 2, 3, 4, 5], name
        assert places(pixels, "x") == [0.5, 1.5, 2.5, 3.5, 4.5], name
        within = pytest.approx
        assert places(box, "[]") == within(picture["box"], abs=0.5 / 12), name
        assert places(samples, "o") == within(picture["samples"], abs=0.5 / 12), name
