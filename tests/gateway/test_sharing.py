from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import Code
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome
from dl_inference_core.gateway.sharing import LARGEST, Share
from dl_inference_core.plugins import Kind
from dl_inference_core.transport import Exchange

Lab = Any  # tests/conftest.py


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as name:  # a socket's path must be short
        yield Path(name)


class Worker:
    """A share with a topic "t" whose state is `holds`, and what it has heard."""

    def __init__(self, folder: Path, index: int) -> None:
        self.share = Share(folder, index)
        self.heard: list[dict[str, Any]] = []
        self.holds: list[dict[str, Any]] = []
        self.share.subscribe("t", self.heard.append, lambda: self.holds)

    def start(self) -> Worker:
        self.share.start()
        return self

    def says(self, value: Any) -> None:
        self.share.publish("t", {"value": value})

    @property
    def values(self) -> list[Any]:
        return [payload["value"] for payload in self.heard]


async def until(what: Any, within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


async def test_what_one_publishes_all_others_hear_in_order(folder: Path) -> None:
    one, two, three = (Worker(folder, index).start() for index in range(3))
    assert one.share.others == 0  # nobody has said hello to it yet
    await until(lambda: one.share.others)
    for value in range(200):
        one.says(value)
    two.says("ü")
    await until(lambda: len(two.heard) == 200 and len(three.heard) == 201 and one.heard)
    assert two.values == list(range(200))
    assert [value for value in three.values if value != "ü"] == list(range(200))
    assert one.values == ["ü"]
    for worker in (one, two, three):
        worker.share.close()
    assert os.listdir(folder) == []  # noqa: PTH208


async def test_who_starts_is_told_everything_and_so_is_who_is_killed_and_started_again(folder: Path) -> None:
    one = Worker(folder, 0).start()
    one.holds = [{"value": 1}, {"value": 2}]
    two = Worker(folder, 1).start()
    await until(lambda: two.values == [1, 2])
    # Killed: its socket's file stays, and nobody says goodbye.
    asyncio.get_running_loop().remove_reader(two.share._socket)  # type: ignore[arg-type]
    two.share._socket.close()  # type: ignore[union-attr]
    one.says("to nobody")
    assert one.share.others == 0
    again = Worker(folder, 1).start()
    await until(lambda: again.values == [1, 2])
    one.says(3)
    await until(lambda: again.values == [1, 2, 3])
    two.share._socket = None
    for worker in (one, two, again):
        worker.share.close()


async def test_who_takes_no_messages_holds_up_nobody_and_is_told_everything_later(folder: Path) -> None:
    one, other = Worker(folder, 0).start(), Worker(folder, 2).start()
    stopped = Worker(folder, 1).start()
    await until(lambda: one.share.others == stopped.share.others == 2)
    one.says("before")
    await until(lambda: stopped.values == other.values == ["before"])
    other.heard.clear()
    loop = asyncio.get_running_loop()
    assert stopped.share._socket is not None
    loop.remove_reader(stopped.share._socket)
    for value in range(3000):
        one.says(value)
        if value % 5 == 0:
            await asyncio.sleep(0)
    await until(lambda: len(other.heard) == 3000)
    (waiting,) = [peer.waiting for index, peer in one.share._peers.items() if index == 1]
    assert len(waiting) <= 1024
    one.holds = [{"value": "everything"}]
    loop.add_reader(stopped.share._socket, stopped.share._readable)
    await until(lambda: stopped.values[-1:] == ["everything"])
    one.says("after")
    await until(lambda: stopped.values[-2:] == ["everything", "after"])
    for worker in (one, other, stopped):
        worker.share.close()


async def test_who_has_much_to_be_told_is_told_it_while_others_go_on_telling(folder: Path) -> None:
    one = Worker(folder, 0).start()
    state = [f"state {value}" for value in range(1300)]
    one.holds = [{"value": value} for value in state]
    two = Worker(folder, 1).start()
    said = 0
    async with asyncio.timeout(20):
        while state[-1] not in two.values:
            if one.share.others:
                one.says(said)
                said += 1
            await asyncio.sleep(0.002)
    await until(lambda: two.values[-1] == said - 1)
    assert [value for value in two.values if isinstance(value, str)] == state
    for worker in (one, two):
        worker.share.close()


async def test_garbage_is_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(folder, 0).start()
    garbage = [
        b"",
        b"\xff\xfe",
        b"[" * 20_000,
        b"{}",
        b"null",
        b"[1, 1]",
        b'[1, 1, "t", {}, 0]',
        b'[2, 1, "t", {"value": 0}]',
        b'[1, "1", "t", {"value": 0}]',
        b'[1, 0, "t", {"value": 0}]',
        b'[1, 1, ["t"], {"value": 0}]',
        b'[1, 1, "none", {"value": 0}]',
        b'[1, 1, "t", [0]]',
        b'[1, 99999999999999999999, "hello", {}]',
        json.dumps([1, 1, "t", {"value": "x" * LARGEST}]).encode(),
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(folder / "0"))
        for message in [*garbage, b'[1, 1, "t", {"value": "proper"}]']:
            sender.send(message)
            await asyncio.sleep(0)
    await until(lambda: worker.heard)
    assert worker.values == ["proper"]
    assert caplog.records == []
    worker.share.close()


async def test_what_makes_no_sense_to_a_subscriber_is_told_of_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Worker(folder, 0).start(), Worker(folder, 1)

    def heard(payload: dict[str, Any]) -> None:
        two.heard.append({"value": int(payload["value"])})

    two.share.subscribe("t", heard)
    two.start()
    await until(lambda: one.share.others)
    for value in ("a", "b", 3):
        one.says(value)
    await until(lambda: two.heard)
    assert two.values == [3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "what worker 0 tells of t makes no sense here"
    one.share.close()
    two.share.close()


async def test_a_message_that_is_too_large_is_refused(folder: Path) -> None:
    one, two = Worker(folder, 0).start(), Worker(folder, 1).start()
    await until(lambda: one.share.others)
    with pytest.raises(ValueError, match=r"a message on t has \d+ bytes, over 32768"):
        one.says("x" * LARGEST)
    one.says("x" * (LARGEST - 100))
    await until(lambda: two.heard)
    one.share.close()
    two.share.close()


async def test_without_a_folder_it_stays_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(tmp_path / "none", 0).start()
    worker.says(1)
    assert worker.share.others == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("what this worker learns stays its own: ")
    worker.share.close()


# Between gateways


class Patient(Balancer):
    """Takes the first node whose value is not over its limit; a value is a node's number of failures."""

    name = "patient"

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.failures: dict[Node, float] = {}
        self.asked = 0

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return min(nodes, key=lambda node: self.failures.get(node, 0))

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        self.failures[node] = self.failures.get(node, 0) + (outcome is Outcome.FAILURE)

    def learned(self, node: Node) -> float | None:
        self.asked += 1
        return self.failures.get(node)

    def learn(self, node: Node, value: float) -> None:
        self.failures[node] = value


def known(gateway: Any, route: str = "m") -> dict[str, float]:
    return {node.address: value for node, value in gateway.forwarder(route).balancer.failures.items()}


@pytest.fixture
def patient(lab: Lab) -> str:
    lab.plugins.classes(Kind.BALANCERS)[Patient.name] = Patient
    return 'balancer = "patient"\nattempts = 2\n'


QUIET = "[gateway.health]\ninterval_ms = 0\n"  # what is not asked for is not found out by a probe


async def test_what_one_gateway_finds_left_out_the_others_leave_out_and_bring_back(lab: Lab, folder: Path) -> None:
    a, b = await lab.nodes("ab")
    config = QUIET + lab.route(a, b)
    one, two = [await lab.gateway(config, share=Share(folder, index)) for index in range(2)]
    b.status = lab.error(Code.UNAVAILABLE)
    b.health = b"\x08\x02"
    for _ in range(20):
        await one.call()
    assert not one.usable(b)
    await lab.until(lambda: not two.usable(b))
    assert two.usable(a)
    three = await lab.gateway(config, share=Share(folder, 2))
    assert not three.usable(b)
    b.status, b.health = None, b"\x08\x01"
    await lab.until(lambda: one.usable(b) and two.usable(b) and three.usable(b))


async def test_what_a_strategy_learns_the_others_learn_and_do_not_tell_again(
    lab: Lab, folder: Path, patient: str
) -> None:
    a, b = await lab.nodes("ab")
    config = lab.route(a, b, more=patient) + lab.route(b, name="ü", task=None, more=patient)
    shares = [Share(folder, index) for index in range(2)]
    one, two = [await lab.gateway(config, share=share) for share in shares]
    a.status = lab.error(Code.INTERNAL)
    assert await one.call() == "b"
    await lab.until(lambda: known(two) == {a.address: 1, b.address: 0})
    assert await one.call("ü") == "b"
    await lab.until(lambda: known(two, "ü") == {b.address: 0})
    told = []
    shares[1].publish = lambda topic, payload: told.append((topic, payload))  # type: ignore[method-assign]
    asked = two.forwarder().balancer.asked
    assert await two.call() == "b"  # at once
    assert a.count == 1
    await lab.until(lambda: two.forwarder().balancer.asked > asked)
    assert told == []


async def test_what_was_learned_survives_one_gateway(lab: Lab, folder: Path, patient: str) -> None:
    a, b = await lab.nodes("ab")
    config = lab.route(a, b, more=patient)
    one, two = [await lab.gateway(config, share=Share(folder, index)) for index in range(2)]
    a.status = lab.error(Code.INTERNAL)
    await one.call()
    await lab.until(lambda: known(two) == {a.address: 1, b.address: 0})
    await one.app.close()
    again = await lab.gateway(config, share=Share(folder, 0))
    await lab.until(lambda: known(again) == {a.address: 1, b.address: 0})


async def test_routes_without_attempts_and_strategies_that_learn_nothing_cost_no_questions(
    lab: Lab, folder: Path, patient: str
) -> None:
    a = await lab.node()
    config = lab.route(a, more=patient) + lab.route(a, name="other", task=None, more=patient)
    config += lab.route(a, name="plain", task=None, more='balancer = "round_robin"')
    one, two = [await lab.gateway(config, share=Share(folder, index)) for index in range(2)]
    await lab.until(lambda: one.forwarder("other").balancer.asked)  # for the other gateway, which has just started
    asked = one.forwarder("other").balancer.asked
    await one.call()
    await one.call("plain")
    await lab.until(lambda: known(two))
    assert one.forwarder("other").balancer.asked == asked
    assert not one.forwarder("plain").recorded


async def test_what_is_known_of_nodes_that_go_is_forgotten(lab: Lab, folder: Path, patient: str) -> None:
    a, b = await lab.nodes("ab")
    config = "[gateway]\npoll_interval_ms = 10\n" + lab.route(a, b, more=patient)
    one, two = [await lab.gateway(config, share=Share(folder, index)) for index in range(2)]
    known_ = one.app.gateway._state_sync._known
    a.status = lab.error(Code.INTERNAL)
    await one.call()
    await lab.until(lambda: set(known_.get(one.forwarder(), ())) == {a.address, b.address})
    one.file.write_text(one.file.read_text().replace(lab.route(a, b, more=patient), lab.route(b, more=patient)))
    await lab.until(lambda: len(one.forwarder().pool.nodes) == 1)
    await one.call()
    await lab.until(lambda: set(known_[one.forwarder()]) == {b.address})
    assert known(two)


async def test_a_strategy_that_raises_is_told_of_once_and_forwards_as_before(
    lab: Lab, folder: Path, patient: str, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(node: Node, value: float) -> None:
        raise RuntimeError("as told")

    a, b = await lab.nodes("ab")
    config = lab.route(a, b, more=patient)
    one, two = [await lab.gateway(config, share=Share(folder, index)) for index in range(2)]
    two.forwarder().balancer.learn = raises  # type: ignore[method-assign]
    a.status = lab.error(Code.INTERNAL)
    await one.call()
    await lab.until(lambda: caplog.records)
    await one.call()
    assert await two.call() == "b"
    (record,) = caplog.records
    assert record.getMessage() == 'balancer "patient" failed to exchange what it has learned'


async def test_garbage_from_another_gateway_changes_nothing(lab: Lab, folder: Path, patient: str) -> None:
    a = await lab.node()
    gateway = await lab.gateway(lab.route(a, more=patient), share=Share(folder, 0))
    other = Share(folder, 1)
    other.start()
    garbage: list[tuple[str, dict[str, Any]]] = [
        ("health", {}),
        ("health", {"target": a.address, "reason": "none", "detail": ""}),
        ("health", {"target": [], "reason": "probe", "detail": None}),
        ("learned", {"learned": 1}),
        ("learned", {"learned": [["m", a.address]]}),
        ("learned", {"learned": [[[], a.address, 1]]}),
        ("learned", {"learned": [["m", a.address, "1"]]}),
        ("learned", {"learned": [["m", a.address, float("nan")]]}),
        ("learned", {"learned": [["none", a.address, 1], ["m", "none", 1]]}),
    ]
    for topic, payload in [*garbage, ("learned", {"learned": [["m", a.address, 7]]})]:
        other.publish(topic, payload)
    await lab.until(lambda: known(gateway) == {a.address: 7})
    assert gateway.usable(a)
    assert await gateway.call() == "a"
    other.close()
