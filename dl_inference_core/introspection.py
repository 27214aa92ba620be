"""What clients ask about the server and its models: gRPC health, server reflection, the Open Inference Protocol's live,
ready and metadata, and TensorFlow Serving's metadata and status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

import dl_inference_core
from dl_inference_core.coroutines import StreamHandler
from dl_inference_core.errors import ModelNotFound
from dl_inference_core.routing import Routes, Upstream
from dl_inference_core.transport import Begin, Exchange, Message
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METHODS, QUESTIONS, READY, VERSIONS, Protocol

_WATCH_S = 0.1
_OIP = "/inference.GRPCInferenceService"
_HEALTH = "/grpc.health.v1.Health"
_REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_Status = health_pb2.HealthCheckResponse.ServingStatus


@dataclass(slots=True)
class Readiness:
    """Whether this process takes requests. Set by the app, read by health and ready.

    Attributes:
        serving: from the end of the start until the process is told to end. The start ends once every model has loaded,
            failed or passed its load timeout, and a request for some model would succeed.
        leaving: it was told to end, and takes requests for a moment longer.
        ending: set once it will never take any again: streams end then, after having said so.
        upstreams: whether any upstream would now answer.
    """

    serving: bool = False
    leaving: bool = False
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    upstreams: Callable[[], bool] = lambda: True

    @property
    def ready(self) -> bool:
        """Whether the start has ended and a request for some model would succeed."""
        return self.serving and self.upstreams()

    def serves(self, upstream: Upstream) -> bool:
        """Whether requests for one model are answered, which may be so while others still load."""
        return upstream.ready and not self.leaving


class Introspection:
    """Answers about the server and its routes. Event loop only."""

    def __init__(self, routes: Routes, readiness: Readiness, paths: Collection[str] = METHODS) -> None:
        """Args:
        paths: the paths of the other methods that this process answers.
        """
        self._routes = routes
        self._readiness = readiness
        paths = (*paths, *(question.node_method for question in QUESTIONS))
        self._services = {path.split("/")[1] for path in paths}

    def unary(self) -> Mapping[str, Begin]:
        """What begins an exchange of each unary method, by path; raises InferenceError."""
        return {
            f"{_HEALTH}/Check": self._check,
            f"{_OIP}/ServerLive": self._server_live,
            f"{_OIP}/ServerReady": self._server_ready,
            f"{_OIP}/ServerMetadata": self._server_metadata,
            **{question.node_method: partial(self._ask, question) for question in QUESTIONS},
            READY.node_method: self._model_ready,
        }

    def streaming(self) -> Mapping[str, StreamHandler]:
        """Handlers of streams by method path."""
        own = {path.split("/")[1] for path in self.unary()}
        services = [*sorted(self._services | own), *_REFLECTION]
        servicer = reflection.ReflectionServicer(services, pool=messages.pool)

        async def reflect(_: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            # v1 and v1alpha differ in nothing but their name.
            bodies = self._while_serving(requests)
            parsed = (messages.parse(reflection_pb2.ServerReflectionRequest, body) async for body in bodies)
            async for response in servicer.ServerReflectionInfo(parsed, None):
                yield response.SerializeToString()

        return {
            f"{_HEALTH}/Watch": self._watch,
            **{f"/{service}/ServerReflectionInfo": reflect for service in _REFLECTION},
        }

    def _status(self, service: str) -> Any:
        """The health of `service`: a model's name is that model, which serves as soon as it has loaded; "" is the
        server, which serves if it has started and any model would be answered for; None is unknown."""
        if not service or service in self._services:
            return _Status.SERVING if self._readiness.ready else _Status.NOT_SERVING
        try:
            upstream = self._routes.find(service)
        except ModelNotFound:
            return None
        return _Status.SERVING if self._readiness.serves(upstream) else _Status.NOT_SERVING

    def _check(self, exchange: Exchange) -> None:
        service = messages.parse(health_pb2.HealthCheckRequest, exchange.message).service
        status = self._status(service)
        if status is None:
            raise ModelNotFound(f'no service or model is named "{service}"')
        exchange.reply(_body(health_pb2.HealthCheckResponse(status=status)))

    async def _watch(self, _: Exchange, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        said = None
        ending = self._readiness.ending
        async for body in self._while_serving(requests):
            service = messages.parse(health_pb2.HealthCheckRequest, body).service
            while True:
                last = ending.is_set()
                status = self._status(service)
                if status is None:
                    status = _Status.SERVICE_UNKNOWN
                if status != said:
                    said = status
                    yield _body(health_pb2.HealthCheckResponse(status=status))
                if last:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), _WATCH_S)

    async def _while_serving(self, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        """`requests`, until the server ends: a client that holds its stream open must not hold up a drain."""
        ending = asyncio.ensure_future(self._readiness.ending.wait())
        try:
            while True:
                following = asyncio.ensure_future(anext(requests))
                awaited: set[asyncio.Future[Any]] = {ending, following}
                try:
                    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        return
                    body = following.result()
                except StopAsyncIteration:
                    return
                finally:
                    following.cancel()
                yield body
        finally:
            ending.cancel()

    def _server_live(self, exchange: Exchange) -> None:
        exchange.reply(_body(messages.ServerLiveResponse(live=True)))

    def _server_ready(self, exchange: Exchange) -> None:
        exchange.reply(_body(messages.ServerReadyResponse(ready=self._readiness.ready)))

    def _server_metadata(self, exchange: Exchange) -> None:
        metadata = messages.ServerMetadataResponse(name="dl-inference-core", version=dl_inference_core.__version__)
        exchange.reply(_body(metadata))

    def _model_ready(self, exchange: Exchange) -> None:
        """Of a version that the request names, the upstream knows."""
        upstream, key = self._routes.find_for(exchange, READY)
        ready = self._readiness.serves(upstream)
        if ready and key.version:
            upstream.begin_all((exchange,), READY, key)
        else:
            exchange.reply(_body(messages.ModelReadyResponse(ready=ready)))

    def _ask(self, question: Protocol, exchange: Exchange) -> None:
        try:
            upstream, key = self._routes.find_for(exchange, question)
        except ModelNotFound:
            if question is VERSIONS:
                model = question.read_key(exchange.message).model
                raise ModelNotFound(f"Could not find any versions of model {str(model)[:100]}") from None
            raise
        upstream.begin_all((exchange,), question, key)


def _body(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    return body
