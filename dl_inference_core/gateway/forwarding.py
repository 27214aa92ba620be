"""A request's bytes to a node and the answer's bytes back: attempts, deadlines, what each outcome says of a node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
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
)
from dl_inference_core.gateway.admission import Admission
from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.gateway.picking import Picker
from dl_inference_core.gateway.pool import Node, Pool
from dl_inference_core.gateway.retries import Budget, Recent
from dl_inference_core.metrics import Metrics
from dl_inference_core.transport import Call, Message
from dl_inference_core.wire import orca
from dl_inference_core.wire.protocol import Protocol, well_formed

_OUTCOMES = {Blame.NODE: Outcome.FAILURE, Blame.NODE_SOFTLY: Outcome.OVERLOAD}
_HEDGE_RESERVE = 10
_FIRST, _HEDGE = "attempt", "hedge"
_EARLY_S = 0.01
_WHOLE = 0.9

Answer: TypeAlias = "tuple[Message, list[tuple[str, str | bytes]]]"
"""A node's answer, and what came beside it."""


class Forwarder:
    """The upstream of a route to other nodes. Event loop only."""

    def __init__(self, config: RouteConfig, pool: Pool, balancer: Balancer, metrics: Metrics) -> None:
        self.config = config
        self.pool = pool
        pool.changed = self._changed
        pool.returned = self._returned
        self._metrics = metrics
        self._picker = Picker(balancer, metrics)
        self._recent = Recent()
        self._admission = Admission(self._eligible, self._recent, metrics)
        self._set_budgets()
        self._losing: set[asyncio.Task[Answer]] = set()
        self.recorded = False
        """Set by each attempt, for whoever wants to know of attempts since then to unset."""
        self.configure(config, balancer)

    def configure(self, config: RouteConfig, balancer: Balancer) -> list[Node]:
        """Take on a new config; returns the nodes that left, for `Pool.retire`. Requests in flight keep theirs."""
        before, self.config = self.config, config
        self.name = config.name or str(config.task_id)
        self._timeout_s = config.timeout_ms / 1000
        self._limited = config.node_in_flight > 0
        self._second_chance = config.attempts > 1 and config.retry_failed
        if _budgets(before) != _budgets(config):
            self._set_budgets()
        gone = self.pool.update(config.nodes)
        self._picker.use(self.name, balancer)
        self._picker.forget(gone)
        self._admission.configure(self.name, config.node_in_flight, config.queue)
        return gone

    def _set_budgets(self) -> None:
        config = self.config
        self._retries = Budget(config.retry_budget, config.retry_reserve, lambda: self.in_flight, full=True)
        self._hedges = Budget(config.hedge_budget, _HEDGE_RESERVE, lambda: self.in_flight, full=False)

    @property
    def balancer(self) -> Balancer:
        """The strategy that chooses."""
        return self._picker.balancer

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
        return self._admission.queued

    async def answer(self, call: Call, protocol: Protocol) -> Message:
        """Forward `call` to a node, and to another if the first fails by its own fault and time is left."""
        end = time.monotonic() + self._timeout_s * self.config.attempts
        if call.deadline is not None and call.deadline < end:
            end = call.deadline
        tried: list[Node] = []
        nodes = (self._second_chance and self._retries.left and self.pool.due()) or (
            await self._admission.admit(tried, end) if self._limited else self.pool.usable()
        )
        if not nodes:
            raise NoNodeAvailable(f"route {self.name} has no nodes")
        while True:
            node = self._picker.choose(nodes, call)
            tried.append(node)
            self._take(node)
            try:
                if self.config.hedge:
                    answer, trailers = await self._race(node, tried, call, protocol, end)
                else:
                    answer, trailers = await self._attempt(node, call, protocol, end)
            except InferenceError as error:
                nodes = await self._others_after(error, tried, end)
                if not nodes:
                    call.trailers.extend(error.trailers)
                    raise
            else:
                if trailers:
                    call.trailers.extend(trailers)
                return answer

    def _eligible(self, tried: Sequence[Node]) -> Sequence[Node]:
        """The nodes that have not been tried: those that may be chosen, or else any."""
        usable = self.pool.usable()
        if not tried:
            return usable
        return [node for node in usable if node not in tried] or [node for node in self.pool.nodes if node not in tried]

    async def _others_after(self, error: InferenceError, tried: Sequence[Node], end: float) -> Sequence[Node]:
        """The nodes for one more attempt, after one that ended with `error`; none if there is to be none."""
        if not error.another_node or not self._may_try_again(tried, end):
            return ()
        if isinstance(error, NodeFailed) and not (self.config.retry_failed or isinstance(error, AnswerMalformed)):
            return ()
        nodes = self._eligible(tried)
        if not nodes:
            return ()
        if not self._retries.take():
            self._metrics.retry_denied(self.name)
            return ()
        if not self._limited:
            return nodes
        try:
            return await self._admission.admit(tried, end)
        except Overloaded:
            return ()

    def _may_try_again(self, tried: Sequence[Node], end: float) -> bool:
        """Whether attempts are left, and an answer could come in time: the quickest of the last ones would."""
        return len(tried) < self.config.attempts and time.monotonic() + self._recent.least_s < end

    def _take(self, node: Node) -> None:
        """Count an attempt. `_attempt` is to follow at once, which gives the place back."""
        node.in_flight += 1
        if self._limited:
            self._admission.began(node)

    async def _attempt(self, node: Node, call: Call, protocol: Protocol, end: float) -> Answer:
        """One attempt, on a node whose place was taken."""
        start = time.monotonic()
        outgoing = Call(
            method=protocol.node_method,
            request=call.request,
            metadata=call.metadata,
            deadline=min(start + self._timeout_s, end),
        )
        outcome = Outcome.NEUTRAL
        try:
            answer = await node.endpoint.connection.call(outgoing)
            if not well_formed(answer):
                raise AnswerMalformed(f"the answer is no {protocol.name} message")
        except InferenceError as error:
            cause = error.__cause__
            # No other name: an exception that its own traceback leads to is garbage.
            error = self._judged(node, error, outgoing, start, call.deadline)
            error.trailers = outgoing.trailers
            outcome = _OUTCOMES.get(error.blame, Outcome.NEUTRAL)
            if outcome is Outcome.FAILURE:
                node.endpoint.health.failed(error)
            raise error from cause
        else:
            outcome = Outcome.SUCCESS
            node.endpoint.health.succeeded()
            return answer, outgoing.trailers
        finally:
            node.in_flight -= 1
            self._ended(node, outcome, time.monotonic() - start, outgoing)

    def _judged(
        self, node: Node, error: InferenceError, outgoing: Call, start: float, client_deadline: float | None
    ) -> InferenceError:
        """`error` with what only the gateway knows: whose deadline passed, and which node it was."""
        if isinstance(error, DeadlineExceeded):
            assert outgoing.deadline is not None
            if time.monotonic() < outgoing.deadline - _EARLY_S:  # a deadline of the node's own
                error = NodeFailed(str(error), Code.DEADLINE_EXCEEDED)
            elif outgoing.deadline == client_deadline:
                return error
            else:
                return self._timed_out(node, outgoing.deadline - start)
        if error.blame in _OUTCOMES:
            error.args = (f"route {self.name}: node {node.address}: {error}",)
        return error

    def _timed_out(self, node: Node, given_s: float) -> InferenceError:
        """It is the node's fault, unless too little time was left by a wait in the queue."""
        said = f"route {self.name}: node {node.address} did not answer within"
        if not self._limited or given_s >= _WHOLE * self._timeout_s:
            return AttemptTimedOut(f"{said} {self.config.timeout_ms} ms")
        return DeadlineExceeded(f"{said} {given_s * 1000:.0f} ms, all that was left of the time for this request")

    def _ended(self, node: Node, outcome: Outcome, seconds: float, outgoing: Call) -> None:
        """Tell everybody of an attempt; each decides for itself what it makes of it."""
        self.recorded = True
        self._metrics.attempt(self.name, node.address, outcome.value)
        if outcome is Outcome.SUCCESS:
            self._retries.earn()
            self._recent.add(seconds)
        if self._limited:
            self._admission.ended(node)
        load = orca.take(outgoing.trailers) if outgoing.trailers else None
        if node.removed:
            if not node.in_flight:
                node.idle.set()
            return
        if load is not None and self._picker.takes_reports:
            self._picker.report(node, load)
        self._picker.record(node, outcome, seconds)

    def _raced(self, node: Node, call: Call, protocol: Protocol, end: float, name: str) -> asyncio.Task[Answer]:
        """`_attempt` in a task, which gives the place back even if it is cancelled before it has begun."""
        place = [node]

        async def attempt() -> Answer:
            return await self._attempt(place.pop(), call, protocol, end)

        def ended(_: asyncio.Task[Answer]) -> None:
            if place:
                self._give_back(place.pop())

        task = asyncio.create_task(attempt(), name=name)
        task.add_done_callback(ended)
        return task

    def _give_back(self, node: Node) -> None:
        """Count an attempt no longer that has not begun."""
        node.in_flight -= 1
        if self._limited:
            self._admission.ended(node)
        if node.removed and not node.in_flight:
            node.idle.set()

    async def _race(self, node: Node, tried: list[Node], call: Call, protocol: Protocol, end: float) -> Answer:
        """`_attempt`; but if it takes longer than most have lately, one on another node beside it: the first answer
        counts, and the other attempt is cancelled. If one fails the other may still answer."""
        self._hedges.earn()
        late_s = self._recent.late_s
        if late_s is None or len(tried) >= self.config.attempts:
            return await self._attempt(node, call, protocol, end)
        begun = time.monotonic()
        # No name is kept of a task that failed: its exception leads back to this frame, and they would be garbage.
        racing = {self._raced(node, call, protocol, end, _FIRST)}
        try:
            done, racing = await asyncio.wait(racing, timeout=late_s)
            if not done and (second := self._second(tried, call, end)) is not None:
                tried.append(second)
                self._take(second)
                racing.add(self._raced(second, call, protocol, end, _HEDGE))
            while True:
                if not done:
                    done, racing = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
                if answered := [task for task in done if task.exception() is None]:
                    if any(task.get_name() == _FIRST for task in racing):
                        self._recent.add(time.monotonic() - begun)  # at least; it is among the slowest in any case
                    return answered[0].result()
                failed, done = sorted(done, key=_may_go_elsewhere, reverse=True), set()
                if not racing or not _may_go_elsewhere(failed[-1]):
                    return failed.pop().result()
        finally:
            for task in racing:
                task.cancel()
                self._losing.add(task)
                task.add_done_callback(self._lost)

    def _second(self, tried: Sequence[Node], call: Call, end: float) -> Node | None:
        """The node for one more attempt beside the one under way, if there is to be one."""
        if not self._may_try_again(tried, end):
            return None
        nodes = [node for node in self._admission.room(()) if node not in tried]
        if not nodes or not self._hedges.take():
            return None
        self._metrics.hedge(self.name)
        return self._picker.choose(nodes, call)

    def _lost(self, task: asyncio.Task[Answer]) -> None:
        self._losing.discard(task)
        if not task.cancelled():
            task.exception()  # else asyncio complains that nobody has looked

    def _returned(self, node: Node) -> None:
        self._picker.returned(node)

    def _changed(self) -> None:
        self._admission.wake()

    async def close(self) -> None:
        """Release every node, once its attempts have ended."""
        gone = self.pool.update(())
        await asyncio.gather(*(self.pool.retire(node) for node in gone))


def _may_go_elsewhere(failed: asyncio.Task[Answer]) -> bool:
    error = failed.exception()
    return isinstance(error, InferenceError) and error.another_node


def _budgets(config: RouteConfig) -> tuple[float, ...]:
    return config.retry_budget, config.retry_reserve, config.hedge_budget
