"""The suite for what answers HTTP by exchanges: a transport, on the port of gRPC; or another server beside it."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from dl_inference_core.coroutines import call_soon
from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, MessageTooLarge
from dl_inference_core.http_exchange import HttpExchange, Refused
from dl_inference_core.testing.loopback import LOOPBACK, CoroutineService, LoopbackConformance, asynchronous
from dl_inference_core.transport import Http, HttpApp, Limits

LIMIT = 100_000
"""Bytes of the largest body."""


def echo(exchange: HttpExchange) -> None:
    """Answers with the body."""
    exchange.reply(200, {"content-type": "text/plain", "x-echo": "yes"}, exchange.body)


class HeldService:
    """An `HttpService` that hands its exchanges to the test.

    Attributes:
        failures: what `fail_http` was told of.
    """

    paths = ("/api/", "/exact")
    body_bytes = LIMIT

    def __init__(self, begin: Callable[[HttpExchange], object] | None = None, timeout_s: float | None = None) -> None:
        """Args:
        begin: is called with each exchange first, on the server's thread.
        """
        self.timeout_s = timeout_s
        self.failures: list[InferenceError] = []
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Queue[HttpExchange] = asyncio.Queue()

    def begin_http(self, exchange: HttpExchange) -> None:
        if self._begin is not None:
            self._begin(exchange)
        call_soon(self._loop, lambda: self._begun.put_nowait(exchange))

    def fail_http(self, exchange: HttpExchange, error: InferenceError) -> None:
        self.failures.append(error)
        exchange.reply(418, {"content-type": "text/plain"}, type(error).__name__.encode())

    async def begun(self) -> HttpExchange:
        """The next one."""
        async with asyncio.timeout(10):
            return await self._begun.get()

    @property
    def none_begun(self) -> bool:
        """Whether `begun` has given all that there were."""
        return self._begun.empty()


async def pages(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the path."""
    body = scope["path"].encode()
    headers = [(b"x-page", b"yes"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    def send(self, verb: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Send a request of HTTP/1.1; a length among the headers is sent instead of the right one."""
        fields = {"host": "h", "content-length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = (f"{name}: {value}\r\n" for name, value in fields.items())
        self.write(f"{verb} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self, *, has_body: bool = True) -> HttpAnswer:
        """The next one.

        Args:
            has_body: whether it has one, if it says so; one to HEAD has none.
        """
        async with asyncio.timeout(20):
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length", "0")) if has_body else 0
            return HttpAnswer(
                status=int(status.split()[1]), headers=headers, body=await self.reader.readexactly(length)
            )

    async def ask(self, verb: str, path: str, body: bytes = b"", **headers: str) -> HttpAnswer:
        self.send(verb, path, body, **headers)
        return await self.answer(has_body=verb != "HEAD")

    async def end(self) -> bytes:
        """What comes before the server closes the connection."""
        async with asyncio.timeout(20):
            return await self.reader.read()

    def leave(self) -> None:
        self._writer.close()


class Cancelled:
    """A callback that the test can wait for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._called = asyncio.Event()
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        call_soon(self._loop, self._called.set)

    async def was_called(self) -> None:
        async with asyncio.timeout(10):
            await self._called.wait()


class HttpConformance(LoopbackConformance):
    """What answers HTTP by exchanges. A transport that answers none on gRPC's port skips it."""

    @asynccontextmanager
    async def serving_http(self, service: HeldService, app: HttpApp = pages) -> AsyncIterator[int]:
        """A server on the loopback interface: its port. Override it for another server than a transport's."""
        if not self.transport_class.http_on_same_port:
            pytest.skip("this transport answers no HTTP on gRPC's port")
        transport = self.transport_class(self.transport_class.Options(**self.options))
        server = await transport.serve(CoroutineService({}), LOOPBACK, Limits(), http=Http(service=service, app=app))
        try:
            yield server.ports[0]
        finally:
            await server.drain(0)

    @asynccontextmanager
    async def client(self, service: HeldService) -> AsyncIterator[HttpClient]:
        """A client of a server that `service` answers."""
        async with self.serving_http(service) as port, connected(port) as client:
            yield client

    @asynchronous
    async def test_an_exchange_has_what_the_request_has(self) -> None:
        service = HeldService(echo)
        async with self.client(service) as client:
            client.send("POST", "/api/a%2Fb%20%C3%A4?x=%20&y", b"\0body", X_Tag="one", content_type="text/x")
            answer = await client.answer()
        exchange = await service.begun()
        assert (exchange.verb, exchange.path, exchange.query) == ("POST", "/api/a%2Fb%20%C3%A4", "x=%20&y")
        assert (exchange.body, exchange.deadline) == (b"\0body", None)
        assert [exchange.headers.get(name) for name in ("x-tag", "content-type", "none")] == ["one", "text/x", None]
        assert (answer.status, answer.body) == (200, b"\0body")
        assert (answer.headers["content-type"], answer.headers["x-echo"]) == ("text/plain", "yes")

    @asynchronous
    async def test_any_other_path_is_the_applications(self) -> None:
        service = HeldService(echo)
        async with self.client(service) as client:
            for path, exchanged in (
                ("/api/", True),
                ("/exact", True),
                ("/exact?api", True),
                ("/api", False),
                ("/apis/", False),
                ("/exact/", False),
                ("/", False),
                ("/page?/api/", False),
            ):
                headers = (await client.ask("GET", path)).headers
                assert ("x-echo" in headers, "x-page" in headers) == (exchanged, not exchanged), path

    @asynchronous
    async def test_requests_of_http_1_0_and_on_a_connection_that_stays(self) -> None:
        service = HeldService(echo)
        async with self.serving_http(service) as port:
            async with connected(port) as client:
                for number in range(3):
                    assert (await client.ask("POST", "/api/", b"%d" % number)).body == b"%d" % number
            async with connected(port) as client:
                client.write(b"POST /api/ HTTP/1.0\r\nContent-Length: 3\r\n\r\nold")
                head, _, body = (await client.end()).partition(b"\r\n\r\n")
                assert head.split()[1] == b"200"
                assert body == b"old", "the answer ends with the connection"

    @asynchronous
    async def test_head_gets_the_length_and_no_body(self) -> None:
        service = HeldService(lambda exchange: exchange.reply(200, {}, b"12345"))
        async with self.client(service) as client:
            answer = await client.ask("HEAD", "/api/")
            assert (answer.status, answer.headers["content-length"]) == (200, "5")
            assert (await client.ask("GET", "/api/")).body == b"12345"

    # Bodies

    @asynchronous
    async def test_a_body_over_the_limit_does_not_begin(self) -> None:
        service = HeldService(echo)
        chunked = b"POST /api/ HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with self.serving_http(service) as port:
            async with connected(port) as client:
                assert len((await client.ask("POST", "/api/", bytes(LIMIT))).body) == LIMIT
                client.send("POST", "/api/", bytes(LIMIT + 1))
                assert (await client.answer()).body == b"MessageTooLarge"
            async with connected(port) as client:
                client.send("POST", "/api/", content_length="9" * 30)
                assert (await client.reader.read(20)).startswith(b"HTTP/1.1 4")
            async with connected(port) as client:
                client.write(chunked + b"5\r\nin pi\r\n" + b"4\r\neces\r\n0\r\n\r\n")
                assert (await client.answer()).body == b"in pieces"
                client.write(chunked + b"%x\r\n" % (LIMIT + 1) + bytes(LIMIT + 1) + b"\r\n0\r\n\r\n")
                assert (await client.answer()).body == b"MessageTooLarge"
        assert [len((await service.begun()).body) for _ in range(2)] == [LIMIT, len("in pieces")]
        assert service.none_begun

    @asynchronous
    async def test_a_client_that_asks_first_is_told_to_send_unless_the_body_is_over_the_limit(self) -> None:
        service = HeldService(echo)
        async with self.serving_http(service) as port:
            async with connected(port) as client:
                client.send("POST", "/api/", content_length="4", expect="100-continue")
                assert (await client.answer(has_body=False)).status == 100
                client.write(b"body")
                assert (await client.answer()).body == b"body"
            async with connected(port) as client:
                client.send("POST", "/api/", content_length=str(LIMIT + 1), expect="100-continue")
                assert (await client.answer()).body == b"MessageTooLarge"

    @asynchronous
    async def test_gzip_is_unpacked_within_the_limit_and_nothing_else_is(self) -> None:
        service = HeldService(echo)
        packed = gzip.compress(b"packed")
        async with self.serving_http(service) as port:
            for body, encoding, said in (
                (packed, "gzip", b"packed"),
                (packed, "GZIP", b"packed"),
                (packed, "identity", packed),
                (gzip.compress(bytes(LIMIT)), "gzip", bytes(LIMIT)),
                (gzip.compress(bytes(LIMIT + 1)), "gzip", b"MessageTooLarge"),
                (gzip.compress(bytes(100 * LIMIT)), "gzip", b"MessageTooLarge"),
                (b"plain", "gzip", b"BadRequest"),
                (packed[:-5], "gzip", b"BadRequest"),
                (packed + b"x", "gzip", b"BadRequest"),
                (b"", "gzip", b"BadRequest"),
                (packed, "br", b"Refused"),
            ):
                async with connected(port) as client:
                    assert (await client.ask("POST", "/api/", body, content_encoding=encoding)).body == said
        assert all(isinstance(error, MessageTooLarge | BadRequest) for error in service.failures)
        assert [error.status for error in service.failures if isinstance(error, Refused)] == [415]

    @asynchronous
    async def test_half_a_body_never_begins(self) -> None:
        service = HeldService(echo)
        async with self.serving_http(service) as port:
            async with connected(port) as client:
                client.send("POST", "/api/half", b"half", content_length="8")
            async with connected(port) as client:
                assert (await client.ask("POST", "/api/whole", b"whole")).body == b"whole"
            assert (await service.begun()).path == "/api/whole"
            assert service.none_begun
        assert not service.failures

    # The end

    @asynchronous
    async def test_the_first_reply_counts_from_any_thread(self) -> None:
        service, cancelled = HeldService(), Cancelled()

        def reply() -> None:
            exchange.reply(201, {"x-which": "first"}, b"first")
            exchange.reply(500, {"x-which": "second"}, b"the second")
            exchange.on_cancel(cancelled)

        async with self.client(service) as client:
            for _ in range(2):
                client.send("GET", "/api/")
                exchange = await service.begun()
                exchange.on_cancel(cancelled)
                thread = threading.Thread(target=reply)
                thread.start()
                answer = await client.answer()
                assert (answer.status, answer.headers["x-which"], answer.body) == (201, "first", b"first")
                await asyncio.to_thread(thread.join)
        assert not cancelled.count

    @asynchronous
    async def test_a_client_that_leaves_cancels_its_exchange_alone(self) -> None:
        service, cancelled, other = HeldService(), Cancelled(), Cancelled()
        async with self.serving_http(service) as port, connected(port) as staying, connected(port) as leaving:
            staying.send("GET", "/api/staying")
            (stays := await service.begun()).on_cancel(other)
            leaving.send("POST", "/api/leaving", b"body")
            (leaves := await service.begun()).on_cancel(cancelled)
            leaving.leave()
            await cancelled.was_called()
            leaves.reply(200, {}, b"to nobody")
            stays.reply(200, {}, b"stayed")
            assert (await staying.answer()).body == b"stayed"
        assert (cancelled.count, other.count) == (1, 0)
        assert not service.failures, "nobody is there to be told"

    @asynchronous
    async def test_a_callback_that_comes_after_the_client_has_left_is_called_and_never_inside(self) -> None:
        service, first, second = HeldService(), Cancelled(), Cancelled()
        registering = inside = False

        def note() -> None:
            nonlocal inside
            inside |= registering and threading.get_ident() == thread
            second()

        async with self.client(service) as client:
            client.send("GET", "/api/")
            exchange = await service.begun()
            exchange.on_cancel(first)
            client.leave()
            await first.was_called()
            thread = threading.get_ident()
            registering = True
            exchange.on_cancel(note)
            registering = False
            await second.was_called()
        assert not inside
        assert (first.count, second.count) == (1, 1)

    @asynchronous
    async def test_the_time_limit_cancels_and_the_service_tells_the_client(self) -> None:
        service, cancelled = HeldService(timeout_s=0.5), Cancelled()
        async with self.client(service) as client:
            begun = time.monotonic()
            client.send("POST", "/api/", b"body")
            exchange = await service.begun()
            exchange.on_cancel(cancelled)
            assert exchange.deadline is not None
            assert begun <= exchange.deadline - 0.5 <= time.monotonic()
            answer = await client.answer()
            assert answer.body == b"DeadlineExceeded"
            await cancelled.was_called()
        assert [type(error) for error in service.failures] == [DeadlineExceeded]

    @asynchronous
    async def test_the_time_limit_counts_for_a_body_that_does_not_come(self) -> None:
        service = HeldService(echo, timeout_s=0.5)
        async with self.client(service) as client:
            client.send("POST", "/api/", b"half", content_length="8")
            assert (await client.answer()).body == b"DeadlineExceeded"
        assert service.none_begun

    @asynchronous
    async def test_a_server_that_closes_cancels_what_is_in_flight(self) -> None:
        service, cancelled = HeldService(), Cancelled()
        async with self.serving_http(service) as port:
            client = HttpClient(*await asyncio.open_connection("127.0.0.1", port))
            client.send("GET", "/api/")
            (await service.begun()).on_cancel(cancelled)
        await cancelled.was_called()
        client.leave()

    @asynchronous
    async def test_exchanges_side_by_side_keep_their_answers(self) -> None:
        service = HeldService(echo)
        async with self.serving_http(service) as port:

            async def ask(number: int) -> bytes:
                async with connected(port) as client:
                    return (await client.ask("POST", "/api/", b"%d" % number)).body

            assert await asyncio.gather(*map(ask, range(50))) == [b"%d" % number for number in range(50)]


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[HttpClient]:
    client = HttpClient(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield client
    finally:
        with suppress(ConnectionError):
            client.leave()
