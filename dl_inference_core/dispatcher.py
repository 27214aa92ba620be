"""An exchange comes in: method path → wire protocol, routing key → upstream."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
        self._free = [True] * most_in_flight
        """One item for each inference that may come. `pop` and `append` are atomic; a lock would take 0.2 µs."""
        coroutines = Coroutines()
        self._begin: dict[str, Begin] = {
            TIS_PREDICT: self._infer_raw,
            **(unary or {}),
            **{path: partial(coroutines.answer, handler=handler) for path, handler in (waiting or {}).items()},
        }
        streams: dict[str, Begin] = {
            path: partial(coroutines.answer_stream, handler=handler) for path, handler in (streaming or {}).items()
        }
        if openinference_as_requested:
            self._begin[OPENINFERENCE_AS_REQUESTED.node_method] = self._infer_as_requested
        self._protocols = {path: protocol for path, protocol in METHODS.items() if path not in self._begin}
        """Of the methods that infer, and whose protocol follows from the path alone."""
        self.methods = {
            **{path: Method() for path in self._begin},
            **{path: Method(key=protocol.key_fields) for path, protocol in METHODS.items()},
            **{path: Method(streaming=True) for path in streams},
        }
        self._begin.update(streams)

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        now = time.monotonic()
        for exchange in exchanges:
            protocol = self._protocols.get(exchange.method)
            if protocol is not None:
                self._infer(exchange, protocol, self._routes, now)
                continue
            try:
                self._begin[exchange.method](exchange)
            except Exception as error:
                fail(exchange, error)

    def begin(self, exchange: Exchange, protocol: Protocol, routes: Routes) -> None:
        """Begin an inference in `protocol` at one of `routes`. For REST, whose paths are not gRPC's."""
        self._infer(exchange, protocol, routes, time.monotonic())

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        now = time.monotonic()
        for exchange, code in ended:
            if (state := exchange.state) is not None:
                counts, began, admitted = state
                if admitted:
                    self._free.append(True)
                counts.count(code, now - began)

    def _infer(self, exchange: Exchange, protocol: Protocol, routes: Routes, now: float) -> None:
        """Args:
        now: when the exchange came, by `time.monotonic`.
        """
        admitted = False
        try:
            if self._most_in_flight:
                try:
                    admitted = self._free.pop()
                except IndexError:
                    raise self._refusal() from None
            upstream, key = routes.find_for(exchange, protocol)
            # What `ended_all` takes. A tuple is made in 30 ns; an object of a class takes ten times as long.
            exchange.state = self._metrics.requests[protocol.name, upstream.name], now, admitted
            upstream.begin(exchange, protocol, key)
        except Exception as error:
            if exchange.state is None:
                exchange.state = self._metrics.requests[protocol.name, ""], now, admitted
            fail(exchange, error)

    def _refusal(self) -> Overloaded:
        """Of one inference more than may be in flight."""
        self._metrics.rejection("", "in_flight")
        return Overloaded(f"this server answers {self._most_in_flight} requests already")

    def _infer_raw(self, exchange: Exchange) -> None:
        exchange.metadata += (RAW_OUTPUTS,)
        self.begin(exchange, METHODS[TIS_PREDICT], self._routes)

    def _infer_as_requested(self, exchange: Exchange) -> None:
        raw = RAW_OUTPUTS in exchange.metadata
        self.begin(exchange, METHODS[exchange.method] if raw else OPENINFERENCE_AS_REQUESTED, self._routes)
