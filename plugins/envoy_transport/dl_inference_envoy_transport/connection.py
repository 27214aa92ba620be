"""Calls out, through Envoy's own client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

from pyqwest import ReadError

from dl_inference_core.certificates import Watched
from dl_inference_core.config import ClientTls
from dl_inference_core.errors import (
    AnswerMalformed,
    BadRequest,
    Code,
    DeadlineExceeded,
    NodeUnreachable,
    Unimplemented,
    from_status,
)
from dl_inference_core.transport import Call, Connection, Limits
from dl_inference_envoy_transport import configuration, framing
from dl_inference_envoy_transport.configuration import Document, Options, split
from dl_inference_envoy_transport.host import Host
from dl_inference_envoy_transport.loop import Ticker
from dl_inference_envoy_transport.server import ANSWERING

_CLOSED = "the connection was closed"
_EXPIRED = "the deadline passed"
_LONGEST_CALL_S = 86_400.0
_KNOWN_WITHIN_S = 1.0
_POLL_S = 0.002
# Envoy's timers may be early by a few milliseconds; its time is not to be over before ours is.
_CLOCKS_DIFFER_S = 0.01

_HEADERS: tuple[tuple[str, str], ...] = (
    ("content-type", "application/grpc"),
    ("te", "trailers"),
    ("grpc-accept-encoding", "identity,gzip,deflate"),
)
_NOT_METADATA = frozenset(
    {
        "content-type",
        "content-length",
        "date",
        "server",
        "grpc-status",
        "grpc-message",
        "grpc-encoding",
        "grpc-accept-encoding",
        "x-envoy-upstream-service-time",
    }
)


class _Headers:
    """What Envoy's client reads of a request's headers."""

    __slots__ = ("_items",)

    def __init__(self, items: tuple[tuple[str, str], ...]) -> None:
        self._items = items

    def items(self) -> tuple[tuple[str, str], ...]:
        return self._items

    def __len__(self) -> int:
        return len(self._items)


class _Request:
    """What Envoy's client reads of a request; a pyqwest.Request takes longer to make."""

    __slots__ = ("_json", "content", "headers", "method", "url")

    def __init__(self, url: str, headers: tuple[tuple[str, str], ...], content: bytes) -> None:
        self.method = "POST"
        self.url = url
        self.headers = _Headers(headers)
        self.content = content
        self._json = False


class _Cluster:
    """One node as Envoy knows it."""

    def __init__(self, host: Host, document: Document) -> None:
        from pyvoy.asgi.httpclient import HTTPTransport as EnvoyClient  # there in Envoy's process only

        self._name: str = document["name"]
        self._host = host
        self._client = EnvoyClient
        self._known = False
        self._in_flight = 0
        self._retired = False
        host.add_cluster(document)

    async def execute(self, outgoing: Outgoing, request: _Request, timeout_s: float, *, background: bool) -> Any:
        """Envoy's response, as soon as its headers are there; pair with `done`.

        Args:
            timeout_s: after so many seconds Envoy resets the call at the node.
            background: it is to outlive the call that is being answered.

        Raises:
            ReadError, ConnectionError: it failed.
            ValueError: the address is none that a request can have.
        """
        end = time.monotonic() + _KNOWN_WITHIN_S
        # Making a client takes 0.2 µs, and only so can each call have a timeout of its own.
        execute = self._client(self._name, timeout=timeout_s).execute
        while True:
            try:
                if background:
                    waiting: Any = self._host.background.run(execute, request)  # type: ignore[arg-type]
                else:
                    try:
                        waiting = execute(request)  # type: ignore[arg-type]
                    except RuntimeError:  # no call is being answered in this context
                        background = True
                        continue
                response = await outgoing.on(waiting)
            except ReadError as error:
                if str(error) != "invalid upstream config" or self._known or time.monotonic() >= end:
                    raise
                await asyncio.sleep(_POLL_S)
            else:
                self._known = True
                return response

    def begin(self) -> None:
        """A call is about to use it."""
        self._in_flight += 1

    def done(self) -> None:
        """That call has ended."""
        self._in_flight -= 1
        if self._retired and not self._in_flight:
            self._host.remove_cluster(self._name)

    def retire(self, *, at_once: bool) -> None:
        """Forget it: when the calls on it have ended, or `at_once` and them with it."""
        self._retired = True
        if at_once or not self._in_flight:
            self._host.remove_cluster(self._name)


class Outgoing:
    """A call on its way."""

    __slots__ = ("_waiting", "closed", "deadline", "expired")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.expired = False
        self.closed = False
        self._waiting: asyncio.Future[Any] | None = None

    def on(self, waiting: Any) -> Any:
        """What is being waited for."""
        self._waiting = waiting if asyncio.isfuture(waiting) else None
        return waiting

    def over(self) -> None:
        """Nothing is waited for any more. What was may have ended by an exception, whose traceback leads back to this:
        without a garbage collection it would stay, and with it the connection."""
        self._waiting = None

    def tick(self, now: float) -> None:
        if now >= self.deadline:
            self.expired = True
            self.cancel()

    def cancel(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()


class EnvoyConnection(Connection):
    """One node, as a cluster of Envoy's."""

    def __init__(
        self, host: Host, address: str, limits: Limits, options: Options, watched: Watched | None, tls: ClientTls | None
    ) -> None:
        """Args:
        watched, tls: both or neither.
        """
        self._envoy = host
        self._address = split(address)
        self._limit = limits.message_bytes
        self._options = options
        self._watched = watched
        self._server_name = None if tls is None else tls.server_name
        authority = address if isinstance(self._address, tuple) else configuration.host_of(self._address)
        self._base = f"{'http' if watched is None else 'https'}://{authority}"
        self._calls: Ticker[Outgoing] = Ticker()
        self._urls: dict[str, str] = {}
        self._closed = False
        self._credentials = None if watched is None else watched.current()
        self._cluster = self._new_cluster()

    def _new_cluster(self) -> _Cluster:
        """With the credentials of now."""
        document = configuration.cluster(
            self._envoy.new_name("node"), self._address, self._options, self._credentials, self._server_name
        )
        return _Cluster(self._envoy, document)

    async def call(self, call: Call) -> bytes:
        if self._closed:
            raise NodeUnreachable(_CLOSED)
        if len(call.request) > self._limit:
            raise framing.too_large(len(call.request), self._limit, sent=True)
        if self._watched is not None and self._watched.current() is not self._credentials:
            self._credentials = self._watched.current()
            self._cluster.retire(at_once=False)
            self._cluster = self._new_cluster()
        headers = _HEADERS
        deadline, timeout_s = math.inf, _LONGEST_CALL_S
        if call.deadline is not None:
            deadline = call.deadline
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded("the deadline passed before the call was sent")
            headers = (*headers, ("grpc-timeout", framing.timeout_header(remaining)))
            timeout_s = remaining + _CLOCKS_DIFFER_S
        if call.metadata:
            headers = (*headers, *framing.encoded(call.metadata))
        url = self._urls.get(call.method)
        if url is None:
            url = self._urls[call.method] = self._base + call.method
        outgoing = Outgoing(deadline)
        request = _Request(url, headers, framing.framed(call.request))
        self._calls.add(outgoing)
        # Envoy ends a call out with the call that it is part of, but only one that it has begun.
        answering = None if call.background else ANSWERING.get()
        if answering is not None:
            answering.look_once()
        cluster = self._cluster
        cluster.begin()
        try:
            response = await cluster.execute(outgoing, request, timeout_s, background=call.background)
            return await self._read(outgoing, response, call)
        except TimeoutError:
            raise DeadlineExceeded(_EXPIRED) from None
        except asyncio.CancelledError:
            if outgoing.expired:
                raise DeadlineExceeded(_EXPIRED) from None
            if outgoing.closed:
                raise NodeUnreachable(_CLOSED) from None
            raise
        except (OSError, ReadError, ValueError) as error:
            if answering is not None and await answering.client_left():
                raise asyncio.CancelledError from error
            raise NodeUnreachable(f"the call to the node failed: {error or type(error).__name__}") from None
        finally:
            outgoing.over()
            self._calls.members.discard(outgoing)
            cluster.done()
            if answering is not None:
                answering.look_soon()

    async def _read(self, outgoing: Outgoing, response: Any, call: Call) -> bytes:
        content = aiter(response.content)
        parts: list[bytes] = []
        got = 0
        try:
            while True:
                parts.append(await outgoing.on(anext(content)))
                got += len(parts[-1])
                if got > self._limit + framing.PREFIX:
                    raise framing.too_large(got, self._limit)
        except StopAsyncIteration:
            pass
        headers, trailers = response.headers, response.trailers
        said = trailers.get("grpc-status")
        if said == "0" and response.status == 200:
            if len(trailers) > 1:
                call.trailers.extend(_metadata(trailers))
        else:
            source = headers if said is None else trailers
            code, text = framing.status(response.status, source.get("grpc-status"), source.get("grpc-message"))
            call.trailers.extend(_metadata(source))
            if code is not Code.OK:
                if time.monotonic() >= outgoing.deadline:  # Envoy's own word for that is UNAVAILABLE
                    raise DeadlineExceeded(_EXPIRED)
                raise from_status(code, text)
        frame = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        if not frame:
            raise AnswerMalformed("the status is OK, but there is no message")
        if not headers.get("content-type", "").startswith("application/grpc"):
            raise AnswerMalformed("the answer is not application/grpc")
        try:
            return framing.message(frame, headers.get("grpc-encoding", "identity"), self._limit)
        except (BadRequest, Unimplemented) as error:
            raise AnswerMalformed(f"the answer is malformed: {error}") from None

    async def close(self) -> None:
        self._closed = True
        for outgoing in tuple(self._calls.members):
            outgoing.closed = True
            outgoing.cancel()
        self._cluster.retire(at_once=True)


def _metadata(headers: Any) -> Iterator[tuple[str, str | bytes]]:
    """The node's own metadata among its headers or trailers."""
    for name, value in headers.items():
        if name not in _NOT_METADATA:
            try:
                yield from framing.decoded(name, value)
            except BadRequest as error:
                raise AnswerMalformed(f"the answer is malformed: {error}") from None
