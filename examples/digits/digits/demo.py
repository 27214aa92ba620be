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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
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
    """What was seen. Accuracies and shares are fractions, times are in the units of their names."""

    accuracy_offline: float = 0.0
    served: dict[str, dict[str, Any]] = field(default_factory=dict)
    share_per_node: dict[str, float] = field(default_factory=dict)
    kill: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)


class Server:
    """One `dl-inference-core serve` process."""

    def __init__(self, process: asyncio.subprocess.Process, output: list[str]) -> None:
        self.process = process
        self._output = output
        self.address = ""
        self.metrics = ""

    @classmethod
    async def start(cls, *arguments: str) -> Server:
        """Start it and wait until it serves.

        Raises:
            Failed: it ended instead, or took more than a minute.
        """
        program = Path(sys.executable).with_name("dl-inference-core")
        process = await asyncio.create_subprocess_exec(
            str(program), "serve", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        server = cls(process, [])
        try:
            async with asyncio.timeout(60):
                await server._until_serving()
        except TimeoutError:
            process.kill()
            raise Failed(f"serve {' '.join(arguments)} does not serve after a minute: {server.output}") from None
        except asyncio.CancelledError:
            process.kill()
            raise
        return server

    async def _until_serving(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            line = raw.decode().rstrip()
            self._output.append(line)
            if line.startswith("http on "):
                self.metrics = line.removeprefix("http on ") + "/metrics"
            if line.startswith("serving on "):
                self.address = line.removeprefix("serving on ")
                self._rest = asyncio.create_task(self._read_on())
                return
        raise Failed(f"a server ended with status {await self.process.wait()}: {self.output}")

    async def _read_on(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self._output.append(raw.decode().rstrip())

    @property
    def output(self) -> str:
        """What it printed last."""
        return "\n".join(self._output[-20:])

    async def stop(self) -> int:
        """Ask it to end; its exit code."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(30):
                return await self.process.wait()
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()


@dataclass(slots=True)
class Load:
    """A steady load, counted."""

    sent: int = 0
    failed: list[str] = field(default_factory=list)
    running: bool = True


class Demo:
    """The five steps, in order."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._models = folder / "models"
        self._config = folder / "gateway.toml"
        self._progress = progress
        self._node_arguments = (str(self._models), "--config", str(folder / "node.toml"))
        (folder / "node.toml").write_text("port = 0\n[backends.torch]\nintra_op_threads = 1\n", encoding="utf-8")
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
        try:
            with self._bar("start", _NODES + 1) as advance:

                async def start_node() -> None:
                    nodes.append(await Server.start(*self._node_arguments))
                    advance()

                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(_NODES):
                            group.create_task(start_node())
                except* Failed as failures:
                    raise failures.exceptions[0] from None
                addresses = ", ".join(f'"{node.address}"' for node in nodes)
                self._config.write_text(
                    "port = 0\nhttp_port = 0\n[[routes]]\n"
                    f'name = "digits"\ntask_id = {training.TASK_ID}\ntimeout_ms = 2000\nnodes = [{addresses}]\n',
                    encoding="utf-8",
                )
                gateway = await Server.start("--config", str(self._config))
                advance()
            yield nodes, gateway
        finally:
            for server in (gateway, *nodes):
                if server is not None:
                    self.report.exit_codes.append(await server.stop())

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
        """SIGKILL under load; then the same node again, until it has its share."""
        victim = nodes[0]
        load = Load()
        async with AsyncClient(gateway.address) as client, asyncio.TaskGroup() as group:
            try:
                for _ in range(_IN_FLIGHT):
                    group.create_task(_keep_asking(client, held_out, load))
                await self._pass("load", _LOAD_BEFORE_S)
                before = await self._attempts(gateway)
                os.kill(victim.process.pid, signal.SIGKILL)
                await victim.process.wait()
                await self._pass("one node killed", _LOAD_AFTER_S)
                dead = await self._attempts(gateway) - before
                nodes[0] = await Server.start(*self._node_arguments, "--port", victim.address.rpartition(":")[2])
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
def main(as_json: bool) -> None:
    """Train a digit classifier, serve it on three nodes behind a gateway, call it, kill a node under load."""
    console = Console(stderr=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="dl-inference-demo-") as folder,
        Progress(*columns, console=console) as bars,
    ):
        demo = Demo(Path(folder), bars)
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
