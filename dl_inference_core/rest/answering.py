"""What every REST API here shares: models of this process alone, bodies read in pieces, deadlines, errors as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import (
    BadRequest,
    Code,
    DeadlineExceeded,
    InferenceError,
    MessageTooLarge,
    ModelNotFound,
    ModelNotReady,
)
from dl_inference_core.introspection import Readiness
from dl_inference_core.local_exchange import LocalExchange
from dl_inference_core.routing import Routes, Table, Upstream
from dl_inference_core.transport import HttpApp, Message, Metadata
from dl_inference_core.wire.protocol import VERSIONS, Protocol

_log = logging.getLogger(__name__)

_LOOK_AFTER_S = 0.02
_LINGER_S = 0.5
_MOST_DISCARDED = 10
"""Times the limit of a body."""
_GZIP = 16 + zlib.MAX_WBITS
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
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


class Refused(BadRequest):
    """A request for which HTTP has a status of its own.

    Attributes:
        status: that status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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
        self._readiness = readiness

    def find(self, key: str | int) -> Upstream:
        """Raises:
        ModelNotFound: there is no such model, or it is on other nodes.
        ModelNotReady: the server starts, and does not know its models yet; or it ends.
        """
        if self._readiness.ending.is_set():
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
        if self._readiness.ending.is_set():
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
        return unknown and not (self._readiness.serving or self._readiness.leaving)

    def _is_elsewhere(self, key: str | int) -> bool:
        try:
            self._elsewhere.find(key)
        except ModelNotFound:
            return False
        return True


def _described(error: InferenceError, status: int) -> Any:
    """As TensorFlow Serving has it."""
    return {"error": str(error)}


class Rest:
    """Turns HTTP requests into calls of models and back. Event loop only."""

    def __init__(self, local: Local, dispatcher: Dispatcher, *, body_bytes: int, timeout_s: float | None) -> None:
        """Args:
        dispatcher: of the whole process.
        body_bytes: of the largest request body, as it comes and after decompression.
        timeout_s: what a request may take, from its headers to its answer; None is no limit.
        """
        self._local = local
        self._dispatcher = dispatcher
        self._body_bytes = body_bytes
        self._timeout_s = timeout_s

    def app(
        self,
        answer: Callable[[Request], Awaitable[bytes]],
        *,
        cors: bool = False,
        describe: Callable[[InferenceError, int], Any] = _described,
    ) -> HttpApp:
        """An application that answers each request with the JSON that `answer` returns, or with what an API makes of
        the error that it raises, and the status that belongs to that error. It answers preflights (OPTIONS) itself.

        Args:
            cors: whether pages of other origins may read the answers, and the errors.
            describe: an error and its HTTP status → what is sent as JSON.
        """

        async def respond(scope: Any, receive: Any, send: Any) -> None:
            request = Request(scope, receive)
            try:
                body = _preflight(request) if request.method == "OPTIONS" else await answer(request)
                response = Response(body, media_type="application/json")
            except ClientDisconnect:
                return
            except InferenceError as error:
                response = _refusal(error, describe)
                error.with_traceback(None)  # a handler that raises one object again and again would keep the message
            except Exception as error:
                _log.exception("%s %s failed", request.method, scope["path"])
                response = _refusal(InferenceError(f"unexpected {type(error).__name__}"), describe)
            response.headers.update(_CORS if cors else _NO_HEADERS)
            await response(scope, receive, send)

        return respond

    async def infer(self, request: Request, protocol: Protocol, metadata: Metadata = ()) -> bytes:
        """The answer of the model that `protocol.read_key` or `metadata` names to the request's body.

        Raises:
            InferenceError: any failure.
            ClientDisconnect: the client has left; the call is cancelled.
        """
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._body(request)
                deadline = None if self._timeout_s is None else start + self._timeout_s
                given = request.headers.get("x-request-id")
                exchange = LocalExchange(
                    request.scope["path"],
                    body,
                    (*metadata, ("x-request-id", given)) if given else metadata,
                    deadline,
                    service=self._dispatcher,
                )
                self._dispatcher.begin(exchange, protocol, self._local)
                return bytes(await _while_there(request, exchange.outcome()))
        except TimeoutError:
            raise DeadlineExceeded(f"the request took longer than {self._timeout_s} s") from None

    async def ask(self, question: Protocol, body: bytes, metadata: Metadata = ()) -> bytes:
        """The answer to a question about a model, one of `protocol.QUESTIONS`.

        Args:
            body: the question's message.

        Raises:
            InferenceError: any failure.
        """
        exchange = LocalExchange(question.node_method, body, metadata)
        try:
            upstream, key = self._local.find_for(exchange, question)
        except ModelNotFound as error:
            if question is not VERSIONS:
                raise
            why = str(error).partition("; ")[2]  # after the first words, which TensorFlow Serving has for requests
            model = question.read_key(body).model
            raise ModelNotFound(f"Could not find any versions of model {str(model)[:100]}; {why}") from error
        upstream.begin(exchange, question, key)
        return bytes(await exchange.outcome())

    async def _body(self, request: Request) -> bytes:
        """The body, decompressed; no more of it is held than the limit and one piece.

        Raises:
            MessageTooLarge: as soon as that is known.
            Refused: a content encoding that is not known.
            BadRequest: the body is not in its encoding.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip"):
            raise Refused(f"content encoding {encoding[:100]} is not known; expected gzip or none", 415)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._body_bytes):
            await self._discard(request)
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._body_bytes:
                parts.clear()
                await self._discard(request)
                raise self._too_large()
            parts.append(part)
        body = b"".join(parts)
        return body if encoding == "identity" else await asyncio.to_thread(self._decompressed, body)

    async def _discard(self, request: Request) -> None:
        """Take the rest of a body, within bounds: a client that is cut off while it sends may see no answer."""
        if "expect" in request.headers:  # it sends nothing before it is told to
            return
        left = _MOST_DISCARDED * self._body_bytes
        more = True
        with contextlib.suppress(TimeoutError):
            while more and left > 0:
                async with asyncio.timeout(_LINGER_S):
                    event = await request.receive()
                left -= len(event.get("body", b""))
                more = event.get("more_body", False)

    def _decompressed(self, body: bytes) -> bytes:
        decompressing = zlib.decompressobj(_GZIP)
        try:
            plain = decompressing.decompress(body, self._body_bytes + 1)
        except zlib.error as error:
            raise BadRequest(f"the body is not gzip, which its content encoding says it is: {error}") from None
        if len(plain) > self._body_bytes:
            raise self._too_large()
        if not decompressing.eof or decompressing.unused_data:
            raise BadRequest(
                "the body is not gzip, which its content encoding says it is: it does not end where it ends"
            )
        return plain

    def _too_large(self) -> MessageTooLarge:
        return MessageTooLarge(f"the request's body is too large; expected at most {self._body_bytes} bytes")


async def _while_there(request: Request, answering: Awaitable[Message]) -> Message:
    """The result of `answering`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has.
    """
    task = asyncio.ensure_future(answering)
    leaving: asyncio.Future[None] | None = None
    try:
        await asyncio.wait((task,), timeout=_LOOK_AFTER_S)
        if not task.done():
            leaving = asyncio.ensure_future(_until_left(request))
            await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        if leaving is not None:
            leaving.cancel()


async def _until_left(request: Request) -> None:
    # Some servers tell when the client leaves, others only whether it has.
    while (await request.receive())["type"] != "http.disconnect":  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_AFTER_S)


def raw_path(request: Request) -> str:
    """The path of the URL, still percent-encoded."""
    raw: bytes = request.scope["raw_path"]
    return raw.partition(b"?")[0].decode("latin-1")


def decoded(quoted: str, what: str) -> str:
    """A part of a path without its percent-encoding.

    Raises:
        BadRequest: it is not UTF-8; `what` names it.
    """
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest(f"Failed to decode {what}: {quoted[:200]}; expected UTF-8, percent-encoded") from None


def _preflight(request: Request) -> bytes:
    """The answer to a browser that asks, before it sends a request from a page of another origin, whether it may.

    Raises:
        BadRequest: no page of the web asks.
    """
    if not re.search("https?://", request.headers.get("origin", "")):
        raise BadRequest("Origin header is missing in CORS preflight; expected the page's, http://... or https://...")
    return b""


def _refusal(error: InferenceError, describe: Callable[[InferenceError, int], Any]) -> Response:
    status = _STATUS.get(error.code, 500)
    if isinstance(error, Refused):
        status = error.status
    elif isinstance(error, MessageTooLarge):
        status = 413
    # In ASCII: what a client sent, and an error repeats, need not be encodable.
    return Response(json.dumps(describe(error, status)), status, media_type="application/json")
