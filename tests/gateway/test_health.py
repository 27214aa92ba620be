"""Who is left out, and how soon who is back."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from typing import Any

import pytest

from dl_inference_core.config import HealthConfig
from dl_inference_core.errors import (
    AttemptTimedOut,
    Code,
    DeadlineExceeded,
    InferenceError,
    NodeFailed,
    NodeOverloaded,
    NodeRejected,
    NodeUnreachable,
    Unimplemented,
)
from dl_inference_core.gateway import health as module
from dl_inference_core.gateway.clock import SystemClock
from dl_inference_core.gateway.health import Health, Reason
from dl_inference_core.gateway.probing import BackgroundProbes, Prober
from dl_inference_core.testing.memory import LoopClock
from dl_inference_core.transport import Answer, Connection, Message, Metadata

Lab = Any  # tests/conftest.py

SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


class Probed(Connection):
    """A connection whose probes are answered by the test."""

    def __init__(self) -> None:
        self.answer: bytes | InferenceError = SERVING
        self.hold = asyncio.Event()
        self.hold.set()
        self.probes: list[tuple[str, Message, float | None]] = []

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        self.probes.append((method, message, timeout_s))
        await self.hold.wait()
        if isinstance(self.answer, InferenceError):
            raise self.answer
        return Answer(self.answer, ())

    async def close(self) -> None:
        self.hold.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(module, "_LONGEST_HOLD_S", 0.04)
    monkeypatch.setattr(module, "_LEAST_PAUSE_S", 0.001)


async def until(what: Any) -> None:
    async with asyncio.timeout(5):
        while not what():  # noqa: ASYNC110 - what it waits for sets no event
            await asyncio.sleep(0.001)


class Watched:
    """One endpoint's health, and what it told.

    Attributes:
        moves: for each move whether the endpoint was usable then, and whether this process found out itself.
        changes: how often what may be chosen has changed.
        returns: how often it might have its whole share again.
    """

    def __init__(self, **config: Any) -> None:
        self.connection = Probed()
        self.moves: list[tuple[bool, bool]] = []
        self.changes = self.returns = 0
        settings = HealthConfig(**{"interval_ms": 0, **config})
        prober = Prober("10.0.0.1:8500", self.connection, settings.probe, settings.timeout_ms / 1000)
        clock = SystemClock(LoopClock(asyncio.get_running_loop()))
        self.probing = BackgroundProbes(prober, clock.now)
        self.health = Health(
            self.probing, settings, clock, changed=self._changed, returned=self._returned, moved=self._moved
        )

    def _changed(self) -> None:
        self.changes += 1

    def _returned(self) -> None:
        self.returns += 1

    def _moved(self, own: bool) -> None:
        self.moves.append((self.health.usable, own))

    @property
    def probes(self) -> int:
        return len(self.connection.probes)

    async def start(self) -> Watched:
        """Let the first probe pass."""
        self.health.start()
        await self.settled()
        assert self.health.usable
        return self

    async def settled(self) -> None:
        """Wait for the probe that is under way."""
        await self.probing.settled()

    async def close(self) -> None:
        self.health.close()
        await self.probing.close()

    async def lose(self) -> None:
        """It can be reached no longer, as an attempt and a probe find out; the next probe will pass."""
        self.connection.answer = NodeUnreachable("no")
        self.health.failed(NodeUnreachable("refused"))
        await until(lambda: self.health.reason is Reason.UNREACHABLE)
        self.connection.answer = SERVING


OUT, BACK = (False, True), (True, True)


async def test_who_cannot_be_reached_is_left_out_at_once_and_back_after_a_probe(quick: None) -> None:
    node = await Watched().start()
    health, connection = node.health, node.connection
    connection.answer = NodeUnreachable("no")
    health.failed(NodeUnreachable("refused"))
    assert not health.usable
    assert (health.reason, health.detail) == (Reason.UNAVAILABLE, "refused")
    assert health._timer is None
    assert health._probing
    await node.settled()
    assert (health.reason, health.detail) == (Reason.UNREACHABLE, "refused")
    assert node.moves == [OUT]
    await until(lambda: node.probes == 4)
    assert not health.usable
    connection.answer = SERVING
    await until(lambda: health.usable)
    assert health.reason is None
    assert (node.moves, node.returns) == ([OUT, BACK], 1)
    count = node.probes
    await asyncio.sleep(0.1)
    assert node.probes == count
    await node.close()


async def test_who_says_unavailable_but_answers_probes_is_back_at_once_and_nobody_told() -> None:
    node = await Watched(rise=3).start()
    health = node.health
    health.failed(NodeUnreachable("the queue is full"))
    assert (health.usable, node.changes) == (False, 1)
    for _ in range(50):
        health.failed(NodeUnreachable("the same"))  # were under way, and count as one
    await node.settled()
    assert (health.usable, health.reason, health.detail) == (True, None, "")
    assert not health.on_trial
    assert (node.probes, node.changes, node.moves, node.returns) == (2, 2, [], 0)
    assert health.share(time.monotonic()) == 1
    await node.close()


async def test_who_says_unavailable_five_times_running_but_answers_probes_is_put_on_trial() -> None:
    node = await Watched(slow_start_s=10).start()
    health = node.health
    for _ in range(4):
        health.failed(NodeUnreachable("not loaded"))
        await node.settled()
    health.succeeded()
    for _ in range(5):
        assert not health.on_trial
        health.failed(NodeUnreachable("not loaded"))
        await node.settled()
    assert health.usable
    assert health.on_trial
    changes = node.changes
    for _ in range(5):
        health.failed(NodeUnreachable("not loaded"))
        assert health.usable
        await node.settled()
        assert health.on_trial
        assert health.trial_at > time.monotonic()
    assert health.share(time.monotonic()) == 1
    assert (node.moves, node.returns) == ([], 0)
    assert node.changes <= changes + 1
    health.succeeded()
    assert not health.on_trial
    assert node.returns == 1
    await node.close()


async def test_who_is_gone_while_it_is_on_trial_is_left_out_with_the_next_attempt() -> None:
    node = await Watched().start()
    for _ in range(5):
        node.health.failed(NodeFailed("bad"))
    await node.settled()
    assert node.health.on_trial
    node.health.failed(NodeUnreachable("not its turn"))
    assert not node.health._probing
    node.health.trial_at = 0
    await node.lose()
    assert (node.health.usable, node.health.on_trial, node.moves) == (False, False, [OUT])
    await node.close()


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (NodeFailed("bad"), Reason.UNAVAILABLE, "overloaded"),
        (NOT_SERVING, Reason.NOT_SERVING, "it says that it takes no requests"),
    ],
)
async def test_who_says_unavailable_and_passes_no_probe_is_left_out(
    quick: None, answer: Any, reason: Reason, detail: str
) -> None:
    node = await Watched().start()
    node.connection.answer = answer
    node.health.failed(NodeUnreachable("overloaded"))
    await node.settled()
    assert (node.health.reason, node.health.detail, node.moves) == (reason, detail, [OUT])
    node.connection.answer = SERVING
    await until(lambda: node.health.usable)
    assert (node.moves, node.returns) == ([OUT, BACK], 1)
    await node.close()


async def test_who_says_unavailable_and_answers_other_requests_needs_no_probe_to_pass() -> None:
    node = await Watched().start()
    node.connection.answer = DeadlineExceeded("late")
    node.connection.hold.clear()
    node.health.failed(NodeUnreachable("the queue is full"))
    await until(lambda: node.probes == 2)
    node.health.succeeded()
    node.connection.hold.set()
    await node.settled()
    assert node.health.usable
    assert node.moves == []
    await node.close()


async def test_five_failures_running_and_a_probe_that_fails_eject(quick: None) -> None:
    node = await Watched().start()
    health = node.health
    node.connection.answer = NodeFailed("no")
    for _ in range(4):
        health.failed(AttemptTimedOut("slow"))
    health.succeeded()
    for _ in range(4):
        health.failed(NodeFailed("bad"))
    await asyncio.sleep(0.02)
    assert node.probes == 1
    health.failed(AttemptTimedOut("slow"))
    await until(lambda: not health.usable)
    assert health.reason is Reason.OUTLIER
    assert node.moves == [OUT]
    await node.close()


async def test_how_many_failures_make_a_suspect_is_configured(quick: None) -> None:
    node = await Watched(failures=2).start()
    node.connection.answer = NodeFailed("no")
    node.health.failed(AttemptTimedOut("slow"))
    assert not node.health._probing
    node.health.failed(AttemptTimedOut("slow"))
    await until(lambda: not node.health.usable)
    await node.close()


async def test_timeouts_and_a_probe_that_passes_change_nothing(quick: None) -> None:
    """A node that is overloaded must not be ejected: the others would be next."""
    node = await Watched().start()
    health = node.health
    for round_ in range(1, 4):
        for _ in range(4):
            health.failed(NodeFailed("bad"))
        health.failed(AttemptTimedOut("slow"))
        await until(lambda round_=round_: node.probes == round_ + 1 and not health._probing)
    assert node.changes == 0
    assert health.usable
    assert not health.on_trial


async def test_errors_and_a_probe_that_passes_put_on_trial_until_a_request_succeeds(quick: None) -> None:
    node = await Watched().start()
    health = node.health
    for _ in range(5):
        health.failed(NodeFailed("bad"))
    await until(lambda: health.on_trial)
    assert health.usable
    for pause in (0.02, 0.04, 0.04, 0.04):
        before = time.monotonic()
        health.failed(NodeFailed("bad"))
        assert before + pause <= health.trial_at <= time.monotonic() + pause
    assert (node.changes, node.moves) == (1, [])
    assert node.returns == 0
    health.succeeded()
    assert not health.on_trial
    assert (node.changes, node.returns) == (2, 1)
    for _ in range(4):
        health.failed(NodeFailed("bad"))
    assert not health.on_trial
    await node.close()


async def test_who_is_unreachable_while_a_suspicion_is_checked_comes_back(quick: None) -> None:
    node = await Watched().start()
    health = node.health
    node.connection.hold.clear()
    for _ in range(5):
        health.failed(AttemptTimedOut("slow"))
    await until(lambda: node.probes == 2)
    health.failed(NodeUnreachable("gone"))
    assert not health.usable
    node.connection.hold.set()  # the probe passes, but may have been answered before
    await until(lambda: health.usable)
    assert node.probes == 3
    assert node.moves == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (SERVING, None),
        (NOT_SERVING, Reason.NOT_SERVING),
        (b"", Reason.NOT_SERVING),
        (b"\x08\x03", Reason.NOT_SERVING),
        (Unimplemented("no such method"), None),
        (NodeRejected("who are you", Code.UNAUTHENTICATED), None),
        (NodeOverloaded("busy"), None),
        (NodeUnreachable("no"), Reason.UNREACHABLE),
        (NodeFailed("bad"), Reason.PROBE),
        (DeadlineExceeded("late"), Reason.PROBE),
    ],
)
async def test_a_new_node_is_well_if_its_first_probe_says_so(answer: Any, reason: Reason | None) -> None:
    node = Watched()
    node.connection.answer = answer
    node.health.start()
    await node.settled()
    assert node.health.reason is reason
    assert node.health.usable is (reason is None)
    method, message, timeout_s = node.connection.probes[0]
    assert (method, message) == ("/grpc.health.v1.Health/Check", b"")
    assert timeout_s is not None
    assert 0 < timeout_s <= 0.5
    await node.close()


async def test_who_is_lost_again_and_again_is_left_out_longer_each_time_until_it_answers(quick: None) -> None:
    node = await Watched().start()
    health = node.health
    for pause in (0.01, 0.02, 0.04, 0.04):
        await node.lose()
        assert health._pause_s == pause
        await until(lambda: health.usable)
    health.succeeded()
    await node.lose()
    assert health._pause_s == 0.01
    assert node.moves == [*[OUT, BACK] * 4, OUT]
    await node.close()


async def test_closing_ends_a_probe_under_way(quick: None) -> None:
    node = await Watched().start()
    node.connection.hold.clear()
    node.health.failed(NodeUnreachable("no"))
    await until(lambda: node.probes == 2)
    probing = node.probing._task
    assert probing is not None
    await node.close()
    assert probing.done()


# Probes while all is well


async def test_who_answers_requests_is_probed_in_every_fifth_interval_only(quick: None) -> None:
    node = await Watched(interval_ms=40).start()
    start = time.monotonic()
    late = 0.0
    while node.probes < 3:
        now = time.monotonic()
        node.health.succeeded()
        await asyncio.sleep(0.002)
        late = max(late, time.monotonic() - now)
    took = time.monotonic() - start
    assert took >= 2 * 5 * 0.75 * 0.04 - 0.001 or late > 0.02  # a machine that stands still makes it look idle
    assert took < 2 * 5 * 0.04 or late > 0.02
    await until(lambda: node.probes == 6)
    assert node.changes == 0
    await node.close()


async def test_probes_that_fail_running_eject(quick: None) -> None:
    node = await Watched(interval_ms=20, fall=3).start()
    health, connection = node.health, node.connection
    connection.answer = NodeFailed("bad")
    await until(lambda: node.probes == 3)
    connection.answer = SERVING
    await until(lambda: node.probes == 5)
    assert health._failed_probes == 0
    count = node.probes
    connection.answer = DeadlineExceeded("late")
    await until(lambda: not health.usable)
    assert node.probes == count + 3
    assert health.reason is Reason.PROBE
    await node.close()


async def test_the_next_probe_follows_at_once_on_one_that_timed_out() -> None:
    node = await Watched(interval_ms=10).start()
    node.connection.hold.clear()
    node.connection.answer = DeadlineExceeded("late")
    await until(lambda: node.probes == 2)
    await asyncio.sleep(0.1)  # as long as the first pause
    node.connection.hold.set()
    await node.settled()
    timer = node.health._timer
    assert node.probes > 2 or (timer is not None and timer.when() <= asyncio.get_running_loop().time() + 0.01)
    await node.close()


async def test_a_request_that_is_answered_says_more_than_a_probe_that_is_not(quick: None) -> None:
    node = await Watched(interval_ms=20, fall=1).start()
    node.connection.answer = DeadlineExceeded("late")
    for count in (2, 3, 4):
        node.connection.hold.clear()
        await until(lambda count=count: node.probes == count)
        node.health.succeeded()
        node.connection.hold.set()
        await until(lambda: not node.health._probing)
    assert node.changes == 0
    await node.close()


async def test_one_probe_is_enough_to_hear_that_a_node_does_not_serve(quick: None) -> None:
    node = await Watched(interval_ms=20, fall=100).start()
    node.connection.answer = NOT_SERVING
    await until(lambda: not node.health.usable)
    assert node.health.reason is Reason.NOT_SERVING
    assert node.probes == 2
    await node.close()


async def test_as_many_probes_running_as_configured_bring_back(quick: None) -> None:
    node = await Watched(rise=3).start()
    health, connection = node.health, node.connection
    await node.lose()
    await until(lambda: health._passed_probes == 2)
    connection.answer = NodeFailed("not yet")
    await until(lambda: health._passed_probes == 0)
    assert not health.usable
    count = node.probes
    connection.answer = SERVING
    await until(lambda: health.usable)
    assert node.probes >= count + 3
    await node.close()


async def test_an_ejected_node_that_refuses_connections_is_no_longer_but_ejected(quick: None) -> None:
    node = await Watched(failures=1).start()
    node.connection.answer = NodeFailed("bad")
    node.health.failed(AttemptTimedOut("slow"))
    await until(lambda: node.health.reason is Reason.OUTLIER)
    assert node.changes == 1
    node.health.failed(NodeUnreachable("gone"))
    assert node.changes == 1
    node.connection.answer = NodeUnreachable("gone")
    await until(lambda: node.health.reason is Reason.UNREACHABLE)
    assert node.health.detail == "a probe could not reach it"
    assert (node.changes, node.moves) == (2, [OUT])
    node.connection.answer = NOT_SERVING
    await until(lambda: node.health.reason is Reason.NOT_SERVING)
    assert node.health.detail == "it says that it takes no requests"
    await node.close()


# What other processes say


async def test_what_others_left_out_is_left_out_and_probed_here(quick: None) -> None:
    node = await Watched().start()
    node.health.learn_left_out(Reason.OUTLIER, "so they say")
    assert (node.health.reason, node.health.detail) == (Reason.OUTLIER, "so they say")
    assert node.moves == [(False, False)]
    node.health.learn_left_out(Reason.UNREACHABLE, "again")
    await until(lambda: node.health.usable)
    assert node.moves == [(False, False), BACK]


async def test_what_others_have_back_is_asked_at_once() -> None:
    node = await Watched().start()
    node.connection.answer = NodeFailed("not for you")
    node.health.learn_returned()
    assert node.probes == 1
    node.health._hold_s = 1000.0
    node.health.failed(NodeUnreachable("no"))
    await node.settled()
    assert (node.probes, node.health._pause_s) == (2, 1000)
    node.health.learn_returned()
    await node.settled()
    assert node.probes == 3
    assert not node.health.usable
    node.connection.answer = SERVING
    node.health.learn_returned()
    await node.settled()
    assert node.health.usable
    assert node.moves == [OUT, BACK]


# Slow start


async def test_the_share_of_a_node_that_is_back_grows(quick: None) -> None:
    node = await Watched(slow_start_s=10).start()
    assert node.health.share(time.monotonic()) == 1
    await node.lose()
    await until(lambda: node.health.usable)
    back = node.health._back_at
    assert [node.health.share(back + age) for age in (0, 5, 10, 20)] == pytest.approx([0.1, 0.55, 1, 1])


# Over real sockets


async def test_a_connection_closed_during_a_probe_leaves_no_task(lab: Lab) -> None:
    node = await lab.node(health_hangs=True)
    gateway = await lab.front(node, await lab.node("b"), top="[gateway.health]\ninterval_ms = 0\n")
    health = gateway.node(node).endpoint.health
    checks = node.checks
    await lab.until(lambda: node.checks > checks)
    probing = gateway.node(node).endpoint.probes._task
    assert probing is not None
    others = asyncio.all_tasks() - {probing}
    await gateway.node(node).endpoint.connection.close()
    await lab.until(lambda: probing.done())
    assert not health.usable
    health.close()
    await gateway.node(node).endpoint.probes.close()
    await lab.until(lambda: asyncio.all_tasks() <= others)


async def test_a_gateway_starts_without_the_nodes_that_are_not_there(lab: Lab) -> None:
    dead = await lab.node("dead")
    await dead.stop()
    unwell = await lab.node("unwell", health=b"\x08\x02")
    well = await lab.node("well")
    gateway = await lab.front(dead, unwell, well)
    assert [gateway.usable(node) for node in (dead, unwell, well)] == [False, False, True]
    assert {await gateway.call() for _ in range(9)} == {"well"}
    assert dead.count == unwell.count == 0


async def test_a_foreign_node_without_health_checks_is_well(lab: Lab) -> None:
    node = await lab.node(health=lab.error(Code.UNIMPLEMENTED))
    gateway = await lab.front(node, await lab.node("b"))
    assert gateway.usable(node)
    await node.stop()
    while gateway.usable(node):
        await gateway.call()
    await node.start()
    await lab.until(lambda: gateway.usable(node), 1.5)


async def test_a_node_that_hangs_is_left_out_and_comes_back(lab: Lab) -> None:
    """As SIGSTOP has it: connections stand, and nothing answers."""
    stopped, other = await lab.nodes("ab")
    gateway = await lab.front(stopped, other, more="timeout_ms = 300")
    await gateway.call()
    stopped.hangs = stopped.health_hangs = True
    start = time.monotonic()
    failed = 0
    while gateway.usable(stopped):
        answers = await asyncio.gather(*(gateway.call() for _ in range(16)))
        failed += len(answers) - answers.count("b") - answers.count("a")
        assert time.monotonic() - start < 2
    assert failed == 0
    count = stopped.count
    assert {await gateway.call() for _ in range(20)} == {"b"}
    assert stopped.count == count
    stopped.hangs = stopped.health_hangs = False
    stopped.release.set()
    assert await lab.until(lambda: gateway.usable(stopped)) < 1.5
    assert {await gateway.call() for _ in range(400)} == {"a", "b"}


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED])
async def test_a_node_that_fails_every_request_but_no_probe_keeps_little(lab: Lab, code: Code) -> None:
    bad = await lab.node("bad", status=lab.error(code))
    good = await lab.nodes("abc")
    gateway = await lab.front(bad, *good)
    assert "bad" not in {await gateway.call() for _ in range(300)}
    bad.calls.clear()
    for _ in range(300):
        await gateway.call()
    assert bad.count <= 300 / 4 * 0.1
    assert gateway.node(bad).endpoint.health.on_trial
    assert gateway.usable(bad)


async def test_a_model_that_is_not_ready_takes_no_node_from_another_route(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.UNAVAILABLE, "the model is loading"))
    gateway = await lab.gateway(lab.route(*nodes) + lab.route(*nodes, name="n", task=70))
    for _ in range(10):
        assert (await gateway.refusal())[0] is Code.UNAVAILABLE
    for node in nodes:
        node.status = None
    await lab.until(lambda: all(map(gateway.usable, nodes)))
    assert {await gateway.call("n") for _ in range(20)} <= {"a", "b"}
    assert b"dl_inference_ejections_total{" not in gateway.app.metrics.render("")[0]


async def test_clients_faults_start_no_probe(lab: Lab) -> None:
    node = await lab.node(status=lab.error(Code.INVALID_ARGUMENT))
    gateway = await lab.front(node)
    checks = node.checks
    for _ in range(20):
        await gateway.refusal()
    assert node.checks == checks
    assert gateway.usable(node)


@pytest.mark.parametrize("down_s", [0.5, 1.5])
async def test_a_node_is_back_1500_ms_after_it_listens_again(lab: Lab, down_s: float) -> None:
    node, other = await lab.nodes("ab")
    gateway = await lab.front(node, other)
    await gateway.call()
    await node.stop()
    start = time.monotonic()
    while gateway.usable(node) or time.monotonic() - start < down_s:
        assert await gateway.call() == "b"
        await asyncio.sleep(0.02)
    await node.start()
    assert await lab.until(lambda: gateway.usable(node)) < 1.5


async def test_a_node_that_hangs_is_noticed_without_a_request(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, b, top="[gateway.health]\ninterval_ms = 50\ntimeout_ms = 100\n")
    a.hangs = a.health_hangs = True
    assert await lab.until(lambda: not gateway.usable(a)) < 1
    assert {await gateway.call() for _ in range(9)} == {"b"}
    assert a.count == 0
    a.health_hangs = a.hangs = False
    await lab.until(lambda: gateway.usable(a))


async def test_a_node_that_is_about_to_end_is_left_out(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, b, top="[gateway.health]\ninterval_ms = 20\n")
    a.health = NOT_SERVING
    await lab.until(lambda: not gateway.usable(a))
    assert {await gateway.call() for _ in range(9)} == {"b"}


async def test_a_node_that_is_too_slow_but_answers_probes_is_not_ejected(lab: Lab) -> None:
    """Overload: to eject one would put its requests on the others."""
    nodes = await lab.nodes("ab", latency_s=2)
    gateway = await lab.front(*nodes, more="timeout_ms = 100", top="[gateway.health]\ninterval_ms = 20\n")
    checks = [node.checks for node in nodes]
    end = time.monotonic() + 30
    # On a busy machine the deadline of some requests passes before they reach a node.
    while min(node.count for node in nodes) < 25:
        assert time.monotonic() < end
        codes = {code for code, _ in await asyncio.gather(*(gateway.refusal() for _ in range(10)))}
        assert codes == {Code.DEADLINE_EXCEEDED}
        assert all(map(gateway.usable, nodes))
    assert all(node.checks > before for node, before in zip(nodes, checks, strict=True))
    assert b"dl_inference_ejections_total{" not in gateway.app.metrics.render("")[0]


async def test_a_node_that_fails_at_once_attracts_nothing_even_where_the_strategy_learns_nothing(lab: Lab) -> None:
    bad = await lab.node("bad", status=lab.error(Code.INTERNAL))
    good = await lab.nodes("abc", latency_s=0.002)
    gateway = await lab.front(bad, *good, more='balancer = "round_robin"')
    for _ in range(40):
        await gateway.call()
    bad.calls.clear()
    for _ in range(200):
        await gateway.call()
    assert bad.count <= 200 / 4 * 0.2
    assert gateway.usable(bad)
    bad.status = None
    start = time.monotonic()
    while await gateway.call() != "bad":
        assert time.monotonic() - start < 1.5
    assert [await gateway.call() for _ in range(8)].count("bad") == 2


async def test_a_new_node_that_is_not_there_is_left_out_before_a_request_finds_out(lab: Lab) -> None:
    a, dead = await lab.nodes("ad")
    await dead.stop()
    gateway = await lab.front(a, top="[gateway]\npoll_interval_ms = 20\n")
    gateway.file.write_text(gateway.file.read_text().replace(f"['{a.address}'", f"['{dead.address}', '{a.address}'"))
    await lab.until(lambda: len(gateway.forwarder().pool.nodes) == 2)
    await lab.until(lambda: not gateway.usable(dead))
    assert b'outcome="failure"' not in gateway.app.metrics.render("")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
async def test_a_connection_to_a_node_that_does_not_acknowledge_is_given_up(lab: Lab) -> None:
    """A black hole, as nearly as it can be had without root: that the kernel was told."""
    node = await lab.node()
    gateway = await lab.front(node)
    await gateway.call()
    port = int(node.address.rpartition(":")[2])
    assert set(user_timeouts(port)) == {2000}


def user_timeouts(port: int) -> list[int]:
    """TCP_USER_TIMEOUT, in milliseconds, of each connection that this process has to that port."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                    found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        except OSError:
            continue
    return found
