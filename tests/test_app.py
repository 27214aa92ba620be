"""What one process is built of."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from dl_inference_core import app
from dl_inference_core import config as configs
from dl_inference_core.app import App
from dl_inference_core.config import Config, GatewayConfig, ModelsConfig, NamedModel
from dl_inference_core.plugins import Plugins
from dl_inference_core.testing import FakeBackend
from tests.conftest import Fakes


@pytest.mark.parametrize(
    ("cores", "workers", "share"), [(6, 1, 0), (6, 2, 3), (6, 4, 1), (6, 9, 1), (4, 1, 4), (4, 2, 2), (1, 1, 1)]
)
def test_workers_share_the_cores_that_a_quota_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, share: int
) -> None:
    monkeypatch.setattr(app, "affinity_cores", lambda: 6)
    monkeypatch.setattr(app, "cores", lambda: cores)
    served = App(Config(models=ModelsConfig(directory=tmp_path), workers=workers), Plugins())
    assert served.repository is not None
    names = served.repository._loader.backends
    assert names
    assert {served._make_backend(name).cores for name in names} == {share}


async def test_relative_paths_are_those_of_the_start_whatever_folder_a_handler_changes_to(
    tmp_path: Path, site_with_fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = FakeBackend.write(tmp_path / "models" / "m" / "1", factor=1)
    (folder / "handler.py").write_text(
        "import os\nfrom dl_inference_core.node.handling import Handler\n"
        f"class Own(Handler):\n    def load(self, model, directory):\n        os.chdir({str(elsewhere)!r})\n"
    )
    (tmp_path / "nodefile.txt").write_text("1=1000,127.0.0.1:1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(site_with_fakes))
    config = Config(
        models=ModelsConfig(directory=Path("models"), poll_interval_ms=20),
        gateway=GatewayConfig(nodefile=Path("nodefile.txt"), poll_interval_ms=20),
    )
    served = App(config, Plugins())
    try:
        await served.load()
        assert Path.cwd() == elsewhere
        assert served.repository is not None
        assert served.gateway is not None
        FakeBackend.write(tmp_path / "models" / "m" / "2", factor=1)
        (tmp_path / "nodefile.txt").write_text("1=1000,127.0.0.1:1\n2=1000,127.0.0.1:1\n")
        async with asyncio.timeout(20):
            while 2 not in served.repository.models["m"].loaded or len(served.gateway.forwarders) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await served.close()
        sys.modules.pop("fakes", None)


@pytest.mark.parametrize("written", [True, False])
def test_paths_in_the_options_of_a_backend_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """They are used when the first model is loaded, which may be after a handler has changed the folder."""
    pytest.importorskip("dl_inference_tf_backend")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "server.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    config = Config(
        models=ModelsConfig(directory=tmp_path), backends={"tensorflow": {"custom_op_libraries": ["ops.so", "/ops.so"]}}
    )
    served = App(config, Plugins(), config_file=Path("conf", "server.toml") if written else None)
    monkeypatch.chdir("/")
    options = served._make_backend("tensorflow").options
    folder = tmp_path / "conf" if written else tmp_path
    assert options.model_dump()["custom_op_libraries"] == (folder / "ops.so", Path("/ops.so"))


def test_every_path_of_a_config_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    file = Path("conf", "server.toml")
    file.write_text(
        'socket_path = "s"\n[models]\ndirectory = "d"\n[models.named.m]\npath = "p"\n'
        '[gateway]\nnodefile = "n"\n[gateway.tls]\nca = "a"\n[gateway.registry]\ntoken_file = "t"\n'
        '[join]\ngateways = ["g:1"]\ntoken_file = "j"\n[join.tls]\nca = "b"\n[tls]\ncertificate = "e"\nkey = "/k"\n'
    )
    config = configs.load(file)
    folder = tmp_path / "conf"
    assert config.socket_path == folder / "s"
    assert config.models.directory == folder / "d"
    assert config.models.named["m"].path == folder / "p"
    assert config.gateway.nodefile == folder / "n"
    assert config.gateway.tls is not None
    assert config.gateway.registry is not None
    assert config.join is not None
    assert config.join.tls is not None
    assert config.tls is not None
    assert config.gateway.tls.ca == folder / "a"
    assert config.gateway.registry.token_file == folder / "t"
    assert (config.join.token_file, config.join.tls.ca) == (folder / "j", folder / "b")
    assert (config.tls.certificate, config.tls.key) == (folder / "e", Path("/k"))


def test_http_gets_all_its_connections_where_all_fit_and_a_quarter_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(models=ModelsConfig(directory=tmp_path), connections=40, http_port=0, http_max_connections=30)
    served = App(config, Plugins())
    limits, http_limits = served._with_room()
    assert (limits.connections, http_limits.connections) == (40, 30)
    monkeypatch.setattr(app, "room_for", lambda _: 60)
    limits, http_limits = served._with_room()
    assert (limits.connections, http_limits.connections) == (40, 15)


async def test_a_socket_that_is_not_connected_yet_is_not_the_services_own(
    tmp_path: Path, site_with_fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site_with_fakes))
    FakeBackend.write(tmp_path / "m" / "1")
    served = App(Config(models=ModelsConfig(directory=tmp_path), port=0, transport="grpcio"), Plugins())
    try:
        (port,) = await served.serve()
        with socket.socket() as each, socket.create_connection(("127.0.0.1", port)) as client:
            own = served.own_sockets()
            assert not own.has(each)
            assert not own.has(client)
            assert port in own.ports
    finally:
        await served.close()
        sys.modules.pop("fakes", None)


async def test_a_node_says_what_of_its_config_takes_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FakeBackend.write(tmp_path / "models" / "m" / "1")
    file = tmp_path / "server.toml"
    text = 'transport = "grpcio"\n[models]\ndirectory = "models"\npoll_interval_ms = 0\n'
    file.write_text(text)
    app = App(configs.load(file), Fakes(), config_file=file)
    try:
        await app.reload()  # nothing has begun: there is nothing to reload
        await app.load()
        caplog.clear()
        for changed, said in (
            (text, []),
            (f"port = 1\n{text}", [f"{file}: port: changes take effect at the next start"]),
            ("port = ", [f"reload failed, everything stays as it is: {file}: Invalid value (at end of document)"]),
        ):
            file.write_text(changed)
            await app.reload()
            assert [record.message for record in caplog.records if record.levelname == "WARNING"] == said
            caplog.clear()
    finally:
        await app.close()


async def test_a_gateway_reloads_its_routes(tmp_path: Path) -> None:
    nodes = tmp_path / "nodefile.txt"
    nodes.write_text("1=1000,127.0.0.1:1\n")
    app = App(Config(transport="grpcio", gateway=GatewayConfig(nodefile=nodes, poll_interval_ms=3_600_000)), Plugins())
    try:
        await app.load()
        assert app.gateway is not None
        nodes.write_text("1=1000,127.0.0.1:1\n2=1000,127.0.0.1:1\n")
        await app.reload()
        async with asyncio.timeout(20):
            while len(app.gateway.forwarders) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await app.close()


async def test_a_model_without_versions_is_not_ok(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    models = ModelsConfig(named={"m": NamedModel(path=tmp_path / "empty", flat=False)})
    app = App(Config(transport="grpcio", models=models), Fakes())
    try:
        await app.load()
        assert app.describe() == [{"kind": "model", "name": "m", "ok": False, "detail": "it has no versions"}]
    finally:
        await app.close()
