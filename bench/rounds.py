"""What a request costs each of several systems that take turns under the same load."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from bench import load
from bench.bare import BareCalls
from bench.contract import METHOD
from bench.load import Load, LoadError, Post
from bench.processes import Server
from bench.saved_models import IMAGE_INPUT, SMALL_INPUT
from dl_inference_core.client import build
from dl_inference_core.wire.protocol import PROTOCOLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A size of message, and what is sent of it in a full round.

    Attributes:
        name: its key in bench.json where gateways are measured.
        node_name: and where nodes are: the model, @ and the number in flight.
        message_bytes: of the request.
        tensor: what it holds, by name and shape, for a model that computes; None for one that echoes.
        load: what CPU, rate and latency are measured at.
        alone: one request at a time.
    """

    name: str
    node_name: str
    message_bytes: int
    tensor: tuple[str, tuple[int, ...]] | None = None
    load: Load
    alone: Load

    @property
    def model(self) -> str:
        """The name of what is asked."""
        return self.node_name.partition("@")[0] if self.tensor else "echo"

    def message(self) -> bytes:
        """A tensorflow.serving.PredictRequest of exactly `message_bytes` bytes."""
        if self.tensor:
            name, shape = self.tensor
            return build(self.model, {name: np.zeros(shape, np.float32)}, protocol="tfserving")[1]

        def body(content: int) -> bytes:
            return build("echo", {"x": np.zeros(content, np.uint8)}, protocol="tfserving")[1]

        content = self.message_bytes
        while len(request := body(content)) > self.message_bytes:
            content -= len(request) - self.message_bytes
        return request


_MANY = Load(requests=12_000, clients=16, streams=8), Load(requests=500, clients=1, streams=1)
_FEWER = Load(requests=1_000, clients=8, streams=2), Load(requests=100, clients=1, streams=1)

SIZES = (
    Size(name="600B", node_name="echo@128", message_bytes=600, load=_MANY[0], alone=_MANY[1]),
    Size(name="600KB", node_name="echo-600KB@16", message_bytes=600_000, load=_FEWER[0], alone=_FEWER[1]),
)
_BRIEF = Load(requests=4_000, clients=16, streams=8), Load(requests=100, clients=1, streams=1)
OWN_SIZES = (Size(name="600B", node_name="echo@128", message_bytes=600, load=_BRIEF[0], alone=_BRIEF[1]),)
"""For systems that are measured beside themselves, set up in another way."""
MODEL_SIZES = (
    Size(
        name="small",
        node_name="small@128",
        message_bytes=546,
        tensor=SMALL_INPUT,
        load=_MANY[0],
        alone=_MANY[1],
    ),
    Size(
        name="image",
        node_name="image@16",
        message_bytes=602_162,
        tensor=IMAGE_INPUT,
        load=_FEWER[0],
        alone=_FEWER[1],
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One system at one load: medians over the rounds, and the least and most CPU of any round.

    Attributes:
        memory_mb: resident at the end.
    """

    cpu_us_per_request: float
    cpu_us_least: float
    cpu_us_most: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    memory_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Figures):
    """One system at one size.

    Attributes:
        alone_p50_ms: of one request at a time.
    """

    alone_p50_ms: float


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
    post = Post(path=METHOD, message=size.message())
    loaded, alone = size.load.part(share), size.alone.part(share)
    samples: dict[str, list[_Sample]] = {name: [] for name in running}
    answers = {name: _warm(name, server, size, post, loaded) for name, server in running.items()}
    for name in turns(list(running), rounds):
        with named(name):
            samples[name].append(_sample(running[name], size, post, answers[name], loaded, alone))
        measured()
    return {name: _row(samples[name], server.memory_mb()) for name, server in running.items()}


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


def _warm(name: str, server: Server, size: Size, post: Post, loaded: Load) -> int:
    """Ask for the first time; the length of an answer."""
    few = loaded.part(0.1)
    with named(name):
        if isinstance(server, BareCalls):
            server.call(size.model, few.requests)
            return 0
        answer = load.ask(server.address, post)
        if answer != post.message and not _computed(answer, size):
            raise LoadError(f"{server.address} does not answer with what it was sent, nor with what the model gives")
        load.run(server.address, post, len(answer), few)
        return len(answer)


def _computed(answer: bytes, size: Size) -> bool:
    return size.tensor is not None and PROTOCOLS["tfserving"].codec.decode_response(answer).model == size.model


def _sample(server: Server, size: Size, post: Post, answer_bytes: int, loaded: Load, alone: Load) -> _Sample:
    if isinstance(server, BareCalls):
        calls = server.call(size.model, loaded.requests)
        return _Sample(cpu_us=calls.cpu_us, loaded=calls.run, alone=calls.run)
    before = server.cpu_s()
    run = load.run(server.address, post, answer_bytes, loaded)
    return _Sample(
        cpu_us=(server.cpu_s() - before) / loaded.requests * 1e6,
        loaded=run,
        alone=load.run(server.address, post, answer_bytes, alone),
    )


def _row(samples: list[_Sample], memory_mb: float) -> Row:
    loaded = figures([sample.cpu_us for sample in samples], [sample.loaded for sample in samples], memory_mb)
    return Row(**asdict(loaded), alone_p50_ms=statistics.median(sample.alone.p50_ms for sample in samples))


def figures(cpu_us: Sequence[float], runs: Sequence[load.Run], memory_mb: float) -> Figures:
    """Of the rounds of one system, its CPU per request and its run in each."""
    return Figures(
        cpu_us_per_request=statistics.median(cpu_us),
        cpu_us_least=min(cpu_us),
        cpu_us_most=max(cpu_us),
        requests_per_s=statistics.median(run.requests_per_s for run in runs),
        p50_ms=statistics.median(run.p50_ms for run in runs),
        p99_ms=statistics.median(run.p99_ms for run in runs),
        memory_mb=memory_mb,
    )
