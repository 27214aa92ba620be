"""Clients of HTTP/2 that send what no official client sends: floods, resets without end, streams that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from resource import getpagesize
from typing import Any

import pytest
from hpack import Encoder

from dl_inference_core.errors import Code
from dl_inference_core.testing.loopback import ECHO, DirectService, official
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Exchange, Limits

native = pytest.importorskip("dl_inference_native", exc_type=ImportError)

HELD, SHORT = b"\x0a\x04held", b"\x0a\x05short"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MIB = 1 << 20
COUNT = 20_000
"""Calls that are reset; 100,000 take 12 s on one of two busy cores."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def head(stream: int, *, end: bool = False) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": ECHO, ":authority": "x", "te": "trailers"}
    block = Encoder().encode([*fields.items(), ("content-type", "application/grpc")])
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)


def data(stream: int, message: bytes, *, end: bool = True) -> bytes:
    """A whole message, in frames of 16 KiB."""
    whole = b"\0" + len(message).to_bytes(4, "big") + message
    pieces = [whole[at : at + 16384] for at in range(0, len(whole), 16384)]
    flags = [0] * (len(pieces) - 1) + [END_STREAM if end else 0]
    return b"".join(frame(DATA, flag, stream, piece) for flag, piece in zip(flags, pieces, strict=True))


def update(stream: int, grows: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, grows.to_bytes(4, "big"))


def reset(stream: int) -> bytes:
    return frame(RESET, 0, stream, (8).to_bytes(4, "big"))


class Raw:
    """A connection that sends any bytes.

    Attributes:
        received: how many frames of each kind have come.
        resets: the streams that the server has reset, in order, with its reasons.
        window: what the server has said last of the windows of its streams.
        closed: once the server has closed the connection.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int, *, answers_pings: bool
    ) -> None:
        self.received = dict.fromkeys(range(10), 0)
        self.resets: list[tuple[int, int]] = []
        self._answers_pings = answers_pings
        self.window = 0
        self.closed = asyncio.Event()
        self._reader, self._writer = reader, writer
        self._pong = asyncio.Event()
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HL", INITIAL_WINDOW_SIZE, window)))
        self.reading = asyncio.create_task(self._read())

    def send(self, frames: bytes) -> None:
        self._writer.write(frames)

    async def settled(self) -> None:
        """Wait until the server has looked at all that was sent, or has closed the connection."""
        self._pong.clear()
        self.send(frame(PING, 0, 0, b"settled?"))
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
        await self._pong.wait()

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                size, kind, flags, stream = struct.unpack(">3sBBL", await self._reader.readexactly(9))
                payload = await self._reader.readexactly(int.from_bytes(size, "big"))
                self.received[kind] += 1
                if kind == PING and flags == ACK:
                    self._pong.set()
                elif kind == PING and self._answers_pings:
                    self.send(frame(PING, ACK, 0, payload))
                elif kind == RESET:
                    self.resets.append((stream, int.from_bytes(payload, "big")))
                elif kind == SETTINGS and not flags:
                    said = dict(struct.iter_unpack(">HL", payload))
                    self.window = said.get(INITIAL_WINDOW_SIZE, self.window)
                    self.send(frame(SETTINGS, ACK, 0))
        self.closed.set()
        self._pong.set()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        await self.reading


@asynccontextmanager
async def raw(address: str, *, window: int = 1000, answers_pings: bool = True) -> AsyncIterator[Raw]:
    host, _, port = address.rpartition(":")
    client = Raw(*await asyncio.open_connection(host, int(port)), window, answers_pings=answers_pings)
    try:
        yield client
    finally:
        await client.close()


class Echoes(DirectService):
    """Answers at once: HELD never, SHORT by itself, all else by 2,000 bytes."""

    def __init__(self) -> None:
        self.begun = 0
        super().__init__(self._answer)

    def _answer(self, exchange: Exchange) -> None:
        self.begun += 1
        if exchange.message != HELD:
            exchange.reply(SHORT if exchange.message == SHORT else bytes(2000))


@asynccontextmanager
async def serving(service: Any, **options: Any) -> AsyncIterator[tuple[str, Any]]:
    """An address, and the I/O threads that answer there."""
    transport = native.NativeTransport(native.NativeTransport.Options(**options))
    server = await transport.serve(service, ("127.0.0.1:0",), Limits())
    try:
        yield f"127.0.0.1:{server.ports[0]}", transport._threads
    finally:
        await server.drain(0)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not reached():  # noqa: ASYNC110 - an I/O thread sets no event
            await asyncio.sleep(0.02)


def refused(threads: Any) -> dict[str, int]:
    """How many the I/O threads have refused, by reason."""
    return {reason: count for reason, count in threads.refusals().items() if count}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


# Resets


def overflow(stream: int) -> bytes:
    return head(stream) + update(stream, 2**31 - 1)


def overflow_of_one_begun(stream: int) -> bytes:
    # The call before has begun by now, and its client waits for the answer.
    before = update(stream - 2, 2**31 - 1) if stream > 1 else b""
    return head(stream) + data(stream, HELD) + before


BY_THE_SERVER = {
    "a window that grows by nothing": (lambda stream: head(stream) + update(stream, 0), "http2"),
    "a window that grows too large": (overflow, "flood"),
    "the same of a call that has begun": (overflow_of_one_begun, "flood"),
    "data after the end": (lambda stream: head(stream, end=True) + data(stream, SHORT), "http2"),
    "headers after the end": (lambda stream: head(stream, end=True) + head(stream), "flood"),
    "a priority of a wrong length": (lambda stream: head(stream) + frame(PRIORITY, 0, stream, bytes(4)), "http2"),
    "more than the window": (lambda stream: head(stream) + data(stream, bytes(70_000), end=False), "flood"),
}


@pytest.mark.parametrize(("wrong", "reason"), BY_THE_SERVER.values(), ids=BY_THE_SERVER)
async def test_a_client_that_makes_the_server_reset_loses_its_connection(
    wrong: Callable[[int], bytes], reason: str
) -> None:
    """MadeYouReset, CVE-2025-8671: such resets have to count as the client's own do."""
    service = Echoes()
    opened = 0
    async with serving(service) as (address, threads), official(address) as channel, raw(address) as client:
        while not client.closed.is_set():
            assert opened < 11_000, "the connection takes any number of them"
            client.send(b"".join(wrong(2 * number + 1) for number in range(opened, opened + 50)))
            opened += 50
            await client.settled()
            if opened % 1000 == 0:
                assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        await service.has_ended(service.begun)
        await until(lambda: threads.buffered_bytes() == 0)
        await until(lambda: refused(threads) == {reason: 1})


@pytest.mark.parametrize("answers_pings", [True, False])
async def test_nor_does_it_get_more_after_a_goaway(answers_pings: bool) -> None:
    """Without an answer to the PING that goes with it, a GOAWAY leaves new calls to be taken, and they count."""
    service = Echoes()
    async with (
        serving(service, connection_age_s=1) as (address, threads),
        raw(address, answers_pings=answers_pings) as client,
    ):
        client.send(head(1) + data(1, HELD))
        await until(lambda: client.received[GOAWAY] == (2 if answers_pings else 1))
        for first in range(1, 11_000, 50):
            client.send(b"".join(overflow_of_one_begun(2 * number + 1) for number in range(first + 1, first + 51)))
            await client.settled()
            if client.closed.is_set():
                break
        assert service.begun == 1 if answers_pings else client.closed.is_set()
        await client.close()
        await service.has_ended(service.begun)
        await until(lambda: threads.buffered_bytes() == 0)


async def test_a_client_that_has_not_ended_its_call_is_told_so_after_the_answer() -> None:
    service = DirectService(lambda exchange: exchange.reply(SHORT), streaming=True)
    async with serving(service) as (address, _), raw(address) as client:
        client.send(head(1))
        await until(lambda: bool(client.resets))
        assert client.received[HEADERS] == 2, "the head and the trailers of the answer"
        assert client.received[DATA] == 1
        assert client.resets == [(1, 0)], "without an error, by which some clients would discard the answer"


def cancelled(number: int) -> tuple[bytes, bytes]:
    """A call, and its reset, at each stage: before its message, within it, before the answer, within the answer."""
    stream = 2 * number + 1
    sent = (b"", data(stream, HELD, end=False)[:-1], data(stream, HELD), data(stream, b"\x0a\x04long"))[number % 4]
    if number % 4 == 1:
        sent = frame(DATA, 0, stream, sent[9:])
    return head(stream) + sent, reset(stream)


async def test_any_number_of_calls_may_be_cancelled() -> None:
    """Rapid reset, CVE-2023-44487: nothing may be left of them, and others are answered meanwhile."""
    service = Echoes()
    early = 0
    async with serving(service) as (address, threads), official(address) as channel, raw(address) as client:
        for first in range(0, COUNT, 100):
            calls = [cancelled(number) for number in range(first, first + 100)]
            client.send(b"".join(call for call, _ in calls[:50]))
            if first % 200:
                await client.settled()
            # Half of the calls are reset in the moment in which they come.
            client.send(b"".join(reset for _, reset in calls[:50]))
            client.send(b"".join(call + reset for call, reset in calls[50:]))
            await client.settled()
            assert not client.closed.is_set()
            if first % 1000 == 0:
                assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
            if first == COUNT // 4:
                early = resident()
        await service.has_ended(service.begun)
        await until(lambda: threads.buffered_bytes() == 0)
        assert service.begun > COUNT // 8, "some have come as far as the service"
        assert {code for _, code in service.endings} <= {Code.OK, Code.CANCELLED}
        assert resident() - early < 32 * MIB


# Floods


async def flood(address: str, first: bytes, piece: bytes, most: int, patience_s: float = 1) -> tuple[int, bool]:
    """Send `piece` over and over and read nothing, until the server takes no more for `patience_s` or closes the
    connection. How many bytes it took, and whether it closed."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    taken = 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        try:
            await loop.sock_sendall(client, PREFACE + frame(SETTINGS, 0, 0) + first)
            while taken < most:
                async with asyncio.timeout(patience_s):
                    await loop.sock_sendall(client, piece)
                taken += len(piece)
        except TimeoutError:
            return taken, False
        except ConnectionError:
            return taken, True
    return taken, False


@pytest.mark.parametrize("piece", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, 0, 0)], ids=["pings", "settings"])
async def test_answers_that_nobody_reads_stop_the_flood(piece: bytes) -> None:
    """Each is to be answered. Where the client does not read, the kernel's buffers fill, and then nothing is taken."""
    async with serving(Echoes()) as (address, _), official(address) as channel:
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        before = resident()
        taken, _ = await flood(address, b"", piece * (65536 // len(piece)), 128 * MIB)
        assert taken < 64 * MIB
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        assert resident() - before < 32 * MIB


@pytest.mark.parametrize(("size", "reason"), [(0, "flood"), (1, "http2"), (16384, "http2")])
async def test_headers_without_an_end_end_the_connection(size: int, reason: str) -> None:
    """CVE-2024-27316 and others: frames of CONTINUATION that are kept, or decoded, without end."""
    async with serving(Echoes()) as (address, threads), official(address) as channel:
        block = head(1)[9:]
        first = frame(HEADERS, 0, 1, block)
        # A field that is not put into the table: ":authority" without a value takes two bytes.
        piece = frame(CONTINUATION, 0, 1, (b"\x01\x00" * size)[:size])
        taken, closed = await flood(address, first, piece * max(1, 8192 // len(piece)), 16 * MIB, 20)
        assert closed
        assert taken < 8 * MIB
        await until(lambda: refused(threads) == {reason: 1})
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT


IDLE = {
    "empty data": (head(1), frame(DATA, 0, 1)),
    "padding": (head(1), frame(DATA, 8, 1, b"\xff" + bytes(255))),
    "windows": (b"", update(0, 1)),
    "priorities": (b"", frame(PRIORITY, 0, 1, bytes(5))),
    "answers to no ping": (b"", frame(PING, ACK, 0, bytes(8))),
    "frames of no known kind": (b"", frame(0xBE, 0, 0, bytes(100))),
}
"""What is sent first, and then over and over: CVE-2019-9518 and its kin."""


@pytest.mark.parametrize(("first", "piece"), IDLE.values(), ids=IDLE)
async def test_frames_that_say_nothing_hold_up_nobody_and_fill_no_memory(first: bytes, piece: bytes) -> None:
    async with serving(Echoes()) as (address, threads), official(address) as channel:
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        before = resident()
        flooding = asyncio.ensure_future(flood(address, first, piece * (65536 // len(piece)), 16 * MIB, 20))
        answered = 0
        while not flooding.done():
            assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
            answered += 1
        taken, closed = await flooding
        assert closed or taken >= 16 * MIB
        assert answered > 0
        assert resident() - before < 32 * MIB
        await until(lambda: threads.buffered_bytes() == 0)


async def test_headers_that_unpack_to_much_more_are_refused() -> None:
    """A field of 4,000 bytes goes into HPACK's table and is named 15,000 times by a byte each: 60 MB."""
    async with serving(Echoes()) as (address, threads), official(address) as channel, raw(address) as client:
        before = resident()
        field = b"\x40\x01x" + b"\x7f\xa1\x1e" + b"v" * 4000
        client.send(frame(HEADERS, END_HEADERS, 1, head(1)[9:] + field + b"\xbe" * 15_000))
        await client.settled()
        assert resident() - before < 32 * MIB
        assert client.received[HEADERS] == 1 or client.closed.is_set(), "refused alone, or with its connection"
        assert client.received[DATA] == 0
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT
        await until(lambda: threads.buffered_bytes() == 0)


def noted(stream: int, value: bytes) -> bytes:
    block = head(stream)[9:] + b"\x00\x06x-note" + bytes([len(value)]) + value
    return frame(HEADERS, END_HEADERS, stream, block) + data(stream, SHORT)


async def test_metadata_may_hold_any_bytes_of_text() -> None:
    async with serving(Echoes()) as (address, _), raw(address) as client:
        for stream, value in ((1, b"\xff\xfe"), (3, "ä".encode()), (5, b"a\tb")):
            client.send(noted(stream, value))
        await until(lambda: client.received[DATA] == 3)


@pytest.mark.parametrize("value", [b"a\x7fb", b"a\x01b", b"a\0b", b"a\r\nb"])
async def test_metadata_with_control_characters_end_their_connection(value: bytes) -> None:
    """HTTP/2 asks for the end of the stream alone, which h2 does not offer."""
    service = Echoes()
    async with serving(service) as (address, threads), official(address) as channel, raw(address) as client:
        client.send(noted(1, value))
        await client.closed.wait()
        assert service.begun == 0
        await until(lambda: refused(threads) == {"http2": 1})
        assert await channel.unary_unary(ECHO)(SHORT, timeout=30) == SHORT


# Windows, and what waits in them


async def next_of(exchange: Exchange) -> bytes:
    loop = asyncio.get_running_loop()
    told: asyncio.Future[bytes] = loop.create_future()
    exchange.on_message(lambda message: loop.call_soon_threadsafe(told.set_result, bytes(message or b"")))
    return await told


async def test_what_streams_that_nobody_reads_hold_is_in_the_budget() -> None:
    exchanges: list[Exchange] = []
    service = DirectService(exchanges.append, streaming=True)
    message = bytes(60_000)
    async with serving(service, buffer_mb=16) as (address, threads), raw(address) as client:
        for number in range(400):  # 24 MB
            client.send(head(2 * number + 1) + data(2 * number + 1, message, end=False))
            await client.settled()
        await until(lambda: threads.buffered_bytes() > 15 * MIB and len(service.endings) > 100)
        assert threads.buffered_bytes() <= 16 * MIB
        assert {code for _, code in service.endings} == {Code.RESOURCE_EXHAUSTED}
        assert await next_of(exchanges[0]) == message, "what waits is not lost"
        await client.close()
        await until(lambda: len(service.endings) == 400)
        exchanges.clear()
        await until(lambda: threads.buffered_bytes() == 0)


async def test_an_answer_that_nobody_reads_is_given_up() -> None:
    service = DirectService(lambda exchange: exchange.reply(bytes(1 << 20)))
    async with serving(service, body_timeout_s=2) as (address, threads), raw(address) as client:
        client.send(head(1) + data(1, SHORT))
        await until(lambda: threads.buffered_bytes() > 1 << 19)
        await until(lambda: threads.buffered_bytes() == 0)
        await until(lambda: client.resets == [(1, 8)])
        assert [code for _, code in service.endings] == [Code.OK]
        await until(lambda: refused(threads) == {"slow_reader": 1})


async def test_answers_that_are_read_a_few_bytes_at_a_time_are_given_up_where_others_need_the_room() -> None:
    """Or they would be held for as long as their client likes."""
    service = DirectService(lambda exchange: exchange.reply(bytes(MIB)))
    streams = [2 * number + 1 for number in range(12)]
    async with serving(service, buffer_mb=16, body_timeout_s=1) as (address, threads), raw(address) as client:
        client.send(b"".join(head(stream) + data(stream, SHORT) for stream in streams[:4]))
        await until(lambda: threads.buffered_bytes() > 3 * MIB)
        for _ in range(25):
            client.send(b"".join(update(stream, 10) for stream in streams[:4]))
            await asyncio.sleep(0.1)
        assert refused(threads) == {}, "there is room"
        client.send(b"".join(head(stream) + data(stream, SHORT) for stream in streams[4:]))
        await until(lambda: threads.buffered_bytes() > 11 * MIB)
        async with asyncio.timeout(30):
            while threads.buffered_bytes() >= 8 * MIB:
                client.send(b"".join(update(stream, 10) for stream in streams))
                await asyncio.sleep(0.1)
        await until(lambda: refused(threads) == {"slow_reader": len(client.resets)})
        assert len(client.resets) >= 4


async def test_answers_in_a_full_socket_are_given_up_although_the_client_speaks() -> None:
    """The windows have room for them, and the client sends PINGs: it reads nothing."""
    service = DirectService(lambda exchange: exchange.reply(bytes(300_000)))
    async with serving(service, body_timeout_s=2, keepalive_s=1, buffer_mb=16) as (address, threads):
        host, _, port = address.rpartition(":")
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with small:
            await asyncio.to_thread(small.connect, (host, int(port)))
            calls = b"".join(head(2 * number + 1) + data(2 * number + 1, SHORT) for number in range(30))
            windows = struct.pack(">HL", INITIAL_WINDOW_SIZE, 2**31 - 1)
            small.sendall(PREFACE + frame(SETTINGS, 0, 0, windows) + update(0, 2**31 - 1 - 65_535) + calls)
            await until(lambda: threads.buffered_bytes() > 4 * MIB)
            async with asyncio.timeout(20):
                while threads.buffered_bytes():
                    with contextlib.suppress(ConnectionError):
                        small.sendall(frame(PING, 0, 0, bytes(8)))
                    await asyncio.sleep(0.2)
        await until(lambda: refused(threads) == {"slow_reader": 1})


async def test_streams_that_rest_are_given_up_where_others_need_the_room() -> None:
    """A client may leave a stream unread for as long as it likes, until half of the budget is used."""
    exchanges: list[Exchange] = []
    service = DirectService(exchanges.append, streaming=True)
    async with serving(service, buffer_mb=16, body_timeout_s=1) as (address, threads), raw(address) as client:
        client.send(head(1))
        await until(lambda: len(exchanges) == 1)
        exchanges[0].send(bytes(MIB))
        await asyncio.sleep(2.5)
        assert client.resets == []
        client.send(b"".join(head(2 * number + 1) for number in range(1, 9)))
        await until(lambda: len(exchanges) == 9)
        for exchange in exchanges[1:]:
            exchange.send(bytes(MIB))
        await until(lambda: len(service.endings) > 0)
        assert {code for _, code in service.endings} == {Code.CANCELLED}
        await until(lambda: threads.buffered_bytes() < 8 * MIB)
        await asyncio.sleep(1.5)
        assert refused(threads) == {"slow_reader": len(service.endings)}
        assert len(service.endings) < 9, "those stay for which there is room"


async def test_a_stream_whose_client_takes_one_message_at_a_time_is_given_up_where_others_need_the_room() -> None:
    exchanges: list[Exchange] = []
    service = DirectService(exchanges.append, streaming=True)
    async with (
        serving(service, buffer_mb=16, body_timeout_s=2) as (address, threads),
        raw(address) as client,
        raw(address) as other,
    ):
        client.send(head(1))
        other.send(head(1))
        await until(lambda: len(exchanges) == 2)
        for exchange in exchanges:
            for _ in range(9000):  # 9 MB of each
                exchange.send(bytes(995))
        async with asyncio.timeout(30):
            while not service.endings:
                client.send(update(1, 1000))
                other.send(update(1, 1000))
                await asyncio.sleep(0.2)
        await until(lambda: set(refused(threads)) == {"slow_reader"})


async def test_an_answer_that_is_read_slowly_comes_whole_although_the_server_drains() -> None:
    service = DirectService(lambda exchange: exchange.reply(bytes(200_000)))
    transport = native.NativeTransport(native.NativeTransport.Options())
    server = await transport.serve(service, ("127.0.0.1:0",), Limits())
    async with raw(f"127.0.0.1:{server.ports[0]}") as client:
        client.send(update(0, 300_000) + head(1) + data(1, SHORT))
        await until(lambda: len(service.endings) == 1)
        draining = asyncio.ensure_future(server.drain(30))
        for _ in range(25):
            await asyncio.sleep(0.1)  # in all twice as long as a client may take that has its answer
            client.send(update(1, 4000))
        assert not draining.done()
        client.send(update(1, 200_000))
        await until(lambda: client.received[HEADERS] == 2)
        await draining
        await client.closed.wait()
        assert client.resets == []


async def test_a_request_that_never_comes_whole_holds_up_no_drain() -> None:
    transport = native.NativeTransport(native.NativeTransport.Options())
    server = await transport.serve(Echoes(), ("127.0.0.1:0",), Limits())
    async with raw(f"127.0.0.1:{server.ports[0]}") as client:
        client.send(head(1))
        await client.settled()
        async with asyncio.timeout(15):
            await server.drain(30)


@pytest.mark.parametrize("secure", [False, True], ids=["clear text", "TLS"])
async def test_answers_in_a_full_socket_go_out_although_the_server_drains(tmp_path: Path, secure: bool) -> None:
    """The windows have room for them: the kernel has not."""
    service = DirectService(lambda exchange: exchange.reply(bytes(300_000)))
    transport = native.NativeTransport(native.NativeTransport.Options())
    authority = Authority(tmp_path / "ca")
    server = await transport.serve(
        service, ("127.0.0.1:0",), Limits(), tls=authority.issue().server() if secure else None
    )
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(small)
        await asyncio.to_thread(small.connect, ("127.0.0.1", server.ports[0]))
        if secure:
            context = ssl.create_default_context(cafile=authority.file)
            context.set_alpn_protocols(["h2"])
            wrapped = await asyncio.to_thread(context.wrap_socket, small, server_hostname="127.0.0.1")
            connection = stack.enter_context(wrapped)
        count = 30  # 9 MB: more than the kernel holds
        calls = b"".join(head(2 * number + 1) + data(2 * number + 1, SHORT) for number in range(count))
        windows = struct.pack(">HL", INITIAL_WINDOW_SIZE, 2**31 - 1)
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0, windows) + update(0, 2**31 - 1 - 65_535) + calls)
        await until(lambda: len(service.endings) == count)
        draining = asyncio.ensure_future(server.drain(30))
        await asyncio.sleep(2.5)  # twice as long as a client may take that has its answer
        assert not draining.done()
        received = await asyncio.to_thread(read_all, connection)
        await draining
    assert ends_in(received) == count


def ends_in(received: bytes) -> int:
    """How many streams end in these frames."""
    position = count = 0
    while position < len(received):
        size, kind, flags, _ = struct.unpack_from(">3sBBL", received, position)
        count += kind == HEADERS and bool(flags & END_STREAM)
        position += 9 + int.from_bytes(size, "big")
    return count


def read_all(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


async def test_a_stream_that_is_read_slowly_takes_in_no_more_than_its_window() -> None:
    exchanges: list[Exchange] = []
    service = DirectService(exchanges.append, streaming=True)
    messages = [bytes([number]) * 10_000 for number in range(100)]
    async with serving(service) as (address, threads), raw(address) as client:
        client.send(head(1) + b"".join(data(1, each, end=False) for each in messages[:6]))
        await until(lambda: threads.buffered_bytes() > 60_000)
        for number, message in enumerate(messages):
            assert await next_of(exchanges[0]) == message
            assert threads.buffered_bytes() < 70_000
            if number + 6 < len(messages):
                client.send(data(1, messages[number + 6], end=False))
        assert not client.closed.is_set(), "the window had room for each"
        assert client.received[WINDOW_UPDATE] > 5


async def test_windows_grow_for_large_messages() -> None:
    service = Echoes()
    async with serving(service) as (address, _), raw(address) as client:
        await client.settled()
        assert client.window == 65_535
        client.send(head(1) + head(3) + data(3, bytes(50_000)))
        await until(lambda: client.window == MIB)
        client.send(data(1, bytes(600_000)))  # by the large window, on a stream that began with the small one
        await until(lambda: service.begun == 2)
