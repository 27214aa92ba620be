from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import Mock

import pytest

from dl_inference_core import grpcio_transport
from dl_inference_core.errors import (
    AttemptCancelled,
    Code,
    DeadlineExceeded,
    InferenceError,
    NodeGaveUp,
    NodeUnreachable,
)
from dl_inference_core.grpcio_connections import GrpcioConnection, Overdue, TlsConnection
from dl_inference_core.grpcio_exchanges import GrpcioExchange, Handlers
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.testing import TransportConformance
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    WARM,
    CoroutineService,
    Hold,
    ask,
    connected,
    echo,
    error_of,
    official,
    reached,
    serving,
    warm,
)
from dl_inference_core.testing.transport_servers import send_call
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Ended, Exchange, Extras, Limits, Message, Method


class TestGrpcioTransport(TransportConformance):
    transport_class = GrpcioTransport
    lost_in_a_drain = 1
    """gRPC's C core takes a call that crosses with its goodbye and hands it to nobody, seldom."""


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
        calls = [asyncio.ensure_future(ask(connection, HOLD, b"")) for _ in range(2)]
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
        error = await error_of(ask(old, ECHO, b""))
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


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, ACKNOWLEDGED = b"\0\0\0\x04\0\0\0\0\0", b"\0\0\0\x04\x01\0\0\0\0"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("headers_timeout_s", b""),
        ("headers_timeout_s", PREFACE + SETTINGS),
        ("keepalive_s", PREFACE + SETTINGS + ACKNOWLEDGED),
        ("idle_timeout_s", PREFACE + SETTINGS + ACKNOWLEDGED),
    ],
)
async def test_who_says_no_more_is_closed(option: str, said: bytes) -> None:
    transport = GrpcioTransport(GrpcioTransport.Options(keepalive_timeout_s=1, **{option: 1}))
    async with serving(transport) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        if ACKNOWLEDGED in said:
            await reader.readexactly(len(SETTINGS))
        began = time.monotonic()
        with suppress(ConnectionError):
            async with asyncio.timeout(10):
                while await reader.read(1000):
                    pass
        assert time.monotonic() - began > 0.5
        writer.close()


async def test_a_channel_argument_goes_before_an_option() -> None:
    release = asyncio.Event()
    entered = 0

    async def hold(exchange: Exchange) -> bytes:
        nonlocal entered
        entered += 1
        await release.wait()
        return b""

    options = GrpcioTransport.Options(channel_arguments={"grpc.max_concurrent_streams": 1})
    async with (
        serving(GrpcioTransport(options), {HOLD: hold}, limits=Limits(streams=5)) as address,
        official(address) as channel,
        official(address) as other,
    ):
        await channel.unary_unary(WARM)(b"", timeout=10)
        calls = [channel.unary_unary(HOLD)(b"", timeout=20) for _ in range(3)]
        while not entered:
            await other.unary_unary(WARM)(b"", timeout=10)
        for _ in range(5):
            await other.unary_unary(WARM)(b"", timeout=10)
        assert entered == 1
        release.set()
        await asyncio.gather(*calls)


async def test_calls_of_a_server_that_has_ended_do_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpcio_transport, "_RETIRED_S", 0.1)
    hold = Hold()
    async with serving(make(), {HOLD: hold}) as address, connected(make(), address) as connection:
        call = asyncio.ensure_future(error_of(ask(connection, HOLD, b"")))
        await hold.was_entered()
        await send_call(address, b"\xff")
        await hold.was_cancelled(5)
        assert isinstance(await call, NodeGaveUp | NodeUnreachable)


async def test_a_server_listens_again_once_it_can_and_the_socket_of_the_one_that_has_ended_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if "cannot listen again yet" in message]

    with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as place:
        folder, moved = Path(place) / "folder", Path(place) / "moved"
        folder.mkdir()
        server = await make().serve(CoroutineService({ECHO: echo}), (f"unix:{folder}/socket",), Limits())
        try:
            folder.rename(moved)
            await send_call(f"unix:{moved}/socket", b"\xff")
            for _ in range(1000):
                if said():
                    break
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # some more attempts
            moved.rename(folder)
            await asyncio.sleep(0.2)
            (folder / "socket").unlink()  # as the server that has ended does, be it late
            async with connected(make(), f"unix:{folder}/socket") as connection:
                await reached(connection, 5)
            (message,) = said()
            assert message.endswith(f"there is no folder {folder}")
        finally:
            await server.drain(0)


class NeverEnding:
    """A channel of `grpc.aio` whose timers do not run out: its calls end when they are cancelled."""

    def unary_unary(self, method: str) -> Any:
        return lambda message, **_: asyncio.get_running_loop().create_future()


async def test_a_call_that_grpc_does_not_end_in_time_is_ended_all_the_same() -> None:
    overdue = Overdue()
    connection = GrpcioConnection(NeverEnding(), overdue)  # type: ignore[arg-type]
    for _ in range(2):  # between the two nobody looks at deadlines any more
        since = time.monotonic()
        async with asyncio.timeout(10):
            with pytest.raises(DeadlineExceeded, match="gRPC did not end the call"):
                await connection.call("/m", b"", timeout_s=0.01)
        assert time.monotonic() - since > 0.02
        async with asyncio.timeout(10):
            while overdue._loop is not None:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)


async def test_what_looks_at_deadlines_outlives_an_event_loop() -> None:
    overdue = Overdue()
    connection = GrpcioConnection(NeverEnding(), overdue)  # type: ignore[arg-type]

    async def begin() -> None:
        connection.begin("/m", b"", (), 0.01)

    await asyncio.to_thread(asyncio.run, begin())
    await asyncio.sleep(0.05)  # that call is late now, and its loop is closed
    async with asyncio.timeout(10):
        with pytest.raises(DeadlineExceeded, match="gRPC did not end the call"):
            await connection.call("/m", b"", timeout_s=0.01)


class Silent:
    """A service that leaves its exchanges to the test."""

    methods: Mapping[str, Method] = MappingProxyType({})
    private_trailers: frozenset[str] = frozenset()

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        pass

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        pass


async def begun(message: bytes = b"") -> tuple[GrpcioExchange, asyncio.Task[Message], Mock]:
    """An exchange that the service has begun, the task that carries it to its end, and its context."""
    context = Mock()
    context.time_remaining.return_value = None
    exchange = GrpcioExchange(Handlers(Silent()), context, "/m", message, ())
    running = asyncio.create_task(exchange.run())
    await asyncio.sleep(0)
    return exchange, running, context


@pytest.mark.parametrize("cancels", [False, True])
async def test_an_attempt_that_grpc_does_not_end_in_time_is_ended_all_the_same(cancels: bool) -> None:
    told: list[Ended] = []
    exchange, running, context = await begun()
    connection = GrpcioConnection(NeverEnding(), Overdue())  # type: ignore[arg-type]
    attempt = exchange.forward(connection, "/n", told.extend, "mine", timeout_s=10.0 if cancels else 0.01)
    async with asyncio.timeout(10):
        while not told:
            await asyncio.sleep(0.01)
            if cancels:
                attempt.cancel()
    ((whose, error, trailers, _),) = told
    assert (whose, type(error), trailers) == ("mine", AttemptCancelled if cancels else DeadlineExceeded, ())
    assert not running.done(), "another attempt may follow"
    exchange.fail(DeadlineExceeded("late"))
    assert await running == b""
    context.set_details.assert_called_once_with("late")


@pytest.mark.parametrize("which", ["call", "task"])
async def test_a_call_that_is_cancelled_before_its_deadline_is_cancelled(which: str) -> None:
    overdue = Overdue()
    connection = GrpcioConnection(NeverEnding(), overdue)  # type: ignore[arg-type]
    task = asyncio.create_task(connection.call("/m", b"", timeout_s=10.0))
    await asyncio.sleep(0)
    (call,) = overdue._ends
    (call if which == "call" else task).cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not overdue._ends


async def test_no_deadline_is_looked_at_of_a_call_that_has_ended(tmp_path: Path) -> None:
    authority, hold = Authority(tmp_path / "ca"), Hold()

    async def refuse(_: Exchange) -> bytes:
        raise NodeGaveUp("no")

    transport = make()
    methods = {ECHO: echo, HOLD: hold, "/refuse": refuse}
    async with (
        serving(make(), methods, tls=authority.issue().server()) as address,
        connected(transport, address, tls=authority.client()) as connection,
    ):
        assert isinstance(connection, TlsConnection)
        await warm(connection)
        assert await connection.call(ECHO, b"e", timeout_s=10) == (b"e", ())
        with pytest.raises(InferenceError):
            await connection.call("/refuse", b"", timeout_s=10)
        with pytest.raises(DeadlineExceeded):
            await connection.call(HOLD, b"", timeout_s=0.05)
        held = [asyncio.create_task(connection.call(HOLD, b"", timeout_s=10)) for _ in range(2)]
        await asyncio.sleep(0)
        assert len(transport._overdue._ends) == len(connection._calls) == 2
        held[0].cancel()
        await asyncio.wait(held[:1])
        await connection.close()
        with pytest.raises(asyncio.CancelledError):
            await held[1]
        assert not transport._overdue._ends
        assert not connection._calls
        with pytest.raises(NodeUnreachable, match="the connection was closed"):
            await connection.call(ECHO, b"")


async def test_what_an_attempt_at_a_closed_connection_was_to_send_is_freed_at_once() -> None:
    connection = make().connect("127.0.0.1:1", Limits())
    await connection.close()
    body = bytes(range(100))
    before = sys.getrefcount(body)

    async def attempt() -> None:
        exchange, running, _ = await begun(body)
        told: asyncio.Queue[Sequence[Ended]] = asyncio.Queue()
        exchange.forward(connection, "/n", told.put_nowait)
        ((_, error, _, _),) = await told.get()
        assert isinstance(error, NodeUnreachable)
        exchange.fail(error)
        await running

    gc.disable()
    try:
        await attempt()
        assert sys.getrefcount(body) == before
    finally:
        gc.enable()


async def test_an_attempt_that_is_cancelled_while_its_message_is_changed_is_not_sent() -> None:
    told: list[Ended] = []
    exchange, running, _ = await begun()
    channel = Mock()

    def change(message: Message) -> Message:
        exchange.reply(b"answered")
        return message

    connection = GrpcioConnection(channel, Overdue())
    exchange.forward(connection, "/n", told.extend, extras=Extras(change_request=change))
    assert await running == b"answered"
    ((_, error, _, _),) = told
    assert isinstance(error, AttemptCancelled)
    channel.unary_unary.assert_not_called()
