"""One scenario with one strategy: clients that send by the clock, a route of the gateway, and nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.simulation import clock
from bench.simulation.node import Node
from bench.simulation.scenarios import OPTIONS, Scenario
from dl_inference_core.config import HealthConfig, NodeConfig, RouteConfig
from dl_inference_core.errors import HandlerFailed, InferenceError
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.gateway.pool import Endpoints, Pool
from dl_inference_core.metrics import Metrics
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.testing.memory import LoopClock, MemoryExchange
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_core.wire.routing_keys import RoutingKey

_PROTOCOL, _KEY = PROTOCOLS["tfserving"], RoutingKey("m")
_KEYS = 1000
ATTEMPT_MS = 500
SETTLED_S, BACK_S = 1.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a scenario with a strategy.

    Attributes:
        attempts: at nodes, for each request.
        share: the part of the attempts that the first node had of a fair one, by weights, from 1 s after its fault
            began until it ended; where nothing befalls one, the same of the node that had most of its fair part.
        share_after: the same from 1.5 s after the fault ended; None where nothing befalls one, or it stays.
        p50_ms: of the requests that began during the fault and were answered.
        left_out: how often a node was left out as unwell.
        others_left_out: how often one was to which nothing had happened.
    """

    requests: int
    failed: int
    attempts: float
    share: float
    share_after: float | None
    p50_ms: float
    p99_ms: float
    left_out: int
    others_left_out: int

    def values(self) -> dict[str, Any]:
        """By name, for JSON."""
        return asdict(self)


def simulate(scenario: Scenario, strategy: str, seed: int = 1) -> Figures:
    """Takes some 50 µs for a request."""
    return clock.run(_simulated(scenario, strategy, seed), seed)


async def _simulated(scenario: Scenario, strategy: str, seed: int) -> Figures:
    run = _Run(scenario, strategy, seed)
    await run.go()
    return run.figures()


class _Counting(Metrics):
    """Knows who was left out, and lets no strategy fail unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[str] = []

    def ejection(self, node: str, reason: str) -> None:
        self.left_out.append(node)

    def balancer_failure(self, balancer: str, route: str) -> None:
        raise AssertionError(f"{balancer} failed, and round robin would have taken over")


@dataclass(frozen=True, slots=True)
class _Request:
    began: float
    seconds: float
    answered: bool


class _Run:
    def __init__(self, scenario: Scenario, strategy: str, seed: int) -> None:
        self._scenario = scenario
        self._random = random.Random(seed)  # noqa: S311 - the same run again
        self._loop = asyncio.get_running_loop()
        self._metrics = _Counting()
        mean = sum(scenario.weights) / len(scenario.weights)
        self._nodes: dict[str, Node] = {}
        for number, weight in enumerate(scenario.weights, start=1):
            address = f"10.0.0.{number}:8500"
            places = round(scenario.behaviour.at_once * weight / mean) if scenario.by_weight else None
            behaviour = scenario.behaviour if places is None else replace(scenario.behaviour, at_once=places)
            self._nodes[address] = Node(address, behaviour)
        self._first = next(iter(self._nodes.values()))
        options = OPTIONS.get(strategy, {})
        self._balancer = Plugins().make(Kind.BALANCERS, strategy, options, scenario.name)
        self._balancer.random = random.Random(seed + 1)  # noqa: S311
        loop_clock = LoopClock(self._loop)
        self._endpoints = Endpoints(lambda node: self._nodes[node.address], HealthConfig(), self._metrics, loop_clock)
        self._forwarder = Forwarder(
            self._route(joined=not scenario.joins),
            Pool(self._endpoints),
            self._balancer,
            self._metrics,
            loop_clock,
            "simulation",
        )
        self._requests: list[_Request] = []
        self._under_way: dict[asyncio.Task[None], None] = {}
        self._error: BaseException | None = None

    def _route(self, *, joined: bool) -> RouteConfig:
        nodes = [
            NodeConfig(address=address, weight=weight)
            for address, weight in zip(self._nodes, self._scenario.weights, strict=True)
        ]
        nodes = nodes if joined else nodes[1:]
        return RouteConfig(name="m", nodes=tuple(nodes), timeout_ms=ATTEMPT_MS, **self._scenario.route)

    async def go(self) -> None:
        scenario = self._scenario
        await self._endpoints.probed()
        self._began = self._loop.time()
        self._fault_at = self._began + scenario.warm_s
        self._healed_at = self._fault_at + scenario.fault_s
        self._end = self._healed_at + scenario.after_s
        fate = asyncio.create_task(self._befall())
        while (now := self._loop.time()) < self._end:
            task = asyncio.create_task(self._ask(now))
            self._under_way[task] = None
            task.add_done_callback(self._over)
            await asyncio.sleep(self._random.expovariate(scenario.rate))
        await fate
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._forwarder.close()
        if self._error is not None:
            raise self._error

    def _over(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        if not task.cancelled():
            self._error = self._error or task.exception()

    async def _befall(self) -> None:
        scenario = self._scenario
        well = {name: getattr(scenario.behaviour, name) for name in scenario.fault}
        await self._until(self._fault_at)
        if scenario.joins:
            self._forwarder.configure(self._route(joined=True), self._balancer)
        period = scenario.every_s or scenario.fault_s
        for turn in range(round(scenario.fault_s / period)):
            self._first.behave(**(well if turn % 2 else scenario.fault))
            await self._until(self._fault_at + (turn + 1) * period)
        self._first.behave(**well)

    async def _until(self, at: float) -> None:
        await asyncio.sleep(at - self._loop.time())

    async def _ask(self, began: float) -> None:
        key = str(self._random.randrange(_KEYS))
        metadata = (("x-routing-key", key),)
        exchange = MemoryExchange(_PROTOCOL.node_method, b"", metadata, began + self._scenario.deadline_s)
        answered = True
        try:
            self._forwarder.begin_all((exchange,), _PROTOCOL, _KEY)
            await exchange.outcome()
        except HandlerFailed:  # a fault of ours, and none of the scenario
            raise
        except InferenceError:
            answered = False
        self._requests.append(_Request(began, self._loop.time() - began, answered))

    def figures(self) -> Figures:
        scenario, requests = self._scenario, self._requests
        latencies = sorted(
            request.seconds * 1000
            for request in requests
            if request.answered and self._fault_at <= request.began < self._healed_at
        )
        shares = self._shares(self._fault_at + SETTLED_S, self._healed_at)
        heals = bool(scenario.fault)
        out = self._metrics.left_out
        first = next(iter(self._nodes))
        others = [address for address in out if not (scenario.of_one and address == first)]
        return Figures(
            requests=len(requests),
            failed=sum(not request.answered for request in requests),
            attempts=round(sum(len(node.arrived) for node in self._nodes.values()) / len(requests), 4),
            share=round(shares[0] if scenario.of_one else max(shares), 3),
            share_after=round(self._shares(self._healed_at + BACK_S, self._end)[0], 3) if heals else None,
            p50_ms=round(_part(latencies, 0.5), 2),
            p99_ms=round(_part(latencies, 0.99), 2),
            left_out=len(out),
            others_left_out=len(others),
        )

    def _shares(self, since: float, until: float) -> list[float]:
        """What each node had of its fair part of the attempts."""
        counts = [sum(since <= at < until for at in node.arrived) for node in self._nodes.values()]
        weights = self._scenario.weights
        return [count / sum(counts) * sum(weights) / weight for count, weight in zip(counts, weights, strict=True)]


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]
