"""Nodes, a gateway in front of them and clients, each in processes of their own; and when what was done to them."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.faults import control, figures, gateways, namespaces
from bench.faults.client import OPTIONS, Load
from bench.faults.figures import Attempts, Records
from bench.faults.gateways import Gateway, System
from bench.faults.namespaces import Namespace
from bench.processes import Server, announcing, free_address
from dl_inference_core.client import build

_ATTEMPTS, _EJECTIONS = "dl_inference_attempts_total{", "dl_inference_ejections_total{"
_POLL_S = 0.01


class Node:
    """One fault node, on the same address whenever it runs."""

    def __init__(self, folder: Path, number: int, namespace: Namespace | None = None) -> None:
        self.number = number
        # Each on a host of its own: no connection's own port is ever one of a node that is about to start again.
        host = namespace.host if namespace is not None else f"127.0.0.{2 + number}"
        port = free_address().rpartition(":")[2]
        self.address = f"{host}:{port}"
        self._namespace = namespace
        self._log, self._control = folder / f"node{number}.log", folder / f"node{number}.control"
        self._log.touch()
        self._running = ExitStack()
        self.server: Server | None = None

    def start(self) -> None:
        """Run it; returns once it serves.

        Raises:
            RuntimeError: it does not.
        """
        prefix = self._namespace.prefix if self._namespace is not None else ()
        command = (sys.executable, "-m", "bench.faults.node", self.address, str(self._log), str(self._control))
        self.server = self._running.enter_context(announcing(*prefix, *command, ends_with_input=True))

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server = None
        self._running.close()

    def restart(self) -> None:
        """As an operator would: it says that it does not serve, finishes what it has, ends, and is started again."""
        self.tell(ending=True)
        if self.server is not None:
            until(self.ended, 10.0, f"node {self.address} has not ended")
        self.kill()
        self.start()

    def ended(self) -> bool:
        return self.server is None or _gone(self.server)

    def freeze(self) -> None:
        assert self.server is not None
        self.server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.server is not None
        self.server.send_signal(signal.SIGCONT)

    def swallow(self) -> None:
        assert self._namespace is not None
        self._namespace.swallow()

    def heal(self) -> None:
        assert self._namespace is not None
        self._namespace.heal()

    def tell(self, **behaviour: Any) -> None:
        """Change what it does, in terms of `bench.faults.node.Behaviour`; returns once it does so."""
        control.tell(self._control, **behaviour)

    def attempts(self) -> Attempts:
        """Whatever has reached it, in every life that it has had."""
        return figures.attempts(self._log)


class Proxy:
    """A `bench.faults.proxy` that runs."""

    def __init__(self, address: str, path: Path) -> None:
        self.address = address
        self._control = path

    def tell(self, mode: str) -> None:
        """Change what it does to connections, those that are there and new ones."""
        control.tell(self._control, mode=mode)


@contextmanager
def _proxy(node: Node, folder: Path) -> Iterator[Proxy]:
    path = folder / "proxy.control"
    address = free_address("127.0.0.20")
    command = (sys.executable, "-m", "bench.faults.proxy", address, node.address, str(path))
    with announcing(*command, ends_with_input=True):
        yield Proxy(address, path)


class Stage:
    """Not safe for several threads at one time."""

    def __init__(
        self, system: System, folder: Path, nodes: Sequence[Node], gateway: Gateway, proxy: Proxy | None = None
    ) -> None:
        self.system = system
        self.folder = folder
        self.nodes = nodes
        self.gateway = gateway
        self.proxy = proxy
        self._clients = 0

    @contextmanager
    def load(self, load: Load) -> Iterator[Sending]:
        """A client that sends until the block ends, and then until all it has sent has ended."""
        self._clients += 1
        path, file = self.folder / f"client{self._clients}.control", self.folder / f"client{self._clients}.records"
        command = (sys.executable, "-m", "bench.faults.client", self.gateway.server.address, str(file), str(path))
        with announcing(*command, json.dumps(asdict(load)), ends_with_input=True) as server:
            sending = Sending(server, path, file)
            yield sending
            sending.finish()

    @property
    def tells(self) -> bool:
        """Whether all that the gateway counts is in one place."""
        return bool(self.gateway.http_address) and self.system.workers == 1

    def routed(self) -> dict[str, float] | None:
        """Attempts at each node's address so far, as the gateway counts them when they end; None if it does not
        tell."""
        if not self.tells:
            return None
        return {node.address: 0.0 for node in self.nodes} | _counts(self.metrics(), _ATTEMPTS)

    def metrics(self) -> str:
        """What ours says of itself, as text."""
        with urllib.request.urlopen(f"http://{self.gateway.http_address}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def ejections(self) -> dict[str, float]:
        """Times that each node's address was left out so far, as the gateway counts them; empty if it does not tell."""
        return _counts(self.metrics(), _EJECTIONS) if self.tells else {}

    def complaints(self) -> list[str]:
        """All that the gateway has logged, line by line."""
        if self.gateway.log is None:
            return []
        return self.gateway.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def ask(self, model: str | int, *, timeout_s: float = 1.0, protocol: str = "openinference") -> int:
        """gRPC's code of the answer to one request, sent on a connection of its own."""
        spoken, body = build(model, {"x": np.zeros(1, np.uint8)}, protocol=protocol)
        return self.call(spoken.node_method, body, timeout_s=timeout_s)[0]

    def call(self, method: str, body: bytes, *, timeout_s: float = 1.0) -> tuple[int, bytes]:
        """gRPC's code and the bytes of an answer, on a connection of its own."""
        with grpc.insecure_channel(self.gateway.server.address, options=OPTIONS) as channel:
            return call(channel, method, body, timeout_s=timeout_s)

    def attempts(self) -> list[Attempts]:
        return [node.attempts() for node in self.nodes]


def call(channel: Any, method: str, body: bytes, *, timeout_s: float = 1.0) -> tuple[int, bytes]:
    """gRPC's code and the bytes of an answer."""
    try:
        return 0, channel.unary_unary(method)(body, timeout=timeout_s)
    except grpc.RpcError as error:
        return int(error.code().value[0]), b""


def _counts(metrics: str, name: str) -> dict[str, float]:
    """The sums of a counter by its label "node"."""
    counts: dict[str, float] = {}
    for line in metrics.splitlines():
        if line.startswith(name):
            labels, _, value = line.rpartition(" ")
            address = labels.partition('node="')[2].partition('"')[0]
            counts[address] = counts.get(address, 0.0) + float(value)
    return counts


class Sending:
    """A client under way."""

    def __init__(self, server: Server, path: Path, file: Path) -> None:
        self._server = server
        self._path = path
        self._file = file
        self.began = time.monotonic()

    def change(self, **load: Any) -> None:
        """Settings of its `Load`."""
        control.tell(self._path, **load)

    def finish(self) -> None:
        """Stop it, if it has not done so by itself; returns once all that it has sent has ended."""
        if not self.ended():
            with suppress(OSError):
                control.tell(self._path, stop=True)
        until(self.ended, 30.0, "the client has not ended")

    def ended(self) -> bool:
        return _gone(self._server)

    @property
    def ports(self) -> list[int]:
        """Of its connections when it began; request after request it takes the next of them."""
        found: list[int] = json.loads(self._file.with_suffix(".ports").read_text())
        return found

    def records(self) -> Records:
        """Of all that it has sent; once it has finished."""
        return figures.records(self._file)


def _gone(server: Server) -> bool:
    """Whether it has ended, though its parent may not have looked yet."""
    for pid in server.processes()[:1]:
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def until(condition: Any, seconds: float, complaint: str) -> float:
    """Wait for `condition()`; returns the seconds that it took.

    Raises:
        RuntimeError: `complaint`; it took more than `seconds`.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise RuntimeError(complaint)
        time.sleep(_POLL_S)
    return time.monotonic() - begun


@contextmanager
def set_up(
    system: System,
    *,
    nodes: int = 4,
    behaviour: Mapping[str, Any] | None = None,
    isolated: Sequence[int] = (),
    proxied: bool = False,
) -> Iterator[Stage]:
    """`system` in front of so many nodes, running until the block ends.

    Args:
        behaviour: of all nodes, beside the usual.
        isolated: the nodes that have a network of their own.
        proxied: whether there is a `bench.faults.proxy` in front of the first node, `Stage.proxy`.

    Raises:
        RuntimeError: something does not start.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name, ExitStack() as stack:
        folder = Path(name)
        running = []
        for number in range(nodes):
            namespace = stack.enter_context(namespaces.made(number)) if number in isolated else None
            node = Node(folder, number, namespace)
            stack.callback(node.kill)
            node.start()
            if behaviour:
                node.tell(**behaviour)
            running.append(node)
        log = stack.enter_context((folder / "gateway.log").open("w", encoding="utf-8"))
        proxy = stack.enter_context(_proxy(running[0], folder)) if proxied else None
        addresses = [node.address for node in running]
        if proxy is not None:
            addresses[0] = proxy.address
        gateway = stack.enter_context(gateways.running(system, addresses, folder, log))
        yield Stage(system, folder, running, gateway, proxy)
