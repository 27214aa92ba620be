from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from dl_inference_core import config as configs
from dl_inference_core.config import (
    ClientTls,
    Config,
    GatewayConfig,
    HealthConfig,
    JoinConfig,
    ModelsConfig,
    NamedModel,
    NodeConfig,
    RegistryConfig,
    RouteConfig,
    ServerTls,
    validated,
)
from dl_inference_core.errors import ConfigError
from dl_inference_core.node.loading import ModelConfig

ROOT = Path(__file__).parents[1]
ROUTE = '[[routes]]\nname = "a"\nnodes = ["h:1"]\n'


def read(text: str) -> Config:
    return configs.parse(text.encode(), Path("/etc/dl/server.toml"))


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("/etc/dl/server.toml: ")
    assert "\n" not in message
    return message.removeprefix("/etc/dl/server.toml: ")


def test_an_empty_file_is_the_defaults() -> None:
    assert read("") == Config()
    assert Config().model_dump(include={"host", "port", "workers", "transport"}) == {
        "host": "127.0.0.1",
        "port": 8500,
        "workers": 1,
        "transport": "auto",
    }
    assert Config().message_bytes == 10 * 1024 * 1024


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().port = 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", 'unknown key "prot" (known: host, port, '),
        ("[gateway]\nnodes = 1", 'unknown key "gateway.nodes" (known: nodefile, poll_interval_ms, '),
        ("[models]\ndir = 1", 'unknown key "models.dir" (known: directory, poll_interval_ms, named,'),
        ("[models]\npoll_interval_ms = -1", "models.poll_interval_ms: "),
        ("[models]\nnamed = 1", "models.named: "),
        ("[models.named]\nm = 'p'", "models.named.m: "),
        ("[models.named.m]", "models.named.m.path: Field required"),
        ("[models.named.m]\npath = 1", "models.named.m.path: "),
        ("[models.named.m]\npath = 'p'\nx = 1", 'unknown key "models.named.m.x" (known: path, settings, flat'),
        ("[models.named.path]\npath = 'p'\nx = 1", 'unknown key "models.named.path.x" (known: path, settings, flat'),
        ("[models.named.'tuple a']\npath = 'p'\nsettings = 3", "models.named.tuple a.settings: "),
        (ROUTE + "timeout = 1", 'unknown key "routes.0.timeout" (known: timeout_ms, attempts'),
        ("port = 70000", "port: Input should be less than or equal to 65535"),
        ("port = -1", "port: Input should be greater than or equal to 0"),
        ('port = "many"', "port: Input should be a valid integer"),
        ("port = 8500\nport = 8501", "Cannot overwrite a value"),
        ("workers = 0", "workers: "),
        ("drain_s = nan", "drain_s: "),
        ("drain_s = inf", "drain_s: "),
        ("drain_s = -1", "drain_s: "),
        ("message_bytes = 1", "message_bytes: "),
        ("routes = 1", "routes: "),
        ('routes = ["a"]', "routes.0: "),
        ("x = ", "Invalid value"),
        ("[[routes]]\nnodes = ['h:1']", "routes.0: a route needs a name or a task_id"),
        ("[[routes]]\nname = 'a'", "routes.0.nodes: Field required"),
        ("[[routes]]\nname = 'a'\nnodes = []", "routes.0.nodes: "),
        ("[[routes]]\nname = 'a/b'\nnodes = ['h:1']", "routes.0.name: "),
        ("[[routes]]\nname = 'a'\nnodes = ['h:70000']", 'routes.0.nodes.0: "h:70000": port 70000 is not between'),
        ("[[routes]]\nname = 'a'\nnodes = ['h:1', 8]", "routes.0.nodes.1: expected a string, host:port"),
        ("[[routes]]\nname = 'a'\nnodes = [{address='no'}]", "routes.0.nodes.0: expected a string, host:port"),
        ("[[routes]]\nname = 'a'\nnodes = ['h:1', 'h:1@3']", "routes.0: node h:1 stands twice"),
        ("[[routes]]\ntask_id = -1\nnodes = ['h:1']", "routes.0.task_id: "),
        ("[tls]\nkey = 'k'", "tls.certificate: Field required"),
        ("[tls]\ncertificate = 'c'\nkey = 'k'\nca = 'c'", 'unknown key "tls.ca" (known: certificate, key, client_ca)'),
        ("[gateway.tls]\nkey = 'k'", "gateway.tls: certificate and key go together"),
        ("[gateway.tls]\nx = 1", 'unknown key "gateway.tls.x" (known: ca, certificate, key, server_name)'),
        (ROUTE + "attempts = 0", "routes.0.attempts: "),
        (ROUTE + "timeout_ms = 0", "routes.0.timeout_ms: "),
        (ROUTE * 2, "2 routes have the name 'a'"),
        ("[[routes]]\ntask_id = 7\nnodes = ['h:1']\n" * 3, "3 routes have the task_id 7"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(text: str, said: str) -> None:
    assert complaint(text).startswith(said)


def test_every_mistake_is_named() -> None:
    message = complaint("port = 70000\nhots = 'x'\n[gateway]\npoll_interval_ms = 1")
    assert all(word in message for word in ("port: ", '"hots"', "gateway.poll_interval_ms: "))


@pytest.mark.parametrize("content", [b"\xff\xfep\x00", b"port = '\xe9'"])
def test_what_is_no_utf8_is_said_on_one_line(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^c\.toml: .*expected UTF-8$"):
        configs.parse(content, Path("c.toml"))


def test_a_config_may_begin_with_a_byte_order_mark() -> None:
    assert configs.parse(b"\xef\xbb\xbfport = 1\n", Path("c.toml")).port == 1


def test_a_token_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert configs.read_token(tmp_path / "token") == "secret"


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_file_that_cannot_be_read_is_said(make: object, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: (No such file|Is a directory)"):
        configs.load(path)


def test_relative_paths_are_taken_from_the_files_folder() -> None:
    config = read('[models]\ndirectory = "models"\n[gateway]\nnodefile = "../nodefile.txt"')
    assert config.models.directory == Path("/etc/dl/models")
    assert config.gateway.nodefile == Path("/etc/dl/../nodefile.txt")
    config = read('[tls]\ncertificate = "c"\nkey = "/k"\n[gateway.tls]\nca = "tls/ca"\nserver_name = "n"')
    assert config.tls == ServerTls(certificate=Path("/etc/dl/c"), key=Path("/k"))
    assert config.gateway.tls == ClientTls(ca=Path("/etc/dl/tls/ca"), server_name="n")
    config = read('[models.named.a]\npath = "a"\n[models.named.b]\npath = "/b"')
    assert {name: model.path for name, model in config.models.named.items()} == {
        "a": Path("/etc/dl/a"),
        "b": Path("/b"),
    }
    config = read('[models]\ndirectory = "/srv/models"')
    assert config.models.directory == Path("/srv/models")
    assert config.gateway.nodefile is None


@pytest.mark.parametrize(
    ("given", "host"),
    [("::1", "[::1]"), ("[::1]", "[::1]"), ("::", "[::]"), ("10.0.0.1", "10.0.0.1"), ("a.b", "a.b")],
)
def test_a_host_by_ipv6_stands_in_brackets_before_a_port(given: str, host: str) -> None:
    assert read(f'host = "{given}"').host == host


@pytest.mark.parametrize(
    ("text", "address", "weight"),
    [
        ("10.0.0.1:8500", "10.0.0.1:8500", 1),
        ("unix:/run/node.sock", "unix:/run/node.sock", 1),
        ("unix:/run/a@b/node@3", "unix:/run/a@b/node", 3),
        ("host-1.example_x.org:1@0", "host-1.example_x.org:1", 0),
        ("h:65535@10000", "h:65535", 10_000),
        ("[::1]:80", "[::1]:80", 1),
        ("[2001:db8::2]:80@5", "[2001:db8::2]:80", 5),
    ],
)
def test_a_node_is_an_address_and_perhaps_a_weight(text: str, address: str, weight: int) -> None:
    assert NodeConfig.parse(text) == NodeConfig(address=address, weight=weight)
    assert read(f'[[routes]]\nname = "a"\nnodes = ["{text}"]').routes[0].nodes[0].address == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "h", "h:", ":1", "h:0", "h:65536", "h:99999", "h:123456", "h:1@", "h:1@-1", "h:1@1.5", "h:1@10001"),
        *("::1:80", "[::1]", "[::1:80", "h h:1", "h:1 ", "http://h:1", "h:1/x", "h:1\n", "h\x00:1", "h:1@1@1", "é:1"),
        *("h:-1", "h:\uff11", "unix:", "unix:run/x", "unix:/x@10001", f"unix:/{'x' * 107}"),
    ],
)
def test_what_is_no_node_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a node|is not between|is over|over 107 bytes"):
        NodeConfig.parse(text)


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("", False),
        ("[models]\npoll_interval_ms = 0", False),
        ("[models]\ndirectory = 'models'", True),
        ("[models.named.m]\npath = 'm'", True),
    ],
)
def test_models_may_come_from_a_folder_or_by_name(text: str, there: bool) -> None:
    assert read(text).models.any is there


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"versions": "newst"}, ["versions: Input should be 'newest' or 'all'"]),
        ({"versions": [1, -1]}, ["versions.1: Input should be greater than or equal to 0"]),
        ({"versions": ["1"]}, ["versions.0: Input should be a valid integer"]),
        ({"versions": [True]}, ["versions.0: Input should be a valid integer"]),
        ({"versions": 3}, ["versions: Input should be 'newest' or 'all'"]),
        ({"version_labels": {"stable": "3"}}, ["version_labels.stable: Input should be a valid integer"]),
        ({"version_labels": ["stable"]}, ["version_labels: "]),
        ({"keep_versions": 0}, ["keep_versions: "]),
    ],
)
def test_what_is_wrong_with_a_policy_of_versions_is_said(values: dict[str, object], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(ModelConfig, values, "model.toml")
    message = str(caught.value)
    assert message.startswith("model.toml: ")
    assert all(words in message for words in said)
    assert "[" not in message.partition("Input")[0]


def test_policies_of_versions() -> None:
    for given, taken in (("all", "all"), ("newest", "newest"), ([3, 0], (3, 0)), ([], ())):
        assert validated(ModelConfig, {"versions": given}, "").versions == taken


def test_differences_are_named_by_their_place() -> None:
    one = read("port = 1\n[models]\ndirectory = 'a'\n")
    other = read(f"port = 2\n[models]\ndirectory = 'b'\n[gateway]\nnodefile = 'n'\n{ROUTE}")
    assert configs.differences(one, other) == ["port", "models.directory", "gateway.nodefile", "routes"]
    assert configs.differences(one, one) == []
    plain, tls, other_tls = read(""), read("[gateway.tls]\nca = 'a'"), read("[gateway.tls]\nca = 'b'")
    assert configs.differences(plain, tls) == configs.differences(tls, plain) == ["gateway.tls"]
    assert configs.differences(tls, other_tls) == ["gateway.tls.ca"]
    named, other_named = (read(f"[models.named.m]\npath = '{path}'") for path in "ab")
    assert configs.differences(named, other_named) == ["models.named"]


# docs/configuration.md


def generator() -> object:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == generator().reference(), "run: python docs/generate.py"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "model",
    [
        Config,
        ModelsConfig,
        NamedModel,
        GatewayConfig,
        HealthConfig,
        RegistryConfig,
        JoinConfig,
        RouteConfig,
        ModelConfig,
        ServerTls,
        ClientTls,
    ],
)
def test_every_field_is_described_in_the_page_and_in_the_example(model: type[BaseModel]) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for name, field in model.model_fields.items():
        assert f"| `{name}` |" in page or f"[{name}]" in page or f".{name}]" in page
        assert field.description or name in ("models", "gateway", "health", "registry", "join", "routes", "tls"), name


def test_the_example_is_complete_and_right() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = read(blocks[0])
    table = tomllib.loads(blocks[0])
    assert set(table) == set(Config.model_fields)
    assert set(table["models"]) == set(ModelsConfig.model_fields)
    assert all(set(named) == set(NamedModel.model_fields) for named in table["models"]["named"].values())
    for named in config.models.named.values():
        validated(ModelConfig, named.settings, "settings")
    assert set(table["gateway"]) == set(GatewayConfig.model_fields)
    assert set(table["gateway"]["health"]) == set(HealthConfig.model_fields)
    assert set(table["gateway"]["registry"]) == set(RegistryConfig.model_fields)
    assert set(table["join"]) == set(JoinConfig.model_fields)
    assert set(table["tls"]) == set(ServerTls.model_fields)
    assert set(table["gateway"]["tls"]) == set(ClientTls.model_fields)
    assert set(table["routes"][0]) == set(RouteConfig.model_fields)
    assert config.routes[0].nodes[1].weight == 2
