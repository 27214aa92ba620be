"""The course of a run: clients send by the clock while faults are done to nodes one after the other, and healed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.faults import figures
from bench.faults.client import Load
from bench.faults.figures import Attempts, Records
from bench.faults.gateways import TIMEOUT_MS, System
from bench.faults.node import Behaviour
from bench.faults.stage import Node, Sending, Stage, set_up

NODES = 4
CAPACITY = Behaviour().at_once / Behaviour().latency_ms * 1000
"""Requests a second of one node."""
LOADS: Mapping[str, float] = {"40 %": 0.4 * NODES * CAPACITY, "67 %": 0.67 * (NODES - 1) * CAPACITY}
"""Requests a second: of the capacity of all nodes, and of those that are left when one of four is out."""

UNAVAILABLE, INTERNAL, INVALID_ARGUMENT = 14, 13, 3
_SLOWER = 10
_FLAP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of a run.

    Attributes:
        warm_s: before a fault; the second half of it is the control.
        fault_s: that a fault lasts.
        after_s: in which things go back to what they were.
        enough: whether runs are made long enough for the goals that take many requests.
    """

    warm_s: float = 10.0
    fault_s: float = 12.0
    after_s: float = 10.0
    enough: bool = True


FULL = Pace()
BRIEF = Pace(warm_s=8.0, fault_s=6.0, after_s=4.0)
"""Of each of several faults in one run."""
ONCE = Pace(warm_s=4.0, fault_s=5.0, after_s=3.0)
"""Where it does not take many requests."""
SHORT = Pace(warm_s=3.0, fault_s=3.0, after_s=2.5, enough=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is done to a node, and how it is undone.

    Attributes:
        row: of the scorecard.
        isolated: whether the node needs a network of its own.
        recovery: whether coming back is a row of its own.
    """

    row: str
    inject: Callable[[Node], None]
    heal: Callable[[Node], None]
    isolated: bool = False
    recovery: bool = False


FAULTS: Mapping[str, Fault] = {
    fault.row: fault
    for fault in (
        Fault(row="F1", inject=Node.kill, heal=Node.start, recovery=True),
        Fault(row="F2", inject=Node.freeze, heal=Node.thaw, recovery=True),
        Fault(row="F3", inject=Node.swallow, heal=Node.heal, isolated=True, recovery=True),
        Fault(
            row="F4",
            inject=lambda node: node.tell(latency_ms=_SLOWER * Behaviour().latency_ms, at_once=_SLOWER * 6),
            heal=lambda node: node.tell(latency_ms=Behaviour().latency_ms, at_once=Behaviour().at_once),
        ),
        Fault(
            row="F5",
            inject=lambda node: node.tell(status=UNAVAILABLE, health="not serving"),
            heal=lambda node: node.tell(status=0, health="serving"),
        ),
        Fault(
            row="F5-lies",
            inject=lambda node: node.tell(status=INTERNAL),
            heal=lambda node: node.tell(status=0),
        ),
    )
}


@dataclass(slots=True, kw_only=True)
class Mark:
    """A fault's time, by time.monotonic.

    Attributes:
        nodes: those that had it.
        healed: when what was wrong was over; `until` is when that stopped being looked at.
        routed: attempts at those nodes and at all, by the gateway's own account, from a while after it began until it
            was healed; None if it does not tell.
        healthy_ejected: times that another node was left out in between, by the gateway's own account.
    """

    row: str
    nodes: tuple[int, ...]
    began: float
    healed: float = 0.0
    until: float = 0.0
    routed: tuple[float, float] | None = None
    healthy_ejected: float = math.nan


@dataclass(slots=True, kw_only=True)
class Course:
    """One run. The requests and attempts are there once it is over.

    Attributes:
        control: the part of it without a fault that others are compared with.
        series: counts over time, as of `figures.series`.
        lateness_ms: the 99th percentile of how late the client sent.
    """

    stage: Stage
    sending: Sending
    rate: float
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    marks: list[Mark] = field(default_factory=list)
    control: tuple[float, float] = (0.0, 0.0)
    requests: Records = field(init=False)
    attempts: list[Attempts] = field(init=False)

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))

    def warm(self, seconds: float) -> None:
        """Its second half is the control."""
        begun = time.monotonic()
        self.wait(seconds)
        self.control = (begun + seconds / 2, begun + seconds)

    @contextmanager
    def fault(self, row: str, *nodes: int, after_s: float, settle_s: float = 2.0) -> Iterator[Mark]:
        """What is done in the block is what is done to `nodes`; `after_s` more are looked at.

        Args:
            settle_s: seconds after which the gateway should know; its own account of attempts is taken from then on,
                and once more those that had begun before can have ended.
        """
        mark = Mark(row=row, nodes=nodes, began=time.monotonic())
        self.marks.append(mark)
        yield mark
        mark.healed = mark.healed or time.monotonic()
        self.wait(after_s)
        mark.until = time.monotonic()

    def routed_from(self, mark: Mark, seconds: float, until_s: float) -> None:
        """Wait until `until_s` after the mark, and count what the gateway routed in the meantime, from `seconds` on."""
        self.wait(mark.began + seconds - time.monotonic())
        before = self.stage.routed()
        self.wait(mark.began + until_s - time.monotonic())
        after = self.stage.routed()
        if before is not None and after is not None:
            some = [self.stage.nodes[number].address for number in mark.nodes]
            mark.routed = (
                sum(after[address] - before[address] for address in some),
                sum(after.values()) - sum(before.values()),
            )

    def healthy_ejected(self, before: Mapping[str, float], sick: Sequence[int]) -> float:
        """Times that another node than the `sick` was left out since `before`, by the gateway's own account."""
        if not self.stage.tells:
            return math.nan
        addresses = {self.stage.nodes[number].address for number in sick}
        now = self.stage.ejections()
        return sum(count - before.get(address, 0.0) for address, count in now.items() if address not in addresses)

    def series(self) -> dict[str, Any]:
        marks = [
            {"row": mark.row, "began": round(mark.began - self.began, 3), "healed": round(mark.healed - self.began, 3)}
            for mark in self.marks
        ]
        counts = figures.series(self.requests, self.attempts, self.began, self.ended)
        return {"bin_s": figures.BIN_S, "faults": marks, **counts}

    def plain(self) -> dict[str, float]:
        """What every run says of itself."""
        return {
            "requests": len(self.requests),
            "failed": len(self.requests.failed),
            "client_late_p99_ms": self.requests.lateness_ms(),
        }

    def p99_ratio(self, begin: float, end: float) -> float:
        """The 99th percentile of what was answered, over the control's."""
        control = self.requests.due_within(*self.control).succeeded.percentile_ms(99)
        return self.requests.due_within(begin, end).succeeded.percentile_ms(99) / control

    def fair_shares(self, begin: float, end: float) -> tuple[float, float]:
        """The least and the most that any node had of its fair share."""
        shares = [figures.share_of_fair(self.attempts, (node,), begin, end) for node in range(len(self.stage.nodes))]
        return min(shares), max(shares)


@contextmanager
def run(
    system: System, rate: float, seed: int, *, load: Mapping[str, Any] | None = None, **stage: Any
) -> Iterator[Course]:
    """`system` under a load, for as long as the block takes; its requests and attempts are there after the block.

    Args:
        load: settings of the load beside its rate.
        stage: as for `stage.set_up`.
    """
    with set_up(system, **stage) as staged:
        with staged.load(Load(rate=rate, seed=seed, **(load or {}))) as sending:
            course = Course(stage=staged, sending=sending, rate=rate)
            yield course
        course.requests = sending.records()
        # The client was there a little earlier, and stays a little longer.
        course.began, course.ended = course.requests.due[0], course.requests.due[-1] + figures.BIN_S
        course.attempts = staged.attempts()


def faulted(course: Course, fault: Fault, node: int, pace: Pace, after_s: float | None = None) -> Mark:
    """One fault of one node, and what comes after."""
    settle_s = 1.0 if fault.row == "F1" else 2.0
    known_s = settle_s + (0.1 if fault.row == "F1" else TIMEOUT_MS / 1000 + 0.1)
    target = course.stage.nodes[node]
    with course.fault(fault.row, node, after_s=pace.after_s if after_s is None else after_s) as mark:
        ejections = course.stage.ejections()
        fault.inject(target)
        if pace.fault_s > known_s:
            course.routed_from(mark, known_s, pace.fault_s)
        course.wait(mark.began + pace.fault_s - time.monotonic())
        mark.healthy_ejected = course.healthy_ejected(ejections, mark.nodes)
        mark.healed = time.monotonic()
        fault.heal(target)
        if fault.row == "F1":  # it is back once it listens
            mark.healed = time.monotonic()
    return mark


def during(course: Course, mark: Mark) -> dict[str, float]:
    """What came of a fault of one node: of the requests and attempts from its beginning to the end of its time."""
    attempts, requests = course.attempts, course.requests
    settled = mark.began + 2.0
    found = course.plain() | {
        "failed": len(requests.failed.ended_within(mark.began, mark.until)),
        "attempts_per_request": figures.per_request(attempts, requests, mark.began, mark.healed),
        "p99_ms": requests.due_within(settled, mark.healed).succeeded.percentile_ms(99),
        "p99_ratio": course.p99_ratio(settled, mark.healed),
        "share_of_fair": figures.share_of_fair(attempts, mark.nodes, mark.began, mark.healed),
        "share_of_fair_after_1s": figures.share_of_fair(attempts, mark.nodes, mark.began + 1.0, mark.healed),
        "starved_seconds": figures.starved_seconds(
            attempts, [node for node in range(len(attempts)) if node not in mark.nodes], mark.began, mark.healed
        ),
        "recovered_s": figures.recovered_s(attempts, mark.nodes[0], mark.healed, mark.until),
        "healthy_ejected": mark.healthy_ejected,
        "routed_after_1s": math.nan,
        "share_after_2s": math.nan,
    }
    if mark.routed is not None:
        there, everywhere = mark.routed
        found["routed_after_1s"] = there
        found["share_after_2s"] = there / everywhere if everywhere else math.nan
    return found


_NODES_WELL = ("attempts_per_request", "starved_seconds", "healthy_ejected")
_SHARES = ("share_of_fair", "share_of_fair_after_1s")
FIGURES: Mapping[str, Sequence[str]] = {
    "F1": ("routed_after_1s", *_NODES_WELL),
    "F2": ("share_after_2s", "p99_ms", "p99_ratio", *_NODES_WELL),
    "F3": ("share_after_2s", "p99_ms", "p99_ratio", "recovered_s", *_NODES_WELL),
    "F4": ("share_of_fair", "p99_ms", "p99_ratio", *_NODES_WELL),
    "F5": (*_SHARES, *_NODES_WELL),
    "F5-lies": (*_SHARES, *_NODES_WELL),
    "F7": ("recovered_s",),
}
"""Those of `during` that say something of a row, beside those of every run."""


def flap(course: Course, node: int, seconds: float) -> Mark:
    """1 s up, 1 s down, for so long."""
    target = course.stage.nodes[node]
    with course.fault("F6", node, after_s=0.0) as mark:
        while time.monotonic() < mark.began + seconds:
            target.tell(listening=False)
            course.wait(_FLAP_S)
            target.tell(listening=True)
            course.wait(_FLAP_S)
    return mark
