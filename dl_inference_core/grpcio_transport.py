"""The built-in transport: grpc.aio with generic handlers, so that messages stay bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from pydantic import Field

from dl_inference_core import sockets
from dl_inference_core.certificates import Credentials, Watched
from dl_inference_core.config import ClientTls, PluginOptions, ServerTls
from dl_inference_core.errors import (
    ConfigError,
)
from dl_inference_core.grpcio_connections import GrpcioConnection, Overdue, TlsConnection
from dl_inference_core.grpcio_exchanges import Handlers
from dl_inference_core.transport import (
    Connection,
    Http,
    Limits,
    Server,
    Service,
    Timer,
    Transport,
)

_log = logging.getLogger(__name__)
_cygrpc_log = logging.getLogger("grpc._cython.cygrpc")

_RARELY_MS = 3_600_000
_LOOK_S = 0.05
_RETIRED_S = 60.0
_TELL_S = 60.0
_LONGEST_S = 2**31 // 1000 - 1
_UNLIMITED = 2**31 - 1
# Clients that want to know whether the server lives ping it, every 10 seconds at most in grpc-go and grpc-java, and as
# often as they are told to on gRPC's C core. One ping a second costs nothing.
_PING_INTERVAL_MS = 1000


class GrpcioTransport(Transport):
    """grpcio's asyncio stack, client and server; runs wherever grpcio does.

    Plain gRPC only: HTTP needs a port of its own beside it. With TLS, certificates that change on disk are taken up by
    servers and connections alike; keys may be RSA or ECDSA on P-256 and P-384, since grpcio knows no others.
    """

    name = "grpcio"

    class Options(PluginOptions):
        """Attributes:
        connect_timeout_ms: how long a connection to a node may take to come up.
        reconnect_ms: the first pause before a failed connection is tried again; the later ones are twice as long.
        unacknowledged_ms: how long what was sent to a node may go without TCP's acknowledgement, or the node take
            nothing in, before the connection is given up, so that the next one finds a path that works again; 0 leaves
            that to the system. On Linux only.
        header_kb: KiB that the headers of one call may have; with more, some calls are refused, and all with a quarter
            more and over 16.
        idle_timeout_s: seconds after which a client's connection without calls is closed; 0 never.
        connection_age_s: seconds after which a client is told to connect anew, once its calls are answered; 0 never.
        headers_timeout_s: seconds that a client has for the handshakes of TLS and HTTP/2.
        keepalive_s: seconds after which a client's silent connection is asked for a sign of life.
        keepalive_timeout_s: seconds that the sign may take; then the connection is closed.
        channel_arguments: gRPC's own settings of a server, by their names, which go before all of these; gRPC ignores
            those that it does not know.
        """

        connect_timeout_ms: int = 1000
        reconnect_ms: int = 100
        unacknowledged_ms: int = Field(default=2000, ge=0, lt=2**31)
        header_kb: int = Field(default=16, ge=1, le=8192)
        idle_timeout_s: int = Field(default=3600, ge=0, le=_LONGEST_S)
        connection_age_s: int = Field(default=0, ge=0, le=_LONGEST_S)
        headers_timeout_s: int = Field(default=10, ge=1, le=_LONGEST_S)
        keepalive_s: int = Field(default=30, ge=1, le=_LONGEST_S)
        keepalive_timeout_s: int = Field(default=5, ge=1, le=_LONGEST_S)
        channel_arguments: dict[str, int | str] = Field(default={})

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._watched: dict[ClientTls, Watched] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._overdue = Overdue()

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        return {"channel_arguments": dict(arguments)} if arguments else {}, ()

    async def serve(
        self,
        service: Service,
        addresses: tuple[str, ...],
        limits: Limits,
        *,
        share_port: bool = False,
        tls: ServerTls | None = None,
        http: Http | None = None,
    ) -> Server:
        self._loop = asyncio.get_running_loop()
        watched = None if tls is None else Watched(tls)
        _cygrpc_log.addFilter(_not_of_a_client_that_left)
        # gRPC counts the connections of each address by itself.
        limits = replace(limits, connections=max(1, limits.connections // max(1, len(addresses))))
        ours = [*size_options(limits), *_server_options(limits, self.options), ("grpc.so_reuseport", int(share_port))]
        # Of two arguments of one name gRPC takes the first.
        options = list({**dict(ours), **self.options.channel_arguments}.items())
        handlers = Handlers(service)
        paths = [path for address in addresses if (path := sockets.path_of(address)) is not None]
        for path in paths:
            sockets.claim(path)  # grpc would take it from a server that lives
        server, bound = await _listening(handlers, addresses, options, watched)

        async def again() -> grpc.aio.Server:
            for path in paths:
                # Or the server that ends would remove the socket of this one.
                await _unlinked(path)
                sockets.claim(path)
            return (await _listening(handlers, bound, options, watched))[0]

        return GrpcioServer(server, bound, watched, again)

    def prepare(self, tls: ClientTls) -> None:
        self._watch(tls)

    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> Connection:
        self._loop = asyncio.get_running_loop()
        options: list[tuple[str, Any]] = [
            *size_options(limits),
            ("grpc.initial_reconnect_backoff_ms", self.options.reconnect_ms),
            ("grpc.max_reconnect_backoff_ms", 2 * self.options.reconnect_ms),
            # Despite its name, the time that grpc gives one attempt to connect.
            ("grpc.min_reconnect_backoff_ms", self.options.connect_timeout_ms),
            # Which node a request goes to, and whether again, is decided above this seam.
            ("grpc.enable_retries", 0),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        if self.options.unacknowledged_ms:
            # gRPC sets TCP_USER_TIMEOUT where it sends keepalive pings, which servers forbid unless they are rare.
            options += [
                ("grpc.keepalive_time_ms", _RARELY_MS),
                ("grpc.keepalive_timeout_ms", self.options.unacknowledged_ms),
            ]
        if tls is None:
            return GrpcioConnection(grpc.aio.insecure_channel(address, options=options), self._overdue)
        options += name_options(tls, address)
        overdue = self._overdue

        def connect(credentials: Credentials) -> GrpcioConnection:
            channel = grpc.aio.secure_channel(address, channel_credentials(credentials), options=options)
            return GrpcioConnection(channel, overdue)

        return TlsConnection(self._watch(tls), connect)

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        assert self._loop is not None, "there is no event loop before the first serve or connect"
        return _LoopTimer(self._loop, seconds, function)

    def _watch(self, tls: ClientTls) -> Watched:
        files = tls.model_copy(update={"server_name": None})
        if files not in self._watched:
            self._watched[files] = Watched(files)
        return self._watched[files]


def _runs(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread runs `loop`."""
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is loop
    return False


class _LoopTimer:
    """A timer of an event loop that any thread may start and cancel."""

    __slots__ = ("_function", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, function: Callable[[], None]) -> None:
        self._loop = loop
        self._function: Callable[[], None] | None = function
        self._handle: asyncio.Handle | None = None
        if _runs(loop):
            self._start(loop.time() + seconds)
        else:
            loop.call_soon_threadsafe(self._start, loop.time() + seconds)

    def _start(self, at: float) -> None:
        if self._function is not None:
            self._handle = self._loop.call_at(at, self._fire)

    def _fire(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()

    def cancel(self) -> None:
        self._function = None
        if self._handle is not None and _runs(self._loop):
            self._handle.cancel()


async def _listening(
    handlers: Handlers, addresses: Sequence[str], options: list[tuple[str, Any]], watched: Watched | None
) -> tuple[grpc.aio.Server, list[str]]:
    """A server that has started; and its addresses, with the ports that it got.

    Raises:
        ConfigError: an address cannot be listened on.
    """
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((handlers,))
    bound = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        is_path = sockets.path_of(address) is not None
        try:
            if not is_path and int(port) > 65535:
                raise ValueError("the port is over 65535")  # grpc would take the rest of it modulo 65536
            got = (
                server.add_insecure_port(address)
                if watched is None
                else server.add_secure_port(address, _server_credentials(watched))
            )
        except (RuntimeError, ValueError) as error:
            # Nothing else gives back the ports that were bound before.
            await server.start()
            await server.stop(None)
            raise ConfigError(f"cannot listen on {address}: is the address right, and the port free?") from error
        bound.append(address if is_path else f"{host}:{got}")
    await server.start()
    return server, bound


async def _unlinked(path: Path) -> None:
    """Waits until nothing lies at `path`, for 2 s at most."""
    for _ in range(200):
        if not os.path.lexists(path):  # noqa: ASYNC240 - as quick as a bind
            return
        await asyncio.sleep(0.01)


def size_options(limits: Limits) -> list[tuple[str, int]]:
    """What gRPC calls the limits of a channel or server."""
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
    ]


def _server_options(limits: Limits, options: GrpcioTransport.Options) -> list[tuple[str, int]]:
    """What gRPC calls the limits of a server.

    Calls over `limits.streams` wait at the client, and calls that have come wait for the event loop. By default gRPC
    resets some of either: its overload protection counts calls that it has answered but not yet freed; of more than
    1,000 pending calls it refuses some at random, all from 3,000 on; and it cancels those that have waited for 30 s.
    `limits` bounds all of these already, and clients have their deadlines.
    """
    ages = {
        "grpc.max_connection_idle_ms": options.idle_timeout_s,
        "grpc.max_connection_age_ms": options.connection_age_s,
    }
    return [
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.http.overload_protection", 0),
        ("grpc.server.max_pending_requests", _UNLIMITED),
        ("grpc.server.max_pending_requests_hard_limit", _UNLIMITED),
        ("grpc.server_max_unrequested_time_in_server", _UNLIMITED),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_metadata_size", options.header_kb * 1024),
        ("grpc.server_handshake_timeout_ms", options.headers_timeout_s * 1000),
        ("grpc.http2.settings_timeout", options.headers_timeout_s * 1000),
        ("grpc.keepalive_time_ms", options.keepalive_s * 1000),
        ("grpc.keepalive_timeout_ms", options.keepalive_timeout_s * 1000),
        # Or the answer to a ping may take 60 seconds, whatever the timeout is.
        ("grpc.http2.ping_timeout_ms", options.keepalive_timeout_s * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        # By default the third ping that comes within 5 minutes of another, without data between, ends the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS),
        *((name, seconds * 1000) for name, seconds in ages.items() if seconds),
    ]


def _not_of_a_client_that_left(record: logging.LogRecord) -> bool:
    """grpc.aio logs with a traceback each call whose client leaves before it has taken all of the answer."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "ExecuteBatchError"


def name_options(tls: ClientTls, address: str) -> list[tuple[str, str]]:
    """What gRPC calls the name that a channel to `address` expects of the other side."""
    # gRPC itself would have a socket's path for a name.
    name = tls.server_name or ("localhost" if sockets.path_of(address) is not None else None)
    return [("grpc.ssl_target_name_override", name)] if name is not None else []


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """What a channel shows, and whom it trusts."""
    return grpc.ssl_channel_credentials(credentials.authorities, credentials.key, credentials.certificate)


def _server_credentials(watched: Watched) -> grpc.ServerCredentials:
    """What one port shows, and whom it trusts: looked up for each new connection, on a thread of gRPC's."""
    shown = watched.current()

    def configuration() -> Any:
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.certificate)], shown.authorities)

    def changed() -> Any:
        nonlocal shown
        before, shown = shown, watched.current()
        return None if shown is before else configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), changed, shown.authorities is not None)


class GrpcioServer(Server):
    """A started `grpc.aio` server; and the next one, when it ends by itself."""

    def __init__(
        self,
        server: grpc.aio.Server,
        addresses: Sequence[str],
        watched: Watched | None,
        again: Callable[[], Awaitable[grpc.aio.Server]],
    ) -> None:
        """Args:
        again: starts another one on the same addresses.
        """
        self._server = server
        self._again = again
        self._retiring: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self.ports = tuple(int(each.rpartition(":")[2]) for each in addresses if sockets.path_of(each) is None)
        self._tasks = [asyncio.create_task(self._keep(), name="keep listening")]
        if watched is not None:
            self._tasks.append(asyncio.create_task(_watch(watched), name="watch the certificates"))

    async def _keep(self) -> None:
        """grpc.aio ends a server at the first call whose path is no UTF-8; the calls that it has have a minute left."""
        while True:
            try:
                if not await self._server.wait_for_termination(_LOOK_S):
                    return
            except Exception as error:
                _log.error("a call has ended grpcio's server, by a fault of grpcio's (%s); it listens again", error)
                self._retiring[self._server] = asyncio.create_task(self._retire(self._server))
                await self._replace()

    async def _retire(self, server: grpc.aio.Server) -> None:
        await server.stop(_RETIRED_S)
        del self._retiring[server]

    async def _replace(self) -> None:
        told = -math.inf
        while True:
            try:
                self._server = await self._again()
            except Exception as error:  # or nobody would listen any more
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    foreseen = isinstance(error, ConfigError)
                    _log.error("grpcio's server cannot listen again yet: %s", error, exc_info=not foreseen)
                await asyncio.sleep(_LOOK_S)
            else:
                return

    async def drain(self, grace_s: float) -> None:
        for task in self._tasks:
            task.cancel()
        stopping = [server.stop(grace_s) for server in (self._server, *self._retiring)]
        await asyncio.gather(*stopping, *self._retiring.values())


async def _watch(watched: Watched) -> None:
    """So that a bad file is told of even while nobody connects."""
    async for _ in watched.changes():
        pass
