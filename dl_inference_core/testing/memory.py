"""Exchanges without sockets, which are forwarded over any `Connection`, on an event loop of real or virtual time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

from dl_inference_core.coroutines import call_soon
from dl_inference_core.errors import AnswerMalformed, AttemptCancelled, Code, InferenceError
from dl_inference_core.routing import Upstream
from dl_inference_core.transport import (
    Answer,
    Attempt,
    Connection,
    Done,
    Extras,
    Message,
    Metadata,
    Service,
    Timer,
    Trailers,
    UnaryExchange,
    with_added,
)
from dl_inference_core.wire.protocol import Protocol, well_formed


class MemoryExchange(UnaryExchange):
    """A unary exchange without a socket. Its attempts are tasks that await `Connection.call`, on the event loop on
    which the exchange was made; an exchange that was made on none cannot be forwarded.

    Attributes:
        answer: how it was answered; None before, and where it has failed.
        error: how it has failed; None before, where it was answered, and once `outcome` has raised it.
    """

    __slots__ = (
        "_attempts",
        "_left",
        "_lock",
        "_loop",
        "_on_cancel",
        "_on_end",
        "_open",
        "_service",
        "_told",
        "answer",
        "error",
    )

    def __init__(
        self,
        method: str,
        message: Message = b"",
        metadata: Metadata = (),
        deadline: float | None = None,
        *,
        service: Service | None = None,
    ) -> None:
        """Args:
        service: is told when it has ended.
        """
        super().__init__(method, message, metadata, deadline)
        self._service = service
        self._loop = _running_loop()
        self.answer: Answer | None = None
        self.error: InferenceError | None = None
        self._open = [True]
        """Empty once it has ended. The thread that pops the item has ended it: `pop` is atomic."""
        self._told = False
        """Whether the service knows that it has ended."""
        self._left = False
        self._lock = threading.Lock()
        """Of `_left` and `_on_cancel`."""
        self._on_cancel: list[Callable[[], object]] = []
        self._on_end: Callable[[], object] | None = None
        self._attempts: list[MemoryAttempt] = []

    async def outcome(self) -> Message:
        """The answer's bytes. Cancelling it is the client's leaving.

        Raises:
            InferenceError: it has failed.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():
                ended.set_result(None)

        self._on_end = lambda: loop.call_soon_threadsafe(settle)
        if self._told:
            settle()
        try:
            await ended
        except asyncio.CancelledError:
            self.leave()
            raise
        if self.error is not None:
            error, self.error = self.error, None  # its traceback will lead here
            try:
                raise error
            finally:
                del error
        assert self.answer is not None
        return self.answer.message

    def leave(self) -> None:
        """End it as a client does that leaves."""
        if not self._end():
            return
        with self._lock:
            self._left = True
            callbacks, self._on_cancel = self._on_cancel, []
        self._ended(Code.CANCELLED)
        for callback in callbacks:
            callback()

    def _end(self) -> bool:
        try:
            return self._open.pop()
        except IndexError:
            return False

    def _ended(self, code: Code) -> None:
        for attempt in self._attempts:
            attempt.cancel()
        with self._lock:
            self._on_cancel = []  # callbacks lead back here: the message would be garbage
        if self._service is not None:
            self._service.ended_all(((self, code),))
        self._told = True
        if self._on_end is not None:
            self._on_end()

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        if self._end():
            self.answer = Answer(message, trailers)
            self._ended(Code.OK)

    def fail(self, error: InferenceError) -> None:
        if self._end():
            self.error = error
            self._ended(error.code)

    def on_cancel(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._left:
                self._on_cancel.append(callback)
                return
        threading.Thread(target=callback, daemon=True).start()  # never inside this call

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
        assert extras is None
        assert self._loop is not None

        async def call() -> Answer:
            sent = with_added(self.metadata, metadata)
            answer = await connection.call(method, self.message, metadata=sent, timeout_s=timeout_s)
            if not well_formed(answer.message) and (answer.message or not allow_empty):
                raise AnswerMalformed("the answer is not a protobuf message")
            return answer

        attempt = MemoryAttempt(self, self._loop, call, lambda *outcome: done([(context, *outcome)]))
        self._attempts.append(attempt)
        if not self._open:
            attempt.cancel()
        return attempt

    def attempt_ended(self, attempt: MemoryAttempt) -> None:
        """Let go of it."""
        if attempt in self._attempts:
            self._attempts.remove(attempt)


class MemoryAttempt(Attempt):
    """A task that calls a node; cancelled before its first step it sends nothing."""

    def __init__(
        self,
        exchange: MemoryExchange,
        loop: asyncio.AbstractEventLoop,
        call: Callable[[], Awaitable[Answer]],
        done: Callable[[InferenceError | None, Trailers, float], object],
    ) -> None:
        self._exchange = exchange
        self._loop = loop
        self._call = call
        self._done = done
        self._cancelled = False
        self._calling: asyncio.Future[Answer] | None = None
        self._task: asyncio.Task[None]
        self._on_loop(self._start)

    def _on_loop(self, function: Callable[[], None]) -> None:
        if _running_loop() is self._loop:
            function()
        else:
            call_soon(self._loop, function)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._run())

    def cancel(self) -> None:
        self._on_loop(self._cancel)

    def _cancel(self) -> None:
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


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """This thread's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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
    upstream.begin_all((exchange,), protocol, protocol.read_key(message))
    return bytes(await exchange.outcome())
