"""The nodes of a route, and the endpoints behind them, which routes share and reloads keep.

Threads: endpoints and nodes come and go on the event loop. The health of an endpoint changes on any thread, and is read
without a lock. A change marks the snapshot of each route that has the endpoint as outdated, and the route's next
request makes a new one, under the route's lock. That takes 6 µs for four nodes; thousands of routes may share an
endpoint, and to make the snapshots of all at once would hold requests up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dl_inference_core.config import HealthConfig, NodeConfig
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.health import Health
from dl_inference_core.gateway.health_states import OUR_JUDGEMENT, State
from dl_inference_core.gateway.probing import BackgroundProbes, Prober, call_on_loop
from dl_inference_core.metrics import AttemptCounts, Metrics
from dl_inference_core.transport import Connection

_log = logging.getLogger(__name__)

_QUIET_S = 10.0
_TURNS_BETWEEN_TRIALS = 10


class Endpoint:
    """One address, however many routes use it: its connection, what is known of its health, and its nodes."""

    __slots__ = ("address", "connection", "health", "nodes", "probes", "said", "said_at", "target", "unsaid")

    def __init__(self, node: NodeConfig, connection: Connection, probes: BackgroundProbes, health: Health) -> None:
        self.address = node.address
        self.target = node.target
        self.connection = connection
        self.probes = probes
        self.health = health
        self.nodes: dict[Node, None] = {}
        """In the order of their routes; only the event loop changes it, and other threads copy it in one step."""
        self.said = False
        self.said_at = -math.inf
        self.unsaid = 0


class Endpoints:
    """Every endpoint in use, by `NodeConfig.target`. Event loop only.

    Attributes:
        told: called on the event loop, if it is there, when this process itself has found out that an endpoint is
            ejected, or healthy again. Must not raise.
    """

    def __init__(
        self, connect: Callable[[NodeConfig], Connection], config: HealthConfig, metrics: Metrics, clock: Clock
    ) -> None:
        self._connect = connect
        self._metrics = metrics
        self._by_target: dict[str, Endpoint] = {}
        self.config = config
        self.clock = clock
        self.told: Callable[[Endpoint], None] | None = None

    def use(self, config: NodeConfig, node: Node) -> Endpoint:
        """The endpoint of `config`, made on first use, for `node`; pair with `release`."""
        endpoint = self._by_target.get(config.target)
        if endpoint is None:
            endpoint = self._by_target[config.target] = self._make(config)
            self._metrics.node_usable(endpoint.target, True)
            endpoint.health.start()
        endpoint.nodes[node] = None
        return endpoint

    def _make(self, config: NodeConfig) -> Endpoint:
        loop = asyncio.get_running_loop()
        connection = self._connect(config)
        prober = Prober(config.address, connection, self.config.probe, self.config.timeout_ms / 1000)
        probes = BackgroundProbes(prober, self.clock.now)
        health = Health(
            probes,
            self.config,
            self.clock,
            changed=lambda: self._changed(endpoint),
            returned=lambda: self._returned(endpoint),
            moved=lambda own: call_on_loop(loop, lambda: self._moved(endpoint, own)),
        )
        endpoint = Endpoint(config, connection, probes, health)
        return endpoint

    async def release(self, node: Node) -> None:
        """Give back a `use`; the last one closes the connection."""
        endpoint = node.endpoint
        del endpoint.nodes[node]
        if not endpoint.nodes:
            del self._by_target[endpoint.target]
            self._metrics.node_gone(endpoint.target)
            endpoint.health.close()
            await endpoint.probes.close()
            await endpoint.connection.close()

    async def probed(self) -> None:
        """Wait until every endpoint has been asked how it is; those that do not answer are ejected until they do."""
        await asyncio.gather(*(endpoint.probes.settled() for endpoint in self._by_target.values()))

    def find(self, target: str) -> Endpoint | None:
        """The endpoint in use of that `NodeConfig.target`."""
        return self._by_target.get(target)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._by_target.values())

    def _changed(self, endpoint: Endpoint) -> None:
        """Any thread."""
        for node in tuple(endpoint.nodes):
            node.pool.outdate()

    def _returned(self, endpoint: Endpoint) -> None:
        """Any thread."""
        for node in tuple(endpoint.nodes):
            if not node.removed:
                node.pool.returned(node)

    def _moved(self, endpoint: Endpoint, own: bool) -> None:
        if not endpoint.nodes:  # it was released meanwhile
            return
        reason = endpoint.health.reason
        self._metrics.node_usable(endpoint.target, reason is None)
        if reason is not None:
            self._metrics.ejection(endpoint.target, reason.value)
        if own:
            _say(endpoint)
            if self.told is not None:
                self.told(endpoint)


def _say(endpoint: Endpoint) -> None:
    """Log that it is ejected or healthy again; of one that comes and goes, only now and then."""
    reason = endpoint.health.reason
    if reason is None:
        if endpoint.said:
            endpoint.said = False
            _log.info("node %s healthy again", endpoint.target)
        return
    now = time.monotonic()
    if now - endpoint.said_at < _QUIET_S:
        endpoint.unsaid += 1
        return
    again = f" ({endpoint.unsaid} times more since this was last said)" if endpoint.unsaid else ""
    _log.warning("node %s ejected: %s: %s%s", endpoint.target, reason.value, endpoint.health.detail, again)
    endpoint.said, endpoint.said_at, endpoint.unsaid = True, now, 0


def _ignore(*_: object) -> None: ...


class Node:
    """One endpoint in one route; what a balancer sees of it."""

    __slots__ = ("_idle", "_loop", "address", "attempts", "endpoint", "in_flight", "pool", "removed", "weight")

    attempts: AttemptCounts
    """Set by the route, which writes it."""

    def __init__(self, pool: Pool, endpoints: Endpoints, config: NodeConfig) -> None:
        self.pool = pool
        self.address = config.address
        self.weight = config.weight
        self.in_flight = 0
        self.removed = True
        """Until the route has taken it on, and after it has left the route."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self.endpoint = endpoints.use(config, self)

    def end_last_attempt(self) -> None:
        """The last attempt on a removed node has ended. Any thread."""
        call_on_loop(self._loop, self._idle.set)

    async def idle(self) -> None:
        """Wait until a removed node has no attempts. Event loop only."""
        if self.in_flight:
            await self._idle.wait()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The nodes of a route that may be chosen, as their health was at one time.

    Attributes:
        usable: those that may be chosen; all of them where none is known to be well: a request then fails by trying.
        half_open: those of `usable` that get one trial request at a time.
        starting: those of `usable` that get a part of their share, in slow start.
    """

    usable: tuple[Node, ...] = ()
    half_open: tuple[Node, ...] = ()
    starting: tuple[Node, ...] = ()

    @property
    def steady(self) -> bool:
        """Whether each of `usable` may have its whole share."""
        return not (self.half_open or self.starting)


class Pool:
    """The nodes of one route. `connect`, `update` and `retire`: event loop only; `outdate`: any thread; all else: any
    thread, under the route's lock; `update` needs it, too.

    Attributes:
        nodes: all of them; only the event loop changes it.
        steady: the nodes that may be chosen, where no health has changed and each may have its whole share of the
            requests; else none: ask `due` and `usable`.
        changed: called on any thread when another answer than before may be right to which nodes may be chosen. The
            caller may hold the lock of a route: it must not wait for one. Must not raise.
        returned: likewise, called with a node that was ejected or half-open, and is healthy again.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._now = endpoints.clock.now
        self._snapshot = Snapshot()
        self._outdated = False
        self.steady: Sequence[Node] = ()
        self._spared: set[Node] = set()
        self._offered: tuple[Node, ...] = ()
        """The usable nodes without `_spared`: while nothing changes, the same tuple."""
        self._until_trial = 0
        self.nodes: tuple[Node, ...] = ()
        self.changed: Callable[[], None] = _ignore
        self.returned: Callable[[Node], None] = _ignore

    def outdate(self) -> None:
        """The health of a node has changed. Any thread."""
        self._outdated = True
        self.steady = ()
        self._outdated = True  # a request may have looked at the nodes between the two lines above
        self.changed()

    def snapshot(self) -> Snapshot:
        """The nodes that may be chosen, as of the last change."""
        if self._outdated:
            self._outdated = False  # before the nodes are looked at: what changes from now on is for the next request
            self._snapshot = snapshot = self._judged()
            self._spared = set()
            self.steady = snapshot.usable if snapshot.steady else ()
            if self._outdated:  # again, meanwhile: `outdate` may have come before the line above
                self.steady = ()
        return self._snapshot

    def usable(self) -> Sequence[Node]:
        """The nodes that may be chosen this time."""
        snapshot = self.snapshot()
        return snapshot.usable if snapshot.steady else self._drawn(snapshot)

    def due(self) -> Sequence[Node]:
        """The one half-open node whose turn it is to show how it does; mostly none. For each request that could be
        tried again on another node, once: a strategy that has learned to avoid the node would hardly ever give it the
        chance.

        At pauses that grow from 0.1 s to 1 s, and a tenth of a fair share of this route's requests.
        """
        snapshot = self._snapshot  # of the last request: the first one after a change is left to the strategy
        if not snapshot.half_open:
            return ()
        self._until_trial -= 1
        if self._until_trial > 0:
            return ()
        now = self._now()
        for node in snapshot.half_open:
            if (
                node.endpoint.health.on_trial
                and _trial_due(node, now)
                and (node.weight > 0 or not any(other.weight for other in snapshot.usable))
            ):
                self._until_trial = _TURNS_BETWEEN_TRIALS * len(self.nodes)
                return (node,)
        return ()

    def _drawn(self, snapshot: Snapshot) -> Sequence[Node]:
        """The nodes that may be chosen this time, where some may not have all their share."""
        now = self._now()
        spared = {node for node in snapshot.half_open if not _trial_due(node, now)}
        for node in snapshot.starting:
            share = node.endpoint.health.share(now)
            if share >= 1:
                self._outdated = True
            elif random.random() >= share:  # noqa: S311 - no secret
                spared.add(node)
        if not spared:
            return snapshot.usable
        if spared != self._spared:
            self._spared = spared
            self._offered = tuple([node for node in snapshot.usable if node not in spared]) or snapshot.usable
        return self._offered

    def _judged(self) -> Snapshot:
        """Of the nodes that are unwell by our own judgement as many are spared as `max_ejected` allows, the first ones;
        and each that says so itself, or cannot be reached."""
        nodes, now = self.nodes, self._now()
        standings = {node: node.endpoint.health.standing for node in nodes}
        most = min(int(self._endpoints.config.max_ejected * len(nodes)), len(nodes) - 1)
        ejected = [node for node, standing in standings.items() if standing.reason in OUR_JUDGEMENT]
        ejected.sort(key=lambda node: standings[node].since)
        kept = set(ejected[most:])
        usable = tuple([node for node in nodes if standings[node].state.usable or node in kept])
        if not usable or len(usable) == len(nodes):
            usable = nodes
        half_open = [node for node in usable if standings[node].state is State.HALF_OPEN]
        others = (node for node in usable if standings[node].state is not State.HALF_OPEN)
        starting = [node for node in others if node.endpoint.health.share(now) < 1]
        return Snapshot(usable, tuple(half_open[: max(most - len(ejected), 0)]), tuple(starting))

    def connect(self, configs: Sequence[NodeConfig]) -> list[Node]:
        """A node for each of `configs`: the pool's own, or a new one, for `update`. Not under the route's lock: to
        connect may take a while."""
        known = {node.endpoint.target: node for node in self.nodes}
        return [known.get(config.target) or Node(self, self._endpoints, config) for config in configs]

    def update(self, configs: Sequence[NodeConfig], nodes: Sequence[Node] | None = None) -> list[Node]:
        """Take on new nodes, keep those that stay, and return those that left, for `retire`.

        Args:
            nodes: of `connect`, if it was called before.
        """
        nodes = self.connect(configs) if nodes is None else nodes
        for node, config in zip(nodes, configs, strict=True):
            node.weight = config.weight
            node.removed = False
        before, self.nodes = self.nodes, tuple(nodes)
        # A route without requests must not hold on to nodes that left.
        self._snapshot, self._spared, self._offered = Snapshot(), set(), ()
        self._outdated, self.steady = True, ()
        stay = set(nodes)
        gone = [node for node in before if node not in stay]
        for node in gone:
            node.removed = True
        return gone

    async def retire(self, node: Node) -> None:
        """Let the attempts on a node that left end, then release its endpoint."""
        await node.idle()
        await self._endpoints.release(node)


def _trial_due(node: Node, now: float) -> bool:
    """Whether a half-open node may get its next trial request."""
    return not node.in_flight and now >= node.endpoint.health.trial_at
