"""Where the time of one request to a node goes, stage by stage: the figures of `bench.timed_node` and of its client."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import cycle, islice, pairwise
from pathlib import Path

import hpack

from bench import bodies
from bench.load import LoadError
from bench.model_servers import measuring, starting
from bench.model_servers.models import MODELS
from bench.processes import announcing
from bench.timed_node import POINTS
from dl_inference_core.wire.protocol import PROTOCOLS

NAME = "stages"
COLUMNS = ("stage", "until", "median µs", "10 % to 90 % µs")
_MODEL = MODELS["mmoe"]
_METHOD = PROTOCOLS["openinference"].node_method
_REQUESTS = 3000
"""One after another: 1 or 2 s. Medians of two such runs differ by a few per cent."""
_WARM_UP = 500
"""Requests before: the model, the codecs and the branch predictors are cold at first."""
STAGES = {
    "receive": "the transport calls the core (kernel, a thread that wakes, HTTP/2, the message, its key)",
    "key": "the request goes into the queue of its model (the key looked up, admission)",
    "queue": "the model's thread has taken it (a thread that wakes)",
    "batch": "the model is called (decoded, checked, put together)",
    "model": "the model returns",
    "encode": "the answer is handed to the transport (taken apart, encoded)",
    "send": "the client has it (a thread that wakes, HTTP/2, kernel)",
}
"""By stage, when it ends; each begins where the one before ends, the first when the client sends."""
NOTE = """\
A node on the transport `native` with the MMoE, asked by one client over one connection, one request at a time. The
client and functions of the node write down the time of the machine's one clock; a stage is the difference of two of
them. The client is a socket with requests that are encoded already. Writing down takes about 0.3 µs for each stage,
which is part of the figures. With many requests in flight, waking threads is shared by all that come at one time.
"""

# HTTP/2's frames and flags, RFC 9113 section 6.
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_FRAME_HEAD = 9
_WINDOW = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Attributes:
    us: by stage, the µs of each request; "in all" is from sending to the answer.
    """

    us: Mapping[str, Sequence[float]]

    def lines(self) -> list[tuple[str, ...]]:
        """As `COLUMNS` has them."""
        lines: list[tuple[str, ...]] = []
        for name, each in self.us.items():
            low, *_, high = statistics.quantiles(each, n=10)
            lines.append((name, STAGES.get(name, ""), f"{statistics.median(each):.1f}", f"{low:.1f} to {high:.1f}"))
        return lines

    def values(self) -> dict[str, float]:
        """For JSON: the medians."""
        return {name: statistics.median(each) for name, each in self.us.items()}


def installed() -> bool:
    """Whether there is what it measures."""
    try:
        return all(metadata.version(name) for name in ("dl-inference-native", "dl-inference-torch-backend"))
    except metadata.PackageNotFoundError:
        return False


def measure(share: float) -> Stages:
    """Args:
    share: of the requests that a full measurement has.

    Raises:
        LoadError: a request was not answered well.
    """
    messages = bodies.one_row("openinference", _MODEL.name, _MODEL.input, _MODEL.shape)
    count = max(round(_REQUESTS * share), 20)
    with tempfile.TemporaryDirectory() as place, measuring.made(_MODEL) as (folder, _):
        toml = starting.model_toml(_MODEL, starting.Setting(values={"delay_us": 0}))
        (folder / _MODEL.name / "model.toml").write_text(toml, encoding="utf-8")
        config, log = Path(place) / "server.toml", Path(place) / "log.json"
        config.write_text(
            f'port = 0\ntransport = "native"\n[models]\ndirectory = {str(folder)!r}\n'
            f"[backends.torch]\nintra_op_threads = {_MODEL.threads}\n",
            encoding="utf-8",
        )
        with announcing(sys.executable, "-m", "bench.timed_node", str(config), str(log)) as server:
            asked = _ask(server.address, messages, round(_WARM_UP * share) + count)
        told = json.loads(log.read_text())
    return Stages(us=split(asked[-count:], [told[point][-count:] for point in POINTS]))


def split(asked: Sequence[tuple[int, int]], told: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """The µs of each stage, and in all.

    Args:
        asked: when each request was sent and answered, in ns.
        told: by point of `timed_node.POINTS`, when each request passed it.

    Raises:
        LoadError: the node has not noted each request once, or in another order.
    """
    if any(len(times) != len(asked) for times in told):
        raise LoadError(f"the node noted {[len(times) for times in told]} times for {len(asked)} requests")
    us: dict[str, list[float]] = {name: [] for name in (*STAGES, "in all")}
    for (sent, received), *noted in zip(asked, *told, strict=True):
        times = (sent, *noted, received)
        if sorted(times) != list(times):
            raise LoadError(f"the times of a request are not in their order: {times}")
        for name, (begin, end) in zip(STAGES, pairwise(times), strict=True):
            us[name].append((end - begin) / 1000)
        us["in all"].append((received - sent) / 1000)
    return us


def _ask(address: str, messages: Sequence[bytes], count: int) -> list[tuple[int, int]]:
    """When each of `count` requests, one after another, was sent and answered, in ns of `time.monotonic_ns`."""
    host, _, port = address.rpartition(":")
    with closing(_Client(host, int(port))) as client:
        return [client.ask(message) for message in islice(cycle(messages), count)]


class _Client:
    """HTTP/2 with as little as can be: one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": _METHOD,
            ":authority": f"{host}:{port}",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        # Without a table on the server's side, so that all requests have the same bytes.
        self._headers = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*each) for each in headers.items()])
        self._decoder = hpack.Decoder()
        self._received = b""
        self._stream = 1
        settings = (4).to_bytes(2, "big") + _WINDOW.to_bytes(4, "big")  # SETTINGS_INITIAL_WINDOW_SIZE
        window = (_WINDOW).to_bytes(4, "big")
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, window)
        )

    def ask(self, message: bytes) -> tuple[int, int]:
        """When the request was sent, and when the whole answer was here.

        Raises:
            LoadError: it is an error, or the connection has ended.
        """
        stream, self._stream = self._stream, self._stream + 2
        body = b"\0" + len(message).to_bytes(4, "big") + message
        request = _frame(_HEADERS, _END_HEADERS, stream, self._headers) + _frame(_DATA, _END_STREAM, stream, body)
        sent = time.monotonic_ns()
        self._socket.sendall(request)
        for kind, flags, payload in self._frames():
            if kind == _SETTINGS and not flags & _ACK:
                self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _PING and not flags & _ACK:
                self._socket.sendall(_frame(_PING, _ACK, 0, payload))
            elif kind == _HEADERS and flags & _END_STREAM:
                received = time.monotonic_ns()
                if dict(self._decoder.decode(payload, raw=True)).get(b"grpc-status") != b"0":
                    raise LoadError("a request was not answered well")
                return sent, received
            elif kind == _HEADERS:
                self._decoder.decode(payload)
        raise LoadError("the connection has ended")

    def close(self) -> None:
        self._socket.close()

    def _frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and payload of what comes, until GOAWAY or the end."""
        while True:
            while len(self._received) >= _FRAME_HEAD:
                length = int.from_bytes(self._received[:3], "big")
                if len(self._received) < _FRAME_HEAD + length:
                    break
                kind, flags = self._received[3], self._received[4]
                payload = self._received[_FRAME_HEAD : _FRAME_HEAD + length]
                self._received = self._received[_FRAME_HEAD + length :]
                if kind == _GOAWAY:
                    return
                yield kind, flags, payload
            more = self._socket.recv(65536)
            if not more:
                return
            self._received += more


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
