"""The rig of faults: its arithmetic, its verdicts, what it does to nodes, and one short run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.faults import __main__ as faults
from bench.faults import (
    chart,
    course,
    experiments,
    figures,
    gateways,
    goals,
    hostile,
    namespaces,
    original,
    plan,
    sockets,
)
from bench.faults.__main__ import _measure, main
from bench.faults.client import Load
from bench.faults.course import Pace
from bench.faults.experiments import Experiment, Findings
from bench.faults.figures import Attempts, Records
from bench.faults.gateways import System
from bench.faults.goals import BY_ID, ROWS, Finding, judged
from bench.faults.node import ANSWERED, ARRIVED, EVENT
from bench.faults.report import Report
from bench.faults.stage import Node, set_up
from dl_inference_core import config as configs

ROOT = Path(__file__).parents[1]
MACHINE = {
    "date": "D",
    "minutes": 1,
    "cpu": "C",
    "cores": 2,
    "python": "3",
    "versions": {"grpcio": "1"},
    "command": "c",
}

SERIES = {
    "run": "several",
    "system": "ours",
    "load": "67 %",
    "bin_s": 0.1,
    "faults": [{"row": "F1", "began": 0.2, "healed": 0.6}],
    "requests": [5] * 20,
    "failed": [0] * 19 + [1],
    "attempts": [[2] * 20, [3] * 20],
}


def attempts(folder: Path, arrived: Sequence[float], answered: Sequence[float] = ()) -> Attempts:
    """What a node would have logged, and a last event that it was killed at."""
    events = [EVENT.pack(at, 0.5, 7, ARRIVED) for at in arrived] + [EVENT.pack(at, 0.5, 7, ANSWERED) for at in answered]
    log = folder / "log"
    log.write_bytes(b"".join(events) + EVENT.pack(9, 9, 9, 0)[:5])
    return figures.attempts(log)


def requests(*rows: tuple[float, float, int]) -> Records:
    """When each was due and ended, and its code."""
    due, ended, codes = (np.array(column) for column in zip(*rows, strict=True))
    return Records(due, due, ended, codes)


def every(seconds: float, begin: float, end: float) -> list[float]:
    return list(np.arange(begin, end, seconds))


def test_a_log_is_read_up_to_what_was_cut_off(tmp_path: Path) -> None:
    read = attempts(tmp_path, [1.0, 2.0], [1.5])
    assert list(read.arrived().at) == [1.0, 2.0]
    assert list(read.answered().at) == [1.5]
    assert set(read.port) == {7}
    assert set(read.left) == {0.5}
    assert len(read.arrived(1.0, 2.0)) == 1


def test_shares_and_attempts_for_each_request_are_counted_at_the_nodes(tmp_path: Path) -> None:
    nodes = [attempts(tmp_path, every(0.1, 0, 9.95)), attempts(tmp_path, every(0.1, 0, 4.95)), attempts(tmp_path, [])]
    assert list(figures.arrivals(nodes, 0, 10)) == [100, 50, 0]
    assert figures.share_of_fair(nodes, (1,), 0, 10) == pytest.approx(1.0)
    assert figures.share_of_fair(nodes, (1,), 5, 10) == 0
    assert figures.share_of_fair(nodes, (0, 1), 0, 5) == pytest.approx(1.5)
    assert math.isnan(figures.share_of_fair(nodes, (1,), 20, 30))
    sent = requests(*((at, at + 0.1, 0) for at in every(0.1, 0, 9.95)))
    assert figures.per_request(nodes, sent, 0, 10) == pytest.approx(1.5)
    assert figures.starved_seconds(nodes, (0, 1), 0, 10) == 4  # the last whole second ends at the end
    assert figures.starved_seconds(nodes, (0,), 0, 10) == 0


def test_a_node_has_recovered_when_it_gives_four_fifths_of_its_part(tmp_path: Path) -> None:
    others = [attempts(tmp_path, [], every(0.01, 0, 10)) for _ in range(3)]
    back = attempts(tmp_path, every(0.01, 0, 10), every(0.01, 4, 10))
    assert figures.recovered_s([*others, back], 3, 3.0, 10.0) == pytest.approx(0.9, abs=0.1)
    assert figures.recovered_s([*others, back], 3, 0.0, 3.0) == math.inf
    assert figures.recovered_s([*others, back], 3, 5.0, 10.0) == 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    found = requests((0.0, 0.1, 0), (1.0, 1.3, 0), (2.0, 2.5, 14))
    assert found.succeeded.percentile_ms(100) == pytest.approx(300)
    assert len(found.failed) == 1
    assert len(found.ended_within(1.0, 2.0)) == 1
    assert len(found.due_within(1.0, 2.0)) == 1
    assert list(found.by_connections([0], 2).due) == [0.0, 2.0]
    assert len(found.by_connections([], 2)) == 0
    assert math.isnan(found.due_within(5, 6).percentile_ms(99))


def test_a_series_has_every_request_and_attempt_once(tmp_path: Path) -> None:
    found = figures.series(requests((0.05, 0.2, 14), (0.15, 0.3, 0)), [attempts(tmp_path, [0.06, 0.16])], 0.0, 0.4)
    assert found["requests"] == [1, 1, 0, 0]
    assert sum(found["failed"]) == 1
    assert found["attempts"] == [[1, 1, 0, 0]]


def finding(transport: str = "grpcio", **values: float) -> Finding:
    return Finding(row="", system="s", transport=transport, figures=values)


def test_a_goal_is_met_by_its_figure_alone() -> None:
    row = judged("F1", finding(failed=0, requests=15_000, routed_after_1s=0, attempts_per_request=1.0))
    assert row.met
    assert row.hard_met
    few = judged("F1", finding(failed=0, requests=10, routed_after_1s=0, attempts_per_request=1.0))
    assert [str(goal) for goal in few.missed] == ["requests ≥ 15000"]
    assert few.hard_met
    assert judged("F1", finding(failed=0, requests=10, routed_after_1s=0, attempts_per_request=1.0), enough=False).met
    assert not judged("F1", finding(failed=1, requests=15_000, routed_after_1s=0, attempts_per_request=1.0)).hard_met


def test_what_is_not_known_is_not_met_and_not_held_against_a_baseline() -> None:
    values = {"failed": 0, "requests": 15_000, "routed_after_1s": math.nan, "attempts_per_request": 1.0}
    assert not judged("F1", finding(**values)).met
    assert judged("F1", finding("", **values)).met
    assert not judged("F1", finding()).met
    assert not judged("F1", finding()).hard_met


def test_what_was_not_measured_is_never_met() -> None:
    values = {"failed": 0, "requests": 15_000, "routed_after_1s": 0, "attempts_per_request": 1.0}
    lost = judged("F1", Finding(row="", system="s", transport="grpcio", figures=values, why="it broke"))
    assert not lost.met
    assert not lost.hard_met
    assert lost.values()["measured"] is None


@pytest.mark.parametrize(
    ("row", "figure", "value"),
    [
        ("P1", "unanswered", 1),
        ("P2", "oversized", 0),
        ("P4", "connections", 499),
        ("P5", "sent_reset", 999),
        ("P5", "sent_ping", 999),
        ("L1", "cancelled", 0),
        ("L1", "failed", 1),
        ("L4", "victims_connections", 0),
        ("R1", "connections_held", 39),
        ("F5b", "ejections", 1),
    ],
)
def test_an_attack_that_came_to_nothing_is_not_withstood(row: str, figure: str, value: float) -> None:
    of_row = (*BY_ID[row].hard, *BY_ID[row].goals)
    reached = {goal.figure: goal.least if math.isfinite(goal.least) else goal.most for goal in of_row}
    assert judged(row, finding(**reached)).met
    assert not judged(row, finding(**reached | {figure: value})).hard_met


@pytest.mark.parametrize("broken", [RuntimeError("no such thing"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_is_reported_and_the_others_are_kept(broken: BaseException) -> None:
    def breaks() -> Findings:
        raise broken

    def works() -> Findings:
        return Findings(of=[judged("L2", finding(passed_on_beyond_ms=0, worked_after=0))])

    system = System(transport="grpcio", strategy="round_robin")
    runs = [
        Experiment(name=row, rows=(row,), system=system, load="", seconds=1, run=run)
        for row, run in (("L2", works), ("F1", breaks), ("F2", works))
    ]
    found: list[Finding] = []
    try:
        _measure(runs, found, [], Console(quiet=True))
    except KeyboardInterrupt:
        assert isinstance(broken, KeyboardInterrupt)
        assert [each.why for each in found] == ["", "interrupted", "interrupted"]
    else:
        assert [bool(each.why) for each in found] == [False, True, False]
        assert [bool(each.measured) for each in found] == [True, False, True]
        assert "no such thing" in found[1].why
    assert found[0].met
    assert not found[1].met


def test_every_row_has_goals_or_a_test_that_there_is() -> None:
    for row in ROWS:
        assert row.goal or row.tests or row.page, row.id
        for test in row.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), test
            assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_the_plan_has_every_row_within_an_hour_and_configs_that_are_read() -> None:
    runs = list(plan.full(gateways.transports(), []))
    assert {row for run in runs for row in run.rows} == {row.id for row in ROWS if row.goal}
    assert sum(run.seconds for run in runs) < 3600
    short = list(plan.short(gateways.transports(), []))
    assert sum(run.seconds for run in short) < 200
    assert {run.system.transport for run in short} == set(gateways.transports())
    strategies = {run.system.strategy for run in runs if "F5" in run.rows and run.system.ours}
    assert strategies == set(gateways.strategies())
    for run in runs:
        if run.system.ours:
            text = gateways.config_of(run.system, ["127.0.0.1:1"], "127.0.0.1:2")
            assert configs.parse(text.encode(), Path("/server.toml")).routes[0].balancer == run.system.strategy


def test_without_namespaces_their_rows_are_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "missing", lambda: "no root")
    runs = [run for run in plan.full(("grpcio",), []) if "F3" in run.rows and run.name == "F3"]
    found: list[Finding] = []
    _measure(runs, found, [], Console(quiet=True))
    assert found
    assert all("no root" in each.why and not each.met for each in found)


def test_the_page_and_the_values_have_every_finding(tmp_path: Path) -> None:
    found = [
        judged("F4", finding(failed=3, requests=100, p99_ratio=2.0)),
        judged("F2", Finding(row="", system="ours", transport="grpcio", why="interrupted")),
    ]
    report = Report(machine=MACHINE, findings=found, series=[])
    page = report.page()
    assert "| s |  | failed 3, requests 100, p99_ratio 2 | NOT met: failed = 0 (is 3), p99_ratio ≤ 1.5 (is 2) |" in page
    assert "not measured: interrupted" in page
    assert all(f"### {row.id}: " in page for row in ROWS)
    values = json.loads(json.dumps(report.values(), allow_nan=False))
    assert [each["met"] for each in values["faults"]] == [False, False]
    assert {"id", "strategy", "load", "requests", "failed", "figures", "goal", "met"} <= values["faults"][0].keys()
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg([SERIES], file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert "ours: 1 of 100 failed" in one


OLD = {
    "machine": MACHINE | {"date": "2026-01-02T01:30:00+00:00", "command": "all of it"},
    "faults": [
        {
            "id": row,
            "system": system,
            "transport": transport,
            "strategy": "",
            "load": "67 %",
            "requests": 1,
            "failed": 0,
            "figures": {"requests": 20_000, "failed": 0, "recovered_s": None},
            "goal": "",
            "missed": [],
            "met": True,
            "hard_met": True,
            "measured": True,
            "why": "",
        }
        for row, system, transport in (("F7", "ours", "grpcio"), ("L2", "ours", "grpcio"), ("F7", "envoy", ""))
    ],
    "tests": [],
}
"""As it was written when findings did not say when they were measured."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of figures of 03:04 on the second of January, with its series."""
    file = tmp_path / "faults.json"
    file.write_text(json.dumps(OLD), encoding="utf-8")
    series = [SERIES | {"system": system} for system in ("ours", "envoy")]
    (tmp_path / "faults-series.json").write_text(json.dumps(series), encoding="utf-8")
    at = datetime(2026, 1, 2, 3, 4, tzinfo=UTC).timestamp()
    os.utime(file, (at, at))
    return file


def test_what_is_measured_again_takes_the_place_of_what_was(old: Path) -> None:
    then = Report.read(old)
    assert {each.measured for each in then.findings} == {"2026-01-02T03:04+00:00"}
    assert all(math.isinf(each.figures["recovered_s"]) and not each.met for each in then.findings)
    again = [
        judged("L2", replace(finding(passed_on_beyond_ms=0, worked_after=0), system="ours", load="67 %")),
        judged("F7", Finding(row="", system="ours", transport="grpcio", load="67 %", why="interrupted")),
        judged("F2", Finding(row="", system="ours", transport="grpcio", load="67 %", why="interrupted")),
    ]
    again[0] = replace(again[0], measured="2026-01-03T05:06+00:00")
    series = [SERIES | {"new": True}]
    machine = MACHINE | {"date": "2026-01-03T05:00:00+00:00", "command": "a part"}
    both = Report(machine=machine, findings=again, series=series).over(then)
    rows = [(each.row, each.system, each.measured[:10]) for each in both.findings]
    assert rows == [
        ("F7", "ours", "2026-01-02"),
        ("L2", "ours", "2026-01-03"),
        ("F7", "envoy", "2026-01-02"),
        ("F2", "ours", ""),
    ]
    assert [(each["system"], "new" in each) for each in both.series] == [("envoy", False), ("ours", True)]
    page = both.page()
    assert "`all of it`, begun on 2026-01-02T01:30:00+00:00" in page
    assert "NOT met: recovered_s ≤ 1.5 (is never) (2026-01-02T03:04+00:00) |" in page
    assert "worked_after 0 | met |" in page
    both.write(old)
    once_more = Report.read(old)
    assert once_more.findings == both.findings
    assert once_more.over(then).first == then.machine


def test_a_part_leaves_the_whole_as_it_was_unless_it_is_for_the_page(
    old: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exit status is of our gateway alone."""
    ours, theirs = System(transport="grpcio", strategy="round_robin"), System(name="envoy")
    found = [
        judged("L2", replace(finding(passed_on_beyond_ms=0, worked_after=0), system="ours", load="67 %")),
        judged("L2", replace(finding("", passed_on_beyond_ms=99, worked_after=0), system="envoy", load="67 %")),
    ]
    runs = [
        Experiment(name="L2", rows=("L2",), system=system, load="", seconds=1, run=lambda of=of: Findings(of=[of]))
        for system, of in zip((ours, theirs), found, strict=True)
    ]
    monkeypatch.setattr(plan, "full", lambda *_: runs)
    monkeypatch.setattr(faults, "_OUT", old)
    monkeypatch.setattr(faults, "_PART", tmp_path / "part.json")
    monkeypatch.setattr(faults, "_DOCS", tmp_path)
    before = old.read_bytes()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        part = CliRunner().invoke(main, ["--only", "L2"])
        assert part.exit_code == 0, part.output
        assert old.read_bytes() == before
        assert len(Report.read(tmp_path / "part.json").findings) == 2
        assert not (tmp_path / "reliability.md").exists()
        for_page = CliRunner().invoke(main, ["--only", "L2", "--docs"])
        assert for_page.exit_code == 0, for_page.output
        assert [each.row for each in Report.read(old).findings] == ["F7", "L2", "F7", "L2"]
        assert "(2026-01-02T03:04+00:00)" in (tmp_path / "reliability.md").read_text(encoding="utf-8")
        old.write_text("{}", encoding="utf-8")
        refused = CliRunner().invoke(main, ["--only", "L2", "--docs"])
        assert refused.exit_code == 2
        assert "cannot be added to" in refused.output
    finally:
        signal.signal(signal.SIGTERM, terminate)
    assert CliRunner().invoke(main, ["--short", "--docs"]).exit_code == 2


def test_the_soak_is_cited_with_its_own_date() -> None:
    page = Report(machine=MACHINE, findings=[], series=[]).page()
    written = re.search(r" on (2\S+):", (ROOT / "docs" / "soak.md").read_text(encoding="utf-8"))
    assert written
    assert f"[docs/soak.md](soak.md), of {written[1]}." in page


async def test_the_originals_weights_are_never_set() -> None:
    published = original.Proxy(["a", "b", "c"], 0, 1.0)
    for _ in range(9):
        chosen = published.choose()
        assert chosen is published.nodes[0]
        chosen.failed()
    meant = original.Proxy(["a", "b", "c"], 100, 1.0)
    assert len({id(meant.choose()) for _ in range(3)}) == 3
    for _ in range(6):
        meant.nodes[0].failed()
    assert meant.nodes[0].effective == 1
    taken = [meant.choose() for _ in range(201)]
    assert taken.count(meant.nodes[0]) <= 2
    for _ in range(7):
        meant.nodes[0].succeeded()
    assert meant.nodes[0].effective == 100


def test_a_row_that_there_is_not_is_refused_by_name() -> None:
    result = CliRunner().invoke(main, ["--only", "F1,F99"])
    assert result.exit_code == 2
    assert "there is no F99" in result.output
    assert "python -m bench.faults --list" in CliRunner().invoke(main, ["--help"]).output


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_short_run_counts_requests_failures_and_attempts() -> None:
    """Two nodes, one of which is killed and comes back; what is measured adds up."""
    pace = Pace(warm_s=0.4, fault_s=0.6, after_s=0.6, enough=False)
    system = System(transport="grpcio", strategy="round_robin")
    with course.run(system, 100.0, 1, nodes=2) as run:
        run.warm(pace.warm_s)
        mark = course.faulted(run, course.FAULTS["F1"], 0, pace)
    assert mark.began < mark.healed < mark.until
    values = course.during(run, mark)
    assert values["requests"] == len(run.requests) > 50
    assert (run.requests.ended >= run.requests.sent).all()
    came, answered = (sum(len(of(node)) for node in run.attempts) for of in (Attempts.arrived, Attempts.answered))
    assert len(run.requests.succeeded) <= answered <= came
    assert len(run.attempts[0].answered(mark.began)) < len(run.attempts[1].answered(mark.began))
    assert sum(run.series()["requests"]) == len(run.requests)


def test_a_node_behind_a_black_hole_says_nothing_until_it_heals() -> None:
    if said := namespaces.missing():
        pytest.skip(said)
    with namespaces.made(77) as namespace, set_up(System(name="original"), nodes=1) as stage:
        node = Node(stage.folder, 9, namespace)
        node.start()
        try:
            stage.gateway.server.address = node.address
            assert stage.ask("m") == 0
            node.swallow()
            begun = time.monotonic()
            assert stage.ask("m", timeout_s=0.2) != 0
            assert time.monotonic() - begun < 1
            node.heal()
            assert stage.ask("m", timeout_s=5.0) == 0
        finally:
            node.kill()


def test_health_that_never_says_otherwise_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    node = Node(tmp_path, 0)
    node.start()
    try:
        with grpc.insecure_channel(node.address) as channel:
            assert not hostile._until_said(channel, time.monotonic() + 0.2)
            node.tell(health="not serving")
            assert hostile._until_said(channel, time.monotonic() + 10)
    finally:
        node.kill()


def test_a_clients_connections_are_known_by_their_ports(stack: ExitStack) -> None:
    stage = stack.enter_context(set_up(System(name="original"), nodes=1))
    (node,) = stage.nodes
    assert node.server is not None
    stage.gateway.server.address = node.address
    port = int(node.address.rpartition(":")[2])
    with stage.load(Load(rate=200.0, seed=1, connections=3)) as sending:
        time.sleep(0.3)
        assert len(set(sending.ports)) == 3
        assert sockets.accepted(node.server.processes()[0], port) >= set(sending.ports)
        pid, link = sockets.listener(node.server.processes(), port)
    assert pid == node.server.processes()[0]
    assert link in sockets.listening(port)  # another process may have the same port on another address
    came = node.attempts().arrived().port
    for number, own in enumerate(sending.ports):
        assert (came == own).sum() == len(sending.records().by_connections([number], 3))


def test_a_node_does_as_it_is_told(stack: ExitStack) -> None:
    stage = stack.enter_context(set_up(System(name="original"), nodes=1))
    (node,) = stage.nodes
    stage.gateway.server.address = node.address
    assert stage.ask("m", protocol="tfserving") == 0
    node.tell(status=13)
    assert stage.ask("m") == 13
    node.tell(status=0, hangs=True)
    assert stage.ask("m", timeout_s=0.1) == 4
    node.tell(hangs=False, listening=False)
    assert stage.ask("m") == 14
    node.tell(listening=True, answer_bytes=1000)
    assert stage.ask(7, protocol="seldon") == 0
    assert len(node.attempts().arrived()) == 4
    node.kill()
    node.start()
    assert stage.ask("m") == 0
    assert len(node.attempts().arrived()) == 5


def test_rows_are_known_by_their_ids() -> None:
    assert len(BY_ID) == len(ROWS)
    assert set(experiments.FAULTS) <= set(BY_ID)
    assert goals.worst([1.0, 2.0]) == 2.0
    assert math.isnan(goals.worst([1.0, math.nan]))
