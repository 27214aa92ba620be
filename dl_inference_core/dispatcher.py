"""An exchange comes in: method path → wire protocol, routing key → upstream."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TypeAlias

from dl_inference_core.coroutines import Coroutines, StreamHandler, UnaryHandler
from dl_inference_core.errors import Code, Overloaded
from dl_inference_core.failures import fail
from dl_inference_core.metrics import Metrics, RequestCounts
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

_State: TypeAlias = "tuple[RequestCounts, float, bool]"
"""What is kept of an inference: what counts it, when it came, and whether it holds a place of `most_in_flight`. A tuple
is made in 30 ns; an object of a class takes ten times as long."""

_PATH_AND_KEY = attrgetter("method", "key")


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
        protocols: Mapping[str, Protocol] = METHODS,
        unary: Mapping[str, Begin] | None = None,
        waiting: Mapping[str, UnaryHandler] | None = None,
        streaming: Mapping[str, StreamHandler] | None = None,
    ) -> None:
        """On the event loop of the process.

        Args:
            most_in_flight: the most inferences answered at one time; 0 sets no limit.
            openinference_as_requested: whether ModelInfer answers a typed request typed.
            protocols: the protocols of the methods that infer, by path.
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
        self._protocols = {path: protocol for path, protocol in protocols.items() if path not in self._begin}
        """Of the methods that infer, and whose protocol follows from the path alone."""
        self.methods = {
            **{path: Method() for path in self._begin},
            **{path: Method(key=protocol.key_fields) for path, protocol in protocols.items()},
            **{path: Method(streaming=True) for path in streams},
        }
        self._begin.update(streams)

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        now = time.monotonic()
        for alike in (exchanges,) if len(exchanges) == 1 else _alike(exchanges):
            path = alike[0].method
            protocol = self._protocols.get(path)
            if protocol is not None:
                self._infer(alike, protocol, self._routes, now)
                continue
            for exchange in alike:
                try:
                    self._begin[path](exchange)
                except Exception as error:
                    fail(exchange, error)

    def begin(self, exchange: Exchange, protocol: Protocol, routes: Routes) -> None:
        """Begin an inference in `protocol` at one of `routes`. For REST, whose paths are not gRPC's."""
        self._infer((exchange,), protocol, routes, time.monotonic())

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        now = time.monotonic()
        for exchange, code in ended:
            if (state := exchange.state) is not None:
                counts, began, admitted = state
                if admitted:
                    self._free.append(True)
                counts.count(code, now - began)

    def _infer(self, exchanges: Sequence[Exchange], protocol: Protocol, routes: Routes, now: float) -> None:
        """Args:
        exchanges: one, or several with the same routing key, which names a model.
        now: when they came, by `time.monotonic`.
        """
        counts, admitted = self._metrics.requests, self._most_in_flight > 0
        if admitted:
            room = 0
            try:
                for _ in exchanges:
                    self._free.pop()
                    room += 1
            except IndexError:
                self._refuse(exchanges[room:], protocol, now)
                exchanges = exchanges[:room]
                if not exchanges:
                    return
        try:
            upstream, key = routes.find_for(exchanges[0], protocol)
        except Exception as error:
            _fail_all(exchanges, (counts[protocol.name, ""], now, admitted), error)
            return
        state = counts[protocol.name, upstream.name], now, admitted
        for exchange in exchanges:
            exchange.state = state
        try:
            upstream.begin_all(exchanges, protocol, key)
        except Exception as error:
            _fail_all(exchanges, state, error)

    def _refuse(self, exchanges: Sequence[Exchange], protocol: Protocol, now: float) -> None:
        """Fail inferences that are more than may be in flight."""
        for exchange in exchanges:
            self._metrics.rejection("", "in_flight")
            full = Overloaded(f"this server answers {self._most_in_flight} requests already")
            _fail_all((exchange,), (self._metrics.requests[protocol.name, ""], now, False), full)

    def _infer_raw(self, exchange: Exchange) -> None:
        exchange.metadata += (RAW_OUTPUTS,)
        self.begin(exchange, METHODS[TIS_PREDICT], self._routes)

    def _infer_as_requested(self, exchange: Exchange) -> None:
        raw = RAW_OUTPUTS in exchange.metadata
        self.begin(exchange, METHODS[exchange.method] if raw else OPENINFERENCE_AS_REQUESTED, self._routes)


def _alike(exchanges: Iterable[Exchange]) -> Iterator[Sequence[Exchange]]:
    """Those that come one after another with the same method and routing key. What names no model comes alone."""
    for (_, key), group in groupby(exchanges, _PATH_AND_KEY):
        alike = tuple(group)
        if key is not None and key.model is not None:
            yield alike
        else:
            yield from ((exchange,) for exchange in alike)


def _fail_all(exchanges: Sequence[Exchange], state: _State, error: Exception) -> None:
    for exchange in exchanges:
        exchange.state = state
        fail(exchange, error)
