"""Calls of grpcio's server as exchanges, and their attempts at nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc
import grpc.aio

from dl_inference_core.errors import AnswerMalformed, AttemptCancelled, Code, HandlerFailed, InferenceError
from dl_inference_core.grpcio_connections import Calling, as_bytes, error_of, overdue_error
from dl_inference_core.transport import (
    Attempt,
    Connection,
    Done,
    Exchange,
    Extras,
    Message,
    Metadata,
    Reply,
    Service,
    Trailers,
    UnaryExchange,
    shortened,
    with_added,
)
from dl_inference_core.wire.protocol import well_formed

_log = logging.getLogger(__name__)

_STATUS = {Code(status.value[0]): status for status in grpc.StatusCode}
_OF_HTTP = frozenset({"user-agent", "te", "content-type", "content-length"})
_OF_ENVOY = frozenset({"x-forwarded-for", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms"})
_RESERVED = _OF_HTTP | _OF_ENVOY
_MOST_UNSENT = 256 * 1024
"""Bytes of a stream that wait to be sent, from which on the service is told to wait: four of HTTP/2's first windows."""


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
    """Makes an exchange of each call.

    Attributes:
        exchange_service: answers the exchanges.
        loop: the event loop of all calls, and `thread` the thread that runs it.
        tasks: of attempts beside others.
    """

    def __init__(self, service: Service) -> None:
        self.exchange_service = service
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.tasks: set[asyncio.Task[None]] = set()
        # Reading a context's metadata costs 3 % of a gateway's request, and nearly always there is none.
        self._without_metadata = {
            path: grpc.unary_unary_rpc_method_handler(_unary(path, self, metadata=False))
            for path, method in service.methods.items()
            if not method.streaming
        }
        self._handlers = {
            path: grpc.stream_stream_rpc_method_handler(_streaming(path, self))
            if method.streaming
            else grpc.unary_unary_rpc_method_handler(_unary(path, self, metadata=True))
            for path, method in service.methods.items()
        }

    def service(self, details: Any) -> Any:
        metadata = details.invocation_metadata
        if len(metadata) == 1 and metadata[0][0] == "user-agent" and details.method in self._without_metadata:
            return self._without_metadata[details.method]
        return self._handlers.get(details.method)


def _unary(method: str, handlers: Handlers, *, metadata: bool) -> Any:
    async def answer(request: bytes, context: Any) -> Message:
        own = _callers_own(context.invocation_metadata()) if metadata else ()
        return await GrpcioExchange(handlers, context, method, request, own).run()

    return answer


def _streaming(method: str, handlers: Handlers) -> Any:
    async def answer(_: Any, context: Any) -> None:
        await GrpcioStream(handlers, context, method, b"", _callers_own(context.invocation_metadata())).run()

    return answer


def _callers_own(metadata: Any) -> Metadata:
    return tuple([pair for pair in metadata if pair[0] not in _RESERVED and not pair[0].startswith("grpc-")])


class GrpcioExchange(UnaryExchange):
    """A unary call, answered by the task that `grpc.aio` makes for it.

    That task also carries out the attempts, one after another; an attempt beside another has a task of its own. What
    another thread asks for is done on the event loop.
    """

    __slots__ = (
        "_attempts",
        "_code",
        "_context",
        "_error",
        "_handlers",
        "_message",
        "_next",
        "_on_cancel",
        "_trailers",
        "_waiter",
    )

    def __init__(self, handlers: Handlers, context: Any, method: str, message: bytes, metadata: Metadata) -> None:
        remaining = context.time_remaining()
        super().__init__(method, message, metadata, None if remaining is None else time.monotonic() + remaining)
        self._handlers = handlers
        self._context = context
        self._code: Code | None = None
        """How it has ended."""
        self._message: Message = b""
        self._error: InferenceError | None = None
        self._trailers: Trailers = ()
        self._on_cancel: list[Callable[[], object]] = []
        self._attempts: list[GrpcioAttempt] = []
        """Those that have not ended."""
        self._next: GrpcioAttempt | None = None
        """The one that the task of the call is to carry out next."""
        self._waiter: asyncio.Future[None] | None = None

    async def run(self) -> Message:
        """Have the service begin it, and carry it to its end."""
        try:
            self._handlers.exchange_service.begin_all((self,))
            while self._code is None:
                if (attempt := self._next) is not None:
                    self._next = None
                    await attempt.run()
                else:
                    await self._woken()
        finally:
            self._settle()
        return self._tell()

    def _settle(self) -> None:
        """The task of the call does no more for it."""
        if self._code is None:
            self.leave()  # a write may tell that the client has left before the task is cancelled
        self._on_cancel = []
        if (attempt := self._next) is not None:
            self._next = None
            attempt.abandon()
        self._handlers.exchange_service.ended_all(((self, Code.UNKNOWN if self._code is None else self._code),))

    def _tell(self) -> Message:
        """The message that ends the call; the context has its status and its trailers."""
        # Not by `abort`, whose exception leads to itself by way of this frame: the message would be garbage.
        if self._error is not None:
            self._context.set_code(_STATUS[self._error.code])
            self._context.set_details(shortened(str(self._error)))
            self._trailers = self._error.trailers
        if self._trailers:
            self._context.set_trailing_metadata(tuple(self._trailers))
        return as_bytes(self._message)

    def leave(self) -> None:
        """The client has left, or the deadline has passed. Event loop only."""
        if self._end(Code.CANCELLED):
            for callback in self._on_cancel:
                callback()

    async def _woken(self) -> None:
        self._waiter = self._handlers.loop.create_future()
        await self._waiter
        self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(
        self, code: Code, message: Message = b"", trailers: Trailers = (), error: InferenceError | None = None
    ) -> bool:
        """Whether it had not ended. Event loop only."""
        if self._code is not None:
            return False
        self._code, self._message, self._trailers, self._error = code, message, trailers, error
        for attempt in self._attempts:
            attempt.cancel()
        if self._waiter is not None:  # nearly never: saves a call
            self._wake()
        return True

    def on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function` now on the event loop, soon from another thread."""
        if threading.get_ident() == self._handlers.thread:
            function(*arguments)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._handlers.loop.call_soon_threadsafe(function, *arguments)

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        self.on_loop(self._end, Code.OK, message, trailers)

    @classmethod
    def reply_all(cls, replies: Sequence[Reply]) -> None:
        if replies:
            first = replies[0][0]
            assert isinstance(first, GrpcioExchange)
            first.on_loop(super().reply_all, replies)

    def fail(self, error: InferenceError) -> None:
        self.on_loop(self._end, error.code, b"", (), error)

    def on_cancel(self, callback: Callable[[], object]) -> None:
        self.on_loop(self._add_on_cancel, callback)

    def _add_on_cancel(self, callback: Callable[[], object]) -> None:
        if self._code is None:
            self._on_cancel.append(callback)
        elif self._code is Code.CANCELLED and self._error is None:
            self._handlers.loop.call_soon(callback)

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
        metadata = with_added(self.metadata, metadata)
        attempt = GrpcioAttempt(self, connection, method, done, context, timeout_s, metadata, allow_empty, extras)
        self.on_loop(self._forward, attempt)
        return attempt

    def _forward(self, attempt: GrpcioAttempt) -> None:
        beside = bool(self._attempts)
        self._attempts.append(attempt)
        if self._code is not None:
            attempt.cancel()
        if beside or self._code is not None:
            task = self._handlers.loop.create_task(attempt.run())
            self._handlers.tasks.add(task)
            task.add_done_callback(self._handlers.tasks.discard)
        else:
            self._next = attempt
            self._wake()

    def attempt_ended(self, attempt: GrpcioAttempt, answer: Message | None, trailers: Trailers) -> None:
        """Answer the client, if the attempt gave an answer. Event loop only."""
        self._attempts.remove(attempt)
        if answer is not None:
            private = self._handlers.exchange_service.private_trailers
            self._end(Code.OK, answer, [pair for pair in trailers if pair[0] not in private] if trailers else ())


class GrpcioStream(GrpcioExchange):
    """A stream in each direction: the task of the call sends, and another one reads while a message is asked for."""

    __slots__ = ("_coming", "_lock", "_on_message", "_on_writable", "_outgoing", "_reading", "_unsent")

    forward = Exchange.forward

    def __init__(self, handlers: Handlers, context: Any, method: str, message: bytes, metadata: Metadata) -> None:
        super().__init__(handlers, context, method, message, metadata)
        self._outgoing: deque[Message] = deque()
        self._unsent = 0
        """The bytes that were given to `send` and are not written yet."""
        self._coming = 0
        """Calls of other threads that the event loop has not made yet."""
        self._lock = threading.Lock()
        """Of `_unsent` and `_coming`."""
        self._on_message: Callable[[Message | None], object] | None = None
        self._on_writable: Callable[[], object] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def run(self) -> Message:
        try:
            self._handlers.exchange_service.begin_all((self,))
            await self._send_until_ended()
        finally:
            self._settle()
        return self._tell()

    async def _send_until_ended(self) -> None:
        try:
            while True:
                while self._outgoing:
                    await self._context.write(as_bytes(self._outgoing[0]))
                    self._add_unsent(-len(self._outgoing.popleft()))
                    if self._unsent < _MOST_UNSENT and (callback := self._on_writable) is not None:
                        self._on_writable = None
                        callback()
                if self._code is not None:
                    return
                await self._woken()
        finally:
            if self._reading is not None:
                self._reading.cancel()

    def on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """In the order in which threads call this: a message of another thread comes before an end that follows it."""
        if threading.get_ident() == self._handlers.thread and not self._coming:
            function(*arguments)
            return
        with self._lock:
            self._coming += 1
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._handlers.loop.call_soon_threadsafe(self._come, function, arguments)

    def _come(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        with self._lock:
            self._coming -= 1
        function(*arguments)

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        self._add_unsent(len(message))
        self.on_loop(self._reply, message, trailers)

    def _reply(self, message: Message, trailers: Trailers) -> None:
        self._send(message)
        self._end(Code.OK, b"", trailers)

    def on_message(self, callback: Callable[[Message | None], object]) -> None:
        self.on_loop(self._read, callback)

    def _read(self, callback: Callable[[Message | None], object]) -> None:
        if self._code is not None:
            return
        self._on_message = callback
        if self._reading is None:
            self._reading = self._handlers.loop.create_task(self._read_asked())

    async def _read_asked(self) -> None:
        try:
            while (callback := self._on_message) is not None and self._code is None:
                self._on_message = None
                message = await self._context.read()
                callback(None if message is grpc.aio.EOF else message)
        except grpc.aio.BaseError:  # the client left, and the task of the call is told
            return
        finally:
            self._reading = None

    def send(self, message: Message) -> bool:
        self._add_unsent(len(message))
        self.on_loop(self._send, message)
        return self._unsent < _MOST_UNSENT

    def _send(self, message: Message) -> None:
        if self._code is None:
            self._outgoing.append(message)
            self._wake()

    def _add_unsent(self, size: int) -> None:
        with self._lock:
            self._unsent += size

    def on_writable(self, callback: Callable[[], object]) -> None:
        self.on_loop(self._await_room, callback)

    def _await_room(self, callback: Callable[[], object]) -> None:
        if self._code is not None:
            return
        if self._unsent < _MOST_UNSENT:
            self._handlers.loop.call_soon(callback)
        else:
            self._on_writable = callback

    def finish(self, trailers: Trailers = ()) -> None:
        self.on_loop(self._end, Code.OK, b"", trailers)


class GrpcioAttempt(Attempt):
    """A call of a node that answers an exchange."""

    __slots__ = (
        "_allow_empty",
        "_call",
        "_cancelled",
        "_connection",
        "_context",
        "_done",
        "_exchange",
        "_extras",
        "_metadata",
        "_method",
        "_timeout_s",
    )

    def __init__(
        self,
        exchange: GrpcioExchange,
        connection: Connection,
        method: str,
        done: Done,
        context: object,
        timeout_s: float | None,
        metadata: Metadata,
        allow_empty: bool,
        extras: Extras | None,
    ) -> None:
        self._exchange = exchange
        self._connection = cast("Calling", connection)
        self._method = method
        self._done = done
        self._context = context
        self._timeout_s = timeout_s
        self._metadata = metadata
        self._allow_empty = allow_empty
        self._extras = extras
        self._cancelled = False
        self._call: Any = None
        """Of `grpc.aio`, once it is under way."""

    async def run(self) -> None:
        """Carry it out. Raises nothing but the CancelledError of the task."""
        exchange, extras = self._exchange, self._extras
        begun = time.monotonic()
        error: InferenceError | None = None
        trailers: Trailers = ()
        left = False
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            request = exchange.message
            if extras is not None and extras.change_request is not None:
                request = extras.change_request(request)
                if self._cancelled:
                    raise asyncio.CancelledError
            self._call = call = self._connection.begin(self._method, as_bytes(request), self._metadata, self._timeout_s)
            answer = await call
            trailers = await call.trailing_metadata() or ()
            self._answer(request, answer, trailers)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            left = task is not None and task.cancelling() > 0
            if left:
                exchange.leave()
            late = self._timeout_s is not None and time.monotonic() - begun > self._timeout_s
            error = overdue_error() if late and not (left or self._cancelled) else _cancelled()
        except InferenceError as failure:
            error = failure.with_traceback(None)  # which leads to this frame, and so to the messages
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
        except Exception as failure:
            _log.exception("a function that changes messages, or grpcio, raised an unexpected error")
            error = HandlerFailed(f"unexpected {type(failure).__name__}")
        finally:
            if self._call is not None:
                self._connection.ended(self._call)
        if error is not None:
            exchange.attempt_ended(self, None, ())
            trailers = error.trailers
        self._done(((self._context, error, trailers, time.monotonic() - begun),))
        if left:
            raise asyncio.CancelledError

    def _answer(self, request: Message, answer: bytes, trailers: Trailers) -> None:
        """Hand a good answer of the node's to the exchange.

        Args:
            request: what the node was sent.

        Raises:
            AnswerMalformed: the answer is not a protobuf message.
        """
        if not well_formed(answer) and (answer or not self._allow_empty):
            malformed = AnswerMalformed("the answer is not a protobuf message")
            malformed.trailers = trailers
            raise malformed
        extras = self._extras
        if extras is None:
            self._exchange.attempt_ended(self, answer, trailers)
            return
        changed = answer if extras.change_answer is None else extras.change_answer(answer)
        self._exchange.attempt_ended(self, changed, trailers)
        if extras.sink is not None:
            extras.sink.offer(request, answer)

    def abandon(self) -> None:
        """End it before it has begun."""
        self._exchange.attempt_ended(self, None, ())
        self._done(((self._context, _cancelled(), (), 0.0),))

    def cancel(self) -> None:
        self._exchange.on_loop(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()


def _cancelled() -> InferenceError:
    return AttemptCancelled("this process cancelled the attempt")
