"""A request on its way through a gateway: admission → choice → attempt → answer.

Read `Forwarder.begin_all` and `_first_ended`, which are all that nearly every request needs; then, for retries, hedges
and requests that wait, `dl_inference_core/gateway/attempts.py`.

The transport calls `begin_all` and tells of the end of attempts on its threads; health and reload call from the event
loop. Each route has one lock, and everything that belongs to the route happens under it: admission, choice, counts,
budgets, and all methods of the strategy. Exchanges are called after the lock was released. The lock order is: the lock
of a route, then that of a node's health (`dl_inference_core/gateway/health.py`), never the reverse; and who holds the
lock of a route never waits for that of another.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from dl_inference_core.config import RouteConfig
from dl_inference_core.errors import InferenceError, RouteLoop
from dl_inference_core.failures import as_inference_error, do_all, fail
from dl_inference_core.gateway.admission import Admission
from dl_inference_core.gateway.attempts import Forwarding
from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.picking import Picker
from dl_inference_core.gateway.pool import Node, Pool
from dl_inference_core.gateway.retries import Budget, Recent
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Ended, Exchange, Metadata, Trailers
from dl_inference_core.wire import orca
from dl_inference_core.wire.protocol import Protocol
from dl_inference_core.wire.routing_keys import RoutingKey

_log = logging.getLogger(__name__)

_SUCCESS = Outcome.SUCCESS  # CPython 3.11 takes 0.1 µs to look up a member of an enumeration
_HEDGE_RESERVE = 10
"""Hedges that may be made beyond the share of the budget: else a route with few requests would have none."""
HOPS = "x-dl-inference-hops"
"""The metadata that names the gateways that a request has been through, by their ids, with commas between them."""
_MOST_HOPS = 8
"""Gateways that a request may go through: two or three tiers are usual, a loop through many gateways is longer."""

_First: TypeAlias = tuple[Node, float, float, Exchange, Protocol, Metadata, float]
"""The first attempt of a request: its node; when it began; its timeout, in seconds; the request's exchange, protocol,
hops, and the end of the route's time for it. A tuple is made in 30 ns; an object of a class takes ten times as long."""


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

    def begin_all(self, exchanges: Sequence[Exchange], protocol: Protocol, key: RoutingKey) -> None:
        """Forward each of `exchanges` to a node, and to another if the first fails by its own fault and time is
        left."""
        for exchange in exchanges:
            try:
                self._begin(exchange, protocol)
            except Exception as error:
                fail(exchange, error)

    def _begin(self, exchange: Exchange, protocol: Protocol) -> None:
        """Raises:
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
                admission = self.admission
                known = nodes is admission.open_among and not admission.places  # as nearly always: saves a call
                nodes = admission.open if known else admission.free(nodes)
            if nodes and not self.hedging:  # as nearly always
                node = self.picker.choose(nodes, exchange, now)
                node.in_flight += 1
                if node.in_flight >= self.per_node:
                    self.admission.filled()
            else:
                node = None
                self._admit(Forwarding(self, exchange, protocol, hops, now + self.whole_s))
            timeout_s, end = self.timeout_s, now + self.whole_s
            actions = self._take_actions() if self.actions else ()
        finally:
            self.lock.release()
        if node is not None:
            deadline = exchange.deadline
            if deadline is not None and deadline - now < timeout_s:
                timeout_s = deadline - now
            first = (node, now, timeout_s, exchange, protocol, hops, end)
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
                self._first_ended([(first, as_inference_error(error), (), 0.0)])
        if actions:
            do_all(actions)

    def _first_ended(self, ended: Sequence[Ended]) -> None:
        """First attempts of requests have ended, which nearly always are the only ones."""
        exiting: BaseException | None = None
        record = self.record  # by way of a local, as in `_begin`
        self.lock.acquire()
        try:
            for first, error, trailers, seconds in ended:
                try:
                    if error is not None:
                        with self._unlocked():
                            self._first_failed(first, error, trailers, seconds)
                        continue
                    node = first[0]
                    health = node.endpoint.health
                    health.answered_at = first[1] + seconds
                    if health.forgivable:
                        health.succeeded()
                    record(node, _SUCCESS, trailers, seconds)
                except Exception:
                    _log.exception("the end of an attempt could not be told")
                except BaseException as raised:  # by `sys.exit` in a forked child, say; the others are told first
                    exiting = raised
            actions = self._take_actions() if self.actions else ()
        finally:
            self.lock.release()
        if actions:
            do_all(actions)
        if exiting is not None:
            raise exiting

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Do what was put off, and then the block, without the lock. Under the lock."""
        actions = self._take_actions()
        self.lock.release()
        try:
            do_all(actions)
            yield
        finally:
            self.lock.acquire()

    def _first_failed(self, first: _First, error: InferenceError, trailers: Trailers, seconds: float) -> None:
        node, _, timeout_s, exchange, protocol, hops, end = first
        forwarding = Forwarding(self, exchange, protocol, hops, end)
        forwarding.tried.append(node)
        forwarding.running = 1
        forwarding.attempt_ended((node, timeout_s), error, trailers, seconds)

    def record(self, node: Node, outcome: Outcome, trailers: Trailers, seconds: float) -> None:
        """Tell everybody of an attempt that has ended; each decides for itself what it makes of it. Under the lock."""
        self.recorded = True
        node.in_flight -= 1
        if outcome is _SUCCESS:
            node.attempts.successes += 1
            budget = self.retries
            budget.tokens += budget.share  # as `earn`, whose call takes 0.05 µs
            add = self.recent.add  # by way of a local, as in `_begin`
            add(seconds)
        else:
            node.attempts.count(outcome.value)
        if node.in_flight + 1 >= self.per_node or self.admission.places:
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

    def _admit(self, forwarding: Forwarding) -> None:
        """Under the lock.

        Raises:
            Overloaded: as `_begin`.
        """
        nodes = self._second_chance and self.retries.left and self.pool.due()
        if nodes or not self.limited:
            forwarding.admitted(nodes or self.pool.usable())
        else:
            self.admission.admit(forwarding, forwarding.end)

    def _next_hop(self, hops: str) -> Metadata:
        """The metadata with this gateway's id after `hops`.

        Raises:
            RouteLoop: as `_begin`.
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

    def _take_actions(self) -> list[Callable[[], None]]:
        """What was put off under the lock, for after it. Under the lock."""
        actions, self.actions = self.actions, []
        return actions

    def under_lock(self, action: Callable[[], None]) -> None:
        """Do `action` under the lock, and then what it has put off."""
        with self.lock:
            action()
            actions = self._take_actions()
        do_all(actions)

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


def _budgets(config: RouteConfig) -> tuple[float, ...]:
    return config.retry_budget, config.retry_reserve, config.hedge_budget
