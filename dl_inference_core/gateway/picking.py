"""A route's strategy, and round robin in its place whenever it fails: no request is lost by a plugin's mistake."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence

from dl_inference_core.gateway.balancing import Balancer, RoundRobin
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.pool import Node
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Exchange
from dl_inference_core.wire.orca import Load

_log = logging.getLogger(__name__)

_SLOW_S = 0.05
_SLOW_TIMES = 5
_SLOW_WITHIN_S = 60.0
_SLOW_SHARE = 0.05
"""Of the time since the first of the slow choices. A thread that loses its core for a moment makes a choice look slow,
but not so often."""


class Picker:
    """Asks the strategy and tells it, and lets nothing that it raises through. For use under the route's lock.

    The route tells the strategy of outcomes itself, for each request, and calls `failed` where that raises.

    Attributes:
        balancer: the strategy; round robin, once the one that the config names has kept everybody waiting too often.
        takes_reports: whether it wants to know of loads.
    """

    def __init__(self, balancer: Balancer, metrics: Metrics, clock: Clock) -> None:
        self._fallback = RoundRobin(RoundRobin.Options())
        self._metrics = metrics
        self._now = clock.now
        self._complained_of: Balancer | None = None
        self.use("", balancer)

    def use(self, route: str, balancer: Balancer) -> None:
        """Ask `balancer` from now on, for the route of that name."""
        self._route = route
        self.balancer = balancer
        self.takes_reports = type(balancer).report is not Balancer.report
        self._given: Sequence[Node] = ()
        self._members: frozenset[Node] = frozenset()
        self._slow: deque[tuple[float, float]] = deque(maxlen=_SLOW_TIMES)
        """When slow choices began, and what they took."""

    def choose(self, nodes: Sequence[Node], exchange: Exchange, begun: float) -> Node:
        """One of `nodes`, of which there is at least one. `begun` is the time."""
        try:
            node = self.balancer.choose(nodes, exchange)
            if nodes is not self._given:  # a set takes the same time for four nodes and for a thousand
                self._given, self._members = nodes, frozenset(nodes)
            if node not in self._members:
                raise TypeError(f"it chose {node!r}, which is not among the nodes that it was given")
        except Exception:
            self.failed()
            node = self._fallback.choose(nodes, exchange)
        now_of = self._now  # by way of a local: CPython 3.11 is slow to call an attribute
        if (now := now_of()) - begun > _SLOW_S:
            self._kept_waiting(begun, now)
        return node  # type: ignore[return-value] # one of `nodes`

    def report(self, node: Node, load: Load) -> None:
        """As `Balancer.report`."""
        try:
            self.balancer.report(node, load)
        except Exception:
            self.failed()

    def returned(self, node: Node) -> None:
        """As `Balancer.returned`."""
        try:
            self.balancer.returned(node)
        except Exception:
            self.failed()

    def forget(self, nodes: Iterable[Node]) -> None:
        """As `Balancer.forget`, for each."""
        for node in nodes:
            try:
                self.balancer.forget(node)
            except Exception:
                self.failed()

    def failed(self) -> None:
        """The strategy has raised what is being handled: count it, and log it the first time."""
        self._metrics.balancer_failure(self.balancer.name, self._route)
        if self._complained_of is not self.balancer:
            self._complained_of = self.balancer
            _log.exception(
                'balancer "%s" failed on route %s; round robin chooses when it does', self.balancer.name, self._route
            )

    def _kept_waiting(self, begun: float, now: float) -> None:
        """A choice holds the route's lock: a strategy that takes long again and again is not asked any more."""
        self._metrics.balancer_failure(self.balancer.name, self._route)
        self._slow.append((begun, now - begun))
        since_s = now - self._slow[0][0]
        share = sum(took_s for _, took_s in self._slow) / since_s
        if len(self._slow) == _SLOW_TIMES and since_s < _SLOW_WITHIN_S and share > _SLOW_SHARE:
            _log.error(
                'balancer "%s" took over %g s to choose, %d times within a minute, on route %s; round robin chooses '
                "from now on, until the config names another",
                self.balancer.name,
                _SLOW_S,
                _SLOW_TIMES,
                self._route,
            )
            self.use(self._route, self._fallback)
