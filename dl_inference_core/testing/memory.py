"""Exchanges without sockets that are forwarded over any `Connection`, on an event loop of real or virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from dl_inference_core.errors import AnswerMalformed, AttemptCancelled, Code, InferenceError
from dl_inference_core.local_exchange import LocalExchange
from dl_inference_core.routing import Upstream
from dl_inference_core.transport import (
    Answer,
    Attempt,
    Connection,
    Done,
    Extras,
    Message,
    Metadata,
    Timer,
    Trailers,
    with_added,
)
from dl_inference_core.wire.protocol import Protocol, well_formed


class MemoryExchange(LocalExchange):
    """Its attempts are tasks of the running event loop that await `Connection.call`."""

    __slots__ = ("_attempts",)

    def __init__(
        self, method: str, message: Message = b"", metadata: Metadata = (), deadline: float | None = None
    ) -> None:
        super().__init__(method, message, metadata, deadline)
        self._attempts: list[MemoryAttempt] = []

    def forward(
        self,
        connection: Connection,
        method: str,
        done: Done,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        allow_empty: bool = False,
        extras: Extras | None = None,
    ) -> Attempt:
        assert extras is None

        async def call() -> Answer:
            sent = with_added(self.metadata, metadata)
            answer = await connection.call(method, self.message, metadata=sent, timeout_s=timeout_s)
            if not well_formed(answer.message) and (answer.message or not allow_empty):
                raise AnswerMalformed("the answer is not a protobuf message")
            return answer

        attempt = MemoryAttempt(self, call, done)
        self._attempts.append(attempt)
        if not self._open:
            attempt.cancel()
        return attempt

    def attempt_ended(self, attempt: MemoryAttempt) -> None:
        """Let go of it."""
        if attempt in self._attempts:
            self._attempts.remove(attempt)

    def _ended(self, code: Code) -> None:
        for attempt in self._attempts:
            attempt.cancel()
        super()._ended(code)


class MemoryAttempt(Attempt):
    """A task that calls a node; cancelled before its first step it sends nothing."""

    def __init__(self, exchange: MemoryExchange, call: Callable[[], Awaitable[Answer]], done: Done) -> None:
        self._exchange = exchange
        self._call = call
        self._done = done
        self._cancelled = False
        self._calling: asyncio.Future[Answer] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self) -> None:
        self._cancelled = True
        if self._calling is not None:
            self._calling.cancel()

    async def _run(self) -> None:
        begun = time.monotonic()
        error: InferenceError | None = None
        trailers: Trailers = ()
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            self._calling = asyncio.ensure_future(self._call())
            message, trailers = await self._calling
        except asyncio.CancelledError:
            error = AttemptCancelled("this process cancelled the attempt")
        except InferenceError as failure:
            error, trailers = failure.with_traceback(None), failure.trailers
        else:
            self._exchange.attempt_ended(self)
            self._exchange.reply(message, trailers)
        self._calling = None
        self._exchange.attempt_ended(self)
        self._done(error, trailers, time.monotonic() - begun)


class LoopClock:
    """The clock of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time
        self._loop = loop

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        return self._loop.call_later(seconds, function)


async def answered(
    upstream: Upstream, protocol: Protocol, message: Message, *, metadata: Metadata = (), deadline: float | None = None
) -> bytes:
    """The answer of `upstream` to a message of `protocol`.

    Raises:
        InferenceError: it failed.
    """
    exchange = MemoryExchange(protocol.node_method, message, metadata, deadline)
    upstream.begin(exchange, protocol, protocol.read_key(message))
    return bytes(await exchange.outcome())
