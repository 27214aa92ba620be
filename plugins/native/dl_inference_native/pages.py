"""Pages: HTTP requests that an ASGI application answers, on the event loop of the process."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers

from dl_inference_core.coroutines import call_soon
from dl_inference_core.transport import HttpApp
from dl_inference_native import _native

_log = logging.getLogger(__name__)


class Pages:
    """Has an application answer requests.

    The application gets the body in one piece. Its answer is held until it is whole, and then sent: an application that
    streams without an end never answers.
    """

    def __init__(self, app: HttpApp, scheme: str) -> None:
        """On the event loop that is to run `app`.

        Args:
            scheme: "http" or "https".
        """
        self._app = app
        self._scheme = scheme
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, exchange: _native.HttpExchange) -> None:
        """Answer a whole request. Any thread."""
        call_soon(self._loop, partial(self._start, exchange))

    def _start(self, exchange: _native.HttpExchange) -> None:
        task = self._loop.create_task(self._answer(exchange), name=f"answer {exchange.path}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: _native.HttpExchange) -> None:
        left = asyncio.Event()
        exchange.on_cancel(partial(call_soon, self._loop, left.set))
        answer = _Answer(exchange, left)
        try:
            await self._app(self._scope(exchange), answer.receive, answer.send)
        except Exception:
            _log.exception("%s %s failed", exchange.verb, exchange.path)
        if not answer.is_whole:
            exchange.reply(500, {"content-type": "text/plain; charset=utf-8"}, b"Internal Server Error\n")

    def _scope(self, exchange: _native.HttpExchange) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": exchange.version,
            "method": exchange.verb,
            "scheme": self._scheme,
            "path": unquote(exchange.path.encode("latin-1").decode("utf-8", "replace")),
            "raw_path": exchange.path.encode("latin-1"),
            "query_string": exchange.query.encode("latin-1"),
            "root_path": "",
            "headers": exchange.raw_headers,
            "client": None,
            "server": None,
        }


class _Answer:
    """What an application takes and gives for one request."""

    def __init__(self, exchange: _native.HttpExchange, left: asyncio.Event) -> None:
        self._exchange = exchange
        self._left = left
        self._has_received = False
        self._status = 500
        self._headers = Headers()
        self._parts: list[bytes] = []
        self.is_whole = False

    async def receive(self) -> dict[str, Any]:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": self._exchange.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = Headers(raw=list(message.get("headers", ())))
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._exchange.reply(self._status, self._headers, b"".join(self._parts))
                self.is_whole = True
