"""What tests of the request path share: each installed transport in turn, nodes that fail as told, and gateways."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest

from dl_inference_core import builtins
from dl_inference_core import config as configs
from dl_inference_core.app import App
from dl_inference_core.errors import Code, InferenceError, from_status
from dl_inference_core.gateway.forwarding import Forwarder
from dl_inference_core.gateway.pool import Node
from dl_inference_core.gateway.sharing import Share
from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.serving import new_event_loop
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import CoroutineService, free_port
from dl_inference_core.transport import Answer, Exchange, Limits, Server, Transport
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, QUESTIONS
from tests.methods import METHODS

INFER = PROTOCOLS["openinference"].node_method
CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture(scope="session", params=sorted(Plugins().classes(Kind.TRANSPORTS)))
def transport(request: pytest.FixtureRequest) -> str:
    """The name of each installed transport."""
    return str(request.param)


FAKES = """
from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.testing import FakeBackend


@hookimpl
def dl_inference_register_backends():
    return [FakeBackend]
"""


@pytest.fixture
def site_with_fakes(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH, in which a plugin with `FakeBackend` is installed."""
    site = tmp_path / "site"
    about = site / "fakes-1.dist-info"
    about.mkdir(parents=True)
    (site / "fakes.py").write_text(FAKES)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fakes\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[dl_inference_core]\nfakes = fakes\n")
    return site


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine function runs on an event loop of its own, for at most two minutes. Then its labs have
    as long to close."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def bounded() -> None:
        try:
            async with asyncio.timeout(120):
                await pyfuncitem.obj(**arguments)
        finally:
            async with asyncio.timeout(120):
                for argument in arguments.values():
                    if isinstance(argument, Lab):
                        await argument.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(bounded())
    return True


class FaultNode:
    """A node that does as it is told.

    Attributes:
        latency_s: seconds before an answer.
        status: answers with that error, if any.
        hangs: whether it never answers.
        answer: the bytes of an answer; None is one that carries the node's name.
        trailers: go with each answer and error.
        health: the answer to health checks, or an error.
        health_hangs: whether it never answers those.
        calls: every call that came, health checks left out.
        checks: how many health checks came.
        cancelled: when calls were cancelled, by `time.monotonic`.
    """

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self.latency_s = 0.0
        self.status: InferenceError | None = None
        self.hangs = False
        self.answer: bytes | None = None
        self.trailers: list[tuple[str, str | bytes]] = []
        self.health: bytes | InferenceError = b"\x08\x01"
        self.health_hangs = False
        self.calls: list[Exchange] = []
        self.checks = 0
        self.cancelled: list[float] = []
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self._transport = transport
        self._server: Server | None = None
        self.address = f"127.0.0.1:{free_port()}"

    async def start(self) -> FaultNode:
        """Listen, always on the same port."""
        methods = {protocol.node_method: self._call for protocol in (*METHODS.values(), *QUESTIONS)}
        self._server = await self._transport.serve(
            CoroutineService({**methods, CHECK: self._check}), (self.address,), Limits()
        )
        return self

    async def stop(self) -> None:
        """Stop listening, and drop what is in flight."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.drain(0)

    @property
    def count(self) -> int:
        return len(self.calls)

    async def _call(self, exchange: Exchange) -> Answer:
        self.calls.append(exchange)
        self.entered.set()
        try:
            if self.hangs:
                await self.release.wait()
            await asyncio.sleep(self.latency_s)
        except asyncio.CancelledError:
            self.cancelled.append(time.monotonic())
            raise
        if self.status is not None:
            self.status.trailers = tuple(self.trailers)
            raise self.status
        return Answer(ok(self.name) if self.answer is None else self.answer, tuple(self.trailers))

    async def _check(self, _: Exchange) -> bytes:
        self.checks += 1
        if self.health_hangs:
            await asyncio.Event().wait()
        if isinstance(self.health, InferenceError):
            raise self.health
        return self.health


def ok(name: str) -> bytes:
    """The answer of the node of that name."""
    body: bytes = messages.ModelInferResponse(model_name="m", id=name).SerializeToString()
    return body


class Gateway:
    """A gateway in this process, and an official client of it."""

    def __init__(self, app: App, port: int, file: Path) -> None:
        self.app = app
        self.address = f"127.0.0.1:{port}"
        self.file = file
        self.channel = grpc.aio.insecure_channel(
            self.address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )

    def start_call(
        self,
        model: str = "m",
        *,
        body: bytes | None = None,
        method: str = INFER,
        timeout: float = 10,
        metadata: Any = (),
    ) -> Any:
        """A call under way, of `grpc.aio`."""
        if body is None:
            body = messages.ModelInferRequest(model_name=model).SerializeToString()
        return self.channel.unary_unary(method)(body, timeout=timeout, metadata=metadata)

    async def call(self, model: str = "m", **how: Any) -> str:
        """The name of the node that answered."""
        return str(messages.ModelInferResponse.FromString(await self.start_call(model, **how)).id)

    async def refusal(self, model: str = "m", **how: Any) -> tuple[Code, str]:
        """The status and message of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.start_call(model, **how)
        return Code(caught.value.code().value[0]), caught.value.details() or ""

    def forwarder(self, route: str | int = "m") -> Forwarder:
        assert self.app.gateway is not None
        found = self.app.gateway.models.get(route) if isinstance(route, str) else self.app.gateway.tasks.get(route)
        assert found is not None
        return found

    def node(self, fault: FaultNode, route: str | int = "m") -> Node:
        """The gateway's own idea of a node."""
        return next(node for node in self.forwarder(route).pool.nodes if node.address == fault.address)

    def usable(self, fault: FaultNode, route: str | int = "m") -> bool:
        return self.node(fault, route).endpoint.health.usable

    def weight(self, fault: FaultNode, route: str | int = "m") -> int:
        """What the dynamic strategy gives it."""
        return int(self.forwarder(route).balancer.shares[self.node(fault, route)].weight)  # type: ignore[attr-defined]

    async def close(self) -> None:
        await self.channel.close()
        await self.app.close()


class Fakes(Plugins):
    """The installed plugins, with `FakeBackend` in the place of the installed backends."""

    def classes(self, kind: Kind) -> Mapping[str, type[Any]]:
        return {"fake": FakeBackend} if kind is Kind.BACKENDS else super().classes(kind)


class _Loaded(EntryPoint):
    """An entry point of a module that is there already."""

    def load(self) -> ModuleType:
        module: ModuleType = vars(self)["module"]
        return module


@pytest.fixture
def installed() -> Callable[..., Plugins]:
    """The core, and one more plugin that registers classes of one kind, or of several: `installed(kind, *classes)`,
    `installed(kind, *classes, more={kind: [class]})`."""

    def of(kind: Kind, *classes: type, more: Mapping[Kind, list[type]] = MappingProxyType({})) -> Plugins:
        module = ModuleType("installed")

        def register(kind: Kind, classes: list[type]) -> None:
            setattr(module, kind.hook, hookimpl(lambda: classes))

        for each, registered in {kind: list(classes), **more}.items():
            register(each, registered)
        found = [_Loaded(name, name, "dl_inference_core") for name in ("core", "installed")]
        for entry, loaded in zip(found, (builtins, module), strict=True):
            vars(entry)["module"] = loaded
        return Plugins(found)

    return of


class Lab:
    """Nodes and gateways of one test; taken down after it."""

    def __init__(self, transport: str, folder: Path) -> None:
        self.plugins = Plugins()
        self.fakes = Fakes()
        self.transport_name = transport
        self.folder = folder
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._files = itertools.count()

    def make_transport(self) -> Transport:
        made: Transport = self.plugins.make(Kind.TRANSPORTS, self.transport_name, {}, "test")
        return made

    async def node(self, name: str = "a", **faults: Any) -> FaultNode:
        """A node that is up."""
        node = FaultNode(name, self.make_transport())
        for key, value in faults.items():
            assert hasattr(node, key)
            setattr(node, key, value)
        await node.start()
        self._closing.append(node.stop)
        return node

    async def nodes(self, names: str = "abc", **faults: Any) -> list[FaultNode]:
        return [await self.node(name, **faults) for name in names]

    async def gateway(
        self, config: str, *, share: Share | None = None, listen: str = "127.0.0.1:0", **update: Any
    ) -> Gateway:
        """A gateway with that config file; with `share` one of several."""
        file = self.folder / f"gateway-{next(self._files)}.toml"
        file.write_text(f'transport = "{self.transport_name}"\n{config}')
        parsed = configs.load(file).model_copy(update=update)
        app = App(parsed, self.plugins, config_file=file, share=share)
        try:
            (port,) = await app.serve(listen)
        except BaseException:
            await app.close()
            raise
        gateway = Gateway(app, port, file)
        self._closing.append(gateway.close)
        return gateway

    async def front(self, *nodes: FaultNode | str, more: str = "", top: str = "") -> Gateway:
        """A gateway with a route "m", task 69, to those nodes."""
        return await self.gateway(top + self.route(*nodes, more=more))

    def route(self, *nodes: FaultNode | str, name: str = "m", task: int | None = 69, more: str = "") -> str:
        addresses = [node if isinstance(node, str) else node.address for node in nodes]
        id_ = "" if task is None else f"task_id = {task}\n"
        return f'[[routes]]\nname = "{name}"\n{id_}nodes = {addresses}\n{more}\n'

    async def close(self) -> None:
        for close in reversed(self._closing):
            await close()

    async def until(self, what: Callable[[], Any], within_s: float = 20.0) -> float:
        """Polls until `what` tells a truth; returns how many seconds that took."""
        start = time.monotonic()
        while not what():
            assert time.monotonic() - start < within_s, f"waited {within_s} s for {inspect.getsource(what)}"
            await asyncio.sleep(0.005)
        return time.monotonic() - start

    def error(self, code: Code, message: str = "as told") -> InferenceError:
        """What makes a node answer so."""
        error = from_status(code, message)
        error.code = code
        return error


@pytest.fixture
def lab(transport: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Lab:
    caplog.set_level(logging.WARNING)
    return Lab(transport, tmp_path)
