# SPDX-License-Identifier: BSD-3-Clause
"""One picture of the results: how many times slower each peer is, one panel per setting."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .report import Results, format_ratio, peers_in, rows_of_setting, setting_names
from .suite import Row

# Distinguishable with any colour vision and in grey.
COLOURS = {
    "torchvision": "#0072b2",
    "torchvision float32": "#56b4e9",
    "grid_sample": "#e69f00",
    "grid_sample copies": "#d55e00",
    "detectron2's way": "#009e73",
}
PANELS_PER_LINE = 2
BAR = 0.8  # of the space of a row


def _panel(axes: Axes, rows: Sequence[Row], peers: Sequence[str], title: str) -> None:
    thickness = BAR / len(peers)
    for place, row in enumerate(rows):
        for index, name in enumerate(peers):
            peer = row["peers"].get(name, {})
            if "ratio" not in peer:
                continue
            ratio = peer["ratio"]
            middle = ratio["median"]
            y = place - BAR / 2 + (index + 0.5) * thickness
            # Bars start at 1: to the left of it, the peer is faster.
            axes.barh(
                y,
                middle - 1,
                thickness * 0.92,
                left=1,
                color=COLOURS[name],
                hatch=None if peer["accurate"] else "////",
                edgecolor="white",
                linewidth=0,
            )
            axes.plot([ratio["low"], ratio["high"]], [y, y], color="#333333", linewidth=0.9)
            text = format_ratio(middle)
            end = max(middle, ratio["high"], 1)
            axes.annotate(
                text, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(range(len(rows)), [f"{row['workload']} {row['direction']}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot(results: Results, path: Path) -> None:
    """Write the picture; the ending of ``path`` chooses PNG, SVG or PDF."""
    rows = [row for row in results["rows"] if any("ratio" in p for p in row["peers"].values())]
    if not rows:
        raise ValueError("no row of these results has a peer: there is nothing to plot")
    peers = peers_in(rows)
    settings = setting_names(rows)
    columns = min(PANELS_PER_LINE, len(settings))
    lines = math.ceil(len(settings) / columns)
    longest = max(len(rows_of_setting(rows, name)) for name in settings)
    size = (5.4 * columns, lines * (0.9 + 0.17 * longest * max(len(peers), 2)) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
    for axes, name in zip(panels, settings, strict=False):
        _panel(axes, rows_of_setting(rows, name), peers, name)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    ratios = [p["ratio"]["high"] for r in rows for p in r["peers"].values() if "ratio" in p]
    lows = [p["ratio"]["low"] for r in rows for p in r["peers"].values() if "ratio" in p]
    panels[0].set_xlim(min(0.8, 0.9 * min(lows)), 1.9 * max(*ratios, 2))
    handles = [Patch(color=COLOURS[name], label=name) for name in peers]
    if any(not p.get("accurate", True) for row in rows for p in row["peers"].values()):
        handles.append(
            Patch(facecolor="white", edgecolor="black", hatch="////", label="inaccurate")
        )
    machine, versions = results["machine"], results["versions"]
    quick = ", --quick (smaller workloads)" if results["quick"] else ""
    figure.suptitle(
        f"Time of a peer over that of glimpse_ext (right of 1: glimpse_ext is faster){quick}\n"
        f"{machine.get('gpu') or machine['processor']}, torch {versions['torch']}",
        fontsize=10,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.savefig(path, dpi=130)
