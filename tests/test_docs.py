# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says is what the code does."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

import glimpse_ext
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


# ------------------------------------------------------------------------------------ examples

PAGES = sorted(DOCS.glob("*.md"))
# Programs of peers.md may end the process they run in: docs/peers.py runs them, and .ci/docs that.
EXAMPLES = [page for page in PAGES if page.name != "peers.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
IMPORT = re.compile(r"^(?:>>> )?(?:import|from) ([\w, .]+?)(?: import.*| as .*)?$", re.M)


def prompts(page):
    """Blocks with prompts. Pages show code that is part of something larger without them."""
    return [code for code in BLOCK.findall(page.read_text()) if ">>> " in code]


def need_imports(page, code):
    """Skips where a page compares with a package that is not installed."""
    for names in IMPORT.findall(code):
        for name in names.split(","):
            package = name.strip().split(".")[0]
            pytest.importorskip(package, reason=f"{page.name} compares with {package} itself")


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", list(filter(prompts, EXAMPLES)), ids=lambda page: page.name)
def test_examples(page, root):
    """Every example of the page, one after the other, as it is printed there."""
    need_imports(page, "\n".join(prompts(page)))
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0
    assert result.attempted >= len(prompts(page))


def test_examples_of_the_readme(root):
    """Every block of Python, in one program."""
    code = BLOCK.findall((ROOT / "README.md").read_text())
    assert code
    exec(compile("\n".join(code), "README.md", "exec"), {"__name__": "readme"})


def test_pages_have_examples():
    """What the functions above run is not nothing."""
    count = {page.name: len(prompts(page)) for page in PAGES}
    least = {"coordinates.md": 20, "borders.md": 7}
    least |= {name: 4 for name in count if name.startswith("migrating_")}
    assert all(count[name] >= few for name, few in least.items()), count


# ----------------------------------------------------------------------------------- docstrings


def modules():
    skipped = ("_testing", "lib", "bench", "demo")
    for info in pkgutil.walk_packages(glimpse_ext.__path__, "glimpse_ext."):
        if not info.name.removeprefix("glimpse_ext.").startswith(skipped):
            yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_of_docstrings(name):
    if name == "glimpse_ext._onnx":
        pytest.importorskip("onnxscript", reason="it writes ONNX: pip install onnxscript")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def functions_of_tensors():
    for name in glimpse_ext.__all__:
        value = getattr(glimpse_ext, name)
        if inspect.isfunction(value) and "Tensor" in str(inspect.signature(value)):
            yield name


@pytest.mark.parametrize("name", list(functions_of_tensors()))
def test_docstrings_say_everything(name):
    """Shapes and units of every argument, the result, gradients, errors, a source, an example."""
    function = getattr(glimpse_ext, name)
    text = inspect.getdoc(function)
    missing = [part for part in ("Args:", "Returns:", "Raises:") if part not in text]
    assert not missing, f"{name}: {missing}"
    # Of a function that makes something else of the same numbers, the source is that function.
    source = r"Source:|numbers are those of|:func:`(?!set_check_indices)"
    assert re.search(source, text), f"{name}: whose semantics"
    assert re.search(r"gradient", text, re.I), f"{name}: gradients"
    assert re.search(r"\bpixel|edge units|fractions|units", text), f"{name}: units"
    assert "[" in text.split("Args:")[1], f"{name}: shapes"
    example = doctest.DocTestFinder(recurse=False).find(function, name)[0].examples
    assert any(not e.options.get(doctest.SKIP) and e.want for e in example), f"{name}: an example"
    entries = re.findall(r"^    (\w+(?:, \w+)*): ", text.split("Args:")[1], re.M)
    described = {name for entry in entries for name in entry.split(", ")}
    assert set(inspect.signature(function).parameters) <= described, f"{name}: arguments"


# ----------------------------------------------------------------------------------------- site


def module_of(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    return module_of(DOCS / "site_pages.py")


def test_every_public_name_has_a_page(site):
    made = {path.stem: text for path, text in site.pages().items() if path.parent.name != "docs"}
    index = made["index"]
    for name in glimpse_ext.__all__:
        assert f"glimpse_ext.{name}" in made[name], name
        assert f"\n{name}\n" in index, name
        assert f"| [`{name}`]({name}.md) | " in index, name
        assert site.first_sentence(name).endswith("."), name


def test_links_lead_to_files():
    """Of the README and all pages: relative links, as a reader of the repository follows them."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "csrc" / "README.md", *PAGES]
    link = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        text = re.sub(r"`[^`\n]*`", "", text)
        for target in link.findall(text):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_library_is_listed():
    """Its page in the table of all of them; pages that lead nowhere are errors of Sphinx."""
    table = (DOCS / "migrating.md").read_text()
    for page in PAGES:
        if page.stem.startswith("migrating_"):
            assert f"({page.name})" in table, page.name


def test_the_readme_has_what_the_site_takes_from_it(site):
    for page in PAGES:
        for heading in site.FROM_README.findall(page.read_text()):
            assert site.readme_section(heading), f"{page.name}: {heading}"


def test_the_example_of_a_new_operator_applies():
    """docs/extending.patch belongs to the source as it is."""
    if not (ROOT / ".git").exists():
        pytest.skip("git apply needs a repository")
    result = subprocess.run(
        ["git", "apply", "--check", "docs/extending.patch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


needs_geometry = pytest.mark.skipif(
    conftest._testing is None, reason="pictures are made by the test module"
)


@pytest.fixture(scope="module")
def pictures():
    return module_of(DOCS / "pictures.py")


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
