"""The suite for transports, over real sockets: calls here, servers in `transport_servers`, TLS in `transport_tls`."""

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
from dl_inference_core.testing.transport_servers import ServerConformance
from dl_inference_core.testing.transport_tls import TlsConformance
from dl_inference_core.transport import Call, Limits, Transport


class TransportConformance(ServerConformance, TlsConformance):
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
        seen: list[Call] = []

        async def reverse(call: Call) -> bytes:
            seen.append(call)
            return call.request[::-1]

        async with pair(transport, reverse) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message[::-1]
        assert [(call.method, call.request) for call in seen] == [(ECHO, message)]

    @asynchronous
    async def test_handlers_run_on_the_loop_that_made_the_server(self, transport: Transport) -> None:
        loops = []

        async def note(call: Call) -> bytes:
            loops.append(asyncio.get_running_loop())
            return b""

        async with pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b""))
        assert loops == [asyncio.get_running_loop()]

    @asynchronous
    async def test_an_unknown_method_is_unimplemented(self, transport: Transport) -> None:
        async with pair(transport, echo) as connection:
            for method in ("/conformance.Test/Unknown", "/conformance.Other/Echo"):
                error = await error_of(connection.call(Call(method=method, request=b"")))
                assert error.code is Code.UNIMPLEMENTED
                assert error.blame is Blame.CLIENT
            assert await connection.call(Call(method=ECHO, request=b"still here")) == b"still here"

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
        deadline = time.monotonic() + 10
        async with pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b"", metadata=sent, deadline=deadline))
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

        async def answer(call: Call) -> bytes:
            call.trailers.extend(sent)
            if call.request == b"fail":
                raise NodeFailed("failed on purpose")
            return b"answered"

        async with pair(transport, answer) as connection:
            good = Call(method=ECHO, request=b"")
            await connection.call(good)
            bad = Call(method=ECHO, request=b"fail")
            await error_of(connection.call(bad))
        assert by_key(good.trailers) == by_key(sent)
        assert by_key(bad.trailers) == by_key(sent)

    @asynchronous
    async def test_an_official_client_that_compresses_is_answered(self, transport: Transport) -> None:
        note = Recorder()
        message = b"compress me " * 10_000
        async with (
            serving(transport, {ECHO: note}) as address,
            official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message
        assert note.calls[0].request == message
        assert note.calls[0].metadata == ()

    @asynchronous
    async def test_500_calls_in_flight_are_answered_in_any_order(self, transport: Transport) -> None:
        count = 500
        arrived = asyncio.Event()
        waiting: dict[bytes, asyncio.Future[None]] = {}

        async def wait(call: Call) -> bytes:
            future = waiting[call.request] = asyncio.get_running_loop().create_future()
            if len(waiting) == count:
                arrived.set()
            await future
            return b"answer to " + call.request

        async with pair(transport, wait) as connection:
            calls = [
                asyncio.ensure_future(connection.call(Call(method=ECHO, request=b"%d" % number)))
                for number in range(count)
            ]
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

        async def answer(call: Call) -> bytes:
            return call.request if large == "request" else b"x" * int(call.request)

        def call(size: int) -> Call:
            return Call(method=ECHO, request=b"x" * size if large == "request" else b"%d" % size)

        async with pair(
            transport,
            answer,
            Limits(message_bytes=limit if smaller != "client" else 4 * limit),
            Limits(message_bytes=limit if smaller != "server" else 4 * limit),
        ) as connection:
            assert len(await connection.call(call(limit))) == limit
            for size in (limit + 1, 3 * limit):
                error = await error_of(connection.call(call(size)))
                assert isinstance(error, MessageTooLarge)
            assert len(await connection.call(call(limit))) == limit

    @asynchronous
    async def test_ten_megabytes_pass_by_default(self, transport: Transport) -> None:
        message = b"\x01" * (10 * 1024 * 1024)
        async with pair(transport, echo) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message

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

        async def fail(call: Call) -> bytes:
            raise Failure(messages[int(call.request)])

        async with pair(transport, fail) as connection:
            for number, message in enumerate(messages):
                error = await error_of(connection.call(Call(method=ECHO, request=b"%d" % number)))
                expected = from_status(code, message)
                assert type(error) is type(expected)
                assert error.code is expected.code
                assert str(error) == message

    @asynchronous
    async def test_a_message_too_long_for_a_header_does_not_hide_the_status(self, transport: Transport) -> None:
        """gRPC carries messages in headers, which peers limit to 8 or 16 KiB after percent-encoding."""
        message = "輸入形狀" * 5000

        async def fail(call: Call) -> bytes:
            raise BadRequest(message)

        async with pair(transport, fail) as connection:
            for _ in range(5):
                error = await error_of(connection.call(Call(method=ECHO, request=b"")))
                assert error.code is Code.INVALID_ARGUMENT
                assert str(error)[:300] == message[:300]

    @asynchronous
    async def test_what_nobody_foresaw_is_a_failure_and_never_ok(self, transport: Transport) -> None:
        async def fail(call: Call) -> bytes:
            raise ZeroDivisionError("an exception outside the tree")

        async with pair(transport, fail) as connection:
            error = await error_of(connection.call(Call(method=ECHO, request=b"")))
            assert isinstance(error, NodeFailed)
            await warm(connection)

    # Deadlines and cancellation

    @asynchronous
    async def test_the_deadline_reaches_the_server(self, transport: Transport) -> None:
        note = Recorder()
        async with pair(transport, note) as connection:
            for seconds in (0.9, 5.0, 100.0):
                deadline = time.monotonic() + seconds
                await connection.call(Call(method=ECHO, request=b"", deadline=deadline))
                received = note.calls[-1].deadline
                assert received is not None
                # gRPC rounds a timeout up, to 1 % at worst.
                assert deadline - 0.5 < received <= deadline + 0.05 + 0.01 * seconds
            await connection.call(Call(method=ECHO, request=b""))
            assert note.calls[-1].deadline is None

    @asynchronous
    async def test_a_deadline_that_passes_ends_the_call_on_both_sides(self, transport: Transport) -> None:
        hold = Hold()
        async with pair(transport, hold) as connection:
            await warm(connection)
            started = time.monotonic()
            error = await error_of(connection.call(Call(method=HOLD, request=b"", deadline=started + 0.3)))
            took = time.monotonic() - started
            assert isinstance(error, DeadlineExceeded)
            assert 0.25 < took < 0.3 + self.prompt_s
            await hold.was_cancelled(self.prompt_s)

    @asynchronous
    async def test_a_deadline_already_passed_sends_nothing(self, transport: Transport) -> None:
        hold = Hold()
        async with pair(transport, hold) as connection:
            await warm(connection)
            past = time.monotonic() - 1
            error = await error_of(connection.call(Call(method=HOLD, request=b"", deadline=past)))
            assert isinstance(error, DeadlineExceeded)
            await warm(connection)
            assert not hold.entered.is_set()

    @asynchronous
    async def test_cancelling_the_caller_cancels_the_handler_and_no_other_call(self, transport: Transport) -> None:
        one, other = Hold(), Hold()
        async with serving(transport, {HOLD: one, ECHO: other}) as node, connected(transport, node) as connection:

            async def cancel(call: Call) -> bytes:
                leaving = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
                await one.was_entered()
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
                return b"cancelled"

            staying = asyncio.ensure_future(connection.call(Call(method=ECHO, request=b"stays")))
            await other.was_entered()
            async with pair(transport, cancel) as front:
                assert await front.call(Call(method=ECHO, request=b"")) == b"cancelled"
            await one.was_cancelled(self.prompt_s)
            other.release.set()
            assert await staying == b"stays"
            assert not other.cancelled.is_set()

    @asynchronous
    async def test_a_client_that_leaves_a_forwarded_call_cancels_it_at_the_node(self, transport: Transport) -> None:
        hold = Hold()
        async with serving(transport, {HOLD: hold}) as node, connected(transport, node) as connection:
            cancelled = asyncio.Event()

            async def forward(call: Call) -> bytes:
                try:
                    return await connection.call(Call(method=HOLD, request=call.request))
                except asyncio.CancelledError:
                    cancelled.set()
                    raise

            async with serving(transport, {ECHO: forward}) as address, official(address) as channel:
                call = channel.unary_unary(ECHO)(b"")
                await hold.was_entered()
                call.cancel()
                async with asyncio.timeout(self.prompt_s):
                    await cancelled.wait()
                await hold.was_cancelled(self.prompt_s)

    @asynchronous
    async def test_a_call_in_the_background_outlives_the_call_in_whose_context_it_is_made(
        self, transport: Transport
    ) -> None:
        hold = Hold()
        async with serving(transport, {HOLD: hold}) as node, connected(transport, node) as connection:
            outliving: list[asyncio.Future[bytes]] = []

            async def begin(call: Call) -> bytes:
                later = Call(method=HOLD, request=b"outlives", background=True)
                outliving.append(asyncio.ensure_future(connection.call(later)))
                await hold.was_entered()
                return b"begun"

            async with pair(transport, begin) as front:
                assert await front.call(Call(method=ECHO, request=b"")) == b"begun"
            hold.release.set()
            assert await outliving[0] == b"outlives"

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
            call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
            await hold.was_entered()
            await connection.close()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                with pytest.raises((asyncio.CancelledError, InferenceError)):
                    await call
            await error_of(connection.call(Call(method=HOLD, request=b"")))

    # Streaming, which a connection has not; so through official clients

    @asynchronous
    async def test_one_request_may_have_many_answers(self, transport: Transport) -> None:
        async def count(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            call.trailers.append(("x-load", "0.5"))
            async for request in requests:
                for number in range(int(request)):
                    yield b"%d" % number

        async with serving(transport, streaming={ECHO: count}) as address, official(address) as channel:
            call = channel.unary_stream(ECHO)(b"3", metadata=(("x-request-id", "7"),), timeout=10)
            assert [answer async for answer in call] == [b"0", b"1", b"2"]
            assert ("x-load", "0.5") in [tuple(item) for item in await call.trailing_metadata()]
            assert [answer async for answer in channel.unary_stream(ECHO)(b"0", timeout=10)] == []

    @asynchronous
    async def test_a_stream_answers_each_message_as_it_comes(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def reverse(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            seen.append(call)
            async for request in requests:
                yield request[::-1]
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
        assert [(each.method, each.request, tuple(each.metadata)) for each in seen] == [
            (ECHO, b"", (("x-request-id", "7"),))
        ]
        assert seen[0].deadline is not None

    @asynchronous
    async def test_a_stream_that_fails_keeps_what_was_sent_and_says_why(self, transport: Transport) -> None:
        async def fail(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
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
