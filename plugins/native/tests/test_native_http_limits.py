"""HTTP on the port of gRPC: clients that send what they should not, too much, too slowly or too late."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dl_inference_core.http_exchange import Refused
from dl_inference_core.testing.transport_http import Cancelled, HeldService, HttpClient, connected, echo

pytest.importorskip("dl_inference_native", exc_type=ImportError)

HIDDEN = b"POST /api/hidden HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
"""A request in the place of a body: what reads the length otherwise than its peer would take it for one."""


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3, 4\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 0x3\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"X: a\r\n folded: b\r\n",
        b"X\0: a\r\n",
        b"Host: other\r\n",
    ],
)
async def test_a_head_that_is_read_in_two_ways(serve_http: Any, head: bytes) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served, connected(served.port) as client:
        client.write(b"POST /api/ HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n" + HIDDEN)
        answer = await client.answer()
        assert answer.status == 400
        await served.has_refused(malformed_http=1)
        if head.startswith(b"Host"):
            return  # how long the body is was never in doubt
        assert await client.end() == b"", "the connection is not used any more"
    assert service.none_begun


@pytest.mark.parametrize("first", ["length", "encoding"])
async def test_a_length_beside_chunks_ends_the_connection(serve_http: Any, first: str) -> None:
    """RFC 9112, section 6.1: chunks count, and nothing that follows is taken for a request."""
    service = HeldService(echo)
    fields = {"length": b"Content-Length: 5\r\n", "encoding": b"Transfer-Encoding: chunked\r\n"}
    head = fields.pop(first) + b"".join(fields.values())
    async with serve_http(service) as served, connected(served.port) as client:
        client.write(b"POST /api/seen HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n0\r\n\r\n" + HIDDEN)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.end() == b""
    exchange = await service.begun()
    assert (exchange.path, exchange.body) == ("/api/seen", b"")
    assert service.none_begun


async def test_chunks_in_http_1_0_are_refused(serve_http: Any) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served, connected(served.port) as client:
        client.write(b"POST /api/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN)
        assert (await client.end()).startswith(b"HTTP/1.1 400")
    assert service.none_begun


@pytest.mark.parametrize(
    "chunk", [b"x\r\n", b"-1\r\n", b"1\r\nab\r\n", b"ffffffffffffffffff\r\n", b"1;" + b"x" * 20_000]
)
async def test_malformed_chunks(serve_http: Any, chunk: bytes) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served, connected(served.port) as client:
        client.write(b"POST /api/ HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + HIDDEN)
        assert (await client.answer()).status == 400
        assert await client.end() == b""
    assert service.none_begun


@pytest.mark.parametrize(
    "line",
    [
        b"\0\x01\x02\x03",
        b"GET",
        b"GET /\0 HTTP/1.1",
        b"GET / HTTP/9.9",
        b"G\xffT / HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"PRI *",
    ],
)
async def test_a_line_that_is_not_a_request(serve_http: Any, line: bytes) -> None:
    async with serve_http(HeldService(echo)) as served, connected(served.port) as client:
        client.write(line + b"\r\nHost: h\r\n\r\n")
        assert (await client.answer()).status == 400
        assert await client.end() == b""


async def test_the_host_is_required_by_http_1_1_alone(serve_http: Any) -> None:
    async with serve_http(HeldService(echo)) as served:
        async with connected(served.port) as client:
            client.write(b"GET /page HTTP/1.1\r\n\r\n")
            assert (await client.answer()).status == 400
        async with connected(served.port) as client:
            client.write(b"GET /page HTTP/1.0\r\n\r\n")
            assert (await client.answer()).body == b"/page"


async def test_a_target_for_a_proxy(serve_http: Any) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served, connected(served.port) as client:
        await client.ask("POST", "http://other:1/api/x?y", b"")
        exchange = await service.begun()
        assert (exchange.path, exchange.query, exchange.headers["host"]) == ("/api/x", "y", "other:1")
        assert (await client.ask("GET", "http://other:1")).body == b"/"
        assert (await client.ask("OPTIONS", "*")).body == b"*"


async def test_requests_that_do_not_wait_for_answers(serve_http: Any) -> None:
    service = HeldService(lambda exchange: echo(exchange) if exchange.path != "/api/first" else None)
    async with serve_http(service) as served, connected(served.port) as client:
        for name in ("first", "second", "third"):
            client.send("POST", f"/api/{name}", name.encode())
        client.send("GET", "/page")
        (await service.begun()).reply(200, {}, b"first")
        bodies = [(await client.answer()).body for _ in range(4)]
    assert bodies == [b"first", b"second", b"third", b"/page"]


async def test_an_upgrade_to_http_2_is_passed_over(serve_http: Any) -> None:
    async with serve_http(HeldService(echo)) as served, connected(served.port) as client:
        headers = {"upgrade": "h2c", "connection": "Upgrade, HTTP2-Settings", "http2_settings": "AAMAAABkAAQAAP__"}
        for _ in range(2):
            assert (await client.ask("POST", "/api/", b"x", **headers)).body == b"x"


@pytest.mark.parametrize("field", [b"x" * 20_000, b"\r\n".join(b"x-%d: y" % number for number in range(200))])
async def test_too_many_headers(serve_http: Any, field: bytes) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served, connected(served.port) as client:
        client.write(b"GET /api/ HTTP/1.1\r\nHost: h\r\nx: " + field + b"\r\n\r\n")
        assert (await client.answer()).status == 431
        await served.has_refused(header_bytes=1)
    assert service.none_begun


async def test_bodies_beyond_what_the_process_may_hold(serve_http: Any) -> None:
    class Large(HeldService):
        body_bytes = 12 << 20

    service = Large()
    async with (
        serve_http(service, buffer_mb=16) as served,
        connected(served.port) as first,
        connected(served.port) as second,
    ):
        first.send("POST", "/api/", bytes(10 << 20))
        exchange = await service.begun()
        second.send("POST", "/api/", bytes(10 << 20))
        assert (await second.answer()).body == b"Refused"
        (error,) = service.failures
        assert isinstance(error, Refused)
        assert error.status == 503
        await served.has_refused(buffer=1)
        exchange.reply(200, {}, b"")
        await first.answer()
        del exchange
        await served.has_freed_all()
        second.send("POST", "/api/", bytes(10 << 20))
        (await service.begun()).reply(200, {}, b"")
        assert (await second.answer()).status == 200


# Times


async def test_a_body_that_does_not_come(serve_http: Any) -> None:
    service = HeldService(echo)
    async with serve_http(service, body_timeout_s=1) as served:
        for path in ("/api/", "/page"):
            async with connected(served.port) as client:
                client.send("POST", path, b"half", content_length="8")
                assert (await client.answer()).status == 408
                assert await client.end() == b""
        await served.has_freed_all()
        await served.has_refused(body_time=2)
    assert service.none_begun
    assert not service.failures


@pytest.mark.parametrize(
    "begun",
    [b"Content-Length: 8\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n8\r\nhalf"],
    ids=["length", "chunks"],
)
async def test_a_client_that_leaves_within_a_body_counts_as_nothing(serve_http: Any, begun: bytes) -> None:
    service = HeldService(echo)
    async with serve_http(service) as served:
        async with connected(served.port) as client:
            client.write(b"POST /api/ HTTP/1.1\r\nHost: h\r\n" + begun)
            await asyncio.sleep(0.2)
        await served.has_freed_all()
        async with connected(served.port) as client:
            assert (await client.ask("POST", "/api/", b"x")).body == b"x"
        await served.has_refused()
    assert not service.failures


async def test_headers_that_do_not_come(serve_http: Any) -> None:
    async def begin(port: int, begun: bytes) -> None:
        async with connected(port) as client:
            client.write(begun)
            assert await client.end() == b""

    async def begin_second(port: int, begun: bytes) -> None:
        async with connected(port) as client:
            assert (await client.ask("POST", "/api/", b"x")).body == b"x"
            client.write(begun)
            assert await client.end() == b""

    async with serve_http(HeldService(echo), headers_timeout_s=3) as served:
        some = (b"G", b"GET /api/ HTTP/1.1\r\nHo")
        await asyncio.gather(
            *(begin(served.port, begun) for begun in (b"", *some)),
            *(begin_second(served.port, begun) for begun in some),
        )
        await served.has_refused(handshake_time=1, headers_time=4)


async def test_a_connection_without_requests_outlives_the_time_for_headers(serve_http: Any) -> None:
    async with (
        serve_http(HeldService(echo), headers_timeout_s=1, idle_timeout_s=7) as served,
        connected(served.port) as client,
    ):
        await client.ask("GET", "/api/")
        answered = time.monotonic()
        await asyncio.sleep(2.5)
        assert (await client.ask("GET", "/api/")).status == 200
        assert await client.end() == b""
        assert time.monotonic() - answered > 2.5 + 7


async def test_a_connection_that_is_old(serve_http: Any) -> None:
    service = HeldService()
    async with (
        serve_http(service, connection_age_s=4, headers_timeout_s=1) as served,
        connected(served.port) as busy,
        connected(served.port) as idle,
    ):
        assert (await idle.ask("GET", "/page")).status == 200
        busy.send("GET", "/api/")
        exchange = await service.begun()
        assert await idle.end() == b""
        await asyncio.sleep(3)  # a tenth more or less, and the second in which nobody looks
        exchange.reply(200, {}, b"answered")
        answer = await busy.answer()
        assert (answer.body, answer.headers["connection"]) == (b"answered", "close")


async def test_an_answer_that_nobody_reads(serve_http: Any) -> None:
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(30 << 20)))
    async with serve_http(service, body_timeout_s=3) as served, silent(served.port) as client:
        client.send("GET", "/api/")
        await service.begun()
        assert served.transport._threads.buffered_bytes() > 10 << 20
        await served.has_freed_all()
        await served.has_refused(slow_reader=1)


async def test_an_answer_that_is_read_a_few_bytes_at_a_time(serve_http: Any) -> None:
    """Or it would be held for as long as its client likes, and there is room for no other."""
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(30 << 20)))
    async with serve_http(service, body_timeout_s=3, buffer_mb=32) as served, silent(served.port) as client:
        client.send("GET", "/api/")
        await service.begun()
        began = time.monotonic()
        while served.transport._threads.buffered_bytes():
            assert time.monotonic() < began + 20
            await client.reader.read(4000)
            await asyncio.sleep(0.4)
        await served.has_refused(slow_reader=1)


async def test_the_next_request_does_not_end_an_answer_that_goes_out_slowly(serve_http: Any) -> None:
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(30 << 20)))
    async with serve_http(service, headers_timeout_s=1) as served, silent(served.port) as client:
        client.send("GET", "/api/")
        await service.begun()
        client.write(b"GET /api/ HTTP/1.1\r\n")
        await asyncio.sleep(4)  # the time for headers, and the second in which nobody looks, twice
        assert len((await client.answer()).body) == 30 << 20
        await served.has_refused()


@asynccontextmanager
async def silent(port: int) -> AsyncIterator[HttpClient]:
    """A client that reads 64 KiB at most."""
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.setblocking(False)
    await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=small, limit=16 << 10)
    try:
        yield HttpClient(reader, writer)
    finally:
        writer.transport.abort()


# The end


async def test_a_drain_waits_for_requests(serve_http: Any) -> None:
    service = HeldService()
    async with serve_http(service) as served, connected(served.port) as busy, connected(served.port) as idle:
        idle.send("GET", "/page")
        await idle.answer()
        busy.send("GET", "/api/")
        exchange = await service.begun()
        draining = asyncio.ensure_future(served.server.drain(20))
        assert await idle.end() == b""
        assert not draining.done()
        exchange.reply(200, {}, b"in time")
        answer = await busy.answer()
        assert (answer.body, answer.headers["connection"]) == (b"in time", "close")
        await draining


async def test_a_drain_waits_for_an_answer_that_is_read_slowly(serve_http: Any) -> None:
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(30 << 20)))
    async with serve_http(service) as served, silent(served.port) as client:
        client.send("GET", "/api/")
        await service.begun()
        draining = asyncio.ensure_future(served.server.drain(30))
        await asyncio.sleep(2.5)  # twice as long as a client may take that has its answer
        assert not draining.done()
        assert len((await client.answer()).body) == 30 << 20
        await draining


async def test_a_drain_that_ends_first_tells_the_client(serve_http: Any) -> None:
    service, cancelled = HeldService(), Cancelled()
    async with serve_http(service) as served, connected(served.port) as client:
        client.send("GET", "/api/")
        (await service.begun()).on_cancel(cancelled)
        await served.server.drain(0)
        assert (await client.answer()).status == 503
        await cancelled.was_called()
    assert not service.failures
