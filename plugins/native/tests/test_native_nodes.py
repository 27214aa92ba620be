"""Connections to nodes of which nothing is heard any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from dl_inference_core.errors import NodeUnreachable
from dl_inference_core.testing.loopback import ECHO, HOLD, Hold, ask, connected, echo, error_of, serving, warm

native = pytest.importorskip("dl_inference_native", exc_type=ImportError)

MESSAGE = b"\x0a\x05hello"


def make(**options: Any) -> Any:
    return native.NativeTransport(native.NativeTransport.Options(**options))


class Proxy:
    """Passes bytes on, until it is told to drop them: those of the connections that there are by then."""

    def __init__(self, node: str) -> None:
        self._host, _, port = node.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def drop(self) -> None:
        """Neither read nor write any more, and close nothing."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self.drop()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers += [back, writer]
        for source, target in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, target)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while received := await source.read(65536):
                target.write(received)
                await target.drain()
        target.close()


@asynccontextmanager
async def proxied(node: str) -> AsyncIterator[tuple[str, Proxy]]:
    proxy = Proxy(node)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    finally:
        await proxy.close()
        server.close()


async def test_calls_on_a_connection_that_passes_nothing_end_and_the_next_one_works() -> None:
    """TCP's acknowledgements come, so TCP_USER_TIMEOUT does not help, and nothing is sent."""
    hold = Hold()
    async with (
        serving(make(), {HOLD: hold, ECHO: echo}) as node,
        proxied(node) as (address, proxy),
        connected(make(keepalive_s=1, keepalive_timeout_s=2), address) as connection,
    ):
        calls = [asyncio.ensure_future(error_of(ask(connection, HOLD, MESSAGE, timeout_s=50))) for _ in range(3)]
        await hold.was_entered()
        await warm(connection)
        proxy.drop()
        async with asyncio.timeout(30):
            assert [type(error) for error in await asyncio.gather(*calls)] == [NodeUnreachable] * 3
        assert await ask(connection, ECHO, MESSAGE, timeout_s=20) == MESSAGE
        hold.release.set()


async def test_a_node_of_grpcs_own_is_not_asked_more_often_than_it_allows() -> None:
    """By default it ends the connection at the fourth PING that comes without data between: here after 17 seconds."""

    async def late(message: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.sleep(20)
        return message

    server = grpc.aio.server()
    methods = {"Hold": grpc.unary_unary_rpc_method_handler(late)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("conformance.Test", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connected(make(keepalive_s=1, keepalive_timeout_s=4), f"127.0.0.1:{port}") as connection:
            assert await ask(connection, HOLD, MESSAGE, timeout_s=50) == MESSAGE
    finally:
        await server.stop(0)
