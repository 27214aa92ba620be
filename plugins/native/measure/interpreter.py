"""python interpreter.py [ROUNDS]: what the interpreter's switch interval costs and gains. Needs h2load.

A gateway forwards 600 B, 8 in flight, alone and beside a thread that computes in Python for 200 ms at a time: p50 and
p99 of the requests, and how much the thread gets done. A node answers 548 B by a model in Python, 8 and 128 in flight:
requests per second and CPU per request. The intervals take turns, because the machine may be busy: each figure is the
median of all rounds, and in brackets that of the best round.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from load import HERE, IDLE, URL, cpu_ns, load, write_bodies

from dl_inference_core.app import App
from dl_inference_core.config import Config, PluginOptions
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request
from dl_inference_core.testing.fakes import FakeBackend, FakeModel
from dl_inference_core.wire import openinference

INTERVALS_MS = (5.0, 2.0, 1.0, 0.5, 0.1)
ECHO, GATEWAY, NODE = 25100, 25101, 25102
PIECE_S = 0.2
SECONDS = 2
"""Of each measurement: ten pieces."""


class Echoes(FakeModel):
    """Gives back what it is given, without keeping it."""

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Any]:
        return dict(inputs)


class EchoBackend(FakeBackend):
    """Loads echoes."""

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        return Echoes()


class WithEchoes(Plugins):
    """The installed plugins, with a backend of echoes."""

    def classes(self, kind: Kind) -> Mapping[str, type[Any]]:
        return {EchoBackend.name: EchoBackend} if kind is Kind.BACKENDS else super().classes(kind)


class Computing:
    """A thread that computes in Python while it is switched on.

    Attributes:
        done: how often it has gone through its loop.
    """

    def __init__(self) -> None:
        self.on = threading.Event()
        self.done = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.on.wait():
            end = time.monotonic() + PIECE_S
            while time.monotonic() < end:
                self.done += 1


async def serve(role: str, folder: str) -> None:
    """Serves until the standard input ends; each line of it is an interval in ms and whether a thread computes."""
    if role == "gateway":
        route = {"name": "mmoe", "nodes": [f"127.0.0.1:{ECHO}"]}
        config: dict[str, Any] = {"routes": [route], "gateway": {"health": {"probe": "tcp"}}}
    else:
        FakeBackend.write(Path(folder) / "mmoe" / "1")
        config = {"models": {"directory": Path(folder), "defaults": {"batching": {"enabled": True, "max_rows": 64}}}}
    app = App(Config(transport="native", drain_s=0, **config), WithEchoes())
    await app.serve(f"127.0.0.1:{GATEWAY if role == 'gateway' else NODE}")
    computing = Computing()
    while line := await asyncio.to_thread(sys.stdin.readline):
        interval, computes = line.split()
        sys.setswitchinterval(float(interval) / 1000)
        computing.on.set() if computes == "True" else computing.on.clear()
        print(computing.done, flush=True)
    await app.close()


class Served:
    """A process that `serve` runs in."""

    def __init__(self, role: str, folder: Path) -> None:
        command = (*IDLE, sys.executable, __file__, role, str(folder))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def set(self, interval_ms: float, computes: bool) -> int:
        """How much has been computed so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{interval_ms} {computes}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def latencies_ms(body: Path, log: Path) -> list[float]:
    log.unlink(missing_ok=True)
    command = [*IDLE, "h2load", "-D", str(SECONDS), "-c", "2", "-m", "4", "-d", str(body), f"--log-file={log}"]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers", URL.format(GATEWAY)]
    subprocess.run(command, capture_output=True, check=True)
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    return sorted(int(took) / 1000 for _, status, took in rows if status == "200")


@contextmanager
def started(folder: Path) -> Iterator[tuple[Served, Served]]:
    echo = [*IDLE, sys.executable, str(HERE / "serve.py"), "native", "echo", str(ECHO), str(ECHO)]
    with ExitStack() as stack:
        node = subprocess.Popen(echo, stdin=subprocess.PIPE)
        stack.callback(node.communicate)
        both = Served("gateway", folder), Served("node", folder)
        for each in both:
            stack.callback(each.close)
            each.set(5.0, False)
        yield both


def main(rounds: int = 5) -> None:
    figures: dict[tuple[str, float], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bodies(folder)
        array = np.random.default_rng(0).random((1, 128), np.float32)
        request = Request(payload={"x": array}, form=Form.TENSORS_RAW, model="mmoe", id="1")
        message = bytes(openinference.encode_request(request))
        (folder / "plain").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        with started(folder / "models") as (gateway, node):
            for _ in range(rounds):
                for interval in INTERVALS_MS:
                    for computes in (False, True):
                        done = gateway.set(interval, computes)
                        took = latencies_ms(folder / "600", folder / "log")
                        if computes:
                            done = gateway.set(interval, False) - done
                            figures["beside: computed, millions/s", interval].append(done / SECONDS / 1e6)
                        said = "beside" if computes else "alone"
                        figures[f"{said}: p50, ms", interval].append(took[len(took) // 2])
                        figures[f"{said}: p99, ms", interval].append(took[len(took) * 99 // 100])
                        figures[f"{said}: requests/s", interval].append(len(took) / SECONDS)
                    node.set(interval, False)
                    for clients, streams in ((8, 1), (16, 8)):
                        count = 250 * clients * streams
                        before = cpu_ns(node.process.pid)
                        rate = load(NODE, folder / "plain", clients, streams, count)
                        used = (cpu_ns(node.process.pid) - before) / count / 1000
                        figures[f"node, {clients * streams} in flight: CPU per request, us", interval].append(used)
                        figures[f"node, {clients * streams} in flight: requests/s", interval].append(rate)
    print("| figure |", " | ".join(f"{interval:g} ms" for interval in INTERVALS_MS), "|")
    for what in dict.fromkeys(what for what, _ in figures):
        best = max if what.endswith("/s") else min
        all_rounds = [figures[what, interval] for interval in INTERVALS_MS]
        print(f"| {what} |", " | ".join(f"{median(each):.2f} ({best(each):.2f})" for each in all_rounds), "|")


if __name__ == "__main__":
    if sys.argv[1:2] in (["gateway"], ["node"]):
        asyncio.run(serve(sys.argv[1], sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
