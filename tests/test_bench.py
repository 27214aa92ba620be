"""The benchmark measures what is installed, and its output is whole; the figures are not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import chart, choices, goals, load, peers, processes, systems
from bench.__main__ import main
from bench.choices import Choice
from bench.core import loads
from bench.core.measuring import PARTS
from bench.core.report import ROWS as CORE_ROWS
from bench.core.report import TABLE, UNIT
from bench.core.report import Report as CoreReport
from bench.load import LoadError
from bench.report import Report
from bench.rounds import MODEL_SIZES, SIZES, Row

ROOT = Path(__file__).parents[1]
OUTPUT = """\
finished in 2.05s, 9756.10 req/s, 5.87MB/s
requests: 4 total, 4 started, 4 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 4 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 12.06MB (12648112) total, 12.34KB (123) headers (space savings 96.62%), 11.54MB ({data}) data
"""
LOG = "".join(f"1764000000000000\t200\t{latency_us}\t1\n" for latency_us in (1000, 2000, 3000, 4000))


def row(cpu_us: float) -> Row:
    return Row(
        cpu_us_per_request=cpu_us,
        cpu_us_least=cpu_us - 1,
        cpu_us_most=cpu_us + 1,
        requests_per_s=1e6 / cpu_us,
        p50_ms=10.0,
        p99_ms=20.0,
        alone_p50_ms=1.0,
        memory_mb=50.0,
    )


ROWS = {
    "gateway": {
        "600B": {
            "ours-grpcio": row(450),
            "proxy-grpcio": row(375),
            "echo-grpcio": row(200),
            "plain-envoy": row(100),
        }
    },
    "node": {"echo@128": {"echo-grpcio": row(200)}},
}
CHOICES = {
    "random": {choices.size(nodes): Choice(cpu_us_per_request=0.25) for nodes in choices.NODES},
    "costly": {choices.size(nodes): Choice(cpu_us_per_request=nodes / 10) for nodes in choices.NODES},
}


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_a_quick_run_measures_every_system_that_is_installed_at_every_size() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    tables = systems.installed()
    assert {table.name for table in tables} >= {"gateway", "node"}
    assert set(result) == {"machine", *(table.name for table in tables), goals.CHOICES, "goals", "absent"}
    for table in tables:
        assert set(result[table.name]) == {size.name if table.node else size.node_name for size in table.sizes}
        for rows in result[table.name].values():
            assert set(rows) == {system.name for system in table.systems}
            # In so short a run one may use less CPU than a tick of the clock.
            empty = [(name, each) for name, figures in rows.items() for each in figures if figures[each] <= 0]
            assert [(name, each) for name, each in empty if not each.startswith("cpu")] == []
            assert len(empty) < len(rows)
            assert all(set(figures) == set(asdict(row(1))) for figures in rows.values())
    assert set(result[goals.CHOICES]) == set(choices.strategies())
    sizes = {choices.size(nodes) for nodes in choices.NODES}
    assert all(set(by_size) == sizes for by_size in result[goals.CHOICES].values())
    assert any(
        choice["cpu_us_per_request"] > 0 for by_size in result[goals.CHOICES].values() for choice in by_size.values()
    )
    assert set(result["absent"]) == set(systems.absent(systems.NAMES))
    assert {"date", "cpu", "cores", "python", "versions", "command"} <= set(result["machine"])
    assert {"dl-inference-core", "grpcio", "h2load"} <= set(result["machine"]["versions"])
    assert {goal["system"] for goal in result["goals"]} >= {"ours-grpcio"}


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
    report = CoreReport(machine={}, samples=samples, batch_rows=2.0)
    assert asdict(report.costs()["gateway_1"]) == {
        "cpu_us_per_request": 5.0,
        "cpu_us_least": 4.0,
        "cpu_us_most": 10.0,
    }
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
    assert systems.absent(("nginx", "haproxy", "ours-grpcio")) == {
        "nginx": "apt-get install nginx-light",
        "haproxy": "apt-get install haproxy",
    }


def test_only_the_systems_asked_for_are_measured() -> None:
    found = systems.installed(("echo-grpcio", "proxy-grpcio"))
    assert {table.name: [system.name for system in table.systems] for table in found} == {
        "gateway": ["echo-grpcio", "proxy-grpcio"],
        "node": ["echo-grpcio"],
    }
    assert [table.name for table in systems.installed(("proxy-grpcio",))] == ["gateway"]


def test_a_system_that_there_is_not_is_refused_by_name() -> None:
    result = CliRunner().invoke(main, ["--systems", "nginx,apache"])
    assert result.exit_code == 2
    assert "there is no apache" in result.output
    assert "ours-grpcio" in result.output


def test_a_message_has_the_size_that_it_is_named_after() -> None:
    for size in (*SIZES, *MODEL_SIZES):
        assert len(size.message()) == size.message_bytes


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
        (outcome.goal.table, outcome.goal.figure, outcome.goal.than): outcome for outcome in goals.outcomes(ROWS, {})
    }
    assert {key: (round(outcome.ratio, 3), outcome.met) for key, outcome in found.items()} == {
        ("gateway", "cpu_us_per_request", "echo-grpcio"): (2.25, True),
        ("gateway", "cpu_us_per_request", "proxy-grpcio"): (1.2, False),
    }
    assert str(found["gateway", "cpu_us_per_request", "proxy-grpcio"]) == (
        "gateway, 600B, CPU: ours-grpcio / proxy-grpcio = 1.20, at most 1.15: NOT met"
    )


def test_what_took_no_time_that_is_counted_has_no_ratio() -> None:
    nothing = replace(row(1), cpu_us_per_request=0.0)
    rows = {"gateway": {"600B": {"ours-grpcio": row(450), "proxy-grpcio": nothing, "echo-grpcio": row(200)}}}
    assert [outcome.goal.than for outcome in goals.outcomes(rows, {})] == ["echo-grpcio"]


def test_choosing_is_to_stay_flat() -> None:
    found = {outcome.goal.load: (outcome.ratio, outcome.met) for outcome in goals.outcomes({}, CHOICES)}
    assert found == {"random": (1.0, True), "costly": (16.0, False)}


def test_the_page_has_every_figure_and_goal() -> None:
    machine = {"date": "D", "cpu": "C", "cores": 2, "python": "3", "versions": {"nginx": "1.22"}, "command": "c"}
    report = Report(
        machine=machine | {"rounds": 5, "loads": "600B: 16 connections"},
        rows=ROWS,
        titles={"gateway": "Gateway", "node": "Node"},
        choices=CHOICES,
        outcomes=goals.outcomes(ROWS, CHOICES),
        absent={"haproxy": "apt-get install haproxy"},
    )
    page = report.page()
    assert "nginx 1.22" in page
    assert "## Gateway: 600B" in page
    assert "| echo-grpcio | 200 | 199 to 201 | 5000 | 10.0 | 20.0 | 1.00 | 50 |" in page
    assert all(str(outcome) in page for outcome in report.outcomes)
    assert "| costly | 0.40 | 6.40 | 102.40 |" in page
    assert "apt-get install haproxy" in page
    json.dumps(report.values())


def test_the_same_figures_give_the_same_chart(tmp_path: Path) -> None:
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg(ROWS, {"gateway": "Gateway", "node": "Node"}, file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert all(name in one for name in ("ours-grpcio", "echo-grpcio", "Node: echo@128"))


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
