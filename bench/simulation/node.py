"""A node without a network: places for so many requests at once, a queue before them, and faults as told."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dl_inference_core.errors import DeadlineExceeded, NodeFailed, NodeUnreachable
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.transport import Answer, Connection, Message, Metadata

_ANSWER = b"\x08\x01"
"""To requests a protobuf message, to probes SERVING."""
_SERVICE = "/grpc.health.v1.Health/"
_AT_ONCE_S = 0.001
_REPORTS_PER_S = 20
_LEAST = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How a node does.

    Attributes:
        at_once: requests that it works on at a time; the others wait.
        mean_s: seconds that one takes on average: three quarters of that, and an exponential part.
        later_s: and how much later than it is done the answer comes.
        fails: the part of the requests that end with INTERNAL after 1 ms, without taking a place.
        hangs: whether it stands still, as a process that is stopped, and answers no probes.
        refuses: whether it is gone, and connections are refused.
    """

    at_once: int = 6
    mean_s: float = 0.04
    later_s: float = 0.0
    fails: float = 0.0
    hangs: bool = False
    refuses: bool = False


Work: TypeAlias = "asyncio.Future[Answer]"


class Node(Connection):
    """The connection to a node, and the node itself. Event loop only.

    Attributes:
        arrived: when each attempt was made; probes do not count.
    """

    def __init__(self, address: str, behaviour: Behaviour) -> None:
        self.arrived: list[float] = []
        self._address = address
        self._behaviour = behaviour
        self._random = random.Random(address)  # noqa: S311 - the same run again
        self._loop = asyncio.get_running_loop()
        self._busy = 0
        self._queue: deque[Work] = deque()
        self._under_way: dict[asyncio.Future[Answer], None] = {}
        self._stuck: list[Work] = []
        self._worked_s = 0.0
        self._meter = LoadMeter(_REPORTS_PER_S)
        self._meter.watch(lambda: self._worked_s, behaviour.at_once)

    def behave(self, **changes: Any) -> None:
        """From now on."""
        self._behaviour = replace(self._behaviour, **changes)
        if self._behaviour.refuses:
            for answer in self._under_way:
                if not answer.done():
                    answer.set_exception(NodeUnreachable(f"{self._address}: connection reset"))
        if not self._behaviour.hangs:
            stuck, self._stuck = self._stuck, []
            for work in stuck:
                self._done(work)

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        probe = method.startswith(_SERVICE)
        if not probe:
            self.arrived.append(self._loop.time())
        if self._behaviour.refuses:
            await asyncio.sleep(_AT_ONCE_S)
            raise NodeUnreachable(f"{self._address}: connection refused")
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._under_way[answer] = None
        if probe:
            self._loop.call_later(_AT_ONCE_S, self._answer_probe, answer)
        elif self._random.random() < self._behaviour.fails:
            self._loop.call_later(_AT_ONCE_S, self._fail, answer)
        else:
            self._queue.append(answer)
            self._work()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: no answer in time") from None
        finally:
            del self._under_way[answer]

    async def close(self) -> None:
        """There is nothing to close."""

    def _work(self) -> None:
        """Take up what waits, while there is room; who has gone meanwhile is passed over."""
        while self._queue and self._busy < self._behaviour.at_once:
            work = self._queue.popleft()
            if not work.done():
                mean_s = self._behaviour.mean_s
                seconds = mean_s * (_LEAST + self._random.expovariate(1 / (1 - _LEAST)))
                self._busy += 1
                self._loop.call_later(seconds, self._worked, work, seconds)

    def _worked(self, work: Work, seconds: float) -> None:
        self._worked_s += seconds
        if self._behaviour.hangs:
            self._stuck.append(work)
        else:
            self._done(work)

    def _done(self, work: Work) -> None:
        self._busy -= 1
        self._work()
        self._loop.call_later(self._behaviour.later_s, self._answer, work)

    def _answer(self, answer: asyncio.Future[Answer]) -> None:
        if not answer.done():
            answer.set_result(Answer(_ANSWER, self._meter.answered()))

    def _fail(self, answer: asyncio.Future[Answer]) -> None:
        if not answer.done() and not self._behaviour.hangs:
            error = NodeFailed(f"{self._address}: as it was told")
            error.trailers = self._meter.answered(error)
            answer.set_exception(error)

    def _answer_probe(self, answer: asyncio.Future[Answer]) -> None:
        if not answer.done() and not self._behaviour.hangs:
            answer.set_result(Answer(_ANSWER, ()))
