"""The suite for transports, over real sockets."""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.aio
import pytest

from dl_inference_core.errors import (
    BadRequest,
    Blame,
    Code,
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    MessageTooLarge,
    NodeFailed,
    NodeGaveUp,
    NodeUnreachable,
    from_status,
)
from dl_inference_core.testing.plugin import PluginConformance
from dl_inference_core.transport import (
    Call,
    Connection,
    Limits,
    Methods,
    Server,
    StreamHandler,
    Transport,
    UnaryHandler,
)

SelfT = TypeVar("SelfT", bound="TransportConformance")
P = ParamSpec("P")


def _asynchronous(
    test: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, None]],
) -> Callable[Concatenate[SelfT, P], None]:
    """A test that is a coroutine, run by the suite's `run`."""

    @functools.wraps(test)
    def run(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.run(test(self, *args, **kwargs))

    return run


ECHO = "/conformance.Test/Echo"
HOLD = "/conformance.Test/Hold"
WARM = "/conformance.Test/Warm"
LOOPBACK = ("127.0.0.1:0",)


async def _echo(call: Call) -> bytes:
    return call.request


class _Hold:
    """A handler, of either kind, that holds its calls until told, and notes how they ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, call: Call) -> bytes:
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return call.request

    async def stream(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self(call)


class TransportConformance(PluginConformance):
    """What every transport must keep, over real sockets on the loopback interface::

    class TestGrpcioTransport(TransportConformance):
        transport_class = GrpcioTransport
    """

    transport_class: ClassVar[type[Transport]]
    prompt_s: ClassVar[float] = 1.0
    """How many seconds something may take that is to happen at once."""

    @pytest.fixture
    def transport(self) -> Transport:
        return self.transport_class(self.transport_class.Options(**self.options))

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Runs one test on an event loop of its own, for at most a minute. Override it if the loop must be another."""

        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test

        with asyncio.Runner() as runner:
            runner.run(bounded())

    def test_is_a_transport_with_a_name(self) -> None:
        self._check_class(self.transport_class, Transport, ["connect"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.transport_class.Options, self.options)

    # Messages and metadata

    @pytest.mark.parametrize(
        "message", [b"", b"\0", bytes(range(256)), b"x" * 1_000_000], ids=["empty", "zero", "all", "1 MB"]
    )
    @_asynchronous
    async def test_bytes_go_there_and_back(self, transport: Transport, message: bytes) -> None:
        seen: list[Call] = []

        async def reverse(call: Call) -> bytes:
            seen.append(call)
            return call.request[::-1]

        async with _pair(transport, reverse) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message[::-1]
        assert [(call.method, call.request) for call in seen] == [(ECHO, message)]

    @_asynchronous
    async def test_handlers_run_on_the_loop_that_made_the_server(self, transport: Transport) -> None:
        loops = []

        async def note(call: Call) -> bytes:
            loops.append(asyncio.get_running_loop())
            return b""

        async with _pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b""))
        assert loops == [asyncio.get_running_loop()]

    @_asynchronous
    async def test_an_unknown_method_is_unimplemented(self, transport: Transport) -> None:
        async with _pair(transport, _echo) as connection:
            for method in ("/conformance.Test/Unknown", "/conformance.Other/Echo"):
                error = await _error(connection.call(Call(method=method, request=b"")))
                assert error.code is Code.UNIMPLEMENTED
                assert error.blame is Blame.CLIENT
            assert await connection.call(Call(method=ECHO, request=b"still here")) == b"still here"

    @_asynchronous
    async def test_metadata_arrive_in_order_and_nothing_of_the_protocol_with_them(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        sent = (
            ("x-request-id", "7"),
            ("x-tag", "one"),
            ("trace-bin", bytes(range(256))),
            ("x-tag", "two, three"),
            ("empty-bin", b""),
        )
        deadline = time.monotonic() + 10
        async with _pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b"", metadata=sent, deadline=deadline))
        assert _by_key(seen[0].metadata) == _by_key(sent)

    @_asynchronous
    async def test_metadata_of_an_official_client_hold_nothing_of_the_protocol(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        async with _serving(transport, {ECHO: note}) as address, _official(address) as channel:
            sent = (("x-request-id", "7"), ("trace-bin", b"\0\xff"))
            await channel.unary_unary(ECHO)(b"", metadata=sent, timeout=10)
        assert _by_key(seen[0].metadata) == _by_key(sent)

    @_asynchronous
    async def test_trailers_come_back_with_an_answer_and_with_an_error(self, transport: Transport) -> None:
        sent: list[tuple[str, str | bytes]] = [
            ("x-load", "0.5"),
            ("x-report-bin", b"\0\x01\xff"),
            ("x-load", "0.6"),
        ]

        async def answer(call: Call) -> bytes:
            call.trailers.extend(sent)
            if call.request == b"fail":
                raise NodeFailed("failed on purpose")
            return b"answered"

        async with _pair(transport, answer) as connection:
            good = Call(method=ECHO, request=b"")
            await connection.call(good)
            bad = Call(method=ECHO, request=b"fail")
            await _error(connection.call(bad))
        assert _by_key(good.trailers) == _by_key(sent)
        assert _by_key(bad.trailers) == _by_key(sent)

    @_asynchronous
    async def test_an_official_client_that_compresses_is_answered(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return call.request

        message = b"compress me " * 10_000
        async with (
            _serving(transport, {ECHO: note}) as address,
            _official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message
        assert seen[0].request == message
        assert seen[0].metadata == ()

    @_asynchronous
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

        async with _pair(transport, wait) as connection:
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
    @_asynchronous
    async def test_messages_over_the_limit_are_refused_and_those_at_it_pass(
        self, transport: Transport, smaller: str, large: str
    ) -> None:
        limit = 64 * 1024

        async def answer(call: Call) -> bytes:
            return call.request if large == "request" else b"x" * int(call.request)

        def call(size: int) -> Call:
            return Call(method=ECHO, request=b"x" * size if large == "request" else b"%d" % size)

        async with _pair(
            transport,
            answer,
            Limits(message_bytes=limit if smaller != "client" else 4 * limit),
            Limits(message_bytes=limit if smaller != "server" else 4 * limit),
        ) as connection:
            assert len(await connection.call(call(limit))) == limit
            for size in (limit + 1, 3 * limit):
                error = await _error(connection.call(call(size)))
                assert isinstance(error, MessageTooLarge)
            assert len(await connection.call(call(limit))) == limit

    @_asynchronous
    async def test_ten_megabytes_pass_by_default(self, transport: Transport) -> None:
        message = b"\x01" * (10 * 1024 * 1024)
        async with _pair(transport, _echo) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message

    @_asynchronous
    async def test_what_is_over_the_limit_only_when_unpacked_is_refused(self, transport: Transport) -> None:
        """A compressed request of a few kilobytes must not fill the memory."""
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        limits = Limits(message_bytes=64 * 1024)
        async with (
            _serving(transport, {ECHO: note}, limits=limits) as address,
            _official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(ECHO)(bytes(4 * 1024 * 1024), timeout=10)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not seen

    # Errors

    @pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
    @_asynchronous
    async def test_each_status_arrives_with_its_message(self, transport: Transport, code: Code) -> None:
        class Failure(InferenceError):
            pass

        Failure.code = code
        messages = ["plain", "", "100 % of “naïve” 輸入\nand a second line\t%41", " blanks around "]

        async def fail(call: Call) -> bytes:
            raise Failure(messages[int(call.request)])

        async with _pair(transport, fail) as connection:
            for number, message in enumerate(messages):
                error = await _error(connection.call(Call(method=ECHO, request=b"%d" % number)))
                expected = from_status(code, message)
                assert type(error) is type(expected)
                assert error.code is expected.code
                assert str(error) == message

    @_asynchronous
    async def test_a_message_too_long_for_a_header_does_not_hide_the_status(self, transport: Transport) -> None:
        """gRPC carries messages in headers, which peers limit to 8 or 16 KiB after percent-encoding."""
        message = "輸入形狀" * 5000

        async def fail(call: Call) -> bytes:
            raise BadRequest(message)

        async with _pair(transport, fail) as connection:
            for _ in range(5):
                error = await _error(connection.call(Call(method=ECHO, request=b"")))
                assert error.code is Code.INVALID_ARGUMENT
                assert str(error)[:300] == message[:300]

    @_asynchronous
    async def test_what_nobody_foresaw_is_a_failure_and_never_ok(self, transport: Transport) -> None:
        async def fail(call: Call) -> bytes:
            raise ZeroDivisionError("an exception outside the tree")

        async with _pair(transport, fail) as connection:
            error = await _error(connection.call(Call(method=ECHO, request=b"")))
            assert isinstance(error, NodeFailed)
            await _warm(connection)

    # Deadlines and cancellation

    @_asynchronous
    async def test_the_deadline_reaches_the_server(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        async with _pair(transport, note) as connection:
            for seconds in (0.9, 5.0, 100.0):
                deadline = time.monotonic() + seconds
                await connection.call(Call(method=ECHO, request=b"", deadline=deadline))
                received = seen[-1].deadline
                assert received is not None
                # gRPC rounds a timeout up, to 1 % at worst.
                assert deadline - 0.5 < received <= deadline + 0.05 + 0.01 * seconds
            await connection.call(Call(method=ECHO, request=b""))
            assert seen[-1].deadline is None

    @_asynchronous
    async def test_a_deadline_that_passes_ends_the_call_on_both_sides(self, transport: Transport) -> None:
        hold = _Hold()
        async with _pair(transport, hold) as connection:
            await _warm(connection)
            started = time.monotonic()
            error = await _error(connection.call(Call(method=HOLD, request=b"", deadline=started + 0.3)))
            took = time.monotonic() - started
            assert isinstance(error, DeadlineExceeded)
            assert 0.25 < took < 0.3 + self.prompt_s
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    @_asynchronous
    async def test_a_deadline_already_passed_sends_nothing(self, transport: Transport) -> None:
        hold = _Hold()
        async with _pair(transport, hold) as connection:
            await _warm(connection)
            past = time.monotonic() - 1
            error = await _error(connection.call(Call(method=HOLD, request=b"", deadline=past)))
            assert isinstance(error, DeadlineExceeded)
            await _warm(connection)
            assert not hold.entered.is_set()

    @_asynchronous
    async def test_cancelling_the_caller_cancels_the_handler_and_no_other_call(self, transport: Transport) -> None:
        one, other = _Hold(), _Hold()
        methods: dict[str, UnaryHandler] = {HOLD: one, ECHO: other}
        async with _serving(transport, methods) as address, _connected(transport, address) as connection:
            leaving = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
            staying = asyncio.ensure_future(connection.call(Call(method=ECHO, request=b"stays")))
            async with asyncio.timeout(10):
                await one.entered.wait()
                await other.entered.wait()
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            async with asyncio.timeout(self.prompt_s):
                await one.cancelled.wait()
            other.release.set()
            assert await staying == b"stays"
            assert not other.cancelled.is_set()

    @_asynchronous
    async def test_an_official_client_that_hangs_up_cancels_the_handler(self, transport: Transport) -> None:
        hold = _Hold()
        async with _serving(transport, {HOLD: hold}) as address:
            async with _official(address) as channel:
                call = channel.unary_unary(HOLD)(b"")
                async with asyncio.timeout(10):
                    await hold.entered.wait()
                await channel.close()
                with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await call
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    @_asynchronous
    async def test_closing_a_connection_ends_its_calls(self, transport: Transport) -> None:
        hold = _Hold()
        async with _serving(transport, {HOLD: hold}) as address:
            connection = transport.connect(address, Limits())
            call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
            async with asyncio.timeout(10):
                await hold.entered.wait()
            await connection.close()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                with pytest.raises((asyncio.CancelledError, InferenceError)):
                    await call
            await _error(connection.call(Call(method=HOLD, request=b"")))

    # Streaming, which a connection has not; so through official clients

    @_asynchronous
    async def test_one_request_may_have_many_answers(self, transport: Transport) -> None:
        async def count(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            call.trailers.append(("x-load", "0.5"))
            async for request in requests:
                for number in range(int(request)):
                    yield b"%d" % number

        async with _serving(transport, streaming={ECHO: count}) as address, _official(address) as channel:
            call = channel.unary_stream(ECHO)(b"3", metadata=(("x-request-id", "7"),), timeout=10)
            assert [answer async for answer in call] == [b"0", b"1", b"2"]
            assert ("x-load", "0.5") in [tuple(item) for item in await call.trailing_metadata()]
            assert [answer async for answer in channel.unary_stream(ECHO)(b"0", timeout=10)] == []

    @_asynchronous
    async def test_a_stream_answers_each_message_as_it_comes(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def reverse(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            seen.append(call)
            async for request in requests:
                yield request[::-1]
            yield b"end"

        async with _serving(transport, streaming={ECHO: reverse}) as address, _official(address) as channel:
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

    @_asynchronous
    async def test_a_stream_that_fails_keeps_what_was_sent_and_says_why(self, transport: Transport) -> None:
        async def fail(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            yield b"one"
            yield b"two"
            raise BadRequest("no third for “你”")

        async with _serving(transport, streaming={ECHO: fail}) as address, _official(address) as channel:
            call = channel.unary_stream(ECHO)(b"", timeout=10)
            assert [await call.read(), await call.read()] == [b"one", b"two"]
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "no third for “你”"

    @_asynchronous
    async def test_a_client_that_leaves_its_stream_cancels_the_handler(self, transport: Transport) -> None:
        hold = _Hold()
        async with (
            _serving(transport, streaming={HOLD: hold.stream}) as address,
            _official(address) as channel,
        ):
            call = channel.stream_stream(HOLD)()
            await call.write(b"")
            assert await call.read() == b"first"
            async with asyncio.timeout(10):
                await hold.entered.wait()
            call.cancel()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    # Servers and their addresses

    @_asynchronous
    async def test_one_server_answers_on_several_addresses(self, transport: Transport) -> None:
        server = await transport.serve(Methods(unary={ECHO: _echo, WARM: _echo}), LOOPBACK * 2, Limits())
        try:
            assert len(set(server.ports)) == 2
            for port in server.ports:
                async with _connected(transport, f"127.0.0.1:{port}") as connection:
                    await _warm(connection)
        finally:
            await server.drain(0)

    @_asynchronous
    async def test_two_servers_share_a_port_if_both_say_so(self, transport: Transport) -> None:
        answered = [0, 0]

        def count(number: int) -> UnaryHandler:
            async def answer(call: Call) -> bytes:
                answered[number] += 1
                return b""

            return answer

        one = await transport.serve(Methods(unary={ECHO: count(0)}), LOOPBACK, Limits(), share_port=True)
        address = f"127.0.0.1:{one.ports[0]}"
        two = await transport.serve(Methods(unary={ECHO: count(1)}), (address,), Limits(), share_port=True)
        try:
            assert two.ports == one.ports
            for _ in range(40):  # the kernel picks by the client's port: all on one side is 1 in 2**39
                async with _connected(transport, address) as connection:
                    await connection.call(Call(method=ECHO, request=b""))
            assert sum(answered) == 40
            assert all(answered)
        finally:
            await one.drain(0)
            await two.drain(0)

    @_asynchronous
    async def test_a_port_in_use_is_a_config_error(self, transport: Transport) -> None:
        async with _serving(transport, {ECHO: _echo}) as address:
            with pytest.raises(ConfigError, match=address):
                await transport.serve(Methods(unary={}), (address,), Limits())
            async with _connected(transport, address) as connection:
                await _warm(connection)

    @pytest.mark.parametrize("address", ["127.0.0.1:70000", "127.0.0.1:http?", "192.0.2.1:0", "no address"])
    @_asynchronous
    async def test_a_bad_address_is_a_config_error_and_leaves_no_port_taken(
        self, transport: Transport, address: str
    ) -> None:
        good = f"127.0.0.1:{_free_port()}"
        with pytest.raises(ConfigError) as error:
            await transport.serve(Methods(unary={}), (good, address), Limits())
        assert address in str(error.value)
        server = await transport.serve(Methods(unary={ECHO: _echo}), (good,), Limits())
        await server.drain(0)

    # Draining

    @_asynchronous
    async def test_a_drain_lets_calls_finish_and_refuses_new_ones_so_that_another_node_is_tried(
        self, transport: Transport
    ) -> None:
        for attempt in range(20):  # calls that cross with the server's goodbye are the ones that go wrong, sometimes
            hold = _Hold()
            server = await transport.serve(Methods(unary={HOLD: hold, ECHO: _echo}), LOOPBACK, Limits())
            address = f"127.0.0.1:{server.ports[0]}"
            async with _connected(transport, address) as connection, _connected(transport, address) as other:
                call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"finishes")))
                async with asyncio.timeout(10):
                    await hold.entered.wait()
                drain = asyncio.ensure_future(server.drain(10))
                crossing = [
                    connection.call(Call(method=ECHO, request=b"")) for _ in range(10 if attempt % 4 == 0 else 0)
                ]
                for result in await asyncio.gather(*crossing, return_exceptions=True):
                    assert result == b"" or isinstance(result, NodeUnreachable | NodeGaveUp), repr(result)
                for each in (connection, other):
                    error = await _refusal(each, self.prompt_s)
                    assert isinstance(error, NodeUnreachable | NodeGaveUp), repr(error)
                assert not drain.done()
                assert not hold.cancelled.is_set()
                hold.release.set()
                assert await call == b"finishes"
                async with asyncio.timeout(self.prompt_s):
                    await drain

    @_asynchronous
    async def test_a_call_that_outlasts_the_grace_is_cancelled(self, transport: Transport) -> None:
        hold = _Hold()
        server = await transport.serve(Methods(unary={HOLD: hold}), LOOPBACK, Limits())
        async with _connected(transport, f"127.0.0.1:{server.ports[0]}") as connection:
            call = asyncio.ensure_future(_error(connection.call(Call(method=HOLD, request=b""))))
            async with asyncio.timeout(10):
                await hold.entered.wait()
            started = time.monotonic()
            await server.drain(0.3)
            assert 0.25 < time.monotonic() - started < 0.3 + self.prompt_s
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                error = await call
            assert error.another_node, "the node took the call and gave it up: another may answer it"

    @_asynchronous
    async def test_a_drain_with_nothing_in_flight_returns_at_once_and_frees_the_port(
        self, transport: Transport
    ) -> None:
        server = await transport.serve(Methods(unary={WARM: _echo}), LOOPBACK, Limits())
        address = f"127.0.0.1:{server.ports[0]}"
        async with _connected(transport, address) as connection:
            await _warm(connection)
            async with asyncio.timeout(self.prompt_s):
                await server.drain(10)
        again = await transport.serve(Methods(unary={ECHO: _echo}), (address,), Limits())
        await again.drain(0)

    # Nodes that are not there

    @_asynchronous
    async def test_a_dead_port_is_unreachable_at_once_and_reached_again_in_1500_ms(self, transport: Transport) -> None:
        address = f"127.0.0.1:{_free_port()}"
        async with _connected(transport, address) as connection:
            for _ in range(5):
                started = time.monotonic()
                error = await _error(connection.call(Call(method=ECHO, request=b"")))
                assert isinstance(error, NodeUnreachable)
                assert time.monotonic() - started < 1
            for _ in range(2):
                server = await transport.serve(Methods(unary={ECHO: _echo}), (address,), Limits())
                await _reached(connection, 1.5)
                await server.drain(0)
                await _refusal(connection, self.prompt_s)

    @_asynchronous
    async def test_a_peer_that_says_nothing_costs_no_more_than_the_deadline(self, transport: Transport) -> None:
        async with _peer(None) as address, _connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 0.4)
            error = await _error(connection.call(call))
            assert isinstance(error, DeadlineExceeded | NodeUnreachable)
            assert time.monotonic() - started < 0.4 + self.prompt_s

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"])
    @_asynchronous
    async def test_a_peer_that_hangs_up_or_is_no_grpc_server_is_the_nodes_failure(
        self, transport: Transport, answer: bytes
    ) -> None:
        async with _peer(answer) as address, _connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 10)
            error = await _error(connection.call(call))
            assert error.blame is Blame.NODE
            assert error.another_node
            assert time.monotonic() - started < 1 + self.prompt_s


@asynccontextmanager
async def _serving(
    transport: Transport,
    unary: Mapping[str, UnaryHandler] | None = None,
    streaming: Mapping[str, StreamHandler] | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[str]:
    """A server on the loopback interface, on which `_warm` works too: its address."""
    methods = Methods(unary={**(unary or {}), WARM: _echo}, streaming=streaming or {})
    server = await transport.serve(methods, LOOPBACK, limits or Limits())
    assert isinstance(server, Server)
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.drain(0)


@asynccontextmanager
async def _connected(transport: Transport, address: str, limits: Limits | None = None) -> AsyncIterator[Connection]:
    connection = transport.connect(address, limits or Limits())
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _pair(
    transport: Transport,
    handler: UnaryHandler,
    server_limits: Limits | None = None,
    client_limits: Limits | None = None,
) -> AsyncIterator[Connection]:
    """A connection to a server whose methods ECHO and HOLD are `handler`."""
    methods = {ECHO: handler, HOLD: handler}
    async with (
        _serving(transport, methods, limits=server_limits) as address,
        _connected(transport, address, client_limits) as connection,
    ):
        yield connection


@asynccontextmanager
async def _official(address: str, **options: Any) -> AsyncIterator[Any]:
    """A channel of the grpcio package's own."""
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)], **options
    ) as channel:
        yield channel


@asynccontextmanager
async def _peer(answer: bytes | None) -> AsyncIterator[str]:
    """The address of a TCP server that answers so to whatever comes, and hangs up; None never answers."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            await done.wait()
        else:
            await reader.read(100)
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        server.close()


def _by_key(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str | bytes]]:
    """In the order of the keys, equal ones as they stood: gRPC promises no order between different keys."""
    return sorted(((key, value) for key, value in metadata), key=lambda item: item[0])


async def _error(call: Coroutine[Any, Any, bytes]) -> InferenceError:
    with pytest.raises(InferenceError) as error:
        await call
    return error.value


async def _warm(connection: Connection) -> None:
    """A call there and back, so that the connection stands."""
    assert await connection.call(Call(method=WARM, request=b"warm")) == b"warm"


async def _refusal(connection: Connection, within_s: float) -> InferenceError:
    """The error of the first call that is not answered any more."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await connection.call(Call(method=ECHO, request=b""))
            except InferenceError as error:
                return error


async def _reached(connection: Connection, within_s: float) -> None:
    """Calls until one is answered."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await connection.call(Call(method=ECHO, request=b""))
            except InferenceError:
                await asyncio.sleep(0.02)
            else:
                return


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
