# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the reader: where it looked on held-out canvases, what it saw, how it learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import reader

ROWS, COLUMNS = 2, 5
GAZE_COLOUR = "#ff8c1a"
START_COLOUR = "#9aa7b5"
TRUTH_COLOUR = "#35c46a"
WRONG_COLOUR = "#e0433a"


def _show_path(axes: Axes, canvases: reader.Canvases, reading: reader.Reading, index: int) -> None:
    """A canvas with the path of the gaze and the finest window of the last look."""
    size = reader.CANVAS
    image = canvases.images[index, 0].cpu().numpy()
    axes.imshow(image, cmap="gray", vmin=-0.4, vmax=1.1, extent=(0, size, size, 0))
    y, x = canvases.corners[index].tolist()
    axes.add_patch(
        Rectangle((x, y), reader.DIGIT, reader.DIGIT, fill=False, ec=TRUTH_COLOUR, ls="--", lw=1.3)
    )
    # Offsets -1 and 1 are the outer edges of the canvas.
    path = (reading.gaze[:, index].cpu().numpy() + 1) * size / 2
    axes.plot(path[:, 1], path[:, 0], color=GAZE_COLOUR, lw=1.6)
    axes.plot(*path[0, ::-1], "o", color=START_COLOUR, ms=6, mec="black", mew=0.6)
    axes.plot(path[1:, 1], path[1:, 0], "o", color=GAZE_COLOUR, ms=5, mec="black", mew=0.6)
    half = reader.GLIMPSE / 2
    axes.add_patch(
        Rectangle(
            (path[-1, 1] - half, path[-1, 0] - half),
            *(reader.GLIMPSE, reader.GLIMPSE),
            fill=False,
            ec=GAZE_COLOUR,
            lw=1.8,
        )
    )
    label, said = int(canvases.labels[index]), int(reading.scores[-1, index].argmax())
    axes.set_title(
        f"{label}, read as {said}",
        fontsize=12,
        color="black" if label == said else WRONG_COLOUR,
    )
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def _show_losses(axes: Axes, losses: Mapping[str, list[float]]) -> None:
    for way, colour in (("moving", GAZE_COLOUR), ("fixed", START_COLOUR)):
        values = np.asarray(losses[way])
        width = max(1, len(values) // 30)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, color=colour, lw=1.6, label=f"{way} gaze")
    axes.axhline(np.log(10), color="black", lw=0.8, ls=":", label="guessing")
    axes.set_title("Training loss", fontsize=12, loc="left")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _show_accuracy(axes: Axes, summary: Mapping[str, Any]) -> None:
    by_look = summary["accuracy_by_look"]
    looks = [f"look {i + 1}" for i in range(len(by_look))]
    names = [*looks, "fixed gaze"]
    values = [*by_look, summary["fixed_gaze_accuracy"]]
    colours = [GAZE_COLOUR] * len(by_look) + [START_COLOUR]
    axes.bar(names, values, color=colours, width=0.6)
    for i, value in enumerate(values):
        axes.text(i, value + 0.02, f"{value:.0%}", ha="center", fontsize=11)
    axes.axhline(summary["chance"], color="black", lw=0.8, ls=":")
    axes.set_ylim(0, 1.1)
    axes.set_title("Held-out digits read right; dotted: chance", fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw(
    path: Path, canvases: reader.Canvases, reading: reader.Reading, summary: Mapping[str, Any]
) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(13, 9.6), layout="constrained")
    grid = figure.add_gridspec(ROWS + 1, 2 * COLUMNS, height_ratios=(1.0,) * ROWS + (1.1,))
    figure.suptitle(
        f"Learned where to look: {summary['accuracy']:.0%} of held-out digits read right, "
        f"{summary['fixed_gaze_accuracy']:.0%} with the gaze held in the middle",
        fontsize=15,
        fontweight="bold",
    )
    for i in range(ROWS * COLUMNS):
        row, column = divmod(i, COLUMNS)
        axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
        _show_path(axes, canvases, reading, i)
    _show_losses(figure.add_subplot(grid[ROWS, :COLUMNS]), summary["losses"])
    _show_accuracy(figure.add_subplot(grid[ROWS, COLUMNS:]), summary)
    figure.supxlabel(
        "Grey: the first look, in the middle. Orange: the path of the gaze and the finest of three "
        "windows of the last look. Green: the digit.",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
