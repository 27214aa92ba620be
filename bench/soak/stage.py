"""A gateway of ours in front of four nodes; its routes can be written anew, and its nodes end and start again."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from bench.processes import Server, announcing, free_address
from dl_inference_core.plugins import Kind, Plugins

MESSAGE_BYTES = 1024 * 1024
"""The gateway's largest message."""
NAME, TASK, PASSING = "echo", 69, "passing"
"""Routes: by name, in the config file; by task id, in the node file; and one of the config file that comes and goes."""

_NODES = 4
_TIMEOUT_MS = 5000
_HEAVIEST = 3


class Node:
    """One node, on the same address whenever it runs."""

    def __init__(self, transport: str, host: str) -> None:
        self.transport = transport
        self.address = free_address(host)
        self._running = ExitStack()
        self._server: Server | None = None

    def start(self) -> None:
        """Run it; returns once it serves."""
        command = (sys.executable, "-m", "bench.soak.node", self.transport, self.address)
        self._server = self._running.enter_context(announcing(*command, ends_with_input=True))

    def end(self, *, at_once: bool = False) -> None:
        """Let it finish what is in flight, as `serve` does on SIGTERM; or kill it `at_once`."""
        if at_once and self._server is not None:
            self._server.kill()
        self._running.close()


class Stage:
    """The gateway, its nodes and its files. Not safe for several threads at one time."""

    def __init__(self, folder: Path, nodes: Sequence[Node], transport: str, seed: int) -> None:
        self.nodes = nodes
        self.transport = transport
        self._one_port = Plugins().classes(Kind.TRANSPORTS)[transport].http_on_same_port
        self._own_http_address = free_address()
        self.gateway: Server
        self._random = random.Random(seed)  # noqa: S311 - the same run again
        self._config, self._nodefile = folder / "gateway.toml", folder / "nodefile.txt"

    @property
    def http_address(self) -> str:
        """The address that answers HTTP."""
        return self.gateway.address if self._one_port else self._own_http_address

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the gateway."""
        return (sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(self._config))

    def settle(self) -> Iterator[None]:
        """Write routes to all nodes, all alike, once each has been away from them: what the gateway held of it is gone.
        After each step the gateway has to be given time to take it up."""
        addresses = [node.address for node in self.nodes]
        for some in (addresses[: _NODES // 2], addresses[_NODES // 2 :], addresses):
            self._write(some, passing=True)
            yield

    def shuffle(self) -> None:
        """Write other routes: all nodes or all but one, in any order, with any weights."""
        chosen = self._random.sample(self.nodes, self._random.randint(_NODES - 1, _NODES))
        weighted = [f"{node.address}@{self._random.randint(1, _HEAVIEST)}" for node in chosen]
        self._write(weighted, passing=self._random.random() < 0.5)

    def _write(self, nodes: Sequence[str], *, passing: bool) -> None:
        own_http = "" if self._one_port else f"http_port = {self._own_http_address.rpartition(':')[2]}\n"
        routes = "".join(
            f'[[routes]]\nname = "{name}"\ntimeout_ms = {_TIMEOUT_MS}\nnodes = {list(nodes)}\n'
            for name in (NAME, PASSING)[: 1 + passing]
        )
        self._replace(
            self._config,
            f'port = 0\ntransport = "{self.transport}"\nmessage_bytes = {MESSAGE_BYTES}\n{own_http}'
            f'[gateway]\nnodefile = "{self._nodefile.name}"\n{routes}',
        )
        self._replace(self._nodefile, f"{TASK}={_TIMEOUT_MS},{','.join(nodes)}\n")

    def _replace(self, path: Path, content: str) -> None:
        new = path.with_suffix(".new")
        new.write_text(content, encoding="utf-8")
        new.rename(path)


@contextmanager
def set_up(transport: str, log: IO[str], seed: int) -> Iterator[Stage]:
    """A gateway on `transport` with nodes on every transport that is installed, running until the block ends.

    Args:
        log: takes what the gateway complains of.
        seed: of what `Stage.shuffle` writes.
    """
    plugins = Plugins()
    kinds = [name for name, kind in sorted(plugins.classes(Kind.TRANSPORTS).items()) if not kind.missing()]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # Each on a host of its own: no connection's own port is ever one of a node that is about to start again.
        nodes = [Node(kinds[number % len(kinds)], f"127.0.0.{2 + number}") for number in range(_NODES)]
        for node in nodes:
            stack.callback(node.end)
            node.start()
        stage = Stage(Path(folder), nodes, transport, seed)
        stage.shuffle()
        stage.gateway = stack.enter_context(announcing(*stage.command, log=log))
        yield stage
