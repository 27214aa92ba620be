"""Faults over time: what reached each node, and what failed; a panel for each system that had them all in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PANEL_IN = 1.5
_COLOURS = ("#00798c", "#66a5ad", "#9aa5b1", "#c4dfe6")
_FAILED = "#d1495b"
# Bins of the series that make one point.
_OVER = 5
_RUN = "several"


def svg(series: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the chart to `path`: the same series give the same file."""
    longest = max((len(run["faults"]) for run in series if run["run"] == _RUN), default=0)
    runs = [run for run in series if run["run"] == _RUN and len(run["faults"]) == longest and run["load"] == "67 %"]
    with mpl.rc_context({"svg.hashsalt": "dl-inference", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, max(1, len(runs)) * _PANEL_IN), layout="constrained")
        panels = figure.subplots(max(1, len(runs)), 1, sharex=True, squeeze=False)[:, 0]
        for panel, run in zip(panels, runs, strict=False):
            _panel(panel, run)
        panels[-1].set_xlabel("seconds")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(panel: Axes, run: Mapping[str, Any]) -> None:
    attempts = np.array([_rates(counts, run["bin_s"]) for counts in run["attempts"]])
    failed = _rates(run["failed"], run["bin_s"])
    seconds = np.arange(len(failed)) * _OVER * run["bin_s"]
    panel.stackplot(seconds, attempts, colors=_COLOURS, linewidth=0)
    panel.plot(seconds, failed, color=_FAILED, linewidth=1.2)
    top = 1.25 * max(attempts.sum(axis=0).max(), failed.max(), 1.0)
    for fault in run["faults"]:
        panel.axvspan(fault["began"], fault["healed"], color="#000000", alpha=0.08, linewidth=0)
        panel.text(fault["began"], top, fault["row"], va="top", fontsize=7)
    panel.set_ylim(0, top)
    panel.set_xlim(0, seconds[-1] if len(seconds) else 1)
    panel.set_title(f"{run['system']}: {sum(run['failed'])} of {sum(run['requests'])} failed", loc="left", fontsize=8)
    panel.set_ylabel("per second")
    panel.spines[["top", "right"]].set_visible(False)


def _rates(counts: Sequence[int], bin_s: float) -> Any:
    whole = len(counts) // _OVER * _OVER
    return np.array(counts[:whole], float).reshape(-1, _OVER).sum(axis=1) / (_OVER * bin_s)
