"""HTTP exchanges from an ASGI server, such as uvicorn on a port of its own. The only coroutine that REST has."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dl_inference_core.coroutines import call_soon
from dl_inference_core.errors import InferenceError
from dl_inference_core.http_exchange import (
    HttpExchange,
    HttpService,
    is_among,
    not_gzip,
    too_large,
    took_too_long,
    unknown_encoding,
)
from dl_inference_core.transport import Http, HttpApp

_Answer: TypeAlias = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""

_LOOK_AFTER_S = 0.02
_LINGER_S = 0.5
_MOST_DISCARDED = 10
"""Times the limit of a body."""
_GZIP = 16 + zlib.MAX_WBITS


def with_exchanges(http: Http) -> HttpApp:
    """An application that answers by exchanges of `http.service`, and any other request by `http.app`."""
    paths = tuple(http.service.paths)

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        path = scope["raw_path"].partition(b"?")[0].decode("latin-1")
        if not is_among(path, paths):
            await http.app(scope, receive, send)
            return
        answer = await _answered(http.service, Request(scope, receive), path)
        if answer is not None:
            status, headers, body = answer
            await Response(body, status, headers)(scope, receive, send)

    return respond


class _AsgiExchange(HttpExchange):
    """What other threads ask of it is done on the event loop, in the order in which they ask."""

    __slots__ = ("_left", "_loop", "_on_cancel", "answer")

    def __init__(self, request: Request, path: str, deadline: float | None) -> None:
        query = request.scope["query_string"].decode("latin-1")
        super().__init__(request.method, path, query, request.headers, deadline)
        self._loop = asyncio.get_running_loop()
        self._on_cancel: list[Callable[[], object]] = []
        self._left = False
        self.answer: asyncio.Future[_Answer] = self._loop.create_future()

    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        call_soon(self._loop, partial(self._settle, (status, headers, body)))

    def _settle(self, answer: _Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)
            self._on_cancel.clear()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        call_soon(self._loop, partial(self._add, callback))

    def _add(self, callback: Callable[[], object]) -> None:
        if self._left:
            callback()
        elif not self.answer.done():
            self._on_cancel.append(callback)

    def leave(self) -> None:
        """The client has left, or the deadline has passed. Does nothing after a reply. Event loop only."""
        self._left = not self.answer.done()
        callbacks, self._on_cancel = self._on_cancel, []
        for callback in callbacks:
            callback()


async def _answered(service: HttpService, request: Request, path: str) -> _Answer | None:
    """What `service` replies; None for a client that has left."""
    limit_s = service.timeout_s
    exchange = _AsgiExchange(request, path, None if limit_s is None else time.monotonic() + limit_s)
    error: InferenceError
    try:
        async with asyncio.timeout(limit_s):
            exchange.body = await _body(request, service.body_bytes)
            service.begin_http(exchange)
            return await _while_there(request, exchange.answer)
    except ClientDisconnect:
        return None
    except TimeoutError:
        error = took_too_long(limit_s)
    except InferenceError as refusal:
        error = refusal.with_traceback(None)
    finally:
        exchange.leave()
    service.fail_http(exchange, error)
    return await exchange.answer


async def _body(request: Request, limit: int) -> bytes:
    """The body without its encoding; no more of it is held than the limit and one piece.

    Raises:
        MessageTooLarge: as soon as that is known.
        Refused: a content encoding that is not known.
        BadRequest: the body is not in its encoding.
        ClientDisconnect: the client has left.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise unknown_encoding(encoding)
    announced = request.headers.get("content-length", "")
    is_too_large = announced.isdecimal() and (len(announced) > 18 or int(announced) > limit)
    parts: list[bytes] = []
    size = 0
    if not is_too_large:
        async for part in request.stream():
            size += len(part)
            if is_too_large := size > limit:
                break
            parts.append(part)
    if is_too_large:
        parts.clear()
        await _discard(request, limit)
        raise too_large(limit)
    body = b"".join(parts)
    return body if encoding == "identity" else await asyncio.to_thread(_decompressed, body, limit)


async def _discard(request: Request, limit: int) -> None:
    """Take the rest of a body, within bounds: a client that is cut off while it sends may see no answer."""
    if "expect" in request.headers:  # it sends nothing before it is told to
        return
    left = _MOST_DISCARDED * limit
    more = True
    with contextlib.suppress(TimeoutError):
        while more and left > 0:
            async with asyncio.timeout(_LINGER_S):
                event = await request.receive()
            left -= len(event.get("body", b""))
            more = event.get("more_body", False)


def _decompressed(body: bytes, limit: int) -> bytes:
    decompressing = zlib.decompressobj(_GZIP)
    try:
        plain = decompressing.decompress(body, limit + 1)
    except zlib.error as error:
        raise not_gzip(str(error)) from None
    if len(plain) > limit:
        raise too_large(limit)
    if not decompressing.eof or decompressing.unused_data:
        raise not_gzip("it does not end where it ends")
    return plain


async def _while_there(request: Request, answer: asyncio.Future[_Answer]) -> _Answer:
    """The result of `answer`.

    Raises:
        ClientDisconnect: the client has left before.
    """
    leaving: asyncio.Future[None] | None = None
    try:
        await asyncio.wait((answer,), timeout=_LOOK_AFTER_S)
        if not answer.done():
            leaving = asyncio.ensure_future(_until_left(request))
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        if leaving is not None:
            leaving.cancel()


async def _until_left(request: Request) -> None:
    # Some servers tell when the client leaves, others only whether it has.
    while (await request.receive())["type"] != "http.disconnect":  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_AFTER_S)
