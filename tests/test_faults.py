"""The rig of faults: its arithmetic, its verdicts, what it does to nodes, and one short run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.faults import chart, course, experiments, figures, gateways, goals, namespaces, original, plan
from bench.faults.__main__ import _measure, main
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
    assert lost.values()["measured"] is False


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
        assert "no such thing" in found[1].why
    assert found[0].met
    assert not found[1].met


def test_every_row_has_goals_or_a_test_that_there_is() -> None:
    for row in ROWS:
        assert row.goal or row.tests, row.id
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
    series = {
        "run": "several",
        "system": "ours",
        "load": "67 %",
        "bin_s": 0.1,
        "faults": [{"row": "F1", "began": 0.2, "healed": 0.6}],
        "requests": [5] * 20,
        "failed": [0] * 19 + [1],
        "attempts": [[2] * 20, [3] * 20],
    }
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg([series], file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert "ours: 1 of 100 failed" in one


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
