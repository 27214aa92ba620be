"""HTTP for operators, on gRPC's own port where the transport can, else on the one beside it."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import build
from dl_inference_core.plugins import Kind, Plugins

INFER = "/inference.GRPCInferenceService/ModelInfer"
WATCH = "/grpc.health.v1.Health/Watch"
CALL = build("linear", {"x": np.array([[1, 2, 3]], np.float32)})[1]


@pytest.fixture(scope="module")
def one_port(transport: str) -> bool:
    """Whether HTTP is answered on gRPC's port."""
    return bool(Plugins().classes(Kind.TRANSPORTS)[transport].http_on_same_port)


@pytest.fixture
def same_port(one_port: bool, transport: str, peer: Any) -> str:
    """The URL of gRPC's port."""
    if not one_port:
        pytest.skip(f"{transport} speaks nothing but gRPC on its port")
    return f"http://{peer.address}"


@pytest.fixture
def base(one_port: bool, peer: Any) -> str:
    """The URL of the port that answers HTTP."""
    return f"http://{peer.address}" if one_port else str(peer.metrics).removesuffix("/metrics")


def ask(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    """The status, content type and body of an answer by HTTP/1.1."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["content-type"], error.read()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health(base: str, path: str) -> None:
    assert ask(base + path) == (200, "text/plain; charset=utf-8", b"ok\n")


def test_metrics(base: str, peer: Any) -> None:
    peer.call(INFER, CALL)
    status, content_type, body = ask(f"{base}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    assert b'dl_inference_requests_total{code="OK",protocol="openinference",upstream="linear"}' in body
    assert ask(f"{base}/metrics", accept="application/openmetrics-text")[1].startswith("application/openmetrics-text")


@pytest.mark.parametrize("path", ["/", "/nope", "/metrics/", "/a.B/C", "/%00", "/../healthz"])
def test_an_unknown_path(base: str, path: str) -> None:
    assert ask(base + path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_method_that_is_not_for_reading(base: str, method: str) -> None:
    assert ask(f"{base}/metrics", method, b"x")[0] == 405


def test_many_requests_on_one_connection(base: str) -> None:
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=20)
    for path, status in [("/healthz", 200), ("/nope", 404), ("/metrics", 200)] * 20:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == status
        answer.read()
    connection.close()


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /healthz HTTP/1.0\r\n\r\n",  # HAProxy's default check, with another path
        b"GET /healthz HTTP/1.0\r\nHost: nodes\r\nConnection: close\r\n\r\n",  # nginx's default proxy_pass
        b"GET /healthz HTTP/1.0\r\nHost: h\r\nUser-Agent: ApacheBench/2.3\r\nAccept: */*\r\n\r\n",
    ],
    ids=["haproxy", "nginx", "ab"],
)
def test_http_1_0(base: str, request_head: bytes) -> None:
    """The answer ends with the connection, as clients of HTTP/1.0 expect."""
    host, _, port = base.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request_head)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 200 ", head)
    assert body == b"ok\n"


@pytest.mark.parametrize("path", [INFER, WATCH])
@pytest.mark.parametrize(
    ("method", "content_type", "status"),
    [
        ("POST", "application/json", 415),
        ("POST", "application/grpc-web", 415),
        ("POST", "application/grpcx", 415),
        ("POST", "", 415),
        ("POST", "application/grpc", 505),
        ("GET", "application/grpc", 405),
        ("PUT", "application/grpc", 405),
    ],
)
def test_what_is_no_call_of_a_method(same_port: str, path: str, method: str, content_type: str, status: int) -> None:
    """By HTTP/1.1, which has no trailers here: an answer would have no status."""
    assert ask(same_port + path, method, b"\0\0\0\0\0", content_type=content_type, te="trailers")[0] == status


def test_a_port_of_grpcs_alone_answers_no_http(one_port: bool, peer: Any) -> None:
    if one_port:
        assert ask(f"http://{peer.address}/healthz")[0] == 200
    else:
        with suppress(http.client.HTTPException, OSError):
            assert ask(f"http://{peer.address}/healthz")[0] == 505  # "HTTP Version Not Supported", and nothing else
    peer.call(INFER, CALL)


Curl = Callable[..., tuple[str, int, str]]


@pytest.fixture(scope="module")
def curl() -> Curl:
    """(*arguments): the version of HTTP, the status and the body of an answer by HTTP/2 without TLS.

    For requests without a body: of an answer that comes before the whole request is there, old versions make an error.
    """
    command = shutil.which("curl")
    if command is None or "HTTP2" not in subprocess.run([command, "-V"], capture_output=True, text=True).stdout.split():
        pytest.skip("needs a curl that speaks HTTP/2")

    def curl(*arguments: str) -> tuple[str, int, str]:
        options = ["--silent", "--show-error", "--max-time", "20", "--noproxy", "*", "--http2-prior-knowledge"]
        written = ["--write-out", "\n%{http_version} %{http_code}"]
        done = subprocess.run([command, *options, *written, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        body, _, last = done.stdout.rpartition("\n")
        version, status = last.split()
        return version, int(status), body

    return curl


@pytest.mark.parametrize(
    ("path", "arguments", "status", "said"),
    [
        ("/healthz", (), 200, "ok\n"),
        ("/readyz", (), 200, "ok\n"),
        ("/metrics", (), 200, "# HELP"),
        ("/metrics", ("--head",), 200, "content-type: text/plain"),
        ("/nope", ("--head",), 404, ""),
        ("/nope", (), 404, "Not Found"),
        ("/metrics", ("--request", "POST"), 405, "Method Not Allowed"),
        (INFER, ("--request", "POST"), 415, "expected the content type application/grpc"),
        (INFER, ("--head",), 405, "allow: POST"),
        (INFER, ("--header", "content-type: application/grpc"), 405, "expected POST"),
        (WATCH, ("--request", "POST"), 415, "expected the content type application/grpc"),
    ],
)
def test_http_2_without_tls(
    curl: Curl, same_port: str, path: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    version, got, body = curl(*arguments, same_port + path)
    assert (version, got) == ("2", status)
    assert said in body


def test_requests_go_on_while_calls_are_under_way(same_port: str, peer: Any) -> None:
    calls = [peer.start_call(INFER, CALL) for _ in range(200)]
    for _ in range(20):
        assert ask(f"{same_port}/readyz")[0] == 200
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
