"""Where and when something is measured, and with what load tester."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ABOUT_BUSY = 0.1
"""Of load: less are the programs that any system runs."""


def facts() -> dict[str, Any]:
    """The time of now, the processor, the Python that runs this, and who else uses the machine; asked for before
    anything is measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pinned": len(os.sched_getaffinity(0)) < (os.cpu_count() or 1),
        "load_before": round(os.getloadavg()[0], 2),
    }


def conditions(facts: Mapping[str, Any]) -> str:
    """For readers, in sentences: whether processes are pinned to cores, and whether the machine is shared."""
    pinned = "All run on a part of its cores (affinity)" if facts["pinned"] else "No process is pinned to a core"
    load = facts["load_before"]
    if load < _ABOUT_BUSY:
        return f"{pinned}; nothing else ran in the minute before."
    return f"{pinned}. The machine is shared: in the minute before, {load:.1f} programs ran at one time on the average."


def h2load_version() -> str:
    """With a space before it; "" where it is not installed."""
    if shutil.which("h2load") is None:
        return ""
    said = subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=True).stdout
    return " " + said.split()[-1].removeprefix("nghttp2/")
