"""The seam's classes on top of `_native`."""

from __future__ import annotations

import asyncio
import atexit
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import Field

from dl_inference_core import transport as seam
from dl_inference_core.config import ClientTls, PluginOptions, ServerTls
from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptCancelled,
    Code,
    ConfigError,
    HandlerFailed,
    InferenceError,
    NodeUnreachable,
    from_status,
)
from dl_inference_core.transport import Answer, Http, Limits, Message, Metadata, Service, Timer, Trailers
from dl_inference_native import _native

# A class of Rust cannot derive from one of Python, and one of Python that derives from both costs more to make.
seam.Exchange.register(_native.Exchange)
seam.Attempt.register(_native.Attempt)

_ATTEMPT_CANCELLED, _MALFORMED = 100, 101


def _error_of(code: int, message: str, trailers: Trailers) -> InferenceError:
    if code == _ATTEMPT_CANCELLED:
        error: InferenceError = AttemptCancelled(message)
    elif code == _MALFORMED:
        error = AnswerMalformed(message)
    else:
        error = from_status(Code(code), message)
    error.trailers = trailers
    return error


def _status_of(error: InferenceError) -> tuple[int, str, Trailers]:
    return int(error.code), seam.shortened(str(error)), tuple(error.trailers)


def _raised(error: BaseException) -> InferenceError:
    """What a function that changes messages raised."""
    if isinstance(error, InferenceError):
        return error.with_traceback(None)
    return HandlerFailed(f"unexpected {type(error).__name__}")


class NativeTransport(seam.Transport):
    """Rust's tokio and h2. The spike has no TLS, no Unix-domain sockets and no compression; a method that streams is
    UNIMPLEMENTED."""

    name = "native"

    class Options(PluginOptions):
        """Attributes:
        io_threads: how many threads receive and send.
        """

        io_threads: int = Field(default=1, ge=1, le=64)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._started: Any = None

    @property
    def _threads(self) -> Any:
        if self._started is None:
            helpers = _error_of, _status_of, _raised, list(Code), time.monotonic
            self._started = threads = _native.Threads(self.options.io_threads, *helpers)
            _running.add(threads)
            weakref.finalize(self, _stop, threads).atexit = False
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
        if tls is not None:
            raise NotImplementedError("this spike has no TLS")
        sockets: list[socket.socket] = []
        try:
            for address in addresses:
                sockets.append(_listening(address, share_port))
            ports = tuple(each.getsockname()[1] for each in sockets)
        except BaseException:
            for each in sockets:
                each.close()
            raise
        connections = seam.room_for(limits.connections)
        fds = [each.detach() for each in sockets]
        id = self._threads.serve(service, fds, limits.message_bytes, connections, limits.streams)
        return NativeServer(self, id, ports)

    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> seam.Connection:
        if tls is not None or address.startswith("unix:"):
            raise NotImplementedError("this spike has no TLS and no Unix-domain sockets")
        return NativeConnection(self._threads, address, limits.message_bytes)

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        return self._threads.call_later(seconds, function)


_running: weakref.WeakSet[Any] = weakref.WeakSet()


def _stop(threads: Any) -> None:
    threads.stop(False)


@atexit.register
def _stop_all() -> None:
    """Or a thread would want the interpreter while it ends."""
    for threads in list(_running):
        threads.stop(True)


def _listening(address: str, share_port: bool) -> socket.socket:
    if address.startswith("unix:"):
        raise NotImplementedError("this spike has no Unix-domain sockets")
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if not colon:
            raise ValueError("there is no port")
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, int(port)))
        listening.listen(1024)
        listening.setblocking(False)
    except (OSError, ValueError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    return listening


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
    def __init__(self, transport: NativeTransport, id: int, ports: tuple[int, ...]) -> None:
        self._transport = transport
        self._id = id
        self.ports = ports

    async def drain(self, grace_s: float) -> None:
        parts = _Parts()
        await parts.wait(self._transport._threads.drain(self._id, grace_s, parts))


class NativeConnection(_native.Node, seam.Connection):  # type: ignore[misc]
    def __new__(cls, threads: Any, address: str, message_bytes: int) -> NativeConnection:
        return super().__new__(cls, threads, address, message_bytes)

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(error: InferenceError | None, message: Message, trailers: Trailers) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(Answer(message, trailers))
            elif isinstance(error, AttemptCancelled):
                future.set_exception(NodeUnreachable("the connection was closed"))
            else:
                future.set_exception(error)

        def done(*outcome: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, *outcome)

        attempt = self.begin_call(method, message, metadata, timeout_s, done)
        try:
            return await future
        except asyncio.CancelledError:
            attempt.cancel()
            raise
        finally:
            del future  # an error's traceback leads to this frame

    async def close(self) -> None:
        parts = _Parts()
        await parts.wait(self.begin_close(parts))
