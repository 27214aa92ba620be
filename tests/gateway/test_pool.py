"""Which of a route's nodes are offered to its strategy, of all that are unwell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

import pytest

from dl_inference_core.config import HealthConfig, NodeConfig
from dl_inference_core.errors import InferenceError, NodeFailed, NodeUnreachable
from dl_inference_core.gateway import pool as module
from dl_inference_core.gateway.clock import SystemClock
from dl_inference_core.gateway.health import Reason
from dl_inference_core.gateway.pool import Endpoints, Node, Pool
from dl_inference_core.metrics import Metrics
from dl_inference_core.testing.memory import LoopClock
from dl_inference_core.transport import Answer, Connection, Message

SERVING = b"\x08\x01"


class Silent(Connection):
    """A connection whose probes all have one result."""

    def __init__(self, results: dict[str, bytes | InferenceError], address: str) -> None:
        self._results = results
        self._address = address

    async def call(self, method: str, message: Message, **_: Any) -> Answer:
        result = self._results[self._address]
        if isinstance(result, InferenceError):
            raise result
        return Answer(result, ())

    async def close(self) -> None: ...


class Lane:
    """One route of `count` nodes, "0:1", "1:1" and so on, whose endpoints others may use, too.

    Attributes:
        results: what a probe of an address comes to.
    """

    def __init__(self, count: int, endpoints: Endpoints | None = None, **health: Any) -> None:
        self.metrics = Metrics()
        self.results: dict[str, bytes | InferenceError] = {f"{number}:1": SERVING for number in range(count)}
        if endpoints is None:
            config = HealthConfig(**{"interval_ms": 0, **health})
            clock = SystemClock(LoopClock(asyncio.get_running_loop()))
            endpoints = Endpoints(lambda node: Silent(self.results, node.address), config, self.metrics, clock)
        self.endpoints = endpoints
        self.pool = Pool(endpoints)
        self.pool.update([NodeConfig(address=address) for address in self.results])

    def leave_out(self, number: int, reason: Reason = Reason.OUTLIER) -> None:
        """As another process says; it stays so until `back`."""
        self.results[f"{number}:1"] = NodeFailed("no")
        self.pool.nodes[number].endpoint.health.learn_left_out(reason, "as told")

    async def back(self, number: int) -> None:
        endpoint = self.pool.nodes[number].endpoint
        self.results[f"{number}:1"] = SERVING
        async with asyncio.timeout(5):
            while not endpoint.health.usable:
                endpoint.health.learn_returned()
                await endpoint.probes.settled()

    def usable(self) -> str:
        return "".join(node.address[0] for node in self.pool.usable())

    def drawn(self, turns: int = 2000) -> Counter[str]:
        """How often each node was offered."""
        return Counter(node.address[0] for _ in range(turns) for node in self.pool.usable())

    async def close(self) -> None:
        for node in self.pool.update(()):
            await self.pool.retire(node)


@pytest.mark.parametrize(
    ("count", "part", "usable"),
    [
        (1, 0.5, "0"),
        (2, 0.5, "1"),
        (3, 0.5, "12"),
        (4, 0.5, "23"),
        (5, 0.5, "234"),
        (4, 0.0, "0123"),
        (4, 0.24, "0123"),
        (4, 0.25, "123"),
        (4, 1.0, "3"),
        (1, 1.0, "0"),
    ],
)
async def test_only_so_many_are_ejected_and_those_that_were_first(count: int, part: float, usable: str) -> None:
    lane = Lane(count, max_ejected=part)
    for number in range(count):
        lane.leave_out(number, (Reason.OUTLIER, Reason.PROBE)[number % 2])
    assert lane.usable() == usable
    await lane.close()


async def test_when_one_is_back_the_next_has_to_go(caplog: pytest.LogCaptureFixture) -> None:
    lane = Lane(4)
    for number in (2, 0, 3):
        lane.leave_out(number)
    assert lane.usable() == "13"
    await lane.back(2)
    assert lane.usable() == "12"
    await lane.back(3)
    assert lane.usable() == "123"
    await lane.back(0)
    assert lane.usable() == "0123"
    await lane.close()


@pytest.mark.parametrize("reason", [Reason.UNREACHABLE, Reason.NOT_SERVING])
async def test_who_is_not_there_or_says_no_does_not_count(reason: Reason) -> None:
    lane = Lane(4)
    for number in (0, 1):
        lane.leave_out(number, reason)
    assert lane.usable() == "23"
    lane.leave_out(2, reason)
    assert lane.usable() == "3"
    lane.leave_out(3)
    assert lane.usable() == "0123"  # none is left: all are tried
    await lane.back(1)
    assert lane.usable() == "1"
    await lane.close()


async def test_an_ejection_that_turns_out_a_refusal_makes_room_for_another() -> None:
    lane = Lane(4)
    for number in range(3):
        lane.leave_out(number)
    assert lane.usable() == "23"
    lane.results["0:1"] = NodeUnreachable("gone")
    health = lane.pool.nodes[0].endpoint.health
    health.learn_returned()  # which has it asked at once
    await lane.endpoints.probed()
    assert lane.usable() == "3"
    await lane.close()


async def test_of_those_that_say_unavailable_only_so_many_are_left_out_unless_they_cannot_be_reached() -> None:
    lane = Lane(4)
    await lane.endpoints.probed()
    told = []
    lane.pool.changed = lambda: told.append(lane.usable())
    for number in range(4):
        lane.pool.nodes[number].endpoint.health.failed(NodeUnreachable("the queue is full"))
    assert lane.usable() == "23"
    await lane.endpoints.probed()
    assert told[-1] == lane.usable() == "0123"
    for number in range(3):
        lane.results[f"{number}:1"] = NodeUnreachable("gone")
        lane.pool.nodes[number].endpoint.health.failed(NodeUnreachable("gone"))
    assert lane.usable() == "23"
    await lane.endpoints.probed()
    assert lane.usable() == "3"
    await lane.close()


async def test_each_route_has_its_own_bound_on_the_endpoints_that_it_shares() -> None:
    lane = Lane(4)
    small = Pool(lane.endpoints)
    small.update([NodeConfig(address=f"{number}:1") for number in (0, 1)])
    assert [node.endpoint for node in small.nodes] == [node.endpoint for node in lane.pool.nodes[:2]]
    for number in (0, 1):
        lane.leave_out(number)
    assert lane.usable() == "23"
    assert [node.address for node in small.usable()] == ["1:1"]
    for node in small.update(()):
        await small.retire(node)
    await lane.close()


# Fewer requests


async def to_trial(lane: Lane, number: int) -> None:
    health = lane.pool.nodes[number].endpoint.health
    for _ in range(5):
        health.failed(NodeFailed("bad"))
    await lane.endpoints.probed()
    assert health.on_trial


async def test_who_is_on_trial_has_one_request_at_a_time_at_growing_pauses() -> None:
    lane = Lane(4)
    await lane.endpoints.probed()
    await to_trial(lane, 1)
    node = lane.pool.nodes[1]
    assert lane.usable() == "023"
    node.endpoint.health.trial_at = time.monotonic()
    assert lane.usable() == "0123"
    node.in_flight = 1
    assert lane.usable() == "023"
    node.in_flight = 0
    node.endpoint.health.failed(NodeFailed("still"))
    assert lane.usable() == "023"
    node.endpoint.health.succeeded()
    assert lane.usable() == "0123"
    await lane.close()


async def test_a_trial_falls_due_each_tenth_turn_but_not_before_its_time_nor_while_one_is_under_way() -> None:
    lane = Lane(4)
    await lane.endpoints.probed()
    assert lane.pool.due() == ()
    await to_trial(lane, 1)
    node = lane.pool.nodes[1]
    lane.usable()
    assert lane.pool.due() == ()
    node.endpoint.health.trial_at = time.monotonic()
    assert lane.pool.due() == (node,)
    assert [lane.pool.due() for _ in range(39)] == [()] * 39
    node.in_flight = 1
    assert lane.pool.due() == ()
    node.in_flight = 0
    assert lane.pool.due() == (node,)
    node.endpoint.health.succeeded()
    lane.usable()
    assert [lane.pool.due() for _ in range(50)] == [()] * 50
    await lane.close()


async def test_who_has_no_weight_is_not_tried_unless_none_has_any() -> None:
    lane = Lane(2)
    await lane.endpoints.probed()
    await to_trial(lane, 0)
    lane.pool.nodes[0].endpoint.health.trial_at = time.monotonic()
    lane.usable()
    lane.pool.nodes[0].weight = 0
    assert lane.pool.due() == ()
    lane.pool.nodes[1].weight = 0
    assert lane.pool.due() == (lane.pool.nodes[0],)
    await lane.close()


async def test_as_long_as_nothing_changes_the_same_tuple_is_offered() -> None:
    lane = Lane(4, slow_start_s=1000)
    await lane.endpoints.probed()
    whole = lane.pool.usable()
    await to_trial(lane, 1)
    node = lane.pool.nodes[1]
    node.endpoint.health.trial_at = time.monotonic() + 1000
    most = lane.pool.usable()
    assert [other.address for other in most] == ["0:1", "2:1", "3:1"]
    assert all(lane.pool.usable() is most for _ in range(10))
    node.endpoint.health.trial_at = 0
    assert lane.pool.usable() is whole
    node.in_flight = 1
    assert lane.pool.usable() is most
    node.in_flight = 0
    node.endpoint.health.succeeded()
    assert lane.pool.usable() is whole
    await lane.close()


async def test_who_is_on_trial_when_it_has_just_come_back_is_spared_for_that_alone() -> None:
    lane = Lane(4, slow_start_s=1000)
    lane.leave_out(1, Reason.UNREACHABLE)
    await lane.back(1)
    await to_trial(lane, 1)
    lane.usable()
    assert lane.pool.snapshot().half_open == (lane.pool.nodes[1],)
    assert lane.pool.snapshot().starting == ()
    await lane.close()


async def test_only_so_many_are_spared_for_a_trial_as_may_be_ejected() -> None:
    lane = Lane(4)
    await lane.endpoints.probed()
    for number in range(4):
        await to_trial(lane, number)
    assert lane.usable() == "23"
    lane.leave_out(3)
    assert lane.usable() == "12"
    await lane.close()


async def test_a_node_that_is_back_starts_slowly_and_then_has_all() -> None:
    lane = Lane(2, slow_start_s=1000)
    assert lane.drawn()["0"] == 2000
    lane.leave_out(0, Reason.UNREACHABLE)
    assert lane.drawn()["0"] == 0
    await lane.back(0)
    health = lane.pool.nodes[0].endpoint.health
    assert 100 < lane.drawn()["0"] < 300
    health._back_at -= 500
    assert 1000 < lane.drawn()["0"] < 1200
    assert lane.drawn()["1"] == 2000
    health._back_at -= 500
    assert lane.drawn()["0"] == 2000
    assert lane.pool.snapshot().starting == ()
    await lane.close()


async def test_a_route_whose_nodes_all_start_slowly_has_one_for_each_request() -> None:
    lane = Lane(2, slow_start_s=1000)
    for number in (0, 1):
        lane.leave_out(number, Reason.UNREACHABLE)
    for number in (0, 1):
        await lane.back(number)
    assert all(lane.pool.usable() for _ in range(200))
    await lane.close()


# Who is told


async def test_every_route_is_told_once_of_a_node_that_is_back() -> None:
    lane = Lane(2)
    other = Pool(lane.endpoints)
    other.update([NodeConfig(address="0:1"), NodeConfig(address="1:1")])
    told: list[tuple[Pool, Node]] = []
    for pool in (lane.pool, other):
        pool.returned = lambda node: told.append((node.pool, node))
    lane.leave_out(0, Reason.UNREACHABLE)
    assert told == []
    await lane.back(0)
    assert sorted(told, key=lambda one: one[0] is other) == [(lane.pool, lane.pool.nodes[0]), (other, other.nodes[0])]
    told.clear()
    lane.leave_out(1)
    gone = other.update([NodeConfig(address="0:1")])
    await lane.back(1)
    assert told == [(lane.pool, lane.pool.nodes[1])]
    for node in (*gone, *other.update(())):
        await other.retire(node)
    await lane.close()


async def test_other_processes_are_told_only_what_was_found_out_here() -> None:
    lane = Lane(2)
    told: list[tuple[str, Reason | None]] = []
    lane.endpoints.told = lambda endpoint: told.append((endpoint.target, endpoint.health.reason))
    lane.leave_out(0)
    assert told == []
    await lane.back(0)
    lane.results["1:1"] = NodeUnreachable("gone")
    lane.pool.nodes[1].endpoint.health.failed(NodeUnreachable("gone"))
    await lane.endpoints.probed()
    assert told == [("0:1", None), ("1:1", Reason.UNREACHABLE)]
    assert lane.endpoints.find("1:1") is lane.pool.nodes[1].endpoint
    assert lane.endpoints.find("9:1") is None
    assert [endpoint.target for endpoint in lane.endpoints] == ["0:1", "1:1"]
    await lane.close()


async def test_the_metrics_say_who_is_left_out_and_why() -> None:
    lane = Lane(2)

    def values() -> dict[str, str]:
        lines = lane.metrics.render("")[0].decode().splitlines()
        wanted = ("dl_inference_node_usable{", "dl_inference_ejections_total{")
        return dict(line.rsplit(" ", 1) for line in lines if line.startswith(wanted))

    up = {f'dl_inference_node_usable{{node="{number}:1"}}': "1.0" for number in (0, 1)}
    assert values() == up
    lane.leave_out(0, Reason.NOT_SERVING)
    out = 'dl_inference_ejections_total{node="0:1",reason="not_serving"}'
    assert values() == {**up, 'dl_inference_node_usable{node="0:1"}': "0.0", out: "1.0"}
    await lane.back(0)
    assert values() == {**up, out: "1.0"}
    await lane.close()
    assert values() == {}


async def test_one_line_says_who_is_left_out_however_often_it_comes_and_goes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    lane = Lane(2)
    health = lane.pool.nodes[0].endpoint.health

    async def lose() -> None:
        lane.results["0:1"] = NodeUnreachable("no")
        health.failed(NodeUnreachable("connection refused"))
        await lane.endpoints.probed()

    await lane.endpoints.probed()
    for _ in range(3):
        await lose()
        await lane.back(0)
        for _ in range(3):
            health.failed(NodeUnreachable("it only says so"))
            await lane.endpoints.probed()
        health.succeeded()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("WARNING", "node 0:1 ejected: unreachable: connection refused"),
        ("INFO", "node 0:1 healthy again"),
    ]
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    await lose()
    assert caplog.messages[-1].endswith("connection refused (2 times more since this was last said)")
    caplog.clear()
    lane.leave_out(1)  # whoever found out has said so
    assert caplog.messages == []
    await lane.close()
