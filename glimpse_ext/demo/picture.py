# SPDX-License-Identifier: BSD-3-Clause
"""The picture at the end: labels and detections of the held-out half, loss, time of a step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

import glimpse_ext

from .data import Half
from .detector import Detections

LABEL_COLOUR = "#35c46a"
FOUND_COLOUR = "#ff8c1a"
OTHER_COLOUR = "#9aa7b5"
LABEL_STYLE: dict[str, Any] = {"edgecolor": LABEL_COLOUR, "linewidth": 1.8}
FOUND_STYLE: dict[str, Any] = {"edgecolor": FOUND_COLOUR, "linewidth": 1.8}
TRUTH_STYLE: dict[str, Any] = {"edgecolor": LABEL_COLOUR, "linewidth": 1.2, "linestyle": "--"}
# Weaker detections count in the average precision but would only clutter the picture.
SHOWN_SCORE = 0.5


def _show(axes: Axes, half: Half, masks: Tensor, colour: str) -> None:
    """The photograph with shaded masks."""
    height, width = half.image.shape
    extent = (0, width, height, 0)
    axes.imshow(half.image.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    shade = np.empty((height, width, 4))
    shade[..., :3] = to_rgb(colour)
    shade[..., 3] = 0.35 * masks.any(0).numpy()
    axes.imshow(shade, extent=extent, interpolation="nearest")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: Axes, boxes: Tensor, **style: Any) -> None:
    for x1, y1, x2, y2 in boxes.tolist():
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _write_scores(axes: Axes, boxes: Tensor, scores: Tensor) -> None:
    for (x1, y1, _, _), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        axes.text(
            x1 - 0.2,
            max(y1 - 1.2, 8),  # above the box, and inside the photograph
            f"{score:.2f}",
            fontsize=10,
            fontweight="bold",
            color="black",
            va="bottom",
            bbox={"facecolor": FOUND_COLOUR, "edgecolor": "none", "pad": 1.5},
        )


def _add_legend(axes: Axes, *handles: Patch) -> None:
    """Right above the axes, level with the title."""
    axes.legend(
        handles=handles,
        ncols=len(handles),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        frameon=False,
        fontsize=11,
    )


def _show_labels(axes: Axes, half: Half) -> None:
    _show(axes, half, half.masks, LABEL_COLOUR)
    _outline(axes, half.boxes, **LABEL_STYLE)
    axes.set_title(
        f"Ground truth: {len(half.boxes)} coins, by classical segmentation", fontsize=12, loc="left"
    )
    _add_legend(
        axes, Patch(facecolor=LABEL_COLOUR + "59", label="true box and mask", **LABEL_STYLE)
    )


def _show_detections(axes: Axes, half: Half, found: Detections) -> None:
    height, width = half.image.shape
    shown = found.scores >= SHOWN_SCORE
    boxes = found.boxes[shown]
    pasted = glimpse_ext.paste_masks(found.masks[shown], boxes, (height, width))
    _show(axes, half, pasted, FOUND_COLOUR)
    _outline(axes, half.boxes, **TRUTH_STYLE)
    _outline(axes, boxes, **FOUND_STYLE)
    _write_scores(axes, boxes, found.scores[shown])
    axes.set_title(
        f"Detections: {len(boxes)} with a score of at least {SHOWN_SCORE}", fontsize=12, loc="left"
    )
    _add_legend(
        axes,
        Patch(facecolor=FOUND_COLOUR + "59", label="found box, mask and score", **FOUND_STYLE),
        Patch(facecolor="none", label="true box", **TRUTH_STYLE),
    )


def _show_loss(axes: Axes, total: Sequence[float]) -> None:
    axes.plot(range(1, len(total) + 1), total, color=FOUND_COLOUR, linewidth=1.3)
    axes.set_title("Training loss", fontsize=12, loc="left")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _show_times(axes: Axes, times: Mapping[str, float]) -> None:
    for row, name in enumerate(("glimpse_ext", "grid_sample")):
        step, pooling = times[f"{name}_step_seconds"] * 1e3, times[f"{name}_pooling_seconds"] * 1e3
        axes.barh(row, pooling, color=FOUND_COLOUR, height=0.55)
        axes.barh(row, max(step - pooling, 0), left=pooling, color=OTHER_COLOUR, height=0.55)
        axes.text(
            step,
            row,
            f"  {step:.0f} ms, {times[f'{name}_share']:.0%} pooling",
            va="center",
            fontsize=10,
        )
    longest = max(times["glimpse_ext_step_seconds"], times["grid_sample_step_seconds"]) * 1e3
    axes.set_xlim(0, longest * 1.5)
    axes.set_ylim(1.6, -0.6)
    axes.set_yticks([0, 1], ["glimpse_ext", "grid_sample"])
    axes.set_title("One training step, by the way boxes are pooled", fontsize=12, loc="left")
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(color=FOUND_COLOUR, label="pooling"),
            Patch(color=OTHER_COLOUR, label="the rest"),
        ],
        loc="lower right",
        frameon=False,
        fontsize=10,
    )


def draw(
    path: Path,
    half: Half,
    found: Detections,
    precision: Mapping[str, float],
    losses: Sequence[float],
    times: Mapping[str, float],
) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(12, 13.2), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(4.8, 4.8, 2.6), width_ratios=(1, 1.35))
    figure.suptitle(
        f"Coins the detector never saw: box AP {precision['box_AP']:.2f} "
        f"(AP@0.5 {precision['box_AP50']:.2f}), mask AP {precision['mask_AP']:.2f}",
        fontsize=16,
        fontweight="bold",
    )
    _show_labels(figure.add_subplot(grid[0, :]), half)
    _show_detections(figure.add_subplot(grid[1, :]), half, found)
    _show_loss(figure.add_subplot(grid[2, 0]), losses)
    _show_times(figure.add_subplot(grid[2, 1]), times)
    figure.supxlabel(
        f"Photograph: skimage.data.coins. Trained on its upper half, shown is its {half.name}.",
        fontsize=10,
        color="#555555",
    )
    figure.savefig(path, dpi=110)
