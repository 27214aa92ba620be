"""`python -m bench.agreement`: h2load and our clients, in turns, against the same server.

A server that takes 50 ms for each request and next to no CPU: no client is the limit, and none takes CPU from a server
that has much to do, as a client on grpc.aio does on two cores. The clients are `dl-inference-core bench` and the load
generator, `bench.replay`.

A node that serves a model, as in the benchmarks: the load generator alone beside h2load, and its counts beside the
node's (`bench.reconciling`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import click
from dl_inference_tools.load_testing.processes import Processes, started
from dl_inference_tools.load_testing.request import Message, Target
from dl_inference_tools.load_testing.results import Load
from rich.console import Console
from rich.table import Table

from bench import bodies, load, reconciling, replay
from bench.contract import METHOD
from bench.load import Post, Run
from bench.processes import announcing
from bench.replay import Traffic
from bench.rounds import turns

_FIGURES = {"requests_per_s": "requests/s", "mean_ms": "mean, ms", "p50_ms": "median, ms"}
_POST = Post(path=METHOD, message=bodies.of_bytes("tfserving", "echo", 600)[0])
_H2LOAD = "h2load"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=15, show_default=True, help="In each of which every client runs once.")
@click.option("--seconds", default=1.0, show_default=True, help="Of each run, about.")
@click.option("--delay-ms", default=50.0, show_default=True, help="How long the server takes for a request.")
@click.option("--in-flight", "in_flights", multiple=True, type=int, default=(8, 32), show_default=True)
def main(rounds: int, seconds: float, delay_ms: float, in_flights: tuple[int, ...]) -> None:
    """Print what h2load and each of our clients measured, and the ratio: the median of the rounds' own.

    Ends with status 1 if a ratio differs from 1 by more than 5 %: of throughput, mean and median latency beside the
    server that takes its time, of throughput and the server's CPU beside the node; or if the load generator has counted
    other than the node, or takes more CPU than the node.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        load.require_h2load()
        agree = _compare_all(console, rounds, seconds, delay_ms, in_flights)
        agree = _compare_replay(console, rounds, seconds, in_flights) and agree
    except load.LoadError as error:
        console.print(f"error: {error}", highlight=False)
        sys.exit(2)
    if not agree:
        sys.exit(1)


def _compare_all(console: Console, rounds: int, seconds: float, delay_ms: float, in_flights: tuple[int, ...]) -> bool:
    """Every client, with the server that takes its time."""
    message = Message(method=METHOD, body=_POST.message, contents="")
    table = Table("in flight", "figure", "h2load", "client", "client's", "ratio", "least and most of the rounds")
    agree = True
    with announcing(sys.executable, "-m", "bench.servers", "slow", str(delay_ms)) as server:
        answer = load.ask(server.address, _POST)
        target = Target(address=server.address)
        with started(target, message, processes=1, connections=1, open_loop=False) as processes:
            for in_flight in in_flights:
                amount = load.Load(
                    requests=round(seconds * in_flight / (delay_ms + 2) * 1000), clients=1, streams=in_flight
                )
                clients = {
                    _H2LOAD: _h2load(server.address, len(answer), amount),
                    "bench": _bench(processes, amount),
                    "load generator": _replay(server.address, answer, amount),
                }
                agree = _compare(table, clients, in_flight, rounds) and agree
    console.print(table)
    return agree


def _compare(table: Table, clients: Mapping[str, Callable[[], Run]], in_flight: int, rounds: int) -> bool:
    """Add rows for each client but h2load, and say whether all agree with h2load."""
    for client in clients.values():
        client()  # the connection, and whatever else is made at first
    runs: dict[str, list[Run]] = {name: [] for name in clients}
    for name in turns(list(clients), rounds):
        runs[name].append(clients[name]())
    agree = True
    for name in [name for name in clients if name != _H2LOAD]:
        for figure, title in _FIGURES.items():
            theirs, ours = ([getattr(run, figure) for run in runs[each]] for each in (_H2LOAD, name))
            row = reconciling.ratio(theirs, ours)
            agree = agree and row.agrees
            table.add_row(str(in_flight), title, row.theirs, name, row.ours, *row.ratios)
    return agree


def _compare_replay(console: Console, rounds: int, seconds: float, in_flights: tuple[int, ...]) -> bool:
    table = Table("in flight", "figure", "h2load", "load generator", "ratio", "least and most of the rounds")
    counts = Table("in flight", "figure", "server", "load generator", "ratio")
    agree = True
    with reconciling.node() as node:
        for in_flight in in_flights:
            agree = reconciling.compare(node, table, in_flight, rounds, seconds) and agree
            agree = reconciling.reconcile(node, counts, in_flight, seconds) and agree
    console.print(table)
    console.print(counts)
    return agree


def _h2load(address: str, answer_bytes: int, amount: load.Load) -> Callable[[], Run]:
    return lambda: load.run(address, _POST, answer_bytes, amount)


def _replay(address: str, answer: bytes, amount: load.Load) -> Callable[[], Run]:
    traffic = Traffic(path=_POST.path, messages=(_POST.message,), answers=(answer,))
    return lambda: replay.run(address, traffic, amount)


def _bench(processes: Processes, amount: load.Load) -> Callable[[], Run]:
    ours = Load(in_flight=amount.streams, requests=amount.requests, warm_up_s=0)

    def run() -> Run:
        row = processes.run(ours)
        if not row.good:
            raise load.LoadError("; ".join(row.notes()))
        figures = row.latency_ms
        return Run(
            requests_per_s=row.requests_per_s,
            mean_ms=figures["mean"],
            p50_ms=figures["p50"],
            p99_ms=figures["p99"],
        )

    return run


if __name__ == "__main__":
    main()
