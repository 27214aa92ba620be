"""The runs: each makes findings for rows of the scorecard, of one system at one load."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.faults import course, figures
from bench.faults.course import CAPACITY, FAULTS, FIGURES, INVALID_ARGUMENT, LOADS, NODES, Course, Mark, Pace
from bench.faults.gateways import System
from bench.faults.goals import LEAST_REQUESTS, Finding, judged
from bench.faults.proxy import MODES

_PLAIN = ("requests", "failed", "client_late_p99_ms")
_OK, _DEADLINE_EXCEEDED, _RESOURCE_EXHAUSTED, _UNAVAILABLE = 0, 4, 8, 14


@dataclass(slots=True, kw_only=True)
class Findings:
    """What one run came to.

    Attributes:
        series: counts over time of the runs that have them.
    """

    of: list[Finding] = field(default_factory=list)
    series: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One run.

    Attributes:
        name: what it is called on the terminal.
        rows: the rows that it makes findings for.
        run: makes them.
        seconds: that it takes, about.
        isolated: whether it takes network namespaces.
    """

    name: str
    rows: tuple[str, ...]
    system: System
    load: str
    seconds: float
    run: Callable[[], Findings]
    isolated: bool = False

    def absent(self, why: str) -> list[Finding]:
        """Its findings, none of which was measured."""
        return [judged(row, finding(self.system, self.load, {}, why=why)) for row in self.rows]


def finding(system: System, load: str, values: Mapping[str, float], why: str = "") -> Finding:
    """Without goals yet."""
    return Finding(
        row="",
        system=system.title if system.ours else system.name,
        transport=system.transport,
        strategy=system.strategy,
        load=load,
        figures={name: round(float(value), 4) for name, value in values.items()},
        why=why,
    )


def _chosen(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: values[name] for name in (*_PLAIN, *names)}


def _series(run: Course, name: str, load: str) -> dict[str, Any]:
    return {"run": name, "system": run.stage.system.title, "load": load, **run.series()}


def single(row: str, system: System, load: str, pace: Pace, seed: int) -> Findings:
    """One fault in a run of its own, with requests enough to say that none failed; and the recovery from it."""
    fault, rate = FAULTS[row], LOADS[load]
    enough_s = LEAST_REQUESTS * 1.03 / rate if pace.enough else 0.0
    after_s = max(pace.after_s, enough_s - pace.warm_s - pace.fault_s)
    with course.run(system, rate, seed, isolated=(0,) if fault.isolated else ()) as run:
        run.warm(pace.warm_s)
        mark = course.faulted(run, fault, 0, pace, after_s)
    values = course.during(run, mark) | {"failed": len(run.requests.failed)}
    return Findings(of=_of_fault(row, system, load, values, pace.enough), series=[_series(run, row, load)])


def _of_fault(row: str, system: System, load: str, values: Mapping[str, float], enough: bool) -> list[Finding]:
    found = [judged(row, finding(system, load, _chosen(values, FIGURES[row])), enough=enough)]
    if FAULTS[row].recovery:
        found.append(judged("F7", finding(system, f"{load}, {row}", _chosen(values, FIGURES["F7"]))))
    return found


def several(rows: Sequence[str], system: System, load: str, pace: Pace, seed: int) -> Findings:
    """Several faults of one run, each of another node, all of whose requests count; a failure belongs to the fault in
    whose time it came."""
    isolated = [number % NODES for number, row in enumerate(rows) if FAULTS[row].isolated]
    marks: list[Mark] = []
    with course.run(system, LOADS[load], seed, isolated=isolated) as run:
        run.warm(pace.warm_s)
        for number, row in enumerate(rows):
            marks.append(course.faulted(run, FAULTS[row], number % NODES, pace))
    found = Findings(series=[_series(run, "several", load)])
    for mark in marks:
        found.of += _of_fault(mark.row, system, load, course.during(run, mark), pace.enough)
    return found


def cascade(system: System, pace: Pace, seed: int) -> Findings:
    """Three of four nodes die at once, then the last; then one comes back."""
    rate = 0.67 * CAPACITY
    dead_s = pace.fault_s / 2
    with course.run(system, rate, seed) as run:
        run.warm(pace.warm_s)
        nodes = run.stage.nodes
        with run.fault("F1b", 0, 1, 2, after_s=0.0) as some:
            for node in nodes[:3]:
                assert node.server is not None
                node.server.kill()
            run.wait(dead_s)
        with run.fault("F1b", 0, 1, 2, 3, after_s=pace.after_s) as every:
            nodes[3].kill()
            for node in nodes[:3]:
                node.kill()
            run.wait(dead_s)
            nodes[3].start()
            every.healed = time.monotonic()
    dead = [run.attempts[number].arrived(end=some.began) for number in range(3)]
    answered = [run.attempts[number].answered(end=some.began) for number in range(3)]
    in_flight = sum(len(came) - len(went) for came, went in zip(dead, answered, strict=True))
    failed = run.requests.failed.ended_within(some.began, every.began)
    without = run.requests.due_within(every.began + 0.2, every.healed - 1.0)
    unavailable = without.among(without.code == _UNAVAILABLE)
    back = run.requests.succeeded
    back = back.among(back.ended > every.healed)
    values = run.plain() | {
        "failed": len(failed),
        "failed_beyond_in_flight": max(0, len(failed) - in_flight),
        "failed_after_200ms": len(failed.among(failed.due > some.began + 0.2)),
        "timeouts_without_nodes": int((without.code == _DEADLINE_EXCEEDED).sum()),
        "unavailable_p99_ms": unavailable.percentile_ms(99),
        "first_success_s": float(back.ended.min()) - every.healed if len(back) else math.inf,
    }
    return Findings(of=[judged("F1b", finding(system, "67 % of one", values))], series=[_series(run, "F1b", "67 %")])


def eleven(system: System, pace: Pace, seed: int) -> Findings:
    """Eleven nodes of which one is slow for half the time, and clients that wait for 1 s.

    Source: Linkerd's "Beyond round robin", whose clients got 95 % from round robin, 99 % from least loaded, and 99.9 %
    from peak EWMA.
    """
    half_s = 1.25 * pace.fault_s
    behaviour = {"latency_ms": 20.0, "at_once": 1000}
    with course.run(system, 300.0, seed, nodes=11, behaviour=behaviour, load={"deadline_ms": 1000.0}) as run:
        run.warm(half_s)
        with run.fault("F4-eleven", 0, after_s=0.0) as mark:
            run.stage.nodes[0].tell(latency_ms=2000.0)
            run.wait(half_s)
    values = run.plain() | {
        "success_percent": 100.0 * len(run.requests.succeeded) / len(run.requests),
        "p99_ms": run.requests.percentile_ms(99),
        "share_of_fair": figures.share_of_fair(run.attempts, (0,), mark.began, mark.healed),
    }
    return Findings(of=[judged("F4-eleven", finding(system, "300/s", values))])


def client_faults(system: System, load: str, pace: Pace, seed: int) -> Findings:
    """A node says INVALID_ARGUMENT to all; then clients cancel what they have sent. Neither is anybody's fault."""
    rate = LOADS[load]
    with course.run(system, rate, seed, load={"deadline_ms": 2000.0}) as run:
        run.warm(pace.warm_s)
        ejections = run.stage.ejections()
        with run.fault("F5b", 0, after_s=0.0) as codes:
            run.stage.nodes[0].tell(status=INVALID_ARGUMENT)
            run.wait(pace.fault_s)
        run.stage.nodes[0].tell(status=0)
        with run.fault("F5b", after_s=pace.after_s) as cancels:
            run.sending.change(cancel_ms=15.0)
            run.wait(pace.fault_s)
            run.sending.change(cancel_ms=0.0)
        ejected = run.healthy_ejected(ejections, ())
    least, most = math.inf, -math.inf
    for begin, end in ((codes.began, codes.healed), (cancels.healed + 0.5, cancels.until)):
        low, high = run.fair_shares(begin, end)
        least, most = min(least, low), max(most, high)
    came = sum(len(node.arrived()) for node in run.attempts)
    wrong = run.requests.among(~np.isin(run.requests.code, (_OK, INVALID_ARGUMENT, 1)))
    values = run.plain() | {
        "failed": len(wrong),
        "retries": max(0, came - len(run.requests)),
        "ejections": ejected,
        "starved_seconds": figures.starved_seconds(run.attempts, range(NODES), run.control[0], cancels.until),
        "least_share_of_fair": least,
        "most_share_of_fair": most,
    }
    return Findings(of=[judged("F5b", finding(system, load, values))])


def flapping(system: System, load: str, pace: Pace, seed: int) -> Findings:
    """A node that comes and goes, then another of whose answers half are errors."""
    with course.run(system, LOADS[load], seed) as run:
        run.warm(pace.warm_s)
        ejections = run.stage.ejections()
        flapped = course.flap(run, 0, pace.fault_s)
        with run.fault("F6", 1, after_s=2.0) as halved:
            run.stage.nodes[1].tell(status=_UNAVAILABLE, status_share=0.5)
            run.wait(pace.fault_s)
            run.stage.nodes[1].tell(status=0, status_share=1.0)
        ejected = run.healthy_ejected(ejections, (0, 1))
    window = run.requests.due_within(flapped.began, halved.until)
    values = run.plain() | {
        "failed": len(window.failed),
        "failed_percent": 100.0 * len(window.failed) / len(window),
        "attempts_per_request": max(
            figures.per_request(run.attempts, run.requests, mark.began, mark.healed) for mark in (flapped, halved)
        ),
        "starved_seconds": figures.starved_seconds(run.attempts, (2, 3), flapped.began, halved.until),
        "healthy_ejected": ejected,
    }
    return Findings(of=[judged("F6", finding(system, load, values))], series=[_series(run, "F6", load)])


def overload(system: System, pace: Pace, seed: int) -> Findings:
    """Up to 1.74 times what the nodes can do, with a limit on what each has in flight, and a short queue."""
    behaviour = {"latency_ms": 50.0, "at_once": 3}
    capacity = NODES * 3 / 0.05
    limited = system.having(route={**system.route, "node_in_flight": 4, "queue": 12})
    with course.run(limited, 0.4 * capacity, seed, behaviour=behaviour) as run:
        run.warm(pace.warm_s)
        with run.fault("F8", after_s=0.0):
            run.sending.change(rate=1.2 * capacity)
            run.wait(pace.fault_s / 2)
        with run.fault("F8", after_s=0.0) as most:
            run.sending.change(rate=1.74 * capacity)
            run.wait(pace.fault_s)
        run.sending.change(rate=0.4 * capacity)
        run.wait(1.0)
    begin, end = most.began + 0.5, most.healed
    window = run.requests.due_within(begin, end)
    rejected = window.among(window.code == _RESOURCE_EXHAUSTED)
    answered = run.requests.succeeded.ended_within(begin, end)
    others = window.among(~np.isin(window.code, (_OK, _RESOURCE_EXHAUSTED)))
    values = run.plain() | {
        "failed": len(window.failed),
        "neither_answered_nor_rejected": len(others),
        "goodput_of_capacity": len(answered) / (end - begin) / capacity,
        "accepted_p99_ratio": run.p99_ratio(begin, end),
        "rejection_p99_ms": rejected.percentile_of_answer_ms(99),
    }
    return Findings(of=[judged("F8", finding(limited, "174 %", values))], series=[_series(run, "F8", "174 %")])


def all_fail(system: System, load: str, pace: Pace, seed: int) -> Findings:
    """Every node answers with an error at once, for a while."""
    after_s = 10.0 if pace.enough else 4.0
    with course.run(system, LOADS[load], seed) as run:
        run.warm(pace.warm_s)
        with run.fault("F9", *range(NODES), after_s=after_s) as mark:
            for node in run.stage.nodes:
                node.tell(status=_UNAVAILABLE)
            run.wait(pace.fault_s)
            for node in run.stage.nodes:
                node.tell(status=0)
    late = (mark.until - 2.0, mark.until - 0.2)
    values = run.plain() | {
        "failed": len(run.requests.failed),
        "attempts_per_request": figures.per_request(run.attempts, run.requests, mark.began, mark.healed),
        "attempts_after_10s": figures.per_request(run.attempts, run.requests, *late),
        "failed_after": len(run.requests.due_within(*late).failed),
    }
    # Rates over so short a time differ by what is under way at its ends.
    return Findings(of=[judged("F9", finding(system, load, values))], series=[_series(run, "F9", load)])


def rolling(system: System, load: str, pace: Pace, seed: int) -> Findings:
    """Each node in turn is told to end, and started again, every 10 s."""
    every_s = 10.0 if pace.enough else 2.5
    rate = LOADS[load]
    enough = LEAST_REQUESTS * 1.03 / rate if pace.enough else 0.0
    with course.run(system, rate, seed) as run:
        run.warm(pace.warm_s)
        turn = 0
        while time.monotonic() - run.began < enough or turn < (NODES if pace.enough else 2):
            with run.fault("L5", turn % NODES, after_s=0.0) as mark:
                run.stage.nodes[turn % NODES].restart()
            run.wait(mark.began + every_s - time.monotonic())
            turn += 1
    values = run.plain() | {"restarts": turn}
    return Findings(of=[judged("L5", finding(system, load, values), enough=pace.enough)])


def without_ejection(
    rows: Sequence[str], system: System, load: str, pace: Pace, seed: int, measured: Sequence[Finding]
) -> Findings:
    """These rows and flapping with ejection off, beside what was `measured` with it in this session, or is now."""

    def both(gateway: System) -> list[Finding]:
        return [*several(rows, gateway, load, pace, seed).of, *flapping(gateway, load, pace, seed).of]

    wanted = {*rows, "F6"}
    mine = [each for each in measured if each.system == system.title and each.load == load and not each.why]
    mine = [each for each in mine if each.row in wanted]
    if {each.row for each in mine} < wanted:
        mine = both(system)
    off = both(system.having(gateway={"health": {"max_ejected": 0.0}}))
    failed = {each.row: each.figures["failed"] for each in off if each.row in wanted}
    mine = [each for each in mine if each.row in failed]
    values = {
        "requests": max(each.figures["requests"] for each in mine),
        "failed": sum(each.figures["failed"] for each in mine),
        "failed_without_ejection": sum(failed.values()),
        "worse_than_without_ejection": max(each.figures["failed"] - failed[each.row] for each in mine),
        "starved_seconds": sum(each.figures["starved_seconds"] for each in mine),
        "healthy_ejected": sum(each.figures["healthy_ejected"] for each in mine),
    }
    return Findings(of=[judged("F10", finding(system, load, values))])


_START_S = 4.0


def seconds_of(pace: Pace, faults: int = 1, *, enough_at: str = "") -> float:
    """That a run takes, about."""
    busy = pace.warm_s + faults * (pace.fault_s + pace.after_s)
    if enough_at and pace.enough:
        busy = max(busy, LEAST_REQUESTS * 1.03 / LOADS[enough_at])
    return _START_S + busy


def broken_connections(system: System, load: str, pace: Pace, seed: int) -> Findings:
    """What one node sends is held up, cut off and spoilt on the way, a third of a fault's time each."""
    with course.run(system, LOADS[load], seed, proxied=True) as run:
        run.warm(pace.warm_s)
        assert run.stage.proxy is not None
        begins = {}
        for mode in MODES[1:]:
            with run.fault("F11", 0, after_s=0.0) as mark:
                run.stage.proxy.tell(mode)
                run.wait(pace.fault_s / 2)
            begins[mode] = mark.began
            run.stage.proxy.tell("pass")
            run.wait(1.0)
    failed = {
        f"failed_{mode.replace('-', '_')}": len(run.requests.failed.ended_within(begin, begin + pace.fault_s / 2 + 1.0))
        for mode, begin in begins.items()
    }
    values = run.plain() | {"failed": len(run.requests.failed)} | failed
    return Findings(of=[judged("F11", finding(system, load, values))], series=[_series(run, "F11", load)])
