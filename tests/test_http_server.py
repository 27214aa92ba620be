"""Limits on the connections of an HTTP port and on their times, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dl_inference_core import http_server
from dl_inference_core.config import Config
from dl_inference_core.http_server import HttpLimits, HttpServer

Lab = Any  # tests/conftest.py

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n"
LARGE = 32 * 1024 * 1024
"""More bytes than the sockets of both sides hold."""


class App:
    """Answers GET with "ok", POST with the body, "/large" with many bytes, and "/slow" once it is released."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event["body"]
            more = event["more_body"]
        if scope["path"] == "/slow":
            self.entered.set()
            await self.release.wait()
        body = bytes(LARGE) if scope["path"] == "/large" else body or b"ok"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes = GET) -> bytes:
        """The body of the answer."""
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        return await self.reader.readexactly(int(length.split()[1]))

    async def closed(self) -> bytes:
        """What comes before the server closes the connection."""
        got = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while chunk := await self.reader.read(1 << 20):
                    got += chunk
        return got

    @property
    def is_open(self) -> bool:
        return not self.reader.at_eof()


class Rig:
    def __init__(self, app: App, server: HttpServer) -> None:
        self.app = app
        self._server = server
        self._clients: list[Client] = []

    @property
    def refused(self) -> dict[str, int]:
        return {reason: count for reason, count in self._server.refusals.items() if count}

    async def connect(self, said: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self._server.port))
        self._clients.append(client)
        client.writer.write(said)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.writer.close()


@contextlib.asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> AsyncIterator[Rig]:
    monkeypatch.setattr(http_server, "_LOOK_S", 0.05)
    app = App()
    server = await HttpServer.start(app, "127.0.0.1", 0, HttpLimits(**limits))
    rig = Rig(app, server)
    try:
        yield rig
    finally:
        app.release.set()
        rig.close()
        await server.close()


async def trickle(client: Client, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for number in range(10_000):
            client.writer.write(data[number : number + 1] or data[-1:])
            await client.writer.drain()
            await asyncio.sleep(0.05)


def test_answers_on_a_connection_that_stays_do_not_wait_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for 40 ms where the event loop is asyncio's own: uvloop never lets them wait."""

    async def test() -> None:
        async with serving(monkeypatch) as rig:
            client = await rig.connect()
            async with asyncio.timeout(10):
                for _ in range(500):
                    assert await client.ask() == b"ok"

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(test())


# Times


@pytest.mark.parametrize(
    ("said", "then", "answer"),
    [
        (b"", b"", b""),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", b"", b"HTTP/1.1 408 "),
        (b"G", b"ET / HTTP/1.1\r\nHost: hhhhhhh", b"HTTP/1.1 408 "),
        (POST, b"", b"HTTP/1.1 408 "),
        (POST + b"123", b"", b"HTTP/1.1 408 "),
        (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b"HTTP/1.1 408 "),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", b"", b"HTTP/1.1 100 "),
    ],
)
@pytest.mark.parametrize("first", [True, False])
async def test_a_request_that_does_not_come_to_its_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, said: bytes, then: bytes, answer: bytes, first: bool
) -> None:
    async with serving(monkeypatch, headers_s=0.4, body_s=0.4) as rig:
        client = await rig.connect()
        if not first:
            if not said:
                return  # it is idle
            assert await client.ask() == b"ok"
        client.writer.write(said)
        more = asyncio.create_task(trickle(client, then)) if then else None
        got = await client.closed()
        if more is not None:
            more.cancel()
            await asyncio.wait({more})
        if more is None or got:  # of who sends on, the system may drop what was to be read
            assert got.startswith(answer)
        if answer and got:
            assert b"HTTP/1.1 408 Request Timeout\r\n" in got
            assert b"connection: close\r\n" in got
        reason = "body_time" if said.startswith(b"POST") else "headers_time"
        assert rig.refused == {reason: 1}
        assert await (await rig.connect()).ask() == b"ok"


async def test_what_takes_longer_than_a_request_may_take_to_come_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, headers_s=0.2, body_s=0.2, idle_s=0.2) as rig:
        client = await rig.connect(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
        await rig.app.entered.wait()
        await asyncio.sleep(1)
        rig.app.release.set()
        assert await client.answer() == b"ok"


async def test_an_idle_connection_stays_for_the_idle_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, headers_s=0.1, body_s=0.1) as rig:
        client = await rig.connect()
        for _ in range(2):
            assert await client.ask() == b"ok"
            await asyncio.sleep(0.6)
            assert await client.ask(POST + b"0123456789") == b"0123456789"
        assert await client.ask(GET + GET) == b"ok"  # the second one waits for the first
        assert await client.answer() == b"ok"
    async with serving(monkeypatch, idle_s=0.2) as rig:
        client = await rig.connect()
        assert await client.ask() == b"ok"
        assert await client.closed() == b""


async def test_a_client_that_takes_nothing_of_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, body_s=0.5, connections=1) as rig:
        client = await rig.connect(b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert await (await rig.connect(GET)).closed() == b"", "its answer is not sent yet, so it keeps its place"
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    assert await (await rig.connect()).ask() == b"ok"
                    break
                await asyncio.sleep(0.05)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await client.closed()) < LARGE
        assert rig.refused["slow_reader"] == 1


# How many


async def test_over_the_limit_the_connection_that_is_idle_for_longest_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch, connections=4) as rig:
        clients = [await rig.connect() for _ in range(4)]
        for index in (2, 0, 3, 1):
            assert await clients[index].ask() == b"ok"
        assert await clients[2].ask() == b"ok"  # its second request: 0 is the idlest now
        for index in (0, 3):
            new = await rig.connect()
            assert await new.ask() == b"ok"
            assert await clients[index].closed() == b""
        for index in (1, 2):
            assert await clients[index].ask() == b"ok"
        assert rig.refused == {"connections": 2}


async def test_a_request_is_never_given_up_for_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, connections=3) as rig:
        slow = await rig.connect(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
        await rig.app.entered.wait()
        half, body = await rig.connect(GET[:10]), await rig.connect(POST + b"01234")
        await asyncio.sleep(0.2)
        for _ in range(5):
            assert await (await rig.connect()).closed() == b""
        half.writer.write(GET[10:])
        body.writer.write(b"56789")
        assert (await half.answer(), await body.answer()) == (b"ok", b"0123456789")
        for _ in range(5):  # the two that are idle now, and then each other
            assert await (await rig.connect()).ask() == b"ok"
        rig.app.release.set()
        assert await slow.answer() == b"ok"


async def test_silent_connections_give_way_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, connections=20) as rig:
        silent = [await rig.connect() for _ in range(100)]
        assert await (await rig.connect()).ask() == b"ok"
        assert [await client.closed() for client in silent[:80]] == [b""] * 80
        assert silent[-1].is_open


# In a serving process


def test_idle_connections_stay_for_longer_than_load_balancers_keep_them() -> None:
    assert Config().http_idle_timeout_s > 600  # Google Cloud's; AWS's ALB has 60 s


async def test_the_config_sets_the_limits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_LOOK_S", 0.05)
    timeouts = "http_headers_timeout_s = 0.2\nhttp_body_timeout_s = 0.3\nhttp_idle_timeout_s = 0.4\n"
    gateway = await lab.gateway(f"{timeouts}http_max_connections = 2\n{lab.route(await lab.node())}", http_port=0)
    limits = gateway.app._http_server._connections.limits
    assert limits == HttpLimits(connections=2, headers_s=0.2, body_s=0.3, idle_s=0.4)
