"""How many requests a route's nodes have at once, and which request waits for one of them to have room."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol as Interface
from typing import TypeAlias

from dl_inference_core.errors import DeadlineExceeded, Overloaded
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.pool import Node
from dl_inference_core.gateway.retries import Recent
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Timer

Tried: TypeAlias = Sequence[Node]


class Waiting(Interface):
    """A request that may have to wait. The queue calls its methods under the route's lock."""

    tried: list[Node]
    """The nodes that it had attempts on."""

    def waits(self) -> None:
        """It was put into the queue."""

    def admitted(self, nodes: Sequence[Node]) -> None:
        """It is its turn: count an attempt on one of `nodes`, or, if there are none, end it."""

    def refused(self, error: Overloaded) -> None:
        """It has waited for as long as it may."""


class _Place:
    """A place in the queue."""

    __slots__ = ("request", "timer")

    def __init__(self, request: Waiting) -> None:
        self.request = request
        self.timer: Timer | None = None


class Admission:
    """The queue of one route, for use under the route's lock.

    First come, first served. A request that could not be answered in time any more, judged by how long recent attempts
    took, is refused rather than sent to a node, whose work would be lost: at once, where the length of the queue says
    so. A request that is admitted counts its attempt before the next one is looked at, so nothing is reserved that
    could leak.

    Attributes:
        name: the route's, for messages and metrics.
        open: those of the nodes `open_among` that could take an attempt now.
        open_among: None where `open` is to be looked for.
        places: of the requests that wait, in order.
    """

    def __init__(
        self,
        eligible: Callable[[Tried], Sequence[Node]],
        recent: Recent,
        metrics: Metrics,
        clock: Clock,
        expired: Callable[[Callable[[], None]], None],
    ) -> None:
        """Args:
        eligible: the nodes that may be chosen, less those that were tried; the same object for as long as it holds.
        recent: how long attempts take.
        expired: calls a function under the route's lock, for a timer that has run out.
        """
        self._eligible = eligible
        self._recent = recent
        self._metrics = metrics
        self._clock = clock
        self._expired = expired
        self._per_node = sys.maxsize
        self._queue = 0
        self.places: deque[_Place] = deque()
        self._retrying: deque[_Place] = deque()
        """Those of them whose requests had attempts: what they may have differs from what the others may."""
        self.open_among: Sequence[Node] | None = None
        self.open: Sequence[Node] = ()
        self.name = ""

    def configure(self, name: str, per_node: int, queue: int) -> None:
        """Take on other limits; the requests that wait stay.

        Args:
            per_node: attempts at once; `sys.maxsize` sets no limit.
            queue: requests that may wait.
        """
        self.name = name
        self._per_node = per_node
        self._queue = queue
        self.open_among = None
        self.admit_waiting()

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self.places)

    def room(self, tried: Tried) -> Sequence[Node]:
        """The eligible nodes that could take an attempt now."""
        nodes = self._eligible(tried)
        if tried:
            return [node for node in nodes if node.in_flight < self._per_node]
        return self._open(nodes)

    def _open(self, nodes: Sequence[Node]) -> Sequence[Node]:
        if nodes is not self.open_among:
            self.open_among = nodes
            self.open = tuple([node for node in nodes if node.in_flight < self._per_node])
        return self.open

    def free(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Those of `nodes`, of which each may have its whole share, that could take an attempt now; none where requests
        wait."""
        return () if self.places else self._open(nodes)

    def admit(self, request: Waiting, end: float) -> None:
        """Have `request.admitted` called, now or when it is its turn; without nodes if no node is eligible at all.

        Args:
            end: when the request must have been answered, on the route's clock.

        Raises:
            DeadlineExceeded: `end` has passed.
            Overloaded: the queue is full, or the time would not suffice.
        """
        tried = request.tried
        if (nodes := self.room(tried)) and (not self.places or self._next() is None):
            request.admitted(nodes)
        elif nodes := self._eligible(tried):
            self._wait(request, end, len(nodes))
        else:
            request.admitted(())

    def leave(self, request: Waiting) -> None:
        """`request` does not wait any more; nothing if it does not wait."""
        place = next((place for place in self.places if place.request is request), None)
        if place is not None:
            self._remove(place)
            self.admit_waiting()  # it may have been this one's turn

    def filled(self) -> None:
        """A node has as many attempts as it may."""
        self.open_among = None

    def ended(self, node: Node) -> None:
        """An attempt on `node` has ended, and `node.in_flight` counts it no longer.

        The caller may leave out the call while no request waits and the node was not full.
        """
        if node.in_flight >= self._per_node - 1:
            self.open_among = None
        if self.places:
            self.admit_waiting()

    def admit_waiting(self) -> None:
        """Admit each request whose turn it is."""
        while self.places and (place := self._next()) is not None:
            self._remove(place)
            place.request.admitted(self.room(place.request.tried))

    def _wait(self, request: Waiting, end: float, nodes: int) -> None:
        before = len(self.places)
        if before >= self._queue:
            raise self._refusal("queue_full", f"{before} requests wait already")
        now = self._clock.now()
        if now >= end:
            raise DeadlineExceeded(f"route {self.name}: the deadline passed before the request came to a node")
        self._recent.look()
        attempt_s = self._recent.typical_s
        left_s = end - attempt_s - now
        if left_s <= attempt_s * before / (nodes * self._per_node):
            raise self._refusal("no_time", f"with {before} requests before it this one would not be answered in time")
        place = _Place(request)
        self.places.append(place)
        if request.tried:
            self._retrying.append(place)
        request.waits()
        place.timer = self._clock.call_later(left_s, lambda: self._expired(lambda: self._give_up(place)))
        self.admit_waiting()

    def _give_up(self, place: _Place) -> None:
        if place in self.places:
            self._remove(place)
            place.request.refused(self._refusal("no_time", "none had room in time"))
            self.admit_waiting()

    def _remove(self, place: _Place) -> None:
        self.places.remove(place)
        if place.request.tried:
            self._retrying.remove(place)
        if place.timer is not None:
            place.timer.cancel()

    def _next(self) -> _Place | None:
        """The place of the first request that could use what there is, or for which there is nothing to wait for."""
        if self._per_node == sys.maxsize or not self._eligible(()):
            return self.places[0]
        nodes = self.room(())
        for place in self.places if nodes else self._retrying:
            tried = place.request.tried
            if (nodes and not tried) or (tried and (self.room(tried) or not self._eligible(tried))):
                return place
        return None

    def _refusal(self, reason: str, why: str) -> Overloaded:
        self._metrics.rejection(self.name, reason)
        return Overloaded(f"route {self.name}: every node has its {self._per_node} requests, and {why}")
