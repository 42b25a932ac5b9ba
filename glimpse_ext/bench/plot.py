# SPDX-License-Identifier: BSD-3-Clause
"""One picture of the results: how many times slower each peer is.

A column of panels for each direction, a line of panels for each device, number of threads and
dtype; in a panel a line for each workload, with a mark for each peer and layout.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from .report import Results, peers_in, setting_of
from .suite import DIRECTIONS, Row

# Distinguishable with any colour vision and in grey.
COLOURS = {
    "torchvision": "#0072b2",
    "torchvision float32": "#56b4e9",
    "torchvision loop": "#332288",
    "torchvision loop of bytes": "#aa4499",
    "grid_sample": "#e69f00",
    "grid_sample copies": "#d55e00",
    "detectron2's way": "#009e73",
    "detectron2's way and pycocotools": "#66c2a5",
    "detectron2": "#00694d",
    "mmcv": "#cc79a7",
    "kornia": "#f0e442",
    "compiled reference": "#999999",
    "compiled grid_sample": "#8c6d31",
}
MARKS = {"contiguous": "o", "channels_last": "s"}
INACCURATE_MARK = "none"  # hollow
LINE_INCHES = 0.2
PANEL_INCHES = 3.6


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], peers: Sequence[str]) -> None:
    for line, name in enumerate(names):
        for row in rows:
            if row["workload"] != name:
                continue
            for index, peer_name in enumerate(peers):
                peer = row["peers"].get(peer_name, {})
                if "ratio" not in peer:
                    continue
                ratio, colour = peer["ratio"], COLOURS[peer_name]
                # Side by side within the line, so that equal ratios do not hide each other.
                last = row["layout"] == "channels_last"
                y = line + 0.56 * ((index + 0.5 * last + 0.25) / len(peers) - 0.5)
                axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=0.8)
                axes.plot(
                    ratio["median"],
                    y,
                    MARKS[row["layout"]],
                    color=colour,
                    markersize=4,
                    markeredgewidth=0.8,
                    markerfacecolor=colour if peer["accurate"] else INACCURATE_MARK,
                )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color="#eeeeee", linewidth=0.6, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(rows: Sequence[Row], peers: Sequence[str]) -> list[Line2D]:
    def mark(colour: str, shape: str, label: str, fill: str | None = None) -> Line2D:
        return Line2D(
            [], [], color=colour, marker=shape, linestyle="", label=label, markerfacecolor=fill
        )

    handles = [Line2D([], [], color=COLOURS[name], linewidth=4, label=name) for name in peers]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        handles.append(mark("#555555", MARKS[layout], layout, "#555555"))
    if any(not p.get("accurate", True) for row in rows for p in row["peers"].values()):
        handles.append(mark("#555555", "o", "inaccurate", INACCURATE_MARK))
    return handles


def plot(results: Results, path: Path) -> None:
    """Write the picture; the ending of ``path`` chooses PNG, SVG or PDF."""
    rows = [row for row in results["rows"] if any("ratio" in p for p in row["peers"].values())]
    if not rows:
        raise ValueError("no row of these results has a peer: there is nothing to plot")
    peers = peers_in(rows)
    settings = list(dict.fromkeys(setting_of(row) for row in rows))
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    names = {
        setting: list(dict.fromkeys(r["workload"] for r in rows if setting_of(r) == setting))
        for setting in settings
    }
    heights = [0.6 + LINE_INCHES * len(names[setting]) for setting in settings]
    figure = Figure(
        figsize=(PANEL_INCHES * len(directions) + 0.4, sum(heights) + 1.3), layout="constrained"
    )
    panels = figure.subplots(
        len(settings),
        len(directions),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for line, setting in zip(panels, settings, strict=True):
        for axes, direction in zip(line, directions, strict=True):
            here = [r for r in rows if (setting_of(r), r["direction"]) == (setting, direction)]
            axes.set_visible(bool(here))
            _panel(axes, here, names[setting], peers)
            axes.set_title(f"{direction}, {setting}", fontsize=9)
    spreads = [p["ratio"] for r in rows for p in r["peers"].values() if "ratio" in p]
    lowest, highest = min(s["low"] for s in spreads), max(s["high"] for s in spreads)
    panels[0, 0].set_xlim(min(0.8, 0.9 * lowest), 1.2 * max(highest, 2))
    machine, versions = results["machine"], results["versions"]
    quick = ", --quick (smaller workloads)" if results["quick"] else ""
    figure.suptitle(
        f"Time of a peer over that of glimpse_ext (right of 1: glimpse_ext is faster){quick}\n"
        f"{machine.get('gpu') or machine['processor']}, torch {versions['torch']}",
        fontsize=10,
    )
    handles = _handles(rows, peers)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize=8
    )
    figure.savefig(path, dpi=110)
