"""What a node measures of itself, by a clock that the tests move."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from dl_inference_core.errors import (
    BadRequest,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    ModelNotFound,
    ModelNotReady,
)
from dl_inference_core.node import load
from dl_inference_core.node.batcher import BatchCost
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.model_threads import ModelThreads
from dl_inference_core.node.queue import RequestQueue
from dl_inference_core.wire import messages, orca
from dl_inference_core.wire.orca import Load


class Clock(SimpleNamespace):
    now = 1000.0
    cpu = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(load, "time", clock)
    return clock


def answered(meter: LoadMeter, error: InferenceError | None = None) -> Load | None:
    """What the next answer, or error, tells."""
    return orca.read(meter.answered(error))


def test_as_many_answers_a_second_as_were_asked_for_carry_a_report(clock: Clock) -> None:
    meter = LoadMeter(100)
    reports = []
    for _ in range(1000):
        clock.now += 0.001
        reports.append(answered(meter) is not None)
    assert not any(reports[:99]), "nothing can be said of less than a tenth of a second"
    assert 80 <= sum(reports) <= 90


def test_a_lone_request_is_answered_with_a_report(clock: Clock) -> None:
    meter = LoadMeter(100)
    for _ in range(5):
        clock.now += 0.2
        assert answered(meter) is not None


def test_answers_that_go_back_together_count_each(clock: Clock) -> None:
    meter = LoadMeter(100)
    told = None
    for _ in range(20):
        clock.now += 0.1
        told = orca.read(meter.answered(count=5))
    assert told is not None
    assert told.qps == pytest.approx(50, rel=0.1)


def test_no_reports(clock: Clock) -> None:
    meter = LoadMeter(0)
    for _ in range(5):
        clock.now += 1
        assert answered(meter) is None


def test_rates_are_those_of_the_last_two_seconds(clock: Clock) -> None:
    meter = LoadMeter(1000)

    def pass_by(seconds: float, per_s: int, error: InferenceError | None = None) -> Load:
        told = None
        for _ in range(int(seconds * per_s)):
            clock.now += 1 / per_s
            told = answered(meter, error) or told
        assert told is not None
        return told

    assert pass_by(3, 50).qps == pytest.approx(50, rel=0.1)
    assert pass_by(1, 150).qps == pytest.approx(100, rel=0.15)
    assert pass_by(2.2, 150).qps == pytest.approx(150, rel=0.1)
    assert pass_by(2.2, 150).eps == 0
    failing = pass_by(2.2, 40, HandlerFailed("as told"))
    assert (failing.qps, failing.eps) == (pytest.approx(40, rel=0.1), pytest.approx(40, rel=0.1))


def test_what_was_before_a_long_pause_is_forgotten_with_it(clock: Clock) -> None:
    meter = LoadMeter(1000)
    for _ in range(300):
        clock.now += 0.01
        answered(meter)
    clock.now += 600
    told = answered(meter)
    assert told is not None
    assert told.qps < 0.02
    for _ in range(11):
        clock.now += 0.01
        told = answered(meter)
    assert told is not None
    assert told.qps == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("cpus", "part"), [(0.5, 0.8), (1, 0.4), (4, 0.1)])
def test_cpu_utilization_is_a_part_of_the_cores_or_of_the_quota(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, cpus: float, part: float
) -> None:
    monkeypatch.setattr(load, "available_cpus", lambda: cpus)
    meter = LoadMeter(1000)
    clock.now += 1
    clock.cpu += 0.4
    report = messages.OrcaLoadReport.FromString(dict(meter.answered())[orca.KEY])
    assert report.cpu_utilization == pytest.approx(part)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (HandlerFailed("as told"), True),
        (ModelNotReady("as told"), True),
        (BadRequest("as told"), False),
        (ModelNotFound("as told"), False),
        (DeadlineExceeded("as told"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, InferenceError) else None,
)
def test_only_failures_of_the_nodes_own_count(clock: Clock, error: InferenceError, counts: bool) -> None:
    meter = LoadMeter(1000)
    for _ in range(9):
        answered(meter, error)
    clock.now += 1
    told = answered(meter)
    assert told == Load(utilization=0, qps=10 if counts else 1, eps=9 if counts else 0)


def test_utilization_is_that_of_the_busiest_version(clock: Clock) -> None:
    meter = LoadMeter(1000)
    seconds = {"one": 100.0, "two": 0.0}  # one has been loading
    one = meter.watch(lambda: seconds["one"], threads=1)
    meter.watch(lambda: seconds["two"], threads=4)

    def after(spent: float, by: str) -> float:
        clock.now += 10
        seconds[by] += spent
        told = answered(meter)
        assert told is not None
        return told.utilization

    assert after(1.0, by="one") == pytest.approx(0.1)
    assert after(8.0, by="two") == pytest.approx(0.2)
    assert after(8.0, by="one") == pytest.approx(0.8)
    clock.now += 10
    seconds["one"] += 8
    seconds["two"] += 2
    meter.forget(one)
    told = answered(meter)
    assert told is not None
    assert told.utilization == pytest.approx(0.05)


def test_the_processor_is_told_of_beside_it(clock: Clock) -> None:
    meter = LoadMeter(1000)
    clock.now += 1
    clock.cpu += 1
    report = messages.OrcaLoadReport.FromString(dict(meter.answered())[orca.KEY])
    assert 0 < report.cpu_utilization <= 1
    assert report.application_utilization == 0


async def test_threads_count_the_function_that_they_are_running() -> None:
    queue = RequestQueue("m/1", BatchCost(), lambda request, error: None)
    threads = ModelThreads("m/1", queue, lambda request, thread: 0)
    threads.grow(2)
    begun, go_on = threading.Barrier(3, timeout=10), threading.Event()

    def work() -> None:
        begun.wait()
        go_on.wait(10)

    running = [asyncio.ensure_future(threads.run(work)) for _ in range(2)]
    await asyncio.to_thread(begun.wait)
    before = threads.worked()
    await asyncio.sleep(0.05)
    spent = threads.worked() - before
    assert spent >= 0.1, "two threads, each for 0.05 s"
    go_on.set()
    await asyncio.gather(*running)
    await threads.close(lambda: None)
    after = threads.worked()
    assert after >= before + spent
    await asyncio.sleep(0.02)
    assert threads.worked() == after
