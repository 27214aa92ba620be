"""Requests that a route sends to a node at once, without a state of their own: their place beside requests that wait,
and what the node's health hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dl_inference_core.config import HealthConfig, NodeConfig, RouteConfig
from dl_inference_core.errors import NodeFailed, NodeUnreachable
from dl_inference_core.gateway.balancing import RoundRobin
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.gateway.pool import Endpoints, Pool
from dl_inference_core.gateway.probing import Verdict
from dl_inference_core.metrics import Metrics
from dl_inference_core.testing.memory import LoopClock, MemoryExchange
from dl_inference_core.transport import Answer, Connection, Message
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_core.wire.routing_keys import RoutingKey

PROTOCOL = PROTOCOLS["openinference"]
SLOW_S = 0.05


class Nodes:
    """Nodes that answer once they are told to.

    Attributes:
        asked: the ids of the requests that came, in order.
    """

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.asked: list[str] = []

    def connect(self, _: NodeConfig) -> Connection:
        nodes = self

        class Hanging(Connection):
            async def call(self, method: str, message: Message, **_: Any) -> Answer:
                if method == PROTOCOL.node_method:
                    nodes.asked.append(messages.ModelInferRequest.FromString(bytes(message)).id)
                    await nodes.answers.wait()
                return Answer(b"\x08\x01", ())

            async def close(self) -> None: ...

        return Hanging()


@asynccontextmanager
async def routed(nodes: Nodes, addresses: Sequence[str]) -> AsyncIterator[Forwarder]:
    """A route whose nodes take one request each at a time."""
    metrics, clock = Metrics(), LoopClock(asyncio.get_running_loop())
    health = HealthConfig(interval_ms=0, slow_start_s=0, rise=1, failures=2)
    endpoints = Endpoints(nodes.connect, health, metrics, clock)
    configs = tuple(NodeConfig(address=address) for address in addresses)
    route = RouteConfig(name="m", nodes=configs, node_in_flight=1, timeout_ms=9000)
    forwarder = Forwarder(route, Pool(endpoints), RoundRobin(RoundRobin.Options()), metrics, clock, "gateway")
    await endpoints.probed()
    yield forwarder
    await forwarder.close()


def begun(forwarder: Forwarder, number: int) -> MemoryExchange:
    message = messages.ModelInferRequest(model_name="m", id=str(number)).SerializeToString()
    exchange = MemoryExchange(PROTOCOL.node_method, message)
    forwarder.begin(exchange, PROTOCOL, RoutingKey("m"))
    return exchange


async def test_requests_that_come_before_the_queue_is_told_of_room_stay_behind_those_that_wait() -> None:
    nodes = Nodes()
    async with routed(nodes, ["10.0.0.1:8500", "10.0.0.2:8500"]) as forwarder:
        full, back = forwarder.pool.nodes
        back.endpoint.health.failed(NodeUnreachable("gone"))
        exchanges = [begun(forwarder, number) for number in range(3)]
        assert (full.in_flight, back.in_flight, forwarder.queued) == (1, 0, 2)
        back.endpoint.health.probed(Verdict.WELL, forwarder.clock.now())
        assert forwarder.pool.usable() == (full, back)
        exchanges += [begun(forwarder, number) for number in range(3, 6)]
        assert (full.in_flight, back.in_flight, forwarder.queued) == (1, 1, 4)
        nodes.answers.set()
        await asyncio.gather(*(exchange.outcome() for exchange in exchanges))
    assert nodes.asked == ["0", "1", "2", "3", "4", "5"]


async def test_the_health_of_a_node_hears_when_a_request_was_answered() -> None:
    nodes = Nodes()
    async with routed(nodes, ["10.0.0.1:8500"]) as forwarder:
        health = forwarder.pool.nodes[0].endpoint.health
        assert health.answered_at < 0
        began = forwarder.clock.now()
        exchange = begun(forwarder, 0)
        await asyncio.sleep(SLOW_S)
        nodes.answers.set()
        await exchange.outcome()
        assert began + SLOW_S <= health.answered_at <= forwarder.clock.now()


async def test_an_answer_clears_what_the_health_of_the_node_remembers_of_failures() -> None:
    nodes = Nodes()
    nodes.answers.set()
    async with routed(nodes, ["10.0.0.1:8500"]) as forwarder:
        health = forwarder.pool.nodes[0].endpoint.health
        health.failed(NodeFailed("bad"))
        assert (health.usable, health.forgivable) == (True, True)
        await begun(forwarder, 0).outcome()
        assert not health.forgivable
