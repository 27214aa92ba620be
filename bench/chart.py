"""CPU per request as bars: a panel for each table and load, a bar for each system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.goals import Rows
from bench.rounds import Row

_OURS, _OTHERS = "#d1495b", "#9aa5b1"
_BAR_IN, _FRAME_IN = 0.3, 0.9


def svg(rows: Rows, titles: Mapping[str, str], path: Path) -> None:
    """Write the chart to `path`: the same figures give the same file."""
    heights = [_FRAME_IN + _BAR_IN * max(map(len, by_load.values())) for by_load in rows.values()]
    with mpl.rc_context({"svg.hashsalt": "dl-inference", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        columns = max(map(len, rows.values()))
        panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for across, (table, by_load) in zip(panels, rows.items(), strict=True):
            for panel, (load, by_system) in zip(across, by_load.items(), strict=False):
                _bars(panel, f"{titles[table]}: {load}", by_system)
            for panel in across[len(by_load) :]:
                panel.set_axis_off()
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(panel: Axes, title: str, by_system: Mapping[str, Row]) -> None:
    cpu = [row.cpu_us_per_request for row in by_system.values()]
    spread = [
        [row.cpu_us_per_request - row.cpu_us_least for row in by_system.values()],
        [row.cpu_us_most - row.cpu_us_per_request for row in by_system.values()],
    ]
    colours = [_OURS if name.startswith("ours") else _OTHERS for name in by_system]
    bars = panel.barh(list(by_system), cpu, xerr=spread, color=colours, error_kw={"elinewidth": 1, "ecolor": "#333"})
    panel.bar_label(bars, [f"{value:.0f}" for value in cpu], padding=4)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel("CPU µs/request")
    panel.spines[["top", "right"]].set_visible(False)
