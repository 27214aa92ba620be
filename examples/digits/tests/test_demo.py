"""The main job, as `make demo` runs it, on the transport that is taken where none is named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dl_inference_core.plugins import Plugins


def test_the_demo_serves_what_was_trained_and_loses_nothing_when_a_node_crashes(run_demo: Any) -> None:
    report = run_demo("digits.demo", "auto")
    assert report["transport"].partition(":")[0] == Plugins().choose_transport("auto")[0]
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


def test_the_demo_of_torch_does_without_tensorflow() -> None:
    asks = "import sys, digits.demo; sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", asks], timeout=60, check=False).returncode == 0
