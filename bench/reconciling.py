"""The load generator beside h2load, in turns against one of our nodes; and its counts beside the node's own."""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families as parse
from rich.table import Table

from bench import bodies, load, replay
from bench.load import Load, Post
from bench.model_servers import measuring, starting
from bench.model_servers.models import MODELS
from bench.own import serving
from bench.processes import Server, free_address
from bench.replay import Traffic
from bench.rounds import turns
from dl_inference_core.wire.protocol import PROTOCOLS

_MOST = 0.05
"""By which the ratio of two clients may differ from 1."""
_MODEL = MODELS["mmoe"]
_PROTOCOL = PROTOCOLS["openinference"]
_WARM_UP_S = 0.5
_COUNTED_S = 5.0
"""How long a server may take to count answers that it has sent."""
_FIGURES = {"requests_per_s": "requests/s", "server_cpu_us": "server's CPU, µs per request"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of ours that serves the MMoE.

    Attributes:
        metrics: the URL of its metrics.
    """

    server: Server
    metrics: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one client saw in one round.

    Attributes:
        client_cpu_us: per request, of the client itself; None of h2load, which does not say it.
    """

    requests_per_s: float
    server_cpu_us: float
    client_cpu_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One figure of two clients, for a table.

    Attributes:
        theirs, ours: the medians.
        ratios: the median of the rounds' own, and the least and the most.
    """

    theirs: str
    ours: str
    ratios: tuple[str, str]
    agrees: bool


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Of our client to theirs, in rounds in which both ran."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    median = statistics.median(ratios)
    return Ratio(
        theirs=f"{statistics.median(theirs):.1f}",
        ours=f"{statistics.median(ours):.1f}",
        ratios=(f"{median:.3f}", f"{min(ratios):.3f} {max(ratios):.3f}"),
        agrees=abs(median - 1) <= _MOST,
    )


@contextmanager
def node() -> Iterator[Node]:
    """On the transport that an installation has by default, until the block ends."""
    address = free_address()
    with measuring.made(_MODEL) as (folder, _):
        toml = starting.model_toml(_MODEL, starting.Setting(values={"delay_us": 0}))
        (folder / _MODEL.name / "model.toml").write_text(toml, encoding="utf-8")
        config = f"http_port = {address.rpartition(':')[2]}\n[models]\ndirectory = {str(folder)!r}\n"
        config += f"[backends.torch]\nintra_op_threads = {_MODEL.threads}\n"
        with serving("auto", config) as server:
            yield Node(server=server, metrics=f"http://{address}/metrics")


def compare(node: Node, table: Table, in_flight: int, rounds: int, seconds: float) -> bool:
    """Both clients send one body, in turns. Adds rows to `table`, and says whether they agree.

    Raises:
        LoadError: not every request was answered.
    """
    message, *_ = bodies.one_row("openinference", _MODEL.name, _MODEL.input, _MODEL.shape)
    traffic = Traffic(path=_PROTOCOL.node_method, messages=(message,))
    amount = _amount(node, traffic, in_flight, seconds)
    clients = {
        "h2load": _h2load(node, Post(path=traffic.path, message=message), amount),
        "replay": _replay(node, traffic, amount),
    }
    samples: dict[str, list[Sample]] = {name: [] for name in clients}
    for name in turns(list(clients), rounds):
        samples[name].append(clients[name]())
    agree = True
    for figure, title in _FIGURES.items():
        theirs, ours = ([getattr(sample, figure) for sample in samples[name]] for name in clients)
        row = ratio(theirs, ours)
        agree = agree and row.agrees
        table.add_row(str(in_flight), title, row.theirs, row.ours, *row.ratios)
    own = statistics.median(sample.client_cpu_us or 0.0 for sample in samples["replay"])
    server = statistics.median(sample.server_cpu_us for sample in samples["replay"])
    agree = agree and own < server
    table.add_row(str(in_flight), "load generator's CPU / server's", "", f"{own:.1f}", f"{own / server:.3f}", "")
    return agree


def reconcile(node: Node, table: Table, in_flight: int, seconds: float) -> bool:
    """Replays 64 bodies of one row and 64 of one to four, and says whether the node has counted as many answers."""
    equal = True
    for title, make in (("one row", bodies.one_row), ("one to four rows", bodies.one_to_four_rows)):
        messages = make("openinference", _MODEL.name, _MODEL.input, _MODEL.shape)
        traffic = Traffic(path=_PROTOCOL.node_method, messages=messages)
        amount = _amount(node, traffic, in_flight, seconds)
        before = ok_answers(node.metrics)
        ok = replay.run(node.server.address, traffic, amount).ok
        counted = grown(node.metrics, before, ok)
        equal = equal and counted == ok
        table.add_row(str(in_flight), f"OK answers, {title}", str(counted), str(ok), f"{ok / max(counted, 1):.6f}")
    return equal


def ok_answers(metrics: str) -> int:
    """What a server's counter says of requests that it has answered with the status OK."""
    with urllib.request.urlopen(metrics, timeout=10) as response:  # noqa: S310 - a URL of this process's own
        text = response.read().decode()
    samples = (sample for family in parse(text) for sample in family.samples)
    return round(
        sum(
            sample.value
            for sample in samples
            if sample.name == "dl_inference_requests_total" and sample.labels["code"] == "OK"
        )
    )


def grown(metrics: str, before: int, by: int) -> int:
    """By how much the counter has grown since it was `before`; a counter that lags has five seconds to reach `by`."""
    deadline = time.monotonic() + _COUNTED_S
    while (growth := ok_answers(metrics) - before) < by and time.monotonic() < deadline:
        time.sleep(0.05)
    return growth


def _amount(node: Node, traffic: Traffic, in_flight: int, seconds: float) -> Load:
    """As many requests as take about so many seconds, once the server is warm."""
    few = Load(requests=4 * in_flight, clients=1, streams=in_flight)
    rate = replay.run(node.server.address, traffic, few).requests_per_s
    warm = Load(requests=max(round(rate * _WARM_UP_S), few.requests), clients=1, streams=in_flight)
    rate = replay.run(node.server.address, traffic, warm).requests_per_s
    return Load(requests=max(round(rate * seconds), few.requests), clients=1, streams=in_flight)


def _h2load(node: Node, post: Post, amount: Load) -> Callable[[], Sample]:
    answer_bytes = len(load.ask(node.server.address, post))

    def run() -> Sample:
        before = node.server.cpu_s()
        seen = load.run(node.server.address, post, answer_bytes, amount)
        used = node.server.cpu_s() - before
        return Sample(requests_per_s=seen.requests_per_s, server_cpu_us=used / amount.requests * 1e6)

    return run


def _replay(node: Node, traffic: Traffic, amount: Load) -> Callable[[], Sample]:
    def run() -> Sample:
        before = node.server.cpu_s()
        seen = replay.run(node.server.address, traffic, amount)
        used = node.server.cpu_s() - before
        return Sample(
            requests_per_s=seen.requests_per_s,
            server_cpu_us=used / amount.requests * 1e6,
            client_cpu_us=seen.cpu_us_per_request,
        )

    return run
