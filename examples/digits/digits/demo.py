"""The main job, end to end: train, serve on three nodes behind a gateway, call, kill a node under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from digits import training
from dl_inference_core.client import AsyncClient, build
from dl_inference_core.errors import InferenceError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.tensors import Response
from dl_inference_core.transport import Call, Limits

_NODES = 3
_IN_FLIGHT = 16
_LOAD_BEFORE_S, _LOAD_AFTER_S, _RECOVERY_S = 2.0, 3.0, 15.0
_WINDOW_S = 0.5
_PYTORCH_PREDICT = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/PytorchPredict"
_ATTEMPTS = re.compile(r'dl_inference_attempts_total\{node="([^"]+)",outcome="([^"]+)",route="digits"\} (\S+)')


class Failed(Exception):
    """The demo did not show what it is there to show."""


@dataclass(kw_only=True)
class Report:
    """What was seen. Accuracies and shares are fractions, times are in the units of their names.

    Attributes:
        transport: the one that served, and why that one.
    """

    transport: str = ""
    accuracy_offline: float = 0.0
    served: dict[str, dict[str, Any]] = field(default_factory=dict)
    share_per_node: dict[str, float] = field(default_factory=dict)
    kill: dict[str, Any] = field(default_factory=dict)
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
            Failed: it ended instead, or took more than a minute.
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
            async with asyncio.timeout(60):
                await server._settled.wait()
        except TimeoutError:
            await server.kill()
            raise Failed(f"serve {' '.join(arguments)} does not serve after a minute: {server._said}") from None
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


@dataclass(slots=True)
class Load:
    """A steady load, counted."""

    sent: int = 0
    failed: list[str] = field(default_factory=list)
    running: bool = True


class Demo:
    """The five steps, in order."""

    def __init__(self, folder: Path, transport: str, progress: Progress) -> None:
        self._folder = folder
        self._transport = transport
        self._progress = progress
        self._models = folder / "models"
        self._node = folder / "node.toml"
        self._gateway = folder / "gateway.toml"
        self.report = Report()

    async def run(self) -> None:
        """Raises:
        Failed: something was not as it should be; says what.
        """
        held_out = await self._train()
        async with self._servers() as (nodes, gateway):
            await self._serve_all(held_out, gateway)
            self.report.share_per_node = _shares(await self._attempts(gateway))
            await self._kill_one(held_out, nodes, gateway)
        if any(self.report.exit_codes):
            raise Failed(f"servers ended with {self.report.exit_codes}")

    async def _train(self) -> training.HeldOut:
        with self._bar("train", training.EPOCHS) as advance:
            net, held_out = await asyncio.to_thread(training.train, advance)
        self.report.accuracy_offline = training.accuracy(net, held_out)
        await asyncio.to_thread(training.export, net, self._models)
        return held_out

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[tuple[list[Server], Server]]:
        """Three nodes and a gateway in front of them; all ended afterwards."""
        nodes: list[Server] = []
        gateway = None
        top = f'port = 0\ntransport = "{self._transport}"\n'
        self._node.write_text(f"{top}[backends.torch]\nintra_op_threads = 1\n", encoding="utf-8")
        try:
            with self._bar("start", _NODES + 1) as advance:

                async def start_node() -> None:
                    nodes.append(await self._start_node())
                    advance()

                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(_NODES):
                            group.create_task(start_node())
                except* Failed as failures:
                    raise failures.exceptions[0] from None
                addresses = ", ".join(f'"{node.address}"' for node in nodes)
                self._gateway.write_text(
                    f"{top}http_port = 0\n[[routes]]\n"
                    f'name = "digits"\ntask_id = {training.TASK_ID}\ntimeout_ms = 2000\nnodes = [{addresses}]\n',
                    encoding="utf-8",
                )
                gateway = await Server.start(self._folder, "--config", str(self._gateway))
                advance()
            self.report.transport = gateway.transport
            yield nodes, gateway
        finally:
            for server in (gateway, *nodes):
                if server is not None:
                    self.report.exit_codes.append(await server.stop())

    async def _start_node(self, port: int = 0) -> Server:
        arguments = (str(self._models), "--config", str(self._node), "--port", str(port))
        return await Server.start(self._folder, *arguments)

    async def _serve_all(self, held_out: training.HeldOut, gateway: Server) -> None:
        """Every held-out digit, as a PNG by the original's own method and as a tensor by Open Inference's."""
        transport = GrpcioTransport(GrpcioTransport.Options())
        connection = transport.connect(gateway.address, Limits())
        async with AsyncClient(gateway.address) as client:

            async def as_png(index: int) -> int:
                protocol, body = build(training.TASK_ID, held_out.pngs[index], protocol="seldon")
                answer = await connection.call(
                    Call(method=_PYTORCH_PREDICT, request=body, deadline=time.monotonic() + 10)
                )
                return _digit(protocol.codec.decode_response(answer))

            async def as_tensor(index: int) -> int:
                image = held_out.images[index : index + 1]
                return _digit(await client.predict("digits", {"image": image}, protocol="openinference"))

            await self._measure("PytorchPredict, PNG", as_png, held_out.labels)
            await self._measure("ModelInfer, tensor", as_tensor, held_out.labels)
        await connection.close()

    async def _measure(
        self, what: str, ask: Callable[[int], Awaitable[int]], labels: np.ndarray[Any, np.dtype[np.int64]]
    ) -> None:
        waiting = iter(range(len(labels)))
        right, seconds = 0, []
        with self._bar(what, len(labels)) as advance:

            async def worker() -> None:
                nonlocal right
                for index in waiting:
                    start = time.perf_counter()
                    answer = await ask(index)
                    right += answer == labels[index]
                    seconds.append(time.perf_counter() - start)
                    advance()

            start = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(_IN_FLIGHT):
                        group.create_task(worker())
            except* InferenceError as errors:
                raise Failed(f"{what}: {errors.exceptions[0]}") from errors
            took = time.perf_counter() - start
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        self.report.served[what] = {
            "requests": len(labels),
            "accuracy": float(right / len(labels)),
            "requests_per_s": len(labels) / took,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
        }
        if right / len(labels) != self.report.accuracy_offline:
            raise Failed(
                f"{what}: accuracy served is {right / len(labels):.4f}, offline {self.report.accuracy_offline:.4f}"
            )

    async def _kill_one(self, held_out: training.HeldOut, nodes: list[Server], gateway: Server) -> None:
        """A node crashes under load; then it is started again, until it has its share."""
        victim = nodes[0]
        load = Load()
        async with AsyncClient(gateway.address) as client, asyncio.TaskGroup() as group:
            try:
                for _ in range(_IN_FLIGHT):
                    group.create_task(_keep_asking(client, held_out, load))
                await self._pass("load", _LOAD_BEFORE_S)
                before = await self._attempts(gateway)
                await victim.kill()
                await self._pass("one node killed", _LOAD_AFTER_S)
                dead = await self._attempts(gateway) - before
                with self._bar("started again", None):
                    nodes[0] = await self._start_node(int(victim.address.rpartition(":")[2]))
                recovered_s = await self._recovery(gateway, victim.address)
            finally:
                load.running = False
        self.report.kill = {
            "requests": load.sent,
            "failed": len(load.failed),
            "attempts_at_dead_node": sum(count for (node, _), count in dead.items() if node == victim.address),
            "share_of_dead_node": _shares(dead).get(victim.address, 0.0),
            "share_back_after_s": recovered_s,
        }
        if load.failed:
            raise Failed(f"{len(load.failed)} of {load.sent} requests failed; the first: {load.failed[0]}")
        if recovered_s is None:
            raise Failed(f"the node has not had its share back within {_RECOVERY_S:g} s")

    async def _recovery(self, gateway: Server, address: str) -> float | None:
        """Seconds until a window in which the node has 80 % of its fair share begins; None if that takes too long."""
        start = time.monotonic()
        with self._bar("until it has its share back", None):
            seen = await self._attempts(gateway)
            while (passed := time.monotonic() - start) < _RECOVERY_S:
                await asyncio.sleep(_WINDOW_S)
                now = await self._attempts(gateway)
                if _shares(now - seen).get(address, 0.0) >= 0.8 / _NODES:
                    return passed
                seen = now
        return None

    async def _attempts(self, gateway: Server) -> Counter[tuple[str, str]]:
        """The gateway's attempts so far by (node, outcome), from its metrics."""
        text = await asyncio.to_thread(_get, gateway.metrics)
        return Counter({(node, outcome): int(float(count)) for node, outcome, count in _ATTEMPTS.findall(text)})

    async def _pass(self, what: str, seconds: float) -> None:
        with self._bar(what, 20) as advance:
            for _ in range(20):
                await asyncio.sleep(seconds / 20)
                advance()

    @contextmanager
    def _bar(self, what: str, total: int | None) -> Iterator[Callable[[], None]]:
        """A progress bar, and what advances it; without a total it is full at the end."""
        task = self._progress.add_task(what, total=total)
        yield lambda: self._progress.advance(task)
        if total is None:
            self._progress.update(task, total=1, completed=1)


async def _keep_asking(client: AsyncClient, held_out: training.HeldOut, load: Load) -> None:
    while load.running:
        index = load.sent % len(held_out.pngs)
        load.sent += 1
        try:
            await client.predict(training.TASK_ID, held_out.pngs[index])
        except InferenceError as error:
            load.failed.append(f"{error.code.name}: {error}")


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


def _digit(response: Response) -> int:
    payload = response.payload
    assert isinstance(payload, dict)
    return int(payload["digit"][0])


def _shares(attempts: Counter[tuple[str, str]]) -> dict[str, float]:
    per_node: Counter[str] = Counter()
    for (node, _), count in attempts.items():
        per_node[node] += count
    total = per_node.total()
    return {node: count / total for node, count in sorted(per_node.items())} if total else {}


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the gateway's own address
        text: str = answer.read().decode()
        return text


def _print(console: Console, report: Report) -> None:
    table = Table("every held-out digit", "requests", "accuracy", "requests/s", "p50 ms", "p99 ms")
    for what, row in report.served.items():
        table.add_row(
            what,
            str(row["requests"]),
            f"{row['accuracy']:.4f}",
            f"{row['requests_per_s']:.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
        )
    console.print(f"transport {report.transport}", highlight=False)
    console.print(table)
    console.print(f"accuracy offline {report.accuracy_offline:.4f}: the same")
    console.print("share per node   " + ", ".join(f"{share:.1%}" for share in report.share_per_node.values()))
    kill = report.kill
    console.print(
        f"one node killed under load: {kill['requests']} requests, [bold]{kill['failed']} failed[/bold]; "
        f"the dead node got {kill['attempts_at_dead_node']} attempts ({kill['share_of_dead_node']:.2%})"
    )
    console.print(f"started again: it had its share back {kill['share_back_after_s']:.1f} s after it served")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--transport",
    type=click.Choice(["auto", "envoy", "grpcio"]),
    default="auto",
    show_default=True,
    help="The network stack of nodes and gateway.",
)
def main(as_json: bool, transport: str) -> None:
    """Train a digit classifier, serve it on three nodes behind a gateway, call it, kill a node under load."""
    console = Console(stderr=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="dl-inference-demo-") as folder,
        Progress(*columns, console=console) as bars,
    ):
        demo = Demo(Path(folder), transport, bars)
        try:
            asyncio.run(demo.run())
        except Failed as error:
            console.print(f"[bold red]failed:[/bold red] {error}")
            sys.exit(1)
    if as_json:
        click.echo(json.dumps(vars(demo.report), indent=2))
    else:
        _print(console, demo.report)


if __name__ == "__main__":
    main()
