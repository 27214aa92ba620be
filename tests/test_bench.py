"""The benchmark runs and its output is whole; what it measures is not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_a_quick_run_measures_every_system_at_every_size() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert set(result["gateway"]) == {"600B", "600KB"}
    for rows in result["gateway"].values():
        assert set(rows) == {"echo-grpcio", "proxy-grpcio", "ours-grpcio"}
        for row in rows.values():
            assert all(
                row[name] > 0 for name in ("cpu_us_per_request", "requests_per_s", "p50_ms", "p99_ms", "memory_mb")
            )
    assert {"date", "cpu", "cores", "python", "versions", "command"} <= set(result["machine"])
    assert [goal["goal"] for goal in result["goals"]] == [3.0, 1.15, 1.15]


def test_a_message_has_the_size_that_it_is_named_after() -> None:
    from bench.gateway import SIZES, message

    assert [len(message(size)) for size in SIZES.values()] == [600, 600_000]
