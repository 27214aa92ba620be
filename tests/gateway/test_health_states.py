"""Every transition of a node's health: what the table says, and what a `Health` does."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dl_inference_core.config import HealthConfig
from dl_inference_core.errors import AttemptTimedOut, NodeFailed, NodeUnreachable
from dl_inference_core.gateway import health_states
from dl_inference_core.gateway.health import Health
from dl_inference_core.gateway.health_states import TRANSITIONS, Event, Reason, State, transition
from dl_inference_core.gateway.probing import Verdict

HEALTHY, SUSPECT, HALF_OPEN, QUARANTINED, EJECTED = State
CELLS = list(itertools.product(State, Event))
IDS = [f"{state.value}, {event.value}" for state, event in CELLS]


class Clock:
    """A clock that stands still until it is told to go on. Any thread."""

    def __init__(self) -> None:
        self.time = 100.0
        self.timers: dict[Any, None] = {}

    def now(self) -> float:
        return self.time

    def call_later(self, seconds: float, function: Callable[[], None]) -> Any:
        clock = self

        class Timer:
            at = clock.time + seconds

            def cancel(self) -> None:
                clock.timers.pop(self, None)

            def run(self) -> None:
                self.cancel()
                function()

        timer = Timer()
        self.timers[timer] = None
        return timer


class Driven:
    """A `Health` whose clock, timers and probes are the test's.

    Attributes:
        probing: whether a probe is under way.
        most_probes: how many there were at one time.
        told: the callbacks, in order.
    """

    def __init__(self, **config: Any) -> None:
        self.clock = Clock()
        self.probes = self.most_probes = 0
        self.began = 0.0
        self.told: list[str] = []
        settings = HealthConfig(**{"failures": 3, "fall": 2, "rise": 2, **config})
        self.health = Health(
            self,
            settings,
            self.clock,
            changed=lambda: self.told.append("changed"),
            returned=lambda: self.told.append("returned"),
            moved=lambda own: self.told.append("moved" if own else "moved by a peer"),
        )
        self.health.start()
        self.end_probe(Verdict.WELL)
        self.told.clear()

    def begin(self, ended: Callable[[Verdict, float], None]) -> None:
        self.probes += 1
        self.most_probes = max(self.most_probes, self.probes)
        self.began = self.clock.time

    def forget(self) -> None: ...

    @property
    def probing(self) -> bool:
        return self.probes > 0

    def end_probe(self, verdict: Verdict) -> None:
        if not self.probing:
            self.end_pause()
        self.probes -= 1
        self.clock.time += 0.001
        self.health.probed(verdict, self.began)

    def end_pause(self) -> None:
        (timer,) = self.clock.timers
        self.clock.time = max(self.clock.time, timer.at) + 10
        timer.run()

    def fail(self, times: int, error: type[Exception] = NodeFailed) -> None:
        for _ in range(times):
            self.health.failed(error("bad"))  # type: ignore[arg-type]

    def go(self, state: State) -> Driven:
        """The shortest way from healthy to `state`."""
        match state:
            case State.SUSPECT:
                self.fail(3)
            case State.HALF_OPEN:
                self.fail(3)
                self.end_probe(Verdict.WELL)
            case State.QUARANTINED:
                self.health.failed(NodeUnreachable("refused"))
            case State.EJECTED:
                self.health.failed(NodeUnreachable("refused"))
                self.clock.time += 0.001
                self.end_probe(Verdict.UNREACHABLE)
        assert self.health.standing.state is state
        self.told.clear()
        self.clock.time += 0.01
        return self


# The table


def test_the_table_has_every_event_and_state() -> None:
    assert list(TRANSITIONS) == list(Event)
    assert all(len(cells) == len(State) for cells in TRANSITIONS.values())
    assert all(isinstance(state, State) for cells in TRANSITIONS.values() for state, _ in cells)


def test_the_docstring_shows_the_table() -> None:
    short = {"HE": HEALTHY, "SU": SUSPECT, "HO": HALF_OPEN, "QU": QUARANTINED, "EJ": EJECTED}
    lines = health_states.__doc__.splitlines()  # type: ignore[union-attr]
    start = next(number for number, line in enumerate(lines) if line.startswith("-----"))
    starts = [0, *(match + 1 for match, character in enumerate(lines[start]) if character == " ")]
    columns = [at for at in starts if lines[start][at] == "-"]
    shown = {}
    for line in itertools.takewhile(bool, lines[start + 1 :]):
        event, *cells = (line[at:end].strip() for at, end in zip(columns, [*columns[1:], None], strict=True))
        shown[Event(event)] = tuple((short[cell[:2]], cell[3:]) for cell in cells)
    assert shown == TRANSITIONS


@pytest.mark.parametrize(("state", "event"), CELLS, ids=IDS)
def test_actions_fit_where_they_lead(state: State, event: Event) -> None:
    after, action = transition(state, event)
    assert (action in ("eject", "confirm")) == (after is EJECTED and state is not EJECTED)
    assert (action == "readmit") == (state is EJECTED and after is HEALTHY)
    assert (action == "trial") == (after is HALF_OPEN and event is Event.ONLY_PROBE_PASSED)
    if event in (Event.PROBE_DUE, Event.PEER_READMITTED):
        assert after is state  # so nobody has to be told
    if after is QUARANTINED and state is not QUARANTINED:
        assert action == "probe"
    if event.value.startswith(("probe", "rise", "fall", "both", "only")):
        assert action  # a probe that has ended is always followed by another, sooner or later


# The machine, in each state with each thing that can happen to a node: state, callbacks, and what it waits for

NOTHING, PROBE, TIMER = "nothing", "a probe", "a timer"


def answered(node: Driven) -> None:
    node.health.succeeded()


def one_failure(node: Driven) -> None:
    node.fail(1)


def failures(node: Driven) -> None:
    node.fail(3)


def unreachable(node: Driven) -> None:
    node.clock.time += 10  # a trial is due
    node.health.failed(NodeUnreachable("refused"))


def ends(*verdicts: Verdict, answered_meanwhile: bool = False) -> Callable[[Driven], None]:
    def end(node: Driven) -> None:
        for verdict in verdicts:
            if not node.probing:
                node.end_pause()
            if answered_meanwhile:
                node.clock.time += 0.001
                node.health.succeeded()
            node.end_probe(verdict)

    return end


def ends_after_timeouts(node: Driven) -> None:
    node.fail(3, AttemptTimedOut)
    node.end_probe(Verdict.WELL)


def ends_after_failures(verdict: Verdict) -> Callable[[Driven], None]:
    def end(node: Driven) -> None:
        node.fail(3)
        node.end_probe(verdict)

    return end


def stale(node: Driven) -> None:
    """A probe that had begun before the node was quarantined or ejected ends."""
    if not node.probing:
        node.end_pause()
    node.health.probed(Verdict.WELL, node.health.standing.since - 1)
    node.probes -= 1


def peer_ejects(node: Driven) -> None:
    node.health.learn_left_out(Reason.OUTLIER, "as told")


def peer_readmits(node: Driven) -> None:
    node.health.learn_returned()


OUT = ["changed", "moved"]
NEXT: dict[str, tuple[Callable[[Driven], None], dict[State, tuple[State, list[str]]]]] = {
    "a request is answered": (
        answered,
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HEALTHY, []),
            HALF_OPEN: (HEALTHY, ["changed", "returned"]),
            QUARANTINED: (QUARANTINED, []),
            EJECTED: (EJECTED, []),
        },
    ),
    "an attempt fails": (one_failure, {state: (state, []) for state in State}),
    "three attempts fail": (
        failures,
        {**{state: (state, []) for state in State}, HEALTHY: (SUSPECT, [])},
    ),
    "an attempt cannot reach it": (
        unreachable,
        {
            HEALTHY: (QUARANTINED, ["changed"]),
            SUSPECT: (QUARANTINED, ["changed"]),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (QUARANTINED, []),
            EJECTED: (EJECTED, []),
        },
    ),
    "a probe passes": (
        ends(Verdict.WELL),
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HALF_OPEN, ["changed"]),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (HEALTHY, ["changed"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "two probes pass": (
        ends(Verdict.WELL, Verdict.WELL),
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HALF_OPEN, ["changed"]),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (HEALTHY, ["changed"]),
            EJECTED: (HEALTHY, ["changed", "returned", "moved"]),
        },
    ),
    "three attempts fail and a probe passes": (
        ends_after_failures(Verdict.WELL),
        {
            HEALTHY: (HALF_OPEN, ["changed"]),
            SUSPECT: (HALF_OPEN, ["changed"]),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (HEALTHY, ["changed"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "three attempts time out and a probe passes": (
        ends_after_timeouts,
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HEALTHY, []),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (HEALTHY, ["changed"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "a probe fails": (
        ends(Verdict.FAILED),
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (EJECTED, OUT),
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (EJECTED, ["moved"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "two probes fail": (
        ends(Verdict.FAILED, Verdict.FAILED),
        {
            HEALTHY: (EJECTED, OUT),
            SUSPECT: (EJECTED, OUT),
            HALF_OPEN: (EJECTED, OUT),
            QUARANTINED: (EJECTED, ["moved"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "three attempts fail and a probe fails": (
        ends_after_failures(Verdict.FAILED),
        {
            HEALTHY: (EJECTED, OUT),
            SUSPECT: (EJECTED, OUT),
            HALF_OPEN: (EJECTED, OUT),
            QUARANTINED: (EJECTED, ["moved"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "a probe fails while a request is answered": (
        ends(Verdict.FAILED, answered_meanwhile=True),
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HEALTHY, []),
            HALF_OPEN: (HEALTHY, ["changed", "returned"]),
            QUARANTINED: (HEALTHY, ["changed"]),
            EJECTED: (EJECTED, []),
        },
    ),
    "a probe hears that it does not serve": (
        ends(Verdict.NOT_SERVING),
        {
            HEALTHY: (EJECTED, OUT),
            SUSPECT: (EJECTED, OUT),
            HALF_OPEN: (EJECTED, OUT),
            QUARANTINED: (EJECTED, OUT),
            EJECTED: (EJECTED, ["changed"]),
        },
    ),
    "an old probe passes": (
        stale,
        {
            HEALTHY: (HEALTHY, []),
            SUSPECT: (HALF_OPEN, ["changed"]),  # it was never out, so no probe is too old
            HALF_OPEN: (HALF_OPEN, []),
            QUARANTINED: (QUARANTINED, []),
            EJECTED: (EJECTED, []),
        },
    ),
    "a peer ejects it": (
        peer_ejects,
        {
            HEALTHY: (EJECTED, ["changed", "moved by a peer"]),
            SUSPECT: (EJECTED, ["changed", "moved by a peer"]),
            HALF_OPEN: (EJECTED, ["changed", "moved by a peer"]),
            QUARANTINED: (QUARANTINED, []),
            EJECTED: (EJECTED, []),
        },
    ),
    "a peer readmits it": (peer_readmits, {state: (state, []) for state in State}),
}
HAPPENINGS = [(name, state) for name in NEXT for state in State]


@pytest.mark.parametrize(("name", "state"), HAPPENINGS, ids=[f"{state.value}, {name}" for name, state in HAPPENINGS])
def test_each_happening_in_each_state(name: str, state: State) -> None:
    happen, outcomes = NEXT[name]
    node = Driven().go(state)
    happen(node)
    after, told = outcomes[state]
    assert (node.health.standing.state, node.told) == (after, told)
    assert node.health.usable is after.usable
    assert (node.health.reason is None) is after.usable
    assert node.health.on_trial is (after is HALF_OPEN)
    assert node.probing != bool(node.clock.timers), "a probe is either under way or waited for"
    if after in (SUSPECT, QUARANTINED):
        assert node.probing


@pytest.mark.parametrize("state", [HEALTHY, HALF_OPEN, EJECTED], ids=lambda state: state.value)
def test_a_timer_that_runs_out_begins_a_probe(state: State) -> None:
    """In the other states a probe is under way, and so no timer runs."""
    node = Driven().go(state)
    if not node.probing:
        node.end_pause()
    assert node.probing
    assert node.health.standing.state is state


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_node_that_is_well_is_healthy_again(seed: int) -> None:
    chance = random.Random(seed)
    node = Driven(rise=1)
    happenings = [happen for happen, _ in NEXT.values() if happen is not stale]
    for _ in range(200):
        chance.choice(happenings)(node)
        assert node.probing != bool(node.clock.timers)
        assert node.most_probes == 1
    for _ in range(2):
        node.end_probe(Verdict.WELL)
        node.health.succeeded()
    assert node.health.standing.state is HEALTHY
    assert node.health.reason is None


# Threads


class Threaded:
    """Probes that any thread may end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: list[Callable[[Verdict, float], None]] = []
        self.most = 0

    def begin(self, ended: Callable[[Verdict, float], None]) -> None:
        with self.lock:
            self.waiting.append(ended)
            self.most = max(self.most, len(self.waiting))

    def forget(self) -> None: ...

    def end(self, verdict: Verdict, began: float) -> None:
        with self.lock:
            ended = self.waiting.pop() if self.waiting else None
        if ended is not None:
            ended(verdict, began)


def test_many_threads_leave_a_consistent_state() -> None:
    clock, probes = Clock(), Threaded()
    ticks = itertools.count(1)
    clock.now = lambda: float(next(ticks))  # type: ignore[method-assign]
    published: list[bool] = []
    publishing = threading.Lock()
    moves: list[bool] = []
    config = HealthConfig(failures=2)

    def changed() -> None:
        with publishing:
            published.append(health.usable)

    health = Health(probes, config, clock, changed=changed, returned=lambda: None, moved=moves.append)  # type: ignore[arg-type]
    health.start()
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            start.wait()
            for _ in range(3000):
                match chance.randrange(8):
                    case 0 | 1:
                        health.succeeded()
                    case 2:
                        health.failed(NodeFailed("bad"))
                    case 3:
                        health.failed(NodeUnreachable("gone"))
                    case 4 | 5:
                        probes.end(chance.choice(list(Verdict)), clock.now())
                    case 6:
                        for timer in tuple(clock.timers):
                            timer.run()
                    case 7 if chance.random() < 0.5:
                        health.learn_returned()
                    case 7:
                        health.learn_left_out(Reason.OUTLIER, "as told")
                standing = health.standing
                assert (standing.reason is None) is standing.state.usable
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert probes.most == 1
    assert bool(probes.waiting) != bool(clock.timers)
    assert len(moves) > 10
    for _ in range(3):
        for timer in tuple(clock.timers):
            timer.run()
        probes.end(Verdict.WELL, clock.now())
        health.succeeded()
    assert health.standing.state is HEALTHY
    assert published[-1] is True
