"""Calls out: through Envoy's own client while a call is being answered, else through pyqwest's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

from pyqwest import Headers, HTTPTransport, HTTPVersion, ReadError, RemoteProtocolError, Request, WriteError

from dl_inference_core.certificates import Watched
from dl_inference_core.config import ClientTls
from dl_inference_core.errors import (
    BadRequest,
    Code,
    DeadlineExceeded,
    NodeFailed,
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


class _OutsideOfACall(Exception):
    """Envoy's client works only while a call is being answered, and in its context."""


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

    async def execute(self, outgoing: Outgoing, request: _Request, timeout_s: float) -> Any:
        """Envoy's response, as soon as its headers are there; pair with `done`.

        Args:
            timeout_s: after so many seconds Envoy resets the call at the node.

        Raises:
            _OutsideOfACall: no call is being answered.
            ReadError, ConnectionError: it failed.
        """
        end = time.monotonic() + _KNOWN_WITHIN_S
        # Making a client takes 0.2 µs, and only so can each call have a timeout of its own.
        client = self._client(self._name, timeout=timeout_s)
        while True:
            try:
                response = await outgoing.on(client.execute(request))  # type: ignore[arg-type]
            except RuntimeError as error:
                raise _OutsideOfACall from error
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
    """One node: a cluster of Envoy's, and pyqwest's client for what is no part of answering a call."""

    def __init__(
        self, address: str, limits: Limits, options: Options, watched: Watched | None, tls: ClientTls | None
    ) -> None:
        """Args:
        watched, tls: both or neither.
        """
        self._host, self._port = split(address)
        self._limit = limits.message_bytes
        self._options = options
        self._watched = watched
        self._server_name = None if tls is None else tls.server_name
        self._base = f"{'http' if watched is None else 'https'}://{address}"
        self._calls: Ticker[Outgoing] = Ticker()
        self._urls: dict[str, str] = {}
        self._closed = False
        self._cluster: _Cluster | None = None
        self._credentials = None if watched is None else watched.current()
        self._connect()

    def _connect(self) -> None:
        """New ways to the node, with the credentials of now."""
        host, credentials = Host.of_this_process(), self._credentials
        if host is not None:
            if self._cluster is not None:
                self._cluster.retire(at_once=False)
            document = configuration.cluster(
                host.new_name("node"), self._host, self._port, self._options, credentials, self._server_name
            )
            self._cluster = _Cluster(host, document)
        secure: dict[str, Any] = {}
        if credentials is not None:
            secure = {
                "tls_ca_cert": credentials.authorities,
                "tls_cert": credentials.certificate,
                "tls_key": credentials.key,
            }
            if self._server_name is not None:
                secure["dns_overrides"] = {self._server_name: [self._host]}
        self._others: HTTPTransport | None = HTTPTransport(
            http_version=HTTPVersion.HTTP2,
            connect_timeout=self._options.connect_timeout_ms / 1000,
            follow_redirects=False,
            enable_otel=False,
            **secure,
        )

    async def call(self, call: Call) -> bytes:
        if self._closed:
            raise NodeUnreachable(_CLOSED)
        if len(call.request) > self._limit:
            raise framing.too_large(len(call.request), self._limit, sent=True)
        if self._watched is not None and self._watched.current() is not self._credentials:
            self._credentials = self._watched.current()
            self._connect()
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
        cluster = None if call.background else self._cluster
        if cluster is not None:
            cluster.begin()
        try:
            response = await self._send(outgoing, request, timeout_s, cluster)
            return await self._read(outgoing, response, call)
        except TimeoutError:
            raise DeadlineExceeded(_EXPIRED) from None
        except asyncio.CancelledError:
            if outgoing.expired:
                raise DeadlineExceeded(_EXPIRED) from None
            if outgoing.closed:
                raise NodeUnreachable(_CLOSED) from None
            raise
        except (OSError, ReadError, WriteError, RemoteProtocolError) as error:
            if answering is not None and await answering.client_left():
                raise asyncio.CancelledError from error
            raise NodeUnreachable(f"the call to the node failed: {error or type(error).__name__}") from None
        finally:
            outgoing.over()
            self._calls.members.discard(outgoing)
            if cluster is not None:
                cluster.done()
            if answering is not None:
                answering.look_soon()

    async def _send(self, outgoing: Outgoing, request: _Request, timeout_s: float, cluster: _Cluster | None) -> Any:
        if cluster is not None:
            try:
                return await cluster.execute(outgoing, request, timeout_s)
            except _OutsideOfACall:
                pass
        if self._others is None:
            raise NodeUnreachable(_CLOSED)
        url = request.url
        if self._server_name is not None:  # whose address pyqwest was told
            url = f"https://{self._server_name}:{self._port}{url.removeprefix(self._base)}"
        asked = Request(request.method, url, Headers(request.headers.items()), request.content)
        return await outgoing.on(asyncio.ensure_future(self._others.execute(asked)))

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
            raise NodeFailed("the status is OK, but there is no message")
        if not headers.get("content-type", "").startswith("application/grpc"):
            raise NodeFailed("the answer is not application/grpc")
        try:
            return framing.message(frame, headers.get("grpc-encoding", "identity"), self._limit)
        except (BadRequest, Unimplemented) as error:
            raise NodeFailed(f"the answer is malformed: {error}") from None

    async def close(self) -> None:
        self._closed = True
        for outgoing in tuple(self._calls.members):
            outgoing.closed = True
            outgoing.cancel()
        if self._cluster is not None:
            self._cluster.retire(at_once=True)
        self._others = None  # which closes its connections


def _metadata(headers: Any) -> Iterator[tuple[str, str | bytes]]:
    """The node's own metadata among its headers or trailers."""
    for name, value in headers.items():
        if name not in _NOT_METADATA:
            try:
                yield from framing.decoded(name, value)
            except BadRequest as error:
                raise NodeFailed(f"the answer is malformed: {error}") from None
