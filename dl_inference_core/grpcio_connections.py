"""grpcio's channels to nodes as connections."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from dl_inference_core.certificates import Credentials, Watched
from dl_inference_core.errors import Code, DeadlineExceeded, NodeUnreachable, from_status
from dl_inference_core.transport import Answer, Connection, Message, Metadata

_GRACE_S = 0.02
"""After the deadline of a call gRPC has so long to end it. Where the packets of a node were lost, gRPC's timers ran out
1 s too late."""


def as_bytes(message: Message) -> bytes:
    """The message as gRPC takes it: it takes no views."""
    return message if isinstance(message, bytes) else bytes(message)


class Calling(Connection):
    """A connection of this transport."""

    @abstractmethod
    async def call_for(
        self,
        begun: Callable[[Any], None] | None,
        method: str,
        message: Message,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> Answer:
        """As `call`; hands the call of `grpc.aio` to `begun`."""

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        return await self.call_for(None, method, as_bytes(message), metadata, timeout_s)


class GrpcioConnection(Calling):
    """One `grpc.aio` channel to one node."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._methods: dict[str, Any] = {}

    def stands(self, *, connect: bool = False) -> bool:
        """Whether it could take a call at once; with `connect` it sees to that, in the background."""
        return bool(self._channel.get_state(connect) is grpc.ChannelConnectivity.READY)

    async def call_for(
        self,
        begun: Callable[[Any], None] | None,
        method: str,
        message: Message,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> Answer:
        call = self._methods.get(method)
        if call is None:
            call = self._methods[method] = self._channel.unary_unary(method)
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the call was sent")
        late = False
        timer: asyncio.TimerHandle | None = None

        def end_late() -> None:
            nonlocal late
            late = True
            rpc.cancel()

        try:
            rpc = call(message, timeout=timeout_s, metadata=metadata or None)
            if timeout_s is not None:
                timer = asyncio.get_running_loop().call_later(timeout_s + _GRACE_S, end_late)
            if begun is not None:
                begun(rpc)
            answer: bytes = await rpc
            return Answer(answer, await rpc.trailing_metadata() or ())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not late or (task is not None and task.cancelling()):
                raise
            error = from_status(Code.DEADLINE_EXCEEDED, "the deadline passed, and gRPC did not end the call")
        except grpc.aio.AioRpcError as failure:
            error = from_status(Code(failure.code().value[0]), failure.details() or "")
            error.trailers = tuple(failure.trailing_metadata() or ())
        except grpc.aio.UsageError:
            error = NodeUnreachable("the connection was closed")
        finally:
            if timer is not None:
                timer.cancel()
        try:
            raise error
        finally:
            del error  # its traceback leads to this frame, and so to the message

    async def close(self) -> None:
        await self._channel.close()


class TlsConnection(Calling):
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

    async def call_for(
        self,
        begun: Callable[[Any], None] | None,
        method: str,
        message: Message,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> Answer:
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
            return await connection.call_for(begun, method, message, metadata, timeout_s)
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
