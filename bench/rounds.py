"""What a request costs each of several systems that take turns under the same load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import bodies, load, replay
from bench.bare import BareCalls
from bench.contract import METHOD
from bench.figures import Figures, Sample
from bench.load import LoadError, Post
from bench.processes import Server
from bench.replay import Lasting, Traffic
from bench.saved_models import IMAGE_INPUT, SMALL_INPUT
from dl_inference_core.wire.protocol import PROTOCOLS

ECHO = "echo"
"""The model that gateways are asked for; nodes answer with what they were sent."""
_WARM_S = 0.3
_TOLERANCE = 1e-4
"""Of answers that were computed in different batches: the order of sums differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is sent, and how many requests are in flight.

    Attributes:
        name: its key in bench.json: a size of message or a model, @ and the number in flight.
        message_bytes: of a request that a gateway passes on; 0 for models that compute.
        tensor: what a model that computes is asked with, by name and shape of one row.
        most_rows: of a request to such a model.
    """

    name: str
    in_flight: int
    message_bytes: int = 0
    tensor: tuple[str, tuple[int, ...]] | None = None
    most_rows: int = 1

    @property
    def model(self) -> str:
        """The name of what is asked."""
        return self.name.partition("@")[0].partition(",")[0] if self.tensor else ECHO

    def traffic(self, ca: Path | None = None) -> Traffic:
        """64 different requests: ModelInfer to gateways, whose answers are the requests; Predict to models."""
        if self.tensor is None:
            protocol = PROTOCOLS["openinference"]
            messages = bodies.of_bytes("openinference", ECHO, self.message_bytes)
            return Traffic(path=protocol.node_method, messages=messages, answers=messages, ca=ca)
        name, shape = self.tensor
        make = bodies.one_row if self.most_rows == 1 else bodies.one_to_four_rows
        return Traffic(path=METHOD, messages=make("tfserving", self.model, name, shape), ca=ca)


def _passed(name: str, message_bytes: int, in_flights: Sequence[int]) -> tuple[Size, ...]:
    return tuple(
        Size(name=f"{name}@{in_flight}", message_bytes=message_bytes, in_flight=in_flight) for in_flight in in_flights
    )


SIZES = (
    *_passed("600B", 600, (1, 8, 32, 128)),
    *_passed("4KB", 4096, (8, 128)),
    *_passed("600KB", 600_000, (8,)),
)
BUSY_SIZES = _passed("600B", 600, (128,))
THREAD_SIZES = _passed("600B", 600, (32, 128))
_SMALL = SMALL_INPUT[0], SMALL_INPUT[1][1:]
MODEL_SIZES = (
    Size(name="small@128", tensor=_SMALL, in_flight=128),
    Size(name="small, 1 to 4 rows@128", tensor=_SMALL, in_flight=128, most_rows=bodies.MOST_ROWS),
    Size(name="image@16", tensor=(IMAGE_INPUT[0], IMAGE_INPUT[1][1:]), in_flight=16),
)


def measure(
    running: Mapping[str, Server],
    size: Size,
    rounds: int,
    seconds: float,
    measured: Callable[[], None],
    ca: Path | None = None,
) -> dict[str, Figures]:
    """Figures of each of the `running` servers. They take turns, each round in another order.

    Args:
        rounds: how often each is measured.
        seconds: of load in a round.
        measured: called after each measurement, `rounds` times the number of servers.
        ca: the authority of the servers' certificates; without, they are asked in plaintext.

    Raises:
        LoadError: not every request was answered well.
    """
    traffic = size.traffic(ca)
    amount = Lasting(seconds=seconds, in_flight=size.in_flight)
    samples: dict[str, list[Sample]] = {name: [] for name in running}
    for name, server in running.items():
        with named(name):
            _warm(server, size, traffic, replace(amount, seconds=min(_WARM_S, seconds)))
    for name in turns(list(running), rounds):
        with named(name):
            samples[name].append(_sample(running[name], size, traffic, amount))
        measured()
    return {name: Figures(rounds=samples[name], memory_mb=server.memory_mb()) for name, server in running.items()}


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name once in a round, each round in another order."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from (*names[first:], *names[:first])


@contextmanager
def named(name: str) -> Iterator[None]:
    """Has a LoadError in the block say which system it is about."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from error


def sample(server: Server, traffic: Traffic, amount: Lasting) -> Sample:
    """One round of gRPC.

    Raises:
        LoadError: not every request was answered well.
    """
    before = server.cpu_s()
    seen = replay.last(server.address, traffic, amount)
    used = server.cpu_s() - before
    return Sample(
        cpu_us_per_request=used / seen.ok * 1e6,
        requests_per_s=seen.requests_per_s,
        p50_ms=seen.p50_ms,
        p99_ms=seen.p99_ms,
        client_cpu_us=seen.cpu_us_per_request,
    )


def called(server: BareCalls, name: str, seconds: float) -> Sample:
    """One round of calls without a server, one after another."""
    first = server.call(name, 2)
    calls = server.call(name, max(round(first.run.requests_per_s * seconds), 1))
    run = calls.run
    return Sample(
        cpu_us_per_request=calls.cpu_us, requests_per_s=run.requests_per_s, p50_ms=run.p50_ms, p99_ms=run.p99_ms
    )


def _warm(server: Server, size: Size, traffic: Traffic, amount: Lasting) -> None:
    if isinstance(server, BareCalls):
        called(server, _call(size), amount.seconds)
        return
    if size.tensor is not None:
        _check_computed(server, traffic)
    replay.last(server.address, traffic, amount)


def _check_computed(server: Server, traffic: Traffic) -> None:
    """Raises:
    LoadError: requests that are in flight together are not answered as each of them is alone.
    """
    alone = [
        _outputs(load.ask(server.address, Post(path=traffic.path, message=message))) for message in traffic.messages
    ]
    together = [_outputs(answer) for answer in load.ask_together(server.address, traffic.path, traffic.messages)]
    for one, other in zip(alone, together, strict=True):
        if one.keys() != other.keys() or not all(
            one[name].shape == other[name].shape and np.allclose(one[name], other[name], rtol=0, atol=_TOLERANCE)
            for name in one
        ):
            raise LoadError(f"{server.address} gives {other} beside other requests, and {one} alone")


def _outputs(answer: bytes) -> Mapping[str, Any]:
    payload: Any = PROTOCOLS["tfserving"].codec.decode_response(answer).payload
    return {name: np.asarray(values) for name, values in payload.items()}


def _call(size: Size) -> str:
    """What the process without a server knows it by."""
    return f"{size.model}x{size.most_rows}" if size.most_rows > 1 else size.model


def _sample(server: Server, size: Size, traffic: Traffic, amount: Lasting) -> Sample:
    if isinstance(server, BareCalls):
        return called(server, _call(size), amount.seconds)
    return sample(server, traffic, amount)
