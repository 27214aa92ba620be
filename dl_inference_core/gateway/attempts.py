"""A request that waits, is tried again, or may be hedged: waiting → attempts → ended. Read it from top to bottom.

A request whose first attempt succeeds does not come here, unless its route hedges or has nodes that may not have their
whole share. The rules of threads and locks are in `dl_inference_core/gateway/forwarding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

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
)
from dl_inference_core.failures import as_inference_error, do_all, fail
from dl_inference_core.gateway.balancing import Outcome
from dl_inference_core.gateway.pool import Node
from dl_inference_core.transport import Ended, Exchange, Metadata, Timer, Trailers
from dl_inference_core.wire import orca
from dl_inference_core.wire.protocol import Protocol

if TYPE_CHECKING:
    from dl_inference_core.gateway.forwarding import Forwarder

_OUTCOMES = {Blame.NODE: Outcome.FAILURE, Blame.NODE_SOFTLY: Outcome.OVERLOAD}
_EARLY_S = 0.01
"""An attempt that ends so long before its timeout has met a deadline of the node's own: clocks differ by less."""
_WHOLE = 0.9
"""An attempt that was given less of the route's timeout than that says nothing of its node."""


class Forwarding:
    """One request: waiting → attempts, one after another or a hedge beside one → ended.

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
                self._attempts_ended,
                (node, timeout_s),
                timeout_s=timeout_s,
                metadata=self._hops,
                allow_empty=protocol.allow_empty,
            )
        except Exception as error:
            self.attempt_ended((node, timeout_s), as_inference_error(error), (), 0.0)

    def _attempts_ended(self, ended: Sequence[Ended]) -> None:
        if len(ended) == 1:  # as nearly always: 0.5 µs less
            self.attempt_ended(*ended[0])
        else:
            do_all(partial(self.attempt_ended, *each) for each in ended)

    def attempt_ended(
        self, attempt: tuple[Node, float], error: InferenceError | None, trailers: Trailers, seconds: float
    ) -> None:
        """The transport tells how an attempt ended. An answer has gone to the client already.

        Args:
            attempt: its node, and its timeout in seconds.
        """
        node, timeout_s = attempt
        route, outcome = self._route, Outcome.SUCCESS
        if error is None:
            self._answered = True
            node.endpoint.health.succeeded()
        else:
            error = self._judged(node, error, timeout_s, seconds)
            outcome = _OUTCOMES.get(error.blame, Outcome.NEUTRAL)
            if outcome is Outcome.FAILURE:
                node.endpoint.health.failed(error)

        def settle() -> None:
            self.running -= 1
            if error is not None and self._answered and node is self._late:
                route.recent.add(seconds)  # at least; it is among the slowest in any case
            route.record(node, outcome, trailers, seconds)
            if self._answered or not self.running:
                self._stop_hedging()
            if error is not None and not self._answered and not self._ended:
                self._go_on(error, trailers)

        route.under_lock(settle)

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
