"""Exchanges that come together: which begin together, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import Code, ModelNotFound, Overloaded
from dl_inference_core.failures import fail
from dl_inference_core.metrics import Metrics
from dl_inference_core.routing import Routes
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.transport import Exchange
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, Protocol
from dl_inference_core.wire.routing_keys import RoutingKey

OIP, SELDON = PROTOCOLS["openinference"], PROTOCOLS["seldon"]
NO_KEY = object()


class Recorder:
    """An upstream that notes what begins; `raises` is what it then raises."""

    ready = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.began: list[list[Exchange]] = []
        self.raises: Exception | None = None

    def begin_all(self, exchanges: Sequence[Exchange], protocol: Protocol, key: RoutingKey) -> None:
        self.began.append(list(exchanges))
        if self.raises is not None:
            raise self.raises


class Table:
    def __init__(self, *upstreams: Recorder) -> None:
        self.models = {upstream.name: upstream for upstream in upstreams}
        self.tasks: dict[int, Recorder] = {}


class Scene:
    def __init__(self, *names: str, most_in_flight: int = 0) -> None:
        self.upstreams = {name: Recorder(name) for name in names}
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(
            Routes(Table(*self.upstreams.values())), self.metrics, most_in_flight=most_in_flight
        )

    def exchange(self, model: str, protocol: Protocol = OIP, key: Any = NO_KEY, **more: Any) -> MemoryExchange:
        """Of a request for `model`, whose key the transport has read unless `key` says otherwise."""
        if protocol is OIP:
            body = messages.ModelInferRequest(model_name=model).SerializeToString()
        else:
            body = messages.SeldonMessage(strData="x").SerializeToString()
        exchange = MemoryExchange(protocol.node_method, body, service=self.dispatcher, **more)
        exchange.key = protocol.read_key(body) if key is NO_KEY else key
        return exchange

    def counted(self) -> dict[tuple[str, str], dict[str, int]]:
        """How many requests have ended, by protocol and upstream, and by status."""
        return {names: counts.read()[0] for names, counts in self.metrics.requests.items()}


async def test_those_with_one_key_begin_together_and_in_order() -> None:
    scene = Scene("a", "b")
    first = [scene.exchange("a") for _ in range(3)]
    second = [scene.exchange("b"), scene.exchange("b")]
    last = scene.exchange("a")
    scene.dispatcher.begin_all([*first, *second, last])
    assert scene.upstreams["a"].began == [first, [last]]
    assert scene.upstreams["b"].began == [second]
    for exchange in (*first, *second, last):
        exchange.reply(b"answer")
    assert scene.counted() == {("openinference", "a"): {"OK": 4}, ("openinference", "b"): {"OK": 2}}


async def test_a_key_that_the_transport_has_not_read_is_read_for_each() -> None:
    scene = Scene("a", "b")
    exchanges = [scene.exchange(name, key=None) for name in "aba"]
    scene.dispatcher.begin_all(exchanges)
    assert scene.upstreams["a"].began == [[exchanges[0]], [exchanges[2]]]
    assert scene.upstreams["b"].began == [[exchanges[1]]]


async def test_requests_that_name_no_model_go_each_where_its_metadata_says() -> None:
    scene = Scene("a", "b")
    exchanges = [scene.exchange("", SELDON, metadata=(("seldon", name),)) for name in "abb"]
    assert {exchange.key for exchange in exchanges} == {RoutingKey(None)}
    scene.dispatcher.begin_all(exchanges)
    assert scene.upstreams["a"].began == [[exchanges[0]]]
    assert scene.upstreams["b"].began == [[exchanges[1]], [exchanges[2]]]


async def test_of_those_that_come_together_as_many_begin_as_there_is_room_for() -> None:
    scene = Scene("a", most_in_flight=3)
    earlier = scene.exchange("a")
    scene.dispatcher.begin_all([earlier])
    exchanges = [scene.exchange("a") for _ in range(4)]
    scene.dispatcher.begin_all(exchanges)
    assert scene.upstreams["a"].began == [[earlier], exchanges[:2]]
    assert [type(exchange.error) for exchange in exchanges] == [type(None), type(None), Overloaded, Overloaded]
    assert scene.counted()["openinference", ""] == {"RESOURCE_EXHAUSTED": 2}
    late = scene.exchange("a")
    scene.dispatcher.begin_all([late])
    assert isinstance(late.error, Overloaded), "a refused request has taken no place that it could give back"
    for exchange in (earlier, *exchanges[:2]):
        exchange.reply(b"answer")
    again = [scene.exchange("a") for _ in range(4)]
    scene.dispatcher.begin_all(again)
    assert [exchange.error is None for exchange in again] == [True, True, True, False]


async def test_where_all_have_room_no_refusal_is_counted() -> None:
    scene = Scene("a", most_in_flight=2)
    scene.dispatcher.begin_all([scene.exchange("a"), scene.exchange("a")])
    assert scene.counted() == {("openinference", "a"): {}}


async def test_each_request_for_an_unknown_model_is_told_so() -> None:
    scene = Scene("a", most_in_flight=2)
    for _ in range(2):  # their places are free again
        exchanges = [scene.exchange("unknown"), scene.exchange("unknown")]
        scene.dispatcher.begin_all(exchanges)
        assert all(isinstance(exchange.error, ModelNotFound) for exchange in exchanges)
    assert scene.counted() == {("openinference", ""): {"NOT_FOUND": 4}}


async def test_what_an_upstream_raises_fails_those_that_have_not_ended() -> None:
    class Half(Recorder):
        def begin_all(self, exchanges: Sequence[Exchange], protocol: Protocol, key: RoutingKey) -> None:
            fail(exchanges[0], Overloaded("full"))
            super().begin_all(exchanges, protocol, key)

    scene = Scene("a")
    upstream = scene.upstreams["a"] = Half("a")
    scene.dispatcher = Dispatcher(Routes(Table(upstream)), scene.metrics)
    upstream.raises = ZeroDivisionError("broken")
    exchanges = [scene.exchange("a") for _ in range(3)]
    scene.dispatcher.begin_all(exchanges)
    codes = [exchange.error.code for exchange in exchanges if exchange.error is not None]
    assert codes == [Code.RESOURCE_EXHAUSTED, Code.INTERNAL, Code.INTERNAL]
    assert scene.counted() == {("openinference", "a"): {"RESOURCE_EXHAUSTED": 1, "INTERNAL": 2}}


@pytest.mark.parametrize("parameters", [{}, {"timeout": {"int64_param": 1}}])
async def test_requests_that_ask_for_a_place_in_a_queue_do_not_begin_beside_others(parameters: Any) -> None:
    scene = Scene("a")
    plain = scene.exchange("a")
    asking = scene.exchange("a")
    body = messages.ModelInferRequest(model_name="a", parameters=parameters).SerializeToString()
    asking.key = OIP.read_key(body)
    scene.dispatcher.begin_all([plain, asking])
    assert scene.upstreams["a"].began == ([[plain], [asking]] if parameters else [[plain, asking]])
