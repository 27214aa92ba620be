"""An exchange comes in: method path → wire protocol, routing key → upstream."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dl_inference_core.coroutines import Coroutines, StreamHandler, UnaryHandler
from dl_inference_core.errors import Code, Overloaded
from dl_inference_core.failures import fail
from dl_inference_core.metrics import Metrics
from dl_inference_core.routing import Routes
from dl_inference_core.transport import Begin, Exchange, Method
from dl_inference_core.wire import orca
from dl_inference_core.wire.protocol import (
    METHODS,
    OPENINFERENCE_AS_REQUESTED,
    RAW_OUTPUTS,
    TIS_PREDICT,
    Protocol,
)


@dataclass(slots=True)
class _Inference:
    """What the metrics need to know of an inference.

    Attributes:
        upstream: its name; "" until the routing key is known.
        admitted: whether it counts among those in flight.
    """

    protocol: str
    upstream: str = ""
    admitted: bool = False
    began: float = field(default_factory=time.monotonic)


class Dispatcher:
    """The service of this process: begins every exchange at what answers it. Any thread."""

    private_trailers = orca.TRAILERS

    def __init__(
        self,
        routes: Routes,
        metrics: Metrics,
        *,
        most_in_flight: int = 0,
        openinference_as_requested: bool = False,
        unary: Mapping[str, Begin] | None = None,
        waiting: Mapping[str, UnaryHandler] | None = None,
        streaming: Mapping[str, StreamHandler] | None = None,
    ) -> None:
        """On the event loop of the process.

        Args:
            most_in_flight: the most inferences answered at one time; 0 sets no limit.
            openinference_as_requested: whether ModelInfer answers a typed request typed.
            unary: what begins exchanges of further methods, by path; may raise an InferenceError.
            waiting: coroutines that answer further methods, by path.
            streaming: coroutines that answer methods that stream, by path.
        """
        self._routes = routes
        self._metrics = metrics
        self._most_in_flight = most_in_flight
        self._in_flight = 0
        self._lock = threading.Lock()
        """Of `_in_flight`."""
        coroutines = Coroutines()
        self._begin: dict[str, Begin] = {
            **{path: partial(self._infer, protocol) for path, protocol in METHODS.items()},
            **(unary or {}),
            **{path: partial(coroutines.answer, handler=handler) for path, handler in (waiting or {}).items()},
        }
        self._begin[TIS_PREDICT] = self._infer_raw
        if openinference_as_requested:
            self._begin[OPENINFERENCE_AS_REQUESTED.node_method] = self._infer_as_requested
        streams: dict[str, Begin] = {
            path: partial(coroutines.answer_stream, handler=handler) for path, handler in (streaming or {}).items()
        }
        self.methods = {
            **{path: Method() for path in self._begin},
            **{path: Method(streaming=True) for path in streams},
        }
        self._begin.update(streams)

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            try:
                self._begin[exchange.method](exchange)
            except Exception as error:
                fail(exchange, error)

    def begin(self, exchange: Exchange, protocol: Protocol, routes: Routes) -> None:
        """Begin an inference in `protocol` at one of `routes`. For REST, whose paths are not gRPC's."""
        state = exchange.state = _Inference(protocol.name)
        try:
            if self._most_in_flight:
                self._admit(state)
            upstream, key = routes.find_for(exchange, protocol)
            state.upstream = upstream.name
            upstream.begin(exchange, protocol, key)
        except Exception as error:
            fail(exchange, error)

    def ended(self, exchange: Exchange, code: Code) -> None:
        state: _Inference | None = exchange.state
        if state is None:
            return
        if state.admitted:
            with self._lock:
                self._in_flight -= 1
        self._metrics.request(state.protocol, state.upstream, code.name, time.monotonic() - state.began)

    def _admit(self, state: _Inference) -> None:
        with self._lock:
            state.admitted = self._in_flight < self._most_in_flight
            self._in_flight += state.admitted
        if not state.admitted:
            self._metrics.rejection("", "in_flight")
            raise Overloaded(f"this server answers {self._most_in_flight} requests already")

    def _infer(self, protocol: Protocol, exchange: Exchange) -> None:
        self.begin(exchange, protocol, self._routes)

    def _infer_raw(self, exchange: Exchange) -> None:
        exchange.metadata += (RAW_OUTPUTS,)
        self._infer(METHODS[TIS_PREDICT], exchange)

    def _infer_as_requested(self, exchange: Exchange) -> None:
        raw = RAW_OUTPUTS in exchange.metadata
        self._infer(METHODS[exchange.method] if raw else OPENINFERENCE_AS_REQUESTED, exchange)
