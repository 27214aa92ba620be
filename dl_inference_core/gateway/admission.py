"""How many requests a route's nodes have at once, and who waits for one of them to have room."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from dl_inference_core.errors import Overloaded
from dl_inference_core.gateway.pool import Node
from dl_inference_core.gateway.retries import Recent
from dl_inference_core.metrics import Metrics

Tried = Sequence[Node]


class _Waiter:
    """A request that waits for its turn."""

    __slots__ = ("late", "look", "tried")

    def __init__(self, tried: Tried) -> None:
        self.tried = tried
        self.late = False
        self.look = asyncio.get_running_loop().create_future()
        """Done when there may be something to find."""

    def wake(self) -> None:
        if not self.look.done():
            self.look.set_result(None)

    def give_up(self) -> None:
        self.late = True
        self.wake()


class Admission:
    """The queue of one route. Event loop only.

    First come, first served; but whoever could not be answered in time any more, by what recent attempts took, is
    refused rather than sent to a node, whose work would be lost: at once, where the length of the queue says so.

    Whoever is admitted takes its place by `began` before anything else runs, so nothing is reserved that could leak.
    """

    def __init__(self, eligible: Callable[[Tried], Sequence[Node]], recent: Recent, metrics: Metrics) -> None:
        """Args:
        eligible: the nodes that may be chosen, less those that were tried; the same object for as long as it holds.
        recent: how long attempts take.
        """
        self._eligible = eligible
        self._recent = recent
        self._metrics = metrics
        self._per_node = sys.maxsize
        self._queue = 0
        self._waiting: deque[_Waiter] = deque()
        self._retrying: deque[_Waiter] = deque()
        """Those of them that were tried: what they may have differs from what the others may."""
        self._seen: Sequence[Node] = ()
        self._open: Sequence[Node] | None = None
        self.name = ""
        """The route's, for messages and metrics."""

    def configure(self, name: str, per_node: int, queue: int) -> None:
        """Take on other limits; those that wait stay.

        Args:
            per_node: attempts at once; 0 is no limit.
            queue: requests that may wait.
        """
        self.name = name
        self._per_node = per_node or sys.maxsize
        self._queue = queue
        self._seen, self._open = (), None
        self.wake()

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def room(self, tried: Tried) -> Sequence[Node]:
        """The eligible nodes that could take an attempt now."""
        nodes = self._eligible(tried)
        if tried:
            return [node for node in nodes if node.in_flight < self._per_node]
        if self._open is None or nodes is not self._seen:
            self._seen = nodes
            self._open = tuple([node for node in nodes if node.in_flight < self._per_node])
        return self._open

    async def admit(self, tried: Tried, end: float) -> Sequence[Node]:
        """`room`, once there is some and it is this request's turn; none if no node is eligible at all.

        Args:
            end: when the request must have been answered, on the clock of `time.monotonic`.

        Raises:
            Overloaded: the queue is full, or the time would not suffice.
        """
        if (nodes := self.room(tried)) and (not self._waiting or self._next() is None):
            return nodes
        nodes = self._eligible(tried)
        return await self._wait(tried, end, len(nodes)) if nodes else ()

    async def _wait(self, tried: Tried, end: float, nodes: int) -> Sequence[Node]:
        before = len(self._waiting)
        if before >= self._queue:
            raise self._refused("queue_full", f"{before} requests wait already")
        attempt_s = self._recent.typical_s
        latest = end - attempt_s
        left_s = latest - time.monotonic()
        if left_s <= attempt_s * before / (nodes * self._per_node):
            raise self._refused("no_time", f"with {before} requests before it this one would not be answered in time")
        waiter = _Waiter(tried)
        self._waiting.append(waiter)
        if tried:
            self._retrying.append(waiter)
        timer = asyncio.get_running_loop().call_later(left_s, waiter.give_up)
        found: Sequence[Node] = ()
        try:
            self.wake()
            while not found and self._eligible(tried):
                await waiter.look
                if waiter.late:
                    raise self._refused("no_time", "none had room in time")
                waiter.look = asyncio.get_running_loop().create_future()
                found = self.room(tried)
                if not found or self._next() is not waiter:
                    found = ()  # it has gone, or is for who came before and can have it, or something else
                    self.wake()
            return found
        finally:
            timer.cancel()
            self._waiting.remove(waiter)
            if tried:
                self._retrying.remove(waiter)
            if not found:
                self.wake()  # it may have been this one's turn

    def began(self, node: Node) -> None:
        """An attempt was counted in `node.in_flight`."""
        if node.in_flight >= self._per_node:
            self._open = None
        self.wake()

    def ended(self, node: Node) -> None:
        """An attempt is no longer counted in `node.in_flight`."""
        if node.in_flight >= self._per_node - 1:
            self._open = None
        self.wake()

    def wake(self) -> None:
        """Let the first who could use what there is look again; it sees to the next by `began`."""
        if not self._waiting:
            return
        if self._per_node == sys.maxsize or not self._eligible(()):  # there is nothing to wait for
            for waiter in self._waiting:
                waiter.wake()
        elif (first := self._next()) is not None:
            first.wake()

    def _next(self) -> _Waiter | None:
        """The first of those that wait that could use what there is; or that looks already, as soon as it runs."""
        nodes = self.room(())
        for waiter in self._waiting if nodes else self._retrying:
            if waiter.look.done() or (nodes and not waiter.tried):
                return waiter
            if waiter.tried and (self.room(waiter.tried) or not self._eligible(waiter.tried)):
                return waiter
        return None

    def _refused(self, reason: str, why: str) -> Overloaded:
        self._metrics.rejection(self.name, reason)
        return Overloaded(f"route {self.name}: every node has its {self._per_node} requests, and {why}")
