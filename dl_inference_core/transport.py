"""The seam between the network and the rest of the core.

A transport turns bytes on a socket into exchanges, and what the core says of an exchange into bytes. Nothing else in
the core knows how bytes travel, and no coroutine, future or event loop belongs to an exchange: the transport calls the
`Service` of its server, and the service calls the `Exchange`. `dl_inference_core.testing.TransportConformance` is the
suite that every transport must pass.

Threads: any thread may call any method of an exchange or an attempt. The transport calls the service and all callbacks
on threads of its own, on several at the same time where it has several; they must not block. What belongs to one
exchange is called on one of them, one after another. A callback runs once, and never inside the call that registered
it; but where another thread registered it, it may run before that call has returned.
"""

from __future__ import annotations

import resource
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple, TypeAlias
from typing import Protocol as Interface

from dl_inference_core.choosable import Choosable
from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import Code, InferenceError
from dl_inference_core.http_exchange import HttpService
from dl_inference_core.wire.routing_keys import KeyFields, RoutingKey

Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"
"""Those of one key in order; keys in lower case, values `bytes` where the key ends in "-bin"."""


def with_added(metadata: Metadata, added: Metadata) -> Metadata:
    """`metadata` and `added`, whose entries take the place of those with the same keys."""
    if not metadata or not added:
        return metadata or added
    keys = {key for key, _ in added}
    return (*[pair for pair in metadata if pair[0] not in keys], *added)


Trailers: TypeAlias = "Sequence[tuple[str, str | bytes]]"
"""Metadata that goes beside an answer or a status."""

Message: TypeAlias = bytes | memoryview
"""A message's bytes; a view where a transport can pass on what it holds without a copy."""


class Answer(NamedTuple):
    """A node's answer."""

    message: Message
    trailers: Trailers


Ended: TypeAlias = "tuple[Any, InferenceError | None, Trailers, float]"
"""An attempt that has ended: the `context` that `Exchange.forward` was given; its error, or None where its answer went
to the client; the node's trailers; and the seconds that it took."""

Done: TypeAlias = "Callable[[Sequence[Ended]], object]"
"""Is told of attempts that have ended: of several at a time, in their order, where one turn of a transport ended them.
It must not raise because of one attempt before it has seen to the others."""


class Attempt(ABC):
    """One message of an exchange on its way to one node."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the call at the node. `Done` is told `AttemptCancelled`, unless the attempt has ended already."""


class Sink:
    """Takes copies of forwarded messages for a reader of its own, and never slows a call: what does not fit is dropped.

    Attributes:
        dropped: how many copies did not fit.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Args:
        capacity_bytes: of the messages that wait for the reader.
        """
        self._free = capacity_bytes
        self._lock = threading.Lock()
        self._copies: deque[tuple[Message, Message]] = deque()
        self.dropped = 0

    def offer(self, request: Message, answer: Message) -> None:
        """Add a copy of a request and its answer. Any thread; for transports."""
        size = len(request) + len(answer)
        with self._lock:
            if size > self._free:
                self.dropped += 1
                return
            self._free -= size
            self._copies.append((request, answer))

    def take(self) -> tuple[Message, Message] | None:
        """The oldest copy; None if there is none. Any thread."""
        with self._lock:
            if not self._copies:
                return None
            request, answer = self._copies.popleft()
            self._free += len(request) + len(answer)
        return request, answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What happens to the messages of an attempt on their way.

    Attributes:
        change_request: replaces the bytes of the request; None sends the client's own.
        change_answer: replaces the bytes of a well-formed answer; None sends the node's own.
        sink: takes a copy of what the node was sent and of its well-formed answer.
    """

    change_request: Callable[[Message], Message] | None = None
    change_answer: Callable[[Message], Message] | None = None
    sink: Sink | None = None


class Exchange(ABC):
    """One call of a client's, made by a transport: messages come in, messages go out, and then it ends.

    Its end is the first of `reply`, `fail`, `finish`, the answer of an attempt, the client's leaving, and its deadline.
    After the end every method does nothing; only `forward` still tells `Done`.

    A class that cannot derive from this one, as of an extension module, is registered: `Exchange.register(theirs)`.

    Attributes:
        method: "/package.Service/Method".
        message: of a unary method, the request; b"" of a streaming one. A transport may make it when it is first asked
            for.
        metadata: the client's own. Never holds what belongs to the protocol (grpc-*, te, content-type, user-agent,
            names that begin with ":").
        deadline: on the clock of `time.monotonic`, in seconds; None if the client set none.
        key: what the protocol's `read_key` returns for the message, where the transport has read it by the method's
            `KeyFields`. None where the transport has not, or the message is malformed or unusual: the service reads it.
        state: what the service keeps of this exchange. It and `metadata` may be set.
    """

    __slots__ = ("deadline", "key", "message", "metadata", "method", "state")

    def __init__(self, method: str, message: Message, metadata: Metadata, deadline: float | None) -> None:
        self.method = method
        self.message = message
        self.metadata = metadata
        self.deadline = deadline
        self.key: RoutingKey | None = None
        self.state: Any = None

    def find_metadata(self, key: str) -> str | bytes | None:
        """The first value of the client's metadata with that key. A transport may look without making `metadata`."""
        for name, value in self.metadata:
            if name == key:
                return value
        return None

    def hash_message(self) -> bytes:
        """The BLAKE2b digest of the message, 16 bytes: the same in all processes, whatever their transports. Here it
        takes about 1 ms for each MB; a transport may compute it without the interpreter."""
        return blake2b(self.message, digest_size=16).digest()

    @abstractmethod
    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        """End the exchange with `message`, its only answer or the last one, whose bytes do not change from now on."""

    @classmethod
    def reply_all(cls, replies: Sequence[Reply]) -> None:
        """Answer several exchanges of this class, as `reply` does each."""
        for exchange, message, trailers in replies:
            exchange.reply(message, trailers)

    @abstractmethod
    def fail(self, error: InferenceError) -> None:
        """End the exchange with the status, the message and the trailers of `error`."""

    @abstractmethod
    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Have `callback` called if the client leaves, or the deadline passes, before the exchange has ended."""

    def forward(
        self,
        connection: Connection,
        method: str,
        done: Done,
        context: object = None,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        allow_empty: bool = False,
        extras: Extras | None = None,
    ) -> Attempt:
        """Send the message of a unary exchange to a node. Functions of `extras` run as callbacks do.

        The first OK and well-formed answer goes to the client by itself, with the node's trailers but for the service's
        `private_trailers`. Anything else reaches `done` alone, as `errors.from_status` has it, `AnswerMalformed`,
        DeadlineExceeded where `timeout_s` passed, or the error that a function of `extras` raised. `done` is told
        once of each attempt, after the answer has gone to the client. When the exchange ends, its other attempts are
        cancelled.

        Args:
            connection: to the node; made by the same transport.
            method: the node's method path.
            context: what `done` is told with the attempt. One function for all attempts and a tuple for each cost less
                than a function for each.
            timeout_s: limits this attempt; None sets no limit.
            metadata: added to the client's own, which goes on to the node, in the place of entries with the same keys.
            allow_empty: whether an empty message is a good answer: one whose fields all have their default values.
            extras: what happens to the messages on their way; None is nothing, and costs nothing.

        Raises:
            TypeError: the exchange streams, or came by no transport.
        """
        raise TypeError(f"{self.method}: only unary exchanges of a transport's server are forwarded")

    # Streams

    @abstractmethod
    def on_message(self, callback: Callable[[Message | None], object]) -> None:
        """Have `callback` called with the client's next message; with None once the client has sent all. One message is
        asked for at a time. The transport takes no more in than it is asked for, so that a client cannot send faster
        than the service reads."""

    @abstractmethod
    def send(self, message: Message) -> bool:
        """Send `message`. False says that the client reads too slowly: wait for `on_writable` before the next one."""

    @abstractmethod
    def on_writable(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once there is room for another message."""

    @abstractmethod
    def finish(self, trailers: Trailers = ()) -> None:
        """End the exchange with the status OK, after all that was sent."""


class UnaryExchange(Exchange):
    """An exchange of one message in and one out: the methods of streams raise TypeError."""

    __slots__ = ()

    def on_message(self, callback: Callable[[Message | None], object]) -> None:
        raise TypeError(f"{self.method} is unary: its only message is `message`")

    def send(self, message: Message) -> bool:
        raise TypeError(f"{self.method} is unary: `reply` gives its only answer")

    def on_writable(self, callback: Callable[[], object]) -> None:
        raise TypeError(f"{self.method} is unary: `reply` gives its only answer")

    def finish(self, trailers: Trailers = ()) -> None:
        raise TypeError(f"{self.method} is unary: `reply` gives its only answer")


Begin: TypeAlias = Callable[[Exchange], None]
"""Begins an exchange: answers or fails it, now or later."""


Reply: TypeAlias = tuple[Exchange, Message, Trailers]
"""One of the answers that go back together: an exchange, the message that ends it, and trailers beside it. Model
threads make one for each request: an object with named fields takes 0.3 µs, a tuple 0.03 µs."""


class Service(Interface):
    """What a server of a transport asks. Must not raise. Its properties are read once, when it is served."""

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods that it has, by path; any other is UNIMPLEMENTED."""

    @property
    def private_trailers(self) -> frozenset[str]:
        """The trailers of nodes that do not go to clients."""

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        """Exchanges have come: whole requests of unary methods, and streams that are open."""

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        """Exchanges have ended, after they were begun; the `Done` of their attempts may come before or after. Their
        clients may have the answers already.

        CANCELLED says that the client has left, that its deadline has passed, or that a drain has cancelled the
        exchange.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a transport must know of a method.

    Attributes:
        streaming: whether messages stream in both directions; else one comes in and one goes out.
        key: where the routing key stands in a request; None where the transport need not look.
    """

    streaming: bool = False
    key: KeyFields | None = None


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
class Http:
    """What answers HTTP.

    Attributes:
        service: answers the requests that are exchanges.
        app: answers the others.
    """

    service: HttpService
    app: HttpApp


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

    Percent-encoding makes 3 bytes of an ASCII character at most, and up to 12 of another. Half of a surrogate pair, as
    in a file's name that is not UTF-8, is escaped: no header can hold it.
    """
    message = message.encode(errors="backslashreplace").decode()
    return message[: _LONGEST_ASCII if message.isascii() else _LONGEST]


class Server(ABC):
    """A listening server."""

    ports: tuple[int, ...]
    """The ports it listens on, in the order of the addresses asked for; a Unix-domain socket has none."""

    @abstractmethod
    async def drain(self, grace_s: float) -> None:
        """Take no new exchanges, let those in flight finish for at most `grace_s` seconds, cancel the rest, close.

        For the service, what is cancelled is as if its client had left; the client is told CANCELLED or UNAVAILABLE.
        """


class Connection(ABC):
    """A way to one node; connects by itself, and again after a failure, within a second of the node being there."""

    @abstractmethod
    async def call(
        self, method: str, message: Message, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Answer:
        """The node's answer, for work that belongs to no exchange. Event loop only. Cancelling it cancels the call at
        the node.

        Raises:
            InferenceError: as `errors.from_status` has it, with the node's trailers; DeadlineExceeded when `timeout_s`
                passed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close; calls and attempts in flight are cancelled."""


class Timer(Interface):
    """A function that is to be called later."""

    def cancel(self) -> None:
        """Do not call it. Any thread; if it has not begun when this returns, it never does."""


class Transport(Choosable):
    """One kind of network stack. Made once per process, on the event loop that also does its background work."""

    http_on_same_port: ClassVar[bool] = False
    """Whether `serve` answers HTTP on the port of gRPC; else `http` is ignored."""

    @classmethod
    def of_channel_arguments(cls, arguments: Mapping[str, int | str]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What gRPC's channel arguments for a server come to here: values for `Options`, and those it has nothing like.

        Args:
            arguments: by gRPC's names, such as "grpc.max_connection_age_ms".
        """
        return {}, tuple(arguments)

    @abstractmethod
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
        """Listen on each of `addresses`, and have `service` answer.

        Args:
            addresses: "host:port", where port 0 is any free one; or "unix:/path", a Unix-domain socket: one that a
                server left there when it was killed is replaced, and ours is removed at the end.
            share_port: other servers that say so too may listen on the same ports (SO_REUSEPORT); not on sockets.
            tls: speak TLS, and nothing else. Certificates that change on disk are taken up while serving.
            http: answers HTTP requests that are not gRPC, where `http_on_same_port`.

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

    def refusals(self) -> Mapping[str, int]:
        """How many connections and requests of clients the transport's limits have refused or ended, by reason, since
        it was made. Empty where the transport does not know. Any thread."""
        return {}

    @abstractmethod
    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Have `function` called on one of the transport's threads after so many seconds. Any thread. Not before the
        first `serve` or `connect`."""
