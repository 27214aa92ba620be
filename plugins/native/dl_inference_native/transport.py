"""The seam's classes on top of `_native`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Self

from pydantic import Field

from dl_inference_core import children, sockets
from dl_inference_core import transport as seam
from dl_inference_core.config import ClientTls, PluginOptions, ServerTls
from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptCancelled,
    Code,
    HandlerFailed,
    InferenceError,
    NodeUnreachable,
    from_status,
)
from dl_inference_core.http_exchange import HttpExchange
from dl_inference_core.transport import Answer, Http, Limits, Message, Metadata, Service, Timer, Trailers
from dl_inference_core.wire.routing_keys import RoutingKey
from dl_inference_native import _native
from dl_inference_native.certificates import Followed
from dl_inference_native.http import NativeHttp
from dl_inference_native.listening import Listening
from dl_inference_native.pages import Count

_log = logging.getLogger(__name__)

# A class of Rust cannot derive from one of Python, and one of Python that derives from both costs more to make.
seam.Exchange.register(_native.Exchange)
seam.Attempt.register(_native.Attempt)
HttpExchange.register(_native.HttpExchange)

_ATTEMPT_CANCELLED, _MALFORMED = 100, 101
"""Codes of `_native` that gRPC has not."""

_SWITCH_INTERVAL_S = 0.0005
"""How long a thread that computes in Python keeps the interpreter from an I/O thread that waits for it. Python's 5 ms
raise the p99 of forwarded requests by 24 ms, this raises it by 6 ms. A node's CPU per request grows by 3 %; with 0.1 ms
it grows by 22 % (`measure/interpreter.py`)."""

_LONGEST_S = 10**9
_NO_LIMIT_MS = 2**31 - 1
_STOP_S = 5.0
"""Seconds that the I/O threads have to end when the process ends. They do so in milliseconds, unless a service blocks
one."""


class _Helpers:
    """What `_native` needs of the core to speak of errors and times."""

    now = staticmethod(time.monotonic)
    codes = tuple(Code)
    key_of = RoutingKey

    @staticmethod
    def error_of(code: int, message: str, trailers: Trailers) -> InferenceError:
        if code == _ATTEMPT_CANCELLED:
            error: InferenceError = AttemptCancelled(message)
        elif code == _MALFORMED:
            error = AnswerMalformed(message)
        else:
            error = from_status(Code(code), message)
        error.trailers = trailers
        return error

    @staticmethod
    def status_of(error: InferenceError) -> tuple[int, str, Trailers]:
        return int(error.code), seam.shortened(str(error)), tuple(error.trailers)

    @staticmethod
    def end_child(error: BaseException | None) -> None:
        """End this process: a service has forked it on an I/O thread, and came back from there."""
        children.end_child(error)
        os._exit(1)

    @staticmethod
    def raised(error: BaseException) -> InferenceError:
        """What a function that changes messages raised."""
        if isinstance(error, InferenceError):
            return error.with_traceback(None)
        _log.error("a function that changes messages failed", exc_info=error)
        return HandlerFailed(f"unexpected {type(error).__name__}")


class NativeTransport(seam.Transport):
    """Rust's tokio, h2, hyper and rustls, client and server, on I/O threads of their own.

    The service and all callbacks are called on the I/O threads. So `serve` lowers the interpreter's switch interval to
    0.5 ms, unless it is shorter already. It is the whole process's, and stays so. A C function that holds the GIL keeps
    the I/O threads waiting until it returns, whatever the interval is: a model with such functions belongs on a node of
    its own, not in a gateway's process. With TLS, keys may be RSA, ECDSA on P-256 and P-384, or
    Ed25519.
    """

    name = "native"
    priority = 10
    http_on_same_port = True

    class Options(PluginOptions):
        """Attributes:
        threads: how many threads receive and send.
        buffer_mb: MiB of messages that the process holds at one time; over it, messages that come are refused with
            RESOURCE_EXHAUSTED.
        connect_timeout_ms: how long a connection to a node may take to come up.
        unacknowledged_ms: how long what was sent to a node may go without TCP's acknowledgement, or the node take
            nothing in, before the connection is given up, so that the next one finds a path that works again; 0 leaves
            that to the system. On Linux only.
        header_kb: KiB that the headers of one call or request may have; with more, it is refused.
        idle_timeout_s: seconds after which a client's connection without calls and requests is closed; 0 never.
        connection_age_s: seconds, 10 % more or less, after which a client is told to connect anew, once its calls are
            answered; 0 never.
        headers_timeout_s: seconds that a client has for the handshakes of TLS and HTTP/2, and with HTTP/1 for the
            headers of each request.
        body_timeout_s: seconds that a client has for the body of an HTTP request, and in which it may take nothing of
            an HTTP answer or of the answer to a unary call. While half of `buffer_mb` is in use, also seconds for each
            64 KiB of every answer that waits for its client.
        keepalive_s: seconds after which a silent connection is asked for a sign of life by a PING of HTTP/2: that of a
            client always, that to a node while calls are in flight on it. As long as a node sends nothing but the
            answers, it is asked every five minutes at most, as gRPC's servers demand.
        keepalive_timeout_s: seconds that the sign may take; then the connection is closed.
        """

        threads: int = Field(default=1, ge=1, le=64)
        buffer_mb: int = Field(default=256, ge=16, le=2**20)
        connect_timeout_ms: int = Field(default=1000, ge=1, lt=2**31)
        unacknowledged_ms: int = Field(default=2000, ge=0, lt=2**31)
        header_kb: int = Field(default=16, ge=1, le=64)
        idle_timeout_s: int = Field(default=3600, ge=0, le=_LONGEST_S)
        connection_age_s: int = Field(default=0, ge=0, le=_LONGEST_S)
        headers_timeout_s: int = Field(default=10, ge=1, le=_LONGEST_S)
        body_timeout_s: int = Field(default=60, ge=1, le=_LONGEST_S)
        keepalive_s: int = Field(default=30, ge=1, le=_LONGEST_S)
        keepalive_timeout_s: int = Field(default=5, ge=1, le=_LONGEST_S)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._started: _native.Threads | None = None
        self._trusted: dict[ClientTls, Followed] = {}
        self._refused_pages = Count()

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        options: dict[str, Any] = {}
        for name, value in arguments.items():
            option, unit, none = _OF_ARGUMENTS.get(name, ("", 1, None))
            if not option or not isinstance(value, int) or value < 0:
                continue
            if value >= _NO_LIMIT_MS and none is not None:
                options[option] = none
            else:
                options[option] = max(1, -(-value // unit))
        known = {name for name, (option, _, _) in _OF_ARGUMENTS.items() if option in options}
        return options, tuple(name for name in arguments if name not in known)

    @property
    def _threads(self) -> _native.Threads:
        if self._started is None:
            self._started = _native.Threads(_Helpers, self.options)
        return self._started

    async def serve(
        self,
        service: Service,
        addresses: tuple[str, ...],
        limits: Limits,
        *,
        share_port: bool = False,
        tls: ServerTls | None = None,
        http: Http | None = None,
    ) -> seam.Server:
        followed = None if tls is None else Followed(tls)
        listening = Listening(addresses, share_port=share_port)
        if sys.getswitchinterval() > _SWITCH_INTERVAL_S:
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
        if followed is not None:
            followed.begin()
        number = self._threads.serve(
            service,
            listening.detach(),
            limits.message_bytes,
            seam.room_for(limits.connections),
            limits.streams,
            None if followed is None else followed.native,
            None if http is None else NativeHttp(http, "http" if tls is None else "https", self._refused_pages),
        )
        return NativeServer(self._threads, number, listening, followed)

    def prepare(self, tls: ClientTls) -> None:
        self._trust(tls)

    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> seam.Connection:
        path = sockets.path_of(address)
        place = address if path is None else f"{sockets.PREFIX}{path}"
        if tls is None:
            return NativeConnection(self._threads, place, limits.message_bytes)
        trusted = self._trust(tls)
        name = tls.server_name or ("localhost" if path is not None else address.rpartition(":")[0])
        connection = NativeConnection(self._threads, place, limits.message_bytes, (trusted.native, name))
        connection.follow(trusted)
        return connection

    def refusals(self) -> Mapping[str, int]:
        counts = {} if self._started is None else self._started.refusals()
        return counts | {"pages": self._refused_pages.value}

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        return self._threads.call_later(seconds, function)

    def _trust(self, tls: ClientTls) -> Followed:
        files = tls.model_copy(update={"server_name": None})
        if files not in self._trusted:
            self._trusted[files] = Followed(files)
        return self._trusted[files]


_OF_ARGUMENTS: Mapping[str, tuple[str, int, int | None]] = {
    "grpc.max_connection_age_ms": ("connection_age_s", 1000, 0),
    "grpc.max_connection_idle_ms": ("idle_timeout_s", 1000, 0),
    "grpc.keepalive_time_ms": ("keepalive_s", 1000, _LONGEST_S),
    "grpc.keepalive_timeout_ms": ("keepalive_timeout_s", 1000, None),
    "grpc.server_handshake_timeout_ms": ("headers_timeout_s", 1000, None),
}
"""By channel argument of gRPC's: the option that it sets, how many of its units make one of the option's, and the value
of the option that sets no limit."""


@atexit.register
def _stop_all() -> None:
    """Or a thread would want the interpreter while it ends."""
    if not _native.stop_all(_STOP_S):
        _log.error("an I/O thread has not ended in %g s: a service blocks it", _STOP_S)


class _Parts:
    """Waits until each I/O thread has done its part."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Semaphore(0)

    def __call__(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._done.release)

    async def wait(self, count: int) -> None:
        for _ in range(count):
            await self._done.acquire()


class NativeServer(seam.Server):
    """A server of the I/O threads."""

    def __init__(self, threads: _native.Threads, number: int, listening: Listening, followed: Followed | None) -> None:
        self._threads = threads
        self._number = number
        self._listening = listening
        self._followed = followed
        self.ports = listening.ports

    async def drain(self, grace_s: float) -> None:
        if self._followed is not None:
            self._followed.end()
            self._followed = None
        parts = _Parts()
        await parts.wait(self._threads.drain(self._number, grace_s, parts))
        self._listening.remove_paths()


class NativeConnection(_native.Node, seam.Connection):
    """A connection of each I/O thread to one node."""

    _threads: _native.Threads
    _followed: Followed | None

    def __new__(
        cls,
        threads: _native.Threads,
        address: str,
        message_bytes: int,
        tls: tuple[_native.ClientTls, str] | None = None,
    ) -> Self:
        self = super().__new__(cls, threads, address, message_bytes, tls)
        self._threads = threads  # or they would end with the transport
        self._followed = None
        return self

    def follow(self, followed: Followed) -> None:
        """Keep up with the files of the certificates until it is closed."""
        followed.begin()
        self._followed = followed

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        done = partial(_settle_soon, loop, future)
        attempt = self.begin_call(method, message, metadata, timeout_s, done)
        try:
            return await future
        except asyncio.CancelledError:
            attempt.cancel()
            raise
        finally:
            del future  # an error's traceback leads to this frame

    async def close(self) -> None:
        if self._followed is not None:
            self._followed.end()
            self._followed = None
        parts = _Parts()
        await parts.wait(self.begin_close(parts))


def _settle_soon(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Answer], *outcome: Any) -> None:
    """On an I/O thread: have the future told how its call has ended."""
    with suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_settle, future, *outcome)


def _settle(future: asyncio.Future[Answer], error: InferenceError | None, message: Message, trailers: Trailers) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(Answer(message, trailers))
    elif isinstance(error, AttemptCancelled):
        future.set_exception(NodeUnreachable("the connection was closed"))
    else:
        future.set_exception(error)
