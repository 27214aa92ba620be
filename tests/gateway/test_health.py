"""Who is left out, and how soon who is back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dl_inference_core.errors import (
    AttemptTimedOut,
    Code,
    InferenceError,
    NodeFailed,
    NodeUnreachable,
    Unimplemented,
)
from dl_inference_core.gateway import health as module
from dl_inference_core.gateway.health import Health
from dl_inference_core.transport import Call, Connection

Lab = Any  # tests/conftest.py


class Probed(Connection):
    """A connection whose probes are answered by the test."""

    def __init__(self) -> None:
        self.answer: bytes | InferenceError = b"\x08\x01"
        self.hold = asyncio.Event()
        self.hold.set()
        self.probes: list[Call] = []

    async def call(self, call: Call) -> bytes:
        self.probes.append(call)
        await self.hold.wait()
        if isinstance(self.answer, InferenceError):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        self.hold.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.04)


async def until(what: Any) -> None:
    async with asyncio.timeout(5):
        while not what():  # noqa: ASYNC110 - what it waits for sets no event
            await asyncio.sleep(0.001)


def make() -> tuple[Health, Probed, list[bool]]:
    connection = Probed()
    changes: list[bool] = []
    health = Health(connection, lambda: changes.append(health.usable))
    return health, connection, changes


async def test_who_cannot_be_reached_is_left_out_at_once_and_back_after_a_probe(quick: None) -> None:
    health, connection, changes = make()
    connection.answer = NodeUnreachable("no")
    health.failed(NodeUnreachable("no"))
    assert not health.usable
    await until(lambda: len(connection.probes) == 3)
    assert not health.usable
    connection.answer = b"\x08\x01"
    await until(lambda: health.usable)
    assert changes == [False, True]
    count = len(connection.probes)
    await asyncio.sleep(0.1)
    assert len(connection.probes) == count
    await health.close()


async def test_five_failures_running_and_a_probe_that_fails_leave_out(quick: None) -> None:
    health, connection, changes = make()
    connection.answer = NodeUnreachable("no")
    for _ in range(4):
        health.failed(AttemptTimedOut("slow"))
    health.succeeded()
    for _ in range(4):
        health.failed(NodeFailed("bad"))
    await asyncio.sleep(0.02)
    assert connection.probes == []
    health.failed(AttemptTimedOut("slow"))
    await until(lambda: not health.usable)
    assert changes == [False]
    await health.close()


async def test_five_failures_and_a_probe_that_passes_change_nothing(quick: None) -> None:
    health, connection, changes = make()
    for round_ in range(1, 4):
        for _ in range(5):
            health.failed(NodeFailed("bad"))
        await until(lambda round_=round_: len(connection.probes) == round_ and health._probing is None)
    assert changes == []
    assert health.usable


async def test_who_is_unreachable_while_a_suspicion_is_checked_comes_back(quick: None) -> None:
    health, connection, changes = make()
    connection.hold.clear()
    for _ in range(5):
        health.failed(AttemptTimedOut("slow"))
    await until(lambda: connection.probes)
    health.failed(NodeUnreachable("gone"))
    assert not health.usable
    connection.hold.set()  # and the probe passes
    await until(lambda: health.usable)
    assert changes == [False, True]
    await until(lambda: health._probing is None)


@pytest.mark.parametrize(
    ("answer", "well"),
    [
        (b"\x08\x01", True),
        (b"\x08\x02", False),
        (b"", False),
        (b"\x08\x03", False),
        (Unimplemented("no such method"), True),
        (NodeUnreachable("no"), False),
        (NodeFailed("bad"), False),
    ],
)
async def test_a_node_is_well_if_it_says_so_or_knows_no_such_question(answer: Any, well: bool) -> None:
    health, connection, _ = make()
    connection.answer = answer
    await health.check()
    assert health.usable is well
    (probe,) = connection.probes
    assert (probe.method, probe.request) == ("/grpc.health.v1.Health/Check", b"")
    assert probe.deadline is not None
    assert probe.deadline - time.monotonic() <= 0.5
    await health.close()


async def test_pauses_grow_while_probes_pass_but_requests_do_not(quick: None) -> None:
    health, _, changes = make()
    for _ in range(3):
        health.failed(NodeUnreachable("flapping"))
        await until(lambda: health.usable)
    assert health._pause_s == 0.04
    health.succeeded()
    assert health._pause_s == 0.01
    assert changes == [False, True] * 3


async def test_closing_ends_a_probe_under_way(quick: None) -> None:
    health, connection, _ = make()
    connection.hold.clear()
    health.failed(NodeUnreachable("no"))
    await until(lambda: connection.probes)
    probing = health._probing
    assert probing is not None
    await health.close()
    assert probing.done()
    await connection.close()


async def test_a_connection_closed_during_a_probe_leaves_no_task(lab: Lab) -> None:
    node = await lab.node(health_hangs=True)
    gateway = await lab.front(node, await lab.node("b"))
    health = gateway.node(node).endpoint.health
    checks = node.checks
    await lab.until(lambda: node.checks > checks)  # one is under way
    before = asyncio.all_tasks()
    await gateway.node(node).endpoint.connection.close()
    await asyncio.sleep(0.6)
    assert not health.usable
    await health.close()
    assert asyncio.all_tasks() <= before


# Over real sockets


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


async def test_a_node_that_fails_every_request_but_no_probe_keeps_little(lab: Lab) -> None:
    bad = await lab.node("bad", status=lab.error(Code.INTERNAL))
    good = await lab.nodes("abc")
    gateway = await lab.front(bad, *good)
    assert "bad" not in {await gateway.call() for _ in range(300)}
    bad.calls.clear()
    for _ in range(300):
        await gateway.call()
    assert bad.count <= 300 / 4 * 0.1
    assert gateway.usable(bad)


async def test_clients_faults_start_no_probe(lab: Lab) -> None:
    node = await lab.node(status=lab.error(Code.INVALID_ARGUMENT))
    gateway = await lab.front(node)
    checks = node.checks
    for _ in range(20):
        await gateway.refusal()
    assert node.checks == checks
    assert gateway.usable(node)


@pytest.mark.parametrize("down_s", [0.5, 2.0, 3.0])
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
