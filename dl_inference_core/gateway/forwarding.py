"""A request on its way through a gateway: admission → choice → attempt → answer, retry, hedge or failure.

Read `Forwarder.begin` and `_first_ended`, which are all that nearly every request needs; then `_Forwarding` from top
to bottom. The transport calls `begin` and tells of the end of attempts on its threads; health and reload call from the
event loop. Each route has one lock, and everything that belongs to the route happens under it: admission, choice,
counts, budgets, and all methods of the strategy. Exchanges are called, and the health of nodes is told, after the lock
was released. The lock order is: the lock of a route, then that of a node's health
(`dl_inference_core/gateway/health.py`), never the reverse, and never the locks of two routes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from dl_inference_core.config import RouteConfig
from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptTimedOut,
    Blame,
    Code,
    DeadlineExceeded,
    InferenceError,
    NodeFailed,
    NoNodeAvailable,
    Overloaded,
    RouteLoop,
)
from dl_inference_core.failures import as_inference_error, fail
from dl_inference_core.gateway.admission import Admission
from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.picking import Picker
from dl_inference_core.gateway.pool import Node, Pool
from dl_inference_core.gateway.retries import Budget, Recent
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Exchange, Metadata, Timer, Trailers
from dl_inference_core.wire import orca
from dl_inference_core.wire.protocol import Protocol
from dl_inference_core.wire.routing_keys import RoutingKey

_log = logging.getLogger(__name__)

_OUTCOMES = {Blame.NODE: Outcome.FAILURE, Blame.NODE_SOFTLY: Outcome.OVERLOAD}
_SUCCESS = Outcome.SUCCESS  # CPython 3.11 takes 0.1 µs to look up a member of an enumeration
_HEDGE_RESERVE = 10
"""Hedges that may be made beyond the share of the budget: else a route with few requests would have none."""
_EARLY_S = 0.01
"""An attempt that ends so long before its timeout has met a deadline of the node's own: clocks differ by less."""
_WHOLE = 0.9
"""An attempt that was given less of the route's timeout than that says nothing of its node."""
HOPS = "x-dl-inference-hops"
"""The metadata that names the gateways that a request has been through, by their ids, with commas between them."""
_MOST_HOPS = 8
"""Gateways that a request may go through: two or three tiers are usual, a loop through many gateways is longer."""


class Forwarder:
    """The upstream of a route to other nodes. Any thread, but for `configure` and `close`: event loop only."""

    def __init__(
        self, config: RouteConfig, pool: Pool, balancer: Balancer, metrics: Metrics, clock: Clock, gateway_id: str
    ) -> None:
        """Args:
        gateway_id: of this gateway, the same in all of its processes; without commas.
        """
        self._gateway_id = gateway_id
        self._first_hop = ((HOPS, gateway_id),)
        self._first_done = self._first_ended  # made once, not for each request
        self.config = config
        self.pool = pool
        self.clock = clock
        self._now = clock.now
        self.metrics = metrics
        self.lock = threading.RLock()
        """Of everything that belongs to the route."""
        pool.changed = self._changed
        pool.returned = self._returned
        self.picker = Picker(balancer, metrics, clock)
        self.recent = Recent()
        self.actions: list[Callable[[], None]] = []
        """What requests do once the lock is released."""
        self.admission = Admission(self.eligible, self.recent, metrics, clock, self.under_lock)
        self._set_budgets()
        self.recorded = False
        """Set by each attempt, for whoever wants to know of attempts since then to unset."""
        self.configure(config, balancer)

    def configure(self, config: RouteConfig, balancer: Balancer) -> list[Node]:
        """Take on a new config; returns the nodes that left, for `Pool.retire`. Requests in flight keep theirs."""
        gone: list[Node] = []
        nodes = self.pool.connect(config.nodes)  # before the lock, for which requests wait

        def take_on() -> None:
            before, self.config = self.config, config
            self.name = config.name or str(config.task_id)
            self.timeout_s = config.timeout_ms / 1000
            self.whole_s = self.timeout_s * config.attempts
            self.hedging = config.hedge
            self.limited = config.node_in_flight > 0
            self.per_node = config.node_in_flight or sys.maxsize
            self._second_chance = config.attempts > 1 and config.retry_failed
            if _budgets(before) != _budgets(config):
                self._set_budgets()
            gone.extend(self.pool.update(config.nodes, nodes))
            for node in nodes:
                node.attempts = self.metrics.attempts(self.name, node.endpoint.target, node.address)
            self.picker.use(self.name, balancer)
            self.picker.forget(gone)
            self.admission.configure(self.name, self.per_node, config.queue)

        self.under_lock(take_on)
        return gone

    def _set_budgets(self) -> None:
        config = self.config
        self.retries = Budget(config.retry_budget, config.retry_reserve, lambda: self.in_flight, full=True)
        self.hedges = Budget(config.hedge_budget, _HEDGE_RESERVE, lambda: self.in_flight, full=False)

    @property
    def balancer(self) -> Balancer:
        """The strategy that chooses."""
        return self.picker.balancer

    @property
    def ready(self) -> bool:
        """Whether any node is known to be well."""
        return any(node.endpoint.health.usable for node in self.pool.nodes)

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return sum(node.in_flight for node in self.pool.nodes)

    @property
    def queued(self) -> int:
        """Requests that wait for a node to have room."""
        return self.admission.queued

    def begin(self, exchange: Exchange, protocol: Protocol, key: RoutingKey) -> None:
        """Forward `exchange` to a node, and to another if the first fails by its own fault and time is left.

        Raises:
            RouteLoop: it has been here before, or through eight gateways.
            Overloaded: there is no room in the queue.
        """
        before = exchange.find_metadata(HOPS)
        hops = self._first_hop if before is None else self._next_hop(str(before))
        self.lock.acquire()  # `with` takes 0.1 µs more
        try:
            now_of = self._now  # by way of a local: CPython 3.11 is slow to call an attribute
            now = now_of()
            nodes = self.pool.steady
            if nodes and self.limited:
                nodes = self.admission.free(nodes)
            if nodes and not self.hedging:  # as nearly always
                node = self.picker.choose(nodes, exchange, now)
                node.in_flight += 1
                if node.in_flight >= self.per_node:
                    self.admission.filled()
            else:
                node = None
                self._admit(_Forwarding(self, exchange, protocol, hops, now + self.whole_s))
            timeout_s, end = self.timeout_s, now + self.whole_s
            actions = self.take_actions() if self.actions else ()
        finally:
            self.lock.release()
        if node is not None:
            deadline = exchange.deadline
            if deadline is not None and deadline - now < timeout_s:
                timeout_s = deadline - now
            first = (node, timeout_s, exchange, protocol, hops, end)
            try:
                exchange.forward(
                    node.endpoint.connection,
                    protocol.node_method,
                    self._first_done,
                    first,
                    timeout_s=timeout_s,
                    metadata=hops,
                    allow_empty=protocol.allow_empty,
                )
            except Exception as error:
                self._first_ended(first, as_inference_error(error), (), 0.0)
        if actions:
            do(actions)

    def _first_ended(self, first: _First, error: InferenceError | None, trailers: Trailers, seconds: float) -> None:
        """The first attempt of a request has ended, which nearly always is the only one."""
        node = first[0]
        if error is not None:
            node, timeout_s, exchange, protocol, hops, end = first
            forwarding = _Forwarding(self, exchange, protocol, hops, end)
            forwarding.tried.append(node)
            forwarding.running = 1
            forwarding.attempt_ended((node, timeout_s), error, trailers, seconds)
            return
        node.endpoint.health.succeeded()
        self.lock.acquire()  # as in `begin`
        try:
            self.record(node, _SUCCESS, trailers, seconds)
            actions = self.take_actions() if self.actions else ()
        finally:
            self.lock.release()
        if actions:
            do(actions)

    def record(self, node: Node, outcome: Outcome, trailers: Trailers, seconds: float) -> None:
        """Tell everybody of an attempt that has ended; each decides for itself what it makes of it. Under the lock."""
        self.recorded = True
        node.in_flight -= 1
        if outcome is _SUCCESS:
            node.attempts.successes += 1
            budget = self.retries
            budget.tokens += budget.share  # as `earn`, whose call takes 0.05 µs
            add = self.recent.add  # by way of a local, as in `begin`
            add(seconds)
        else:
            node.attempts.count(outcome.value)
        if self.limited:
            self.admission.ended(node)
        if node.removed:
            if not node.in_flight:
                node.end_last_attempt()
            return
        picker = self.picker
        if trailers and picker.takes_reports and (load := orca.read(trailers)) is not None:
            picker.report(node, load)
        try:
            picker.balancer.record(node, outcome, seconds)
        except Exception:
            picker.failed()

    def _admit(self, forwarding: _Forwarding) -> None:
        """Under the lock.

        Raises:
            Overloaded: as `begin`.
        """
        nodes = self._second_chance and self.retries.left and self.pool.due()
        if nodes or not self.limited:
            forwarding.admitted(nodes or self.pool.usable())
        else:
            self.admission.admit(forwarding, forwarding.end)

    def _next_hop(self, hops: str) -> Metadata:
        """The metadata with this gateway's id after `hops`.

        Raises:
            RouteLoop: as `begin`.
        """
        ids = [each for each in hops.split(",") if each]
        if self._gateway_id in ids:
            raise RouteLoop(
                f"route {self.name} leads back to this gateway: expected nodes that run models, or gateways that do "
                "not forward to this one"
            )
        if len(ids) >= _MOST_HOPS:
            raise RouteLoop(f"the request has been through {len(ids)} gateways; expected at most {_MOST_HOPS}")
        return ((HOPS, ",".join((*ids, self._gateway_id))),)

    def eligible(self, tried: Sequence[Node]) -> Sequence[Node]:
        """The nodes that have not been tried: those that may be chosen, or else any."""
        usable = self.pool.usable()
        if not tried:
            return usable
        return [node for node in usable if node not in tried] or [node for node in self.pool.nodes if node not in tried]

    def after(self, action: Callable[[], None]) -> None:
        """Have `action` done once the lock is released. Under the lock."""
        self.actions.append(action)

    def take_actions(self) -> list[Callable[[], None]]:
        """What was put off under the lock, for `do` after it. Under the lock."""
        actions, self.actions = self.actions, []
        return actions

    def under_lock(self, action: Callable[[], None]) -> None:
        """Do `action` under the lock, and then what it has put off."""
        with self.lock:
            action()
            actions = self.take_actions()
        do(actions)

    def _returned(self, node: Node) -> None:
        """Tell the strategy: now, or a moment later where another thread holds the lock. This thread may hold the lock
        of another route, so it must not wait for this one's."""
        if not self.lock.acquire(blocking=False):
            self.clock.call_later(0, lambda: self._returned(node))
            return
        try:
            self.picker.returned(node)
        finally:
            self.lock.release()

    def _changed(self) -> None:
        """Requests that wait are admitted a moment later, when everybody knows of the change."""
        if self.admission.queued:
            self.clock.call_later(0, lambda: self.under_lock(self.admission.admit_waiting))

    async def close(self) -> None:
        """Release every node, once its attempts have ended."""
        with self.lock:
            gone = self.pool.update(())
        await asyncio.gather(*(self.pool.retire(node) for node in gone))


def do(actions: Iterable[Callable[[], None]]) -> None:
    """Do what was put off until a route's lock was released: each for a request of its own."""
    for action in actions:
        try:
            action()
        except Exception:
            _log.exception("a step of a request failed")


_First: TypeAlias = tuple[Node, float, Exchange, Protocol, Metadata, float]
"""The first attempt of a request: its node; its timeout, in seconds; the request's exchange, protocol, hops, and the
end of the route's time for it. A tuple is made in 30 ns; an object of a class takes ten times as long."""


class _Forwarding:
    """One request: waiting → attempts, one after another or a hedge beside one → ended.

    A request has none where the route is steady and does not hedge, and the first attempt succeeds.

    Attributes:
        end: when it must have been answered, on the route's clock.
        running: attempts under way.
        tried: the nodes that it had attempts on, those under way included.
    """

    __slots__ = (
        "_answered",
        "_ended",
        "_error",
        "_exchange",
        "_hedging",
        "_hops",
        "_late",
        "_protocol",
        "_route",
        "end",
        "running",
        "tried",
    )

    def __init__(self, route: Forwarder, exchange: Exchange, protocol: Protocol, hops: Metadata, end: float) -> None:
        """Args:
        hops: the metadata that says which gateways the request has been through.
        end: of the route's time for the request, on the route's clock; the client's deadline may be earlier.
        """
        self._route = route
        self._hops = hops
        self._exchange = exchange
        self._protocol = protocol
        self.running = 0
        self._answered = False
        self._ended = False
        """Whether it has failed, or the client has left."""
        self._error: InferenceError | None = None
        """Of the last attempt."""
        self._hedging: Timer | None = None
        self._late: Node | None = None
        """The node whose attempt took so long that another one was begun beside it."""
        self.tried: list[Node] = []
        deadline = exchange.deadline
        self.end = end if deadline is None or deadline > end else deadline

    # Waiting: under the lock

    def waits(self) -> None:
        self._route.after(lambda: self._exchange.on_cancel(self._leave))

    def admitted(self, nodes: Sequence[Node]) -> None:
        """Choose one of `nodes` and count an attempt on it, which is begun once the lock is released."""
        route = self._route
        if nodes:
            node = route.picker.choose(nodes, self._exchange, route.clock.now())
            node.in_flight += 1
            if node.in_flight >= route.per_node:
                route.admission.filled()
            self.tried.append(node)
            self.running += 1
            route.after(lambda: self._attempt(node))
        else:
            self._fail_later(self._error or NoNodeAvailable(f"route {route.name} has no nodes"))

    def refused(self, error: Overloaded) -> None:
        self._fail_later(self._error or error)

    def _fail_later(self, error: InferenceError) -> None:
        self._ended = True
        self._stop_hedging()
        self._route.after(lambda: fail(self._exchange, error))

    # Attempts: without the lock

    def _attempt(self, node: Node) -> None:
        """Send the request to `node`, which was chosen."""
        route, protocol = self._route, self._protocol
        timeout_s = min(self.end - route.clock.now(), route.timeout_s)
        if route.hedging and self.running == 1:
            self._hedge_when_late(node)
        try:
            self._exchange.forward(
                node.endpoint.connection,
                protocol.node_method,
                self.attempt_ended,
                (node, timeout_s),
                timeout_s=timeout_s,
                metadata=self._hops,
                allow_empty=protocol.allow_empty,
            )
        except Exception as error:
            self.attempt_ended((node, timeout_s), as_inference_error(error), (), 0.0)

    def attempt_ended(
        self, attempt: tuple[Node, float], error: InferenceError | None, trailers: Trailers, seconds: float
    ) -> None:
        """The transport tells how an attempt ended. An answer has gone to the client already.

        Args:
            attempt: its node, and its timeout in seconds.
        """
        node, timeout_s = attempt
        route, outcome = self._route, _SUCCESS
        if error is None:
            self._answered = True
            node.endpoint.health.succeeded()
        else:
            error = self._judged(node, error, timeout_s, seconds)
            outcome = _OUTCOMES.get(error.blame, Outcome.NEUTRAL)
            if outcome is Outcome.FAILURE:
                node.endpoint.health.failed(error)
        with route.lock:
            self.running -= 1
            if error is not None and self._answered and node is self._late:
                route.recent.add(seconds)  # at least; it is among the slowest in any case
            route.record(node, outcome, trailers, seconds)
            if self._answered or not self.running:
                self._stop_hedging()
            if error is not None and not self._answered and not self._ended:
                self._go_on(error, trailers)
            actions = route.take_actions()
        do(actions)

    def _judged(self, node: Node, error: InferenceError, timeout_s: float, seconds: float) -> InferenceError:
        """`error` with what only the gateway knows: whose deadline passed, and which node it was."""
        route = self._route
        if isinstance(error, DeadlineExceeded):
            if seconds < timeout_s - _EARLY_S:  # a deadline of the node's own
                error = NodeFailed(str(error), Code.DEADLINE_EXCEEDED)
            elif self.end == self._exchange.deadline and timeout_s < route.timeout_s:
                return error
            else:
                return self._timed_out(node, timeout_s)
        if error.blame in _OUTCOMES:
            error.args = (f"route {route.name}: node {node.address}: {error}",)
        return error

    def _timed_out(self, node: Node, timeout_s: float) -> InferenceError:
        """It is the node's fault, unless too little time was left by a wait in the queue."""
        route = self._route
        said = f"route {route.name}: node {node.address} did not answer within"
        if not route.limited or timeout_s >= _WHOLE * route.timeout_s:
            return AttemptTimedOut(f"{said} {route.config.timeout_ms} ms")
        return DeadlineExceeded(f"{said} {timeout_s * 1000:.0f} ms, all that was left of the time for this request")

    # After an attempt: under the lock

    def _go_on(self, error: InferenceError, trailers: Trailers) -> None:
        """After an attempt that failed: leave it to the one beside it, try another node, or fail."""
        if error.another_node and self.running:
            return
        self._error = error
        error.trailers = [pair for pair in trailers if pair[0] not in orca.TRAILERS] if trailers else ()
        route = self._route
        if not self._may_retry(error):
            self._fail_later(error)
        elif not route.limited:
            self.admitted(route.eligible(self.tried))
        else:
            try:
                route.admission.admit(self, self.end)
            except InferenceError:  # no room, or no time
                self._fail_later(error)

    def _may_retry(self, error: InferenceError) -> bool:
        """Whether there is to be one more attempt; takes it from the budget."""
        route = self._route
        if not error.another_node or not self._time_for_another():
            return False
        if isinstance(error, NodeFailed) and not (route.config.retry_failed or isinstance(error, AnswerMalformed)):
            return False
        if not route.eligible(self.tried):
            return False
        if not route.retries.take():
            route.metrics.retry_denied(route.name)
            return False
        return True

    def _time_for_another(self) -> bool:
        """Whether attempts are left, and an answer could come in time: the quickest of the last ones would."""
        route = self._route
        route.recent.look()
        return len(self.tried) < route.config.attempts and route.clock.now() + route.recent.least_s < self.end

    def _leave(self) -> None:
        """The client has left. The transport cancels the attempts."""
        route = self._route
        self._ended = True
        route.under_lock(lambda: route.admission.leave(self))

    # Hedging: a second attempt beside one that takes longer than most have lately

    def _hedge_when_late(self, node: Node) -> None:
        route = self._route
        with route.lock:
            route.hedges.earn()
            route.recent.look()
            late_s = route.recent.late_s
            if late_s is not None and len(self.tried) < route.config.attempts and not self._answered:
                self._hedging = route.clock.call_later(late_s, lambda: route.under_lock(lambda: self._hedge(node)))

    def _hedge(self, late: Node) -> None:
        """Under the lock."""
        route = self._route
        if self._hedging is None or self.running != 1 or self.tried[-1] is not late or not self._time_for_another():
            return
        self._hedging = None
        nodes = [node for node in route.admission.room(()) if node not in self.tried]
        if nodes and route.hedges.take():
            self._late = late
            route.metrics.hedge(route.name)
            self.admitted(nodes)

    def _stop_hedging(self) -> None:
        if self._hedging is not None:
            self._hedging.cancel()
            self._hedging = None


def _budgets(config: RouteConfig) -> tuple[float, ...]:
    return config.retry_budget, config.retry_reserve, config.hedge_budget
