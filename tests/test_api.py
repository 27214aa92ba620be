"""What a process does with the APIs that plugins bring."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from dl_inference_core import config as configs
from dl_inference_core.api import Api
from dl_inference_core.app import App
from dl_inference_core.config import Config, ModelsConfig, NamedModel, PluginOptions
from dl_inference_core.coroutines import UnaryHandler
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import ConfigError, InferenceError, ModelError, PluginError
from dl_inference_core.http_exchange import HttpExchange
from dl_inference_core.introspection import Readiness
from dl_inference_core.node.repository import Repository
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.rest.answering import Local, RestApi
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import CoroutineService
from dl_inference_core.transport import Exchange, Limits
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, TIS_PREDICT, VERSIONS, Protocol

Lab = Any  # tests/conftest.py
Install = Callable[..., Plugins]

SHOUT = replace(PROTOCOLS["tfserving"], name="shout", node_method="/loud.Service/Predict")
QUESTION = "/quiet.Service/Question"


class Page(RestApi):
    """Answers one URL."""

    paths = ("/loud/",)

    def begin(self, exchange: HttpExchange) -> None:
        self.answer(exchange, json.dumps({"asked": exchange.path}).encode())

    def describe(self, error: InferenceError, status: int) -> Any:
        return {"error": str(error)}


class Loud(Api):
    """An API with one of everything."""

    name = "loud"
    protocols: ClassVar[Mapping[str, Protocol]] = MappingProxyType({SHOUT.node_method: SHOUT})
    made: ClassVar[list[Loud]] = []

    class Options(PluginOptions):
        folder: Path | None = None
        waits: bool = False
        damaged: bool = False

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.calls: list[str] = []
        self.made.append(self)

    @property
    def said(self) -> Options:
        assert isinstance(self.options, self.Options)
        return self.options

    @property
    def brings_models(self) -> bool:
        return self.said.folder is not None

    @property
    def awaits_models(self) -> bool:
        return self.said.waits

    def name_models(self, named: Mapping[str, NamedModel], config: Config) -> Mapping[str, NamedModel]:
        self.calls.append("name models")
        folder = self.said.folder
        return {**named, "loud": NamedModel(path=folder)} if folder is not None and not self.said.waits else named

    def recorded_requests(self, folder: Path) -> Iterable[tuple[str, Request]]:
        if self.said.damaged:
            raise ModelError(f"{folder}: the recorded requests are damaged")
        inputs = {"x": np.array([7], np.float32)}
        yield f"request 1 in {folder}", Request(payload=inputs, form=Form.TENSORS)

    def methods(self) -> Mapping[str, UnaryHandler]:
        async def answer(exchange: Exchange) -> bytes:
            return bytes(exchange.message)[::-1]

        return {QUESTION: answer}

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> RestApi:
        return Page(local, dispatcher, cors=cors)

    def pages(self, readiness: Readiness) -> list[Route]:
        return [Route("/loud-page", lambda _: PlainTextResponse("a page"))]

    def start(self, repository: Repository) -> None:
        self.calls.append(f"start with {', '.join(repository.models)}")

    async def reload(self) -> None:
        self.calls.append("reload")

    async def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Loud.made.clear()


@pytest.fixture
def plugins(installed: Install) -> Plugins:
    return installed(Kind.APIS, Loud, more={Kind.BACKENDS: [FakeBackend]})


@asynccontextmanager
async def serving(
    config: Config, plugins: Plugins, file: Path | None = None
) -> AsyncIterator[tuple[App, grpc.aio.Channel]]:
    app = App(config, plugins, config_file=file)
    try:
        (port,) = await app.serve("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield app, channel
    finally:
        await app.close()


async def call(channel: grpc.aio.Channel, method: str, message: bytes) -> bytes:
    answer: bytes = await channel.unary_unary(method)(message, timeout=10)
    return answer


def predict(model: str) -> bytes:
    request = messages.PredictRequest(model_spec={"name": model})
    request.inputs["x"].dtype = 1
    request.inputs["x"].tensor_shape.dim.add(size=2)
    request.inputs["x"].float_val.extend([1, 2])
    return request.SerializeToString()  # type: ignore[no-any-return]


def values(answer: bytes) -> list[float]:
    outputs: Any = messages.PredictResponse.FromString(answer).outputs
    return list(outputs["x"].float_val)


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


async def test_a_node_answers_all_that_an_api_brings(tmp_path: Path, plugins: Plugins) -> None:
    for name in ("m", "far"):
        FakeBackend.write(tmp_path / name / "1", factor=3)
    config = Config(
        transport="grpcio",
        http_port=0,
        models=ModelsConfig(named={"m": NamedModel(path=tmp_path / "m")}),
        apis={"loud": {"folder": "far"}},
    )
    file = tmp_path / "server.toml"
    file.write_text("")
    async with serving(config, plugins, file) as (app, channel):
        (api,) = Loud.made
        for model in ("m", "loud"):
            assert values(await call(channel, SHOUT.node_method, predict(model))) == [3, 6]
        assert await call(channel, QUESTION, b"abc") == b"cba"
        assert app.http_port is not None
        assert await asyncio.to_thread(get, app.http_port, "/loud/x") == (200, b'{"asked": "/loud/x"}')
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("loud.Service", "quiet.Service"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await asyncio.to_thread(get, app.http_port, "/loud-page") == (200, b"a page")
        await app.reload()
    assert api.calls == ["name models", "start with loud, m", "reload", "close"]


async def test_a_version_answers_recorded_requests_before_it_is_ready(tmp_path: Path, plugins: Plugins) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=3)
    models = ModelsConfig(directory=tmp_path)
    async with serving(Config(transport="grpcio", models=models), plugins) as (app, _):
        assert app.repository is not None
        (instance,) = app.repository.models["m"].loaded[1].loaded.instances
        assert 7.0 in [float(inputs["x"][0]) for inputs in instance.model.calls]
    damaged = App(Config(transport="grpcio", models=models, apis={"loud": {"damaged": True}}), plugins)
    try:
        await damaged.load()
        (row,) = damaged.describe()
        assert row["detail"].endswith("the recorded requests are damaged")
    finally:
        await damaged.close()


async def test_a_process_whose_clients_have_yet_to_name_models_is_ready(tmp_path: Path, plugins: Plugins) -> None:
    config = Config(transport="grpcio", apis={"loud": {"folder": str(tmp_path), "waits": True}})
    async with serving(config, plugins) as (_, channel):
        answer = await call(channel, "/inference.GRPCInferenceService/ServerReady", b"")
        assert messages.ServerReadyResponse.FromString(answer).ready


async def test_a_gateway_forwards_the_methods_of_an_api(lab: Lab, installed: Install) -> None:
    calls: list[Exchange] = []

    async def answer(exchange: Exchange) -> bytes:
        calls.append(exchange)
        return b"\x0a\x03far"

    node = await lab.make_transport().serve(CoroutineService({SHOUT.node_method: answer}), ("127.0.0.1:0",), Limits())
    try:
        theirs = [type(lab.make_transport())] if lab.transport_name != "grpcio" else []
        lab.plugins = installed(Kind.APIS, Loud, more={Kind.TRANSPORTS: theirs})
        gateway = await lab.front(f"127.0.0.1:{node.ports[0]}")
        assert await gateway.start_call(body=predict("m"), method=SHOUT.node_method) == b"\x0a\x03far"
        assert [exchange.message for exchange in calls] == [predict("m")]
        (api,) = Loud.made
        assert api.calls == [], "a gateway has no models to name"
    finally:
        await node.drain(0)


# What cannot be


def test_options_are_strict_and_their_paths_those_of_the_config_file(tmp_path: Path, plugins: Plugins) -> None:
    config = Config(models=ModelsConfig(directory=tmp_path), apis={"loud": {"folder": "far"}})
    file = tmp_path / "conf" / "server.toml"
    file.parent.mkdir()
    file.write_text("")
    App(config, plugins, config_file=file)
    (api,) = Loud.made
    assert api.said.folder == tmp_path / "conf" / "far"
    wrong = config.model_copy(update={"apis": {"loud": {"colour": "red"}}})
    with pytest.raises(ConfigError, match=r'\[apis\.loud\]: options of API loud: unknown key "colour"'):
        App(wrong, plugins)


def test_an_api_that_is_not_installed_is_an_error_where_a_config_names_it(tmp_path: Path, plugins: Plugins) -> None:
    config = Config(models=ModelsConfig(directory=tmp_path), apis={"tfserving": {}})
    with pytest.raises(PluginError, match=r'\[apis\.tfserving\] names the API "tfserving", which no installed plugin'):
        App(config, plugins)


def test_an_api_that_cannot_be_made_ends_only_a_process_that_names_it(
    tmp_path: Path, installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Api):
        name = "broken"

        def __init__(self, options: PluginOptions) -> None:
            raise OSError("no device")

    class Demanding(Api):
        name = "demanding"

        class Options(PluginOptions):
            token: str

    plugins = installed(Kind.APIS, Broken, Demanding, Loud)
    config = Config(models=ModelsConfig(directory=tmp_path))
    App(config, plugins)
    assert [api.name for api in Loud.made] == ["loud"]
    broken, demanding = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert broken.startswith("API broken is left out: ")
    assert broken.endswith('cannot make the API "broken": OSError: no device')
    assert demanding.startswith("API demanding is left out: ")
    assert demanding.endswith("options of API demanding: token: Field required")
    with pytest.raises(PluginError, match="OSError: no device"):
        App(config.model_copy(update={"apis": {"broken": {}}}), plugins)
    with pytest.raises(ConfigError, match="token: Field required"):
        App(config.model_copy(update={"apis": {"demanding": {}}}), plugins)


def test_a_plugin_that_is_broken_is_said_since_it_may_have_an_api(
    tmp_path: Path, installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    class Nameless(Api):
        pass

    App(Config(models=ModelsConfig(directory=tmp_path)), installed(Kind.APIS, Nameless))
    (said,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "Nameless has no `name` of its own" in said
    assert said.endswith("; what it would have added to this server is missing")


def test_a_config_can_leave_an_api_out(tmp_path: Path, plugins: Plugins) -> None:
    text = f'[models]\ndirectory = "{tmp_path}"\n[apis]\nloud = false\n'
    App(configs.parse(text.encode(), tmp_path / "server.toml"), plugins)
    assert Loud.made == []


def test_an_api_that_is_left_out_must_be_there_or_it_is_said(
    tmp_path: Path, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    App(Config(models=ModelsConfig(directory=tmp_path), apis={"laud": False}), plugins)
    assert [api.name for api in Loud.made] == ["loud"]
    assert caplog.messages == ["[apis] laud = false: no installed plugin provides that API"]


@pytest.mark.parametrize("value", ["true", "0", '"no"'])
def test_an_api_has_options_or_false(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"apis: loud is .*; expected a table of options, or false$"):
        configs.parse(f"[apis]\nloud = {value}\n".encode(), tmp_path / "server.toml")


CHECK = "/grpc.health.v1.Health/Check"
TAKEN = {
    "of the core that infers": (TIS_PREDICT, "protocols", "the core"),
    "of the core that asks": (VERSIONS.node_method, "protocols", "the core"),
    "of the core that answers about health": (CHECK, "methods", "the core"),
    "of the core that streams": ("/grpc.health.v1.Health/Watch", "methods", "the core"),
    "of another API that infers": (SHOUT.node_method, "methods", "API loud"),
    "of another API that answers otherwise": (QUESTION, "protocols", "API loud"),
    "of its own": ("/own.Service/Both", "both", "API second"),
}


@pytest.mark.parametrize(("path", "where", "owner"), TAKEN.values(), ids=TAKEN)
async def test_a_method_that_is_taken_is_an_error_at_the_start(
    tmp_path: Path, installed: Install, path: str, where: str, owner: str
) -> None:
    class Second(Api):
        name = "second"
        protocols: ClassVar[Mapping[str, Protocol]] = {path: SHOUT} if where in ("protocols", "both") else {}

        def methods(self) -> Mapping[str, UnaryHandler]:
            async def answer(_: Exchange) -> bytes:
                return b""

            return {path: answer} if where in ("methods", "both") else {}

    said = rf"^API second: the method {path} is taken by {owner}$"
    await refused(tmp_path, installed(Kind.APIS, Loud, Second), said)


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("/loud/", "API loud, which has /loud/"),
        ("/loud/er", "API loud, which has /loud/"),
        ("/", "the core, which has /metrics"),
        ("/readyz", "the core, which has /readyz"),
        ("/loud-page", "API loud, which has /loud-page"),
    ],
)
async def test_a_url_that_is_taken_is_an_error_at_the_start(
    tmp_path: Path, installed: Install, path: str, owner: str
) -> None:
    class Other(Page):
        paths = (path,)

    class Second(Api):
        name = "second"

        def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> RestApi:
            return Other(local, dispatcher, cors=cors)

    await refused(tmp_path, installed(Kind.APIS, Loud, Second), f"^API second: the path {path} is taken by {owner}$")


@pytest.mark.parametrize(("path", "owner"), [("/readyz", "the core"), ("/m", "the core"), ("/loud-page", "API loud")])
async def test_a_page_that_is_taken_is_an_error_at_the_start(
    tmp_path: Path, installed: Install, path: str, owner: str
) -> None:
    class Second(Api):
        name = "second"

        def pages(self, readiness: Readiness) -> list[Route]:
            return [Route(path, lambda _: PlainTextResponse("another"))]

    said = f"^API second: the page {path} is taken by {owner}$"
    await refused(tmp_path, installed(Kind.APIS, Loud, Second), said, metrics_path="/m")


async def test_metrics_at_the_root_leave_all_other_urls_to_apis(tmp_path: Path, plugins: Plugins) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    config = Config(transport="grpcio", http_port=0, metrics_path="/", models=ModelsConfig(directory=tmp_path))
    async with serving(config, plugins) as (app, _):
        assert app.http_port is not None
        assert (await asyncio.to_thread(get, app.http_port, "/loud/x"))[1] == b'{"asked": "/loud/x"}'
        assert b"dl_inference" in (await asyncio.to_thread(get, app.http_port, "/"))[1]


async def test_a_path_that_is_not_a_method_is_an_error_at_the_start(tmp_path: Path, installed: Install) -> None:
    class Second(Api):
        name = "second"
        protocols: ClassVar[Mapping[str, Protocol]] = {"Predict": SHOUT}

    said = r"^API second: 'Predict' is not a method; expected /package\.Service/Method$"
    await refused(tmp_path, installed(Kind.APIS, Second), said)


async def refused(folder: Path, plugins: Plugins, said: str, **config: Any) -> None:
    """`check` and `serve` end with that error."""
    for start in (App.load, lambda app: app.serve("127.0.0.1:0")):
        app = App(Config(transport="grpcio", models=ModelsConfig(directory=folder), **config), plugins)
        try:
            with pytest.raises(PluginError, match=said):
                await start(app)
        finally:
            await app.close()


def test_several_apis_that_name_models_are_an_error(tmp_path: Path, installed: Install) -> None:
    class Second(Loud):
        name = "second"

    plugins = installed(Kind.APIS, Loud, Second)
    config = Config(apis={"loud": {"folder": str(tmp_path)}, "second": {"folder": str(tmp_path)}})
    with pytest.raises(PluginError, match="the APIs loud and second name models; expected at most one that does"):
        App(config, plugins)


STEPS = ("name_models", "methods", "rest", "pages", "start", "brings_models")


@pytest.mark.parametrize("step", STEPS)
async def test_an_error_of_an_apis_own_code_names_the_api(tmp_path: Path, installed: Install, step: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oh")

    failing = property(fail) if step == "brings_models" else fail
    plugins = installed(Kind.APIS, type("Second", (Api,), {"name": "second", step: failing}))

    # Where the config names models, nobody asks whether an API does.
    models = ModelsConfig() if step == "brings_models" else ModelsConfig(directory=tmp_path)

    async def start() -> None:
        app = App(Config(transport="grpcio", models=models), plugins)
        try:
            await app.load()
        finally:
            await app.close()

    with pytest.raises(PluginError, match=f"^API second: {step} failed: ZeroDivisionError: oh$"):
        await start()


async def fails(_: Api) -> None:
    raise ZeroDivisionError


def fails_at_once(_: Api) -> None:
    raise ZeroDivisionError


async def ends_its_task(_: Api) -> None:
    task = asyncio.create_task(asyncio.sleep(10))
    task.cancel()
    await task


@pytest.mark.parametrize("how", [fails, fails_at_once, ends_its_task])
async def test_an_api_that_fails_to_reload_or_to_close_stops_nothing_else(
    tmp_path: Path, installed: Install, caplog: pytest.LogCaptureFixture, how: Callable[[Api], Any]
) -> None:
    failing = type("Failing", (Api,), {"name": "failing", "reload": how, "close": how})
    FakeBackend.write(tmp_path / "m" / "1")
    plugins = installed(Kind.APIS, failing, Loud, more={Kind.BACKENDS: [FakeBackend]})
    async with serving(Config(transport="grpcio", models=ModelsConfig(directory=tmp_path)), plugins) as (app, _):
        await app.reload()
    (loud,) = Loud.made
    assert loud.calls == ["name models", "start with m", "reload", "close"]
    failed = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert failed == ["API failing: reload failed", "API failing: close failed"]


async def test_a_gateway_is_not_ready_because_an_api_awaits_models(lab: Lab, installed: Install) -> None:
    class Awaiting(Api):
        name = "awaiting"
        awaits_models = True

    app = App(Config(transport="grpcio", gateway={"nodefile": nodefile(lab.folder)}), installed(Kind.APIS, Awaiting))
    try:
        assert not app._awaits_config
    finally:
        await app.close()


def nodefile(folder: Path) -> Path:
    file = folder / "nodefile.txt"
    file.write_text("m=1000,127.0.0.1:1\n")
    return file
