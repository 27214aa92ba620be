"""What a process is told: one TOML file → a strict, frozen `Config`."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dl_inference_core.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)
SectionT = TypeVar("SectionT", bound="_Section")

_NODE = re.compile(
    r"(?:(?P<socket>unix:/[^\x00-\x1f]+?)|(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5}))"
    r"(?:@(?P<weight>[0-9]{1,5}))?"
)


class PluginOptions(BaseModel):
    """What every plugin's `Options` derive from: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Section(PluginOptions):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NodeConfig(_Section):
    """One node of a route; written "host:port" or "host:port@weight", IPv6 in brackets; or "unix:/path"."""

    address: str
    """host:port, or unix:/path for a Unix-domain socket"""
    weight: int = Field(default=1, ge=0, le=10_000)
    """the static weight; 0 takes no requests while another node has a weight"""

    @classmethod
    def parse(cls, text: str) -> NodeConfig:
        """Raises:
        ValueError: says what is wrong with `text`.
        """
        match = _NODE.fullmatch(text)
        if match is None:
            raise ValueError(f'"{text}" is no node: expected host:port, host:port@weight or unix:/path')
        port, weight = int(match["port"] or 1), int(match["weight"] or 1)
        if not 1 <= port <= 65535:
            raise ValueError(f'"{text}": port {port} is not between 1 and 65535')
        if weight > 10_000:
            raise ValueError(f'"{text}": weight {weight} is over 10000')
        if match["socket"] and len(match["socket"].removeprefix("unix:").encode()) > 107:
            raise ValueError(f'"{text}": the path is over 107 bytes, more than a socket\'s can have')
        return cls(address=match["socket"] or f"{match['host']}:{port}", weight=weight)


def _node(value: Any) -> NodeConfig:
    if isinstance(value, NodeConfig):
        return value
    if isinstance(value, str):
        return NodeConfig.parse(value)
    raise ValueError("expected a string, host:port or host:port@weight")


class RouteConfig(_Section):
    """Where the requests of one task go: `[[routes]]`, once per task."""

    name: str = Field(default="", pattern=r"^[^/\x00-\x1f]*$", max_length=255)
    """the model's name, as clients write it in `model_spec.name`, `model_name` or `taskId`"""
    task_id: int | None = Field(default=None, ge=0, lt=2**63)
    """the number that `textcnn-69` and `taskId: 69` mean"""
    nodes: tuple[Annotated[NodeConfig, BeforeValidator(_node)], ...] = Field(min_length=1)
    """the nodes: "host:port" or "host:port@weight"; IPv6 addresses in brackets; "unix:/path" for a node on this
    machine"""
    timeout_ms: int = Field(default=1000, ge=1, le=3_600_000)
    """milliseconds that one attempt may take; the whole call takes at most this times `attempts`"""
    attempts: int = Field(default=2, ge=1, le=10)
    """how many nodes may be tried for one request; 1 never tries again"""
    retry_failed: bool = True
    """whether a node's INTERNAL, UNKNOWN or DATA_LOSS is tried on another node"""
    balancer: str | None = None
    """the balancing strategy; if left out, `dynamic_weighted_round_robin` where it is installed, else `round_robin`"""
    balancer_options: dict[str, Any] = {}
    """the strategy's own options"""

    @model_validator(mode="after")
    def _check(self) -> RouteConfig:
        if not self.name and self.task_id is None:
            raise ValueError("a route needs a name or a task_id")
        counts = Counter(node.address for node in self.nodes)
        if twice := [address for address, count in counts.items() if count > 1]:
            raise ValueError(f"node {min(twice)} stands twice")
        return self

    @property
    def key(self) -> str | int:
        """What tells this route from others across reloads."""
        return self.name or int(self.task_id or 0)


class ServerTls(_Section):
    """TLS for what is served: `[tls]`. Files that change are taken up while running."""

    certificate: Path
    """a PEM file: the server's certificate, then those between it and the root; relative to the config file"""
    key: Path
    """a PEM file: the certificate's private key, without a passphrase"""
    client_ca: Path | None = None
    """a PEM file of authorities; if given, clients must show a certificate of one of them"""


class ClientTls(_Section):
    """TLS to nodes: `[gateway.tls]`. Without it nodes are called in plaintext."""

    ca: Path | None = None
    """a PEM file of authorities that nodes' certificates must come from; if left out, the system's"""
    certificate: Path | None = None
    """a PEM file: the certificate that is shown to nodes which ask for one; needs `key`"""
    key: Path | None = None
    """a PEM file: that certificate's private key, without a passphrase"""
    server_name: str | None = None
    """the name that nodes' certificates must have; if left out, the host of the node's address; "localhost" for a
    socket"""

    @model_validator(mode="after")
    def _check(self) -> ClientTls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self


class NamedModel(_Section):
    """A model that lies outside the folder of models: `[models.named.NAME]`."""

    path: Path
    """its folder, which holds a folder for each version; relative to the config file"""
    settings: dict[str, Any] = {}
    """keys of `model.toml` that take the place of its own"""
    flat: bool = True
    """whether its folder itself is version 1 where it holds no folder of a version"""
    sources: bool = True
    """whether `handler.py` and `processor.py` in its folders are run"""


class ModelsConfig(_Section):
    """The models that this process serves itself: `[models]`."""

    directory: Path | None = None
    """the folder of models, each `NAME/VERSION/…` or a flat `NAME/`; relative to the config file"""
    poll_interval_ms: int = Field(default=1000, ge=0)
    """milliseconds between two looks for new, changed and removed versions; 0 looks at the start only"""
    named: dict[str, NamedModel] = {}
    """models that lie elsewhere, by the names that they are served under; they take the place of those in `directory`
    that have the same name"""
    config_file: Path | None = None
    """a `model_config_file` of TensorFlow Serving's, whose models are served as if they stood under `named`; relative
    to the config file"""
    config_poll_interval_ms: int = Field(default=0, ge=0)
    """milliseconds between two looks at `config_file`; 0 looks at the start only"""
    accept_config: bool = False
    """whether clients may replace `named` and `config_file` by `ModelService/HandleReloadConfigRequest`; whoever can
    call it can have any folder of this machine loaded, but `handler.py` and `processor.py` in it are run only if the
    operator has named it, too"""
    defaults: dict[str, Any] = {}
    """keys of `model.toml` for every model; what a `model.toml` or `settings` says takes their place"""

    @property
    def any(self) -> bool:
        """Whether there is anything to serve."""
        return self.directory is not None or bool(self.named) or self.config_file is not None


class GatewayConfig(_Section):
    """What holds for all routes: `[gateway]`."""

    nodefile: Path | None = None
    """a file of lines `taskid=timeout_ms,host:port,…`, read beside the routes; relative to the config file"""
    poll_interval_ms: int = Field(default=250, ge=10)
    """milliseconds between two looks at the config file and the nodefile"""
    tls: ClientTls | None = None


class Config(_Section):
    """The whole of it. Keys outside any table come first in the file."""

    host: str = "127.0.0.1"
    """the address to listen on; "0.0.0.0" or "[::]" for every interface"""
    port: int = Field(default=8500, ge=0, le=65535)
    """the port for every protocol; 0 is any free one"""
    socket_path: Path | None = None
    """a Unix-domain socket that is listened on beside the port, for clients on this machine; relative to the config
    file; of several workers each has its own, with "-0", "-1" and so on after the name"""
    http_port: int | None = Field(default=None, ge=0, le=65535)
    """an HTTP port for REST, metrics and health on the same host, beside the gRPC port; always plaintext, so without
    REST where there is `[tls]`; none if left out; of several workers each has its own, counted up from here"""
    metrics_path: str = Field(default="/metrics", pattern=r"^/[^{}]*$")
    """the path that metrics are answered at by HTTP"""
    rest_timeout_ms: int = Field(default=30_000, ge=0, le=3_600_000)
    """milliseconds that a REST request may take; 0 is no limit"""
    rest_bytes: int = Field(default=10 * 1024 * 1024, ge=1024, lt=2**31)
    """bytes of the largest body of a REST request, after decompression; over it 413. While JSON is read nothing else is
    answered, for up to 0.1 s per MB"""
    workers: int = Field(default=1, ge=1, le=256)
    """processes that share the port, each with its own copy of the models"""
    transport: str = "auto"
    """the network stack: "envoy", "grpcio", or "auto": envoy where its plugin is installed and can run, else grpcio"""
    transport_options: dict[str, Any] = {}
    """the network stack's own options"""
    message_bytes: int = Field(default=10 * 1024 * 1024, ge=1024, lt=2**31)
    """bytes of the largest message, in either direction; over it RESOURCE_EXHAUSTED"""
    drain_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """seconds that requests in flight have to finish after SIGTERM"""
    models: ModelsConfig = ModelsConfig()
    gateway: GatewayConfig = GatewayConfig()
    tls: ServerTls | None = None
    routes: tuple[RouteConfig, ...] = ()
    backends: dict[str, dict[str, Any]] = {}
    """options of each backend, by its name: `[backends.torch]`"""

    @model_validator(mode="after")
    def _check(self) -> Config:
        for kind in ("name", "task_id"):
            counts = Counter(getattr(route, kind) for route in self.routes)
            for key, count in counts.items():
                if count > 1 and key not in ("", None):
                    raise ValueError(f"{count} routes have the {kind} {key!r}")
        return self


def load(path: Path) -> Config:
    """The config in a TOML file.

    Raises:
        ConfigError: it cannot be read, or as `parse`.
    """
    try:
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def parse(content: bytes, path: Path) -> Config:
    """The config that `content` says; relative paths in it are taken from the folder of `path`.

    Raises:
        ConfigError: it is no TOML, or says what no config says; one line that names the file.
    """
    try:
        values = tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return _resolved(validated(Config, values, str(path)), path.parent)


def _resolved(section: SectionT, folder: Path) -> SectionT:
    """`section` with its relative paths, and those of the sections in it, taken from `folder`."""
    update: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Path):
            update[name] = folder / value
        elif isinstance(value, _Section):
            update[name] = _resolved(value, folder)
        elif isinstance(value, dict) and all(isinstance(item, _Section) for item in value.values()):
            update[name] = {key: _resolved(item, folder) for key, item in value.items()}
    return section.model_copy(update=update)


def differences(one: BaseModel, other: BaseModel, within: str = "") -> list[str]:
    """The keys whose values differ between two configs, as "gateway.nodefile"."""
    found: list[str] = []
    for name in type(one).model_fields:
        values = getattr(one, name), getattr(other, name)
        if isinstance(values[0], BaseModel) and isinstance(values[1], BaseModel):
            found += differences(*values, within=f"{within}{name}.")
        elif values[0] != values[1]:
            found.append(f"{within}{name}")
    return found


def validated(model: type[ModelT], values: Mapping[str, Any], where: str) -> ModelT:
    """`values` as a `model`.

    Raises:
        ConfigError: one line that names each wrong key, what was wrong with it, and where it stands.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            # Of the types that a value may have pydantic names each, as in "tuple[int, ...]".
            key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "tuple[")))
            if problem["type"] == "extra_forbidden":
                known = ", ".join(_section(model, problem["loc"][:-1]).model_fields)
                problems.append(f'unknown key "{key}" ({f"known: {known}" if known else "there are none"})')
            else:
                said = problem["msg"].removeprefix("Value error, ")
                problems.append(f"{key}: {said}" if key else said)
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _section(model: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of the table at `place` in a `model`."""
    parts = iter(place)
    for part in parts:
        if isinstance(part, str):
            types: list[Any] = [model.model_fields[part].annotation]
            if get_origin(types[0]) is dict:
                next(parts)  # a key that the file chose
            for annotation in types:
                types += get_args(annotation)
            model = next(each for each in types if isinstance(each, type) and issubclass(each, BaseModel))
    return model
