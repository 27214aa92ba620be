"""Where and when something is measured, and with what load tester."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """The time of now, the processor, and the Python that runs this."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def h2load_version() -> str:
    said = subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1].removeprefix("nghttp2/")
