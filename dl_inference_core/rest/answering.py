"""What every REST API here shares: models of this process alone, inferences, preflights, errors as JSON."""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias
from urllib.parse import unquote

from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import BadRequest, Code, InferenceError, MessageTooLarge, ModelNotFound, ModelNotReady
from dl_inference_core.http_exchange import HttpExchange, Refused, is_among
from dl_inference_core.introspection import Readiness
from dl_inference_core.routing import Routes, Table, Upstream
from dl_inference_core.transport import Message, Metadata, Trailers, UnaryExchange
from dl_inference_core.wire.protocol import VERSIONS, Protocol

_log = logging.getLogger(__name__)

Write: TypeAlias = Callable[[Message], bytes]
"""Makes the body of an HTTP answer of a model's answer. May raise an InferenceError."""

_CORS = MappingProxyType(
    {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "POST, GET",
        "access-control-allow-headers": "Content-Type",
    }
)
"""The headers by which browsers let pages of other origins read the answers; TensorFlow Serving sends the same."""

# As TensorFlow Serving has it.
_STATUS = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}


class Local(Routes):
    """The models that this process serves itself."""

    def __init__(self, here: Table | None, elsewhere: Table | None, readiness: Readiness) -> None:
        """Args:
        here: where they are found; None is nowhere.
        elsewhere: what has routes to other nodes, which are not gone.
        """
        super().__init__(*() if here is None else (here,))
        self._here = here
        self._elsewhere = Routes(*() if elsewhere is None else (elsewhere,))
        self.readiness = readiness

    def find(self, key: str | int) -> Upstream:
        """Raises:
        ModelNotFound: there is no such model, or it is on other nodes.
        ModelNotReady: the server starts, and does not know its models yet; or it ends.
        """
        if self.readiness.ending.is_set():
            raise ModelNotReady("the server is shutting down")
        try:
            return super().find(key)
        except ModelNotFound:
            if self._is_elsewhere(key):
                raise ModelNotFound(
                    f'Servable not found for request: Latest({key}); "{key}" is a route to other nodes, '
                    "which is taken by gRPC only: REST answers for the models of this process"
                ) from None
            if self._is_starting:
                raise ModelNotReady(f'no model is named "{str(key)[:100]}", but the server is starting') from None
            raise

    def _find_or_none(self, name: str) -> Upstream | None:
        """Raises:
        ModelNotFound: it is on other nodes.
        ModelNotReady: as `find`.
        """
        found = super()._find_or_none(name)
        return self.find(name) if found is None and self._is_elsewhere(name) else found

    def upstreams(self, most: int) -> list[Upstream]:
        """Raises:
        ModelNotFound: this process has routes to other nodes alone.
        ModelNotReady: the server starts, and may yet have models; or it ends.
        """
        if self.readiness.ending.is_set():
            raise ModelNotReady("the server is shutting down")
        found = super().upstreams(most)
        if not found and self._elsewhere.upstreams(1):
            raise ModelNotFound(
                "Servable not found for request: this server has routes to other nodes alone, which are taken by gRPC "
                "only: REST answers for the models of this process"
            )
        if not found and self._is_starting:
            raise ModelNotReady("this server has no models yet: it is starting")
        return found

    @property
    def _is_starting(self) -> bool:
        """Whether the server does not know yet which models it has."""
        unknown = self._here is not None and not self._here.models
        return unknown and not (self.readiness.serving or self.readiness.leaving)

    def _is_elsewhere(self, key: str | int) -> bool:
        try:
            self._elsewhere.find(key)
        except ModelNotFound:
            return False
        return True


class RestApi(ABC):
    """One REST API: its URLs, and the form of its answers and errors. Any thread.

    Questions about models are answered on the caller's thread. The answer of a model is written, and replied, on the
    model's thread.

    Attributes:
        dispatcher: of the whole process.
        paths: of its requests, as `HttpService.paths` has it.
    """

    paths: ClassVar[tuple[str, ...]]

    def __init__(self, local: Local, dispatcher: Dispatcher, *, cors: bool = False) -> None:
        """Args:
        cors: whether pages of other origins may read the answers, and the errors.
        """
        self.dispatcher = dispatcher
        self._local = local
        self._headers = {"content-type": "application/json", **(_CORS if cors else {})}

    @abstractmethod
    def begin(self, exchange: HttpExchange) -> None:
        """Answer a request other than a preflight, now or later.

        Raises:
            InferenceError: it has not begun.
        """

    @abstractmethod
    def describe(self, error: InferenceError, status: int) -> Any:
        """What is sent as JSON of an error and its HTTP status."""

    def begin_http(self, exchange: HttpExchange) -> None:
        """As `HttpService` has it."""
        self.attempt(exchange, self._preflight if exchange.verb == "OPTIONS" else self.begin)

    def attempt(self, exchange: HttpExchange, function: Callable[[HttpExchange], None]) -> None:
        """Call `function`, and fail the exchange with what it raises."""
        try:
            function(exchange)
        except InferenceError as error:
            self.fail_http(exchange, error)
        except Exception as error:
            _log.exception("%s %s failed", exchange.verb, exchange.path)
            self.fail_http(exchange, InferenceError(f"unexpected {type(error).__name__}"))

    def _preflight(self, exchange: HttpExchange) -> None:
        """Answer a browser that asks, before it sends a request from a page of another origin, whether it may.

        Raises:
            BadRequest: no page of the web asks.
        """
        if not re.search("https?://", exchange.headers.get("origin", "")):
            raise BadRequest(
                "Origin header is missing in CORS preflight; expected the page's, http://... or https://..."
            )
        self.answer(exchange, b"")

    def answer(self, exchange: HttpExchange, body: bytes) -> None:
        """Reply with JSON."""
        exchange.reply(200, self._headers, body)

    def fail_http(self, exchange: HttpExchange, error: InferenceError) -> None:
        """As `HttpService` has it."""
        status = _STATUS.get(error.code, 500)
        if isinstance(error, Refused):
            status = error.status
        elif isinstance(error, MessageTooLarge):
            status = 413
        # In ASCII: what a client sent, and an error repeats, need not be encodable.
        exchange.reply(status, self._headers, json.dumps(self.describe(error, status)).encode())
        error.with_traceback(None)  # a handler that raises one object again and again would keep the message

    def infer(self, http: HttpExchange, protocol: Protocol, metadata: Metadata = (), write: Write = bytes) -> None:
        """Reply with what `write` makes of the answer of the model that `protocol.read_key` or `metadata` names. The
        client's leaving is that of the inference."""
        given = http.headers.get("x-request-id")
        metadata = (*metadata, ("x-request-id", given)) if given else metadata
        exchange = _Exchange(http.path, http.body, metadata, self, http, write)
        self.dispatcher.begin(exchange, protocol, self._local)
        http.on_cancel(exchange.leave)

    def ask(self, http: HttpExchange, question: Protocol, body: bytes, write: Write, metadata: Metadata = ()) -> None:
        """Reply with what `write` makes of the answer to a question about a model, one of `protocol.QUESTIONS`.

        Args:
            body: the question's message.

        Raises:
            InferenceError: there is no such model. Any later failure ends the exchange.
        """
        exchange = _Exchange(question.node_method, body, metadata, self, http, write)
        try:
            upstream, key = self._local.find_for(exchange, question)
        except ModelNotFound as error:
            if question is not VERSIONS:
                raise
            why = str(error).partition("; ")[2]  # after the first words, which TensorFlow Serving has for requests
            model = question.read_key(body).model
            raise ModelNotFound(f"Could not find any versions of model {str(model)[:100]}; {why}") from error
        upstream.begin_all((exchange,), question, key)


class _Exchange(UnaryExchange):
    """What a model is asked for the sake of an HTTP exchange, which it ends with itself."""

    __slots__ = ("_api", "_http", "_open", "_write")

    def __init__(
        self, method: str, message: bytes, metadata: Metadata, api: RestApi, http: HttpExchange, write: Write
    ) -> None:
        super().__init__(method, message, metadata, http.deadline)
        self._api = api
        self._http = http
        self._write = write
        self._open = [True]
        """Empty once it has ended. The thread that pops the item has ended it: `pop` is atomic."""

    def _end(self, code: Code) -> bool:
        try:
            self._open.pop()
        except IndexError:
            return False
        self._api.dispatcher.ended_all(((self, code),))
        return True

    def leave(self) -> None:
        """End it: the client has left, or the deadline has passed."""
        self._end(Code.CANCELLED)

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        if self._end(Code.OK):
            self._api.attempt(self._http, lambda http: self._api.answer(http, self._write(message)))

    def fail(self, error: InferenceError) -> None:
        if self._end(error.code):
            self._api.fail_http(self._http, error)

    def on_cancel(self, callback: Callable[[], object]) -> None:
        self._http.on_cancel(callback)


class Rest:
    """The HTTP service of this process: `HttpService` for several APIs. Any thread."""

    def __init__(self, *apis: RestApi, body_bytes: int, timeout_s: float | None) -> None:
        """Args:
        body_bytes: of the largest request body, as it comes and after decompression.
        timeout_s: the most seconds from a request's headers to its answer; None sets no limit.
        """
        self.paths = tuple(path for api in apis for path in api.paths)
        self.body_bytes = body_bytes
        self.timeout_s = timeout_s
        self._apis = apis

    def begin_http(self, exchange: HttpExchange) -> None:
        self._api_of(exchange).begin_http(exchange)

    def fail_http(self, exchange: HttpExchange, error: InferenceError) -> None:
        self._api_of(exchange).fail_http(exchange, error)

    def _api_of(self, exchange: HttpExchange) -> RestApi:
        return next(api for api in self._apis if is_among(exchange.path, api.paths))


def decoded(quoted: str, what: str) -> str:
    """A part of a path without its percent-encoding.

    Raises:
        BadRequest: it is not UTF-8; `what` names it.
    """
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest(f"Failed to decode {what}: {quoted[:200]}; expected UTF-8, percent-encoded") from None
