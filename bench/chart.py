"""CPU per request as bars: a panel for each table and load, a bar for each system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import Figures
from bench.goals import Rows

_OURS, _OTHERS = "#d1495b", "#9aa5b1"
_BAR_IN, _FRAME_IN = 0.3, 0.9
_ACROSS = 2
"""Panels beside each other."""


def svg(rows: Rows, titles: Mapping[str, str], path: Path) -> None:
    """Write the chart to `path`: the same figures give the same file."""
    panels_of = [
        (f"{titles[table]}: {load}", by_system)
        for table, by_load in rows.items()
        for load, by_system in by_load.items()
    ]
    across = [panels_of[start : start + _ACROSS] for start in range(0, len(panels_of), _ACROSS)]
    heights = [_FRAME_IN + _BAR_IN * max(len(by_system) for _, by_system in panels) for panels in across]
    with mpl.rc_context({"svg.hashsalt": "dl-inference", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        panels = figure.subplots(len(across), _ACROSS, squeeze=False, height_ratios=heights)
        for line, titled in zip(panels, across, strict=True):
            for panel, (title, by_system) in zip(line, titled, strict=False):
                _bars(panel, title, by_system)
            for panel in line[len(titled) :]:
                panel.set_axis_off()
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(panel: Axes, title: str, by_system: Mapping[str, Figures]) -> None:
    cpu = [row.cpu_us_per_request for row in by_system.values()]
    each = [row.each("cpu_us_per_request") for row in by_system.values()]
    spread = [
        [median - min(rounds) for median, rounds in zip(cpu, each, strict=True)],
        [max(rounds) - median for median, rounds in zip(cpu, each, strict=True)],
    ]
    colours = [_OURS if name.startswith("ours") else _OTHERS for name in by_system]
    bars = panel.barh(list(by_system), cpu, xerr=spread, color=colours, error_kw={"elinewidth": 1, "ecolor": "#333"})
    panel.bar_label(bars, [f"{value:.0f}" for value in cpu], padding=4)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel("CPU µs/request")
    panel.spines[["top", "right"]].set_visible(False)
