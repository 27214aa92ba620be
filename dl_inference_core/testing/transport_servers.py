"""Of the suite for transports, what is about servers: where they listen, how they drain, and if none is there."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dl_inference_core.coroutines import UnaryHandler
from dl_inference_core.errors import Blame, ConfigError, DeadlineExceeded, NodeGaveUp, NodeUnreachable
from dl_inference_core.sockets import path_of
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    LOOPBACK,
    WARM,
    CoroutineService,
    Hold,
    LoopbackConformance,
    ask,
    asynchronous,
    connected,
    echo,
    error_of,
    free_port,
    official,
    peer,
    reached,
    refusal,
    serving,
    warm,
)
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Exchange, Limits, Transport


class ServerConformance(LoopbackConformance):
    """Addresses, draining, and nodes that are not there."""

    @pytest.fixture
    def socket_path(self) -> Iterator[Path]:
        """Where nothing lies yet; short, as the paths of sockets have to be."""
        with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as folder:
            yield Path(folder) / "socket"

    # Servers and their addresses

    @asynchronous
    async def test_one_server_answers_on_several_addresses(self, transport: Transport) -> None:
        server = await transport.serve(CoroutineService({ECHO: echo, WARM: echo}), LOOPBACK * 2, Limits())
        try:
            assert len(set(server.ports)) == 2
            for port in server.ports:
                async with connected(transport, f"127.0.0.1:{port}") as connection:
                    await warm(connection)
        finally:
            await server.drain(0)

    @asynchronous
    async def test_two_servers_share_a_port_if_both_say_so(self, transport: Transport) -> None:
        answered = [0, 0]

        def count(number: int) -> UnaryHandler:
            async def answer(exchange: Exchange) -> bytes:
                answered[number] += 1
                return b""

            return answer

        one = await transport.serve(CoroutineService({ECHO: count(0)}), LOOPBACK, Limits(), share_port=True)
        address = f"127.0.0.1:{one.ports[0]}"
        two = await transport.serve(CoroutineService({ECHO: count(1)}), (address,), Limits(), share_port=True)
        try:
            assert two.ports == one.ports
            for _ in range(40):  # the kernel picks by the client's port: all on one side is 1 in 2**39
                async with connected(transport, address) as connection:
                    await ask(connection)
            assert sum(answered) == 40
            assert all(answered)
        finally:
            await one.drain(0)
            await two.drain(0)

    @asynchronous
    async def test_a_port_in_use_is_a_config_error(self, transport: Transport) -> None:
        async with serving(transport, {ECHO: echo}) as address:
            with pytest.raises(ConfigError, match=address):
                await transport.serve(CoroutineService({}), (address,), Limits())
            async with connected(transport, address) as connection:
                await warm(connection)

    @pytest.mark.parametrize("address", ["127.0.0.1:70000", "127.0.0.1:http?", "192.0.2.1:0", "no address"])
    @asynchronous
    async def test_a_bad_address_is_a_config_error_and_leaves_no_port_taken(
        self, transport: Transport, address: str
    ) -> None:
        good = f"127.0.0.1:{free_port()}"
        with pytest.raises(ConfigError) as error:
            await transport.serve(CoroutineService({}), (good, address), Limits())
        assert address in str(error.value)
        server = await transport.serve(CoroutineService({ECHO: echo}), (good,), Limits())
        await server.drain(0)

    # Unix-domain sockets

    @asynchronous
    async def test_a_socket_is_served_beside_a_port_to_official_clients_and_to_gateways(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        server = await transport.serve(CoroutineService({ECHO: echo, WARM: echo}), (address, *LOOPBACK), Limits())
        try:
            assert len(server.ports) == 1, "a socket has no port"
            for each in (address, f"127.0.0.1:{server.ports[0]}"):
                async with official(each) as channel, connected(transport, each) as connection:
                    assert await channel.unary_unary(ECHO)(b"hello", timeout=10) == b"hello"
                    await warm(connection)
        finally:
            await server.drain(0)
        assert not sockets_in(socket_path.parent)

    @asynchronous
    async def test_a_socket_speaks_tls_where_the_port_does(self, transport: Transport, socket_path: Path) -> None:
        authority = Authority(socket_path.parent / "ca")
        tls = authority.issue("localhost").server()
        server = await transport.serve(CoroutineService({WARM: echo}), (f"unix:{socket_path}",), Limits(), tls=tls)
        try:
            async with connected(transport, f"unix:{socket_path}", tls=authority.client()) as connection:
                await warm(connection)
            async with connected(transport, f"unix:{socket_path}") as plain:
                await error_of(ask(plain, WARM, timeout_s=2))
        finally:
            await server.drain(0)

    @asynchronous
    async def test_a_socket_that_a_killed_server_left_is_replaced(
        self, transport: Transport, socket_path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(socket_path))
            killed.listen()
        server = await transport.serve(CoroutineService({WARM: echo}), (f"unix:{socket_path}",), Limits())
        async with connected(transport, f"unix:{socket_path}") as connection:
            await warm(connection)
        await server.drain(0)

    @asynchronous
    async def test_a_socket_that_another_server_listens_on_is_left_to_it(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        server = await transport.serve(CoroutineService({WARM: echo}), (address,), Limits())
        async with connected(transport, address) as connection:
            with pytest.raises(ConfigError, match=f"{address}: another server listens there"):
                await transport.serve(CoroutineService({}), (address,), Limits())
            await warm(connection)
        await server.drain(0)

    @asynchronous
    async def test_a_path_that_no_socket_can_have_is_a_config_error_and_leaves_what_lies_there(
        self, transport: Transport, socket_path: Path
    ) -> None:
        file = socket_path.with_name("file")
        file.write_text("mine")
        for path, said in (
            (file, "is no socket"),
            (socket_path.parent / "none" / "socket", "there is no folder"),
            (socket_path.parent / ("s" * 108), "107 bytes"),
        ):
            with pytest.raises(ConfigError, match=f"cannot listen on .*{said}"):
                await transport.serve(CoroutineService({}), (*LOOPBACK, f"unix:{path}"), Limits())
        assert file.read_text() == "mine"

    @asynchronous
    async def test_a_socket_where_nobody_listens_is_unreachable_and_reached_again(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        async with connected(transport, address) as connection:
            for _ in range(2):
                error = await error_of(ask(connection))
                assert isinstance(error, NodeUnreachable)
                server = await transport.serve(CoroutineService({ECHO: echo}), (address,), Limits())
                await reached(connection, 1.5)
                await server.drain(0)
                await refusal(connection, self.prompt_s)

    # Limits

    @asynchronous
    async def test_connections_over_the_limit_are_closed_and_one_that_goes_makes_room(
        self, transport: Transport
    ) -> None:
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving(transport, {ECHO: echo}, limits=Limits(connections=3)))
            leaving = await stack.enter_async_context(AsyncExitStack())
            channels = [await leaving.enter_async_context(official(address))]
            channels += [await stack.enter_async_context(official(address)) for _ in range(3)]
            for channel in channels[:3]:
                assert await channel.unary_unary(ECHO)(b"in", timeout=10) == b"in"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channels[3].unary_unary(ECHO)(b"over", timeout=10)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            for channel in channels[:3]:
                assert await channel.unary_unary(ECHO)(b"still in", timeout=10) == b"still in"
            await leaving.aclose()
            assert await channels[3].unary_unary(ECHO)(b"now", timeout=10, wait_for_ready=True) == b"now"

    @asynchronous
    async def test_the_limit_of_connections_is_one_for_all_addresses(self, transport: Transport) -> None:
        server = await transport.serve(CoroutineService({ECHO: echo}), LOOPBACK * 2, Limits(connections=2))
        try:
            async with AsyncExitStack() as stack:
                for port in server.ports:
                    channel = await stack.enter_async_context(official(f"127.0.0.1:{port}"))
                    assert await channel.unary_unary(ECHO)(b"in", timeout=10) == b"in"
                for port in server.ports:
                    async with official(f"127.0.0.1:{port}") as over:
                        with pytest.raises(grpc.aio.AioRpcError) as error:
                            await over.unary_unary(ECHO)(b"over", timeout=10)
                    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await server.drain(0)

    @asynchronous
    async def test_calls_over_the_limit_of_one_connection_wait_for_others_to_end(self, transport: Transport) -> None:
        entered: list[bytes] = []
        release = asyncio.Semaphore(0)

        async def hold(exchange: Exchange) -> bytes:
            entered.append(bytes(exchange.message))
            await release.acquire()
            return exchange.message

        async with (
            serving(transport, {HOLD: hold, ECHO: echo}, limits=Limits(streams=2)) as address,
            official(address) as channel,
            official(address) as other,
        ):
            assert await channel.unary_unary(ECHO)(b"", timeout=10) == b"", "the limit is known from now on"
            calls = [channel.unary_unary(HOLD)(b"%d" % number, timeout=20) for number in range(5)]
            for already in (2, 3, 4, 5):
                async with asyncio.timeout(10):
                    while len(entered) < already:
                        await other.unary_unary(ECHO)(b"")
                for _ in range(5):
                    await other.unary_unary(ECHO)(b"", timeout=10)
                assert len(entered) == already
                release.release()
            release.release()
            assert [await call for call in calls] == [b"0", b"1", b"2", b"3", b"4"]

    @pytest.mark.parametrize(("channels", "streams"), [(1, 16), (1, 1024), (6, 1024)])
    @asynchronous
    async def test_none_of_many_calls_at_once_fails(self, transport: Transport, channels: int, streams: int) -> None:
        count = min(6000, 100 * streams)

        async def slow(exchange: Exchange) -> bytes:
            await asyncio.sleep(0.02)
            return exchange.message

        async with AsyncExitStack() as stack:
            limits = Limits(streams=streams)
            address = await stack.enter_async_context(serving(transport, {ECHO: slow}, limits=limits))
            clients = [await stack.enter_async_context(official(address)) for _ in range(channels)]
            for client in clients:
                await client.unary_unary(WARM)(b"", timeout=10)
            calls = [clients[number % channels].unary_unary(ECHO)(b"%d" % number) for number in range(count)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [each for each in answers if isinstance(each, BaseException)] == []
            assert answers == [b"%d" % number for number in range(count)]

    @asynchronous
    async def test_a_client_that_pings_more_often_than_data_comes_stays_connected(self, transport: Transport) -> None:
        hold = Hold()
        keepalive = {"grpc.keepalive_time_ms": 1200, "grpc.keepalive_permit_without_calls": 1}
        pings = {"grpc.http2.max_pings_without_data": 0, "grpc.http2.min_time_between_pings_ms": 1000}
        options = list({**keepalive, **pings}.items())
        async with (
            serving(transport, {HOLD: hold}) as address,
            grpc.aio.insecure_channel(address, options=options) as channel,
        ):
            call = channel.unary_unary(HOLD)(b"held", timeout=30)
            await hold.was_entered()
            # gRPC's default closes the connection at the third ping that comes too soon, after 4.8 s.
            await asyncio.sleep(6.5)
            hold.release.set()
            assert await call == b"held"

    @pytest.mark.parametrize("where", ["port", "socket"])
    @asynchronous
    async def test_a_path_that_is_no_text_ends_no_other_call_and_the_next_is_answered(
        self, transport: Transport, socket_path: Path, where: str
    ) -> None:
        hold = Hold()
        methods = CoroutineService({HOLD: hold, ECHO: echo})
        server = await transport.serve(methods, (f"unix:{socket_path}", *LOOPBACK), Limits())
        address = f"unix:{socket_path}" if where == "socket" else f"127.0.0.1:{server.ports[0]}"
        try:
            async with connected(transport, address) as connection, connected(transport, address) as other:
                staying = asyncio.ensure_future(ask(connection, HOLD, b"stays"))
                await hold.was_entered()
                for path in (b"/conformance.Test/\xff", b"\xff"):
                    await send_call(address, path)
                    async with connected(transport, address) as new:
                        for each in (other, new):
                            await reached(each, self.prompt_s)
                hold.release.set()
                assert await staying == b"stays"
        finally:
            await server.drain(0)
        assert not sockets_in(socket_path.parent)

    # Draining

    @asynchronous
    async def test_a_drain_lets_calls_finish_and_refuses_new_ones_so_that_another_node_is_tried(
        self, transport: Transport
    ) -> None:
        for attempt in range(20):  # calls that cross with the server's goodbye are the ones that go wrong, sometimes
            hold = Hold()
            server = await transport.serve(CoroutineService({HOLD: hold, ECHO: echo}), LOOPBACK, Limits())
            address = f"127.0.0.1:{server.ports[0]}"
            async with connected(transport, address) as connection, connected(transport, address) as other:
                call = asyncio.ensure_future(ask(connection, HOLD, b"finishes"))
                await hold.was_entered()
                drain = asyncio.ensure_future(server.drain(10))
                crossing = [ask(connection) for _ in range(10 if attempt % 4 == 0 else 0)]
                for result in await asyncio.gather(*crossing, return_exceptions=True):
                    assert result == b"" or isinstance(result, NodeUnreachable | NodeGaveUp), repr(result)
                for each in (connection, other):
                    error = await refusal(each, self.prompt_s, lost=self.lost_in_a_drain)
                    assert isinstance(error, NodeUnreachable | NodeGaveUp), repr(error)
                assert not drain.done()
                assert not hold.cancelled.is_set()
                hold.release.set()
                assert await call == b"finishes"
                async with asyncio.timeout(self.prompt_s):
                    await drain

    @asynchronous
    async def test_a_call_that_outlasts_the_grace_is_cancelled(self, transport: Transport) -> None:
        hold = Hold()
        server = await transport.serve(CoroutineService({HOLD: hold}), LOOPBACK, Limits())
        async with connected(transport, f"127.0.0.1:{server.ports[0]}") as connection:
            call = asyncio.ensure_future(error_of(ask(connection, HOLD)))
            await hold.was_entered()
            started = time.monotonic()
            await server.drain(0.3)
            assert 0.25 < time.monotonic() - started < 0.3 + self.prompt_s
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                error = await call
            assert error.another_node, "the node took the call and gave it up: another may answer it"

    @asynchronous
    async def test_a_drain_with_nothing_in_flight_returns_at_once_and_frees_the_port(
        self, transport: Transport
    ) -> None:
        server = await transport.serve(CoroutineService({WARM: echo}), LOOPBACK, Limits())
        address = f"127.0.0.1:{server.ports[0]}"
        async with connected(transport, address) as connection:
            await warm(connection)
            async with asyncio.timeout(self.prompt_s):
                await server.drain(10)
        again = await transport.serve(CoroutineService({ECHO: echo}), (address,), Limits())
        await again.drain(0)

    # Nodes that are not there

    @asynchronous
    async def test_a_dead_port_is_unreachable_at_once_and_reached_again_in_1500_ms(self, transport: Transport) -> None:
        address = f"127.0.0.1:{free_port()}"
        async with connected(transport, address) as connection:
            for _ in range(5):
                started = time.monotonic()
                error = await error_of(ask(connection))
                assert isinstance(error, NodeUnreachable)
                assert time.monotonic() - started < 1
            for _ in range(2):
                server = await transport.serve(CoroutineService({ECHO: echo}), (address,), Limits())
                await reached(connection, 1.5)
                await server.drain(0)
                await refusal(connection, self.prompt_s)

    @asynchronous
    async def test_a_peer_that_says_nothing_costs_no_more_than_the_deadline(self, transport: Transport) -> None:
        async with peer(None) as address, connected(transport, address) as connection:
            started = time.monotonic()
            error = await error_of(ask(connection, timeout_s=0.4))
            assert isinstance(error, DeadlineExceeded | NodeUnreachable)
            assert time.monotonic() - started < 0.4 + self.prompt_s

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"])
    @asynchronous
    async def test_a_peer_that_hangs_up_or_is_no_grpc_server_is_the_nodes_failure(
        self, transport: Transport, answer: bytes
    ) -> None:
        async with peer(answer) as address, connected(transport, address) as connection:
            started = time.monotonic()
            error = await error_of(ask(connection, timeout_s=10))
            assert error.blame is Blame.NODE
            assert error.another_node
            assert time.monotonic() - started < 1 + self.prompt_s


async def send_call(address: str, path: bytes) -> None:
    """Sends the headers of a call, as no official client does, on a connection of its own; waits for what comes."""
    if (socket_path := path_of(address)) is not None:
        reader, writer = await asyncio.open_unix_connection(socket_path)
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"test", b"te": b"trailers"}
    block = b"".join(
        bytes([0, len(name)]) + name + bytes([len(value)]) + value
        for name, value in {**fields, b"content-type": b"application/grpc"}.items()
    )
    settings, headers = bytes(3) + b"\x04" + bytes(5), bytes([0, 0, len(block), 1, 5, 0, 0, 0, 1]) + block
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + headers)
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(0.3):
            while await reader.read(1000):
                pass
    writer.close()


def sockets_in(folder: Path) -> list[Path]:
    """The files of sockets there."""
    return [path for path in folder.iterdir() if path.is_socket()]
