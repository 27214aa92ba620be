"""The seam between the network and the rest: a `Call` comes in or goes out, and bytes or an error come back.

Nothing else in the core knows how bytes travel. A transport turns gRPC framing, compression, deadlines, statuses and
trailers into these few types and back; `dl_inference_core.testing.TransportConformance` says what it must keep.
"""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from dl_inference_core.config import ClientTls, PluginOptions, ServerTls

Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"

Message: TypeAlias = bytes | memoryview
"""A message's bytes; a view where a transport can pass on what it holds without a copy."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One call of a gRPC method, coming in or going out.

    Attributes:
        method: "/package.Service/Method".
        request: the request message's bytes.
        metadata: the caller's own metadata in order; keys in lower case, values `bytes` where the key ends in "-bin".
            Never holds what belongs to the protocol (grpc-*, te, content-type, user-agent, names that begin with ":").
        deadline: on the clock of `time.monotonic`, in seconds; None is no deadline.
        trailers: what goes back, or came back, beside the answer. Who answers appends to it.
        background: of an outgoing call: it belongs to no call that is being answered, and may outlive the one in
            whose context it is made.
    """

    method: str
    request: Message
    metadata: Metadata = ()
    deadline: float | None = None
    trailers: list[tuple[str, str | bytes]] = field(default_factory=list)
    background: bool = False


UnaryHandler: TypeAlias = Callable[[Call], Awaitable[Message]]
"""Answers a call, or raises an `InferenceError`. Cancelled when the client has gone or the deadline has passed."""

StreamHandler: TypeAlias = Callable[[Call, AsyncIterator[bytes]], AsyncIterator[bytes]]
"""Answers a stream of messages (`call.request` is empty) by a stream of messages. Cancelled likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """What a server answers, by method path; any other path is UNIMPLEMENTED."""

    unary: Mapping[str, UnaryHandler]
    streaming: Mapping[str, StreamHandler] = field(default_factory=dict)


HttpApp: TypeAlias = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]
"""An ASGI application that answers HTTP requests; it is never asked about its lifespan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command that starts a process, and what its environment has beside that of this one."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Attributes:
    message_bytes: largest message, in either direction; over it RESOURCE_EXHAUSTED.
    connections: of a server: from clients at one time; more are closed as they come.
    streams: of a server: calls that one connection of a client may have in flight; more wait at the client.
    """

    message_bytes: int = 10 * 1024 * 1024
    connections: int = 10_000
    streams: int = 1024


_FILES, _SHARE_OF_FILES = 64, 4
_NO_LIMIT = 2**31 - 1


def room_for(connections: int) -> int:
    """How many of `connections` from clients, 0 for any number, this process can have; its limit on open files is
    raised for them as far as it may be. A quarter of it, or 64, stay for nodes and files."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + max(_FILES, connections // (_SHARE_OF_FILES - 1) + 1)
    if files != resource.RLIM_INFINITY and files < wanted:
        files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = _NO_LIMIT if files == resource.RLIM_INFINITY else max(1, files - max(_FILES, files // _SHARE_OF_FILES))
    return min(connections or room, room)


_LONGEST_ASCII, _LONGEST = 2000, 500


def shortened(message: str) -> str:
    """A status message that fits into a header: over 8 KiB of headers may be refused, and the status with them.

    Percent-encoding makes 3 bytes of an ASCII character at most, and up to 12 of another.
    """
    return message[: _LONGEST_ASCII if message.isascii() else _LONGEST]


class Server(ABC):
    """A listening server, on the event loop that made it."""

    ports: tuple[int, ...]
    """The ports it listens on, in the order of the addresses asked for; a Unix-domain socket has none."""

    @abstractmethod
    async def drain(self, grace_s: float) -> None:
        """Take no new calls, let those in flight finish for at most `grace_s` seconds, cancel the rest, close."""


class Connection(ABC):
    """A way to one node; connects by itself, and again after a failure, within a second of the node being there."""

    @abstractmethod
    async def call(self, call: Call) -> Message:
        """Send `call` and return the answer's bytes; trailers that came back are appended to `call.trailers`.

        Cancelling the caller cancels the call at the node: at once, or as soon as the call is answered in whose context
        it was made.

        Raises:
            InferenceError: as `errors.from_status` has it; DeadlineExceeded when `call.deadline` passed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close; calls in flight are cancelled."""


class Transport(ABC):
    """One kind of network stack. Made once per process, used on one event loop."""

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    http_on_same_port: ClassVar[bool] = False
    """Whether `serve` answers HTTP on the port of gRPC; else `http` is ignored."""
    hosted: ClassVar[bool] = False
    """Whether `serve` works only in a process that was started by `program`."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @classmethod
    def missing(cls) -> str:
        """What this machine lacks to run the transport, in one line; "" if nothing. Called before one is made."""
        return ""

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What gRPC's channel arguments for a server come to here: values for `Options`, and those it has nothing like.

        Args:
            arguments: by gRPC's names, such as "grpc.max_connection_age_ms".
        """
        return {}, tuple(arguments)

    @contextmanager
    def program(self, arguments: Sequence[str]) -> Iterator[Program]:
        """How to start one process that runs `dl-inference-core` with `arguments` and may `serve`.

        For as long as the context is open, what the process needs is there. It must end by itself when its standard
        input does.
        """
        yield Program(command=(sys.executable, "-m", "dl_inference_core.cli", *arguments))

    @abstractmethod
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
        """Listen on each of `addresses` and answer `methods`.

        Args:
            addresses: "host:port", where port 0 is any free one; or "unix:/path", a Unix-domain socket: one that a
                server left there when it was killed is replaced, and ours is removed at the end.
            share_port: other servers that say so too may listen on the same ports (SO_REUSEPORT); not on sockets.
            tls: speak TLS, and nothing else. Certificates that change on disk are taken up while serving.
            http: answers what is no gRPC, where `http_on_same_port`.

        Raises:
            ConfigError: an address cannot be listened on; a certificate or key cannot be used (it names the file).
        """

    def prepare(self, tls: ClientTls) -> None:
        """Read what `connect` will need with `tls`, whatever the server's name, which cannot fail for it from then on.

        Raises:
            ConfigError: a certificate or key cannot be used; it names the file.
        """

    @abstractmethod
    def connect(self, address: str, limits: Limits, tls: ClientTls | None = None) -> Connection:
        """A connection to the node at `address`, "host:port" or "unix:/path"; plaintext without `tls`. Returns at once.

        Certificates that change on disk hold for what is connected from then on; what cannot be used changes nothing.

        Raises:
            ConfigError: a certificate or key cannot be used; it names the file.
        """
