"""A transport without sockets. The benchmark is both ends: it begins exchanges, and it ends their attempts.

The transport does the least that a transport must do, so that the core is what is measured. Its one thread is the
thread of the event loop, in the place of a native transport's I/O thread. Model threads may answer from threads of
their own; the event loop then takes all the answers that have come in one turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle, groupby
from operator import attrgetter

from bench.contract import SERVING
from dl_inference_core.config import ClientTls, PluginOptions, ServerTls
from dl_inference_core.errors import Code, InferenceError
from dl_inference_core.transport import (
    Answer,
    Attempt,
    Connection,
    Done,
    Exchange,
    Extras,
    Http,
    Limits,
    Message,
    Metadata,
    Reply,
    Server,
    Service,
    Timer,
    Trailers,
    Transport,
    UnaryExchange,
)
from dl_inference_core.wire.routing_keys import RoutingKey

_DEADLINE_S = 10.0
"""Seconds that a client gives its request: more than any request here takes, so that no deadline passes."""
_ATTEMPT_S = (0.009, 0.010, 0.012)
"""Seconds that attempts are said to have taken, in turn: the gateway keeps and sorts them."""
_DONE = attrgetter("done")


class CoreExchange(UnaryExchange):
    """A request in memory. Nobody leaves, so it keeps no callbacks."""

    __slots__ = ("_transport",)

    def __init__(
        self, transport: MemoryTransport, method: str, message: bytes, deadline: float, key: RoutingKey | None
    ) -> None:
        super().__init__(method, message, (), deadline)
        self.key = key
        self._transport = transport

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        self._transport.end([(self, message, None)])

    @classmethod
    def reply_all(cls, replies: Sequence[Reply]) -> None:
        first = replies[0][0]
        assert isinstance(first, CoreExchange)
        first._transport.end([(exchange, message, None) for exchange, message, _ in replies])

    def fail(self, error: InferenceError) -> None:
        self._transport.end([(self, b"", error)])

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Nobody leaves."""

    def forward(
        self,
        connection: Connection,
        method: str,
        done: Done,
        context: object = None,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        allow_empty: bool = False,
        extras: Extras | None = None,
    ) -> Attempt:
        attempt = _Attempt(self, done, context)
        self._transport.attempts.append(attempt)
        return attempt


class _Attempt(Attempt):
    __slots__ = ("context", "done", "exchange")

    def __init__(self, exchange: CoreExchange, done: Done, context: object) -> None:
        self.exchange = exchange
        self.done = done
        self.context = context

    def cancel(self) -> None:
        """No attempt here outlives its exchange."""


class _Node(Connection):
    """A node that is well. Requests do not come here: the benchmark ends their attempts."""

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        return Answer(SERVING, ())

    async def close(self) -> None:
        """There is nothing to close."""


class _MemoryServer(Server):
    ports = ()

    async def drain(self, grace_s: float) -> None:
        """No exchange is in flight between two measurements."""


class _NoTimer:
    def cancel(self) -> None:
        """It never runs out."""


def _nothing() -> None: ...


class MemoryTransport(Transport):
    """Hands requests to a service, and takes what becomes of them. Event loop only, but for `end`.

    Attributes:
        service: what answers; set by `serve`.
        attempts: those under way.
        on_end: called on the event loop when exchanges have ended.
        key: the routing key of its exchanges, as a native transport reads it; None leaves that to the service.
    """

    name = "memory"

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.service: Service
        self.attempts: list[_Attempt] = []
        self.on_end: Callable[[], None] = _nothing
        self.key: RoutingKey | None = None
        self._ended: deque[tuple[Exchange, Message, InferenceError | None]] = deque()
        self._seconds = cycle(_ATTEMPT_S)
        self._woken = False
        self._timer = _NoTimer()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    async def serve(
        self,
        service: Service,
        addresses: tuple[str, ...],
        limits: Limits,
        *,
        share_port: bool = False,
        tls: ServerTls | None = None,
        http: Http | None = None,
    ) -> Server:
        self.service = service
        return _MemoryServer()

    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> Connection:
        return _Node()

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """A timer that never runs out: a native transport keeps timers outside Python."""
        return self._timer

    def begin(self, method: str, messages: Sequence[bytes]) -> None:
        """Hand requests to the service in one call."""
        deadline, key = time.monotonic() + _DEADLINE_S, self.key
        self.service.begin_all([CoreExchange(self, method, message, deadline, key) for message in messages])

    def end_attempts(self) -> int:
        """End all attempts well, as a native transport does: clients have their answers before `done` is told.
        Returns how many there were."""
        attempts, self.attempts = self.attempts, []
        self.service.ended_all([(attempt.exchange, Code.OK) for attempt in attempts])
        for done, of_one in groupby(attempts, _DONE):
            done([(attempt.context, None, (), next(self._seconds)) for attempt in of_one])
        return len(attempts)

    def end(self, outcomes: Sequence[tuple[Exchange, Message, InferenceError | None]]) -> None:
        """Exchanges were answered or have failed. Any thread."""
        self._ended.extend(outcomes)
        if not self._woken:
            self._woken = True
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._wake)
            else:
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False  # before `take`: what comes from now on wakes again
        self.on_end()

    def take(self) -> list[Message]:
        """The answers that have come, whose exchanges the service is told have ended.

        Raises:
            InferenceError: a request has failed.
        """
        outcomes = [self._ended.popleft() for _ in range(len(self._ended))]
        for _, _, error in outcomes:
            if error is not None:
                raise error
        self.service.ended_all([(exchange, Code.OK) for exchange, _, _ in outcomes])
        return [message for _, message, _ in outcomes]
