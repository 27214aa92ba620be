"""Nodes by name: "dns:///name:port" in a route stands for a node at each address that the name has, as it does for
gRPC's own clients.

A name is looked up again and again: for how long an answer holds, its TTL, `getaddrinfo` does not say. One that cannot
be looked up keeps the addresses that it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from dl_inference_core.config import NodeConfig, RouteConfig

PREFIX = "dns:///"

_START_S = 1.0
_HASTY_S = 1.0
_LONGEST_LOOK_S = 0.25
# Each holds a thread for as long as name servers do not answer.
_AT_ONCE = 2

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name and a port, each "host:port", IPv6 in brackets.

Raises:
    OSError, ValueError: there are none; it says why.
"""

Complain: TypeAlias = Callable[[str, str], None]
"""Takes what a warning is about, and the warning, or "" once there is nothing to warn of."""


async def resolve(name: str, port: int) -> list[str]:
    """The system's `Resolve`: hosts file, name servers, or whatever else it is told to ask; IPv4 and IPv6 addresses.

    It runs on a thread of its own, which the end of the process does not wait for as it would for the event loop's.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(hosts: list[str], error: Exception | None) -> None:
        if answer.done():  # nobody waits for it any more
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(hosts)

    def look_up() -> None:
        hosts, failure = [], None
        try:
            hosts = [str(where[0]) for *_, where in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the event loop has closed
            loop.call_soon_threadsafe(settle, hosts, failure)

    try:
        threading.Thread(target=look_up, name=f"look up {name}", daemon=True).start()
    except RuntimeError as error:  # there are too many
        raise OSError(str(error)) from error
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in await answer]


class Names:
    """The names in use, and what they stand for. Event loop only."""

    def __init__(
        self,
        resolve: Resolve,
        interval_s: float,
        *,
        verified: bool,
        usable: Callable[[NodeConfig], bool],
        changed: Callable[[], None],
        complain: Complain,
    ) -> None:
        """Args:
        interval_s: seconds between two look-ups of a name; up to a quarter less, by chance.
        verified: whether nodes must have a certificate for the name.
        usable: whether requests may go to one of the nodes; while not, its name is looked up more often.
        changed: called when a name stands for other addresses than before.
        """
        self._resolve = resolve
        self._interval_s = interval_s
        self._verified = verified
        self._usable = usable
        self._changed = changed
        self._complain = complain
        self._names: dict[str, _Name] = {}
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._watching: asyncio.Task[None] | None = None
        self._lookups: set[asyncio.Task[None]] = set()

    async def start(self, routes: Iterable[RouteConfig]) -> None:
        """Look up the names in `routes`, for a second at most, and from now on."""
        self.want(routes)
        if self._lookups:
            await asyncio.wait(self._lookups, timeout=_START_S)
        self._watching = asyncio.create_task(self._watch(), name="look up names")

    async def close(self) -> None:
        """Look up nothing any more."""
        tasks = [*self._lookups, *([self._watching] if self._watching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def want(self, routes: Iterable[RouteConfig]) -> None:
        """Look up the names in `routes` from now on."""
        for address in _names(routes) - self._names.keys():
            self._names[address] = name = _Name(address)
            self._begin(name)

    def want_only(self, routes: Iterable[RouteConfig]) -> None:
        """Forget the names that are in none of `routes`."""
        for address in self._names.keys() - _names(routes):
            del self._names[address]
            self._complain(address, "")

    def within(self, route: RouteConfig) -> bool:
        """Whether a name stands for any of the route's nodes."""
        return any(node.address.startswith(PREFIX) for node in route.nodes)

    def expand(self, route: RouteConfig) -> RouteConfig:
        """`route` with a node for each address in the place of a name; of several at one address the first counts."""
        if not self.within(route):
            return route
        nodes: dict[str, NodeConfig] = {}
        for node in route.nodes:
            named = self._names[node.address].nodes(node.weight) if node.address.startswith(PREFIX) else (node,)
            for each in named:
                nodes.setdefault(each.address, each)
        return route.model_copy(update={"nodes": tuple(nodes.values())})

    async def _watch(self) -> None:
        pause_s = min(self._interval_s / 2, _LONGEST_LOOK_S)
        hasty_s = min(self._interval_s, _HASTY_S)
        while True:
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            for name in self._names.values():
                since_s = now - name.began
                if since_s >= name.interval_s or (since_s >= hasty_s and not self._well(name)):
                    self._begin(name)

    def _well(self, name: _Name) -> bool:
        """Whether requests may go to each of its addresses, of which there are some."""
        return bool(name.addresses) and all(map(self._usable, name.nodes(1)))

    def _begin(self, name: _Name) -> None:
        if name.busy:
            return
        name.busy = True
        name.began = time.monotonic()
        name.interval_s = self._interval_s * random.uniform(0.75, 1)  # noqa: S311 - jitter
        task = asyncio.create_task(self._look_up(name))
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _look_up(self, name: _Name) -> None:
        try:
            async with self._at_once:
                found = tuple(sorted(set(await self._resolve(name.host, name.port))))
            if not found:
                raise OSError("it has no addresses")
        except (OSError, ValueError) as error:
            if self._names.get(name.address) is name:
                why = error.strerror if isinstance(error, OSError) and error.strerror else error
                kept = "its last addresses stay" if name.addresses else "it stands for no node until it can"
                self._complain(name.address, f"{name.address} cannot be looked up: {why}; {kept}")
            return
        finally:
            name.busy = False
        if self._names.get(name.address) is not name:
            return
        self._complain(name.address, "")
        if found != name.addresses:
            name.take(found, name.host.removesuffix(".") if self._verified else None)
            if self._watching is not None:
                self._changed()


def _names(routes: Iterable[RouteConfig]) -> set[str]:
    return {node.address for route in routes for node in route.nodes if node.address.startswith(PREFIX)}


class _Name:
    """One name and port.

    Attributes:
        addresses: what it stands for; () until it has been looked up.
        began: when it was last looked up, by `time.monotonic`.
        busy: whether it is being looked up.
    """

    __slots__ = ("_nodes", "_server_name", "address", "addresses", "began", "busy", "host", "interval_s", "port")

    def __init__(self, address: str) -> None:
        self.address = address
        self.host, _, port = address.removeprefix(PREFIX).rpartition(":")
        self.port = int(port)
        self.addresses: tuple[str, ...] = ()
        self.began = 0.0
        self.busy = False
        self.interval_s = 0.0
        self._server_name: str | None = None
        self._nodes: dict[int, tuple[NodeConfig, ...]] = {}

    def take(self, addresses: tuple[str, ...], server_name: str | None) -> None:
        self.addresses = addresses
        self._server_name = server_name
        self._nodes.clear()

    def nodes(self, weight: int) -> tuple[NodeConfig, ...]:
        """A node of that weight at each address; the same objects for as long as the addresses are the same."""
        nodes = self._nodes.get(weight)
        if nodes is None:
            nodes = self._nodes[weight] = tuple(
                NodeConfig(address=address, weight=weight, server_name=self._server_name) for address in self.addresses
            )
        return nodes
