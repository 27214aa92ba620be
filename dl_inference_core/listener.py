"""A call in: method path → protocol, routing key → upstream, and every failure → a status."""

from __future__ import annotations

import logging
import time
import uuid

from dl_inference_core.errors import Code, HandlerFailed, InferenceError, Overloaded
from dl_inference_core.metrics import Metrics
from dl_inference_core.routing import Routes
from dl_inference_core.transport import Call, Message, UnaryHandler
from dl_inference_core.wire.protocol import METHODS, Protocol

_log = logging.getLogger(__name__)


class InFlight:
    """How many requests a process answers at once, whichever way they came. Event loop only.

    Attributes:
        limit: at most so many; 0 is no limit, and then nothing is counted.
        now: how many there are.
    """

    __slots__ = ("limit", "now")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.now = 0


class Listener:
    """Answers every method that infers. Event loop only."""

    def __init__(self, routes: Routes, metrics: Metrics, in_flight: InFlight) -> None:
        self._routes = routes
        self._metrics = metrics
        self._in_flight = in_flight

    def methods(self) -> dict[str, UnaryHandler]:
        """A handler for each method path; raises nothing but InferenceError."""
        return {path: self.handler(protocol) for path, protocol in METHODS.items()}

    def handler(self, protocol: Protocol) -> UnaryHandler:
        """What answers calls in `protocol`."""

        async def answer(call: Call) -> bytes:
            start = time.monotonic()
            code, name = "CANCELLED", ""
            try:
                upstream = self._routes.find(protocol.read_key(call.request))
                name = upstream.name
                response = await upstream.answer(call, protocol)
            except InferenceError as error:
                if isinstance(error, HandlerFailed):
                    error = _identified(call, error)
                code = error.code.name
                raise error from None
            except Exception as error:
                code = Code.INTERNAL.name
                raise _identified(call, error) from None
            else:
                code = "OK"
                return response
            finally:
                self._metrics.request(protocol.name, name, code, time.monotonic() - start)

        return self._limited(answer, protocol) if self._in_flight.limit else answer

    def _limited(self, answer: UnaryHandler, protocol: Protocol) -> UnaryHandler:
        in_flight = self._in_flight

        async def admit(call: Call) -> Message:
            if in_flight.now >= in_flight.limit:
                self._metrics.rejection("", "in_flight")
                self._metrics.request(protocol.name, "", Code.RESOURCE_EXHAUSTED.name, 0.0)
                raise Overloaded(f"this server answers {in_flight.limit} requests already")
            in_flight.now += 1
            try:
                return await answer(call)
            finally:
                in_flight.now -= 1

        return admit


def _identified(call: Call, error: Exception) -> HandlerFailed:
    """`error` as the client may see it, with a request id under which the log has the traceback."""
    given = next((value for key, value in call.metadata if key == "x-request-id"), None)
    request_id = given if isinstance(given, str) and given else uuid.uuid4().hex
    _log.error("request %s failed", request_id, exc_info=error)
    what = str(error) if isinstance(error, InferenceError) else f"unexpected {type(error).__name__}"
    return HandlerFailed(f"{what} (request id {request_id})")
