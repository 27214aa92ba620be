"""What broke other data planes on HTTP/2: public issues of h2, hyper, grpc-go, linkerd and Envoy, as tests of ours."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import (
    AttemptCancelled,
    Code,
    InferenceError,
    NodeFailed,
    NodeOverloaded,
    NodeUnreachable,
    Unimplemented,
)
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    WARM,
    CoroutineService,
    DirectService,
    Hold,
    ask,
    connected,
    echo,
    error_of,
    has_refused,
    official,
    serving,
    warm,
)
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Connection, Ended, Exchange, Limits, Trailers
from dl_inference_core.wire import protocol

native = pytest.importorskip("dl_inference_native", exc_type=ImportError)

MESSAGE = b"\x0a\x05hello"
FRAME = b"\0\0\0\0\x07" + MESSAGE
GRPC = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


def make(**options: Any) -> Any:
    return native.NativeTransport(native.NativeTransport.Options(**options))


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - an I/O thread sets no event
            await asyncio.sleep(0.02)


Answer = Callable[[h2.connection.H2Connection, int, int], None]
"""Answers a whole request: `(connection, stream, how many came before)`."""


@asynccontextmanager
async def node(answer: Answer) -> AsyncIterator[str]:
    """The address of an HTTP/2 server that answers each request so, as no official server would."""
    before = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal before
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        http.initiate_connection()
        writer.write(http.data_to_send())
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(65536):
                if http.state_machine.state is h2.connection.ConnectionState.CLOSED:
                    continue  # it has said goodbye
                for event in http.receive_data(received):
                    if isinstance(event, h2.events.DataReceived):
                        http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    if isinstance(event, h2.events.StreamEnded):
                        answer(http, event.stream_id, before)
                        before += 1
                writer.write(http.data_to_send())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def outcome(answer: Answer) -> bytes | InferenceError:
    async with node(answer) as address, connected(make(), address) as connection:
        try:
            return bytes(await ask(connection, ECHO, MESSAGE, timeout_s=20))
        except InferenceError as error:
            return error


# Answers of nodes


async def test_a_reset_without_an_error_after_a_whole_answer_takes_nothing_of_it() -> None:
    def answer(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, GRPC)
        http.send_data(stream, FRAME)
        http.send_headers(stream, OK, end_stream=True)
        # h2 itself would not send it any more.
        http._data_to_send += b"\0\0\4\3\0" + stream.to_bytes(4, "big") + bytes(4)

    assert await outcome(answer) == MESSAGE


@pytest.mark.parametrize("status", ["429", "502", "503", "504"])
async def test_what_something_in_between_answers_is_the_nodes_unreachability(status: str) -> None:
    def answer(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, [(":status", status), ("content-type", "text/html")])
        http.send_data(stream, b"<html>busy</html>", end_stream=True)

    error = await outcome(answer)
    assert isinstance(error, NodeUnreachable)
    assert f"HTTP {status}" in str(error)


async def test_other_plain_answers_are_what_grpc_says_they_are() -> None:
    for status, expected in (("404", Unimplemented), ("500", NodeFailed), ("200", NodeFailed)):

        def answer(http: Any, stream: int, _: int, status: str = status) -> None:
            http.send_headers(stream, [(":status", status)])
            http.send_data(stream, b"no gRPC", end_stream=True)

        assert isinstance(await outcome(answer), expected)


async def test_a_failure_is_told_wherever_it_comes() -> None:
    status = [("grpc-status", "8"), ("grpc-message", "as told"), ("x-load", "1")]

    def at_once(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, GRPC + status, end_stream=True)

    def after_headers(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, GRPC)
        http.send_headers(stream, status, end_stream=True)

    def after_a_message(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, GRPC)
        http.send_data(stream, FRAME)
        http.send_headers(stream, status, end_stream=True)

    for answer in (at_once, after_headers, after_a_message):
        error = await outcome(answer)
        assert isinstance(error, NodeOverloaded)
        assert str(error) == "as told"
        assert list(error.trailers) == [("x-load", "1")]


async def test_a_request_that_the_node_has_not_looked_at_is_sent_again() -> None:
    def goodbye(http: Any, stream: int, before: int) -> None:
        if before == 0:
            http.close_connection(h2.errors.ErrorCodes.NO_ERROR, last_stream_id=0)
        else:
            good(http, stream, before)

    def refused(http: Any, stream: int, before: int) -> None:
        if before == 0:
            http.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
        else:
            good(http, stream, before)

    def good(http: Any, stream: int, _: int) -> None:
        http.send_headers(stream, GRPC)
        http.send_data(stream, FRAME)
        http.send_headers(stream, OK, end_stream=True)

    assert await outcome(goodbye) == MESSAGE
    assert await outcome(refused) == MESSAGE


async def test_a_request_that_the_node_may_have_looked_at_is_not() -> None:
    count = 0

    def reset(http: Any, stream: int, before: int) -> None:
        nonlocal count
        count = before + 1
        http.reset_stream(stream, h2.errors.ErrorCodes.INTERNAL_ERROR)

    assert isinstance(await outcome(reset), NodeFailed)
    assert count == 1


async def test_a_node_whose_connections_live_for_a_second_costs_no_request() -> None:
    answer = b"x" * (4 << 20)

    async def large(exchange: Exchange) -> bytes:
        await asyncio.sleep(0.05)
        return answer

    calls = 0
    async with (
        serving(make(connection_age_s=1), {ECHO: large}) as address,
        connected(make(), address) as connection,
    ):
        end = time.monotonic() + 4

        async def keep_on() -> None:
            nonlocal calls
            while time.monotonic() < end:
                assert len(await ask(connection)) == len(answer)
                calls += 1

        await asyncio.gather(*(keep_on() for _ in range(4)))
    assert calls > 4


# Connections that many share


@asynccontextmanager
async def gateway(address: str, done: Callable[..., object]) -> AsyncIterator[tuple[str, Any, Connection]]:
    """A server that forwards to the method HOLD of a node, and to ECHO where the message is not MESSAGE."""
    transport = make()

    def begin(exchange: Exchange) -> None:
        method = HOLD if exchange.message == MESSAGE else ECHO
        exchange.state = exchange.forward(connection, method, done)

    async with connected(transport, address) as connection:
        server = await transport.serve(DirectService(begin), ("127.0.0.1:0",), Limits())
        try:
            yield f"127.0.0.1:{server.ports[0]}", transport, connection
        finally:
            await server.drain(0)


async def test_thousands_of_cancelled_forwards_end_no_other_call() -> None:
    """h2 counts resets over a connection's life, 1,024 by default, and then ends all that is in flight."""
    hold = Hold()
    cancelled = 0

    def done(ended: Sequence[Ended]) -> None:
        nonlocal cancelled
        cancelled += sum(isinstance(error, AttemptCancelled) for _, error, _, _ in ended)

    async with (
        serving(make(), {HOLD: hold, ECHO: echo}) as address,
        gateway(address, done) as (front, _, _),
        official(front) as leaving,
        official(front) as channel,
    ):
        staying = channel.unary_unary(ECHO)(MESSAGE, timeout=50)
        await hold.was_entered()
        for _ in range(40):
            calls = [leaving.unary_unary(ECHO)(MESSAGE) for _ in range(75)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            assert await channel.unary_unary(ECHO)(b"\x0a\x01x", timeout=10) == b"\x0a\x01x"
        hold.release.set()
        assert await staying == MESSAGE
    assert cancelled > 1100


async def test_answers_that_nobody_reads_stop_no_neighbour() -> None:
    """Each fills a window of its client's; the connection to the node is the same for all."""
    large = b"\x0a\x80\x80\x40" + bytes(1 << 20)

    async def answer(exchange: Exchange) -> bytes:
        return large if exchange.message == MESSAGE else bytes(exchange.message)

    async with (
        serving(make(), {HOLD: answer, ECHO: answer}) as address,
        gateway(address, lambda *_: None) as (front, transport, _),
        official(front) as channel,
    ):
        host, _, port = front.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        http.initiate_connection()
        for _ in range(100):
            stream = http.get_next_available_stream_id()
            head = {":method": "POST", ":scheme": "http", ":path": ECHO, ":authority": "x", "te": "trailers"}
            http.send_headers(stream, [*head.items(), ("content-type", "application/grpc")])
            http.send_data(stream, FRAME, end_stream=True)
        writer.write(http.data_to_send())
        await until(lambda: transport._threads.buffered_bytes() > 90 << 20)
        for number in range(200):
            message = b"\x10" + bytes([number % 100])
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message
        writer.close()
        await until(lambda: transport._threads.buffered_bytes() < 1 << 20)
        assert reader is not None


async def test_a_thousand_requests_in_flight_on_one_connection_go_on() -> None:
    message = bytes(10_000)
    async with serving(make(), {ECHO: echo}) as address, connected(make(), address) as connection:
        await warm(connection)
        left = iter(range(10_000))

        async def some() -> None:
            for _ in left:
                assert await ask(connection, ECHO, message) == message

        await asyncio.gather(*(some() for _ in range(1000)))


# Memory


async def test_messages_over_the_budget_are_refused_until_others_have_gone() -> None:
    hold, transport = Hold(), make(buffer_mb=16)
    large = bytes(3 << 20)
    async with serving(transport, {HOLD: hold, WARM: echo}) as address, connected(make(), address) as connection:
        held = [asyncio.ensure_future(ask(connection, HOLD, large)) for _ in range(5)]
        await until(lambda: transport._threads.buffered_bytes() > 5 * len(large))
        error = await error_of(ask(connection, HOLD, large))
        assert error.code is Code.RESOURCE_EXHAUSTED
        assert error.another_node, "another node may have room"
        await has_refused(transport, buffer=1)
        await warm(connection)
        hold.release.set()
        for call in held:
            assert await call == large
        assert await ask(connection, HOLD, large) == large
    await until(lambda: transport._threads.buffered_bytes() == 0)


# Who speaks something else


async def test_tls_and_clear_text_say_within_a_second_that_they_do_not_fit(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    tls = authority.issue().server()
    encrypting, plain = make(), make()
    async with serving(encrypting, tls=tls) as secure, serving(plain) as clear:
        began = time.monotonic()
        async with connected(make(), secure) as connection:
            error = await error_of(ask(connection, WARM, timeout_s=10))
        assert "the node speaks TLS, and this connection does not" in str(error)
        async with connected(make(), clear, tls=authority.client()) as connection:
            error = await error_of(ask(connection, WARM, timeout_s=10))
        assert "the TLS handshake failed" in str(error)
        assert time.monotonic() - began < 5
        for said in (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
            host, _, port = clear.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            async with asyncio.timeout(5):
                answer = await reader.read()
            expected = b"needs HTTP/2" if said.startswith(b"GET") else b"speaks clear text, not TLS"
            assert expected in answer
            writer.close()
        await has_refused(encrypting, handshake=1)
        await has_refused(plain, other_protocol=3)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, ACKNOWLEDGED = b"\0\0\0\x04\0\0\0\0\0", b"\0\0\0\x04\x01\0\0\0\0"


@pytest.mark.parametrize(
    ("option", "said", "refused"),
    [
        ("headers_timeout_s", b"", "handshake_time"),
        ("headers_timeout_s", PREFACE[:10], "handshake_time"),
        ("keepalive_s", PREFACE + SETTINGS + ACKNOWLEDGED, "silence"),
        ("idle_timeout_s", PREFACE + SETTINGS + ACKNOWLEDGED, "silence"),  # it answers nothing of the goodbye
    ],
)
async def test_who_says_no_more_is_closed(option: str, said: bytes, refused: str) -> None:
    transport = make(keepalive_timeout_s=1, **{"keepalive_s": 2, option: 1})
    async with serving(transport) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                while await reader.read(1000):
                    pass
        assert time.monotonic() - began > 0.5
        writer.close()
        await has_refused(transport, **{refused: 1})


# Messages


@settings(max_examples=500)
@given(
    st.binary(max_size=40)
    | st.lists(
        st.sampled_from([b"\x08", b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x09", b"\x80", b"\xff", b"\x01", b"\0"])
    ).map(b"".join)
)
@example(b"\x0a\x85\x80\x80\x80\x80\x00abcde")
@example(b"\xf8\xff\xff\xff\x1f\x00")
def test_a_message_is_well_formed_where_the_core_says_so(message: bytes) -> None:
    assert native._native.well_formed(message) == protocol.well_formed(message)


async def test_the_trailers_of_a_node_are_those_of_its_answer() -> None:
    told: list[Trailers] = []

    async def answer(exchange: Exchange) -> Any:
        from dl_inference_core.transport import Answer as Answered

        return Answered(MESSAGE, (("x-load", "1"), ("x-private", "2")))

    def done(ended: Sequence[Ended]) -> None:
        told.extend(trailers for _, _, trailers, _ in ended)

    server = await (transport := make()).serve(CoroutineService({HOLD: answer}), ("127.0.0.1:0",), Limits())
    async with gateway(f"127.0.0.1:{server.ports[0]}", done) as (front, _, _), official(front) as channel:
        call = channel.unary_unary(ECHO)(MESSAGE, timeout=10)
        assert await call == MESSAGE
        assert [tuple(each) for each in await call.trailing_metadata()] == [("x-load", "1")]
    await server.drain(0)
    assert told == [(("x-load", "1"), ("x-private", "2"))]
    assert transport is not None
