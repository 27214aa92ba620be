"""`dl-inference-core bench` against a gateway, and a node behind it, that serve a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from dl_inference_tools.load_testing.results import Results
from hdrh.histogram import HdrHistogram

from dl_inference_core.cli import main

COUNT = ("--requests", "30", "--warm-up", "0s")


@pytest.mark.parametrize("protocol", ["openinference", "tfserving", "seldon"])
def test_a_real_model_takes_what_is_made_from_its_signature(gateway: Any, tmp_path: Path, protocol: str) -> None:
    out = tmp_path / "out.json"
    how = ("--model", "linear", "--protocol", protocol, "--rows", "4", "--in-flight", "4", "--json", str(out))
    result = CliRunner().invoke(main, ["bench", gateway.address, *how, *COUNT])
    assert result.exit_code == 0, result.output
    assert "float32 [4, 3] (from the model's signature)" in result.output
    (row,) = Results.read(out).rows
    assert row.good
    assert HdrHistogram.decode(row.latency).get_total_count() == 30


def test_a_model_that_is_not_there_is_said(node: Any) -> None:
    result = CliRunner().invoke(main, ["bench", node.address, "--model", "nobody"])
    assert result.exit_code == 1
    assert "error: NOT_FOUND: " in result.output
