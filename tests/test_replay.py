"""The load generator, against real servers: what it sends, and what it says of what came back."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import StreamEnded

from bench import bodies, certificate, own, processes, reconciling, replay
from bench.contract import HEALTH, SERVING
from bench.load import Load, LoadError
from bench.replay import Lasting, Replay, Traffic
from dl_inference_core.config import ServerTls
from dl_inference_core.errors import Code, InferenceError, NodeOverloaded
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.testing.loopback import CoroutineService, free_port
from dl_inference_core.transport import Exchange, Limits, Server
from dl_inference_core.wire.protocol import PROTOCOLS

pytestmark = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed: no load generator")

METHOD = PROTOCOLS["openinference"].node_method
MESSAGES = bodies.one_row("openinference", "m", "x", (3,))
TRAFFIC = Traffic(path=METHOD, messages=MESSAGES)

Respond = Callable[[H2Connection, int], None]
"""Answers the request of a stream."""


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    """Outside of any test's half minute: it may take longer."""
    if shutil.which("cargo") is not None:
        replay.binary()


class Echo:
    """Answers with what it is sent, and keeps it. `before` is awaited first, with the number of the request."""

    def __init__(self, before: Callable[[int], Awaitable[None]] | None = None) -> None:
        self.messages: list[bytes] = []
        self.metadata: list[tuple[str, Any]] = []
        self._before = before

    async def answer(self, exchange: Exchange) -> bytes:
        message = bytes(exchange.message)
        self.messages.append(message)
        self.metadata = list(exchange.metadata)
        if self._before:
            await self._before(len(self.messages))
        return message


@asynccontextmanager
async def serving(answer: Callable[[Exchange], Awaitable[bytes]], **limits: int) -> AsyncIterator[tuple[str, Server]]:
    """The address of a server of our own transport, and the server."""
    transport = GrpcioTransport(GrpcioTransport.Options())
    server = await transport.serve(CoroutineService({METHOD: answer}), ("127.0.0.1:0",), Limits(**limits))
    try:
        yield f"127.0.0.1:{server.ports[0]}", server
    finally:
        await server.drain(0)


async def count(address: str, requests: int, in_flight: int = 8, traffic: Traffic = TRAFFIC, **how: Any) -> Replay:
    """On another thread, as the server is on this one."""
    amount = Load(requests=requests, clients=how.pop("connections", 1), streams=in_flight)
    return await asyncio.to_thread(replay.count, address, traffic, amount, **how)


async def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Status, output and errors of the load generator itself."""
    line = [str(replay.binary()), *map(str, arguments)]
    ended = await asyncio.to_thread(subprocess.run, line, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


# What is sent


async def test_all_bodies_are_sent_in_turn() -> None:
    node = Echo()
    async with serving(node.answer) as (address, _):
        seen = await count(address, requests=3 * len(MESSAGES), connections=2, in_flight=4)
    assert Counter(node.messages) == dict.fromkeys(MESSAGES, 3)
    assert (seen.ok, seen.statuses, seen.first_error) == (192, {"OK": 192}, "")
    assert 0 < seen.p50_ms <= seen.p90_ms <= seen.p99_ms <= seen.p999_ms <= seen.max_ms
    assert seen.requests_per_s == pytest.approx(192 / seen.seconds)
    assert seen.cpu_us_per_request > 0


async def test_metadata_goes_with_each_request() -> None:
    node = Echo()
    async with serving(node.answer) as (address, _):
        headers = ("x-routing-key: a", "x-other: b: c")
        seen = await count(address, 1, traffic=Traffic(path=METHOD, messages=MESSAGES, headers=headers))
    assert seen.ok == 1
    assert {("x-routing-key", "a"), ("x-other", "b: c")} <= set(node.metadata)


async def test_as_many_are_in_flight_as_asked_for() -> None:
    waiting, most, full = 0, 0, asyncio.Event()

    async def wait_for_all(_: int) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        if waiting == 12:
            full.set()
        await full.wait()
        await asyncio.sleep(0.001)
        waiting -= 1

    async with serving(Echo(wait_for_all).answer) as (address, _):
        seen = await count(address, requests=100, connections=3, in_flight=4)
    assert (seen.ok, most) == (100, 12)


async def test_large_messages_come_and_go_whole() -> None:
    large = tuple(bytes([number]) * 3_000_000 for number in range(3))
    async with serving(Echo().answer) as (address, _):
        seen = await count(address, 12, in_flight=4, traffic=Traffic(path=METHOD, messages=large, answers=large))
    assert (seen.ok, seen.mismatched, seen.first_error) == (12, 0, "")


@pytest.mark.parametrize("protocol", ["openinference", "tfserving"])
def test_bodies_differ_in_values_and_ids(protocol: str) -> None:
    codec = PROTOCOLS[protocol].codec
    for make, sizes in ((bodies.one_row, {1: 64}), (bodies.one_to_four_rows, {1: 16, 2: 16, 3: 16, 4: 16})):
        requests = [codec.decode_request(message) for message in make(protocol, "mmoe", "features", (62,))]
        arrays = [request.payload["features"] for request in requests]
        assert Counter(len(array) for array in arrays) == sizes
        assert {
            (request.model, array.shape[1:], array.dtype) for request, array in zip(requests, arrays, strict=True)
        } == {("mmoe", (62,), np.dtype(np.float32))}
        assert len(np.unique(np.concatenate(arrays)[:, 0])) == sum(map(len, arrays))
        assert protocol == "tfserving" or len({request.id for request in requests}) == 64
        assert make(protocol, "mmoe", "features", (62,)) == make(protocol, "mmoe", "features", (62,))


async def test_tls_is_spoken_with_whom_the_authority_vouches_for() -> None:
    node = Echo()
    transport = GrpcioTransport(GrpcioTransport.Options())
    with certificate.issued() as shown, certificate.issued() as other:
        tls = ServerTls(certificate=shown.chain, key=shown.key)
        server = await transport.serve(CoroutineService({METHOD: node.answer}), ("127.0.0.1:0",), Limits(), tls=tls)
        address = f"127.0.0.1:{server.ports[0]}"
        traffic = Traffic(path=METHOD, messages=MESSAGES, answers=MESSAGES, ca=shown.ca)
        try:
            seen = await count(address, 128, traffic=traffic)
            with pytest.raises(LoadError, match=f"no TLS with {re.escape(address)}.*certificate"):
                await count(address, 1, traffic=Traffic(path=METHOD, messages=MESSAGES, ca=other.ca))
        finally:
            await server.drain(0)
    assert (seen.ok, seen.first_error) == (128, "")
    assert Counter(node.messages) == dict.fromkeys(MESSAGES, 2)


# The nodes behind gateways


def test_an_echo_node_answers_on_all_its_ports_with_what_it_is_sent() -> None:
    with processes.announcing(str(replay.echo()), "3") as node:
        addresses = node.address.split(",")
        assert len(set(addresses)) == 3
        for address in addresses:
            for size in (600, 3_000_000):
                messages = bodies.of_bytes("openinference", "m", size)[:4]
                traffic = Traffic(path=METHOD, messages=messages, answers=messages)
                assert replay.count(address, traffic, Load(requests=20, clients=2, streams=4)).ok == 20
            health = Traffic(path=HEALTH, messages=(b"",), answers=(SERVING,))
            assert replay.count(address, health, Load(requests=1, clients=1, streams=1)).ok == 1


def test_a_load_lasts_as_long_as_it_is_to() -> None:
    with processes.announcing(str(replay.echo())) as node:
        seen = replay.last(node.address, TRAFFIC, Lasting(seconds=0.3, in_flight=32))
        assert seen.ok > 0
        assert seen.seconds >= 0.3
        wrong = Traffic(path=METHOD, messages=MESSAGES, answers=MESSAGES[::-1])
        with pytest.raises(LoadError, match=r"0 good answers, .* mismatched"):
            replay.last(node.address, wrong, Lasting(seconds=0.1, in_flight=8))


@pytest.mark.parametrize(("in_flight", "shape"), [(1, (1, 1)), (8, (8, 1)), (32, (16, 2)), (128, (16, 8))])
def test_requests_in_flight_are_shared_by_up_to_16_connections(in_flight: int, shape: tuple[int, int]) -> None:
    lasting = Lasting(seconds=1, in_flight=in_flight)
    assert (lasting.clients, lasting.streams) == shape


# What came back


async def test_answers_are_counted_by_status() -> None:
    errors: dict[int, InferenceError] = {0: NodeOverloaded("full"), 1: InferenceError("broken")}

    async def fail_two_in_four(number: int) -> None:
        if error := errors.get(number % 4):
            raise error

    async with serving(Echo(fail_two_in_four).answer) as (address, _):
        seen = await count(address, requests=40)
        with pytest.raises(LoadError, match=r"2 good answers to 4 requests, .*message"):
            await asyncio.to_thread(replay.run, address, TRAFFIC, Load(requests=4, clients=1, streams=1))
    names = {Code(error.code).name for error in errors.values()}
    assert seen.statuses == {"OK": 20, **dict.fromkeys(names, 10)}
    assert (seen.ok, seen.mismatched, seen.transport_errors) == (20, 0, 0)
    assert any(name in seen.first_error for name in names)
    assert seen.requests_per_s == pytest.approx(20 / seen.seconds)


async def test_an_answer_of_another_request_is_a_mismatch() -> None:
    async def answer(exchange: Exchange) -> bytes:
        message = bytes(exchange.message)
        return MESSAGES[5] if message == MESSAGES[4] else message

    async with serving(answer) as (address, _):
        seen = await count(address, 128, traffic=Traffic(path=METHOD, messages=MESSAGES, answers=MESSAGES))
    assert (seen.ok, seen.statuses, seen.mismatched) == (126, {"OK": 128}, 2)
    assert seen.first_error == "message 4: the answer differs from the expected one"


async def test_a_method_that_there_is_not_is_unimplemented() -> None:
    async with serving(Echo().answer) as (address, _):
        seen = await count(address, 10, traffic=Traffic(path="/no.Such/Method", messages=MESSAGES))
    assert (seen.ok, seen.statuses, seen.transport_errors) == (0, {"UNIMPLEMENTED": 10}, 0)
    assert (seen.requests_per_s, seen.p99_ms) == (0, 0)


async def test_a_server_that_ends_is_counted_and_not_waited_for() -> None:
    held = asyncio.Event()

    async def hold(number: int) -> None:
        if number > 20:
            held.set()
            await asyncio.Event().wait()

    async with serving(Echo(hold).answer) as (address, server):
        counting = asyncio.create_task(count(address, requests=1000))
        await held.wait()
        await server.drain(0)
        seen = await counting
    failed = sum(seen.statuses.values()) - seen.ok + seen.transport_errors
    assert seen.ok >= 20 - 8
    assert failed >= 1
    assert seen.ok + failed < 1000
    assert seen.first_error


def respond(status: str, data: bytes = b"", trailers: dict[str, str] | None = None) -> Respond:
    """An answer by HTTP/2: headers, then `data` and `trailers` if there are any."""

    def answer(connection: H2Connection, stream: int) -> None:
        connection.send_headers(stream, [(":status", status)], end_stream=trailers is None)
        if trailers is not None:
            connection.send_data(stream, data)
            connection.send_headers(stream, trailers.items(), end_stream=True)

    return answer


@asynccontextmanager
async def raw(answer: Respond) -> AsyncIterator[str]:
    """The address of a server that sends what it is told to, well-formed or not, for each request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(H2Configuration(client_side=False, validate_outbound_headers=False))
        connection.initiate_connection()
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, StreamEnded):
                    answer(connection, event.stream_id)
            writer.write(connection.data_to_send())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


OK_TRAILERS = {"grpc-status": "0"}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (respond("503"), "HTTP status 503"),
        (respond("200"), "no grpc-status"),
        (respond("200", b"\0\0\0\0\0", {"grpc-status": "99"}), 'the grpc-status "99"'),
        (respond("200", b"", OK_TRAILERS), "an OK answer has 0 bytes"),
        (respond("200", b"\0\0\0\0\2x", OK_TRAILERS), "1 bytes after its prefix, which says 2"),
        (respond("200", b"\1\0\0\0\1x", OK_TRAILERS), "is compressed"),
        (partial(H2Connection.reset_stream, error_code=ErrorCodes.REFUSED_STREAM), "refused stream"),
    ],
)
async def test_a_malformed_answer_is_a_transport_error(answer: Respond, error: str) -> None:
    async with raw(answer) as address:
        seen = await count(address, requests=20, in_flight=4)
    assert (seen.ok, seen.statuses, seen.transport_errors) == (0, {}, 20)
    assert error in seen.first_error


async def test_an_error_may_have_its_status_in_its_only_headers() -> None:
    def answer(connection: H2Connection, stream: int) -> None:
        connection.send_headers(stream, [(":status", "200"), ("grpc-status", "14")], end_stream=True)

    async with raw(answer) as address:
        seen = await count(address, requests=20, in_flight=4)
    assert (seen.statuses, seen.transport_errors) == ({"UNAVAILABLE": 20}, 0)


async def test_a_connection_that_the_server_gives_up_is_counted() -> None:
    def answer(connection: H2Connection, stream: int) -> None:
        respond("200", b"\0\0\0\0\0", OK_TRAILERS)(connection, stream)
        if stream >= 9:  # the fifth
            connection.close_connection()

    async with raw(answer) as address:
        seen = await count(address, requests=20, in_flight=1)
    assert (seen.ok, seen.transport_errors) == (5, 1)


async def test_a_server_without_http2_is_a_transport_error() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        seen = await count(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", 4, in_flight=1)
    assert (seen.ok, seen.statuses) == (0, {})
    assert seen.transport_errors >= 1


def test_the_counts_are_those_of_the_server() -> None:
    http = free_port()
    with processes.announcing(str(replay.echo())) as echo:
        route = f'[[routes]]\nname = "m"\nnodes = ["{echo.address}"]\n'
        with own.serving("grpcio", f"http_port = {http}\n{route}") as gateway:
            metrics = f"http://127.0.0.1:{http}/metrics"
            for messages in (MESSAGES, bodies.one_row("openinference", "unknown", "x", (3,))):
                before = reconciling.ok_answers(metrics)
                traffic = Traffic(path=METHOD, messages=messages)
                seen = replay.count(gateway.address, traffic, Load(requests=100, clients=1, streams=8))
                assert seen.ok == (100 if messages is MESSAGES else 0), seen.first_error
                assert reconciling.grown(metrics, before, seen.ok) == seen.ok


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_a_short_run_of_the_agreement_has_every_figure_and_equal_counts() -> None:
    pytest.importorskip("torch")
    command = (sys.executable, "-m", "bench.agreement", "--rounds", "1", "--seconds", "0.3", "--in-flight", "4")
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr  # in so short a run the ratios may be anything
    rows = [[cell.strip() for cell in line.split("\u2502")[2:-1]] for line in run.stdout.splitlines()]
    counts = {row[0]: row[1:3] for row in rows if row and row[0].startswith("OK answers")}
    assert set(counts) == {"OK answers, one row", "OK answers, one to four rows"}
    for server, client in counts.values():
        assert int(client) == int(server) > 0
    figures = [(row[0], row[2]) for row in rows if len(row) == 6]
    ours = {
        (figure, client)
        for figure in ("requests/s", "mean, ms", "median, ms")
        for client in ("bench", "load generator")
    }
    assert ours <= set(figures)


def test_clients_agree_whose_median_ratio_is_within_5_percent() -> None:
    near = reconciling.ratio([100, 100, 100], [104, 50, 105])
    assert near == reconciling.Ratio(theirs="100.0", ours="104.0", ratios=("1.040", "0.500 1.050"), agrees=True)
    assert not reconciling.ratio([100], [106]).agrees
    assert not reconciling.ratio([100], [94]).agrees


# The open loop


async def test_an_open_loop_keeps_its_rate() -> None:
    async with serving(Echo().answer) as (address, _):
        seen = await count(address, requests=101, in_flight=32, rate=200)
    assert seen.ok == 101
    assert 0.5 <= seen.seconds < 10  # the last request is due after half a second


async def test_latency_in_an_open_loop_starts_when_a_request_is_due() -> None:
    async def pause(number: int) -> None:
        if number == 1:
            await asyncio.sleep(1)

    async with serving(Echo(pause).answer) as (address, _):
        opened = await count(address, requests=51, in_flight=1, rate=100)
    async with serving(Echo(pause).answer) as (address, _):
        closed = await count(address, requests=51, in_flight=1)
    # Request n is due after n / 100 s and answered after one second at the earliest.
    assert opened.p50_ms >= 749
    assert opened.mean_ms >= 749
    assert closed.max_ms >= 999
    assert closed.p50_ms < opened.p50_ms


# The command


async def test_a_load_of_seconds_and_its_warm_up_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "bodies").write_bytes(b"\0\0\0\x01x")
    node = Echo()
    async with serving(node.answer) as (address, _):
        how = ("--address", address, "--path", METHOD, "--bodies", tmp_path / "bodies", "--in-flight", "4")
        status, output, errors = await command(*how, "--seconds", "0.5", "--warm-up", "0.25")
    assert (status, errors) == (0, "")
    told = json.loads(output)
    assert min(told["ok"], told["warm_up"]["ok"]) > 0
    assert told["ok"] + told["warm_up"]["ok"] == len(node.messages)
    assert told["seconds"] >= 0.5
    assert told["cpu_us_per_request"] == pytest.approx(told["cpu_s"] / told["ok"] * 1e6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no message"),
        (b"\0\0\0\x02x", "is malformed: message 0 has 1 of its 2 bytes"),
        (None, "cannot read .*No such file"),
    ],
    ids=["empty", "cut", "missing"],
)
async def test_a_file_that_cannot_be_used_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bodies").write_bytes(content)
    how = ("--address", "127.0.0.1:1", "--path", METHOD, "--bodies", tmp_path / "bodies", "--requests", "1")
    status, output, errors = await command(*how)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert re.search(message, errors)


async def test_a_server_that_does_not_answer_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "bodies").write_bytes(b"\0\0\0\x01x")

    async def hang(_: int) -> None:
        await asyncio.Event().wait()

    async with serving(Echo(hang).answer) as (address, _):
        how = ("--address", address, "--path", METHOD, "--bodies", tmp_path / "bodies", "--in-flight", "3")
        status, _, errors = await command(*how, "--requests", "9", "--stall", "0.2")
    assert (status, errors) == (2, "error: 3 requests are in flight, and no answer has come for 200ms\n")


async def test_where_nobody_listens_is_said() -> None:
    with pytest.raises(LoadError, match=r"cannot connect to 127\.0\.0\.1:.*refused"):
        await count(f"127.0.0.1:{free_port()}", 1)


async def test_a_server_that_takes_fewer_at_once_is_an_error() -> None:
    async with serving(Echo().answer, streams=5) as (address, _):
        with pytest.raises(LoadError, match="takes 5 requests on a connection; 8 were to be in flight"):
            await count(address, 100)


async def test_answers_must_be_as_many_as_messages() -> None:
    with pytest.raises(LoadError, match="2 answers; expected one for each of the 64 messages"):
        await count("127.0.0.1:1", 1, traffic=Traffic(path=METHOD, messages=MESSAGES, answers=MESSAGES[:2]))


def test_without_cargo_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoadError, match=r"cargo is not installed.*https://rustup\.rs"):
        replay.binary.__wrapped__()
