"""The main job, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _serving() -> set[int]:
    """The processes of `dl-inference-core serve` that this test's own session has started and that still run."""
    mine = os.getsid(0)
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"dl-inference-demo-" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return {pid for pid in found if os.getsid(pid) == mine}


def test_the_demo_serves_what_was_trained_and_loses_nothing_when_a_node_is_killed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "digits.demo", "--json"], capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
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
    assert not _serving()
