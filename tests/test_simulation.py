"""The simulation gives the figures that stand in docs/simulation.md, whatever the machine; and it is what it says."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.simulation import clock, report
from bench.simulation.__main__ import EXPECTED, strategies
from bench.simulation.course import Figures, simulate
from bench.simulation.node import Behaviour, Node
from bench.simulation.scenarios import BY_NAME
from dl_inference_core.errors import DeadlineExceeded, HandlerFailed, NodeFailed, NodeUnreachable
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.transport import Answer, Exchange
from dl_inference_core.wire.protocol import Protocol

ROOT = Path(__file__).parents[1]
DEFAULT = "dynamic_weighted_round_robin"
SINKHOLE = "one fails at once"
WANTED: dict[str, dict[str, dict[str, Any]]] = json.loads(EXPECTED.read_text(encoding="utf-8"))


# The table


def test_the_table_has_every_scenario_and_strategy() -> None:
    assert {scenario: set(figures) for scenario, figures in WANTED.items()} == {
        scenario: set(strategies()) for scenario in BY_NAME
    }


@pytest.mark.parametrize("strategy", strategies())
def test_each_strategy_does_what_it_did_to_a_node_that_fails_at_once(strategy: str) -> None:
    assert simulate(BY_NAME[SINKHOLE], strategy).values() == WANTED[SINKHOLE][strategy]


@pytest.mark.parametrize("scenario", [name for name in BY_NAME if name != SINKHOLE])
def test_the_default_strategy_does_what_it_did(scenario: str) -> None:
    assert simulate(BY_NAME[scenario], DEFAULT).values() == WANTED[scenario][DEFAULT]


def test_the_page_shows_the_table() -> None:
    results = {
        scenario: {strategy: Figures(**figures) for strategy, figures in by_strategy.items()}
        for scenario, by_strategy in WANTED.items()
    }
    assert (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8") == report.page(results)


def test_what_fails_in_one_request_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, asked = Forwarder._begin, 0

    def fail_once(self: Forwarder, exchange: Exchange, protocol: Protocol) -> None:
        nonlocal asked
        asked += 1
        if asked == 10:
            raise ZeroDivisionError("of no error that a client is told")
        begin(self, exchange, protocol)

    monkeypatch.setattr(Forwarder, "_begin", fail_once)
    scenario = replace(BY_NAME[SINKHOLE], warm_s=0.2, fault_s=2.0, after_s=2.0)
    with pytest.raises(HandlerFailed, match="ZeroDivisionError"):
        simulate(scenario, DEFAULT)
    assert asked > 100


def test_no_strategy_attracts_requests_to_a_node_that_fails() -> None:
    assert {name: row["share"] for name, row in WANTED[SINKHOLE].items() if row["share"] > 0.1} == {}
    for scenario in (name for name in BY_NAME if "fails" in BY_NAME[name].fault):
        assert {name: row["share"] for name, row in WANTED[scenario].items() if row["share"] > 1.0} == {}
        assert {name: row["failed"] for name, row in WANTED[scenario].items() if row["failed"]} == {}


def test_no_node_is_left_out_to_which_nothing_happened() -> None:
    for by_strategy in WANTED.values():
        assert all(row["others_left_out"] == 0 for row in by_strategy.values())


def test_the_figures_do_not_depend_on_the_order_of_hashes() -> None:
    scenario, strategy = "one fails at once, 10 requests/s", "least_request"
    command = [sys.executable, "-m", "bench.simulation", "--json", "--scenario", scenario, "--strategy", strategy]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {scenario: {strategy: WANTED[scenario][strategy]}}


def test_a_figure_that_is_another_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from bench.simulation import __main__ as cli

    scenario, strategy = "one fails at once, 10 requests/s", "random"
    other = {scenario: {strategy: {**WANTED[scenario][strategy], "failed": 1}}}
    (tmp_path / "expected.json").write_text(json.dumps(other), encoding="utf-8")
    monkeypatch.setattr(cli, "EXPECTED", tmp_path / "expected.json")
    result = CliRunner().invoke(cli.main, ["--scenario", scenario, "--strategy", strategy])
    assert result.exit_code == 1
    assert f"{scenario}, {strategy}" in " ".join(result.output.split())


# Virtual time


def test_an_hour_passes_at_once_and_only_inside() -> None:
    async def hour() -> tuple[float, float]:
        begun = time.monotonic()
        await asyncio.sleep(3600)
        return begun, time.monotonic()

    real, chance = time.monotonic(), random.getstate()
    assert clock.run(hour(), 1) == (0.0, 3600.0)
    assert time.monotonic() - real < 60
    assert random.getstate() == chance


def test_waiting_for_what_never_comes_is_an_error() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing would ever happen again"):
        clock.run(forever(), 1)


# Nodes


def asked(node: Node, *, probe: bool = False, timeout_s: float = 100.0) -> asyncio.Task[Answer]:
    method = "/grpc.health.v1.Health/Check" if probe else "/m"
    return asyncio.ensure_future(node.call(method, b"", timeout_s=timeout_s))


def test_a_node_works_on_so_many_at_once_and_the_others_wait() -> None:
    async def main() -> float:
        node = Node("10.0.0.1:8500", Behaviour(at_once=2, mean_s=1.0))
        begun = time.monotonic()
        await asyncio.gather(*(asked(node, timeout_s=1000.0) for _ in range(200)))
        assert len(node.arrived) == 200
        return time.monotonic() - begun

    assert 90 < clock.run(main(), 1) < 110


def test_a_node_that_hangs_answers_nothing_until_it_goes_on() -> None:
    async def main() -> None:
        node = Node("10.0.0.1:8500", Behaviour())
        early = asked(node)
        await asyncio.sleep(0.01)
        node.behave(hangs=True)
        for probe in (False, True):
            with pytest.raises(DeadlineExceeded):
                await asked(node, probe=probe, timeout_s=1)
        assert not early.done()
        node.behave(hangs=False)
        await early
        assert time.monotonic() < 3

    clock.run(main(), 1)


def test_a_node_that_is_gone_drops_what_it_had_and_refuses_what_comes() -> None:
    async def main() -> None:
        node = Node("10.0.0.1:8500", Behaviour())
        early = asked(node)
        await asyncio.sleep(0.01)
        node.behave(refuses=True)
        for call in (early, asked(node), asked(node, probe=True)):
            with pytest.raises(NodeUnreachable):
                await call
        node.behave(refuses=False)
        await asked(node)

    clock.run(main(), 1)


def test_a_node_that_fails_answers_probes() -> None:
    async def main() -> None:
        node = Node("10.0.0.1:8500", Behaviour(fails=1.0))
        with pytest.raises(NodeFailed):
            await asked(node)
        assert (await asked(node, probe=True)).message == b"\x08\x01"
        assert len(node.arrived) == 1

    clock.run(main(), 1)
