"""The nodes of a route, and the endpoints behind them, which routes share and reloads keep."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

from dl_inference_core.config import HealthConfig, NodeConfig
from dl_inference_core.gateway.health import EJECTED, Health
from dl_inference_core.gateway.probing import Prober
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Connection

_log = logging.getLogger(__name__)

_QUIET_S = 10.0
_TURNS_BETWEEN_TRIALS = 10


class Endpoint:
    """One address, however many routes use it: its connection, what is known of its health, and its nodes."""

    __slots__ = ("address", "connection", "health", "nodes", "said", "said_at", "target", "unsaid")

    def __init__(self, node: NodeConfig, connection: Connection, health: Health) -> None:
        self.address = node.address
        self.target = node.target
        self.connection = connection
        self.health = health
        self.nodes: set[Node] = set()
        self.said = False
        self.said_at = -math.inf
        self.unsaid = 0


class Endpoints:
    """Every endpoint in use, by `NodeConfig.target`. Event loop only.

    Attributes:
        changes: grows whenever another answer than before may be right to which nodes of a route may be chosen.
        told: called, if it is there, when this process itself has found out that an endpoint is to be left out, or used
            again. Must not raise.
    """

    def __init__(self, connect: Callable[[NodeConfig], Connection], config: HealthConfig, metrics: Metrics) -> None:
        self._connect = connect
        self._metrics = metrics
        self._by_target: dict[str, Endpoint] = {}
        self.config = config
        self.changes = 0
        self.told: Callable[[Endpoint], None] | None = None

    def use(self, config: NodeConfig, node: Node) -> Endpoint:
        """The endpoint of `config`, made on first use, for `node`; pair with `release`."""
        target = config.target
        endpoint = self._by_target.get(target)
        if endpoint is None:
            connection = self._connect(config)
            prober = Prober(config.address, connection, self.config.probe, self.config.timeout_ms / 1000)
            health = Health(
                prober,
                self.config,
                changed=lambda: self._changed(target),
                returned=lambda: self._returned(target),
                moved=lambda own: self._moved(target, own),
            )
            endpoint = self._by_target[target] = Endpoint(config, connection, health)
            self._metrics.node_usable(target, True)
            health.start()
        endpoint.nodes.add(node)
        return endpoint

    async def release(self, node: Node) -> None:
        """Give back a `use`; the last one closes the connection."""
        endpoint = node.endpoint
        endpoint.nodes.discard(node)
        if not endpoint.nodes:
            del self._by_target[endpoint.target]
            self._metrics.node_gone(endpoint.target, endpoint.address)
            await endpoint.health.close()
            await endpoint.connection.close()

    async def probed(self) -> None:
        """Wait until every endpoint has been asked how it is; those that do not answer are left out until they do."""
        await asyncio.gather(*(endpoint.health.settled() for endpoint in self._by_target.values()))

    def find(self, target: str) -> Endpoint | None:
        """The endpoint in use of that `NodeConfig.target`."""
        return self._by_target.get(target)

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._by_target.values())

    def _changed(self, target: str) -> None:
        self.changes += 1
        for node in self._by_target[target].nodes:
            node.pool.changed()

    def _returned(self, target: str) -> None:
        for node in tuple(self._by_target[target].nodes):
            if not node.removed:
                node.pool.returned(node)

    def _moved(self, target: str, own: bool) -> None:
        endpoint = self._by_target[target]
        health = endpoint.health
        reason = health.reason
        self._metrics.node_usable(target, reason is None)
        if reason is not None:
            self._metrics.ejection(target, reason.value)
        if own:
            _say(endpoint)
            if self.told is not None:
                self.told(endpoint)


def _say(endpoint: Endpoint) -> None:
    """Log that it is left out or back; of one that comes and goes, only now and then."""
    reason = endpoint.health.reason
    if reason is None:
        if endpoint.said:
            endpoint.said = False
            _log.info("node %s is back", endpoint.target)
        return
    now = time.monotonic()
    if now - endpoint.said_at < _QUIET_S:
        endpoint.unsaid += 1
        return
    again = f" ({endpoint.unsaid} times more since this was last said)" if endpoint.unsaid else ""
    _log.warning("node %s is left out: %s: %s%s", endpoint.target, reason.value, endpoint.health.detail, again)
    endpoint.said, endpoint.said_at, endpoint.unsaid = True, now, 0


def _ignore(*_: object) -> None: ...


class Node:
    """One endpoint in one route; what a balancer sees of it."""

    __slots__ = ("address", "endpoint", "idle", "in_flight", "pool", "removed", "weight")

    def __init__(self, pool: Pool, endpoints: Endpoints, config: NodeConfig) -> None:
        self.pool = pool
        self.endpoint = endpoints.use(config, self)
        self.address = config.address
        self.weight = config.weight
        self.in_flight = 0
        self.removed = False
        self.idle = asyncio.Event()
        """Set by whoever ends the last attempt on a removed node."""


class Pool:
    """The nodes of one route. Event loop only.

    Attributes:
        changed: called when another answer than before may be right to which nodes may be chosen. Must not raise.
        returned: called with a node that was left out or on trial, and may have its whole share again. Must not raise.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._usable: tuple[Node, ...] = ()
        self._limited: tuple[Node, ...] = ()
        self._spared: set[Node] = set()
        self._offered: tuple[Node, ...] = ()
        self._seen = -1
        self._until_trial = 0
        self.nodes: tuple[Node, ...] = ()
        self.changed: Callable[[], None] = _ignore
        self.returned: Callable[[Node], None] = _ignore

    def usable(self) -> Sequence[Node]:
        """The nodes that may be chosen; all of them where none is known to be well: a request then fails by trying."""
        if self._seen != self._endpoints.changes:
            self._judge()
        return self._usable if not self._limited else self._drawn()

    def due(self) -> Sequence[Node]:
        """The one node on trial whose turn it is to show how it does; mostly none. For each request that could be tried
        again on another node, once: a strategy that has learned to avoid the node would hardly ever give it the chance.

        At pauses that grow from 0.1 s to 1 s, and a tenth of a fair share of this route's requests.
        """
        if not self._limited:
            return ()
        self._until_trial -= 1
        if self._until_trial > 0:
            return ()
        now = time.monotonic()
        for node in self._limited:
            health = node.endpoint.health
            if health.on_trial and not node.in_flight and now >= health.trial_at and self._weighs(node):
                self._until_trial = _TURNS_BETWEEN_TRIALS * len(self.nodes)
                return (node,)
        return ()

    def _weighs(self, node: Node) -> bool:
        return node.weight > 0 or not any(other.weight for other in self._usable)

    def _judge(self) -> None:
        """Who is left out, of all that are unwell: of those that we ejected by our own judgement as many as may be, the
        first ones; and each that says so itself, or cannot be reached."""
        self._seen = self._endpoints.changes
        nodes = self.nodes
        most = min(int(self._endpoints.config.max_ejected * len(nodes)), len(nodes) - 1)
        ejected = [node for node in nodes if node.endpoint.health.reason in EJECTED]
        ejected.sort(key=lambda node: node.endpoint.health.since)
        kept = ejected[most:]
        usable = tuple([node for node in nodes if node.endpoint.health.usable or node in kept])
        self._usable = usable if 0 < len(usable) < len(nodes) else nodes
        now = time.monotonic()
        on_trial = [node for node in self._usable if node.endpoint.health.on_trial]
        starting = [node for node in self._usable if node not in on_trial and node.endpoint.health.share(now) < 1]
        self._limited = (*on_trial[: max(most - len(ejected), 0)], *starting)
        self._spared = set()

    def _drawn(self) -> Sequence[Node]:
        """The nodes that may be chosen this time, where some may not have all their share."""
        now = time.monotonic()
        spared = set()
        for node in self._limited:
            health = node.endpoint.health
            if health.on_trial:
                if node.in_flight or now < health.trial_at:
                    spared.add(node)
            elif (share := health.share(now)) >= 1:
                self._seen = -1  # it has started
            elif random.random() >= share:  # noqa: S311 - no secret
                spared.add(node)
        if not spared:
            return self._usable
        if spared != self._spared:
            self._spared = spared
            self._offered = tuple([node for node in self._usable if node not in spared]) or self._usable
        return self._offered

    def update(self, configs: Sequence[NodeConfig]) -> list[Node]:
        """Take on new nodes, keep those that stay, and return those that left, for `retire`."""
        before = {node.endpoint.target: node for node in self.nodes}
        nodes = []
        for config in configs:
            node = before.pop(config.target, None)
            if node is None:
                node = Node(self, self._endpoints, config)
            node.weight = config.weight
            nodes.append(node)
        self.nodes = tuple(nodes)
        # A route without requests must not hold on to nodes that left.
        self._usable = self._limited = self._offered = ()
        self._spared = set()
        self._seen = -1
        for node in before.values():
            node.removed = True
        return list(before.values())

    async def retire(self, node: Node) -> None:
        """Let the attempts on a node that left end, then release its endpoint."""
        if node.in_flight:
            await node.idle.wait()
        await self._endpoints.release(node)
