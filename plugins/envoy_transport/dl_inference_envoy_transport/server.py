"""Calls in: what pyvoy hands over as ASGI → a `Call`, and its answer → an HTTP/2 response with trailers."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

from dl_inference_core.certificates import Watched
from dl_inference_core.errors import (
    BadRequest,
    Code,
    DeadlineExceeded,
    InferenceError,
    MessageTooLarge,
    NodeFailed,
    NodeUnreachable,
    Unimplemented,
)
from dl_inference_core.transport import Call, HttpApp, Limits, Metadata, Methods, Server, UnaryHandler
from dl_inference_envoy_transport import framing
from dl_inference_envoy_transport.configuration import Address, Options, Secrets
from dl_inference_envoy_transport.host import Host
from dl_inference_envoy_transport.loop import Ticker

_log = logging.getLogger(__name__)

_LOOK_AFTER_S = 0.02
_LOOK_ONCE_AFTER_S = 0.25
# Messages of a stream that may wait for its handler; beyond them the client has to.
_AHEAD = 16
_LINGER_S = 0.1
_SHUT_DOWN = "the server is shutting down"
# Of the thousand headers and `header_kb` that Envoy takes: a gateway passes metadata on, beside headers of its own, to
# nodes that take no more. A node that resets the call for them would be blamed.
_MOST_METADATA = 900
_METADATA_SHARE = 7 / 8

# What HTTP, gRPC and Envoy put beside the caller's own metadata.
_NOT_METADATA = frozenset(
    {
        b"host",
        b"te",
        b"content-type",
        b"content-length",
        b"user-agent",
        b"grpc-timeout",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-envoy-internal",
        b"x-envoy-expected-rq-timeout-ms",
    }
)
_GRPC = (b"content-type", b"application/grpc")
_START = {"type": "http.response.start", "status": 200, "headers": [_GRPC], "trailers": True}
_UNDERSTOOD = (b"grpc-accept-encoding", b"identity,gzip,deflate")
_OK = (b"grpc-status", b"0")
_TRAILERS_OK = {"type": "http.response.trailers", "headers": [_OK]}


Messages: TypeAlias = "asyncio.Queue[bytes | InferenceError | None]"


class Ended(enum.Enum):
    """Why a handler was cancelled."""

    NO = enum.auto()
    CLIENT_LEFT = enum.auto()
    DEADLINE = enum.auto()
    DRAIN = enum.auto()


class Incoming:
    """A call that is being answered."""

    __slots__ = ("_again_s", "_looking", "_receive", "_task", "deadline", "ended", "look_at", "read")

    def __init__(self, task: asyncio.Task[Any], receive: Any) -> None:
        self._task = task
        self._receive = receive
        self._looking: asyncio.Future[None] | None = None
        self._again_s = math.inf
        self.deadline = math.inf
        self.look_at = math.inf
        """When to ask whether the client is still there."""
        self.read = False
        """Whether the request has been read to its end: nothing can be asked before, without taking some of it."""
        self.ended = Ended.NO

    def end(self, why: Ended) -> None:
        """Cancel the handler."""
        if self.ended is Ended.NO:
            self.ended = why
            self._task.cancel()

    def look_soon(self) -> None:
        """From now on nothing else would tell that the client has left."""
        if not self.read:
            return
        self._again_s = _LOOK_AFTER_S
        self.look_at = time.monotonic() + _LOOK_AFTER_S

    def look_once(self) -> None:
        """From now on a call out would tell, unless the client had left before Envoy began it."""
        if not self.read:
            return
        self._again_s = math.inf
        self.look_at = time.monotonic() + _LOOK_ONCE_AFTER_S

    def tick(self, now: float) -> None:
        if now >= self.deadline:
            self.end(Ended.DEADLINE)
        elif now >= self.look_at:
            self.look_at = now + self._again_s
            self._looking = asyncio.ensure_future(self._look())

    async def client_left(self) -> bool:
        """Ask Envoy, which answers at once, but does not tell by itself; False before the request has been read."""
        return self.read and bool((await self._receive())["type"] == "http.disconnect")

    async def _look(self) -> None:
        if await self.client_left():
            self.end(Ended.CLIENT_LEFT)


ANSWERING: ContextVar[Incoming | None] = ContextVar("ANSWERING", default=None)
"""The call that this context answers."""


class EnvoyServer(Server):
    """What answers one listener of Envoy's."""

    def __init__(self, host: Host, methods: Methods, limits: Limits, http: HttpApp | None) -> None:
        self._host = host
        self._name = host.new_name("server")
        self._secrets: Secrets | None = None
        self._rotating: asyncio.Future[None] | None = None
        self._unary = methods.unary
        self._streaming = methods.streaming
        self._limits = limits
        self._limit = limits.message_bytes
        self._http = http
        self._calls: Ticker[Incoming] = Ticker()
        self._sockets: list[Path] = []
        self._metadata_bytes = 0
        self._closed = False
        self._answered = 0
        self._idle = asyncio.Event()

    async def open(
        self,
        addresses: list[Address],
        options: Options,
        *,
        share_port: bool,
        watched: Watched | None,
    ) -> None:
        """Listen; with TLS and the newest of its credentials, if `watched`.

        Raises:
            ConfigError: as `Host.listen`.
        """
        self._metadata_bytes = int(options.header_kb * 1024 * _METADATA_SHARE)
        self._sockets = [address for address in addresses if isinstance(address, Path)]
        if watched is not None:
            self._secrets = Secrets(self._host.folder, self._name, watched.current())
        try:
            self.ports = await self._host.listen(
                self._name, self, addresses, options, self._limits, share_port=share_port, secrets=self._secrets
            )
        except BaseException:
            self._remove_sockets()
            if self._secrets is not None:
                self._secrets.remove()
            raise
        if watched is not None:
            self._rotating = asyncio.ensure_future(self._rotate(watched))

    async def _rotate(self, watched: Watched) -> None:
        assert self._secrets is not None
        async for credentials in watched.changes():
            self._secrets.write(credentials, self._host.new_version())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The listener's ASGI application."""
        handler = self._unary.get(scope["path"])
        if handler is None or _refusal(scope) is not None:
            await self._other(scope, receive, send)
            return
        incoming = self._begin(receive)
        call = Call(method=scope["path"], request=b"")
        try:
            response = await self._answer(handler, call, incoming, scope["headers"], receive)
            if response is None:
                return
            await send(_START)
            await send({"type": "http.response.body", "body": framing.framed(response)})
            await send(_trailers(call) if call.trailers else _TRAILERS_OK)
        except InferenceError as error:
            await _fail(send, error, call)
        finally:
            self._end(incoming)

    def _begin(self, receive: Any) -> Incoming:
        task = asyncio.current_task()
        assert task is not None
        incoming = Incoming(task, receive)
        ANSWERING.set(incoming)
        self._host.pace.in_flight += 1
        self._calls.add(incoming)
        return incoming

    def _end(self, incoming: Incoming) -> None:
        ANSWERING.set(None)  # else the task, its context and the call lead to one another until garbage is collected
        self._host.pace.in_flight -= 1
        self._calls.members.discard(incoming)
        self._answered += 1
        if not self._calls.members:
            self._idle.set()

    async def _answer(
        self, handler: UnaryHandler, call: Call, incoming: Incoming, headers: Any, receive: Any
    ) -> bytes | None:
        """The answer's message; None if the client has left.

        Raises:
            InferenceError: any failure.
        """
        if self._closed:
            raise NodeUnreachable(_SHUT_DOWN)
        timeout_s, encoding, call.metadata = _read(headers, self._metadata_bytes)
        if timeout_s is not None:
            call.deadline = incoming.deadline = time.monotonic() + timeout_s
        try:
            frame = await _body(receive, self._limit)
            if frame is None:
                return None
            incoming.read = True
            call.request = framing.message(frame, encoding, self._limit)
            incoming.look_soon()
            response = await handler(call)
        except asyncio.CancelledError:
            await _raise_why(incoming)
            return None
        except InferenceError:
            raise
        except Exception as error:
            raise _unforeseen(call, error) from error
        finally:
            incoming.look_at = math.inf
        if len(response) > self._limit:
            raise framing.too_large(len(response), self._limit, sent=True)
        return response

    async def _other(self, scope: Any, receive: Any, send: Any) -> None:
        path, refusal = scope["path"], _refusal(scope)
        if scope["method"] == "HEAD":
            send = _without_body(send)
        if refusal is not None:
            if path in self._unary or path in self._streaming:
                await _say(send, *refusal)
            elif self._http is not None:
                await self._http(scope, receive, send)
            else:
                await _say(send, 404, b"not found\n")
        elif path in self._streaming:
            incoming = self._begin(receive)
            try:
                await self._stream(incoming, scope, receive, send)
            finally:
                self._end(incoming)
        else:
            await _fail(send, Unimplemented(f"method {path[:200]} is not known"), Call(method=path, request=b""))

    async def _stream(self, incoming: Incoming, scope: Any, receive: Any, send: Any) -> None:
        call = Call(method=scope["path"], request=b"")
        started = False
        pumping = None
        try:
            if self._closed:
                raise NodeUnreachable(_SHUT_DOWN)
            timeout_s, encoding, call.metadata = _read(scope["headers"], self._metadata_bytes)
            if timeout_s is not None:
                call.deadline = incoming.deadline = time.monotonic() + timeout_s
            messages: Messages = asyncio.Queue(_AHEAD)
            pumping = asyncio.ensure_future(_pump(incoming, receive, encoding, self._limit, messages))
            async with aclosing(self._streaming[scope["path"]](call, _taken(messages))) as responses:  # type: ignore[type-var]
                async for response in responses:
                    if len(response) > self._limit:
                        raise framing.too_large(len(response), self._limit, sent=True)
                    if not started:
                        started = True
                        await send(_START)
                    await send({"type": "http.response.body", "body": framing.framed(response), "more_body": True})
        except asyncio.CancelledError:
            try:
                await _raise_why(incoming)
            except InferenceError as ended:
                await _fail(send, ended, call, started=started)
        except InferenceError as error:
            await _fail(send, error, call, started=started)
        except Exception as error:
            if type(error).__name__ == "ClientDisconnectedError":  # pyvoy's, from `send`
                return
            await _fail(send, _unforeseen(call, error), call, started=started)
        else:
            if not started:
                await send(_START)
            await send({"type": "http.response.body", "body": b""})
            await send(_trailers(call))
        finally:
            if pumping is not None:
                pumping.cancel()

    async def drain(self, grace_s: float) -> None:
        if self._secrets is not None and self._rotating is not None:
            self._rotating.cancel()
            self._secrets.remove()
        end = time.monotonic() + grace_s
        # From now on each answer tells its connection to go away (GOAWAY). One without calls Envoy does not tell; so
        # calls that cross with its closing are answered for a moment longer.
        with suppress(OSError):  # of the admin interface
            await self._host.close_listener(self._name)
            self._remove_sockets()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await self._until_quiet()
        self._closed = True
        for call in tuple(self._calls.members):
            call.end(Ended.DRAIN)
        await self._until_idle()

    def _remove_sockets(self) -> None:
        """Envoy leaves their files."""
        for path in self._sockets:
            path.unlink(missing_ok=True)

    async def _until_quiet(self) -> None:
        while True:
            await self._until_idle()
            answered = self._answered
            await asyncio.sleep(_LINGER_S)
            if answered == self._answered and not self._calls.members and not await self._host.open_calls(self._name):
                return

    async def _until_idle(self) -> None:
        while self._calls.members:
            self._idle.clear()
            await self._idle.wait()


def _refusal(scope: Any) -> tuple[int, bytes] | None:
    """Why a request is no call of gRPC's, as an HTTP status and what it says; None if it is one."""
    if scope["method"] != "POST":
        return 405, b"expected POST\n"
    for name, value in scope["headers"]:
        if name == b"content-type" and (
            value == _GRPC[1] or value.startswith((b"application/grpc+", b"application/grpc;"))
        ):
            # Envoy sends no trailers by HTTP/1, and so no status.
            return None if scope["http_version"] == "2" else (505, b"gRPC takes HTTP/2\n")
    return 415, b"expected the content type application/grpc\n"


def _read(headers: list[tuple[bytes, bytes]], limit: int) -> tuple[float | None, str, Metadata]:
    """The timeout in seconds, the messages' encoding, and the caller's own metadata.

    Raises:
        BadRequest: one of them is malformed.
        MessageTooLarge: the metadata have over `limit` bytes, or are too many.
    """
    timeout_s, encoding, trailers, size = None, "identity", False, 0
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name in _NOT_METADATA:
            if name == b"grpc-timeout":
                timeout_s = framing.timeout_s(value.decode("latin-1"))
            elif name == b"grpc-encoding":
                encoding = value.decode("latin-1")
            elif name == b"te":
                trailers = True
        elif not name.startswith(b"grpc-"):
            found = framing.decoded(name.decode("latin-1"), value.decode("latin-1"))
            size += len(name) * len(found) + len(value)
            metadata += found
    if size > limit or len(metadata) > _MOST_METADATA:
        given, most = (size, f"{limit} bytes") if size > limit else (len(metadata), f"{_MOST_METADATA} values")
        raise MessageTooLarge(f"received metadata size exceeds hard limit ({given} vs. {most})")  # gRPC's own words
    if not trailers:  # pyvoy sends none then, and so no status
        raise BadRequest("expected the header te: trailers")
    return timeout_s, encoding, tuple(metadata)


async def _body(receive: Any, limit: int) -> bytes | None:
    """The whole body; None if the client has left.

    Raises:
        MessageTooLarge: as soon as more than `limit` bytes are announced.
    """
    event = await receive()
    body: bytes = event.get("body", b"")
    if event.get("more_body"):
        size = framing.PREFIX + limit
        parts = [body]
        got = len(body)
        while event.get("more_body"):
            if got >= framing.PREFIX and size == framing.PREFIX + limit:
                size = framing.length(parts[0] if len(parts[0]) >= framing.PREFIX else b"".join(parts), limit)
            if got > size:
                break
            event = await receive()
            parts.append(event.get("body", b""))
            got += len(parts[-1])
        body = b"".join(parts)
    return None if event["type"] == "http.disconnect" else body


async def _pump(incoming: Incoming, receive: Any, encoding: str, limit: int, messages: Messages) -> None:
    """Put a stream's messages into `messages` as they come, then None, or what is wrong with them; see when the client
    leaves, whether or not the handler reads on."""
    buffer = bytearray()
    more = True
    try:
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                incoming.end(Ended.CLIENT_LEFT)
                return
            buffer += event.get("body", b"")
            more = event.get("more_body", False)
            at = 0
            while len(buffer) - at >= framing.PREFIX:
                size = framing.length(buffer[at : at + framing.PREFIX], limit)
                if len(buffer) - at < size:
                    break
                await messages.put(framing.message(bytes(buffer[at : at + size]), encoding, limit))
                at += size
            del buffer[:at]
        if buffer:
            raise BadRequest(f"the stream ends within a message, after {len(buffer)} bytes of it")
    except InferenceError as error:
        await messages.put(error)
        return
    incoming.read = True
    incoming.look_soon()
    await messages.put(None)


async def _taken(messages: Messages) -> AsyncIterator[bytes]:
    while (message := await messages.get()) is not None:
        if isinstance(message, InferenceError):
            raise message
        yield message


async def _raise_why(incoming: Incoming) -> None:
    """What a cancelled handler's client is told.

    Raises:
        InferenceError: that; nothing, if the client has left.
    """
    if incoming.ended is Ended.NO:  # a call of ours through Envoy's client ends with the client's own
        incoming.ended = Ended.CLIENT_LEFT  # as is to be seen; and nothing else is to cancel the question
        if not await incoming.client_left():
            raise NodeFailed("the handler was cancelled, and the client has not left")
        return
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    if incoming.ended is Ended.DEADLINE:
        raise DeadlineExceeded("the deadline passed")
    if incoming.ended is Ended.DRAIN:
        raise NodeUnreachable(_SHUT_DOWN)


def _unforeseen(call: Call, error: Exception) -> NodeFailed:
    _log.error("%s failed", call.method, exc_info=error)
    return NodeFailed(f"unexpected {type(error).__name__}", Code.UNKNOWN)


def _trailers(call: Call) -> dict[str, Any]:
    return {"type": "http.response.trailers", "headers": [_OK, *_raw(framing.encoded(call.trailers))]}


async def _fail(send: Any, error: InferenceError, call: Call, *, started: bool = False) -> None:
    headers = _raw([*framing.status_headers(error), *framing.encoded(call.trailers)])
    if started:
        await send({"type": "http.response.body", "body": b""})
        await send({"type": "http.response.trailers", "headers": headers})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [_GRPC, _UNDERSTOOD, *headers]})
        await send({"type": "http.response.body", "body": b""})


async def _say(send: Any, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain")]
    if status == 405:
        headers.append((b"allow", b"POST"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _without_body(send: Any) -> Any:
    """`send` for the answer to HEAD, which has the headers of the answer to GET and nothing else."""

    async def headers_alone(event: Any) -> None:
        await send(event if event["type"] == "http.response.start" else {**event, "body": b""})

    return headers_alone


def _raw(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers]
