"""The built-in transport: grpc.aio with generic handlers, so that messages stay bytes."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
    Code,
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    NodeUnreachable,
    from_status,
)
from dl_inference_core.transport import (
    Call,
    Connection,
    HttpApp,
    Limits,
    Metadata,
    Methods,
    Server,
    StreamHandler,
    Transport,
    UnaryHandler,
    shortened,
)

_log = logging.getLogger(__name__)
_cygrpc_log = logging.getLogger("grpc._cython.cygrpc")

_STATUS = {Code(status.value[0]): status for status in grpc.StatusCode}
_RARELY_MS = 3_600_000
_LOOK_S = 0.05
_RETIRED_S = 60.0
_TELL_S = 60.0
_LONGEST_S = 2**31 // 1000 - 1
_OF_HTTP = frozenset({"user-agent", "te", "content-type", "content-length"})
_OF_ENVOY = frozenset({"x-forwarded-for", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms"})
_RESERVED = _OF_HTTP | _OF_ENVOY


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

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        return {"channel_arguments": dict(arguments)} if arguments else {}, ()

    async def serve(
        self,
        methods: Methods,
        addresses: tuple[str, ...],
        limits: Limits,
        *,
        share_port: bool = False,
        tls: ServerTls | None = None,
        http: HttpApp | None = None,
    ) -> Server:
        watched = None if tls is None else Watched(tls)
        _cygrpc_log.addFilter(_not_of_a_client_that_left)
        # gRPC counts the connections of each address by itself.
        limits = replace(limits, connections=max(1, limits.connections // max(1, len(addresses))))
        ours = [*size_options(limits), *_server_options(limits, self.options), ("grpc.so_reuseport", int(share_port))]
        # Of two arguments of one name gRPC takes the first.
        options = list({**dict(ours), **self.options.channel_arguments}.items())
        handlers = _Handlers(methods)
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
            return GrpcioConnection(grpc.aio.insecure_channel(address, options=options))
        options += name_options(tls, address)

        def connect(credentials: Credentials) -> GrpcioConnection:
            return GrpcioConnection(grpc.aio.secure_channel(address, channel_credentials(credentials), options=options))

        return TlsConnection(self._watch(tls), connect)

    def _watch(self, tls: ClientTls) -> Watched:
        files = tls.model_copy(update={"server_name": None})
        if files not in self._watched:
            self._watched[files] = Watched(files)
        return self._watched[files]


async def _listening(
    handlers: _Handlers, addresses: Sequence[str], options: list[tuple[str, Any]], watched: Watched | None
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
    """What gRPC calls the limits of a server."""
    ages = {
        "grpc.max_connection_idle_ms": options.idle_timeout_s,
        "grpc.max_connection_age_ms": options.connection_age_s,
    }
    return [
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_metadata_size", options.header_kb * 1024),
        ("grpc.server_handshake_timeout_ms", options.headers_timeout_s * 1000),
        ("grpc.http2.settings_timeout", options.headers_timeout_s * 1000),
        ("grpc.keepalive_time_ms", options.keepalive_s * 1000),
        ("grpc.keepalive_timeout_ms", options.keepalive_timeout_s * 1000),
        # Or the answer to a ping may take 60 seconds, whatever the timeout is.
        ("grpc.http2.ping_timeout_ms", options.keepalive_timeout_s * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
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


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
    def __init__(self, methods: Methods) -> None:
        # Reading a context's metadata costs 3 % of a gateway's request, and nearly always there is none.
        self._without_metadata = {
            path: grpc.unary_unary_rpc_method_handler(_unary(path, handler, metadata=False))
            for path, handler in methods.unary.items()
        }
        self._handlers = {
            path: grpc.unary_unary_rpc_method_handler(_unary(path, handler, metadata=True))
            for path, handler in methods.unary.items()
        } | {
            path: grpc.stream_stream_rpc_method_handler(_streaming(path, handler))
            for path, handler in methods.streaming.items()
        }

    def service(self, details: Any) -> Any:
        metadata = details.invocation_metadata
        if len(metadata) == 1 and metadata[0][0] == "user-agent" and details.method in self._without_metadata:
            return self._without_metadata[details.method]
        return self._handlers.get(details.method)


def _unary(method: str, handler: UnaryHandler, *, metadata: bool) -> Any:
    async def answer(request: bytes, context: Any) -> bytes:
        call = _call(method, request, context, metadata=metadata)
        try:
            response = await handler(call)
        except InferenceError as error:
            await _abort(context, error, call)
        if call.trailers:
            context.set_trailing_metadata(tuple(call.trailers))
        return response

    return answer


def _streaming(method: str, handler: StreamHandler) -> Any:
    async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        call = _call(method, b"", context, metadata=True)
        try:
            async for response in handler(call, requests):
                yield response
        except InferenceError as error:
            await _abort(context, error, call)
        if call.trailers:
            context.set_trailing_metadata(tuple(call.trailers))

    return answer


def _call(method: str, request: bytes, context: Any, *, metadata: bool) -> Call:
    remaining = context.time_remaining()
    return Call(
        method=method,
        request=request,
        metadata=_callers_own(context.invocation_metadata()) if metadata else (),
        deadline=None if remaining is None else time.monotonic() + remaining,
    )


def _callers_own(metadata: Any) -> Metadata:
    return tuple([pair for pair in metadata if pair[0] not in _RESERVED and not pair[0].startswith("grpc-")])


async def _abort(context: Any, error: InferenceError, call: Call) -> None:
    await context.abort(_STATUS[error.code], shortened(str(error)), tuple(call.trailers))


class GrpcioConnection(Connection):
    """One `grpc.aio` channel to one node."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._methods: dict[str, Any] = {}

    def stands(self, *, connect: bool = False) -> bool:
        """Whether it could take a call at once; with `connect` it sees to that, in the background."""
        return bool(self._channel.get_state(connect) is grpc.ChannelConnectivity.READY)

    async def call(self, call: Call) -> bytes:
        method = self._methods.get(call.method)
        if method is None:
            method = self._methods[call.method] = self._channel.unary_unary(call.method)
        timeout = None
        if call.deadline is not None:
            timeout = call.deadline - time.monotonic()
            if timeout <= 0:
                raise DeadlineExceeded("the deadline passed before the call was sent")
        try:
            rpc = method(call.request, timeout=timeout, metadata=call.metadata or None)
            response: bytes = await rpc
            trailers = await rpc.trailing_metadata()
        except grpc.aio.AioRpcError as error:
            call.trailers.extend(error.trailing_metadata() or ())
            raise from_status(Code(error.code().value[0]), error.details() or "") from None
        except grpc.aio.UsageError as error:
            raise NodeUnreachable("the connection was closed") from error
        if trailers:
            call.trailers.extend(trailers)
        return response

    async def close(self) -> None:
        await self._channel.close()


class TlsConnection(Connection):
    """A connection by TLS that is made anew when the files change.

    The old one takes the calls for as long as it stands and the new one does not yet: a node that accepts the old
    certificate but not the new is not lost for that.
    """

    def __init__(self, watched: Watched, connect: Callable[[Credentials], GrpcioConnection]) -> None:
        self._watched = watched
        self._connect = connect
        self._credentials = watched.current()
        self._connection = connect(self._credentials)
        self._next: GrpcioConnection | None = None
        self._in_flight: Counter[GrpcioConnection] = Counter()

    async def call(self, call: Call) -> bytes:
        credentials = self._watched.current()
        if credentials is not self._credentials:
            self._credentials, stale = credentials, self._next
            self._next = self._connect(credentials)
            if stale is not None:
                await stale.close()
        if self._next is not None and (self._next.stands(connect=True) or not self._connection.stands()):
            retired, self._connection, self._next = self._connection, self._next, None
            await self._close_if_unused(retired)
        connection = self._connection
        self._in_flight[connection] += 1
        try:
            return await connection.call(call)
        finally:
            self._in_flight[connection] -= 1
            if connection is not self._connection:
                await self._close_if_unused(connection)

    async def _close_if_unused(self, retired: GrpcioConnection) -> None:
        if not self._in_flight[retired]:
            del self._in_flight[retired]
            await retired.close()

    async def close(self) -> None:
        for connection in (self._connection, self._next, *self._in_flight):
            if connection is not None:
                await connection.close()
