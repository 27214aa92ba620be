"""The suite for transports, over real sockets: calls here; exchanges and forwarding in `transport_exchanges`,
servers in `transport_servers`, TLS in `transport_tls`, HTTP in `transport_http`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import grpc.aio
import pytest

from dl_inference_core.errors import (
    BadRequest,
    Blame,
    Code,
    DeadlineExceeded,
    InferenceError,
    MessageTooLarge,
    NodeFailed,
    from_status,
)
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    Hold,
    Recorder,
    ask,
    asynchronous,
    by_key,
    connected,
    echo,
    error_of,
    official,
    pair,
    serving,
    warm,
)
from dl_inference_core.testing.transport_exchanges import ExchangeConformance
from dl_inference_core.testing.transport_http import HttpConformance
from dl_inference_core.testing.transport_routing import RoutingConformance
from dl_inference_core.testing.transport_servers import ServerConformance
from dl_inference_core.testing.transport_tls import TlsConformance
from dl_inference_core.transport import Answer, Exchange, Limits, Message, Transport


class TransportConformance(ExchangeConformance, RoutingConformance, ServerConformance, TlsConformance, HttpConformance):
    """What every transport must keep, over real sockets on the loopback interface::

    class TestGrpcioTransport(TransportConformance):
        transport_class = GrpcioTransport
    """

    def test_is_a_transport_with_a_name(self) -> None:
        self._check_class(self.transport_class, Transport, ["connect"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.transport_class.Options, self.options)

    def test_channel_arguments_become_options_or_are_told(self) -> None:
        given: dict[str, int | str] = {"grpc.max_connection_age_ms": 60_000, "made.up": "x"}
        options, ignored = self.transport_class.of_channel_arguments(given)
        self.transport_class.Options(**{**self.options, **options})
        assert set(ignored) <= set(given)
        assert options or set(ignored) == set(given), "what is not ignored has an option"

    # Messages and metadata

    @pytest.mark.parametrize(
        "message", [b"", b"\0", bytes(range(256)), bytes(range(250)) * 4000], ids=["empty", "zero", "all", "1 MB"]
    )
    @asynchronous
    async def test_bytes_go_there_and_back(self, transport: Transport, message: bytes) -> None:
        seen: list[Exchange] = []

        async def reverse(exchange: Exchange) -> bytes:
            seen.append(exchange)
            return bytes(exchange.message[::-1])

        async with pair(transport, reverse) as connection:
            assert await ask(connection, ECHO, message) == message[::-1]
        assert [(exchange.method, exchange.message) for exchange in seen] == [(ECHO, message)]

    @asynchronous
    async def test_handlers_run_on_the_loop_that_made_the_server(self, transport: Transport) -> None:
        loops = []

        async def note(exchange: Exchange) -> bytes:
            loops.append(asyncio.get_running_loop())
            return b""

        async with pair(transport, note) as connection:
            await ask(connection)
        assert loops == [asyncio.get_running_loop()]

    @asynchronous
    async def test_an_unknown_method_is_unimplemented(self, transport: Transport) -> None:
        async with pair(transport, echo) as connection:
            for method in ("/conformance.Test/Unknown", "/conformance.Other/Echo"):
                error = await error_of(ask(connection, method, b""))
                assert error.code is Code.UNIMPLEMENTED
                assert error.blame is Blame.CLIENT
            assert await ask(connection, ECHO, b"still here") == b"still here"

    @asynchronous
    async def test_metadata_arrive_in_order_and_nothing_of_the_protocol_with_them(self, transport: Transport) -> None:
        note = Recorder()
        sent = (
            ("x-request-id", "7"),
            ("x-tag", "one"),
            ("trace-bin", bytes(range(256))),
            ("x-tag", "two, three"),
            ("empty-bin", b""),
        )
        async with pair(transport, note) as connection:
            await ask(connection, metadata=sent, timeout_s=10)
        assert by_key(note.calls[0].metadata) == by_key(sent)

    @asynchronous
    async def test_metadata_of_an_official_client_hold_nothing_of_the_protocol(self, transport: Transport) -> None:
        note = Recorder()
        async with serving(transport, {ECHO: note}) as address, official(address) as channel:
            sent = (("x-request-id", "7"), ("trace-bin", b"\0\xff"))
            await channel.unary_unary(ECHO)(b"", metadata=sent, timeout=10)
        assert by_key(note.calls[0].metadata) == by_key(sent)

    @asynchronous
    async def test_trailers_come_back_with_an_answer_and_with_an_error(self, transport: Transport) -> None:
        sent: list[tuple[str, str | bytes]] = [("x-load", "0.5"), ("x-report-bin", b"\0\x01\xff"), ("x-load", "0.6")]

        async def answer(exchange: Exchange) -> Answer:
            if exchange.message == b"fail":
                error = NodeFailed("failed on purpose")
                error.trailers = sent
                raise error
            return Answer(b"answered", sent)

        async with pair(transport, answer) as connection:
            answered = await connection.call(ECHO, b"")
            error = await error_of(connection.call(ECHO, b"fail"))
        assert answered.message == b"answered"
        assert by_key(answered.trailers) == by_key(sent)
        assert by_key(error.trailers) == by_key(sent)

    @asynchronous
    async def test_an_official_client_that_compresses_is_answered(self, transport: Transport) -> None:
        note = Recorder()
        message = b"compress me " * 10_000
        async with (
            serving(transport, {ECHO: note}) as address,
            official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message
        assert note.calls[0].message == message
        assert note.calls[0].metadata == ()

    @asynchronous
    async def test_500_calls_in_flight_are_answered_in_any_order(self, transport: Transport) -> None:
        count = 500
        arrived = asyncio.Event()
        waiting: dict[bytes, asyncio.Future[None]] = {}

        async def wait(exchange: Exchange) -> bytes:
            future = waiting[bytes(exchange.message)] = asyncio.get_running_loop().create_future()
            if len(waiting) == count:
                arrived.set()
            await future
            return b"answer to " + bytes(exchange.message)

        async with pair(transport, wait) as connection:
            calls = [asyncio.ensure_future(ask(connection, ECHO, b"%d" % number)) for number in range(count)]
            async with asyncio.timeout(20):
                await arrived.wait()
            for future in reversed(waiting.values()):
                future.set_result(None)
            answers = await asyncio.gather(*calls)
        assert answers == [b"answer to %d" % number for number in range(count)]

    # Sizes

    @pytest.mark.parametrize("smaller", ["client", "server", "both"])
    @pytest.mark.parametrize("large", ["request", "answer"])
    @asynchronous
    async def test_messages_over_the_limit_are_refused_and_those_at_it_pass(
        self, transport: Transport, smaller: str, large: str
    ) -> None:
        limit = 64 * 1024

        async def answer(exchange: Exchange) -> Message:
            return exchange.message if large == "request" else b"x" * int(exchange.message)

        def message(size: int) -> bytes:
            return b"x" * size if large == "request" else b"%d" % size

        async with pair(
            transport,
            answer,
            Limits(message_bytes=limit if smaller != "client" else 4 * limit),
            Limits(message_bytes=limit if smaller != "server" else 4 * limit),
        ) as connection:
            assert len(await ask(connection, ECHO, message(limit))) == limit
            for size in (limit + 1, 3 * limit):
                error = await error_of(ask(connection, ECHO, message(size)))
                assert isinstance(error, MessageTooLarge)
            assert len(await ask(connection, ECHO, message(limit))) == limit

    @asynchronous
    async def test_ten_megabytes_pass_by_default(self, transport: Transport) -> None:
        message = b"\x01" * (10 * 1024 * 1024)
        async with pair(transport, echo) as connection:
            assert await ask(connection, ECHO, message) == message

    @asynchronous
    async def test_what_is_over_the_limit_only_when_unpacked_is_refused(self, transport: Transport) -> None:
        """A compressed request of a few kilobytes must not fill the memory."""
        note = Recorder()
        limits = Limits(message_bytes=64 * 1024)
        async with (
            serving(transport, {ECHO: note}, limits=limits) as address,
            official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(ECHO)(bytes(4 * 1024 * 1024), timeout=10)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not note.calls

    # Errors

    @pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
    @asynchronous
    async def test_each_status_arrives_with_its_message(self, transport: Transport, code: Code) -> None:
        class Failure(InferenceError):
            pass

        Failure.code = code
        messages = ["plain", "", "100 % of “naïve” 輸入\nand a second line\t%41", " blanks around "]

        async def fail(exchange: Exchange) -> bytes:
            raise Failure(messages[int(exchange.message)])

        async with pair(transport, fail) as connection:
            for number, message in enumerate(messages):
                error = await error_of(ask(connection, ECHO, b"%d" % number))
                expected = from_status(code, message)
                assert type(error) is type(expected)
                assert error.code is expected.code
                assert str(error) == message

    @asynchronous
    async def test_a_message_too_long_for_a_header_does_not_hide_the_status(self, transport: Transport) -> None:
        """gRPC carries messages in headers, which peers limit to 8 or 16 KiB after percent-encoding."""
        message = "輸入形狀" * 5000

        async def fail(exchange: Exchange) -> bytes:
            raise BadRequest(message)

        async with pair(transport, fail) as connection:
            for _ in range(5):
                error = await error_of(ask(connection))
                assert error.code is Code.INVALID_ARGUMENT
                assert str(error)[:300] == message[:300]

    @asynchronous
    async def test_what_nobody_foresaw_is_a_failure_and_never_ok(self, transport: Transport) -> None:
        async def fail(exchange: Exchange) -> bytes:
            raise ZeroDivisionError("an exception outside the tree")

        async with pair(transport, fail) as connection:
            error = await error_of(ask(connection))
            assert isinstance(error, NodeFailed)
            await warm(connection)

    # Deadlines and cancellation

    @asynchronous
    async def test_the_deadline_reaches_the_server(self, transport: Transport) -> None:
        note = Recorder()
        async with pair(transport, note) as connection:
            for seconds in (0.9, 5.0, 100.0):
                deadline = time.monotonic() + seconds
                await ask(connection, timeout_s=seconds)
                received = note.calls[-1].deadline
                assert received is not None
                # gRPC rounds a timeout up, to 1 % at worst.
                assert deadline - 0.5 < received <= deadline + 0.5 + 0.01 * seconds
            await ask(connection)
            assert note.calls[-1].deadline is None

    @asynchronous
    async def test_a_deadline_that_passes_ends_the_call_on_both_sides(self, transport: Transport) -> None:
        hold = Hold()
        async with pair(transport, hold) as connection:
            await warm(connection)
            started = time.monotonic()
            error = await error_of(ask(connection, HOLD, timeout_s=0.3))
            took = time.monotonic() - started
            assert isinstance(error, DeadlineExceeded)
            assert 0.25 < took < 0.3 + self.prompt_s
            await hold.was_cancelled(self.prompt_s)

    @asynchronous
    async def test_a_deadline_already_passed_sends_nothing(self, transport: Transport) -> None:
        hold = Hold()
        async with pair(transport, hold) as connection:
            await warm(connection)
            error = await error_of(ask(connection, HOLD, timeout_s=-1))
            assert isinstance(error, DeadlineExceeded)
            await warm(connection)
            assert not hold.entered.is_set()

    @asynchronous
    async def test_cancelling_the_caller_cancels_the_handler_and_no_other_call(self, transport: Transport) -> None:
        one, other = Hold(), Hold()
        async with serving(transport, {HOLD: one, ECHO: other}) as node, connected(transport, node) as connection:

            async def cancel(exchange: Exchange) -> bytes:
                leaving = asyncio.ensure_future(ask(connection, HOLD))
                await one.was_entered()
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
                return b"cancelled"

            staying = asyncio.ensure_future(ask(connection, ECHO, b"stays"))
            await other.was_entered()
            async with pair(transport, cancel) as front:
                assert await ask(front) == b"cancelled"
            await one.was_cancelled(self.prompt_s)
            other.release.set()
            assert await staying == b"stays"
            assert not other.cancelled.is_set()

    @asynchronous
    async def test_an_official_client_that_hangs_up_cancels_the_handler(self, transport: Transport) -> None:
        hold = Hold()
        async with serving(transport, {HOLD: hold}) as address:
            async with official(address) as channel:
                call = channel.unary_unary(HOLD)(b"")
                await hold.was_entered()
                await channel.close()
                with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await call
            await hold.was_cancelled(self.prompt_s)

    @asynchronous
    async def test_closing_a_connection_ends_its_calls(self, transport: Transport) -> None:
        hold = Hold()
        async with serving(transport, {HOLD: hold}) as address:
            connection = transport.connect(address, Limits())
            call = asyncio.ensure_future(ask(connection, HOLD))
            await hold.was_entered()
            await connection.close()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                with pytest.raises((asyncio.CancelledError, InferenceError)):
                    await call
            await error_of(ask(connection, HOLD))

    # Streaming, which a connection has not; so through official clients

    @asynchronous
    async def test_one_request_may_have_many_answers(self, transport: Transport) -> None:
        async def count(_: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            async for request in requests:
                for number in range(int(request)):
                    yield b"%d" % number

        async with serving(transport, streaming={ECHO: count}) as address, official(address) as channel:
            call = channel.unary_stream(ECHO)(b"3", metadata=(("x-request-id", "7"),), timeout=10)
            assert [answer async for answer in call] == [b"0", b"1", b"2"]
            assert [answer async for answer in channel.unary_stream(ECHO)(b"0", timeout=10)] == []

    @asynchronous
    async def test_a_stream_answers_each_message_as_it_comes(self, transport: Transport) -> None:
        seen: list[Exchange] = []

        async def reverse(exchange: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            seen.append(exchange)
            async for request in requests:
                yield bytes(request[::-1])
            yield b"end"

        async with serving(transport, streaming={ECHO: reverse}) as address, official(address) as channel:
            call = channel.stream_stream(ECHO)(metadata=(("x-request-id", "7"),), timeout=10)
            for message in (b"ab", b"", b"x" * 200_000, b"cd"):
                await call.write(message)
                assert await call.read() == message[::-1]
            await call.done_writing()
            assert await call.read() == b"end"
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
        assert [(each.method, each.message, tuple(each.metadata)) for each in seen] == [
            (ECHO, b"", (("x-request-id", "7"),))
        ]
        assert seen[0].deadline is not None

    @asynchronous
    async def test_a_stream_that_fails_keeps_what_was_sent_and_says_why(self, transport: Transport) -> None:
        async def fail(_: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            yield b"one"
            yield b"two"
            raise BadRequest("no third for “你”")

        async with serving(transport, streaming={ECHO: fail}) as address, official(address) as channel:
            call = channel.unary_stream(ECHO)(b"", timeout=10)
            assert [await call.read(), await call.read()] == [b"one", b"two"]
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "no third for “你”"

    @asynchronous
    async def test_a_client_that_leaves_its_stream_cancels_the_handler(self, transport: Transport) -> None:
        hold = Hold()
        async with serving(transport, streaming={HOLD: hold.stream}) as address, official(address) as channel:
            call = channel.stream_stream(HOLD)()
            await call.write(b"")
            assert await call.read() == b"first"
            await hold.was_entered()
            call.cancel()
            await hold.was_cancelled(self.prompt_s)
