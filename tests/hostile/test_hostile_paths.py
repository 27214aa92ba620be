"""S2: whatever a client calls a model, a task or a version, no file is opened for it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving.rest import TfServingRest

from dl_inference_core import admin, asgi
from dl_inference_core.client import build
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import Code, InferenceError
from dl_inference_core.http_server import HttpServer
from dl_inference_core.introspection import Introspection, Readiness
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.repository import Repository
from dl_inference_core.rest.answering import Local, Rest
from dl_inference_core.routing import Routes
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.transport import Http
from dl_inference_core.wire import messages

X = np.array([1.0, 2.0], np.float32)
OPENS = {"open", "os.listdir", "os.scandir", "os.chdir", "os.mkdir", "os.rename", "os.remove", "import"}


@dataclass
class Opened:
    """Files and folders that this process has opened while `watching`."""

    watching: bool = False
    found: list[Any] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event in OPENS:
            self.found.append((event, arguments[0]))


@pytest.fixture(scope="module")
def auditing() -> Opened:
    """A hook of the interpreter's, which stays for good."""
    opened = Opened()
    sys.addaudithook(opened.hook)
    return opened


@pytest.fixture
def opened(auditing: Opened) -> Iterator[Opened]:
    auditing.found.clear()
    yield auditing
    auditing.watching = False


@dataclass
class Node:
    dispatcher: Dispatcher
    port: int

    async def call(self, method: str, body: bytes) -> bytes:
        exchange = MemoryExchange(method, body)
        self.dispatcher.begin_all([exchange])
        return bytes(await exchange.outcome())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of models, beside which lies another model."""
    FakeBackend.write(tmp_path / "models/inside/1")
    FakeBackend.write(tmp_path / "outside/1")
    (tmp_path / "models/inside/model.toml").write_text("task_id = 7\nversion_labels = { stable = 1 }\n")
    return tmp_path / "models"


@contextlib.asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Node]:
    repository = Repository(root, backends={"fake": FakeBackend()}, handlers={}, poll_interval_s=0)
    await repository.start()
    metrics, readiness = Metrics(), Readiness(serving=True)
    routes = Routes(repository)
    dispatcher = Dispatcher(routes, metrics, unary=Introspection(routes, readiness).unary())
    rest = Rest(TfServingRest(Local(repository, None, readiness), dispatcher), body_bytes=100_000, timeout_s=20.0)
    app = asgi.with_exchanges(Http(service=rest, app=admin.app(metrics, readiness)))
    server = await HttpServer.start(app, "127.0.0.1", 0)
    try:
        yield Node(dispatcher, server.port)
    finally:
        await server.close()
        await repository.close()


def names(root: Path) -> list[str]:
    return [
        "../outside", "..\\outside", "%2e%2e/outside", "..%2foutside", "inside/../../outside", "./inside",
        "inside/", "inside/1", "inside/1/../../../outside/1", str(root.parent / "outside"), "//", "..", ".", "~",
        "$HOME", "file:///etc/passwd", "inside\0/../../outside", "../outside-7/../x", "\u2025/outside",
    ]  # fmt: skip


PREDICT, INFER = "/tensorflow.serving.PredictionService/Predict", "/inference.GRPCInferenceService/ModelInfer"


def requests(name: str) -> Iterator[tuple[str, bytes]]:
    """A method and what it is sent, for each way of naming a model."""
    yield PREDICT, build(name, {"x": X}, protocol="tfserving")[1]
    yield INFER, build(name, {"x": X})[1]
    yield "/seldon.protos.Model/Predict", build(name, X.astype(float))[1]
    yield (
        "/inference.GRPCInferenceService/ModelMetadata",
        messages.ModelInferRequest(model_name=name).SerializeToString(),
    )
    spec = {"name": name}
    yield (
        "/tensorflow.serving.PredictionService/GetModelMetadata",
        messages.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"]).SerializeToString(),
    )
    yield (
        "/tensorflow.serving.ModelService/GetModelStatus",
        messages.GetModelStatusRequest(model_spec=spec).SerializeToString(),
    )


def versioned(version: str) -> Iterator[tuple[str, bytes]]:
    """The same for each way of naming a version of the model that is there."""
    asked = messages.ModelInferRequest.FromString(build("inside", {"x": X})[1])
    asked.model_version = version
    yield INFER, asked.SerializeToString()
    labelled = messages.PredictRequest.FromString(build("inside", {"x": X}, protocol="tfserving")[1])
    labelled.model_spec.version_label = version
    yield PREDICT, labelled.SerializeToString()


async def test_by_grpc(root: Path, opened: Opened) -> None:
    async with serving(root) as node:
        for method, body in requests("inside"):  # imports what is imported late
            assert await node.call(method, body)
        opened.watching = True
        count = 0
        for name in names(root):
            for method, body in [*requests(name), *versioned(name)]:
                with pytest.raises(InferenceError) as refused:
                    await node.call(method, body)
                assert refused.value.code in (Code.NOT_FOUND, Code.INVALID_ARGUMENT)
                count += 1
        opened.watching = False
    assert count == 8 * len(names(root))
    assert opened.found == []


async def test_by_rest(root: Path, opened: Opened) -> None:
    def ask(path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest("POST", path, skip_accept_encoding=True)
            connection.putheader("content-length", "17")
            connection.endheaders(b'{"inputs": [1.5]}')
            return connection.getresponse().status

    async with serving(root) as node:
        assert await asyncio.to_thread(ask, "/v1/models/inside:predict") == 200
        opened.watching = True
        for name in ("../outside", "..%2Foutside", "%2e%2e%2foutside", "..%5coutside", "inside%2F..%2F..%2Foutside"):
            for path in (
                f"{name}:predict",
                f"{name}/versions/1:predict",
                f"inside/versions/{name}:predict",
                "inside/versions/..%2f1:predict",
                f"inside/labels/{name}:predict",
            ):
                assert await asyncio.to_thread(ask, f"/v1/models/{path}") in (400, 404), path
        opened.watching = False
    assert opened.found == []


def test_what_is_watched_is_seen(tmp_path: Path, opened: Opened) -> None:
    opened.watching = True
    list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    opened.watching = False
    assert len(opened.found) == 2
