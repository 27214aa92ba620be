"""Demos, run as `make` runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RunDemo = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def run_demo() -> Iterator[RunDemo]:
    """Runs a demo, by its module and a transport, and gives its report; nothing of it may stay behind."""
    # The path must be short enough for those of sockets, as that of `tmp_path` is not.
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)

        def run(module: str, transport: str) -> dict[str, Any]:
            done = subprocess.run(
                [sys.executable, "-m", module, "--json", "--transport", transport],
                env={**os.environ, "TMPDIR": path},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert not _naming(folder)
            assert not list(folder.glob("dl-inference-*"))
            report: dict[str, Any] = json.loads(done.stdout)
            return report

        yield run


def _naming(folder: Path) -> list[str]:
    """The command lines of running processes that name something in `folder`, as those of all servers do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found
