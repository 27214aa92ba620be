"""What official clients cannot be made to send, by a client of HTTP/2 and nothing above it."""

from __future__ import annotations

import gzip
import select
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import numpy as np
import pytest
from hpack import NeverIndexedHeaderTuple

from dl_inference_core.client import build
from dl_inference_core.errors import Code
from dl_inference_core.wire import openinference, seldon

INFER = "/inference.GRPCInferenceService/ModelInfer"
SELDON = "/seldon.protos.Model/Predict"
WATCH = "/grpc.health.v1.Health/Watch"
X = np.array([[1, 2, 3]], np.float32)
CALL = build("linear", {"x": X})[1]
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": INFER,
    ":authority": "test",
    "te": "trailers",
    "content-type": "application/grpc",
    "grpc-timeout": "20S",
}
PATIENCE_S = 20.0


def framed(message: bytes, flag: int = 0, length: int | None = None) -> bytes:
    return bytes([flag]) + (len(message) if length is None else length).to_bytes(4, "big") + message


@dataclass
class Answer:
    """What has come back on a stream."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: h2.errors.ErrorCodes | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    def __str__(self) -> str:
        """In a word: the status's code, HTTP's if there is none, or that the stream was reset."""
        said = self.trailers.get("grpc-status", self.headers.get("grpc-status"))
        if said is not None:
            return Code(int(said)).name
        if not self.ended:
            return "RESET"
        status = self.headers[":status"]
        return "NO STATUS" if status == "200" else f"HTTP {status}"

    @property
    def text(self) -> str:
        return self.headers.get("grpc-message", "") or self.data.decode("utf-8", "replace")


class Client:
    """One connection, and all that has come on it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        # What is malformed is to be sent as it is, and gRPC's messages may end in blanks.
        self._http = h2.connection.H2Connection(
            h2.config.H2Configuration(
                validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
            )
        )
        self._http.initiate_connection()
        self._answers: dict[int, Answer] = {}
        self._flush()

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        self._socket.sendall(self._http.data_to_send())

    def begin(self, headers: list[tuple[str, str]], *, end: bool = False) -> int:
        """A new stream; its number."""
        stream = self._http.get_next_available_stream_id()
        self._answers[stream] = Answer()
        # Not indexed: a header that grpcio could not read makes it refuse the next one of that name on the connection.
        self._http.send_headers(stream, [NeverIndexedHeaderTuple(*pair) for pair in headers], end_stream=end)
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool) -> int:
        """Send `data`, or as much of it as is wanted before the answer is over; returns how many bytes those were."""
        view = memoryview(data)
        sent = 0
        while not self._answers[stream].over:
            room = min(self._http.local_flow_control_window(stream), self._http.max_outbound_frame_size)
            part = view[sent : sent + room]
            sent += len(part)
            last = sent == len(view)
            if part or last:
                self._http.send_data(stream, bytes(part), end_stream=end and last)
                self._flush()
            if last:
                break
            self._take(wait=room == 0)
        return sent

    def reset(self, stream: int) -> None:
        self._http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    def answer(self, stream: int) -> Answer:
        """The whole answer."""
        answer = self._answers[stream]
        end = time.monotonic() + PATIENCE_S
        while not answer.over:
            assert time.monotonic() < end, f"no answer in {PATIENCE_S} s; until now {answer!r}"
            self._take(wait=True)
        return answer

    def _take(self, *, wait: bool) -> None:
        if not wait and not select.select([self._socket], [], [], 0)[0]:
            return
        received = self._socket.recv(1 << 20)
        assert received, "the connection was closed"
        for event in self._http.receive_data(received):
            assert not isinstance(event, h2.events.ConnectionTerminated), "the connection is being closed"
            answer = self._answers.get(getattr(event, "stream_id", None) or 0, Answer())
            match event:
                case h2.events.ResponseReceived():
                    answer.headers = decoded(event.headers)
                case h2.events.TrailersReceived():
                    answer.trailers = decoded(event.headers)
                case h2.events.DataReceived():
                    answer.data += event.data
                    self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    answer.ended = True
                case h2.events.StreamReset():
                    answer.reset = h2.errors.ErrorCodes(event.error_code)
        self._flush()

    def call(
        self, body: bytes, changed: Mapping[str, str | None] = MappingProxyType({}), *, end: bool = True
    ) -> Answer:
        """The whole answer to a call with `headers(changed)`."""
        stream = self.begin(headers(changed))
        self.send(stream, body, end=end)
        return self.answer(stream)


def decoded(headers: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


def headers(changed: Mapping[str, str | None] = MappingProxyType({})) -> list[tuple[str, str]]:
    """HEADERS with changes; None is for none."""
    merged = {**HEADERS, **changed}
    return [(name, value) for name, value in merged.items() if value is not None]


@pytest.fixture
def client(peer: Any) -> Iterator[Client]:
    client = Client(peer.address)
    yield client
    client.close()


@contextmanager
def others_live_on(client: Client, gate: Path, wait_for: Callable[..., Any]) -> Iterator[None]:
    """A call on `client`'s connection that is under way meanwhile is answered after it, and so is a new one."""
    patient = client.begin(headers({":path": SELDON}))
    client.send(patient, framed(build(12, f"await {gate}")[1]), end=True)
    wait_for("the model to have begun", gate.with_name(f"{gate.name}.begun").exists)
    try:
        yield
        answer = client.call(framed(CALL))
    finally:
        gate.touch()
    assert str(answer) == "OK"
    payload: Any = openinference.decode_response(answer.data[5:]).payload
    np.testing.assert_array_equal(payload["y"], [[45, 55]])
    answer = client.answer(patient)
    assert str(answer) == "OK"
    assert seldon.decode_response(answer.data[5:]).payload == f"done {gate}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sent, and what must come of it.

    Attributes:
        status: what the answer comes to, as `Answer` says it.
        said: part of what it says.
        elsewhere: by transport, what it comes to where that is not ours to decide; one of several.
    """

    body: bytes = framed(CALL)
    headers: dict[str, str | None] = field(default_factory=dict)
    status: str
    said: str = ""
    elsewhere: dict[str, set[str]] = field(default_factory=dict)


PACKED = gzip.compress(CALL)
# grpcio waits for a message that it can take as one, for as long as the client does.
WAITS = {"grpcio": {"DEADLINE_EXCEEDED"}}
INTERNAL = {"grpcio": {"INTERNAL"}}
ANSWERS = {"grpcio": {"OK"}}
RESETS = {"grpcio": {"RESET"}}
# Its limit of 16 KiB does not hold for headers in several frames; but those that a gateway of its own sends are in one.
SOME_TIMES = {"grpcio": {"OK", "RESOURCE_EXHAUSTED"}}
INVALID, NOT_KNOWN, TOO_LARGE = "INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"

CASES = {
    "good": Case(status="OK"),
    # frames
    "no bytes": Case(body=b"", status=INVALID, said="expected one message", elsewhere=WAITS),
    "part of a prefix": Case(body=b"\0\0\0", status=INVALID, said="expected one message", elsewhere=WAITS),
    "part of a message": Case(body=framed(CALL)[:-1], status=INVALID, said="expected one message", elsewhere=WAITS),
    "one byte more": Case(body=framed(CALL) + b"\0", status=INVALID, said="expected one message", elsewhere=ANSWERS),
    "two messages": Case(body=2 * framed(CALL), status=INVALID, said="expected one message", elsewhere=ANSWERS),
    "flag 2": Case(
        body=framed(CALL, 2),
        status=INVALID,
        said="is 0 or 1; got 2",
        elsewhere={"grpcio": {"DEADLINE_EXCEEDED", INVALID}},
    ),
    "2 GiB": Case(body=framed(CALL, 0, 1 << 31), status=TOO_LARGE, said="larger than max (2147483648 vs. 10485760)"),
    "4 GiB": Case(body=framed(CALL, 0, (1 << 32) - 1), status=TOO_LARGE, said="larger than max (4294967295 vs."),
    # compression
    "gzip": Case(body=framed(PACKED, 1), headers={"grpc-encoding": "gzip"}, status="OK"),
    "deflate": Case(body=framed(zlib.compress(CALL), 1), headers={"grpc-encoding": "deflate"}, status="OK"),
    "gzip that is none": Case(
        body=framed(b"no gzip at all", 1),
        headers={"grpc-encoding": "gzip"},
        status=INVALID,
        said="not compressed by gzip",
        elsewhere=INTERNAL,
    ),
    "part of a gzip": Case(
        body=framed(PACKED[:-5], 1),
        headers={"grpc-encoding": "gzip"},
        status=INVALID,
        said="ends before its gzip does",
        elsewhere=INTERNAL,
    ),
    "more than a gzip": Case(
        body=framed(PACKED + b"x", 1),
        headers={"grpc-encoding": "gzip"},
        status=INVALID,
        said="goes on after its gzip",
        elsewhere=INTERNAL,
    ),
    "a gzip of 200 MB": Case(
        body=framed(gzip.compress(bytes(200_000_000)), 1), headers={"grpc-encoding": "gzip"}, status=TOO_LARGE
    ),
    "compressed, nobody knows how": Case(
        body=framed(PACKED, 1), status=INVALID, said="no grpc-encoding says how", elsewhere=INTERNAL
    ),
    "an unknown encoding": Case(
        body=framed(PACKED, 1),
        headers={"grpc-encoding": "br"},
        status=NOT_KNOWN,
        said='"br" is not known; known: identity, gzip, deflate',
        elsewhere=INTERNAL,
    ),
    "an unknown encoding, unused": Case(headers={"grpc-encoding": "br"}, status="OK", elsewhere=INTERNAL),
    # headers
    **{
        f'timeout "{text}"': Case(
            headers={"grpc-timeout": text}, status=INVALID, said="malformed; expected", elsewhere=INTERNAL
        )
        for text in ("", "5", "S", "5X", "-1S", "1.5S", "1s")
    },
    "a timeout of nine digits": Case(
        headers={"grpc-timeout": "123456789S"}, status=INVALID, said="malformed; expected", elsewhere=ANSWERS
    ),
    "no time at all": Case(headers={"grpc-timeout": "0n"}, status="DEADLINE_EXCEEDED"),
    "no te": Case(headers={"te": None}, status=INVALID, said="te: trailers", elsewhere=RESETS),
    "metadata that are no base64": Case(
        headers={"x-bin": "!?"}, status=INVALID, said="x-bin is not base64", elsewhere=INTERNAL
    ),
    "55 KB of metadata": Case(
        headers={f"x-{number}": "a" * 1000 for number in range(55)},
        status=TOO_LARGE,
        said="received metadata size exceeds hard limit (",
        elsewhere=SOME_TIMES,
    ),
    "950 metadata": Case(
        headers={f"x-{number}": "a" for number in range(950)},
        status=TOO_LARGE,
        said="(950 vs. 900 values)",
        elsewhere=SOME_TIMES,
    ),
    "a thousand metadata in one header": Case(
        headers={"x-bin": ",".join(1000 * ["AA"])}, status=TOO_LARGE, said="(1000 vs. 900 values)", elsewhere=INTERNAL
    ),
    "100 KB of headers": Case(
        headers={f"x-{number}": "a" * 100 for number in range(1000)}, status="HTTP 431", elsewhere=SOME_TIMES
    ),
    "JSON": Case(headers={"content-type": "application/json"}, status="HTTP 415", elsewhere=ANSWERS),
    "no content type": Case(headers={"content-type": None}, status="HTTP 415", elsewhere=ANSWERS),
    "GET": Case(headers={":method": "GET"}, status="HTTP 405", elsewhere=RESETS),
    "PUT": Case(headers={":method": "PUT"}, status="HTTP 405", elsewhere=RESETS),
    "no path": Case(headers={":path": None}, status="RESET"),
    "a path that is none": Case(headers={":path": "x"}, status="RESET", elsewhere={"grpcio": {NOT_KNOWN}}),
    "an unknown method": Case(headers={":path": "/a.B/C"}, status=NOT_KNOWN),
    # streams
    "a stream with part of a message": Case(
        headers={":path": WATCH}, body=b"\0\0\0", status=INVALID, said="within a message", elsewhere=ANSWERS
    ),
    "a stream with flag 2": Case(
        headers={":path": WATCH},
        body=framed(b"", 2),
        status=INVALID,
        said="is 0 or 1; got 2",
        elsewhere={"grpcio": {"DEADLINE_EXCEEDED", "OK"}},
    ),
    "a stream with 2 GiB": Case(headers={":path": WATCH}, body=framed(b"", 0, 1 << 31), status=TOO_LARGE),
    "a stream with gzip that is none": Case(
        headers={":path": WATCH, "grpc-encoding": "gzip"},
        body=framed(b"no gzip at all", 1),
        status=INVALID,
        elsewhere=INTERNAL,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_told_so_and_others_live_on(
    client: Client, peer: Any, gateway: Any, transport: str, case: Case, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    log, attempts = peer.text(), gateway.attempts()
    elsewhere = case.elsewhere.get(transport)
    hurry = {"grpc-timeout": "300m"} if elsewhere is not None and "DEADLINE_EXCEEDED" in elsewhere else {}
    with others_live_on(client, tmp_path / "gate", wait_for):
        answer = client.call(case.body, {**case.headers, **hurry})
        if elsewhere is not None:
            assert str(answer) in elsewhere
        else:
            assert str(answer) == case.status
            assert case.said in answer.text
    if elsewhere is None:
        assert peer.text() == log, "bad input must not fill the log"
        after = gateway.attempts()
        assert {outcome for outcome in after if after[outcome] > attempts.get(outcome, 0)} <= {"success", "neutral"}


TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + bytes(252)
OTHER_PROTOCOLS = {
    "HTTP/1.1": b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/grpc\r\nContent-Length: 3\r\n\r\nabc"
    % INFER.encode(),
    "HTTP/1.1 that asks for HTTP/2": b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    "HTTP/1.1 without an end": b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000,
    "TLS": TLS_HELLO,
    "part of a preface": b"PRI * HTTP/2.0\r\n\r\nSM",
    "a preface and text": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100_000),
    "nothing": b"",
}


@pytest.mark.parametrize("said", OTHER_PROTOCOLS.values(), ids=OTHER_PROTOCOLS)
def test_p3_another_protocol_ends_its_own_connection_only(
    client: Client, peer: Any, gateway: Any, said: bytes, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    log, attempts = peer.text(), gateway.attempts()
    host, _, port = peer.address.rpartition(":")
    with (
        others_live_on(client, tmp_path / "gate", wait_for),
        socket.create_connection((host, int(port)), timeout=PATIENCE_S) as other,
        suppress(ConnectionError),
    ):
        other.sendall(said)
        with suppress(OSError):  # it has been closed already
            other.shutdown(socket.SHUT_WR)
        while other.recv(65536):
            pass
    assert peer.text() == log
    after = gateway.attempts()
    assert {outcome for outcome in after if after[outcome] > attempts.get(outcome, 0)} <= {"success", "neutral"}


def test_a_refused_encoding_comes_with_those_that_are_known(client: Client, transport: str) -> None:
    answer = client.call(framed(PACKED, 1), {"grpc-encoding": "br"})
    if transport != "grpcio":  # which says INTERNAL, and no more
        assert answer.headers["grpc-accept-encoding"] == "identity,gzip,deflate"


def test_a_call_whose_message_never_comes_ends_at_its_deadline(
    client: Client, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    with others_live_on(client, tmp_path / "gate", wait_for):
        began = time.monotonic()
        answers = [client.call(body, {"grpc-timeout": "200m"}, end=False) for body in (b"", b"\0\0", framed(CALL)[:-1])]
        assert [str(answer) for answer in answers] == ["DEADLINE_EXCEEDED"] * 3
        assert 0.55 < time.monotonic() - began < 10


def test_calls_that_are_reset_half_way_are_forgotten(
    client: Client, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    with others_live_on(client, tmp_path / "gate", wait_for):
        for body in (b"", b"\0\0", framed(CALL)[:-1], framed(CALL)) * 25:
            stream = client.begin(headers({"grpc-timeout": None}))
            client.send(stream, body, end=False)
            client.reset(stream)


def test_a_message_in_pieces_is_one_message(client: Client) -> None:
    stream = client.begin(headers())
    body = framed(CALL)
    for number, byte in enumerate(body, 1):
        client.send(stream, bytes([byte]), end=number == len(body))
    assert str(client.answer(stream)) == "OK"


def test_an_end_that_comes_by_itself_is_an_end(client: Client) -> None:
    stream = client.begin(headers())
    client.send(stream, framed(CALL), end=False)
    client.send(stream, b"", end=True)
    assert str(client.answer(stream)) == "OK"


@pytest.mark.parametrize("announced", [1 << 31, (1 << 32) - 1, 100], ids=["2 GiB", "4 GiB", "100 bytes"])
def test_what_is_over_the_limit_is_not_taken_in(client: Client, peer: Any, announced: int) -> None:
    """Nor is what goes on after the message; that it is no message is told at once."""
    body = framed(bytes(100_000_000), 0, announced)
    before = peer.resident()
    for _ in range(3):
        stream = client.begin(headers())
        sent = client.send(stream, body, end=True)
        answer = client.answer(stream)
        assert str(answer) == (TOO_LARGE if announced > 100 else INVALID)
        assert sent < 40_000_000
    assert peer.resident() - before < 64_000_000
    assert str(client.call(framed(CALL))) == "OK"
