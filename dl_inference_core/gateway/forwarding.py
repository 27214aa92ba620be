"""A request's bytes to a node and the answer's bytes back: attempts, deadlines, what each outcome says of a node."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from dl_inference_core.config import RouteConfig
from dl_inference_core.errors import (
    AttemptTimedOut,
    Blame,
    DeadlineExceeded,
    InferenceError,
    NodeFailed,
    NoNodeAvailable,
)
from dl_inference_core.gateway.balancing import Balancer, Outcome, RoundRobin
from dl_inference_core.gateway.pool import Node, Pool
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Call
from dl_inference_core.wire.protocol import Protocol, well_formed

_log = logging.getLogger(__name__)

_OUTCOMES = {Blame.NODE: Outcome.FAILURE, Blame.NODE_SOFTLY: Outcome.OVERLOAD}


class Forwarder:
    """The upstream of a route to other nodes. Event loop only."""

    def __init__(self, config: RouteConfig, pool: Pool, balancer: Balancer, metrics: Metrics) -> None:
        self.pool = pool
        self._fallback = RoundRobin(RoundRobin.Options())
        self._metrics = metrics
        self._complained_of: Balancer | None = None
        self.configure(config, balancer)

    def configure(self, config: RouteConfig, balancer: Balancer) -> list[Node]:
        """Take on a new config; returns the nodes that left, for `Pool.retire`. Requests in flight keep theirs."""
        self.config = config
        self.name = config.name or str(config.task_id)
        self.balancer = balancer
        self._timeout_s = config.timeout_ms / 1000
        gone = self.pool.update(config.nodes)
        try:
            for node in gone:
                balancer.forget(node)
        except Exception:
            self._balancer_raised()
        return gone

    @property
    def ready(self) -> bool:
        """Whether any node is known to be well."""
        return any(node.endpoint.health.usable for node in self.pool.nodes)

    async def answer(self, call: Call, protocol: Protocol) -> bytes:
        """Forward `call` to a node, and to another if the first fails by its own fault and time is left."""
        config = self.config
        start = time.monotonic()
        end = start + self._timeout_s * config.attempts
        if call.deadline is not None and call.deadline < end:
            end = call.deadline
        tried: tuple[Node, ...] = ()
        nodes: Sequence[Node] = self.pool.usable()
        if not nodes:
            raise NoNodeAvailable(f"route {self.name} has no nodes")
        while True:
            node = self._choose(nodes, call)
            tried = (*tried, node)
            outgoing = Call(
                method=protocol.node_method,
                request=call.request,
                metadata=call.metadata,
                deadline=min(start + self._timeout_s, end),
            )
            try:
                answer = await self._attempt(node, outgoing, call.deadline, protocol)
            except InferenceError as error:
                start = time.monotonic()
                if (
                    not error.another_node
                    or len(tried) >= config.attempts
                    or start >= end
                    or (isinstance(error, NodeFailed) and not config.retry_failed)
                    or not (nodes := self._others(tried))
                ):
                    call.trailers.extend(outgoing.trailers)
                    raise
            else:
                if outgoing.trailers:
                    call.trailers.extend(outgoing.trailers)
                return answer

    def _others(self, tried: tuple[Node, ...]) -> Sequence[Node]:
        """The nodes that have not been tried: those known to be well, or else any."""
        usable = [node for node in self.pool.usable() if node not in tried]
        return usable or [node for node in self.pool.nodes if node not in tried]

    def _choose(self, nodes: Sequence[Node], call: Call) -> Node:
        try:
            node = self.balancer.choose(nodes, call)
            if not isinstance(node, Node) or node.removed:
                raise TypeError(f"it chose {node!r}, which is not among the nodes")
        except Exception:
            self._balancer_raised()
            return self._fallback.choose(nodes, call)  # type: ignore[return-value] # one of `nodes`
        return node

    async def _attempt(self, node: Node, outgoing: Call, client_deadline: float | None, protocol: Protocol) -> bytes:
        start = time.monotonic()
        outcome = Outcome.NEUTRAL
        node.in_flight += 1
        try:
            answer = await node.endpoint.connection.call(outgoing)
            if not well_formed(answer):
                raise NodeFailed(f"the answer is no {protocol.name} message")
        except InferenceError as error:
            raised = self._judged(node, error, outgoing, client_deadline)
            outcome = _OUTCOMES.get(raised.blame, Outcome.NEUTRAL)
            if outcome is Outcome.FAILURE:
                node.endpoint.health.failed(raised)
            raise raised from error.__cause__
        else:
            outcome = Outcome.SUCCESS
            node.endpoint.health.succeeded()
            return answer
        finally:
            node.in_flight -= 1
            if node.removed:
                if not node.in_flight:
                    node.idle.set()
            else:
                self._record(node, outcome, time.monotonic() - start)

    def _judged(
        self, node: Node, error: InferenceError, outgoing: Call, client_deadline: float | None
    ) -> InferenceError:
        """`error` with what only the gateway knows: whose deadline passed, and which node it was."""
        if isinstance(error, DeadlineExceeded):
            if outgoing.deadline == client_deadline:
                return error
            return AttemptTimedOut(
                f"route {self.name}: node {node.address} did not answer within {self.config.timeout_ms} ms"
            )
        if error.blame in _OUTCOMES:
            error.args = (f"route {self.name}: node {node.address}: {error}",)
        return error

    def _record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        self._metrics.attempt(self.name, node.address, outcome.value)
        try:
            self.balancer.record(node, outcome, seconds)
        except Exception:
            self._balancer_raised()

    def _balancer_raised(self) -> None:
        """Log what is being handled, the first time."""
        if self._complained_of is not self.balancer:
            self._complained_of = self.balancer
            _log.exception(
                'balancer "%s" failed on route %s; round robin chooses when it does', self.balancer.name, self.name
            )

    async def close(self) -> None:
        """Release every node, once its attempts have ended."""
        gone = self.pool.update(())
        await asyncio.gather(*(self.pool.retire(node) for node in gone))
