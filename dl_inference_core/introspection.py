"""What clients ask about the server and its models: gRPC health, server reflection, the Open Inference Protocol's live,
ready and metadata, and TensorFlow Serving's metadata and status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

import dl_inference_core
from dl_inference_core.errors import ModelNotFound, ModelNotReady
from dl_inference_core.routing import Routes
from dl_inference_core.transport import Call, StreamHandler, UnaryHandler
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METADATA, METHODS, QUESTIONS, VERSIONS, Protocol

_WATCH_S = 0.1
_OIP = "/inference.GRPCInferenceService"
_HEALTH = "/grpc.health.v1.Health"
_SERVICES = frozenset(
    {"", *(path.split("/")[1] for path in (*METHODS, *(question.node_method for question in QUESTIONS)))}
)
_Status = health_pb2.HealthCheckResponse.ServingStatus


@dataclass(slots=True)
class Readiness:
    """Whether this process takes requests. Set by the app, read by health and ready.

    Attributes:
        serving: from when a request would first have succeeded until it is told to end.
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
        """Whether a request for some model would succeed."""
        return self.serving and self.upstreams()


class Introspection:
    """Answers about the server and its routes. Event loop only."""

    def __init__(self, routes: Routes, readiness: Readiness) -> None:
        self._routes = routes
        self._readiness = readiness

    def unary(self) -> Mapping[str, UnaryHandler]:
        """Handlers by method path; they raise nothing but InferenceError."""
        return {
            f"{_HEALTH}/Check": self._check,
            f"{_OIP}/ServerLive": self._server_live,
            f"{_OIP}/ServerReady": self._server_ready,
            f"{_OIP}/ModelReady": self._model_ready,
            f"{_OIP}/ServerMetadata": self._server_metadata,
            **{question.node_method: self._asking(question) for question in QUESTIONS},
        }

    def streaming(self) -> Mapping[str, StreamHandler]:
        """Handlers of streams by method path."""
        paths = {path.split("/")[1] for path in (*METHODS, *self.unary())}
        services = [*sorted(paths), "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"]
        servicer = reflection.ReflectionServicer(services, pool=messages.pool)

        async def reflect(_: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            # v1 and v1alpha differ in nothing but their name.
            bodies = self._while_serving(requests)
            parsed = (messages.parse(reflection_pb2.ServerReflectionRequest, body) async for body in bodies)
            async for response in servicer.ServerReflectionInfo(parsed, None):
                yield response.SerializeToString()

        return {
            f"{_HEALTH}/Watch": self._watch,
            **{f"/{service}/ServerReflectionInfo": reflect for service in services[-2:]},
        }

    def _status(self, service: str) -> Any:
        """The health of `service`: a model's name is that model; "" is the server, which serves if any model would be
        answered for; None is unknown."""
        if service in _SERVICES:
            return _Status.SERVING if self._readiness.ready else _Status.NOT_SERVING
        try:
            upstream = self._routes.find(service)
        except ModelNotFound:
            return None
        return _Status.SERVING if self._readiness.serving and upstream.ready else _Status.NOT_SERVING

    async def _check(self, call: Call) -> bytes:
        service = messages.parse(health_pb2.HealthCheckRequest, call.request).service
        status = self._status(service)
        if status is None:
            raise ModelNotFound(f'no service or model is named "{service}"')
        return _body(health_pb2.HealthCheckResponse(status=status))

    async def _watch(self, _: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
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

    async def _while_serving(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
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

    async def _server_live(self, _: Call) -> bytes:
        return _body(messages.ServerLiveResponse(live=True))

    async def _server_ready(self, _: Call) -> bytes:
        return _body(messages.ServerReadyResponse(ready=self._readiness.ready))

    async def _model_ready(self, call: Call) -> bytes:
        request = messages.parse(messages.ModelReadyRequest, call.request)
        upstream = self._routes.find(request.name)
        ready = self._readiness.serving and upstream.ready
        if ready and request.version:
            try:
                await upstream.answer(call, METADATA)  # the two requests are the same, field by field
            except ModelNotReady:
                ready = False
        return _body(messages.ModelReadyResponse(ready=ready))

    async def _server_metadata(self, _: Call) -> bytes:
        return _body(messages.ServerMetadataResponse(name="dl-inference-core", version=dl_inference_core.__version__))

    def _asking(self, question: Protocol) -> UnaryHandler:
        async def ask(call: Call) -> bytes:
            key = question.read_key(call.request)
            try:
                upstream = self._routes.find(key)
            except ModelNotFound as error:
                if question is VERSIONS:
                    raise ModelNotFound(f"Could not find any versions of model {str(key)[:100]}") from error
                raise
            return await upstream.answer(call, question)

        return ask


def _body(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    return body
