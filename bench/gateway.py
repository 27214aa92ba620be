"""What a gateway costs per request: ours, beside one bare echo server and a plain byte proxy."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import load, servers
from bench.load import Load
from bench.processes import Server, server
from dl_inference_core.client import build

METHOD = "/tensorflow.serving.PredictionService/Predict"
SIZES = {"600B": 600, "600KB": 600_000}
SYSTEMS = ("echo-grpcio", "proxy-grpcio", "ours-grpcio")
_LOADS = {"600B": Load(requests=20_000, clients=16, streams=8), "600KB": Load(requests=1_500, clients=8, streams=2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system at one size: medians over the rounds, and the least and most CPU of any round."""

    cpu_us_per_request: float
    cpu_us_least: float
    cpu_us_most: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    memory_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One system at one size in one round."""

    cpu_us: float
    run: load.Run


def message(size: int) -> bytes:
    """A tensorflow.serving.PredictRequest for the model "echo" of exactly `size` bytes."""

    def body(content: int) -> bytes:
        return build("echo", {"x": np.zeros(content, np.uint8)}, protocol="tfserving")[1]

    content = size
    while len(request := body(content)) > size:
        content -= len(request) - size
    return request


@contextmanager
def systems() -> Iterator[dict[str, Server]]:
    """Each system, running; two echo servers are the nodes behind both gateways, a third is measured itself."""
    with ExitStack() as stack:
        echo, *nodes = [stack.enter_context(server("-m", "bench.servers", "echo")) for _ in range(3)]
        addresses = [node.address for node in nodes]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "gateway.toml"
        config.write_text(
            f'port = 0\nmessage_bytes = {servers.MESSAGE_BYTES}\n[[routes]]\nname = "echo"\ntimeout_ms = 60000\n'
            f"nodes = {addresses}\n",
            encoding="utf-8",
        )
        proxy = stack.enter_context(server("-m", "bench.servers", "proxy", METHOD, *addresses))
        ours = stack.enter_context(server("-m", "dl_inference_core.cli", "serve", "--config", str(config)))
        yield dict(zip(SYSTEMS, (echo, proxy, ours), strict=True))


def measure(rounds: int, share: float, round_done: Callable[[], None]) -> dict[str, dict[str, Row]]:
    """Rows by size and system. The systems take turns, each round in another order.

    Args:
        rounds: how often each system is measured at each size.
        share: of the requests that a full round has.
        round_done: called after each measurement, `rounds` * sizes * systems times.

    Raises:
        LoadError: not every request was answered.
    """
    rows: dict[str, dict[str, Row]] = {}
    with systems() as running:
        for size_name, size in SIZES.items():
            body = message(size)
            full = _LOADS[size_name]
            some = Load(requests=round(full.requests * share), clients=full.clients, streams=full.streams)
            warm = Load(requests=max(some.requests // 10, full.clients), clients=full.clients, streams=full.streams)
            samples: dict[str, list[Sample]] = {name: [] for name in SYSTEMS}
            for target in running.values():
                load.check(target.address, METHOD, body)
                load.run(target.address, METHOD, body, warm)
            for turn in range(rounds):
                for name in SYSTEMS[turn % len(SYSTEMS) :] + SYSTEMS[: turn % len(SYSTEMS)]:
                    samples[name].append(_sample(running[name], body, some))
                    round_done()
            rows[size_name] = {name: _row(samples[name], running[name].memory_mb()) for name in SYSTEMS}
    return rows


def _sample(target: Server, body: bytes, some: Load) -> Sample:
    before = target.cpu_s()
    run = load.run(target.address, METHOD, body, some)
    return Sample(cpu_us=(target.cpu_s() - before) / some.requests * 1e6, run=run)


def _row(samples: list[Sample], memory_mb: float) -> Row:
    cpu = [sample.cpu_us for sample in samples]
    runs = [sample.run for sample in samples]
    return Row(
        cpu_us_per_request=statistics.median(cpu),
        cpu_us_least=min(cpu),
        cpu_us_most=max(cpu),
        requests_per_s=statistics.median(run.requests_per_s for run in runs),
        p50_ms=statistics.median(run.p50_ms for run in runs),
        p99_ms=statistics.median(run.p99_ms for run in runs),
        memory_mb=memory_mb,
    )
