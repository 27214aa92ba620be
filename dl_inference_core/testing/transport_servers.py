"""Of the suite for transports, what is about servers: where they listen, how they drain, and if none is there."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dl_inference_core.errors import Blame, ConfigError, DeadlineExceeded, NodeGaveUp, NodeUnreachable
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    LOOPBACK,
    WARM,
    Hold,
    LoopbackConformance,
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
from dl_inference_core.transport import Call, Limits, Methods, Transport, UnaryHandler


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
        server = await transport.serve(Methods(unary={ECHO: echo, WARM: echo}), LOOPBACK * 2, Limits())
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
                async with connected(transport, address) as connection:
                    await connection.call(Call(method=ECHO, request=b""))
            assert sum(answered) == 40
            assert all(answered)
        finally:
            await one.drain(0)
            await two.drain(0)

    @asynchronous
    async def test_a_port_in_use_is_a_config_error(self, transport: Transport) -> None:
        async with serving(transport, {ECHO: echo}) as address:
            with pytest.raises(ConfigError, match=address):
                await transport.serve(Methods(unary={}), (address,), Limits())
            async with connected(transport, address) as connection:
                await warm(connection)

    @pytest.mark.parametrize("address", ["127.0.0.1:70000", "127.0.0.1:http?", "192.0.2.1:0", "no address"])
    @asynchronous
    async def test_a_bad_address_is_a_config_error_and_leaves_no_port_taken(
        self, transport: Transport, address: str
    ) -> None:
        good = f"127.0.0.1:{free_port()}"
        with pytest.raises(ConfigError) as error:
            await transport.serve(Methods(unary={}), (good, address), Limits())
        assert address in str(error.value)
        server = await transport.serve(Methods(unary={ECHO: echo}), (good,), Limits())
        await server.drain(0)

    # Unix-domain sockets

    @asynchronous
    async def test_a_socket_is_served_beside_a_port_to_official_clients_and_to_gateways(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        server = await transport.serve(Methods(unary={ECHO: echo, WARM: echo}), (address, *LOOPBACK), Limits())
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
        server = await transport.serve(Methods(unary={WARM: echo}), (f"unix:{socket_path}",), Limits(), tls=tls)
        try:
            async with connected(transport, f"unix:{socket_path}", tls=authority.client()) as connection:
                await warm(connection)
            async with connected(transport, f"unix:{socket_path}") as plain:
                await error_of(plain.call(Call(method=WARM, request=b"", deadline=time.monotonic() + 2)))
        finally:
            await server.drain(0)

    @asynchronous
    async def test_a_socket_that_a_killed_server_left_is_replaced(
        self, transport: Transport, socket_path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(socket_path))
            killed.listen()
        server = await transport.serve(Methods(unary={WARM: echo}), (f"unix:{socket_path}",), Limits())
        async with connected(transport, f"unix:{socket_path}") as connection:
            await warm(connection)
        await server.drain(0)

    @asynchronous
    async def test_a_socket_that_another_server_listens_on_is_left_to_it(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        server = await transport.serve(Methods(unary={WARM: echo}), (address,), Limits())
        async with connected(transport, address) as connection:
            with pytest.raises(ConfigError, match=f"{address}: another server listens there"):
                await transport.serve(Methods(unary={}), (address,), Limits())
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
                await transport.serve(Methods(unary={}), (*LOOPBACK, f"unix:{path}"), Limits())
        assert file.read_text() == "mine"

    @asynchronous
    async def test_a_socket_where_nobody_listens_is_unreachable_and_reached_again(
        self, transport: Transport, socket_path: Path
    ) -> None:
        address = f"unix:{socket_path}"
        async with connected(transport, address) as connection:
            for _ in range(2):
                error = await error_of(connection.call(Call(method=ECHO, request=b"")))
                assert isinstance(error, NodeUnreachable)
                server = await transport.serve(Methods(unary={ECHO: echo}), (address,), Limits())
                await reached(connection, 1.5)
                await server.drain(0)
                await refusal(connection, self.prompt_s)

    # Draining

    @asynchronous
    async def test_a_drain_lets_calls_finish_and_refuses_new_ones_so_that_another_node_is_tried(
        self, transport: Transport
    ) -> None:
        for attempt in range(20):  # calls that cross with the server's goodbye are the ones that go wrong, sometimes
            hold = Hold()
            server = await transport.serve(Methods(unary={HOLD: hold, ECHO: echo}), LOOPBACK, Limits())
            address = f"127.0.0.1:{server.ports[0]}"
            async with connected(transport, address) as connection, connected(transport, address) as other:
                call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"finishes")))
                await hold.was_entered()
                drain = asyncio.ensure_future(server.drain(10))
                crossing = [
                    connection.call(Call(method=ECHO, request=b"")) for _ in range(10 if attempt % 4 == 0 else 0)
                ]
                for result in await asyncio.gather(*crossing, return_exceptions=True):
                    assert result == b"" or isinstance(result, NodeUnreachable | NodeGaveUp), repr(result)
                for each in (connection, other):
                    error = await refusal(each, self.prompt_s)
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
        server = await transport.serve(Methods(unary={HOLD: hold}), LOOPBACK, Limits())
        async with connected(transport, f"127.0.0.1:{server.ports[0]}") as connection:
            call = asyncio.ensure_future(error_of(connection.call(Call(method=HOLD, request=b""))))
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
        server = await transport.serve(Methods(unary={WARM: echo}), LOOPBACK, Limits())
        address = f"127.0.0.1:{server.ports[0]}"
        async with connected(transport, address) as connection:
            await warm(connection)
            async with asyncio.timeout(self.prompt_s):
                await server.drain(10)
        again = await transport.serve(Methods(unary={ECHO: echo}), (address,), Limits())
        await again.drain(0)

    # Nodes that are not there

    @asynchronous
    async def test_a_dead_port_is_unreachable_at_once_and_reached_again_in_1500_ms(self, transport: Transport) -> None:
        address = f"127.0.0.1:{free_port()}"
        async with connected(transport, address) as connection:
            for _ in range(5):
                started = time.monotonic()
                error = await error_of(connection.call(Call(method=ECHO, request=b"")))
                assert isinstance(error, NodeUnreachable)
                assert time.monotonic() - started < 1
            for _ in range(2):
                server = await transport.serve(Methods(unary={ECHO: echo}), (address,), Limits())
                await reached(connection, 1.5)
                await server.drain(0)
                await refusal(connection, self.prompt_s)

    @asynchronous
    async def test_a_peer_that_says_nothing_costs_no_more_than_the_deadline(self, transport: Transport) -> None:
        async with peer(None) as address, connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 0.4)
            error = await error_of(connection.call(call))
            assert isinstance(error, DeadlineExceeded | NodeUnreachable)
            assert time.monotonic() - started < 0.4 + self.prompt_s

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"])
    @asynchronous
    async def test_a_peer_that_hangs_up_or_is_no_grpc_server_is_the_nodes_failure(
        self, transport: Transport, answer: bytes
    ) -> None:
        async with peer(answer) as address, connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 10)
            error = await error_of(connection.call(call))
            assert error.blame is Blame.NODE
            assert error.another_node
            assert time.monotonic() - started < 1 + self.prompt_s


def sockets_in(folder: Path) -> list[Path]:
    """The files of sockets there."""
    return [path for path in folder.iterdir() if path.is_socket()]
