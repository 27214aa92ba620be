"""What a request costs each of several systems that take turns under the same load."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from bench import load
from bench.contract import METHOD
from bench.load import Load, LoadError
from bench.processes import Server
from dl_inference_core.client import build


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A size of message, and what is sent of it in a full round.

    Attributes:
        name: its key in bench.json where gateways are measured.
        node_name: and where nodes are: the model, @ and the number in flight.
        load: what CPU, rate and latency are measured at.
        alone: one request at a time.
    """

    name: str
    node_name: str
    message_bytes: int
    load: Load
    alone: Load

    def message(self) -> bytes:
        """A tensorflow.serving.PredictRequest for the model "echo" of exactly `message_bytes` bytes."""

        def body(content: int) -> bytes:
            return build("echo", {"x": np.zeros(content, np.uint8)}, protocol="tfserving")[1]

        content = self.message_bytes
        while len(request := body(content)) > self.message_bytes:
            content -= len(request) - self.message_bytes
        return request


SIZES = (
    Size(
        name="600B",
        node_name="echo@128",
        message_bytes=600,
        load=Load(requests=12_000, clients=16, streams=8),
        alone=Load(requests=500, clients=1, streams=1),
    ),
    Size(
        name="600KB",
        node_name="echo-600KB@16",
        message_bytes=600_000,
        load=Load(requests=1_000, clients=8, streams=2),
        alone=Load(requests=100, clients=1, streams=1),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system at one size: medians over the rounds, and the least and most CPU of any round.

    Attributes:
        alone_p50_ms: of one request at a time.
        memory_mb: resident at the end.
    """

    cpu_us_per_request: float
    cpu_us_least: float
    cpu_us_most: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    alone_p50_ms: float
    memory_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One system in one round."""

    cpu_us: float
    loaded: load.Run
    alone: load.Run


def measure(
    running: Mapping[str, Server], size: Size, rounds: int, share: float, measured: Callable[[], None]
) -> dict[str, Row]:
    """A row for each of the `running` servers. They take turns, each round in another order.

    Args:
        rounds: how often each is measured.
        share: of the requests that a full round has.
        measured: called after each measurement, `rounds` times the number of servers.

    Raises:
        LoadError: not every request was answered.
    """
    message = size.message()
    loaded, alone = size.load.part(share), size.alone.part(share)
    samples: dict[str, list[_Sample]] = {name: [] for name in running}
    for name, server in running.items():
        with _named(name):
            load.check(server.address, METHOD, message)
            load.run(server.address, METHOD, message, loaded.part(0.1))
    order = list(running)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            with _named(name):
                samples[name].append(_sample(running[name], message, loaded, alone))
            measured()
    return {name: _row(samples[name], server.memory_mb()) for name, server in running.items()}


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from error


def _sample(server: Server, message: bytes, loaded: Load, alone: Load) -> _Sample:
    before = server.cpu_s()
    run = load.run(server.address, METHOD, message, loaded)
    return _Sample(
        cpu_us=(server.cpu_s() - before) / loaded.requests * 1e6,
        loaded=run,
        alone=load.run(server.address, METHOD, message, alone),
    )


def _row(samples: list[_Sample], memory_mb: float) -> Row:
    cpu = [sample.cpu_us for sample in samples]
    return Row(
        cpu_us_per_request=statistics.median(cpu),
        cpu_us_least=min(cpu),
        cpu_us_most=max(cpu),
        requests_per_s=statistics.median(sample.loaded.requests_per_s for sample in samples),
        p50_ms=statistics.median(sample.loaded.p50_ms for sample in samples),
        p99_ms=statistics.median(sample.loaded.p99_ms for sample in samples),
        alone_p50_ms=statistics.median(sample.alone.p50_ms for sample in samples),
        memory_mb=memory_mb,
    )
