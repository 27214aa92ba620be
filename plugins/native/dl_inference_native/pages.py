"""Pages: HTTP requests that an ASGI application answers, on the event loop of the process."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers

from dl_inference_core.coroutines import call_soon
from dl_inference_core.transport import HttpApp
from dl_inference_native import _native

_log = logging.getLogger(__name__)


_MOST = 100
"""Pages that are answered at one time. A page of metrics takes up to 23 ms of the interpreter, so all of them are done
after some two seconds; whoever asks for one more is told at once to come again."""
_TEXT = {"content-type": "text/plain; charset=utf-8"}


class Count:
    """A number that any thread may add one to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1


class Pages:
    """Has an application answer requests, up to 100 at one time.

    The application gets the body in one piece. Its answer is held until it is whole, and then sent: an application that
    streams without an end never answers.
    """

    def __init__(self, app: HttpApp, scheme: str, refused: Count) -> None:
        """On the event loop that is to run `app`.

        Args:
            scheme: "http" or "https".
            refused: counts the requests that find no room.
        """
        self._app = app
        self._scheme = scheme
        self._loop = asyncio.get_running_loop()
        self._room = threading.BoundedSemaphore(_MOST)
        self._refused = refused
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, exchange: _native.HttpExchange) -> None:
        """Answer a whole request. Any thread."""
        if self._room.acquire(blocking=False):
            answer = _Answer(exchange, self._loop)
            exchange.on_cancel(answer.end)
            call_soon(self._loop, partial(self._start, exchange, answer))
        else:
            self._refused.add()
            exchange.reply(503, _TEXT, b"The server answers as many requests for pages as it may.\n")

    def _start(self, exchange: _native.HttpExchange, answer: _Answer) -> None:
        if answer.has_ended:
            self._room.release()
            return
        task = self._loop.create_task(self._answer(exchange, answer), name=f"answer {exchange.path}")
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _answer(self, exchange: _native.HttpExchange, answer: _Answer) -> None:
        try:
            await self._app(self._scope(exchange), answer.receive, answer.send)
        except Exception:
            _log.exception("%s %s failed", exchange.verb, exchange.path)
        finally:  # also where something that the application waits for was cancelled
            exchange.reply(500, _TEXT, b"Internal Server Error\n")

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
    """What an application takes and gives for one request.

    Attributes:
        has_ended: whether it is whole, or the client has left.
    """

    def __init__(self, exchange: _native.HttpExchange, loop: asyncio.AbstractEventLoop) -> None:
        self._exchange = exchange
        self._loop = loop
        self._ended = asyncio.Event()
        self._has_received = False
        self._status = 500
        self._headers = Headers()
        self._parts: list[bytes] = []
        self.has_ended = False

    def end(self) -> None:
        """It is whole, or the client has left. Any thread."""
        self.has_ended = True
        call_soon(self._loop, self._ended.set)

    async def receive(self) -> dict[str, Any]:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": self._exchange.body, "more_body": False}
        await self._ended.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.has_ended:  # nobody takes what is sent
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = Headers(raw=list(message.get("headers", ())))
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._exchange.reply(self._status, self._headers, b"".join(self._parts))
                self.end()
