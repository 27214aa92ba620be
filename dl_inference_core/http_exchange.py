"""HTTP in the seam between network and core: a request that is neither gRPC nor a page is an exchange, too.

A transport takes the request's body in and calls the `HttpService`, and the service calls the `HttpExchange`. No
coroutine, future or event loop belongs to it. The rules for threads and callbacks are those of `transport`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol as Interface

from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, MessageTooLarge


class Refused(BadRequest):
    """A request for which HTTP has a status of its own.

    Attributes:
        status: that status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def too_large(limit: int) -> MessageTooLarge:
    """Of a body over the service's limit, in bytes."""
    return MessageTooLarge(f"the request's body is too large; expected at most {limit} bytes")


def unknown_encoding(encoding: str) -> Refused:
    """Of a content encoding other than gzip and identity."""
    return Refused(f"content encoding {encoding[:100]} is not known; expected gzip or none", 415)


def not_gzip(why: str) -> BadRequest:
    """Of a body that is not in its content encoding."""
    return BadRequest(f"the body is not gzip, which its content encoding says it is: {why}")


def took_too_long(limit_s: float | None) -> DeadlineExceeded:
    """Of a request that has passed the service's time limit, in seconds."""
    return DeadlineExceeded(f"the request took longer than {limit_s} s")


class HttpExchange(ABC):
    """One HTTP request, made by a transport.

    It ends with the first `reply`, or when the client leaves. After the end every method does nothing.

    A class that cannot derive from this one, as of an extension module, is registered: `HttpExchange.register(theirs)`.

    Attributes:
        verb: "GET", "POST", ...
        path: as the request has it, percent-encoded, without the query; its bytes as Latin-1, as those of the next two.
        query: what follows "?", percent-encoded; "" if nothing does.
        headers: the client's, by names in lower case; of a name that comes several times the first value.
        body: all of it, without its content encoding; b"" before the exchange has begun.
        deadline: on the clock of `time.monotonic`, in seconds: the service's time limit; None if it has none.
    """

    __slots__ = ("body", "deadline", "headers", "path", "query", "verb")

    def __init__(self, verb: str, path: str, query: str, headers: Mapping[str, str], deadline: float | None) -> None:
        self.verb = verb
        self.path = path
        self.query = query
        self.headers = headers
        self.body = b""
        self.deadline = deadline

    @abstractmethod
    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """End the exchange with this answer. HEAD gets no body.

        Args:
            headers: by names in lower case. The transport adds the length and what belongs to the connection.
        """

    @abstractmethod
    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Have `callback` called if the client leaves, or the deadline passes, before the exchange has ended."""


class HttpService(Interface):
    """What answers HTTP exchanges. Must not raise, and must not block. Its properties never change."""

    @property
    def paths(self) -> Sequence[str]:
        """The requests that are exchanges, as `is_among` has it; the HTTP application answers any other."""

    @property
    def body_bytes(self) -> int:
        """Of the largest body, as it comes and without its content encoding."""

    @property
    def timeout_s(self) -> float | None:
        """The most seconds that an exchange may take after the end of the request's headers; None sets no limit."""

    def begin_http(self, exchange: HttpExchange) -> None:
        """A whole request has come."""

    def fail_http(self, exchange: HttpExchange, error: InferenceError) -> None:
        """Reply to `exchange` that it failed. A transport calls this, for a client that is still there, with

        - `MessageTooLarge`: the body is over the limit. It has not begun.
        - `Refused`: the status is 415: a content encoding other than gzip and identity; or 503: the transport has no
          room for the body. It has not begun.
        - `BadRequest`: the body is not in its content encoding. It has not begun.
        - `DeadlineExceeded`: the time limit has passed, before or after it has begun; after what `on_cancel` was given.
        """


def is_among(path: str, paths: Sequence[str]) -> bool:
    """Whether `path` is one of `paths`, or below one of them that ends in "/"."""
    return any(path == each or (each.endswith("/") and path.startswith(each)) for each in paths)
