"""The main job, as `make demo` runs it, on each installed transport."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dl_inference_core.plugins import Kind, Plugins


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files; its path is short enough for those of sockets, as `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.mark.parametrize("transport", sorted(Plugins().classes(Kind.TRANSPORTS)))
def test_the_demo_serves_what_was_trained_and_loses_nothing_when_a_node_crashes(folder: Path, transport: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "digits.demo", "--json", "--transport", transport],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["transport"] == f"{transport}: as configured"
    assert report["accuracy_offline"] > 0.95
    for row in report["served"].values():
        assert row["requests"] == 540
        assert row["accuracy"] == report["accuracy_offline"]
    assert list(report["share_per_node"].values()) == pytest.approx([1 / 3] * 3, abs=0.01)
    assert report["kill"]["requests"] > 500
    assert report["kill"]["failed"] == 0
    assert report["kill"]["share_of_dead_node"] < 0.1
    assert report["kill"]["share_back_after_s"] < 15
    assert report["exit_codes"] == [0, 0, 0, 0]
    assert not _naming(folder)
    assert not list(folder.glob("dl-inference-*"))


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
