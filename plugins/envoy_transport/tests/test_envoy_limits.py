"""What Envoy is told to bound, as a raw HTTP/2 client meets it; other clients go on meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest

CHECK = "/grpc.health.v1.Health/Check"
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", CHECK),
    (":authority", "test"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
EMPTY = b"\0\0\0\0\0"
OPTIONS = (
    "header_kb = 8, headers_timeout_s = 1, message_timeout_s = 1, premature_resets = 20, "
    "stream_window_bytes = 131072, connection_window_bytes = 262144"
)


class Raw:
    """An HTTP/2 connection that does as it is told."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
        self.http.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def events(self) -> Iterator[h2.events.Event]:
        """What comes, until the other side closes."""
        while data := self.receive():
            yield from self.http.receive_data(data)
            self.flush()

    def receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionResetError:
            return b""

    def call(self, headers: list[tuple[str, Any]], body: bytes = EMPTY, *, end: bool = True) -> dict[str, str]:
        """The headers and trailers of the answer to a call with `headers`."""
        stream = self.http.get_next_available_stream_id()
        self.http.send_headers(stream, headers)
        self.http.send_data(stream, body, end_stream=end)
        self.flush()
        answer: dict[str, str] = {}
        for event in self.events():
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                answer |= {name.decode(): value.decode() for name, value in event.headers}
            if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                return answer
        return answer

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server with the options above and one route, to itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    config = tmp_path_factory.mktemp("limits") / "server.toml"
    config.write_text(
        f'port = {port}\nconnections = 4\nstreams = 7\ntransport = "envoy"\ntransport_options = {{{OPTIONS}}}\n'
        f'[[routes]]\nname = "m"\nnodes = ["127.0.0.1:{port}"]\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(config)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        # It is its own node, which never says that it serves; but it listens.
        grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(timeout=20)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


def works(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return bool(channel.unary_unary(CHECK)(b"", timeout=10))


def test_streams_and_windows_are_announced(port: int) -> None:
    with Raw(port) as raw:
        for event in raw.events():
            if isinstance(event, h2.events.RemoteSettingsChanged):
                break
        remote = raw.http.remote_settings
        assert remote.max_concurrent_streams == 7
        assert remote.initial_window_size == 131072


def test_a_call_with_too_many_headers_is_refused_and_the_next_is_answered(port: int) -> None:
    with Raw(port) as raw:
        answer = raw.call([*HEADERS, *(("x-many", "y" * 1000) for _ in range(9))])
        assert answer == {}  # the stream is reset
        assert raw.call(HEADERS)["grpc-status"] == "0"


def test_a_path_that_is_not_ascii_is_refused_and_the_next_call_is_answered(port: int) -> None:
    with Raw(port) as raw:
        for path in ("/%ff", "/caf%E9", b"/\xff", b"/caf\xe9", "/café", "/%%%E9"):
            answer = raw.call([(name, path if name == ":path" else value) for name, value in HEADERS])
            assert answer.get("grpc-status") == "7", path
        assert raw.call(HEADERS)["grpc-status"] == "0"


def test_rapid_resets_end_their_own_connection_only(port: int) -> None:
    with Raw(port) as raw:
        try:
            for _ in range(200):
                stream = raw.http.get_next_available_stream_id()
                raw.http.send_headers(stream, HEADERS)
                raw.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
                raw.flush()
            for _ in raw.events():
                pass
        except (BrokenPipeError, ConnectionResetError, h2.exceptions.ProtocolError):
            pass
        else:
            assert raw.receive() == b""
        assert works(port)


def test_a_client_that_does_not_send_its_headers_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /x HTTP/1.1\r\nhost: t\r\n")
        assert b" 408 " in slow.recv(1000)


@pytest.mark.parametrize("part", [b"", EMPTY[:3], b"\0\0\0\0\x09abc"])
def test_a_client_that_does_not_send_its_message_is_told_so(port: int, part: bytes) -> None:
    with Raw(port) as raw:
        answer = raw.call(HEADERS, part, end=False)
        assert answer["grpc-status"] == str(grpc.StatusCode.UNKNOWN.value[0])  # for HTTP 408
        assert raw.call(HEADERS)["grpc-status"] == "0"


def test_connections_over_the_limit_are_closed_and_those_below_it_answered(port: int) -> None:
    raws: list[Raw] = []
    try:
        answered = 0
        while not works(port):  # the connections of other tests may not have closed yet
            time.sleep(0.05)
        time.sleep(0.2)
        raws += [Raw(port) for _ in range(8)]
        for raw in raws:
            try:
                answered += raw.call(HEADERS).get("grpc-status") == "0"
            except (BrokenPipeError, ConnectionResetError):
                continue
        assert answered == 3  # the fourth is the server's own, to itself as its node
    finally:
        for raw in raws:
            raw.socket.close()


def test_what_is_no_http_is_closed_and_harms_nobody(port: int) -> None:
    for junk in (os.urandom(2000), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(400), b"GET\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
            other.sendall(junk)
            other.shutdown(socket.SHUT_WR)
            while True:
                try:
                    if not other.recv(1000):
                        break
                except ConnectionResetError:
                    break
    assert works(port)
