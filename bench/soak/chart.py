"""A soak over time: memory, descriptors, threads and tasks, requests by how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.soak.course import Sample

_PANEL_IN = 2.0
# Rates are over so many samples.
_OVER = 5


def svg(samples: Sequence[Sample], path: Path) -> None:
    """Write the chart to `path`: the same samples give the same file."""
    with mpl.rc_context({"svg.hashsalt": "dl-inference", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 4 * _PANEL_IN), layout="constrained")
        memory, descriptors, others, requests = figure.subplots(4, 1, sharex=True)
        seconds = np.array([sample.at_s for sample in samples])
        minutes = seconds / 60
        memory.plot(minutes, [sample.memory_mb for sample in samples], color="#d1495b")
        _fit(memory, [sample for sample in samples if sample.phase == "busy"])
        descriptors.plot(minutes, [sample.descriptors for sample in samples], color="#00798c")
        others.plot(minutes, [sample.threads for sample in samples], label="threads")
        others.plot(minutes, [sample.tasks for sample in samples], label="tasks", linewidth=0.8)
        for outcome in sorted(samples[-1].ended, key=lambda name: -samples[-1].ended[name]):
            counts = np.array([sample.ended.get(outcome, 0) for sample in samples])
            rates = (counts[_OVER:] - counts[:-_OVER]) / (seconds[_OVER:] - seconds[:-_OVER])
            requests.plot(minutes[_OVER:], rates, label=outcome, linewidth=0.8)
        requests.set_yscale("symlog", linthresh=1)
        requests.set_xlabel("minutes")
        titles = {memory: "memory, MB", descriptors: "descriptors", others: "threads, tasks", requests: "requests/s"}
        for panel, title in titles.items():
            panel.set_title(title, loc="left", fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
            for sample, following in pairwise(samples):
                if sample.phase == "rest":
                    panel.axvspan(sample.at_s / 60, following.at_s / 60, color="#eeeeee", linewidth=0)
        for panel in (memory, others, requests):
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _fit(panel: Axes, busy: Sequence[Sample]) -> None:
    minutes = [sample.at_s / 60 for sample in busy]
    line = np.poly1d(np.polyfit(minutes, [sample.memory_mb for sample in busy], 1))
    panel.plot(minutes, line(minutes), color="#333333", linestyle="--", linewidth=0.8, label="least squares")
