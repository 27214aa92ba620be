"""The nodes of a route, and the endpoints behind them, which routes share and reloads keep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dl_inference_core.config import NodeConfig
from dl_inference_core.gateway.health import Health
from dl_inference_core.transport import Connection


class Endpoint:
    """One address, however many routes use it: its connection, and what is known of its health."""

    __slots__ = ("_users", "address", "connection", "health")

    def __init__(self, address: str, connection: Connection, health: Health) -> None:
        self.address = address
        self.connection = connection
        self.health = health
        self._users = 0


class Endpoints:
    """Every endpoint in use, by address. Event loop only."""

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._by_address: dict[str, Endpoint] = {}
        self.changes = 0
        """Grows whenever an endpoint becomes usable or stops being so."""

    def use(self, address: str) -> Endpoint:
        """The endpoint at `address`, made on first use; pair with `release`."""
        endpoint = self._by_address.get(address)
        if endpoint is None:
            connection = self._connect(address)
            endpoint = self._by_address[address] = Endpoint(address, connection, Health(connection, self._changed))
        endpoint._users += 1
        return endpoint

    async def release(self, endpoint: Endpoint) -> None:
        """Give back a `use`; the last one closes the connection."""
        endpoint._users -= 1
        if endpoint._users == 0:
            del self._by_address[endpoint.address]
            await endpoint.health.close()
            await endpoint.connection.close()

    async def probe_all(self) -> None:
        """Ask every endpoint once how it is; those that do not answer are left out until they do."""
        await asyncio.gather(*(endpoint.health.check() for endpoint in self._by_address.values()))

    def _changed(self) -> None:
        self.changes += 1


class Node:
    """One endpoint in one route; what a balancer sees of it."""

    __slots__ = ("address", "endpoint", "idle", "in_flight", "removed", "weight")

    def __init__(self, endpoint: Endpoint, weight: int) -> None:
        self.endpoint = endpoint
        self.address = endpoint.address
        self.weight = weight
        self.in_flight = 0
        self.removed = False
        self.idle = asyncio.Event()
        """Set by whoever ends the last attempt on a removed node."""


class Pool:
    """The nodes of one route. Event loop only."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._usable: tuple[Node, ...] = ()
        self._seen = -1
        self.nodes: tuple[Node, ...] = ()

    def usable(self) -> Sequence[Node]:
        """The nodes that may be chosen; all of them where none is known to be well: a request then fails by trying."""
        if self._seen != self._endpoints.changes:
            self._seen = self._endpoints.changes
            self._usable = tuple(node for node in self.nodes if node.endpoint.health.usable) or self.nodes
        return self._usable

    def update(self, configs: Sequence[NodeConfig]) -> list[Node]:
        """Take on new nodes, keep those that stay, and return those that left, for `retire`."""
        before = {node.address: node for node in self.nodes}
        nodes = []
        for config in configs:
            node = before.pop(config.address, None)
            if node is None:
                node = Node(self._endpoints.use(config.address), config.weight)
            node.weight = config.weight
            nodes.append(node)
        self.nodes = tuple(nodes)
        self._usable = ()  # a route without requests must not hold on to nodes that left
        self._seen = -1
        for node in before.values():
            node.removed = True
        return list(before.values())

    async def retire(self, node: Node) -> None:
        """Let the attempts on a node that left end, then release its endpoint."""
        if node.in_flight:
            await node.idle.wait()
        await self._endpoints.release(node.endpoint)
