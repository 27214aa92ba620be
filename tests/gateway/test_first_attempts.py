"""Requests that a route sends to a node at once, without a state of their own: their place beside requests that wait,
and what the node's health hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from dl_inference_core.config import HealthConfig, NodeConfig, RouteConfig
from dl_inference_core.errors import NodeFailed, NodeUnreachable
from dl_inference_core.gateway.balancing import Balancer, Outcome, RoundRobin
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.gateway.health_states import State
from dl_inference_core.gateway.pool import Endpoints, Pool
from dl_inference_core.gateway.probing import Verdict
from dl_inference_core.metrics import Metrics
from dl_inference_core.testing.memory import LoopClock, MemoryExchange
from dl_inference_core.transport import Answer, Connection, Done, Message
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_core.wire.routing_keys import RoutingKey

PROTOCOL = PROTOCOLS["openinference"]
SLOW_S = 0.05
E = TypeVar("E", bound=MemoryExchange)


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


class Captured(MemoryExchange):
    """Is forwarded nowhere: the test tells `done` of the end of its attempt."""

    done: Done
    context: object

    def forward(self, connection: Connection, method: str, done: Done, context: object = None, **_: Any) -> Any:
        self.done, self.context = done, context


@asynccontextmanager
async def routed(
    nodes: Nodes, addresses: Sequence[str], balancer: Balancer | None = None, **config: Any
) -> AsyncIterator[Forwarder]:
    """A route whose nodes take one request each at a time, where `config` does not say otherwise."""
    metrics, clock = Metrics(), LoopClock(asyncio.get_running_loop())
    health = HealthConfig(interval_ms=0, slow_start_s=0, rise=1, failures=2)
    endpoints = Endpoints(nodes.connect, health, metrics, clock)
    configs = tuple(NodeConfig(address=address) for address in addresses)
    route = RouteConfig(**{"name": "m", "nodes": configs, "node_in_flight": 1, "timeout_ms": 9000, **config})
    balancer = balancer or RoundRobin(RoundRobin.Options())
    forwarder = Forwarder(route, Pool(endpoints), balancer, metrics, clock, "gateway")
    await endpoints.probed()
    assert forwarder.pool.usable() == forwarder.pool.steady  # from the first request on
    yield forwarder
    await forwarder.close()


def begun(forwarder: Forwarder, number: int) -> MemoryExchange:
    return begin(forwarder, MemoryExchange, number)


def captured(forwarder: Forwarder, number: int) -> Captured:
    return begin(forwarder, Captured, number)


def begin(forwarder: Forwarder, kind: type[E], number: int) -> E:
    message = messages.ModelInferRequest(model_name="m", id=str(number)).SerializeToString()
    exchange = kind(PROTOCOL.node_method, message)
    forwarder.begin_all((exchange,), PROTOCOL, RoutingKey("m"))
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
        now = forwarder.clock.now() + 0.002  # uvloop counts milliseconds
        assert began + SLOW_S / 2 < health.answered_at <= now


async def test_attempts_that_end_together_are_told_to_the_health_in_their_order() -> None:
    """Failures between which there is a success are not consecutive."""
    async with routed(Nodes(), ["10.0.0.1:8500"], node_in_flight=0, attempts=1) as forwarder:
        (node,) = forwarder.pool.nodes
        exchanges = [captured(forwarder, number) for number in range(6)]
        errors = [NodeFailed("bad"), None] * 3
        exchanges[0].done([(each.context, error, (), 0.01) for each, error in zip(exchanges, errors, strict=True)])
        assert (node.endpoint.health.standing.state, node.in_flight) == (State.HEALTHY, 0)
        assert [type(each.error) for each in exchanges] == [NodeFailed, type(None)] * 3


@pytest.mark.parametrize("error", [None, NodeFailed("bad")])
async def test_a_strategy_that_ends_the_thread_keeps_no_other_attempt_from_its_end(error: NodeFailed | None) -> None:
    told: list[Outcome] = []

    class Leaving(RoundRobin):
        def record(self, node: Any, outcome: Outcome, seconds: float) -> None:
            told.append(outcome)
            if len(told) == 1:
                raise SystemExit

    balancer = Leaving(RoundRobin.Options())
    async with routed(Nodes(), ["10.0.0.1:8500"], balancer, node_in_flight=0, attempts=1) as forwarder:
        exchanges = [captured(forwarder, number) for number in range(3)]
        with pytest.raises(SystemExit):
            exchanges[0].done([(each.context, error, (), 0.01) for each in exchanges])
        assert forwarder.in_flight == 0
        assert told == [Outcome.SUCCESS if error is None else Outcome.FAILURE] * 3
        assert [each.error is not None for each in exchanges[1:]] == [error is not None] * 2


async def test_an_answer_clears_what_the_health_of_the_node_remembers_of_failures() -> None:
    nodes = Nodes()
    nodes.answers.set()
    async with routed(nodes, ["10.0.0.1:8500"]) as forwarder:
        health = forwarder.pool.nodes[0].endpoint.health
        health.failed(NodeFailed("bad"))
        assert (health.usable, health.forgivable) == (True, True)
        await begun(forwarder, 0).outcome()
        assert not health.forgivable
