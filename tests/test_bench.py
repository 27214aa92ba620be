"""The benchmark measures what is installed, and its output is whole; the figures are not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import bodies, chart, choices, goals, load, machine, peers, processes, stages, systems
from bench.__main__ import main
from bench.choices import Choice
from bench.core import loads
from bench.core.measuring import PARTS
from bench.core.report import ROWS as CORE_ROWS
from bench.core.report import TABLE, UNIT
from bench.core.report import Report as CoreReport
from bench.figures import Figures, Sample
from bench.goals import Goal
from bench.load import LoadError
from bench.report import Report
from bench.rounds import SIZES
from bench.stages import Stages

ROOT = Path(__file__).parents[1]
OUTPUT = """\
finished in 2.05s, 9756.10 req/s, 5.87MB/s
requests: 4 total, 4 started, 4 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 4 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 12.06MB (12648112) total, 12.34KB (123) headers (space savings 96.62%), 11.54MB ({data}) data
"""
LOG = "".join(f"1764000000000000\t200\t{latency_us}\t1\n" for latency_us in (1000, 2000, 3000, 4000))


def row(*cpu_us: float, requests_per_s: float = 1000.0, memory_mb: float = 50.0) -> Figures:
    """A round for each of the `cpu_us`."""
    rounds = [
        Sample(cpu_us_per_request=each, requests_per_s=requests_per_s, p50_ms=10.0, p99_ms=20.0, client_cpu_us=4.0)
        for each in cpu_us
    ]
    return Figures(rounds=rounds, memory_mb=memory_mb)


ROWS = {
    "gateway": {
        "600B@128": {
            "ours-native": row(30, 36, 33),
            "plain-envoy": row(100, 90, 110),
            "nginx": row(60, 60, 60),
            "haproxy": row(30, 30, 30),
        }
    },
    "gateway-tasks": {"600B@128": {"ours-native-10-tasks": row(30, memory_mb=61)}},
    "node-tensorflow": {"small@128": {"bare-call": row(10, 12, 11), "ours-tf-native": row(30, 29, 31)}},
}
TITLES = {"gateway": "Gateway", "gateway-tasks": "Tasks", "node-tensorflow": "Node"}
CHOICES = {
    "random": {choices.size(nodes): Choice(cpu_us_per_request=0.25) for nodes in choices.NODES},
    "costly": {choices.size(nodes): Choice(cpu_us_per_request=nodes / 10) for nodes in choices.NODES},
}
needs_cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed: no load generator")
QUICK = (
    *("echo", "ours-native", "ours-grpcio", "nginx", "ours-native-tls", "haproxy-tls", "ours-native-10-tasks"),
    *("ours-random-1024-nodes", "ours-native-2-processes", "bare-call", "ours-tf-native"),
)
"""One of each table, or two."""


@needs_cargo
def test_a_quick_run_measures_every_system_that_is_asked_for_and_installed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json", "--systems", ",".join((*QUICK, goals.CHOICES, "stages"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    tables = systems.installed(QUICK)
    assert "gateway" in {table.name for table in tables}
    told = {"machine", goals.CHOICES, "stages", "goals", "absent"}
    assert set(result) == {*told, *(table.name for table in tables)}
    for table in tables:
        assert set(result[table.name]) == {size.name for size in table.sizes}
        for rows in result[table.name].values():
            assert set(rows) == {system.name for system in table.systems}
            for figures in rows.values():
                assert min(value for name, value in figures.items() if name != "rounds") > 0
                assert len(figures["rounds"]) == 1
    assert set(result[goals.CHOICES]) == set(choices.strategies())
    sizes = {choices.size(nodes) for nodes in choices.NODES}
    assert all(set(by_size) == sizes for by_size in result[goals.CHOICES].values())
    assert any(
        choice["cpu_us_per_request"] > 0 for by_size in result[goals.CHOICES].values() for choice in by_size.values()
    )
    assert set(result["stages"]) == ({*stages.STAGES, "in all"} if stages.installed() else set())
    assert set(result["absent"]) == set(systems.absent(QUICK))
    assert {"date", "cpu", "cores", "python", "versions", "command", "pinned"} <= set(result["machine"])
    assert {"dl-inference-core", "grpcio"} <= set(result["machine"]["versions"])


def test_a_quick_run_of_the_core_measures_every_part() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "core", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert set(result) == {"machine", TABLE, "batch_rows", "goals"}
    figures = result[TABLE]
    assert set(figures) == {row.name for row in CORE_ROWS}
    # What others are taken off from may be anything in so short a run.
    measured = {row.name for row in CORE_ROWS if not row.less} | {"gateway_1", "gateway_32"}
    assert [name for name in measured if min(figures[name].values()) <= 0] == []
    assert figures[UNIT]["units"] == 1
    for in_flight in (1, 128):
        assert figures[f"node_{in_flight}"]["cpu_us_most"] < figures[f"node_{in_flight}_in_all"]["cpu_us_least"]
    assert 1 <= result["batch_rows"] <= 64
    assert {goal["system"]: goal["most"] for goal in result["goals"]} == {
        "gateway_1": 5.0,
        "gateway_32": 5.0,
        "node_1": 8.0,
        "node_128": 8.0,
    }
    assert {"date", "cpu", "cores", "python", "versions", "command", "rounds"} <= set(result["machine"])


def test_what_the_core_takes_is_less_what_others_took_in_the_same_round() -> None:
    samples: dict[str, list[float]] = {part: [1.0, 1.0, 1.0] for part in PARTS}
    samples |= {"gateway_1": [7.0, 30.0, 5.0], "passing_1": [2.0, 20.0, 1.0], "gateway_32": [6.5] * 3}
    samples |= {"node_1": [11.0] * 3, "node_128": [10.0, 9.0, 12.0], "codec": [2.0, 1.0, 3.0]}
    samples |= {"spread_128": [20.0, 19.0, 22.0]}
    report = CoreReport(machine={}, samples=samples, batch_rows=2.0)
    assert asdict(report.costs()["gateway_1"]) == {
        "cpu_us_per_request": 5.0,
        "cpu_us_least": 4.0,
        "cpu_us_most": 10.0,
    }
    assert report.costs()["spread_128"].cpu_us_per_request == 17.0
    assert {outcome.goal.system: (outcome.ratio, outcome.met) for outcome in report.outcomes()} == {
        "gateway_1": (5.0, True),
        "gateway_32": (5.5, False),
        "node_1": (8.0, True),
        "node_128": (7.0, True),
    }


def test_requests_to_the_core_are_of_one_size_and_never_the_same() -> None:
    messages = loads.make_requests(200)
    assert {len(message) for message in messages} == {loads.MESSAGE_BYTES}
    requests = [loads.PROTOCOL.codec.decode_request(message) for message in messages]
    assert {request.model for request in requests} == {loads.MODEL}
    assert len({request.id for request in requests}) == 200


def test_options_before_the_command_core_are_refused() -> None:
    result = CliRunner().invoke(main, ["--quick", "core"])
    assert result.exit_code == 2
    assert "options of core stand after it" in result.output


def test_what_is_not_installed_is_left_out_with_a_word_on_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "binary", lambda _: None)
    names = {system.name for table in systems.installed() for system in table.systems}
    assert "ours-grpcio" in names
    assert not names & {"nginx", "haproxy"}
    assert systems.absent(("nginx", "haproxy", "haproxy-tls", "ours-grpcio")) == {
        "nginx": "nginx: apt-get install nginx-light",
        "haproxy": "haproxy: apt-get install haproxy",
        "haproxy-tls": "haproxy: apt-get install haproxy",
    }


def test_only_the_systems_asked_for_are_measured() -> None:
    found = systems.installed(("echo", "proxy-grpcio"))
    assert {table.name: [system.name for system in table.systems] for table in found} == {
        "gateway": ["echo", "proxy-grpcio"],
    }


def test_every_goal_is_about_what_is_measured() -> None:
    measured = {
        (table.name, size.name, system.name)
        for table in systems.installed()
        for size in table.sizes
        for system in table.systems
    }
    missing = set(systems.absent())
    for goal in goals.GOALS:
        for name in (goal.system, *goal.than, *([goal.less] if goal.less else [])):
            assert name in missing or (goal.table, goal.load, name) in measured, goal


def test_a_system_that_there_is_not_is_refused_by_name() -> None:
    result = CliRunner().invoke(main, ["--systems", "nginx,apache"])
    assert result.exit_code == 2
    assert "there is no apache" in result.output
    assert "ours-grpcio" in result.output


def test_messages_have_the_size_that_they_are_named_after_and_differ() -> None:
    for size in SIZES:
        traffic = size.traffic()
        assert {len(message) for message in traffic.messages} == {size.message_bytes}
        assert len(set(traffic.messages)) == bodies.COUNT
        assert traffic.answers == traffic.messages


def test_h2load_is_read() -> None:
    run = load.read(OUTPUT.format(succeeded=4, failed=0, data=2420), LOG, 4, 600)
    assert run == load.Run(requests_per_s=9756.10, mean_ms=2.5, p50_ms=2.5, p99_ms=pytest.approx(4, abs=1))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (OUTPUT.format(succeeded=3, failed=1, data=2420), "3 succeeded, 1 failed"),
        (OUTPUT.format(succeeded=4, failed=0, data=0), "0 bytes came back"),
        ("", "not understood"),
    ],
    ids=["failed", "gRPC error", "nothing"],
)
def test_a_run_in_which_not_all_was_answered_is_an_error(output: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load.read(output, LOG, 4, 600)


def test_goals_are_ratios_of_what_was_measured() -> None:
    found = {
        (each.goal.system, each.than, each.goal.most): (round(each.ratio, 3), each.met)
        for each in goals.outcomes(ROWS, {})
    }
    assert found == {
        ("ours-native", "plain-envoy", 0.6): (0.33, True),
        ("ours-native", "plain-envoy", 0.35): (0.33, True),
        ("ours-native", "haproxy", 1.3): (1.1, True),
        ("ours-native-10-tasks", "", 60): (61.0, False),
        ("ours-tf-native", "", 20): (19.0, True),
    }


def test_an_outcome_has_the_range_of_the_rounds_own_ratios() -> None:
    by_most = {outcome.goal.most: outcome for outcome in goals.outcomes(ROWS, {})}
    assert by_most[0.6].cells() == (
        *("gateway, 600B@128, CPU: ours-native / plain-envoy", "required", "0.33", "0.30 to 0.40", "at most 0.6"),
        "reached",
    )
    assert by_most[20].cells()[2:4] == ("19.00", "17.00 to 20.00")
    assert by_most[60].cells() == (
        *("gateway-tasks, 600B@128, memory: ours-native-10-tasks", "aim", "61.00", "61.00 to 61.00"),
        *("at most 60 MB", "**not reached**"),
    )


def test_the_best_of_several_is_the_best_by_the_figure() -> None:
    measured = {"ours": row(5, requests_per_s=30), "a": row(4, requests_per_s=20), "b": row(3, requests_per_s=10)}
    for figure, than in (("cpu_us_per_request", "b"), ("requests_per_s", "a")):
        goal = Goal(table="t", load="l", system="ours", than=("a", "b", "c"), most=1, figure=figure)
        outcome = goal.outcome(measured)
        assert outcome is not None
        assert outcome.than == than
        assert outcome.cells()[0].endswith(f"ours / {than} (the best)")


def test_what_took_no_time_that_is_counted_has_no_ratio() -> None:
    goal = Goal(table="t", load="l", system="a", than=("b",), most=1.0)
    assert goal.outcome({"a": row(450), "b": row(0)}) is None
    assert goal.outcome({"a": row(450)}) is None


def test_choosing_is_to_stay_flat() -> None:
    found = {outcome.goal.load: (outcome.ratio, outcome.met) for outcome in goals.outcomes({}, CHOICES)}
    assert found == {"random": (1.0, True), "costly": (16.0, False)}


def test_the_page_has_every_figure_and_goal() -> None:
    facts = {"date": "D", "cpu": "C", "cores": 2, "python": "3", "versions": {"nginx": "1.22"}, "command": "c"}
    report = Report(
        machine=facts | {"rounds": 3, "seconds": 1.5, "pinned": False, "load_before": 0.75},
        rows=ROWS,
        titles=TITLES,
        choices=CHOICES,
        stages=Stages(us={"receive": [1.0, 2.0, 3.0], "in all": [10.0, 20.0, 30.0]}),
        outcomes=goals.outcomes(ROWS, CHOICES),
        absent={"haproxy": "haproxy: apt-get install haproxy", "haproxy-tls": "haproxy: apt-get install haproxy"},
    )
    page = report.page()
    assert "nginx 1.22" in page
    assert "No process is pinned to a core. The machine is shared" in page
    assert "## Gateway: 600B@128" in page
    assert (
        "| plain-envoy | 100 | 90.0 to 110 | 1000 | 1000 to 1000 | 10.00 | 10.00 to 10.00 | 20.0 | 50 | 4.0 |" in page
    )
    assert all(f"| {' | '.join(outcome.cells())} |" in page for outcome in report.outcomes)
    assert "| costly | 0.40 | 6.40 | 102.40 |" in page
    assert "| receive | the transport calls the core" in page
    assert "| in all |  | 20.0 | " in page
    assert "as it is not installed (haproxy: apt-get install haproxy): haproxy, haproxy-tls" in page
    assert json.loads(json.dumps(report.values()))["stages"] == {"receive": 2.0, "in all": 20.0}


def test_where_it_was_measured_is_said() -> None:
    facts = machine.facts()
    assert {"pinned", "load_before", "cores"} <= set(facts)
    alone = machine.conditions({"pinned": True, "load_before": 0.0})
    assert alone == "All run on a part of its cores (affinity); nothing else ran in the minute before."


def test_the_same_figures_give_the_same_chart(tmp_path: Path) -> None:
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg(ROWS, TITLES, file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert all(name in one for name in ("ours-native", "plain-envoy", "Node: small@128"))


def test_the_stages_of_a_request_end_where_the_next_begin() -> None:
    asked, told = [(0, 8000), (10_000, 18_000)], [[at, at + 10_000] for at in (1000, 2000, 3000, 5000, 6000, 7000)]
    us = stages.split(asked, told)
    assert {name: each[0] for name, each in us.items()} == {
        **dict.fromkeys(stages.STAGES, 1.0),
        "batch": 2.0,
        "in all": 8.0,
    }
    with pytest.raises(LoadError, match="noted"):
        stages.split(asked, [times[:1] for times in told])
    with pytest.raises(LoadError, match="order"):
        stages.split(asked, list(reversed(told)))


def runs(pid: int) -> bool:
    """Whether the process is there, and no zombie, which an init of a container may leave."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_servers_children_count_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_S", 0.2)
    child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)\nwhile True: pass"
    parent = textwrap.dedent(f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print("serving on 127.0.0.1:%d" % child.pid, flush=True)
        time.sleep(60)
    """)
    with processes.announcing(sys.executable, "-c", parent) as server:
        pid = int(server.address.rpartition(":")[2])
        deadline = time.monotonic() + 30
        before = server.cpu_s()
        while server.cpu_s() < before + 0.2:
            assert time.monotonic() < deadline, "the child's time is not counted"
            time.sleep(0.01)
        assert server.memory_mb() > processes.Server(pid, "").memory_mb() > 1
        assert runs(pid)
    assert not runs(pid)


def test_a_server_that_does_not_start_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="ended with status 3"),
        processes.announcing(sys.executable, "-c", "import sys; sys.exit(3)"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="does not listen"),
        processes.listening(processes.free_address(), sys.executable, "-c", ""),
    ):
        pass
