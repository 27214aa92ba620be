"""grpcio's channels to nodes as connections. Event loop only."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from dl_inference_core.certificates import Credentials, Watched
from dl_inference_core.errors import Code, DeadlineExceeded, InferenceError, NodeUnreachable, from_status
from dl_inference_core.transport import Answer, Connection, Message, Metadata

_GRACE_S = 0.01
"""After the deadline of a call gRPC has so long to end it. Where the packets of a node were lost, gRPC's timers ran out
1 s too late."""
_LOOK_S = 0.01
"""The time between two looks at the deadlines of calls. A look at 1,000 calls takes 50 µs; a timer for each call would
take 1 to 2 µs of every call."""


def as_bytes(message: Message) -> bytes:
    """The message as gRPC takes it: it takes no views."""
    return message if isinstance(message, bytes) else bytes(message)


def error_of(failure: grpc.aio.AioRpcError) -> InferenceError:
    """What the status of a call means."""
    error = from_status(Code(failure.code().value[0]), failure.details() or "")
    error.trailers = tuple(failure.trailing_metadata() or ())
    return error


def overdue_error() -> InferenceError:
    """What it means that `Overdue` cancelled a call."""
    return DeadlineExceeded("the deadline passed, and gRPC did not end the call")


class Overdue:
    """Cancels the calls that gRPC does not end by their deadlines."""

    def __init__(self) -> None:
        self._ends: dict[Any, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        """On which it looks at the deadlines; None while there is no call."""

    def watch(self, call: Any, end: float) -> None:
        """Cancel `call` soon after `end`, by `time.monotonic`, unless it is forgotten before."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._ends = loop, {}  # the calls of another loop ended with it
            loop.call_later(_LOOK_S, self._look, loop)
        self._ends[call] = end + _GRACE_S

    def forget(self, call: Any) -> None:
        """`call` has ended, or nobody waits for it."""
        self._ends.pop(call, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is not self._loop:
            return
        now = time.monotonic()
        late = [call for call, end in self._ends.items() if end <= now]
        for call in late:
            self.forget(call)
        if self._ends:
            loop.call_later(_LOOK_S, self._look, loop)
        else:
            self._loop = None
        for call in late:
            call.cancel()


class _Pairs(grpc.aio.Metadata):  # type: ignore[misc] # grpc is untyped
    """Metadata of a call. `grpc.aio` makes a mapping of any other sequence, and a tuple of the mapping, in 3 µs. Of a
    mapping it asks for nothing but its items, unless there are interceptors."""

    def __init__(self, pairs: Metadata) -> None:
        self._pairs = pairs

    @property
    def _metadata(self) -> Any:
        """What the other methods of the base class look into."""
        return grpc.aio.Metadata(*self._pairs)._metadata

    def __bool__(self) -> bool:
        return True  # an empty one would be replaced

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[str, str | bytes]]:
        return iter(self._pairs)


class Calling(Connection):
    """A connection of this transport."""

    @abstractmethod
    def begin(self, method: str, message: bytes, metadata: Metadata, timeout_s: float | None) -> Any:
        """A call of `grpc.aio` that is under way. Tell `ended` of it once, when it has ended or nobody waits for it.

        `Overdue` cancels it soon after `timeout_s`, if gRPC does not end it.

        Raises:
            DeadlineExceeded: `timeout_s` is not over 0.
            NodeUnreachable: the connection was closed.
        """

    @abstractmethod
    def ended(self, call: Any) -> None:
        """`call`, which `begin` gave, has ended, or nobody waits for it."""

    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        begun = time.monotonic()
        call = self.begin(method, as_bytes(message), metadata, timeout_s)
        try:
            return Answer(await call, await call.trailing_metadata() or ())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            late = timeout_s is not None and time.monotonic() - begun > timeout_s
            if not late or (task is not None and task.cancelling()):
                raise
            error = overdue_error()
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
        finally:
            self.ended(call)
        try:
            raise error
        finally:
            del error  # its traceback leads to this frame, and so to the message


class GrpcioConnection(Calling):
    """One `grpc.aio` channel to one node."""

    def __init__(self, channel: grpc.aio.Channel, overdue: Overdue) -> None:
        self._channel = channel
        self._overdue = overdue
        self._methods: dict[str, Any] = {}

    def stands(self, *, connect: bool = False) -> bool:
        """Whether it could take a call at once; with `connect` it sees to that, in the background."""
        return bool(self._channel.get_state(connect) is grpc.ChannelConnectivity.READY)

    def begin(self, method: str, message: bytes, metadata: Metadata, timeout_s: float | None) -> Any:
        make = self._methods.get(method)
        if make is None:
            make = self._methods[method] = self._channel.unary_unary(method)
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the call was sent")
        try:
            call = make(message, timeout=timeout_s, metadata=_Pairs(metadata))
        except grpc.aio.UsageError:
            call = None
        if call is None:  # not raised above: the error's context would lead here, and so to the message
            raise NodeUnreachable("the connection was closed")
        if timeout_s is not None:
            self._overdue.watch(call, time.monotonic() + timeout_s)
        return call

    def ended(self, call: Any) -> None:
        self._overdue.forget(call)

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
        self._calls: dict[Any, GrpcioConnection] = {}
        """Those that have not ended."""
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def begin(self, method: str, message: bytes, metadata: Metadata, timeout_s: float | None) -> Any:
        if self._closed:
            raise NodeUnreachable("the connection was closed")
        credentials = self._watched.current()
        if credentials is not self._credentials:
            self._credentials, stale = credentials, self._next
            self._next = self._connect(credentials)
            if stale is not None:
                self._close_soon(stale)
        if self._next is not None and (self._next.stands(connect=True) or not self._connection.stands()):
            retired, self._connection, self._next = self._connection, self._next, None
            self._close_if_unused(retired)
        call = self._connection.begin(method, message, metadata, timeout_s)
        self._calls[call] = self._connection
        return call

    def ended(self, call: Any) -> None:
        connection = self._calls.pop(call)
        connection.ended(call)
        if connection is not self._connection and not self._closed:
            self._close_if_unused(connection)

    def _close_if_unused(self, retired: GrpcioConnection) -> None:
        if retired not in self._calls.values():
            self._close_soon(retired)

    def _close_soon(self, connection: GrpcioConnection) -> None:
        task = asyncio.get_running_loop().create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self._closed = True
        for connection in {self._connection, self._next, *self._calls.values()}:
            if connection is not None:
                await connection.close()
        if self._closing:
            await asyncio.wait(self._closing)
