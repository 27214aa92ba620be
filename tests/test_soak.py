"""A short soak answers every request; and what its verdict would say of what is left behind."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.soak import chart, traffic, verdict
from bench.soak.__main__ import main
from bench.soak.course import Pace, Sample, Soak
from bench.soak.report import Report
from bench.soak.traffic import KINDS, End, Kind, Traffic

ROOT = Path(__file__).parents[1]
SECONDS = range(540)
NOISE = np.random.default_rng(1).normal(0, 1, len(SECONDS))


def growing(mb_per_hour: float, noise: Any) -> list[float]:
    return list(200 + np.array(SECONDS) * mb_per_hour / 3600 + noise)


# The slope


def test_the_slope_of_a_line_is_exact() -> None:
    found = verdict.slope([0, 900, 1800, 2700, 3600], [100, 125, 150, 175, 200])
    assert (found.per_hour, found.low, found.high) == pytest.approx((100, 100, 100))


def test_the_interval_is_students() -> None:
    seconds = [3600 * hour for hour in range(6)]
    found = verdict.slope(seconds, [0, 2, 1, 3, 2, 4])
    assert found.per_hour == pytest.approx(0.6286, abs=1e-4)  # these are what scipy.stats.linregress finds
    assert found.high - found.per_hour == pytest.approx(found.per_hour - found.low)
    assert found.high - found.per_hour == pytest.approx(0.5829, rel=0.01)


def test_the_interval_holds_the_slope_19_times_in_20() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        found = verdict.slope(SECONDS, growing(30, random.normal(0, 1, len(SECONDS))))
        held += found.low <= 30 <= found.high
    assert 0.91 < held / 400 < 0.98


# The verdict


@pytest.mark.parametrize(
    ("mb_per_hour", "noise", "met"),
    [
        (0, NOISE, True),
        (-60, NOISE, True),
        (4, 0 * NOISE, True),
        (6, 0 * NOISE, False),
        (60, NOISE, False),
        (60, 3 * np.sin(np.array(SECONDS) / 20), False),
    ],
    ids=["flat", "shrinking", "too little to matter", "slow and sure", "growing", "growing, with waves"],
)
def test_memory_that_grows_is_found(mb_per_hour: float, noise: Any, met: bool) -> None:
    found = verdict.memory(verdict.slope(SECONDS, growing(mb_per_hour, noise)))
    assert found.met is met
    assert str(found).endswith(": met" if met else ": NOT met")


@pytest.mark.parametrize("name", verdict.ALLOWED)
def test_more_than_is_allowed_at_rest_is_found(name: str) -> None:
    allowed = verdict.ALLOWED[name]
    assert verdict.level(name, 50, 50 + allowed).met
    assert verdict.level(name, 50, 40).met
    assert not verdict.level(name, 50, 51 + allowed).met


def test_a_request_that_ended_wrongly_or_not_at_all_is_found() -> None:
    may = {"small": {"OK"}, "cancelled": {"OK", "CANCELLED"}}
    good = {"small": {"OK": 3}, "cancelled": {"OK": 1, "CANCELLED": 1}}
    assert verdict.answered({"small": 3, "cancelled": 2}, good, may).met
    wrong = verdict.answered({"small": 3, "cancelled": 3}, {**good, "small": {"OK": 2, "UNAVAILABLE": 1}}, may)
    assert not wrong.met
    assert wrong.said == "1 of small ended UNAVAILABLE; 3 of cancelled sent, 2 ended"
    assert not verdict.answered({}, {}, may).met


# The traffic


async def test_what_ends_wrongly_raises_or_hangs_is_recorded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(_: Any) -> End:
        return End("UNAVAILABLE", "no node")

    async def broken(_: Any) -> End:
        raise ConnectionResetError("gone")

    async def hanging(_: Any) -> End:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(traffic, "_HANGS_S", 0.05)
    found = Traffic(None, rate=1, seed=1)  # type: ignore[arg-type]
    for send in (refused, broken, hanging):
        await found.send(Kind(name=send.__name__, share=1, expected=frozenset({"OK"}), send=send), 2)
    assert found.ended == {
        "refused": {"UNAVAILABLE": 2},
        "broken": {"ConnectionResetError": 2},
        "hanging": {"HANGS": 2},
    }
    assert found.failed == 6
    assert [failure.detail for failure in found.failures][::2] == ["no node", "gone", "no end within 0 s"]
    assert found.in_flight == 0


# The whole


def test_a_short_soak_answers_every_request(transport: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--transport", transport, "--minutes", "0.15", "--warm-up", "3"]
    command += ["--rate", "100", "--reload", "1", "--restart", "2", "--json", "--out", str(tmp_path / "soak.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode in (0, 1), run.stderr
    result = json.loads(run.stdout)
    rules = {finding["rule"]: finding for finding in result["findings"]}
    assert set(rules) == {"answered", "memory", *verdict.ALLOWED}
    assert rules["answered"]["met"], (rules["answered"], result["failures"])
    assert set(result["requests"]) == {kind.name for kind in KINDS}
    assert sum(kind["sent"] for kind in result["requests"].values()) > 500
    assert result["settings"]["reloads"] >= 5
    assert result["settings"]["restarts"] >= 2
    assert all(sample["tasks"] > 0 and sample["descriptors"] > 0 for sample in result["samples"])
    assert {sample["phase"] for sample in result["samples"]} == {"warm-up", "busy", "rest"}
    assert json.loads((tmp_path / "soak.json").read_text(encoding="utf-8")) == result


def test_a_transport_that_there_is_not_and_a_time_without_an_end_are_refused() -> None:
    assert "pigeon" in CliRunner().invoke(main, ["--transport", "pigeon"]).output
    result = CliRunner().invoke(main, ["--minutes", "1"])
    assert result.exit_code == 2
    assert "no time left after the warm-up" in result.output


async def test_the_page_and_the_chart_have_what_was_found(tmp_path: Path) -> None:
    found = Traffic(None, rate=1, seed=1)  # type: ignore[arg-type]
    found.sent["small"], found.ended["small"]["OK"] = 5900, 5900
    soak = Soak(None, found, Pace(busy_s=50, warm_up_s=5, reload_s=1, restart_s=1), lambda _: None)  # type: ignore[arg-type]
    soak.samples = [
        Sample(
            at_s=float(second),
            phase="rest" if second > 50 else "busy",
            memory_mb=200 + second / 10,
            descriptors=50,
            threads=20,
            tasks=7,
            in_flight=3,
            ended={"OK": 100 * second, "CANCELLED": second},
            failed=0,
        )
        for second in range(60)
    ]
    soak.rests = [soak.samples[-1], replace(soak.samples[-1], tasks=9)]
    report = Report(
        machine={"date": "D", "cpu": "C", "cores": 2, "python": "3", "versions": {"grpcio": "1.85"}, "command": "c"},
        settings={"transport": "grpcio", "nodes": "n", "minutes": 1, "rate": 400.0, "warm_up_s": 5.0, "reloads": 3}
        | {"restarts": 3},
        soak=soak,
        findings=soak.findings(),
    )
    assert not report.met
    page = report.page()
    assert "- answered: all of 5900 requests as they should be: met" in page
    assert "- memory: +360.0 MB/h, 95 % within +360.0 and +360.0: NOT met" in page
    assert "- descriptors: 50 before, 50 at the end: met" in page
    assert "- tasks: 7 before, 9 at the end: NOT met" in page
    assert "| small | 5900 | OK 5900 | OK |" in page
    assert json.loads(json.dumps(report.values()))["samples"][0]["memory_mb"] == 200
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg(soak.samples, file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert "memory, MB" in one
