"""The main job, end to end: train, serve on three nodes behind a gateway, call, kill a node under load."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from digits import data, training
from digits.demo_base import IN_FLIGHT, Demo, Failed, Report, Server, asking_for_pngs, command, digit
from dl_inference_core.client import AsyncClient
from dl_inference_core.errors import InferenceError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.transport import Limits

_NODES = 3
_LOAD_BEFORE_S, _LOAD_AFTER_S, _RECOVERY_S = 2.0, 3.0, 15.0
_WINDOW_S = 0.5
_ATTEMPTS = re.compile(r'dl_inference_attempts_total\{node="([^"]+)",outcome="([^"]+)",route="digits"\} (\S+)')


@dataclass(kw_only=True)
class KillReport(Report):
    """What was seen.

    Attributes:
        kill: of the node that was killed.
    """

    accuracy_offline: float = 0.0
    share_per_node: dict[str, float] = field(default_factory=dict)
    kill: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Load:
    """A steady load, counted."""

    sent: int = 0
    failed: list[str] = field(default_factory=list)
    running: bool = True


class KillDemo(Demo):
    """The five steps, in order."""

    report: KillReport

    def __init__(self, folder: Path, transport: str, progress: Progress) -> None:
        super().__init__(folder, transport, progress)
        self.report = KillReport()

    async def steps(self) -> None:
        held_out = await self._train()
        async with self.servers(_NODES, {"digits": training.TASK_ID}, backends=("torch",)) as (nodes, gateway):
            await self._serve_all(held_out, gateway)
            self.report.share_per_node = _shares(await self._attempts(gateway))
            await self._kill_one(held_out, nodes, gateway)

    async def _train(self) -> data.HeldOut:
        digits = data.load()
        with self.bar("train", training.EPOCHS) as advance:
            net = await asyncio.to_thread(training.train, digits, advance)
        self.report.accuracy_offline = digits.held_out.accuracy(training.answers(net, digits.held_out))
        await asyncio.to_thread(training.export, net, self.models)
        return digits.held_out

    async def _serve_all(self, held_out: data.HeldOut, gateway: Server) -> None:
        """Every held-out digit, as a PNG by the original's own method and as a tensor by Open Inference's."""
        connection = GrpcioTransport(GrpcioTransport.Options()).connect(gateway.address, Limits())
        async with AsyncClient(gateway.address) as client:

            async def as_tensor(index: int) -> int:
                image = held_out.images[index : index + 1]
                return digit(await client.predict("digits", {"image": image}, protocol="openinference"))

            as_png = asking_for_pngs(connection, training.TASK_ID, held_out)
            offline = self.report.accuracy_offline
            await self.measure("PytorchPredict, PNG", as_png, held_out, offline)
            await self.measure("ModelInfer, tensor", as_tensor, held_out, offline)
        await connection.close()

    async def _kill_one(self, held_out: data.HeldOut, nodes: list[Server], gateway: Server) -> None:
        """A node crashes under load; then it is started again, until it has its share."""
        victim = nodes[0]
        load = Load()
        async with AsyncClient(gateway.address) as client, asyncio.TaskGroup() as group:
            try:
                for _ in range(IN_FLIGHT):
                    group.create_task(_keep_asking(client, held_out, load))
                await self.pass_time("load", _LOAD_BEFORE_S)
                before = await self._attempts(gateway)
                await victim.kill()
                await self.pass_time("one node killed", _LOAD_AFTER_S)
                dead = await self._attempts(gateway) - before
                with self.bar("started again", None):
                    nodes[0] = await self.start_node(int(victim.address.rpartition(":")[2]))
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
        with self.bar("until it has its share back", None):
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

    def show(self, console: Console) -> None:
        self.show_served(console)
        report, kill = self.report, self.report.kill
        console.print(f"accuracy offline {report.accuracy_offline:.4f}: the same")
        console.print("share per node   " + ", ".join(f"{share:.1%}" for share in report.share_per_node.values()))
        console.print(
            f"one node killed under load: {kill['requests']} requests, [bold]{kill['failed']} failed[/bold]; "
            f"the dead node got {kill['attempts_at_dead_node']} attempts ({kill['share_of_dead_node']:.2%})"
        )
        console.print(f"started again: it had its share back {kill['share_back_after_s']:.1f} s after it served")


async def _keep_asking(client: AsyncClient, held_out: data.HeldOut, load: Load) -> None:
    while load.running:
        index = load.sent % len(held_out.pngs)
        load.sent += 1
        try:
            await client.predict(training.TASK_ID, held_out.pngs[index])
        except InferenceError as error:
            load.failed.append(f"{error.code.name}: {error}")


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


main = command(
    KillDemo, "Train a digit classifier, serve it on three nodes behind a gateway, call it, kill a node under load."
)

if __name__ == "__main__":
    main()
