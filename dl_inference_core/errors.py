"""The error tree: for each failure its gRPC code, who is to blame, and whether another node may be tried.

Retries, node health and the status that the client sees all read the same three facts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence


class Code(enum.IntEnum):
    """gRPC status codes, numbered as in the gRPC specification (doc/statuscodes.md of grpc/grpc)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Blame(enum.Enum):
    """Whose fault a failure is. Only NODE and NODE_SOFTLY change what is known of a node."""

    CLIENT = "client"
    NODE = "node"
    NODE_SOFTLY = "node, softly"  # lowers a node's weight, never ejects it
    SERVER = "server"
    OPERATOR = "operator"
    NOBODY = "nobody"


class InferenceError(Exception):
    """A failure that a caller may be told of: `str(error)` is the status message.

    `code`, `blame` and `another_node` are facts of the class.

    Attributes:
        trailers: what the node that failed sent beside its status.
    """

    code: Code = Code.INTERNAL
    blame: Blame = Blame.SERVER
    another_node: bool = False
    trailers: Sequence[tuple[str, str | bytes]] = ()

    def __init_subclass__(cls) -> None:
        """Raises:
        TypeError: its `code` is not one that a failure can have.
        """
        super().__init_subclass__()
        if not isinstance(cls.code, Code) or cls.code is Code.OK:
            raise TypeError(f"{cls.__qualname__}: its code is {cls.code!r}; expected an errors.Code other than OK")


class BadRequest(InferenceError):
    """The request is malformed, or does not fit the model. Says what was wrong and what was expected."""

    code = Code.INVALID_ARGUMENT
    blame = Blame.CLIENT


class FailedPrecondition(InferenceError):
    """The request is well-formed, but asks for something that this model does not have."""

    code = Code.FAILED_PRECONDITION
    blame = Blame.CLIENT


class ModelNotFound(InferenceError):
    """No model, version or task of that name."""

    code = Code.NOT_FOUND
    blame = Blame.CLIENT


class MessageTooLarge(InferenceError):
    """A message over the size limit, whoever sent it."""

    code = Code.RESOURCE_EXHAUSTED
    blame = Blame.CLIENT


class Unimplemented(InferenceError):
    """The method is known but this server does not offer it for that model."""

    code = Code.UNIMPLEMENTED
    blame = Blame.CLIENT


class PermissionDenied(InferenceError):
    """What the client asks for this server does for nobody, unless its operator says otherwise."""

    code = Code.PERMISSION_DENIED
    blame = Blame.CLIENT


class Unauthenticated(InferenceError):
    """The client has not shown that it may ask for this."""

    code = Code.UNAUTHENTICATED
    blame = Blame.CLIENT


class ReloadFailed(InferenceError):
    """A config that a client sent was taken up, but not all of what it names could be loaded."""

    code = Code.UNKNOWN
    blame = Blame.CLIENT

    def __init__(self, message: str, code: Code = Code.UNKNOWN) -> None:
        super().__init__(message)
        self.code = code


class ModelNotReady(InferenceError):
    """The model is known but cannot answer yet, or no longer."""

    code = Code.UNAVAILABLE
    blame = Blame.NODE
    another_node = True


class NoNodeAvailable(InferenceError):
    """A route has no nodes at all."""

    code = Code.UNAVAILABLE
    blame = Blame.SERVER


class RouteLoop(InferenceError):
    """The request came back to a gateway that has forwarded it already, or went through too many gateways."""

    code = Code.FAILED_PRECONDITION
    blame = Blame.OPERATOR


class NodeUnreachable(InferenceError):
    """The node refused or dropped the connection, or said UNAVAILABLE."""

    code = Code.UNAVAILABLE
    blame = Blame.NODE
    another_node = True


class NodeOverloaded(InferenceError):
    """The node answered RESOURCE_EXHAUSTED."""

    code = Code.RESOURCE_EXHAUSTED
    blame = Blame.NODE_SOFTLY
    another_node = True


class NodeFailed(InferenceError):
    """The node answered INTERNAL, UNKNOWN or DATA_LOSS; or DEADLINE_EXCEEDED, long before the attempt's deadline.

    `code` is the node's own.
    """

    blame = Blame.NODE
    another_node = True

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class AnswerMalformed(NodeFailed):
    """The node's answer is none: it is empty, or cannot be decoded."""


class NodeRejected(InferenceError):
    """The node refused the request with some other status, which goes on unchanged."""

    blame = Blame.CLIENT

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code


class NodeGaveUp(InferenceError):
    """The node answered CANCELLED, as a server does that shuts down. A cancel of our own never comes as a status."""

    code = Code.CANCELLED
    blame = Blame.NODE_SOFTLY
    another_node = True


class Overloaded(InferenceError):
    """This server takes no more requests for now."""

    code = Code.RESOURCE_EXHAUSTED
    blame = Blame.SERVER


class AttemptTimedOut(InferenceError):
    """A node did not answer within the attempt's timeout."""

    code = Code.DEADLINE_EXCEEDED
    blame = Blame.NODE
    another_node = True


class AttemptCancelled(InferenceError):
    """This process cancelled the attempt: the client has left, another attempt was quicker, or the node has left."""

    code = Code.CANCELLED
    blame = Blame.NOBODY


class DeadlineExceeded(InferenceError):
    """The client's own deadline passed."""

    code = Code.DEADLINE_EXCEEDED
    blame = Blame.NOBODY


class HandlerFailed(InferenceError):
    """A handler or model raised; or anything else that nobody foresaw. The message carries the request id."""

    code = Code.INTERNAL
    blame = Blame.SERVER


class PluginError(InferenceError):
    """A plugin is missing, broken or breaks its contract. Start-up and reload only."""

    blame = Blame.OPERATOR


class ConfigError(InferenceError):
    """The configuration cannot be used. Start-up and reload only."""

    blame = Blame.OPERATOR


class ModelError(InferenceError):
    """A model version cannot be loaded. Load time only: it never reaches a client."""

    blame = Blame.OPERATOR


def text_of(error: BaseException) -> str:
    """`str(error)`; "" where that raises, as the `__str__` of a handler's own exception class may."""
    try:
        return str(error)
    except BaseException:
        return ""


def causes(error: BaseException | None, *, implied: bool = False) -> Iterator[BaseException]:
    """`error`, its `__cause__`, the cause of that, and so on; each once: `raise error from error` makes a circle.

    Args:
        implied: an error without a `__cause__` was caused by the error that was handled when it was raised, unless
            `from None` says otherwise.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        handled = error.__context__ if implied and not error.__suppress_context__ else None
        error = error.__cause__ or handled


def from_status(code: Code, message: str) -> InferenceError:
    """The error that a node's status other than OK stands for.

    DEADLINE_EXCEEDED is taken as the client's: whoever set the attempt's deadline knows better, and says
    `AttemptTimedOut` or `NodeFailed` instead.
    """
    match code:
        case Code.UNAVAILABLE:
            return NodeUnreachable(message)
        case Code.RESOURCE_EXHAUSTED:
            # gRPC's own words on both sides of a connection when a message, or its metadata, is over the limit.
            too_large = "message larger than max" in message or "metadata size exceeds" in message
            return MessageTooLarge(message) if too_large else NodeOverloaded(message)
        case Code.INTERNAL | Code.UNKNOWN | Code.DATA_LOSS:
            return NodeFailed(message, code)
        case Code.OK:
            return AnswerMalformed(message)
        case Code.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case Code.CANCELLED:
            return NodeGaveUp(message)
        case Code.INVALID_ARGUMENT:
            return BadRequest(message)
        case Code.NOT_FOUND:
            return ModelNotFound(message)
        case Code.UNIMPLEMENTED:
            return Unimplemented(message)
        case _:
            return NodeRejected(message, code)
