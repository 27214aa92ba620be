"""HTTP on the port of gRPC, beyond what the suite for transports asks."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dl_inference_core.errors import DeadlineExceeded
from dl_inference_core.testing.loopback import ECHO, ask, connected
from dl_inference_core.testing.transport_http import LIMIT, Cancelled, HeldService, HttpClient, echo
from dl_inference_core.testing.transport_tls import Authority

pytest.importorskip("dl_inference_native", exc_type=ImportError)


async def scope_of(request: Request) -> Response:
    """What the application was given, and a header that comes twice."""
    scope = {name: value for name, value in request.scope.items() if name in ("http_version", "method", "scheme")}
    scope |= {"path": request.scope["path"], "raw_path": request.scope["raw_path"].decode()}
    scope |= {"query": request.scope["query_string"].decode(), "body": (await request.body()).decode()}
    scope |= {"tags": [value for name, value in request.headers.items() if name == "x-tag"], "url": str(request.url)}
    response = JSONResponse(scope)
    response.headers.append("x-answer", "one")
    response.headers.append("x-answer", "two")
    return response


async def failing(_: Request) -> Response:
    raise RuntimeError("this is expected")


async def cancelled(_: Request) -> Response:
    raise asyncio.CancelledError


class Late(Response):
    """Stays after the answer, until the application is told of the end."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["app"].state.left.set()


async def late(_: Request) -> Response:
    return Late(b"late")


async def waiting(request: Request) -> Response:
    while not await request.is_disconnected():  # noqa: ASYNC110 - starlette has no event
        await asyncio.sleep(0.01)
    request.app.state.left.set()
    return Response()


@pytest.fixture
def app() -> Starlette:
    methods = ["GET", "POST", "PUT"]
    kinds = {"failing": failing, "cancelled": cancelled, "late": late, "waiting": waiting}
    routes = [Route(f"/{name}", kind) for name, kind in kinds.items()]
    routes.append(Route("/{rest:path}", scope_of, methods=methods))
    starlette = Starlette(routes=routes)
    starlette.state.left = asyncio.Event()
    return starlette


class Client(HttpClient):
    """As the suite's.

    Attributes:
        negotiated: the protocol that TLS agreed on.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        tls = writer.get_extra_info("ssl_object")
        self.negotiated = None if tls is None else tls.selected_alpn_protocol()


@asynccontextmanager
async def client(served: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    hostname = None if context is None else "localhost"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context, server_hostname=hostname)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def curl(*arguments: str) -> str:
    """What curl prints; it must speak HTTP/2."""
    command = shutil.which("curl")
    if command is None:
        pytest.skip("needs curl")
    options = ["--silent", "--show-error", "--max-time", "20", "--noproxy", "*"]
    done = await asyncio.to_thread(
        subprocess.run, [command, *options, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Http2:
    """A client of HTTP/2 in clear text: one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._http.initiate_connection()
        self._heads: dict[int, dict[str, str]] = {}
        self._bodies: dict[int, bytes] = {}
        self._ended: set[int] = set()
        self._resets: dict[int, Any] = {}
        self._told_to_send: set[int] = set()

    def send(self, verb: str, path: str, body: bytes = b"", *, ends: bool = True, **headers: str) -> int:
        """The number of the request's stream; a body fits into the first window."""
        stream = self._http.get_next_available_stream_id()
        fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
        head = [(":method", verb), (":path", path), (":scheme", "http"), (":authority", "h"), *fields]
        self._http.send_headers(stream, head, end_stream=ends and not body)
        for at in range(0, len(body), 16_384):
            piece = body[at : at + 16_384]
            self._http.send_data(stream, piece, end_stream=ends and at + len(piece) == len(body))
        self._writer.write(self._http.data_to_send())
        return stream

    async def send_when_told(self, stream: int, body: bytes) -> None:
        """Send the body once the server says 100."""
        async with asyncio.timeout(20):
            while stream not in self._told_to_send:
                for event in self._http.receive_data(await self._reader.read(65_536)):
                    self._take(event)
        self._http.send_data(stream, body, end_stream=True)
        self._writer.write(self._http.data_to_send())

    def reset(self, stream: int) -> None:
        self._http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._writer.write(self._http.data_to_send())

    async def answer(self, stream: int) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        async with asyncio.timeout(20):
            while stream not in self._ended:
                for event in self._http.receive_data(await self._reader.read(65_536)):
                    self._take(event)
                self._writer.write(self._http.data_to_send())
        return int(self._heads[stream][":status"]), self._heads[stream], self._bodies[stream]

    async def reset_of(self, stream: int) -> Any:
        """The code with which the server resets a stream."""
        async with asyncio.timeout(20):
            while stream not in self._resets:
                for event in self._http.receive_data(await self._reader.read(65_536)):
                    self._take(event)
        return self._resets[stream]

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self._heads[event.stream_id] = dict(event.headers)
            self._bodies[event.stream_id] = b""
        elif isinstance(event, h2.events.DataReceived):
            self._bodies[event.stream_id] += event.data
            self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.InformationalResponseReceived):
            assert (":status", "100") in event.headers
            self._told_to_send.add(event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self._resets[event.stream_id] = event.error_code
        assert not isinstance(event, h2.events.ConnectionTerminated)


@asynccontextmanager
async def http2(served: Any) -> AsyncIterator[Http2]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        yield Http2(reader, writer)
    finally:
        writer.close()


# Pages


async def test_a_page_by_http_1(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served, client(served) as one:
        one.write(b"PUT /a%2Fb%20c?x=%20y HTTP/1.1\r\nHost: h:1\r\nX-Tag: one\r\nx-tag: two\r\n")
        one.write(b"Content-Length: 4\r\n\r\nbody")
        answer = await one.answer()
        assert answer.status == 200
        scope = json.loads(answer.body)
        assert scope.pop("url").startswith("http://h:1/")
        assert scope == {
            "http_version": "1.1",
            "method": "PUT",
            "scheme": "http",
            "path": "/a/b c",
            "raw_path": "/a%2Fb%20c",
            "query": "x=%20y",
            "body": "body",
            "tags": ["one", "two"],
        }


async def test_a_page_by_http_2(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served:
        url = f"http://127.0.0.1:{served.port}/page?x"
        printed = await curl("--http2-prior-knowledge", "--include", "--data-binary", "body", url)
        head, _, body = printed.replace("\r", "").partition("\n\n")
        assert head.startswith("HTTP/2 200")
        assert [line for line in head.splitlines() if line.startswith("x-answer")] == ["x-answer: one", "x-answer: two"]
        scope = json.loads(body)
        assert (scope["http_version"], scope["method"], scope["body"]) == ("2", "POST", "body")
        assert (scope["path"], scope["url"]) == ("/page", url)


async def test_an_application_that_fails(serve_http: Any, app: Starlette, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_http(HeldService(echo), app) as served, client(served) as one:
        assert (await one.ask("GET", "/failing")).status == 500
        assert (await one.ask("GET", "/page")).status == 200
    assert "this is expected" in caplog.text


async def test_an_application_that_is_cancelled(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(), app) as served, client(served) as asking:
        answer = await asking.ask("GET", "/cancelled")
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")


async def test_an_application_that_stays_after_its_answer_hears_of_the_end(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(), app) as served, client(served) as asking:
        assert (await asking.ask("GET", "/late")).body == b"late"
        async with asyncio.timeout(20):
            await app.state.left.wait()


async def test_so_many_pages_are_answered_at_one_time(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(), app) as served:
        async with http2(served) as crowd, http2(served) as other:
            streams = [crowd.send("GET", "/waiting") for _ in range(101)]
            status, _, body = await crowd.answer(streams[-1])
            assert (status, body) == (503, b"The server answers as many requests for pages as it may.\n")
            assert (await other.answer(other.send("GET", "/page")))[0] == 503
        async with http2(served) as other, asyncio.timeout(20):
            while (await other.answer(other.send("GET", "/page")))[0] == 503:  # noqa: ASYNC110 - the crowd leaves
                await asyncio.sleep(0.05)
        assert served.transport.refusals()["pages"] >= 2


async def test_an_answer_by_http_2_that_nobody_reads(serve_http: Any, app: Starlette) -> None:
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(1 << 20)))
    async with serve_http(service, app, body_timeout_s=2) as served, http2(served) as asking:
        unread = asking.send("GET", "/api/unread")
        await service.begun()
        assert served.transport._threads.buffered_bytes() > 1 << 19
        await served.has_freed_all()
        assert await asking.reset_of(unread) == h2.errors.ErrorCodes.CANCEL
        await served.has_refused(slow_reader=1)


async def test_an_application_hears_that_its_client_has_left(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served:
        async with client(served) as one:
            one.send("GET", "/waiting")
            await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            await app.state.left.wait()


async def test_the_body_of_a_page_is_bounded(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served, client(served) as one:
        assert (await one.ask("POST", "/page", bytes(LIMIT + 1))).status == 413
        await served.has_refused(message_bytes=1)


# HTTP/2


async def test_exchanges_by_http_2_beside_calls(serve_http: Any, app: Starlette) -> None:
    service = HeldService(echo)
    async with serve_http(service, app) as served, http2(served) as one:
        bodies = [b"%d" % number * 1000 for number in range(10)]
        streams = [one.send("POST", "/api/%C3%A4?q", body, x_tag="t") for body in bodies]
        async with connected(served.transport, f"127.0.0.1:{served.port}") as connection:
            assert await ask(connection, message=b"a call") == b"a call"
        for stream, body in zip(streams, bodies, strict=True):
            status, headers, got = await one.answer(stream)
            assert (status, headers["x-echo"], headers["content-length"], got) == (200, "yes", str(len(body)), body)
        exchange = await service.begun()
        assert (exchange.verb, exchange.path, exchange.query) == ("POST", "/api/%C3%A4", "q")
        assert (exchange.headers["x-tag"], exchange.headers["host"]) == ("t", "h")


async def test_bodies_by_http_2(serve_http: Any, app: Starlette) -> None:
    service = HeldService(echo)
    async with serve_http(service, app) as served, http2(served) as one:
        packed = one.send("POST", "/api/", gzip.compress(b"packed"), content_encoding="gzip")
        other = one.send("POST", "/api/", b"x", content_encoding="br")
        damaged = one.send("POST", "/api/", b"damaged", content_encoding="gzip")
        announced = one.send("POST", "/api/", ends=False, content_length=str(LIMIT + 1), expect="100-continue")
        bomb = one.send("POST", "/api/", gzip.compress(bytes(LIMIT + 1)), content_encoding="gzip")
        head = one.send("HEAD", "/api/")
        assert (await one.answer(packed))[2] == b"packed"
        assert (await one.answer(other))[2] == b"Refused"
        assert (await one.answer(damaged))[2] == b"BadRequest"
        assert (await one.answer(announced))[2] == b"MessageTooLarge"
        assert (await one.answer(bomb))[2] == b"MessageTooLarge"
        assert (await one.answer(head))[::2] == (200, b"")
        assert {(await service.begun()).verb for _ in range(2)} == {"POST", "HEAD"}
        assert service.none_begun
        await served.has_freed_all()
    assert {str(error).partition(": ")[0] for error in service.failures} == {
        "content encoding br is not known; expected gzip or none",
        "the body is not gzip, which its content encoding says it is",
        f"the request's body is too large; expected at most {LIMIT} bytes",
    }


async def test_a_client_of_http_2_that_waits_is_told_to_send(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served, http2(served) as one:
        for path in ("/api/", "/page"):
            waiting = one.send("POST", path, ends=False, content_length="4", expect="100-continue")
            await one.send_when_told(waiting, b"body")
            status, _, body = await one.answer(waiting)
            assert status == 200
            assert b"body" in body


async def test_a_stream_that_is_reset_cancels_its_exchange_alone(serve_http: Any, app: Starlette) -> None:
    service, cancelled, other = HeldService(), Cancelled(), Cancelled()
    async with serve_http(service, app) as served, http2(served) as one:
        leaves, stays = one.send("POST", "/api/", b"leaves"), one.send("POST", "/api/", b"stays")
        exchanges = {exchange.body: exchange for exchange in [await service.begun() for _ in range(2)]}
        exchanges[b"leaves"].on_cancel(cancelled)
        exchanges[b"stays"].on_cancel(other)
        one.reset(leaves)
        await cancelled.was_called()
        exchanges[b"leaves"].reply(200, {}, b"to nobody")
        exchanges[b"stays"].reply(200, {"connection": "keep-alive"}, b"stayed")
        status, headers, body = await one.answer(stays)
        assert (status, "connection" in headers, body) == (200, False, b"stayed")
    assert (cancelled.count, other.count, service.failures) == (1, 0, [])


async def test_the_time_limit_by_http_2(serve_http: Any, app: Starlette) -> None:
    service = HeldService(timeout_s=0.3)
    async with serve_http(service, app) as served, http2(served) as one:
        whole, half = one.send("POST", "/api/", b"whole"), one.send("POST", "/api/", b"half", ends=False)
        assert (await one.answer(whole))[2] == b"DeadlineExceeded"
        assert (await one.answer(half))[2] == b"DeadlineExceeded"
    assert [str(error) for error in service.failures] == ["the request took longer than 0.3 s"] * 2
    assert all(isinstance(error, DeadlineExceeded) for error in service.failures)


async def test_what_is_no_call_where_http_is_not_answered(serve_http: Any) -> None:
    async with serve_http(None) as served:
        async with http2(served) as one:
            assert (await one.answer(one.send("GET", "/page")))[0] == 405
            assert (await one.answer(one.send("POST", ECHO, b"x")))[0] == 415
        async with client(served) as old:
            old.send("GET", "/page")
            assert (await old.end()).startswith(b"HTTP/1.1 505")
        await served.has_refused(other_protocol=1)


async def test_a_method_of_grpcs_by_http_1_needs_http_2(serve_http: Any, app: Starlette) -> None:
    async with serve_http(HeldService(echo), app) as served, client(served) as one:
        answer = await one.ask("POST", ECHO, b"\0\0\0\0\0", content_type="application/grpc")
        assert (answer.status, b"needs HTTP/2" in answer.body) == (505, True)


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.mark.parametrize("protocols", [["http/1.1"], ["h2", "http/1.1"], []])
async def test_tls_and_what_the_client_offers(
    serve_http: Any, app: Starlette, authority: Authority, protocols: list[str]
) -> None:
    context = ssl.create_default_context(cafile=str(authority.file))
    if protocols:
        context.set_alpn_protocols(protocols)
    tls = authority.issue("localhost").server()
    async with serve_http(HeldService(echo), app, tls) as served, client(served, context) as one:
        if "h2" in protocols:
            assert one.negotiated == "h2"
            return
        assert one.negotiated == (protocols[0] if protocols else None)
        assert (await one.ask("POST", "/api/", b"body")).body == b"body"
        assert json.loads((await one.ask("GET", "/page")).body)["scheme"] == "https"


@pytest.mark.parametrize(("option", "version"), [("--http1.0", "1.0"), ("--http1.1", "1.1"), ("--http2", "2")])
async def test_curl_with_tls(serve_http: Any, app: Starlette, authority: Authority, option: str, version: str) -> None:
    tls = authority.issue("localhost").server()
    async with serve_http(HeldService(echo), app, tls) as served:
        url = f"https://localhost:{served.port}/page"
        scope = json.loads(await curl(option, "--cacert", str(authority.file), "--ipv4", url))
        assert (scope["http_version"], scope["scheme"], scope["url"]) == (version, "https", url)


async def test_a_large_answer(serve_http: Any, app: Starlette) -> None:
    """A whole answer that is larger than all windows."""
    size = 5 << 20
    service = HeldService(lambda exchange: exchange.reply(200, {}, bytes(size)))
    async with serve_http(service, app) as served:
        for option in ("--http1.1", "--http2-prior-knowledge"):
            url = f"http://127.0.0.1:{served.port}/api/"
            assert await curl(option, "--output", "/dev/null", "--write-out", "%{size_download}", url) == str(size)
