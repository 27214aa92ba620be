"""TensorFlow beside torch, as `make demo-tf TRANSPORT=grpcio` runs it; and what makes it fail."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow_serving")


def test_a_second_version_comes_under_load_and_no_request_fails(run_demo: Any) -> None:
    report = run_demo("digits.demo_tf", "grpcio")
    assert report["transport"] == "grpcio: as configured"
    offline = report["accuracy_offline"]
    assert 0.9 < offline["digits-tf 1"] < offline["digits-tf 2"]
    asked = {"digits 1": 2, "digits-tf 1": 3, "digits-tf 2": 2}
    for what, row in report["served"].items():
        model, _, _ = what.partition(",")
        asked[model] -= 1
        assert row["requests"] == 540
        assert row["accuracy"] == offline[model]
    assert set(asked.values()) == {0}
    assert report["versions"] == {"before": {"1": "AVAILABLE"}, "after": {"1": "AVAILABLE", "2": "AVAILABLE"}}
    switch = report["switch"]
    assert len(switch["nodes"]) == 2
    for figures in (switch["gateway"], *switch["nodes"].values()):
        assert figures["failed"] == 0
        assert min(figures["answers"]["1"], figures["answers"]["2"]) > 10
    assert switch["gateway_torch"]["failed"] == 0
    assert switch["gateway_torch"]["requests"] > 20
    assert switch["all_nodes_after_copy_s"] > 0
    assert report["exit_codes"] == [0, 0, 0]


def answers(*versions: int, digit: int = 0) -> Any:
    """What came of one way of asking, by the versions that answered; each takes the only picture for a 0."""
    from digits.demo_tf import Answers

    given = Answers(held_out=None, expected={1: np.zeros(1), 2: np.zeros(1)})  # type: ignore[arg-type] # nobody asks
    for version in versions:
        given.take(0, digit, version, sent=time.monotonic())
    return given


def judge(node: Any, load: Any, copied: float = 0.0) -> None:
    from digits.demo_tf import check

    check(load, answers(1), {"node": node}, copied=copied, switched={"node": node.first_new})


def test_a_switch_as_it_should_be_passes() -> None:
    load = answers(1, 2, 1)  # from several nodes
    judge(answers(1, 1, 2, 2), load)


def test_what_is_not_as_it_should_be_is_told() -> None:
    from digits.demo_base import Failed

    node = answers(1, 2)
    for load, words in (
        (answers(1), "version 1 answered a request that was sent after all nodes had switched"),
        (answers(2, 3), "the gateway: 1 of 2 failed; the first: version 3 answered"),
        (answers(2, digit=7), "version 2 takes digit 0 for 7"),
    ):
        with pytest.raises(Failed, match=words):
            judge(node, load)
    with pytest.raises(Failed, match="node node went back to version 1"):
        judge(answers(1, 2, 1), answers(2))
    with pytest.raises(Failed, match="before all of it was there"):
        judge(node, answers(2), copied=time.monotonic())
