# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of docs/coordinates.md and docs/borders.md, from the formulas of csrc/geometry.

Every number that is drawn comes from the geometry itself, through ``glimpse_ext._testing``, and is
kept in docs/coordinates/pictures.json. A test makes all of it again and compares, so the pictures
cannot drift from the code.

    python docs/pictures.py            prints the pictures as text
    python docs/pictures.py --check    fails where a file says something else
    python docs/pictures.py --update   writes the SVG files, the JSON, and the text into the pages
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from glimpse_ext import _testing

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS / "coordinates"
DATA = FOLDER / "pictures.json"
PAGES = [DOCS / "coordinates.md", DOCS / "borders.md"]

SIZE = 5
"""Pixels of the row that is drawn, and of the image in the worked examples."""

Picture = dict[str, Any]

# ------------------------------------------------------------------------------------- the numbers


def _origin(op: Any, number: float) -> float:
    """Where a number is, in index units: the place where an axis from there on starts."""
    return float(_testing.axis_table(op, number, number, 2, SIZE)["origin"])


def _positions(op: Any, low: float, high: float, cells: int) -> list[float]:
    """Samples of a box, in edge units."""
    positions = _testing.axis_table(op, low, high, cells, SIZE)["position"]
    return [round(float(p) + 0.5, 9) for p in positions]


def _box(
    title: str,
    op: Any,
    numbers: tuple[float, float],
    ticks: list[float],
    *,
    cells: int = 3,
    place: Callable[[float], float] | None = None,
) -> Picture:
    """A box given by two numbers of an axis, with its samples."""
    at = place or (lambda v: _origin(op, v) + 0.5)
    return {
        "kind": "axis",
        "title": title,
        "numbers": list(numbers),
        "ticks": [[_short(v), round(at(v), 9)] for v in ticks],
        "box": [round(at(v), 9) for v in numbers],
        "samples": _positions(op, *numbers, cells),
    }


def _glimpse(
    title: str, rule: tuple[int, bool, bool], offset: float, ticks: list[float]
) -> Picture:
    """A window of three pixels. The offset is the place of its middle, or of its first edge."""
    version, centered, normalized = rule
    op = _testing.glimpse(version, centered, normalized)
    cells = 3
    middle = version == 1 or (centered and normalized)

    def first(v: float) -> float:
        # The origin is the index of the first pixel, whose first edge has the same number.
        return float(_testing.axis_table(op, v, v, cells, SIZE)["origin"])

    def place(v: float) -> float:
        return first(v) + (cells / 2 if middle else 0)

    return {
        "kind": "axis",
        "title": title,
        "numbers": [offset, cells],
        "ticks": [[_short(v), round(place(v), 9)] for v in ticks],
        "box": [first(offset), first(offset) + cells],
        "samples": _positions(op, offset, offset, cells),
    }


def _annotation(
    title: str, numbers: tuple[float, float], ticks: list[float], first: float, last: float
) -> Picture:
    """Boxes of a data set: numbers are edges moved by ``first`` and ``last``, and read aligned."""
    op = _testing.roi_align(1, True)
    edges = (numbers[0] + first, numbers[1] + last)
    picture = _box(title, op, edges, ticks, place=lambda v: _origin(op, v) + 0.5)
    picture["numbers"] = list(numbers)
    # A number that names a whole pixel stands at its centre.
    middle = 0.5 * (last - first)
    places = [_origin(op, v + first) + 0.5 + middle for v in ticks]
    picture["ticks"] = [[_short(v), round(p, 9)] for v, p in zip(ticks, places, strict=True)]
    return picture


def _paste(title: str, method: str, low: float, high: float, mask: int) -> Picture:
    """A mask over a box. Places in the mask are drawn where the image shows them."""
    origin, step = _testing.paste_axis(method, low, high, mask)
    table = _testing.axis_table(_testing.given_axes(), origin, step, SIZE, mask)
    # The image pixel at index j reads the mask at origin + j * step.
    centres = [(k - origin) / step + 0.5 for k in range(mask)]
    half = 0.5 / step
    return {
        "kind": "paste",
        "title": title,
        "numbers": [low, high],
        "box": [low, high],
        "mask": [[round(c - half, 9), round(c + half, 9)] for c in centres],
        "reads": [round(float(p), 9) for p in table["position"]],
        "ticks": [[_short(v), float(v)] for v in range(SIZE + 1)],
    }


def _border(title: str, border: Any, fill: str) -> Picture:
    """What a ramp of 1, 2, .. reads as, and how much of it is still pixels."""
    steps = 16
    positions = [i / steps for i in range(-2 * steps, (SIZE + 1) * steps + 1)]
    # Next to every place where a rule can change, so that jumps are drawn as jumps.
    for kink in (-1.0, -0.5, 0.0, SIZE - 1.0, SIZE - 0.5, float(SIZE), 0.5, 1.5, 2.5, 3.5):
        positions += [kink - 1e-6, kink, kink + 1e-6]
    positions = sorted(set(positions))
    taps = _testing.border_taps(border, positions, SIZE)
    values = []
    for i in range(len(positions)):
        read = range(taps["count"][i])
        value = sum(taps["weight"][i, j] * (taps["pixel"][i, j] + 1) for j in read)
        values.append(None if taps["count"][i] == 0 else round(float(value), 4))
    return {
        "kind": "border",
        "title": title,
        "positions": [round(p, 6) for p in positions],
        "values": values,
        "outside": fill,
    }


def _short(number: float) -> str:
    return f"{number:g}"


def pictures() -> dict[str, Picture]:
    """Everything that is drawn, by name."""
    aligned, legacy = _testing.roi_align(1, True), _testing.roi_align(1, False)

    def crop(unit: str, corners: bool) -> Any:
        return _testing.crop(unit, corners, "zeros")

    whole = [0.0, 1, 2, 3, 4, 5]
    result = {
        "torchvision": _box("torchvision: edges", aligned, (1, 4), whole),
        "torchvision_legacy": _box(
            "torchvision_legacy: edges read as indices", legacy, (1, 4), [0, 1, 2, 3, 4]
        ),
        "opencv": _box("opencv: numbers are pixel centres", legacy, (0.5, 3.5), [0, 1, 2, 3, 4]),
        "tf_crop_and_resize": _box(
            "tf_crop_and_resize: from centre to centre",
            crop("fraction", True),
            (0.25, 0.75),
            [0, 0.25, 0.5, 0.75, 1],
        ),
        "tf_half_pixel": _box(
            "tf_half_pixel: fractions of the image",
            crop("fraction", False),
            (0.2, 0.8),
            [0, 0.2, 0.4, 0.6, 0.8, 1],
        ),
        "grid_sample": _box(
            "grid_sample: -1 and 1 are edges",
            crop("normalized", False),
            (-0.6, 0.6),
            [-1, -0.6, -0.2, 0.2, 0.6, 1],
        ),
        "grid_sample_align_corners": _box(
            "grid_sample_align_corners: -1 and 1 are centres",
            crop("normalized", True),
            (-0.5, 0.5),
            [-1, -0.5, 0, 0.5, 1],
        ),
        "tf_glimpse": _glimpse(
            "tf_glimpse: the middle, -1 and 1 are edges",
            (2, True, True),
            0.0,
            [-1, -0.6, -0.2, 0.2, 0.6, 1],
        ),
        "tf_glimpse_v1_normalized": _glimpse(
            "tf_glimpse_v1_normalized: the middle, in sizes",
            (1, False, True),
            0.5,
            [0, 0.2, 0.4, 0.6, 0.8, 1],
        ),
        "tf_glimpse_v1_centered": _glimpse(
            "tf_glimpse_v1_centered: the middle, in half pixels",
            (1, True, False),
            0.0,
            [-5, -3, -1, 1, 3, 5],
        ),
        "tf_glimpse_v1": _glimpse(
            "tf_glimpse_v1: the middle, in pixels", (1, False, False), 2.5, whole
        ),
        "tf_glimpse_v2_normalized": _glimpse(
            "tf_glimpse_v2_normalized: the first edge, in sizes",
            (2, False, True),
            0.2,
            [0, 0.2, 0.4, 0.6, 0.8, 1],
        ),
        "tf_glimpse_v2_centered": _glimpse(
            "tf_glimpse_v2_centered: the first edge, from the middle",
            (2, True, False),
            -1.5,
            [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5],
        ),
        "tf_glimpse_v2": _glimpse(
            "tf_glimpse_v2: the first edge, in pixels", (2, False, False), 1.0, whole
        ),
        "coco": _annotation("coco: first edge and extent", (1, 4), whole, 0, 0),
        "yolo": _box(
            "yolo: middle and extent, in sizes",
            crop("fraction", False),
            (0.2, 0.8),
            [0, 0.2, 0.4, 0.6, 0.8, 1],
        ),
        "inclusive": _annotation(
            "inclusive: first and last pixel, from 0", (1, 3), [0, 1, 2, 3, 4], 0, 1
        ),
        "pascal_voc": _annotation(
            "pascal_voc: first and last pixel, from 1", (2, 4), [1, 2, 3, 4, 5], -1, 0
        ),
        "paste": _paste("paste_masks: a mask of 4 over a box", "detectron2", 1.0, 4.0, 4),
        "paste_torchvision": _paste(
            "paste_masks, torchvision: whole pixels", "torchvision", 1.0, 4.0, 4
        ),
    }
    # Extents where a convention has them.
    result["coco"]["numbers"] = [1, 3]
    result["yolo"]["numbers"] = [0.5, 0.6]
    borders = {
        "roi": ("roi_align: one pixel more, then nothing", _testing.roi_border(), "0"),
        "zeros": ("zeros: pixels outside are 0", _testing.zeros_border(), "0"),
        "border": ("border: the edge goes on", _testing.edge_border(), "0"),
        "tf": ("crop_and_resize: to the pixel centres", _testing.fill_border(), "fill"),
        "tf_nearest": ("crop_and_resize, nearest", _testing.fill_border(nearest=True), "fill"),
        "half_pixel": ("half_pixel: to the pixel edges", _testing.covered_border(), "fill"),
        "half_pixel_nearest": (
            "half_pixel, nearest",
            _testing.covered_border(nearest=True),
            "fill",
        ),
    }
    for name, arguments in borders.items():
        result[f"border_{name}"] = _border(*arguments)
    return result


# ------------------------------------------------------------------------------------------- text

COLUMNS = 12
"""Characters of a pixel."""
MARGIN = 6
"""Half a pixel on each side, for what reaches out."""


def _line(
    marks: list[tuple[float, str]], fill: str = " ", span: tuple[float, float] | None = None
) -> str:
    """Marks centred on places in edge units."""
    width = COLUMNS * SIZE + 2 * MARGIN + 1
    line = [" "] * width

    def column(place: float) -> int:
        return MARGIN + math.floor(place * COLUMNS + 0.5)

    if span is not None:
        for c in range(max(column(span[0]), 0), min(column(span[1]), width - 1) + 1):
            line[c] = fill
    for place, mark in marks:
        start = column(place) - (len(mark) - 1) // 2
        if mark.startswith("-") and len(mark) > 1:
            start = column(place) - len(mark) // 2
        for i, letter in enumerate(mark):
            if 0 <= start + i < width:
                line[start + i] = letter
    return "".join(line).rstrip()


def text(picture: Picture) -> str:
    """A picture in characters. A twelfth of a pixel is one of them."""
    if picture["kind"] == "border":
        return _border_text(picture)
    pixels = [(float(k), "|") for k in range(SIZE + 1)] + [(k + 0.5, "x") for k in range(SIZE)]
    low, high = picture["box"]
    rows = [
        (_line(pixels, "-", (0, SIZE)), "x: pixel centres"),
        (_line([(place, label) for label, place in picture["ticks"]]), "numbers"),
    ]
    if picture["kind"] == "paste":
        edges = [(left, "|") for left, _ in picture["mask"]]
        edges.append((picture["mask"][-1][1], "|"))
        middles = [((left + right) / 2, "o") for left, right in picture["mask"]]
        span = (picture["mask"][0][0], picture["mask"][-1][1])
        shown = [(k + 0.5, _short(round(p, 3))) for k, p in enumerate(picture["reads"])]
        rows += [
            (_line(edges + middles, "-", span), "o: pixel centres of the mask"),
            (_line(shown), "the index of the mask that each pixel reads"),
        ]
    else:
        rows += [
            (_line([(low, "["), (high, "]")], "=", (low, high)), "the box"),
            (_line([(place, "o") for place in picture["samples"]]), "o: samples"),
        ]
    width = COLUMNS * SIZE + MARGIN + 4
    lines = [f"{line:{width}}{words}" for line, words in rows]
    return "\n".join(lines)


def _border_text(picture: Picture) -> str:
    """Values at every half pixel."""
    table = dict(zip(picture["positions"], picture["values"], strict=True))
    places = [p / 2 for p in range(-4, 2 * SIZE + 3)]
    width = 6
    values = [table[p] for p in places]
    shown = [picture["outside"] if v is None else _short(v) for v in values]
    return "\n".join(
        (
            "position " + "".join(f"{_short(p):>{width}}" for p in places),
            "value    " + "".join(f"{v:>{width}}" for v in shown),
        )
    )


# ------------------------------------------------------------------------------------------- SVG

INK, FAINT, PIXEL, BOX, SAMPLE = "#24292f", "#6e7781", "#f3f4f6", "#0969da", "#cf222e"
UNIT = 100
LEFT = 70


class Svg:
    """Shapes with rounded numbers, so that files are the same on every machine."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" font-family="sans-serif" font-size="13">'
        )
        self.parts = [
            f"<title>{escape(title)}</title>",
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        ]

    def rect(self, x: float, y: float, w: float, h: float, fill: str, line: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, ink: str, width: float = 1) -> None:
        self.parts.append(
            f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{ink}" '
            f'stroke-width="{width:g}"/>'
        )

    def dot(self, x: float, y: float, r: float, fill: str, line: str = "none") -> None:
        self.parts.append(
            f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r:g}" fill="{fill}" stroke="{line}" '
            'stroke-width="1.5"/>'
        )

    def path(self, points: list[tuple[float, float]], ink: str) -> None:
        where = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{where}" fill="none" stroke="{ink}" stroke-width="2.5"/>'
        )

    def text(
        self, x: float, y: float, words: str, ink: str = INK, anchor: str = "middle", size: int = 13
    ) -> None:
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" fill="{ink}" text-anchor="{anchor}" '
            f'font-size="{size}">{escape(words)}</text>'
        )

    def __str__(self) -> str:
        return "\n".join([self.head, *self.parts, "</svg>"]) + "\n"


def svg(picture: Picture) -> str:
    return {"axis": _axis_svg, "paste": _paste_svg, "border": _border_svg}[picture["kind"]](picture)


def _place(edge: float) -> float:
    return LEFT + edge * UNIT


def _row_of_pixels(drawing: Svg, top: float, height: float) -> None:
    for k in range(SIZE):
        drawing.rect(_place(k), top, UNIT, height, PIXEL, FAINT)
        drawing.text(_place(k) + 6, top + 16, f"{k}", FAINT, "start", 11)


def _ruler(drawing: Svg, picture: Picture, top: float) -> None:
    drawing.line(_place(-0.55), top, _place(SIZE + 0.55), top, FAINT)
    for label, place in picture["ticks"]:
        if -0.55 <= place <= SIZE + 0.55:
            drawing.line(_place(place), top - 5, _place(place), top + 5, INK, 1.5)
            drawing.text(_place(place), top + 20, label)


def _axis_svg(picture: Picture) -> str:
    width, height = 2 * LEFT + SIZE * UNIT, 190
    drawing = Svg(width, height, picture["title"])
    drawing.text(_place(0), 22, picture["title"], INK, "start", 15)
    _row_of_pixels(drawing, 40, 60)
    low, high = picture["box"]
    drawing.parts.append(
        f'<rect x="{_place(low):.2f}" y="46" width="{(high - low) * UNIT:.2f}" height="48" '
        f'fill="{BOX}" fill-opacity="0.15" stroke="{BOX}" stroke-width="2"/>'
    )
    for k in range(SIZE):
        x, y = _place(k + 0.5), 70
        drawing.line(x - 4, y - 4, x + 4, y + 4, FAINT, 1.5)
        drawing.line(x - 4, y + 4, x + 4, y - 4, FAINT, 1.5)
    for place in picture["samples"]:
        drawing.dot(_place(place), 70, 8, "none", SAMPLE)
    _ruler(drawing, picture, 120)
    y = 174
    numbers = ", ".join(_short(v) for v in picture["numbers"])
    drawing.parts.append(
        f'<rect x="{_place(0):.2f}" y="{y - 11}" width="14" height="14" fill="{BOX}" '
        f'fill-opacity="0.15" stroke="{BOX}" stroke-width="2"/>'
    )
    drawing.text(_place(0) + 22, y, f"the box: {numbers}", INK, "start")
    drawing.dot(_place(2.2), y - 4, 7, "none", SAMPLE)
    drawing.text(_place(2.2) + 14, y, "samples of 3 cells", INK, "start")
    drawing.text(_place(4) - 6, y, "× pixel centres", FAINT, "start")
    return str(drawing)


def _paste_svg(picture: Picture) -> str:
    drawing = Svg(2 * LEFT + SIZE * UNIT, 235, picture["title"])
    drawing.text(_place(0), 22, picture["title"], INK, "start", 15)
    _row_of_pixels(drawing, 40, 44)
    _ruler(drawing, picture, 100)
    for left, right in picture["mask"]:
        drawing.parts.append(
            f'<rect x="{_place(left):.2f}" y="136" width="{(right - left) * UNIT:.2f}" height="30" '
            f'fill="{BOX}" fill-opacity="0.15" stroke="{BOX}" stroke-width="2"/>'
        )
        drawing.dot(_place((left + right) / 2), 151, 4, BOX)
    for k, read in enumerate(picture["reads"]):
        drawing.line(_place(k + 0.5), 62, _place(k + 0.5), 176, SAMPLE)
        drawing.dot(_place(k + 0.5), 62, 5, SAMPLE)
        drawing.text(_place(k + 0.5), 192, _short(round(read, 3)), SAMPLE)
    numbers = " to ".join(_short(v) for v in picture["numbers"])
    caption = f"box from {numbers}; in red the index of the mask that each pixel of the image reads"
    drawing.text(_place(0), 220, caption, INK, "start")
    return str(drawing)


def _border_svg(picture: Picture) -> str:
    left, top, unit, rise = 60, 44, 70, 24
    drawing = Svg(left + 8 * unit + 40, top + 7.4 * rise + 46, picture["title"])
    drawing.text(left - 30, 22, picture["title"], INK, "start", 15)

    def x(position: float) -> float:
        return left + (position + 2) * unit

    def y(value: float) -> float:
        return top + (SIZE + 1 - value) * rise

    drawing.rect(x(-0.5), y(SIZE + 0.8), SIZE * unit, (SIZE + 0.8) * rise, PIXEL)
    drawing.line(x(-2), y(0), x(SIZE + 1), y(0), FAINT)
    for k in range(-2, SIZE + 2):
        drawing.text(x(k), y(0) + 36, f"{k}", INK if 0 <= k < SIZE else FAINT)
        drawing.line(x(k), y(0) + 16, x(k), y(0) + 22, FAINT)
    drawing.line(x(-2), y(0) + 19, x(SIZE + 1), y(0) + 19, FAINT)
    for k in range(SIZE):
        drawing.dot(x(k), y(k + 1), 4, FAINT)
        drawing.text(x(k) - 4, y(k + 1) - 8, f"{k + 1}", FAINT, "end", 11)
    points: list[tuple[float, float]] = []
    last: tuple[float, float | None] | None = None
    runs: list[tuple[str, list[tuple[float, float]]]] = []
    for position, value in zip(picture["positions"], picture["values"], strict=True):
        missing = value is None
        jump = (
            last is not None and not missing and last[1] is not None and abs(value - last[1]) > 0.5
        )
        changed = last is not None and (last[1] is None) != missing
        if jump or changed:
            runs.append(("none" if last is not None and last[1] is None else "value", points))
            points = []
        points.append((x(position), y(0 if missing else value)))
        last = (position, value)
    runs.append(("none" if last is not None and last[1] is None else "value", points))
    for kind, run in runs:
        if kind == "value":
            drawing.path(run, SAMPLE)
            continue
        drawing.parts.append(
            f'<line x1="{run[0][0]:.2f}" y1="{run[0][1]:.2f}" x2="{run[-1][0]:.2f}" '
            f'y2="{run[-1][1]:.2f}" stroke="{BOX}" stroke-width="2.5" stroke-dasharray="6 4"/>'
        )
        words = "0" if picture["outside"] == "0" else "fill value"
        if run[-1][0] - run[0][0] > 0.9 * unit:
            drawing.text((run[0][0] + run[-1][0]) / 2, y(0) - 8, words, BOX, "middle", 11)
    return str(drawing)


# ------------------------------------------------------------------------------------------ files


def files(made: dict[str, Picture]) -> dict[Path, str]:
    """Contents of every file that is written here."""
    contents = {DATA: json.dumps(made, indent=1, sort_keys=True) + "\n"}
    for name, picture in made.items():
        contents[FOLDER / f"{name}.svg"] = svg(picture)
    for page in PAGES:
        contents[page] = with_texts(page.read_text(), made)
    return contents


def with_texts(page: str, made: dict[str, Picture]) -> str:
    """A page whose pictures in characters, between two marks each, are those of ``made``."""
    lines, kept, inside = page.split("\n"), [], False
    for line in lines:
        if line.startswith("<!-- picture: "):
            name = line.removeprefix("<!-- picture: ").removesuffix(" -->")
            kept += [line, "```text", text(made[name]), "```"]
            inside = True
        elif line == "<!-- end of picture -->":
            kept.append(line)
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the files")
    parser.add_argument("--update", action="store_true", help="write the files")
    options = parser.parse_args(arguments)
    made = pictures()
    if not options.check and not options.update:
        for name, picture in made.items():
            print(f"{name}\n{text(picture)}\n")
        return 0
    FOLDER.mkdir(exist_ok=True)
    wrong = 0
    for path, content in files(made).items():
        found = path.read_text() if path.exists() else ""
        if options.update:
            path.write_text(content)
        elif found != content:
            wrong += 1
            print(f"{path.name} is not what csrc/geometry gives; run docs/pictures.py --update")
            difference = difflib.unified_diff(found.splitlines(), content.splitlines(), lineterm="")
            print("\n".join(list(difference)[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
