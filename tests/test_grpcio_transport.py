from __future__ import annotations

import asyncio
from pathlib import Path

from dl_inference_core.errors import NodeUnreachable
from dl_inference_core.grpcio_transport import GrpcioTransport, TlsConnection
from dl_inference_core.testing import TransportConformance
from dl_inference_core.testing.loopback import ECHO, HOLD, Hold, connected, echo, error_of, serving, warm
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Call


class TestGrpcioTransport(TransportConformance):
    transport_class = GrpcioTransport


def make() -> GrpcioTransport:
    return GrpcioTransport(GrpcioTransport.Options())


async def test_a_connection_with_old_certificates_is_closed_with_its_last_call(tmp_path: Path) -> None:
    authority, hold = Authority(tmp_path / "ca"), Hold()
    shown = authority.issue("client")
    async with (
        serving(make(), {HOLD: hold}, tls=authority.issue().server(clients=authority)) as address,
        connected(make(), address, tls=authority.client(shown)) as connection,
    ):
        assert isinstance(connection, TlsConnection)
        calls = [asyncio.ensure_future(connection.call(Call(method=HOLD, request=b""))) for _ in range(2)]
        await hold.was_entered()
        old = connection._connection
        shown.become(authority.issue("client"))
        while connection._connection is old:
            await warm(connection)
            await asyncio.sleep(0.02)
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        assert old.stands()
        hold.release.set()
        await calls[1]
        error = await error_of(old.call(Call(method=ECHO, request=b"")))
        assert isinstance(error, NodeUnreachable)
        assert str(error) == "the connection was closed"
        await warm(connection)


async def test_a_connection_that_stands_is_kept_while_the_node_takes_no_other(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    shown = ours.issue("client")
    async with (
        serving(make(), {ECHO: echo}, tls=ours.issue().server(clients=ours)) as address,
        connected(make(), address, tls=ours.client(shown)) as connection,
    ):
        assert isinstance(connection, TlsConnection)
        await warm(connection)
        for authority in (other, other, ours):
            before = connection._next
            shown.become(authority.issue("client"))
            while connection._next is before:
                await warm(connection)
                await asyncio.sleep(0.02)
            for _ in range(20):
                await warm(connection)
                await asyncio.sleep(0.02)
        assert connection._next is None
