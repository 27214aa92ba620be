"""Metrics and health, asked by HTTP over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from dl_inference_core import admin
from dl_inference_core import config as configs
from dl_inference_core.app import App
from dl_inference_core.errors import Code, ConfigError
from dl_inference_core.http_server import HttpServer
from dl_inference_core.introspection import Readiness
from dl_inference_core.metrics import Metrics

Lab = Any  # tests/conftest.py


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str


async def ask(port: int | None, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str) -> Answer:
    def send() -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read().decode())

    return await asyncio.to_thread(send)


@contextlib.asynccontextmanager
async def serving(*beside: Any, host: str = "127.0.0.1", **parts: Any) -> AsyncIterator[int]:
    app = admin.app(parts.get("metrics", Metrics()), parts.get("readiness", Readiness()), *beside)
    server = await HttpServer.start(app, host, 0)
    yield server.port
    await server.close()
    with pytest.raises(ConnectionRefusedError):
        await ask(server.port, "/healthz", host=host.strip("[]"))


# The application


async def test_it_lives_whether_it_takes_requests_or_not() -> None:
    readiness = Readiness()
    async with serving(readiness=readiness) as port:
        for readiness.serving in (False, True):
            answer = await ask(port, "/healthz")
            assert (answer.status, answer.text) == (200, "ok\n")
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"


async def test_it_is_ready_while_it_takes_requests_and_says_why_it_is_not() -> None:
    readiness = Readiness()
    async with serving(readiness=readiness) as port:
        answer = await ask(port, "/readyz")
        assert (answer.status, answer.text.partition(":")[0]) == (503, "starting")
        readiness.serving = True
        answer = await ask(port, "/readyz")
        assert (answer.status, answer.text) == (200, "ok\n")
        readiness.upstreams = lambda: False
        answer = await ask(port, "/readyz")
        assert (answer.status, answer.text.partition(":")[0]) == (503, "failing")
        readiness.serving, readiness.leaving = False, True
        answer = await ask(port, "/readyz")
        assert (answer.status, answer.text.partition(":")[0]) == (503, "ending")


async def test_metrics_come_in_the_format_that_is_asked_for() -> None:
    metrics = Metrics()
    metrics.requests["seldon", "m"].count(Code.OK, 0.003)
    async with serving(metrics=metrics) as port:
        answer = await ask(port, "/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'dl_inference_requests_total{code="OK",protocol="seldon",upstream="m"} 1.0' in answer.text.splitlines()
        answer = await ask(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.text.endswith("# EOF\n")


async def test_no_other_path_and_no_other_method_is_answered() -> None:
    async with serving() as port:
        for path in ("/", "/none", "/metrics/", "/healthz/x", "//readyz"):
            assert (await ask(port, path)).status == 404, path
        for path in ("/metrics", "/healthz", "/readyz"):
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                answer = await ask(port, path, method)
                assert answer.status == 405
                assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
        answer = await ask(port, "/healthz", "HEAD")
        assert (answer.status, answer.text) == (200, "")


async def test_others_are_answered_beside_it_and_do_not_take_its_paths() -> None:
    async def hello(_: Any) -> PlainTextResponse:
        return PlainTextResponse("hello")

    beside = Mount("/v2", routes=[Route("/hello", hello)]), Route("/{path:path}", hello)
    async with serving(*beside) as port:
        assert (await ask(port, "/v2/hello")).text == "hello"
        assert (await ask(port, "/any")).text == "hello"
        assert (await ask(port, "/healthz")).text == "ok\n"


# The port


async def test_it_listens_on_ipv6_too() -> None:
    async with serving(host="[::1]") as port:
        assert (await ask(port, "/healthz", host="::1")).status == 200


async def test_every_interface_is_ipv4_as_well() -> None:
    async with serving(host="[::]") as port:
        assert (await ask(port, "/healthz")).status == 200


async def test_what_is_no_http_is_refused_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        assert (await ask(port, "/healthz", Upgrade="websocket", Connection="Upgrade")).status == 200
    assert caplog.records == []


async def test_a_client_that_holds_its_connection_open_does_not_hold_up_the_end() -> None:
    async with serving() as port:
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        (idle, to_idle), (_, to_half), _ = streams
        to_idle.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await idle.readline()).startswith(b"HTTP/1.1 200 ")
        to_half.write(b"GET /healthz HTTP/1.1\r\n")
    for reader, writer in streams:
        await reader.read()
        writer.close()


async def test_an_answer_that_never_ends_is_cut_off() -> None:
    entered = asyncio.Event()
    cancelled = asyncio.Event()

    async def endless(_: Any) -> PlainTextResponse:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return PlainTextResponse("never")

    async with serving(Route("/endless", endless)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
        await entered.wait()
        start = time.monotonic()
    assert time.monotonic() - start < 3
    assert cancelled.is_set()
    await reader.read()
    writer.close()


# In a serving process


async def test_it_answers_before_requests_would_succeed(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    file = lab.folder / "server.toml"
    file.write_text(f'port = 0\nhttp_port = 0\ntransport = "{lab.transport_name}"\n{lab.route(node)}')
    app = App(configs.load(file), lab.plugins)
    starting = asyncio.create_task(app.serve())
    try:
        await lab.until(lambda: app.http_port is not None)
        assert (await ask(app.http_port, "/healthz")).status == 200
        answer = await ask(app.http_port, "/readyz")
        assert (answer.status, answer.text.partition(":")[0]) == (503, "starting")
        await node.start()
        await starting
        assert (await ask(app.http_port, "/readyz")).status == 200
    finally:
        await app.close()


async def test_it_answers_until_what_is_in_flight_is_finished(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.gateway(lab.route(node, more="timeout_ms = 10000"), http_port=0)
    port = gateway.app.http_port
    call = asyncio.ensure_future(gateway.call())
    await node.entered.wait()
    closing = asyncio.create_task(gateway.app.close())
    await asyncio.sleep(0)
    answer = await ask(port, "/readyz")
    assert (answer.status, answer.text.partition(":")[0]) == (503, "ending")
    assert (await ask(port, "/healthz")).status == 200
    node.release.set()
    assert await call == "a"
    await closing
    with pytest.raises(ConnectionRefusedError):
        await ask(port, "/healthz")


@pytest.mark.parametrize("cors", [False, True])
async def test_rest_lets_pages_of_other_origins_read_its_answers_where_the_config_says_so(lab: Lab, cors: bool) -> None:
    gateway = await lab.gateway(f"rest_cors = {str(cors).lower()}\n{lab.route(await lab.node())}", http_port=0)
    preflight = await ask(gateway.app.http_port, "/v1/models/m:predict", "OPTIONS", Origin="https://page.example")
    answer = await ask(gateway.app.http_port, "/v1/models/m", Origin="https://page.example")
    assert (preflight.status, answer.status) == (200, 404)
    for each in (preflight, answer):
        assert each.headers.get("access-control-allow-origin") == ("*" if cors else None)
    assert "access-control-allow-origin" not in (await ask(gateway.app.http_port, "/healthz")).headers


async def test_it_counts_what_was_answered(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.gateway(lab.route(node), http_port=0)
    await gateway.call()
    lines = (await ask(gateway.app.http_port, "/metrics")).text.splitlines()
    assert 'dl_inference_requests_total{code="OK",protocol="openinference",upstream="m"} 1.0' in lines
    assert f'dl_inference_attempts_total{{node="{node.address}",outcome="success",route="m"}} 1.0' in lines


@pytest.mark.parametrize("wrong", ["in use", "over 65535"])
async def test_a_port_that_cannot_be_had_is_a_config_error(lab: Lab, wrong: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if wrong == "in use" else 65536
        with pytest.raises(ConfigError, match=rf"^http_port {port}: .*{wrong}"):
            await lab.gateway(lab.route(await lab.node()), http_port=port)
