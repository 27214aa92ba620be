"""What the demos are made of: servers, progress bars, measuring, the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import click
import grpc
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from digits.data import HeldOut
from dl_inference_core.client import build
from dl_inference_core.errors import InferenceError
from dl_inference_core.tensors import Response
from dl_inference_core.transport import Connection

IN_FLIGHT = 16
_START_S = 180.0
"""Seconds that a server may take: four import their frameworks at once, on few cores that may be busy."""
_SERVICE = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService"
PREDICT, PYTORCH_PREDICT = f"{_SERVICE}/Predict", f"{_SERVICE}/PytorchPredict"

Ask: TypeAlias = Callable[[int], Awaitable[int]]
"""Has a held-out digit, by its index, read by a server."""


class Failed(Exception):
    """The demo did not show what it is there to show."""


@dataclass(kw_only=True)
class Report:
    """What was seen. Accuracies and shares are fractions, times are in the units of their names.

    Attributes:
        transport: the one that served, and why that one.
        served: the figures of each way of asking for every held-out digit.
        exit_codes: of the gateway, then of the nodes.
    """

    transport: str = ""
    served: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)


class Server:
    """One `dl-inference-core serve`: the process and those that it starts.

    Attributes:
        address, metrics, transport: what it said of itself.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.address = ""
        self.metrics = ""
        self.transport = ""
        self._process = process
        self._output: deque[str] = deque(maxlen=20)
        self._settled = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, folder: Path, *arguments: str) -> Server:
        """Start it and wait until it serves.

        Args:
            folder: for temporary files; those of a server that is killed stay there.

        Raises:
            Failed: it ended instead, or did not serve within three minutes.
        """
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("dl-inference-core")),
            "serve",
            *arguments,
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        server = cls(process)
        try:
            async with asyncio.timeout(_START_S):
                await server._settled.wait()
        except TimeoutError:
            await server.kill()
            raise Failed(f"serve {' '.join(arguments)} does not serve after {_START_S:g} s: {server._said}") from None
        except asyncio.CancelledError:
            await server.kill()
            raise
        if not server.address:
            raise Failed(f"a server ended with status {await process.wait()}: {server._said}")
        return server

    async def _read(self) -> None:
        """Take in what it says, until all its processes have ended."""
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode().rstrip()
            self._output.append(line)
            if line.startswith("http on "):
                self.metrics = line.removeprefix("http on ") + "/metrics"
            elif line.startswith("transport "):
                self.transport = line.removeprefix("transport ")
            elif line.startswith("serving on "):
                self.address = line.removeprefix("serving on ")
                self._settled.set()
        self._settled.set()

    @property
    def _said(self) -> str:
        return "\n".join(self._output)

    async def kill(self) -> None:
        """A crash: SIGKILL to all its processes at once; returns when they have ended."""
        for pid in _family(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._reading

    async def stop(self) -> int:
        """Ask it to end; its exit code, once all its processes have ended."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(30):
                await asyncio.shield(self._reading)
        except TimeoutError:
            await self.kill()
        return await self._process.wait()


class Demo(ABC):
    """Nodes and a gateway of its own, in a folder of its own; a subclass has the steps."""

    report: Report

    def __init__(self, folder: Path, transport: str, progress: Progress) -> None:
        self.folder = folder
        self.models = folder / "models"
        self._transport = transport
        self._progress = progress
        self._node = folder / "node.toml"
        self._gateway = folder / "gateway.toml"

    async def run(self) -> None:
        """Raises:
        Failed: something was not as it should be; says what.
        """
        try:
            await self.steps()
        except* Failed as failures:
            raise _first(failures) from None
        if any(self.report.exit_codes):
            raise Failed(f"servers ended with {self.report.exit_codes}")

    @abstractmethod
    async def steps(self) -> None:
        """All that is done; fills `report`.

        Raises:
            Failed: as `run`.
        """

    @abstractmethod
    def show(self, console: Console) -> None:
        """Print `report`."""

    @asynccontextmanager
    async def servers(
        self, count: int, tasks: Mapping[str, int], backends: tuple[str, ...]
    ) -> AsyncIterator[tuple[list[Server], Server]]:
        """Nodes with all of `models`, and a gateway in front of them; all ended afterwards.

        Args:
            count: how many nodes.
            tasks: the models' names and task ids, for the gateway's routes.
            backends: those used; each gets one thread in a node.
        """
        nodes: list[Server] = []
        gateway = None
        top = f'port = 0\ntransport = "{self._transport}"\n'
        threads = "".join(f"[backends.{backend}]\nintra_op_threads = 1\n" for backend in backends)
        self._node.write_text(top + threads, encoding="utf-8")
        try:
            with self.bar("start", count + 1) as advance:

                async def start_node() -> None:
                    nodes.append(await self.start_node())
                    advance()

                async with asyncio.TaskGroup() as group:
                    for _ in range(count):
                        group.create_task(start_node())
                addresses = ", ".join(f'"{node.address}"' for node in nodes)
                routes = "".join(
                    f'[[routes]]\nname = "{name}"\ntask_id = {task_id}\ntimeout_ms = 2000\nnodes = [{addresses}]\n'
                    for name, task_id in tasks.items()
                )
                self._gateway.write_text(f"{top}http_port = 0\n{routes}", encoding="utf-8")
                gateway = await Server.start(self.folder, "--config", str(self._gateway))
                advance()
            self.report.transport = gateway.transport
            yield nodes, gateway
        finally:
            for server in (gateway, *nodes):
                if server is not None:
                    self.report.exit_codes.append(await server.stop())

    async def start_node(self, port: int = 0) -> Server:
        """One more node, with the config of those that `servers` started."""
        arguments = (str(self.models), "--config", str(self._node), "--port", str(port))
        return await Server.start(self.folder, *arguments)

    async def measure(self, what: str, ask: Ask, held_out: HeldOut, offline: float) -> None:
        """Ask for every held-out digit, and put the figures into the report under `what`.

        Args:
            offline: the accuracy that there must be.

        Raises:
            Failed: the accuracy is another; a request failed.
        """
        waiting = iter(range(len(held_out.labels)))
        answers = np.full_like(held_out.labels, -1)
        seconds = []
        with self.bar(what, len(answers)) as advance:

            async def worker() -> None:
                for index in waiting:
                    start = time.perf_counter()
                    answers[index] = await ask(index)
                    seconds.append(time.perf_counter() - start)
                    advance()

            start = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(IN_FLIGHT):
                        group.create_task(worker())
            except* (InferenceError, grpc.RpcError, Failed) as errors:
                raise Failed(f"{what}: {errors.exceptions[0]}") from errors
            took = time.perf_counter() - start
        accuracy = held_out.accuracy(answers)
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        self.report.served[what] = {
            "requests": len(answers),
            "accuracy": accuracy,
            "requests_per_s": len(answers) / took,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
        }
        if accuracy != offline:
            raise Failed(f"{what}: accuracy served is {accuracy:.4f}, offline {offline:.4f}")

    async def pass_time(self, what: str, seconds: float) -> None:
        """Wait, with a progress bar."""
        with self.bar(what, 20) as advance:
            for _ in range(20):
                await asyncio.sleep(seconds / 20)
                advance()

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Callable[[], None]]:
        """A progress bar, and what advances it, on any thread; without a total it is full at the end."""
        task = self._progress.add_task(what, total=total)
        yield lambda: self._progress.advance(task)
        if total is None:
            self._progress.update(task, total=1, completed=1)

    def show_served(self, console: Console) -> None:
        """Print the transport, and a table of what `measure` has seen."""
        table = Table("every held-out digit", "requests", "accuracy", "requests/s", "p50 ms", "p99 ms")
        for what, row in self.report.served.items():
            table.add_row(
                what,
                str(row["requests"]),
                f"{row['accuracy']:.4f}",
                f"{row['requests_per_s']:.0f}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
            )
        console.print(f"transport {self.report.transport}", highlight=False)
        console.print(table)


def asking_for_pngs(connection: Connection, task_id: int, held_out: HeldOut) -> Ask:
    """By pictures, through the original's own method for PyTorch; the handler makes tensors of them."""

    async def ask(index: int) -> int:
        protocol, body = build(task_id, held_out.pngs[index], protocol="seldon")
        answer = await connection.call(PYTORCH_PREDICT, body, timeout_s=10)
        return digit(protocol.codec.decode_response(bytes(answer.message)))

    return ask


def digit(response: Response) -> int:
    """What the handler says in `response`."""
    payload = response.payload
    assert isinstance(payload, dict)
    return int(payload["digit"][0])


def _first(failures: BaseExceptionGroup[Failed]) -> BaseException:
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def _family(pid: int) -> list[int]:
    """The process `pid` and its descendants, parents first, as /proc has them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def command(demo_class: type[Demo], what: str) -> click.Command:
    """The command line of a demo: its figures, or the reason and exit code 1. `what` is its help."""

    @click.command(help=what)
    @click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
    @click.option(
        "--transport",
        type=click.Choice(["auto", "grpcio", "native"]),
        default="auto",
        show_default=True,
        help="The network stack of nodes and gateway.",
    )
    def main(as_json: bool, transport: str) -> None:
        console = Console(stderr=as_json)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            tempfile.TemporaryDirectory(prefix="dl-inference-demo-") as folder,
            Progress(*columns, console=console) as bars,
        ):
            demo = demo_class(Path(folder), transport, bars)
            try:
                asyncio.run(demo.run())
            except Failed as error:
                console.print(f"[bold red]failed:[/bold red] {escape(str(error))}")
                sys.exit(1)
        if as_json:
            click.echo(json.dumps(vars(demo.report), indent=2))
        else:
            demo.show(console)

    return main
