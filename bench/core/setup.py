"""What is measured: a gateway, a node, and the same transport with nothing behind it."""

from __future__ import annotations

import queue
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bench.core.loads import FEATURES, MODEL
from bench.core.transport import MemoryTransport
from dl_inference_core.app import App
from dl_inference_core.config import Config, PluginOptions
from dl_inference_core.errors import Code
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor
from dl_inference_core.testing.fakes import FakeBackend, FakeModel
from dl_inference_core.transport import Ended, Exchange, Limits, Method, Transport

BALANCER = "dynamic_weighted_round_robin"
NODES = 4
MAX_BATCH = 64
_IN_FLIGHT, _NODE_IN_FLIGHT = 1000, 100
"""Limits that are on and never reached: 128 requests are in flight at most, on a gateway 32 at four nodes."""


class _EchoModel(FakeModel):
    """Gives back what it is given: a model that costs next to nothing."""

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        return dict(inputs)


class EchoBackend(FakeBackend):
    """Loads echoes."""

    name = "echo"

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, FEATURES))
        return _EchoModel(signature=Signature(inputs=(spec,), outputs=(spec,)))


class _InMemory(Plugins):
    """The installed strategies and handlers, with the transport in memory and the backend of echoes."""

    def classes(self, kind: Kind) -> Mapping[str, type[Any]]:
        if kind is Kind.TRANSPORTS:
            return {MemoryTransport.name: MemoryTransport}
        if kind is Kind.BACKENDS:
            return {EchoBackend.name: EchoBackend}
        return super().classes(kind)


@asynccontextmanager
async def serving(**config: Any) -> AsyncIterator[App]:
    """A server as `dl-inference-core serve` builds it, behind the transport in memory: `App.transport`."""
    app = App(Config(transport=MemoryTransport.name, in_flight=_IN_FLIGHT, drain_s=0, **config), _InMemory())
    try:
        await app.serve("127.0.0.1:1")  # nobody listens
        yield app
    finally:
        await app.close()


def gateway(*, hedge: bool = False) -> Mapping[str, Any]:
    """The config of a gateway with one route to four nodes: limits, health and retries are on."""
    route = {
        "name": MODEL,
        "nodes": [f"10.0.0.{number}:8500" for number in range(1, NODES + 1)],
        "node_in_flight": _NODE_IN_FLIGHT,
        "balancer": BALANCER,
        "hedge": hedge,
    }
    return {"routes": [route]}


@asynccontextmanager
async def node() -> AsyncIterator[App]:
    """A node with one model, whose requests share batches of up to 64 rows."""
    with tempfile.TemporaryDirectory() as folder:
        FakeBackend.write(Path(folder) / MODEL / "1")
        defaults = {"batching": {"enabled": True, "max_rows": MAX_BATCH}}
        models = {"directory": Path(folder), "poll_interval_ms": 0, "defaults": defaults}
        async with serving(models=models) as app:
            yield app


def behind(service: type[_Service]) -> MemoryTransport:
    """A transport that serves `service`."""
    transport = MemoryTransport(PluginOptions())
    transport.service = service(transport)
    return transport


class _Service(ABC):
    """A service in the place of ours: what it takes is the transport's own part."""

    methods: Mapping[str, Method] = MappingProxyType({})
    private_trailers: frozenset[str] = frozenset()

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @abstractmethod
    def begin_all(self, exchanges: Sequence[Exchange]) -> None: ...

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        """Nothing is kept of exchanges."""


class Passing(_Service):
    """Forwards every request to one node, and does nothing else."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._connection = transport.connect("10.0.0.1:8500", Limits())

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            exchange.forward(self._connection, exchange.method, _done, timeout_s=1.0, metadata=())


def _done(ended: Sequence[Ended]) -> None: ...


class Echoing(_Service):
    """Answers every request with its own bytes, at once."""

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        _echo(exchanges)


class Hopping(_Service):
    """Answers with the same bytes from another thread, which does nothing else: the least that a model thread takes."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._given: queue.SimpleQueue[Sequence[Exchange]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()  # it ends with the process

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        self._given.put(exchanges)

    def _answer(self) -> None:
        while True:
            _echo(self._given.get())


def _echo(exchanges: Sequence[Exchange]) -> None:
    type(exchanges[0]).reply_all([(exchange, exchange.message, ()) for exchange in exchanges])
