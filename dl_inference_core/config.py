"""What a process is told: one TOML file → a strict, frozen `Config`."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dl_inference_core.errors import ConfigError
from dl_inference_core.files import decode

ModelT = TypeVar("ModelT", bound=BaseModel)
SectionT = TypeVar("SectionT", bound="PluginOptions")

_NODE = re.compile(
    r"(?:(?P<socket>unix:/[^\x00-\x1f]+?)"
    r"|(?P<host>\[[0-9A-Fa-f:.%]+\]|(?:dns:///)?[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5}))"
    r"(?:@(?P<weight>[0-9]{1,5}))?"
)


def bracketed(host: str) -> str:
    """`host` as it stands before ":port": an IPv6 address in brackets, whether or not it came with them."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class PluginOptions(BaseModel):
    """What every plugin's `Options` derive from: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Section(PluginOptions):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NodeConfig(_Section):
    """One node of a route; written "host:port" or "host:port@weight", IPv6 in brackets; or "unix:/path"; or as many as
    a name has addresses, "dns:///name:port"."""

    address: str
    """host:port, unix:/path for a Unix-domain socket, or dns:///name:port"""
    weight: int = Field(default=1, ge=0, le=10_000)
    """the static weight; 0 takes no requests while another node has a weight"""
    server_name: str | None = None
    """the name that its certificate must have, if that is not for `[gateway.tls]` or the address to say"""

    @property
    def target(self) -> str:
        """What connections are kept by: a node that is to prove another name is another."""
        return self.address if self.server_name is None else f"{self.address} as {self.server_name}"

    @classmethod
    def parse(cls, text: str) -> NodeConfig:
        """Raises:
        ValueError: says what is wrong with `text`.
        """
        match = _NODE.fullmatch(text)
        if match is None:
            expected = "host:port, host:port@weight, [IPv6]:port, dns:///name:port or unix:/path"
            raise ValueError(f'"{text}" is not a node: expected {expected}')
        port, weight = int(match["port"] or 1), int(match["weight"] or 1)
        if not 1 <= port <= 65535:
            raise ValueError(f'"{text}": port {port} is not between 1 and 65535')
        if weight > 10_000:
            raise ValueError(f'"{text}": weight {weight} is over 10000')
        if match["socket"] and len(match["socket"].removeprefix("unix:").encode()) > 107:
            raise ValueError(f'"{text}": the path is over 107 bytes, more than a socket\'s can have')
        return cls(address=match["socket"] or f"{match['host']}:{port}", weight=weight)

    @classmethod
    def parse_one(cls, text: str) -> NodeConfig:
        """A plain "host:port" of one node.

        Raises:
            ValueError: says what is wrong with `text`.
        """
        match = _NODE.fullmatch(text)
        if match is None or match["host"] is None or match["weight"] or text.startswith("dns:"):
            raise ValueError(
                f'"{text}" is not an address: expected host:port, with an IPv6 address in brackets, [::1]:8500'
            )
        return cls.parse(text)


def _node(value: Any) -> NodeConfig:
    if isinstance(value, NodeConfig):
        return value
    if isinstance(value, str):
        return NodeConfig.parse(value)
    raise ValueError("expected a string, host:port or host:port@weight")


class RouteSettings(_Section):
    """How the requests of a route are forwarded."""

    timeout_ms: int = Field(default=1000, ge=1, le=3_600_000)
    """milliseconds that one attempt may take; the whole call takes at most this times `attempts`"""
    attempts: int = Field(default=2, ge=1, le=10)
    """how many nodes may be tried for one request; 1 never tries again"""
    retry_failed: bool = True
    """whether a node's INTERNAL, UNKNOWN or DATA_LOSS is tried on another node"""
    retry_budget: float = Field(default=0.2, ge=0, le=1)
    """how many retries each success pays for: 0.2 is one for five. They can be saved up to `retry_reserve` and one for
    each request in flight; when there are none left, a request that fails is not tried again"""
    retry_reserve: int = Field(default=20, ge=0, le=1_000_000)
    """retries that can be saved up beyond one for each request in flight; 0 with `retry_budget = 0` never retries"""
    hedge: bool = False
    """whether a request that takes longer than 95 % of recent ones is sent to one more node, within `attempts`; the
    first answer counts, and the other attempt is cancelled"""
    hedge_budget: float = Field(default=0.05, ge=0, le=1)
    """the part of the requests that may be hedged, at most"""
    node_in_flight: int = Field(default=0, ge=0, le=1_000_000)
    """requests that this route has at a node at once, at most; what is more waits; 0 means no limit"""
    queue: int = Field(default=100, ge=0, le=1_000_000)
    """requests that wait while every node has `node_in_flight`; over it, or if their deadline would pass first,
    RESOURCE_EXHAUSTED at once. As many as the nodes take at once make a request take twice as long, at most"""
    balancer: str | None = None
    """the balancing strategy; if left out, `dynamic_weighted_round_robin` where it is installed, else `round_robin`"""
    balancer_options: dict[str, Any] = {}
    """the strategy's own options"""

    @model_validator(mode="after")
    def _check_hedge(self) -> RouteSettings:
        if self.hedge and self.attempts < 2:
            raise ValueError("a hedge is a second attempt: it takes attempts of 2 or more")
        return self


class RouteConfig(RouteSettings):
    """Where the requests of one task go: `[[routes]]`, once per task."""

    name: str = Field(default="", pattern=r"^[^/\x00-\x1f]*$", max_length=255)
    """the model's name, as clients write it in `model_spec.name`, `model_name` or `taskId`"""
    task_id: int | None = Field(default=None, ge=0, lt=2**63)
    """the number that `textcnn-69` and `taskId: 69` mean"""
    nodes: tuple[Annotated[NodeConfig, BeforeValidator(_node)], ...] = Field(min_length=1)
    """the nodes: "host:port" or "host:port@weight"; IPv6 addresses in brackets; "unix:/path" for a node on this
    machine; "dns:///name:port" for one node at each address of that name, which is looked up again and again"""

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
    """milliseconds between two looks for new, changed and removed versions; 0 looks at the start and at SIGHUP only"""
    named: dict[str, NamedModel] = {}
    """models that lie elsewhere, by the names that they are served under; they take the place of those in `directory`
    that have the same name"""
    load_timeout_s: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    """seconds that the load of a version may take, its warm-up included; then it counts as failed, another load takes
    its place, and what it gives later is discarded; 0 means no limit. The default reads 60 GB at 200 MB/s, and is half
    of the 600 s that Kubernetes gives a new pod to become ready; give larger models more"""
    defaults: dict[str, Any] = {}
    """keys of `model.toml` for every model; what a `model.toml` or `settings` says takes their place"""
    openinference_outputs: Literal["raw", "as_requested"] = "raw"
    """how `ModelInfer` answers: "raw" writes `raw_output_contents`, as Triton does; "as_requested" answers a request
    with typed contents typed, as MLServer does, for clients that read nothing else. `TisPredict` is always answered
    raw"""
    load_reports_per_s: int = Field(default=20, ge=0, le=1_000_000)
    """how many answers a second carry a report of this process's load, in ORCA's form, by which gRPC's and Envoy's
    weighted round robin and `orca_weighted_round_robin` weigh nodes; 0 is none"""

    @property
    def any(self) -> bool:
        """Whether the config names any."""
        return self.directory is not None or bool(self.named)


class RegistryConfig(_Section):
    """Nodes that register themselves, as `serve --join` does: `[gateway.registry]`. Whoever has the token says where
    requests go."""

    token_file: Path
    """a file whose first line is the token that nodes must show; relative to the config file"""
    lease_ms: int = Field(default=10_000, ge=100, le=3_600_000)
    """the most milliseconds that a registration holds; nodes renew theirs after a third of what they were given"""
    max_nodes: int = Field(default=1000, ge=1)
    """registrations at once; each worker process of a node has one"""
    max_models: int = Field(default=10_000, ge=1)
    """models of all registrations together"""
    route: RouteSettings = RouteSettings()
    """the routes of models that no route is configured for: keys of `[[routes]]`, but for `name`, `task_id` and
    `nodes`"""


class HealthConfig(_Section):
    """When nodes are left out, and when they are back: `[gateway.health]`, for all routes."""

    probe: Literal["auto", "grpc", "openinference", "tfserving", "tcp"] = "auto"
    """how a node is asked: by `grpc.health.v1`, the Open Inference Protocol's `ServerReady`, or TensorFlow Serving's
    `GetModelStatus`; "auto" takes the first of these that the node knows, and one that knows none is well; "tcp" only
    connects, so that a node which hangs or still loads its models seems well"""
    interval_ms: int = Field(default=1000, ge=0, le=3_600_000)
    """milliseconds, somewhat less at random, without an answered request after which a node is probed; one that answers
    requests is in every fifth only, to hear that it is about to end; 0 probes only who is suspect or left out. A probe
    takes some 0.3 ms of CPU"""
    timeout_ms: int = Field(default=500, ge=1, le=60_000)
    """milliseconds that a probe may take"""
    fall: int = Field(default=2, ge=1, le=1000)
    """probes running that fail before a node is ejected; the first probe of a new node counts alone"""
    rise: int = Field(default=1, ge=1, le=1000)
    """probes running that pass before a node is used again"""
    failures: int = Field(default=5, ge=1, le=100_000)
    """attempts running that time out, or fail by the node's fault, before it is probed at once and ejected if that
    fails too"""
    max_ejected: float = Field(default=0.5, ge=0, le=1)
    """the part of a route's nodes, rounded down, that may be ejected at one time, though never all: those that were
    first. Nodes that refuse connections or say that they do not serve are left out beside them; if no node is left, all
    are used"""
    slow_start_s: float = Field(default=0.0, ge=0, le=3600)
    """seconds in which the share of a node that is back grows from a tenth to the whole; 0 gives it all at once"""


class GatewayConfig(_Section):
    """What holds for all routes: `[gateway]`."""

    nodefile: Path | None = None
    """a file of lines `taskid=timeout_ms,host:port,…`, read beside the routes; relative to the config file"""
    poll_interval_ms: int = Field(default=250, ge=10)
    """milliseconds between two looks at the config file and the nodefile"""
    resolve_interval_ms: int = Field(default=5000, ge=10)
    """milliseconds between two look-ups of a name that stands in a route as "dns:///name:port"; while one of its
    addresses does not answer it is looked up every second"""
    health: HealthConfig = HealthConfig()
    registry: RegistryConfig | None = None
    tls: ClientTls | None = None


class JoinConfig(_Section):
    """Gateways that this process registers its models with: `[join]`."""

    gateways: tuple[str, ...] = Field(min_length=1)
    """each gateway, "host:port"; all of them know then"""
    token_file: Path
    """a file whose first line is the gateways' token; relative to the config file"""
    advertise: str | None = None
    """where gateways reach this process, "host:port"; if left out, `host` and the port that it listens on"""
    weight: int = Field(default=1, ge=0, le=10_000)
    """the static weight of this node"""
    lease_ms: int = Field(default=10_000, ge=100, le=3_600_000)
    """milliseconds that a gateway takes this process to be there without hearing of it; the gateway may give less"""
    tls: ClientTls | None = None

    @model_validator(mode="after")
    def _check(self) -> JoinConfig:
        for address in (*self.gateways, *((self.advertise,) if self.advertise is not None else ())):
            NodeConfig.parse_one(address)
        return self


class Config(_Section):
    """The whole of it. Keys outside any table come first in the file."""

    host: Annotated[str, AfterValidator(bracketed)] = "127.0.0.1"
    """the address to listen on; "0.0.0.0" for every interface by IPv4, "::" by IPv6 and IPv4; IPv6 addresses with or
    without brackets"""
    port: int = Field(default=8500, ge=0, le=65535)
    """the port for every protocol; 0 is any free one"""
    socket_path: Path | None = None
    """a Unix-domain socket that is listened on beside the port, for clients on this machine; relative to the config
    file; of several workers each has its own, with "-0", "-1" and so on after the name"""
    http_port: int | None = Field(default=None, ge=0, le=65535)
    """an HTTP port for REST, metrics and health on the same host, beside the gRPC port; always plaintext, so without
    REST where there is `[tls]`; none if left out; of several workers each has its own, counted up from here. A
    transport that can, as "native" does, answers the same on `port`: by one of the workers, and by TLS if `[tls]` is
    there"""
    http_max_connections: int = Field(default=1000, ge=1, lt=2**31)
    """connections to `http_port` at one time, at most; a quarter of what the limit on open files leaves room for, if
    it has no room for these beside `connections`. One more takes the place of the one that has been without a request
    for longest, and is closed if all are in the middle of one"""
    http_headers_timeout_s: float = Field(default=10.0, ge=0.1, le=86_400)
    """seconds that a client of `http_port` has for the headers of a request; then 408, and the connection is closed"""
    http_body_timeout_s: float = Field(default=60.0, ge=0.1, le=86_400)
    """seconds that a client of `http_port` has for the body of a request; then 408, and the connection is closed; so is
    a connection whose client takes nothing of an answer for so long"""
    http_idle_timeout_s: float = Field(default=620.0, ge=0.1, le=86_400)
    """seconds without a request after which a connection to `http_port` is closed. Make it longer than what a load
    balancer in front keeps connections for, or requests fail with 502: 60 s for AWS's, 600 s for Google Cloud's"""
    metrics_path: str = Field(default="/metrics", pattern=r"^/[^{}]*$")
    """the path that metrics are answered at by HTTP"""
    rest_timeout_ms: int = Field(default=30_000, ge=0, le=3_600_000)
    """milliseconds that a REST request may take; 0 means no limit"""
    rest_bytes: int = Field(default=10 * 1024 * 1024, ge=1024, lt=2**31)
    """bytes of the largest body of a REST request, after decompression; over it 413. While JSON is read nothing else is
    answered, for up to 0.1 s per MB"""
    rest_cors: bool = False
    """whether REST answers carry the headers by which browsers let web pages of any origin read them (CORS)"""
    workers: int = Field(default=1, ge=1, le=256)
    """processes that share the port, each with its own copy of the models; of several that serve routes alone there is
    one more, which waits to take the place of one that dies"""
    transport: str = "auto"
    """the network stack, by the name of an installed transport; "auto" takes the one with the highest priority that can
    run here"""
    transport_options: dict[str, Any] = {}
    """the network stack's own options"""
    codec: str = "auto"
    """what takes the messages of requests apart and writes those of answers, by the name of an installed set of codecs:
    "python" is the core's own; "auto" takes the set with the highest priority that can run here. All have the same
    results"""
    message_bytes: int = Field(default=10 * 1024 * 1024, ge=1024, lt=2**31)
    """bytes of the largest message, in either direction; over it RESOURCE_EXHAUSTED"""
    connections: int = Field(default=10_000, ge=0, lt=2**31)
    """clients' connections to each worker at one time, at most, but for those to `http_port`; more are closed as they
    come; 0 is what the limit on open files leaves room for: a quarter of it, or 64, stay for nodes and files in any
    case"""
    streams: int = Field(default=1024, ge=1, lt=2**31)
    """calls that one connection of a client may have in flight; more wait at the client"""
    in_flight: int = Field(default=0, ge=0, le=1_000_000)
    """requests that are answered at once, at most, in each worker; over it RESOURCE_EXHAUSTED at once; questions about
    health, readiness and models do not count; 0 means no limit"""
    drain_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """seconds that requests in flight have to finish after SIGTERM"""
    drain_delay_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """seconds after SIGTERM in which requests are still taken while health says NOT_SERVING, before `drain_s` begins:
    time for balancers in front to look elsewhere"""
    hang_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """with several workers: seconds without a sign of life from the event loop of a worker after which it is killed and
    started again; a slow model does not stop the event loop; 0 waits for ever"""
    models: ModelsConfig = ModelsConfig()
    gateway: GatewayConfig = GatewayConfig()
    join: JoinConfig | None = None
    tls: ServerTls | None = None
    routes: tuple[RouteConfig, ...] = ()
    backends: dict[str, dict[str, Any]] = {}
    """options of each backend, by its name: `[backends.torch]`"""
    apis: dict[str, dict[str, Any] | Literal[False]] = {}
    """options of each API, by its name: `[apis.tfserving]`; or false, to leave the API out"""

    @field_validator("apis", mode="before")
    @classmethod
    def _check_apis(cls, apis: Any) -> Any:
        for name, options in apis.items() if isinstance(apis, dict) else ():
            if options is not False and not isinstance(options, dict):
                raise ValueError(f"{name} is {options!r}; expected a table of options, or false")
        return apis

    @model_validator(mode="after")
    def _check(self) -> Config:
        for kind in ("name", "task_id"):
            counts = Counter(getattr(route, kind) for route in self.routes)
            for key, count in counts.items():
                if count > 1 and key not in ("", None):
                    raise ValueError(f"{count} routes have the {kind} {key!r}")
        return self


def read_token(path: Path) -> str:
    """The token in a file: its first line.

    Raises:
        ConfigError: it cannot be read, or there is none in it.
    """
    try:
        first, *_ = decode(path.read_bytes()).splitlines() or [""]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    token = first.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(f"{path}: the first line is no token; expected visible ASCII characters without spaces")
    return token


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
        values = tomllib.loads(decode(content))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return resolved(validated(Config, values, str(path)), path.parent)


def resolved(section: SectionT, folder: Path = Path()) -> SectionT:
    """`section` with all paths absolute, and those of the sections in it: relative ones are taken from `folder`, by
    default the current one, which a handler may change later."""
    update: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Path):
            update[name] = (folder / value).absolute()
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            update[name] = tuple((folder / item).absolute() if isinstance(item, Path) else item for item in value)
        elif isinstance(value, _Section):
            update[name] = resolved(value, folder)
        elif isinstance(value, dict) and all(isinstance(item, _Section) for item in value.values()):
            update[name] = {key: resolved(item, folder) for key, item in value.items()}
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
