"""Every part in turn, in several rounds: samples of CPU µs per request."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

from bench.core import loads, setup
from bench.core.transport import MemoryTransport
from bench.rounds import turns
from dl_inference_core.app import App
from dl_inference_core.errors import Code
from dl_inference_core.gateway.balancing import Outcome
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.metrics import Metrics
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.serving import settle
from dl_inference_core.tensors import Response
from dl_inference_core.testing.fakes import EXCHANGE, FakeNode

AT_ONCE = 32
"""Requests that a transport hands over in one call where many have come."""
IN_FLIGHT = 128
"""Twice the rows of a batch: one batch runs while the next one gathers."""
_CALLS, _FORWARDED, _ALONE, _ANSWERED = 20_000, 10_000, 3_000, 10_000
"""Of one sample: calls of one function, requests through a gateway, requests to a node one after another, and requests
to a node with 128 in flight. Each takes 0.02 to 0.5 s of CPU: the median of five repeats within a few per cent."""
_LEAST = 2 * IN_FLIGHT
"""Of a sample, however short the run."""
_SECONDS = 0.01
"""What an attempt or a request is said to have taken."""

Part: TypeAlias = "Callable[[], Awaitable[float]]"
Parts: TypeAlias = "Iterator[tuple[str, Part]]"
Samples: TypeAlias = "Mapping[str, Sequence[float]]"
"""By name of the part, one for each round."""

PARTS = (
    *("unit", "key", "route_choice", "metrics", "codec"),
    *(f"{name}_{at_once}" for at_once in (1, AT_ONCE) for name in ("gateway", "hedging", "passing")),
    *(f"{name}_{in_flight}" for in_flight in (1, IN_FLIGHT) for name in ("node", "echoing", "hopping", "spread")),
)


async def measure(rounds: int, share: float, measured: Callable[[], None]) -> tuple[Samples, float]:
    """The samples of all `PARTS`, and the mean number of rows in a batch with `IN_FLIGHT` requests in flight.

    Args:
        rounds: samples of each part; the parts take turns, each round in another order.
        share: of the requests that a full sample has.
        measured: called after each sample.

    Raises:
        InferenceError: a request failed; PluginError: the strategy is not installed.
        RuntimeError: the machine was so busy that round robin took over from the strategy.
    """
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(setup.serving(**setup.gateway()))
        hedging = await stack.enter_async_context(setup.serving(**setup.gateway(hedge=True)))
        node = await stack.enter_async_context(setup.node())
        passing, echoing, hopping = (setup.behind(each) for each in (setup.Passing, setup.Echoing, setup.Hopping))
        key = loads.PROTOCOL.read_key(loads.make_requests(1)[0])
        for transport in (*map(_transport, (gateway, hedging, node)), passing, echoing, hopping):
            transport.key = key
        parts = {
            **dict(_calls(gateway, share)),
            **dict(_forwarding(share, gateway=_transport(gateway), hedging=_transport(hedging), passing=passing)),
            **dict(_answering(share, one_core, node=_transport(node), echoing=echoing, hopping=hopping)),
            **dict(_answering(share, nullcontext, spread=_transport(node))),
        }
        await loads.ask(_transport(node))
        settle()  # the garbage collector, as in a server that has started
        samples: dict[str, list[float]] = {name: [] for name in PARTS}
        batches = rows = 0.0
        for name in turns(PARTS, rounds):
            batches_before, rows_before = _batches(node.metrics)
            samples[name].append(await parts[name]())
            if name == f"node_{IN_FLIGHT}":
                batches_after, rows_after = _batches(node.metrics)
                batches, rows = batches + batches_after - batches_before, rows + rows_after - rows_before
            measured()
        for app in (gateway, hedging):
            if _route(app).balancer.name != setup.BALANCER:
                raise RuntimeError(
                    f"{setup.BALANCER} was interrupted for 50 ms too often, and round robin took over from it: measure "
                    "again on a machine with less to do"
                )
        return samples, rows / batches


def _transport(app: App) -> MemoryTransport:
    assert isinstance(app.transport, MemoryTransport)
    return app.transport


def _route(app: App) -> Forwarder:
    assert app.gateway is not None
    return app.gateway.models[loads.MODEL]


def _count(full: int, share: float) -> int:
    return max(round(full * share), _LEAST)


def _calls(app: App, share: float) -> Parts:
    """What can be called alone: the unit, and parts of what a gateway or a node does for each request."""
    balancer = Plugins().make(Kind.BALANCERS, setup.BALANCER, {}, "bench core")
    fakes = tuple(FakeNode(f"10.0.0.{number}:8500") for number in range(1, setup.NODES + 1))
    route = _route(app)
    nodes = route.pool.usable()
    messages = loads.make_requests(_count(_ALONE, share))
    following = cycle(messages)
    codec, read_key = loads.PROTOCOL.codec, loads.PROTOCOL.read_key
    success = Outcome.SUCCESS  # a look-up of it takes a sixth of the unit

    def choose() -> None:
        balancer.record(balancer.choose(fakes, EXCHANGE), success, _SECONDS)

    def choose_on_route() -> None:
        route.picker.balancer.record(route.picker.choose(nodes, EXCHANGE, route.clock.now()), success, _SECONDS)

    def count() -> None:
        app.metrics.requests[loads.PROTOCOL.name, loads.MODEL].count(Code.OK, _SECONDS)
        nodes[0].attempts.successes += 1

    def transcode() -> None:
        request = codec.decode_request(next(following))
        codec.encode_response(Response(payload=request.payload, model=loads.MODEL, version=1), request)

    for name, function, full in (
        ("unit", choose, _CALLS),
        ("key", lambda: read_key(next(following)), _CALLS),
        ("route_choice", choose_on_route, _CALLS),
        ("metrics", count, _CALLS),
        ("codec", transcode, _ALONE),
    ):
        yield name, _calling(function, _count(full, share))


def _calling(function: Callable[[], object], count: int) -> Part:
    async def sample() -> float:
        return loads.call(function, count)

    return sample


def _forwarding(share: float, **transports: MemoryTransport) -> Parts:
    messages = loads.make_requests(_count(_FORWARDED, share))

    def part(transport: MemoryTransport, at_once: int) -> Part:
        async def sample() -> float:
            return loads.forward(transport, messages, at_once)

        return sample

    for name, transport in transports.items():
        for at_once in (1, AT_ONCE):
            yield f"{name}_{at_once}", part(transport, at_once)


@contextmanager
def one_core() -> Iterator[None]:
    """All threads of this process share one core meanwhile, where the system can have them do so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    _move_threads({max(cores)})
    try:
        yield
    finally:
        _move_threads(cores)


def _move_threads(cores: Set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def _answering(share: float, where: Callable[[], AbstractContextManager[None]], **transports: MemoryTransport) -> Parts:
    def part(transport: MemoryTransport, in_flight: int, messages: Sequence[bytes]) -> Part:
        async def sample() -> float:
            with where():
                return await loads.answer(transport, messages, in_flight)

        return sample

    for in_flight, full in ((1, _ALONE), (IN_FLIGHT, _ANSWERED)):
        messages = loads.make_requests(_count(full, share))
        for name, transport in transports.items():
            yield f"{name}_{in_flight}", part(transport, in_flight, messages)


def _batches(metrics: Metrics) -> tuple[float, float]:
    """Calls of the model so far, and the rows in them."""
    lines = metrics.render("")[0].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    label = f'{{model="{loads.MODEL}"}}'
    name = "dl_inference_batch_rows"
    return float(values.get(f"{name}_count{label}", 0)), float(values.get(f"{name}_sum{label}", 0))
