"""Requests per second and p99 by requests in flight: a row of panels for each model, a line for each system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.model_servers.measuring import Measured
from bench.model_servers.models import MODELS
from bench.model_servers.systems import NAMES

_COLOURS = dict(zip(NAMES, ("#333333", "#d1495b", "#f4a6ae", *mpl.color_sequences["Set2"]), strict=False))
_PANEL_IN = 2.6
_FIGURES = {"requests_per_s": "requests/s", "p99_ms": "p99, ms"}


def svg(measured: Mapping[str, Measured], path: Path) -> None:
    """Write the chart to `path`: the same figures give the same file."""
    with mpl.rc_context({"svg.hashsalt": "dl-inference", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, _PANEL_IN * len(measured)), layout="constrained")
        panels = figure.subplots(len(measured), len(_FIGURES), squeeze=False)
        for across, (name, model) in zip(panels, measured.items(), strict=True):
            for panel, (attribute, title) in zip(across, _FIGURES.items(), strict=True):
                _lines(panel, model, attribute)
                panel.set_title(f"{MODELS[name].title}: {title}", loc="left", fontsize=10)
            across[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(panel: Axes, measured: Measured, attribute: str) -> None:
    for system in (name for name in NAMES if any(name in row for row in measured.rows.values())):
        points = {
            in_flight: getattr(row[system], attribute) for in_flight, row in measured.rows.items() if system in row
        }
        panel.plot(list(points), list(points.values()), marker="o", markersize=3, color=_COLOURS[system], label=system)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(measured.rows), [str(in_flight) for in_flight in measured.rows])
    panel.set_xlabel("in flight")
    panel.spines[["top", "right"]].set_visible(False)
