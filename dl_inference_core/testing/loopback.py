"""What the suite for transports stands on: servers and connections on the loopback interface, and their handlers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc.aio
import pytest

from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.coroutines import Coroutines, StreamHandler, UnaryHandler, call_soon
from dl_inference_core.errors import Code, DeadlineExceeded, InferenceError
from dl_inference_core.testing.plugin import PluginConformance
from dl_inference_core.transport import (
    Connection,
    Exchange,
    Limits,
    Message,
    Metadata,
    Method,
    Server,
    Transport,
)
from dl_inference_core.wire.routing_keys import KeyFields

ECHO = "/conformance.Test/Echo"
HOLD = "/conformance.Test/Hold"
WARM = "/conformance.Test/Warm"
LOOPBACK = ("127.0.0.1:0",)

SelfT = TypeVar("SelfT", bound="LoopbackConformance")
P = ParamSpec("P")


def asynchronous(
    test: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, None]],
) -> Callable[Concatenate[SelfT, P], None]:
    """A test that is a coroutine, run by the suite's `run`."""

    @functools.wraps(test)
    def run(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.run(test(self, *args, **kwargs))

    return run


class LoopbackConformance(PluginConformance):
    """Makes the transport, and runs tests that are coroutines."""

    transport_class: ClassVar[type[Transport]]
    prompt_s: ClassVar[float] = 1.0
    """How many seconds something may take that is to happen at once."""
    lost_in_a_drain: ClassVar[int] = 0
    """How many calls of one connection a server that drains may take and never answer: the client's deadline, or the
    end of the drain, ends them."""

    @pytest.fixture
    def transport(self) -> Transport:
        return self.transport_class(self.transport_class.Options(**self.options))

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Run a test on an event loop of its own, for four minutes at most. Override it for another loop."""

        async def bounded() -> None:
            async with asyncio.timeout(240):
                await test

        with asyncio.Runner() as runner:
            runner.run(bounded())


class CoroutineService:
    """A service whose methods coroutines answer.

    Attributes:
        endings: the method and the code of each exchange that has ended.
    """

    private_trailers = frozenset({"x-private"})

    def __init__(self, unary: Mapping[str, UnaryHandler], streaming: Mapping[str, StreamHandler] | None = None) -> None:
        self.methods = {path: Method() for path in unary} | {path: Method(streaming=True) for path in streaming or {}}
        self.endings: list[tuple[str, Code]] = []
        self._unary = unary
        self._streaming = streaming or {}
        self._coroutines = Coroutines()

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            if exchange.method in self._unary:
                self._coroutines.answer(exchange, self._unary[exchange.method])
            else:
                self._coroutines.answer_stream(exchange, self._streaming[exchange.method])

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        self.endings.extend(_endings(ended))


def _endings(ended: Sequence[tuple[Exchange, Code]]) -> list[tuple[str, Code]]:
    for _, code in ended:
        assert isinstance(code, Code), "equal to a number, but no number"
    return [(exchange.method, code) for exchange, code in ended]


class DirectService:
    """A service whose only method, ECHO, a function begins."""

    private_trailers = frozenset({"x-private"})

    def __init__(
        self, begin: Callable[[Exchange], object], *, streaming: bool = False, key: KeyFields | None = None
    ) -> None:
        self.methods = {ECHO: Method(streaming=streaming, key=key)}
        self.endings: list[tuple[str, Code]] = []
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            self._begin(exchange)

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        self.endings.extend(_endings(ended))
        call_soon(self._loop, self._ended.set)

    async def has_ended(self, count: int) -> None:
        """Wait until so many exchanges have."""
        while len(self.endings) < count:
            self._ended.clear()
            await self._ended.wait()


async def echo(exchange: Exchange) -> Message:
    return exchange.message


class Recorder:
    """A handler that answers with the request, and keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[Exchange] = []

    async def __call__(self, exchange: Exchange) -> Message:
        self.calls.append(exchange)
        return exchange.message


class Hold:
    """A handler, of either kind, that holds its calls until told, and notes how they ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> Message:
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return exchange.message

    async def was_entered(self) -> None:
        async with asyncio.timeout(10):
            await self.entered.wait()

    async def was_cancelled(self, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            await self.cancelled.wait()

    async def stream(self, exchange: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        yield b"first"
        yield await self(exchange)


@asynccontextmanager
async def serving(
    transport: Transport,
    unary: Mapping[str, UnaryHandler] | None = None,
    streaming: Mapping[str, StreamHandler] | None = None,
    limits: Limits | None = None,
    tls: ServerTls | None = None,
) -> AsyncIterator[str]:
    """A server on the loopback interface, on which `warm` works too: its address."""
    service = CoroutineService({**(unary or {}), WARM: echo}, streaming or {})
    server = await transport.serve(service, LOOPBACK, limits or Limits(), tls=tls)
    assert isinstance(server, Server)
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.drain(0)


@asynccontextmanager
async def connected(
    transport: Transport, address: str, limits: Limits | None = None, tls: ClientTls | None = None
) -> AsyncIterator[Connection]:
    connection = transport.connect(address, limits or Limits(), tls)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def pair(
    transport: Transport,
    handler: UnaryHandler,
    server_limits: Limits | None = None,
    client_limits: Limits | None = None,
) -> AsyncIterator[Connection]:
    """A connection to a server whose methods ECHO and HOLD are `handler`."""
    methods = {ECHO: handler, HOLD: handler}
    async with (
        serving(transport, methods, limits=server_limits) as address,
        connected(transport, address, client_limits) as connection,
    ):
        yield connection


async def has_refused(transport: Transport, **expected: int) -> None:
    """Wait until the transport has refused so many by each reason, and none by any other."""
    for _ in range(1000):
        refused = {reason: count for reason, count in transport.refusals().items() if count}
        if refused == expected:
            return
        await asyncio.sleep(0.02)
    assert refused == expected


@asynccontextmanager
async def official(
    address: str, credentials: grpc.ChannelCredentials | None = None, **options: Any
) -> AsyncIterator[Any]:
    """A channel of the grpcio package's own."""
    options["options"] = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    async with (
        grpc.aio.insecure_channel(address, **options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, **options)
    ) as channel:
        yield channel


@asynccontextmanager
async def peer(answer: bytes | None) -> AsyncIterator[str]:
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


def by_key(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str | bytes]]:
    """In the order of the keys, equal ones as they stood: gRPC promises no order between different keys."""
    return sorted(((key, value) for key, value in metadata), key=lambda item: item[0])


async def ask(
    connection: Connection,
    method: str = ECHO,
    message: bytes = b"",
    *,
    metadata: Metadata = (),
    timeout_s: float | None = None,
) -> Message:
    """The message of a node's answer."""
    return (await connection.call(method, message, metadata=metadata, timeout_s=timeout_s)).message


async def error_of(call: Coroutine[Any, Any, Any]) -> InferenceError:
    with pytest.raises(InferenceError) as error:
        await call
    return error.value


async def warm(connection: Connection) -> None:
    """A call there and back, so that the connection stands."""
    assert await ask(connection, WARM, b"warm") == b"warm"


async def refusal(connection: Connection, within_s: float, *, lost: int = 0) -> InferenceError:
    """The error of the first call that is not answered any more.

    Args:
        lost: how many calls may be left without an answer before.
    """
    async with asyncio.timeout((1 + lost) * within_s):
        while True:
            try:
                await ask(connection, timeout_s=within_s)
            except DeadlineExceeded:
                if not lost:
                    raise
                lost -= 1
            except InferenceError as error:
                return error


async def reached(connection: Connection, within_s: float) -> None:
    """Calls until one is answered."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await ask(connection)
            except InferenceError:
                await asyncio.sleep(0.02)
            else:
                return


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection is given meanwhile."""
    while True:
        port = random.randrange(20_000, 32_768)  # noqa: S311 - below those that Linux gives to connections
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
