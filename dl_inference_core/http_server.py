"""HTTP on a port of its own: uvicorn, on the event loop of the rest, with limits on connections and their times."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dl_inference_core.transport import HttpApp

_FINISH_S = 1
_LOOK_S = 1.0
# asyncio accepts as many at once before it asks whether there is room for the first; they come out of the reserve.
_BACKLOG = 64
_REASONS = ("connections", "headers_time", "body_time", "slow_reader")
_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Attributes:
    connections: at one time. One more takes the place of the connection that has been without a request for longest;
        it is closed itself if each of the others is in the middle of one.
    headers_s: seconds from the first byte of a request to the end of its headers; and from a connection to that byte.
    body_s: seconds from the end of the headers to that of the body; and seconds in which a client takes nothing of an
        answer.
    idle_s: seconds from an answer to the first byte of the next request.
    """

    connections: int = 1000
    headers_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 620.0


class HttpServer:
    """A listening server of plaintext HTTP/1.1. Event loop only."""

    def __init__(self, app: HttpApp, listening: socket.socket, limits: HttpLimits) -> None:
        """Args:
        listening: a socket that listens; closed with the server.
        """
        self.port: int = listening.getsockname()[1]
        self._connections = _Connections(limits)
        self.refusals = self._connections.refusals
        """How many connections a limit has closed, by reason. Changes on the event loop."""
        protocol: Any = partial(_Connection, self._connections)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type] # it may have fractions
            timeout_graceful_shutdown=_FINISH_S,
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([listening]))
        self._looking = asyncio.create_task(self._connections.keep_looking(), name="close slow connections")

    @classmethod
    async def start(cls, app: HttpApp, host: str, port: int, limits: HttpLimits | None = None) -> HttpServer:
        """Answer HTTP requests by `app`.

        Args:
            host: a name or an address; IPv6 in brackets or without.
            port: 0 is any free one.

        Raises:
            OSError: the address cannot be listened on.
        """
        if port > 65535:  # getaddrinfo would take the rest of it modulo 65536
            raise OSError("the port is over 65535")
        loop = asyncio.get_running_loop()
        (family, *_, address), *_ = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        # "::" is every interface to gRPC, IPv4 as well.
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listening = socket.create_server(address, family=family, dualstack_ipv6=dual)
        # Connections inherit it. Without it, which asyncio's own loop forgets, each answer but the first took 45 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(app, listening, limits or HttpLimits())

    async def close(self) -> None:
        """Stop listening, give the answers under way a second, cancel the rest."""
        self._uvicorn.should_exit = True
        await self._serving
        self._looking.cancel()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's own."""
        yield


class _Connections:
    """All connections of a server, and which of them have no request."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.refusals = dict.fromkeys(_REASONS, 0)
        self._open: set[_Connection] = set()
        self._idle: dict[_Connection, None] = {}
        """The one that has been idle for longest comes first."""

    def add(self, connection: _Connection) -> None:
        """Count a new one, which is idle; close one if these are too many now."""
        self._open.add(connection)
        self._idle[connection] = None
        if len(self._open) > self.limits.connections:
            idlest = next(iter(self._idle))
            self.remove(idlest)
            self.refusals["connections"] += 1
            idlest.transport.close()

    def remove(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def set_idle(self, connection: _Connection) -> None:
        if connection in self._open:
            self._idle[connection] = None

    def set_busy(self, connection: _Connection) -> None:
        self._idle.pop(connection, None)

    async def keep_looking(self) -> None:
        """Close the connections that have passed a limit, for ever."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            if now - began > 2 * _LOOK_S:
                continue  # the event loop stood still: what clients have sent meanwhile is not read yet
            for connection in tuple(self._open):
                connection.check(now)


class _Stage(enum.Enum):
    """What a connection is in the middle of."""

    NEW = enum.auto()
    """nothing: no byte has come"""
    HEADERS = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    """an answer is made or sent"""
    IDLE = enum.auto()
    """nothing: the answer has been sent"""


class _Connection(H11Protocol):
    """One connection of a client."""

    def __init__(self, connections: _Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._all = connections
        self._stage = _Stage.NEW
        self._since = time.monotonic()
        self._unsent = 0
        self._unsent_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._all.set_busy(self)
        super().data_received(data)
        self._enter(self._reached())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._enter(self._reached())

    def check(self, now: float) -> None:
        """Close the connection if it has passed a limit."""
        limits, unsent = self._all.limits, self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif unsent and now - self._unsent_since > limits.body_s:
            self._all.refusals["slow_reader"] += 1
            self.transport.abort()
        if self.transport.is_closing():
            return
        lasted_s = now - self._since
        if self._stage is _Stage.ANSWER:
            self._enter(self._reached())
        elif self._stage is _Stage.NEW and lasted_s > limits.headers_s:
            self._all.refusals["headers_time"] += 1
            self.transport.close()
        elif (self._stage is _Stage.HEADERS and lasted_s > limits.headers_s) or (
            self._stage is _Stage.BODY and lasted_s > limits.body_s
        ):
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(_TIMED_OUT)
            self._all.refusals["headers_time" if self._stage is _Stage.HEADERS else "body_time"] += 1
            self.transport.close()

    def _reached(self) -> _Stage:
        """The stage of now."""
        if self.conn.their_state is h11.SEND_BODY:
            return _Stage.BODY
        if self.conn.their_state is not h11.IDLE or self.transport.get_write_buffer_size():
            return _Stage.ANSWER
        return _Stage.HEADERS if self.conn.trailing_data[0] else _Stage.IDLE

    def _enter(self, stage: _Stage) -> None:
        if stage is not self._stage:
            self._stage, self._since = stage, time.monotonic()
            if stage is _Stage.IDLE:
                self._all.set_idle(self)
